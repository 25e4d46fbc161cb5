"""A forward pass, watched: which layers, products and norms a model has, and what feeds what.

Nothing here knows the name of any architecture. A model is run while every torch function it calls is seen, with
the module that calls it; results carry a mark of where they came from.
"""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from s2d.layers import is_conv1d_of_gpt2
from s2d.ptq.attention import call_kind
from s2d.ptq.census import Census
from s2d.ptq.sites import CONVOLUTIONS, factors, positional

MARK = "_s2d_origin"
_ATTENTION = F.scaled_dot_product_attention  # as torch made it, whatever a library puts in its place later

# Functions that move entries about, and leave each one, and the channels' place at the end, as they are.
_MOVES = {
    "view", "reshape", "permute", "transpose", "contiguous", "flatten", "unflatten", "squeeze", "unsqueeze", "to",
    "clone", "type_as", "float", "half", "bfloat16", "double", "expand", "repeat", "roll", "dropout", "__getitem__",
    "select", "detach", "view_as", "flip", "index_select", "pad", "_pad", "movedim", "swapaxes", "narrow", "alias",
}  # fmt: skip
_SHAPES = {
    "size", "stride", "zeros_like", "ones_like", "empty_like", "full_like", "new_zeros", "new_ones", "new_empty",
    "new_full",
}  # fmt: skip
# Those of the moves that may reorder the channels, or take some for others.
_PICKS = {
    "roll", "flip", "index_select", "select", "narrow", "__getitem__", "transpose", "permute", "movedim", "swapaxes",
}  # fmt: skip


@dataclass
class Origin:
    """Where a tensor came from: a GELU, or a norm (by name, with the number of entries of its whole output)."""

    kind: str
    norm: str | None = None
    numel: int = 0


@dataclass
class Trace:
    """What the forward passes showed.

    Attributes:
        layers: name to module, the Linear layers and convolutions that were called as such, in the order of calls.
        after: layer to ``"gelu"`` or ``"norm"`` where its input came straight from one.
        norm: layer to the norm that feeds it, if that norm feeds Linear layers only.
        plans: attention to its products in the order of one call, each ``"qk"``, ``"pv"`` or None (neither).
        kinds: ``nn.MultiheadAttention`` to how it is called (see :data:`s2d.ptq.attention.KINDS`).
        direct: module to its Linear layers whose weight it uses without calling them.
        uncalled: layers that exist and were not called.
        problems: module to what keeps it from being quantized.
        left_out: what computes with weights or multiplies activations and is none of the above, one line each.
    """

    layers: dict[str, nn.Module] = field(default_factory=dict)
    after: dict[str, str] = field(default_factory=dict)
    norm: dict[str, str] = field(default_factory=dict)
    plans: dict[str, list[str | None]] = field(default_factory=dict)
    kinds: dict[str, str] = field(default_factory=dict)
    direct: dict[str, list[str]] = field(default_factory=dict)
    uncalled: list[str] = field(default_factory=list)
    problems: dict[str, str] = field(default_factory=dict)
    left_out: list[str] = field(default_factory=list)


def is_layer(module: nn.Module) -> bool:
    """Whether a module is a Linear layer or a convolution whose forward is the plain product."""
    plain = next((kind for kind in (nn.Linear, *CONVOLUTIONS) if isinstance(module, kind)), None)
    if plain is None and not is_conv1d_of_gpt2(module):
        return False
    forward = type(module).forward
    own = module.__dict__.get("forward", forward)  # one that was set on the instance
    if own is not forward and getattr(own, "__func__", None) is not forward:
        return False
    return plain is None or forward is plain.forward


def _is_norm(module: nn.Module) -> bool:
    named = type(module).__name__.lower().endswith(("layernorm", "rmsnorm", "layernorm2d"))
    return isinstance(module, (nn.LayerNorm, nn.RMSNorm)) or (named and not list(module.children()))


class _Watcher(TorchFunctionMode):
    """The mode that sees every torch function; with hooks that keep the stack of modules."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.names = {module: name for name, module in model.named_modules()}
        self.census = Census(model, self._leave_out_contraction)
        self.stack: list[nn.Module] = [model]
        self.trace = Trace()
        self.origins: dict[str, list[tuple[Origin | None, int]]] = {}
        self.shared_norms: set[str] = set()  # norms whose output something other than a Linear layer reads
        # Module to the products of each of its calls: the kind, and the size of the scores (made or used).
        self.made: dict[str, list[list[tuple[str | None, int]]]] = {}
        # Module to what to call its products, by their place in a call: those with something made of weights.
        self.words: dict[str, dict[int, str]] = {}

    # --- modules

    def entered(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        self.stack.append(module)
        self._ask_census()
        name = self.names[module]
        self.made.setdefault(name, []).append([])
        if isinstance(module, nn.MultiheadAttention):
            named = dict(zip(("query", "key", "value"), args, strict=False)) | kwargs
            kind = call_kind(module, named["query"], named["key"], named["value"])
            if self.trace.kinds.setdefault(name, kind) != kind:
                self.trace.problems[name] = "is called with queries, keys and values shared in different ways"
        elif is_layer(module):
            self._called(name, module, (*args, *kwargs.values())[0])

    def _called(self, name: str, layer: nn.Module, x: Tensor) -> None:
        self.trace.layers.setdefault(name, layer)
        origin = getattr(x, MARK, None)
        self.origins.setdefault(name, []).append((origin, x.numel()))

    def left(self, module: nn.Module, args: tuple, output) -> None:
        self.stack.pop()
        self._ask_census()
        if _is_norm(module) and isinstance(output, Tensor):
            setattr(output, MARK, Origin("norm", self.names[module], output.numel()))

    # --- functions

    def __torch_function__(self, function, types, args=(), kwargs=None):
        args, kwargs = positional(function, args, kwargs)
        tensors = [t for a in (*args, *kwargs.values()) for t in (a if isinstance(a, (list, tuple)) else [a])]
        tensors = [t for t in tensors if isinstance(t, Tensor)]
        marks = [(t, getattr(t, MARK)) for t in tensors if getattr(t, MARK, None) is not None]
        direct = function is F.linear and self._direct(args, kwargs)
        followed = direct or self._product(function, args)
        with self.census.inside("" if followed else getattr(function, "__name__", "a function")):
            result = function(*args, **kwargs)
        last = self.made.get(self.names[self.stack[-1]], [[]])[-1]
        if last[-1:] == [(None, 0)] and isinstance(result, Tensor):  # the product just made: now its size is known
            last[-1] = (None, result.numel())
        if isinstance(result, (Tensor, tuple, list)) and not direct:
            self._pass_on(function, args, kwargs, marks, result)
        return result

    def _pass_on(self, function, args: tuple, kwargs: dict, marks: list[tuple[Tensor, Origin]], result) -> None:
        name = getattr(function, "__name__", "")
        parts = [result] if isinstance(result, Tensor) else result
        if name in _SHAPES or not any(isinstance(part, Tensor) for part in parts):
            return  # about shapes, not data
        if isinstance(result, Tensor):
            if function is F.gelu:
                setattr(result, MARK, Origin("gelu"))
            elif hasattr(result, MARK) and not (name in _MOVES and marks):
                delattr(result, MARK)  # changed in place
        innermost = self.stack[-1]
        for tensor, origin in marks:
            moved = name in _MOVES and isinstance(result, Tensor)
            if moved and _keeps_channels(function, args, kwargs, tensor, result):
                setattr(result, MARK, origin)
            elif origin.norm is not None and not is_layer(innermost):
                self.shared_norms.add(origin.norm)

    def _direct(self, args: tuple, kwargs: dict) -> bool:
        """Whether this is a module's own use of the weight of one of its Linear layers."""
        owner = self.stack[-1]
        named = dict(zip(("input", "weight"), args, strict=False)) | kwargs
        for child, layer in owner.named_children():
            if isinstance(layer, nn.Linear) and is_layer(layer) and layer.weight is named["weight"]:
                known = self.trace.direct.setdefault(self.names[owner], [])
                if child not in known:
                    known.append(child)
                self._called(self.names[layer], layer, named["input"])
                return True
        return False

    def _product(self, function, args: tuple) -> bool:
        """Whether this is a product that a site can stand at, which is noted."""
        if self._in_layer():
            return False
        calls = self.made.setdefault(self.names[self.stack[-1]], [[]])
        if function is _ATTENTION:
            calls[-1] += [("qk", 0), ("pv", 0)]
            return True
        places = factors(function, args)
        if places is None:
            return False
        left, right = (args[place] for place in places)
        weights = self.census.parameters_in(left) or self.census.parameters_in(right)
        name = getattr(function, "__name__", "product")
        words = "" if not weights else self._words(name, weights)
        calls[-1].append(("pv", left.numel()) if _are_probabilities(left) else (None, 0))
        self.words.setdefault(self.names[self.stack[-1]], {})[len(calls[-1]) - 1] = words
        return True

    def _in_layer(self) -> bool:
        """Whether what runs now is a part of something that gets a site, or is taken apart, as a whole."""
        return any(is_layer(module) or isinstance(module, nn.MultiheadAttention) for module in self.stack)

    def _ask_census(self) -> None:
        self.census.counts = not self._in_layer()

    def _leave_out_contraction(self, function: str, weights: list[str]) -> None:
        """Name a function that multiplies, called by the innermost module, in floating point."""
        self._leave_out(self._words(function, weights))

    def _words(self, function: str, weights: list[str]) -> str:
        what = f"with {', '.join(weights)}" if weights else "of two activations"
        return f"{function.strip('_')} {what}, called directly by {self._label(self.stack[-1])}"

    def _label(self, module: nn.Module) -> str:
        return f"{self.names[module] or 'the model'} ({type(module).__name__})"

    def _leave_out(self, line: str) -> None:
        if line not in self.trace.left_out:
            self.trace.left_out.append(line)

    # --- the end

    def finish(self, model: nn.Module, output) -> Trace:
        trace = self.trace
        for tensor in tensors_of(output):  # the caller reads it too
            origin = getattr(tensor, MARK, None)
            if origin is not None and origin.norm is not None:
                self.shared_norms.add(origin.norm)
        consumers: dict[str, list[str]] = {}
        whole: set[str] = set()
        for name, calls in self.origins.items():
            kinds = {origin and origin.kind for origin, _ in calls}
            norms = {origin and origin.norm for origin, _ in calls}
            if len(kinds) == 1 and None not in kinds:
                trace.after[name] = kinds.pop()
            if len(norms) > 1 or isinstance(trace.layers[name], CONVOLUTIONS):
                self.shared_norms |= norms - {None}
            for norm in norms - {None}:
                consumers.setdefault(norm, []).append(name)
                if all(origin.numel == numel for origin, numel in calls if origin is not None):
                    whole.add(norm)
        for norm, layers in consumers.items():
            # Layers that read different tokens: one of them must read all.
            if norm not in self.shared_norms and (len(layers) == 1 or norm in whole):
                trace.norm |= dict.fromkeys(layers, norm)
        for name, calls in self.made.items():
            plans = [_paired(call) for call in calls if call]
            if not plans:
                continue
            if any(plan != plans[0] for plan in plans):
                trace.problems[name] = "makes other products in one call than in another"
                continue
            module = model.get_submodule(name)
            if any(plans[0]):
                trace.plans[name] = plans[0]
            for position, kind in enumerate(plans[0]):
                if kind is None:
                    words = f"a product of two activations that is no attention, in {self._label(module)}"
                    self._leave_out(self.words.get(name, {}).get(position) or words)
        for name, module in model.named_modules():
            if is_layer(module) and name not in trace.layers:
                inside = any(name.startswith(f"{attention}.") for attention in trace.kinds)
                if not inside:
                    trace.uncalled.append(name)
            elif isinstance(module, (nn.Linear, *CONVOLUTIONS)) and not is_layer(module):
                self._leave_out(f"{self._label(module)} has a forward of its own")
        return trace


def _keeps_channels(function, args: tuple, kwargs: dict, before: Tensor, after: Tensor) -> bool:
    """Whether the last dimension still holds the same channels in their order, and none was added."""
    if function.__name__.endswith("pad"):
        return after.shape == before.shape
    if after.shape[-1:] != before.shape[-1:] or function.__name__ not in _PICKS:
        return after.shape[-1:] == before.shape[-1:]
    # The channels' own numbers must come out in order.
    numbers = torch.arange(before.shape[-1], device=before.device, dtype=before.dtype)
    ramp = numbers.expand(before.shape)
    moved = function(*(ramp if a is before else a for a in args), **kwargs)
    return bool((moved == numbers).all())


def _are_probabilities(tensor: Tensor) -> bool:
    total = tensor.float().sum(-1)
    tolerance = max(1e-3, torch.finfo(tensor.dtype).eps)
    return bool((tensor >= 0).all()) and torch.allclose(total, torch.ones_like(total), atol=tolerance)


def _paired(call: list[tuple[str | None, int]]) -> list[str | None]:
    """Mark for each product with probabilities the one that made them: the first before it of their size."""
    kinds = [kind for kind, _ in call]
    for position, (kind, size) in enumerate(call):
        earlier = [i for i in range(position) if kinds[i] is None and call[i][1] == size]
        if kind == "pv" and earlier:
            kinds[earlier[0]] = "qk"
    return kinds


def tensors_of(output) -> list[Tensor]:
    """The tensors of a model's output, which may be nested in tuples and mappings."""
    if isinstance(output, Tensor):
        return [output]
    if dataclasses.is_dataclass(output):
        output = list(vars(output).values())
    if isinstance(output, dict) or hasattr(output, "values"):
        output = list(output.values())
    return [t for part in output for t in tensors_of(part)] if isinstance(output, (tuple, list)) else []


def call(model: nn.Module, batch):
    """The model's output for a batch: a tensor, a tuple of positional or a mapping of keyword arguments."""
    if isinstance(batch, dict) or hasattr(batch, "keys"):
        return model(**batch)
    return model(*batch) if isinstance(batch, (tuple, list)) else model(batch)


@torch.no_grad()
def trace(model: nn.Module, batches: list) -> tuple[Trace, list[Tensor]]:
    """Run a model and note what it is made of.

    Args:
        model: in evaluation mode; left as it was.
        batches: what the model is called with (see :func:`call`), one after the other.

    Returns:
        The trace, and the tensors of the model's output for the first batch.

    Example:
        >>> model = nn.Sequential(nn.LayerNorm(4), nn.Linear(4, 8), nn.GELU(), nn.Linear(8, 2)).eval()
        >>> found, _ = trace(model, [torch.randn(3, 4)])
        >>> found.after, found.norm
        ({'1': 'norm', '3': 'gelu'}, {'1': '0'})

    Paper: none.
    """
    watcher = _Watcher(model)
    with regular_attention():  # unwatched: kernels may be chosen otherwise while every operation is seen
        expected = tensors_of(call(model, batches[0]))
    outputs = []
    handles = [
        handle
        for module in list(model.modules())
        if not isinstance(module, torch.jit.ScriptModule)  # which takes no hooks; the census sees into it
        for handle in (
            module.register_forward_pre_hook(watcher.entered, with_kwargs=True, prepend=True),
            module.register_forward_hook(watcher.left),
        )
    ]
    try:
        for batch in batches:
            watcher.census.begin(tensors_of(batch))
            with watcher, watcher.census, regular_attention():
                outputs.append(call(model, batch))
    finally:
        for handle in handles:
            handle.remove()
    return watcher.finish(model, outputs), expected


class _FastPath:
    """Torch's switch is one for all threads: off while anyone wants it off, then as it was."""

    lock, wanted_off, before = threading.Lock(), 0, True


@contextmanager
def regular_attention() -> Iterator[None]:
    """Switch off torch's fused path of ``nn.MultiheadAttention`` in evaluation, whose sums come in another order."""
    with _FastPath.lock:
        if _FastPath.wanted_off == 0:
            _FastPath.before = torch.backends.mha.get_fastpath_enabled()
        _FastPath.wanted_off += 1
        torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        with _FastPath.lock:
            _FastPath.wanted_off -= 1
            if _FastPath.wanted_off == 0:
                torch.backends.mha.set_fastpath_enabled(_FastPath.before)
