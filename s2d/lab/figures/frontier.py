"""Notebook 12: every arm in full precision and at low bits, and what tells them apart."""

from __future__ import annotations

from collections.abc import Sequence

import matplotlib.pyplot as plt
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from s2d.lab.figures.registry import published
from s2d.lab.figures.style import COLOURS, MARKERS, bars, bit_widths, difference_panels, legend_below, listed
from s2d.lab.frontier import keeping, search_points
from s2d.lab.statistics import pareto_front

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


def _cells(table: pd.DataFrame) -> list[tuple[str, str]]:
    """Method and bits of each panel."""
    low = [bits for bits in bit_widths(table) if bits in ("W4A4", "W3A3")]
    return [(method, bits) for bits in low for method in FRONT_METHODS]


def _best(table: pd.DataFrame) -> str:
    mean = 100 * table.groupby(["method", "bits", "variant"]).accuracy.mean()
    best = [
        f"{bits} {method}: {mean[method, bits].idxmax()} {mean[method, bits].max():.1f}"
        for method, bits in _cells(table)
    ]
    full = mean["FP", "FP"]
    return f"Highest mean test accuracy in full precision: {full.idxmax()} {full.max():.1f}; {'; '.join(best)}."


@published(tables=["frontier"], finding=_best, paper="Tables 6, 11 in shape")
def frontier_test(table: pd.DataFrame) -> Figure:
    """The chosen settings on test images: mean and standard deviation over seeds, full precision against low bits.

    Args:
        table: from :func:`s2d.lab.frontier.frontier_table`.
    """
    cells = _cells(table)
    percent = table.assign(percent=100 * table.accuracy).pivot(
        index=["variant", "seed"], columns=["method", "bits"], values="percent"
    )
    order = list(dict.fromkeys(table.variant))
    mean, std = (getattr(percent.groupby("variant"), name)().loc[order] for name in ("mean", "std"))
    rows = -(-len(cells) // 2)
    figure, axes = plt.subplots(rows, 2, figsize=(10, 3.9 * rows), sharex=True, squeeze=False)
    for axis, cell in zip(axes.flat, cells, strict=False):
        points = pd.DataFrame({"full": mean["FP", "FP"], "low": mean[cell]})
        _front_line(axis, points.assign(front=pareto_front(points, "full", "low")), color="black", linestyle="--")
        for variant, point in points.iterrows():
            axis.errorbar(
                point.full,
                point.low,
                xerr=std["FP", "FP"][variant],
                yerr=std[cell][variant],
                color=COLOURS[variant],
                marker=MARKERS[variant],
                markersize=11 if MARKERS[variant] == "*" else 7,
                elinewidth=0.8,
                label=variant,
            )
        axis.set(ylabel=f"{cell[1]}, {cell[0]} (%)", title=f"{cell[1]}, {cell[0]}")
    for axis in axes[-1]:
        axis.set_xlabel("full precision (%)")
    for axis in list(axes.flat)[len(cells) :]:
        axis.remove()
    legend_below(figure, axes[0, 0], columns=4)
    return figure


def _said_of_adamw(table: pd.DataFrame) -> str:
    """How many comparisons with AdamW go which way."""
    own = table[table.second == "AdamW"]
    texts = []
    for measure, part in own.groupby("measure", sort=False):
        counts = part.says.value_counts()
        texts.append(f"{measure} of {len(part)}: {listed({f'{name}:': n for name, n in counts.items()}, '{:d}')}.")
    return f"Arms against AdamW, by their intervals. {' '.join(texts).capitalize()}"


@published(tables=["frontier_differences"], finding=_said_of_adamw, paper="Tables 6, 11 in shape")
def frontier_differences(
    table: pd.DataFrame, against: str = "AdamW", bits: Sequence[str] = ("FP", "W4A4", "W3A3")
) -> Figure:
    """Every arm against AdamW under every quantizer: mean difference and 95 % interval, accuracy and points lost.

    Args:
        table: from :func:`s2d.lab.frontier.comparisons`.
        against: the arm that the others are compared with.
        bits: those shown, where they were measured.
    """
    return difference_panels(table[table.second == against], rows="first", bits=bits, against=against)


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
