"""Notebook 22: a real encoder, fine-tuned with every arm and quantized."""

from __future__ import annotations

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from s2d.lab.figures.frontier import arms_on_test
from s2d.lab.figures.registry import published
from s2d.lab.figures.style import forest_panels, legend_below, listed, mean_line
from s2d.lab.frontier import comparisons
from s2d.lab.statistics import paired_interval, points_lost

LOWEST = "W4A4"
SHOWN = [("RTN", LOWEST), ("ERQ", LOWEST)]
"""The weakest and the strongest quantizer."""


def by_quantizer(evidence: pd.DataFrame) -> pd.DataFrame:
    """The table of the evidence in the columns of :func:`s2d.lab.frontier.compare`, every network once.

    Args:
        evidence: ``data/encoder/evidence.csv``; an arm whose search chose the setting of an earlier arm is the same
            networks and is left out.
    """
    first = evidence.groupby("key").variant.transform("first")
    table = evidence[evidence.variant == first].dropna(subset="accuracy").reset_index(drop=True)
    return table.assign(points_lost=points_lost(table, ["variant", "seed"]))


def against_adamw(evidence: pd.DataFrame) -> pd.DataFrame:
    """Every other arm minus AdamW, within seeds, in accuracy and in points lost.

    Args:
        evidence: see :func:`by_quantizer`.
    """
    return comparisons(by_quantizer(evidence), ["AdamW"])


def error_ratios(evidence: pd.DataFrame) -> pd.DataFrame:
    """Every arm's logit error over AdamW's, within seeds: below 1 its logits keep nearer to its own full precision.

    Args:
        evidence: see :func:`by_quantizer`.

    Returns:
        Columns variant, method, bits, ratio (geometric mean over seeds), low, high (95 % interval), seeds.
    """
    low = by_quantizer(evidence).query("method != 'FP'")
    wide = np.log(low.pivot(index=["method", "bits", "seed"], columns="variant", values="logit_error"))
    rows = []
    for variant in [name for name in dict.fromkeys(low.variant) if name != "AdamW"]:
        for method, bits in dict.fromkeys(zip(low.method, low.bits, strict=True)):
            own = wide.loc[method, bits]
            interval = paired_interval((own[variant] - own["AdamW"]).dropna().tolist())
            row = {"variant": variant, "method": method, "bits": bits}
            row |= {name: float(np.exp(getattr(interval, at))) for name, at in _ENDS.items()}
            rows.append(row | {"seeds": interval.n})
    return pd.DataFrame(rows)


_ENDS = {"ratio": "mean", "low": "low", "high": "high"}


def _best(evidence: pd.DataFrame) -> str:
    mean = 100 * by_quantizer(evidence).pivot_table(index="variant", columns=["method", "bits"], values="accuracy")
    parts = [f"{' '.join(cell)} {mean[cell].idxmax()} {mean[cell].max():.1f}" for cell in SHOWN]
    full = mean["FP", "FP"]
    return f"Highest mean test accuracy in full precision: {full.idxmax()} {full.max():.1f}; {'; '.join(parts)}."


@published(tables=["encoder/evidence"], finding=_best, paper="Tables 6, 11 in shape, on a pretrained network")
def encoder_test(evidence: pd.DataFrame) -> Figure:
    """A pretrained sentence encoder after every fine-tuning, test glosses: four bits, and full precision (hollow)."""
    table = by_quantizer(evidence)
    table = table[table.groupby("variant").seed.transform("nunique") == table.seed.nunique()]
    mean = 100 * table.pivot_table(index="variant", columns=["method", "bits"], values="accuracy")
    spread = [f"{mean[cell].max() - mean[cell].min():.0f} under {cell[0]}" for cell in SHOWN]
    title = f"A pretrained encoder: points between the best and the worst fine-tuning at {LOWEST}: {', '.join(spread)}"
    return arms_on_test(table, SHOWN, title)


def _told_apart(evidence: pd.DataFrame) -> str:
    differences = against_adamw(evidence)
    parts = []
    for name in ("S2D", "No PCDR"):
        own = differences[(differences["first"] == name) & (differences.measure == "accuracy")]
        cells = [
            f"{'full precision' if row.method == 'FP' else f'{row.method} {row.bits}'} {row.difference:+.1f} "
            f"[{row.low:+.1f}, {row.high:+.1f}]"
            for row in own.itertuples()
            if (row.method, row.bits) in [("FP", "FP"), *SHOWN]
        ]
        parts.append(f"{name} {'; '.join(cells)}")
    return f"Points of test accuracy against AdamW: {'. '.join(parts)}."


@published(tables=["encoder/evidence"], finding=_told_apart, paper="Tables 6, 11, D in shape, on a pretrained network")
def encoder_differences(evidence: pd.DataFrame) -> Figure:
    """A pretrained encoder, every arm against AdamW: accuracy and points kept; right: better than AdamW."""
    differences = against_adamw(evidence)
    parts = []
    for method, bits in SHOWN:
        own = differences[(differences.method == method) & (differences.bits == bits)]
        own = own[own.measure == "accuracy"]
        parts.append(f"{int((own.low > 0).sum())} more accurate under {method}, {int((own.high < 0).sum())} less")
    title = f"Of {differences['first'].nunique()} arms, against AdamW at {LOWEST}: {'; '.join(parts)}"
    return forest_panels(differences, rows="first", panels=[("FP", "FP"), *SHOWN], claim="better than AdamW", title=title)


def written(layers: pd.DataFrame) -> pd.DataFrame:
    """The FFNs' second layers, which write the residual stream, with the number of their block.

    Args:
        layers: ``data/encoder/layers.csv``.
    """
    own = layers[layers.layer.str.contains(r"\d+\.output\.dense")]
    own = own[own.variant == own.groupby("key").variant.transform("first")]
    return own.assign(block=own.layer.str.extract(r"layer\.(\d+)\.", expand=False).astype(int))


def changed(layers: pd.DataFrame) -> pd.DataFrame:
    """Each arm over AdamW: largest output of a layer that writes the stream, and what the grids of inputs span.

    Args:
        layers: ``data/encoder/layers.csv``.

    Returns:
        Indexed by variant: max_abs and sigma_1 (mean over seeds of the largest of all blocks, over AdamW's),
        input_ratio (geometric mean over all FFN layers and seeds, over AdamW's).
    """
    own = written(layers)
    largest = own.groupby(["variant", "seed"], sort=False)[["max_abs", "sigma_1"]].max().groupby("variant").mean()
    same = layers[layers.variant.isin(own.variant.unique())]
    span = np.exp(np.log(same.input_ratio).groupby(same.variant).mean()).rename("input_ratio")
    table = largest.join(span).loc[list(dict.fromkeys(own.variant))]
    return table / table.loc["AdamW"]


def _falls(layers: pd.DataFrame) -> str:
    ratios = changed(layers).drop("AdamW")
    names = {"max_abs": "Largest FFN output", "sigma_1": "Largest sigma_1", "input_ratio": "Range of inputs over rms"}
    parts = [f"{name}: {listed(ratios[column], '{:.2f}')}" for column, name in names.items()]
    return f"Over AdamW's. {'. '.join(parts)}."


@published(tables=["encoder/layers"], finding=_falls, paper="Table 7 in shape, on a pretrained network")
def encoder_layers(layers: pd.DataFrame) -> Figure:
    """What the layers that write the residual stream put out after each fine-tuning, and what a grid has to span."""
    own = written(layers)
    figure, axes = plt.subplots(1, 2, figsize=(10.5, 4.2))
    labels = {"max_abs": "largest absolute output", "input_ratio": "largest input over root mean square"}
    for axis, (column, label) in zip(axes, labels.items(), strict=True):
        for variant, part in own.groupby("variant", sort=False):
            mean_line(axis, part, "block", column, variant, marker="o", markersize=4)
        axis.set(xlabel="block", ylabel=label, yscale="log")
    ratios = changed(layers)
    lowest = ratios.max_abs.idxmin()
    title = (
        f"{lowest} brings the largest FFN output to {ratios.max_abs[lowest]:.2f} of AdamW's; "
        f"the range of inputs to {ratios.input_ratio[lowest]:.2f}"
    )
    figure.suptitle(title, fontweight="bold", fontsize="large")
    legend_below(figure, axes[0], columns=4)
    return figure
