"""Notebook 90: ours beside the paper's."""

from __future__ import annotations

import textwrap

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.figure import Figure

from s2d.lab.claims import NOT_MEASURED, headline
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


COLOUR_OF = {
    "reproduced": "#007a3d",
    "holds": "#007a3d",
    "equivalent": "#2f6db5",
    "undecided": "#7a7a7a",
    "not reproduced": "#d1495b",
    "does not hold": "#d1495b",
}
HEADINGS = {"paper": "THE PAPER'S CLAIMS", "ours": "OUR OWN", "theorem": "TRUE BY CONSTRUCTION"}


@published(tables=["claims"], finding=headline, paper="abstract; appendices A, C, D, E, G; Tables 6, 7, 9, 10, 11")
def claims(table: pd.DataFrame) -> Figure:
    """Every claim that was measured, signed so that right is what it says: mean and 95 % interval in its own scale.

    Args:
        table: from :func:`s2d.lab.claims.claims_table`.
    """
    table = table[table.verdict != NOT_MEASURED]
    shown = [name for name in COLOUR_OF if name in set(table.verdict)]
    rows: list[tuple[str, pd.Series | None]] = []
    for group, own in table.groupby("group", sort=False):
        rows += [(HEADINGS[group], None), *((row.claim, row) for _, row in own.iterrows())]
    figure, axis = plt.subplots(figsize=(13, 0.34 * len(rows) + 1))
    for place, (_, row) in enumerate(rows):
        if row is None:
            continue
        unit = max(abs(value) for value in (row.low, row.high, row.measured) if value == value) or 1.0
        colour = COLOUR_OF[row.verdict]
        if row.low == row.low:  # one seed has no interval
            axis.plot([row.low / unit, row.high / unit], [place, place], color=colour, linewidth=2)
        axis.plot(row.measured / unit, place, color=colour, marker="o", markersize=5)
        interval = f" [{row.low:+.3g}, {row.high:+.3g}]" if row.low == row.low else ""
        text = f"{row.measured:+.3g}{interval} {row.unit}"
        if pd.notna(row.reported_size):
            text += f"  (paper: {row.reported_size:+.3g})"
        axis.text(1.08, place, text, va="center", fontsize="x-small")
    axis.axvline(0, color="black", linewidth=0.8)
    axis.set_yticks(
        range(len(rows)), [textwrap.fill(name, 78, break_on_hyphens=False) for name, _ in rows], fontsize="x-small"
    )
    for tick, (_, row) in zip(axis.get_yticklabels(), rows, strict=True):
        tick.set_fontweight("bold" if row is None else "normal")
    axis.set(xlim=(-1.05, 1.05), ylim=(len(rows) - 0.5, -0.5))
    axis.set_xticks([-1, 0, 1], ["against the claim", "0", "as claimed"])
    handles = [plt.Line2D([], [], color=COLOUR_OF[name], marker="o", label=name) for name in shown]
    figure.legend(handles=handles, loc="outside upper center", ncols=len(handles))
    return figure
