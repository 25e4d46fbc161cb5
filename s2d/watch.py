"""Gathering the outlier activations of training forward passes, as they happen."""

from __future__ import annotations

import sys
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from s2d.distributed import is_dtensor, local, whole_activations
from s2d.layers import LinearMap
from s2d.outliers import OutlierRows


class OutlierWatch:
    """Keeps the outlier activations that some linear maps see while :attr:`active`.

    In training only forward passes that will be differentiated count: evaluation under ``torch.no_grad()`` is ignored,
    and the second forward pass of activation checkpointing, inside ``backward()``, counts only where the first had no
    gradients. The hooks stay on the modules but do nothing while inactive, so a compiled model has two variants, with
    and without, and does not compile anew; in blocks that are compiled one by one inside activation checkpointing an
    activation counts twice. A copy of the model (an EMA, a pickle) carries hooks that do nothing, and inside the
    function transforms of ``torch.func`` they do nothing either: what passes there are no plain activations.

    Args:
        maps: name to the maps that share one weight.
        capacity: how many activations to keep for each name.
        training_only: whether forward passes without gradients are ignored.

    Attributes:
        rows: name to :class:`s2d.outliers.OutlierRows`.
        active: whether forward passes are watched now.

    Example:
        >>> layer = nn.Linear(2, 2, bias=False)
        >>> watch = OutlierWatch({"fc": [LinearMap("fc", layer)]}, capacity=1)
        >>> watch.attach()
        >>> watch.start()
        >>> y = layer(torch.eye(2))
        >>> bool(watch.rows["fc"].magnitude[0] == y.abs().max())
        True

    Paper: main text, PCDR ("outlier activations"; second-hand).
    """

    def __init__(self, maps: Mapping[str, Sequence[LinearMap]], capacity: int, *, training_only: bool = True) -> None:
        self.maps, self.training_only = maps, training_only
        self.rows = {name: OutlierRows(capacity) for name in maps}
        self.active = False
        self._seen: set[int] = set()  # modules whose forward pass was watched outside backward()
        self._handles: list[Any] = []
        self._hooks: list[_Hook] = []

    def __getstate__(self) -> dict[str, Any]:
        """A copy watches nothing until it is attached: the hooks are those of the modules of the original."""
        return vars(self) | {"_handles": [], "_hooks": [], "active": False}

    def attach(self) -> None:
        """Hook every module."""
        # Code that torch.compile made before would go on without the hooks: it does not look for new ones.
        if "torch._dynamo" in sys.modules:
            torch.compiler.reset()
        for name, twins in self.maps.items():
            for linear in twins:
                # A pre-hook sees the input as the layer will: under FSDP2 the weight is whole at this moment, under
                # tensor parallelism the input has its layout.
                hook = _Hook(self, name, linear)
                self._hooks.append(hook)
                self._handles.append(linear.module.register_forward_pre_hook(hook, with_kwargs=True))

    def detach(self) -> None:
        """Remove the hooks; what was seen stays."""
        while self._handles:
            self._handles.pop().remove()
        self._hooks.clear()
        self.active = False

    def start(self, names: Collection[str] | None = None) -> None:
        """Watch from the next forward pass on, with empty buffers.

        Args:
            names: which maps; by default all.
        """
        self.clear()
        for hook in self._hooks:
            hook.chosen = names is None or hook.name in names
        for name, twins in self.maps.items():
            if names is not None and name not in names:
                continue
            weight = local(twins[0].weight)
            self.rows[name].allocate(twins[0].shape[1], weight.dtype, weight.device)
        self.active = True

    def clear(self) -> None:
        """Forget what was seen."""
        self._seen.clear()
        for rows in self.rows.values():
            rows.clear()

    def was_called(self, name: str) -> bool:
        """Whether a forward pass came to a map since :meth:`start`, whatever it brought; not known of compiled code."""
        return any(id(linear.module) in self._seen for linear in self.maps[name])

    @torch.no_grad()
    def see(self, name: str, linear: LinearMap, x: Tensor) -> None:
        """Merge the input of one forward pass; the output without bias is computed here."""
        if not torch.compiler.is_compiling() and (in_function_transform() or self._is_repetition(linear.module)):
            return
        if is_dtensor(linear.weight):
            seen = whole_activations(name, linear, x)
            if seen is None:  # another rank of the tensor-parallel group contributes the same activations
                return
            x, y = seen
        else:
            x = x if torch.compiler.is_compiling() else _in_dtype_of(linear, x)
            y = x @ linear.matrix().T
        self.rows[name].update(x, y)

    def _is_repetition(self, module: nn.Module) -> bool:
        """Whether this is the second forward pass of activation checkpointing, and the first was seen."""
        if torch._C._current_graph_task_id() != -1:  # inside backward(), as torch.utils.checkpoint itself asks
            return id(module) in self._seen
        self._seen.add(id(module))
        return False


def _in_dtype_of(linear: LinearMap, x: Tensor) -> Tensor:
    """The input as a layer that casts it would have it; one that does not cannot be called, and that has to be said."""
    wanted, autocast = linear.weight.dtype, torch.is_autocast_enabled(x.device.type)
    if x.dtype == wanted or autocast:
        return x
    if type(linear.module).forward is nn.Linear.forward:
        raise ValueError(
            f"layer {linear.name or 'Linear'} has {wanted} weights and is given {x.dtype}: cast the input or the "
            "model, or train under torch.autocast"
        )
    return x.to(wanted)


def in_function_transform() -> bool:
    """Whether a transform of ``torch.func`` (grad, jvp, vmap, ...) is under way.

    Example:
        >>> in_function_transform()
        False

    Paper: none.
    """
    return torch._C._functorch.peek_interpreter_stack() is not None


class _Hook:
    """The forward pre-hook of one map; copies and pickles of it are inert."""

    def __init__(self, watch: OutlierWatch, name: str, linear: LinearMap) -> None:
        self.watch, self.name, self.linear = watch, name, linear
        self.chosen = True

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self.watch.active and self.chosen and (torch.is_grad_enabled() or not self.watch.training_only):
            self.watch.see(self.name, self.linear, self.linear.input(args, kwargs))

    def __reduce__(self) -> tuple[Any, ...]:
        return _InertHook, ()


class _InertHook:
    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        return None
