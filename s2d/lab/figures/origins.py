"""Notebook 01: AdamW's outliers beside SGD's."""

from __future__ import annotations

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.figure import Figure

from s2d.lab.figures.registry import published
from s2d.lab.figures.style import COLOURS, MARKERS, bars, bit_widths, legend_below, listed, mean_line


def sample_digits(images, labels, columns: int = 8) -> Figure:
    """A strip of images with their labels: what the network is asked."""
    figure, axes = plt.subplots(1, columns, figsize=(1.1 * columns, 1.4))
    for axis, image, label in zip(axes, images, labels, strict=False):
        axis.imshow(image[0], cmap="gray_r", interpolation="nearest")
        axis.set_title(str(int(label)), loc="center")
        axis.set_axis_off()
    return figure


def _kurtosis_at_the_end(history: pd.DataFrame) -> str:
    last = history.loc[history.groupby(["variant", "seed"]).step.idxmax()]
    kurtosis = last.groupby("variant", sort=False).excess_kurtosis.mean()
    return f"Mean excess kurtosis of the residual stream at the end of training: {listed(kurtosis)}."


@published(tables=["origins_history"], finding=_kurtosis_at_the_end, paper="appendix C")
def origins_kurtosis(history: pd.DataFrame) -> Figure:
    """Excess kurtosis over training, and against the validation accuracy reached, by optimizer."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.4), sharey=True)
    for variant, table in history.groupby("variant", sort=False):
        mean_line(left, table, "step", "excess_kurtosis", variant)
        right.scatter(
            table.validation_accuracy,
            table.excess_kurtosis,
            s=18,
            alpha=0.8,
            color=COLOURS[variant],
            marker=MARKERS[variant],
            label=variant,
        )
    left.set(xlabel="optimizer step", ylabel="excess kurtosis of the residual stream", title="Over training")
    right.set(xlabel="validation accuracy", title="At equal accuracy")
    right.legend()
    return figure


def _share_far_out(histogram: pd.DataFrame) -> str:
    far = histogram[(histogram.low >= 5) | (histogram.high <= -5)].groupby("variant")["count"].sum()
    share = 100 * far / histogram.groupby("variant", sort=False)["count"].sum()
    return f"Per cent of the entries that lie beyond five standard deviations: {listed(share, '{:.2f}')}."


@published(tables=["origins_histogram"], finding=_share_far_out, paper="appendix C")
def origins_histogram(histogram: pd.DataFrame) -> Figure:
    """How far the activations of the last block reach, in standard deviations."""
    figure, axis = plt.subplots(figsize=(6.5, 3.2))
    for variant, table in histogram.groupby("variant", sort=False):
        share = table["count"] / table["count"].sum()
        axis.stairs(share, [*table.low, table.high.iloc[-1]], color=COLOURS[variant], label=variant, linewidth=1.6)
    axis.set_yscale("log")
    axis.set(xlabel="activation, in standard deviations", ylabel="share of entries", title="Output of the last block")
    axis.legend()
    return figure


def _cost_at_low_bits(cost: pd.DataFrame) -> str:
    full = 100 * cost[cost.method == "FP"].groupby("variant", sort=False).accuracy.mean()
    lost = cost[cost.method != "FP"].groupby(["bits", "method", "variant"], sort=False).points_lost.mean()
    lowest = lost[bit_widths(cost)[-1]]
    cells = "; ".join(f"{method}: {listed(lowest[method])}" for method in lowest.index.unique("method"))
    return f"Test accuracy in full precision: {listed(full)}. Points of it lost at {bit_widths(cost)[-1]}: {cells}."


@published(tables=["origins_cost"], finding=_cost_at_low_bits, paper="appendix C")
def origins_cost(cost: pd.DataFrame) -> Figure:
    """Accuracy, and points of it lost to quantization, by optimizer and quantizer; one column a bit width.

    Args:
        cost: from :func:`s2d.lab.frontier.frontier_table`.
    """
    low = [name for name in bit_widths(cost) if name != "FP"]
    figure, axes = plt.subplots(2, len(low), figsize=(5 * len(low), 6), sharex=True, sharey="row", squeeze=False)
    for column, name in zip(axes.T, low, strict=True):
        part = cost[(cost.bits == name) | (cost.method == "FP")].assign(percent=lambda t: 100 * t.accuracy)
        quantized = part[part.method != "FP"]
        order = list(dict.fromkeys(part.method))
        bars(column[0], part, x="method", y="percent", order=order, legend=column[0] is axes[0, 0])
        bars(column[1], quantized, x="method", y="points_lost", order=order, legend=False)
        column[0].set(title=name, xlabel="", ylabel="test accuracy (%)")
        column[1].set(xlabel="", ylabel="points lost")
        column[1].axhline(0, color="black", linewidth=0.8)
        column[1].tick_params(axis="x", rotation=20)
    legend_below(figure, axes[0, 0])
    return figure
