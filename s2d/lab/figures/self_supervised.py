"""Notebook 23: a self-supervised backbone fine-tuned with and without S2D, under the quantizers of Table 8."""

from __future__ import annotations

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.figure import Figure

from s2d.lab.claims import TABLE_7
from s2d.lab.figures.registry import published
from s2d.lab.figures.style import COLOURS, MARKERS, bit_widths, forest_panels, label_ends, mean_line
from s2d.lab.frontier import comparisons
from s2d.lab.paper import load_paper_table
from s2d.lab.self_supervised import BEFORE
from s2d.lab.statistics import points_lost

TABLE_8 = "PTQ4ViT"
"""The quantizer of the paper's Table 8; where it was not run, round-to-nearest stands in for it."""
SHORT = {"S2D, the paper's lam and tau": "S2D, paper's lam, tau"}


def complete_cells(evidence: pd.DataFrame) -> pd.DataFrame:
    """The rows of the quantizers and widths that every network of the table was measured under.

    Args:
        evidence: of :func:`s2d.lab.self_supervised.run`, which may have been interrupted.
    """
    networks = evidence.groupby(["method", "bits"]).key.transform("nunique")
    return evidence[networks == evidence.key.nunique()]


def against_adamw(evidence: pd.DataFrame) -> pd.DataFrame:
    """Every other arm minus AdamW, within seeds, in accuracy and in points lost.

    Args:
        evidence: of :func:`s2d.lab.self_supervised.run`.

    Returns:
        The columns of :func:`s2d.lab.frontier.compare`.
    """
    table = complete_cells(evidence)
    return comparisons(table.assign(points_lost=points_lost(table, ["variant", "seed"])), ["AdamW"])


def fine_tuned_layers(layers: pd.DataFrame, *, only: str = "mlp") -> pd.DataFrame:
    """Table 7 in shape: the statistics of each layer, mean over seeds.

    Args:
        layers: of the table of that name.
        only: part of the names of the layers; Table 7 has those of the FFN.

    Returns:
        Indexed by layer and variant (``BEFORE`` first), columns pcdr_1, max_abs, sigma_1, input_ratio.
    """
    own = layers[layers.layer.str.contains(only, regex=False)]
    return own.groupby(["layer", "variant"], sort=False)[[*TABLE_7, "input_ratio"]].mean()


def quantizer_of_table_8(evidence: pd.DataFrame) -> str:
    """PTQ4ViT if every network was measured under it, else RTN."""
    return TABLE_8 if TABLE_8 in set(complete_cells(evidence).method) else "RTN"


def _table_8(evidence: pd.DataFrame) -> str:
    differences, method = against_adamw(evidence), quantizer_of_table_8(evidence)
    own = differences[(differences["first"] == "S2D") & (differences.measure == "accuracy")]
    cells = [
        f"{row.bits if row.method == 'FP' else f'{row.method} {row.bits}'} {row.difference:+.1f} "
        f"[{row.low:+.1f}, {row.high:+.1f}]"
        for row in own[own.method.isin(["FP", method])].itertuples()
    ]
    reported = load_paper_table(8).pivot(index="bits", columns="variant", values="value")
    gains = ", ".join(
        f"{bits} {reported.S2D[bits] - reported.AdamW[bits]:+.1f}" for bits in own.bits[own.method == method]
    )
    return (
        f"S2D against AdamW on a DINOv2-S, {evidence['items'].iloc[0]} test images, {evidence.seed.nunique()} seeds, "
        f"points: {'; '.join(cells)} (reported for DINOv3-B under {TABLE_8}: {gains})."
    )


@published(tables=["self_supervised/evidence"], finding=_table_8, paper="Table 8 in shape, appendix E")
def self_supervised_table8(evidence: pd.DataFrame) -> Figure:
    """A self-supervised backbone, each arm against AdamW at Table 8's widths, 95 % intervals; right: better."""
    differences, method = against_adamw(evidence).replace({"first": SHORT}), quantizer_of_table_8(evidence)
    own = differences[(differences.method == method) & (differences.measure == "accuracy")]
    better, worse = int((own.low > 0).sum()), int((own.high < 0).sum())
    title = f"Under {method}, of {len(own)} comparisons with AdamW {better} are in S2D's favour, {worse} against it"
    panels = [(method, bits) for bits in own.bits.unique()]
    figure = forest_panels(differences, rows="first", panels=panels, claim="better than AdamW", title=title)
    figure.axes[0].set_ylim(differences["first"].nunique() - 0.5, -0.5)  # one row alone needs room too
    return figure


def _by_quantizer(evidence: pd.DataFrame) -> str:
    evidence = complete_cells(evidence)
    low = bit_widths(evidence)[-1]
    means = 100 * evidence.groupby(["method", "bits", "variant"], sort=False).accuracy.mean()
    parts = [f"{method} {means[method, low, 'AdamW']:.1f}" for method in evidence.method.unique() if method != "FP"]
    text = f"After AdamW {means['FP', 'FP', 'AdamW']:.1f} % are right in full precision, at {low} {', '.join(parts)}."
    if "ERQ" not in set(evidence.method):
        return text
    return f"{text} (On the paper's DINOv3 every configuration of ERQ was near random.)"


@published(tables=["self_supervised/evidence"], finding=_by_quantizer, paper="Table 8 in shape, appendix E")
def self_supervised_quantizers(evidence: pd.DataFrame) -> Figure:
    """Accuracy of the fine-tuned backbone by bit width under each quantizer; bands: lowest to highest seed."""
    evidence = complete_cells(evidence)
    methods = [method for method in evidence.method.unique() if method != "FP"]
    widths = bit_widths(evidence)
    figure, axes = plt.subplots(1, len(methods), figsize=(3.2 * len(methods) + 1, 3.6), sharey=True, squeeze=False)
    for axis, method in zip(axes[0], methods, strict=True):
        for variant, own in evidence[evidence.method.isin(["FP", method])].groupby("variant", sort=False):
            own = own.assign(place=own.bits.map(widths.index), percent=100 * own.accuracy)
            mean_line(axis, own, "place", "percent", variant, marker=MARKERS[variant], markersize=5)
        axis.set_xticks(range(len(widths)), widths)
        axis.set(title=method, xlim=(-0.2, len(widths) - 0.8))
    axes[0, 0].set_ylabel("accuracy (%)")
    last = evidence[(evidence.method == methods[-1]) & (evidence.bits == widths[-1])]
    ends = (100 * last.groupby("variant", sort=False).accuracy.mean()).to_dict()
    axes[0, -1].set_xlim(-0.2, len(widths) - 0.8 + 1.6)
    label_ends(axes[0, -1], ends, len(widths) - 0.8, apart=0.07)
    means = evidence[evidence.variant == "AdamW"].groupby(["method", "bits"]).accuracy.mean()
    lost = {method: 100 * (means["FP", "FP"] - means[method, widths[-1]]) for method in methods}
    said = ", ".join(f"{points:.0f} under {method}" for method, points in lost.items())
    figure.suptitle(f"{widths[-1]} costs points after AdamW: {said}", fontweight="bold", fontsize="large")
    return figure


def _table_7(layers: pd.DataFrame) -> str:
    wide = fine_tuned_layers(layers).unstack("variant")
    parts = []
    for column, (name, _) in TABLE_7.items():
        if column == "pcdr_1":
            values = [f"{wide[column][arm].mean():.2f} {arm}" for arm in (BEFORE, "AdamW", "S2D")]
        else:
            ratio = wide[column]["S2D"] / wide[column]["AdamW"]
            values = [f"{ratio.min():.2f} to {ratio.max():.2f} times AdamW's after S2D"]
        parts.append(f"{name} {', '.join(values)}")
    return f"Over {len(wide)} FFN layers: {'; '.join(parts)}."


@published(tables=["self_supervised/layers"], finding=_table_7, paper="Table 7 in shape, appendix E")
def self_supervised_layers(layers: pd.DataFrame) -> Figure:
    """Every FFN layer after AdamW and after S2D: PCDR_1, largest activation, sigma_1 (mean over seeds)."""
    wide = fine_tuned_layers(layers).unstack("variant")
    figure, axes = plt.subplots(1, len(TABLE_7), figsize=(10, 3.7))
    for axis, (column, (name, _)) in zip(axes, TABLE_7.items(), strict=True):
        for variant in [arm for arm in COLOURS if arm in wide[column] and arm != "AdamW"]:
            axis.scatter(
                wide[column]["AdamW"], wide[column][variant], color=COLOURS[variant], marker=MARKERS[variant],
                s=22, label=SHORT.get(variant, variant),
            )  # fmt: skip
        ends = [wide[column].min().min(), wide[column].max().max()]
        axis.plot(ends, ends, color="black", linewidth=0.8, linestyle=":")
        scale = "log" if column == "max_abs" else "linear"
        axis.set(xscale=scale, yscale=scale, xlabel="after AdamW", title=name.removeprefix("the "))
    axes[0].set_ylabel("after S2D")
    axes[0].legend(loc="upper left", fontsize="small")
    falls = {column: 100 * (1 - wide[column]["S2D"] / wide[column]["AdamW"]) for column in ("sigma_1", "max_abs")}
    sigma, largest = falls["sigma_1"], falls["max_abs"].abs().max()
    figure.suptitle(
        f"S2D lowers sigma_1 in {(sigma > 2).sum()} of {len(wide)} FFN layers, by {sigma.max():.0f} % at most; "
        f"no largest activation moves by more than {largest:.0f} %",
        fontweight="bold",
        fontsize="large",
    )
    return figure
