"""The paired interval: against scipy, at its degenerate ends, and in how often it covers the truth."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from s2d.lab.paired import paired_interval


@pytest.mark.parametrize("confidence", [0.5, 0.95, 0.99])
@pytest.mark.parametrize("n", [2, 3, 5, 40])
def test_agrees_with_scipy(n, confidence):
    before, after = np.random.default_rng(n).normal(size=(2, n))
    interval = paired_interval(after - before, confidence=confidence)
    expected = stats.ttest_rel(after, before).confidence_interval(confidence)
    assert (interval.low, interval.high) == pytest.approx((expected.low, expected.high), rel=1e-12)
    expected = stats.ttest_1samp(after - before, 0).confidence_interval(confidence)
    assert (interval.low, interval.high) == pytest.approx((expected.low, expected.high), rel=1e-12)
    assert interval.n == n and interval.std == pytest.approx(stats.tstd(after - before))


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
