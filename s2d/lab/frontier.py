"""The evidence on fine-tuning: every arm in full precision and under every quantizer, and what tells them apart."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pandas as pd

from s2d.lab.evaluate import CALIBRATION_IMAGES, Checkpoints
from s2d.lab.quantization import TEST_IMAGES, Subject, logits_of, methods_table, over_checkpoints, quantization_table
from s2d.lab.statistics import paired_interval, pareto_front, points_lost, verdict
from s2d.lab.store import Trained
from s2d.lab.winners import ALLOWED_LOSS, SETTING_COLUMNS, winners
from s2d.ptq import parse_bits
from s2d.ptq.sites import QuantizedProduct, Site, set_mode, sites

STRONG_METHODS = ("PTQ4ViT", "RepQ-ViT", "ERQ")
MEAN_METHOD = "mean of all"
"""Name of the mean over the quantizers; see :func:`with_means`."""
ROUNDED_METHODS = ("RTN, symmetric", "RTN, asymmetric")
MEASURES = ("accuracy", "points lost")
SAYS = {"reproduced": "more", "not reproduced": "less", "equivalent": "equivalent", "undecided": "undecided"}
SITE_KINDS = ("after a norm", "after GELU", "attention products", "other")


def frontier_table(
    checkpoints: Checkpoints,
    *,
    bits: Sequence[str] = ("W4A4", "W3A3"),
    methods: Sequence[str] = STRONG_METHODS,
    erq_bits: Sequence[str] = ("W6A6", "W5A5"),
    images: int = TEST_IMAGES,
    calibration_sets: int = 1,
) -> pd.DataFrame:
    """Test accuracy of every checkpoint in full precision and under every quantizer, and what that costs it.

    Args:
        checkpoints: variant to one checkpoint a seed.
        bits: for all methods; round-to-nearest on both grids calibrates on 256 images, the other methods on 32.
        methods: those beside round-to-nearest.
        erq_bits: further widths for ERQ alone, the quantizer of the paper's tables.
        images: test images.
        calibration_sets: of the methods that calibrate on 32 images.

    Returns:
        Columns variant, seed, method, bits, images, accuracy (mean over calibration sets), points_lost (see
        :func:`s2d.lab.statistics.points_lost`).

    Raises:
        ValueError: for an unknown bit width.
    """
    rounded = quantization_table(checkpoints, ["FP", *bits], images=images)
    rounded["method"] = ("RTN, " + rounded.grid).where(rounded.bits != "FP", "FP")
    rounded = rounded[(rounded.bits != "FP") | (rounded.grid == "symmetric")]  # full precision knows no grid
    options = {"images": images, "calibration_sets": calibration_sets}
    strong = methods_table(checkpoints, bits, methods=methods, **options)
    if erq_bits:
        strong = pd.concat([strong, methods_table(checkpoints, erq_bits, methods=["ERQ"], **options)])
    table = pd.concat([rounded, strong[strong.method != "FP"]])
    by = ["variant", "seed", "method", "bits", "images"]
    table = table.groupby(by, sort=False).accuracy.mean().reset_index()
    return table.assign(points_lost=points_lost(table, ["variant", "seed"]))


def with_means(table: pd.DataFrame) -> pd.DataFrame:
    """The table, and for every bit width that all quantizers were run at the mean over them.

    Args:
        table: from :func:`frontier_table`.

    Returns:
        The same columns; the added rows have the method ``MEAN_METHOD``.
    """
    low = table[table.method != "FP"]
    methods = low.groupby("bits").method.nunique()
    shared = low[low.bits.map(methods) == low.method.nunique()]
    by = ["variant", "seed", "bits", "images"]
    means = shared.groupby(by, sort=False)[["accuracy", "points_lost"]].mean().reset_index()
    return pd.concat([table, means.assign(method=MEAN_METHOD)], ignore_index=True)


def compare(table: pd.DataFrame, first: str, second: str) -> pd.DataFrame:
    """One variant minus another, within seeds, under every quantizer, in both measures.

    Args:
        table: from :func:`frontier_table`.
        first, second: variants; the seeds that both have are compared.

    Returns:
        Columns method, bits, measure ("accuracy" or "points lost"; the second not in full precision, where it is 0),
        first, second, difference (points), std, low, high (95 % interval), seeds, says ("more", "less", "equivalent",
        "undecided": :func:`s2d.lab.statistics.verdict` of the first having more of the measure).

    Raises:
        ValueError: if a variant is not in the table, or they have no seed in common.
    """
    for variant in (first, second):
        if variant not in set(table.variant):
            raise ValueError(f"no variant {variant!r} in the table: it has {', '.join(dict.fromkeys(table.variant))}")
    percent = table.assign(accuracy=100 * table.accuracy).rename(columns={"points_lost": "points lost"})
    wide = percent.pivot(index=["method", "bits", "seed"], columns="variant", values=list(MEASURES))
    rows = []
    for measure in MEASURES:
        pairs = wide[measure][[first, second]].dropna()
        if pairs.empty:
            raise ValueError(f"{first!r} and {second!r} have no seed in common: train both on the same seeds")
        for cell in table[["method", "bits"]].drop_duplicates().itertuples(index=False):
            if measure == "points lost" and cell.method == "FP":
                continue
            own = pairs.loc[tuple(cell)]
            interval = paired_interval((own[first] - own[second]).tolist())
            row = {"method": cell.method, "bits": cell.bits, "measure": measure, "first": first, "second": second}
            row |= {"difference": interval.mean, "std": interval.std, "low": interval.low, "high": interval.high}
            rows.append(row | {"seeds": interval.n, "says": SAYS[verdict(interval)]})
    return pd.DataFrame(rows)


def comparisons(table: pd.DataFrame, against: Sequence[str]) -> pd.DataFrame:
    """Every variant of a table against some of them: :func:`compare` of each pair.

    Args:
        table: from :func:`frontier_table`.
        against: variants that all others are compared with.

    Raises:
        ValueError: if one of them is not in the table.
    """
    variants = list(dict.fromkeys(table.variant))
    pairs = [(first, second) for second in against for first in variants if first != second]
    return pd.concat([compare(table, *pair) for pair in pairs], ignore_index=True)


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


def search_points(tuning: pd.DataFrame, column: str = "low_bits") -> pd.DataFrame:
    """Every setting of the search as a point: validation accuracy in per cent, mean over the tuning seeds.

    Args:
        tuning: ``data/laptop/tuning.csv``, see :func:`s2d.lab.tuning.tuning_table`.
        column: what is set against full precision: ``"low_bits"`` (the mean by which winners are chosen) or one of its
            parts, such as ``"ERQ W4A4"``.

    Returns:
        Columns variant, the settings, full, low, front (whether no other setting is at least as good in both and better
        in one), chosen (whether it won, see :func:`s2d.lab.winners.winners`).

    Raises:
        ValueError: for a column that the table does not have.
    """
    if column not in tuning:
        raise ValueError(f"the tuning table has no column {column!r}: choose one of {', '.join(tuning)}")
    by = ["variant", *SETTING_COLUMNS]
    means = tuning.assign(full=100 * tuning.FP, low=100 * tuning[column])
    points = means.groupby(by, sort=False, dropna=False)[["full", "low"]].mean().reset_index()
    won = winners(tuning)[by].assign(chosen=True)
    points = points.merge(won, on=by, how="left")
    points["chosen"] = points.chosen.notna()
    return points.assign(front=pareto_front(points, "full", "low"))


def keeping(points: pd.DataFrame) -> float:
    """The full precision that a setting had to keep in the search, per cent: half a point below AdamW's best.

    Args:
        points: from :func:`search_points`.
    """
    return points[points.variant == "AdamW"].full.max() - 100 * ALLOWED_LOSS


def means_by_quantizer(table: pd.DataFrame, order: Sequence[str], measure: str = "accuracy") -> pd.DataFrame:
    """Mean and standard deviation over seeds as text, one row a variant: what a reader looks at first.

    Args:
        table: from :func:`frontier_table`.
        order: variants, in the order of the rows.
        measure: ``"accuracy"`` (per cent) or ``"points lost"``.

    Raises:
        ValueError: for another measure.
    """
    if measure not in MEASURES:
        raise ValueError(f"unknown measure {measure!r}: choose {' or '.join(MEASURES)}")
    if measure == "points lost":
        table = table[table.method != "FP"]
    values = 100 * table.accuracy if measure == "accuracy" else table.points_lost
    groups = table.assign(value=values).groupby(["variant", "method", "bits"], sort=False).value
    text = groups.mean().map("{:.1f}".format) + " ± " + groups.std(ddof=1).fillna(0).map("{:.1f}".format)
    columns = list(dict.fromkeys(zip(table.method, table.bits, strict=True)))
    return text.unstack(["method", "bits"]).loc[list(order), columns]
