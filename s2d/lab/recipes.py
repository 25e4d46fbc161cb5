"""The named recipes. Every hyper-parameter was chosen on the validation split (``s2d/lab/tuning.py``)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from s2d.lab.data import ClutteredDigits
from s2d.lab.models import DigitsViT
from s2d.lab.optimizers import Capped, LessAdaptive, Orthogonal, RotatedBasis
from s2d.lab.qat import FakeQuantization
from s2d.lab.training import Optimizer, Recipe
from s2d.ptq import parse_bits

TUNING_SEEDS = (0, 1)
"""Seeds on which every setting is chosen, by validation images."""
EVIDENCE_SEEDS = (2, 3, 4, 5, 6, 7, 8, 9)
"""Seeds on which no setting was chosen: every claim is measured on them."""
SEEDS = EVIDENCE_SEEDS[:3]
"""The seeds of the walkthrough."""
ABLATION_SEEDS = EVIDENCE_SEEDS[:5]
INTERVENTION_SEEDS = EVIDENCE_SEEDS[:5]
WIDE_SEEDS = EVIDENCE_SEEDS[:3]  # a wide network takes three times as long
PRETRAIN_STEPS = {"adamw": 4000, "sgd": 6000}
GROWTH_STEPS = (1000, 2000, 4000)  # the same recipe at 1, 2 and 4 times the steps
INTERVENTION_STEPS = GROWTH_STEPS[1]  # half of the pretraining: there are seven optimizers, five seeds each
WIDE = 128  # one channel alone can give w channels an excess kurtosis of w - 3: more than 100 needs more than 103
FINETUNE_STEPS = 600

DECOUPLED = "Decoupled spectral decay"
S2D_DECOUPLED = "S2D, decoupled"
CAP = "Spectral-norm cap"
AS_PRINTED = "S2D, the paper's lam and tau"
VARIANTS = ("AdamW", "AdamW, tuned weight decay", "No PCDR", "S2D, live", "S2D")
"""Fine-tuning variants of the walkthrough, in the order in which they are shown."""
EVIDENCE_VARIANTS = ("AdamW", "AdamW, tuned weight decay", "No PCDR", AS_PRINTED, "S2D", "S2D, live", DECOUPLED, CAP)
"""What is compared on the evidence seeds."""

# The winners of `python -m s2d.lab.tuning` (data/laptop/tuning.csv), checked by tests/test_recipes.py.
SETTINGS: dict[str, dict[str, float]] = {
    "AdamW": {},
    "AdamW, tuned weight decay": {"weight_decay": 0.3},
    "No PCDR": {"lam": 2e-4},
    AS_PRINTED: {"lam": 5e-4, "tau": 0.95},  # second-hand; not tuned
    "S2D": {"lam": 1e-3, "tau": 0.6},
    "S2D, live": {"lam": 5e-3, "tau": 0.6},
    DECOUPLED: {"lam": 0.1},
    CAP: {"cap": 3.0},
}
"""What each variant changes of AdamW's fine-tuning, beside learning rate and weight decay."""
_ALGORITHM_1: dict[str, Any] = {"criterion": "activation", "k_max": 3, "power": 2, "coefficients": "cached"}
_SPECTRAL: dict[str, dict[str, Any]] = {
    "No PCDR": _ALGORITHM_1 | {"criterion": "all", "k_max": None},
    AS_PRINTED: _ALGORITHM_1,
    "S2D": _ALGORITHM_1,
    "S2D, live": _ALGORITHM_1 | {"coefficients": "live"},
    S2D_DECOUPLED: _ALGORITHM_1 | {"coefficients": "live", "coupling": "decoupled"},
    DECOUPLED: {"criterion": "all", "k_max": None, "power": 2, "coefficients": "live", "coupling": "decoupled"},
}
FINETUNE_LR = 5e-4
RECIPE_WEIGHT_DECAY = 0.01
BATCH_SIZE = 64
FINETUNE_BATCH_SIZE = 32
CLIP = 1.0
# Not tuned: half of fine-tuning's learning rate, and steps enough for the loss to settle.
QAT_LR = 5e-4
QAT_STEPS = 400
QAT_BITS = "W3A3"
QAT_VARIANTS = ("AdamW", "S2D")

# A short memory of the squared gradients makes large outliers; so does no weight decay (a fine-tuning brings its own).
_ADAMW = {"lr": 2e-3, "weight_decay": 0.0, "betas": (0.9, 0.9), "clip": CLIP}
INTERVENTIONS: dict[str, Optimizer] = {
    "AdamW": Optimizer("adamw", **_ADAMW),
    "AdamW, rotated basis": RotatedBasis("adamw", **_ADAMW),
    "AdamW, eps 1e-4": LessAdaptive("adamw", eps=1e-4, **_ADAMW),
    "AdamW, beta2 0.99": Optimizer("adamw", **_ADAMW | {"betas": (0.9, 0.99)}),
    "AdamW, beta2 0.999": Optimizer("adamw", **_ADAMW | {"betas": (0.9, 0.999)}),
    "Muon": Orthogonal("adamw", **_ADAMW),
    # Nearly every gradient is longer than the bound, so a step is as long as the schedule says. Clipped at 1, with the
    # same longest step, the network stays at chance for much of its training, how long depends on the seed.
    "SGD": Optimizer("sgd", lr=1.0, weight_decay=0.0, clip=0.1),
}
"""What appendix C's references change about the optimizer, by the name it has in tables and figures."""


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
    steps = PRETRAIN_STEPS[optimizer] if steps is None else steps
    return Recipe(
        seed=seed,
        steps=steps,
        warmup=min(100, steps),
        optimizer=INTERVENTIONS["AdamW" if optimizer == "adamw" else "SGD"],
        batch_size=BATCH_SIZE,
        data=ClutteredDigits(canvas=canvas),
        model=DigitsViT(image_size=canvas, width=width, depth=depth),
        measure_every=max(1, steps // 20),
        device=device,
    )


def intervention(name: str, seed: int, *, steps: int | None = None, **size) -> Recipe:
    """Pretraining with another optimizer; everything else is :func:`pretraining`'s.

    Args:
        name: a key of ``INTERVENTIONS``.
        seed: initial weights and training stream, the same for every optimizer.
        steps: optimizer steps; by default ``INTERVENTION_STEPS``, and SGD's own for SGD.
        **size: canvas, width, depth, device of :func:`pretraining`.

    Raises:
        ValueError: for an unknown name.

    Example:
        >>> intervention("AdamW, eps 1e-4", seed=0).optimizer.eps
        0.0001
    """
    if name not in INTERVENTIONS:
        raise ValueError(f"unknown intervention {name!r}: choose one of {', '.join(INTERVENTIONS)}")
    if name == "SGD":
        return pretraining("sgd", seed, steps=steps, **size)
    base = pretraining("adamw", seed, steps=INTERVENTION_STEPS if steps is None else steps, **size)
    return replace(base, optimizer=INTERVENTIONS[name])


ABLATIONS: dict[str, dict[str, dict[str, Any]]] = {
    "refresh interval": {"10": {"refresh_every": 10}},
    "k_max": {"5": {"k_max": 5}, "10": {"k_max": 10}},
    "tau": {"0.8": {"tau": 0.8}, "0.9": {"tau": 0.9}, "0.95": {"tau": 0.95}},
    "power": {"3": {"power": 3}, "4": {"power": 4}},
    "criterion": {
        "spectral, tau 0.2": {"criterion": "spectral", "tau": 0.2},
        "top 3 of every layer": {"criterion": "all"},
    },
    "coefficients": {"live": {"coefficients": "live"}},
}
"""Tables 10 and 11, the criteria of PCDR: group, setting, what it changes of the variant ``"S2D"``."""


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


def arm(
    variant: str, settings: Mapping[str, float], *, betas: tuple[float, float], refresh_every: int
) -> tuple[Optimizer, dict[str, Any] | None]:
    """What a fine-tuning variant does with its settings.

    Args:
        variant: AdamW, with or without one of the spectral penalties, or the cap.
        settings: lr, weight_decay and the variant's own.
        betas: AdamW's.
        refresh_every: steps between refreshes of the spectral variants.

    Returns:
        The optimizer, and the arguments of S2D or None: what a :class:`Recipe` takes.
    """
    s2d = None
    if variant in _SPECTRAL:
        s2d = _SPECTRAL[variant] | {"lam": settings["lam"], "refresh_every": refresh_every}
        s2d |= {"tau": settings.get("tau", 0.6)}  # without a criterion it decides nothing
    adamw = {"lr": settings["lr"], "weight_decay": settings["weight_decay"], "betas": betas, "clip": CLIP}
    return Capped("adamw", cap=settings["cap"], **adamw) if "cap" in settings else Optimizer("adamw", **adamw), s2d


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
    optimizer, s2d = arm(variant, settings, betas=start.optimizer.betas, refresh_every=refresh_every)
    return Recipe(
        seed=1000 + seed,  # another stream of images than the pretraining's
        steps=steps,
        warmup=min(50, steps),
        optimizer=optimizer,
        batch_size=FINETUNE_BATCH_SIZE,
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
        optimizer=replace(start.optimizer, lr=QAT_LR, weight_decay=RECIPE_WEIGHT_DECAY),
        batch_size=start.batch_size,
        data=start.data,
        model=start.model,
        start=start,
        prepare=FakeQuantization(w_bits, a_bits),
        measure_every=max(1, steps // 5),
        device=start.device,
    )


def testbed_recipes() -> list[Recipe]:
    """What the testbed's table is measured on: both optimizers and the growth, on every evidence seed."""
    recipes = [pretraining("adamw", seed, steps=steps) for steps in GROWTH_STEPS for seed in EVIDENCE_SEEDS]
    return recipes + [pretraining("sgd", seed) for seed in EVIDENCE_SEEDS]


def starting_recipes() -> list[Recipe]:
    """What a reader starts from: the checkpoints of the walkthrough (QAT apart) and the ablations' pretraining."""
    recipes = [pretraining("adamw", seed) for seed in ABLATION_SEEDS]
    recipes += [pretraining("adamw", seed, steps=INTERVENTION_STEPS) for seed in SEEDS]
    recipes += [pretraining("sgd", seed) for seed in SEEDS]
    return recipes + [finetuning(variant, seed) for variant in VARIANTS for seed in SEEDS]


def laptop_recipes() -> list[Recipe]:
    """Everything the notebooks train at their defaults."""
    recipes = testbed_recipes()
    recipes += [finetuning(variant, seed) for variant in EVIDENCE_VARIANTS for seed in EVIDENCE_SEEDS]
    recipes += [quantization_aware(finetuning(variant, seed), QAT_BITS) for variant in QAT_VARIANTS for seed in SEEDS]
    recipes += [intervention(name, seed) for name in INTERVENTIONS for seed in INTERVENTION_SEEDS]
    recipes += [pretraining("adamw", seed, steps=INTERVENTION_STEPS, width=WIDE) for seed in WIDE_SEEDS]
    settings = [(group, setting) for group in ABLATIONS for setting in ABLATIONS[group]]
    recipes += [ablation(group, setting, seed) for group, setting in settings for seed in ABLATION_SEEDS]
    return list({str(recipe): recipe for recipe in recipes}.values())
