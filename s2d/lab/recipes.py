"""The named recipes. Every hyper-parameter was chosen on the validation split (``s2d/lab/tuning.py``)."""

from __future__ import annotations

from s2d.lab.data import ClutteredDigits
from s2d.lab.models import DigitsViT
from s2d.lab.training import Optimizer, Recipe

SEEDS = (0, 1, 2)
PRETRAIN_STEPS = {"adamw": 4000, "sgd": 3500}
FINETUNE_STEPS = 1000
VARIANTS = ("AdamW", "AdamW, tuned weight decay", "No PCDR", "S2D")
"""Fine-tuning variants, in the order in which they are shown."""


def pretraining(
    optimizer: str,
    seed: int,
    *,
    steps: int | None = None,
    canvas: int = 16,
    width: int = 64,
    depth: int = 4,
    device: str = "cpu",
) -> Recipe:
    """Pretraining from scratch with AdamW or SGD.

    Args:
        optimizer: ``"adamw"`` or ``"sgd"``.
        seed: initial weights and training stream.
        steps: optimizer steps; by default the number at which the two reach about the same validation accuracy.
        canvas, width, depth: size of image and model.
        device: where to train.

    Raises:
        ValueError: for another optimizer.

    Example:
        >>> pretraining("sgd", seed=0).optimizer.momentum
        0.9
    """
    if optimizer not in PRETRAIN_STEPS:
        raise ValueError(f"unknown optimizer {optimizer!r}: choose one of {', '.join(PRETRAIN_STEPS)}")
    settings = {
        "adamw": Optimizer("adamw", lr=6e-3, weight_decay=0.01, betas=(0.9, 0.99)),
        "sgd": Optimizer("sgd", lr=0.2, weight_decay=0.0, clip=1.0),
    }
    steps = PRETRAIN_STEPS[optimizer] if steps is None else steps
    return Recipe(
        seed=seed,
        steps=steps,
        warmup=min(400, steps),
        optimizer=settings[optimizer],
        data=ClutteredDigits(canvas=canvas),
        model=DigitsViT(image_size=canvas, width=width, depth=depth),
        measure_every=max(1, steps // 16),
        device=device,
    )
