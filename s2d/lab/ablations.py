"""Tables 6, 10 and 11 in shape, and which layers each criterion picks: tidy tables over trained ablations."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd
import torch

from s2d.lab.evaluate import CALIBRATION_IMAGES, Checkpoints, each, gather_outliers
from s2d.lab.paper import load_paper_table
from s2d.lab.quantization import TEST_IMAGES, methods_table, quantization_table
from s2d.lab.recipes import ABLATIONS, AS_PRINTED, ablation, finetuning
from s2d.lab.statistics import paired_interval, points_lost
from s2d.lab.store import Trained
from s2d.lab.training import Recipe
from s2d.layers import linear_maps
from s2d.pcdr import activation_pcdr, layer_pcdr, outlier_rank, spectral_pcdr
from s2d.spectral import top_singular_triplets

BASELINE = "S2D"
REFERENCES = "references"
"""Group of the fine-tunings to which ablations are compared; the others are groups of ``recipes.ABLATIONS``."""
REFERENCE_VARIANTS = (BASELINE, AS_PRINTED, "AdamW", "No PCDR")
KEY = ["group", "setting"]
CELL = [*KEY, "method", "bits", "measure"]


def ablation_recipes(
    seeds: Sequence[int], *, groups: Sequence[str] = tuple(ABLATIONS), **options
) -> dict[tuple[str, str], list[Recipe]]:
    """The references and every setting of some groups, one recipe a seed.

    Args:
        seeds: of the pretraining.
        groups: keys of ``recipes.ABLATIONS``.
        **options: steps, pretrain_steps, refresh_every and sizes of :func:`s2d.lab.recipes.finetuning`.

    Returns:
        (group, setting) to recipes, as :func:`s2d.lab.store.obtain_checkpoints` takes it.

    Raises:
        ValueError: for an unknown group.

    Example:
        >>> list(ablation_recipes([3], groups=["power"]))[-2:]
        [('power', '3'), ('power', '4')]
    """
    for group in groups:
        if group not in ABLATIONS:
            raise ValueError(f"unknown group {group!r}: choose among {', '.join(ABLATIONS)}")
    recipes = {(REFERENCES, v): [finetuning(v, seed, **options) for seed in seeds] for v in REFERENCE_VARIANTS}
    for group in groups:
        for setting in ABLATIONS[group]:
            recipes[group, setting] = [ablation(group, setting, seed, **options) for seed in seeds]
    return recipes


def baseline_setting(group: str, baseline: Recipe) -> str:
    """What the baseline has where the group varies: the row of a table that no ablation stands for.

    Example:
        >>> baseline_setting("power", finetuning("S2D", seed=3))
        '2'
    """
    field = next(iter(next(iter(ABLATIONS[group].values()))))
    return str(baseline.s2d[field])


def ablation_table(
    checkpoints: Mapping[tuple[str, str], Sequence[Trained]],
    bits: Sequence[str] = ("W4A4", "W3A3"),
    *,
    erq_bits: Sequence[str] = (),
    images: int = TEST_IMAGES,
    calibration_sets: int = 1,
) -> pd.DataFrame:
    """Accuracy of every ablation in full precision, under round-to-nearest (both grids) and under ERQ.

    Args:
        checkpoints: (group, setting) to one checkpoint a seed.
        bits: names such as ``"W4A4"``.
        erq_bits: further widths, for ERQ alone.
        images: test images.
        calibration_sets: ERQ calibrates on that many disjoint sets; the accuracy is their mean.

    Returns:
        Columns group, setting, seed, method, bits, images, accuracy, points_lost (to quantization, see
        :func:`s2d.lab.statistics.points_lost`). Full precision has the method ``"FP"``.

    Raises:
        ValueError: for an unknown bit width, before anything is computed.

    Paper: Tables 6, 10 and 11 (ERQ).
    """
    rounded = quantization_table(checkpoints, bits, images=images)
    rounded["method"] = "RTN, " + rounded.grid
    erq = methods_table(
        checkpoints, [*bits, *erq_bits], methods=["ERQ"], calibration_sets=calibration_sets, images=images
    )
    columns = ["variant", "seed", "method", "bits", "images"]
    table = pd.concat([rounded, erq]).groupby(columns, sort=False).accuracy.mean().reset_index()
    table = pd.DataFrame(table.pop("variant").tolist(), columns=KEY).join(table)
    return table.assign(points_lost=points_lost(table, [*KEY, "seed"]))


def paired_differences(table: pd.DataFrame, *, baseline: tuple[str, str] = (REFERENCES, BASELINE)) -> pd.DataFrame:
    """Each ablation minus the baseline within a seed: both started from the same checkpoint and saw the same images.

    Args:
        table: from :func:`ablation_table`.
        baseline: its group and setting.

    Returns:
        Columns group, setting, method, bits, measure ("accuracy" or "points lost"; the second not in full precision,
        where it is 0), difference (points, mean over seeds), std, low, high (95 % t-interval), seeds.

    Raises:
        ValueError: if the baseline is not in the table, or lacks a seed.
    """
    accuracies = table.assign(measure="accuracy", value=100 * table.accuracy)
    lost = table[table.method != "FP"].assign(measure="points lost", value=lambda t: t.points_lost)
    long = pd.concat([accuracies, lost])
    wide = long.pivot(index=["method", "bits", "measure", "seed"], columns=KEY, values="value")
    if baseline not in wide.columns or wide[baseline].isna().any():
        raise ValueError(
            f"the baseline {baseline} is not there for every seed: measure it on the seeds of the ablations"
        )
    differences = wide.sub(wide[baseline], axis=0).drop(columns=[baseline]).melt(ignore_index=False).dropna()
    rows = []
    for cell, values in differences.groupby(CELL).value:
        mean, std, low, high, n = paired_interval(values.tolist())
        row = {"difference": mean, "std": std, "low": low, "high": high, "seeds": n}
        rows.append(dict(zip(CELL, cell, strict=True)) | row)
    return long[CELL].drop_duplicates().merge(pd.DataFrame(rows), on=CELL)  # in the order of the table


def with_baseline(table: pd.DataFrame, baseline: Recipe) -> pd.DataFrame:
    """The rows of :func:`ablation_table`, and in each group the baseline's once more under the name it has there.

    Args:
        table: from :func:`ablation_table`.
        baseline: recipe of the baseline.

    Returns:
        The columns of ``table``.
    """
    reference = table[(table.group == REFERENCES) & (table.setting == BASELINE)]
    groups = [group for group in dict.fromkeys(table.group) if group != REFERENCES]
    added = [reference.assign(group=group, setting=baseline_setting(group, baseline)) for group in groups]
    return pd.concat([table, *added], ignore_index=True)


def beside_reported(table: pd.DataFrame, baseline: Recipe, *, method: str, bits: Sequence[str]) -> pd.DataFrame:
    """Means over seeds and the paper's numbers, in per cent, each in columns of their own.

    Args:
        table: from :func:`ablation_table`.
        baseline: recipe of the baseline.
        method: whose measured accuracy is shown.
        bits: which; full precision stands before them.

    Returns:
        One row a group and setting, those of either side; columns such as ``measured W4A4`` and ``reported W4A4``.

    Paper: Tables 6, 10 and 11.
    """
    shown = with_baseline(table, baseline)
    shown = shown[shown.method.isin(["FP", method])]
    measured = 100 * shown.groupby([*KEY, "bits"], sort=False).accuracy.mean().unstack("bits")
    reported = reported_ablations().pivot(index=KEY, columns="bits", values="reported")
    sides = {"measured": measured, "reported": reported}
    both = pd.concat({side: values.reindex(columns=["FP", *bits]) for side, values in sides.items()}, axis=1)
    both.columns = [f"{side} {name}" for side, name in both.columns]
    groups = list(dict.fromkeys([*shown.group, *reported.index.get_level_values("group")]))
    rows = sorted(both.dropna(how="all").index, key=lambda row: (groups.index(row[0]), _number(row[1])))
    return both.loc[rows].round(1)


def _number(setting: str) -> float:
    """What a setting is sorted by: its value where it is a number."""
    return float(setting) if setting.replace(".", "").isdigit() else 0.0


def reported_ablations() -> pd.DataFrame:
    """Tables 6, 10 and 11 of the paper under our names of groups and settings.

    Returns:
        Columns group, setting, bits, reported (per cent). The paper's baseline (refresh 100, k_max 3, tau 0.95,
        power 2) stands once in each group.

    Paper: Tables 6, 10 and 11.
    """
    table6, table10, table11 = load_paper_table(6), load_paper_table(10), load_paper_table(11)
    names = {"refresh_every": "refresh interval", "k_max": "k_max", "tau": "tau"}
    defaults = (table10.refresh_every == 100) & (table10.k_max == 3) & (table10.tau == 0.95)
    parts = [
        table10[defaults | (table10.varied == field)].assign(group=group, setting=lambda t, f=field: t[f].map(str))
        for field, group in names.items()
    ]
    power = table11[table11.variant == "S2D"].assign(group="power", setting=lambda t: t.power.map(str))
    variants = {"S2D": BASELINE, "S2D without PCDR": "No PCDR", "Baseline": "AdamW"}
    compared = pd.concat([table6, table11[table11.variant == "Baseline"]])
    references = compared.assign(group=REFERENCES, setting=compared.variant.map(variants))
    reported = pd.concat([references, *parts, power], ignore_index=True).rename(columns={"value": "reported"})
    return reported[["group", "setting", "bits", "reported"]].replace({"bits": {"FP16": "FP"}})


SELECTION_CRITERIA: dict[str, dict[str, Any]] = {
    **{f"activation, tau {tau}": {"criterion": "activation", "tau": tau} for tau in (0.95, 0.8, 0.6)},
    **{f"spectral, tau {tau}": {"criterion": "spectral", "tau": tau} for tau in (0.95, 0.6, 0.2)},
    "top 3 of every layer": {"criterion": "all", "tau": 1.0},
}
"""Forms of PCDR and thresholds by the name they have in tables and figures."""


@torch.no_grad()
def selection_table(
    checkpoints: Checkpoints,
    criteria: Mapping[str, Mapping[str, Any]] = SELECTION_CRITERIA,
    *,
    k_max: int = 3,
    images: int = CALIBRATION_IMAGES,
) -> pd.DataFrame:
    """How many components of each layer each criterion would decay, were it to refresh on these checkpoints.

    Args:
        checkpoints: variant to one checkpoint a seed.
        criteria: name to criterion (``"activation"``, ``"spectral"`` or ``"all"``) and tau.
        k_max: how many top components are considered.
        images: calibration images on which the activation form finds its outliers.

    Returns:
        Columns variant, seed, layer, criterion, rank (0: the layer is left alone).

    Raises:
        ValueError: for an unknown criterion.

    Paper: Algorithm 1, lines 9 and 10, in both readings.
    """
    for name, choice in criteria.items():
        if choice["criterion"] not in ("activation", "spectral", "all"):
            raise ValueError(f"{name} has criterion {choice['criterion']!r}: choose activation, spectral or all")
    rows = []
    for variant, trained in each(checkpoints):
        model = trained.model()
        outliers = gather_outliers(model, trained.recipe.data.fixed_set("calibration", images)[0])
        for layer, linear in linear_maps(model).items():
            weight = linear.matrix()
            triplets = top_singular_triplets(weight, k_max)
            ratios = activation_pcdr(weight, outliers[layer].x, outliers[layer].neuron, k_max=k_max, triplets=triplets)
            pcdr = {
                "activation": layer_pcdr(ratios),
                "spectral": spectral_pcdr(weight, k_max=k_max, triplets=triplets),
            }
            key = {"variant": variant, "seed": trained.seed, "layer": layer}
            for name, choice in criteria.items():
                everything = choice["criterion"] == "all"
                rank = k_max if everything else outlier_rank(pcdr[choice["criterion"]], choice["tau"]) or 0
                rows.append(key | {"criterion": name, "rank": rank})
    return pd.DataFrame(rows)
