"""Measurements on trained checkpoints, as tidy tables: one row a thing measured."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

from s2d.bound import check_bound
from s2d.lab.statistics import points_lost
from s2d.lab.store import Trained
from s2d.lab.training import accuracy, residual_statistics
from s2d.layers import linear_maps
from s2d.outliers import OutlierRows, watch_activations
from s2d.pcdr import activation_pcdr, spectral_pcdr
from s2d.spectral import top_singular_triplets
from s2d.watch import OutlierWatch

CALIBRATION_IMAGES = 256

Checkpoints = Mapping[str, Sequence[Trained]]  # variant -> one checkpoint a seed


def each(checkpoints: Checkpoints) -> Iterator[tuple[str, Trained]]:
    """Every checkpoint with the name of its variant."""
    for variant, trained_models in checkpoints.items():
        for trained in trained_models:
            yield variant, trained


def outlier_table(checkpoints: Checkpoints, *, images: int = CALIBRATION_IMAGES) -> pd.DataFrame:
    """Kurtosis and largest magnitude of the residual stream of every checkpoint, and its validation accuracy.

    Measured on calibration images; the test split stays for accuracies.
    """
    rows = []
    for variant, trained in each(checkpoints):
        model = trained.model()
        x, _ = trained.recipe.data.fixed_set("calibration", images)
        validation = trained.recipe.data.fixed_set("validation", 800)
        rows.append(
            {"variant": variant, "seed": trained.seed}
            | residual_statistics(model, x)
            | {"validation_accuracy": accuracy(model, *validation)}
        )
    return pd.DataFrame(rows)


def with_points_lost(table: pd.DataFrame) -> pd.DataFrame:
    """A table of accuracies, and beside each what quantization cost that checkpoint.

    Args:
        table: columns variant, seed, bits (``"FP"`` is full precision), accuracy, and grid where there are two.

    Returns:
        The table with a column points_lost: see :func:`s2d.lab.statistics.points_lost`.

    Raises:
        ValueError: for a checkpoint without its accuracy in full precision, or with two on one grid.

    Example:
        >>> t = pd.DataFrame({"variant": "AdamW", "seed": 2, "bits": ["FP", "W4A4"], "accuracy": [0.75, 0.5]})
        >>> with_points_lost(t).points_lost.tolist()
        [0.0, 25.0]

    Paper: none.
    """
    checkpoint = [column for column in ("variant", "seed", "grid") if column in table]
    marked = table.assign(method=np.where(table.bits == "FP", "FP", "quantized"))
    return table.assign(points_lost=points_lost(marked, checkpoint))


def history_table(checkpoints: Checkpoints) -> pd.DataFrame:
    """Training histories, one row a measurement."""
    return pd.DataFrame(
        [
            {"variant": variant, "seed": trained.seed} | row
            for variant, trained in each(checkpoints)
            for row in trained.history
        ]
    )


@torch.no_grad()
def gather_outliers(model: nn.Module, images: Tensor, *, capacity: int = 16) -> dict[str, OutlierRows]:
    """The outlier activations of every watched layer on some images."""
    maps = {name: [linear] for name, linear in linear_maps(model).items()}
    watch = OutlierWatch(maps, capacity, training_only=False)
    watch.attach()
    watch.start()
    try:
        model(images)
        return watch.rows
    finally:
        watch.detach()


def layer_statistics(
    trained: Trained, *, images: int = CALIBRATION_IMAGES, k_max: int = 3, outliers: int = 16
) -> pd.DataFrame:
    """The columns of Table 7 for every watched layer, and both forms of PCDR.

    Args:
        trained: a checkpoint.
        images: calibration images shown.
        k_max: PCDR_1 to PCDR_k_max are given.
        outliers: activations a layer, the largest, over which the (unclipped) activation form is averaged.

    Returns:
        Columns layer, sigma_1.., max_abs (output without bias), excess_kurtosis (of the output), pcdr_k,
        spectral_pcdr_k.
    """
    x, _ = trained.recipe.data.fixed_set("calibration", images)
    return statistics_of(trained.model(), x, k_max=k_max, outliers=outliers)


@torch.no_grad()
def statistics_of(model: nn.Module, x: Tensor, *, k_max: int = 3, outliers: int = 16) -> pd.DataFrame:
    """:func:`layer_statistics` of any model on some items, both on one device."""
    layers = linear_maps(model)
    with watch_activations({name: linear.module for name, linear in layers.items()}) as watched:
        rows = gather_outliers(model, x, capacity=outliers)
    table = []
    for name, linear in layers.items():
        weight = linear.matrix()
        triplets = top_singular_triplets(weight, k_max)
        ratios = activation_pcdr(weight, rows[name].x, rows[name].neuron, k_max=k_max, triplets=triplets).mean(0)
        share = spectral_pcdr(weight, k_max=k_max, triplets=triplets)
        row = {"layer": name, "max_abs": rows[name].magnitude[0].item()}
        row["excess_kurtosis"] = watched[name].summary().excess_kurtosis
        for k in range(1, k_max + 1):
            row |= {f"sigma_{k}": triplets.s[k - 1].item(), f"pcdr_{k}": ratios[k - 1].item()}
            row[f"spectral_pcdr_{k}"] = share[k - 1].item()
        table.append(row)
    return pd.DataFrame(table)


def layer_table(checkpoints: Checkpoints, **options) -> pd.DataFrame:
    """:func:`layer_statistics` of every checkpoint."""
    tables = [
        layer_statistics(trained, **options).assign(variant=variant, seed=trained.seed)
        for variant, trained in each(checkpoints)
    ]
    table = pd.concat(tables, ignore_index=True)
    return table[["variant", "seed", *[c for c in table.columns if c not in ("variant", "seed")]]]


def bound_table(checkpoints: Checkpoints, *, images: int = CALIBRATION_IMAGES) -> pd.DataFrame:
    """Theorem 1 checked layer by layer on calibration images."""
    rows = []
    for variant, trained in each(checkpoints):
        x, _ = trained.recipe.data.fixed_set("calibration", images)
        rows += [{"variant": variant, "seed": trained.seed} | c._asdict() for c in check_bound(trained.model(), x)]
    return pd.DataFrame(rows)


@torch.no_grad()
def spectra_table(checkpoints: Checkpoints) -> pd.DataFrame:
    """Every singular value of every watched layer: columns variant, seed, layer, index (from 1), sigma."""
    rows = []
    for variant, trained in each(checkpoints):
        for name, linear in linear_maps(trained.model()).items():
            for index, sigma in enumerate(torch.linalg.svdvals(linear.matrix()).tolist(), start=1):
                rows.append({"variant": variant, "seed": trained.seed, "layer": name, "index": index, "sigma": sigma})
    return pd.DataFrame(rows)


@torch.no_grad()
def residual_histogram(checkpoints: Checkpoints, *, bins: int = 60, images: int = CALIBRATION_IMAGES) -> pd.DataFrame:
    """Histogram of the last block's output in units of its standard deviation, by variant, all seeds together.

    Returns:
        Columns variant, low, high (bin edges), count; the outermost bins hold everything beyond +-20.
    """
    rows = []
    edges = torch.linspace(-20, 20, bins + 1)
    for variant, trained_models in checkpoints.items():
        counts = torch.zeros(bins)
        for trained in trained_models:
            model = trained.model()
            kept: list[Tensor] = []
            handle = model.blocks[-1].register_forward_hook(lambda _m, _a, output, kept=kept: kept.append(output))
            model(trained.recipe.data.fixed_set("calibration", images)[0])
            handle.remove()
            values = kept[0].flatten()
            standardised = ((values - values.mean()) / values.std()).clamp(-19.999, 19.999)
            counts += torch.histogram(standardised, edges).hist
        for low, high, count in zip(edges[:-1].tolist(), edges[1:].tolist(), counts.tolist(), strict=True):
            rows.append({"variant": variant, "low": low, "high": high, "count": int(count)})
    return pd.DataFrame(rows)
