"""What a training run may be told: a recipe (YAML), and NAME=VALUE over it; each name known, each value checked."""

from __future__ import annotations

import dataclasses
import difflib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any, TypeVar

from s2d.packages import need
from s2d.regularizer import COEFFICIENTS, COUPLINGS, CRITERIA

RECIPES = resources.files("s2d.train") / "recipes"


def _number(default: float | None, low: float, high: float, **notes: Any) -> Any:
    """A real number from ``low`` to ``high``; None is allowed where it is the default."""
    return field(default=default, metadata={"kind": float, "low": low, "high": high} | notes)


def _count(default: int | None, low: int = 1, **notes: Any) -> Any:
    """A whole number of at least ``low``; None is allowed where it is the default."""
    return field(default=default, metadata={"kind": int, "low": low, "high": math.inf} | notes)


def _choice(default: str, *known: str) -> Any:
    return field(default=default, metadata={"kind": str, "known": known})


FREE = {"free": True}  # may differ between the runs that continue each other: it does not change the result


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What both kinds of training know. Numbers without a source in the recipes are ours.

    Attributes:
        epochs: passes over the data.
        batch_size: items an optimizer step, over all processes and accumulation steps.
        micro_batch_size: items a process takes at a time; by default its whole share. With a fixed one the result does
            not depend on the number of processes but for rounding.
        lr, min_lr, weight_decay, beta1, beta2, clip_grad: of the optimizer; the rate falls along a cosine.
        warmup_epochs: over which the rate grows linearly.
        precision: ``"fp32"``, or ``"bf16"`` for autocast.
        compile: by ``torch.compile``.
        sharding: ``"ddp"`` keeps a whole model on every process, ``"fsdp2"`` a part of it.
        seed: of everything random.
        decay: ``"none"`` or ``"s2d"``, with ``lam`` to ``coupling`` as in :class:`s2d.SelectiveSpectralDecay`.
        qat_w_bits, qat_a_bits: bits of quantization-aware training.
        qat_items: training items that set the ranges of its activations.
        checkpoint_every: optimizer steps between checkpoints; there is one after each epoch too.
        log_every: optimizer steps between lines of progress.
        workers: processes that read data, beside each training process.
    """

    epochs: int = _count(10)
    batch_size: int = _count(256)
    micro_batch_size: int | None = _count(None)
    lr: float = _number(1e-5, 0, 10)
    min_lr: float = _number(0.0, 0, 10)
    weight_decay: float = _number(0.05, 0, 10)
    beta1: float = _number(0.9, 0, 1)
    beta2: float = _number(0.999, 0, 1)
    clip_grad: float | None = _number(None, 0, math.inf)
    warmup_epochs: float = _number(1.0, 0, math.inf)
    precision: str = _choice("fp32", "fp32", "bf16")
    compile: bool = field(default=False, metadata={"kind": bool})
    sharding: str = _choice("ddp", "ddp", "fsdp2")
    seed: int = _count(0, 0)
    decay: str = _choice("none", "none", "s2d")
    lam: float = _number(5e-4, 0, math.inf)
    power: float = _number(2.0, 0.01, 100)
    tau: float = _number(0.95, 1e-9, 1)
    k_max: int | None = _count(3, optional=True)
    refresh_every: int = _count(100)
    criterion: str = _choice("activation", *CRITERIA)
    coefficients: str = _choice("cached", *COEFFICIENTS)
    coupling: str = _choice("gradient", *COUPLINGS)
    qat_w_bits: int | None = _count(None, 2)
    qat_a_bits: int | None = _count(None, 2)
    qat_items: int = _count(256)
    checkpoint_every: int = _count(500, **FREE)
    log_every: int = _count(50, **FREE)
    workers: int = _count(4, 0, **FREE)

    def __post_init__(self) -> None:
        for entry in dataclasses.fields(self):
            object.__setattr__(self, entry.name, _checked(entry, getattr(self, entry.name)))
        if (self.qat_w_bits is None) != (self.qat_a_bits is None):
            raise ValueError("qat_w_bits and qat_a_bits belong together: set both, such as 4 and 4, or none")
        for name in ("qat_w_bits", "qat_a_bits"):
            value = getattr(self, name)
            if value is not None and not (value <= 8 or value in (16, 32)):
                raise ValueError(f"{name} is {value}: choose 2 to 8, or 16 or 32 to leave that side in floating point")
        if self.decay != "none" and self.qat_w_bits is not None:
            raise ValueError(
                "decay=s2d and qat_w_bits do not go together: train with the decay first, then start QAT from its "
                "OUT/model with decay=none"
            )
        if self.warmup_epochs >= self.epochs:
            raise ValueError(f"warmup_epochs is {self.warmup_epochs:g} of {self.epochs} epochs: give fewer")

    def s2d(self) -> dict[str, Any]:
        """The arguments of :class:`s2d.SelectiveSpectralDecay`."""
        names = ("lam", "power", "tau", "k_max", "refresh_every", "criterion", "coefficients", "coupling")
        return {name: getattr(self, name) for name in names}


@dataclass(frozen=True, kw_only=True)
class VisionSettings(Settings):
    """Of image classification; the names are timm's.

    Attributes:
        image_size: pixels a side; by default the model's.
        classes: of the head; by default as many as the data names.
        optimizer: ``"adamw"`` or ``"sgd"`` (momentum 0.9).
        layer_decay: factor of the rate from block to block downwards; None for one rate.
        label_smoothing, mixup, cutmix, random_erasing, color_jitter, drop_path, flip: of timm.
        auto_augment: timm's name of a policy, such as ``rand-m9-mstd0.5-inc1``.
        crop_min: least share of an image's area in a random crop.
        ema_decay: of an average of the weights, which then is the result; None for none.
    """

    image_size: int | None = _count(None)
    classes: int | None = _count(None, 2)
    optimizer: str = _choice("adamw", "adamw", "sgd")
    layer_decay: float | None = _number(None, 0, 1)
    label_smoothing: float = _number(0.1, 0, 1)
    mixup: float = _number(0.0, 0, math.inf)
    cutmix: float = _number(0.0, 0, math.inf)
    random_erasing: float = _number(0.0, 0, 1)
    auto_augment: str | None = field(default=None, metadata={"kind": str})
    color_jitter: float = _number(0.0, 0, 1)
    crop_min: float = _number(0.08, 0, 1)
    flip: float = _number(0.5, 0, 1)
    drop_path: float = _number(0.0, 0, 1)
    ema_decay: float | None = _number(None, 0, 1)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.sharding == "fsdp2" and (self.ema_decay is not None or self.qat_w_bits is not None):
            other = "ema_decay" if self.ema_decay is not None else "qat_w_bits"
            raise ValueError(f"sharding=fsdp2 and {other} do not go together: use sharding=ddp, or leave {other} out")
        if self.ema_decay is not None and self.qat_w_bits is not None:
            raise ValueError("ema_decay and qat_w_bits do not go together: leave one out")
        if self.mixup or self.cutmix:
            for name in ("batch_size", "micro_batch_size"):
                if (getattr(self, name) or 0) % 2:
                    raise ValueError(f"{name} is {getattr(self, name)}, and mixup pairs images: give an even number")


@dataclass(frozen=True, kw_only=True)
class LanguageSettings(Settings):
    """Of supervised fine-tuning on answers.

    Attributes:
        max_length: tokens of a conversation; longer ones are cut off at the end.
        gradient_checkpointing: compute activations twice, to keep fewer.
    """

    max_length: int = _count(1024, 2)
    gradient_checkpointing: bool = field(default=False, metadata={"kind": bool})

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.qat_w_bits is not None:
            raise ValueError("qat_w_bits is for s2d train vision: leave it out")


Kind = TypeVar("Kind", bound=Settings)


def read_settings(kind: type[Kind], recipe: str | Path | None = None, sets: Sequence[str] = ()) -> Kind:
    """A recipe, and what is set over it.

    Args:
        kind: :class:`VisionSettings` or :class:`LanguageSettings`.
        recipe: a YAML file, or the name of one that is shipped (:func:`recipe_names`).
        sets: texts NAME=VALUE; later ones win.

    Raises:
        ValueError: for a file that is not there or no mapping, a name that is not known, and a value out of range.
        ImportError: without the package pyyaml.

    Example:
        >>> read_settings(VisionSettings, "vision-s2d", ["lr=3e-5"]).lr
        3e-05

    Paper: none.
    """
    yaml = need("yaml", "a recipe or --set")
    given: dict[str, Any] = {}
    if recipe is not None:
        given = _read_recipe(yaml, recipe)
        _check_names(kind, given, f"--recipe {recipe}")
    for text in sets:
        name, equals, value = text.partition("=")
        if not equals:
            raise ValueError(f"--set {text!r} is not of the form NAME=VALUE")
        _check_names(kind, {name: None}, "--set")
        try:
            given[name] = yaml.safe_load(value)
        except yaml.YAMLError:
            given[name] = value
    return kind(**given)


def recipe_names() -> list[str]:
    """The recipes that are shipped.

    Example:
        >>> "vision-adamw" in recipe_names()
        True

    Paper: none.
    """
    return sorted(Path(entry.name).stem for entry in RECIPES.iterdir() if entry.name.endswith(".yaml"))


def free_names(kind: type[Settings]) -> set[str]:
    """The settings that may change when a run goes on, as they do not change its result.

    Example:
        >>> sorted(free_names(VisionSettings))
        ['checkpoint_every', 'log_every', 'workers']

    Paper: none.
    """
    return {entry.name for entry in dataclasses.fields(kind) if entry.metadata.get("free")}


def _read_recipe(yaml: Any, recipe: str | Path) -> dict[str, Any]:
    path = Path(recipe)
    if str(recipe) in recipe_names():
        text = (RECIPES / f"{recipe}.yaml").read_text(encoding="utf-8")
    elif path.is_file():
        text = path.read_text(encoding="utf-8")
    else:
        raise ValueError(f"--recipe {recipe} does not exist: give a YAML file, or one of {', '.join(recipe_names())}")
    try:
        found = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(f"--recipe {recipe} is no YAML ({str(error).splitlines()[0]}): repair it") from None
    if not isinstance(found, Mapping):
        raise ValueError(f"--recipe {recipe} holds no names and values: write lines such as lr: 1e-5")
    return dict(found)


def _check_names(kind: type[Settings], given: Mapping[str, Any], where: str) -> None:
    known = [entry.name for entry in dataclasses.fields(kind)]
    for name in given:
        if name not in known:
            close = difflib.get_close_matches(str(name), known, n=1)
            hint = f"did you mean {close[0]!r}? " if close else ""
            raise ValueError(f"{where}: {name!r} is no setting: {hint}There are {', '.join(known)}")


def _checked(entry: dataclasses.Field, value: Any) -> Any:
    """The value of a setting, of its kind and in its range."""
    notes, name = entry.metadata, entry.name
    if value is None and (entry.default is None or notes.get("optional")):
        return None
    if notes["kind"] is float:
        try:
            number = math.nan if isinstance(value, bool) else float(value)  # YAML reads 1e-4 as a text
        except (TypeError, ValueError):
            number = math.nan
        if not notes["low"] <= number <= notes["high"] or math.isinf(number):
            raise ValueError(f"{name} is {value!r}: give a number from {notes['low']:g} to {notes['high']:g}")
        return number
    if notes["kind"] is int:
        if isinstance(value, bool) or not isinstance(value, int) or value < notes["low"]:
            raise ValueError(f"{name} is {value!r}: give a whole number of {notes['low']} or more")
    elif notes["kind"] is bool:
        if not isinstance(value, bool):
            raise ValueError(f"{name} is {value!r}: give true or false")
    elif not isinstance(value, str) or value not in notes.get("known", (value,)):
        raise ValueError(f"{name} is {value!r}: choose {', '.join(notes.get('known', ())) or 'a text'}")
    return value
