"""The named recipes. Every hyper-parameter was chosen on the validation split (``s2d/lab/tuning.py``)."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from s2d.lab.data import ClutteredDigits
from s2d.lab.models import DigitsViT
from s2d.lab.optimizers import Capped, LessAdaptive, Orthogonal, RotatedBasis
from s2d.lab.qat import FakeQuantization
from s2d.lab.training import Optimizer, Recipe
from s2d.ptq import parse_bits

SEEDS = (0, 1, 2)
EVIDENCE_SEEDS = (3, 4, 5, 6, 7)
"""Seeds on which no setting was chosen: what is claimed about fine-tuning is measured on them."""
ABLATION_SEEDS = EVIDENCE_SEEDS[:3]
PRETRAIN_STEPS = {"adamw": 4000, "sgd": 4500}
GROWTH_STEPS = (500, 1500)  # shorter runs, in which the growth of the outliers is watched
FINETUNE_STEPS = 1000
DECOUPLED = "Decoupled spectral decay"
VARIANTS = ("AdamW", "AdamW, tuned weight decay", "No PCDR", "Top 3 of every layer", "S2D")
"""Fine-tuning variants of the paper, in the order in which they are shown."""
EVIDENCE_VARIANTS = ("AdamW", "AdamW, tuned weight decay", "No PCDR", "S2D", DECOUPLED)
"""What is compared on the evidence seeds."""
S2D_TUNED = "S2D, tuned weight decay"
CONTROLS = (S2D_TUNED, "Spectral-norm cap", "L2 on every component", "Gradient clipping")
"""What else might do as well."""

# The winners of `python -m s2d.lab.tuning` (data/laptop/tuning.csv), checked by tests/test_recipes.py.
SETTINGS: dict[str, dict[str, float]] = {
    "AdamW": {},
    "AdamW, tuned weight decay": {"weight_decay": 0.5},
    "No PCDR": {"lam": 5e-4},
    "Top 3 of every layer": {"lam": 2e-3},
    "S2D": {"lam": 5e-3, "tau": 0.6},
    S2D_TUNED: {"lam": 5e-3, "tau": 0.6, "weight_decay": 0.5},
    DECOUPLED: {"lam": 0.1, "weight_decay": 0.2},
    "L2 on every component": {"lam": 1e-3},
    "Spectral-norm cap": {"cap": 2.0},
    "Gradient clipping": {"clip": 0.1},
}
"""What each variant changes of AdamW's fine-tuning, beside learning rate and weight decay."""
_SPECTRAL: dict[str, dict[str, Any]] = {
    "No PCDR": {"criterion": "all", "k_max": None, "power": 2, "coefficients": "live"},
    "Top 3 of every layer": {"criterion": "all", "k_max": 3, "power": 2, "coefficients": "live"},
    "S2D": {"criterion": "activation", "k_max": 3, "power": 2, "coefficients": "live"},
    S2D_TUNED: {"criterion": "activation", "k_max": 3, "power": 2, "coefficients": "live"},
    "L2 on every component": {"criterion": "all", "k_max": None, "power": 1, "coefficients": "live"},
    DECOUPLED: {"criterion": "all", "k_max": None, "power": 2, "coefficients": "live", "coupling": "decoupled"},
}
FINETUNE_LR = 3e-3
RECIPE_WEIGHT_DECAY = 0.01
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


_ADAMW = {"lr": 6e-3, "weight_decay": 0.01, "betas": (0.9, 0.99)}
INTERVENTIONS: dict[str, Optimizer] = {
    "AdamW": Optimizer("adamw", **_ADAMW),
    "AdamW, lr 2e-3": Optimizer("adamw", **_ADAMW | {"lr": 2e-3}),
    "AdamW, rotated basis": RotatedBasis("adamw", **_ADAMW | {"lr": 2e-3}),  # at 6e-3 it hardly learns
    "AdamW, eps 1e-3": LessAdaptive("adamw", eps=1e-3, **_ADAMW),
    "AdamW, eps 1e-2": LessAdaptive("adamw", eps=1e-2, **_ADAMW),
    "AdamW, beta2 0.9": Optimizer("adamw", **_ADAMW | {"betas": (0.9, 0.9)}),
    "Muon": Orthogonal("adamw", **_ADAMW),
    "SGD": Optimizer("sgd", lr=0.1, weight_decay=0.0, clip=1.0),
}
"""What appendix C's references change about the optimizer, by the name it has in tables and figures."""


def intervention(name: str, seed: int, *, steps: int | None = None, **size) -> Recipe:
    """Pretraining with another optimizer; everything else is :func:`pretraining`'s.

    Args:
        name: a key of ``INTERVENTIONS``.
        seed: initial weights and training stream, the same for every optimizer.
        steps: optimizer steps; by default AdamW's, and SGD's own for SGD.
        **size: canvas, width, depth, device of :func:`pretraining`.

    Raises:
        ValueError: for an unknown name.

    Example:
        >>> intervention("AdamW, eps 1e-3", seed=0).optimizer.eps
        0.001
    """
    if name not in INTERVENTIONS:
        raise ValueError(f"unknown intervention {name!r}: choose one of {', '.join(INTERVENTIONS)}")
    base = pretraining("sgd" if name == "SGD" else "adamw", seed, steps=steps, **size)
    return replace(base, optimizer=INTERVENTIONS[name])


ABLATIONS: dict[str, dict[str, dict[str, Any]]] = {
    "refresh interval": {"10": {"refresh_every": 10}},
    "k_max": {"10": {"k_max": 10}},
    "tau": {"0.8": {"tau": 0.8}, "0.95": {"tau": 0.95}},
    "power": {"1": {"power": 1}, "3": {"power": 3}, "4": {"power": 4}},
    "criterion": {
        "spectral, tau 0.2": {"criterion": "spectral", "tau": 0.2},
        "top 3 of every layer": {"criterion": "all"},
    },
    "coefficients": {"cached": {"coefficients": "cached"}},
}
"""Tables 10 and 11 and the criteria of PCDR: group, setting, what it changes of the variant ``"S2D"``."""


def ablation(group: str, setting: str, seed: int, **options) -> Recipe:
    """Fine-tuning with S2D in which one setting differs.

    Args:
        group, setting: keys of ``ABLATIONS``.
        seed: see :func:`finetuning`.
        **options: steps, pretrain_steps, refresh_every and sizes of :func:`finetuning`.

    Raises:
        ValueError: for an unknown group or setting.

    Example:
        >>> ablation("power", "4", seed=3).s2d["power"]
        4
    """
    if setting not in ABLATIONS.get(group, ()):
        known = ", ".join(f"{g}: {s}" for g, settings in ABLATIONS.items() for s in settings)
        raise ValueError(f"unknown ablation {group!r}, {setting!r}: choose one of {known}")
    base = finetuning("S2D", seed, **options)
    return replace(base, s2d=base.s2d | ABLATIONS[group][setting])


def finetuning(
    variant: str,
    seed: int,
    *,
    steps: int = FINETUNE_STEPS,
    pretrain_steps: int | None = None,
    refresh_every: int = 100,
    canvas: int = 16,
    width: int = 64,
    depth: int = 4,
    device: str = "cpu",
    **changed: float,
) -> Recipe:
    """Fine-tuning of the AdamW checkpoint of one seed.

    Args:
        variant: a key of ``SETTINGS``.
        seed: seed of the pretraining; the fine-tuning draws its own images.
        steps: optimizer steps.
        pretrain_steps: see :func:`pretraining`.
        refresh_every: steps between refreshes of the spectral variants.
        canvas, width, depth, device: see :func:`pretraining`.
        **changed: other values than the variant's own of ``lr``, ``weight_decay`` or its ``SETTINGS``; for tuning.

    Raises:
        ValueError: for an unknown variant, or a setting the variant does not have.

    Example:
        >>> finetuning("S2D", seed=0).s2d["criterion"]
        'activation'
    """
    if variant not in SETTINGS:
        raise ValueError(f"unknown variant {variant!r}: choose one of {', '.join(SETTINGS)}")
    settings = {"lr": FINETUNE_LR, "weight_decay": RECIPE_WEIGHT_DECAY} | SETTINGS[variant]
    for name in changed.keys() - settings.keys():
        raise ValueError(f"{variant} has no setting {name!r}: it has {', '.join(settings)}")
    settings |= changed
    start = pretraining("adamw", seed, steps=pretrain_steps, canvas=canvas, width=width, depth=depth, device=device)
    s2d = None
    if variant in _SPECTRAL:
        s2d = _SPECTRAL[variant] | {"lam": settings["lam"], "refresh_every": refresh_every}
        s2d |= {"tau": settings.get("tau", 0.6)}  # without a criterion it decides nothing
    adamw = {"lr": settings["lr"], "weight_decay": settings["weight_decay"], "betas": start.optimizer.betas}
    if "cap" in settings:
        optimizer = Capped("adamw", cap=settings["cap"], **adamw)
    else:
        optimizer = Optimizer("adamw", clip=settings.get("clip", 0.0), **adamw)
    return Recipe(
        seed=1000 + seed,  # another stream of images than the pretraining's
        steps=steps,
        warmup=min(50, steps),
        optimizer=optimizer,
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
        >>> quantization_aware(finetuning("S2D", seed=0), "W3A3").prepare.a_bits
        3
    """
    w_bits, a_bits = parse_bits(bits)
    return Recipe(
        seed=2000 + start.seed,  # another stream of images than the fine-tuning's
        steps=steps,
        warmup=min(50, steps),
        optimizer=Optimizer("adamw", lr=QAT_LR, weight_decay=RECIPE_WEIGHT_DECAY, betas=start.optimizer.betas),
        data=start.data,
        model=start.model,
        start=start,
        prepare=FakeQuantization(w_bits, a_bits),
        measure_every=max(1, steps // 5),
        device=start.device,
    )


def laptop_recipes() -> list[Recipe]:
    """Everything the notebooks train at their defaults: what the committed store holds."""
    recipes = [pretraining(optimizer, seed) for optimizer in PRETRAIN_STEPS for seed in SEEDS]
    recipes += [finetuning(variant, seed) for variant in VARIANTS for seed in SEEDS]
    recipes += [quantization_aware(finetuning(variant, seed), QAT_BITS) for variant in QAT_VARIANTS for seed in SEEDS]
    recipes += [intervention(name, seed) for name in INTERVENTIONS for seed in SEEDS]
    recipes += [pretraining("adamw", seed, steps=steps) for steps in GROWTH_STEPS for seed in SEEDS]
    recipes += [pretraining("adamw", seed) for seed in EVIDENCE_SEEDS]
    recipes += [finetuning(variant, seed) for variant in EVIDENCE_VARIANTS + CONTROLS for seed in EVIDENCE_SEEDS]
    settings = [(group, setting) for group in ABLATIONS for setting in ABLATIONS[group]]
    recipes += [ablation(group, setting, seed) for group, setting in settings for seed in ABLATION_SEEDS]
    return list({str(recipe): recipe for recipe in recipes}.values())
