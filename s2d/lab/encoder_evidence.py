"""What the tables of the encoder's study say: arms against AdamW, errors beside accuracies, layers.

The tables are those of :mod:`s2d.lab.encoder`, as :func:`s2d.lab.results.load_table` reads them.
"""

from __future__ import annotations

import numpy as np
import pandas as pd

from s2d.lab.frontier import comparisons
from s2d.lab.statistics import NO_LOSS, PairedInterval, paired_interval, points_lost, verdict

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


def seen_of_claims(evidence: pd.DataFrame, layers: pd.DataFrame) -> dict[str, str]:
    """What this encoder says of the paper's claims, by a part of the claim's sentence: difference, interval, verdict.

    Args:
        evidence: ``data/encoder/evidence.csv``.
        layers: ``data/encoder/layers.csv``.
    """
    table = by_quantizer(evidence)
    percent = table.assign(accuracy=100 * table.accuracy, kept=-table.points_lost)
    wide = percent.pivot(index="seed", columns=["method", "bits", "variant"], values=["accuracy", "kept"]).sort_index(
        axis=1
    )
    best, full = ("ERQ", LOWEST), ("FP", "FP")
    cells = {
        "S2D is more accurate than AdamW at W4A4 (ERQ)": ("accuracy", best, "S2D", "AdamW", 0.0),
        "S2D is more accurate than No PCDR at W4A4 (ERQ)": ("accuracy", best, "S2D", "No PCDR", 0.0),
        "No PCDR falls below AdamW at W4A4 (ERQ)": ("accuracy", best, "AdamW", "No PCDR", 0.0),
        "No PCDR degrades capacity": ("accuracy", full, "S2D", "No PCDR", 0.0),
        "S2D costs no accuracy in full precision": ("accuracy", full, "S2D", "AdamW", NO_LOSS),
        "S2D is more accurate than AdamW under round-to-nearest": ("accuracy", ("RTN", LOWEST), "S2D", "AdamW", 0.0),
        "S2D quantizes better, not only trains better": ("kept", best, "S2D", "AdamW", 0.0),
    }
    seen = {}
    for part, (measure, cell, first, second, margin) in cells.items():
        own = wide[measure][cell]
        seen[part] = _in_words(paired_interval((own[first] - own[second]).dropna().tolist()), "points", margin)
    own = written(layers)
    means = own.groupby(["variant", "seed"])[["pcdr_1", "max_abs", "sigma_1"]].mean()
    fall = (1 - means.loc["S2D"] / means.loc["AdamW"]).dropna()
    for column, name in (
        ("pcdr_1", "S2D lowers PCDR_1"),
        ("max_abs", "S2D lowers the largest activation"),
        ("sigma_1", "S2D lowers the largest singular value"),
    ):
        seen[name] = _in_words(paired_interval((100 * fall[column]).tolist()), "% lower")
    return seen


def _in_words(interval: PairedInterval, unit: str, margin: float = 0.0) -> str:
    span = f"{interval.mean:+.1f} [{interval.low:+.1f}, {interval.high:+.1f}] {unit}"
    word = verdict(interval, margin=margin, equivalence=1.0 if unit == "points" else 0.0)
    return f"minilm fine-tuned, {interval.n} seeds: {span}, {word}"
