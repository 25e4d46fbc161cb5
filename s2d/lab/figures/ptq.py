"""Notebook 05: every checkpoint under every method."""

from __future__ import annotations

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.figure import Figure

from s2d.lab.evaluate import with_points_lost
from s2d.lab.figures.registry import published
from s2d.lab.figures.style import COLOURS, MARKERS, bars, bit_widths, label_ends, legend_below, listed


def accuracy_by_bits(ptq: pd.DataFrame) -> Figure:
    """Test accuracy at every bit width, and points of it lost; each seed a small marker, the mean a line.

    Args:
        ptq: columns variant, seed, grid, bits, accuracy; one grid.

    Raises:
        ValueError: for more than one grid, whose accuracies have no common mean.
    """
    grids = list(dict.fromkeys(ptq.grid))
    if len(grids) != 1:
        raise ValueError(f"the table has the grids {', '.join(grids)}: draw one at a time")
    bits = bit_widths(ptq)
    table = with_points_lost(ptq).assign(percent=lambda t: 100 * t.accuracy)
    variants = list(table.variant.unique())
    figure, axes = plt.subplots(1, 2, figsize=(11, 3.8))
    panels = {"percent": ("test accuracy (%)", "Accuracy after rounding"), "points_lost": ("points lost", "Its cost")}
    for axis, (column, (label, title)) in zip(axes, panels.items(), strict=True):
        for index, variant in enumerate(variants):
            # A small sideways shift keeps the seeds of one variant from hiding another's.
            shift = 0.08 * (index - (len(variants) - 1) / 2)
            part = table[table.variant == variant]
            mean = part.groupby("bits")[column].mean()[bits]
            places = [i + shift for i in range(len(bits))]
            axis.plot(places, mean, color=COLOURS[variant], marker=MARKERS[variant], label=variant)
            places = [bits.index(name) + shift for name in part.bits]
            axis.scatter(places, part[column], s=9, color=COLOURS[variant], alpha=0.5)
        axis.set_xticks(range(len(bits)), bits)
        axis.set(xlim=(-0.3, len(bits) + 0.9), ylabel=label, title=title)
        ends = table[table.bits == bits[-1]].groupby("variant", sort=False)[column].mean()
        label_ends(axis, ends, len(bits) - 0.7, apart=0.075)
    lost = table[table.bits == bits[-2]].groupby("variant", sort=False).points_lost.mean()
    title = f"At {bits[-2]} rounding costs {lost.idxmin()} {lost.min():.0f} points, {lost.idxmax()} {lost.max():.0f}"
    figure.suptitle(title, fontweight="bold", fontsize="large")
    figure.supxlabel(f"weights and activations (round-to-nearest, {grids[0]} grid)", fontsize="medium")
    return figure


def _symmetric(ptq: pd.DataFrame) -> pd.DataFrame:
    return ptq[ptq.grid == "symmetric"]


def _accuracy_at_low_bits(ptq: pd.DataFrame) -> str:
    percent = 100 * _symmetric(ptq).groupby(["bits", "variant"], sort=False).accuracy.mean()
    return " ".join(f"Mean test accuracy at {bits}: {listed(percent[bits])}." for bits in bit_widths(ptq)[-2:])


@published(tables=["ptq"], finding=_accuracy_at_low_bits, paper="Table 6 in shape")
def ptq_accuracy(ptq: pd.DataFrame) -> Figure:
    """Test accuracy under round-to-nearest, symmetric grid, at every bit width, for each kind of fine-tuning."""
    return accuracy_by_bits(_symmetric(ptq))


def _s2d_gain_by_method(table: pd.DataFrame) -> str:
    percent = 100 * table.groupby(["bits", "method", "variant"], sort=False).accuracy.mean().unstack("variant")
    gain = percent["S2D"] - percent["AdamW"]
    return " ".join(
        f"S2D against AdamW at {bits}, points: {listed(gain[bits], '{:+.1f}')}." for bits in bit_widths(table)[-2:]
    )


def _method_or_training(quantized: pd.DataFrame, bits: str) -> str:
    """What spans more points: the methods on one network, or the networks under one method."""
    lost = quantized[quantized.bits == bits].groupby(["method", "variant"]).points_lost.mean().unstack()
    fine = lost.drop(columns="SGD", errors="ignore")
    methods, networks = (fine.max() - fine.min()).mean(), (fine.max(axis=1) - fine.min(axis=1)).mean()
    return f"{bits}: {methods:.0f} points between methods on one network, {networks:.0f} between fine-tuned networks"


@published(tables=["ptq_methods"], finding=_s2d_gain_by_method, paper="Tables 6, 8, 11 in shape")
def ptq_methods(table: pd.DataFrame) -> Figure:
    """Every method at the two lowest bit widths: points lost, and the error of the logits; each mark a network.

    Marks are means over seeds and calibration sets, lines reach from the lowest to the highest of them.
    """
    quantized = with_points_lost(table).query("method != 'FP'")
    methods, bits = list(quantized.method.unique()), bit_widths(quantized)[-2:]
    panels = [("points_lost", name, f"points lost, {name}") for name in bits]
    panels.append(("logit_error", bits[-1], f"relative logit error, {bits[-1]}"))
    variants = list(quantized.variant.unique())
    figure, axes = plt.subplots(1, 3, figsize=(11, 0.75 * len(methods) + 1.8), sharey=True)
    for axis, (column, name, title) in zip(axes, panels, strict=True):
        part = quantized[quantized.bits == name]
        for index, variant in enumerate(variants):
            values = part[part.variant == variant].groupby("method", sort=False)[column]
            places = [
                methods.index(method) + 0.15 * (index - (len(variants) - 1) / 2) for method in values.mean().index
            ]
            axis.hlines(places, values.min(), values.max(), color=COLOURS[variant], linewidth=1.2, alpha=0.6)
            style = {"color": COLOURS[variant], "marker": MARKERS[variant], "linestyle": "none"}
            axis.plot(values.mean(), places, label=variant, **style)
        axis.set_title(title)
        axis.grid(axis="x", linewidth=0.3)
    axes[0].set_yticks(range(len(methods)), methods)
    axes[0].invert_yaxis()
    figure.suptitle(_method_or_training(quantized, bits[-1]), fontweight="bold", fontsize="large")
    legend_below(figure, axes[0])
    return figure


def _conditioned(table: pd.DataFrame) -> str:
    percent = 100 * table.groupby(["bits", "conditioning", "variant"], sort=False).accuracy.mean()
    bits = bit_widths(table)[0]
    cells = {f"{variant} ({conditioning})": value for (conditioning, variant), value in percent[bits].items()}
    return f"Mean test accuracy at {bits}, by what was done before rounding: {listed(cells)}."


@published(tables=["ptq_conditioning"], finding=_conditioned, paper="appendix D")
def ptq_conditioning(table: pd.DataFrame) -> Figure:
    """Round-to-nearest after nothing, SmoothQuant and rotations, from each checkpoint; one panel a bit width."""
    bits = bit_widths(table)
    figure, axes = plt.subplots(1, len(bits), figsize=(4.6 * len(bits), 3.6), sharey=True, squeeze=False)
    for axis, name in zip(axes[0], bits, strict=True):
        shown = table[table.bits == name].assign(percent=lambda t: 100 * t.accuracy)
        bars(axis, shown, x="conditioning", y="percent", legend=axis is axes[0, 0])
        axis.set(title=f"{name}, RTN", xlabel="", ylabel="test accuracy (%)")
        axis.tick_params(axis="x", rotation=20)
    legend_below(figure, axes[0, 0])
    return figure


def _qat_gain(table: pd.DataFrame) -> str:
    percent = 100 * table.groupby(["training", "variant"], sort=False).accuracy.mean()
    bits = table[table.training == "QAT"].bits.iloc[0]
    return f"Points that QAT gains over rounding alone at {bits}: {listed(percent['QAT'] - percent['PTQ'], '{:+.1f}')}."


@published(tables=["ptq_qat"], finding=_qat_gain)
def ptq_qat(table: pd.DataFrame) -> Figure:
    """Before and after quantization-aware training: each seed a line from rounding alone to QAT."""
    figure, axis = plt.subplots(figsize=(5.5, 3.4))
    order = ["FP", "PTQ", "QAT"]
    for index, (variant, part) in enumerate(table.groupby("variant", sort=False)):
        wide = 100 * part.pivot(index="seed", columns="training", values="accuracy")[order]
        places = [i + 0.06 * (2 * index - 1) for i in range(len(order))]
        for values in wide.to_numpy():
            axis.plot(places, values, color=COLOURS[variant], alpha=0.35, linewidth=1)
        axis.plot(places, wide.mean(), color=COLOURS[variant], marker=MARKERS[variant], label=f"from {variant}")
    bits = table[table.training == "QAT"].bits.iloc[0]
    axis.set_xticks(range(len(order)), ["full precision", f"{bits}, rounded", f"{bits}, QAT"])
    axis.set(ylabel="test accuracy (%)", title="Quantization-aware training")
    axis.legend()
    return figure
