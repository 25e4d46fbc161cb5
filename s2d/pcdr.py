"""PCDR, the Principal Component Dominance Ratio: how much of an outlier the top singular components make.

Two forms carry the name. The *activation* form looks at the outlier activations themselves (main text, second-hand; the
numbers of Table 7 are of this form). The *spectral* form, ``PCDR(Sigma, k')`` of Algorithm 1 line 9, looks at the
weight alone.
"""

from __future__ import annotations

from numbers import Integral

import torch
from torch import Tensor

from s2d.checks import check_number, check_tensor
from s2d.spectral import SingularTriplets, as_matrix, check_triplets, in_float64, top_singular_triplets

INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)

# A threshold counts as reached up to this part of it, which is more than a PCDR is off for its triplets' sake: those of
# a refresh have residuals of up to 5e-5 s_1 each.
TOLERANCE = 5e-4
REST_UNITS = 32  # a rest of so many units of rounding, relative to s_1 |x|, is what rounding leaves of zero


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

    **What is guaranteed.** Both sums may cancel, so they are computed in float64, whatever the weight's dtype; but the
    weight and the triplets have been rounded before. With u the rounding of the weight's dtype (1.2e-7 in float32):

    * A rest beyond k of at most :math:`32u\,\sigma_1\|x_j\|` is what rounding makes of zero, and counts as zero. So a
      weight of rank k has :math:`\mathrm{PCDR}_k` = 1 exactly, on every processor and however small the activation.
    * An activation of at most :math:`u\,\|W_i\|\|x_j\|` cannot be told from zero, and gives NaN.
    * Triplets with residuals R (:class:`s2d.spectral.SolvedTriplets`) are exact for a weight :math:`\|R\|_2` away. The
      result is that weight's PCDR up to the part :math:`\|R\|_2\|x_j\| / |W_i x_j|` of it. For an activation that is a
      tenth or more of what the spectral norm allows, this is what :func:`outlier_rank` forgives. (Which component is
      the k-th is itself undetermined where singular values lie closer together than that.)

    Args:
        weight: ``(out_features, in_features)``.
        x: ``(r, in_features)`` the input of each activation.
        neuron: ``(r,)`` integer, the output index i of each activation.
        k_max: largest k.
        triplets: the top ``k_max`` (or more) triplets of ``weight`` when they are at hand.

    Returns:
        ``(r, k_max)``: column k-1 holds PCDR_k. An activation that is zero, up to rounding, gives NaN.

    Raises:
        ValueError: for shapes that do not fit, a neuron out of range, or k_max out of range.

    Example:
        >>> weight = torch.diag(torch.tensor([3.0, 1.0]))
        >>> activation_pcdr(weight, torch.ones(1, 2), torch.tensor([0]), k_max=2)
        tensor([[1., 1.]])

    Paper: main text (second-hand), Table 7. Cost: O(r k_max (m + n)) beside the triplets.
    """
    matrix = as_matrix(weight)
    repair = f"give the inputs of the activations, (r, {matrix.shape[1]})"
    check_tensor("x", x, repair, finite=True)
    if not isinstance(neuron, Tensor) or neuron.dtype not in INTEGERS or neuron.is_meta:
        kind = neuron.dtype if isinstance(neuron, Tensor) else type(neuron).__name__
        raise ValueError(f"neuron is {kind}: give the output index of each activation, an integer tensor (r,)")
    if x.ndim != 2 or x.shape[1] != matrix.shape[1] or neuron.shape != x.shape[:1]:
        raise ValueError(
            f"x {tuple(x.shape)} and neuron {tuple(neuron.shape)} do not fit a {tuple(matrix.shape)} weight: "
            f"expected (r, {matrix.shape[1]}) and (r,)"
        )
    if len(neuron) and not (0 <= int(neuron.min()) and int(neuron.max()) < matrix.shape[0]):
        raise ValueError(f"neuron holds {int(neuron.min())} to {int(neuron.max())}: the layer has {matrix.shape[0]}")
    triplets = _triplets(weight, k_max, triplets)
    u, s, v = (in_float64(part[..., :k_max]) for part in triplets)
    x, neuron = in_float64(x), neuron.to(u.device)
    rows = in_float64(matrix[neuron.to(matrix.device)])
    total = (rows * x).sum(dim=1, keepdim=True)
    partial = (u[neuron] * s * (x @ v)).cumsum(dim=1)
    unit = torch.finfo(matrix.dtype).eps
    length = torch.linalg.vector_norm(x, dim=1, keepdim=True)
    partial = torch.where((total - partial).abs() <= REST_UNITS * unit * s[0] * length, total, partial)
    nothing = total.abs() <= unit * torch.linalg.vector_norm(rows, dim=1, keepdim=True) * length
    return (partial.abs() / total.abs().masked_fill(nothing, float("nan"))).to(matrix)


def spectral_pcdr(weight: Tensor, *, k_max: int = 3, triplets: SingularTriplets | None = None) -> Tensor:
    r"""Share of the squared spectral mass in the top k components.

    .. math:: \mathrm{PCDR}(\Sigma, k) = \frac{\sum_{r \le k} \sigma_r^2}{\sum_r \sigma_r^2}

    The denominator is the squared Frobenius norm, so no full SVD is needed. Triplets with residuals R put the ratio
    off by at most :math:`2\|R\|_F / \|W\|_F` (Mirsky's inequality), which :func:`outlier_rank` forgives for the
    residuals of a refresh and up to 25 components.

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
    triplets = _triplets(weight, k_max, triplets)
    s = in_float64(triplets.s[:k_max])
    if s[0] == 0:
        return s.to(matrix)
    # Relative to s_1, because the squares of a huge or tiny weight would leave the range of the dtype.
    total = torch.linalg.vector_norm(in_float64(matrix) / s[0])
    return ((s / s[0]).square().cumsum(0) / total.square()).clamp(max=1.0).to(matrix)


def _triplets(weight: Tensor, k_max: int, triplets: SingularTriplets | None) -> SingularTriplets:
    """The top triplets of a weight: those given, if they are enough, or new ones."""
    if triplets is None:
        return top_singular_triplets(weight, k_max)
    check_triplets(triplets, weight.shape)
    if isinstance(k_max, bool) or not isinstance(k_max, Integral) or not 1 <= k_max <= len(triplets.s):
        raise ValueError(f"k_max is {k_max}, but {len(triplets.s)} triplets were given")
    return triplets


def layer_pcdr(ratios: Tensor) -> Tensor:
    """PCDR of a layer: the mean over its outlier activations, each capped at 1.

    The cap is deliberate. A ratio far above 1 (the top components overshoot and later ones cancel) says no more than
    "the top components are enough"; uncapped, a single such activation could lift the mean over the threshold.

    Args:
        ratios: ``(r, k_max)`` from :func:`activation_pcdr`; rows with NaN (zero activations) are left out.

    Returns:
        ``(k_max,)`` in [0, 1]; zeros when no activation is left.

    Raises:
        ValueError: for anything but a table of ratios, which are not negative.

    Example:
        >>> layer_pcdr(torch.tensor([[0.5, 4.0], [0.7, 0.6]]))
        tensor([0.6000, 0.8000])

    Paper: none (the paper does not say how a layer's outliers are merged).
    """
    check_tensor("ratios", ratios, "give the ratios of activation_pcdr, (r, k_max)", ndim=2)
    if (ratios < 0).any():
        raise ValueError("ratios holds negative numbers: give the ratios of magnitudes that activation_pcdr returns")
    kept = ratios[~ratios.isnan().any(dim=1)].clamp(max=1.0)
    return kept.mean(dim=0) if len(kept) else ratios.new_zeros(ratios.shape[1])


def outlier_rank(pcdr: Tensor, tau: float) -> int | None:
    r"""The outlier rank cutoff.

    .. math:: \hat k = \min\{k : \mathrm{PCDR}_k \ge \tau\}

    A value that falls short of the threshold by no more than the 5e-4th part of it has reached it: a PCDR is known no
    better than its triplets (see :func:`activation_pcdr`), and a value that is the threshold in exact arithmetic must
    not fall on either side as the processor rounds.

    Args:
        pcdr: ``(k_max,)``, PCDR_1 to PCDR_k_max of a layer.
        tau: threshold in (0, 1].

    Returns:
        The rank, 1 to k_max, or None when no k reaches the threshold: the layer is then left alone.

    Raises:
        ValueError: for tau outside (0, 1], and for anything but a vector of finite ratios.

    Example:
        >>> outlier_rank(torch.tensor([0.7, 0.96, 0.99]), tau=0.95)
        2

    Paper: Algorithm 1, lines 9 and 10.
    """
    check_number("tau", tau, lambda value: 0 < value <= 1, "a dominance ratio lies in (0, 1]")
    check_tensor("pcdr", pcdr, "give PCDR_1 to PCDR_k_max of a layer, (k_max,)", ndim=1, finite=True)
    reached = (pcdr >= tau * (1 - TOLERANCE)).nonzero()
    return int(reached[0]) + 1 if len(reached) else None
