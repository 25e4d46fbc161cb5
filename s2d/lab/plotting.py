"""Every published figure, drawn from tables alone, one function each."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib as mpl
import matplotlib.pyplot as plt
import pandas as pd
import seaborn as sns
from matplotlib.figure import Figure

from s2d.lab.files import write_atomically
from s2d.lab.paths import output_root

# One colour a variant, in every figure; distinguishable with colour-blind eyes and in print.
COLOURS = {
    "SGD": "#7a7a7a",
    "AdamW": "#d1495b",
    "AdamW, tuned weight decay": "#edae49",
    "S2D": "#00798c",
    "No PCDR": "#8d6cab",
}
MARKERS = {"SGD": "s", "AdamW": "o", "AdamW, tuned weight decay": "^", "S2D": "D", "No PCDR": "v"}
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


def save_figure(figure: Figure, name: str, *, run: str, source: Mapping[str, Any]) -> list[Path]:
    """Write ``figures/<run>/<name>.svg`` and ``.png``, their provenance in the file's own metadata.

    Args:
        figure: closed afterwards.
        name: file stem.
        run: output label, usually the scale.
        source: provenance, from :func:`s2d.lab.results.provenance` or ``load_sources``.
    """
    description = json.dumps(source, sort_keys=True)
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
    plt.close(figure)
    return paths
