"""Calibration rows kept back, to judge what was fitted to the others.

A correction that is fitted to calibration data lowers the error there. Whether it does on other data, behind layers
that are quantized too, shows only on items it was not fitted to, as they arrive in the quantized network. So every
fourth item is kept back (:func:`kept_back`), the network is run on those with its quantizers on
(:func:`inputs_as_run`), and what a method changes is kept as far as it helps there. What was not is in the last column
of :func:`s2d.ptq.coverage`.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from s2d.ptq.calibrate import item_count, pick_items
from s2d.ptq.quantizers import SWITCHED_OFF, AffineQuantizer
from s2d.ptq.rtn import rtn
from s2d.ptq.sites import Site, quantized_layers, sites
from s2d.ptq.trace import call, tensors_of

EVERY = 4
MOST = 32  # items kept back: more would cost time and judge no better
FEW_ITEMS = 4  # fewer cannot tell by the model's output which of two is better


def kept_back(batches: list[Any]) -> list[Any]:
    """Every fourth item of the calibration data, from all of it: what may judge.

    Args:
        batches: see :func:`s2d.ptq.calibrate.split_batches`; one that cannot be cut counts as one item.

    Returns:
        Batches of the same form, at most 32 items in all. Of fewer than four items, the last one; a single item judges
        what was fitted to it.

    Example:
        >>> [batch.flatten().tolist() for batch in kept_back([torch.arange(6.0)[:, None], torch.ones(3, 1)])]
        [[3.0], [1.0]]

    Paper: none.
    """
    return _picked(batches, True)


def taken(batches: list[Any]) -> list[Any]:
    """The items that are not kept back; of a single one, that.

    Example:
        >>> [batch.flatten().tolist() for batch in taken([torch.arange(6.0)[:, None], torch.ones(3, 1)])]
        [[0.0, 1.0, 2.0, 4.0, 5.0], [1.0, 1.0]]

    Paper: none.
    """
    return _picked(batches, False) or batches


def _picked(batches: list[Any], judging: bool) -> list[Any]:
    counts = [item_count(batch) for batch in batches]
    chosen = _judges(sum(counts)) == judging
    found, first = [], 0
    for batch, count in zip(batches, counts, strict=True):
        here = chosen[first : first + count].nonzero()[:, 0]
        first += count
        if len(here):
            found.append(pick_items(batch, here))
    return found


def _judges(items: int) -> Tensor:
    """Which items are kept back, ``(items,)``."""
    chosen = torch.zeros(items, dtype=torch.bool)
    chosen[list(range(EVERY - 1, items, EVERY))[:MOST] or [items - 1]] = True
    return chosen


def fitted_rows(rows: int, batches: list[Any]) -> Tensor:
    """Which of a site's rows, in the order of the data, belong to items that are not kept back: ``(rows,)``.

    An item is taken to have as many rows as any other, which ragged batches and routed tokens only nearly have. Of a
    single item, or fewer rows than items, all rows count.

    Example:
        >>> fitted_rows(8, [torch.zeros(4, 2, 3)]).tolist()
        [True, True, True, True, True, True, False, False]

    Paper: none.
    """
    items = sum(item_count(batch) for batch in batches)
    if items < 2 or rows < items:
        return torch.ones(rows, dtype=torch.bool)
    return ~_judges(items)[torch.arange(rows) * items // rows]


@contextmanager
def replaced(model: nn.Module, weights: dict[str, Tensor], biases: dict[str, Tensor] | None = None) -> Iterator[None]:
    """Layers with other weights and biases while the context is open, by the name of their site."""
    layers = quantized_layers(model)
    kept = {name: (layers[name].weight, layers[name].bias) for name in {*weights, *(biases or {})}}
    try:
        for name, weight in weights.items():
            layers[name].weight = nn.Parameter(weight.detach(), requires_grad=False)
        for name, bias in (biases or {}).items():
            layers[name].bias = nn.Parameter(bias.detach(), requires_grad=False)
        yield
    finally:
        for name, (weight, bias) in kept.items():
            layers[name].weight, layers[name].bias = weight, bias


def nearest_weight(weight: Tensor, w_bits: int, *, symmetric: bool = False) -> Tensor:
    """A weight on its min-max grid per output channel; as it is where that side is switched off."""
    if w_bits in SWITCHED_OFF:
        return weight.detach()
    quantizer = AffineQuantizer(w_bits, symmetric=symmetric, granularity="per_channel")
    quantizer.observe(weight)
    quantizer.freeze()
    return quantizer(weight.detach())


def nearest(model: nn.Module, w_bits: int, *, symmetric: bool = False) -> dict[str, Tensor]:
    """:func:`nearest_weight` of every layer, by the name of its site: what all methods start from."""
    layers = quantized_layers(model)
    return {name: nearest_weight(site.weight, w_bits, symmetric=symmetric) for name, site in layers.items()}


@torch.no_grad()
def inputs_as_run(model: nn.Module, held: list[Any], only: Iterable[Site]) -> dict[str, Tensor]:
    """What layers read of some data while the quantizers that are set are on, those of the layers themselves included.

    Args:
        model: a prepared model.
        held: from :func:`kept_back`.
        only: the layers.

    Returns:
        Rows ``(n, d)`` by the name of the site, after its input transform and before its quantizer. A layer that no
        batch reaches is left out.

    Example:
        >>> from s2d.ptq.prepare import prepare
        >>> model, x = nn.Sequential(nn.Linear(3, 2)).eval(), torch.randn(4, 3)
        >>> prepared = prepare(model, x)
        >>> torch.equal(inputs_as_run(prepared, [x], [prepared[0]])["0"], x)
        True

    Paper: none.
    """
    seen: dict[str, list[Tensor]] = {}

    def keep(site: Site, args: tuple) -> None:
        x = args[0] if site.input_transform is None else site.input_transform(args[0])
        if x.numel():
            seen.setdefault(site.name, []).append(x.reshape(-1, x.shape[-1]).clone())

    before = {site: site.mode for site in sites(model).values()}
    handles = [site.register_forward_pre_hook(keep) for site in only]
    try:
        for site in before:
            site.mode = "quantized"
        for batch in held:
            call(model, batch)
    finally:
        for handle in handles:
            handle.remove()
        for site, name in before.items():
            site.mode = name
    return {name: torch.cat(rows) for name, rows in seen.items()}


@torch.no_grad()
def outputs(model: nn.Module, held: list[Any], name: str) -> list[Tensor]:
    """The floating-point outputs of a model for some data, all its sites in one mode."""
    before = {site: site.mode for site in sites(model).values()}
    try:
        for site in before:
            site.mode = name
        found = [tensor for batch in held for tensor in tensors_of(call(model, batch))]
    finally:
        for site, mode in before.items():
            site.mode = mode
    return [tensor.detach().float() for tensor in found if tensor.is_floating_point() and tensor.ndim]


def item_errors(found: list[Tensor], expected: list[Tensor]) -> Tensor:
    """Squared distance of outputs, item by item, each output in units of its own size.

    Args:
        found, expected: from :func:`outputs`; entries that are not finite (masked) do not count.

    Returns:
        ``(n,)``, float64: one number for each first index of each output.

    Example:
        >>> item_errors([torch.tensor([[1.0], [3.0]])], [torch.tensor([[1.0], [2.0]])]).tolist()
        [0.0, 0.2]

    Paper: none.
    """
    parts = []
    for one, other in zip(found, expected, strict=True):
        one, other = (tensor.double().nan_to_num(0.0, 0.0, 0.0).reshape(len(tensor), -1) for tensor in (one, other))
        parts.append((one - other).square().sum(1) / other.square().sum().clamp(min=1e-30))
    return torch.cat(parts)


def transforms_help(transformed: nn.Module, plain: nn.Module, batches: list[Any], *, w_bits: int, a_bits: int) -> bool:
    """Whether a model with transforms, rounded to nearest, is not clearly worse than without, on items kept back.

    Args:
        transformed, plain: a prepared model, with and without; both are left as they are.
        batches: calibration data; three quarters of the items calibrate, the others judge.
        w_bits, a_bits: see :func:`s2d.ptq.quantize`.

    Returns:
        True also where too few items are kept back to tell, or nothing is rounded.

    Paper: none.
    """
    held = kept_back(batches)
    if sum(map(item_count, held)) < FEW_ITEMS or {w_bits, a_bits} <= set(SWITCHED_OFF):
        return True
    expected, errors = outputs(plain, held, "float"), []
    for model in (transformed, plain):
        rounded = copy.deepcopy(model)
        rtn(rounded, taken(batches), w_bits=w_bits, a_bits=a_bits)
        errors.append(item_errors(outputs(rounded, held, "quantized"), expected))
    return not clearly_above(*errors)


def output_errors(change: Tensor, weight: Tensor) -> Tensor:
    """The squared error that a change ``(n, d)`` of a layer's inputs makes of its outputs, for each row."""
    return (change.to(weight.dtype) @ weight.T).square().sum(-1)


def clearly_above(errors: Tensor, others: Tensor) -> bool:
    """Whether the sum of some errors exceeds that of others by more than twice the standard error of the difference.

    For what rows left out have spoken for already: a few more must not turn that by chance.

    Args:
        errors, others: of the same rows, ``(n,)``.

    Example:
        >>> few, many = torch.tensor([1.0, -0.5]), torch.tensor([1.0, -0.5]).repeat(100)
        >>> clearly_above(few, torch.zeros(2)), clearly_above(many, torch.zeros(200))
        (False, True)

    Paper: none.
    """
    difference = (errors - others).double()
    noise = difference.var(correction=0) * len(difference)
    return bool(difference.sum() > 2 * noise.sqrt())


def note(model: nn.Module, site: Site | str, what: str, kept: float) -> None:
    """Remember which share of a correction was kept, for :func:`s2d.ptq.coverage`."""
    name = site if isinstance(site, str) else site.name
    model.__dict__.setdefault("s2d_kept", {}).setdefault(name, {})[what] = float(kept)


def held_back(model: nn.Module, name: str) -> str:
    """What was held back at a site, as text: ``"aqer 40 %"``; empty where nothing was judged."""
    kept = model.__dict__.get("s2d_kept", {}).get(name, {})
    return ", ".join(f"{what} {100 * (1 - share):.0f} %" for what, share in kept.items())
