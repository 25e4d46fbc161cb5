"""A real network fine-tuned: all-MiniLM-L6-v2 on WordNet's glosses, every variant tuned alike, then quantized.

    python -m s2d.lab.encoder tune            every setting on the tuning seeds, judged on validation glosses
    python -m s2d.lab.encoder evidence        the winners on the evidence seeds, on test glosses
    python -m s2d.lab.encoder ablations       one setting of S2D changed at a time, on three of these seeds
    python -m s2d.lab.encoder staleness       how long a cached penalty stays right (G.2)
    python -m s2d.lab.encoder all --device cuda --workers 12                  one after the other, on an accelerator
    python -m s2d.lab.encoder evidence --seeds 2 --variants AdamW S2D         (a piece of it)
    python -m s2d.lab.encoder quantizers      every quantizer on the encoder as it was published (ten minutes)

write tables of these names (evidence also ``layers.csv``) in ``data/encoder``, one row a network and quantizer (or
layer). What these have is not done again: a run that was interrupted goes on where it was, also on another machine. A
network takes five to ten minutes on one core.

What is asked: does S2D help a network that somebody else pretrained, whose outliers are the size of the paper's? AdamW
is tuned as hard as what it is compared with.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from s2d.files import write_text
from s2d.lab import parallel
from s2d.lab.evaluate import statistics_of
from s2d.lab.glosses import Glosses, glosses
from s2d.lab.identity import recipe_key
from s2d.lab.paths import output_root, repository_root
from s2d.lab.quantization import METHODS, logit_error, logits_of, setting
from s2d.lab.recipes import AS_PRINTED, CAP, EVIDENCE_SEEDS, S2D_DECOUPLED, TUNING_SEEDS, arm
from s2d.lab.results import provenance, save_table
from s2d.lab.sentence_encoder import PADDING, SentenceEncoder, encoder_folder
from s2d.lab.staleness import Mode, follow
from s2d.lab.statistics import tuning_table
from s2d.lab.store import Trained, find, obtain_checkpoints, train_and_store
from s2d.lab.training import Recipe
from s2d.lab.winners import SETTING_COLUMNS, winners
from s2d.layers import linear_maps
from s2d.ptq import parse_bits, quantize, quantize_each

RUN = "encoder"
STEPS = 300
BATCH_SIZE = 16
REFRESH_EVERY = 50
SEEDS = EVIDENCE_SEEDS[:5]
ABLATION_SEEDS = SEEDS[:3]
CALIBRATION = 32
PUBLISHED_TEST = 128
WEIGHT_DECAY = 0.01

TUNED_RATE = "AdamW, tuned learning rate"
LONGER = "AdamW, twice the steps"
FORMS = ("S2D", "S2D, live", S2D_DECOUPLED)
_S2D = ({"lam": 5e-3, "tau": 0.6}, {"lam": 5e-2, "tau": 0.6}, {"lam": 0.5, "tau": 0.6}, {"lam": 5e-2, "tau": 0.3})
_RATES = tuple({"lr": lr} for lr in (2e-4, 4e-4, 8e-4, 1.6e-3))
GRID: dict[str, tuple[dict[str, float], ...]] = {
    # The learning rate is chosen first, and every other variant uses the winner.
    "AdamW": _RATES,
    TUNED_RATE: _RATES,  # the same networks; which is best at low bits
    "AdamW, tuned weight decay": tuple({"weight_decay": wd} for wd in (0.3, 1.0, 3.0, 10.0)),
    "No PCDR": tuple({"lam": lam} for lam in (5e-4, 5e-3, 5e-2, 0.5)),
    "S2D": _S2D,
    "S2D, live": _S2D,
    S2D_DECOUPLED: tuple({"lam": lam, "tau": tau} for tau in (0.6, 0.3) for lam in (5.0, 20.0)),
    CAP: tuple({"cap": cap} for cap in (2.0, 2.5, 3.0, 4.0)),
}
"""Variant to the settings that are tried: as many for each, on the same seeds."""
UNTUNED: dict[str, dict[str, float]] = {
    LONGER: {},
    AS_PRINTED: {"lam": 5e-4, "tau": 0.95},  # second-hand
}
VARIANTS = ("AdamW", TUNED_RATE, "AdamW, tuned weight decay", LONGER, "No PCDR", AS_PRINTED, *FORMS, CAP)

STALENESS_STEPS = 100  # as in G.2
SIGMA = 10.0  # about MiniLM's largest singular value
ABLATIONS: dict[str, dict[str, dict[str, float | str | None]]] = {
    "refresh interval": {"10": {"refresh_every": 10}, "100": {"refresh_every": 100}},
    "k_max": {"1": {"k_max": 1}, "10": {"k_max": 10}},
    "tau": {"0.8": {"tau": 0.8}, "0.95": {"tau": 0.95}},
    "power": {"3": {"power": 3}, "4": {"power": 4}},
    "criterion": {"top 3 of every layer": {"criterion": "all"}},
}
"""Tables 6, 10 and 11 in shape: group, setting, what it changes. Another power keeps the force on ``SIGMA``."""

PER_TOKEN = {"activations": "per_token"}
QUANTIZERS: dict[str, dict[str, Any]] = {
    "RTN": METHODS["RTN"],
    "RTN, per token": METHODS["RTN"] | PER_TOKEN,
    "PTQ4ViT": METHODS["PTQ4ViT"],
    "RepQ-ViT": METHODS["RepQ-ViT"],
    "ERQ": METHODS["ERQ"],
}
"""Quantizers by the name they have in the tables."""
AS_PUBLISHED: dict[str, dict[str, Any]] = {
    "RTN": METHODS["RTN"],
    "RTN, symmetric": METHODS["RTN"] | {"symmetric": True},
    "rotation, then RTN": METHODS["RTN"] | {"transforms": ["rotation"]},
    "PTQ4ViT": METHODS["PTQ4ViT"],
    "RepQ-ViT": METHODS["RepQ-ViT"],
    "ERQ": METHODS["ERQ"],
}
"""What the published encoder is quantized by. SmoothQuant finds nothing to smooth in it: it is RTN."""
GRANULARITIES = ("per_tensor", "per_token")
PUBLISHED_BITS = ("W8A8", "W6A6", "W4A4")


Jobs = list[tuple[dict[str, Any], Recipe]]
"""Networks: what a table says of each, and its recipe."""


class Stage(NamedTuple):
    """On which glosses the networks of a stage are measured, under what, and the seeds of their fine-tuning."""

    split: str
    items: int
    seeds: tuple[int, ...]
    cells: tuple[tuple[str, str], ...]


_FEW = (("RTN", "W6A6"), ("RTN", "W5A5"), ("RTN", "W4A4"), ("ERQ", "W4A4"))
_ALL = (
    *(("RTN", bits) for bits in ("W6A6", "W4A4")),
    ("RTN, per token", "W4A4"),
    ("RepQ-ViT", "W4A4"),
    *(("ERQ", bits) for bits in ("W6A6", "W4A4")),
)
STAGES = {
    "tuning": Stage("validation", 2000, TUNING_SEEDS, _FEW),
    "evidence": Stage("test", 2000, SEEDS, _ALL),
    "ablations": Stage("test", 4000, ABLATION_SEEDS, _FEW),
}


def encoder_finetuning(
    variant: str, seed: int, settings: Mapping[str, float], *, steps: int | None = None, device: str = "cpu"
) -> Recipe:
    """Fine-tuning of the published encoder with a new head.

    Args:
        variant: one of ``VARIANTS``.
        seed: of the head and of the training stream, the same for every variant.
        settings: lr, and those of the variant (:func:`chosen_settings`).
        steps: optimizer steps, by default ``STEPS``.
        device: where it is trained.

    Raises:
        ValueError: for an unknown variant, or a setting that is missing.

    Example:
        >>> encoder_finetuning("AdamW", 2, {"lr": 1e-4}).optimizer.lr
        0.0001

    Paper: appendix D and Tables 6, 10, 11 in shape, on a smaller network.
    """
    if variant not in VARIANTS:
        raise ValueError(f"unknown variant {variant!r}: choose one of {', '.join(VARIANTS)}")
    needed = {"lr", *(GRID[variant][0] if variant in GRID else UNTUNED[variant])}
    if missing := sorted(needed - settings.keys()):
        raise ValueError(f"{variant} needs {', '.join(missing)}: run python -m s2d.lab.encoder tune, or give it")
    own = {"weight_decay": WEIGHT_DECAY} | dict(settings)
    optimizer, s2d = arm(variant, own, betas=(0.9, 0.999), refresh_every=REFRESH_EVERY)
    steps = (STEPS if steps is None else steps) * (2 if variant == LONGER else 1)
    return Recipe(
        seed=seed,
        steps=steps,
        warmup=min(30, steps),
        optimizer=optimizer,
        batch_size=BATCH_SIZE,
        data=Glosses(),
        model=SentenceEncoder(),
        s2d=s2d,
        measure_every=steps,
        device=device,
    )


def encoder_ablation(
    variant: str, group: str, setting: str, seed: int, settings: Mapping[str, float], **options
) -> Recipe:
    """Fine-tuning with a form of S2D in which one setting differs.

    Args:
        variant: of ``FORMS``.
        group, setting: keys of ``ABLATIONS``.
        seed, settings, **options: see :func:`encoder_finetuning`.

    Raises:
        ValueError: for an unknown group or setting.

    Example:
        >>> recipe = encoder_ablation("S2D", "power", "3", 2, {"lr": 1e-4, "lam": 0.03, "tau": 0.6})
        >>> recipe.s2d["power"], round(recipe.s2d["lam"], 6)
        (3, 0.003)

    Paper: Tables 6, 10 and 11 in shape.
    """
    if setting not in ABLATIONS.get(group, ()):
        known = ", ".join(f"{g}: {s}" for g, each in ABLATIONS.items() for s in each)
        raise ValueError(f"unknown ablation {group!r}, {setting!r}: choose one of {known}")
    base = encoder_finetuning(variant, seed, settings, **options)
    changed = dict(ABLATIONS[group][setting])
    if group == "power":  # the force is lam sigma^n
        changed["lam"] = settings["lam"] * SIGMA ** (2 - changed["power"])
    return replace(base, s2d=base.s2d | changed)


# --- one trained network ----------------------------------------------------------------------------------------------


@torch.no_grad()
def gloss_logits(model: nn.Module, x: Tensor, batch_size: int = 128) -> Tensor:
    """Logits of padded glosses, those of a length together: padding is masked, and half of what there would be to do.

    Args:
        model: gives logits of token numbers, whatever their length.
        x: token numbers ``(n, length)``, padded at the end.
        batch_size: glosses at once.
    """
    model.eval()
    lengths = (x != PADDING).sum(1)
    order = lengths.argsort(stable=True)
    batches = [model(x[rows, : int(lengths[rows].max())]) for rows in order.split(batch_size)]
    return torch.cat(batches)[order.argsort()]


def rows_of(trained: Trained, stage: Stage) -> list[dict[str, Any]]:
    """What one network does in full precision and under some quantizers, on the device it was trained on.

    Args:
        trained: a fine-tuned encoder.
        stage: what it is tested on, and under which keys of :data:`QUANTIZERS`.

    Returns:
        One row a cell, full precision first: method, bits, split, items, accuracy, logit_error (``|q - fp|^2 /
        |fp|^2``).
    """
    data, device = trained.recipe.data, trained.recipe.device
    model = trained.model().to(device)
    x, y = (part.to(device) for part in data.fixed_set(stage.split, stage.items))
    calibration = data.fixed_set("calibration", CALIBRATION)[0].to(device)
    settings = [setting(parse_bits(bits), **QUANTIZERS[name]) for name, bits in stage.cells]
    full = gloss_logits(model, x)
    found = [full]
    for quantized in quantize_each(model, settings, calibration=calibration, batch_size=CALIBRATION):
        found.append(gloss_logits(quantized, x))
    same = {"split": stage.split, "items": len(y)}
    return [
        {"method": name, "bits": bits, **same, "accuracy": (logits.argmax(-1) == y).double().mean().item()}
        | {"logit_error": logit_error(logits, full)}
        for (name, bits), logits in zip((("FP", "FP"), *stage.cells), found, strict=True)
    ]


@torch.no_grad()
def layer_rows(trained: Trained, *, items: int = 256) -> pd.DataFrame:
    """Table 7 in shape: each FFN's two layers, what they put out and what a quantizer of their input has to span.

    Args:
        trained: a fine-tuned encoder.
        items: calibration glosses shown.

    Returns:
        The columns of :func:`s2d.lab.evaluate.layer_statistics`, and input_ratio (largest input over the root mean
        square).
    """
    device = trained.recipe.device
    model = trained.model().to(device)
    x = trained.recipe.data.fixed_set("calibration", items)[0].to(device)
    ratios: dict[str, float] = {}

    def seen(name: str, value: Tensor) -> None:
        ratios[name] = (value.abs().max() / value.square().mean().sqrt()).item()

    hooks = [
        linear.module.register_forward_pre_hook(lambda _, inputs, name=name: seen(name, inputs[0]))
        for name, linear in linear_maps(model).items()
    ]
    try:
        table = statistics_of(model, x)
    finally:
        for hook in hooks:
            hook.remove()
    table = table[~table.layer.str.contains("attention") & (table.layer != "head")].reset_index(drop=True)
    return table.assign(input_ratio=table.layer.map(ratios))


def fine_tuned_here(variants: Sequence[str], seed: int, *, steps: int = STEPS, items: int = 1000) -> pd.DataFrame:
    """A few arms of one seed, trained here unless they are stored, and quantized: what the notebook does live.

    Args:
        variants: of ``VARIANTS``, with the settings that the search chose.
        seed: of the head and of the training stream.
        steps: optimizer steps.
        items: test glosses.

    Returns:
        Columns variant, seed, and those of :func:`rows_of`.

    Raises:
        FileNotFoundError, ValueError: if encoder or glosses are not here, before anything is trained.
    """
    encoder_folder(SentenceEncoder().encoder), glosses()
    best = best_settings()
    recipes = {name: [encoder_finetuning(name, seed, best[name], steps=steps)] for name in variants}
    stage = Stage("test", items, (seed,), _FEW)
    return pd.concat(
        pd.DataFrame(rows_of(trained, stage)).assign(variant=name, seed=seed)
        for name, (trained,) in obtain_checkpoints(recipes).items()
    )


# --- all of them, resumed where they were -----------------------------------------------------------------------------


def _row_file(key: str, stage: str) -> Path:
    return output_root() / "build" / "encoder" / f"{stage}-{key}.csv"


def _table_file(stage: str) -> Path:
    return Path("data") / RUN / f"{stage}.csv"


def known_rows(stage: str) -> pd.DataFrame:
    """What was measured: the committed table, and what was measured here since.

    Args:
        stage: a table of this study.

    Returns:
        Its rows, each once; empty at the start.
    """
    files = [root / _table_file(stage) for root in {output_root(), repository_root()}]
    files += sorted(_row_file("", stage).parent.glob(f"{stage}-*.csv"))
    # A key of digits alone (or with an e among them) is no number.
    tables = [pd.read_csv(path, dtype={"key": str}) for path in files if path.is_file()]
    if not tables:
        return pd.DataFrame(columns=["variant", "seed", "key", "method", "bits", "accuracy"])
    rows = pd.concat(tables)
    names = [name for name in ("key", "layer", "step", "method", "bits") if name in rows.columns]
    return rows.drop_duplicates(names, keep="last").reset_index(drop=True)


def network_key(recipe: Recipe) -> str:
    """What a network is known by in the tables: its recipe, wherever it was trained."""
    return recipe_key(replace(recipe, device="cpu"))


def hardware(device: str) -> str:
    """The name of the device, as the tables have it: ``"CPU"``, or the accelerator's own."""
    return torch.cuda.get_device_name(device) if device.startswith("cuda") else device.upper()


def _measure_missing(
    work: Callable[..., None], jobs: Mapping[str, tuple], workers: int | None, *, unit: str, label: str
) -> None:
    """Do the jobs, by their names, in worker processes; none starts where there is nothing to do."""
    if jobs:
        count = min(parallel.worker_count(workers), len(jobs))
        parallel.run(work, list(jobs.values()), names=list(jobs), workers=count, unit=unit, label=label)


def missing_cells(rows: pd.DataFrame, key: str, stage: str) -> list[tuple[str, str]]:
    """The cells of a stage that a network was not measured in yet, full precision among them.

    Args:
        rows: of :func:`known_rows`.
        key: of the network (:func:`network_key`).
        stage: a key of ``STAGES``.

    Returns:
        Method and bits of each; none of a network whose training diverged.
    """
    own = rows[rows.key == key]
    if len(own) and own.accuracy.isna().any():
        return []
    have = set(zip(own.method, own.bits, strict=True))
    return [cell for cell in (("FP", "FP"), *STAGES[stage].cells) if cell not in have]


def measure(recipe: Recipe, stage: str) -> None:
    """Train one network unless it is stored, and leave the rows that are missing on disk; called in a worker process.

    Training that diverges is a result too: one row without accuracy.

    Args:
        recipe: what is trained.
        stage: a key of ``STAGES``.
    """
    torch.set_num_threads(1)
    same = {"key": network_key(recipe), "hardware": hardware(recipe.device)}
    trained = find(recipe)
    if trained is None:
        try:
            train_and_store(recipe)
        except ValueError as error:
            if "lower lr" not in str(error):
                raise
            row = {"method": "FP", "bits": "FP", "split": STAGES[stage].split, "items": STAGES[stage].items}
            rows = pd.DataFrame([row | {"accuracy": None} | same])
            write_text(_row_file(same["key"], stage), rows.to_csv(index=False))
            return
        trained = find(recipe)
    if stage == "evidence":
        layers = layer_rows(trained).assign(**same)
        write_text(_row_file(same["key"], "layers"), layers.to_csv(index=False))
    missing = missing_cells(known_rows(stage), same["key"], stage)
    wanted_here = STAGES[stage]._replace(cells=tuple(cell for cell in missing if cell[0] != "FP"))
    rows = pd.DataFrame(rows_of(trained, wanted_here)).assign(**same)
    if (path := _row_file(same["key"], stage)).is_file():
        rows = pd.concat([pd.read_csv(path, dtype={"key": str}), rows]).drop_duplicates(["method", "bits"])
    write_text(path, rows.to_csv(index=False))


def measure_staleness(name: str, mode: Mode, recipe: Recipe) -> None:
    """Follow the cached penalty of one mode and leave the rows on disk; called in a worker process.

    Args:
        name: of the mode.
        mode: how the penalty is applied.
        recipe: whose model, data and optimizer are used.
    """
    torch.set_num_threads(1)
    model = recipe.model.build(recipe.seed).to(recipe.device)
    rows = follow(
        model, recipe, mode, steps=STALENESS_STEPS, refresh_every=STALENESS_STEPS, every=STALENESS_STEPS // 10
    )
    key = f"{name} {recipe.seed}"
    found = pd.DataFrame(rows).assign(mode=name, seed=recipe.seed, key=key, hardware=hardware(recipe.device))
    write_text(_row_file(key.replace(" ", "_"), "staleness"), found.to_csv(index=False))


def run_staleness(workers: int | None = None, device: str = "cpu") -> pd.DataFrame:
    """G.2 on the encoder: the cached penalty against a fresh one over the steps of one refresh interval.

    Args:
        workers, device: see :func:`run`.

    Returns:
        Columns mode, seed, hardware, and those of :func:`s2d.lab.staleness.follow`.

    Raises:
        FileNotFoundError, ValueError: see :func:`run`.
    """
    encoder_folder(SentenceEncoder().encoder), glosses()
    check_searched(["AdamW", "S2D", S2D_DECOUPLED])
    best = best_settings()
    modes = {
        "no penalty": Mode(0.0),
        AS_PRINTED: Mode(UNTUNED[AS_PRINTED]["lam"]),
        "S2D": Mode(best["S2D"]["lam"]),
        S2D_DECOUPLED: Mode(best[S2D_DECOUPLED]["lam"], "live", "decoupled"),
    }
    jobs = [
        (name, mode, encoder_finetuning("AdamW", seed, best["AdamW"], device=device))
        for name, mode in modes.items()
        for seed in ABLATION_SEEDS
    ]
    keys = [f"{name} {recipe.seed}" for name, _, recipe in jobs]
    known = set(known_rows("staleness").key)
    missing = {key: job for key, job in zip(keys, jobs, strict=True) if key not in known}
    _measure_missing(measure_staleness, missing, workers, unit="run", label="staleness")
    rows = known_rows("staleness")
    rows = rows[rows.key.isin(keys)].sort_values(["mode", "seed", "step"], kind="stable", key=_by_place(list(modes)))
    rows = rows[["mode", "seed", *[name for name in rows.columns if name not in ("mode", "seed")]]]
    parameters = {"steps": STALENESS_STEPS, "seeds": list(ABLATION_SEEDS)}
    save_table(rows, "staleness", run=RUN, source=provenance("s2d.lab.encoder", parameters))
    return rows


def _by_place(names: Sequence[str]):
    return lambda column: column.map(names.index) if column.name == "mode" else column


def measure_published(name: str, activations: str, bits: str) -> None:
    """Quantize the published encoder one way and leave the row on disk; called in a worker process.

    The error is that of the normalised embeddings of test glosses, :math:`|q - f| / |f|`.

    Args:
        name: a key of ``AS_PUBLISHED``.
        activations: of ``GRANULARITIES``.
        bits: such as ``"W4A4"``.
    """
    torch.set_num_threads(1)
    model, data = SentenceEncoder().build(0).eval(), Glosses()
    model.head = nn.Identity()
    calibration, x = data.fixed_set("calibration", CALIBRATION)[0], data.fixed_set("test", PUBLISHED_TEST)[0]
    options = setting(parse_bits(bits), **AS_PUBLISHED[name], activations=activations)
    quantized = quantize(model, calibration=calibration, **options)
    found, full = (F.normalize(logits_of(each, x), dim=-1) for each in (quantized, model))
    row = {"method": name, "activations": activations, "bits": bits, "items": len(x)}
    row |= {"error": ((found - full).norm() / full.norm()).item(), "key": activations}
    path = _row_file(f"{list(AS_PUBLISHED).index(name)}-{activations}-{bits}", "quantizers")
    write_text(path, pd.DataFrame([row]).to_csv(index=False))


def run_published(workers: int | None = None) -> pd.DataFrame:
    """The published encoder under every quantizer, bit width and granularity: what is missing is measured.

    Args:
        workers: processes, one thread each.

    Returns:
        Columns method, activations, bits, items, error.

    Raises:
        FileNotFoundError, ValueError: see :func:`run`.
    """
    encoder_folder(SentenceEncoder().encoder), glosses()
    jobs = [(name, kind, bits) for name in AS_PUBLISHED for kind in GRANULARITIES for bits in PUBLISHED_BITS]
    known = known_rows("quantizers")
    done = set(zip(known.method, known.key, known.bits, strict=True))
    missing = {" ".join(job): job for job in jobs if job not in done}
    _measure_missing(measure_published, missing, workers, unit="quantizer", label="quantizers")
    rows = known_rows("quantizers").set_index(["method", "key", "bits"]).loc[jobs].reset_index()
    rows = rows[["method", "activations", "bits", "items", "error", "key"]]
    parameters = {"calibration": CALIBRATION, "items": PUBLISHED_TEST}
    save_table(rows, "quantizers", run=RUN, source=provenance("s2d.lab.encoder", parameters))
    return rows.drop(columns="key")


def chosen_settings(rows: pd.DataFrame) -> dict[str, dict[str, float]]:
    """Variant to the setting that the search chose (:func:`s2d.lab.winners.winners`), learning rate included.

    Args:
        rows: of the stage ``"tuning"``.

    Returns:
        Only the variants that ``rows`` can tell.
    """
    if rows.empty:
        return {}
    found: dict[str, dict[str, float]] = {}
    for row in winners(tuning_table(rows)).to_dict("records"):
        found[row["variant"]] = {name: row[name] for name in SETTING_COLUMNS if not pd.isna(row[name])}
    if "AdamW" in found:
        found |= UNTUNED
    return {variant: found.get("AdamW", {}) | setting for variant, setting in found.items()}


def _labels(variant: str, own: Mapping[str, float], /, **more: Any) -> dict[str, Any]:
    return {"variant": variant} | dict.fromkeys(SETTING_COLUMNS) | dict(own) | more


def tuning_jobs(variants: Sequence[str], seeds: Sequence[int], rate: Mapping[str, float], device: str = "cpu") -> Jobs:
    """Every setting of some variants; ``rate`` is the learning rate (``lr``) of those that do not try their own."""
    return [
        (_labels(variant, own, seed=seed), encoder_finetuning(variant, seed, {**rate, **own}, device=device))
        for seed in seeds
        for variant in variants
        for own in GRID.get(variant, ())
    ]


def best_settings() -> dict[str, dict[str, float]]:
    """What the search has chosen so far: see :func:`chosen_settings`."""
    seeds = STAGES["tuning"].seeds
    adamw = [variant for variant in ("AdamW", TUNED_RATE) if variant in GRID]
    rates = chosen_settings(table_of("tuning", tuning_jobs(adamw, seeds, {})))
    if "AdamW" not in rates:
        return {}
    return chosen_settings(table_of("tuning", tuning_jobs(list(GRID), seeds, rates["AdamW"])))


def searched() -> set[str]:
    """The variants of which every setting was tried on every tuning seed; only these have a winner."""
    best = best_settings()
    if "AdamW" not in best:
        return set()
    known, seeds = set(known_rows("tuning").key), STAGES["tuning"].seeds
    jobs = {variant: tuning_jobs([variant], seeds, best["AdamW"]) for variant in GRID}
    found = {variant for variant, tried in jobs.items() if all(network_key(recipe) in known for _, recipe in tried)}
    return found | set(UNTUNED) if "AdamW" in found else set()


def check_searched(variants: Sequence[str]) -> None:
    """ValueError where the search of a variant is not finished: its setting would be chosen among too few."""
    done = searched()
    if lacking := [variant for variant in variants if variant not in done]:
        raise ValueError(
            f"the search is not finished for {'; '.join(lacking)}: run python -m s2d.lab.encoder tune first, or name "
            "others with --variants"
        )


def wanted(stage: str, variants: Sequence[str], seeds: Sequence[int], device: str = "cpu") -> Jobs:
    """Labels and recipe of every network of a stage, in the order of the table.

    Raises:
        ValueError: if the search has not chosen a setting that is needed.
    """
    best = best_settings()
    if stage == "tuning":
        return tuning_jobs(variants, seeds, best.get("AdamW", {}), device)
    jobs: Jobs = []
    for seed in seeds:
        for variant in variants:
            own = best.get(variant, {})
            recipe = encoder_finetuning(variant, seed, own, device=device)
            if stage == "evidence":
                jobs.append((_labels(variant, own, seed=seed), recipe))
            elif variant in FORMS:
                jobs.append((_labels(variant, own, group="none", setting="as tuned", seed=seed), recipe))
                for group, name in ((group, name) for group, names in ABLATIONS.items() for name in names):
                    recipe = encoder_ablation(variant, group, name, seed, own, device=device)
                    jobs.append((_labels(variant, own, group=group, setting=name, seed=seed), recipe))
    return jobs


def table_of(stage: str, jobs: Jobs) -> pd.DataFrame:
    """The rows of the networks that were measured, under the names they have in this study."""
    rows = known_rows(stage)
    of_key = dict(list(rows.groupby("key", sort=False)))
    parts = []
    for labels, recipe in jobs:
        if (part := of_key.get(network_key(recipe))) is not None:
            own = part.drop(columns=[name for name in (*labels, "group", "setting") if name in part.columns])
            front = pd.DataFrame({name: [value] * len(own) for name, value in labels.items()}, index=own.index)
            parts.append(pd.concat([front, own], axis=1))
    return pd.concat(parts, ignore_index=True) if parts else rows.iloc[:0]


def run(
    stage: str,
    variants: Sequence[str],
    seeds: Sequence[int] = (),
    *,
    workers: int | None = None,
    device: str = "cpu",
) -> pd.DataFrame:
    """Measure what is missing, write the table.

    Args:
        stage: a key of ``STAGES``.
        variants, seeds: of this run (by default the stage's seeds); the table keeps what it has of others.
        workers: processes, one thread each.
        device: where to train and to measure.

    Returns:
        The table.

    Raises:
        FileNotFoundError, ValueError: if encoder or glosses are not here, before anything is trained.
    """
    encoder_folder(SentenceEncoder().encoder), glosses()
    seeds = tuple(seeds) or STAGES[stage].seeds
    if stage != "tuning":
        check_searched([variant for variant in variants if stage == "evidence" or variant in FORMS])
    if stage == "tuning" and set(variants) - {"AdamW"} and "AdamW" in variants:
        run(stage, ["AdamW"], seeds, workers=workers, device=device)  # the others take its learning rate
    known = known_rows(stage)
    networks = {network_key(recipe): recipe for _, recipe in wanted(stage, variants, seeds, device)}
    missing = {
        f"{stage} of the recipe {key}, seed {recipe.seed}": (recipe, stage)
        for key, recipe in networks.items()
        if missing_cells(known, key, stage)
    }
    try:
        _measure_missing(measure, missing, workers, unit="network", label=stage)
    finally:  # also what a run that was interrupted has measured
        rows = save_measured(stage, seeds)
    return rows


def save_measured(stage: str, seeds: Sequence[int] = ()) -> pd.DataFrame:
    """Write the table of what was measured so far.

    Args:
        stage: a key of ``STAGES``.
        seeds: beside the stage's own.

    Returns:
        The table; without rows where nothing was measured, and then nothing is written.
    """
    measured = set(known_rows(stage).key)
    seeds = sorted({*STAGES[stage].seeds, *seeds})
    if stage == "tuning":
        rate = "AdamW" in best_settings()
        told = [variant for variant in VARIANTS if rate or "lr" in _tried(variant)]
    else:
        done = searched()
        told = [variant for variant in VARIANTS if variant in done]
    jobs = [job for job in wanted(stage, told, seeds) if network_key(job[1]) in measured]
    rows = table_of(stage, jobs)
    if rows.empty:
        return rows
    source = provenance("s2d.lab.encoder", {"steps": STEPS, "batch_size": BATCH_SIZE, "seeds": seeds})
    save_table(rows, stage, run=RUN, source=source)
    if stage == "evidence":
        save_table(table_of("layers", jobs), "layers", run=RUN, source=source)
    return rows


def _tried(variant: str) -> Mapping[str, float]:
    """The names of what the search tries of a variant."""
    return GRID[variant][0] if variant in GRID else {}


def main(argv: Sequence[str] | None = None) -> None:
    """Run a stage and print what it says."""
    parser = argparse.ArgumentParser(
        prog="python -m s2d.lab.encoder", description="Fine-tune a real sentence encoder with every variant; quantize."
    )
    parser.add_argument("stage", choices=["tune", "evidence", "ablations", "staleness", "all", "quantizers"])
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS), metavar="VARIANT")
    parser.add_argument("--seeds", nargs="+", type=int, metavar="SEED", help="default: 0 1 to tune, 2 to 6 as evidence")
    parser.add_argument("--workers", type=int, help="processes (default: $S2D_WORKERS or the number of cores)")
    parser.add_argument("--device", default="cpu", help="such as cuda (default: cpu)")
    arguments = parser.parse_args(argv)
    if arguments.stage == "all" and arguments.seeds:
        parser.error("--seeds is of one stage: the stages of all have their own")
    stages = [{"tune": "tuning"}.get(arguments.stage, arguments.stage)]
    try:
        if arguments.stage == "quantizers":
            table = run_published(arguments.workers).set_index(["activations", "method", "bits"]).error
            print(table.unstack("bits", sort=False).round(3).to_string())
            return
        options = {"workers": arguments.workers, "device": arguments.device}
        for stage in [*STAGES, "staleness"] if arguments.stage == "all" else stages:
            if stage == "staleness":
                cosines = run_staleness(**options).groupby(["mode", "step"], sort=False).cosine
                print(cosines.agg(["mean", "min"]).unstack("step").round(4).to_string())
            else:
                _print(stage, run(stage, arguments.variants, arguments.seeds or (), **options))
    except (FileNotFoundError, ValueError) as error:
        parser.error(str(error))
    except KeyboardInterrupt:
        print("interrupted: networks that were measured are kept; run again to go on", file=sys.stderr)
        raise SystemExit(130) from None


def _print(stage: str, rows: pd.DataFrame) -> None:
    if stage == "tuning":
        table = tuning_table(rows)
        by = ["variant", *SETTING_COLUMNS]
        print(table.groupby(by, sort=False, dropna=False)[["FP", "low_bits"]].mean().round(3).to_string())
        print("\nwinners:\n" + winners(table).to_string(index=False))
        return
    by = ["variant", "group", "setting"] if stage == "ablations" else ["variant"]
    means = rows.groupby([*by, "method", "bits"], sort=False).accuracy.mean()
    print((100 * means.unstack(["method", "bits"])).round(1).to_string())


if __name__ == "__main__":
    main()
