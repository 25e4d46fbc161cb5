"""Differences within pairs, with their uncertainty: the same seed with and without something."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from scipy import stats


class PairedInterval(NamedTuple):
    """Mean of paired differences, their sample standard deviation, the confidence interval of the mean, how many."""

    mean: float
    std: float
    low: float
    high: float
    n: int


def paired_interval(differences: Sequence[float], *, confidence: float = 0.95) -> PairedInterval:
    r"""Student's t-interval of the mean of paired differences.

    .. math:: \bar d \pm t_{n-1,\,(1+c)/2}\; s_d / \sqrt n

    Args:
        differences: one a pair, in any unit, at least one.
        confidence: the interval's c, in (0, 1).

    Returns:
        In the unit of the differences. A single pair has no spread: its std, low and high are NaN.

    Raises:
        ValueError: for no differences, one that is not finite, or a confidence outside (0, 1).

    Example:
        >>> interval = paired_interval([1.0, 2.0, 3.0])
        >>> interval.mean, interval.std, round(interval.low, 2), round(interval.high, 2), interval.n
        (2.0, 1.0, -0.48, 4.48, 3)

    Paper: none (its tables have one run a cell).
    """
    d = np.asarray(differences, dtype=float)
    if d.ndim != 1 or not len(d) or not np.isfinite(d).all():
        raise ValueError(f"differences are {differences!r}: give a list of one finite number a pair, at least one")
    if not 0 < confidence < 1:
        raise ValueError(f"confidence is {confidence}: it must lie between 0 and 1, 0.95 is usual")
    n, mean = len(d), float(d.mean())
    if n == 1:
        return PairedInterval(mean, float("nan"), float("nan"), float("nan"), 1)
    std = float(d.std(ddof=1))
    half = float(stats.t.ppf((1 + confidence) / 2, n - 1)) * std / n**0.5
    return PairedInterval(mean, std, mean - half, mean + half, n)
