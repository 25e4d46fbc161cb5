"""Every published figure, drawn from tables alone, one function each."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib as mpl
import matplotlib.pyplot as plt
import pandas as pd
import seaborn as sns
from matplotlib.figure import Figure
from torch import Tensor

from s2d.lab.files import write_atomically
from s2d.lab.paths import output_root
from s2d.lab.results import load_sources
from s2d.ptq.quantizers import Quantizer

# One colour a variant, in every figure; distinguishable with colour-blind eyes and in print.
COLOURS = {
    "SGD": "#7a7a7a",
    "AdamW": "#d1495b",
    "AdamW, tuned weight decay": "#edae49",
    "S2D": "#00798c",
    "No PCDR": "#8d6cab",
    "Top 3 of every layer": "#2e4057",
}
MARKERS = {
    "SGD": "s",
    "AdamW": "o",
    "AdamW, tuned weight decay": "^",
    "S2D": "D",
    "No PCDR": "v",
    "Top 3 of every layer": "P",
}
BIT_ORDER = ["FP", "W8A8", "W6A6", "W5A5", "W4A4", "W3A3"]


def use_style() -> None:
    """The house style; fixed salt and embedded text so that an SVG has the same bytes every time."""
    sns.set_theme(context="notebook", style="ticks", font_scale=0.9)
    mpl.rcParams.update(
        {
            "svg.hashsalt": "s2d",
            "svg.fonttype": "none",
            "font.family": "sans-serif",
            "font.sans-serif": ["DejaVu Sans"],
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.titlesize": "medium",
            "axes.titleweight": "bold",
            "axes.titlelocation": "left",
            "legend.frameon": False,
            "figure.dpi": 100,
            "savefig.dpi": 150,
            "savefig.bbox": "tight",
            "figure.constrained_layout.use": True,
        }
    )


def save_figure(figure: Figure, name: str, *, run: str, tables: Sequence[str]) -> list[Path]:
    """Write ``figures/<run>/<name>.svg`` and ``.png``, the provenance of their tables in the file's own metadata.

    Args:
        figure: left open, so that a notebook shows it.
        name: file stem.
        run: output label, usually the scale.
        tables: the tables it was drawn from.

    Returns:
        The two paths.
    """
    description = json.dumps(load_sources(tables, run=run), sort_keys=True)
    # Date and Software would differ between runs and releases without the picture changing.
    metadata = {
        "svg": {"Date": None, "Description": description},
        "png": {"Software": None, "Description": description},
    }
    paths = []
    for suffix, entries in metadata.items():
        path = output_root() / "figures" / run / f"{name}.{suffix}"
        write_atomically(path, lambda temporary, entries=entries: figure.savefig(temporary, metadata=entries))
        paths.append(path)
    return paths


def sample_digits(images, labels, columns: int = 8) -> Figure:
    """A strip of images with their labels: what the network is asked."""
    figure, axes = plt.subplots(1, columns, figsize=(1.1 * columns, 1.4))
    for axis, image, label in zip(axes, images, labels, strict=False):
        axis.imshow(image[0], cmap="gray_r", interpolation="nearest")
        axis.set_title(str(int(label)), loc="center")
        axis.set_axis_off()
    return figure


def _short(layers) -> list[str]:
    """Layer names for an axis: ``blocks.0.mlp.fc1`` as ``0.mlp.fc1``."""
    return [name.removeprefix("blocks.") for name in layers]


def _legend_below(figure: Figure, axis) -> None:
    """Move the legend of one panel under all of them, where it takes no panel's room."""
    handles, labels = axis.get_legend_handles_labels()
    axis.get_legend().remove()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels))


def _mean_line(axis, table: pd.DataFrame, x: str, y: str, variant: str, **style) -> None:
    """Mean over seeds as a line, the range over seeds as a band."""
    groups = table.groupby(x)[y]
    mean, low, high = groups.mean(), groups.min(), groups.max()
    axis.plot(mean.index, mean, color=COLOURS[variant], label=variant, **style)
    axis.fill_between(mean.index, low, high, color=COLOURS[variant], alpha=0.18, linewidth=0)


def origins_kurtosis(history: pd.DataFrame) -> Figure:
    """Excess kurtosis over training, and against the validation accuracy reached: AdamW and SGD."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.4), sharey=True)
    for variant, table in history.groupby("variant", sort=False):
        _mean_line(left, table, "step", "excess_kurtosis", variant)
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


def accuracy_by_bits(ptq: pd.DataFrame, bits: list[str] | None = None) -> Figure:
    """Test accuracy at every bit width; each seed a small marker, the mean a line."""
    bits = [b for b in BIT_ORDER if b in set(ptq.bits)] if bits is None else bits
    figure, axis = plt.subplots(figsize=(7.5, 3.8))
    variants = list(ptq.variant.unique())
    for index, variant in enumerate(variants):
        table = ptq[ptq.variant == variant]
        # A small sideways shift keeps the seeds of one variant from hiding another's.
        shift = 0.08 * (index - (len(variants) - 1) / 2)
        mean = table.groupby("bits").accuracy.mean()
        axis.plot(
            [i + shift for i in range(len(bits))],
            [100 * mean[b] for b in bits],
            color=COLOURS[variant],
            marker=MARKERS[variant],
            label=variant,
        )
        for i, b in enumerate(bits):
            values = 100 * table[table.bits == b].accuracy
            axis.scatter([i + shift] * len(values), values, s=9, color=COLOURS[variant], alpha=0.5)
    axis.set_xticks(range(len(bits)), bits)
    axis.set(xlabel="weights and activations (RTN)", ylabel="test accuracy (%)", title="Accuracy after quantization")
    axis.legend()
    return figure


def grid_on_histogram(values: Tensor, quantizers: Mapping[str, Quantizer]) -> Figure:
    """What a quantizer does, seen: the histogram of some values, and under it the points of each calibrated grid.

    Args:
        values: any shape.
        quantizers: title to a calibrated quantizer; the points are those that the values go to.

    Returns:
        One panel a quantizer, with the root mean squared error in the title.
    """
    flat = values.flatten()
    figure, axes = plt.subplots(1, len(quantizers), figsize=(3.6 * len(quantizers), 2.9), sharey=True)
    for axis, (title, quantizer) in zip(axes, quantizers.items(), strict=True):
        rounded = quantizer(flat)
        axis.hist(flat.numpy(), bins=120, color=COLOURS["SGD"], log=True, histtype="stepfilled")
        for point in rounded.unique().tolist():
            axis.axvline(point, ymax=0.12, color=COLOURS["AdamW"], linewidth=1.2)
        error = (rounded - flat).square().mean().sqrt().item()
        axis.set(title=f"{title}\nerror {error:.3f}", xlabel="activation")
    axes[0].set(ylabel="entries")
    return figure


def methods_by_bits(table: pd.DataFrame) -> Figure:
    """Every method at every bit width: accuracy above, relative logit error below, one column a method.

    Lines are means over seeds and calibration sets, bands reach from the lowest to the highest of them.
    """
    quantized = table[table.method != "FP"]
    methods, bits = list(quantized.method.unique()), [b for b in BIT_ORDER if b in set(quantized.bits)]
    figure, axes = plt.subplots(2, len(methods), figsize=(2.9 * len(methods), 5.4), sharex=True, sharey="row")
    for column, method in enumerate(methods):
        rows = quantized[quantized.method == method].assign(
            position=lambda t: t.bits.map(bits.index), percent=lambda t: 100 * t.accuracy
        )
        for variant, part in rows.groupby("variant", sort=False):
            for axis, value in ((axes[0, column], "percent"), (axes[1, column], "logit_error")):
                _mean_line(axis, part, "position", value, variant, marker=MARKERS[variant], markersize=4)
        axes[0, column].set(title=method)
        axes[1, column].set_yscale("log")
        axes[1, column].set_xticks(range(len(bits)), bits, rotation=45)
    axes[0, 0].set(ylabel="test accuracy (%)")
    axes[1, 0].set(ylabel="relative logit error")
    axes[0, 0].legend()
    _legend_below(figure, axes[0, 0])
    return figure


def conditioning_bars(table: pd.DataFrame) -> Figure:
    """Round-to-nearest after nothing, SmoothQuant and rotations, from each checkpoint; one panel a bit width."""
    bits = [b for b in BIT_ORDER if b in set(table.bits)]
    figure, axes = plt.subplots(1, len(bits), figsize=(4.6 * len(bits), 3.6), sharey=True, squeeze=False)
    for axis, name in zip(axes[0], bits, strict=True):
        sns.barplot(
            table[table.bits == name].assign(percent=lambda t: 100 * t.accuracy),
            x="conditioning",
            y="percent",
            hue="variant",
            palette=COLOURS,
            errorbar=lambda x: (x.min(), x.max()),
            err_kws={"linewidth": 1},
            legend=axis is axes[0, 0],
            ax=axis,
        )
        axis.set(title=f"{name}, RTN", xlabel="", ylabel="test accuracy (%)")
        axis.tick_params(axis="x", rotation=20)
    _legend_below(figure, axes[0, 0])
    return figure


def qat_points(table: pd.DataFrame) -> Figure:
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


def bound_tightness(bound: pd.DataFrame) -> Figure:
    """How close each layer comes to its bound: largest gain over certified spectral norm, one point a seed."""
    figure, axis = plt.subplots(figsize=(8, 3.6))
    layers = list(dict.fromkeys(bound.layer))
    for variant, table in bound.groupby("variant", sort=False):
        positions = [layers.index(layer) for layer in table.layer]
        axis.scatter(positions, table.tightness, color=COLOURS[variant], marker=MARKERS[variant], s=24, label=variant)
    axis.axhline(1.0, color="black", linewidth=1, linestyle="--")
    axis.text(len(layers) - 0.6, 1.0, "the bound", va="bottom", ha="right")
    axis.set_xticks(range(len(layers)), _short(layers), rotation=60, ha="right")
    axis.set(ylim=(0, 1.12), ylabel="largest gain / certified $\\sigma_1$", title="Theorem 1, layer by layer")
    axis.legend(loc="lower left", ncols=2)
    return figure


def pcdr_layers(layers: pd.DataFrame, taus: tuple[float, ...] = (0.95, 0.6)) -> Figure:
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
    axis.set_xticks(range(len(mean)), _short(mean.index), rotation=60, ha="right")
    axis.set(ylabel="PCDR$_3$", title="Which layers make their outliers with three components")
    figure.legend(loc="outside lower center", ncols=2)
    return figure


def finetuning_spectra(spectra: pd.DataFrame, layers: list[str]) -> Figure:
    """Singular values of a few layers after each kind of fine-tuning, mean over seeds."""
    figure, axes = plt.subplots(1, len(layers), figsize=(3.1 * len(layers), 3.2), sharey=True)
    for axis, layer in zip(axes, layers, strict=True):
        for variant, table in spectra[spectra.layer == layer].groupby("variant", sort=False):
            _mean_line(axis, table, "index", "sigma", variant)
        axis.set(xlabel="index", title=layer, xscale="log")
    axes[0].set(ylabel="singular value")
    axes[0].legend()
    _legend_below(figure, axes[0])
    return figure


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
        axis.set_xticks(range(ffn.layer.nunique()), _short(ffn.layer.unique()), rotation=60, ha="right")
    axes[1].set_yscale("log")
    _legend_below(figure, axes[0])
    return figure


def measured_and_reported(ptq: pd.DataFrame, reported: pd.DataFrame) -> Figure:
    """Table 6 beside ours: what PCDR buys, on the paper's model and on the laptop's.

    Args:
        ptq: our table, several variants and bit widths.
        reported: the paper's, columns variant, bits, value (%).
    """
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.6), sharey=True)
    order = ["AdamW", "No PCDR", "S2D"]
    sns.barplot(reported, x="bits", y="value", hue="variant", hue_order=order, palette=COLOURS, errorbar=None, ax=left)
    ours = ptq[ptq.variant.isin(order) & (ptq.bits != "FP")].assign(value=lambda t: 100 * t.accuracy)
    ours = ours.assign(bits=pd.Categorical(ours.bits, [b for b in BIT_ORDER if b in set(ours.bits)], ordered=True))
    sns.barplot(
        ours,
        x="bits",
        y="value",
        hue="variant",
        hue_order=order,
        palette=COLOURS,
        errorbar=lambda x: (x.min(), x.max()),
        err_kws={"linewidth": 1},
        legend=False,
        ax=right,
    )
    left.set(title="Reported: SigLIP2-B, ImageNet, ERQ", xlabel="", ylabel="accuracy (%)")
    right.set(title="Measured: laptop ViT, cluttered digits, RTN", xlabel="")
    _legend_below(figure, left)
    return figure
