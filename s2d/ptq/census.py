"""Every multiplication of a forward pass, seen where torch carries it out: under whatever name it was asked for.

An LSTM, ``torch.inner``, a scripted module or a function of one's own end in a few operations. Each tensor's memory is
followed back to what it was made of, so that a normalized or stacked weight still counts as that weight.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

# Matrix and dot products, convolutions, recurrent layers and fused attention, as torch names its operations.
_CONTRACTION = re.compile(
    r"\w*(mm|mv|_rnn|_rnn_layer)|\w*_attention\w*|v?dot|\w*convolution\w*|conv[123]d|_trilinear|_cdist_forward"
    r"|linear|bilinear|matmul|einsum|inner|tensordot|linalg_(vecdot|matmul|multi_dot)|lstm|gru"
)
# Where the left factor of a matrix product is: where it has a single column nothing is summed.
_LEFT = {"mm": 0, "bmm": 0, "addmm": 1, "baddbmm": 1}
_MULTIPLIES, _SUMS, _COPIES = {"mul", "mul_"}, {"sum", "mean", "nansum"}, {"_to_copy", "clone"}
# What a tensor was made of: names of parameters and buffers, and these. Nothing at all: constants.
DATA, NUMBERS = "the input", "whole numbers of the input"
Source = frozenset[str]
_NONE: Source = frozenset()


class Census(TorchDispatchMode):
    """Tells of every multiplication by a weight, or of two activations, that is summed; but for those it is told of.

    Args:
        model: whose parameters and buffers are the weights.
        found: ``found(function, weights)``, called for each: the function's name and the names of the weights (none
            for a product of two activations).

    Attributes:
        counts: False while something runs that is accounted for as a whole.

    Example:
        >>> layer, x = nn.Linear(2, 3), torch.randn(4, 2)
        >>> census = Census(layer, lambda function, weights: print(function, weights))
        >>> census.begin([x])
        >>> with torch.no_grad(), census:
        ...     _ = torch.inner(x, 2 * layer.weight)
        mm ['weight']

    Paper: none.
    """

    def __init__(self, model: nn.Module, found: Callable[[str, list[str]], None]) -> None:
        super().__init__()
        self.found, self.counts = found, True
        self._function: str | None = None  # that torch was asked for; "" if it is accounted for
        # By the address of a memory; the weak reference keeps the address from being used again.
        self._made: dict[int, tuple[StorageWeakRef, Source]] = {}
        self._elementwise: dict[int, tuple[StorageWeakRef, list[bool], Source]] = {}
        self._parameter_names = {name for name, _ in model.named_parameters()}
        held = [*model.named_parameters(), *model.named_buffers()]
        self._held = [(name, tensor) for name, tensor in held if tensor.is_floating_point()]

    def begin(self, batch: Iterable[Tensor]) -> None:
        """Start a forward pass with these inputs."""
        self._made.clear()
        self._elementwise.clear()
        for name, tensor in self._held:
            self._mark(tensor, frozenset([name]))
        for tensor in batch:
            self._mark(tensor, frozenset([DATA if tensor.is_floating_point() else NUMBERS]))

    @contextmanager
    def inside(self, function: str) -> Iterator[None]:
        """While a function of torch runs, by its name; "" for one that is accounted for."""
        before, self._function = self._function, function
        try:
            yield
        finally:
            self._function = before

    def parameters_in(self, tensor: Tensor) -> list[str]:
        """The parameters that a tensor was made of; none if the input has a part in it."""
        return [name for name in _weights(self._source(tensor)) if name in self._parameter_names]

    # --- what a tensor was made of

    def _mark(self, tensor: Tensor, source: Source) -> None:
        storage = _storage(tensor)
        if storage is not None:
            known = self._made.get(storage._cdata, (None, _NONE))[1]  # views and changes in place share a memory
            self._made[storage._cdata] = (StorageWeakRef(storage), _joined([known, source]))

    def _source(self, tensor: Tensor) -> Source:
        storage = _storage(tensor)
        return _NONE if storage is None else self._made.get(storage._cdata, (None, _NONE))[1]

    # --- operations

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        inputs = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        sources = [self._source(tensor) for tensor in inputs]
        result = operation(*args, **kwargs)
        outputs = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        namespace, _, name = operation.name().partition("::")
        name = name.partition(".")[0]
        if self.counts and self._function != "":
            self._count(namespace, name, inputs, sources)
            self._follow_elementwise(name, args, inputs, sources, outputs)
        source = _joined(sources)
        for tensor in outputs:
            self._mark(tensor, source)
        return result

    def _count(self, namespace: str, name: str, inputs: list[Tensor], sources: list[Source]) -> None:
        factors = [s for t, s in zip(inputs, sources, strict=True) if t.is_floating_point() and s - {NUMBERS}]
        if namespace not in ("aten", "prims"):  # an operator of someone's own may do anything
            if len(factors) > 1:
                self._tell(f"{namespace}::{name}", factors)
        elif factors and _CONTRACTION.fullmatch(name):
            left = _LEFT.get(name)
            outer = left is not None and inputs[left].shape[-1] == 1
            if not outer or self._parameter_names.intersection(*map(_weights, factors[-1:])):
                self._tell(name, factors)

    def _tell(self, name: str, factors: list[Source]) -> None:
        self.found(self._function or name, list(dict.fromkeys(w for source in factors for w in _weights(source))))

    def _follow_elementwise(
        self, name: str, args: tuple, inputs: list[Tensor], sources: list[Source], outputs: list[Tensor]
    ) -> None:
        """Notice what multiplies entry by entry and then sums: ``(x[..., None] * w).sum(-2)``."""
        if len(outputs) != 1 or not inputs or _storage(outputs[0]) is None:
            return
        output, storage = outputs[0], _storage(outputs[0])
        if name in _MULTIPLIES and len(inputs) == 2 and all(source - {NUMBERS} for source in sources):
            if not _same(*inputs):  # a square is no product of two
                both, weights = _vary_together(*inputs, output), frozenset(w for s in sources for w in _weights(s))
                self._elementwise[storage._cdata] = (StorageWeakRef(storage), both, weights)
            return
        before = _storage(inputs[0])
        known = None if before is None else self._elementwise.get(before._cdata)
        if known is None:
            return
        _, both, weights = known
        if name in _SUMS:
            dims = args[1] if len(args) > 1 and isinstance(args[1], (list, tuple)) and args[1] else range(len(both))
            if any(both[dim] for dim in dims):
                self.found("multiply and sum", sorted(weights))
        elif name in _COPIES or storage._cdata == before._cdata:  # a copy or a view
            same = output.shape == inputs[0].shape and len(both) == output.ndim
            both = both if same else [any(both)] * output.ndim
            self._elementwise[storage._cdata] = (StorageWeakRef(storage), both, weights)


def _storage(tensor: Tensor) -> torch.UntypedStorage | None:
    """Its memory; None for a tensor that has none of its own (a sparse one)."""
    try:
        return tensor.untyped_storage()
    except (NotImplementedError, RuntimeError):
        return None


def _weights(source: Source) -> list[str]:
    return [] if DATA in source else sorted(source - {NUMBERS})


def _joined(sources: Iterable[Source]) -> Source:
    """What is made of several: the input hides the weights, and so does picking from them by it."""
    joined = _NONE.union(*sources)
    picked = NUMBERS in joined and len(joined) > 1
    return frozenset([DATA]) if DATA in joined or picked else joined


def _same(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and a.data_ptr() == b.data_ptr() and a.stride() == b.stride()


def _vary_together(a: Tensor, b: Tensor, output: Tensor) -> list[bool]:
    """For each dimension of the output, whether both factors have entries of their own along it."""

    def varies(tensor: Tensor) -> list[bool]:
        own = [size > 1 and stride != 0 for size, stride in zip(tensor.shape, tensor.stride(), strict=True)]
        return [False] * (output.ndim - tensor.ndim) + own

    return [x and y for x, y in zip(varies(a), varies(b), strict=True)]
