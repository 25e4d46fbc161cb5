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

from s2d.files import write_atomically
from s2d.lab.pareto import pareto_front
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
    "AdamW, lr 2e-3": "#f4a6b0",
    "AdamW, rotated basis": "#56b4e9",
    "AdamW, eps 1e-3": "#cc79a7",
    "AdamW, eps 1e-2": "#9c3587",
    "AdamW, beta2 0.9": "#e69f00",
    "Muon": "#6a994e",
    "Decoupled spectral decay": "#007a3d",
    "L2 on every component": "#b5838d",
    "S2D, tuned weight decay": "#7fc8d4",
    "Spectral-norm cap": "#5c6b73",
    "Gradient clipping": "#bc8034",
}
MARKERS = {
    "SGD": "s",
    "AdamW": "o",
    "AdamW, tuned weight decay": "^",
    "S2D": "D",
    "No PCDR": "v",
    "Top 3 of every layer": "P",
    "AdamW, lr 2e-3": "8",
    "AdamW, rotated basis": "X",
    "AdamW, eps 1e-3": "<",
    "AdamW, eps 1e-2": ">",
    "AdamW, beta2 0.9": "h",
    "Muon": "p",
    "Decoupled spectral decay": "*",
    "L2 on every component": "X",
    "S2D, tuned weight decay": "D",
    "Spectral-norm cap": "s",
    "Gradient clipping": "h",
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
    right.set(title="Measured: laptop ViT, cluttered digits, ERQ", xlabel="")
    _legend_below(figure, left)
    return figure


def origins_interventions(matched: pd.DataFrame, ptq: pd.DataFrame) -> Figure:
    """Every optimizer a row: kurtosis at equal accuracy and at the end, accuracy before and after rounding.

    Args:
        matched: columns variant, moment ("matched" or "end"), excess_kurtosis.
        ptq: columns variant, bits ("FP" and one more), accuracy.
    """
    variants = list(matched.variant.unique())
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 0.36 * len(variants) + 1.7), sharey=True)
    widths = [b for b in BIT_ORDER if b in set(ptq.bits)]
    series = [
        (left, matched[matched.moment == "end"], "excess_kurtosis", 1, "s", "end of training"),
        (left, matched[matched.moment == "matched"], "excess_kurtosis", 1, "o", "at equal validation accuracy"),
        *((right, ptq[ptq.bits == b], "accuracy", 100, m, b) for b, m in zip(widths, "so", strict=True)),
    ]
    colours = {"s": COLOURS["SGD"], "o": COLOURS["AdamW"]}
    for axis, table, column, scale, marker, label in series:
        shift = 0.14 if marker == "o" else -0.14
        places = [variants.index(v) + shift for v in table.variant]
        axis.scatter(scale * table[column], places, s=10, color=colours[marker], alpha=0.45)
        mean = scale * table.groupby("variant")[column].mean()[variants]
        rows = [i + shift for i in range(len(variants))]
        axis.scatter(mean, rows, s=40, color=colours[marker], marker=marker, label=label)
    left.set_yticks(range(len(variants)), variants)
    left.invert_yaxis()
    left.set_xscale("symlog", linthresh=1)
    left.xaxis.set_major_formatter("{x:g}")
    left.set_xlim(right=2 * max(1, matched.excess_kurtosis.max()))
    left.set(xlabel="excess kurtosis of the residual stream", title="Outliers")
    right.set(xlabel="test accuracy (%)", title=f"Full precision and {widths[-1]} (RTN)")
    for axis in (left, right):
        axis.grid(axis="y", alpha=0.4)
        axis.legend(loc="upper center", bbox_to_anchor=(0.5, -0.17), ncols=2)
    return figure


def origins_doses(doses: pd.DataFrame) -> Figure:
    """Kurtosis against how adaptive AdamW is: more ``eps``, more or less ``beta2``; each seed a small marker."""
    labels = {"eps": "eps (larger: less adaptive)", "beta2": "beta2 (smaller: less adaptive, says [7])"}
    figure, axes = plt.subplots(1, 2, figsize=(8.5, 3.4), sharey=True)
    styles = {"end": ("--", "s", COLOURS["SGD"]), "matched": ("-", "o", COLOURS["AdamW"])}
    names = {"end": "end of training", "matched": "at equal validation accuracy"}
    for axis, (knob, label) in zip(axes, labels.items(), strict=True):
        table = doses[doses.knob == knob]
        ticks = sorted(table.dose.unique())
        for moment, (line, marker, colour) in styles.items():
            part = table[table.moment == moment]
            mean = part.groupby("dose").excess_kurtosis.mean()
            axis.plot(range(len(ticks)), mean, line, marker=marker, color=colour, label=names[moment])
            axis.scatter([ticks.index(d) for d in part.dose], part.excess_kurtosis, s=10, color=colour, alpha=0.5)
        axis.set_xticks(range(len(ticks)), [f"{dose:g}" for dose in ticks])
        axis.set(xlabel=label, title=f"Dose-response to {knob}")
    axes[0].set(ylabel="excess kurtosis")
    axes[0].legend()
    _legend_below(figure, axes[0])
    return figure


def origins_where(where: pd.DataFrame, writers: pd.DataFrame, variant: str = "AdamW") -> Figure:
    """The largest channel and direction along the network, the tokens that carry the channel, the layers that write it.

    Args:
        where: one row a variant, seed and point of the residual stream.
        writers: one row a variant, seed and layer that adds to the channel.
        variant: whose tokens and layers are shown; its channel's sign differs by seed, so shares are shown.
    """
    figure, ((channel, direction), (middle, right)) = plt.subplots(2, 2, figsize=(10, 7))
    points = list(where.layer.unique())
    table = where.assign(position=where.layer.map(points.index))
    titles = {"energy_share": "The largest channel", "direction_share": "The largest direction, in any basis"}
    for axis, (column, title) in zip((channel, direction), titles.items(), strict=True):
        for name, part in table.assign(percent=100 * table[column]).groupby("variant", sort=False):
            _mean_line(axis, part, "position", "percent", name, marker=MARKERS[name], markersize=5)
        axis.set(ylabel="share of all energy (%)", ylim=(0, 100), title=title)
    channel.legend(loc="center right", bbox_to_anchor=(1, 0.35), fontsize="small")
    own = table[table.variant == variant].groupby("position")
    for column, label, style in (
        ("patch_mean_abs", "mean size on patch tokens", {"marker": "o"}),
        ("class_mean_abs", "mean size on the class token", {"marker": "s"}),
        ("std", "spread over all tokens", {"linestyle": "--", "color": COLOURS["SGD"]}),
    ):
        mean, low, high = own[column].mean(), own[column].min(), own[column].max()
        (line,) = middle.plot(mean.index, mean, label=label, **({"color": None} | style))
        middle.fill_between(mean.index, low, high, color=line.get_color(), alpha=0.15, linewidth=0)
    middle.set(ylabel="activation", ylim=(0, 1.35 * own.patch_mean_abs.max().max()))
    middle.set(title=f"{variant}: which tokens carry it")
    middle.legend()
    for axis in (channel, direction, middle):
        axis.set_xticks(
            range(len(points)), ["embed", *(p.replace("blocks.", "block ") for p in points[1:])], rotation=30
        )
    part = writers[writers.variant == variant]
    share = 100 * part["mean"] / part.groupby("seed")["mean"].transform("sum")
    names = list(part.writer.unique())
    right.barh(range(len(names)), share.groupby(part.writer).mean()[names], color=COLOURS[variant], alpha=0.45)
    right.scatter(share, [names.index(w) for w in part.writer], s=14, color=COLOURS[variant])
    right.set_yticks(range(len(names)), _short(names))
    right.invert_yaxis()
    right.set(xlabel="share of the channel's final mean (%)", title=f"{variant}: which layers write it")
    return figure


def origins_growth(growth: pd.DataFrame, correlation: pd.DataFrame) -> Figure:
    """Largest activation against largest singular value while training grows longer; correlations with intervals.

    Args:
        growth: one row a seed, length and layer.
        correlation: one row a pair of columns and scope, with low and high.
    """
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.2))
    for _, path in growth.sort_values("steps").groupby(["seed", "layer"], sort=False):
        left.plot(path.sigma_1, path.max_abs, color=COLOURS["SGD"], alpha=0.25, linewidth=0.8, zorder=1)
    lengths = sorted(growth.steps.unique())
    colours = sns.color_palette("viridis", len(lengths))
    for steps, colour, marker in zip(lengths, colours, "osD^vPX", strict=False):
        part = growth[growth.steps == steps]
        left.scatter(part.sigma_1, part.max_abs, s=22, color=colour, marker=marker, label=f"{steps} steps", zorder=2)
    left.set(xscale="log", yscale="log", xlabel="largest singular value", ylabel="largest |activation|")
    left.set(title="One point a layer, seed and length")
    for axis in (left.xaxis, left.yaxis):
        axis.set_major_locator(mpl.ticker.LogLocator(subs=(1, 2, 5)))
        axis.set_major_formatter("{x:g}")
        axis.set_minor_locator(mpl.ticker.NullLocator())
    left.legend()
    symbols = {
        "sigma_1": "$\\sigma_1$",
        "pcdr_1": "PCDR$_1$",
        "max_abs": "largest |y|",
        "excess_kurtosis": "kurtosis",
        "bound": "$\\sigma_1 \\cdot$ largest $\\|x\\|$",
    }
    pairs = list(dict.fromkeys(zip(correlation.x, correlation.y, strict=True)))
    scopes = list(dict.fromkeys(correlation.scope))
    styles = zip(scopes, (COLOURS["AdamW"], COLOURS["S2D"], COLOURS["AdamW, tuned weight decay"]), "oD^", strict=True)
    for index, (scope, colour, marker) in enumerate(styles):
        part = correlation[correlation.scope == scope]
        places = [pairs.index(pair) + 0.2 * (index - 1) for pair in zip(part.x, part.y, strict=True)]
        right.hlines(places, part.low, part.high, color=colour, linewidth=1.5)
        right.scatter(part.correlation, places, color=colour, marker=marker, s=28, label=scope, zorder=2)
    right.axvline(0, color="black", linewidth=0.8, linestyle=":")
    right.set_yticks(range(len(pairs)), [f"{symbols[x]} and {symbols[y]}" for x, y in pairs])
    right.invert_yaxis()
    right.set_xticks([-1, -0.5, 0, 0.5, 1])
    right.set(xlim=(-1.02, 1.02), xlabel="rank correlation, 95 % interval", title="What grows together")
    figure.legend(*right.get_legend_handles_labels(), loc="outside lower right", ncols=len(scopes))
    return figure


# --- the sixth notebook: ablations and G.2 ----------------------------------------------------------------------------


def ablations(differences: pd.DataFrame) -> Figure:
    """Every ablation against the baseline: mean difference within a seed, and its 95 % interval, around zero.

    Args:
        differences: columns group, setting, method, bits, difference, low, high (fractions).

    Returns:
        One panel a bit width, one row a setting, one colour a method.
    """
    table = differences.assign(label=differences.group + ": " + differences.setting)
    labels, bits = list(dict.fromkeys(table.label)), [b for b in BIT_ORDER if b in set(table.bits)]
    methods = [method for method in dict.fromkeys(table.method) if method != "FP"]
    styles = dict(zip(methods, zip(sns.color_palette("colorblind"), "osD^v", strict=False), strict=False))
    height = 1.6 + 0.32 * len(labels)
    figure, axes = plt.subplots(1, len(bits), figsize=(3.6 * len(bits) + 1.6, height), sharey=True, squeeze=False)
    for axis, name in zip(axes[0], bits, strict=True):
        panel = table[table.bits == name]
        shown = list(dict.fromkeys(panel.method))
        for index, method in enumerate(shown):
            part = panel[panel.method == method]
            colour, marker = styles.get(method, ("black", "o"))
            places = [labels.index(label) + 0.24 * (index - (len(shown) - 1) / 2) for label in part.label]
            spread = [100 * (part.difference - part.low), 100 * (part.high - part.difference)]
            style = {"color": colour, "marker": marker, "linestyle": "none", "markersize": 4, "linewidth": 1}
            axis.errorbar(100 * part.difference, places, xerr=spread, label=method, **style)
        axis.axvline(0, color="black", linewidth=0.8)
        axis.set(title="full precision" if name == "FP" else name, xlabel="points against S2D")
        axis.grid(axis="y", linewidth=0.3)
    axes[0, 0].set_yticks(range(len(labels)), labels)
    axes[0, 0].invert_yaxis()
    handles, names = axes[0, -1].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncols=len(names))
    return figure


def selection(table: pd.DataFrame) -> Figure:
    """How many components of each layer each criterion picks, mean over seeds."""
    mean = table.groupby(["layer", "criterion"], sort=False)["rank"].mean().unstack()
    figure, axis = plt.subplots(figsize=(7, 0.9 + 0.28 * len(mean)))
    mean.index = _short(mean.index)
    sns.heatmap(
        mean[list(dict.fromkeys(table.criterion))],
        annot=True,
        fmt=".1f",
        cmap="Blues",
        vmin=0,
        linewidths=0.5,
        cbar_kws={"label": "components picked", "ticks": range(int(mean.to_numpy().max()) + 1)},
        ax=axis,
    )
    axis.set(xlabel="", ylabel="", title="What each criterion picks")
    axis.set_xticks(axis.get_xticks(), axis.get_xticklabels(), rotation=25, ha="right")
    return figure


def _followed(axis, part: pd.DataFrame, column: str) -> None:
    """One mode over the steps, a line for each interval: the mean, and the range over layers and seeds."""
    for refresh, rows in part.groupby(part.step - part.age):
        groups = rows.groupby("step")[column]
        axis.plot(groups.mean(), color=COLOURS["S2D"])
        axis.fill_between(groups.mean().index, groups.min(), groups.max(), color=COLOURS["S2D"], alpha=0.2, linewidth=0)
        if refresh > 0:
            axis.axvline(refresh, color="black", linewidth=0.6, linestyle=":")


def staleness(table: pd.DataFrame) -> Figure:
    """G.2: cosine of the cached and a fresh penalty, one panel a mode, beside the paper's 0.99.

    Args:
        table: columns mode, step, age, cosine (by layer and seed).
    """
    modes = list(dict.fromkeys(table["mode"]))
    columns = -(-len(modes) // 2)
    figure, axes = plt.subplots(2, columns, figsize=(2.7 * columns, 4.6), sharex=True, sharey=True, squeeze=False)
    for axis, mode in zip(axes.flat, modes, strict=False):
        _followed(axis, table[table["mode"] == mode], "cosine")
        axis.axhline(0.99, color=COLOURS["AdamW"], linewidth=1, linestyle="--")
        axis.set_title(mode, fontsize="small")
    for axis in axes.flat[len(modes) :]:
        axis.set_axis_off()
    for axis in axes[:, 0]:
        axis.set(ylabel="cosine")
    figure.supxlabel("optimizer step (dotted: refresh; dashed: the paper's 0.99)", fontsize="small")
    return figure


def overshoot(table: pd.DataFrame) -> Figure:
    """What a penalty does to a weight while it is cached: sigma_1 above, the signed coefficient below, by mode.

    Args:
        table: columns mode, step, age, sigma_1, coefficient (by layer and seed).
    """
    modes = list(dict.fromkeys(table["mode"]))
    size = (2.6 * len(modes), 4.8)
    figure, axes = plt.subplots(2, len(modes), figsize=size, sharex=True, sharey="row", squeeze=False)
    for column, mode in enumerate(modes):
        part = table[table["mode"] == mode]
        for axis, name in zip(axes[:, column], ("sigma_1", "coefficient"), strict=True):
            _followed(axis, part, name)
        axes[1, column].axhline(0, color="black", linewidth=0.8)
        axes[0, column].set_title(mode, fontsize="small")
    axes[0, 0].set(ylabel="$\\sigma_1$")
    axes[1, 0].set(ylabel="$u_1^\\top W v_1$, cached vectors")
    figure.supxlabel("optimizer step (dotted: refresh)", fontsize="small")
    return figure


def _legend_in_rows(figure: Figure, axis, columns: int = 4) -> None:
    """One legend for all panels, for more entries than fit beside each other."""
    figure.legend(*axis.get_legend_handles_labels(), loc="outside lower center", ncols=columns)


def _front_line(axis, points: pd.DataFrame, **style) -> None:
    """The staircase above which no point is."""
    front = points[points.front].sort_values("full")
    axis.step(front.full, front.low, where="pre", linewidth=1, zorder=0, **style)


def frontier_search(points: Mapping[str, pd.DataFrame]) -> Figure:
    """Every setting that was tried, on validation images: full precision against W4A4, one panel a quantizer.

    Args:
        points: quantizer to the table of :func:`s2d.lab.frontier.search_points`.
    """
    figure, axes = plt.subplots(1, len(points), figsize=(5.2 * len(points), 4.2), sharex=True, squeeze=False)
    for axis, (method, table) in zip(axes[0], points.items(), strict=True):
        _front_line(axis, table, color="black", linestyle="--")
        for variant, own in table.groupby("variant", sort=False):
            style = {"marker": MARKERS[variant], "s": 90 if MARKERS[variant] == "*" else 36, "alpha": 0.85}
            for longer, part in own.groupby("longer"):
                face = "none" if longer else COLOURS[variant]
                label = f"{variant}, twice the steps" if longer else variant
                axis.scatter(part.full, part.low, edgecolor=COLOURS[variant], facecolor=face, label=label, **style)
        axis.set(
            xlabel="full precision (%)", ylabel=f"W4A4, {method} (%)", title=f"Settings tried at laptop scale, {method}"
        )
    _legend_in_rows(figure, axes[0, 0])
    return figure


def frontier_test(table: pd.DataFrame, cells: Sequence[tuple[str, str]]) -> Figure:
    """The chosen settings on test images: mean and standard deviation over seeds, full precision against low bits.

    Args:
        table: from :func:`s2d.lab.frontier.frontier_table`.
        cells: method and bits of each panel.
    """
    percent = table.assign(percent=100 * table.accuracy).pivot(
        index=["variant", "seed"], columns=["method", "bits"], values="percent"
    )
    order = list(dict.fromkeys(table.variant))
    mean, std = (getattr(percent.groupby("variant"), name)().loc[order] for name in ("mean", "std"))
    rows = -(-len(cells) // 2)
    figure, axes = plt.subplots(rows, 2, figsize=(10, 3.9 * rows), sharex=True, squeeze=False)
    for axis, cell in zip(axes.flat, cells, strict=False):
        points = pd.DataFrame({"full": mean["FP", "FP"], "low": mean[cell]})
        _front_line(axis, points.assign(front=pareto_front(points, "full", "low")), color="black", linestyle="--")
        for variant, point in points.iterrows():
            axis.errorbar(
                point.full,
                point.low,
                xerr=std["FP", "FP"][variant],
                yerr=std[cell][variant],
                color=COLOURS[variant],
                marker=MARKERS[variant],
                markersize=11 if MARKERS[variant] == "*" else 7,
                elinewidth=0.8,
                label=variant,
            )
        axis.set(ylabel=f"{cell[1]}, {cell[0]} (%)", title=f"{cell[1]}, {cell[0]}")
    for axis in axes[-1]:
        axis.set_xlabel("full precision (%)")
    for axis in list(axes.flat)[len(cells) :]:
        axis.remove()
    _legend_in_rows(figure, axes[0, 0])
    return figure


def site_errors(table: pd.DataFrame) -> Figure:
    """Logit error when the inputs of one kind of site alone are quantized: mean and range over seeds."""
    figure, axis = plt.subplots(figsize=(8, 3.8))
    sns.barplot(
        table,
        x="kind",
        y="logit_error",
        hue="variant",
        palette=COLOURS,
        errorbar=lambda x: (x.min(), x.max()),
        err_kws={"linewidth": 1},
        ax=axis,
    )
    axis.set(
        xlabel="", ylabel="relative logit error", title=f"Inputs at {table.a_bits.iloc[0]} bits, one kind at a time"
    )
    _legend_below(figure, axis)
    return figure


def claims_verdicts(claims: pd.DataFrame) -> Figure:
    """Every claim with its verdict: the measured value with its interval, each in its own scale, and the paper's."""
    colours = {"reproduced": "#007a3d", "undecided": "#7a7a7a", "not reproduced": "#d1495b"}
    claims = claims[claims.verdict.isin(colours)]
    figure, axis = plt.subplots(figsize=(9.5, 0.3 * len(claims) + 1))
    for place, row in enumerate(claims.itertuples()):
        unit = max(abs(value) for value in (row.low, row.high, row.measured) if value == value) or 1.0
        style = {"color": colours[row.verdict], "marker": "o", "markersize": 5, "linewidth": 2}
        if row.low == row.low:  # one seed has no interval
            axis.plot([row.low / unit, row.high / unit], [place, place], color=colours[row.verdict], linewidth=2)
        axis.plot(row.measured / unit, place, **style)
        text = f"{row.measured:+.3g} {row.unit}  (paper: {row.reported})"
        axis.text(1.08, place, text, va="center", fontsize="x-small")
    axis.axvline(0, color="black", linewidth=0.8)
    axis.set_yticks(range(len(claims)), claims.claim, fontsize="x-small")
    axis.set(xlim=(-1.05, 1.05), ylim=(len(claims) - 0.5, -0.5), xlabel="mean and 95 % interval, each in its own scale")
    axis.set_xticks([-1, 0, 1], ["negative", "0", "positive"])
    handles = [plt.Line2D([], [], color=colour, marker="o", label=name) for name, colour in colours.items()]
    figure.legend(handles=handles, loc="outside upper center", ncols=3)
    return figure
