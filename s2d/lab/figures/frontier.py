"""Notebook 07: full precision against low bits."""

from __future__ import annotations

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from s2d.lab.figures.registry import published
from s2d.lab.figures.style import COLOURS, MARKERS, bars, bit_widths, legend_below
from s2d.lab.frontier import search_points
from s2d.lab.statistics import pareto_front


def _front_line(axis: Axes, points: pd.DataFrame, **style) -> None:
    """The staircase above which no point is."""
    front = points[points.front].sort_values("full")
    axis.step(front.full, front.low, where="pre", linewidth=1, zorder=0, **style)


def _search_points(tuning: pd.DataFrame) -> dict[str, pd.DataFrame]:
    return {method: search_points(tuning, method) for method in ("RTN", "ERQ")}


def _on_the_front(tuning: pd.DataFrame) -> str:
    fronts = {method: sorted(set(points[points.front].variant)) for method, points in _search_points(tuning).items()}
    return " ".join(f"On the front under {method}: {'; '.join(variants)}." for method, variants in fronts.items())


@published(tables=["laptop/tuning"], finding=_on_the_front)
def frontier_search(tuning: pd.DataFrame) -> Figure:
    """Every setting that was tried, on validation images: full precision against W4A4, one panel a quantizer.

    Args:
        tuning: ``data/laptop/tuning.csv``.
    """
    points = _search_points(tuning)
    figure, axes = plt.subplots(1, len(points), figsize=(5.2 * len(points), 4.2), sharex=True, squeeze=False)
    for axis, (method, table) in zip(axes[0], points.items(), strict=True):
        _front_line(axis, table, color="black", linestyle="--")
        for variant, own in table.groupby("variant", sort=False):
            style = {"marker": MARKERS[variant], "s": 90 if MARKERS[variant] == "*" else 36, "alpha": 0.85}
            for longer, part in own.groupby("longer"):
                face = "none" if longer else COLOURS[variant]
                label = f"{variant}, twice the steps" if longer else variant
                axis.scatter(part.full, part.low, edgecolor=COLOURS[variant], facecolor=face, label=label, **style)
        axis.set(
            xlabel="full precision (%)", ylabel=f"W4A4, {method} (%)", title=f"Settings tried at laptop scale, {method}"
        )
    legend_below(figure, axes[0, 0], columns=4)
    return figure


def _cells(table: pd.DataFrame) -> list[tuple[str, str]]:
    """Method and bits of each panel."""
    low = [bits for bits in bit_widths(table) if bits in ("W4A4", "W3A3")]
    return [(method, bits) for bits in low for method in ("RTN", "ERQ")]


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


def _smallest_error(table: pd.DataFrame) -> str:
    error = table.groupby(["kind", "variant"], sort=False).logit_error.mean().unstack("kind")
    parts = [f"{kind}: {error[kind].idxmin()} {error[kind].min():.2f}" for kind in error]
    return f"Smallest mean logit error with {table.a_bits.iloc[0]}-bit inputs of one kind, {'; '.join(parts)}."


@published(tables=["frontier_sites"], finding=_smallest_error)
def frontier_sites(table: pd.DataFrame) -> Figure:
    """Logit error when the inputs of one kind of site alone are quantized: mean and range over seeds."""
    figure, axis = plt.subplots(figsize=(8, 3.8))
    bars(axis, table, x="kind", y="logit_error")
    axis.set(
        xlabel="", ylabel="relative logit error", title=f"Inputs at {table.a_bits.iloc[0]} bits, one kind at a time"
    )
    legend_below(figure, axis)
    return figure
