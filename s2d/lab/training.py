"""Training one recipe: a plain loop that can be interrupted anywhere and resumes as if it had not been.

The code that a stored checkpoint depends on is this module and what it imports (see :mod:`s2d.lab.identity`), so it
holds what decides the weights and nothing else. It knows nothing of quantization: what a recipe does to the model
before it is trained is a :class:`Preparation`.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from s2d.lab.data import ClutteredDigits
from s2d.lab.files import read_tensors, write_tensors
from s2d.lab.models import DigitsViT
from s2d.outliers import watch_activations

MEASURE_IMAGES = 256  # calibration images on which activations are measured during training
VALIDATION_IMAGES = 800


@dataclass(frozen=True)
class Optimizer:
    """Optimizer recipe; ``betas`` are AdamW's, ``momentum`` is SGD's, ``clip`` bounds the gradient norm (0: off)."""

    name: Literal["adamw", "sgd"] = "adamw"
    lr: float = 3e-3
    weight_decay: float = 0.01
    betas: tuple[float, float] = (0.9, 0.999)
    momentum: float = 0.9
    clip: float = 0.0

    def __post_init__(self) -> None:
        if self.name not in ("adamw", "sgd"):
            raise ValueError(f"unknown optimizer {self.name!r}: choose 'adamw' or 'sgd'")
        if not self.lr > 0:
            raise ValueError(f"lr is {self.lr}: it must be positive")

    def build(self, model: nn.Module) -> torch.optim.Optimizer:
        """The torch optimizer over the model's parameters; biases, norms and embeddings are not decayed."""
        from timm.optim import param_groups_weight_decay

        groups = param_groups_weight_decay(model, self.weight_decay, no_weight_decay_list=model.no_weight_decay())
        if self.name == "adamw":
            return torch.optim.AdamW(groups, lr=self.lr, betas=self.betas)
        return torch.optim.SGD(groups, lr=self.lr, momentum=self.momentum)


class Data(Protocol):
    """What a recipe trains on; the classes are frozen dataclasses, such as :class:`s2d.lab.data.ClutteredDigits`."""

    @property
    def item_shape(self) -> tuple[int, ...]:
        """Of one item."""

    def training_batch(self, batch_size: int, *, seed: int, step: int) -> tuple[Tensor, Tensor]:
        """Items and labels of one step, a pure function of seed and step."""

    def fixed_set(self, split: str, n: int | None = None, *, seed: int = 0) -> tuple[Tensor, Tensor]:
        """Items and labels of one split."""


class Architecture(Protocol):
    """What a recipe trains; the classes are frozen dataclasses, such as :class:`s2d.lab.models.DigitsViT`.

    The modules have ``blocks``, whose outputs are the residual stream, and timm's ``no_weight_decay()``.
    """

    @property
    def item_shape(self) -> tuple[int, ...]:
        """Of one item."""

    def build(self, seed: int) -> nn.Module:
        """The model with its initial weights."""


class Preparation(ABC):
    """What is done to the model between its start weights and the first step; subclasses are frozen dataclasses.

    Attributes:
        stage: the word for it in file names.
    """

    stage: ClassVar[str]

    @abstractmethod
    def apply(self, model: nn.Module, data: Data) -> nn.Module:
        """The model to train. Names and shapes of its state must depend on the recipe alone, never on the weights.

        Args:
            model: with the start weights, on the CPU; may be changed.
            data: the recipe's.
        """


@dataclass(frozen=True)
class Recipe:
    """Everything that decides a trained checkpoint.

    Attributes:
        seed: seed of the initial weights (when there is no ``start``) and of the training stream.
        steps: optimizer steps; the learning rate rises linearly over ``warmup`` of them and falls linearly to 0 over
            the last half.
        start: the recipe whose result is fine-tuned, or None to train from scratch.
        prepare: what is done to the model once the start weights are loaded, or None.
        s2d: keyword arguments of :class:`s2d.SelectiveSpectralDecay`, or None to train without it.
    """

    seed: int
    steps: int
    optimizer: Optimizer = field(default_factory=Optimizer)
    warmup: int = 200
    batch_size: int = 64
    data: Data = field(default_factory=ClutteredDigits)
    model: Architecture = field(default_factory=DigitsViT)
    start: Recipe | None = None
    prepare: Preparation | None = None
    s2d: dict[str, Any] | None = None
    measure_every: int = 250
    device: str = "cpu"

    def __post_init__(self) -> None:
        if self.steps < 1 or self.batch_size < 1 or self.measure_every < 1:
            raise ValueError(
                f"steps={self.steps}, batch_size={self.batch_size}, measure_every={self.measure_every}: "
                "each must be at least 1"
            )
        if self.data.item_shape != self.model.item_shape:
            raise ValueError(
                f"{self.data} makes items of the shape {self.data.item_shape} and {self.model} takes "
                f"{self.model.item_shape}: make them equal"
            )
        if self.start is not None and self.start.model != self.model:
            raise ValueError(f"cannot fine-tune {self.start.model} as {self.model}: the architectures differ")
        if self.start is not None and self.start.prepare is not None:
            raise ValueError(
                f"cannot start from a model prepared by {self.start.prepare}: start from what that began with"
            )

    @property
    def origin(self) -> Recipe:
        """The pretraining that this descends from."""
        return self if self.start is None else self.start.origin

    def blank(self) -> nn.Module:
        """A prepared model on the CPU, to load this recipe's result into; its values are of no account."""
        model = self.model.build(0)
        return model if self.prepare is None else self.prepare.apply(model, self.data)


def learning_rate(recipe: Recipe, step: int) -> float:
    """Linear warm-up, a plateau, and a linear descent to zero over the last half."""
    rise = (step + 1) / max(1, recipe.warmup)
    fall = (recipe.steps - step) / max(1, recipe.steps // 2)
    return recipe.optimizer.lr * min(rise, 1.0, fall)


@torch.inference_mode()
def accuracy(model: nn.Module, images: Tensor, labels: Tensor, batch_size: int = 256) -> float:
    """Fraction of images whose largest logit is the label."""
    model.eval()
    device = next(model.parameters()).device
    hits = sum(
        (model(x.to(device)).argmax(-1).cpu() == y).sum().item()
        for x, y in zip(images.split(batch_size), labels.split(batch_size), strict=True)
    )
    return hits / len(labels)


@torch.inference_mode()
def residual_statistics(model: nn.Module, images: Tensor) -> dict[str, float]:
    """Kurtosis and largest magnitude of the residual stream (block outputs), as means and maxima over blocks."""
    model.eval()
    with watch_activations(dict(model.blocks.named_children())) as watched:
        model(images.to(next(model.parameters()).device))
    summaries = [statistics.summary() for statistics in watched.values()]
    return {
        "excess_kurtosis": sum(s.excess_kurtosis for s in summaries) / len(summaries),
        "neuron_kurtosis": sum(s.neuron_kurtosis for s in summaries) / len(summaries),
        "max_abs": max(s.max_abs for s in summaries),
    }


class Run:
    """A training under way, from its start or from any step of its schedule.

    Args:
        recipe: what is trained.
        start: weights to begin with; by default freshly initialised ones.

    Attributes:
        history: the measurements so far.
    """

    def __init__(self, recipe: Recipe, start: Mapping[str, Tensor] | None = None) -> None:
        self.recipe, self.history = recipe, []
        model = recipe.model.build(recipe.seed)
        if start is not None:
            model.load_state_dict({name: tensor.float() for name, tensor in start.items()})
        if recipe.prepare is not None:
            model = recipe.prepare.apply(model, recipe.data)
        self.model = model.to(recipe.device)
        self.optimizer = recipe.optimizer.build(model)
        self.decay = None
        if recipe.s2d is not None:
            from s2d.regularizer import SelectiveSpectralDecay

            self.decay = SelectiveSpectralDecay(model, **recipe.s2d)
            self.decay.attach(self.optimizer)
        self._loss = 0.0
        self._calibration, _ = recipe.data.fixed_set("calibration", MEASURE_IMAGES)
        self._validation = recipe.data.fixed_set("validation", VALIDATION_IMAGES)

    def step(self, step: int) -> Tensor:
        """Take one step of the schedule, with the learning rate and the images of ``step``.

        Returns:
            The loss before it, a scalar.

        Raises:
            ValueError: if the loss is found to be non-finite, which is looked at where it is measured.
        """
        recipe = self.recipe
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(recipe, step)
        images, labels = recipe.data.training_batch(recipe.batch_size, seed=recipe.seed, step=step)
        self.model.train()
        loss = F.cross_entropy(self.model(images.to(recipe.device)), labels.to(recipe.device))
        if step % recipe.measure_every == 0:
            value = loss.item()
            if not math.isfinite(value):
                raise ValueError(f"the loss is {value} at step {step}: lower lr={recipe.optimizer.lr}")
            self._measure(step, value)
            self.model.train()
        loss.backward()
        if recipe.optimizer.clip > 0:
            nn.utils.clip_grad_norm_(self.model.parameters(), recipe.optimizer.clip)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self._loss = loss.detach()
        return self._loss

    def _measure(self, step: int, loss: float) -> None:
        row = {"step": step, "loss": loss, "validation_accuracy": accuracy(self.model, *self._validation)}
        if self.decay is not None:
            row["selected_layers"] = sum(row["rank"] > 0 for row in self.decay.report())
        self.history.append(row | residual_statistics(self.model, self._calibration))

    def finish(self) -> tuple[dict[str, Tensor], list[dict[str, float]]]:
        """Round the weights to float16 and measure these.

        Returns:
            The weights and the whole history.

        Raises:
            ValueError: if the weights are not finite.
        """
        final = {name: tensor.detach().cpu().half() for name, tensor in self.model.state_dict().items()}
        if not all(tensor.isfinite().all() for tensor in final.values()):
            raise ValueError(f"the weights are not finite after training: lower lr={self.recipe.optimizer.lr}")
        self.model.load_state_dict({name: tensor.float() for name, tensor in final.items()})
        self._measure(self.recipe.steps, float(self._loss))
        return final, self.history

    def state(self) -> dict[str, Tensor]:
        """Everything that the next steps depend on, beside the history: of model, optimizer and S2D."""
        tensors = {f"model.{name}": tensor for name, tensor in self.model.state_dict().items()}
        for index, state in self.optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer.{index}.{name}": value for name, value in state.items() if value is not None}
        if self.decay is not None:
            tensors |= {f"decay.{name}": value for name, value in self.decay.state_dict().items()}
        return tensors

    def load_state(self, tensors: Mapping[str, Tensor]) -> None:
        """Continue from a :meth:`state`."""

        def part(prefix: str) -> dict[str, Tensor]:
            return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}

        self.model.load_state_dict(part("model."))
        state: dict[int, dict[str, Tensor]] = {}
        for name, value in part("optimizer.").items():
            index, key = name.split(".", 1)
            state.setdefault(int(index), {})[key] = value
        self.optimizer.load_state_dict({"state": state, "param_groups": self.optimizer.state_dict()["param_groups"]})
        if self.decay is not None:
            self.decay.load_state_dict(part("decay."))


def train(
    recipe: Recipe,
    start: dict[str, Tensor] | None = None,
    *,
    partial: Path | None = None,
    save_every: int = 500,
    progress: Callable[[int], None] = lambda steps: None,
) -> tuple[dict[str, Tensor], list[dict[str, float]]]:
    """Train one recipe to its end.

    Args:
        recipe: what to train.
        start: weights to fine-tune; required exactly when ``recipe.start`` is set.
        partial: where to keep the unfinished run; when the file exists the run continues from it, on CPU bit for bit as
            if never stopped. It is removed at the end.
        save_every: steps between saves of the unfinished run.
        progress: called with the number of steps just done.

    Returns:
        The weights rounded to float16 (the precision of the paper's full-precision baselines and of the stored
        checkpoints), and the history: one row every ``measure_every`` steps.

    Raises:
        ValueError: when ``start`` does not fit the recipe, or the loss becomes non-finite.
    """
    if (start is None) != (recipe.start is None):
        raise ValueError("start weights must be given exactly when the recipe has a start")
    run, first = Run(recipe, start), 0
    if partial is not None and partial.exists():
        tensors, metadata = read_tensors(partial)
        run.load_state(tensors)
        first, run.history = metadata["step"], metadata["history"]
        progress(first)
    step = first
    try:
        for step in range(first, recipe.steps):
            if partial is not None and step > first and step % save_every == 0:
                write_tensors(partial, run.state(), {"step": step, "history": run.history})
            run.step(step)
            progress(1)
    except KeyboardInterrupt:
        # A step that was cut short may have changed the weights: only saves at step boundaries are trusted.
        raise KeyboardInterrupt(f"interrupted at step {step}; run again to resume") from None
    final, history = run.finish()
    if partial is not None:
        partial.unlink(missing_ok=True)
    return final, history
