"""PCDR, the Principal Component Dominance Ratio: how much of an outlier the top singular components make.

Two forms carry the name. The *activation* form looks at the outlier activations themselves (main text, second-hand; the
numbers of Table 7 are of this form). The *spectral* form, ``PCDR(Sigma, k')`` of Algorithm 1 line 9, looks at the
weight alone.
"""

from __future__ import annotations

import torch
from torch import Tensor

from s2d.spectral import SingularTriplets, as_matrix, top_singular_triplets

ROUNDING = 1e-5  # of a ratio computed in float32: a weight of rank one has PCDR 1 only up to this


def activation_pcdr(
    weight: Tensor,
    x: Tensor,
    neuron: Tensor,
    *,
    k_max: int = 3,
    triplets: SingularTriplets | None = None,
) -> Tensor:
    r"""PCDR of single activations, unclipped.

    .. math::
        \mathrm{PCDR}_k(i,j) =
        \frac{|\sum_{r \le k} \sigma_r U_{ir} (v_r \cdot x_j)|}{|\sum_r \sigma_r U_{ir} (v_r \cdot x_j)|}

    A ratio of magnitudes: not monotone in k, and above 1 where later components cancel the top ones. The denominator
    is ``|W[i] . x_j|``, so only the top ``k_max`` triplets are needed.

    Args:
        weight: ``(out_features, in_features)``.
        x: ``(r, in_features)`` the input of each activation.
        neuron: ``(r,)`` integer, the output index i of each activation.
        k_max: largest k.
        triplets: the top ``k_max`` (or more) triplets of ``weight`` when they are at hand.

    Returns:
        ``(r, k_max)``: column k-1 holds PCDR_k. An activation that is exactly zero gives NaN.

    Raises:
        ValueError: for shapes that do not fit, a neuron out of range, or k_max out of range.

    Example:
        >>> weight = torch.diag(torch.tensor([3.0, 1.0]))
        >>> activation_pcdr(weight, torch.ones(1, 2), torch.tensor([0]), k_max=2)
        tensor([[1., 1.]])

    Paper: main text (second-hand), Table 7. Cost: O(r k_max (m + n)) beside the triplets.
    """
    matrix = as_matrix(weight)
    if x.ndim != 2 or x.shape[1] != matrix.shape[1] or neuron.shape != x.shape[:1]:
        raise ValueError(
            f"x {tuple(x.shape)} and neuron {tuple(neuron.shape)} do not fit a {tuple(matrix.shape)} weight: "
            f"expected (r, {matrix.shape[1]}) and (r,)"
        )
    if len(neuron) and not (0 <= int(neuron.min()) and int(neuron.max()) < matrix.shape[0]):
        raise ValueError(f"neuron holds {int(neuron.min())} to {int(neuron.max())}: the layer has {matrix.shape[0]}")
    if triplets is None:
        triplets = top_singular_triplets(weight, k_max)
    elif not 1 <= k_max <= len(triplets.s):
        raise ValueError(f"k_max is {k_max}, but {len(triplets.s)} triplets were given")
    u, s, v = (t[..., :k_max].to(matrix) for t in triplets)
    x, neuron = x.to(matrix), neuron.to(matrix.device)
    partial = (u[neuron] * s * (x @ v)).cumsum(dim=1)
    total = (matrix[neuron] * x).sum(dim=1, keepdim=True)
    return partial.abs() / total.abs().masked_fill(total == 0, float("nan"))


def spectral_pcdr(weight: Tensor, *, k_max: int = 3, triplets: SingularTriplets | None = None) -> Tensor:
    r"""Share of the squared spectral mass in the top k components.

    .. math:: \mathrm{PCDR}(\Sigma, k) = \frac{\sum_{r \le k} \sigma_r^2}{\sum_r \sigma_r^2}

    The denominator is the squared Frobenius norm, so no full SVD is needed.

    Args:
        weight: ``(out_features, in_features)``.
        k_max: largest k.
        triplets: the top ``k_max`` (or more) triplets of ``weight`` when they are at hand.

    Returns:
        ``(k_max,)``, increasing, at most 1; zero for a zero weight.

    Example:
        >>> spectral_pcdr(torch.diag(torch.tensor([2.0, 1.0, 1.0])), k_max=2)
        tensor([0.6667, 0.8333])

    Paper: Algorithm 1, line 9.
    """
    matrix = as_matrix(weight)
    if triplets is None:
        triplets = top_singular_triplets(weight, k_max)
    elif not 1 <= k_max <= len(triplets.s):
        raise ValueError(f"k_max is {k_max}, but {len(triplets.s)} triplets were given")
    # Relative to s_1, because the squares of a huge or tiny weight would leave the range of float32.
    s = triplets.s[:k_max].to(matrix)
    if s[0] == 0:
        return torch.zeros_like(s)
    total = torch.linalg.matrix_norm(matrix / s[0])
    return ((s / s[0]).square().cumsum(0) / total.square()).clamp(max=1.0)


def layer_pcdr(ratios: Tensor) -> Tensor:
    """PCDR of a layer: the mean over its outlier activations, each capped at 1.

    The cap is deliberate. A ratio far above 1 (the top components overshoot and later ones cancel) says no more than
    "the top components are enough"; uncapped, a single such activation could lift the mean over the threshold.

    Args:
        ratios: ``(r, k_max)`` from :func:`activation_pcdr`; rows with NaN (zero activations) are left out.

    Returns:
        ``(k_max,)`` in [0, 1]; zeros when no activation is left.

    Example:
        >>> layer_pcdr(torch.tensor([[0.5, 4.0], [0.7, 0.6]]))
        tensor([0.6000, 0.8000])

    Paper: none (the paper does not say how a layer's outliers are merged).
    """
    kept = ratios[~ratios.isnan().any(dim=1)].clamp(max=1.0)
    return kept.mean(dim=0) if len(kept) else ratios.new_zeros(ratios.shape[1])


def outlier_rank(pcdr: Tensor, tau: float) -> int | None:
    r"""The outlier rank cutoff.

    .. math:: \hat k = \min\{k : \mathrm{PCDR}_k \ge \tau\}

    Args:
        pcdr: ``(k_max,)``, PCDR_1 to PCDR_k_max of a layer.
        tau: threshold in (0, 1].

    Returns:
        The rank, 1 to k_max, or None when no k reaches the threshold: the layer is then left alone.

    Raises:
        ValueError: for tau outside (0, 1].

    Example:
        >>> outlier_rank(torch.tensor([0.7, 0.96, 0.99]), tau=0.95)
        2

    Paper: Algorithm 1, lines 9 and 10.
    """
    if not 0 < tau <= 1:
        raise ValueError(f"tau is {tau}: a dominance ratio lies in (0, 1]")
    reached = (pcdr >= tau * (1 - ROUNDING)).nonzero()
    return int(reached[0]) + 1 if len(reached) else None
