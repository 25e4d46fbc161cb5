"""An independent copy of any model: compiled, pruned, patched on the instance, or holding tensors of a graph."""

from __future__ import annotations

import copy
from functools import partial
from types import CellType, FunctionType, MethodType
from typing import Any

from torch import Tensor, nn
from torch.overrides import TorchFunctionMode


class _Detaching(TorchFunctionMode):
    """Copies a tensor that is the result of a computation, which torch refuses, as its values."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is Tensor.__deepcopy__ and not args[0].is_leaf:
            tensor, memo = args
            if id(tensor) not in memo:
                memo[id(tensor)] = tensor.detach().clone()
            return memo[id(tensor)]
        return function(*args, **(kwargs or {}))


def independent_copy(model: nn.Module) -> nn.Module:
    """A copy of a model that shares nothing with it, compiled modules replaced by what they were compiled from.

    A ``forward`` that was set on an instance is the copy's own, also where it is a function around the old one, as
    accelerate's is; tensors that a computation left behind (a pruned weight) become plain ones.

    Args:
        model: left untouched.

    Example:
        >>> layer = nn.Linear(2, 2)
        >>> _ = nn.utils.prune.l1_unstructured(layer, "weight", amount=1)  # its weight is a computed tensor now
        >>> bool((independent_copy(layer).weight == layer.weight).all())
        True

    Paper: none.
    """
    memo: dict[int, Any] = {}
    with _Detaching():
        for module in reversed(list(model.modules())):  # the inner ones first, before what holds them is copied
            if isinstance(getattr(module, "_orig_mod", None), nn.Module):
                memo[id(module)] = copy.deepcopy(_uncompiled(module), memo)
        copied = copy.deepcopy(model, memo)
    for module in copied.modules():
        if getattr(module, "_compiled_call_impl", None) is not None:  # of module.compile()
            module._compiled_call_impl = None
        for name in ("forward", "_old_forward"):
            if isinstance(module.__dict__.get(name), FunctionType):
                module.__dict__[name] = copied_function(module.__dict__[name], memo)
        _without_device_hook(module)
    return copied


def _uncompiled(module: nn.Module) -> nn.Module:
    while isinstance(getattr(module, "_orig_mod", None), nn.Module):
        module = module._orig_mod
    return module


def copied_function(function: Any, memo: dict[int, Any]) -> Any:
    """A copy that speaks of the copies of the modules it closed over; ``copy.deepcopy`` leaves functions as they are.

    Args:
        function: any callable, left untouched.
        memo: of the copy that is being made, as ``copy.deepcopy`` has it.

    Example:
        >>> layer = nn.Linear(2, 2)
        >>> def around(x):
        ...     return layer(x)
        >>> copied_function(around, {}) is around  # at the top level of a file there is nothing to close over
        True

    Paper: none.
    """
    if not isinstance(function, FunctionType):
        return copy.deepcopy(function, memo)
    if function.__closure__ is None:
        return function
    if id(function) not in memo:
        cells = [CellType() for _ in function.__closure__]
        new = FunctionType(
            function.__code__, function.__globals__, function.__name__, function.__defaults__, tuple(cells)
        )
        new.__kwdefaults__, new.__dict__ = function.__kwdefaults__, dict(function.__dict__)
        memo[id(function)] = new  # before its cells: a function may close over itself
        for cell, old in zip(cells, function.__closure__, strict=True):
            found = old.cell_contents
            moved = isinstance(found, (nn.Module, MethodType, FunctionType, partial))
            cell.cell_contents = copied_function(found, memo) if moved else found
    return memo[id(function)]


def _without_device_hook(module: nn.Module) -> None:
    """Give back the class's forward where accelerate's hook that only moves tensors between devices is around it."""
    old, hook = module.__dict__.get("_old_forward"), module.__dict__.get("_hf_hook")
    if type(hook).__name__ == "AlignDevicesHook" and getattr(old, "__func__", None) is type(module).forward:
        for name in ("forward", "_old_forward", "_hf_hook"):
            module.__dict__.pop(name, None)
