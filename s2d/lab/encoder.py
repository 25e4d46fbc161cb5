"""A real network fine-tuned: all-MiniLM-L6-v2 on WordNet's glosses, every variant tuned alike, then quantized.

    python -m s2d.lab.encoder tune            every setting on the tuning seeds, judged on validation glosses
    python -m s2d.lab.encoder evidence        the winners on the evidence seeds, on test glosses
    python -m s2d.lab.encoder evidence --seeds 2 --variants AdamW S2D        (a piece of it)
    python -m s2d.lab.encoder quantizers      every quantizer on the encoder as it was published (ten minutes)

write ``tuning.csv``, ``evidence.csv`` and ``quantizers.csv`` in ``data/encoder``, one row a network and quantizer. What
these have is not done again: a run that was interrupted goes on where it was, also on another machine. Training takes
about three minutes a network on one core, measuring it two (tune) or five (evidence).

What is asked: does S2D help a network that somebody else pretrained, whose outliers are the size of the paper's? AdamW
is tuned as hard as what it is compared with.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import torch
import torch.nn.functional as F
from torch import nn

from s2d.files import write_text
from s2d.lab import parallel
from s2d.lab.evaluate import layer_statistics
from s2d.lab.glosses import Glosses, glosses
from s2d.lab.identity import recipe_key
from s2d.lab.paths import output_root, repository_root
from s2d.lab.quantization import METHODS, Subject, logits_of, setting
from s2d.lab.recipes import AS_PRINTED, CAP, EVIDENCE_SEEDS, S2D_DECOUPLED, TUNING_SEEDS, arm
from s2d.lab.results import provenance, save_table
from s2d.lab.sentence_encoder import SentenceEncoder, encoder_folder
from s2d.lab.store import Trained, find, train_and_store
from s2d.lab.training import Recipe
from s2d.lab.winners import SETTING_COLUMNS, winners
from s2d.ptq import parse_bits, quantize

RUN = "encoder"
STEPS = 300
BATCH_SIZE = 16
REFRESH_EVERY = 50
SEEDS = EVIDENCE_SEEDS[:5]
VALIDATION = 1000
TEST = 1000
CALIBRATION = 32
PUBLISHED_TEST = 128

_S2D = ({"lam": 5e-3, "tau": 0.6}, {"lam": 5e-2, "tau": 0.6}, {"lam": 0.5, "tau": 0.6}, {"lam": 5e-2, "tau": 0.3})
GRID: dict[str, tuple[dict[str, float], ...]] = {
    # The learning rate is chosen first, and every other variant uses the winner.
    "AdamW": tuple({"lr": lr} for lr in (1e-4, 2e-4, 4e-4, 8e-4)),
    "AdamW, tuned weight decay": tuple({"weight_decay": wd} for wd in (0.3, 1.0, 3.0, 10.0)),
    "No PCDR": tuple({"lam": lam} for lam in (5e-4, 5e-3, 5e-2, 0.5)),
    "S2D": _S2D,
    "S2D, live": _S2D,
    S2D_DECOUPLED: tuple({"lam": lam, "tau": tau} for tau in (0.6, 0.3) for lam in (5.0, 20.0)),
    CAP: tuple({"cap": cap} for cap in (2.0, 2.5, 3.0, 4.0)),
}
"""Variant to the settings that are tried: as many for each, on the same seeds."""
VARIANTS = ("AdamW", "AdamW, tuned weight decay", "No PCDR", AS_PRINTED, "S2D", "S2D, live", S2D_DECOUPLED, CAP)
# The winners of the search (data/encoder/tuning.csv), checked by tests/test_encoder.py.
SETTINGS: dict[str, dict[str, float]] = {
    "AdamW": {},
    AS_PRINTED: {"lam": 5e-4, "tau": 0.95},  # second-hand; not tuned
}
LR = 4e-4
WEIGHT_DECAY = 0.01

PER_TOKEN = {"activations": "per_token"}
QUANTIZERS: dict[str, dict[str, Any]] = {
    "RTN": METHODS["RTN"],
    "RTN, per token": METHODS["RTN"] | PER_TOKEN,
    "PTQ4ViT": METHODS["PTQ4ViT"],
    "RepQ-ViT": METHODS["RepQ-ViT"],
    "ERQ": METHODS["ERQ"],
}
"""Quantizers by the name they have in the tables."""
TUNING_CELLS = (("RTN", "W6A6"), ("RTN", "W5A5"), ("RTN", "W4A4"), ("ERQ", "W4A4"))
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
EVIDENCE_CELLS = (
    *(("RTN", bits) for bits in ("W8A8", "W6A6", "W5A5", "W4A4")),
    *((name, bits) for name in list(QUANTIZERS)[1:] for bits in ("W6A6", "W4A4")),
)


def encoder_finetuning(variant: str, seed: int, *, steps: int = STEPS, **changed: float) -> Recipe:
    """Fine-tuning of the published encoder with a new head.

    Args:
        variant: one of ``VARIANTS``.
        seed: of the head and of the training stream, the same for every variant.
        steps: optimizer steps.
        **changed: other values than the variant's own, for tuning.

    Raises:
        ValueError: for an unknown variant, or one that has no setting yet and is given none.

    Example:
        >>> encoder_finetuning("AdamW", seed=2, lr=1e-4).optimizer.lr
        0.0001

    Paper: appendix D and Tables 6, 10, 11 in shape, on a smaller network.
    """
    if variant not in VARIANTS:
        raise ValueError(f"unknown variant {variant!r}: choose one of {', '.join(VARIANTS)}")
    settings = {"lr": LR, "weight_decay": WEIGHT_DECAY} | SETTINGS.get(variant, {}) | changed
    if missing := set(GRID[variant][0] if variant in GRID else SETTINGS[variant]) - settings.keys():
        raise ValueError(f"{variant} has no {', '.join(sorted(missing))} yet: run python -m s2d.lab.encoder tune")
    optimizer, s2d = arm(variant, settings, betas=(0.9, 0.999), refresh_every=REFRESH_EVERY)
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
    )


# --- one trained network ----------------------------------------------------------------------------------------------


def rows_of(trained: Trained, *, split: str, items: int, cells: Sequence[tuple[str, str]]) -> list[dict[str, Any]]:
    """What one network does in full precision and under some quantizers.

    Args:
        trained: a fine-tuned encoder.
        split, items: what it is tested on.
        cells: keys of :data:`QUANTIZERS` with bit widths such as ``"W4A4"``.

    Returns:
        One row a cell, full precision first: method, bits, split, items, accuracy, logit_error (``|q - fp|^2 /
        |fp|^2``), and the same in every row: max_abs, sigma_1 and kurtosis (of the FFN outputs, largest over layers).
    """
    subject = Subject("", trained, split, items)
    calibration, _ = trained.recipe.data.fixed_set("calibration", CALIBRATION)
    layers = layer_statistics(trained, images=256, k_max=1)
    ffn = layers[layers.layer.str.endswith("output.dense") & ~layers.layer.str.contains("attention")]
    same = {"split": split, "items": items, "max_abs": ffn.max_abs.max(), "sigma_1": ffn.sigma_1.max()}
    same["kurtosis"] = ffn.excess_kurtosis.max()
    results = [("FP", "FP", subject.compared(subject.full))]
    settings = [setting(parse_bits(bits), **QUANTIZERS[name]) for name, bits in cells]
    for (name, bits), result in zip(cells, subject.measured(settings, calibration), strict=True):
        results.append((name, bits, result))
    return [{"method": name, "bits": bits} | result | same for name, bits, result in results]


# --- all of them, resumed where they were -----------------------------------------------------------------------------


def _row_file(key: str, stage: str) -> Path:
    return output_root() / "build" / "encoder" / f"{stage}-{key}.csv"


def _table_file(stage: str) -> Path:
    return Path("data") / RUN / f"{stage}.csv"


def known_rows(stage: str) -> pd.DataFrame:
    """What was measured: the committed table, and what was measured here since.

    Args:
        stage: ``"tuning"`` or ``"evidence"``.

    Returns:
        Rows of :func:`measure`; empty at the start.
    """
    files = [root / _table_file(stage) for root in {output_root(), repository_root()}]
    files += sorted(_row_file("", stage).parent.glob(f"{stage}-*.csv"))
    tables = [pd.read_csv(path) for path in files if path.is_file()]
    if not tables:
        return pd.DataFrame(columns=["variant", "seed", "key", "method", "bits"])
    return pd.concat(tables).drop_duplicates(["key", "method", "bits"], keep="last").reset_index(drop=True)


def measure(variant: str, setting: Mapping[str, float], recipe: Recipe, stage: str) -> None:
    """Train one network and leave its rows on disk; called in a worker process.

    Args:
        variant, setting: what the rows say they are of.
        recipe: what is trained.
        stage: ``"tuning"`` (validation glosses, few quantizers) or ``"evidence"`` (test glosses, all of them).
    """
    torch.set_num_threads(1)
    trained = find(recipe)
    if trained is None:
        train_and_store(recipe)
        trained = find(recipe)
    split, items, cells = ("validation", VALIDATION, TUNING_CELLS)
    if stage == "evidence":
        split, items, cells = ("test", TEST, EVIDENCE_CELLS)
    same = {"variant": variant, **dict.fromkeys(SETTING_COLUMNS)} | dict(setting) | {"seed": recipe.seed}
    same["key"] = recipe_key(recipe)
    rows = pd.DataFrame([same | row for row in rows_of(trained, split=split, items=items, cells=cells)])
    write_text(_row_file(same["key"], stage), rows.to_csv(index=False))


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
    missing = [job for job in jobs if job not in done]
    if missing:
        parallel.run(
            measure_published,
            missing,
            names=[" ".join(job) for job in missing],
            workers=min(parallel.worker_count(workers), len(missing)),
            unit="quantizer",
            label="quantizers",
        )
    rows = known_rows("quantizers").set_index(["method", "key", "bits"]).loc[jobs].reset_index()
    rows = rows[["method", "activations", "bits", "items", "error", "key"]]
    parameters = {"calibration": CALIBRATION, "items": PUBLISHED_TEST}
    save_table(rows, "quantizers", run=RUN, source=provenance("s2d.lab.encoder", parameters))
    return rows.drop(columns="key")


def wanted(stage: str, variants: Sequence[str], seeds: Sequence[int]) -> list[tuple[str, dict[str, float], Recipe]]:
    """Variant, setting and recipe of every network of a stage, in the order of the table."""
    if stage == "tuning":
        settings = [(variant, setting) for variant in variants for setting in GRID.get(variant, ())]
    else:
        settings = [(variant, SETTINGS.get(variant, {})) for variant in variants]
    pairs = [(seed, *pair) for seed in seeds for pair in settings]
    return [(variant, setting, encoder_finetuning(variant, seed, **setting)) for seed, variant, setting in pairs]


def run(stage: str, variants: Sequence[str], seeds: Sequence[int], workers: int | None = None) -> pd.DataFrame:
    """Measure what is missing, write the table.

    Args:
        stage: ``"tuning"`` or ``"evidence"``.
        variants, seeds: of this run; the table keeps what it has of others.
        workers: processes, one thread each.

    Returns:
        The table.

    Raises:
        FileNotFoundError, ValueError: if encoder or glosses are not here, before anything is trained.
    """
    encoder_folder(SentenceEncoder().encoder), glosses()
    jobs = wanted(stage, variants, seeds)
    known = set(known_rows(stage).key)
    missing = [job for job in jobs if recipe_key(job[2]) not in known]
    if missing:
        parallel.run(
            measure,
            [(*job, stage) for job in missing],
            names=[f"{variant} {setting} seed {recipe.seed}" for variant, setting, recipe in missing],
            workers=min(parallel.worker_count(workers), len(missing)),
            unit="network",
            label=stage,
        )
    rows = known_rows(stage)
    order = {recipe_key(recipe): place for place, (_, _, recipe) in enumerate(jobs)}
    rows = rows.assign(place=rows.key.map(order)).sort_values("place", kind="stable").drop(columns="place")
    parameters = {"steps": STEPS, "batch_size": BATCH_SIZE, "seeds": sorted(set(rows.seed.tolist()))}
    save_table(rows, stage, run=RUN, source=provenance("s2d.lab.encoder", parameters))
    return rows


def tuning_table(rows: pd.DataFrame) -> pd.DataFrame:
    """The search as :func:`s2d.lab.winners.winners` reads it.

    Args:
        rows: of the stage ``"tuning"``.

    Returns:
        Columns variant, the settings, seed, FP, and low_bits (mean accuracy under the quantizers).
    """
    by = ["variant", *SETTING_COLUMNS, "seed"]
    full = rows[rows.method == "FP"].groupby(by, sort=False, dropna=False).accuracy.mean()
    low = rows[rows.method != "FP"].groupby(by, sort=False, dropna=False).accuracy.mean()
    return pd.DataFrame({"FP": full, "low_bits": low}).reset_index()


def main(argv: Sequence[str] | None = None) -> None:
    """Run a stage and print what it says."""
    parser = argparse.ArgumentParser(
        prog="python -m s2d.lab.encoder", description="Fine-tune a real sentence encoder with every variant; quantize."
    )
    parser.add_argument("stage", choices=["tune", "evidence", "quantizers"])
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS), metavar="VARIANT")
    parser.add_argument("--seeds", nargs="+", type=int, metavar="SEED", help="default: 0 1 to tune, 2 to 6 as evidence")
    parser.add_argument("--workers", type=int, help="processes (default: $S2D_WORKERS or the number of cores)")
    arguments = parser.parse_args(argv)
    stage, seeds = {"tune": ("tuning", TUNING_SEEDS)}.get(arguments.stage, (arguments.stage, SEEDS))
    try:
        if stage == "quantizers":
            table = run_published(arguments.workers).set_index(["activations", "method", "bits"]).error
            print(table.unstack("bits", sort=False).round(3).to_string())
            return
        rows = run(stage, arguments.variants, arguments.seeds or seeds, arguments.workers)
    except (FileNotFoundError, ValueError) as error:
        parser.error(str(error))
    except KeyboardInterrupt:
        print("interrupted: networks that were measured are kept; run again to go on", file=sys.stderr)
        raise SystemExit(130) from None
    if stage == "tuning":
        table = tuning_table(rows)
        by = ["variant", *SETTING_COLUMNS]
        print(table.groupby(by, sort=False, dropna=False)[["FP", "low_bits"]].mean().round(3).to_string())
        print("\nwinners:\n" + winners(table).to_string(index=False))
    else:
        means = rows.groupby(["variant", "method", "bits"], sort=False).accuracy.mean()
        print((100 * means.unstack(["method", "bits"])).round(1).to_string())


if __name__ == "__main__":
    main()
