"""Notebook 11: one setting at a time, and a cached penalty growing old."""

from __future__ import annotations

from collections.abc import Sequence

import matplotlib.pyplot as plt
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from s2d.lab.ablations import BASELINE
from s2d.lab.figures.registry import published
from s2d.lab.figures.style import COLOURS, difference_panels, listed, short_names
from s2d.lab.staleness import AT_REST


def _intervals_without_zero(differences: pd.DataFrame) -> str:
    accuracy = differences[differences.measure == "accuracy"]
    sure = ((accuracy.low > 0) | (accuracy.high < 0)).sum()
    return (
        f"{sure} of {len(accuracy)} intervals of accuracy leave zero out; "
        f"by chance alone it would be about {0.05 * len(accuracy):.0f}."
    )


@published(tables=["ablation_differences"], finding=_intervals_without_zero, paper="Tables 6, 10, 11 in shape")
def ablations(differences: pd.DataFrame, bits: Sequence[str] = ("FP", "W4A4", "W3A3")) -> Figure:
    """Every ablation against S2D: mean difference within a seed and its 95 % interval, in accuracy and in points lost.

    Args:
        differences: from :func:`s2d.lab.ablations.paired_differences`.
        bits: those shown, where they were measured.

    Returns:
        One panel a measure and bit width, one row a setting, one colour a method.
    """
    named = differences.assign(label=differences.group + ": " + differences.setting)
    return difference_panels(named, rows="label", bits=bits, against=BASELINE)


def _share_picked(table: pd.DataFrame) -> str:
    share = 100 * (table["rank"] > 0).groupby(table.criterion, sort=False).mean()
    return f"Per cent of the layers picked: {listed({f'{name}:': value for name, value in share.items()}, '{:.0f}')}."


@published(tables=["selection"], finding=_share_picked, paper="Algorithm 1 line 9")
def selection(table: pd.DataFrame) -> Figure:
    """How many components of each layer each criterion picks, mean over seeds."""
    mean = table.groupby(["layer", "criterion"], sort=False)["rank"].mean().unstack()
    figure, axis = plt.subplots(figsize=(7, 0.9 + 0.28 * len(mean)))
    mean.index = short_names(mean.index)
    sns.heatmap(
        mean[list(dict.fromkeys(table.criterion))],
        annot=True,
        fmt=".1f",
        cmap="Blues",
        vmin=0,
        linewidths=0.5,
        cbar_kws={"label": "components picked", "ticks": range(int(mean.to_numpy().max()) + 1)},
        ax=axis,
    )
    axis.set(xlabel="", ylabel="", title="What each criterion picks")
    axis.set_xticks(axis.get_xticks(), axis.get_xticklabels(), rotation=25, ha="right")
    return figure


def _followed(axis: Axes, part: pd.DataFrame, column: str) -> None:
    """One mode over the steps, a line for each interval: the mean, and the range over layers and seeds."""
    for refresh, rows in part.groupby(part.step - part.age):
        groups = rows.groupby("step")[column]
        axis.plot(groups.mean(), color=COLOURS["S2D"])
        axis.fill_between(groups.mean().index, groups.min(), groups.max(), color=COLOURS["S2D"], alpha=0.2, linewidth=0)
        if refresh > 0:
            axis.axvline(refresh, color="black", linewidth=0.6, linestyle=":")


def _oldest(table: pd.DataFrame) -> pd.DataFrame:
    """Looks at the end of the first interval, just before the refresh."""
    first = table[table.age == table.step]
    return first[first.age == first.age.max()]


def _cosine_of_an_old_cache(table: pd.DataFrame) -> str:
    cosine = _oldest(table).groupby("mode", sort=False).cosine.mean()
    named = {f"{mode}:": value for mode, value in cosine.items()}
    return f"Mean cosine after {_oldest(table).age.iloc[0]} steps: {listed(named, '{:.3f}')}."


@published(tables=["staleness"], finding=_cosine_of_an_old_cache, paper="G.2")
def staleness(table: pd.DataFrame) -> Figure:
    """G.2: cosine of the cached and a fresh penalty, one panel a mode, beside the paper's 0.99.

    Args:
        table: columns mode, step, age, cosine (by layer and seed).
    """
    modes = list(dict.fromkeys(table["mode"]))
    columns = -(-len(modes) // 2)
    figure, axes = plt.subplots(2, columns, figsize=(2.7 * columns, 4.6), sharex=True, sharey=True, squeeze=False)
    for axis, mode in zip(axes.flat, modes, strict=False):
        _followed(axis, table[table["mode"] == mode], "cosine")
        axis.axhline(0.99, color=COLOURS["AdamW"], linewidth=1, linestyle="--")
        axis.set_title(mode, fontsize="small")
    for axis in axes.flat[len(modes) :]:
        axis.set_axis_off()
    for axis in axes[:, 0]:
        axis.set(ylabel="cosine")
    figure.supxlabel("optimizer step (dotted: refresh; dashed: the paper's 0.99)", fontsize="small")
    return figure


def _turned_over(table: pd.DataFrame) -> str:
    old = _oldest(_moving(table))
    share = 100 * (old.coefficient < 0).groupby(old["mode"], sort=False).mean()
    named = {f"{mode}:": value for mode, value in share.items()}
    return f"Per cent of the coefficients below zero after {old.age.iloc[0]} steps: {listed(named, '{:.0f}')}."


def _moving(table: pd.DataFrame) -> pd.DataFrame:
    return table[~table["mode"].isin(AT_REST)]


@published(tables=["overshoot"], finding=_turned_over)
def overshoot(table: pd.DataFrame) -> Figure:
    """What a penalty does to a weight while it is cached: sigma_1 above, the signed coefficient below, by mode.

    Args:
        table: columns mode, step, age, sigma_1, coefficient (by layer and seed); modes in which nothing moves within
            an interval (``s2d.lab.staleness.AT_REST``) are left out.
    """
    table = _moving(table)
    modes = list(dict.fromkeys(table["mode"]))
    size = (2.6 * len(modes), 4.8)
    figure, axes = plt.subplots(2, len(modes), figsize=size, sharex=True, sharey="row", squeeze=False)
    for column, mode in enumerate(modes):
        part = table[table["mode"] == mode]
        for axis, name in zip(axes[:, column], ("sigma_1", "coefficient"), strict=True):
            _followed(axis, part, name)
        axes[1, column].axhline(0, color="black", linewidth=0.8)
        axes[0, column].set_title(mode, fontsize="small")
    axes[0, 0].set(ylabel="$\\sigma_1$")
    axes[1, 0].set(ylabel="$u_1^\\top W v_1$, cached vectors")
    figure.supxlabel("optimizer step (dotted: refresh)", fontsize="small")
    return figure
