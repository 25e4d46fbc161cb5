"""SmoothQuant: what is large in a norm's output moves into the weights that read it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from s2d.ptq.calibrate import Shared, visit_sites
from s2d.ptq.reparameterize import rescale_norm, scalable_groups
from s2d.ptq.rtn import rtn
from s2d.ptq.sites import QuantizedLinear, Site

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
    groups = scalable_groups(model)
    for norm, x_max in _input_maxima(model, batches, groups).items():
        layers = groups[norm]
        w_max = torch.stack([layer.weight.abs().amax(0) for layer in layers]).amax(0)
        s = smoothing_factors(x_max, w_max, alpha)
        rescale_norm(model, norm, layers, s, torch.zeros_like(s))


def _input_maxima(model: nn.Module, batches: list[Any], groups: dict[str, list[QuantizedLinear]]) -> dict[str, Tensor]:
    """max|X_j| of each norm's output."""
    maxima: dict[str, Tensor] = {}

    def observe(site: Site, inputs: tuple[Tensor, ...]) -> None:
        x = inputs[0]
        here = x.abs().reshape(-1, x.shape[-1]).amax(0)
        maxima[site.norm] = torch.maximum(maxima[site.norm], here) if site.norm in maxima else here

    # All its layers, as some may read a part of its output only (the class token, say).
    visit_sites(model, batches, observe, [layer for layers in groups.values() for layer in layers])
    return maxima


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
    smooth(model, batches, alpha=alpha)
    rtn(
        model,
        batches,
        w_bits=w_bits,
        a_bits=a_bits,
        progress=progress,
        shared=None if shared is None else shared.once(("smoothed", alpha), Shared),
        symmetric=symmetric,
        activations=activations,
    )
