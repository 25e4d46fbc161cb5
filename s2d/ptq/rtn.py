"""Round to nearest: every value goes to the closest point of a min-max grid."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from s2d.ptq.calibrate import Shared, visit_sites
from s2d.ptq.quantizers import SWITCHED_OFF, AffineQuantizer
from s2d.ptq.sites import CONVOLUTIONS, Site, products, quantized_layers

ACTIVATIONS = ("per_tensor", "per_token")


def rtn(
    model: nn.Module,
    batches: list[Any],
    *,
    w_bits: int,
    a_bits: int,
    progress: Callable[[str], None] | None = None,
    shared: Shared | None = None,
    symmetric: bool = False,
    activations: str = "per_tensor",
) -> None:
    """Quantize with round-to-nearest: weights per output channel, activations min-max over the calibration set.

    Args:
        model: a prepared model, changed in place.
        batches: calibration data (:func:`s2d.ptq.calibrate.split_batches`).
        w_bits, a_bits: see :func:`s2d.ptq.quantize`.
        progress: unused; one pass over the data is all there is.
        shared: keeps the ranges of the inputs for other copies of the model.
        symmetric: grids without a zero point on both sides (attention probabilities, which are never negative, then
            have an unsigned one).
        activations: ``"per_tensor"`` (static) or ``"per_token"`` (inputs of Linear layers measured at run time, for
            each token on its own). Attention products stay per tensor.

    Raises:
        ValueError: for another choice of ``activations``, inputs that are not finite, or a site that the data misses.

    Paper: Table 9 (RTN).
    """
    check_activations(activations)
    if a_bits not in SWITCHED_OFF:
        calibrate_inputs(model, batches, a_bits, symmetric=symmetric, activations=activations, shared=shared)
    if w_bits not in SWITCHED_OFF:
        round_weights(model, w_bits, symmetric=symmetric)


def check_activations(activations: str) -> None:
    """ValueError for a granularity of activations that there is not."""
    if activations not in ACTIVATIONS:
        raise ValueError(f"activations is {activations!r}: choose one of {', '.join(ACTIVATIONS)}")


def calibrate_inputs(
    model: nn.Module,
    batches: list[Any],
    a_bits: int,
    *,
    symmetric: bool = False,
    activations: str = "per_tensor",
    ranges: str = "minmax",
    shared: Shared | None = None,
) -> None:
    """Put the inputs of every Linear layer and attention product on grids, in place.

    Args:
        ranges: ``calibration`` of :class:`s2d.ptq.quantizers.AffineQuantizer`; the others as for :func:`rtn`. All but
            ``"minmax"`` look at the data again for each copy of the model.
    """
    for site in quantized_layers(model).values():
        if not isinstance(site, CONVOLUTIONS):
            site.input_quantizer = AffineQuantizer(
                a_bits, symmetric=symmetric, granularity=activations, calibration=ranges
            )
    for product in products(model).values():
        signed = product.kind == "qk"
        product.left_quantizer = AffineQuantizer(a_bits, symmetric=symmetric and signed, calibration=ranges)
        product.right_quantizer = AffineQuantizer(a_bits, symmetric=symmetric, calibration=ranges)
    chosen: list[Site] = [site for site in quantized_layers(model).values() if site.input_quantizer is not None]
    chosen += products(model).values()

    def observe(site: Site, inputs: tuple[Tensor, ...]) -> None:
        for quantizer, tensor in zip(site.input_quantizers(), inputs, strict=True):
            quantizer.observe(tensor)

    if ranges == "minmax":
        shared = Shared() if shared is None else shared
        seen = shared.once("extremes", lambda: extremes(model, batches, chosen))
        for site in chosen:
            observe(site, seen[site.name])
    else:
        visit_sites(model, batches, observe, chosen)
    for site in chosen:
        for quantizer in site.input_quantizers():
            quantizer.freeze()


def extremes(model: nn.Module, batches: list[Any], only: list[Site]) -> dict[str, tuple[Tensor, ...]]:
    """The least and the largest value of each input of some sites: the ends of a min-max grid of any bit width.

    Args:
        model: a prepared model.
        batches: calibration data (:func:`s2d.ptq.calibrate.split_batches`).
        only: the sites.

    Returns:
        Name of the site to a tensor ``(calls, 2)`` an input.

    Raises:
        ValueError: as :func:`s2d.ptq.calibrate.visit_sites`.

    Paper: none.
    """
    calls: dict[str, list[list[Tensor]]] = {site.name: [] for site in only}

    def observe(site: Site, inputs: tuple[Tensor, ...]) -> None:
        calls[site.name].append([torch.stack((tensor.amin(), tensor.amax())) for tensor in inputs])

    visit_sites(model, batches, observe, only)
    return {name: tuple(map(torch.stack, zip(*found, strict=True))) for name, found in calls.items()}


def round_weights(model: nn.Module, w_bits: int, *, symmetric: bool = False) -> None:
    """Put every weight on a min-max grid per output channel, in place."""
    for site in quantized_layers(model).values():
        quantizer = AffineQuantizer(w_bits, symmetric=symmetric, granularity="per_channel")
        quantizer.observe(site.weight)
        quantizer.freeze()
        site.weight_quantizer = quantizer
        site.freeze_weight()
