"""Activation statistics and outlier rows.

Oracles: ``scipy.stats.kurtosis``, numpy over the concatenation, closed forms, a brute-force sort of every activation.
"""

from __future__ import annotations

import math

import numpy as np
import pytest
import scipy.stats
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from s2d.outliers import (
    ActivationStatistics,
    ActivationSummary,
    OutlierRows,
    excess_kurtosis,
    neuron_kurtosis,
    watch_activations,
)

STRESS = settings(max_examples=100, deadline=None, derandomize=True)
seeds = st.integers(0, 2**31)
partitions = st.lists(st.integers(1, 9), min_size=1, max_size=6)


def gaussian(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def heavy(*shape: int, seed: int = 0) -> Tensor:
    """Activations with outliers and a skew: a cubed normal with one channel blown up."""
    x = gaussian(*shape, seed=seed) ** 3 + 0.5
    x[..., 0] *= 8
    return x


def summarize(*batches: Tensor) -> ActivationSummary:
    statistics = ActivationStatistics()
    for batch in batches:
        statistics.update(batch)
    return statistics.summary()


def by_numpy(x: Tensor) -> ActivationSummary:
    """Every statistic from the whole array at once."""
    a = x.double().numpy()
    s2 = (a.reshape(-1, a.shape[-1]) ** 2).mean(0)
    return ActivationSummary(
        a.size,
        a.mean(),
        a.std(),
        scipy.stats.kurtosis(a, axis=None),
        (s2**2).mean() / s2.mean() ** 2,
        abs(a).max(),
    )


def assert_same(got: ActivationSummary, expected: ActivationSummary, rel: float = 1e-9) -> None:
    for field, value in got._asdict().items():
        assert value == pytest.approx(getattr(expected, field), rel=rel, abs=rel), field


# Moments


@STRESS
@given(seeds, partitions, st.integers(1, 6))
def test_any_partition_into_batches_is_the_whole(seed: int, lengths: list[int], width: int) -> None:
    x = heavy(sum(lengths), width, seed=seed)
    if sum(lengths) * width == 1:
        return  # one number has no spread
    got = summarize(*x.split(lengths))
    assert_same(got, summarize(x), rel=1e-8)
    assert_same(got, by_numpy(x), rel=1e-8)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(7,), (9, 5), (2, 3, 8), (2, 2, 2, 2)])
def test_one_shot_against_scipy_and_numpy(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x = heavy(*shape).to(dtype)
    assert_same(summarize(x), by_numpy(x))
    assert excess_kurtosis(x) == pytest.approx(scipy.stats.kurtosis(x.double().numpy(), axis=None), rel=1e-10)


def test_integers_are_activations_too() -> None:
    x = torch.arange(12).reshape(3, 4)
    assert_same(summarize(x), by_numpy(x))


@pytest.mark.parametrize("mean", [0.0, 1e3, -1e6, 1e6])
def test_a_large_mean_does_not_swallow_the_spread(mean: float) -> None:
    x = gaussian(4000, 5, seed=1)
    x[0, 0] = 9.0
    shifted = x + mean
    truth = scipy.stats.kurtosis(x.numpy(), axis=None)
    for batches in ([shifted], shifted.split(1000), shifted.split(37)):
        got = summarize(*batches)
        assert got.excess_kurtosis == pytest.approx(truth, rel=1e-6, abs=1e-6)
        assert got.std == pytest.approx(x.numpy().std(), rel=1e-9)
        assert got.mean == pytest.approx(mean + x.mean().item(), rel=1e-12)


def test_batches_with_means_far_apart() -> None:
    batches = [gaussian(50, 3, seed=1) + 1e6, gaussian(80, 3, seed=2) - 1e6, gaussian(3, 3, seed=3)]
    assert_same(summarize(*batches), by_numpy(torch.cat(batches)), rel=1e-9)


def test_known_distributions() -> None:
    grid = (torch.arange(200_000, dtype=torch.float64) + 0.5) / 200_000
    assert excess_kurtosis(grid) == pytest.approx(-1.2, abs=1e-6)  # uniform
    assert excess_kurtosis(torch.special.ndtri(grid)) == pytest.approx(0.0, abs=5e-3)  # normal
    laplace = torch.sign(grid - 0.5) * torch.log1p(-2 * (grid - 0.5).abs())
    assert excess_kurtosis(laplace) == pytest.approx(3.0, abs=0.05)
    assert excess_kurtosis(torch.tensor([1.0, -1.0])) == pytest.approx(-2.0)


@pytest.mark.parametrize("n", [10, 1000, 100_000])
def test_one_outlier_among_zeros_in_closed_form(n: int) -> None:
    x = torch.zeros(n)
    x[n // 2] = 3.0
    p = 1 / n  # a Bernoulli variable: excess kurtosis (1 - 6 p (1 - p)) / (p (1 - p))
    assert excess_kurtosis(x) == pytest.approx((1 - 6 * p * (1 - p)) / (p * (1 - p)), rel=1e-9)


@pytest.mark.parametrize("value", [0.0, -3.0, 0.1, 1e6 + 0.1, 1e-30, 1e30])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_constant_has_kurtosis_zero_by_convention(value: float, dtype: torch.dtype) -> None:
    for count in (1, 3, 7, 100, 1000):
        x = torch.full((count, 4), value, dtype=dtype)
        assert excess_kurtosis(x) == 0.0, count  # and not the -2 of the rounding of its mean
        got = summarize(*[x] * 5)
        assert got.excess_kurtosis == 0.0, count
        assert got.neuron_kurtosis == pytest.approx(1.0)
        assert got.std == pytest.approx(0.0, abs=1e-14 * abs(value))
        assert got.max_abs == abs(x[0, 0].item())


@pytest.mark.parametrize("scale", [1e-40, 1e-20, 1e20, 1e37])
def test_kurtosis_does_not_depend_on_scale_within_float32(scale: float) -> None:
    x = heavy(40, 6).clamp(-5, 5)
    got = summarize(*(x * scale).float().split(7))
    # Subnormal numbers are coarse, so the oracle looks at what float32 made of them.
    rescaled = (x * scale).float().double() / scale
    assert got.excess_kurtosis == pytest.approx(by_numpy(rescaled).excess_kurtosis, rel=1e-6)
    assert got.neuron_kurtosis == pytest.approx(by_numpy(rescaled).neuron_kurtosis, rel=1e-6)


# Neuron kurtosis


@pytest.mark.parametrize("width", [1, 2, 7, 64])
def test_neuron_kurtosis_closed_forms(width: int) -> None:
    one = torch.zeros(5, width)
    one[:, width // 2] = torch.tensor([1.0, -2.0, 3.0, 0.5, 9.0])
    assert neuron_kurtosis(one) == pytest.approx(width)
    alike = torch.tensor([1.0, -1.0])[torch.arange(5 * width) % 2].reshape(5, width)
    assert neuron_kurtosis(alike) == pytest.approx(1.0)
    assert neuron_kurtosis(torch.zeros(5, width)) == 1.0


@pytest.mark.parametrize(("active", "width"), [(1, 8), (2, 8), (3, 12), (8, 8)])
def test_neuron_kurtosis_of_equal_channels_among_silent_ones(active: int, width: int) -> None:
    x = torch.zeros(4, width)
    x[:, :active] = 2.0
    assert neuron_kurtosis(x) == pytest.approx(width / active)


def test_neuron_kurtosis_looks_at_channels_not_at_tokens() -> None:
    x = torch.zeros(8, 4)
    x[3] = 1.0  # one token carries everything, every channel alike
    assert neuron_kurtosis(x) == pytest.approx(1.0)
    assert neuron_kurtosis(x.T) == pytest.approx(8.0)


@STRESS
@given(seeds, st.integers(1, 8), st.integers(1, 8))
def test_neuron_kurtosis_lies_between_one_and_the_width(seed: int, tokens: int, width: int) -> None:
    assert 1 - 1e-12 <= neuron_kurtosis(heavy(tokens, width, seed=seed)) <= width * (1 + 1e-12)


def test_neuron_kurtosis_merges_over_batches_of_unequal_length() -> None:
    x = heavy(31, 6)
    assert summarize(*x.split([1, 20, 10])).neuron_kurtosis == pytest.approx(by_numpy(x).neuron_kurtosis, rel=1e-12)


# Errors


@pytest.mark.parametrize("x", [torch.zeros(0, 4), torch.zeros(4, 0), torch.tensor(1.0)])
def test_nothing_to_measure_is_refused(x: Tensor) -> None:
    with pytest.raises(ValueError, match="activations of shape"):
        ActivationStatistics().update(x)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_activations_that_are_not_finite_are_refused_and_nothing_is_counted(bad: float) -> None:
    statistics = ActivationStatistics()
    statistics.update(torch.ones(2, 3))
    before = statistics.summary()
    x = torch.ones(4, 3)
    x[1, 1] = bad
    for function in (statistics.update, excess_kurtosis, neuron_kurtosis):
        with pytest.raises(ValueError, match="NaN or infinity"):
            function(x)
    assert statistics.summary() == before


def test_another_width_is_refused_and_nothing_is_counted() -> None:
    statistics = ActivationStatistics()
    statistics.update(torch.ones(2, 3))
    before = statistics.summary()
    with pytest.raises(ValueError, match="width 4, earlier batches had 3"):
        statistics.update(torch.ones(2, 4) * 9)
    assert statistics.summary() == before


def test_a_summary_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match=r"call update\(\) first"):
        ActivationStatistics().summary()


def test_statistics_hold_no_graph_and_do_not_change_their_input() -> None:
    x = gaussian(3, 4).requires_grad_()
    before = x.detach().clone()
    summarize(x * 2, x)
    assert torch.equal(x, before)


# Watching modules


def test_watched_modules_are_measured_in_every_forward_pass() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.GELU(), nn.Linear(4, 2)).double()
    batches = [gaussian(5, 3, seed=1), gaussian(2, 6, 3, seed=2)]
    with watch_activations({"hidden": model[1], "out": model}) as statistics:
        with torch.no_grad():
            outputs = [(model[1](model[0](x)), model(x)) for x in batches]
    # model[1] ran twice a batch: by hand, and inside the model.
    hidden = torch.cat([h.reshape(-1, 4) for h, _ in outputs for _ in range(2)])
    assert_same(statistics["hidden"].summary(), by_numpy(hidden))
    assert_same(statistics["out"].summary(), by_numpy(torch.cat([y.reshape(-1, 2) for _, y in outputs])))


def test_hooks_go_and_results_stay_when_the_context_closes() -> None:
    layer = nn.Linear(2, 3)
    with watch_activations({"layer": layer}) as statistics:
        layer(torch.ones(4, 2))
    layer(torch.ones(4, 2))
    assert statistics["layer"].count == 12
    assert len(layer._forward_hooks) == 0


def test_hooks_go_when_an_error_is_raised_inside() -> None:
    layers = {"a": nn.Linear(2, 3), "b": nn.Linear(2, 3)}
    with pytest.raises(ValueError, match="NaN"), watch_activations(layers):
        layers["b"](torch.full((1, 2), math.nan))
    with pytest.raises(KeyError), watch_activations(layers):
        raise KeyError
    assert all(len(layer._forward_hooks) == 0 for layer in layers.values())


def test_watching_changes_no_output() -> None:
    layer, x = nn.Linear(2, 3), torch.ones(4, 2)
    before = layer(x)
    with watch_activations({"layer": layer}):
        assert torch.equal(layer(x), before)


# Outlier rows


def brute_force(x: Tensor, y: Tensor, capacity: int) -> list[tuple[float, int, tuple[float, ...]]]:
    """Every activation in a Python list, sorted."""
    x, y = x.reshape(-1, x.shape[-1]), y.reshape(-1, y.shape[-1])
    everything = [
        (abs(value), i, tuple(x[j].tolist())) for j, row in enumerate(y.tolist()) for i, value in enumerate(row)
    ]
    return sorted(everything, reverse=True)[:capacity]


def contents(rows: OutlierRows) -> list[tuple[float, int, tuple[float, ...]]]:
    return list(zip(rows.magnitude.tolist(), rows.neuron.tolist(), map(tuple, rows.x.tolist()), strict=True))


@STRESS
@given(seeds, partitions, st.integers(1, 5), st.integers(1, 5), st.integers(1, 40))
def test_rows_are_the_largest_over_the_concatenation(
    seed: int, lengths: list[int], inputs: int, outputs: int, capacity: int
) -> None:
    x = gaussian(sum(lengths), inputs, seed=seed)
    y = x @ gaussian(outputs, inputs, seed=seed + 1).T  # continuous, so without ties
    rows = OutlierRows(capacity)
    for x_batch, y_batch in zip(x.split(lengths), y.split(lengths), strict=True):
        rows.update(x_batch, y_batch)
    expected = brute_force(x, y, capacity)
    assert contents(rows) == expected
    assert len(rows) == len(expected) == min(capacity, y.numel())


def test_token_dimensions_are_flattened_together() -> None:
    x = gaussian(2, 3, 4, 5)
    y = x @ gaussian(6, 5, seed=1).T
    rows = OutlierRows(10)
    rows.update(x, y)
    assert contents(rows) == brute_force(x, y, 10)


def test_a_known_outlier_is_found_with_its_input() -> None:
    x, y = gaussian(6, 3), torch.zeros(6, 4, dtype=torch.float64)
    y[4, 2], y[1, 3] = -9.0, 5.0
    rows = OutlierRows(2)
    rows.update(x, y)
    assert rows.magnitude.tolist() == [9.0, 5.0]
    assert rows.neuron.tolist() == [2, 3]
    assert torch.equal(rows.x, x[[4, 1]])


def test_ties_keep_the_magnitudes_right() -> None:
    rows = OutlierRows(3)
    for value in (1.0, 2.0, 2.0, 2.0, 2.0, 1.0):
        rows.update(torch.full((1, 2), value), torch.full((1, 2), value))
    assert rows.magnitude.tolist() == [2.0, 2.0, 2.0]
    assert torch.equal(rows.x, torch.full((3, 2), 2.0))


def test_rows_own_their_memory_and_hold_no_graph() -> None:
    x = gaussian(1000, 8).requires_grad_()
    y = x * 2
    rows = OutlierRows(4)
    rows.update(x, y)
    kept = rows.x.clone()
    assert not rows.x.requires_grad and not rows.magnitude.requires_grad
    assert rows.x.untyped_storage().nbytes() == rows.x.nbytes
    with torch.no_grad():
        x.zero_()
        y.zero_()
    assert torch.equal(rows.x, kept)


def test_an_empty_pass_changes_nothing_and_clear_forgets() -> None:
    rows = OutlierRows(4)
    rows.update(torch.zeros(0, 3), torch.zeros(0, 2))
    assert len(rows) == 0
    rows.update(torch.ones(2, 3), torch.ones(2, 2))
    rows.update(torch.zeros(0, 3), torch.zeros(0, 2))
    assert len(rows) == 4
    rows.clear()
    assert len(rows) == 0 and rows.x is None
    rows.update(torch.ones(1, 5), torch.ones(1, 2))  # another layer's width is fine after clear
    assert rows.x.shape == (2, 5)


@pytest.mark.parametrize("capacity", [0, -3])
def test_a_capacity_below_one_is_named(capacity: int) -> None:
    with pytest.raises(ValueError, match=f"capacity is {capacity}"):
        OutlierRows(capacity)


def test_numpy_agrees_on_the_definition_of_neuron_kurtosis() -> None:
    # s_j as the paper's reference writes it, with the root mean square spelled out.
    a = heavy(50, 9).numpy()
    s = np.sqrt((a**2).mean(axis=0))
    assert neuron_kurtosis(torch.from_numpy(a)) == pytest.approx((s**4).mean() / (s**2).mean() ** 2, rel=1e-12)
