"""By what rule a setting of the search wins. The search itself is :mod:`s2d.lab.tuning`."""

from __future__ import annotations

import pandas as pd

SETTING_COLUMNS = ["lr", "weight_decay", "lam", "tau", "cap"]
ALLOWED_LOSS = 0.005  # of full-precision accuracy against AdamW


def winners(table: pd.DataFrame) -> pd.DataFrame:
    """Of each variant the setting with the best mean accuracy at low bits among those that keep full precision.

    "Keep" means within half a point of the best AdamW setting in full precision, means over seeds; where no setting
    does, the one nearest to it wins. AdamW itself is chosen by full precision: it is what everybody starts from.

    Args:
        table: from :func:`s2d.lab.tuning.tuning_table`.

    Returns:
        One row a variant: its setting, FP and low_bits.
    """
    means = table.groupby(["variant", *SETTING_COLUMNS], sort=False, dropna=False)[["FP", "low_bits"]].mean()
    means = means.reset_index()
    best = means[means.variant == "AdamW"].FP.max()
    chosen = []
    for variant, group in means.groupby("variant", sort=False):
        keeping = group[group.FP >= best - ALLOWED_LOSS]
        by_full_precision = variant == "AdamW" or keeping.empty
        chosen.append(group.loc[group.FP.idxmax()] if by_full_precision else keeping.loc[keeping.low_bits.idxmax()])
    return pd.DataFrame(chosen)
