"""SmoothQuant: what is large in a norm's output moves into the weights that read it."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from s2d.ptq.calibrate import Shared, visit_sites
from s2d.ptq.judge import inputs_as_run, kept_back, nearest, nearest_weight, note, replaced, taken
from s2d.ptq.quantizers import SWITCHED_OFF, AffineQuantizer
from s2d.ptq.reparameterize import rescale_norm, scalable_groups
from s2d.ptq.rtn import calibrate_inputs, check_activations, rtn
from s2d.ptq.sites import QuantizedLinear, Site, quantized_layers

# Half precision must hold the norm's weight divided by the factor.
SMALLEST_FACTOR, LARGEST_FACTOR = 1e-4, 1e4


def smoothing_factors(x_max: Tensor, w_max: Tensor, alpha: float) -> Tensor:
    r"""What SmoothQuant divides the channels of an activation by.

    .. math:: s_j = \max|X_j|^\alpha \, / \, \max|W_j|^{1 - \alpha}

    Args:
        x_max, w_max: ``(channels,)``, the largest magnitudes of each channel.
        alpha: from 0 (all range goes to the activation) to 1 (all range goes to the weight).

    Returns:
        ``(channels,)`` in float32, from 1e-4 to 1e4; 1 for a channel where either is zero.

    Raises:
        ValueError: for an alpha out of range.

    Example:
        >>> smoothing_factors(torch.tensor([16.0, 0.0]), torch.tensor([1.0, 1.0]), 0.5)
        tensor([4., 1.])

    Paper: none (SmoothQuant, equation 4).
    """
    if not 0 <= alpha <= 1:
        raise ValueError(f"alpha is {alpha!r}: choose a number from 0 to 1")
    x_max, w_max = x_max.float(), w_max.float()
    factors = (x_max**alpha / w_max ** (1 - alpha)).clamp(SMALLEST_FACTOR, LARGEST_FACTOR)
    return torch.where((x_max > 0) & (w_max > 0), factors, torch.ones_like(factors))


@torch.no_grad()
def smooth(model: nn.Module, batches: list[Any], *, alpha: float = 0.5) -> None:
    r"""Even out the channels of every norm's output, and undo it in the layers that read it; a transform.

    .. math:: \gamma' = \gamma / s, \quad \beta' = \beta / s, \quad W' = W \operatorname{diag}(s)

    with s of :func:`smoothing_factors`, max|W_j| over all layers that read the norm. Nothing is left to do at run
    time. Norms that something other than Linear layers reads, that do not scale by their weight as it stands (Gemma's)
    or whose layers are rotated are left alone, and so are inputs that come from no norm (those of proj and fc2).

    Args:
        model: a prepared model, changed in place; its function stays as it is.
        batches: calibration data (:func:`s2d.ptq.calibrate.split_batches`).
        alpha: from 0 to 1, how much of the range goes into the weights.

    Raises:
        ValueError: for an alpha out of range, or inputs that are not finite.

    Example:
        >>> from s2d.ptq.prepare import prepare
        >>> model, x = nn.Sequential(nn.LayerNorm(4), nn.Linear(4, 2)).eval(), torch.randn(8, 4)
        >>> smoothed = prepare(model, x)
        >>> smooth(smoothed, [x])
        >>> torch.allclose(smoothed(x), model(x), atol=1e-5)
        True

    Cost: one pass over the calibration data; nothing at run time.

    Paper: none (SmoothQuant).
    """
    smoothing_factors(torch.ones(1), torch.ones(1), alpha)  # refuse a bad alpha also where no norm can be scaled
    groups = _smoothable(model)
    for norm, ends in _channel_ends(model, batches, groups).items():
        _smooth_norm(model, norm, groups[norm], ends, alpha)


def _smoothable(model: nn.Module) -> dict[str, list[QuantizedLinear]]:
    """The norms that can be smoothed; a warning where there are norms and none of them can."""
    groups = scalable_groups(model)
    if not groups and any(site.after == "norm" for site in quantized_layers(model).values()):
        warnings.warn(
            "nothing to smooth: something other than Linear layers reads what each norm puts out too (the residual sum "
            "of a post-norm network, say), or it cannot be scaled; the result is that without smoothing",
            stacklevel=3,
        )
    return groups


def _smooth_norm(model: nn.Module, norm: str, layers: list[QuantizedLinear], ends: Ends, alpha: float) -> None:
    s = _factors(layers, ends, alpha)
    rescale_norm(model, norm, layers, s, torch.zeros_like(s))


Ends = tuple[Tensor, Tensor]  # the least and the largest value of each channel


def _factors(layers: list[QuantizedLinear], ends: Ends, alpha: float) -> Tensor:
    w_max = torch.stack([layer.weight.abs().amax(0) for layer in layers]).amax(0)
    return smoothing_factors(torch.maximum(-ends[0], ends[1]), w_max, alpha)


def _channel_ends(model: nn.Module, batches: list[Any], groups: dict[str, list[QuantizedLinear]]) -> dict[str, Ends]:
    """The range of each channel of each norm's output."""
    found: dict[str, Ends] = {}

    def observe(site: Site, inputs: tuple[Tensor, ...]) -> None:
        rows = inputs[0].reshape(-1, inputs[0].shape[-1])
        ends = rows.amin(0), rows.amax(0)
        found[site.norm] = _both(found[site.norm], ends) if site.norm in found else ends

    # All its layers, as some may read a part of its output only (the class token, say).
    visit_sites(model, batches, observe, [layer for layers in groups.values() for layer in layers])
    return found


def _both(one: Ends, other: Ends) -> Ends:
    return torch.minimum(one[0], other[0]), torch.maximum(one[1], other[1])


def smoothquant(
    model: nn.Module,
    batches: list[Any],
    *,
    w_bits: int,
    a_bits: int,
    progress: Callable[[str], None] | None = None,
    shared: Shared | None = None,
    alpha: float = 0.5,
    symmetric: bool = False,
    activations: str = "per_tensor",
) -> None:
    """Quantize with SmoothQuant: :func:`smooth`, then round to nearest.

    Each norm is smoothed only where that lowers the error of its layers' outputs, at these bit widths, on calibration
    items that the factors were not taken from and behind layers that are quantized (:mod:`s2d.ptq.judge`). A channel
    that no weight reads, say, keeps its range while the others give theirs up: all are worse off. A network in which
    everything else reads the norms too (post-norm: the residual sum does) has nothing to smooth, which is said in a
    warning.

    Args:
        model, batches, w_bits, a_bits, progress, shared, symmetric, activations: see :func:`s2d.ptq.rtn.rtn`.
        alpha: see :func:`smooth`.

    Raises:
        ValueError: as these two.

    Example:
        >>> from s2d.ptq.prepare import prepare
        >>> x = torch.randn(8, 4)
        >>> model = prepare(nn.Sequential(nn.LayerNorm(4), nn.Linear(4, 2)).eval(), x)
        >>> smoothquant(model, [x], w_bits=8, a_bits=8, alpha=0.8)

    Paper: none (SmoothQuant).
    """
    check_activations(activations)
    smoothing_factors(torch.ones(1), torch.ones(1), alpha)
    groups = _smoothable(model)
    grids = {"symmetric": symmetric, "activations": activations}
    if groups and (w_bits not in SWITCHED_OFF or a_bits not in SWITCHED_OFF):
        _smooth_where_it_helps(model, batches, groups, alpha, w_bits, a_bits, shared, grids)
    smoothed = None if shared is None else shared.once(("smoothed", alpha, w_bits, a_bits, *grids.values()), Shared)
    rtn(model, batches, w_bits=w_bits, a_bits=a_bits, progress=progress, shared=smoothed, **grids)


def _smooth_where_it_helps(
    model: nn.Module,
    batches: list[Any],
    groups: dict[str, list[QuantizedLinear]],
    alpha: float,
    w_bits: int,
    a_bits: int,
    shared: Shared | None,
    grids: dict[str, Any],
) -> None:
    """Smooth the norms whose layers' outputs have less error with it on the items kept back."""
    if a_bits not in SWITCHED_OFF:
        calibrate_inputs(model, batches, a_bits, shared=shared, **grids)
    symmetric = grids["symmetric"]
    with replaced(model, nearest(model, w_bits, symmetric=symmetric)):
        layers = [layer for group in groups.values() for layer in group]
        as_run = inputs_as_run(model, kept_back(batches), layers)
    fitted = _channel_ends(model, taken(batches), groups)
    everything = _channel_ends(model, batches, groups)
    for norm, group in groups.items():
        if norm not in fitted:  # only items kept back reach it
            continue
        s, helped = _factors(group, fitted[norm], alpha), []
        for factors in (torch.ones_like(s), s):
            grid = _grid(tuple(end / factors for end in fitted[norm]), a_bits, grids)
            weights = [nearest_weight(layer.weight * factors, w_bits, symmetric=symmetric) for layer in group]
            helped.append(
                sum(
                    (F.linear(grid(x / factors), weight) - F.linear(x, layer.weight)).square().sum()
                    for layer, weight in zip(group, weights, strict=True)
                    if (x := as_run.get(layer.name)) is not None
                )
            )
        helps = bool(helped[1] < helped[0])
        note(model, group[0], "smoothing", helps)
        if helps:
            _smooth_norm(model, norm, group, everything[norm], alpha)


def _grid(ends: Ends, a_bits: int, grids: dict[str, Any]) -> Callable[[Tensor], Tensor]:
    """The min-max grid of an input."""
    if a_bits in SWITCHED_OFF:
        return lambda x: x
    quantizer = AffineQuantizer(a_bits, symmetric=grids["symmetric"], granularity=grids["activations"])
    if grids["activations"] == "per_tensor":
        quantizer.set_range(ends[0].amin(), ends[1].amax())
    return quantizer
