"""Full precision against low-bit accuracy: the front that the variants make, and who is ahead on it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from s2d.lab.evaluate import CALIBRATION_IMAGES, Checkpoints
from s2d.lab.quantization import TEST_IMAGES, Subject, logits_of, methods_table, over_checkpoints, quantization_table
from s2d.lab.recipes import DECOUPLED, S2D_TUNED
from s2d.lab.statistics import paired_interval, pareto_front
from s2d.lab.store import Trained
from s2d.ptq import parse_bits
from s2d.ptq.sites import QuantizedProduct, Site, set_mode, sites

FULL_PRECISION = ("FP", "FP")
STRONG_METHODS = ("PTQ4ViT", "RepQ-ViT", "ERQ")
CONTROL = "AdamW, tuned weight decay"
PAPER = "S2D"
RIVALS = ("AdamW", CONTROL, PAPER, S2D_TUNED)
SITE_KINDS = ("after a norm", "after GELU", "attention products", "other")


def frontier_table(
    checkpoints: Checkpoints,
    *,
    bits: Sequence[str] = ("W4A4", "W3A3"),
    erq_bits: Sequence[str] = ("W6A6", "W5A5"),
    images: int = TEST_IMAGES,
    calibration_sets: int = 1,
) -> pd.DataFrame:
    """Test accuracy of every checkpoint in full precision and under every quantizer.

    Args:
        checkpoints: variant to one checkpoint a seed.
        bits: for all methods, and for round-to-nearest on both grids (``"RTN"`` is the symmetric one, as in the
            published figures, ``"RTN, asymmetric"`` the other; both calibrate on 256 images, the methods on 32).
        erq_bits: further widths for ERQ alone, the quantizer of the paper's tables.
        images: test images.
        calibration_sets: of the methods that calibrate on 32 images.

    Returns:
        Columns variant, seed, method, bits, images, accuracy (mean over calibration sets).

    Raises:
        ValueError: for an unknown bit width.
    """
    rounded = quantization_table(checkpoints, ["FP", *bits], images=images)
    names = {"symmetric": "RTN", "asymmetric": "RTN, asymmetric"}
    rounded["method"] = rounded.grid.map(names).where(rounded.bits != "FP", "FP")
    rounded = rounded[(rounded.bits != "FP") | (rounded.grid == "symmetric")]  # full precision knows no grid
    options = {"images": images, "calibration_sets": calibration_sets}
    strong = methods_table(checkpoints, bits, methods=STRONG_METHODS, **options)
    if erq_bits:
        strong = pd.concat([strong, methods_table(checkpoints, erq_bits, methods=["ERQ"], **options)])
    table = pd.concat([rounded, strong[strong.method != "FP"]])
    by = ["variant", "seed", "method", "bits", "images"]
    return table.groupby(by, sort=False).accuracy.mean().reset_index()


def compare(table: pd.DataFrame, first: str, second: str) -> pd.DataFrame:
    """One variant minus another, within seeds, under every quantizer.

    Args:
        table: from :func:`frontier_table`.
        first, second: variants; the seeds that both have are compared.

    Returns:
        Columns method, bits, first, second, difference (points), std, low, high (95 % interval), seeds.

    Raises:
        ValueError: if a variant is not in the table, or they have no seed in common.
    """
    for variant in (first, second):
        if variant not in set(table.variant):
            raise ValueError(f"no variant {variant!r} in the table: it has {', '.join(dict.fromkeys(table.variant))}")
    wide = 100 * table.pivot(index=["method", "bits", "seed"], columns="variant", values="accuracy")
    pairs = wide[[first, second]].dropna()
    if pairs.empty:
        raise ValueError(f"{first!r} and {second!r} have no seed in common: train both on the same seeds")
    rows = []
    for cell in table[["method", "bits"]].drop_duplicates().itertuples(index=False):
        own = pairs.loc[tuple(cell)]
        mean, std, low, high, n = paired_interval((own[first] - own[second]).tolist())
        row = {"method": cell.method, "bits": cell.bits, "first": first, "second": second}
        rows.append(row | {"difference": mean, "std": std, "low": low, "high": high, "seeds": n})
    return pd.DataFrame(rows)


def reach_table(table: pd.DataFrame, *, variant: str = DECOUPLED) -> pd.DataFrame:
    """The targets set for a better variant before it was searched for, and what was reached.

    The paper's algorithm counts twice, at the recipe's weight decay and at the better one of its own. Round-to-nearest
    counts on both grids: the targets were set on an asymmetric one, the published figures have the symmetric.

    Args:
        table: from :func:`frontier_table`, with all of ``RIVALS``.
        variant: the one that should reach them.

    Returns:
        Columns against, method, bits, target (points by which to be ahead), difference, low, high, seeds, reached
        (whether the mean is at the target).

    Raises:
        ValueError: if the table lacks a rival, or was not measured at W4A4 and W3A3.
    """
    rivals = {against: compare(table, variant, against).set_index(["method", "bits"]) for against in RIVALS}
    rounding = ("RTN", "RTN, asymmetric")
    strong = [(method, bits) for method in STRONG_METHODS for bits in ("W4A4", "W3A3")]
    targets = [
        *(("AdamW", method, "W4A4", 25.0) for method in rounding),
        *((CONTROL, method, "W4A4", 1.0) for method in rounding),
        *((CONTROL, method, "W3A3", 15.0) for method in rounding),
        *((against, method, "W4A4", 5.0) for against in (PAPER, S2D_TUNED) for method in rounding),
        *((against, "FP", "FP", -0.5) for against in ("AdamW", CONTROL)),
        *((against, *cell, 0.0) for against in (CONTROL, PAPER, S2D_TUNED) for cell in strong),
    ]
    rows = []
    for against, method, bits, target in targets:
        if (method, bits) not in rivals[against].index:
            raise ValueError(f"no {method} at {bits} in the table: the targets need it, measure it")
        found = rivals[against].loc[(method, bits)]
        row = {"against": against, "method": method, "bits": bits, "target": target}
        row |= {name: found[name] for name in ("difference", "low", "high", "seeds")}
        rows.append(row | {"reached": bool(found.difference >= target)})
    return pd.DataFrame(rows)


def strong_gains(table: pd.DataFrame, *, baseline: str = "AdamW") -> pd.DataFrame:
    """What every variant gains over a baseline in full precision, under round-to-nearest and under a strong quantizer.

    Args:
        table: from :func:`frontier_table`.
        baseline: the variant that the others are compared with.

    Returns:
        One row a variant, seed and strong method and bit width: columns variant, seed, method, bits, full, rounded
        (gain under asymmetric round-to-nearest at the same bits), strong; all in points.
    """
    wide = 100 * table.pivot(index=["seed", "variant"], columns=["method", "bits"], values="accuracy")
    gains = wide - wide.xs(baseline, level="variant").reindex(wide.index, level="seed")
    gains = gains.drop(index=baseline, level="variant")
    rows = [
        pd.DataFrame(
            {"full": gains["FP", "FP"], "rounded": gains["RTN, asymmetric", bits], "strong": gains[method, bits]}
        ).assign(method=method, bits=bits)
        for method in STRONG_METHODS
        for bits in dict.fromkeys(table[table.method == "RTN, asymmetric"].bits)
    ]
    return pd.concat(rows).reset_index()


def controls_table(table: pd.DataFrame, variants: Sequence[str]) -> pd.DataFrame:
    """Does a control do as well as the paper's algorithm? Each minus S2D, under every quantizer.

    Args:
        table: from :func:`frontier_table`.
        variants: the controls.

    Returns:
        The columns of :func:`compare`, and ``says``: "better", "worse" or "undecided" by the interval.
    """
    parts = [compare(table, variant, PAPER) for variant in variants]
    out = pd.concat(parts, ignore_index=True)
    out["says"] = np.select([out.low > 0, out.high < 0], ["better", "worse"], "undecided")
    return out


def site_kind(site: Site) -> str:
    """Where the input of a site comes from, one of ``SITE_KINDS``."""
    if isinstance(site, QuantizedProduct):
        return "attention products"
    return {"norm": "after a norm", "gelu": "after GELU"}.get(getattr(site, "after", None), "other")


def site_error_table(checkpoints: Checkpoints, a_bits: int = 3, *, images: int = TEST_IMAGES) -> pd.DataFrame:
    """What quantizing the inputs of one kind of site alone does to the logits: where a network is still vulnerable.

    Args:
        checkpoints: variant to one checkpoint a seed.
        a_bits: bits of the inputs (round-to-nearest, asymmetric); weights stay in floating point.
        images: test images.

    Returns:
        Columns variant, seed, kind (of ``SITE_KINDS``), a_bits, images, accuracy, logit_error.

    Raises:
        ValueError: for bits out of range.
    """
    parse_bits(f"W{a_bits}A{a_bits}")
    return over_checkpoints(_SiteErrors(a_bits, images), checkpoints)


class _SiteErrors:
    """The rows of one checkpoint; an object, so that worker processes can be sent it."""

    def __init__(self, a_bits: int, images: int) -> None:
        self.a_bits, self.images = a_bits, images

    def __call__(self, variant: str, trained: Trained) -> list[dict[str, Any]]:
        subject = Subject(variant, trained, "test", self.images)
        calibration, _ = trained.recipe.data.fixed_set("calibration", CALIBRATION_IMAGES)
        (model,) = subject.quantized([{"w_bits": 32, "a_bits": self.a_bits}], calibration)
        rows = []
        for kind in SITE_KINDS:
            set_mode(model, "float")
            for site in sites(model).values():
                if site_kind(site) == kind:
                    site.mode = "quantized"
            result = subject.compared(logits_of(model, subject.x))
            rows.append(subject.row | {"kind": kind, "a_bits": self.a_bits} | result)
        return rows


def search_points(tuning: pd.DataFrame, method: str) -> pd.DataFrame:
    """Every setting of the search as a point: validation accuracy in per cent, on the seed that all settings share.

    Args:
        tuning: ``data/laptop/tuning.csv``.
        method: ``"RTN"`` or ``"ERQ"``.

    Returns:
        Columns variant, longer (whether it was given more steps than the others), full, low (W4A4 under the method),
        front (whether on the Pareto front of those with equal steps).
    """
    shared = tuning[tuning.seed == tuning.seed.iloc[0]].reset_index(drop=True)
    points = shared[["variant"]].assign(longer=shared.steps.notna())
    points = points.assign(full=100 * shared.FP, low=100 * shared[f"{method} W4A4"])
    front = pareto_front(points[~points.longer], "full", "low")
    return points.assign(front=front.reindex(points.index, fill_value=False))


def means_by_quantizer(table: pd.DataFrame, order: Sequence[str]) -> pd.DataFrame:
    """Mean and standard deviation over seeds as text, per cent, one row a variant: what a reader looks at first."""
    grouped = 100 * table.set_index(["variant", "seed", "method", "bits"]).accuracy
    stats: Mapping[str, pd.Series] = {
        "mean": grouped.groupby(["variant", "method", "bits"], sort=False).mean(),
        "std": grouped.groupby(["variant", "method", "bits"], sort=False).std(ddof=1).fillna(0),
    }
    text = stats["mean"].map("{:.1f}".format) + " ± " + stats["std"].map("{:.1f}".format)
    columns = list(dict.fromkeys(zip(table.method, table.bits, strict=True)))
    return text.unstack(["method", "bits"]).loc[list(order), columns]
