"""Singular values: the few largest triplets, and a guaranteed enclosure of the spectral norm."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

FULL_SVD_BELOW = 128  # with fewer rows or columns than this a full SVD costs milliseconds


class SingularTriplets(NamedTuple):
    """The k largest singular triplets, ``weight @ v[:, r] = s[r] * u[:, r]``.

    Attributes:
        u: ``(out_features, k)`` left singular vectors.
        s: ``(k,)`` singular values, largest first.
        v: ``(in_features, k)`` right singular vectors.
    """

    u: Tensor
    s: Tensor
    v: Tensor


def as_matrix(weight: Tensor, name: str = "weight") -> Tensor:
    """The weight as a detached, finite matrix of at least float32; every function here begins with it.

    Args:
        weight: ``(out_features, in_features)``, any floating dtype.
        name: what to call it in an error message.

    Raises:
        TypeError: if it is not a floating-point tensor.
        ValueError: if it is not 2-D, has no entries, or holds NaN or infinity.

    Example:
        >>> as_matrix(torch.ones(2, 3, dtype=torch.float16)).dtype
        torch.float32

    Paper: none.
    """
    if not isinstance(weight, Tensor) or not weight.is_floating_point():
        kind = weight.dtype if isinstance(weight, Tensor) else type(weight).__name__
        raise TypeError(f"{name} is {kind}: a real floating-point tensor is needed")
    if weight.ndim != 2:
        raise ValueError(
            f"{name} has shape {tuple(weight.shape)}: expected (out_features, in_features); "
            "for a convolution kernel pass its patch matrix, kernel.flatten(1)"
        )
    if weight.numel() == 0:
        raise ValueError(f"{name} has shape {tuple(weight.shape)}: it has no entries")
    matrix = weight.detach()
    if matrix.dtype not in (torch.float32, torch.float64):
        matrix = matrix.float()
    if not torch.isfinite(matrix).all():
        bad = int((~torch.isfinite(matrix)).sum())
        raise ValueError(f"{name} holds {bad} NaN or infinite entries: lower the learning rate or check the checkpoint")
    return matrix


def top_singular_triplets(
    weight: Tensor,
    k: int,
    *,
    warm_start: SingularTriplets | None = None,
    tol: float = 1e-5,
    max_iterations: int = 60,
    oversample: int = 8,
) -> SingularTriplets:
    r"""The k largest singular triplets, by block subspace iteration or, for small matrices, a full SVD.

    The iteration stops when every wanted residual satisfies
    :math:`\|W v_r - s_r u_r\|_2 \le \text{tol} \cdot s_1`; if it has not after ``max_iterations``, the full SVD
    answers. The starting block is drawn from a fixed seed, so the result is deterministic.

    Args:
        weight: ``(out_features, in_features)``, any floating dtype; half precision is computed in float32.
        k: how many, ``1 <= k <= min(weight.shape)``.
        warm_start: an earlier result for a similar weight; saves iterations, never changes what is converged to.
        tol: largest residual relative to ``s_1``, dimensionless.
        max_iterations: products with ``W W^T`` before giving up on the iteration.
        oversample: extra columns of the block; more columns, fewer iterations.

    Returns:
        The triplets in float32, or in float64 for a float64 weight.

    Raises:
        TypeError, ValueError: see :func:`as_matrix`; ValueError for k out of range or a warm start of another shape.

    Example:
        >>> top_singular_triplets(torch.diag(torch.tensor([3.0, 1.0, 2.0])), 2).s
        tensor([3., 2.])

    Paper: Algorithm 1, line 8. Cost: O(m n (k + oversample)) an iteration.
    """
    matrix = as_matrix(weight)
    m, n = matrix.shape
    if not isinstance(k, int) or not 1 <= k <= min(m, n):
        raise ValueError(f"k is {k}: a {m}x{n} weight has singular triplets 1 to {min(m, n)}")
    if warm_start is not None and (warm_start.v.shape[0] != n or warm_start.u.shape[0] != m):
        raise ValueError(
            f"the warm start is of a {warm_start.u.shape[0]}x{warm_start.v.shape[0]} weight, this one is {m}x{n}"
        )
    block = k + oversample
    if min(m, n) < max(FULL_SVD_BELOW, 2 * block):
        return _full_svd(matrix, k)
    # A power of two is exact, and keeps the squares inside the residual from leaving the range of float32.
    exponent = math.frexp(matrix.abs().max().item())[1]
    matrix = _times_power_of_two(matrix, -exponent)
    generator = torch.Generator().manual_seed(0)
    v = torch.randn(n, block, generator=generator, dtype=matrix.dtype).to(matrix.device)
    if warm_start is not None:
        kept = min(block, warm_start.v.shape[1])
        v[:, :kept] = warm_start.v[:, :kept].to(matrix)
    runner_up = None
    for iteration in range(1, max_iterations + 1):
        q, _ = torch.linalg.qr(matrix @ v)
        # Rayleigh-Ritz on the range of q: W^T u_r = s_r v_r then holds by construction, so one residual tells all.
        left, s, right = torch.linalg.svd(q.T @ matrix, full_matrices=False)
        u, v = q @ left, right.T
        residual = torch.linalg.vector_norm(matrix @ v[:, :k] - u[:, :k] * s[:k], dim=0).max()
        # Vectors kept from the last refresh can still be exact while another component has overtaken them; the random
        # columns beside them need a few iterations to show it, by a next singular value that still rises.
        settled = warm_start is None or (iteration >= 5 and s[k] - runner_up <= 1e-3 * s[0])
        runner_up = s[k]
        if settled and residual <= tol * s[0]:
            return _owned(u[:, :k], _times_power_of_two(s[:k], exponent), v[:, :k])
    u, s, v = _full_svd(matrix, k)
    return SingularTriplets(u, _times_power_of_two(s, exponent), v)


def _full_svd(matrix: Tensor, k: int) -> SingularTriplets:
    u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
    return _owned(u[:, :k], s[:k], vh[:k].T)


def _owned(u: Tensor, s: Tensor, v: Tensor) -> SingularTriplets:
    """Copies: a view would keep the whole factor alive for as long as the triplets are cached."""
    return SingularTriplets(*(part.clone(memory_format=torch.contiguous_format) for part in (u, s, v)))


def _times_power_of_two(x: Tensor, exponent: int) -> Tensor:
    """``x * 2**exponent`` in two exact steps, because 2**exponent alone may be out of range."""
    half = exponent // 2
    return x * math.ldexp(1.0, half) * math.ldexp(1.0, exponent - half)


class SpectralNormBounds(NamedTuple):
    """``lower <= s_1 <= upper``, as Python floats."""

    lower: float
    upper: float


def spectral_norm_bounds(weight: Tensor, *, rtol: float = 1e-3) -> SpectralNormBounds:
    r"""A guaranteed enclosure of the spectral norm, floating-point rounding included.

    Power iteration alone bounds :math:`s_1` from below, and a check of Theorem 1 against such a value can report
    violations that are not there. Here the upper end is certified by a Cholesky factorisation.

    **Lower.** For any vector, :math:`\|Av\| / \|v\| \le s_1`. A computed product satisfies
    :math:`\|\mathrm{fl}(Av) - Av\| \le \gamma_n \|A\|_F \|v\|` with :math:`\gamma_n = nu/(1-nu)`, and this is
    subtracted.

    **Upper.** Let :math:`\hat G` be the computed :math:`A^T A`, so :math:`\|\hat G - A^T A\|_2 \le \gamma_m \|A\|_F^2`.
    If the Cholesky factorisation of :math:`\hat M = \mathrm{fl}(cI - \hat G)` runs to completion, its factor satisfies
    :math:`R^T R = \hat M + \Delta` with :math:`|\Delta| \le \gamma_{n+1} |R|^T |R|` (Higham 2002, theorem 10.3), hence
    :math:`\lambda_{\min}(\hat M) \ge -\frac{\gamma_{n+1}}{1-\gamma_{n+1}} \mathrm{tr}(\hat M)` (Rump 2006), and

    .. math:: s_1^2 \le c + u c + \tfrac{\gamma_{n+1}}{1-\gamma_{n+1}} n c + \gamma_m \|A\|_F^2 .

    The candidate :math:`c` comes from block subspace iteration; if the factorisation fails, the iteration goes on and
    the margin doubles, and :math:`c = \|A\|_F^2` always succeeds. All is computed in float64 on the matrix scaled by a
    power of two, which is exact, so nothing overflows and underflow is below the terms added for it.

    Args:
        weight: ``(out_features, in_features)``, any floating dtype.
        rtol: wanted relative width ``upper / lower - 1`` (the enclosure is valid whether or not it is reached).

    Returns:
        ``(lower, upper)``; ``(0.0, 0.0)`` for a zero matrix.

    Raises:
        TypeError, ValueError: see :func:`as_matrix`; ValueError unless ``1e-6 <= rtol < 1``.

    Example:
        >>> lower, upper = spectral_norm_bounds(torch.diag(torch.tensor([3.0, 4.0])))
        >>> lower <= 4.0 <= upper < 4.01
        True

    Paper: Theorem 1 (A.1). Cost: one Gram matrix and one Cholesky factorisation of the smaller side, in float64.
    """
    if not 1e-6 <= rtol < 1:
        raise ValueError(f"rtol is {rtol}: choose between 1e-6 and 1")
    matrix = as_matrix(weight)
    if matrix.device.type == "mps":  # no float64 there
        matrix = matrix.cpu()
    matrix = matrix.double()
    largest = matrix.abs().max().item()
    if largest == 0.0:
        return SpectralNormBounds(0.0, 0.0)
    _, exponent = math.frexp(largest)
    a = _times_power_of_two(matrix, -exponent)
    a = a if a.shape[0] >= a.shape[1] else a.T
    lower, upper = _scaled_bounds(a, rtol)
    return SpectralNormBounds(_scale(lower, exponent, down=True), _scale(upper, exponent, down=False))


def _gamma(k: int) -> float:
    """Higham's gamma_k for float64, with room for the rounding of this very expression."""
    return 1.01 * k * 2.0**-53 / (1.0 - 1.01 * k * 2.0**-53)


def _scaled_bounds(a: Tensor, rtol: float) -> tuple[float, float]:
    """The enclosure for a float64 matrix with m >= n and entries of magnitude at most 1."""
    m, n = a.shape
    up = 1.0 + 2.0**-40  # more than the handful of scalar roundings in each expression below
    frobenius_sq = a.square().sum().item() * (1 + _gamma(m * n)) * up
    gram = a.T @ a
    generator = torch.Generator().manual_seed(0)
    block = torch.randn(n, min(n, 8), generator=generator, dtype=a.dtype).to(a.device)
    iterations, margin = 8, 1.4 * rtol
    while True:
        ritz, block = _subspace_iteration(gram, block, iterations)
        c = min(ritz * (1 + margin), frobenius_sq)
        shifted = -gram
        shifted.diagonal().add_(c)
        _, failed = torch.linalg.cholesky_ex(shifted)
        if not failed or c >= frobenius_sq:
            break
        # First iterate more; a margin that still fails at 128 iterations widens until the Frobenius norm is reached.
        iterations, margin = min(2 * iterations, 128), margin * 2 if iterations >= 64 else margin
    if failed:  # nothing smaller was certified: the Frobenius norm needs no certificate
        upper_sq = frobenius_sq
    else:
        slack = _gamma(n + 1) / (1 - _gamma(n + 1)) * n * c + 2.0**-53 * c + _gamma(m) * frobenius_sq
        upper_sq = min((c + slack) * up + m * 2.0**-1000, frobenius_sq)
    top = block[:, 0]
    length = torch.linalg.vector_norm(top).item() * (1 + _gamma(n)) * up
    image = torch.linalg.vector_norm(a @ top).item() * (1 - _gamma(m)) / up
    error = _gamma(n) * math.sqrt(frobenius_sq) * length * up + m * 2.0**-1000
    # No column is longer than s_1 either, and that needs no iteration; it keeps the lower end useful in every case.
    column = math.sqrt(a.square().sum(0).max().item()) * (1 - _gamma(m)) / up
    return max(0.0, (image - error) / length / up, column), math.sqrt(upper_sq) * up


def _subspace_iteration(gram: Tensor, block: Tensor, iterations: int) -> tuple[float, Tensor]:
    """Largest Ritz value of a positive semidefinite matrix, and the block rotated so that its column is first."""
    for _ in range(iterations):
        block, _ = torch.linalg.qr(gram @ block)
    values, vectors = torch.linalg.eigh(block.T @ gram @ block)
    return max(values[-1].item(), 0.0), (block @ vectors).flip(-1)


def _scale(value: float, exponent: int, *, down: bool) -> float:
    """``value * 2**exponent``, rounded outwards where it leaves the range of normal numbers."""
    try:
        scaled = math.ldexp(value, exponent)
    except OverflowError:
        return math.nextafter(math.inf, 0.0) if down else math.inf
    if math.ldexp(scaled, -exponent) == value:
        return scaled
    return max(0.0, math.nextafter(scaled, -math.inf)) if down else math.nextafter(scaled, math.inf)
