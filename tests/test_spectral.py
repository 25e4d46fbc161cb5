"""The singular triplets and the spectral norm's enclosure.

Oracles: the construction ``U diag(s) V^T`` itself, closed forms, ``torch.linalg`` in float64, and, where not even the
last bit may be forgiven, mpmath with 60 digits or matrices whose norm is a floating-point number.
"""

from __future__ import annotations

import math

import mpmath
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays
from torch import Tensor

from s2d.spectral import (
    FULL_SVD_BELOW,
    SingularTriplets,
    SpectralNormBounds,
    as_matrix,
    spectral_norm_bounds,
    top_singular_triplets,
)

TOL = 1e-5  # the documented residual of the iteration, relative to s_1
ORACLE = 1e-13  # the rounding of LAPACK's own float64 answer
HALF = [torch.float16, torch.bfloat16]
FLOATS = [*HALF, torch.float32, torch.float64]


def gaussian(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def planted(m: int, n: int, s: Tensor, seed: int = 0) -> Tensor:
    """A float64 matrix with these singular values and random singular vectors."""
    u, _ = torch.linalg.qr(gaussian(m, len(s), seed=seed))
    v, _ = torch.linalg.qr(gaussian(n, len(s), seed=seed + 1))
    return (u * s) @ v.T


def spectrum(kind: str, r: int) -> Tensor:
    """``r`` singular values, largest first."""
    index = torch.arange(r, dtype=torch.float64)
    return {
        "gapped": 0.9**index,
        "gapless": 1 - index / (2 * r),
        "clustered": torch.where(index < 6, 2 - 1e-9 * index, 1 - index / (2 * r)),
        "repeated": torch.where(index < 5, 2.0, 1.0),
        "flat": torch.ones(r, dtype=torch.float64),
        "rank deficient": torch.where(index < 4, 1 - index / 8, 0.0),
        "rank one": torch.where(index < 1, 3.0, 0.0),
        "steep": 10.0 ** (-2 * index.clamp(max=150)),
    }[kind].double()


KINDS = ["gapped", "gapless", "clustered", "repeated", "flat", "rank deficient", "rank one", "steep"]
SHAPES = [(1, 1), (1, 9), (9, 1), (20, 12), (12, 20), (127, 300), (FULL_SVD_BELOW, 150), (260, 140), (140, 260)]


def check_triplets(weight: Tensor, triplets: SingularTriplets, k: int, tol: float = TOL) -> None:
    """Shapes, orthonormality, both residuals, and the values against LAPACK in float64."""
    m, n = weight.shape
    w = weight.double()
    u, s, v = (t.double() for t in triplets)
    assert (u.shape, s.shape, v.shape) == ((m, k), (k,), (n, k))
    truth = torch.linalg.svdvals(w)[:k]
    top = truth[0].item()
    torch.testing.assert_close(s, truth, rtol=0, atol=2 * tol * top)
    assert (s >= 0).all() and (s.diff() <= 0).all()
    identity = torch.eye(k, dtype=torch.float64)
    torch.testing.assert_close(u.T @ u, identity, rtol=0, atol=tol)
    torch.testing.assert_close(v.T @ v, identity, rtol=0, atol=tol)
    torch.testing.assert_close(w @ v, u * s, rtol=0, atol=2 * tol * top)
    torch.testing.assert_close(w.T @ u, v * s, rtol=0, atol=2 * tol * top)


# as_matrix


@pytest.mark.parametrize("dtype", [*HALF, torch.float8_e4m3fn, torch.float8_e5m2])
def test_narrow_dtypes_become_float32(dtype: torch.dtype) -> None:
    matrix = as_matrix(torch.eye(3).to(dtype))
    assert matrix.dtype == torch.float32
    assert torch.equal(matrix, torch.eye(3))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_wide_dtypes_stay_and_the_graph_is_left(dtype: torch.dtype) -> None:
    matrix = as_matrix(torch.nn.Parameter(torch.eye(2, dtype=dtype)))
    assert matrix.dtype == dtype
    assert not matrix.requires_grad


BAD_WEIGHTS = [
    (torch.ones(3), ValueError, r"shape \(3,\)"),
    (torch.ones(2, 3, 3, 3), ValueError, r"shape \(2, 3, 3, 3\).*flatten\(1\)"),
    (torch.tensor(1.0), ValueError, r"shape \(\)"),
    (torch.ones(0, 4), ValueError, r"shape \(0, 4\).*no entries"),
    (torch.tensor([[1.0, math.nan], [math.nan, 0.0]]), ValueError, "2 NaN or infinite"),
    (torch.tensor([[1.0, -math.inf]]), ValueError, "1 NaN or infinite"),
    (torch.tensor([[math.inf]], dtype=torch.float16), ValueError, "1 NaN or infinite"),
    (torch.ones(2, 2, dtype=torch.int64), TypeError, "torch.int64"),
    (torch.ones(2, 2, dtype=torch.bool), TypeError, "torch.bool"),
    (torch.ones(2, 2, dtype=torch.complex64), TypeError, "torch.complex64"),
    ([[1.0]], TypeError, "list"),
    (np.eye(2), TypeError, "ndarray"),
]


@pytest.mark.parametrize("function", [as_matrix, lambda w: top_singular_triplets(w, 1), spectral_norm_bounds])
@pytest.mark.parametrize(("weight", "error", "message"), BAD_WEIGHTS)
def test_what_is_no_finite_matrix_is_refused(function, weight, error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        function(weight)


def test_the_given_name_is_in_the_message() -> None:
    with pytest.raises(ValueError, match="kernel has shape"):
        as_matrix(torch.ones(3), name="kernel")


# The top triplets


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", KINDS)
def test_triplets_match_the_full_svd(shape: tuple[int, int], kind: str) -> None:
    r = min(shape)
    weight = planted(*shape, spectrum(kind, r))
    for k in {1, min(3, r)}:
        check_triplets(weight, top_singular_triplets(weight, k), k)


@pytest.mark.parametrize("shape", [(5, 7), (7, 5), (200, 130), (130, 200)])
def test_every_triplet_rebuilds_the_weight(shape: tuple[int, int]) -> None:
    weight = gaussian(*shape)
    k = min(shape)
    triplets = top_singular_triplets(weight, k)
    check_triplets(weight, triplets, k, tol=1e-11)
    torch.testing.assert_close((triplets.u * triplets.s) @ triplets.v.T, weight, rtol=0, atol=1e-11)


@pytest.mark.parametrize("shape", [(6, 4), (150, 200)])
def test_the_zero_matrix(shape: tuple[int, int]) -> None:
    triplets = top_singular_triplets(torch.zeros(shape), 2)
    assert torch.equal(triplets.s, torch.zeros(2))
    check_triplets(torch.zeros(shape), triplets, 2)


@pytest.mark.parametrize("size", [6, 150])
def test_a_diagonal_matrix_gives_its_entries(size: int) -> None:
    diagonal = torch.linspace(1, 2, size, dtype=torch.float64) * (-1) ** torch.arange(size)
    u, s, v = top_singular_triplets(torch.diag(diagonal), 3, tol=1e-10)
    torch.testing.assert_close(s, diagonal.abs().flip(0)[:3], rtol=1e-9, atol=0)
    for r in range(3):
        axis = size - 1 - r
        assert abs(v[axis, r].abs() - 1) < 1e-6
        assert torch.sign(u[axis, r] * v[axis, r]) == torch.sign(diagonal[axis])


@pytest.mark.parametrize("shape", [(5, 3), (180, 140)])
def test_rank_one_in_closed_form(shape: tuple[int, int]) -> None:
    a, b = gaussian(shape[0], 1, seed=3)[:, 0], gaussian(shape[1], 1, seed=4)[:, 0]
    u, s, v = top_singular_triplets(torch.outer(a, b), 3)
    torch.testing.assert_close(s[0], a.norm() * b.norm())
    assert s[1] < 1e-12 * s[0]
    torch.testing.assert_close(torch.outer(u[:, 0], v[:, 0]), torch.outer(a / a.norm(), b / b.norm()))


@pytest.mark.parametrize("size", [64, 256])
def test_scaled_orthogonal_in_closed_form(size: int) -> None:
    q, _ = torch.linalg.qr(gaussian(size, size))
    torch.testing.assert_close(top_singular_triplets(2.5 * q, 3).s, torch.full((3,), 2.5, dtype=torch.float64))


def test_separated_vectors_match_lapack() -> None:
    weight = planted(300, 200, spectrum("gapped", 200))
    u, s, vh = torch.linalg.svd(weight, full_matrices=False)
    triplets = top_singular_triplets(weight, 3)
    rank_one = torch.einsum("mr,nr->rmn", triplets.u, triplets.v)
    torch.testing.assert_close(rank_one, torch.einsum("mr,rn->rmn", u[:, :3], vh[:3]), rtol=0, atol=1e-3)


@pytest.mark.parametrize("shape", [(20, 30), (140, 160)])
@pytest.mark.parametrize("dtype", FLOATS)
def test_dtypes(shape: tuple[int, int], dtype: torch.dtype) -> None:
    weight = planted(*shape, spectrum("gapped", min(shape))).to(dtype)
    triplets = top_singular_triplets(weight, 2)
    assert {t.dtype for t in triplets} == {torch.float64 if dtype == torch.float64 else torch.float32}
    check_triplets(weight, triplets, 2)  # of the rounded weight: half precision is computed in float32


@pytest.mark.parametrize(
    ("dtype", "scales"),
    [(torch.float32, [1e-36, 1e-30, 1e-20, 1e20, 1e30, 1e36]), (torch.float64, [1e-300, 1e-200, 1e-100, 1e200, 1e300])],
)
@pytest.mark.parametrize("shape", [(20, 12), (200, 160)])
def test_the_answer_scales_with_the_weight(shape: tuple[int, int], dtype: torch.dtype, scales: list[float]) -> None:
    weight = gaussian(*shape)  # a continuous spectrum, in which a first guess is far from the answer
    truth = torch.linalg.svdvals(weight)[:3]
    for scale in scales:
        s = top_singular_triplets((weight * scale).to(dtype), 3).s.double() / scale
        torch.testing.assert_close(s, truth, rtol=1e-4, atol=0, msg=lambda m, scale=scale: f"scale {scale}: {m}")


def test_the_result_is_bitwise_repeatable_and_leaves_the_global_generator_alone() -> None:
    weight = gaussian(200, 160).float()
    torch.manual_seed(1)
    state = torch.get_rng_state()
    first = top_singular_triplets(weight, 3)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(2)
    second = top_singular_triplets(weight.clone(), 3)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_the_weight_is_not_changed_and_the_result_owns_its_memory() -> None:
    for shape in [(8, 6), (200, 160)]:
        weight = gaussian(*shape)
        before = weight.clone()
        triplets = top_singular_triplets(weight, 3)
        assert torch.equal(weight, before)
        # A view would keep the full factors alive, as large as the weight, for as long as the triplets are cached.
        assert all(t.is_contiguous() and t.untyped_storage().nbytes() == t.nbytes for t in triplets)


@pytest.mark.parametrize("options", [{"max_iterations": 0}, {"max_iterations": 1}, {"tol": 0.0}])
def test_an_iteration_that_gives_up_is_replaced_by_the_full_svd(options: dict) -> None:
    weight = planted(200, 160, spectrum("gapless", 160))
    check_triplets(weight, top_singular_triplets(weight, 3, **options), 3, tol=1e-12)


def test_tol_is_honoured() -> None:
    weight = planted(260, 150, spectrum("gapped", 150))
    for tol in (1e-2, 1e-6, 1e-10):
        u, s, v = top_singular_triplets(weight, 3, tol=tol)
        assert torch.linalg.vector_norm(weight @ v - u * s, dim=0).max() <= tol * s[0] * (1 + 1e-6)


# Warm starts


@pytest.mark.parametrize("k", [1, 3])
@pytest.mark.parametrize("kind", ["gapped", "gapless", "repeated", "rank deficient"])
@pytest.mark.parametrize("change", [0.0, 1e-6, 1e-3, 0.1])
def test_a_warm_start_does_not_change_the_answer(k: int, kind: str, change: float) -> None:
    before = planted(200, 150, spectrum(kind, 150))
    after = before + change * gaussian(200, 150, seed=9) / 200**0.5
    warm = top_singular_triplets(after, k, warm_start=top_singular_triplets(before, 3))
    check_triplets(after, warm, k)


@pytest.mark.parametrize("height", [1.02, 1.05, 1.5, 10.0])
def test_a_warm_start_does_not_hide_a_component_that_has_grown_since(height: float) -> None:
    # The old top vectors are still exact singular vectors, so their residual is zero; a new one has overtaken them.
    s = torch.full((160,), 0.9, dtype=torch.float64)
    s[:3] = 1.0
    before = planted(200, 160, s)
    s[100] = height
    after = planted(200, 160, s)
    check_triplets(after, top_singular_triplets(after, 3, warm_start=top_singular_triplets(before, 3)), 3)


@pytest.mark.parametrize("kept", [1, 3, 11, 30])
def test_a_warm_start_may_hold_fewer_or_more_triplets(kept: int) -> None:
    weight = planted(200, 150, spectrum("gapped", 150))
    warm = top_singular_triplets(weight, 3, warm_start=top_singular_triplets(weight, kept))
    check_triplets(weight, warm, 3)


def test_a_warm_start_of_another_weight_altogether() -> None:
    weight = planted(200, 150, spectrum("gapped", 150), seed=5)
    other = top_singular_triplets(planted(200, 150, spectrum("gapped", 150), seed=50), 3)
    check_triplets(weight, top_singular_triplets(weight, 3, warm_start=other), 3)


def test_a_warm_start_saves_work(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = planted(300, 200, spectrum("gapless", 200))
    calls = []
    qr = torch.linalg.qr
    monkeypatch.setattr(torch.linalg, "qr", lambda a: calls.append(1) or qr(a))
    cold = top_singular_triplets(weight, 3, max_iterations=500)
    needed = len(calls)
    top_singular_triplets(weight, 3, warm_start=cold, max_iterations=500)
    assert 2 * (len(calls) - needed) < needed


@pytest.mark.parametrize("shape", [(200, 150), (12, 10)])
def test_a_foreign_warm_start_is_refused(shape: tuple[int, int]) -> None:
    warm = top_singular_triplets(gaussian(*shape), 2)
    message = f"{shape[0]}x{shape[1]} weight, this one is"
    for other in [(shape[1], shape[0]), (shape[0] + 1, shape[1]), (shape[0], shape[1] + 1)]:
        with pytest.raises(ValueError, match=message):
            top_singular_triplets(gaussian(*other), 2, warm_start=warm)


@pytest.mark.parametrize("k", [0, -1, 5, 2.0, "2", None])
def test_a_k_out_of_range_is_named(k) -> None:
    with pytest.raises(ValueError, match=f"k is {k}: a 4x6 weight has singular triplets 1 to 4"):
        top_singular_triplets(torch.ones(4, 6), k)


# The enclosure of the spectral norm


def check_enclosure(weight: Tensor, rtol: float = 1e-3) -> SpectralNormBounds:
    bounds = spectral_norm_bounds(weight) if rtol == 1e-3 else spectral_norm_bounds(weight, rtol=rtol)
    truth = torch.linalg.svdvals(weight.double())[0].item()
    assert bounds.lower <= truth * (1 + ORACLE)
    assert truth * (1 - ORACLE) <= bounds.upper
    assert bounds.upper <= bounds.lower * (1 + rtol)
    return bounds


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", KINDS)
def test_the_enclosure_holds_and_is_tight(shape: tuple[int, int], kind: str) -> None:
    check_enclosure(planted(*shape, spectrum(kind, min(shape))))


@pytest.mark.parametrize("dtype", FLOATS)
def test_the_enclosure_over_many_random_shapes(dtype: torch.dtype) -> None:
    shapes = torch.randint(1, 40, (60, 2), generator=torch.Generator().manual_seed(0)).tolist()
    for seed, (m, n) in enumerate(shapes):
        check_enclosure(gaussian(m, n, seed=seed).to(dtype))


@pytest.mark.parametrize("shape", [(1, 1), (7, 4), (4, 7), (30, 30)])
@pytest.mark.parametrize("exponent", [-300, -250, -160, -100, -30, 0, 30, 100, 150, 250, 300])
def test_float64_at_every_scale(shape: tuple[int, int], exponent: int) -> None:
    for weight in (gaussian(*shape), planted(*shape, spectrum("rank one", min(shape)))):
        check_enclosure(weight * 10.0**exponent)


@pytest.mark.parametrize("scale", [1e-44, 1e-40, 1e-38, 1e-20, 1.0, 1e20, 1e38])
def test_float32_at_every_scale(scale: float) -> None:
    weight = (gaussian(9, 6).clamp(-3, 3) * scale).float()
    assert weight.abs().max() > 0
    check_enclosure(weight)


def test_the_ends_of_float64() -> None:
    # Nothing can be tight where floating-point numbers are sparse; the enclosure must be valid all the same.
    smallest, largest = 5e-324, 1.7e308
    bounds = spectral_norm_bounds(torch.full((2, 2), smallest, dtype=torch.float64))
    assert bounds.lower <= 2 * smallest <= bounds.upper <= 16 * smallest
    bounds = spectral_norm_bounds(
        torch.full((2, 2), largest, dtype=torch.float64)
    )  # 3.4e308 is past the largest number
    assert 1e308 < bounds.lower <= math.nextafter(math.inf, 0)
    assert bounds.upper == math.inf
    mixed = torch.diag(torch.tensor([largest, 1.0, smallest], dtype=torch.float64))
    bounds = spectral_norm_bounds(mixed)
    assert bounds.lower <= largest <= bounds.upper <= largest * 1.001


@pytest.mark.parametrize("shape", [(1, 1), (3, 5), (200, 300)])
def test_the_zero_matrix_has_norm_zero(shape: tuple[int, int]) -> None:
    assert spectral_norm_bounds(torch.zeros(shape)) == (0.0, 0.0)
    assert spectral_norm_bounds(-torch.zeros(shape)) == (0.0, 0.0)


# Matrices whose norm is a floating-point number: no tolerance at all.
HADAMARD = torch.tensor([[1.0]], dtype=torch.float64)
for _ in range(4):
    HADAMARD = torch.cat([torch.cat([HADAMARD, HADAMARD], 1), torch.cat([HADAMARD, -HADAMARD], 1)])
EXACT = {
    "identity": (torch.eye(50), 1.0),
    "scaled identity": (0.1 * torch.eye(50, dtype=torch.float64), 0.1),
    "one entry": (torch.tensor([[-0.3]], dtype=torch.float64), 0.3),
    "diagonal": (torch.diag(torch.tensor([3.0, -4.0, 2.0])), 4.0),
    "ones 9x16": (torch.full((9, 16), 0.1, dtype=torch.float64), None),
    "Hadamard": (HADAMARD, 4.0),
    "permutation": (torch.eye(31)[torch.randperm(31, generator=torch.Generator().manual_seed(0))], 1.0),
    "rank one": (torch.outer(torch.tensor([3.0, 4.0]), torch.tensor([5.0, 12.0])), 65.0),
    "row": (torch.tensor([[2.0, 3.0, 6.0]]), 7.0),
    "column": (torch.tensor([[2.0], [3.0], [6.0]]), 7.0),
    "repeated top": (torch.diag(torch.tensor([5.0] * 20 + [1.0] * 20)), 5.0),
    "nearly repeated top": (torch.diag(1 - torch.arange(150, dtype=torch.float64) * 1e-12), 1.0),
}


@pytest.mark.parametrize("name", EXACT)
def test_an_exactly_known_norm_lies_in_the_enclosure(name: str) -> None:
    weight, norm = EXACT[name]
    lower, upper = spectral_norm_bounds(weight)
    if norm is None:  # ones * c of m x n has norm c * sqrt(m n) = 12 c; compare without rounding the product
        exact = mpmath.mpf(0.1) * 12
        assert mpmath.mpf(lower) <= exact <= mpmath.mpf(upper)
    else:
        assert lower <= norm <= upper <= norm * 1.001


def mp_norm(weight: Tensor) -> mpmath.mpf:
    """The spectral norm to 60 digits."""
    with mpmath.workdps(60):
        matrix = mpmath.matrix(weight.double().tolist())
        return max(mpmath.svd_r(matrix, compute_uv=False))


@pytest.mark.parametrize("size", [2, 5, 9])
def test_hilbert_against_60_digits(size: int) -> None:
    index = torch.arange(size, dtype=torch.float64)
    weight = 1 / (index[:, None] + index + 1)
    lower, upper = check_enclosure(weight)
    assert mpmath.mpf(lower) <= mp_norm(weight) <= mpmath.mpf(upper)


entries = st.one_of(
    st.floats(allow_nan=False, allow_infinity=False),
    st.floats(-1, 1),
    st.sampled_from([0.0, 1.0, -1.0, 5e-324, 2.2250738585072014e-308, 1.7976931348623157e308, 1e-160, 1e160]),
)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(arrays(np.float64, array_shapes(min_dims=2, max_dims=2, min_side=1, max_side=5), elements=entries))
def test_no_finite_matrix_escapes_its_enclosure(array: np.ndarray) -> None:
    weight = torch.from_numpy(array)
    lower, upper = spectral_norm_bounds(weight)
    truth = mp_norm(weight)
    assert 0 <= lower <= upper
    # The oracle's own error at 60 digits.
    assert mpmath.mpf(lower) <= truth * (1 + mpmath.mpf(10) ** -50)
    assert math.isinf(upper) or truth * (1 - mpmath.mpf(10) ** -50) <= mpmath.mpf(upper)
    if 1e-300 < truth < 1e308:
        assert upper <= lower * (1 + 1e-3)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    st.integers(1, 48),
    st.integers(1, 48),
    st.integers(0, 2**31),
    st.sampled_from(KINDS),
    st.integers(-280, 280),
    st.sampled_from([1e-6, 1e-4, 1e-3, 0.1, 0.9]),
)
def test_width_and_enclosure_over_spectra_scales_and_rtol(
    m: int, n: int, seed: int, kind: str, exponent: int, rtol: float
) -> None:
    check_enclosure(planted(m, n, spectrum(kind, min(m, n)), seed=seed) * 10.0**exponent, rtol)


def test_the_enclosure_is_repeatable_symmetric_and_pure() -> None:
    weight = gaussian(30, 20)
    before = weight.clone()
    state = torch.get_rng_state()
    bounds = spectral_norm_bounds(weight)
    assert torch.equal(weight, before)
    assert torch.equal(torch.get_rng_state(), state)
    assert spectral_norm_bounds(weight) == bounds == spectral_norm_bounds(weight.T)
    assert all(type(end) is float for end in bounds)


@pytest.mark.parametrize("exponent", [-900, -126, -1, 1, 3, 127, 900])
def test_a_power_of_two_moves_the_enclosure_exactly(exponent: int) -> None:
    weight = gaussian(12, 17)
    bounds = spectral_norm_bounds(weight)
    scaled = spectral_norm_bounds(weight * 2.0**exponent)
    assert scaled == (math.ldexp(bounds.lower, exponent), math.ldexp(bounds.upper, exponent))


def test_orthogonal_factors_do_not_change_the_norm() -> None:
    weight = gaussian(25, 25)
    q, _ = torch.linalg.qr(gaussian(25, 25, seed=7))
    (a, b), (c, d) = spectral_norm_bounds(weight), spectral_norm_bounds(q @ weight)
    assert max(a, c) <= min(b, d) * (1 + 1e-12)


@pytest.mark.parametrize("rtol", [0.0, 1e-7, 1.0, -1e-3, math.nan, math.inf])
def test_an_rtol_out_of_range_is_named(rtol: float) -> None:
    with pytest.raises(ValueError, match=f"rtol is {rtol}: choose between 1e-6 and 1"):
        spectral_norm_bounds(torch.eye(2), rtol=rtol)


def test_power_iteration_alone_would_not_do() -> None:
    # The reason for the certificate: an estimate from below is below.
    weight = planted(60, 60, spectrum("gapless", 60))
    x = gaussian(60, 1)
    for _ in range(10):
        x = weight.T @ (weight @ x)
        x /= x.norm()
    estimate = (weight @ x).norm().item()
    truth = torch.linalg.svdvals(weight)[0].item()
    assert estimate < truth * (1 - 1e-3)
    assert spectral_norm_bounds(weight).upper >= truth
