"""The Pareto front of a table: what no other row beats in two columns at once."""

from __future__ import annotations

import numpy as np
import pandas as pd


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
