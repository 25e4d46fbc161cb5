"""Notebook 04: spectra and layers after each kind of fine-tuning."""

from __future__ import annotations

import matplotlib as mpl
import matplotlib.pyplot as plt
import pandas as pd
import seaborn as sns
from matplotlib.figure import Figure

from s2d.lab.figures.registry import published
from s2d.lab.figures.style import COLOURS, MARKERS, legend_below, listed, mean_line, short_names


def _largest(spectra: pd.DataFrame) -> str:
    largest = spectra[spectra["index"] == 1].groupby("variant", sort=False).sigma.mean()
    return f"Mean largest singular value over all layers: {listed(largest)}."


@published(tables=["finetuning_spectra"], finding=_largest, paper="Algorithm 1")
def finetuning_spectra(spectra: pd.DataFrame) -> Figure:
    """Singular values of the first layers of three MLPs after each kind of fine-tuning, mean over seeds."""
    layers = [name for name in spectra.layer.unique() if name.endswith("mlp.fc1")][:3]
    figure, axes = plt.subplots(1, len(layers), figsize=(3.1 * len(layers), 3.2), sharey=True)
    for axis, layer in zip(axes, layers, strict=True):
        for variant, table in spectra[spectra.layer == layer].groupby("variant", sort=False):
            mean_line(axis, table, "index", "sigma", variant)
        axis.set(xlabel="index", title=layer, xscale="log")
    axes[0].set(ylabel="singular value")
    axes[0].legend()
    legend_below(figure, axes[0])
    return figure


def _fell(layers: pd.DataFrame) -> str:
    values = ["pcdr_1", "max_abs", "sigma_1"]
    ffn = layers[layers.layer.str.contains("mlp")]
    pairs = ffn.pivot(index=["seed", "layer"], columns="variant", values=values)
    share = {name: 100 * (pairs[name]["S2D"] < pairs[name]["AdamW"]).mean() for name in values}
    return (
        f"Per cent of the feed-forward layers, over all seeds, in which S2D is below AdamW: {listed(share, '{:.0f}')}."
    )


@published(tables=["finetuning_layers"], finding=_fell, paper="Table 7")
def finetuning_layers(layers: pd.DataFrame) -> Figure:
    """Table 7 in shape: PCDR_1, largest activation and largest singular value of the FFN layers, by variant."""
    ffn = layers[layers.layer.str.contains("mlp")]
    columns = {"pcdr_1": "PCDR$_1$", "max_abs": "largest |activation|", "sigma_1": "largest singular value"}
    figure, axes = plt.subplots(1, 3, figsize=(11, 3.8))
    for axis, (column, label) in zip(axes, columns.items(), strict=True):
        sns.pointplot(
            ffn,
            x="layer",
            y=column,
            hue="variant",
            palette=COLOURS,
            markers=[MARKERS[v] for v in ffn.variant.unique()],
            linestyle="none",
            dodge=0.5,
            errorbar=lambda x: (x.min(), x.max()),
            err_kws={"linewidth": 1},
            markersize=5,
            ax=axis,
            legend=axis is axes[0],
        )
        axis.set(xlabel="", ylabel="", title=label)
        axis.set_xticks(range(ffn.layer.nunique()), short_names(ffn.layer.unique()), rotation=60, ha="right")
    axes[1].set_yscale("log")
    axes[1].yaxis.set_major_locator(mpl.ticker.LogLocator(subs=(1, 2, 5)))
    axes[1].yaxis.set_major_formatter("{x:g}")
    axes[1].yaxis.set_minor_locator(mpl.ticker.NullLocator())
    legend_below(figure, axes[0])
    return figure
