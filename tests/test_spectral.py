"""The few largest singular triplets, one weight at a time and side by side.

Oracles: ``torch.linalg`` in float64, the construction ``U diag(s) V^T`` itself, and closed forms.
"""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from s2d import spectral
from s2d.spectral import (
    FULL_SVD_BELOW,
    SingularTriplets,
    SolvedTriplets,
    as_matrix,
    solve_top_triplets,
    top_mass_bound,
    top_singular_triplets,
)

TOL = 1e-5  # the documented residual of the iteration, relative to s_1
HALF = [torch.float16, torch.bfloat16]
FLOATS = [*HALF, torch.float32, torch.float64]
# Relative to s_1: the rounding of the products and of LAPACK, which the guarantee leaves out.
ROUNDING = {torch.float32: 5e-6, torch.float64: 5e-14}


def gaussian(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def orthonormal(m: int, k: int, seed: int = 0) -> Tensor:
    return torch.linalg.qr(gaussian(m, k, seed=seed))[0]


def planted(m: int, n: int, s: Tensor, seed: int = 0) -> Tensor:
    """A float64 matrix with these singular values and random singular vectors."""
    return (orthonormal(m, len(s), seed) * s) @ orthonormal(n, len(s), seed + 1).T


def spectrum(kind: str, r: int) -> Tensor:
    """``r`` singular values, largest first."""
    index = torch.arange(r, dtype=torch.float64)
    bulk = 1 - index / r  # about the upper half of a gaussian matrix's spectrum
    return {
        "gapped": 0.9**index,
        "gapless": 1 - index / (2 * r),
        "planted": torch.where(index < 3, 3 - 0.75 * index, bulk),
        "power law": (index + 1) ** -0.5,
        "clustered": torch.where(index < 6, 2 - 1e-9 * index, 1 - index / (2 * r)),
        "repeated": torch.where(index < 5, 2.0, 1.0),
        "repeated past the block": torch.where(index < 20, 2.0, bulk),
        "flat": torch.ones(r, dtype=torch.float64),
        "rank deficient": torch.where(index < 4, 1 - index / 8, 0.0),
        "rank one": torch.where(index < 1, 3.0, 0.0),
        "steep": 10.0 ** (-2 * index.clamp(max=150)),
        "zero": torch.zeros(r, dtype=torch.float64),
    }[kind].double()


KINDS = [
    "gapped",
    "gapless",
    "planted",
    "power law",
    "clustered",
    "repeated",
    "repeated past the block",
    "flat",
    "rank deficient",
    "rank one",
    "steep",
    "zero",
]
SMALL_SHAPES = [(1, 1), (1, 9), (9, 1), (20, 12), (12, 20), (127, 300)]
LARGE_SHAPES = [(FULL_SVD_BELOW, 150), (150, FULL_SVD_BELOW), (129, 129), (260, 140), (140, 260)]


def svd_triplets(weight: Tensor, chosen: list[int]) -> SingularTriplets:
    """Exact triplets of the oracle, in float64."""
    u, s, vh = torch.linalg.svd(weight.double(), full_matrices=False)
    return SingularTriplets(u[:, chosen], s[chosen], vh[chosen].T)


def matched(s: Tensor, truth: Tensor, radius: float) -> bool:
    """Whether each value has a true one of its own within the radius."""
    unused = sorted(truth.tolist())
    for value in sorted(s.tolist()):  # with one radius for all, taking the smallest that fits is optimal
        unused = [t for t in unused if t >= value - radius]
        if not unused or unused.pop(0) > value + radius:
            return False
    return True


def check_solution(weight: Tensor, solved: SolvedTriplets, k: int, tol: float = TOL) -> None:
    """Everything the docstring promises, against LAPACK in float64."""
    m, n = weight.shape
    dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32
    assert {t.dtype for t in solved.triplets} == {dtype}
    u, s, v = (t.double() for t in solved.triplets)
    assert (u.shape, s.shape, v.shape) == ((m, k), (k,), (n, k))
    assert (s >= 0).all() and (s.diff() <= 0).all()
    # Subnormal numbers have few digits; the smallest normal one stands for their spacing, generously.
    absolute = torch.finfo(dtype).tiny * 1e-3
    scale = max(torch.linalg.matrix_norm(weight.double()).item(), absolute)
    w, s, error, absolute = weight.double() / scale, s / scale, solved.error / scale, absolute / scale
    truth = torch.linalg.svdvals(w)
    rounding = ROUNDING[dtype] * truth[0].item() + absolute
    # What is guaranteed whatever the iteration missed ...
    assert error <= math.sqrt(k) * tol * truth[0].item() + rounding
    assert matched(s, truth, error + rounding)
    assert (s <= truth[:k] + rounding).all()
    identity = torch.eye(k, dtype=torch.float64)
    torch.testing.assert_close(u.T @ u, identity, rtol=0, atol=2 * ROUNDING[dtype])
    torch.testing.assert_close(v.T @ v, identity, rtol=0, atol=2 * ROUNDING[dtype])
    for residual in (w @ v - u * s, w.T @ u - v * s):
        assert torch.linalg.vector_norm(residual, dim=0).max() <= tol * truth[0].item() + rounding
    # ... and that it missed nothing.
    torch.testing.assert_close(s, truth[:k], rtol=0, atol=tol * truth[0].item() + error + rounding)
    # A view would keep whole factors alive, as large as the weight, for as long as the triplets are cached.
    assert all(t.is_contiguous() and t.untyped_storage().nbytes() == t.nbytes for t in solved.triplets)


def solve_one(weight: Tensor, k: int = 3, warm: SingularTriplets | None = None, **options) -> SolvedTriplets:
    return solve_top_triplets([weight], k, warm_starts=[warm], **options)[0]


def equal(a: SolvedTriplets, b: SolvedTriplets) -> bool:
    """Bit for bit."""
    return a[1:] == b[1:] and all(torch.equal(x, y) for x, y in zip(a.triplets, b.triplets, strict=True))


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


@pytest.mark.parametrize(
    "function",
    [
        as_matrix,
        lambda w: top_singular_triplets(w, 1),
        lambda w: solve_top_triplets([w], 1),
        lambda w: top_mass_bound(w, 1),
    ],
)
@pytest.mark.parametrize(("weight", "error", "message"), BAD_WEIGHTS)
def test_what_is_no_finite_matrix_is_refused(function, weight, error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        function(weight)


def test_the_given_name_is_in_the_message() -> None:
    with pytest.raises(ValueError, match="kernel has shape"):
        as_matrix(torch.ones(3), name="kernel")


# The top triplets


@pytest.mark.parametrize("shape", SMALL_SHAPES + LARGE_SHAPES)
@pytest.mark.parametrize("kind", KINDS)
def test_triplets_match_the_full_svd(shape: tuple[int, int], kind: str) -> None:
    r = min(shape)
    for dtype in (torch.float32, torch.float64):
        weight = planted(*shape, spectrum(kind, r)).to(dtype)
        for k in {1, min(3, r)}:
            check_solution(weight, solve_one(weight, k), k)


@pytest.mark.parametrize("shape", [(5, 7), (7, 5), (200, 130), (130, 200)])
def test_every_triplet_rebuilds_the_weight(shape: tuple[int, int]) -> None:
    weight = gaussian(*shape)
    k = min(shape)
    solved = solve_one(weight, k)
    check_solution(weight, solved, k, tol=1e-13)
    u, s, v = solved.triplets
    torch.testing.assert_close((u * s) @ v.T, weight, rtol=0, atol=1e-11)


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
    q = orthonormal(size, size)
    torch.testing.assert_close(top_singular_triplets(2.5 * q, 3).s, torch.full((3,), 2.5, dtype=torch.float64))


def test_separated_vectors_match_lapack() -> None:
    weight = planted(300, 200, spectrum("gapped", 200))
    oracle = svd_triplets(weight, [0, 1, 2])
    triplets = top_singular_triplets(weight, 3)
    rank_one = torch.einsum("mr,nr->rmn", triplets.u, triplets.v)
    torch.testing.assert_close(rank_one, torch.einsum("mr,nr->rmn", oracle.u, oracle.v), rtol=0, atol=1e-3)


@pytest.mark.parametrize("shape", [(20, 30), (140, 160)])
@pytest.mark.parametrize("dtype", FLOATS)
def test_dtypes(shape: tuple[int, int], dtype: torch.dtype) -> None:
    weight = planted(*shape, spectrum("gapped", min(shape))).to(dtype)
    check_solution(weight, solve_one(weight), 3)  # of the rounded weight: half precision is computed in float32


# The last ones are subnormal in part, or have squares and products far out of range.
SCALES = {torch.float32: [1e-38, 1e-30, 1e-13, 1e13, 1e36], torch.float64: [1e-305, 1e-200, 1e-13, 1e13, 1e300]}


@pytest.mark.parametrize(("dtype", "scale"), [(dtype, scale) for dtype, scales in SCALES.items() for scale in scales])
@pytest.mark.parametrize("shape", [(20, 12), (200, 160)])
def test_the_answer_scales_with_the_weight(shape: tuple[int, int], dtype: torch.dtype, scale: float) -> None:
    weight = gaussian(*shape)  # a continuous spectrum, in which a first guess is far from the answer
    scaled = (weight * scale).to(dtype)
    solved = solve_one(scaled, 3)
    assert not solved.full_svd
    check_solution(scaled, solved, 3)
    torch.testing.assert_close(solved.triplets.s.double() / scale, torch.linalg.svdvals(weight)[:3], rtol=1e-4, atol=0)


def test_the_weight_is_not_changed() -> None:
    for scale in (1.0, 1e-200):
        weight = gaussian(200, 160) * scale
        before = weight.clone()
        top_singular_triplets(weight, 3)
        assert torch.equal(weight, before)


def test_one_weight_and_several_are_the_same_solver() -> None:
    weight = gaussian(200, 160)
    triplets = top_singular_triplets(weight, 3, tol=1e-8)
    assert all(torch.equal(a, b) for a, b in zip(triplets, solve_one(weight, tol=1e-8).triplets, strict=True))


@pytest.mark.parametrize(
    ("tol", "dtype"),
    [
        (1e-2, torch.float32),
        (5e-5, torch.float32),
        (5e-6, torch.float32),
        (1e-6, torch.float64),
        (1e-12, torch.float64),
    ],
)
def test_tol_is_honoured(tol: float, dtype: torch.dtype) -> None:
    for kind in ("gapped", "planted", "gapless"):
        weight = planted(260, 150, spectrum(kind, 150)).to(dtype)
        solved = solve_one(weight, tol=tol)
        check_solution(weight, solved, 3, tol=tol)
        assert not solved.full_svd


def test_a_finer_tol_takes_more_products() -> None:
    weight = gaussian(400, 400)
    taken = [solve_one(weight, tol=tol).products for tol in (1e-2, 1e-5, 1e-12)]
    assert taken == sorted(taken) and taken[0] < taken[-1] < 400


# Weights whose Krylov space ends early: nothing but rounding is left to go on with, and nothing else is needed.


def zero_but_for(rows: slice, columns: slice) -> Tensor:
    weight = torch.zeros(256, 256, dtype=torch.float64)
    weight[rows, columns] = gaussian(256, 256)[rows, columns]
    return weight


EXHAUSTED = {
    "rank one": planted(256, 256, spectrum("rank one", 256)),
    "rank 4": planted(256, 256, spectrum("rank deficient", 256)),
    "two values": planted(256, 256, spectrum("repeated", 256)),
    "one entry": zero_but_for(slice(3, 4), slice(5, 6)),
    "7 live columns": zero_but_for(slice(None), slice(7)),
    "12 live rows": zero_but_for(slice(12), slice(None)),
    "8 ones on the diagonal": torch.diag(torch.arange(256) < 8).double(),
    "20 ones on the diagonal": torch.diag((torch.arange(256) < 20).double()),
    "halving diagonal": torch.diag(0.5 ** torch.arange(256, dtype=torch.float64)),
}


@pytest.mark.parametrize("warm", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", EXHAUSTED)
def test_an_exhausted_krylov_space(name: str, dtype: torch.dtype, warm: bool) -> None:
    weight = EXHAUSTED[name].to(dtype)
    solved = solve_one(weight, 3, svd_triplets(weight, [0, 1, 2]) if warm else None)
    check_solution(weight, solved, 3)
    assert not solved.full_svd


# The iteration as a whole: hypothesis over everything at once

cases = st.fixed_dictionaries(
    {
        "shape": st.sampled_from([(40, 30), (127, 200), (128, 128), (130, 260), (260, 130), (192, 192), (129, 400)]),
        "kind": st.sampled_from(["gaussian", *KINDS]),
        "k": st.sampled_from([1, 2, 3, 6]),
        "dtype": st.sampled_from(FLOATS),
        "exponent": st.sampled_from([0, 0, 0, -110, -60, -20, 20, 60, 110]),
        "warm": st.sampled_from(
            ["none", "exact", "stale", "NaN", "foreign", "more", "fewer", "zero", "twice the same"]
        ),
        "tol": st.sampled_from([1e-3, 5e-5, 1e-5]),
        "seed": st.integers(0, 2**31),
    }
)


def build(case: dict) -> tuple[Tensor, SingularTriplets | None]:
    shape, k, seed = case["shape"], case["k"], case["seed"]
    r = min(shape)
    weight = gaussian(*shape, seed=seed) if case["kind"] == "gaussian" else None
    weight = planted(*shape, spectrum(case["kind"], r), seed) if weight is None else weight
    exponent = case["exponent"] if case["dtype"] != torch.float16 else 0
    weight = (weight * 2.0**exponent).to(case["dtype"])
    if case["warm"] == "none":
        return weight, None
    chosen = {"stale": list(range(1, k + 1)), "more": list(range(20)), "fewer": [0]}.get(case["warm"], list(range(k)))
    warm = svd_triplets(weight, chosen)
    if case["warm"] == "foreign":
        warm = SingularTriplets(gaussian(shape[0], k, seed=seed + 9), warm.s, gaussian(shape[1], k, seed=seed + 10))
    elif case["warm"] == "twice the same":
        warm = SingularTriplets(*(part[..., [0] * k] for part in warm))
    elif case["warm"] in ("NaN", "zero"):
        warm = SingularTriplets(*(part * (math.nan if case["warm"] == "NaN" else 0.0) for part in warm))
    return weight, warm


@settings(max_examples=150, deadline=None, derandomize=True)
@given(cases)
def test_every_promise_on_anything(case: dict) -> None:
    weight, warm = build(case)
    solved = solve_one(weight, case["k"], warm, tol=case["tol"])
    check_solution(weight, solved, case["k"], case["tol"])
    # Rounded to half precision the twenty equal values differ, by less than a block of eight can tell apart.
    assert not solved.full_svd or (case["kind"] == "repeated past the block" and case["dtype"] in HALF)


# Warm starts


@pytest.mark.parametrize("k", [1, 3])
@pytest.mark.parametrize("kind", ["gapped", "gapless", "repeated", "rank deficient"])
@pytest.mark.parametrize("change", [0.0, 1e-6, 1e-3, 0.1])
def test_a_warm_start_does_not_change_the_answer(k: int, kind: str, change: float) -> None:
    before = planted(200, 150, spectrum(kind, 150))
    after = before + change * gaussian(200, 150, seed=9) / 200**0.5
    check_solution(after, solve_one(after, k, top_singular_triplets(before, 3)), k)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("overtaken", [0, 1, 2])
@pytest.mark.parametrize("height", [1.02, 1.1, 1.5, 10.0])
def test_a_warm_start_does_not_hide_a_component_that_has_grown_since(
    height: float, overtaken: int, dtype: torch.dtype
) -> None:
    # The old top vectors are still exact singular vectors, so their residual is zero; a new one has overtaken them.
    bulk = torch.linspace(1, 0, 300, dtype=torch.float64)
    for seed in range(2):
        for edge in (1.05, 1.2, 2.0):  # where the third of them lies above the bulk
            s = torch.cat([edge * torch.tensor([2.0, 1.5, 1.0], dtype=torch.float64), bulk])
            new = torch.tensor([height * s[overtaken]], dtype=torch.float64)
            u, v = orthonormal(304, 304, seed), orthonormal(304, 304, seed + 100)
            weight = ((u * torch.cat([s, new])) @ v.T).to(dtype)
            warm = SingularTriplets(u[:, :3], s[:3], v[:, :3])
            check_solution(weight, solve_one(weight, 3, warm, tol=5e-5), 3, tol=5e-5)


def test_a_wide_weight_misses_no_component() -> None:
    """The hardest case known: exact warm vectors just above a bulk, and a new component just above the last of them.

    In a wide weight the random vectors hold little of it, and the bulk's own values are what is seen first.
    """
    bulk = torch.linspace(1, 0, 1020)
    s = torch.cat([torch.tensor([1.8, 1.4, 1.1, 1.1 * 1.01]), bulk])
    u, v = orthonormal(1024, 1024, 0).float(), orthonormal(1024, 1024, 1).float()
    for shift in range(0, 1000, 25):  # another left and right vector for every value, at the price of a product
        left, right = u.roll(shift, 0), v.roll(shift // 2, 0)
        weight = (left * s) @ right.T
        solved = solve_one(weight, 3, SingularTriplets(left[:, :3], s[:3], right[:, :3]), tol=5e-5)
        assert abs(solved.triplets.s[2] - s[3]) < 1e-4 * s[0], f"missed at shift {shift}: {solved.triplets.s}"


@pytest.mark.parametrize("kept", [1, 3, 11, 30])
def test_a_warm_start_may_hold_fewer_or_more_triplets(kept: int) -> None:
    weight = planted(200, 150, spectrum("gapped", 150))
    check_solution(weight, solve_one(weight, 3, top_singular_triplets(weight, kept)), 3)


def test_a_warm_start_of_another_weight_altogether() -> None:
    weight = planted(200, 150, spectrum("gapped", 150), seed=5)
    other = top_singular_triplets(planted(200, 150, spectrum("gapped", 150), seed=50), 3)
    check_solution(weight, solve_one(weight, 3, other), 3)


@pytest.mark.parametrize("shape", [(300, 200), (200, 300)])
def test_a_warm_start_that_is_not_finite_is_as_good_as_none(shape: tuple[int, int]) -> None:
    weight = gaussian(*shape)
    good = top_singular_triplets(weight, 3)
    for value in (math.nan, math.inf):
        bad = SingularTriplets(*(part.clone().fill_(value) for part in good))
        assert equal(solve_one(weight, 3, bad), solve_one(weight, 3))


def test_a_warm_start_saves_products() -> None:
    for kind in ("planted", "power law"):
        weight = planted(300, 300, spectrum(kind, 300)).float()
        cold = solve_one(weight, 3)
        drifted = weight + 1e-2 * weight.norm() / 300 * gaussian(300, 300, seed=5).float()
        warm = solve_one(drifted, 3, cold.triplets, tol=5e-5)
        assert 2 * warm.products <= cold.products


@pytest.mark.parametrize("shape", [(200, 150), (12, 10)])
def test_a_foreign_warm_start_is_refused(shape: tuple[int, int]) -> None:
    warm = top_singular_triplets(gaussian(*shape), 2)
    message = f"{shape[0]}x{shape[1]} weight, this one is"
    for other in [(shape[1], shape[0]), (shape[0] + 1, shape[1]), (shape[0], shape[1] + 1)]:
        with pytest.raises(ValueError, match=message):
            top_singular_triplets(gaussian(*other), 2, warm_start=warm)


# Several weights side by side


def mixed_batch(shape: tuple[int, int], dtype: torch.dtype) -> tuple[list[Tensor], list[SingularTriplets | None]]:
    """Weights that converge at different times, at different scales, some warm, and a zero among them."""
    r = min(shape)
    weights = [planted(*shape, spectrum(kind, r), seed) for seed, kind in enumerate(KINDS)]
    weights = [w * 10.0 ** (i % 3 * 10 - 10) for i, w in enumerate([*weights, gaussian(*shape), gaussian(*shape)])]
    weights = [w.to(dtype) for w in weights]
    starts = [svd_triplets(w, [0, 1, 2]) if i % 2 else None for i, w in enumerate(weights)]
    return weights, starts


@pytest.fixture
def batched(monkeypatch: pytest.MonkeyPatch) -> None:
    """Solve side by side on the CPU too, as an accelerator would."""
    monkeypatch.setattr(spectral, "_batch_size", len)


@pytest.mark.usefixtures("batched")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(200, 150), (150, 200), (30, 20)])
def test_a_batch_keeps_every_promise(shape: tuple[int, int], dtype: torch.dtype) -> None:
    weights, starts = mixed_batch(shape, dtype)
    together = solve_top_triplets(weights, 3, warm_starts=starts)
    assert len({s.products for s in together}) > 1 or min(shape) < FULL_SVD_BELOW
    for weight, start, solved in zip(weights, starts, together, strict=True):
        check_solution(weight, solved, 3)
        alone = solve_one(weight, 3, start)
        assert (solved.products, solved.full_svd) == (alone.products, alone.full_svd)


@pytest.mark.usefixtures("batched")
@settings(max_examples=25, deadline=None, derandomize=True)
@given(st.lists(cases, min_size=2, max_size=5))
def test_every_promise_on_any_batch(batch: list[dict]) -> None:
    first = batch[0]
    built = [build(case | {key: first[key] for key in ("shape", "dtype", "k")}) for case in batch]
    solutions = solve_top_triplets(
        [weight for weight, _ in built], first["k"], warm_starts=[warm for _, warm in built], tol=first["tol"]
    )
    for (weight, _), solved in zip(built, solutions, strict=True):
        check_solution(weight, solved, first["k"], first["tol"])


@pytest.mark.usefixtures("batched")
def test_a_batch_in_which_some_give_up() -> None:
    easy, hard = planted(200, 200, spectrum("planted", 200)), planted(200, 200, spectrum("gapless", 200))
    solutions = solve_top_triplets([easy, hard, easy], 3, max_products=20)
    assert [s.full_svd for s in solutions] == [False, True, False]
    for weight, solved in zip([easy, hard, easy], solutions, strict=True):
        check_solution(weight, solved, 3)


def test_on_a_cpu_several_are_solved_as_one_by_one() -> None:
    weights, starts = mixed_batch((200, 150), torch.float32)
    together = solve_top_triplets(weights, 3, warm_starts=starts)
    assert all(equal(a, solve_one(w, 3, s)) for a, w, s in zip(together, weights, starts, strict=True))


def test_batches_on_an_accelerator_are_cut_to_size() -> None:
    meta = [torch.empty(4096, 4096, device="meta")] * 7  # stands for any device that is not the CPU
    assert spectral._batch_size(meta) == spectral.BATCH_ENTRIES // 4096**2 == 4
    assert spectral._batch_size([torch.empty(2**14, 2**14, device="meta")]) == 1
    assert spectral._batch_size([torch.empty(4096, 4096)] * 7) == 1


def test_no_weights_give_no_solutions() -> None:
    assert solve_top_triplets([], 3) == []


# Giving up


@pytest.mark.parametrize("max_products", [1, 5, 12])
def test_an_iteration_that_gives_up_is_replaced_by_the_full_svd_and_says_so(max_products: int) -> None:
    weight = planted(200, 160, spectrum("gapless", 160))
    solved = solve_one(weight, max_products=max_products)
    assert solved.full_svd and solved.error == 0.0
    check_solution(weight, solved, 3, tol=1e-13)
    enough = solve_one(weight, max_products=400)
    assert not enough.full_svd and enough.products > max_products


def test_a_tol_out_of_reach_ends_in_the_full_svd() -> None:
    weight = planted(200, 160, spectrum("gapped", 160)).float()
    solved = solve_one(weight, tol=1e-12, max_products=60)
    assert solved.full_svd
    check_solution(weight, solved, 3)


def test_a_small_weight_is_not_counted_as_giving_up() -> None:
    solved = solve_one(gaussian(FULL_SVD_BELOW - 1, 300))
    assert (solved.error, solved.products, solved.full_svd) == (0.0, 0, False)


def test_many_triplets_of_a_small_weight_need_no_iteration() -> None:
    weight = gaussian(200, 140)
    solved = solve_one(weight, 40)
    assert (solved.products, solved.full_svd) == (0, False)
    check_solution(weight, solved, 40)


# Nothing around it matters, and nothing around it changes


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_result_is_bitwise_repeatable_and_leaves_the_global_generator_alone(dtype: torch.dtype) -> None:
    weight = gaussian(200, 160).to(dtype)
    torch.manual_seed(1)
    state = torch.get_rng_state()
    first = solve_one(weight)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(2)
    assert equal(first, solve_one(weight.clone()))
    warm = first.triplets
    assert equal(solve_one(weight, 3, warm), solve_one(weight, 3, warm))


@pytest.mark.parametrize("precision", ["highest", "high", "medium"])
def test_the_precision_of_products_is_left_as_it_was(precision: str) -> None:
    weight = gaussian(200, 160).float()
    expected = solve_one(weight)
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision(precision)
        assert equal(solve_one(weight), expected)
        assert torch.get_float32_matmul_precision() == precision
        with pytest.raises(ValueError, match="NaN"):  # also when it ends early
            solve_one(weight.clone().fill_(math.nan))
        assert torch.get_float32_matmul_precision() == precision
    finally:
        torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize("backend", ["cuda", "mkldnn"])
@pytest.mark.parametrize("precision", ["ieee", "tf32"])
def test_the_newer_precision_switches_are_left_as_they_were(backend: str, precision: str) -> None:
    switch = getattr(torch.backends, backend).matmul
    if not hasattr(switch, "fp32_precision"):
        pytest.skip("torch before 2.9")
    weight = gaussian(200, 160).float()
    expected = solve_one(weight)
    before = switch.fp32_precision
    try:
        switch.fp32_precision = precision  # from here on torch refuses to read the older switch
        assert equal(solve_one(weight), expected)
        assert switch.fp32_precision == precision
    finally:
        switch.fp32_precision = before


def test_inside_autocast_inference_mode_and_a_graph() -> None:
    weight = torch.nn.Parameter(gaussian(200, 160).float())
    expected = solve_one(weight)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert equal(solve_one(weight), expected)
        assert torch.is_autocast_enabled("cpu")
    with torch.inference_mode():
        assert equal(solve_one(weight), expected)
    assert not any(part.requires_grad for part in expected.triplets)


def test_a_view_is_as_good_as_a_copy() -> None:
    whole = gaussian(3 * 160, 200).float()
    for part in (whole[160:320], whole[::3], whole[160:320].T):
        check_solution(part, solve_one(part), 3)


# Bad arguments


@pytest.mark.parametrize("k", [0, -1, 5, 2.0, "2", None, True])
def test_a_k_out_of_range_is_named(k) -> None:
    with pytest.raises(ValueError, match=f"k is {k}: a 4x6 weight has singular triplets 1 to 4"):
        top_singular_triplets(torch.ones(4, 6), k)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tol": 0.0}, "tol is 0.0"),
        ({"tol": -1e-5}, "tol is -1e-05"),
        ({"tol": math.nan}, "tol is nan"),
        ({"tol": math.inf}, "tol is inf"),
        ({"max_products": 0}, "max_products is 0"),
        ({"oversample": 0}, "oversample is 0"),
    ],
)
def test_an_option_out_of_range_is_named(options: dict, message: str) -> None:
    for function in (
        lambda: top_singular_triplets(torch.eye(3), 1, **options),
        lambda: solve_one(torch.eye(3), 1, **options),
    ):
        with pytest.raises(ValueError, match=message):
            function()


def test_weights_of_several_kinds_are_refused() -> None:
    for other in (torch.ones(4, 5), torch.ones(5, 4, dtype=torch.float64), torch.ones(5, 4, device="meta")):
        with pytest.raises(ValueError, match="differ in shape, dtype or device"):
            solve_top_triplets([torch.ones(5, 4), other], 1)


def test_as_many_warm_starts_as_weights() -> None:
    with pytest.raises(ValueError, match="1 warm starts were given for 2 weights"):
        solve_top_triplets([torch.eye(3)] * 2, 1, warm_starts=[None])


@pytest.mark.usefixtures("batched")
def test_one_bad_weight_among_good_ones_is_refused() -> None:
    bad = torch.eye(200)
    bad[3, 4] = math.nan
    with pytest.raises(ValueError, match="1 NaN or infinite"):
        solve_top_triplets([torch.eye(200), bad], 1)


# The bound of the mass in the top components


def mass(weight: Tensor, k: int) -> Tensor:
    """The shares themselves, from LAPACK in float64."""
    size = float(weight.double().abs().max()) or 1.0
    squares = torch.linalg.svdvals(weight.double() / size).square()
    return squares.cumsum(0)[:k] / squares.sum() if squares.sum() else torch.zeros(k, dtype=torch.float64)


def adversarial(kind: str, m: int, n: int, seed: int) -> Tensor:
    """Weights whose rows are as unlike a random matrix's as can be."""
    if kind == "equal rows":
        return torch.ones(m, 1, dtype=torch.float64) * gaussian(1, n, seed=seed)
    if kind == "one row a block":  # flat, but every block has rank one
        weight = torch.zeros(m, n, dtype=torch.float64)
        weight[::16] = orthonormal(n, m, seed).T[: len(weight[::16])] if n >= m else gaussian(m, n, seed=seed)[::16]
        return weight
    if kind == "the last rows":  # all of it in what no whole block holds
        weight = torch.zeros(m, n, dtype=torch.float64)
        weight[-3:] = gaussian(min(m, 3), n, seed=seed)
        return weight
    if kind == "one entry":
        weight = torch.zeros(m, n, dtype=torch.float64)
        weight[seed % m, seed % n] = -2.0
        return weight
    return gaussian(m, n, seed=seed) * torch.exp(4 * gaussian(m, 1, seed=seed + 1))  # "rows of all sizes"


ADVERSARIAL = ["equal rows", "one row a block", "the last rows", "one entry", "rows of all sizes"]


@settings(max_examples=200, deadline=None, derandomize=True)
@given(
    st.sampled_from([*SMALL_SHAPES, *LARGE_SHAPES]),
    st.sampled_from(["gaussian", *KINDS, *ADVERSARIAL]),
    st.sampled_from([1, 3, 10]),
    st.sampled_from([1, 2, 7, 16, 32, 1000]),
    st.sampled_from(FLOATS),
    st.sampled_from([0, 0, -110, -60, 60, 110]),
    st.integers(0, 2**31),
)
def test_the_top_components_hold_no_more_than_the_bound(shape, kind, k, rows, dtype, exponent, seed) -> None:
    k = min(k, *shape)
    if kind in ADVERSARIAL:
        weight = adversarial(kind, *shape, seed)
    else:
        weight = (
            gaussian(*shape, seed=seed) if kind == "gaussian" else planted(*shape, spectrum(kind, min(shape)), seed)
        )
    weight = (weight * 2.0 ** (exponent if dtype != torch.float16 else 0)).to(dtype)
    bound, truth = top_mass_bound(weight, k, rows=rows), mass(weight, k)
    assert bound.shape == (k,) and bound.dtype == torch.float64
    assert (bound >= truth - 1e-12).all() and (bound <= 1).all() and (bound.diff() >= -1e-12).all()


@pytest.mark.parametrize("dtype", FLOATS)
def test_a_flat_spectrum_is_bounded_by_the_rows_of_a_block(dtype: torch.dtype) -> None:
    weight = gaussian(512, 2048).to(dtype)
    for rows, most in ((16, 0.26), (32, 0.16)):
        assert 3 / rows < top_mass_bound(weight, 3, rows=rows)[2] < most
    assert top_mass_bound(weight, 3, rows=3).tolist()[2] == top_mass_bound(weight, 3, rows=513).tolist()[2] == 1


def test_the_bound_is_the_truth_where_every_block_is_alike() -> None:
    weight = torch.eye(4, dtype=torch.float64).repeat(1, 8)  # a single block, of four equal singular values
    torch.testing.assert_close(top_mass_bound(weight, 4, rows=4), mass(weight, 4), rtol=0, atol=1e-5)


def test_a_bound_has_at_least_one_row() -> None:
    with pytest.raises(ValueError, match="rows is 0: give how many rows a block has"):
        top_mass_bound(torch.eye(3), 1, rows=0)
    with pytest.raises(ValueError, match="k is 4: a 3x3 weight"):
        top_mass_bound(torch.eye(3), 4)
