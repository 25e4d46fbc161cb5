"""The few largest singular triplets of a weight: block Krylov iteration, warm starts, an error that is guaranteed."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from numbers import Integral
from typing import Any, NamedTuple

import torch
from torch import Tensor

from s2d.checks import check_count, check_number, check_tensor

FULL_SVD_BELOW = 128  # with fewer rows or columns than this a full SVD costs milliseconds
KRYLOV_DEPTHS = (3, 4, 8)  # blocks in the Krylov space when convergence is looked at; after the last one it restarts
BATCH_ENTRIES = 2**26  # matrices solved side by side on an accelerator hold at most so many entries
SAFE_RANGE = (2.0**-40, 2.0**40)  # largest entries whose products and squares stay inside the range of float32


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


class SolvedTriplets(NamedTuple):
    """Triplets, and how they were found.

    Attributes:
        triplets: the k largest.
        error: the k values of ``triplets.s`` lie within this distance of k singular values of the weight, each of its
            own, in units of the weight (see :func:`solve_top_triplets`); 0 for a full SVD.
        products: block products with the weight or its transpose that the iteration took.
        full_svd: whether the iteration gave up, and the full SVD answered.
    """

    triplets: SingularTriplets
    error: float
    products: int
    full_svd: bool


def as_matrix(weight: Tensor, name: str = "weight") -> Tensor:
    """The weight as a detached, finite matrix of at least float32; every function here begins with it.

    Args:
        weight: ``(out_features, in_features)``, any floating dtype.
        name: what to call it in an error message.

    Raises:
        TypeError: if it is not a floating-point tensor.
        ValueError: if it is not 2-D, has no entries, holds NaN or infinity, is sparse or on the meta device.

    Example:
        >>> as_matrix(torch.ones(2, 3, dtype=torch.float16)).dtype
        torch.float32

    Paper: none.
    """
    _check_matrix(weight, name)
    return _finite(weight, name)[0]


def check_triplets(triplets: Any, shape: Sequence[int] | None = None, *, name: str = "triplets") -> None:
    """Raise ValueError unless these are triplets, of a weight of this shape if one is given.

    Example:
        >>> check_triplets(SingularTriplets(torch.ones(2, 1), torch.ones(1), torch.ones(3, 1)), (2, 3))

    Paper: none.
    """
    repair = "give SingularTriplets(u, s, v) with u (out_features, k), s (k,) and v (in_features, k)"
    if not isinstance(triplets, tuple) or len(triplets) != 3 or not hasattr(triplets, "s"):
        raise ValueError(f"{name} is a {type(triplets).__name__}: {repair}")
    u, s, v = (getattr(triplets, part) for part in ("u", "s", "v"))
    for part, value, ndim in (("u", u, 2), ("s", s, 1), ("v", v, 2)):
        check_tensor(f"{name}.{part}", value, repair, ndim=ndim)
    k = len(s)
    given = [tuple(part.shape) for part in triplets]
    if not k or u.shape[1] != k or v.shape[1] != k:
        raise ValueError(f"{name} has shapes {given}: {repair}")
    if shape is not None and (len(u), len(v)) != tuple(shape):
        raise ValueError(f"{name} is of a {len(u)}x{len(v)} weight, this one is {tuple(shape)}: {repair}")


def _check_matrix(weight: Tensor, name: str = "weight") -> None:
    if not isinstance(weight, Tensor) or not weight.is_floating_point():
        kind = weight.dtype if isinstance(weight, Tensor) else type(weight).__name__
        raise TypeError(f"{name} is {kind}: a real floating-point tensor is needed")
    if weight.layout is not torch.strided or weight.is_meta:
        check_tensor(name, weight, "give a dense matrix")
    if weight.ndim != 2:
        raise ValueError(
            f"{name} has shape {tuple(weight.shape)}: expected (out_features, in_features); "
            "for a convolution kernel pass its patch matrix, kernel.flatten(1)"
        )
    if weight.numel() == 0:
        raise ValueError(f"{name} has shape {tuple(weight.shape)}: it has no entries")


def _finite(weight: Tensor, name: str = "weight") -> tuple[Tensor, float]:
    """The matrix in at least float32, and its largest magnitude: one pass tells that and whether all is finite."""
    matrix = weight.detach()
    if matrix.dtype not in (torch.float32, torch.float64):
        matrix = matrix.float()
    low, high = torch.aminmax(matrix)
    largest = torch.maximum(-low, high).item()
    if not math.isfinite(largest):
        bad = int((~torch.isfinite(matrix)).sum())
        raise ValueError(f"{name} holds {bad} NaN or infinite entries: lower the learning rate or check the checkpoint")
    return matrix, largest


def times_power_of_two(x: Tensor, exponent: int) -> Tensor:
    """``x * 2**exponent`` in two exact steps, because 2**exponent alone may be out of range.

    Args:
        x: any shape.
        exponent: any whole number.

    Example:
        >>> times_power_of_two(torch.tensor([0.75]), 3)
        tensor([6.])

    Paper: none.
    """
    half = exponent // 2
    return x * math.ldexp(1.0, half) * math.ldexp(1.0, exponent - half)


def in_float64(tensor: Tensor, *, copy: bool = False) -> Tensor:
    """The tensor, detached, in float64, for which MPS has to be left.

    Args:
        tensor: any shape and dtype.
        copy: whether the result must not share memory with the tensor.

    Example:
        >>> in_float64(torch.ones(2, dtype=torch.bfloat16))
        tensor([1., 1.], dtype=torch.float64)

    Paper: none.
    """
    device = "cpu" if tensor.device.type == "mps" else tensor.device
    return tensor.detach().to(device).to(torch.float64, copy=copy)


def top_mass_bound(weight: Tensor, k: int, *, rows: int = 16) -> Tensor:
    r"""At most this share of the squared spectral mass is in the top 1, 2, ... k components; no iteration.

    Cut the weight into blocks B of p rows. A best approximation of rank j of the weight is, in each block, one of rank
    j at most, so what it leaves of the whole is at least what the blocks' own best ones leave (Eckart and Young):

    .. math:: \sum_{r > j} \sigma_r(W)^2 \ge \sum_B \sum_{r > j} \sigma_r(B)^2 .

    The Gram matrix :math:`G = BB^\top`, p by p, has the eigenvalues :math:`\sigma_r(B)^2`, whose sum is its trace
    :math:`a` and whose squares' sum is :math:`\|G\|_F^2`. By Cauchy and Schwarz the largest j of any p numbers with
    these sums add up to at most :math:`(ja + \sqrt{j(p-j)(p\|G\|_F^2 - a^2)})/p`: no eigenvalue is computed. A flat
    spectrum gives about j/p and more.

    **What is guaranteed.** The bound holds for the weight as it is, rounding included: an entry of G is off by at most
    :math:`\gamma_n |B||B|^\top`, so the trace by the part :math:`\gamma_n` of it and the norm by :math:`\gamma_n a`
    (Higham 2002, section 3.5), both taken at their worst. Rows beyond the last whole block count as wholly in the top.

    Args:
        weight: ``(out_features, in_features)``, any floating dtype.
        k: how many components, ``1 <= k <= min(weight.shape)``.
        rows: p, rows of a block. More rows bound more sharply; up to 16 take about as long as two block products of
            the iteration, 32 as three. Fewer than k + 1 rows, or more than the weight has, bound nothing.

    Returns:
        ``(k,)`` in float64, increasing, at most 1; zeros for a zero weight.

    Raises:
        TypeError, ValueError: see :func:`as_matrix`; ValueError for k or rows out of range.

    Example:
        >>> bound = top_mass_bound(torch.eye(64, dtype=torch.float64), 2)
        >>> [round(share, 4) for share in bound.tolist()]  # 1/16 and 2/16; in truth 1/64 and 2/64
        [0.0625, 0.125]

    Paper: none; it decides Algorithm 1, line 9, where the spectral form of PCDR is far from the threshold. Cost: O(m n
    rows), in one pass.
    """
    _check_matrix(weight)
    _check(weight, k, None)
    rows = check_count("rows", rows, "give how many rows a block has, at least 1")
    matrix, largest = _finite(weight)
    m, n = matrix.shape
    share = torch.ones(k, dtype=torch.float64)
    if largest == 0:
        return torch.zeros_like(share)
    blocks = m // rows
    # Twice the unit roundoff, for any rounding mode; the second term is that of the float64 sums below.
    unit = n * torch.finfo(matrix.dtype).eps
    gamma = unit / (1 - unit) + rows**2 * 2.0**-50
    if not 0 < gamma < 0.5 or blocks == 0:
        return share
    if not SAFE_RANGE[0] <= largest <= SAFE_RANGE[1]:
        matrix = times_power_of_two(matrix, -math.frexp(largest)[1])
    with _full_precision(matrix.device.type):
        parts = matrix[: blocks * rows].reshape(blocks, rows, n)
        gram = in_float64(torch.bmm(parts, parts.mT))
    trace = gram.diagonal(dim1=1, dim2=2).sum(dim=1)
    norm = torch.linalg.matrix_norm(gram) + gamma * trace / (1 - gamma)
    total = trace.sum() / (1 - gamma)
    if blocks * rows < m:
        total = total + torch.linalg.vector_norm(in_float64(matrix[blocks * rows :])).square() * (1 + gamma)
    trace = trace / (1 + gamma)  # what is left over grows with the trace, and falls with the norm
    j = torch.arange(1, min(k, rows) + 1, dtype=torch.float64, device=gram.device)[:, None]
    spread = (j * (rows - j) * (rows * norm.square() - trace.square()).clamp(min=0)).sqrt()
    rest = (((rows - j) * trace - spread) / rows).clamp(min=0).sum(dim=1)
    share[: len(j)] = (1 - rest / total).clamp(min=0, max=1).cpu()
    return share


def top_singular_triplets(
    weight: Tensor,
    k: int,
    *,
    warm_start: SingularTriplets | None = None,
    tol: float = 1e-5,
    max_products: int = 400,
    oversample: int = 5,
) -> SingularTriplets:
    r"""The k largest singular triplets of one weight; :func:`solve_top_triplets` explains how.

    Args:
        weight: ``(out_features, in_features)``, any floating dtype; half precision is computed in float32.
        k: how many, ``1 <= k <= min(weight.shape)``.
        warm_start: an earlier result for a similar weight; saves products, never changes what is converged to.
        tol: largest residual relative to ``s_1``, dimensionless; in float32 not below 3e-6.
        max_products: block products before the full SVD answers instead.
        oversample: how many columns more than k the block has, at least.

    Returns:
        The triplets in float32, or in float64 for a float64 weight.

    Raises:
        TypeError, ValueError: see :func:`as_matrix`; ValueError for k out of range, a warm start of another shape, or
            an option out of range.

    Example:
        >>> top_singular_triplets(torch.diag(torch.tensor([3.0, 1.0, 2.0])), 2).s
        tensor([3., 2.])

    Paper: Algorithm 1, line 8. Cost: O(m n (k + oversample)) a product.
    """
    solved = solve_top_triplets(
        [weight], k, warm_starts=[warm_start], tol=tol, max_products=max_products, oversample=oversample
    )
    return solved[0].triplets


def solve_top_triplets(
    weights: Sequence[Tensor],
    k: int,
    *,
    warm_starts: Sequence[SingularTriplets | None] | None = None,
    tol: float = 1e-5,
    max_products: int = 400,
    oversample: int = 5,
) -> list[SolvedTriplets]:
    r"""The k largest singular triplets of several weights of one shape, side by side.

    Block Krylov iteration: from a block Q of k warm and ``oversample`` or more random vectors it spans
    :math:`Q, (W^\top W)Q, (W^\top W)^2 Q, \dots`, keeps an orthonormal basis of that space, and takes the singular
    values of W restricted to it (Rayleigh-Ritz). A layer is done when

    * each of its k residuals is small, :math:`\|W^\top u_r - s_r v_r\|_2 \le \text{tol} \cdot s_1`, and
    * no other component can be among the k largest as far as the space knows: the next one has
      :math:`s_{k+1} + 2\,\text{residual} \le s_k`, or has converged as well.

    **What is guaranteed.** The triplets satisfy :math:`W v_r = s_r u_r` and, with the residuals as the columns of R,
    :math:`u_i^\top W v_j = s_i \delta_{ij}`; so they are exact singular triplets of :math:`W - U R^\top`. By Weyl's
    inequality k singular values of W, each of its own, lie within :math:`\|R\|_2 \le \|R\|_F` of ``s``; that is
    ``error``. And :math:`s_r \le \sigma_r(W)` by interlacing, so a value is never overestimated. (Both up to the
    rounding of the products, about 1e-6 of s_1 in float32, where a tol below 3e-6 may never be met. For a wide weight
    u and v change their parts.) That the k values are the *largest* k rests on the random
    vectors in the block, which come from a fixed seed: the result is deterministic.

    A layer that has not converged after ``max_products`` is answered by the full SVD, as is any weight with fewer than
    128 rows or columns; only the first counts as ``full_svd``. On an accelerator the thin algebra of all weights is
    batched; on a CPU one weight at a time stays in the cache.

    Args:
        weights: matrices of one shape, dtype and device.
        k, tol, max_products, oversample: as in :func:`top_singular_triplets`.
        warm_starts: an earlier result, or None, for each weight.

    Returns:
        One solution a weight, in order.

    Raises:
        TypeError, ValueError: as :func:`top_singular_triplets`; ValueError for weights of several shapes.

    Example:
        >>> two = solve_top_triplets([torch.eye(2), torch.diag(torch.tensor([1.0, 5.0]))], 1)
        >>> [solved.triplets.s.item() for solved in two]
        [1.0, 5.0]

    Paper: Algorithm 1, line 8. Method: Musco and Musco (2015); Weyl's inequality.
    """
    for label, given in (("weights", weights), ("warm_starts", warm_starts)):
        if not isinstance(given, (list, tuple)) and not (given is None and label == "warm_starts"):
            raise ValueError(f"{label} is a {type(given).__name__}: give a list, with an entry for each weight")
    starts = [None] * len(weights) if warm_starts is None else list(warm_starts)
    if len(starts) != len(weights):
        raise ValueError(f"{len(starts)} warm starts were given for {len(weights)} weights")
    if len({(tuple(w.shape), w.dtype, w.device) for w in weights if isinstance(w, Tensor)}) > 1:
        raise ValueError("the weights differ in shape, dtype or device: solve each kind by itself")
    tol = check_number("tol", tol, lambda value: value > 0, "give a positive number such as 1e-5")
    oversample = check_count("oversample", oversample, "it must be at least 1")
    max_products = check_count("max_products", max_products, "it must be at least 1")
    solved: list[SolvedTriplets] = []
    batch = _batch_size(weights)
    for first in range(0, len(weights), batch):
        part = slice(first, first + batch)
        for weight, start in zip(weights[part], starts[part], strict=True):
            _check_matrix(weight)
            _check(weight, k, start)
        with _full_precision(weights[0].device.type):
            solved += _solve(weights[part], k, starts[part], tol, max_products, oversample)
    return solved


def _batch_size(weights: Sequence[Tensor]) -> int:
    on_cpu = not weights or not isinstance(weights[0], Tensor) or weights[0].device.type == "cpu"
    return 1 if on_cpu else max(1, BATCH_ENTRIES // max(1, weights[0].numel()))


def _check(weight: Tensor, k: int, start: SingularTriplets | None) -> None:
    m, n = weight.shape
    if isinstance(k, bool) or not isinstance(k, Integral) or not 1 <= k <= min(m, n):
        raise ValueError(f"k is {k}: a {m}x{n} weight has singular triplets 1 to {min(m, n)}")
    if start is not None:
        check_triplets(start, name="the warm start")
    if start is not None and (start.v.shape[0] != n or start.u.shape[0] != m):
        raise ValueError(f"the warm start is of a {start.u.shape[0]}x{start.v.shape[0]} weight, this one is {m}x{n}")


@contextmanager
def _full_precision(device_type: str) -> Iterator[None]:
    """Neither autocast nor TF32: with three digits in the products no residual would become small."""
    # Since torch 2.9 each backend has its own switch, and asking the old, common one fails once these were used.
    backends: tuple[Any, ...] = (torch.backends.cuda.matmul, getattr(torch.backends.mkldnn, "matmul", None))
    switches = [backend for backend in backends if hasattr(backend, "fp32_precision")]
    before: Any = [switch.fp32_precision for switch in switches] if switches else torch.get_float32_matmul_precision()
    try:
        if switches:
            for switch in switches:
                switch.fp32_precision = "ieee"
        else:
            torch.set_float32_matmul_precision("highest")
        with torch.autocast(device_type, enabled=False):
            yield
    finally:
        if switches:
            for switch, precision in zip(switches, before, strict=True):
                switch.fp32_precision = precision
        else:
            torch.set_float32_matmul_precision(before)


def _solve(
    weights: Sequence[Tensor],
    k: int,
    starts: Sequence[SingularTriplets | None],
    tol: float,
    max_products: int,
    oversample: int,
) -> list[SolvedTriplets]:
    matrices, largest = zip(*(_finite(weight) for weight in weights), strict=True)
    block = 8 * math.ceil((k + oversample) / 8)  # matrix products are at their best with multiples of 8
    if min(matrices[0].shape) < max(FULL_SVD_BELOW, 2 * KRYLOV_DEPTHS[-1] * block):
        return [SolvedTriplets(_full_svd(matrix, k), 0.0, 0, False) for matrix in matrices]
    # A power of two is exact, and keeps the squares inside the iteration from leaving the range of the dtype.
    exponents = [0 if SAFE_RANGE[0] <= size <= SAFE_RANGE[1] or size == 0 else math.frexp(size)[1] for size in largest]
    scaled = [times_power_of_two(a, -e) if e else a for a, e in zip(matrices, exponents, strict=True)]
    wide = scaled[0].shape[0] < scaled[0].shape[1]
    tall = [a.T if wide else a for a in scaled]  # the basis then lives in the smaller of the two spaces
    start = _starting_block(tall, [None if s is None else (s.u if wide else s.v)[:, :k] for s in starts], block)
    found, products = _block_krylov(tall, start, k, tol, max_products)
    solved = []
    for matrix, exponent, size, solution in zip(matrices, exponents, largest, found, strict=True):
        if size == 0 or solution is None:
            solved.append(SolvedTriplets(_full_svd(matrix, k), 0.0, products if size else 0, size > 0))
            continue
        (u, s, v), error, taken, _ = solution
        triplets = SingularTriplets(v, s, u) if wide else SingularTriplets(u, s, v)
        s, error = times_power_of_two(triplets.s, exponent), math.ldexp(error, exponent)
        solved.append(SolvedTriplets(triplets._replace(s=s), error, taken, False))
    return solved


def _starting_block(tall: list[Tensor], warm: list[Tensor | None], block: int) -> Tensor:
    """Orthonormal rows ``(weights, block, n)``: the warm vectors, then random ones from a fixed seed."""
    start = _random_block(tall[0], block, seed=0).repeat(len(tall), 1, 1)
    for index, vectors in enumerate(warm):
        vectors = None if vectors is None else vectors.T.to(start)
        if vectors is not None and torch.isfinite(vectors).all():
            start[index, : len(vectors)] = vectors
    return _orthonormal_rows(start)


def _random_block(a: Tensor, block: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)  # its own, so that the caller's random state stays as it is
    return torch.randn(block, a.shape[1], generator=generator, dtype=a.dtype).to(a.device)


def _orthonormal_rows(block: Tensor) -> Tensor:
    return torch.linalg.qr(block.mT)[0].mT


def _block_krylov(
    tall: list[Tensor], start: Tensor, k: int, tol: float, max_products: int
) -> tuple[list[SolvedTriplets | None], int]:
    """The solutions for matrices with m >= n, None where ``max_products`` did not suffice; and the products taken.

    Blocks are stored with their vectors as rows, ``(weights, vectors, length)``: a product then reads both factors
    along their memory, which is two to four times faster on a CPU than the textbook orientation.
    """
    found: list[SolvedTriplets | None] = [None] * len(tall)
    active = list(range(len(tall)))
    basis, products = start, 0
    noise = _random_block(tall[0], start.shape[1], seed=1)
    while active:
        images = _multiply(tall, active, basis)
        products += 1
        for depth in range(2, KRYLOV_DEPTHS[-1] + 1):
            new = _multiply(tall, active, images[:, -start.shape[1] :], adjoint=True)
            # Where the space is exhausted (rank one, dead inputs) rounding is left, or exact zeros, and neither need be
            # independent of the basis; a random direction of the size of rounding is.
            size = torch.finfo(new.dtype).eps * new.abs().amax((1, 2), keepdim=True)
            new = new + size.clamp(min=torch.finfo(new.dtype).tiny) * noise.roll(depth, -1)
            for _ in range(2):  # twice is enough: once leaves the rounding of what was subtracted
                new = _orthonormal_rows(new - (new @ basis.mT) @ basis)
            basis = torch.cat([basis, new], dim=1)
            images = torch.cat([images, _multiply(tall, active, new)], dim=1)
            products += 2
            if depth not in KRYLOV_DEPTHS:
                continue
            left, s, right = _rayleigh_ritz(basis, images)
            products += 1
            done = _converged(tall, active, left, s, right, k, tol)
            for row, error in done.items():
                u, v = left[row, :k].T, right[row, :k].T
                found[active[row]] = SolvedTriplets(_owned(u, s[row, :k], v), error, products, False)
            rest = [row for row in range(len(active)) if row not in done]
            if done and rest:
                basis, images, right = basis[rest], images[rest], right[rest]
            active = [active[row] for row in rest]
            if not active or products >= max_products:
                return found, products
        basis = right[:, : start.shape[1]]
    return found, products


def _multiply(tall: list[Tensor], active: list[int], block: Tensor, *, adjoint: bool = False) -> Tensor:
    """``A x`` (or ``A^T x``) for the rows x of each block; the weights themselves are never stacked or copied."""
    if len(active) == 1:
        a = tall[active[0]]
        return (block[0] @ (a if adjoint else a.T)).unsqueeze(0)
    return torch.stack([block[row] @ (tall[i] if adjoint else tall[i].T) for row, i in enumerate(active)])


def _rayleigh_ritz(basis: Tensor, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Left vectors, values and right vectors (as rows) of the matrix restricted to the span of a basis."""
    q, r = torch.linalg.qr(images.mT)
    left, s, right = torch.linalg.svd(r)
    return (q @ left).mT, s, right @ basis


def _converged(
    tall: list[Tensor], active: list[int], left: Tensor, s: Tensor, right: Tensor, k: int, tol: float
) -> dict[int, float]:
    """Which of the active matrices are done, with the guaranteed error of their singular values."""
    residual = _multiply(tall, active, left[:, : k + 1], adjoint=True) - right[:, : k + 1] * s[:, : k + 1, None]
    size = torch.linalg.vector_norm(residual, dim=2)
    limit = tol * s[:, 0]
    # Twice the residual, because beside this Ritz vector others may hide that are found as slowly.
    next_is_out = (s[:, k] + 2 * size[:, k] <= s[:, k - 1]) | (size[:, k] <= limit)
    done = (size[:, :k] <= limit[:, None]).all(1) & next_is_out
    error = torch.linalg.vector_norm(size[:, :k], dim=1)
    return {row: e for row, (ok, e) in enumerate(zip(done.tolist(), error.tolist(), strict=True)) if ok}


def _full_svd(matrix: Tensor, k: int) -> SingularTriplets:
    u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
    return _owned(u[:, :k], s[:k], vh[:k].T)


def _owned(u: Tensor, s: Tensor, v: Tensor) -> SingularTriplets:
    """Copies: a view would keep the whole factor alive for as long as the triplets are cached."""
    return SingularTriplets(*(part.clone(memory_format=torch.contiguous_format) for part in (u, s, v)))
