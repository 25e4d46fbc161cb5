"""How heavy the outliers of different networks are, side by side: pretrained ones, and the testbed's."""

from __future__ import annotations

import pandas as pd


def severity_table(diagnosis: pd.DataFrame, testbed: pd.DataFrame) -> pd.DataFrame:
    """The heaviest layer of each network.

    Args:
        diagnosis: of :func:`s2d.lab.real_networks.diagnosis_table`.
        testbed: the laptop's table of that name; of AdamW's runs at the usual width, the mean over seeds.

    Returns:
        Columns network, runs, excess_kurtosis, max_abs: each the largest over layers; lightest network first.
    """
    rows = [
        {
            "network": network,
            "runs": 1,
            "excess_kurtosis": layers.excess_kurtosis.max(),
            "max_abs": layers.max_abs.max(),
        }
        for network, layers in diagnosis.groupby("network", sort=False)
    ]
    usual = testbed[(testbed.optimizer == "adamw") & (testbed.width == testbed.width.min())]
    for steps, runs in usual.groupby("steps"):
        row = {"network": f"testbed, {steps} steps", "runs": len(runs)}
        rows.append(row | {name: runs[name].mean() for name in ("excess_kurtosis", "max_abs")})
    return pd.DataFrame(rows).sort_values("excess_kurtosis", ignore_index=True)
