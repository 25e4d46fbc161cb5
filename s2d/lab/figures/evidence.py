"""Notebook 10: where outliers come from, and what grows with them."""

from __future__ import annotations

import matplotlib as mpl
import matplotlib.pyplot as plt
import pandas as pd
import seaborn as sns
from matplotlib.figure import Figure

from s2d.lab.evaluate import with_points_lost
from s2d.lab.figures.registry import published
from s2d.lab.figures.style import COLOURS, MARKERS, bit_widths, legend_below, listed, mean_line, short_names
from s2d.lab.origins import dose_response, dose_table


def _kurtosis_at_equal_accuracy(matched: pd.DataFrame, ptq: pd.DataFrame) -> str:
    kurtosis = matched[matched.moment == "matched"].groupby("variant", sort=False).excess_kurtosis.mean()
    return f"Mean excess kurtosis at equal validation accuracy: {listed(kurtosis)}."


@published(
    tables=["origins_interventions", "origins_interventions_ptq"],
    finding=_kurtosis_at_equal_accuracy,
    paper="appendix C",
)
def origins_interventions(matched: pd.DataFrame, ptq: pd.DataFrame) -> Figure:
    """Every optimizer a row: kurtosis at equal accuracy and at the end, test accuracy, points of it lost to rounding.

    Args:
        matched: columns variant, moment ("matched" or "end"), excess_kurtosis.
        ptq: columns variant, seed, grid, bits ("FP" and at most three more), accuracy; one grid.
    """
    variants = list(matched.variant.unique())
    figure, axes = plt.subplots(1, 3, figsize=(12, 0.36 * len(variants) + 1.9), sharey=True)
    left, middle, right = axes
    table = with_points_lost(ptq).assign(percent=lambda t: 100 * t.accuracy)
    low = [name for name in bit_widths(ptq) if name != "FP"]
    end, level = (matched[matched.moment == moment] for moment in ("end", "matched"))
    series = [
        (left, end, "excess_kurtosis", 0, "end of training"),
        (left, level, "excess_kurtosis", 1, "at equal validation accuracy"),
        (middle, table[table.bits == "FP"], "percent", 0, "full precision"),
        *((right, table[table.bits == name], "points_lost", i, name) for i, name in enumerate(low)),
    ]
    colours = (COLOURS["SGD"], COLOURS["AdamW"], COLOURS["S2D"])
    for axis, part, column, index, label in series:
        shift = 0.28 * index - 0.14
        style = {"color": colours[index], "marker": "sod"[index]}
        axis.scatter(part[column], [variants.index(v) + shift for v in part.variant], s=10, alpha=0.45, **style)
        mean = part.groupby("variant")[column].mean()[variants]
        axis.scatter(mean, [i + shift for i in range(len(variants))], s=40, label=label, **style)
    left.set_yticks(range(len(variants)), variants)
    left.invert_yaxis()
    left.set_xscale("symlog", linthresh=1)
    left.xaxis.set_major_formatter("{x:g}")
    left.set_xlim(right=2 * max(1, matched.excess_kurtosis.max()))
    left.set(xlabel="excess kurtosis of the residual stream", title="Outliers")
    middle.set(xlabel="test accuracy (%)", title="Accuracy")
    right.set(xlabel=f"points lost (RTN, {ptq.grid.iloc[0]} grid)", title="Cost of rounding")
    for axis in axes:
        axis.grid(axis="y", alpha=0.4)
        axis.legend(loc="upper center", bbox_to_anchor=(0.5, -0.17), ncols=2)
    return figure


def _dose_response(matched: pd.DataFrame) -> str:
    doses = dose_table(matched)
    response = dose_response(doses[doses.moment == "matched"])
    said = "; ".join(
        f"{row.knob} {row.correlation:+.2f} [{row.low:+.2f}, {row.high:+.2f}]" for row in response.itertuples()
    )
    return f"Rank correlation of dose and kurtosis at equal accuracy, within seeds, mean and 95 % interval: {said}."


@published(tables=["origins_interventions"], finding=_dose_response, paper="appendix C [7]")
def origins_doses(matched: pd.DataFrame) -> Figure:
    """Kurtosis against how adaptive AdamW is: more ``eps``, more or less ``beta2``; each seed a small marker.

    Args:
        matched: from :func:`s2d.lab.origins.matched_table`.
    """
    doses = dose_table(matched)
    labels = {"eps": "eps (larger: less adaptive)", "beta2": "beta2 (smaller: less adaptive, says [7])"}
    figure, axes = plt.subplots(1, 2, figsize=(8.5, 3.4), sharey=True)
    styles = {"end": ("--", "s", COLOURS["SGD"]), "matched": ("-", "o", COLOURS["AdamW"])}
    names = {"end": "end of training", "matched": "at equal validation accuracy"}
    for axis, (knob, label) in zip(axes, labels.items(), strict=True):
        table = doses[doses.knob == knob]
        ticks = sorted(table.dose.unique())
        for moment, (line, marker, colour) in styles.items():
            part = table[table.moment == moment]
            mean = part.groupby("dose").excess_kurtosis.mean()
            axis.plot(range(len(ticks)), mean, line, marker=marker, color=colour, label=names[moment])
            axis.scatter([ticks.index(d) for d in part.dose], part.excess_kurtosis, s=10, color=colour, alpha=0.5)
        axis.set_xticks(range(len(ticks)), [f"{dose:g}" for dose in ticks])
        axis.set(xlabel=label, title=f"Dose-response to {knob}")
    axes[0].set(ylabel="excess kurtosis")
    axes[0].legend()
    legend_below(figure, axes[0])
    return figure


def _largest_after_the_last_block(where: pd.DataFrame, writers: pd.DataFrame) -> str:
    last = where[where.layer == where.layer.iloc[-1]]
    share = 100 * last.groupby("variant", sort=False)[["energy_share", "direction_share"]].mean()
    channel, direction = listed(share.energy_share, "{:.0f}"), listed(share.direction_share, "{:.0f}")
    return (
        f"Per cent of the energy after the last block in the largest channel: {channel}. In any direction: {direction}."
    )


@published(tables=["origins_where", "origins_writers"], finding=_largest_after_the_last_block, paper="appendix C")
def origins_where(where: pd.DataFrame, writers: pd.DataFrame, variant: str = "AdamW") -> Figure:
    """The largest channel and direction along the network, the tokens that carry the channel, the layers that write it.

    Args:
        where: one row a variant, seed and point of the residual stream.
        writers: one row a variant, seed and layer that adds to the channel.
        variant: whose tokens and layers are shown; its channel's sign differs by seed, so shares are shown.
    """
    figure, ((channel, direction), (middle, right)) = plt.subplots(2, 2, figsize=(10, 7))
    points = list(where.layer.unique())
    table = where.assign(position=where.layer.map(points.index))
    titles = {"energy_share": "The largest channel", "direction_share": "The largest direction, in any basis"}
    for axis, (column, title) in zip((channel, direction), titles.items(), strict=True):
        for name, part in table.assign(percent=100 * table[column]).groupby("variant", sort=False):
            mean_line(axis, part, "position", "percent", name, marker=MARKERS[name], markersize=5)
        axis.set(ylabel="share of all energy (%)", ylim=(0, 100), title=title)
    channel.legend(loc="center right", bbox_to_anchor=(1, 0.35), fontsize="small")
    own = table[table.variant == variant].groupby("position")
    for column, label, style in (
        ("patch_mean_abs", "mean size on patch tokens", {"marker": "o"}),
        ("class_mean_abs", "mean size on the class token", {"marker": "s"}),
        ("std", "spread over all tokens", {"linestyle": "--", "color": COLOURS["SGD"]}),
    ):
        mean, low, high = own[column].mean(), own[column].min(), own[column].max()
        (line,) = middle.plot(mean.index, mean, label=label, **({"color": None} | style))
        middle.fill_between(mean.index, low, high, color=line.get_color(), alpha=0.15, linewidth=0)
    middle.set(ylabel="activation", ylim=(0, 1.35 * own.patch_mean_abs.max().max()))
    middle.set(title=f"{variant}: which tokens carry it")
    middle.legend()
    for axis in (channel, direction, middle):
        axis.set_xticks(
            range(len(points)), ["embed", *(p.replace("blocks.", "block ") for p in points[1:])], rotation=30
        )
    part = writers[writers.variant == variant]
    share = 100 * part["mean"] / part.groupby("seed")["mean"].transform("sum")
    names = list(part.writer.unique())
    right.barh(range(len(names)), share.groupby(part.writer).mean()[names], color=COLOURS[variant], alpha=0.45)
    right.scatter(share, [names.index(w) for w in part.writer], s=14, color=COLOURS[variant])
    right.set_yticks(range(len(names)), short_names(names))
    right.invert_yaxis()
    right.set(xlabel="share of the channel's final mean (%)", title=f"{variant}: which layers write it")
    return figure


def _grow_together(growth: pd.DataFrame, correlation: pd.DataFrame) -> str:
    pair = correlation[(correlation.x == "sigma_1") & (correlation.y == "max_abs")]
    intervals = "; ".join(f"{r.correlation:+.2f} [{r.low:+.2f}, {r.high:+.2f}] {r.scope}" for r in pair.itertuples())
    return f"Rank correlation of the largest singular value and the largest activation: {intervals}."


@published(tables=["origins_growth", "origins_correlation"], finding=_grow_together, paper="Theorem 1")
def origins_growth(growth: pd.DataFrame, correlation: pd.DataFrame) -> Figure:
    """Largest activation against largest singular value while training grows longer; correlations with intervals.

    Args:
        growth: one row a seed, length and layer.
        correlation: one row a pair of columns and scope, with low and high.
    """
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.2))
    for _, path in growth.sort_values("steps").groupby(["seed", "layer"], sort=False):
        left.plot(path.sigma_1, path.max_abs, color=COLOURS["SGD"], alpha=0.25, linewidth=0.8, zorder=1)
    lengths = sorted(growth.steps.unique())
    colours = sns.color_palette("viridis", len(lengths))
    for steps, colour, marker in zip(lengths, colours, "osD^vPX", strict=False):
        part = growth[growth.steps == steps]
        left.scatter(part.sigma_1, part.max_abs, s=22, color=colour, marker=marker, label=f"{steps} steps", zorder=2)
    left.set(xscale="log", yscale="log", xlabel="largest singular value", ylabel="largest |activation|")
    left.set(title="One point a layer, seed and length")
    for axis in (left.xaxis, left.yaxis):
        axis.set_major_locator(mpl.ticker.LogLocator(subs=(1, 2, 5)))
        axis.set_major_formatter("{x:g}")
        axis.set_minor_locator(mpl.ticker.NullLocator())
    left.legend()
    symbols = {
        "sigma_1": "$\\sigma_1$",
        "pcdr_1": "PCDR$_1$",
        "max_abs": "largest |y|",
        "excess_kurtosis": "kurtosis",
        "bound": "$\\sigma_1 \\cdot$ largest $\\|x\\|$",
    }
    pairs = list(dict.fromkeys(zip(correlation.x, correlation.y, strict=True)))
    scopes = list(dict.fromkeys(correlation.scope))
    styles = zip(scopes, (COLOURS["AdamW"], COLOURS["S2D"], COLOURS["AdamW, tuned weight decay"]), "oD^", strict=True)
    for index, (scope, colour, marker) in enumerate(styles):
        part = correlation[correlation.scope == scope]
        places = [pairs.index(pair) + 0.2 * (index - 1) for pair in zip(part.x, part.y, strict=True)]
        right.hlines(places, part.low, part.high, color=colour, linewidth=1.5)
        right.scatter(part.correlation, places, color=colour, marker=marker, s=28, label=scope, zorder=2)
    right.axvline(0, color="black", linewidth=0.8, linestyle=":")
    right.set_yticks(range(len(pairs)), [f"{symbols[x]} and {symbols[y]}" for x, y in pairs])
    right.invert_yaxis()
    right.set_xticks([-1, -0.5, 0, 0.5, 1])
    right.set(xlim=(-1.02, 1.02), xlabel="rank correlation, 95 % interval", title="What grows together")
    figure.legend(*right.get_legend_handles_labels(), loc="outside lower right", ncols=len(scopes))
    return figure


def _severity(summary: pd.DataFrame, widths: pd.DataFrame) -> str:
    by_steps = summary.groupby("steps")[["excess_kurtosis", "ffn_sigma_1"]].mean()
    steps = "; ".join(
        f"{n} steps: {row.excess_kurtosis:.1f} and {row.ffn_sigma_1:.1f}" for n, row in by_steps.iterrows()
    )
    by_width = widths.groupby("width")[["excess_kurtosis", "ceiling"]].mean()
    reached = "; ".join(f"{w}: {row.excess_kurtosis:.1f} of {row.ceiling:.0f}" for w, row in by_width.iterrows())
    return (
        f"Mean excess kurtosis and largest singular value of a feed-forward weight, by length of pretraining: {steps}. "
        f"Kurtosis by width, and what one channel can give: {reached}."
    )


@published(tables=["origins_growth_summary", "origins_width"], finding=_severity, paper="abstract, appendix C [2]")
def origins_severity(summary: pd.DataFrame, widths: pd.DataFrame) -> Figure:
    """What grows with the length of pretraining (kurtosis, singular values, points lost), and kurtosis with width.

    Args:
        summary: from :func:`s2d.lab.origins.growth_summary`.
        widths: from :func:`s2d.lab.origins.width_table`.
    """
    figure, axes = plt.subplots(1, 4, figsize=(13, 3.6))
    lengths = sorted(summary.steps.unique())
    for axis, column, label in (
        (axes[0], "excess_kurtosis", "excess kurtosis"),
        (axes[1], "ffn_sigma_1", "largest $\\sigma_1$ of a feed-forward weight"),
    ):
        for _, run in summary.sort_values("steps").groupby("seed"):
            axis.plot(run.steps, run[column], color=COLOURS["AdamW"], alpha=0.35, linewidth=1)
        mean = summary.groupby("steps")[column].mean()
        axis.plot(mean.index, mean, color=COLOURS["AdamW"], marker=MARKERS["AdamW"])
        axis.set(ylabel=label, title="Each seed a thin line" if axis is axes[0] else "")
    low = list(summary.columns[summary.columns.get_loc("FP") + 1 :])
    methods = list(dict.fromkeys(name.rpartition(" ")[0] for name in low))
    widths_of = list(dict.fromkeys(name.rpartition(" ")[2] for name in low))
    colours = dict(zip(methods, (COLOURS["AdamW"], COLOURS["SGD"], COLOURS["S2D"]), strict=False))
    lines = dict(zip(widths_of, ("--", "-", ":"), strict=False))
    for name in low:
        method, _, bits = name.rpartition(" ")
        lost = (100 * (summary.FP - summary[name])).groupby(summary.steps).mean()
        axes[2].plot(lost.index, lost, lines[bits], color=colours[method], marker="o", markersize=4, label=name)
    axes[2].set(ylabel="points lost", title="Cost of rounding, mean")
    for axis in axes[:3]:
        axis.set_xscale("log")
        axis.set_xticks(lengths, [f"{n:g}" for n in lengths])
        axis.xaxis.set_minor_locator(mpl.ticker.NullLocator())
        axis.set(xlabel="optimizer steps (AdamW)")
    sizes = sorted(widths.width.unique())
    for column, label, colour, marker in (
        ("excess_kurtosis", "mean over blocks", COLOURS["AdamW"], "o"),
        ("largest_block", "largest block", COLOURS["S2D"], "D"),
    ):
        axes[3].scatter(
            [sizes.index(w) for w in widths.width], widths[column], color=colour, marker=marker, label=label
        )
    for index, size in enumerate(sizes):
        axes[3].hlines(size - 3, index - 0.35, index + 0.35, color="black", linestyle="--", linewidth=1)
    axes[3].hlines([], 0, 0, color="black", linestyle="--", linewidth=1, label="one channel on all tokens")
    axes[3].set_xticks(range(len(sizes)), [f"width {size}" for size in sizes])
    axes[3].set(xlim=(-0.5, len(sizes) - 0.5), ylim=(0, None), ylabel="excess kurtosis", title="Room for outliers")
    for axis in axes[2:]:
        axis.legend(loc="upper center", bbox_to_anchor=(0.5, -0.2), fontsize="small", ncols=1 if axis is axes[3] else 2)
    return figure
