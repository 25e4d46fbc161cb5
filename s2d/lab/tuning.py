"""How the fine-tuning hyper-parameters were chosen: a grid on one seed, judged on the validation split alone.

    python -m s2d.lab.tuning        (about ten minutes on two cores; resumes where it was stopped)

writes ``data/laptop/tuning.csv`` and prints the winners, which :mod:`s2d.lab.recipes` holds as constants.
"""

from __future__ import annotations

import pandas as pd

from s2d.lab.quantization import quantization_table
from s2d.lab.recipes import RECIPE_WEIGHT_DECAY, finetuning
from s2d.lab.results import provenance, save_table
from s2d.lab.store import obtain

TUNING_SEED = 0
VALIDATION_IMAGES = 1600
ALLOWED_LOSS = 0.005  # of full-precision accuracy against AdamW at the recipe's weight decay

GRID: list[dict] = (
    [{"variant": "AdamW", "weight_decay": RECIPE_WEIGHT_DECAY}]
    + [{"variant": "AdamW, tuned weight decay", "weight_decay": wd} for wd in (0.05, 0.2, 0.5)]
    + [{"variant": "No PCDR", "lam": lam} for lam in (5e-4, 2e-3)]
    + [{"variant": "Top 3 of every layer", "lam": lam} for lam in (2e-3, 5e-3)]
    + [{"variant": "S2D", "lam": lam, "tau": tau} for lam, tau in ((5e-3, 0.6), (1e-2, 0.6), (5e-3, 0.3))]
)


def tuning_table() -> pd.DataFrame:
    """Validation accuracy of every setting: columns variant, weight_decay, lam, tau, FP, W4A4, W3A3."""
    trained = obtain([finetuning(seed=TUNING_SEED, **setting) for setting in GRID])
    rows = []
    for setting, checkpoint in zip(GRID, trained, strict=True):
        table = quantization_table(
            {setting["variant"]: [checkpoint]},
            ["FP", "W4A4", "W3A3"],
            split="validation",
            images=VALIDATION_IMAGES,
            grids=["symmetric"],
        )
        rows.append({"variant": "", "weight_decay": None, "lam": None, "tau": None} | setting)
        rows[-1] |= dict(zip(table.bits, table.accuracy, strict=True)) | {"seed": TUNING_SEED, "split": "validation"}
    return pd.DataFrame(rows)


def winners(table: pd.DataFrame) -> pd.DataFrame:
    """Of each variant the setting with the best W4A4 accuracy among those that keep full precision.

    "Keep" means within half a point of AdamW at the recipe's weight decay; where no setting does, the nearest one wins.
    """
    floor = table[table.variant == "AdamW"].FP.iloc[0] - ALLOWED_LOSS
    chosen = []
    for _, group in table.groupby("variant", sort=False):
        keeping = group[group.FP >= floor]
        chosen.append(keeping.loc[keeping.W4A4.idxmax()] if len(keeping) else group.loc[group.FP.idxmax()])
    return pd.DataFrame(chosen)


if __name__ == "__main__":
    result = tuning_table()
    save_table(result, "tuning", run="laptop", source=provenance("s2d.lab.tuning", {"seed": TUNING_SEED, "grid": GRID}))
    print(result.to_string(index=False))
    print("\nwinners:\n" + winners(result).to_string(index=False))
