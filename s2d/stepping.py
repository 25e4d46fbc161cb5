"""What really steps a weight: the optimizer inside its wrappers, wider copies inside an optimizer, at what rate."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from s2d import distributed
from s2d.rounding import is_low_precision

SEARCH_DEPTH, SEARCH_OBJECTS = 8, 100_000  # how far inside an optimizer copies of weights are looked for


def unwrap_optimizer(optimizer: Any) -> torch.optim.Optimizer:
    """The torch optimizer that does the step: inside the wrappers of accelerate, Lightning and timm, SAM, Lookahead.

    An optimizer inside another counts when it steps all the parameters of the outer one.

    Raises:
        ValueError: for anything that runs no step hooks.

    Example:
        >>> inner = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.1)
        >>> class Wrapper:
        ...     def __init__(self, optimizer):
        ...         self.optimizer = optimizer
        >>> unwrap_optimizer(Wrapper(inner)) is inner
        True

    Paper: none.
    """
    for attribute in ("optimizer", "_base_optimizer"):
        inner = getattr(optimizer, attribute, None)
        if isinstance(inner, torch.optim.Optimizer) and inner is not optimizer:
            return unwrap_optimizer(inner)
    outer = isinstance(optimizer, torch.optim.Optimizer)
    for inner in _optimizers_inside(optimizer):
        if not outer or _parameters(optimizer) <= _parameters(inner):
            return unwrap_optimizer(inner)
    # torch marks the step methods whose hooks it runs; a class that skips Optimizer.__init__ would never call ours.
    if not outer or not getattr(type(optimizer).step, "hooked", False):
        raise ValueError(
            f"attach() was given {type(optimizer).__name__}, which does not run step hooks: give the torch optimizer "
            "inside it"
        )
    return optimizer


def _parameters(optimizer: torch.optim.Optimizer) -> set[int]:
    return {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}


def _optimizers_inside(holder: Any) -> list[torch.optim.Optimizer]:
    """The optimizers that a wrapper holds itself, or in an object or a list that it holds."""
    found = held(holder, torch.optim.Optimizer, depth=3)
    return [other for other in found if other is not holder and getattr(type(other).step, "hooked", False)]


def held(holder: Any, kind: type, *, depth: int = SEARCH_DEPTH) -> Iterator[Any]:
    """Objects of a kind inside another, in its attributes, lists and dictionaries; modules are not entered.

    Example:
        >>> list(held({"a": [1, torch.ones(1)]}, Tensor))
        [tensor([1.])]

    Paper: none.
    """
    queue, known = deque([(holder, 0)]), {id(holder)}
    while queue and len(known) < SEARCH_OBJECTS:
        entry, level = queue.popleft()
        if isinstance(entry, kind) and entry is not holder:
            yield entry
        if level == depth:
            continue
        for part in _parts(entry):
            if id(part) not in known:
                known.add(id(part))
                queue.append((part, level + 1))


def _parts(entry: Any) -> list[Any]:
    if isinstance(entry, Mapping):
        return list(entry.values())
    if isinstance(entry, (list, tuple, set)):
        return list(entry)
    optimizer = isinstance(entry, torch.optim.Optimizer)
    closed = isinstance(entry, (Tensor, nn.Module, type)) or (callable(entry) and not optimizer)
    return [] if closed or not hasattr(entry, "__dict__") else list(vars(entry).values())


def find_masters(optimizer: torch.optim.Optimizer, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Wider copies of low-precision weights inside an optimizer, which will overwrite the weights.

    A copy is a tensor of the same shape and a wider dtype that rounds to exactly the weight.

    Args:
        optimizer: whose state and attributes are searched.
        weights: name to weight.

    Returns:
        Name to copy, for the weights that have one.

    Example:
        >>> weight = torch.rand(3, 2).bfloat16().requires_grad_()
        >>> optimizer = torch.optim.SGD([weight], lr=0.1)
        >>> optimizer.state[weight]["master"] = weight.detach().float()
        >>> list(find_masters(optimizer, {"w": weight}))
        ['w']

    Paper: none.
    """
    low = {name: distributed.local(weight.detach()) for name, weight in weights.items() if is_low_precision(weight)}
    if not low:
        return {}
    wide: dict[tuple[Any, ...], list[Tensor]] = {}
    for tensor in held(optimizer, Tensor):
        part = distributed.local(tensor.detach())
        if part.dtype in (torch.float32, torch.float64) and not part.is_meta:
            wide.setdefault((tuple(part.shape), part.device), []).append(part)
    found = {}
    for name, weight in low.items():
        if weight.any():  # zeros are also what a fresh momentum holds
            for part in wide.get((tuple(weight.shape), weight.device), []):
                if torch.equal(part.to(weight.dtype), weight):
                    found[name] = part
                    break
    return found


def check_rate(group: Mapping[str, Any]) -> float:
    """The learning rate of a parameter group, as a float.

    Raises:
        ValueError: if it has none (an optimizer of relative step sizes).

    Example:
        >>> check_rate({"lr": 0.5})
        0.5

    Paper: none.
    """
    rate = group.get("lr")
    if rate is None:
        raise ValueError(
            "the optimizer's lr is None (it chooses its step sizes itself), and coupling='decoupled' is that times the "
            "penalty: give the optimizer an lr, or use coupling='gradient'"
        )
    return float(rate)
