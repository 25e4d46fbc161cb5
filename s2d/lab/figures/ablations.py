"""Notebook 11: one setting at a time, and a cached penalty growing old."""

from __future__ import annotations

import matplotlib.pyplot as plt
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from s2d.lab.ablations import BASELINE
from s2d.lab.figures.registry import published
from s2d.lab.figures.style import AGAINST, COLOURS, TOWARDS, bit_widths, forest_panels, listed, short_names
from s2d.lab.staleness import AT_REST

METHODS = ("RTN, symmetric", "ERQ")


def _intervals_without_zero(differences: pd.DataFrame) -> str:
    accuracy = differences[differences.measure == "accuracy"]
    sure = ((accuracy.low > 0) | (accuracy.high < 0)).sum()
    return (
        f"{sure} of {len(accuracy)} intervals of accuracy leave zero out; "
        f"by chance alone it would be about {0.05 * len(accuracy):.0f}."
    )


def _settings_that_matter(differences: pd.DataFrame, bits: str) -> str:
    parts = []
    for method in (method for method in METHODS if method in _methods(differences, bits)):
        own = differences[(differences.method == method) & (differences.bits == bits)]
        own = own[own.measure == "accuracy"]
        away = int(((own.low > 0) | (own.high < 0)).sum())
        parts.append(f"{away} under {method} (at most {own.difference.abs().max():.1f} points)")
    return f"Of {len(own)} changes of S2D these change its accuracy at {bits}: {', '.join(parts)}"


@published(tables=["ablation_differences"], finding=_intervals_without_zero, paper="Tables 6, 10, 11 in shape")
def ablations(differences: pd.DataFrame) -> Figure:
    """S2D against every ablation of it: mean difference within a seed and its 95 % interval; right: S2D is better.

    Args:
        differences: from :func:`s2d.lab.ablations.paired_differences`.

    Returns:
        Full precision, and the weakest and strongest quantizer at the first low bit width; one row a setting.
    """
    named = differences.assign(label=differences.group + ": " + differences.setting)
    bits = next(name for name in bit_widths(differences) if set(METHODS) & _methods(differences, name))
    return forest_panels(
        named,
        rows="label",
        panels=[("FP", "FP"), *((method, bits) for method in METHODS)],
        claim=f"{BASELINE} with its own setting is better",
        title=_settings_that_matter(differences, bits),
        sign=-1,
    )


def _methods(differences: pd.DataFrame, bits: str) -> set[str]:
    return set(differences.method[differences.bits == bits])


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
    """G.2: cosine of the cached and a fresh penalty at half and at the whole of an interval, beside the paper's 0.99.

    Args:
        table: columns mode, step, age, cosine (by layer and seed).
    """
    first = table[table.age == table.step]
    oldest = first.age.max()
    ages = [min(first.age.unique(), key=lambda age: abs(age - oldest / 2)), oldest]
    modes = list(dict.fromkeys(table["mode"]))
    means = first.groupby(["age", "mode"]).cosine.mean()
    figure, axis = plt.subplots(figsize=(8, 0.5 * len(modes) + 1.6))
    for place, mode in enumerate(modes):
        at = [means[age, mode] for age in ages]
        half = first[(first["mode"] == mode) & (first.age == ages[0])].cosine
        colour = TOWARDS if at[0] >= 0.99 else AGAINST
        axis.plot([half.min(), half.max()], [place, place], color=colour, linewidth=5, alpha=0.25)
        axis.plot(at, [place, place], color=colour, linewidth=1)
        axis.plot(at[1], place, marker="o", color=colour, markerfacecolor="white", markersize=7)
        axis.plot(at[0], place, marker="o", color=colour, markersize=8)
    axis.axvline(0.99, color="black", linewidth=0.8, linestyle="--")
    axis.grid(axis="y", linewidth=0.3)
    axis.set_yticks(range(len(modes)), modes)
    axis.invert_yaxis()
    kept = int(sum(means[ages[0], mode] >= 0.99 for mode in modes))
    axis.set_xlabel(
        f"cosine of the cached and a fresh penalty; filled: mean after {ages[0]} steps (bar: all layers), "
        f"hollow: after {ages[1]}",
        fontsize="small",
    )
    title = f"After {ages[0]} steps {kept} of {len(modes)} ways keep the paper's 0.99 (dashed)"
    figure.suptitle(title, fontweight="bold", fontsize="large")
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
