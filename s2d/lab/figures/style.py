"""The house style of every figure: colours, markers, and the small pieces that several figures share."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import matplotlib as mpl
import matplotlib.pyplot as plt
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from s2d.files import write_atomically
from s2d.lab.paths import output_root
from s2d.lab.results import table_digests
from s2d.ptq import parse_bits

# One colour a variant, in every figure; distinguishable with colour-blind eyes and in print.
COLOURS = {
    "SGD": "#7a7a7a",
    "AdamW": "#d1495b",
    "AdamW, tuned weight decay": "#edae49",
    "AdamW, half the steps": "#f4a6b0",
    "S2D": "#00798c",
    "S2D, live": "#4cc3b0",
    "No PCDR": "#8d6cab",
    "Top 3 of every layer": "#2e4057",
    "AdamW, rotated basis": "#56b4e9",
    "AdamW, eps 1e-4": "#cc79a7",
    "AdamW, beta2 0.99": "#e69f00",
    "AdamW, beta2 0.999": "#bc8034",
    "Muon": "#6a994e",
    "Decoupled spectral decay": "#007a3d",
    "S2D, decoupled": "#2b8a57",
    "Spectral-norm cap": "#5c6b73",
    "S2D, the paper's lam and tau": "#7fb2d9",
}
MARKERS = {
    "SGD": "s",
    "AdamW": "o",
    "AdamW, tuned weight decay": "^",
    "AdamW, half the steps": "8",
    "S2D": "D",
    "S2D, live": "P",
    "No PCDR": "v",
    "Top 3 of every layer": "P",
    "AdamW, rotated basis": "X",
    "AdamW, eps 1e-4": "<",
    "AdamW, beta2 0.99": "h",
    "AdamW, beta2 0.999": "H",
    "Muon": "p",
    "Decoupled spectral decay": "*",
    "S2D, decoupled": "X",
    "Spectral-norm cap": "s",
    "S2D, the paper's lam and tau": "d",
}


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
    """Write ``figures/<run>/<name>.svg`` and ``.png``, the digests of their tables in the file's own metadata.

    Args:
        figure: left open, so that a notebook shows it.
        name: file stem.
        run: output label, usually the scale.
        tables: the tables it was drawn from, as :func:`s2d.lab.results.load_table` takes them.

    Returns:
        The two paths.

    Raises:
        FileNotFoundError: if one of the tables is not there.
    """
    description = json.dumps(table_digests(tables, run=run), sort_keys=True)
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


# --- pieces -----------------------------------------------------------------------------------------------------------


def short_names(layers: Iterable[str]) -> list[str]:
    """Layer names for an axis.

    Example:
        >>> short_names(["blocks.0.mlp.fc1"])
        ['0.mlp.fc1']
    """
    return [name.removeprefix("blocks.") for name in layers]


def legend_below(figure: Figure, axis: Axes, *, columns: int | None = None) -> None:
    """One legend under all panels, where it takes no panel's room.

    Args:
        figure: whose legend it becomes.
        axis: the panel whose entries it shows; its own legend goes.
        columns: entries in a row; None for all in one row.
    """
    handles, labels = axis.get_legend_handles_labels()
    if axis.get_legend() is not None:
        axis.get_legend().remove()
    figure.legend(handles, labels, loc="outside lower center", ncols=columns or len(labels))


def mean_line(axis: Axes, table: pd.DataFrame, x: str, y: str, variant: str, **style) -> None:
    """Mean over seeds as a line, the range over seeds as a band.

    Args:
        axis: drawn on.
        table: one row a seed and position.
        x, y: its columns.
        variant: whose colour and label the line has.
        **style: of the line.
    """
    groups = table.groupby(x)[y]
    mean, low, high = groups.mean(), groups.min(), groups.max()
    axis.plot(mean.index, mean, color=COLOURS[variant], label=variant, **style)
    axis.fill_between(mean.index, low, high, color=COLOURS[variant], alpha=0.18, linewidth=0)


def bars(axis: Axes, table: pd.DataFrame, *, x: str, y: str, **options) -> None:
    """Grouped bars in the variants' colours, mean over seeds, with whiskers from the lowest to the highest.

    Args:
        axis: drawn on.
        table: with a column ``variant``.
        x, y: its columns.
        **options: of seaborn's ``barplot``.
    """
    whiskers = {"errorbar": lambda values: (values.min(), values.max()), "err_kws": {"linewidth": 1}}
    sns.barplot(table, x=x, y=y, hue="variant", palette=COLOURS, ax=axis, **(whiskers | options))


TOWARDS, AGAINST, UNDECIDED = "#0072b2", "#d55e00", "#7a7a7a"


def forest_panels(
    table: pd.DataFrame, *, rows: str, panels: Sequence[tuple[str, str]], claim: str, title: str, sign: int = 1
) -> Figure:
    """Differences with their 95 % intervals around zero, towards a claim always to the right, at most three panels.

    A filled point is accuracy, a hollow one points kept (the negative of points lost); blue intervals lie on the side
    of the claim, orange ones on the other, grey ones on both.

    Args:
        table: columns measure, bits, method, difference, low, high (points).
        rows: the column that names the rows.
        panels: method and bits of each panel; what was not measured is left out.
        claim: what right means, in a few words.
        title: the finding.
        sign: -1 where the table's differences are those of the other side.
    """
    measured = set(zip(table.method, table.bits, strict=True))
    panels = [panel for panel in panels if panel in measured]
    labels = list(dict.fromkeys(table[rows]))
    size = (3.0 * len(panels) + 2.6, 1.7 + 0.42 * len(labels))
    figure, axes = plt.subplots(1, len(panels), figsize=size, sharey=True, squeeze=False)
    for axis, (method, bits) in zip(axes[0], panels, strict=True):
        part = table[(table.method == method) & (table.bits == bits)]
        for row in part.itertuples():
            kept = row.measure == "points lost"
            ends = sorted((-sign if kept else sign) * value for value in (row.low, row.high))
            colour = TOWARDS if ends[0] > 0 else AGAINST if ends[1] < 0 else UNDECIDED
            place = labels.index(getattr(row, rows)) + (0.17 if kept else -0.17 if method != "FP" else 0)
            axis.plot(ends, [place, place], color=colour, linewidth=2)
            face = "white" if kept else colour
            middle = (-sign if kept else sign) * row.difference
            axis.plot(middle, place, marker="o", markersize=6, color=colour, markerfacecolor=face)
        axis.axvline(0, color="black", linewidth=0.8, zorder=0)
        axis.grid(axis="y", linewidth=0.3)
        axis.set_title("full precision" if method == "FP" else f"{method}, {bits}", fontsize="medium")
    axes[0, 0].set_yticks(range(len(labels)), labels)
    axes[0, 0].invert_yaxis()
    figure.suptitle(textwrap.fill(title, 22 * len(panels) + 20), fontweight="bold", fontsize="large")
    figure.supxlabel(f"points; right: {claim}\nfilled: accuracy, hollow: points kept", fontsize="medium")
    return figure


def label_ends(axis: Axes, ends: Mapping[str, float], x: float, *, apart: float) -> None:
    """Names at the ends of lines, moved apart where they would lie on one another.

    Args:
        axis: drawn on, its limits set.
        ends: variant to the height at which its line ends.
        x: where the names begin.
        apart: smallest distance between two, as a share of the axis.
    """
    low, high = axis.get_ylim()
    gap, below = apart * (high - low), -float("inf")
    for name, height in sorted(ends.items(), key=lambda entry: entry[1]):
        below = max(height, below + gap)
        axis.text(x, below, name, color=COLOURS[name], va="center", fontsize="small")


def bit_widths(table: pd.DataFrame) -> list[str]:
    """The bit widths of a table, from full precision to the lowest.

    Example:
        >>> bit_widths(pd.DataFrame({"bits": ["W4A4", "FP", "W8A4", "W4A4", "W4A8"]}))
        ['FP', 'W8A4', 'W4A8', 'W4A4']
    """
    return sorted(dict.fromkeys(table.bits), key=lambda name: -sum(parse_bits(name)))


def listed(values: pd.Series | Mapping[str, float], form: str = "{:.1f}") -> str:
    """Numbers with their names, in one line of text.

    Example:
        >>> listed({"AdamW": 33.53, "SGD": 0.4})
        'AdamW 33.5; SGD 0.4'
    """
    return "; ".join(f"{name} {form.format(value)}" for name, value in dict(values).items())
