"""Notebook 12: every arm in full precision and at low bits, and what tells them apart."""

from __future__ import annotations

from collections.abc import Sequence

import matplotlib.pyplot as plt
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from s2d.lab.figures.registry import published
from s2d.lab.figures.style import COLOURS, MARKERS, bars, bit_widths, forest_panels, legend_below, listed
from s2d.lab.frontier import keeping, search_points

SEARCH_PANELS = {"low_bits": "mean at low bits (%), decides", "ERQ W4A4": "W4A4, ERQ (%)"}
FRONT_METHODS = ("RTN, symmetric", "ERQ")


def _front_line(axis: Axes, points: pd.DataFrame, **style) -> None:
    """The staircase above which no point is."""
    front = points[points.front].sort_values("full")
    axis.step(front.full, front.low, where="pre", linewidth=1, zorder=0, **style)


def _on_the_front(tuning: pd.DataFrame) -> str:
    points = search_points(tuning)
    front, best = points[points.front], points.loc[points.low.idxmax()]
    return (
        f"Of {len(points)} settings {len(front)} are on the front: {'; '.join(sorted(set(front.variant)))}. "
        f"Highest at low bits: {best.variant}, {best.low:.1f} with {best.full:.1f} in full precision."
    )


@published(tables=["laptop/tuning"], finding=_on_the_front)
def frontier_search(tuning: pd.DataFrame) -> Figure:
    """Every setting that was tried, on validation images: full precision against low bits; the chosen are ringed.

    Args:
        tuning: ``data/laptop/tuning.csv``.
    """
    figure, axes = plt.subplots(1, len(SEARCH_PANELS), figsize=(11, 4.4), sharex=True, squeeze=False)
    for axis, (column, label) in zip(axes[0], SEARCH_PANELS.items(), strict=True):
        points = search_points(tuning, column)
        _front_line(axis, points, color="black", linestyle="--")
        axis.axvline(keeping(points), color="black", linewidth=0.8, linestyle=":")
        for variant, own in points.groupby("variant", sort=False):
            style = {"marker": MARKERS[variant], "s": 90 if MARKERS[variant] == "*" else 36}
            axis.scatter(own.full, own.low, color=COLOURS[variant], label=variant, alpha=0.85, **style)
        won = points[points.chosen]
        axis.scatter(won.full, won.low, facecolor="none", edgecolor="black", s=150, linewidth=0.9)
        axis.set(xlabel="full precision (%)", ylabel=label)
    axes[0, 0].set_title("Settings tried, validation images, mean of the tuning seeds")
    axes[0, 1].set_title("dotted: what had to be kept", fontweight="normal")
    legend_below(figure, axes[0, 0], columns=4)
    return figure


def _percent(table: pd.DataFrame) -> pd.DataFrame:
    """Accuracy in per cent, one row a variant and seed, one column a method and bit width."""
    return table.assign(percent=100 * table.accuracy).pivot(
        index=["variant", "seed"], columns=["method", "bits"], values="percent"
    )


def _cells(table: pd.DataFrame) -> list[tuple[str, str]]:
    """Method and bits of each panel: the weakest and the strongest quantizer at four bits, or the first low width."""
    low = [bits for bits in bit_widths(table) if bits != "FP"]
    bits = "W4A4" if "W4A4" in low else low[0]
    return [(method, bits) for method in FRONT_METHODS]


def _best(table: pd.DataFrame) -> str:
    mean = _percent(table).groupby("variant").mean()
    best = [f"{bits} {m}: {mean[m, bits].idxmax()} {mean[m, bits].max():.1f}" for m, bits in _cells(table)]
    full = mean["FP", "FP"]
    return f"Highest mean test accuracy in full precision: {full.idxmax()} {full.max():.1f}; {'; '.join(best)}."


def _spread_of_arms(table: pd.DataFrame) -> str:
    mean = _percent(table).groupby("variant").mean()
    parts = [f"{mean[cell].max() - mean[cell].min():.1f} under {cell[0]}" for cell in _cells(table)]
    return f"Points between the best and the worst way of fine-tuning at {_cells(table)[0][1]}: {', '.join(parts)}"


@published(tables=["frontier"], finding=_best, paper="Tables 6, 11 in shape")
def frontier_test(table: pd.DataFrame) -> Figure:
    """The chosen settings on test images: each seed and the mean at low bits, and full precision (hollow).

    Args:
        table: from :func:`s2d.lab.frontier.frontier_table`.
    """
    return arms_on_test(table, _cells(table), _spread_of_arms(table))


def arms_on_test(table: pd.DataFrame, cells: Sequence[tuple[str, str]], title: str) -> Figure:
    """Every arm under some quantizers: the mean and each seed, joined to its full precision.

    Args:
        table: columns variant, seed, method, bits, accuracy.
        cells: method and bits of each panel.
        title: the finding.
    """
    percent, order = _percent(table), list(dict.fromkeys(table.variant))
    figure, axes = plt.subplots(1, len(cells), figsize=(9.5, 0.5 * len(order) + 1.7), sharey=True)
    for axis, cell in zip(axes, cells, strict=True):
        for place, variant in enumerate(order):
            own, colour = percent.loc[variant], COLOURS[variant]
            low, full = own[cell].mean(), own["FP", "FP"].mean()
            axis.plot([low, full], [place, place], color=colour, linewidth=1.5)
            axis.plot(full, place, marker="o", color=colour, markerfacecolor="white", markersize=7)
            axis.plot(own[cell], [place + 0.22] * len(own), ".", color=colour, alpha=0.5, markersize=5)
            axis.plot(low, place, marker="o", color=colour, markersize=8)
        axis.axvline(percent.loc["AdamW"][cell].mean(), color=COLOURS["AdamW"], linewidth=0.8, linestyle=":", zorder=0)
        axis.grid(axis="y", linewidth=0.3)
        axis.set(title=f"{cell[0]}, {cell[1]}", xlabel="test accuracy (%)")
    axes[0].set_yticks(range(len(order)), order)
    axes[0].invert_yaxis()
    figure.suptitle(title, fontweight="bold", fontsize="large")
    note = "large: mean over seeds; small: seeds; hollow: full precision; dotted: AdamW's mean"
    figure.supxlabel(note, fontsize="small")
    return figure


def _said_of_adamw(table: pd.DataFrame) -> str:
    """How many comparisons with AdamW go which way."""
    own = table[table.second == "AdamW"]
    texts = []
    for measure, part in own.groupby("measure", sort=False):
        counts = part.says.value_counts()
        texts.append(f"{measure} of {len(part)}: {listed({f'{name}:': n for name, n in counts.items()}, '{:d}')}.")
    return f"Arms against AdamW, by their intervals. {' '.join(texts).capitalize()}"


def _told_apart(table: pd.DataFrame, cells: Sequence[tuple[str, str]]) -> str:
    """How many arms differ from AdamW in accuracy under each quantizer."""
    parts = []
    for method, bits in cells:
        own = table[(table.method == method) & (table.bits == bits) & (table.measure == "accuracy")]
        better, worse = int((own.low > 0).sum()), int((own.high < 0).sum())
        parts.append(f"under {method} {better} are more accurate and {worse} less")
    return f"Of {table['first'].nunique()} ways of fine-tuning, against AdamW at {cells[0][1]}: {', '.join(parts)}"


@published(tables=["frontier_differences"], finding=_said_of_adamw, paper="Tables 6, 11 in shape")
def frontier_differences(table: pd.DataFrame, against: str = "AdamW") -> Figure:
    """Every arm against AdamW: mean difference and 95 % interval, accuracy and points kept; right: better than AdamW.

    Args:
        table: from :func:`s2d.lab.frontier.comparisons`.
        against: the arm that the others are compared with.
    """
    own, cells = table[table.second == against], _cells(table)
    panels = [("FP", "FP"), *cells]
    return forest_panels(
        own, rows="first", panels=panels, claim=f"better than {against}", title=_told_apart(own, cells)
    )


def _kurtosis_of_each(table: pd.DataFrame) -> str:
    means = table.groupby("variant", sort=False).excess_kurtosis.mean()
    return f"Mean excess kurtosis of the residual stream: {listed({f'{n}:': v for n, v in means.items()})}."


@published(tables=["frontier_outliers"], finding=_kurtosis_of_each)
def frontier_outliers(table: pd.DataFrame) -> Figure:
    """Excess kurtosis of the residual stream after each fine-tuning: the seeds as points, their mean as a bar.

    Args:
        table: from :func:`s2d.lab.evaluate.outlier_table`.
    """
    figure, axis = plt.subplots(figsize=(8, 0.42 * table.variant.nunique() + 1))
    style = {"x": "excess_kurtosis", "y": "variant", "hue": "variant", "palette": COLOURS, "ax": axis, "legend": False}
    sns.barplot(table, errorbar=None, alpha=0.4, **style)
    sns.stripplot(table, size=4, jitter=False, **style)
    axis.set(xlabel="excess kurtosis of the residual stream, mean over blocks", ylabel="")
    return figure


def _smallest_error(table: pd.DataFrame) -> str:
    error = table.groupby(["kind", "variant"], sort=False).logit_error.mean().unstack("kind")
    parts = [f"{kind}: {error[kind].idxmin()} {error[kind].min():.2f}" for kind in error]
    return f"Smallest mean logit error with {table.a_bits.iloc[0]}-bit inputs of one kind, {'; '.join(parts)}."


@published(tables=["frontier_sites"], finding=_smallest_error)
def frontier_sites(table: pd.DataFrame) -> Figure:
    """Logit error when the inputs of one kind of site alone are quantized: mean and range over seeds."""
    figure, axis = plt.subplots(figsize=(8.5, 4.2))
    bars(axis, table, x="kind", y="logit_error")
    axis.set(
        xlabel="", ylabel="relative logit error", title=f"Inputs at {table.a_bits.iloc[0]} bits, one kind at a time"
    )
    legend_below(figure, axis, columns=4)
    return figure
