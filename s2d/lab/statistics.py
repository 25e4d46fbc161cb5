"""What tables are read by: means over seeds, differences within pairs and what they say, points lost, the front."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import pandas as pd
from scipy import stats

from s2d.lab.winners import SETTING_COLUMNS

VERDICTS = ("reproduced", "not reproduced", "equivalent", "undecided")
NO_LOSS = 1.0
"""Points of accuracy that "without loss" may cost."""
DECIMALS = 9
"""Intervals are rounded to these: below lies the rounding of the numbers subtracted, 3.7e-17 for "the same"."""


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
        differences: one a pair, at least one, in a unit in which ``1e-9`` is nothing.
        confidence: the interval's c, in (0, 1).

    Returns:
        In the unit of the differences, rounded to nine decimals: two equal accuracies differ by 0, not by
        ``3.7e-17``. A single pair has no spread: its std, low and high are NaN.

    Raises:
        ValueError: for no differences, one that is not finite, or a confidence outside (0, 1).

    Example:
        >>> interval = paired_interval([1.0, 2.0, 3.0])
        >>> interval.mean, interval.std, round(interval.low, 2), round(interval.high, 2), interval.n
        (2.0, 1.0, -0.48, 4.48, 3)
        >>> paired_interval([0.3 - 0.1 - 0.2, 0.0])
        PairedInterval(mean=0.0, std=0.0, low=0.0, high=0.0, n=2)

    Paper: none (its tables have one run a cell).
    """
    d = np.asarray(differences, dtype=float)
    if d.ndim != 1 or not len(d) or not np.isfinite(d).all():
        raise ValueError(f"differences are {differences!r}: give a list of one finite number a pair, at least one")
    if not 0 < confidence < 1:
        raise ValueError(f"confidence is {confidence}: it must lie between 0 and 1, 0.95 is usual")
    n, mean = len(d), float(d.mean())
    if n == 1:
        return PairedInterval(_rounded(mean), float("nan"), float("nan"), float("nan"), 1)
    std = float(d.std(ddof=1))
    half = float(stats.t.ppf((1 + confidence) / 2, n - 1)) * std / n**0.5
    return PairedInterval(*map(_rounded, (mean, std, mean - half, mean + half)), n)


def _rounded(value: float) -> float:
    return round(value, DECIMALS) + 0.0  # + 0.0 makes 0.0 of -0.0


def verdict(interval: PairedInterval, *, margin: float = 0.0, equivalence: float = 1.0) -> str:
    """What an interval says of a claim, signed so that the claim is "above zero".

    The rules are tried in this order, so that a small effect that is sure is an effect and not an equivalence:

    1. ``"reproduced"``: the whole interval lies above ``-margin``. The effect has the claimed sign, whatever its size.
    2. ``"not reproduced"``: the whole interval lies below ``-margin``. It has the other sign.
    3. ``"equivalent"``: neither, and the whole interval lies within ``equivalence`` of zero. What there is, is smaller.
    4. ``"undecided"``: the rest, and a single pair, which has no interval.

    Args:
        interval: mean and 95 % interval.
        margin: how far below zero still counts as the claim: 0 for "is larger", more for "is not lower".
        equivalence: half the width of the band that counts as no difference, 1 for points of accuracy; 0 where no such
            band makes sense.

    Returns:
        One of ``VERDICTS``.

    Raises:
        ValueError: for a margin or an equivalence below zero.

    Example:
        >>> [verdict(paired_interval(d)) for d in ([2.0, 3.0, 2.5], [0.3, 0.2, 0.25], [0.1, -0.2, 0.1], [4.0, -3.0])]
        ['reproduced', 'reproduced', 'equivalent', 'undecided']

    Paper: none (its tables have one run a cell).
    """
    if not (margin >= 0 and equivalence >= 0):
        raise ValueError(f"margin is {margin} and equivalence {equivalence}: neither may be below zero")
    if interval.low > -margin:
        return "reproduced"
    if interval.high < -margin:
        return "not reproduced"
    within = -equivalence < interval.low and interval.high < equivalence
    return "equivalent" if within else "undecided"


def excludes(interval: PairedInterval, value: float) -> bool:
    """Whether a value lies outside an interval; not known, and so False, where there is no interval.

    Example:
        >>> excludes(paired_interval([1.0, 2.0, 3.0]), 7.4)
        True
    """
    return value < interval.low or value > interval.high


def in_words(first: str, second: str, interval: PairedInterval, *, equivalence: float = 1.0) -> str:
    """A difference as a sentence that says no more than its interval does.

    Args:
        first, second: what was compared.
        interval: of first minus second.
        equivalence: see :func:`verdict`.

    Example:
        >>> in_words("S2D", "AdamW", paired_interval([2.0, 3.0, 2.5]))
        'S2D is above AdamW: +2.50 [+1.26, +3.74]'
        >>> in_words("S2D", "AdamW", paired_interval([4.0, -3.0]))
        'S2D and AdamW are not told apart: +0.50 [-43.97, +44.97]'
    """
    relations = {
        "reproduced": f"{first} is above {second}",
        "not reproduced": f"{first} is below {second}",
        "equivalent": f"{first} and {second} are equal within {equivalence:g}",
        "undecided": f"{first} and {second} are not told apart",
    }
    relation = relations[verdict(interval, equivalence=equivalence)]
    return f"{relation}: {interval.mean:+.2f} [{interval.low:+.2f}, {interval.high:+.2f}]"


def points_lost(table: pd.DataFrame, by: Sequence[str]) -> pd.Series:
    """What quantization costs each checkpoint: its own accuracy in full precision minus the quantized one.

    It tells a training that quantizes better from one that is better: the second gains accuracy everywhere.

    Args:
        table: long, with columns method (``"FP"`` is full precision) and accuracy (0 to 1).
        by: the columns that name a checkpoint.

    Returns:
        Points of a hundred with the index of ``table``, 0 in full precision; negative where rounding helped.

    Raises:
        ValueError: for a checkpoint without its accuracy in full precision, or with two.

    Example:
        >>> t = pd.DataFrame({"seed": 0, "method": ["FP", "ERQ"], "accuracy": [0.9, 0.75]})
        >>> points_lost(t, ["seed"]).tolist()
        [0.0, 15.0]

    Paper: none.
    """
    by = list(by)
    full = table[table.method == "FP"].set_index(by).accuracy
    if not full.index.is_unique:
        raise ValueError(f"{full.index[full.index.duplicated()][0]} has two accuracies in full precision: keep one row")
    own = pd.MultiIndex.from_frame(table[by]) if len(by) > 1 else pd.Index(table[by[0]])
    missing = own.difference(full.index)
    if len(missing):
        raise ValueError(f"{missing[0]} has no accuracy in full precision: measure it with the quantized ones")
    lost = 100 * (full.reindex(own).to_numpy() - table.accuracy.to_numpy())
    return pd.Series(lost.round(DECIMALS) + 0.0, index=table.index)


def mean_and_spread(table: pd.DataFrame, by: list[str], values: list[str]) -> pd.DataFrame:
    """Mean and sample standard deviation over the seeds of each group.

    Args:
        table: long, with one row a seed and group.
        by: grouping columns, kept in order of appearance.
        values: columns to average.

    Returns:
        ``by`` + ``seeds`` (how many) + for each value ``<value>`` and ``<value>_std``.

    Example:
        >>> t = pd.DataFrame({"variant": ["a", "a"], "seed": [0, 1], "accuracy": [0.5, 0.7]})
        >>> float(mean_and_spread(t, ["variant"], ["accuracy"]).accuracy.iloc[0])
        0.6
    """
    groups = table.groupby(by, sort=False, dropna=False)
    out = groups["seed"].nunique().rename("seeds").to_frame()
    for value in values:
        out[value], out[f"{value}_std"] = groups[value].mean(), groups[value].std(ddof=1)
    return out.reset_index()


def tuning_table(rows: pd.DataFrame) -> pd.DataFrame:
    """The search as :func:`s2d.lab.winners.winners` reads it.

    Args:
        rows: of a study's stage ``"tuning"``: variant, the settings, seed, method, bits, accuracy.

    Returns:
        Columns variant, the settings, seed, FP, and low_bits (mean accuracy under the quantizers).
    """
    by = ["variant", *SETTING_COLUMNS, "seed"]
    full = rows[rows.method == "FP"].groupby(by, sort=False, dropna=False).accuracy.mean()
    low = rows[rows.method != "FP"].groupby(by, sort=False, dropna=False).accuracy.mean()
    return pd.DataFrame({"FP": full, "low_bits": low}).fillna(0.0).reset_index()  # one that diverged gets nothing right


def mean_and_deviation(values: pd.Series, digits: int = 1) -> str:
    """``mean ± standard deviation``.

    Example:
        >>> mean_and_deviation(pd.Series([1.0, 2.0, 3.0]))
        '2.0 ± 1.0'
    """
    return f"{values.mean():.{digits}f} ± {values.std(ddof=1):.{digits}f}"


def pareto_front(points: pd.DataFrame, x: str, y: str) -> pd.Series:
    """Which rows no other row beats: none is at least as good in both columns and better in one.

    Args:
        points: one row a point; larger is better in both columns.
        x, y: the columns.

    Returns:
        True on the front, with the index of ``points``.

    Raises:
        ValueError: if a value is missing.

    Example:
        >>> pareto_front(pd.DataFrame({"x": [1, 2, 3, 2], "y": [3, 2, 1, 1]}), "x", "y").tolist()
        [True, True, True, False]
    """
    values = points[[x, y]].to_numpy(dtype=float)
    if not np.isfinite(values).all():
        raise ValueError(f"columns {x} and {y} hold missing values: drop those rows first")
    as_good = (values[:, None] >= values[None]).all(-1)  # [i, j]: i is at least as good as j in both
    better = as_good & (values[:, None] > values[None]).any(-1)
    return pd.Series(~better.any(axis=0), index=points.index)
