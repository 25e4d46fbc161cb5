"""RepQ-ViT: quantize what a norm puts out channel by channel, then fold the channels' scales into norm and layers."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from s2d.ptq.calibrate import Seen, site_inputs
from s2d.ptq.log_sqrt2 import LogSqrt2Quantizer
from s2d.ptq.quantizers import SWITCHED_OFF, AffineQuantizer, Quantizer, best_percentile_range, chunk_elements
from s2d.ptq.reparameterize import can_scale, can_shift, norm_groups, rescale_norm
from s2d.ptq.sites import CONVOLUTIONS, QuantizedLinear, QuantizedProduct, products, quantized_layers

PERCENTILES = (0.999, 0.9999, 0.99999)
SOFTMAX = ("auto", "log_sqrt2", "uniform")
# Channels narrower than this part of the mean get a grid that wide: a dead channel must not blow up norm and weights,
# and a step a hundred times finer than the others' adds nothing to the error.
NARROWEST = 0.01
# With fewer rows a channel's range is not known: what lies outside of it would be clipped.
FEWEST_ROWS = 64


@torch.no_grad()
def repq_vit(
    model: nn.Module,
    batches: list[Any],
    *,
    w_bits: int,
    a_bits: int,
    progress: Callable[[str], None] | None = None,
    softmax: str = "auto",
    percentiles: Sequence[float] = PERCENTILES,
) -> None:
    """Quantize with RepQ-ViT.

    Every range is the pair of quantiles (1 - p, p) with the least squared error. Weights have a grid per row,
    activations one per tensor, all asymmetric. What a norm feeds to Linear layers alone is calibrated per channel, and
    :func:`reparameterize` turns that into one grid per tensor.

    Three corrections of what was published. Zero points are whole numbers, so that codes are integers. A channel's grid
    need not hold zero, because the norm can shift it. And the error of the log-sqrt2 grid does not shrink with more bits
    (it is good at 4 bits, worse than a uniform one at 8), so each product takes the better of both by default.

    Args:
        model: a prepared model, changed in place.
        batches: calibration data (:func:`s2d.ptq.calibrate.split_batches`).
        w_bits, a_bits: see :func:`s2d.ptq.quantize`.
        progress: called with a line of text for each site.
        softmax: the grid of the attention probabilities: ``"log_sqrt2"``, ``"uniform"``, or ``"auto"``, whichever
            gives the smaller squared error of probabilities times values on the calibration data.
        percentiles: the p to choose from.

    Raises:
        ValueError: for another choice of ``softmax``, percentiles out of range, or calibration data that is not finite
            or misses a site.

    Paper: Tables 6 and 8 (RepQ-ViT).
    """
    calibrate_activations(model, batches, a_bits, softmax=softmax, percentiles=percentiles, progress=progress)
    if w_bits not in SWITCHED_OFF:
        for site in quantized_layers(model).values():
            site.weight_quantizer = row_quantizer(site.weight, w_bits, percentiles)
            site.freeze_weight()


def row_quantizer(weight: Tensor, n_bits: int, percentiles: Sequence[float]) -> AffineQuantizer:
    """A grid for each row of a weight (each output channel of a convolution).

    Paper: none.
    """
    quantizer = AffineQuantizer(n_bits, granularity="per_channel")
    quantizer.set_range(*best_percentile_range(weight, n_bits, percentiles, axis=0))
    return quantizer


@torch.no_grad()
def calibrate_activations(
    model: nn.Module,
    batches: list[Any],
    a_bits: int,
    *,
    softmax: str = "auto",
    percentiles: Sequence[float] = PERCENTILES,
    progress: Callable[[str], None] | None = None,
) -> None:
    """Set the quantizers of all activations as :func:`repq_vit` does, and reparameterize the norms; arguments as there.

    Paper: none.
    """
    if softmax not in SOFTMAX:
        raise ValueError(f"softmax is {softmax!r}: choose one of {', '.join(SOFTMAX)}")
    if a_bits in SWITCHED_OFF:
        return
    groups = {norm: layers for norm, layers in norm_groups(model).items() if can_scale(model.get_submodule(norm))}
    followers = {layer.name for layers in groups.values() for layer in layers[1:]}  # read what the first one reads
    linear = [site for site in quantized_layers(model).values() if not isinstance(site, CONVOLUTIONS)]
    chosen = [site for site in linear if site.name not in followers] + list(products(model).values())
    for seen in site_inputs(model, batches, chosen, progress=progress):
        if isinstance(seen.site, QuantizedProduct):
            _calibrate_product(seen, a_bits, softmax, percentiles)
            continue
        layers = groups.get(seen.site.norm, [seen.site])
        rows = seen.inputs[0].flatten(0, -2)
        grid = None
        if seen.site.norm in groups and len(rows) >= FEWEST_ROWS:
            grid = reparameterize(model, seen.site.norm, layers, rows, a_bits, percentiles)
        for layer in layers:
            layer.input_quantizer = _tensor_quantizer(rows, a_bits, percentiles) if grid is None else _with_grid(a_bits, grid)


def _tensor_quantizer(x: Tensor, n_bits: int, percentiles: Sequence[float]) -> AffineQuantizer:
    quantizer = AffineQuantizer(n_bits)
    quantizer.set_range(*best_percentile_range(x, n_bits, percentiles))
    return quantizer


def _with_grid(n_bits: int, grid: tuple[Tensor, Tensor]) -> AffineQuantizer:
    quantizer = AffineQuantizer(n_bits)
    quantizer.set_grid(*grid)
    return quantizer


# --- what a norm puts out --------------------------------------------------------------------------------------------


@torch.no_grad()
def reparameterize(
    model: nn.Module,
    norm_name: str,
    layers: list[QuantizedLinear],
    x: Tensor,
    n_bits: int,
    percentiles: Sequence[float] = PERCENTILES,
) -> tuple[Tensor, Tensor] | None:
    r"""Give every channel of a norm's output a grid of its own, and fold the grids into norm and layers, in place.

    With :math:`\hat x_c = \Delta_c (q - z_c)` the norm puts out

    .. math::
        x'_c = \frac{\tilde\Delta}{\Delta_c} x_c + \tilde\Delta (z_c - \tilde z), \qquad
        \tilde\Delta = \operatorname{mean}_c \Delta_c, \quad
        \tilde z = \operatorname{clamp}(\operatorname{round}(\operatorname{mean}_c z_c))

    and the layers undo it. A norm that cannot shift (RMSNorm) gets the zero point that all channels can share at the
    least squared error, and each channel the finest step whose grid then holds its range.

    Args:
        model: a prepared model.
        norm_name: a key of :func:`s2d.ptq.reparameterize.norm_groups` whose norm can scale its output.
        layers: its value.
        x: ``(rows, channels)``, what the norm puts out.
        n_bits: 2 to 8.
        percentiles: the p of the channels' ranges.

    Returns:
        Step and zero point of the one grid that is left; None where nothing was changed, as all channels are constant
        or the norm has no scale per channel.

    Paper: none; RepQ-ViT's scale reparameterization.
    """
    norm = model.get_submodule(norm_name)
    if norm.weight is not None and norm.weight.numel() != x.shape[-1]:
        return None
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    q_max = 2**n_bits - 1
    step, zero = (_free_grids if can_shift(norm) else _grids_with_one_zero)(x, n_bits, percentiles)
    if not (step > 0).all():
        return None
    common_step = step.mean()
    common_zero = zero.mean().round().clamp(0, q_max)
    shift = (common_zero - zero) * common_step if can_shift(norm) else torch.zeros_like(step)
    rescale_norm(model, norm_name, layers, step / common_step, shift)
    return common_step, common_zero


def _free_grids(x: Tensor, n_bits: int, percentiles: Sequence[float]) -> tuple[Tensor, Tensor]:
    """Step and zero point of every channel; the zero point any real number."""
    mean = x.mean(0)  # around it, so that the range need not hold zero
    low, high = (mean + end for end in best_percentile_range(x - mean, n_bits, percentiles, axis=-1))
    q_max = 2**n_bits - 1
    width = (high - low) / q_max
    step = width.clamp(min=NARROWEST * width.mean())
    middle_on_grid = q_max // 2 - (low + high) / 2 / step
    return step, torch.where(step > width, middle_on_grid, -low / step)


def _grids_with_one_zero(x: Tensor, n_bits: int, percentiles: Sequence[float]) -> tuple[Tensor, Tensor]:
    """Step of every channel and the zero point that they share."""
    low, high = best_percentile_range(x, n_bits, percentiles, axis=-1)
    q_max = 2**n_bits - 1
    zeros = torch.arange(q_max + 1, device=x.device, dtype=x.dtype)[:, None]
    # An end of the range that a zero point leaves no codes for makes the step infinite, unless that end is zero itself.
    down, up = (-low.clamp(max=0)) / zeros, high.clamp(min=0) / (q_max - zeros)
    steps = torch.maximum(down.nan_to_num(nan=0.0, posinf=torch.inf), up.nan_to_num(nan=0.0, posinf=torch.inf))
    best = steps.square().sum(1).argmin()
    step = steps[best]
    return step.clamp(min=NARROWEST * step.mean()), zeros[best].expand_as(step)


# --- attention products ----------------------------------------------------------------------------------------------


def _calibrate_product(seen: Seen, n_bits: int, softmax: str, percentiles: Sequence[float]) -> None:
    left, right = seen.inputs
    seen.site.right_quantizer = _tensor_quantizer(right, n_bits, percentiles)
    if seen.site.kind == "qk":
        seen.site.left_quantizer = _tensor_quantizer(left, n_bits, percentiles)
        return
    candidates: list[Quantizer] = []
    if softmax in ("auto", "uniform"):
        candidates.append(_tensor_quantizer(left, n_bits, percentiles))
    if softmax in ("auto", "log_sqrt2"):
        candidates.append(LogSqrt2Quantizer(n_bits))
        candidates[-1].observe(left)
        candidates[-1].freeze()
    seen.site.left_quantizer = _best(candidates, left, right)


def _best(candidates: list[Quantizer], probabilities: Tensor, values: Tensor) -> Quantizer:
    if len(candidates) == 1:
        return candidates[0]
    multiplies = probabilities.shape[-1] == values.shape[-2] and probabilities.shape[:-2] == values.shape[:-2]
    errors = torch.zeros(len(candidates), dtype=torch.float64)
    for p, v in _chunks(probabilities, values) if multiplies else [(probabilities, None)]:
        for i, quantizer in enumerate(candidates):
            error = (quantizer(p) - p).float()
            errors[i] += (error if v is None else error @ v.float()).square().sum().double().cpu()
    return candidates[int(errors.argmin())]


def _chunks(left: Tensor, right: Tensor) -> Iterable[tuple[Tensor, Tensor]]:
    size = max(1, 4 * chunk_elements(left.device) * len(left) // left.numel())
    return zip(left.split(size), right.split(size), strict=True)
