"""Notebook 05: every checkpoint under every method."""

from __future__ import annotations

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.figure import Figure

from s2d.lab.evaluate import with_points_lost
from s2d.lab.figures.registry import published
from s2d.lab.figures.style import COLOURS, MARKERS, bars, bit_widths, legend_below, listed, mean_line


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
        axis.set(xlabel=f"weights and activations (RTN, {grids[0]} grid)", ylabel=label, title=title)
    axes[0].legend()
    legend_below(figure, axes[0])
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


@published(tables=["ptq_methods"], finding=_s2d_gain_by_method, paper="Tables 6, 8, 11 in shape")
def ptq_methods(table: pd.DataFrame) -> Figure:
    """Every method at every bit width: accuracy, points of it lost, relative logit error; one column a method.

    Lines are means over seeds and calibration sets, bands reach from the lowest to the highest of them.
    """
    quantized = with_points_lost(table).query("method != 'FP'")
    methods, bits = list(quantized.method.unique()), bit_widths(quantized)
    labels = {"percent": "test accuracy (%)", "points_lost": "points lost", "logit_error": "relative logit error"}
    figure, axes = plt.subplots(3, len(methods), figsize=(2.9 * len(methods), 7.4), sharex=True, sharey="row")
    for column, method in enumerate(methods):
        rows = quantized[quantized.method == method].assign(
            position=lambda t: t.bits.map(bits.index), percent=lambda t: 100 * t.accuracy
        )
        for variant, part in rows.groupby("variant", sort=False):
            for axis, value in zip(axes[:, column], labels, strict=True):
                mean_line(axis, part, "position", value, variant, marker=MARKERS[variant], markersize=4)
        axes[0, column].set(title=method)
        axes[2, column].set_yscale("log")
        axes[2, column].set_xticks(range(len(bits)), bits, rotation=45)
    for axis, label in zip(axes[:, 0], labels.values(), strict=True):
        axis.set(ylabel=label)
    axes[0, 0].legend()
    legend_below(figure, axes[0, 0])
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
