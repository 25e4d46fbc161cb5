"""How the fine-tuning settings were chosen: every variant at four settings, judged on the validation split alone.

    python -m s2d.lab.tuning        (half an hour on two cores; resumes where it was stopped)

writes ``data/laptop/tuning.csv`` and prints the winners, which :mod:`s2d.lab.recipes` holds as ``SETTINGS`` and
``FINETUNE_LR``. Every variant is given the same number of settings on the same seeds. The test split is not looked at,
nor are the seeds on which the winners are compared (``EVIDENCE_SEEDS``).
"""

from __future__ import annotations

import pandas as pd

from s2d.lab.quantization import methods_table, quantization_table
from s2d.lab.recipes import CAP, DECOUPLED, TUNING_SEEDS, finetuning
from s2d.lab.results import provenance, save_table
from s2d.lab.store import obtain
from s2d.lab.winners import SETTING_COLUMNS, winners

VALIDATION_IMAGES = 1600
LOW_BITS = ("W4A4", "W3A3")

_S2D = ({"lam": 2e-4, "tau": 0.6}, {"lam": 1e-3, "tau": 0.6}, {"lam": 5e-3, "tau": 0.6}, {"lam": 1e-3, "tau": 0.8})
GRID: dict[str, tuple[dict[str, float], ...]] = {
    # The learning rate is chosen first, and every other variant uses the winner.
    "AdamW": ({"lr": 5e-4}, {"lr": 1e-3}, {"lr": 2e-3}, {"lr": 4e-3}),
    "AdamW, tuned weight decay": tuple({"weight_decay": wd} for wd in (0.03, 0.1, 0.3, 1.0)),
    "No PCDR": tuple({"lam": lam} for lam in (5e-5, 2e-4, 1e-3, 5e-3)),
    "S2D": _S2D,
    "S2D, live": _S2D,
    DECOUPLED: tuple({"lam": lam} for lam in (0.03, 0.1, 0.3, 1.0)),
    CAP: tuple({"cap": cap} for cap in (1.0, 1.5, 2.0, 3.0)),
}
"""Variant to the settings that were tried."""


def tuning_runs() -> list[tuple[str, dict[str, float], int]]:
    """Variant, setting and seed of every run, in the order of the table."""
    return [(variant, setting, seed) for variant in GRID for setting in GRID[variant] for seed in TUNING_SEEDS]


def tuning_table() -> pd.DataFrame:
    """Validation accuracy of every setting.

    Returns:
        Columns variant, the settings that differ from the variant's own, seed, split, images, FP, accuracies such as
        ``RTN symmetric W4A4`` and ``ERQ W3A3``, and low_bits: the mean of those, by which the winner is chosen.
    """
    runs = tuning_runs()
    trained = obtain([finetuning(variant, seed, **setting) for variant, setting, seed in runs])
    checkpoints = {str(index): [checkpoint] for index, checkpoint in enumerate(trained)}
    options = {"split": "validation", "images": VALIDATION_IMAGES}
    rtn = quantization_table(checkpoints, ["FP", *LOW_BITS], **options)
    erq = methods_table(checkpoints, LOW_BITS, methods=["ERQ"], calibration_sets=1, **options)
    rtn["column"] = ("RTN " + rtn.grid + " " + rtn.bits).where(rtn.bits != "FP", "FP")
    erq["column"] = "ERQ " + erq.bits
    measured = pd.concat([rtn, erq[erq.method == "ERQ"]])
    wide = measured.groupby(["variant", "column"], sort=False).accuracy.first().unstack("column")
    low = [name for name in wide if name != "FP"]
    rows = []
    for index, (variant, setting, seed) in enumerate(runs):
        row = {"variant": variant, **dict.fromkeys(SETTING_COLUMNS)} | setting
        row |= {"seed": seed, "split": "validation", "images": VALIDATION_IMAGES}
        own = wide.loc[str(index)]
        rows.append(row | {"FP": own.FP} | own[low].to_dict() | {"low_bits": own[low].mean()})
    return pd.DataFrame(rows)


if __name__ == "__main__":
    result = tuning_table()
    parameters = {"seeds": list(TUNING_SEEDS), "grid": {variant: list(GRID[variant]) for variant in GRID}}
    save_table(result, "tuning", run="laptop", source=provenance("s2d.lab.tuning", parameters))
    print(result.round(3).to_string(index=False))
    print("\nwinners:\n" + winners(result).to_string(index=False))
