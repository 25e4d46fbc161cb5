"""Notebook 21: S2D on language models."""

from __future__ import annotations

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.figure import Figure

from s2d.lab.figures.registry import published
from s2d.lab.figures.style import COLOURS, forest_panels
from s2d.lab.frontier import comparisons
from s2d.lab.recipes import AS_PRINTED
from s2d.lab.statistics import points_lost

SHOWN = "W6A6"
LOWEST = "W4A4"


def by_quantizer(tiny: pd.DataFrame) -> pd.DataFrame:
    """The table of the tiny model in the columns of :func:`s2d.lab.frontier.compare`.

    Args:
        tiny: of :func:`s2d.lab.language.tiny_table`.
    """
    method = tiny.grid.map(lambda grid: "FP" if grid == "none" else f"RTN, {grid}")
    table = tiny.assign(method=method, accuracy=tiny.exact_match)
    return table.assign(points_lost=points_lost(table, ["variant", "seed"]))


def against_adamw(tiny: pd.DataFrame) -> pd.DataFrame:
    """Every other arm minus AdamW, within seeds, in exact match and in points lost."""
    return comparisons(by_quantizer(tiny), ["AdamW"])


def _carries_over(tiny: pd.DataFrame) -> str:
    differences = against_adamw(tiny)
    own = differences[(differences["first"] == AS_PRINTED) & (differences.measure == "accuracy")]
    cells = [
        f"{row.bits if row.method == 'FP' else f'{row.method} {row.bits}'} {row.difference:+.1f} "
        f"[{row.low:+.1f}, {row.high:+.1f}]"
        for row in own[own.bits.isin(["FP", "W8A8", SHOWN, LOWEST])].itertuples()
    ]
    return f"S2D with the paper's lam and tau against AdamW, points of exact match: {'; '.join(cells)}."


@published(tables=["language/tiny"], finding=_carries_over, paper="Table 9 in shape, appendix F")
def language_tiny(tiny: pd.DataFrame) -> Figure:
    """A tiny Qwen2 on word problems, every arm against AdamW: exact match and points kept; right: better than AdamW."""
    differences = against_adamw(tiny)
    own = differences[(differences.method == "RTN, symmetric") & (differences.bits == SHOWN)]
    own = own[own.measure == "accuracy"]
    better, worse = int((own.low > 0).sum()), int((own.high < 0).sum())
    title = f"Of {len(own)} arms {better} solve more problems than AdamW at {SHOWN}, {worse} fewer"
    panels = [("FP", "FP"), ("RTN, symmetric", SHOWN), ("RTN, symmetric", LOWEST)]
    return forest_panels(differences, rows="first", panels=panels, claim="better than AdamW", title=title)


def _published(table: pd.DataFrame) -> str:
    wide = table.pivot(index="training", columns="bits", values="perplexity")
    parts = [
        f"{training}: {wide.loc[training, 'FP']:.2f} to {wide.loc[training, SHOWN]:.2f}" for training in wide.index
    ]
    return f"Perplexity of the answers from full precision to {SHOWN}, one seed: {'; '.join(parts)}."


@published(tables=["language/smollm2"], finding=_published, paper="Table 9 in shape, appendix F")
def language_published(table: pd.DataFrame) -> Figure:
    """SmolLM2 before and after fine-tuning: exact match and perplexity of answers under round-to-nearest, one seed."""
    bits = list(dict.fromkeys(table.bits))
    # The two that were fine-tuned end near one another: one name above its point, one below.
    styles = {"none": ("#7a7a7a", "center"), "AdamW": (COLOURS["AdamW"], "bottom")}
    figure, axes = plt.subplots(1, 2, figsize=(10, 3.4))
    for axis, (column, label) in zip(
        axes, (("exact_match", "exact match (%)"), ("perplexity", "perplexity")), strict=True
    ):
        for training, own in table.groupby("training", sort=False):
            values = own.set_index("bits")[column].loc[bits] * (100 if column == "exact_match" else 1)
            colour, place = styles.get(training, (COLOURS["S2D"], "top"))
            axis.plot(range(len(bits)), values, color=colour, marker="o")
            name = "before" if training == "none" else f"after {training.split(',')[0]}"
            axis.text(len(bits) - 0.9, values.iloc[-1], name, color=colour, va=place, fontsize="small")
        axis.set_xticks(range(len(bits)), bits)
        axis.set(xlim=(-0.2, len(bits) + 0.2), ylabel=label)
    wide = table.pivot(index="training", columns="bits", values="perplexity")
    ratio = (wide[SHOWN] / wide["FP"]).min()
    figure.suptitle(
        f"Six bits a tensor multiply the perplexity by {ratio:.1f} or more", fontweight="bold", fontsize="large"
    )
    return figure
