"""The testbed: the same runs on every CPU kernel, and what AdamW's outliers cost at low bits."""

from __future__ import annotations

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from s2d.lab.figures.registry import published
from s2d.lab.figures.style import COLOURS, listed

_RUNS = {"1x": "AdamW", "2x": "AdamW", "4x": "AdamW", "SGD": "SGD"}
_GROWTH = ["1x", "2x", "4x"]
_KERNEL_MARKERS = {"native": "o", "avx2": "^", "default": "s"}


def _dodged(index: int, of: int) -> float:
    """Places kernels side by side around a tick."""
    return 0.16 * (index - (of - 1) / 2)


def _kernels(table: pd.DataFrame) -> list[str]:
    return [kernel for kernel in _KERNEL_MARKERS if kernel in set(table.kernel)]


def _each_run(axis: Axes, table: pd.DataFrame, values: pd.Series) -> None:
    """A marker for each run, AdamW's lengths of a seed joined by a line, SGD apart from them."""
    table = table.assign(value=values)
    kernels = _kernels(table)
    for index, kernel in enumerate(kernels):
        own = table[(table.kernel == kernel) & table.run.isin(list(_RUNS))]
        wide = own.pivot(index="run", columns="seed", values="value").reindex(list(_RUNS))
        places = [tick + _dodged(index, len(kernels)) for tick in range(len(_RUNS))]
        for seed in wide:
            axis.plot(places[:3], wide.loc[_GROWTH, seed], color=COLOURS["AdamW"], linewidth=0.6, alpha=0.35)
        for place, (run, optimizer) in zip(places, _RUNS.items(), strict=True):
            axis.plot(
                [place] * wide.shape[1],
                wide.loc[run],
                linestyle="none",
                marker=_KERNEL_MARKERS[kernel],
                markersize=4,
                alpha=0.8,
                color=COLOURS[optimizer],
            )
    axis.axvline(2.5, color="#cccccc", linewidth=0.8)
    axis.set_xticks(range(len(_RUNS)), list(_RUNS))


def _kernel_legend(figure: Figure, table: pd.DataFrame) -> None:
    style = {"linestyle": "none", "color": "#444444", "markersize": 5}
    handles = [
        Line2D([], [], marker=_KERNEL_MARKERS[kernel], label=f"{kernel} kernel", **style) for kernel in _kernels(table)
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles))


def _accuracy_and_kurtosis(table: pd.DataFrame) -> str:
    runs = table.groupby("run", sort=False)
    spread = (100 * runs.FP.mean()).map("{:.1f}".format) + " (sd " + (100 * runs.FP.std()).map("{:.1f})".format)
    kurtosis = runs.excess_kurtosis.agg(["min", "max"])
    ranges = kurtosis["min"].map("{:.1f}".format) + " to " + kurtosis["max"].map("{:.1f}".format)
    order = [run for run in _RUNS if run in spread.index]
    kernels = f"{table.kernel.nunique()} kernels" if table.kernel.nunique() > 1 else "one kernel"
    return (
        f"Full-precision test accuracy over {kernels} and {table.seed.nunique()} seeds: "
        f"{listed(spread[order], '{}')}. Excess kurtosis: {listed(ranges[order], '{}')}."
    )


@published(tables=["laptop/testbed"], finding=_accuracy_and_kurtosis, paper="appendix C; abstract in shape")
def testbed_runs(table: pd.DataFrame) -> Figure:
    """Every pretraining on every CPU kernel: accuracy, kurtosis and largest FFN singular value, as AdamW trains on."""
    figure, axes = plt.subplots(1, 3, figsize=(11, 3.8))
    _each_run(axes[0], table, 100 * table.FP)
    _each_run(axes[1], table, table.excess_kurtosis)
    _each_run(axes[2], table, table.sigma_1)
    labels = ("test accuracy, %", "excess kurtosis", "largest $\\sigma_1$ of an FFN weight")
    titles = ("Full precision", "Outliers of the residual stream", "FFN weights")
    for axis, label, title in zip(axes, labels, titles, strict=True):
        axis.set(xlabel="AdamW at 1, 2, 4 times the steps; SGD", ylabel=label, title=title)
    _kernel_legend(figure, table)
    return figure


def _cells(table: pd.DataFrame) -> list[str]:
    return [column for column in table if column.endswith(("W4A4", "W3A3"))]


def _who_loses_more(table: pd.DataFrame) -> str:
    means = table.groupby("run")[["FP", *_cells(table)]].mean()
    lost = 100 * means.rsub(means.FP, axis=0)
    said = []
    for cell in _cells(table):
        said.append(f"{cell} {lost.loc['2x', cell]:.1f} and {lost.loc['SGD', cell]:.1f}")
    return f"Mean points lost, AdamW (2x) and SGD at about equal accuracy: {'; '.join(said)}."


@published(tables=["laptop/testbed"], finding=_who_loses_more, paper="Tables 6, 8 in shape")
def testbed_points_lost(table: pd.DataFrame) -> Figure:
    """Points of test accuracy lost to each quantizer at 4 and 3 bits, as AdamW trains longer, and by SGD."""
    cells = _cells(table)
    columns = list(dict.fromkeys(cell.rpartition(" ")[0] for cell in cells))
    widths = list(dict.fromkeys(cell.rpartition(" ")[2] for cell in cells))
    size = {"nrows": len(widths), "ncols": len(columns), "figsize": (2.8 * len(columns), 2.7 * len(widths) + 0.4)}
    figure, axes = plt.subplots(**size, sharex=True, sharey="row", squeeze=False)
    for row, bits in zip(axes, widths, strict=True):
        for axis, name in zip(row, columns, strict=True):
            _each_run(axis, table, 100 * (table.FP - table[f"{name} {bits}"]))
            axis.axhline(0, color="#cccccc", linewidth=0.8)
            axis.set_title(f"{name}, {bits}")
        row[0].set_ylabel("points lost")
    figure.supxlabel("AdamW at 1, 2, 4 times the steps (2x is as accurate as SGD); SGD", fontsize="medium")
    _kernel_legend(figure, table)
    return figure
