"""Theorem 1: the enclosure of the spectral norm never leaves it out, the check always holds, and a lie is always found.

Oracles: matrices whose norm is a floating-point number, mpmath with 60 digits where not even the last bit may be
forgiven, ``torch.linalg`` in float64; for running models norms computed by hand (patches by ``F.unfold`` or by loops,
projections by slices), and planted violations of known size.
"""

from __future__ import annotations

import collections
import itertools
import math
from collections.abc import Callable
from fractions import Fraction

import mpmath
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays
from stress_bound import stress
from torch import Tensor, nn

import s2d.bound
from s2d.bound import BoundCheck, SpectralNormBounds, check_bound, spectral_norm_bounds
from s2d.layers import LinearMap, linear_maps

ORACLE = 1e-13  # the rounding of LAPACK's own float64 answer
FLOATS = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
ALIGNED = 0.999 / (1 + 1e-3)  # an aligned input reaches the upper end but for the enclosure's own width


# The enclosure of the spectral norm


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
SHAPES = [(1, 1), (1, 9), (9, 1), (20, 12), (32, 50), (33, 50), (50, 33), (127, 300), (260, 140), (140, 260)]


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


@pytest.mark.parametrize("dtype", FLOATS)
def test_the_range_of_every_dtype_down_to_its_smallest_number(dtype: torch.dtype) -> None:
    info = torch.finfo(dtype)
    smallest = info.smallest_normal * info.eps
    for size in (1, 40):
        for value in (smallest, 3 * smallest, info.smallest_normal, 1.0, info.max / 64):
            weight = torch.diag(torch.tensor([value] + [value / 2] * (size - 1), dtype=torch.float64)).to(dtype)
            lower, upper = spectral_norm_bounds(weight)
            assert lower <= value <= upper
            # In float64 there are no numbers to be tight with at the low end.
            assert upper <= value * 1.001 or value <= 3 * smallest


@pytest.mark.parametrize("size", [1, 2, 16, 32, 64, 128])
@pytest.mark.parametrize("scale", [1e-300, 1e-20, 1.0, 0.1, 3e10, 1e300])
def test_hadamard_matrices_of_any_scale(size: int, scale: float) -> None:
    # scale * H has the norm scale * sqrt(size): compared in integers, without rounding.
    hadamard = torch.ones(1, 1, dtype=torch.float64)
    while len(hadamard) < size:
        hadamard = torch.kron(torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64), hadamard)
    lower, upper = spectral_norm_bounds(scale * hadamard)
    truth_sq = Fraction(scale) ** 2 * size
    assert Fraction(lower) ** 2 <= truth_sq <= Fraction(upper) ** 2
    assert upper <= lower * 1.001


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    st.lists(st.integers(-1000, 1000), min_size=1, max_size=60),
    st.lists(st.integers(-1000, 1000), min_size=1, max_size=60),
)
def test_rank_one_integer_matrices(left: list[int], right: list[int]) -> None:
    weight = torch.outer(*(torch.tensor(side, dtype=torch.float64) for side in (left, right)))
    lower, upper = spectral_norm_bounds(weight)
    truth_sq = sum(x * x for x in left) * sum(x * x for x in right)
    assert Fraction(lower) ** 2 <= truth_sq <= Fraction(upper) ** 2


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.lists(st.integers(-(2**20), 2**20), min_size=1, max_size=80), st.integers(-900, 900), st.randoms())
def test_permuted_diagonal_matrices(entries: list[int], exponent: int, random) -> None:
    order = list(range(len(entries)))
    random.shuffle(order)
    weight = torch.diag(torch.tensor([math.ldexp(entry, exponent) for entry in entries], dtype=torch.float64))[order]
    lower, upper = spectral_norm_bounds(weight)
    truth = math.ldexp(max(abs(entry) for entry in entries), exponent)
    assert lower <= truth <= upper <= truth * 1.001


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("size", [10, 50, 70, 100])
def test_the_enclosure_under_autocast(size: int, dtype: torch.dtype) -> None:
    for weight in (gaussian(size + 10, size), planted(size + 10, size, spectrum("flat", size))):
        with torch.autocast("cpu", dtype):
            check_enclosure(weight.float())


@pytest.mark.parametrize("dtype", FLOATS)
def test_any_layout_of_the_same_matrix(dtype: torch.dtype) -> None:
    weight = gaussian(41, 70).to(dtype)
    for other in (weight.T.contiguous().T, torch.stack([weight, weight], dim=2)[..., 0], nn.Parameter(weight)):
        check_enclosure(other.detach())
        assert spectral_norm_bounds(other).upper == pytest.approx(spectral_norm_bounds(weight).upper, rel=1e-9)


# What the proof leans on: nothing but two products


@pytest.mark.parametrize(
    "factor_of",
    [
        lambda factor: 0.9 * factor,
        lambda factor: factor + 0.01 * gaussian(len(factor), len(factor)).tril(),
        lambda factor: torch.zeros_like(factor),
        lambda factor: factor.float().double(),
        lambda factor: gaussian(len(factor), len(factor)).tril(),
    ],
)
@pytest.mark.parametrize("shape", [(5, 3), (30, 30), (200, 140), (140, 260)])
def test_the_upper_end_does_not_trust_the_factorisation(shape, factor_of, monkeypatch: pytest.MonkeyPatch) -> None:
    weight = gaussian(*shape)
    honest = torch.linalg.cholesky_ex

    def broken(matrix: Tensor):
        factor, failed = honest(matrix)
        return factor_of(factor), torch.zeros_like(failed)

    monkeypatch.setattr(torch.linalg, "cholesky_ex", broken)
    truth = torch.linalg.svdvals(weight)[0].item()
    assert truth <= spectral_norm_bounds(weight).upper <= torch.linalg.matrix_norm(weight).item() * (1 + 1e-9)
    # Not even where c is too small and the factor is none.
    gram = weight.T @ weight
    c = 0.5 * truth**2
    slack = s2d.bound._certificate(gram, c)
    assert slack is None or c + slack >= truth**2


def test_every_entry_of_the_residual_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    # Without a factor to speak of the residual of the matrix of ones is nearly itself, and has its norm.
    def nothing(matrix: Tensor):
        return 1e-9 * torch.eye(len(matrix), dtype=torch.float64), torch.zeros((), dtype=torch.int32)

    monkeypatch.setattr(torch.linalg, "cholesky_ex", nothing)
    monkeypatch.setattr(torch.linalg, "solve_triangular", lambda corner, other, upper: torch.zeros_like(other))
    for n in (3, 64, 65, 200):
        assert n <= s2d.bound._certificate(torch.ones(n, n, dtype=torch.float64), 1e-6) + 1e-6 <= 1.5 * n


@pytest.mark.parametrize("n", [1, 2, 3, 10, 65, 150])
def test_the_certificate_covers_its_own_rounding(n: int) -> None:
    # The matrix of ones has the eigenvalue n and zeros, so cI - G is singular at c = n: Cholesky's luck decides there.
    gram, decided = torch.ones(n, n, dtype=torch.float64), set()
    for steps in itertools.chain(range(-40, 41), range(-4000, 4001, 200)):
        c = n * (1 + steps * 2.0**-52)
        slack = s2d.bound._certificate(gram, c)
        decided.add(slack is None)
        if slack is not None:
            assert Fraction(c) + Fraction(slack) >= n
            assert slack <= 1e-10 * n
    assert decided == {True, False}


@pytest.mark.parametrize("n", [1, 30, 100])
def test_the_certificate_is_never_less_than_the_rounding_it_cannot_see(n: int) -> None:
    # c I - G is I / 2 without any rounding, so the residual is next to nothing; the factor's squares add up to n / 2.
    slack = s2d.bound._certificate(torch.eye(n, dtype=torch.float64) / 2, 1.0)
    assert (n + 2) * 2.0**-52 * n / 2 <= slack <= 1e-11


@pytest.mark.parametrize("value", [0.5, 0.75, 1.0 - 2**-53, 1.3])
@pytest.mark.parametrize("exponent", [-1080, -1075, -1074, -1030, -1022, 0, 1000, 1024])
def test_a_result_that_cannot_be_scaled_exactly_is_rounded_outwards(value: float, exponent: int) -> None:
    exact = Fraction(value) * Fraction(2) ** exponent
    down, up = (s2d.bound._scale(value, exponent, down=down) for down in (True, False))
    assert Fraction(down) <= exact and (math.isinf(up) or exact <= Fraction(up))
    assert up == down or up == math.nextafter(down, math.inf) or up <= math.nextafter(math.nextafter(down, 1), 1)


@pytest.mark.parametrize("shape", [(90, 90), (95, 150)])
def test_a_lanczos_iteration_that_finds_nothing_costs_time_only(shape, monkeypatch: pytest.MonkeyPatch) -> None:
    weight = planted(*shape, spectrum("gapless", min(shape)))

    monkeypatch.setattr(s2d.bound, "_lanczos", lambda gram, rtol: torch.linalg.eigh(gram)[1].T[:5])
    check_enclosure(weight)


def test_without_any_vector_the_frobenius_norm_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = planted(40, 50, spectrum("gapless", 40))
    monkeypatch.setattr(s2d.bound, "_top_vectors", lambda gram, rtol: [torch.linalg.eigh(gram)[1][:, 0]])
    lower, upper = spectral_norm_bounds(weight)
    truth = torch.linalg.svdvals(weight)[0].item()
    assert 0 < lower < truth < upper
    assert upper == pytest.approx(torch.linalg.matrix_norm(weight).item(), rel=1e-9)


@pytest.mark.parametrize("shape", [(30, 30), (70, 64), (79, 200), (90, 80), (130, 130)])
@pytest.mark.parametrize("kind", ["gaussian", "gapped", "clustered", "flat"])
def test_the_usual_matrix_needs_no_full_decomposition(shape, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    weight = gaussian(*shape) if kind == "gaussian" else planted(*shape, spectrum(kind, min(shape)))
    sizes, eigh = [], torch.linalg.eigh
    monkeypatch.setattr(torch.linalg, "eigh", lambda matrix: sizes.append(len(matrix)) or eigh(matrix))
    check_enclosure(weight)
    assert all(size < 25 for size in sizes)


@pytest.mark.parametrize("kind", [*KINDS, "gaussian"])
@pytest.mark.parametrize("rtol", [1e-3, 1e-6])
def test_lanczos_needs_no_second_certificate_and_no_full_decomposition(kind: str, rtol: float, monkeypatch) -> None:
    weight = gaussian(150, 120) if kind == "gaussian" else planted(150, 120, spectrum(kind, 120))
    calls, certificate = [], s2d.bound._certificate
    monkeypatch.setattr(s2d.bound, "_certificate", lambda gram, c: calls.append(1) or certificate(gram, c))
    check_enclosure(weight, rtol)
    assert len(calls) <= 1


WRONG_WEIGHTS = [
    (torch.ones(3), ValueError, r"shape \(3,\)"),
    (torch.ones(2, 3, 3, 3), ValueError, r"shape \(2, 3, 3, 3\).*flatten\(1\)"),
    (torch.ones(0, 4), ValueError, r"shape \(0, 4\).*no entries"),
    (torch.tensor([[1.0, math.nan], [math.nan, 0.0]]), ValueError, "2 NaN or infinite"),
    (torch.tensor([[math.inf]], dtype=torch.float16), ValueError, "1 NaN or infinite"),
    (torch.ones(2, 2, dtype=torch.int64), TypeError, "torch.int64"),
    (torch.ones(2, 2, dtype=torch.complex64), TypeError, "torch.complex64"),
    (nn.Linear(2, 2), TypeError, "Linear"),
    (np.eye(2), TypeError, "ndarray"),
]


@pytest.mark.parametrize(("weight", "error", "message"), WRONG_WEIGHTS)
def test_what_is_no_finite_matrix_is_refused(weight, error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        spectral_norm_bounds(weight)


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


# The check


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def mlp(seed: int, *, bias: bool = True, dtype: torch.dtype = torch.float32) -> nn.Sequential:
    """A random MLP of random widths and a random scale."""
    widths = torch.randint(1, 70, (4,), generator=generator(seed)).tolist()
    layers: list[nn.Module] = []
    for m, n in zip(widths[1:], widths[:-1], strict=True):
        layers += [nn.Linear(n, m, bias=bias), nn.GELU()]
    model = nn.Sequential(*layers)
    for index, parameter in enumerate(model.parameters()):
        parameter.data = 10.0 ** (seed % 3 - 2) * torch.randn(parameter.shape, generator=generator(100 * seed + index))
    return model.to(dtype)


def one_layer(weight: Tensor, bias: Tensor | None = None) -> nn.Linear:
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None).to(weight.dtype)
    layer.weight.data = weight.clone()
    if bias is not None:
        layer.bias.data = bias.clone()
    return layer


def top_input(weight: Tensor) -> Tensor:
    return torch.linalg.svd(weight.double())[2][:1].to(weight.dtype)


def hooks_of(model: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


@pytest.fixture(scope="module")
def vit() -> nn.Module:
    from timm.models.vision_transformer import VisionTransformer

    torch.manual_seed(0)
    return VisionTransformer(
        img_size=16, patch_size=4, in_chans=1, embed_dim=32, depth=2, num_heads=2, num_classes=10, class_token=True
    ).eval()


# It never reports a violation that is not there


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("seed", range(10))
def test_no_violation_on_random_mlps(seed: int, dtype: torch.dtype) -> None:
    model = mlp(seed, dtype=dtype)
    batch = (0.1 * torch.randn(32, model[0].in_features, generator=generator(seed))).to(dtype)
    for row in check_bound(model, batch):
        assert row.holds, row
        assert row.tokens == 32
        assert row.tightness <= 1 + 4 * torch.finfo(dtype).eps * 70


@pytest.mark.parametrize("seed", range(6))
def test_no_violation_under_autocast(seed: int) -> None:
    model = mlp(seed)
    with torch.autocast("cpu", torch.bfloat16):
        rows = check_bound(model, torch.randn(32, model[0].in_features, generator=generator(seed)))
    assert all(row.holds for row in rows)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, "autocast"])
def test_no_violation_on_a_vision_transformer(vit: nn.Module, dtype) -> None:
    images = torch.randn(3, 1, 16, 16, generator=generator(0))
    if dtype == "autocast":
        with torch.autocast("cpu", torch.bfloat16):
            rows = check_bound(vit, images)
    else:
        rows = check_bound(vit.to(dtype), images.to(dtype))
        vit.float()
    names = [f"blocks.{n}.{part}" for n in (0, 1) for part in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")]
    assert [row.layer for row in rows] == names
    assert all(row.holds and 0 < row.tightness < 1 and row.tokens == 3 * 17 for row in rows)


def test_no_violation_when_every_input_is_aligned_in_every_dtype() -> None:
    for seed in range(20):
        shape = torch.randint(1, 90, (2,), generator=generator(seed)).tolist()
        weight = torch.randn(shape, generator=generator(seed), dtype=torch.float64)
        for dtype in (torch.float64, torch.float32, torch.float16, torch.bfloat16):
            w = weight.to(dtype)
            scales = torch.logspace(-2, 2, 9, dtype=torch.float64)[:, None]
            (row,) = check_bound(one_layer(w), (top_input(w).double() * scales).to(dtype))
            assert row.holds, (shape, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_no_violation_among_subnormal_numbers(dtype: torch.dtype) -> None:
    # 0.6 times the smallest number rounds up to the smallest number: a gain of 1 that is rounding alone.
    smallest = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
    layer = one_layer(torch.full((1, 1), 0.6, dtype=dtype))
    x = torch.full((1, 1), smallest, dtype=dtype)
    assert layer(x).item() == x.item() > 0
    (row,) = check_bound(layer, x)
    assert row.holds


# What is reported is right


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(1, 1), (5, 3), (3, 5), (64, 48), (150, 200)])
def test_an_aligned_input_is_tight(shape: tuple[int, int], dtype: torch.dtype) -> None:
    weight = torch.randn(shape, generator=generator(1), dtype=torch.float64).to(dtype)
    (row,) = check_bound(one_layer(weight), 7 * top_input(weight))
    truth = torch.linalg.svdvals(weight.double())[0].item()
    assert row.holds
    assert ALIGNED < row.tightness <= 1 + 1e-6
    assert row.lower <= truth * (1 + 1e-13) and truth * (1 - 1e-13) <= row.upper <= 1.001 * row.lower
    assert row.largest_gain == pytest.approx(truth, rel=1e-5)


def test_a_diagonal_layer_in_closed_form() -> None:
    layer = one_layer(torch.diag(torch.tensor([3.0, 4.0])))
    (row,) = check_bound(layer, torch.tensor([[1.0, 0.0], [0.0, 2.0], [1.0, 1.0]]))
    assert row.largest_gain == pytest.approx(4.0, rel=1e-12)
    assert row.tokens == 3
    (row,) = check_bound(layer, torch.tensor([[5.0, 0.0]]))
    assert row.largest_gain == pytest.approx(3.0, rel=1e-12)
    assert row.tightness == pytest.approx(0.75, rel=2e-3)


def test_the_gain_of_an_orthogonal_layer_is_its_scale_for_every_token() -> None:
    q, _ = torch.linalg.qr(torch.randn(20, 20, generator=generator(0), dtype=torch.float64))
    (row,) = check_bound(one_layer(2.5 * q), torch.randn(50, 20, generator=generator(1), dtype=torch.float64))
    assert row.largest_gain == pytest.approx(2.5, rel=1e-12)
    assert ALIGNED < row.tightness <= 1


def test_gains_by_hand_over_batch_and_token_dimensions() -> None:
    model = nn.Sequential(nn.Linear(5, 9), nn.Tanh(), nn.Linear(9, 2), nn.Tanh()).double()
    batch = torch.randn(2, 3, 4, 5, generator=generator(0), dtype=torch.float64)
    rows = check_bound(model, batch)
    x = batch
    for row, (linear, activation) in zip(rows, zip(model[::2], model[1::2], strict=True), strict=True):
        gain = ((x @ linear.weight.T).norm(dim=-1) / x.norm(dim=-1)).max().item()
        assert row.largest_gain == pytest.approx(gain, rel=1e-10)
        assert row.tightness == pytest.approx(gain / row.upper, rel=1e-10)
        assert row.tokens == 24
        x = activation(linear(x))


def test_the_bias_is_no_part_of_the_theorem() -> None:
    weight = torch.randn(6, 5, generator=generator(0), dtype=torch.float64)
    x = torch.randn(9, 5, generator=generator(1), dtype=torch.float64)
    (without,) = check_bound(one_layer(weight), x)
    (with_bias,) = check_bound(one_layer(weight, torch.full((6,), 1e6, dtype=torch.float64)), x)
    assert with_bias.holds
    assert with_bias.largest_gain == pytest.approx(without.largest_gain, rel=1e-7)
    # With the bias left in, the gain would be near 1e6.
    assert with_bias.largest_gain < 10


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_bias_so_large_that_the_output_drowns_in_it_is_no_violation(dtype: torch.dtype) -> None:
    layer = one_layer(torch.randn(16, 16, generator=generator(0)).to(dtype), torch.full((16,), 1e4).to(dtype))
    (row,) = check_bound(layer, 0.01 * torch.randn(8, 16, generator=generator(1)).to(dtype))
    assert row.holds


@pytest.mark.parametrize("bias", [False, True])
def test_zero_inputs(bias: bool) -> None:
    (row,) = check_bound(nn.Linear(4, 3, bias=bias), torch.zeros(5, 4))
    assert (row.holds, row.largest_gain, row.tightness, row.tokens) == (True, 0.0, 0.0, 5)


@pytest.mark.parametrize("bias", [None, torch.tensor([1e3, -2.0])])
def test_a_zero_weight(bias: Tensor | None) -> None:
    (row,) = check_bound(one_layer(torch.zeros(2, 4), bias), torch.randn(5, 4, generator=generator(0)))
    assert row == BoundCheck("", "linear", 0.0, 0.0, 0.0, 0.0, 0.0, True, 5)


def test_rank_one() -> None:
    weight = torch.outer(torch.tensor([3.0, 4.0]), torch.tensor([1.0, 2.0, 2.0]))
    (row,) = check_bound(one_layer(weight), torch.tensor([[1.0, 2.0, 2.0], [2.0, -1.0, 0.0]]))
    assert row.holds
    assert row.largest_gain == pytest.approx(15.0, rel=1e-6)


def test_an_empty_batch() -> None:
    (row,) = check_bound(nn.Linear(4, 3), torch.zeros(0, 4))
    assert (row.holds, row.largest_gain, row.tokens) == (True, 0.0, 0)


# A lie is found


def lie_by_hook(layer: nn.Linear, factor: float) -> None:
    layer.register_forward_hook(lambda _module, _args, output: output * factor)


def lie_by_forward(layer: nn.Linear, factor: float) -> None:
    """The layer computes with another weight than it holds."""
    layer.forward = lambda x: F.linear(x, factor * layer.weight, layer.bias)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("lie", [lie_by_hook, lie_by_forward])
@pytest.mark.parametrize("factor", [1.01, 2.0, -3.0])
def test_a_planted_violation_is_found(lie: Callable, factor: float, dtype: torch.dtype) -> None:
    weight = torch.randn(48, 64, generator=generator(0), dtype=torch.float64).to(dtype)
    layer = one_layer(weight)
    lie(layer, factor)
    (row,) = check_bound(layer, top_input(weight))
    assert not row.holds
    assert row.tightness == pytest.approx(abs(factor), rel=2e-3)


def test_one_lying_token_among_many_is_found_and_only_in_its_layer() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8))

    def lie(_module: nn.Module, _args: tuple, output: Tensor) -> Tensor:
        output = output.clone()
        output[17] *= 100
        return output

    model[2].register_forward_hook(lie)
    rows = check_bound(model, torch.randn(40, 8, generator=generator(0)))
    assert [row.holds for row in rows] == [True, False, True]


@pytest.mark.parametrize("how", ["autocast", "bfloat16", "float16"])
def test_half_precision_does_not_hide_a_threefold_violation(how: str) -> None:
    # The allowance for rounding must stay far below the bound: half precision multiplies in half, but adds in float32.
    weight = nn.Linear(768, 768, bias=False).weight.detach()
    dtype = torch.float32 if how == "autocast" else getattr(torch, how)
    layer = one_layer(weight.to(dtype))
    lie_by_hook(layer, 3.0)
    with torch.autocast("cpu", torch.bfloat16, enabled=how == "autocast"):
        (row,) = check_bound(layer, top_input(weight).to(dtype))
    assert row.tightness > 2.9
    assert not row.holds


def test_a_bias_that_is_not_the_layers_own_is_a_violation() -> None:
    layer = one_layer(torch.eye(4), torch.zeros(4))
    layer.register_forward_hook(lambda _module, _args, output: output + 5.0)
    (row,) = check_bound(layer, torch.ones(2, 4))
    assert not row.holds


# What cannot be checked is said


class TwoLayers(nn.Module):
    """``second`` takes part only when asked to; ``first`` is called as often as asked to."""

    def __init__(self, calls: int = 1, both: bool = True, keyword: bool = False) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)
        self.calls, self.both, self.keyword = calls, both, keyword

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(self.calls):
            x = self.first(input=x) if self.keyword else self.first(x)
        return self.second(x) if self.both else x


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_activations_that_are_not_finite_are_refused_by_name_and_hooks_go(bad: float) -> None:
    model = TwoLayers()
    model.first.register_forward_hook(lambda _module, _args, output: output * bad)
    before = hooks_of(model)
    with pytest.raises(ValueError, match="layer first: input or output holds NaN"):
        check_bound(model, torch.ones(2, 4))
    assert hooks_of(model) == before == 1
    with pytest.raises(ValueError, match="layer second: input"):
        check_bound(model, torch.ones(2, 4), layers={"second": LinearMap("second", model.second)})
    assert hooks_of(model) == before


def test_a_weight_that_is_not_finite_is_refused() -> None:
    model = TwoLayers()
    model.second.weight.data[0, 0] = math.nan
    with pytest.raises(ValueError, match="layer second: weight holds 1 NaN or infinite entries"):
        check_bound(model, torch.ones(2, 4))
    assert hooks_of(model) == 0


def test_hooks_go_after_success_and_after_an_error_of_the_model() -> None:
    model = TwoLayers()
    check_bound(model, torch.ones(2, 4))
    assert hooks_of(model) == 0
    with pytest.raises(ValueError, match="cannot be called with this batch: RuntimeError"):
        check_bound(model, torch.ones(2, 5))
    assert hooks_of(model) == 0


def test_a_layer_called_several_times_is_one_row_over_all_calls() -> None:
    model = TwoLayers(calls=3)
    model.first.bias.data.zero_()
    model.first.weight.data = torch.zeros(4, 4)
    for axis, gain in enumerate([0.5, 2.0, 0.25]):  # each call turns axis into axis + 1
        model.first.weight.data[axis + 1, axis] = gain
    first, second = check_bound(model, torch.eye(4)[[0, 0]])
    assert (first.tokens, second.tokens) == (6, 2)
    assert first.holds and first.largest_gain == pytest.approx(2.0)


@pytest.mark.parametrize("lying_call", [0, 1, 2])
def test_a_violation_in_any_call_stays(lying_call: int) -> None:
    model, calls = TwoLayers(calls=3), []

    def lie(_module: nn.Module, _args: tuple, output: Tensor) -> Tensor:
        calls.append(1)
        return output * 50 if len(calls) == lying_call + 1 else output

    model.first.register_forward_hook(lie)
    first, _ = check_bound(model, torch.ones(2, 4))
    assert not first.holds


def test_a_layer_that_takes_no_part_has_no_row() -> None:
    assert [row.layer for row in check_bound(TwoLayers(both=False), torch.ones(2, 4))] == ["first"]


def test_no_layer_taking_part_is_refused() -> None:
    model = TwoLayers(both=False)
    with pytest.raises(ValueError, match="none of the layers second took part"):
        check_bound(model, torch.ones(2, 4), layers={"second": LinearMap("second", model.second)})
    assert hooks_of(model) == 0


def test_a_layer_called_by_keyword_is_checked_too() -> None:
    rows = check_bound(TwoLayers(keyword=True), torch.ones(2, 4))
    assert [row.layer for row in rows] == ["first", "second"]
    assert all(row.holds for row in rows)


def test_the_choice_of_layers_and_their_order_is_the_callers() -> None:
    model = mlp(0)
    chosen = dict(reversed(linear_maps(model).items()))
    batch = torch.randn(3, model[0].in_features, generator=generator(0))
    assert [row.layer for row in check_bound(model, batch, layers=chosen)] == list(chosen)


def test_the_model_is_left_as_it_was() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5), nn.Linear(4, 4))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    check_bound(model, torch.ones(2, 4))
    assert model.training and model[1].training
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    assert torch.is_grad_enabled()


# Every kind of layer, against its own map written out


def gains_of(x: Tensor, wx: Tensor) -> Tensor:
    """Norm of every row of wx by the norm of the same row of x."""
    return wx.norm(dim=1) / x.norm(dim=1)


PLAIN = {"stride": 1, "padding": 0, "dilation": 1, "groups": 1, "padding_mode": "zeros"}
CONVOLUTION_OPTIONS = [
    {},
    {"stride": 2},
    {"padding": 1},
    {"dilation": 2},
    {"groups": 2},
    {"padding": "same"},
    {"padding": "same", "dilation": 2},
    {"padding": "valid", "groups": 4},
    {"padding": 1, "padding_mode": "circular"},
    {"padding": 2, "padding_mode": "reflect", "stride": 2},
    {"padding": "same", "padding_mode": "replicate", "groups": 2},
    {"stride": 3, "padding": 2, "dilation": 2, "groups": 2},
]


def all_rows(model: nn.Module, batch) -> list[BoundCheck]:
    return check_bound(model, batch, layers=linear_maps(model, include="*"))


def padded(conv: nn.Module, x: Tensor) -> Tensor:
    """The input as the kernel meets it; of an uneven total ``"same"`` puts the larger half at the end."""
    pads = []
    for k, d, p in reversed(list(zip(conv.kernel_size, conv.dilation, conv.padding, strict=False))):
        if conv.padding == "same":
            pads += [d * (k - 1) // 2, d * (k - 1) - d * (k - 1) // 2]
        else:
            pads += [0, 0] if conv.padding == "valid" else [p, p]
    return F.pad(x, pads, mode="constant" if conv.padding_mode == "zeros" else conv.padding_mode)


def patches_of(conv: nn.Module, x: Tensor, group: int) -> Tensor:
    """One row a patch of a group, by loops over samples and positions."""
    size = conv.in_channels // conv.groups
    x = padded(conv, x)[:, group * size : (group + 1) * size]
    window = [d * (k - 1) + 1 for k, d in zip(conv.kernel_size, conv.dilation, strict=True)]
    starts = [range(0, n - w + 1, s) for n, w, s in zip(x.shape[2:], window, conv.stride, strict=True)]
    rows = []
    for sample in x:
        for corner in itertools.product(*starts):
            where = [slice(c, c + w, d) for c, w, d in zip(corner, window, conv.dilation, strict=True)]
            rows.append(sample[(slice(None), *where)].flatten())
    return torch.stack(rows)


@pytest.mark.parametrize("options", CONVOLUTION_OPTIONS, ids=str)
@pytest.mark.parametrize("axes", [1, 2, 3])
def test_a_convolution_acts_on_patches(axes: int, options: dict) -> None:
    torch.manual_seed(0)
    kind, size = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[axes - 1], (3, 2, 3)[:axes]
    conv = kind(4, 8, size, **options).double()
    x = torch.randn(2, 4, *(7, 6, 5)[:axes], dtype=torch.float64)
    maps = linear_maps(conv, include="*")
    rows = check_bound(conv, x, layers=maps)
    assert [row.layer for row in rows] == list(maps) and len(rows) == conv.groups
    for group, (row, linear) in enumerate(zip(rows, maps.values(), strict=True)):
        patches = patches_of(conv, x, group)
        matrix = conv.weight.flatten(1).chunk(conv.groups)[group].detach()
        assert (row.map, row.holds, row.tokens) == ("patch", True, len(patches))
        assert row.largest_gain == pytest.approx(gains_of(patches, patches @ matrix.T).max().item(), rel=1e-10)
        assert row.upper == spectral_norm_bounds(matrix).upper
        torch.testing.assert_close(s2d.bound._patch_norms(linear, x)[0], patches.norm(dim=1), rtol=1e-12, atol=0)


@pytest.mark.parametrize("options", [o for o in CONVOLUTION_OPTIONS if not isinstance(o.get("padding"), str)], ids=str)
def test_the_patches_are_those_of_unfold(options: dict) -> None:
    options = PLAIN | options
    torch.manual_seed(1)
    conv = nn.Conv2d(4, 8, 3, **options).double()
    x = torch.randn(3, 4, 9, 8, dtype=torch.float64)
    mode = "constant" if conv.padding_mode == "zeros" else conv.padding_mode
    field = F.pad(x, [options["padding"]] * 4, mode=mode)
    for group, (part, row) in enumerate(zip(field.chunk(conv.groups, 1), all_rows(conv, x), strict=True)):
        unfolded = F.unfold(part, 3, options["dilation"], 0, options["stride"]).transpose(1, 2).flatten(0, 1)
        matrix = conv.weight.flatten(1).chunk(conv.groups)[group].detach()
        assert row.tokens == len(unfolded)
        assert row.largest_gain == pytest.approx(gains_of(unfolded, unfolded @ matrix.T).max().item(), rel=1e-10)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("groups", [1, 2])
def test_an_aligned_patch_is_tight_and_a_lie_about_it_is_found(groups: int, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    conv = nn.Conv2d(4, 6, 3, groups=groups).to(dtype)
    x = torch.cat(
        [top_input(part.float()).reshape(1, -1, 3, 3) for part in conv.weight.detach().flatten(1).chunk(groups)], 1
    )
    x = x.to(dtype)
    tolerance = 4 * torch.finfo(dtype).eps
    for row in all_rows(conv, x):
        assert row.holds and ALIGNED - tolerance < row.tightness <= 1 + tolerance
    conv.register_forward_hook(lambda _module, _args, output: 3.0 * output)
    assert not any(row.holds for row in all_rows(conv, x))


def test_a_lie_at_one_position_of_a_convolution_is_found_in_its_group_only() -> None:
    torch.manual_seed(0)
    conv = nn.Conv2d(4, 6, 3, groups=2, padding=1)

    def lie(_module: nn.Module, _args: tuple, output: Tensor) -> Tensor:
        output = output.clone()
        output[1, 4, 2, 3] += 50
        return output

    conv.register_forward_hook(lie)
    assert [row.holds for row in all_rows(conv, torch.randn(2, 4, 5, 5))] == [True, False]


def test_one_image_without_a_batch_dimension_and_channels_last() -> None:
    torch.manual_seed(0)
    conv, x = nn.Conv2d(3, 5, 3), torch.randn(1, 3, 6, 6)
    (batched,) = all_rows(conv, x)
    assert all_rows(conv, x[0]) == [batched]
    conv.to(memory_format=torch.channels_last)
    (row,) = check_bound(conv, x.to(memory_format=torch.channels_last), layers={"": LinearMap("", conv)})
    assert row.upper == batched.upper
    assert row.largest_gain == pytest.approx(batched.largest_gain, rel=1e-5)


@pytest.mark.parametrize(
    "options", [{}, {"stride": 2}, {"stride": 3, "padding": 1}, {"dilation": 2, "stride": 2}], ids=str
)
def test_the_norm_of_the_whole_convolution_follows_as_documented(options: dict) -> None:
    torch.manual_seed(0)
    conv = nn.Conv2d(2, 3, (3, 2), bias=False, **options).double()
    shape = (2, 8, 7)
    whole = conv(torch.eye(math.prod(shape), dtype=torch.float64).reshape(-1, *shape)).flatten(1).T
    matrix = conv.weight.detach().flatten(1)
    stride = options.get("stride", 1) // math.gcd(options.get("stride", 1), options.get("dilation", 1))
    overlap = math.ceil(3 / stride) * math.ceil(2 / stride)
    norm = torch.linalg.matrix_norm(whole, 2).item()
    assert norm <= spectral_norm_bounds(matrix).upper * overlap**0.5
    assert overlap == 1 or norm > spectral_norm_bounds(matrix).upper


@pytest.mark.parametrize("options", [{}, {"kdim": 5, "vdim": 7}, {"batch_first": True}, {"bias": False}], ids=str)
@pytest.mark.parametrize("training", [True, False])
def test_attention_is_three_projections(options: dict, training: bool) -> None:
    torch.manual_seed(0)
    layer = nn.MultiheadAttention(6, 2, dropout=0.0, **options).double().train(training)
    if layer.in_proj_bias is not None:
        layer.in_proj_bias.data.fill_(1e3)  # no part of the theorem
    widths = (6, options.get("kdim", 6), options.get("vdim", 6))
    tokens = [torch.randn(4, 3, width, dtype=torch.float64) for width in widths]
    packed = layer.in_proj_weight
    weights = packed.chunk(3) if packed is not None else (layer.q_proj_weight, layer.k_proj_weight, layer.v_proj_weight)
    for batch in (tuple(tokens), dict(zip(("query", "key", "value"), tokens, strict=True))):
        rows = all_rows(layer, batch)
        assert [(row.layer, row.map, row.tokens) for row in rows] == [(part, "projection", 12) for part in "qkv"]
        for row, weight, x in zip(rows, weights, tokens, strict=True):
            x = x.flatten(0, 1)
            assert row.holds
            assert row.largest_gain == pytest.approx(gains_of(x, x @ weight.T).max().item(), rel=1e-10)
            assert row.upper == spectral_norm_bounds(weight).upper


def test_attention_inside_an_encoder_that_has_a_fast_path() -> None:
    torch.manual_seed(0)
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 2).eval()
    with torch.autocast("cpu", torch.bfloat16):
        rows = check_bound(encoder, torch.randn(2, 5, 8))
    parts = ("self_attn.q", "self_attn.k", "self_attn.v", "linear1", "linear2")
    assert [row.layer for row in rows] == [f"layers.{n}.{part}" for n in range(2) for part in parts]
    assert all(row.holds and row.tokens == 10 for row in rows)


@pytest.mark.parametrize("keyword", [False, True])
def test_the_conv1d_of_transformers_is_a_transposed_linear(keyword: bool) -> None:
    conv1d = pytest.importorskip("transformers.pytorch_utils").Conv1D(6, 4).double()  # 4 features in, 6 out
    nn.init.normal_(conv1d.bias)
    x = torch.randn(2, 3, 4, generator=generator(0), dtype=torch.float64)
    (row,) = check_bound(conv1d, {"x": x} if keyword else x)
    matrix, x = conv1d.weight.detach().T, x.flatten(0, 1)
    assert (row.map, row.holds, row.tokens) == ("linear", True, 6)
    assert row.largest_gain == pytest.approx(gains_of(x, x @ matrix.T).max().item(), rel=1e-10)
    assert row.upper == pytest.approx(spectral_norm_bounds(matrix).upper, rel=1e-12)
    (row,) = check_bound(conv1d, 5 * top_input(matrix))
    assert row.holds and row.tightness > ALIGNED


@pytest.mark.parametrize("exponent", [-300, -200, -160, 0, 160, 200, 300])
@pytest.mark.parametrize("convolution", [False, True])
def test_activations_of_any_scale_in_float64(convolution: bool, exponent: int) -> None:
    torch.manual_seed(0)
    layer = (nn.Conv1d(2, 3, 2) if convolution else nn.Linear(4, 3)).double()
    layer.bias.data.zero_()
    x = torch.randn(5, 2, 4, dtype=torch.float64)
    (plain,), (scaled,) = all_rows(layer, x), all_rows(layer, x * 10.0**exponent)
    assert scaled.holds and scaled.tokens == plain.tokens
    assert scaled.largest_gain == pytest.approx(plain.largest_gain, rel=1e-12)
    layer.register_forward_hook(lambda _module, _args, output: 10.0 * output)
    (lie,) = all_rows(layer, x * 10.0**exponent)
    assert not lie.holds


def test_inputs_of_very_different_scale_in_one_call_are_no_violation() -> None:
    # Beside 1 the square of 1e-170 is lost, and with it the norm of the second input, but not that of its output.
    layer = one_layer(torch.tensor([[0.0, 1.0]], dtype=torch.float64))
    (row,) = check_bound(layer, torch.tensor([[1.0, 0.0], [0.0, 1e-170]], dtype=torch.float64))
    assert row.holds


@pytest.mark.parametrize(("error", "holds"), [(1, True), (-1, True), (8, False)])
def test_a_sum_as_wrong_as_float32_may_be_is_no_violation(error: int, holds: bool) -> None:
    n = 2**16  # products: their sum can be off by n units, 0.4 %
    layer = one_layer(torch.ones(1, n))
    layer.register_forward_hook(lambda _module, _args, output: output * (1 + error * n * 2.0**-24))
    (row,) = check_bound(layer, torch.ones(1, n))
    assert row.holds == holds


# Settings under which the same layer is computed otherwise


class RoundedFactors(nn.Linear):
    """Multiplies bfloat16 factors and adds in float32, as float32 products may under a low precision setting."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x.bfloat16().float(), self.weight.bfloat16().float())


@pytest.fixture
def float32_precision():
    before = torch.get_float32_matmul_precision()
    yield torch.set_float32_matmul_precision
    torch.set_float32_matmul_precision(before)


def test_low_precision_products_of_float32_are_allowed_for_only_where_they_are_set(float32_precision) -> None:
    layer = RoundedFactors(1, 1, bias=False)
    layer.weight.data.fill_(1 + 2**-8 + 2**-12)  # rounds up by 0.37 %, past the width of the enclosure
    x = torch.full((1, 1), 1.0)
    assert not check_bound(layer, x)[0].holds
    float32_precision("medium")
    (row,) = check_bound(layer, x)
    assert row.holds and row.tightness > 1
    layer.register_forward_hook(lambda _module, _args, output: 1.05 * output)
    assert not check_bound(layer, x)[0].holds


@pytest.mark.parametrize("fails", [False, True])
def test_sums_in_half_precision_are_off_during_the_call_and_then_as_before(fails: bool) -> None:
    settings_ = torch.backends.cuda.matmul
    names = [name for name in s2d.bound.HALF_PRECISION_SUMS if hasattr(settings_, name)]
    before = [getattr(settings_, name) for name in names]
    assert True in before
    seen = []

    class Spy(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            seen.extend(getattr(settings_, name) for name in names)
            if fails:
                raise RuntimeError("on purpose")
            return super().forward(x)

    if fails:
        with pytest.raises(ValueError, match="cannot be called with this batch: RuntimeError: on purpose"):
            check_bound(Spy(2, 2), torch.ones(1, 2))
    else:
        check_bound(Spy(2, 2), torch.ones(1, 2))
    assert seen == [False] * len(names)
    assert [getattr(settings_, name) for name in names] == before


def test_a_compiled_model_is_run_uncompiled() -> None:
    compilations = []

    def backend(graph: torch.fx.GraphModule, _inputs: list[Tensor]) -> Callable:
        compilations.append(graph)
        return graph.forward

    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
    compiled, x = torch.compile(model, backend=backend), torch.randn(3, 4, generator=generator(0))
    with torch.no_grad():
        compiled(x)
    assert len(compilations) == 1
    assert check_bound(compiled, x) == check_bound(model, x)
    assert len(compilations) == 1


def test_a_float16_weight_under_autocast_may_round_by_half_among_subnormal_numbers() -> None:
    # 4e-8 rounds to 6e-8 in float16: a gain of 1.5 times the norm that is rounding alone.
    layer = one_layer(torch.full((1, 64), 4e-8))
    with torch.autocast("cpu", torch.float16):
        (row,) = check_bound(layer, torch.ones(1, 64))
    assert row.tightness > 1.4
    assert row.holds


def test_weights_that_all_round_the_worst_way_are_no_violation() -> None:
    # A regular Hadamard matrix over 8, whose rows all add up to 1. In bfloat16 every positive entry rounds up and every
    # negative one towards zero, which lifts the gain of a constant input by 3 %, eight times what one rounding does.
    regular = torch.ones(4, 4) - 2 * torch.eye(4).flip(0)
    regular = torch.kron(torch.kron(regular, regular), regular)
    layer = one_layer(regular / 8 * (1 + 2**-8 + regular * 2**-13))
    with torch.autocast("cpu", torch.bfloat16):
        (row,) = check_bound(layer, torch.ones(1, 64))
    assert row.tightness > 1.025
    assert row.holds


# Weights that are not simply there


class Shrinking(nn.Module):
    """A parametrization that gives half as much whenever the weight is read."""

    reads = 0

    def forward(self, weight: Tensor) -> Tensor:
        self.reads += 1
        return weight / 2**self.reads


def test_a_parametrized_weight_that_changes_whenever_it_is_read() -> None:
    layer = nn.Linear(6, 6, bias=False)
    nn.utils.parametrize.register_parametrization(layer, "weight", Shrinking())
    for _ in range(3):
        (row,) = check_bound(layer, torch.eye(6), layers={"": LinearMap("", layer)})
        assert row.holds and row.tightness > 0.1


def test_a_weight_that_is_made_in_the_call_is_the_one_that_is_bounded() -> None:
    layer = nn.Linear(4, 4, bias=False)

    def make(module: nn.Module, _args: tuple) -> None:
        module.weight.data = 7 * torch.eye(4)

    layer.register_forward_pre_hook(make)
    (row,) = check_bound(layer, torch.ones(1, 4))
    assert row.holds and row.largest_gain == pytest.approx(7) and row.lower <= 7 <= row.upper


def test_tied_layers_count_in_one_row_each_with_its_own_bias() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4))
    model[2].weight = model[0].weight
    model[2].bias.data.fill_(100.0)
    rows = check_bound(model, torch.randn(5, 4, generator=generator(0)))
    assert [(row.layer, row.tokens, row.holds) for row in rows] == [("0", 10, True), ("4", 5, True)]
    model[2].register_forward_hook(lambda _module, _args, output: 50 * output)
    assert [row.holds for row in check_bound(model, torch.randn(5, 4, generator=generator(0)))] == [False, True]


def test_a_module_at_two_places_counts_each_call_once() -> None:
    layer = nn.Linear(4, 4)
    (row,) = check_bound(nn.Sequential(layer, nn.Tanh(), layer), torch.ones(3, 4))
    assert row.tokens == 6
    twin = nn.Linear(4, 4)
    twin.weight = layer.weight
    (row,) = check_bound(nn.Sequential(layer, nn.Tanh(), layer, nn.Tanh(), twin), torch.ones(3, 4))
    assert row.tokens == 9


# The table and the call


def test_the_rows_are_a_table() -> None:
    pandas = pytest.importorskip("pandas")
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.Flatten(), nn.Linear(18, 4), nn.ReLU(), nn.Linear(4, 2))
    table = pandas.DataFrame(all_rows(model, torch.randn(2, 1, 5, 5)))
    assert list(table.columns) == list(BoundCheck._fields)
    assert list(table["layer"]) == ["0", "2", "4"] and list(table["map"]) == ["patch", "linear", "linear"]
    assert table["holds"].dtype == bool and table["holds"].all()
    assert ((table["upper"] / table["lower"] - 1 - table["width"]).abs() < 1e-15).all()
    assert (table["width"] <= 1e-3).all() and (table["tightness"] == table["largest_gain"] / table["upper"]).all()


def test_convolutions_are_checked_only_when_asked_for() -> None:
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.Flatten(), nn.Linear(18, 4))
    assert [row.layer for row in check_bound(model, torch.ones(2, 1, 5, 5))] == ["2"]


class TwoInputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x: Tensor, *, or_not: Tensor | None = None, y: Tensor | None = None) -> Tensor:
        return self.layer(x if y is None else y)


@pytest.mark.parametrize(
    ("batch", "tokens"),
    [
        (torch.ones(3, 4), 3),
        ((torch.ones(2, 4),), 2),
        ({"x": torch.ones(3, 4), "y": torch.ones(5, 4)}, 5),
        (collections.UserDict(x=torch.ones(6, 4)), 6),
    ],
)
def test_a_batch_is_a_tensor_a_tuple_or_a_mapping(batch, tokens: int) -> None:
    (row,) = check_bound(TwoInputs(), batch)
    assert (row.layer, row.tokens) == ("layer", tokens)


def test_layers_must_be_linear_maps() -> None:
    layer = nn.Linear(2, 2)
    with pytest.raises(TypeError, match=r"layers\['a'\] is a Linear: expected values as linear_maps"):
        check_bound(layer, torch.ones(1, 2), layers={"a": layer})


@pytest.mark.parametrize(
    ("output", "message"),
    [
        (lambda y: (y, None), "layer first: its output is a tuple"),
        (lambda y: y[:1], r"layer first: its output has shape \(1, 4\), and a vector of 4 entries .* 2 inputs"),
        (lambda y: y[:, :2], r"layer first: its output has shape \(2, 2\)"),
    ],
)
def test_an_output_that_is_not_one_vector_for_each_input_is_refused(output: Callable, message: str) -> None:
    model = TwoLayers()
    model.first.register_forward_hook(lambda _module, _args, y: output(y))
    with pytest.raises(ValueError, match=message):
        check_bound(model, torch.ones(2, 4))
    assert hooks_of(model) == 1


@pytest.mark.parametrize("bad", [math.nan, -math.inf])
def test_pixels_that_are_not_finite_are_refused_by_name(bad: float) -> None:
    model = nn.Sequential(collections.OrderedDict(stem=nn.Conv2d(1, 2, 3)))
    with pytest.raises(ValueError, match="layer stem: input or output holds NaN or infinity"):
        all_rows(model, torch.full((1, 1, 4, 4), bad))
    assert hooks_of(model) == 0


def test_a_norm_at_the_end_of_float64_is_refused() -> None:
    with pytest.raises(ValueError, match="its weight has a norm of 1e\\+305, too near the end of float64"):
        check_bound(one_layer(torch.tensor([[1e305]], dtype=torch.float64)), torch.zeros(1, 1, dtype=torch.float64))


def test_no_false_claim_in_a_short_stress_test() -> None:
    # The long one: python tests/stress_bound.py --seconds 600
    assert list(stress(range(700))) == []
