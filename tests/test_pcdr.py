"""PCDR. Oracles: closed forms on 2x2, diagonal, rank-one and orthogonal weights; the printed sums, written anew."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from s2d.pcdr import activation_pcdr, layer_pcdr, outlier_rank, spectral_pcdr
from s2d.reference import activation_pcdr_literal, spectral_pcdr_literal
from s2d.spectral import solve_top_triplets, top_singular_triplets

F64 = torch.float64
STRESS = settings(max_examples=80, deadline=None, derandomize=True)
sizes = st.integers(1, 12)
seeds = st.integers(0, 2**31)


def gaussian(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


def printed_sums(weight: Tensor, x: Tensor, neuron: Tensor, k_max: int) -> Tensor:
    """PCDR_k(i, j) term by term from an eigendecomposition of ``W^T W``; shares no code with the package."""
    values, v = torch.linalg.eigh(weight.double().T @ weight.double())
    v = v.flip(1)
    result = torch.empty(len(x), k_max, dtype=F64)
    for j, (row, i) in enumerate(zip(x.double(), neuron.tolist(), strict=True)):
        # s_r U[i, r] = (W v_r)[i]
        terms = [float(weight.double()[i] @ v[:, r]) * float(v[:, r] @ row) for r in range(len(values))]
        for k in range(1, k_max + 1):
            result[j, k - 1] = abs(sum(terms[:k])) / abs(sum(terms))
    return result


def literal_ratios(weight: Tensor, x: Tensor, neuron: Tensor, k_max: int) -> Tensor:
    rows = zip(x, neuron.tolist(), strict=True)
    ratios = [[activation_pcdr_literal(weight, row, i, k) for k in range(1, k_max + 1)] for row, i in rows]
    return torch.tensor(ratios, dtype=F64)


# The activation form

SYMMETRIC = torch.tensor([[2.0, 1.0], [1.0, 2.0]], dtype=F64)  # s = 3, 1 along (1, 1) and (1, -1)


@pytest.mark.parametrize(
    ("x", "neuron", "first"),
    [
        ((1.0, 1.0), 0, 1.0),  # the top direction alone
        ((1.0, -1.0), 0, 0.0),  # the second direction alone
        ((1.0, 0.0), 0, 0.75),  # 3/2 of 2
        ((1.0, 0.0), 1, 1.5),  # 3/2 of 1: the second component cancels a third of the first
        ((1.0, -1.5), 0, 1.5),  # -3/4 of 1/2
        ((1.0, -1.999), 0, 1498.5),  # nearly cancelled: far above 1, unclipped
    ],
)
def test_two_by_two_by_hand(x: tuple[float, float], neuron: int, first: float) -> None:
    ratios = activation_pcdr(SYMMETRIC, torch.tensor([x], dtype=F64), torch.tensor([neuron]), k_max=2)
    torch.testing.assert_close(ratios, torch.tensor([[first, 1.0]], dtype=F64), rtol=1e-9, atol=1e-12)


def test_a_diagonal_weight_switches_from_0_to_1_at_the_neurons_own_component() -> None:
    weight = torch.diag(torch.tensor([2.0, 5.0, 1.0, 3.0], dtype=F64))  # ranks 3, 1, 4, 2
    x = gaussian(4, 4)
    ratios = activation_pcdr(weight, x, torch.arange(4), k_max=4)
    expected = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1], [0, 0, 0, 1], [0, 1, 1, 1]], dtype=F64)
    torch.testing.assert_close(ratios, expected, rtol=0, atol=1e-12)


def test_rank_one_is_all_dominance() -> None:
    weight = torch.outer(gaussian(6, seed=1), gaussian(4, seed=2))
    ratios = activation_pcdr(weight, gaussian(5, 4, seed=3), torch.tensor([0, 1, 2, 3, 5]), k_max=3)
    torch.testing.assert_close(ratios, torch.ones(5, 3, dtype=F64))


def test_an_input_along_one_singular_vector_sees_that_component_alone() -> None:
    weight = gaussian(7, 5)
    v = torch.linalg.svd(weight)[2]
    ratios = activation_pcdr(weight, v, torch.tensor([0, 1, 2, 3, 4]), k_max=5)
    torch.testing.assert_close(ratios, torch.ones(5, 5, dtype=F64).triu(), rtol=0, atol=1e-9)


@pytest.mark.parametrize("shape", [(1, 1), (1, 6), (6, 1), (8, 5), (5, 8), (12, 12)])
def test_against_the_literal_and_the_printed_sums(shape: tuple[int, int]) -> None:
    weight, k = gaussian(*shape), min(shape)
    x = gaussian(20, shape[1], seed=1)
    neuron = torch.randint(0, shape[0], (20,), generator=torch.Generator().manual_seed(2))
    ratios = activation_pcdr(weight, x, neuron, k_max=k)
    assert ratios.shape == (20, k)
    literal = literal_ratios(weight, x, neuron, k)
    torch.testing.assert_close(ratios, literal, rtol=1e-8, atol=1e-10)
    torch.testing.assert_close(ratios, printed_sums(weight, x, neuron, k), rtol=1e-6, atol=1e-8)


def test_a_layer_above_the_full_svd_threshold() -> None:
    weight, x = gaussian(200, 160), gaussian(9, 160, seed=1)
    weight += 5 * torch.outer(gaussian(200, seed=4), gaussian(160, seed=5)) / 160**0.5
    neuron = torch.randint(0, 200, (9,), generator=torch.Generator().manual_seed(2))
    ratios = activation_pcdr(weight, x, neuron, k_max=2)
    literal = literal_ratios(weight, x, neuron, 2)
    torch.testing.assert_close(ratios, literal, rtol=1e-2, atol=1e-3)


def test_given_triplets_are_used_and_may_be_more_than_needed() -> None:
    weight, x, neuron = gaussian(9, 7), gaussian(4, 7, seed=1), torch.tensor([0, 3, 8, 3])
    expected = activation_pcdr(weight, x, neuron, k_max=2)
    given_five = activation_pcdr(weight, x, neuron, k_max=2, triplets=top_singular_triplets(weight, 5))
    torch.testing.assert_close(given_five, expected)
    # A triplet of length zero: the numerator is then zero, so the given ones are what is used.
    u, s, v = top_singular_triplets(weight, 2)
    zeroed = activation_pcdr(weight, x, neuron, k_max=2, triplets=type(top_singular_triplets(weight, 2))(u, 0 * s, v))
    assert torch.equal(zeroed, torch.zeros(4, 2, dtype=F64))


def test_dtypes_follow_the_weight() -> None:
    weight, x, neuron = gaussian(6, 6), gaussian(3, 6, seed=1), torch.tensor([0, 1, 2])
    expected = activation_pcdr(weight, x, neuron, k_max=2)
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        ratios = activation_pcdr(weight.to(dtype), x, neuron, k_max=2)
        assert ratios.dtype == torch.float32
        torch.testing.assert_close(ratios.double(), expected, rtol=0.3, atol=0.05)
    mixed = activation_pcdr(weight, x.to(torch.bfloat16), neuron.to(torch.int32), k_max=2)
    assert mixed.dtype == F64


def test_zero_activations_are_nan_and_are_left_out_of_the_layer() -> None:
    ratios = activation_pcdr(torch.eye(2), torch.tensor([[0.0, 1.0], [2.0, 1.0]]), torch.tensor([0, 0]), k_max=2)
    assert ratios[0].isnan().all()
    assert not ratios[1].isnan().any()
    torch.testing.assert_close(layer_pcdr(ratios), ratios[1].clamp(max=1))


def test_an_activation_that_is_zero_by_cancellation_is_nan_too() -> None:
    # Neuron 0 sees 2 - 2 = 0 exactly: components -1.5 and 1.5. It is no outlier and says nothing about dominance.
    ratios = activation_pcdr(SYMMETRIC.float(), torch.tensor([[1.0, -2.0]]), torch.tensor([0]), k_max=1)
    assert ratios.isnan().all()
    assert torch.equal(layer_pcdr(ratios), torch.zeros(1))


def test_no_activations_give_no_rows() -> None:
    ratios = activation_pcdr(gaussian(4, 3), torch.zeros(0, 3), torch.zeros(0, dtype=torch.int64), k_max=2)
    assert ratios.shape == (0, 2)


@STRESS
@given(sizes, sizes, seeds)
def test_every_component_together_is_the_activation(m: int, n: int, seed: int) -> None:
    weight, x = gaussian(m, n, seed=seed), gaussian(6, n, seed=seed + 1)
    neuron = torch.randint(0, m, (6,), generator=torch.Generator().manual_seed(seed))
    ratios = activation_pcdr(weight, x, neuron, k_max=min(m, n))[:, -1]
    # Relative to the activation, rounding grows with the cancellation in it.
    size = (weight[neuron] * x).sum(1).abs()
    assert ((ratios - 1).abs() * size <= 1e-11 * (1 + weight.norm() * x.norm(dim=1))).all()


@STRESS
@given(sizes, sizes, seeds, st.sampled_from([-1.0, 1e-6, 3.0, 1e8]), st.sampled_from([-2.0, 1e-5, 1e5]))
def test_the_ratio_does_not_depend_on_scale_or_sign(m: int, n: int, seed: int, a: float, b: float) -> None:
    weight, x = gaussian(m, n, seed=seed), gaussian(4, n, seed=seed + 1)
    neuron, k = torch.zeros(4, dtype=torch.int64), min(m, n, 3)
    expected = activation_pcdr(weight, x, neuron, k_max=k)
    usable = (expected < 1e3).all(1)  # nearly cancelled activations magnify rounding
    got = activation_pcdr(a * weight, b * x, neuron, k_max=k)
    torch.testing.assert_close(got[usable], expected[usable], rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize(
    ("x", "neuron", "message"),
    [
        (torch.ones(2, 4), torch.tensor([0, 1]), r"x \(2, 4\) and neuron \(2,\) do not fit a \(5, 3\) weight"),
        (torch.ones(3), torch.tensor([0, 1, 2]), r"x \(3,\)"),
        (torch.ones(2, 3), torch.tensor([0]), r"neuron \(1,\)"),
        (torch.ones(2, 3), torch.tensor([[0], [1]]), r"neuron \(2, 1\)"),
        (torch.ones(2, 3), torch.tensor([0, 5]), "neuron holds 0 to 5: the layer has 5"),
        (torch.ones(2, 3), torch.tensor([-1, 2]), "neuron holds -1 to 2: the layer has 5"),
    ],
)
def test_shapes_and_neurons_that_do_not_fit_are_refused(x: Tensor, neuron: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        activation_pcdr(gaussian(5, 3), x, neuron, k_max=1)


@pytest.mark.parametrize("form", ["activation", "spectral"])
@pytest.mark.parametrize("k_max", [0, -1, 4])
def test_a_k_max_out_of_range_is_named(form: str, k_max: int) -> None:
    weight = gaussian(5, 3)
    triplets = top_singular_triplets(weight, 3)

    def call(**options) -> Tensor:
        if form == "spectral":
            return spectral_pcdr(weight, k_max=k_max, **options)
        return activation_pcdr(weight, torch.ones(1, 3), torch.tensor([0]), k_max=k_max, **options)

    with pytest.raises(ValueError, match=f"k is {k_max}"):
        call()
    with pytest.raises(ValueError, match=f"k_max is {k_max}, but 3 triplets"):
        call(triplets=triplets)


@pytest.mark.parametrize("weight", [torch.full((2, 2), math.nan), torch.ones(2), torch.zeros(0, 2)])
def test_a_bad_weight_is_refused_by_both_forms(weight: Tensor) -> None:
    with pytest.raises(ValueError, match="weight"):
        activation_pcdr(weight, torch.ones(1, 2), torch.tensor([0]), k_max=1)
    with pytest.raises(ValueError, match="weight"):
        spectral_pcdr(weight, k_max=1)


# The spectral form


def test_spectral_closed_forms() -> None:
    def close(weight: Tensor, expected: list[float]) -> None:
        got = spectral_pcdr(weight, k_max=len(expected))
        torch.testing.assert_close(got, torch.tensor(expected, dtype=got.dtype))

    close(torch.diag(torch.tensor([3.0, -4.0, 0.0])), [16 / 25, 1.0, 1.0])
    close(torch.outer(torch.tensor([1.0, 2.0]), torch.tensor([3.0, 1.0, 1.0])), [1.0, 1.0])
    close(7 * torch.linalg.qr(gaussian(8, 8))[0], [k / 8 for k in range(1, 9)])
    close(torch.tensor([[5.0]]), [1.0])
    close(torch.zeros(3, 4), [0.0, 0.0, 0.0])
    close(torch.zeros(200, 150), [0.0, 0.0])


@pytest.mark.parametrize("shape", [(1, 5), (9, 4), (4, 9), (140, 170)])
def test_spectral_against_the_literal(shape: tuple[int, int]) -> None:
    weight, k_max = gaussian(*shape), min(*shape, 5)
    literal = torch.tensor([spectral_pcdr_literal(weight, k) for k in range(1, k_max + 1)], dtype=F64)
    torch.testing.assert_close(spectral_pcdr(weight, k_max=k_max), literal, rtol=1e-4, atol=0)
    torch.testing.assert_close(spectral_pcdr(weight.float(), k_max=k_max).double(), literal, rtol=1e-4, atol=0)


def test_the_literals_in_closed_form() -> None:
    assert spectral_pcdr_literal(torch.diag(torch.tensor([3.0, 4.0])), 1) == pytest.approx(16 / 25)
    assert activation_pcdr_literal(SYMMETRIC, torch.tensor([1.0, 0.0]), 1, 1) == pytest.approx(1.5)
    assert activation_pcdr_literal(SYMMETRIC, torch.tensor([1.0, 0.0]), 1, 2) == pytest.approx(1.0)


@pytest.mark.parametrize("scale", [1e-30, 1e-36, 1e-20, 1e20, 1e30])
@pytest.mark.parametrize("shape", [(12, 8), (200, 150)])
def test_spectral_does_not_depend_on_scale(shape: tuple[int, int], scale: float) -> None:
    # The squares of these entries leave the range of float32.
    weight = gaussian(*shape).float()
    torch.testing.assert_close(spectral_pcdr(weight * scale), spectral_pcdr(weight), rtol=1e-4, atol=0)


@STRESS
@given(sizes, sizes, seeds, st.sampled_from([torch.float32, F64]))
def test_spectral_increases_to_one(m: int, n: int, seed: int, dtype: torch.dtype) -> None:
    got = spectral_pcdr(gaussian(m, n, seed=seed).to(dtype), k_max=min(m, n))
    assert (got > 0).all() and (got <= 1).all()
    assert (got.diff() >= 0).all()
    assert got[-1] == pytest.approx(1.0, abs=1e-6)


# A layer's PCDR, and the rank


@pytest.mark.parametrize(
    ("ratios", "expected"),
    [
        ([[0.5, 4.0], [0.7, 0.6]], [0.6, 0.8]),
        ([[100.0], [0.0], [0.5]], [0.5]),  # uncapped, the mean would be 33.5
        ([[math.inf, 1.0]], [1.0, 1.0]),
        ([[math.nan, math.nan], [0.25, 1.0]], [0.25, 1.0]),
        ([[math.nan, 1.0]], [0.0, 0.0]),
    ],
)
def test_the_layers_mean_is_capped_at_one_each(ratios: list, expected: list) -> None:
    torch.testing.assert_close(layer_pcdr(torch.tensor(ratios)), torch.tensor(expected))


def test_a_layer_without_activations_has_no_dominance() -> None:
    assert torch.equal(layer_pcdr(torch.zeros(0, 3)), torch.zeros(3))


def test_the_cap_does_not_write_into_its_argument() -> None:
    ratios = torch.tensor([[3.0]])
    layer_pcdr(ratios)
    assert ratios.item() == 3.0


@pytest.mark.parametrize(
    ("pcdr", "tau", "rank"),
    [
        ([0.7, 0.96, 0.99], 0.95, 2),
        ([0.95], 0.95, 1),  # reaching the threshold is enough, in float32 too
        ([0.9, 0.5, 0.96], 0.8, 1),  # not monotone: the smallest k counts
        ([0.9, 0.9], 0.95, None),
        ([0.0, 0.0], 1e-9, None),
        ([0.5, 1.0], 1.0, 2),
        ([], 0.5, None),
    ],
)
def test_the_outlier_rank(pcdr: list[float], tau: float, rank: int | None) -> None:
    got = outlier_rank(torch.tensor(pcdr), tau)
    assert got == rank
    assert type(got) is type(rank)


@pytest.mark.parametrize("tau", [0, -0.1, 1.1, math.nan, math.inf])
def test_a_tau_out_of_range_is_named(tau: float) -> None:
    with pytest.raises(ValueError, match=f"tau is {tau}"):
        outlier_rank(torch.tensor([0.5]), tau)


def test_a_ratio_that_is_none_is_refused() -> None:
    with pytest.raises(ValueError, match="pcdr holds NaN"):
        outlier_rank(torch.tensor([math.nan, 0.99]), 0.95)


@STRESS
@given(st.lists(st.floats(0, 1, width=32), min_size=1, max_size=6), st.floats(0.01, 1))
def test_the_outlier_rank_is_the_minimum_it_is_defined_as(pcdr: list[float], tau: float) -> None:
    values = torch.tensor(pcdr, dtype=F64)
    expected = [k for k, value in enumerate(values.tolist(), 1) if value >= tau * (1 - 5e-4)]  # what the triplets allow
    assert outlier_rank(values, tau) == (expected[0] if expected else None)


def product_of_factors(m: int, n: int, rank: int, seed: int, dtype: torch.dtype) -> Tensor:
    """A weight of that rank but for the rounding of its entries."""
    return (gaussian(m, rank, seed=seed) @ gaussian(rank, n, seed=seed + 1)).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, F64])
@pytest.mark.parametrize(("shape", "rank"), [((40, 30), 1), ((40, 30), 3), ((200, 160), 1), ((160, 200), 2)])
def test_a_weight_of_rank_k_is_all_dominance_at_k_however_small_the_activation(shape, rank, dtype) -> None:
    for seed in range(0, 40, 2):
        weight = product_of_factors(*shape, rank, seed, dtype)
        x = gaussian(64, shape[1], seed=seed + 7).to(dtype)
        neuron = torch.randint(0, shape[0], (64,), generator=torch.Generator().manual_seed(seed))
        # Half of the inputs are turned until their activation almost cancels.
        rows = weight[neuron[:32]].double()
        parallel = (rows * x[:32]).sum(1, keepdim=True) / rows.square().sum(1, keepdim=True) * rows
        x[:32] = (x[:32] - (1 - 1e-4) * parallel).to(dtype)
        ratios = activation_pcdr(weight, x, neuron, k_max=rank)[:, -1]
        unknown = ratios.isnan()
        assert (ratios[~unknown] == 1).all()
        y = (weight[neuron].double() * x.double()).sum(1).abs()
        allowed = weight[neuron].double().norm(dim=1) * x.double().norm(dim=1)
        assert not (unknown & (y > 1.01 * torch.finfo(dtype).eps * allowed)).any()
        assert outlier_rank(layer_pcdr(ratios[:, None]), tau=1) == 1


@pytest.mark.parametrize("seed", range(20))
def test_a_weight_of_rank_one_reaches_the_highest_threshold(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.outer(torch.randn(40, generator=generator), torch.randn(30, generator=generator))
    assert outlier_rank(spectral_pcdr(weight, k_max=2), tau=1) == 1
    x = torch.randn(8, 30, generator=generator)
    largest = (x @ weight.T).abs().argmax(dim=1)
    assert outlier_rank(layer_pcdr(activation_pcdr(weight, x, largest, k_max=2)), tau=1) == 1


@pytest.mark.parametrize("size", [40, 200])
def test_a_threshold_that_is_met_in_exact_arithmetic_is_met(size: int) -> None:
    # All singular values of an orthogonal weight are 1: its spectral PCDR is k/n, for any choice of components.
    for seed in range(10):
        weight = torch.linalg.qr(gaussian(size, size, seed=seed))[0].float()
        assert outlier_rank(spectral_pcdr(weight, k_max=3), tau=3 / size) == 3


@pytest.mark.parametrize("shape", [(40, 30), (200, 160)])
def test_an_activation_whose_top_component_is_the_threshold_meets_it(shape: tuple[int, int]) -> None:
    for seed in range(10):
        u, v = (torch.linalg.qr(gaussian(size, 2, seed=seed + size))[0] for size in shape)
        weight = (u * torch.tensor([3.0, 1.0], dtype=F64)) @ v.T
        neuron = u.abs().amin(1).topk(4).indices
        # Of every activation, which is 1, the first component makes 3/4 and the second 1/4.
        x = (0.75 / (3 * u[neuron, :1])) * v[:, 0] + (0.25 / u[neuron, 1:]) * v[:, 1]
        ratios = activation_pcdr(weight.float(), x.float(), neuron, k_max=2)
        torch.testing.assert_close(ratios[:, 0], torch.full((4,), 0.75), rtol=5e-5, atol=0)
        assert outlier_rank(layer_pcdr(ratios), tau=0.75) == 1
        assert outlier_rank(layer_pcdr(ratios), tau=0.76) == 2


def test_the_error_of_the_triplets_moves_a_ratio_no_more_than_is_said() -> None:
    for seed in range(10):
        weight, x, neuron = gaussian(200, 160, seed=seed), gaussian(12, 160, seed=seed + 50), torch.arange(12)
        solved = solve_top_triplets([weight], 3, tol=1e-2)[0]  # far from converged
        u, s, v = solved.triplets
        nearby = weight - u @ (weight.T @ u - v * s).T
        exact = literal_ratios(nearby, x, neuron, 3)
        y = (weight[neuron] * x).sum(1).abs()
        allowed = exact * (solved.error * x.norm(dim=1) / y)[:, None]
        error = (activation_pcdr(weight, x, neuron, k_max=3, triplets=solved.triplets) - exact).abs()
        assert solved.error > 1e-4 and (error <= (1 + allowed) * allowed + 1e-9).all()
        shares = torch.tensor([spectral_pcdr_literal(weight, k) for k in (1, 2, 3)], dtype=F64)
        error = (spectral_pcdr(weight, k_max=3, triplets=solved.triplets) - shares).abs()
        assert (error <= 2 * solved.error / weight.norm()).all()


def test_a_forward_pass_in_any_order_of_summation_gives_one_rank() -> None:
    """Permuting inputs permutes every sum, as another kernel does; what is selected must not follow."""
    for seed in range(20):
        weight = product_of_factors(48, 64, 1, seed, torch.float32)
        x = gaussian(16, 64, seed=seed + 9).float()
        neuron = torch.arange(16)
        ranks = set()
        for turn in range(5):
            order = torch.randperm(64, generator=torch.Generator().manual_seed(turn))
            ratios = activation_pcdr(weight[:, order], x[:, order], neuron, k_max=2)
            ranks.add(outlier_rank(layer_pcdr(ratios), tau=1))
        assert ranks == {1}
