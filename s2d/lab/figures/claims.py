"""Notebook 90: ours beside the paper's."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.figure import Figure

from s2d.lab.claims import NOT_MEASURED, headline
from s2d.lab.figures.registry import published
from s2d.lab.figures.style import AGAINST, TOWARDS, UNDECIDED, bars, bit_widths, legend_below, listed

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
    "reproduced": TOWARDS,
    "holds": TOWARDS,
    "equivalent": "#009e73",
    "undecided": UNDECIDED,
    "not reproduced": AGAINST,
    "does not hold": AGAINST,
}
TOPICS = {
    "Outliers and where they come from": ("abstract", "C "),
    "What S2D buys at low bits": (
        "Table 11, abstract",
        "Table 6",
        "Tables 6, 11",
        "Table 8",
        "Table 9",
        "C; Table 10",
        "D",
    ),
    "What it does to a layer": ("Table 7",),
    "Its settings": ("Table 10", "Table 11", "G.2"),
}


def _topic(source: str) -> str:
    """The part of the paper that a claim belongs to; the longest beginning of its source decides."""
    found = [(len(start), topic) for topic, starts in TOPICS.items() for start in starts if source.startswith(start)]
    return max(found)[1] if found else "Further claims"


@published(tables=["claims"], finding=headline, paper="abstract; appendices A, C, D, E, G; Tables 6, 7, 9, 10, 11")
def claims(table: pd.DataFrame) -> Figure:
    """Every claim of the paper that was measured, by topic; right is what the paper says: mean and 95 % interval.

    Args:
        table: from :func:`s2d.lab.claims.claims_table`.
    """
    own = table[(table.group == "paper") & (table.verdict != NOT_MEASURED)]
    own = own.assign(heading=own.source.map(_topic))
    order = [topic for topic in (*TOPICS, "Further claims") if topic in set(own.heading)]
    counts = own.verdict.value_counts()
    title = ", ".join(f"{counts[name]} {name}" for name in COLOUR_OF if name in counts)
    return _evidence({topic: own[own.heading == topic] for topic in order}, f"Of {len(own)} claims: {title}")


def _ours(table: pd.DataFrame) -> str:
    counts = table[table.group != "paper"].verdict.value_counts()
    return f"Of claims that are not the paper's: {listed({f'{name}:': n for name, n in counts.items()}, '{:d}')}."


@published(tables=["claims"], finding=_ours)
def claims_ours(table: pd.DataFrame) -> Figure:
    """The claims that are our own, and the two that hold by construction; right is what they say.

    Args:
        table: from :func:`s2d.lab.claims.claims_table`.
    """
    parts = {"Our own": table[table.group == "ours"], "By construction": table[table.group == "theorem"]}
    return _evidence(parts, _ours(table).removesuffix("."))


def _evidence(parts: Mapping[str, pd.DataFrame], title: str) -> Figure:
    """Claims under headings, each on its own scale, its verdict beside it in words and colour."""
    rows = [
        entry
        for heading, own in parts.items()
        for entry in ((heading, None), *((r.claim, r) for r in own.itertuples()))
    ]
    figure, axis = plt.subplots(figsize=(12, 0.36 * len(rows) + 0.9))
    for place, (_, row) in enumerate(rows):
        if row is None:
            continue
        unit = max(abs(value) for value in (row.low, row.high, row.measured) if value == value) or 1.0
        colour = COLOUR_OF[row.verdict]
        if row.low == row.low:  # one seed has no interval
            axis.plot([row.low / unit, row.high / unit], [place, place], color=colour, linewidth=2.5)
        axis.plot(row.measured / unit, place, color=colour, marker="o", markersize=6)
        reported = f" (paper {row.reported_size:+.3g})" if pd.notna(row.reported_size) else ""
        axis.text(1.08, place, row.verdict, va="center", fontsize="small", color=colour, fontweight="bold")
        axis.text(1.68, place, f"{row.measured:+.3g} {row.unit}{reported}", va="center", fontsize="small")
    axis.axvline(0, color="black", linewidth=0.8)
    axis.set_yticks(range(len(rows)), [textwrap.fill(name, 76, break_on_hyphens=False) for name, _ in rows])
    for tick, (_, row) in zip(axis.get_yticklabels(), rows, strict=True):
        tick.set(fontweight="bold" if row is None else "normal", fontsize="small")
    axis.tick_params(axis="y", length=0)
    axis.set(xlim=(-1.05, 1.05), ylim=(len(rows) - 0.5, -0.5))
    axis.set_xticks([-1, 0, 1], ["against", "0", "as claimed"])
    figure.suptitle(title, fontweight="bold", fontsize="large")
    return figure
