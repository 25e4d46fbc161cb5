r"""PTQ4ViT: scales found by trying a hundred of them, and two uniform grids after GELU and after softmax.

Every site is a product of two factors: an input and a weight, or two activations. Their scales are searched in turn;
all other sites stay in floating point meanwhile. What a pair of scales costs is

.. math:: \mathrm{mean}\big(g \, (y - \hat y)\big)^2

over the calibration data, with y the output of the site and g the gradient of the model's loss at y (``ptq4vit``) or 1
(``base_ptq``). A product in which both factors trade places is the transposed product, so one search serves both.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from s2d.ptq.calibrate import Seen, site_inputs
from s2d.ptq.quantizers import SWITCHED_OFF, AffineQuantizer, Quantizer, fake_quantize
from s2d.ptq.sites import CONVOLUTIONS, QuantizedProduct, Site, quantized_layers, sites
from s2d.ptq.trace import tensors_of
from s2d.ptq.twin_uniform import SPLITS, TwinUniformGELU, TwinUniformSoftmax, twin_gelu, twin_softmax

FACTORS = tuple(0.01 + i * (1.2 - 0.01) / 100 for i in range(100))
"""What the initial scale is multiplied by, one after the other."""
ROUNDS = 3
WEIGHTS = ("per_tensor", "per_channel")
LABELS = ("sampled", "none")
# Rows after which the candidates that cannot win any more are dropped, as parts of all rows.
HURDLES = (1 / 16, 1 / 8, 1 / 4, 1 / 2, 1)
# Elements of one temporary, of which up to three are held: inside a core's cache, or filling an accelerator.
CPU_ELEMENTS, GPU_ELEMENTS = 2**19, 2**24


def ptq4vit(
    model: nn.Module,
    batches: list[Any],
    *,
    w_bits: int,
    a_bits: int,
    progress: Callable[[str], None] | None = None,
    weights: str = "per_tensor",
    rows: int | None = 2048,
    seed: int = 0,
) -> None:
    r"""Quantize with PTQ4ViT: twin uniform quantizers, and scales searched with a Hessian-guided score.

    Grids are symmetric with codes -Q to Q - 1, Q = 2^(k-1); the scales tried are c D0 for the c in ``FACTORS``, with
    D0 = max abs / (Q - 1/2). After GELU, only the positive side's step is searched; for attention probabilities, the
    split between the small and the large range. Three rounds: the weight given the input, the input given the weight
    (for a product of activations, the left factor first). The score weighs output errors by the squared gradient of

    .. math:: -\log p(\tilde y \mid x), \qquad \tilde y \sim p(\cdot \mid x),

    a label sampled from the model: the diagonal of the Fisher information. A site without any gradient is judged by its
    plain squared error. Models that put out anything but logits are taken for Gaussian ones, whose log-likelihood has
    the gradient of the output times standard normal noise.

    The public implementation differs on three points, where it does not do what its paper says: it uses the gradient of
    a divergence between the model and itself (zero but for rounding), collapses to the smallest scale where that is
    exactly zero, and adds the two ranges of its softmax quantizer.

    Args:
        model: a prepared model, changed in place.
        batches: calibration data (:func:`s2d.ptq.calibrate.split_batches`); 32 images as published.
        w_bits, a_bits: see :func:`s2d.ptq.quantize`.
        progress: called with a line of text for each site.
        weights: ``"per_tensor"`` as published (one scale each for q, k and v of a packed projection, and one for each
            output channel of a convolution), or ``"per_channel"``.
        rows: how many rows of a site's inputs (tokens) the search looks at, evenly spaced among those with a gradient;
            of an attention product or a convolution, as many whole images as have that many. None for all.
        seed: for the sampled labels.

    Raises:
        ValueError: for options out of range, inputs that are not finite, or a site that the data misses.

    Paper: none; one of the quantizers that the trained models meet.
    """
    _check_options(weights, rows)
    search = Search(w_bits, a_bits, weights, rows, twin=True)
    _search_all(model, batches, search, loss=sampled_loss(seed), progress=progress)


def base_ptq(
    model: nn.Module,
    batches: list[Any],
    *,
    w_bits: int,
    a_bits: int,
    progress: Callable[[str], None] | None = None,
    weights: str = "per_tensor",
    rows: int | None = 2048,
) -> None:
    """Quantize with what PTQ4ViT starts from: the same search, one uniform grid everywhere, and plain squared errors.

    The score is the mean squared error of the site's output (the public implementation offers the cosine as well).

    Args:
        model, batches, w_bits, a_bits, progress, weights, rows: see :func:`ptq4vit`.

    Raises:
        ValueError: as :func:`ptq4vit`.

    Paper: none; the ablation of PTQ4ViT.
    """
    _check_options(weights, rows)
    _search_all(model, batches, Search(w_bits, a_bits, weights, rows, twin=False), loss=None, progress=progress)


def _check_options(weights: str, rows: int | None) -> None:
    if weights not in WEIGHTS:
        raise ValueError(f"weights is {weights!r}: choose one of {', '.join(WEIGHTS)}")
    if rows is not None and (not isinstance(rows, int) or rows < 1):
        raise ValueError(f"rows is {rows!r}: give a whole number of at least 1, or None for all rows")


# --- the loss whose gradient guides the search -----------------------------------------------------------------------


def sampled_loss(seed: int = 0) -> Callable[[Any, int], Tensor]:
    """The negative log-likelihood of what the model itself might have said, summed over a batch.

    Args:
        seed: with the index of the batch it fixes what is sampled, so that a second pass sees the same.

    Returns:
        ``loss(output, index)``. Logits ``(B, V)`` or ``(B, T, V)``, alone or under ``"logits"`` in a mapping: the
        categorical one. Anything else: the inner product of all its tensors with standard normal noise, whose gradient
        is that of a Gaussian likelihood.

    Example:
        >>> logits = torch.tensor([[0.0, 50.0]])
        >>> float(sampled_loss(seed=0)(logits, 0))
        0.0

    Paper: none.
    """

    def loss(output: Any, index: int) -> Tensor:
        generator = torch.Generator().manual_seed(seed + index)
        logits = _logits(output)
        if logits is None:
            return _gaussian(output, generator)
        logits = logits.flatten(0, -2).float()
        labels = torch.multinomial(logits.detach().double().softmax(-1).cpu(), 1, generator=generator)
        return F.cross_entropy(logits, labels[:, 0].to(logits.device), reduction="sum")

    return loss


def _logits(output: Any) -> Tensor | None:
    if isinstance(output, Mapping):
        output = output.get("logits")
    # A single logit is certain of its only class: nothing to sample.
    categorical = isinstance(output, Tensor) and output.ndim in (2, 3) and output.shape[-1] > 1
    return output if categorical else None


def _gaussian(output: Any, generator: torch.Generator) -> Tensor:
    found = [tensor for tensor in tensors_of(output) if tensor.is_floating_point() and tensor.requires_grad]
    noise = [torch.randn(tensor.shape, generator=generator).to(tensor.device) for tensor in found]
    return sum((tensor.float() * n).sum() for tensor, n in zip(found, noise, strict=True))


# --- one factor of a product -----------------------------------------------------------------------------------------


@dataclass
class Factor:
    """One factor of a product, as the left one: the right factor of a product is the left one of the transposed product.

    Attributes:
        quantize: ``quantize(x, grid)``, broadcasting.
        start: the grid to start with, in the shape of the factor with one dimension for candidates before the last two,
            each dimension as long as the factor's or 1: ``(1, 1, 1)``, ``(1, rows, 1)``, or ``(heads, 1, 1, 1)``.
        grids: the candidates along dimension -3; None for a factor in floating point.
        groups: squared errors summed over the columns, ``(..., candidates, rows)``, to what is searched separately,
            ``(candidates, groups)``.
        spread: a number per group, ``(groups,)``, to the shape of ``start``.
        chosen: the grid in use.
    """

    quantize: Callable[[Tensor, Tensor], Tensor]
    grids: Tensor | None
    groups: Callable[[Tensor], Tensor]
    spread: Callable[[Tensor], Tensor]
    chosen: Tensor
    best: Tensor | None = None

    def quantized(self, x: Tensor) -> Tensor:
        """The factor on the grid in use."""
        return x if self.grids is None else self.quantize(x, self.chosen.squeeze(-3))

    def choose(self, best: Tensor) -> bool:
        """Take one candidate per group into use; whether that is any other than before."""
        changed = self.best is None or not torch.equal(best, self.best)
        self.best = best
        self.chosen = self.grids.take_along_dim(self.spread(best), -3)
        return changed
