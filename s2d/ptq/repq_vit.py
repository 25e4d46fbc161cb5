"""RepQ-ViT: quantize what a norm puts out channel by channel, then fold the channels' scales into norm and layers."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from s2d.ptq.calibrate import Seen, Shared, site_inputs, visit_sites
from s2d.ptq.judge import (
    clearly_above,
    fitted_rows,
    inputs_as_run,
    kept_back,
    nearest,
    note,
    output_errors,
    replaced,
)
from s2d.ptq.log_sqrt2 import LogSqrt2Quantizer
from s2d.ptq.quantizers import (
    SWITCHED_OFF,
    AffineQuantizer,
    Quantizer,
    best_percentile_range,
    chunk_elements,
    first_least,
)
from s2d.ptq.reparameterize import can_shift, rescale_norm, scalable_groups
from s2d.ptq.rtn import calibrate_inputs, check_activations
from s2d.ptq.sites import CONVOLUTIONS, QuantizedLinear, QuantizedProduct, Site, products, quantized_layers
from s2d.ptq.twin_uniform import TwinUniformTail, has_long_tail

PERCENTILES = (0.999, 0.9999, 0.99999)
SOFTMAX = ("auto", "log_sqrt2", "uniform")
GELU = ("auto", "uniform")
# Channels narrower than this part of the mean get a grid that wide: a dead channel must not blow up norm and weights,
# and a step a hundred times finer than the others' adds nothing to the error.
NARROWEST = 0.01
# What channels' ranges are multiplied by, and in how many parts the rows are cut to choose that.
WIDENINGS = (0.7, 0.8, 0.9, 1.0, 1.1, 1.25, 1.5, 2.0, 3.0)
FOLDS = 4


@torch.no_grad()
def repq_vit(
    model: nn.Module,
    batches: list[Any],
    *,
    w_bits: int,
    a_bits: int,
    progress: Callable[[str], None] | None = None,
    shared: Shared | None = None,
    softmax: str = "auto",
    gelu: str = "auto",
    activations: str = "per_tensor",
    percentiles: Sequence[float] = PERCENTILES,
) -> None:
    """Quantize with RepQ-ViT.

    Every range is the pair of quantiles (1 - p, p) with the least squared error. Weights have a grid per row,
    activations one per tensor, all asymmetric. What a norm feeds to Linear layers alone is calibrated per channel, and
    :func:`reparameterize` turns that into one grid per tensor.

    Four corrections of what was published. Zero points are whole numbers, so that codes are integers. A channel's grid
    need not hold zero, because the norm can shift it, and is as wide as is best for rows left out (the calibration
    data's own range clips too much of what comes later). And the error of the log-sqrt2 grid does not shrink with more
    bits (it is good at 4 bits, worse than a uniform one at 8), so each product takes the better of both by default.
    Last, clipping and reparameterization are fitted to three quarters of the calibration items, and dropped where that
    lowers the error of the layers' outputs on the others, behind layers that are quantized (:mod:`s2d.ptq.judge`).

    Args:
        model: a prepared model, changed in place.
        batches: calibration data (:func:`s2d.ptq.calibrate.split_batches`).
        w_bits, a_bits: see :func:`s2d.ptq.quantize`.
        progress: called with a line of text for each site.
        shared: keeps what the sites see for other copies of the model.
        softmax: the grid of the attention probabilities: ``"log_sqrt2"``, ``"uniform"``, or ``"auto"``, whichever
            gives the smaller squared error of probabilities times values on the calibration data.
        gelu: the grid of what GELU puts out: ``"uniform"``, or ``"auto"``, which has two
            (:class:`s2d.ptq.twin_uniform.TwinUniformTail`) where the tail is long
            (:func:`s2d.ptq.twin_uniform.has_long_tail`) and they are better on the items kept back.
        activations: ``"per_tensor"``, or ``"per_token"`` for inputs of Linear layers measured at run time.
        percentiles: the p to choose from.

    Raises:
        ValueError: for another choice of ``softmax``, ``gelu`` or ``activations``, percentiles out of range, or
            calibration data that is not finite or misses a site.

    Paper: Tables 6 and 8 (RepQ-ViT).
    """
    calibrate_activations(
        model,
        batches,
        a_bits,
        w_bits=w_bits,
        softmax=softmax,
        gelu=gelu,
        activations=activations,
        percentiles=percentiles,
        progress=progress,
        shared=shared,
    )
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
    w_bits: int = 32,
    softmax: str = "auto",
    gelu: str = "auto",
    activations: str = "per_tensor",
    percentiles: Sequence[float] = PERCENTILES,
    progress: Callable[[str], None] | None = None,
    shared: Shared | None = None,
) -> None:
    """Set the quantizers of all activations as :func:`repq_vit` does, and reparameterize the norms; arguments as there.

    Weights stay in floating point; ``w_bits`` says in what network the activations are judged.

    Paper: none.
    """
    if softmax not in SOFTMAX:
        raise ValueError(f"softmax is {softmax!r}: choose one of {', '.join(SOFTMAX)}")
    if gelu not in GELU:
        raise ValueError(f"gelu is {gelu!r}: choose one of {', '.join(GELU)}")
    check_activations(activations)
    if a_bits in SWITCHED_OFF:
        return
    groups = _widest_reader_first(model, batches, scalable_groups(model))
    followers = {layer.name for layers in groups.values() for layer in layers[1:]}
    linear = [site for site in quantized_layers(model).values() if not isinstance(site, CONVOLUTIONS)]
    leaders = [site for site in linear if site.name not in followers]
    calibrate_inputs(model, batches, a_bits, activations=activations, shared=shared)  # the network to judge in
    with replaced(model, nearest(model, w_bits)):
        as_run = inputs_as_run(model, kept_back(batches), leaders)
    chosen: list[Site] = [*leaders, *products(model).values()]
    for seen in site_inputs(model, batches, chosen, progress=progress, shared=shared):
        site = seen.site
        if isinstance(site, QuantizedProduct):
            _calibrate_product(seen, a_bits, softmax, percentiles)
            continue
        layers = groups.get(site.norm, [site])
        rows = seen.inputs[0].reshape(-1, seen.inputs[0].shape[-1])
        fitted, held = fitted_rows(len(rows), batches), as_run.get(site.name)
        grid = None
        if site.norm in groups:
            options = {"percentiles": percentiles, "fitted": fitted, "held": held, "activations": activations}
            grid = reparameterize(model, site.norm, layers, rows, a_bits, **options)
        if activations == "per_token":
            continue  # measured at run time: nothing to set
        if grid is not None:
            quantizer = AffineQuantizer(a_bits)
            quantizer.set_grid(*grid)
        else:
            two = gelu == "auto" and site.after == "gelu" and site.input_transform is None
            quantizer = _best_grid(model, layers, rows, fitted, held, a_bits, percentiles, two)
        for layer in layers:
            layer.input_quantizer = copy.deepcopy(quantizer)


def _best_grid(
    model: nn.Module,
    layers: list[QuantizedLinear],
    rows: Tensor,
    fitted: Tensor,
    held: Tensor | None,
    n_bits: int,
    percentiles: Sequence[float],
    two: bool,
) -> Quantizer:
    """Of a clipped grid, a min-max grid and (where they may be had) two grids, the best for the rows kept back."""
    makers = [partial(_tensor_quantizer, n_bits=n_bits, percentiles=percentiles), partial(_minmax, n_bits=n_bits)]
    if two and has_long_tail(rows):
        makers.append(partial(_two_grids, n_bits=n_bits))
    if held is None:  # no item kept back reaches the layer
        return makers[0](rows)
    quantizers = [make(rows[fitted.to(rows.device)]) for make in makers]
    weights = torch.cat([layer.weight.detach().float() for layer in layers])
    errors = torch.stack([output_errors(quantizer(held) - held, weights).sum() for quantizer in quantizers])
    best = int(first_least(errors))
    note(model, layers[0], "clipping", best != 1)
    return makers[best](rows)


def _minmax(x: Tensor, n_bits: int) -> Quantizer:
    quantizer = AffineQuantizer(n_bits)
    quantizer.observe(x)
    quantizer.freeze()
    return quantizer


def _two_grids(x: Tensor, n_bits: int) -> Quantizer:
    quantizer = TwinUniformTail(n_bits)
    quantizer.observe(x)
    quantizer.freeze()
    return quantizer


def _widest_reader_first(
    model: nn.Module, batches: list[Any], groups: dict[str, list[QuantizedLinear]]
) -> dict[str, list[QuantizedLinear]]:
    """Groups in which the first layer reads most: others may read the class token alone, or an expert's tokens."""
    shared = [layer for layers in groups.values() if len(layers) > 1 for layer in layers]
    if not shared:  # most ViTs: a pass over the data would show nothing
        return groups
    read = dict.fromkeys((layer.name for layer in shared), 0)

    def count(site: Site, inputs: tuple[Tensor, ...]) -> None:
        read[site.name] += inputs[0].numel()

    visit_sites(model, batches, count, shared)
    return {norm: sorted(layers, key=lambda layer: -read.get(layer.name, 0)) for norm, layers in groups.items()}


def _tensor_quantizer(x: Tensor, n_bits: int, percentiles: Sequence[float]) -> AffineQuantizer:
    quantizer = AffineQuantizer(n_bits)
    quantizer.set_range(*best_percentile_range(x, n_bits, percentiles))
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
    *,
    fitted: Tensor | None = None,
    held: Tensor | None = None,
    activations: str = "per_tensor",
) -> tuple[Tensor, Tensor] | None:
    r"""Give every channel of a norm's output a grid of its own, and fold the grids into norm and layers, in place.

    With :math:`\hat x_c = \Delta_c (q - z_c)` the norm puts out

    .. math::
        x'_c = \frac{\tilde\Delta}{\Delta_c} x_c + \tilde\Delta (z_c - \tilde z), \qquad
        \tilde\Delta = \operatorname{mean}_c \Delta_c, \quad
        \tilde z = \operatorname{clamp}(\operatorname{round}(\operatorname{mean}_c z_c))

    and the layers undo it. A norm that cannot shift (RMSNorm) gets the zero point that all channels can share at the
    least squared error, and each channel the finest step whose grid then holds its range.

    A channel has few values in a small calibration set, and what lies outside of them would be clipped. So the ranges
    are widened by the factor of ``WIDENINGS`` that is best in cross-validation, and left alone where one grid for the
    whole tensor is better still.

    Args:
        model: a prepared model.
        norm_name: a key of :func:`s2d.ptq.reparameterize.norm_groups` whose norm can scale its output.
        layers: its value.
        x: ``(rows, channels)``, what the norm puts out.
        n_bits: 2 to 8.
        percentiles: the p of the channels' ranges.
        fitted: ``(rows,)``, which of them choose the factor; None for all.
        held: ``(n, channels)``, what the norm puts out in the quantized network on data kept back: it is left alone
            where the layers' outputs are clearly worse there. None for no such judge.
        activations: whether the layers' inputs have one grid or one per token.

    Returns:
        Step and zero point of the one grid that is left; None where nothing was changed, as one grid for the tensor is
        better, or the norm has no scale per channel.

    Paper: none; RepQ-ViT's scale reparameterization.
    """
    norm = model.get_submodule(norm_name)
    if norm.weight is not None and norm.weight.numel() != x.shape[-1]:
        return None
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    part = x if fitted is None else x[fitted.to(x.device)]
    shifts = can_shift(norm)
    importance = sum(layer.weight.to(x.dtype).square().sum(0) for layer in layers)
    widening = _best_widening(part, importance, n_bits, percentiles, shifts)
    if widening is None:
        return None
    if held is not None:
        held, weights = held.to(x.dtype), torch.cat([layer.weight.to(x.dtype) for layer in layers])
        scaling = _scaling(part, widening, n_bits, percentiles, shifts)
        plain = _tensor_quantizer(part, n_bits, percentiles)
        if activations == "per_token":
            plain = AffineQuantizer(n_bits, granularity="per_token")
        before = output_errors(plain(held) - held, weights)
        helps = scaling is not None and not clearly_above(
            output_errors(scaling.error(held, n_bits, activations), weights), before
        )
        note(model, layers[0], "reparameterization", helps)
        if not helps:
            return None
    scaling = _scaling(x, widening, n_bits, percentiles, shifts)
    if scaling is None:
        return None
    rescale_norm(model, norm_name, layers, scaling.r, scaling.shift)
    return scaling.step, scaling.zero_point


@dataclass
class Scaling:
    """A norm's new output x / r - shift, and the grid that all its channels then have."""

    r: Tensor
    shift: Tensor
    step: Tensor
    zero_point: Tensor

    def error(self, x: Tensor, n_bits: int, activations: str) -> Tensor:
        """What quantizing the new output does to the old one."""
        quantizer = AffineQuantizer(n_bits, granularity=activations)
        if activations == "per_tensor":
            quantizer.set_grid(self.step, self.zero_point)
        return (quantizer(x / self.r - self.shift) + self.shift) * self.r - x


def _scaling(x: Tensor, widening: float, n_bits: int, percentiles: Sequence[float], shifts: bool) -> Scaling | None:
    """From the channels' ranges; None where some channel has no usable step."""
    q_max = 2**n_bits - 1
    step, zero = _channel_grids(*_channel_ranges(x, n_bits, percentiles, shifts), widening, q_max, shifts)
    if not (step > 0).all():
        return None
    common_step = step.mean()
    common_zero = zero.mean().round().clamp(0, q_max)
    shift = (common_zero - zero) * common_step if shifts else torch.zeros_like(step)
    return Scaling(step / common_step, shift, common_step, common_zero)


def _channel_ranges(x: Tensor, n_bits: int, percentiles: Sequence[float], shifts: bool) -> tuple[Tensor, Tensor]:
    """The range of every channel, which need not hold zero if the norm can shift."""
    mean = x.mean(0) if shifts else torch.zeros_like(x[0])
    low, high = best_percentile_range(x - mean, n_bits, percentiles, axis=-1)
    return mean + low, mean + high


def _channel_grids(low: Tensor, high: Tensor, widening: float, q_max: int, shifts: bool) -> tuple[Tensor, Tensor]:
    """Step and zero point of every channel, from its range times ``widening``.

    Where the norm can shift, the zero point is any real number; else it is a whole one, the same for all.
    """
    if shifts:
        middle, width = (low + high) / 2, (high - low) * widening / q_max
        step = width.clamp(min=NARROWEST * width.mean())
        # The middle of a channel as good as constant lies on its grid.
        return step, torch.where(step > width, q_max // 2, q_max / 2) - middle / step
    zeros = torch.arange(q_max + 1, device=low.device, dtype=low.dtype)[:, None]
    # An end of the range that a zero point leaves no codes for makes the step infinite, unless that end is zero itself.
    ends = (-low.clamp(max=0) / zeros, high.clamp(min=0) / (q_max - zeros))
    steps = torch.maximum(*(end.nan_to_num(nan=0.0, posinf=torch.inf) for end in ends)) * widening
    best = first_least(steps.square().sum(1))
    return steps[best].clamp(min=NARROWEST * steps[best].mean()), zeros[best].expand_as(low)


def _best_widening(
    x: Tensor, importance: Tensor, n_bits: int, percentiles: Sequence[float], shifts: bool
) -> float | None:
    """The factor of ``WIDENINGS`` with the least error on rows left out, None if a grid for the tensor has less.

    Errors are weighted by ``importance``, what they cause in the outputs of the layers.
    """
    folds = x.tensor_split(FOLDS)  # in the order of the images, so that most of them are in one fold only
    if len(x) < FOLDS:
        return None
    q_max = 2**n_bits - 1
    errors = torch.zeros(1 + len(WIDENINGS), dtype=torch.float64, device=x.device)
    for left_out in range(FOLDS):
        seen, test = torch.cat(folds[:left_out] + folds[left_out + 1 :]), folds[left_out]
        tensor = _tensor_quantizer(seen, n_bits, percentiles)
        errors[0] += ((tensor(test) - test).square().sum(0) * importance).sum()
        low, high = _channel_ranges(seen, n_bits, percentiles, shifts)
        for i, widening in enumerate(WIDENINGS, 1):
            step, zero = _channel_grids(low, high, widening, q_max, shifts)
            steps = test / step + zero if (step > 0).all() else torch.full_like(test, torch.inf)
            error = (steps.round().clamp_(0, q_max) - steps) * step
            errors[i] += (error.square().sum(0) * importance).sum()
    best = int(first_least(errors.nan_to_num(nan=torch.inf)))
    return WIDENINGS[best - 1] if best > 0 else None


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
            errors[i] += (error if v is None else error @ v.float()).square().sum().cpu().double()
    return candidates[int(first_least(errors))]


def _chunks(left: Tensor, right: Tensor) -> Iterable[tuple[Tensor, Tensor]]:
    size = max(1, 4 * chunk_elements(left.device) * len(left) // left.numel())
    return zip(left.split(size), right.split(size), strict=True)
