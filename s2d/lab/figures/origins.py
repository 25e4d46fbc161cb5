"""Notebook 01: AdamW's outliers beside SGD's."""

from __future__ import annotations

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.figure import Figure

from s2d.lab.figures.registry import published
from s2d.lab.figures.style import COLOURS, MARKERS, listed, mean_line


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
    """Excess kurtosis over training, and against the validation accuracy reached: AdamW and SGD."""
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
