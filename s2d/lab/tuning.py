"""How the fine-tuning settings were chosen: every variant at several strengths, judged on the validation split alone.

    python -m s2d.lab.tuning        (about half an hour on two cores; resumes where it was stopped)

writes ``data/laptop/tuning.csv`` and prints the winners, which :mod:`s2d.lab.recipes` holds as ``SETTINGS``. The test
split is not looked at, nor are the seeds on which the winners are compared (``EVIDENCE_SEEDS``).
"""

from __future__ import annotations

import pandas as pd

from s2d.lab.quantization import methods_table, quantization_table
from s2d.lab.recipes import DECOUPLED, RECIPE_WEIGHT_DECAY, S2D_TUNED, SEEDS, finetuning
from s2d.lab.results import provenance, save_table
from s2d.lab.store import obtain

TUNING_SEED = 0
VALIDATION_IMAGES = 1600
ALLOWED_LOSS = 0.005  # of full-precision accuracy against AdamW at the recipe's weight decay
SETTING_COLUMNS = ["lr", "steps", "weight_decay", "lam", "tau", "cap", "clip"]

GRID: list[dict] = [
    {"variant": "AdamW"},
    *({"variant": "AdamW, tuned weight decay", "weight_decay": wd} for wd in (0.05, 0.2, 0.3, 0.5, 1.0)),
    {"variant": "AdamW, tuned weight decay", "weight_decay": 0.5, "lr": 1.5e-3},
    {"variant": "AdamW, tuned weight decay", "weight_decay": 0.5, "lr": 6e-3},
    {"variant": "AdamW, tuned weight decay", "weight_decay": 0.3, "steps": 2000},
    *({"variant": "No PCDR", "lam": lam} for lam in (5e-4, 2e-3)),
    *({"variant": "Top 3 of every layer", "lam": lam} for lam in (2e-3, 5e-3)),
    *({"variant": "S2D", "lam": lam, "tau": 0.6} for lam in (2e-3, 5e-3, 1e-2, 2e-2)),
    *({"variant": "S2D", "lam": 5e-3, "tau": tau} for tau in (0.8, 0.3)),
    *({"variant": S2D_TUNED, "weight_decay": wd} for wd in (0.2, 0.5)),
    *({"variant": "L2 on every component", "lam": lam} for lam in (1e-3, 5e-3)),
    *({"variant": "Spectral-norm cap", "cap": cap} for cap in (1.0, 1.5, 2.0, 4.0)),
    *({"variant": "Gradient clipping", "clip": clip} for clip in (0.1, 1.0)),
    *({"variant": DECOUPLED, "lam": lam, "weight_decay": RECIPE_WEIGHT_DECAY} for lam in (0.1, 0.2)),
    *({"variant": DECOUPLED, "lam": lam, "weight_decay": 0.2} for lam in (0.1, 0.2)),
    {"variant": DECOUPLED, "lam": 0.1, "weight_decay": 0.2, "steps": 2000},
]
FINALISTS: list[dict] = [
    {"variant": "AdamW"},
    *({"variant": "AdamW, tuned weight decay", "weight_decay": wd} for wd in (0.3, 0.5)),
    *({"variant": DECOUPLED, "lam": lam, "weight_decay": 0.2} for lam in (0.1, 0.2)),
]
"""Settings too close to call on one seed: these are trained on all of ``SEEDS``."""


def tuning_runs() -> list[tuple[dict, int]]:
    """Every setting and the seeds it is tried on, in the order of the table."""
    first = [(setting, TUNING_SEED) for setting in GRID]
    return first + [(setting, seed) for setting in FINALISTS for seed in SEEDS if seed != TUNING_SEED]


def tuning_table() -> pd.DataFrame:
    """Validation accuracy of every setting.

    Returns:
        Columns variant, the settings that differ from the variant's own, seed, split, images, FP, then accuracies such
        as ``RTN W4A4`` (symmetric grid, as in the published figures) and ``ERQ W4A4``.
    """
    runs = tuning_runs()
    trained = obtain([finetuning(seed=seed, **setting) for setting, seed in runs])
    checkpoints = {str(index): [checkpoint] for index, checkpoint in enumerate(trained)}
    options = {"split": "validation", "images": VALIDATION_IMAGES}
    rtn = quantization_table(checkpoints, ["FP", "W4A4", "W3A3"], grids=["symmetric"], **options)
    erq = methods_table(checkpoints, ["W4A4", "W3A3"], methods=["ERQ"], calibration_sets=1, **options)
    rows = []
    for index, (setting, seed) in enumerate(runs):
        row = {"variant": "", **dict.fromkeys(SETTING_COLUMNS)} | setting
        row |= {"seed": seed, "split": "validation", "images": VALIDATION_IMAGES}
        for table, prefix in ((rtn, "RTN "), (erq[erq.method == "ERQ"], "ERQ ")):
            own = table[table.variant == str(index)]
            names = [bits if bits == "FP" else prefix + bits for bits in own.bits]
            row |= dict(zip(names, own.accuracy, strict=True))
        rows.append(row)
    return pd.DataFrame(rows)


def winners(table: pd.DataFrame) -> pd.DataFrame:
    """Of each variant the setting with the best W4A4 accuracy (RTN) among those that keep full precision.

    "Keep" means within half a point of AdamW at the recipe's weight decay, on the same seeds; where no setting does,
    the nearest one wins. Settings tried on several seeds count with their mean, and are preferred to those tried on
    one. Those with more steps than the others are not eligible: what more training gives is no merit of a variant.
    """
    table = table[table.steps.isna()]
    setting = [column for column in SETTING_COLUMNS if column in table]
    results = [column for column in table if column == "FP" or column.startswith(("RTN", "ERQ"))]
    groups = table.groupby(["variant", *setting], sort=False, dropna=False)
    means = groups[results].mean().assign(seeds=groups.seed.nunique()).reset_index()
    adamw = table[table.variant == "AdamW"].set_index("seed").FP
    chosen = []
    for _, group in means.groupby("variant", sort=False):
        group = group[group.seeds == group.seeds.max()]
        seeds = table.seed.unique() if group.seeds.max() > 1 else [TUNING_SEED]
        keeping = group[group.FP >= adamw[seeds].mean() - ALLOWED_LOSS]
        chosen.append(keeping.loc[keeping["RTN W4A4"].idxmax()] if len(keeping) else group.loc[group.FP.idxmax()])
    return pd.DataFrame(chosen)


if __name__ == "__main__":
    result = tuning_table()
    parameters = {"seeds": list(SEEDS), "grid": GRID, "finalists": FINALISTS}
    save_table(result, "tuning", run="laptop", source=provenance("s2d.lab.tuning", parameters))
    print(result.to_string(index=False))
    print("\nwinners:\n" + winners(result).to_string(index=False))
