"""The named recipes. Every hyper-parameter was chosen on the validation split (``s2d/lab/tuning.py``)."""

from __future__ import annotations

from dataclasses import asdict

from s2d.lab.data import ClutteredDigits
from s2d.lab.models import DigitsViT
from s2d.lab.qat import FakeQuantized
from s2d.lab.training import Optimizer, Recipe
from s2d.ptq import parse_bits

SEEDS = (0, 1, 2)
PRETRAIN_STEPS = {"adamw": 4000, "sgd": 4500}
FINETUNE_STEPS = 1000
VARIANTS = ("AdamW", "AdamW, tuned weight decay", "No PCDR", "Top 3 of every layer", "S2D")
"""Fine-tuning variants, in the order in which they are shown."""

# The winners of `python -m s2d.lab.tuning` (data/laptop/tuning.csv), checked by tests/test_recipes.py.
FINETUNE_LR = 3e-3
RECIPE_WEIGHT_DECAY = 0.01
TUNED_WEIGHT_DECAY = 0.5
TUNED_LAM = {"No PCDR": 5e-4, "Top 3 of every layer": 2e-3, "S2D": 5e-3}
TUNED_TAU = 0.6
# Not tuned: fine-tuning's learning rate divided by three, and steps enough for the loss to settle.
QAT_LR = 1e-3
QAT_STEPS = 600
QAT_BITS = "W3A3"
QAT_VARIANTS = ("AdamW", "S2D")


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
        "sgd": Optimizer("sgd", lr=0.1, weight_decay=0.0, clip=1.0),
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


def finetuning(
    variant: str,
    seed: int,
    *,
    steps: int = FINETUNE_STEPS,
    pretrain_steps: int | None = None,
    weight_decay: float | None = None,
    lam: float | None = None,
    tau: float | None = None,
    refresh_every: int = 100,
    **size,
) -> Recipe:
    """Fine-tuning of the AdamW checkpoint of one seed.

    Args:
        variant: one of ``VARIANTS``; a choice among them is a choice of weight decay and of S2D's criterion.
        seed: seed of the pretraining; the fine-tuning draws its own images.
        steps: optimizer steps.
        pretrain_steps: see :func:`pretraining`.
        weight_decay, lam, tau: other values than the variant's own; for tuning.
        refresh_every: steps between S2D's refreshes.
        **size: canvas, width, depth, device of :func:`pretraining`.

    Raises:
        ValueError: for an unknown variant, or a setting the variant does not have.

    Example:
        >>> finetuning("S2D", seed=0).s2d["criterion"]
        'activation'
    """
    if variant not in VARIANTS:
        raise ValueError(f"unknown variant {variant!r}: choose one of {', '.join(VARIANTS)}")
    start = pretraining("adamw", seed, steps=pretrain_steps, **size)
    if weight_decay is None:
        weight_decay = TUNED_WEIGHT_DECAY if "tuned" in variant else RECIPE_WEIGHT_DECAY
    s2d = None
    if variant in TUNED_LAM:
        s2d = {
            "lam": TUNED_LAM[variant] if lam is None else lam,
            "power": 2,
            "tau": TUNED_TAU if tau is None else tau,
            "k_max": None if variant == "No PCDR" else 3,
            "refresh_every": refresh_every,
            "criterion": "activation" if variant == "S2D" else "all",
            "coefficients": "live",
        }
    elif lam is not None or tau is not None:
        raise ValueError(f"{variant} has no lam or tau: those belong to {', '.join(TUNED_LAM)}")
    return Recipe(
        seed=1000 + seed,  # another stream of images than the pretraining's
        steps=steps,
        warmup=min(50, steps),
        optimizer=Optimizer("adamw", lr=FINETUNE_LR, weight_decay=weight_decay, betas=start.optimizer.betas),
        data=start.data,
        model=start.model,
        start=start,
        s2d=s2d,
        measure_every=max(1, steps // 10),
        device=start.device,
    )


def quantization_aware(start: Recipe, bits: str, *, steps: int = QAT_STEPS) -> Recipe:
    """Quantization-aware training of a fine-tuned checkpoint, on images of its own.

    Args:
        start: the recipe of the checkpoint.
        bits: such as ``"W3A3"``.
        steps: optimizer steps.

    Raises:
        ValueError: for a bit width of another form.

    Example:
        >>> quantization_aware(finetuning("S2D", seed=0), "W3A3").model.a_bits
        3
    """
    w_bits, a_bits = parse_bits(bits)
    sizes = asdict(start.model)
    return Recipe(
        seed=2000 + start.seed,  # another stream of images than the fine-tuning's
        steps=steps,
        warmup=min(50, steps),
        optimizer=Optimizer("adamw", lr=QAT_LR, weight_decay=RECIPE_WEIGHT_DECAY, betas=start.optimizer.betas),
        data=start.data,
        model=FakeQuantized(**sizes, of=start, w_bits=w_bits, a_bits=a_bits),
        measure_every=max(1, steps // 5),
        device=start.device,
    )


def laptop_recipes() -> list[Recipe]:
    """Everything the notebooks train at their defaults: what the committed store holds."""
    pretrained = [pretraining(optimizer, seed) for optimizer in PRETRAIN_STEPS for seed in SEEDS]
    finetuned = [finetuning(variant, seed) for variant in VARIANTS for seed in SEEDS]
    aware = [quantization_aware(finetuning(variant, seed), QAT_BITS) for variant in QAT_VARIANTS for seed in SEEDS]
    return pretrained + finetuned + aware
