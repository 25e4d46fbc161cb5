"""Notebook 03: how tight the bound is, and which layers PCDR names."""

from __future__ import annotations

import matplotlib as mpl
import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.figure import Figure

from s2d.lab.figures.registry import published
from s2d.lab.figures.style import COLOURS, MARKERS, listed, short_names


def _violations(bound: pd.DataFrame) -> str:
    layer = bound.layer[bound.tightness.idxmax()]
    return (
        f"Of {len(bound)} layers {(~bound.holds.astype(bool)).sum()} exceed the bound; "
        f"the closest, {layer}, reaches {bound.tightness.max():.3f} of it."
    )


@published(tables=["bound"], finding=_violations, paper="Theorem 1 (A.1)")
def bound_tightness(bound: pd.DataFrame) -> Figure:
    """How close each layer comes to its bound: largest gain over certified spectral norm, one point a seed."""
    figure, axis = plt.subplots(figsize=(8, 3.6))
    layers = list(dict.fromkeys(bound.layer))
    for variant, table in bound.groupby("variant", sort=False):
        positions = [layers.index(layer) for layer in table.layer]
        axis.scatter(positions, table.tightness, color=COLOURS[variant], marker=MARKERS[variant], s=24, label=variant)
    axis.axhline(1.0, color="black", linewidth=1, linestyle="--")
    axis.text(len(layers) - 0.6, 1.0, "the bound", va="bottom", ha="right")
    axis.set_xticks(range(len(layers)), short_names(layers), rotation=60, ha="right")
    axis.set(ylim=(0, 1.12), ylabel="largest gain / certified $\\sigma_1$", title="Theorem 1, layer by layer")
    axis.legend(loc="lower left", ncols=2)
    return figure


TAUS = (0.95, 0.6)  # the paper's threshold, and the laptop's


def _selected(layers: pd.DataFrame) -> str:
    adamw = layers[layers.variant == "AdamW"]
    forms = {"activation": "", "spectral": "spectral_"}
    counts = {
        f"{form} form, tau {tau}:": (adamw[[f"{prefix}pcdr_{k}" for k in (1, 2, 3)]] >= tau).any(axis=1).sum()
        for tau in TAUS
        for form, prefix in forms.items()
    }
    return f"Layers selected by up to three components, of {len(adamw)} over all seeds: {listed(counts, '{:d}')}."


@published(tables=["pcdr_layers"], finding=_selected, paper="Algorithm 1 line 9, Table 7")
def pcdr_layers(layers: pd.DataFrame, taus: tuple[float, ...] = TAUS) -> Figure:
    """Both forms of PCDR_3 for every layer of the AdamW checkpoints, with thresholds."""
    table = layers[layers.variant == "AdamW"].groupby("layer", sort=False)[["pcdr_3", "spectral_pcdr_3"]]
    mean, low, high = table.mean(), table.min(), table.max()
    figure, axis = plt.subplots(figsize=(8, 3.6))
    for shift, (column, colour, label) in zip(
        (-0.2, 0.2),
        (
            ("pcdr_3", COLOURS["AdamW"], "activation form, at the outliers"),
            ("spectral_pcdr_3", COLOURS["SGD"], "spectral form, of the weight"),
        ),
        strict=True,
    ):
        positions = [i + shift for i in range(len(mean))]
        spread = [mean[column] - low[column], high[column] - mean[column]]
        axis.bar(positions, mean[column], 0.38, yerr=spread, color=colour, label=label, error_kw={"linewidth": 1})
    for tau in taus:
        axis.axhline(tau, color="black", linewidth=0.8, linestyle=":")
        axis.text(len(mean) - 0.4, tau, f"$\\tau$ = {tau}", va="bottom", ha="right", fontsize="small")
    axis.set_xticks(range(len(mean)), short_names(mean.index), rotation=60, ha="right")
    axis.set(ylabel="PCDR$_3$", title="Which layers make their outliers with three components")
    figure.legend(loc="outside lower center", ncols=2)
    return figure


def _within_and_pooled(layers: pd.DataFrame, correlation: pd.DataFrame) -> str:
    pair = correlation[(correlation.x == "sigma_1") & (correlation.y == "max_abs")]
    cells = [
        f"{row.correlation:+.2f} [{row.low:+.2f}, {row.high:+.2f}] {row.variant}, {row.scope}"
        for row in pair.itertuples()
    ]
    return f"Rank correlation of a layer's largest singular value and largest activation: {'; '.join(cells)}."


@published(tables=["pcdr_layers", "pcdr_correlation"], finding=_within_and_pooled, paper="Theorem 1")
def pcdr_correlation(layers: pd.DataFrame, correlation: pd.DataFrame) -> Figure:
    """Largest activation against largest singular value, one point a layer; correlations within networks and pooled.

    Args:
        layers: one row a variant, seed and layer.
        correlation: from :func:`s2d.lab.origins.layer_correlation_table`.
    """
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 3.8))
    for variant, part in layers.groupby("variant", sort=False):
        style = {"color": COLOURS[variant], "marker": MARKERS[variant], "alpha": 0.7, "label": variant}
        left.scatter(part.sigma_1, part.max_abs, s=22, **style)
    left.set(xscale="log", yscale="log", xlabel="largest singular value", ylabel="largest |activation|")
    for axis in (left.xaxis, left.yaxis):
        axis.set_major_locator(mpl.ticker.LogLocator(subs=(1, 2, 5)))
        axis.set_major_formatter("{x:g}")
        axis.set_minor_locator(mpl.ticker.NullLocator())
    left.set(title="One point a layer and seed")
    left.legend()
    symbols = {"sigma_1": "$\\sigma_1$", "pcdr_1": "PCDR$_1$", "spectral_pcdr_1": "spectral PCDR$_1$"}
    pairs = list(dict.fromkeys(correlation.x))
    kinds = list(dict.fromkeys(zip(correlation.variant, correlation.scope, strict=True)))
    for index, (variant, scope) in enumerate(kinds):
        part = correlation[(correlation.variant == variant) & (correlation.scope == scope)]
        places = [pairs.index(x) + 0.12 * (index - (len(kinds) - 1) / 2) for x in part.x]
        colour = COLOURS.get(variant, "black")
        pooled = scope == "all together"
        right.hlines(places, part.low, part.high, color=colour, linewidth=1.5, linestyle=":" if pooled else "-")
        face = "white" if pooled else colour
        style = {"marker": MARKERS.get(variant, "D"), "facecolor": face, "edgecolor": colour, "zorder": 2}
        right.scatter(part.correlation, places, s=28, label=f"{variant}, {scope}", **style)
    right.axvline(0, color="black", linewidth=0.8, linestyle=":")
    right.set_yticks(range(len(pairs)), [f"{symbols[x]} and largest |y|" for x in pairs])
    right.invert_yaxis()
    right.set(xlim=(-1.02, 1.02), xlabel="rank correlation, 95 % interval", title="Within networks, and pooled")
    figure.legend(*right.get_legend_handles_labels(), loc="outside lower center", ncols=2)
    return figure
