"""A self-supervised backbone (appendix E; Tables 7 and 8 in shape): fine-tuned with and without S2D, then quantized.

    python -m s2d.lab.self_supervised tune            every setting on the tuning seed, judged on validation images
    python -m s2d.lab.self_supervised evidence        the winners on the evidence seeds, on test images
    python -m s2d.lab.self_supervised evidence --seeds 2 --variants AdamW S2D --methods RTN PTQ4ViT   (a piece of it)

write ``tuning.csv``, ``evidence.csv`` and ``layers.csv`` in ``data/self_supervised``, one row a network and quantizer
(or layer). What these have is not done again: a run that was interrupted goes on where it was.

The paper fine-tunes DINOv3-Base on ImageNet. Here it is a DINOv2-S on Fashion-MNIST, from a linear probe on;
``--backbone dinov3-b16 --image-size 224`` takes the paper's where there is a hub, and its tables go to
``data/self_supervised_dinov3-b16``.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import Tensor, nn

from s2d.files import write_text
from s2d.lab import parallel
from s2d.lab.evaluate import statistics_of
from s2d.lab.fashion import FashionMNIST, photographs
from s2d.lab.identity import recipe_key
from s2d.lab.paths import output_root, repository_root
from s2d.lab.quantization import METHOD_CALIBRATION_IMAGES, METHODS, logit_error, logits_of, setting
from s2d.lab.recipes import AS_PRINTED, EVIDENCE_SEEDS, TUNING_SEEDS, arm
from s2d.lab.results import provenance, save_table
from s2d.lab.statistics import tuning_table
from s2d.lab.store import find, train_and_store
from s2d.lab.training import Recipe, learning_rate
from s2d.lab.vision_backbone import VisionBackbone, published_backbone
from s2d.lab.winners import SETTING_COLUMNS, winners
from s2d.layers import linear_maps
from s2d.ptq import parse_bits, quantize_each
from s2d.spectral import top_singular_triplets

RUN = "self_supervised"
BACKBONE, IMAGE_SIZE = "dinov2-s", 28
STEPS, BATCH_SIZE, WARMUP, REFRESH_EVERY = 100, 16, 10, 25
WEIGHT_DECAY = 0.01
SEEDS = EVIDENCE_SEEDS[:3]
LAYER_IMAGES = 256
BEFORE = "as published"

GRID: dict[str, tuple[dict[str, float], ...]] = {
    # The learning rate is chosen first, and every other variant uses the winner.
    "AdamW": ({"lr": 1e-5}, {"lr": 4e-5}),
    "S2D": ({"lam": 5e-2, "tau": 0.6}, {"lam": 0.5, "tau": 0.6}),
}
"""Variant to the settings that are tried: as many for each, on the same seed."""
UNTUNED: dict[str, dict[str, float]] = {AS_PRINTED: {"lam": 5e-4, "tau": 0.95}}  # second-hand
VARIANTS = (*GRID, *UNTUNED)
BITS = ("W8A8", "W6A6", "W5A5")
"""Those of Table 8."""
QUANTIZERS = ("RTN", "PTQ4ViT", "ERQ")
CELLS = {
    "tuning": (("RTN", "W5A5"), ("RTN", "W4A4")),
    "evidence": tuple((method, bits) for method in QUANTIZERS for bits in BITS),
}
"""Stage to what its networks are measured under, beside full precision."""
SPLIT = {"tuning": ("validation", 1000), "evidence": ("test", 1000)}
STAGE_SEEDS = {"tuning": TUNING_SEEDS[:1], "evidence": SEEDS}

Jobs = list[tuple[dict[str, Any], Recipe]]
"""Networks: what a table says of each, and its recipe."""


def backbone_finetuning(
    variant: str,
    seed: int,
    settings: Mapping[str, float],
    *,
    backbone: str = BACKBONE,
    image_size: int = IMAGE_SIZE,
    steps: int = STEPS,
    device: str = "cpu",
) -> Recipe:
    """Fine-tuning of the published backbone and of a linear probe on it.

    Args:
        variant: one of ``VARIANTS``.
        seed: of the training stream, the same for every variant.
        settings: lr, and those of the variant (:func:`best_settings`).
        backbone, image_size: see :class:`s2d.lab.vision_backbone.VisionBackbone`.
        steps: optimizer steps.
        device: where it is trained.

    Raises:
        ValueError: for an unknown variant, or a setting that is missing.

    Example:
        >>> backbone_finetuning("S2D", 2, {"lr": 1e-4, "lam": 0.05, "tau": 0.6}).s2d["tau"]
        0.6

    Paper: appendix E, on another backbone and other images.
    """
    if variant not in VARIANTS:
        raise ValueError(f"unknown variant {variant!r}: choose one of {', '.join(VARIANTS)}")
    needed = {"lr", *(GRID[variant][0] if variant in GRID else UNTUNED[variant])}
    if missing := sorted(needed - settings.keys()):
        raise ValueError(
            f"{variant} needs {', '.join(missing)}: run python -m s2d.lab.self_supervised tune, or give it"
        )
    own = {"weight_decay": WEIGHT_DECAY} | dict(settings)
    optimizer, s2d = arm(variant, own, betas=(0.9, 0.999), refresh_every=REFRESH_EVERY)
    return Recipe(
        seed=seed,
        steps=steps,
        warmup=min(WARMUP, steps),
        optimizer=optimizer,
        batch_size=BATCH_SIZE,
        data=FashionMNIST(image_size),
        model=VisionBackbone(backbone, image_size),
        s2d=s2d,
        measure_every=steps,
        device=device,
    )


# --- one network ------------------------------------------------------------------------------------------------------


def rows_of(
    model: nn.Module, data: FashionMNIST, split: str, items: int, cells: Sequence[tuple[str, str]]
) -> list[dict[str, Any]]:
    """What one network does in full precision and under some quantizers, on the device it is on.

    Args:
        model: gives logits of images.
        data: what it is calibrated and tested on.
        split, items: what it is tested on.
        cells: method (of ``QUANTIZERS``) and bits of each.

    Returns:
        One row a cell, full precision first: method, bits, split, items, accuracy, logit_error (``|q - fp|^2 /
        |fp|^2``).
    """
    device = next(model.parameters()).device
    x, y = (part.to(device) for part in data.fixed_set(split, items))
    calibration = data.fixed_set("calibration", METHOD_CALIBRATION_IMAGES)[0].to(device)
    settings = [setting(parse_bits(bits), **METHODS[method]) for method, bits in cells]
    full = logits_of(model, x)
    quantized = quantize_each(model, settings, calibration=calibration, batch_size=len(calibration)) if cells else ()
    found = [full, *(logits_of(copy, x) for copy in quantized)]
    return [
        {"method": method, "bits": bits, "split": split, "items": items}
        | {"accuracy": (logits.argmax(-1) == y).double().mean().item(), "logit_error": logit_error(logits, full)}
        for (method, bits), logits in zip((("FP", "FP"), *cells), found, strict=True)
    ]


@torch.no_grad()
def layer_rows(model: nn.Module, x: Tensor) -> pd.DataFrame:
    """Table 7 in shape: every linear layer of the blocks, what it puts out, what its input spans.

    Args:
        model: a vision transformer of timm.
        x: calibration images, on its device.

    Returns:
        The columns of :func:`s2d.lab.evaluate.layer_statistics`, input_ratio (largest input over the root mean square)
        and l1_product (of the first singular vectors, ``|u_1|_1 |v_1|_1``: see :func:`adams_reach`).
    """
    ratios: dict[str, float] = {}
    maps = linear_maps(model)

    def seen(name: str, value: Tensor) -> None:
        ratios[name] = (value.abs().max() / value.square().mean().sqrt()).item()

    hooks = [
        linear.module.register_forward_pre_hook(lambda _, inputs, name=name: seen(name, inputs[0]))
        for name, linear in maps.items()
    ]
    try:
        table = statistics_of(model, x)
    finally:
        for hook in hooks:
            hook.remove()
    table = table[table.layer.str.startswith("blocks.")].reset_index(drop=True)
    top = {name: top_singular_triplets(maps[name].matrix(), 1) for name in table.layer}
    products = {name: (found.u.abs().sum() * found.v.abs().sum()).item() for name, found in top.items()}
    return table.assign(input_ratio=table.layer.map(ratios), l1_product=table.layer.map(products))


def adams_reach(layers: pd.DataFrame) -> pd.DataFrame:
    r"""How far Adam can move each largest singular value, and how far it did.

    A step moves a weight by about the learning rate, so that to first order, where all agree and all steps do,

    .. math:: |\Delta\sigma_1| \lesssim \sum_t \eta_t \, \lVert u_1 \rVert_1 \lVert v_1 \rVert_1

    Args:
        layers: the table of that name.

    Returns:
        One row a layer of the blocks: layer, pcdr_1 and sigma_1 (as published), reach, and for every variant by how
        much sigma_1 changed (mean over seeds).
    """
    trained = layers[layers.variant != BEFORE]
    recipe = backbone_finetuning("AdamW", 0, {"lr": float(trained.lr.iloc[0])})
    total = sum(learning_rate(recipe, step) for step in range(recipe.steps))
    before = layers[layers.variant == BEFORE].set_index("layer")
    table = before[["pcdr_1", "sigma_1"]].assign(reach=total * before.l1_product)
    for variant, own in trained.groupby("variant", sort=False):
        table[variant] = own.groupby("layer").sigma_1.mean() - before.sigma_1
    return table.reset_index()


# --- all of them, resumed where they were -----------------------------------------------------------------------------


@dataclass(frozen=True)
class Subject:
    """Which backbone the study is of, at which image size, and where it is trained and measured."""

    backbone: str = BACKBONE
    image_size: int = IMAGE_SIZE
    device: str = "cpu"

    @property
    def run(self) -> str:
        """The label of its tables: ``RUN`` for the study that is committed.

        Example:
            >>> Subject().run, Subject("dinov3-b16", 224).run
            ('self_supervised', 'self_supervised_dinov3-b16')
        """
        return RUN if self.backbone == BACKBONE else f"{RUN}_{self.backbone}"

    def finetuning(self, variant: str, seed: int, settings: Mapping[str, float]) -> Recipe:
        """:func:`backbone_finetuning` of this backbone."""
        return backbone_finetuning(variant, seed, settings, **asdict(self))

    def check(self) -> None:
        """FileNotFoundError, RuntimeError or ValueError where backbone or images are not here."""
        photographs("train")
        published_backbone(self.backbone)


def network_key(recipe: Recipe) -> str:
    """What a network is known by in the tables: its recipe, wherever it was trained."""
    return recipe_key(replace(recipe, device="cpu"))


def known_rows(name: str, subject: Subject) -> pd.DataFrame:
    """What was measured: the committed table, and what was measured here since.

    Args:
        name: of the table: a stage, or ``"layers"``.
        subject: whose.

    Returns:
        Its rows, each once; empty at the start.
    """
    files = [root / "data" / subject.run / f"{name}.csv" for root in (repository_root(), output_root())]
    files += sorted(_row_file(name, "*", subject).parent.glob(f"{name}-*.csv"))
    tables = [pd.read_csv(path, dtype={"key": str}) for path in dict.fromkeys(files) if path.is_file()]
    if not tables:
        return pd.DataFrame(columns=["key", "layer" if name == "layers" else "method", "bits"])
    rows = pd.concat(tables)
    by = [column for column in ("key", "layer", "method", "bits") if column in rows]
    return rows.drop_duplicates(by, keep="last").reset_index(drop=True)


def _row_file(name: str, key: str, subject: Subject) -> Path:
    return output_root() / "build" / subject.run / f"{name}-{key}.csv"


def missing_cells(rows: pd.DataFrame, key: str, stage: str, methods: Sequence[str]) -> list[tuple[str, str]]:
    """The cells of a stage that a network was not measured in yet, full precision among them.

    Args:
        rows: of :func:`known_rows`.
        key: of the network.
        stage: a key of ``CELLS``.
        methods: of ``QUANTIZERS``; others are left for another time.
    """
    own = rows[rows.key == key]
    have = set(zip(own.method, own.bits, strict=True))
    wanted = [("FP", "FP"), *(cell for cell in CELLS[stage] if cell[0] in methods)]
    return [cell for cell in wanted if cell not in have]


def measure(recipe: Recipe, stage: str, cells: Sequence[tuple[str, str]], subject: Subject) -> None:
    """Train one network unless it is stored, and leave its rows on disk; called in a worker process.

    Args:
        recipe: what is trained.
        stage: a key of ``CELLS``.
        cells: what it is measured under; full precision always is.
        subject: whose study.
    """
    torch.set_num_threads(1)
    if (trained := find(recipe)) is None:
        train_and_store(recipe)
        trained = find(recipe)
    same = {"key": network_key(recipe), "hardware": _hardware(subject.device)}
    model = trained.model().to(subject.device)
    if stage == "evidence" and same["key"] not in set(known_rows("layers", subject).key):
        _write("layers", layer_rows(model, _shown(subject)).assign(**same), subject)
    rows = rows_of(model, recipe.data, *SPLIT[stage], [cell for cell in cells if cell[0] != "FP"])
    _write(stage, pd.DataFrame(rows).assign(**same), subject)


def measure_before(subject: Subject) -> None:
    """The layers of the backbone as it was published, left on disk; called in a worker process."""
    torch.set_num_threads(1)
    model = VisionBackbone(subject.backbone, subject.image_size).build(0).to(subject.device).eval()
    rows = layer_rows(model, _shown(subject))
    _write("layers", rows.assign(key=BEFORE, hardware=_hardware(subject.device)), subject)


def _shown(subject: Subject) -> Tensor:
    return FashionMNIST(subject.image_size).fixed_set("calibration", LAYER_IMAGES)[0].to(subject.device)


def _hardware(device: str) -> str:
    return torch.cuda.get_device_name(device) if device.startswith("cuda") else device.upper()


def _write(name: str, rows: pd.DataFrame, subject: Subject) -> None:
    """Add rows to those of the same network."""
    path = _row_file(name, rows.key.iloc[0], subject)
    if path.is_file():
        by = ["layer"] if name == "layers" else ["method", "bits"]
        rows = pd.concat([pd.read_csv(path, dtype={"key": str}), rows]).drop_duplicates(by, keep="last")
    write_text(path, rows.to_csv(index=False))


def wanted(stage: str, variants: Sequence[str], seeds: Sequence[int], subject: Subject) -> Jobs:
    """Labels and recipe of every network of a stage, in the order in which they are measured: seed by seed.

    Raises:
        ValueError: if the search has not chosen a setting that is needed.
    """
    best = best_settings(subject)
    if stage == "tuning":
        rate = best.get("AdamW", {})
        tried = [(variant, rate | own) for variant in variants for own in GRID.get(variant, ())]
        return [
            (_labels(variant, own, seed), subject.finetuning(variant, seed, own))
            for seed in seeds
            for variant, own in tried
            if "lr" in own
        ]
    return [
        (_labels(variant, best.get(variant, {}), seed), subject.finetuning(variant, seed, best.get(variant, {})))
        for seed in seeds
        for variant in variants
    ]


def _labels(variant: str, settings: Mapping[str, float], seed: int) -> dict[str, Any]:
    return {"variant": variant} | {name: settings.get(name) for name in SETTING_COLUMNS} | {"seed": seed}


def best_settings(subject: Subject) -> dict[str, dict[str, float]]:
    """Variant to the setting that the search chose (:func:`s2d.lab.winners.winners`), learning rate included.

    Only the variants of which every setting was tried; AdamW's learning rate is chosen first.
    """
    rows = known_rows("tuning", subject)
    if rows.empty:
        return {}
    done: dict[str, dict[str, float]] = {}
    parts = []
    for variant, settings in GRID.items():
        tried = [done.get("AdamW", {}) | own for own in settings]
        if "lr" not in tried[0]:
            break
        jobs = [
            (_labels(variant, own, seed), subject.finetuning(variant, seed, own))
            for seed in STAGE_SEEDS["tuning"]
            for own in tried
        ]
        if any(missing_cells(rows, network_key(recipe), "tuning", QUANTIZERS) for _, recipe in jobs):
            continue
        parts.append(table_of(rows, jobs))
        won = winners(tuning_table(pd.concat(parts, ignore_index=True)))
        row = won[won.variant == variant].iloc[0]
        done[variant] = {name: float(row[name]) for name in SETTING_COLUMNS if not pd.isna(row[name])}
    if "AdamW" in done:
        done |= {variant: done["AdamW"] | own for variant, own in UNTUNED.items()}
    return done


def table_of(rows: pd.DataFrame, jobs: Jobs) -> pd.DataFrame:
    """The rows of the networks that were measured, under the names they have in this study.

    Args:
        rows: of :func:`known_rows`.
        jobs: of :func:`wanted`.
    """
    parts = []
    for labels, recipe in jobs:
        own = rows[rows.key == network_key(recipe)]
        own = own.drop(columns=[name for name in labels if name in own])
        front = pd.DataFrame({name: [value] * len(own) for name, value in labels.items()}, index=own.index)
        parts.append(pd.concat([front, own], axis=1))
    return pd.concat([part for part in parts if len(part)] or [rows.iloc[:0]], ignore_index=True)


def run(
    stage: str,
    variants: Sequence[str] = VARIANTS,
    seeds: Sequence[int] = (),
    *,
    methods: Sequence[str] = QUANTIZERS,
    subject: Subject | None = None,
    workers: int | None = None,
) -> pd.DataFrame:
    """Measure what is missing, write the tables.

    Args:
        stage: ``"tuning"`` or ``"evidence"``.
        variants, seeds, methods: of this run (by default all, on the stage's seeds); the tables keep what they have of
            others.
        subject: by default the study that is committed.
        workers: processes, one thread each.

    Returns:
        The table of the stage.

    Raises:
        FileNotFoundError, RuntimeError, ValueError: if backbone or images are not here, or the search is not finished,
            before anything is trained.
    """
    subject, seeds = subject or Subject(), tuple(seeds) or STAGE_SEEDS[stage]
    subject.check()
    if stage == "tuning" and "AdamW" in variants and len(variants) > 1:
        run(stage, ["AdamW"], seeds, subject=subject, workers=workers)  # the others take its learning rate
    if stage == "evidence" and BEFORE not in set(known_rows("layers", subject).key):
        _in_workers(measure_before, {BEFORE: (subject,)}, workers, "layers")
    known, jobs = known_rows(stage, subject), {}
    for labels, recipe in wanted(stage, variants, seeds, subject):
        if cells := missing_cells(known, key := network_key(recipe), stage, methods):
            jobs[f"{labels['variant']}, seed {labels['seed']} ({key})"] = (recipe, stage, cells, subject)
    try:
        _in_workers(measure, jobs, workers, stage)
    finally:  # also what a run that was interrupted has measured
        rows = save_measured(stage, seeds, subject)
    return rows


def _in_workers(work, jobs: Mapping[str, tuple], workers: int | None, label: str) -> None:
    if jobs:
        count = min(parallel.worker_count(workers), len(jobs))
        parallel.run(work, list(jobs.values()), names=list(jobs), workers=count, unit="network", label=label)


def save_measured(stage: str, seeds: Sequence[int], subject: Subject) -> pd.DataFrame:
    """Write the tables of what was measured so far.

    Args:
        stage: ``"tuning"`` or ``"evidence"``.
        seeds: beside the stage's own.
        subject: whose.

    Returns:
        The stage's table; without rows where nothing was measured, and then nothing is written.
    """
    seeds, rows = sorted({*STAGE_SEEDS[stage], *seeds}), known_rows(stage, subject)
    told = [name for name in VARIANTS if stage == "tuning" or name in best_settings(subject)]
    jobs = sorted(wanted(stage, told, seeds, subject), key=lambda job: VARIANTS.index(job[0]["variant"]))
    table = table_of(rows, jobs)
    if table.empty:
        return table
    order = [("FP", "FP"), *CELLS[stage]]
    place = [order.index((row.method, row.bits)) for row in table.itertuples()]
    network = table.groupby(["variant", "seed", "key"], sort=False).ngroup()
    table = table.iloc[pd.DataFrame({"network": network, "place": place}).sort_values(["network", "place"]).index]
    parameters = {"backbone": subject.backbone, "image_size": subject.image_size, "steps": STEPS}
    parameters |= {"batch_size": BATCH_SIZE, "refresh_every": REFRESH_EVERY}
    parameters["seeds"] = sorted({int(seed) for seed in table.seed})
    source = provenance("s2d.lab.self_supervised", parameters)
    save_table(table.reset_index(drop=True), stage, run=subject.run, source=source)
    if stage == "evidence":
        layers = known_rows("layers", subject)
        labels = _labels(BEFORE, {}, 0) | {"seed": None}
        before = layers[layers.key == BEFORE].drop(columns=[name for name in labels if name in layers])
        before = pd.concat([pd.DataFrame([labels] * len(before), index=before.index), before], axis=1)
        save_table(pd.concat([before, table_of(layers, jobs)]), "layers", run=subject.run, source=source)
    return table


def main(argv: Sequence[str] | None = None) -> None:
    """Run a stage and print what it says."""
    parser = argparse.ArgumentParser(
        prog="python -m s2d.lab.self_supervised",
        description="Fine-tune a self-supervised backbone with and without S2D; quantize.",
    )
    parser.add_argument("stage", choices=["tune", "evidence", "all"])
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS), metavar="VARIANT")
    parser.add_argument("--seeds", nargs="+", type=int, metavar="SEED", help="default: 0 to tune, 2 to 4 as evidence")
    parser.add_argument("--methods", nargs="+", choices=QUANTIZERS, default=list(QUANTIZERS), metavar="METHOD")
    parser.add_argument("--backbone", default=BACKBONE, help="whatever s2d.models.load takes (default: dinov2-s)")
    parser.add_argument("--image-size", type=int, default=IMAGE_SIZE, help="pixels (default: 28)")
    parser.add_argument("--workers", type=int, help="processes (default: $S2D_WORKERS or the number of cores)")
    parser.add_argument("--device", default="cpu", help="such as cuda (default: cpu)")
    arguments = parser.parse_args(argv)
    if arguments.stage == "all" and arguments.seeds:
        parser.error("--seeds is of one stage: the stages of all have their own")
    subject = Subject(arguments.backbone, arguments.image_size, arguments.device)
    options = {"methods": arguments.methods, "subject": subject, "workers": arguments.workers}
    try:
        for stage in (
            ["tuning", "evidence"]
            if arguments.stage == "all"
            else [{"tune": "tuning"}.get(arguments.stage, arguments.stage)]
        ):
            rows = run(stage, arguments.variants, arguments.seeds or (), **options)
            by = ["variant", *(SETTING_COLUMNS if stage == "tuning" else ()), "method", "bits"]
            means = rows.groupby(by, sort=False, dropna=False).accuracy.mean()
            print((100 * means).unstack(["method", "bits"], sort=False).round(1).to_string())
    except (FileNotFoundError, RuntimeError, ValueError) as error:
        parser.error(str(error))
    except KeyboardInterrupt:
        print("interrupted: networks that were measured are kept; run again to go on", file=sys.stderr)
        raise SystemExit(130) from None


if __name__ == "__main__":
    main()
