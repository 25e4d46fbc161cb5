"""Notebook 02: how tight the bound is, and which layers PCDR names."""

from __future__ import annotations

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
