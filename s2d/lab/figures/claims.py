"""Notebook 08: ours beside the paper's."""

from __future__ import annotations

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.figure import Figure

from s2d.lab.figures.registry import published
from s2d.lab.figures.style import bars, bit_widths, legend_below, listed

PAPER_ORDER = ("AdamW", "No PCDR", "S2D")


def reported_pcdr_selection(selection: pd.DataFrame, power: pd.DataFrame) -> pd.DataFrame:
    """Table 6 with the baseline of Table 11, the same model and quantizer.

    Args:
        selection, power: the paper's Tables 6 and 11.

    Returns:
        Columns variant, bits, value (%).
    """
    selection = selection.replace({"variant": {"S2D without PCDR": "No PCDR"}})
    baseline = power[power.variant == "Baseline"].assign(variant="AdamW")
    table = pd.concat([baseline, selection], ignore_index=True)[["variant", "bits", "value"]]
    return table.sort_values("bits", ascending=False, kind="stable", ignore_index=True)


def _measured(frontier: pd.DataFrame) -> pd.DataFrame:
    """Ours in the columns of :func:`reported_pcdr_selection`, one row a seed."""
    ours = frontier[(frontier.method == "ERQ") & frontier.variant.isin(PAPER_ORDER)]
    return ours.assign(value=100 * ours.accuracy)


def _what_selection_buys(frontier: pd.DataFrame, selection: pd.DataFrame, power: pd.DataFrame) -> str:
    sides = {"reported": reported_pcdr_selection(selection, power), "measured": _measured(frontier)}
    texts = []
    for side, table in sides.items():
        mean = table.groupby(["bits", "variant"]).value.mean().unstack("variant").loc[bit_widths(table)]
        texts.append(f"{side}: {listed(mean['S2D'] - mean['No PCDR'], '{:+.1f}')}.")
    return f"S2D minus No PCDR under ERQ, points, {' '.join(texts)}"


@published(
    tables=["frontier", "paper/table06_pcdr_selection", "paper/table11_power"],
    finding=_what_selection_buys,
    paper="Tables 6 and 11",
)
def measured_and_reported(frontier: pd.DataFrame, selection: pd.DataFrame, power: pd.DataFrame) -> Figure:
    """Table 6 beside ours: what PCDR buys, on the paper's model and on the laptop's.

    Args:
        frontier: from :func:`s2d.lab.frontier.frontier_table`.
        selection, power: the paper's Tables 6 and 11.
    """
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.6), sharey=True)
    ours = _measured(frontier)
    ours = ours.assign(bits=pd.Categorical(ours.bits, bit_widths(ours), ordered=True))
    reported = reported_pcdr_selection(selection, power)
    bars(left, reported, x="bits", y="value", hue_order=PAPER_ORDER, errorbar=None)
    bars(right, ours, x="bits", y="value", hue_order=PAPER_ORDER, legend=False)
    left.set(title="Reported: SigLIP2-B, ImageNet, ERQ", xlabel="", ylabel="accuracy (%)")
    right.set(title="Measured: laptop ViT, cluttered digits, ERQ", xlabel="")
    legend_below(figure, left)
    return figure


VERDICTS = {"reproduced": "#007a3d", "undecided": "#7a7a7a", "not reproduced": "#d1495b"}


def _counted(claims: pd.DataFrame) -> str:
    return f"Of {len(claims)} claims: {listed(claims.verdict.value_counts(), '{:d}')}."


@published(tables=["claims"], finding=_counted, paper="appendices A, C, D, G; Tables 6, 7, 10, 11")
def claims(table: pd.DataFrame) -> Figure:
    """Every claim with its verdict: the measured value with its interval, each in its own scale, and the paper's."""
    table = table[table.verdict.isin(VERDICTS)]
    figure, axis = plt.subplots(figsize=(9.5, 0.3 * len(table) + 1))
    for place, row in enumerate(table.itertuples()):
        unit = max(abs(value) for value in (row.low, row.high, row.measured) if value == value) or 1.0
        style = {"color": VERDICTS[row.verdict], "marker": "o", "markersize": 5, "linewidth": 2}
        if row.low == row.low:  # one seed has no interval
            axis.plot([row.low / unit, row.high / unit], [place, place], color=VERDICTS[row.verdict], linewidth=2)
        axis.plot(row.measured / unit, place, **style)
        text = f"{row.measured:+.3g} {row.unit}  (paper: {row.reported})"
        axis.text(1.08, place, text, va="center", fontsize="x-small")
    axis.axvline(0, color="black", linewidth=0.8)
    axis.set_yticks(range(len(table)), table.claim, fontsize="x-small")
    axis.set(xlim=(-1.05, 1.05), ylim=(len(table) - 0.5, -0.5), xlabel="mean and 95 % interval, each in its own scale")
    axis.set_xticks([-1, 0, 1], ["negative", "0", "positive"])
    handles = [plt.Line2D([], [], color=colour, marker="o", label=name) for name, colour in VERDICTS.items()]
    figure.legend(handles=handles, loc="outside upper center", ncols=3)
    return figure
