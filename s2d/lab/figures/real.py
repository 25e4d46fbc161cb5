"""Notebook 20: the outliers of networks that somebody else trained, and what conditioning does to them."""

from __future__ import annotations

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.figure import Figure

from s2d.lab.figures.registry import published

FINDINGS = {"spectral": ("#d1495b", "o"), "not spectral": ("#c98a16", "s")}
LABELS = {"spectral": "made by at most three components", "not spectral": "not made by three components"}


def _who_is_ill(diagnosis: pd.DataFrame) -> str:
    parts = []
    for network, layers in diagnosis.groupby("network", sort=False):
        spectral = (layers.finding == "spectral").sum()
        parts.append(f"{network}: {len(layers)} of {layers.layers.iloc[0]} layers, {spectral} of them by PCDR >= 0.95")
    return f"Layers with outliers (excess kurtosis of 20 or more): {'; '.join(parts)}."


@published(tables=["real/diagnosis"], finding=_who_is_ill, paper="Table 7 in shape, PCDR, abstract")
def real_outliers(diagnosis: pd.DataFrame) -> Figure:
    """The layers of pretrained networks that have outliers: how heavy, and whether u_1 points at their channel."""
    networks = list(dict.fromkeys(diagnosis.network))
    figure, axes = plt.subplots(1, len(networks), figsize=(9, 3.4), sharey=True)
    for axis, network in zip(axes, networks, strict=True):
        for finding, (colour, marker) in FINDINGS.items():
            rows = diagnosis[(diagnosis.network == network) & (diagnosis.finding == finding)]
            axis.scatter(rows.excess_kurtosis, rows.on_u1, color=colour, marker=marker, s=30, label=LABELS[finding])
        axis.set(xscale="log", xlabel="excess kurtosis", title=network, ylim=(-0.04, 1.04))
    axes[0].set_ylabel("energy of $u_1$ on the channel")
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=2)
    return figure


def _two_questions(conditioning: pd.DataFrame, inputs: pd.DataFrame) -> str:
    best = conditioning.loc[conditioning.max_abs.idxmin()]
    change = inputs.input_ratio_after / inputs.input_ratio_before
    return (
        f"{best.form.capitalize()} lowers the largest activation {best.max_abs_before / best.max_abs:.1f} times at a "
        f"cosine of {best.fidelity:.3f}; RTN's error at W6A6 goes from {best.W6A6_before:.2f} to {best.W6A6:.2f}. "
        f"In the run that `inputs` is of, the largest inputs became {change.min():.2f} to {change.max():.2f} times "
        "what they were."
    )


@published(tables=["real/conditioning", "real/inputs"], finding=_two_questions, paper="standalone conditioning")
def real_conditioning(conditioning: pd.DataFrame, inputs: pd.DataFrame) -> Figure:
    """Conditioning a sentence encoder: outputs fall, what a quantizer has to span does not (first run of the table)."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.6))
    left.scatter(conditioning.max_abs, conditioning.W6A6, color="#00798c", s=34, zorder=3)
    first = conditioning.iloc[0]
    left.scatter([first.max_abs_before], [first.W6A6_before], color="black", marker="x", s=40, label="as published")
    for number, row in enumerate(conditioning.itertuples(), start=1):
        left.annotate(str(number), (row.max_abs, row.W6A6), xytext=(5, 4), textcoords="offset points", fontsize="small")
    left.set(xlabel="largest activation", ylabel="RTN W6A6, relative error", xlim=(0, None))
    left.set_ylim(0, 1.2 * max(first.W6A6_before, conditioning.W6A6.max()))
    left.set_title("Runs, by their row in the table", loc="left")
    left.legend(loc="lower right")
    low, high = 1, 1.3 * max(inputs.max_abs_before.max(), inputs.input_ratio_before.max())
    right.plot([low, high], [low, high], color="black", linewidth=0.8, linestyle=":")
    for name, colour, marker, label in (
        ("max_abs", "#d1495b", "o", "largest output"),
        ("input_ratio", "#00798c", "s", "largest input over rms"),
    ):
        before, after = inputs[f"{name}_before"], inputs[f"{name}_after"]
        right.scatter(before, after, color=colour, marker=marker, s=20, label=label)
    right.set(xscale="log", yscale="log", xlabel="before", ylabel="after")
    right.set_title("Every layer, before and after run 1", loc="left")
    right.legend(loc="upper left")
    return figure
