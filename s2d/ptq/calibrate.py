"""Calibration data, and what each site sees of it in the floating-point model."""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from s2d.ptq.quantizers import all_finite
from s2d.ptq.sites import Site, mode, sites
from s2d.ptq.trace import call

GIB = 2**30


def split_batches(calibration: Any, batch_size: int, device: torch.device | None = None) -> list[Any]:
    """Cut calibration data into batches, each something the model can be called with.

    Args:
        calibration: a tensor ``(N, ...)``; a tuple (positional arguments) or a mapping (keyword arguments) of tensors
            with the same N, which may be nested (``({"x": x},)`` for a model that takes a mapping), other values being
            passed on as they are; or a list of such batches, taken as it is.
        batch_size: N of a batch, at least 1.
        device: where the batches are put; None leaves them where they are.

    Raises:
        ValueError: for data of another form, that is empty, or that holds NaN or infinity (but for attention masks,
            whose entries are minus infinity or nothing above zero).

    Example:
        >>> [len(batch) for batch in split_batches(torch.zeros(5, 3), 2)]
        [2, 2, 1]

    Paper: none.
    """
    if isinstance(calibration, list):
        if not calibration:
            raise ValueError("the calibration set is empty: give at least one image")
        return [_checked(part, device) for part in calibration]
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}: give at least 1")
    whole, lengths = _checked(calibration, device), _lengths(calibration)
    if len(lengths) > 1:
        raise ValueError(
            f"the tensors of the calibration data differ in length: {lengths}; give a list of batches, each as "
            "the model is called"
        )
    return [_slice(whole, lengths[0], start, start + batch_size) for start in range(0, lengths[0], batch_size)]


def _checked(batch: Any, device: torch.device | None) -> Any:
    """A batch on its device, neither empty nor with NaN."""
    if min(_lengths(batch), default=0) == 0:
        raise ValueError("the calibration set is empty: give at least one image")
    if not all(all_finite(tensor) or _is_mask(tensor) for tensor in _tensors(batch)):
        raise ValueError("the calibration set holds NaN or infinity: check the images")
    return _mapped(batch, lambda value: value.to(device) if isinstance(value, Tensor) else value)


def _is_mask(tensor: Tensor) -> bool:
    """Whether this is what is added to attention logits: minus infinity for what is hidden, else nothing above zero."""
    return bool((tensor <= 0).all()) and bool((tensor > -math.inf).any())


def _tensors(batch: Any) -> list[Tensor]:
    """All tensors of a batch, however deep in sequences, mappings and dataclasses."""
    if isinstance(batch, Tensor):
        return [batch]
    return [tensor for value in _parts(batch).values() for tensor in _tensors(value)]


def _parts(value: Any) -> dict[Any, Any]:
    """What a container holds, by key, position or field; nothing for anything else."""
    if isinstance(value, Mapping):
        return dict(value.items())
    if isinstance(value, (tuple, list)):
        return dict(enumerate(value))
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {entry.name: getattr(value, entry.name) for entry in dataclasses.fields(value)}
    return {}


def _lengths(batch: Any) -> list[int]:
    """The different sizes of the first dimension, in order."""
    if not isinstance(batch, (Tensor, tuple, Mapping)):
        raise ValueError(
            f"calibration data is a {type(batch).__name__}: give a tensor, tuple or mapping, as the model is called "
            "(without labels), or a list of those"
        )
    return sorted({len(tensor) for tensor in _tensors(batch) if tensor.ndim})


def _mapped(value: Any, function: Callable[[Any], Any]) -> Any:
    """The same containers with ``function`` of everything in them that is none itself."""
    if isinstance(value, Mapping):
        made = {key: _mapped(inner, function) for key, inner in value.items()}
        if type(value) is dict or not hasattr(value, "update"):
            return made
        like = copy.copy(value)  # models may ask a mapping of their tokenizer's class for its attributes
        like.update(made)
        return like
    if isinstance(value, (tuple, list)):
        made = [_mapped(inner, function) for inner in value]
        return type(value)(*made) if hasattr(value, "_fields") else type(value)(made)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return dataclasses.replace(value, **{key: _mapped(v, function) for key, v in _parts(value).items()})
    return function(value)


def _slice(batch: Any, n: int, start: int, stop: int) -> Any:
    def part(value: Any) -> Any:
        return value[start:stop] if isinstance(value, Tensor) and value.ndim and len(value) == n else value

    return _mapped(batch, part)


def first_items(batches: list[Any], count: int = 2) -> Any:
    """The first few items of the first batch, enough to see what a model is made of; all of it if it cannot be cut."""
    lengths, tensors = _lengths(batches[0]), _tensors(batches[0])
    # A mask of tokens by tokens beside them is no set of items, even where there are as many items as tokens.
    square = len(tensors) > 1 and any(tensor.ndim == 2 and tensor.shape[0] == tensor.shape[1] for tensor in tensors)
    return _slice(batches[0], lengths[0], 0, count) if len(lengths) == 1 and not square else batches[0]


def item_count(batch: Any) -> int:
    """How many items a batch has: its first dimension, or 1 for one whose tensors differ in it.

    Example:
        >>> item_count(torch.zeros(5, 3)), item_count((torch.zeros(5, 3), torch.zeros(2)))
        (5, 1)

    Paper: none.
    """
    lengths = _lengths(batch)
    return lengths[0] if len(lengths) == 1 else 1


def pick_items(batch: Any, items: Tensor) -> Any:
    """Some items of a batch, in the same form; all of it where it counts as one.

    Args:
        batch: as the model is called.
        items: ``(n,)``, int64, below :func:`item_count`.

    Example:
        >>> pick_items({"x": torch.arange(4.0), "scale": 2}, torch.tensor([0, 3]))
        {'x': tensor([0., 3.]), 'scale': 2}

    Paper: none.
    """
    lengths = _lengths(batch)
    if len(lengths) != 1:
        return batch

    def part(value: Any) -> Any:
        whole = isinstance(value, Tensor) and value.ndim and len(value) == lengths[0]
        return value[items.to(value.device)] if whole else value

    return _mapped(batch, part)


class Shared:
    """What several quantized copies of one model have in common: computed for the first, kept for the others.

    Example:
        >>> shared = Shared()
        >>> shared.once("answer", lambda: 42), shared.once("answer", lambda: 43)
        (42, 42)

    Paper: none.
    """

    def __init__(self) -> None:
        self._kept: dict[Hashable, Any] = {}

    def once(self, name: Hashable, compute: Callable[[], Any]) -> Any:
        """The result of ``compute``, from the first call with this name."""
        if name not in self._kept:
            self._kept[name] = compute()
        return self._kept[name]


@torch.no_grad()
def visit_sites(
    model: nn.Module, batches: Iterable[Any], visit: Callable[[Site, tuple[Tensor, ...]], None], only: Iterable[Site]
) -> None:
    """Run the floating-point model, and call ``visit(site, inputs)`` at every call of some of its sites.

    Args:
        model: a prepared model.
        batches: see :func:`split_batches`.
        visit: ``inputs`` is ``(x,)`` for a layer (after its input transform), ``(left, right)`` for a product.
        only: the sites to visit.

    Raises:
        ValueError: naming the site, if its inputs are not finite or no batch reached it.

    Paper: none.
    """
    only = list(only)
    reached = set()

    def seen(site: Site, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        if all(tensor.numel() for tensor in inputs):
            _check_finite(site, inputs)
            reached.add(site.name)
            visit(site, inputs)
        return output

    with mode(model, "observe", only, seen):
        for batch in batches:
            call(model, batch)
    _check_reached(only, reached)


def _check_finite(site: Site, inputs: tuple[Tensor, ...]) -> None:
    if not all(all_finite(tensor) for tensor in inputs):
        raise ValueError(f"{site.name}: its inputs hold NaN or infinity: check the images and the model's forward pass")


def _check_reached(only: Iterable[Site], reached: set[str]) -> None:
    missed = [site.name for site in only if site.name not in reached]
    if missed:
        raise ValueError(
            f"the calibration data never reached {', '.join(missed[:5])}{' and others' if len(missed) > 5 else ''}: "
            "give data that does, or leave such layers in floating point with exclude="
        )


@dataclass
class Seen:
    """What one site saw of all the calibration data.

    Attributes:
        site: the site.
        inputs: ``(x,)`` or ``(left, right)``, all batches along the first dimension.
        output: its floating-point output; None unless gradients were asked for.
        gradient: the loss's gradient at the output, of the output's shape; None unless asked for.
    """

    site: Site
    inputs: tuple[Tensor, ...]
    output: Tensor | None = None
    gradient: Tensor | None = None


def site_inputs(
    model: nn.Module,
    batches: list[Any],
    only: Iterable[Site] | None = None,
    *,
    loss: Callable[[Any, int], Tensor] | None = None,
    memory: float = 1 * GIB,
    progress: Callable[[str], None] | None = None,
    shared: Shared | None = None,
    name: Hashable = "inputs",
) -> Iterator[Seen]:
    """Everything each site sees in the floating-point model, some sites at a time.

    As many sites are collected in one pass over the data as fit into ``memory``, at least one; so what is held is
    bounded by that or by one site's activations, whichever is larger, and small models take a single pass.

    Args:
        model: a prepared model. It may be changed between two sites as long as its function stays the same.
        batches: see :func:`split_batches`.
        only: the sites, in the order wanted; all by default.
        loss: ``loss(output, index of the batch)``, a scalar; with it, outputs and gradients are collected as well.
        memory: bytes.
        progress: called with a line of text for each site.
        shared: keeps what a single pass collects, for other copies of the model as it is now; what takes several
            passes is not kept.
        name: what it is kept under, with the names of the sites; another one for another loss.

    Yields:
        One :class:`Seen` a site.

    Raises:
        ValueError: naming the site, if its inputs are not finite or no batch reached it.

    Paper: none.
    """
    waiting = list(sites(model).values() if only is None else only)
    key = (name, *(site.name for site in waiting))
    measure = partial(_sizes, model, batches, waiting, with_output=loss is not None)
    sizes = measure() if shared is None else shared.once(("sizes", *key), measure)
    groups = _groups(waiting, sizes, memory)
    done = 0
    for group in groups:
        collect = partial(_collect, model, batches, group, loss)
        found = collect() if shared is None or len(groups) > 1 else dict(shared.once(key, collect))
        for site in group:
            done += 1
            if progress is not None:
                progress(f"{site.name} ({done}/{len(sizes)})")
            yield replace(found.pop(site.name), site=site)


def _groups(waiting: list[Site], sizes: dict[str, float], memory: float) -> list[list[Site]]:
    """The sites in order, as many at a time as fit into memory, at least one."""
    groups: list[list[Site]] = []
    held = math.inf
    for site in waiting:
        if held + sizes[site.name] > memory:
            groups.append([])
            held = 0.0
        groups[-1].append(site)
        held += sizes[site.name]
    return groups


def _sizes(model: nn.Module, batches: list[Any], only: list[Site], *, with_output: bool) -> dict[str, float]:
    """Bytes that each site's inputs (and output with gradient) will take."""
    sizes: dict[str, float] = {}
    probe = first_items(batches, 1)
    items = sum(_lengths(batch)[-1] for batch in batches) / _lengths(probe)[-1]

    def measure(site: Site, inputs: tuple[Tensor, ...]) -> None:
        size = sum(tensor.numel() * tensor.element_size() for tensor in inputs)
        if with_output:  # the output may be wider than the inputs
            rows = getattr(site, "out_features", 0) / max(getattr(site, "in_features", 1), 1)
            size *= 1 + 2 * max(rows, 1)
        sizes[site.name] = sizes.get(site.name, 0.0) + size * items

    try:
        visit_sites(model, [probe], measure, only)
    except ValueError:  # the first item alone may miss a branch; collecting says so if all of them do
        sizes = {site.name: sizes.get(site.name, 0.0) for site in only}
    return sizes


def _collect(
    model: nn.Module, batches: list[Any], group: list[Site], loss: Callable[[Any, int], Tensor] | None
) -> dict[str, Seen]:
    kept: dict[str, list[tuple]] = {site.name: [] for site in group}
    if loss is None:

        def keep(site: Site, inputs: tuple[Tensor, ...]) -> None:
            # A copy: the model may change its own in place.
            kept[site.name].append((tuple(tensor.clone() for tensor in inputs), None, None))

        visit_sites(model, batches, keep, group)
    else:
        for index, batch in enumerate(batches):
            _collect_gradients(model, batch, index, group, loss, kept)
        _check_reached(group, {name for name, calls in kept.items() if calls})
    return {site.name: _joined(site, kept.pop(site.name)) for site in group}


def _joined(site: Site, calls: list[tuple]) -> Seen:
    """All calls along the first dimension; ragged ones (windows, sequences of another length) as rows."""
    inputs, outputs, gradients = zip(*calls, strict=True)
    columns = [_cat(column) for column in zip(*inputs, strict=True)]
    if outputs[0] is None:
        return Seen(site, tuple(columns))
    return Seen(site, tuple(columns), _cat(outputs), _cat(gradients))


def _cat(tensors: Iterable[Tensor]) -> Tensor:
    tensors = list(tensors)
    if len(tensors) == 1:
        return tensors[0]
    if len({tensor.shape[1:] for tensor in tensors}) == 1:
        return torch.cat(tensors)
    if len({tensor.shape[-1] for tensor in tensors}) == 1:
        return torch.cat([tensor.reshape(-1, tensor.shape[-1]) for tensor in tensors])
    if len({tensor.shape[-2] for tensor in tensors}) == 1:  # keys, which come transposed
        return torch.cat([tensor.movedim(-2, 0).flatten(1) for tensor in tensors], 1)
    return torch.cat([tensor.reshape(-1, 1) for tensor in tensors])  # probabilities: queries by keys


def _collect_gradients(
    model: nn.Module,
    batch: Any,
    index: int,
    group: list[Site],
    loss: Callable[[Any, int], Tensor],
    kept: dict[str, list[tuple]],
) -> None:
    calls: list[tuple[Site, tuple[Tensor, ...], Tensor, Tensor]] = []

    def seen(site: Site, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        if not all(tensor.numel() for tensor in inputs):
            return output
        _check_finite(site, inputs)
        # A zero that needs its gradient: the graph starts here, whatever the model's own parameters need.
        zero = torch.zeros_like(output, requires_grad=True)
        calls.append((site, tuple(tensor.detach().clone() for tensor in inputs), output.detach(), zero))
        return output + zero

    needed = {parameter: parameter.requires_grad for parameter in model.parameters()}
    try:
        for parameter in needed:
            parameter.requires_grad_(False)
        with torch.inference_mode(False), torch.enable_grad(), mode(model, "observe", group, seen):
            value = loss(call(model, batch), index)
            gradients = torch.autograd.grad(value, [zero for *_, zero in calls], allow_unused=True)
    finally:
        for parameter, flag in needed.items():
            parameter.requires_grad_(flag)
    for (site, inputs, output, zero), gradient in zip(calls, gradients, strict=True):
        kept[site.name].append((inputs, output, torch.zeros_like(zero) if gradient is None else gradient))
