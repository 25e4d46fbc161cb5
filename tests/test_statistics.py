"""Intervals against scipy and in how often they cover the truth, spreads by hand, the front by a double loop."""

from __future__ import annotations

import math
import statistics

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from s2d.lab.statistics import (
    VERDICTS,
    excludes,
    in_words,
    mean_and_spread,
    paired_interval,
    pareto_front,
    points_lost,
    verdict,
)

# --- paired intervals ---


@pytest.mark.parametrize("confidence", [0.5, 0.95, 0.99])
@pytest.mark.parametrize("n", [2, 3, 5, 40])
def test_agrees_with_scipy(n, confidence):
    before, after = np.random.default_rng(n).normal(size=(2, n))
    interval = paired_interval(after - before, confidence=confidence)
    expected = stats.ttest_rel(after, before).confidence_interval(confidence)
    assert (interval.low, interval.high) == pytest.approx((expected.low, expected.high), abs=1e-9)
    expected = stats.ttest_1samp(after - before, 0).confidence_interval(confidence)
    assert (interval.low, interval.high) == pytest.approx((expected.low, expected.high), abs=1e-9)
    assert interval.n == n and interval.std == pytest.approx(stats.tstd(after - before), abs=1e-9)


def test_by_hand():
    # Two pairs: t with one degree of freedom is Cauchy, whose 97.5 % quantile is tan(0.475 pi).
    interval = paired_interval([0.0, 2.0])
    assert interval.high - interval.mean == pytest.approx(math.tan(0.475 * math.pi))
    assert interval.mean == 1.0 and interval.std == pytest.approx(math.sqrt(2))


def test_a_single_pair_has_no_interval():
    interval = paired_interval([0.3])
    assert interval.mean == 0.3 and interval.n == 1
    assert math.isnan(interval.std) and math.isnan(interval.low) and math.isnan(interval.high)


def test_constant_differences_have_zero_width():
    assert paired_interval([0.25] * 4) == (0.25, 0.0, 0.25, 0.25, 4)


@pytest.mark.parametrize("scale", [1, 100])
def test_the_rounding_of_what_was_subtracted_does_not_show(scale):
    """Three seeds whose accuracies differ by two images more, one more and three fewer: the mean is nothing."""
    before = np.array([1397, 1409, 1480]) / 1588
    after = np.array([1399, 1410, 1477]) / 1588
    assert (after - before).mean() != 0  # by rounding
    interval = paired_interval(scale * after - scale * before)
    assert interval.mean == 0 and interval.low == -interval.high and interval.std > 0
    same = paired_interval((scale * (after + 0.1) - scale * 0.1) - scale * after)
    assert same == (0.0, 0.0, 0.0, 0.0, 3)
    assert not any(
        math.copysign(1, value) < 0 for value in paired_interval([-1e-17, -3e-17])[:4]
    )  # -0.0 prints as "-0.0"


def test_what_is_larger_than_rounding_stays():
    interval = paired_interval([1e-6, 2e-6, 3e-6])
    assert interval.mean == 2e-6 and interval.std == 1e-6


def test_covers_the_truth_as_often_as_it_says():
    rng = np.random.default_rng(0)
    intervals = [paired_interval(rng.normal(loc=0.7, size=3)) for _ in range(2000)]
    covered = np.mean([interval.low < 0.7 < interval.high for interval in intervals])
    assert covered == pytest.approx(0.95, abs=0.02)  # four standard errors of a share of 2000


@pytest.mark.parametrize("differences", [[], [1.0, math.nan], [math.inf], [[1.0, 2.0]]])
def test_bad_differences(differences):
    with pytest.raises(ValueError, match=r"differences are .*give a list of one finite number a pair"):
        paired_interval(differences)


@pytest.mark.parametrize("confidence", [0, 1, 95])
def test_bad_confidence(confidence):
    with pytest.raises(ValueError, match=f"confidence is {confidence}: .*0.95 is usual"):
        paired_interval([1.0, 2.0], confidence=confidence)


# --- verdicts ---


@pytest.mark.parametrize(
    ("values", "options", "expected"),
    [
        ([1, 2, 3, 2], {}, "reproduced"),
        ([-1, -2, -3, -2], {}, "not reproduced"),
        ([1, -2, 3], {}, "undecided"),
        ([0.1, -0.2, 0.15], {}, "equivalent"),
        ([0.0, 0.0], {}, "equivalent"),
        ([0.1, -0.2, 0.15], {"equivalence": 0}, "undecided"),
        ([0.0, 0.0], {"equivalence": 0}, "undecided"),
        ([30, -40, 35], {"equivalence": 200}, "equivalent"),
        # The sign comes first: a sure effect is none the less one for being small.
        ([0.2, 0.3, 0.25], {}, "reproduced"),
        ([-0.2, -0.3, -0.25], {}, "not reproduced"),
        # "Not lower": lower by less than the margin, across it, and by more.
        ([-0.1, -0.2, -0.15], {"margin": 1}, "reproduced"),
        ([0.1, -0.2, 0.15], {"margin": 1}, "reproduced"),
        ([-0.5, -1.5, -1.0], {"margin": 1}, "undecided"),
        ([-2.1, -2.2, -2.15], {"margin": 1}, "not reproduced"),
        ([5], {}, "undecided"),  # one pair has no interval
        ([0.0], {}, "undecided"),
    ],
)
def test_verdict(values, options, expected):
    assert verdict(paired_interval(values), **options) == expected and expected in VERDICTS


def test_verdict_is_the_paired_t_test():
    """Without equivalence, an interval leaves zero out exactly where scipy's test rejects at 5 %."""
    rng = np.random.default_rng(0)
    for _ in range(50):
        values = rng.normal(0.7, 1.0, size=5)
        decided = verdict(paired_interval(values), equivalence=0) != "undecided"
        assert decided == (stats.ttest_1samp(values, 0).pvalue < 0.05)


def test_equivalence_is_two_one_sided_tests():
    """Where the sign is not sure, equivalent means that both one-sided tests at 2.5 % reject a point of difference."""
    rng = np.random.default_rng(1)
    seen = set()
    for _ in range(60):
        values = rng.normal(0.0, 0.6, size=6)
        says = verdict(paired_interval(values))
        seen.add(says)
        if says in ("equivalent", "undecided"):
            low = stats.ttest_1samp(values, -1, alternative="greater").pvalue < 0.025
            high = stats.ttest_1samp(values, 1, alternative="less").pvalue < 0.025
            assert (says == "equivalent") == (low and high)
    assert {"equivalent", "undecided"} <= seen


@pytest.mark.parametrize("options", [{"margin": -1}, {"equivalence": -0.1}, {"margin": math.nan}])
def test_bad_bands(options):
    with pytest.raises(ValueError, match="neither may be below zero"):
        verdict(paired_interval([1.0, 2.0]), **options)


def test_an_interval_excludes_what_lies_outside():
    interval = paired_interval([1.0, 2.0, 3.0])  # -0.48 to 4.48
    assert [excludes(interval, value) for value in (-0.5, -0.4, 4.4, 4.5)] == [True, False, False, True]
    assert not excludes(paired_interval([1.0]), 100.0)


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([2.0, 3.0, 2.5], "a is above b: +2.50 ["),
        ([-2.0, -3.0, -2.5], "a is below b: -2.50 ["),
        ([0.1, -0.2, 0.15], "a and b are equal within 1: +0.02 ["),
        ([5.0, -4.0, 1.0], "a and b are not told apart: +0.67 ["),
        ([5.0], "a and b are not told apart: +5.00 [+nan, +nan]"),
    ],
)
def test_words_say_what_the_interval_does(values, expected):
    assert in_words("a", "b", paired_interval(values)).startswith(expected)


# --- points lost ---


def test_points_lost_by_hand():
    table = pd.DataFrame(
        {
            "variant": ["a", "a", "b", "a", "a", "b"],
            "seed": [0, 0, 0, 1, 1, 0],
            "method": ["ERQ", "FP", "RTN", "FP", "ERQ", "FP"],
            "accuracy": [0.75, 0.9, 0.8, 0.5, 0.55, 0.8],
        },
        index=range(10, 16),
    )
    lost = points_lost(table, ["variant", "seed"])
    assert lost.tolist() == [15, 0, 0, 0, -5, 0] and lost.index.equals(table.index)
    assert "-0.0" not in lost.astype(str).tolist()


def test_points_lost_asks_for_one_full_precision_a_checkpoint():
    table = pd.DataFrame({"seed": [0, 0, 1], "method": ["FP", "ERQ", "ERQ"], "accuracy": [0.9, 0.8, 0.7]})
    with pytest.raises(ValueError, match="^1 has no accuracy in full precision: measure it"):
        points_lost(table, ["seed"])
    twice = pd.concat([table[:2], table[:1]], ignore_index=True)
    with pytest.raises(ValueError, match="^0 has two accuracies in full precision: keep one row"):
        points_lost(twice, ["seed"])


# --- mean and spread ---


def test_mean_and_spread_by_hand() -> None:
    rows = {
        ("S2D", "W4A4"): [0.8, 0.9, 0.7],
        ("S2D", "FP"): [0.95, 0.97, 0.96],
        ("AdamW", "W4A4"): [0.1, 0.5, 0.3],
        ("AdamW", "FP"): [0.9],
    }
    table = pd.DataFrame(
        [
            {"variant": variant, "bits": bits, "seed": seed, "accuracy": a, "logit_error": 2 * a + seed}
            for (variant, bits), values in rows.items()
            for seed, a in enumerate(values)
        ]
    )
    got = mean_and_spread(table, ["variant", "bits"], ["accuracy", "logit_error"])
    assert list(got.columns) == [
        "variant", "bits", "seeds", "accuracy", "accuracy_std", "logit_error", "logit_error_std"
    ]  # fmt: skip
    assert list(zip(got.variant, got.bits, strict=True)) == list(rows)  # in order of appearance
    for (_, row), values in zip(got.iterrows(), rows.values(), strict=True):
        errors = [2 * a + seed for seed, a in enumerate(values)]
        assert row.seeds == len(values)
        assert row.accuracy == pytest.approx(statistics.mean(values))
        assert row.logit_error == pytest.approx(statistics.mean(errors))
        if len(values) > 1:
            assert row.accuracy_std == pytest.approx(statistics.stdev(values))
            assert row.logit_error_std == pytest.approx(statistics.stdev(errors))
        else:
            assert np.isnan(row.accuracy_std)  # one seed has no spread, which is not a spread of 0


def test_mean_and_spread_counts_seeds_not_rows() -> None:
    table = pd.DataFrame({"variant": ["a"] * 4, "seed": [0, 0, 1, 1], "x": [1.0, 2.0, 3.0, 4.0]})
    got = mean_and_spread(table, ["variant"], ["x"])
    assert got.seeds.tolist() == [2] and got.x.tolist() == [2.5]


def test_mean_and_spread_keeps_groups_without_a_setting() -> None:
    """AdamW has no lam: its rows must not vanish from a table grouped by lam."""
    table = pd.DataFrame({"variant": ["AdamW", "S2D"], "lam": [np.nan, 0.1], "seed": [0, 0], "x": [1.0, 2.0]})
    got = mean_and_spread(table, ["variant", "lam"], ["x"])
    assert got.variant.tolist() == ["AdamW", "S2D"] and got.x.tolist() == [1.0, 2.0]


def test_mean_and_spread_leaves_the_table_alone() -> None:
    table = pd.DataFrame({"variant": ["b", "a"], "seed": [0, 0], "x": [1.0, 2.0]})
    before = table.copy()
    assert mean_and_spread(table, ["variant"], ["x"]).variant.tolist() == ["b", "a"]
    pd.testing.assert_frame_equal(table, before)


# --- the Pareto front ---


def test_pareto_front_is_what_a_double_loop_finds():
    rng = np.random.default_rng(1)
    points = pd.DataFrame(rng.integers(0, 8, size=(60, 2)), columns=["x", "y"], index=range(100, 160))
    expected = [
        not any(
            (o.x >= p.x and o.y >= p.y) and (o.x > p.x or o.y > p.y) for o in points.itertuples() if o.Index != p.Index
        )
        for p in points.itertuples()
    ]
    found = pareto_front(points, "x", "y")
    assert found.tolist() == expected and found.index.equals(points.index)
    assert pareto_front(pd.DataFrame({"x": [1.0, 1.0], "y": [2.0, 2.0]}), "x", "y").all()  # equal points share it


def test_pareto_front_refuses_missing_values():
    with pytest.raises(ValueError, match="missing values: drop those rows"):
        pareto_front(pd.DataFrame({"x": [1.0, None], "y": [1.0, 2.0]}), "x", "y")
