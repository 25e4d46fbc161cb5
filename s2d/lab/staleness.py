r"""G.2 measured: how long a cached penalty stays right, and what it does to a weight once it is not.

A short fine-tuning of its own, with a constant learning rate, that looks at every watched layer every few steps. With
the vectors :math:`u_1, v_1` of the last refresh it follows the signed coefficient :math:`u_1^\top W v_1`: the penalty
means to bring it towards zero, and a frozen one pushes it on beyond.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cache, partial
from typing import Any, NamedTuple

import pandas as pd
import torch
import torch.nn.functional as F
from torch import nn

from s2d.lab.quantization import over_checkpoints
from s2d.lab.recipes import CLIP, FINETUNE_LR, INTERVENTIONS, RECIPE_WEIGHT_DECAY
from s2d.lab.store import Trained, obtain
from s2d.lab.study import Study
from s2d.lab.training import Optimizer, Recipe
from s2d.regularizer import SelectiveSpectralDecay

K_MAX = 3


class Mode(NamedTuple):
    """One way of applying the penalty; without an ``optimizer``, with the recipe's own."""

    lam: float
    coefficients: str = "cached"
    coupling: str = "gradient"
    optimizer: Optimizer | None = None


# The strength of the decoupled modes is the one at which the coefficients fall over the first steps about as fast
# as in the coupled ones (a table in notebook 11 shows it), so that the modes differ in what happens later.
DECOUPLED_LAM = 4.0
SLOW_ADAMW = replace(INTERVENTIONS["AdamW"], lr=FINETUNE_LR / 100, weight_decay=RECIPE_WEIGHT_DECAY)
PLAIN_SGD = Optimizer("sgd", lr=0.1, weight_decay=0.0, momentum=0.0, clip=CLIP)

MODES: dict[str, Mode] = {
    "no penalty": Mode(lam=0.0),
    "cached, lam 5e-4": Mode(lam=5e-4),
    "cached, lam 5e-2": Mode(lam=5e-2),
    "live, lam 5e-2": Mode(lam=5e-2, coefficients="live"),
    "cached, decoupled": Mode(lam=DECOUPLED_LAM, coupling="decoupled"),
    "live, decoupled": Mode(lam=DECOUPLED_LAM, coefficients="live", coupling="decoupled"),
    "cached, lam 5e-4, lr / 100": Mode(lam=5e-4, optimizer=SLOW_ADAMW),
    "cached, lam 5e-4, SGD": Mode(lam=5e-4, optimizer=PLAIN_SGD),
}
"""What is compared, by the name it has in tables and figures. Coupled through AdamW where the name says nothing."""
PAPER_MODE = "cached, lam 5e-4"
"""The paper's form and strength of the penalty, at this recipe's learning rate."""
AT_REST = ("no penalty", "cached, lam 5e-4, lr / 100", "cached, lam 5e-4, SGD")
"""Modes in which an interval is too short for anything to cross zero: left out of the figure of the overshoot."""


def staleness_table(
    recipes: Sequence[Recipe],
    modes: Mapping[str, Mode] = MODES,
    *,
    steps: int = 200,
    refresh_every: int = 100,
    every: int = 10,
) -> pd.DataFrame:
    """Fine-tune the start of every recipe in every mode and follow each layer.

    Args:
        recipes: fine-tunings, one a seed; their start, data stream and optimizer are used, their S2D is not.
        modes: name to mode; see :data:`MODES`.
        steps: optimizer steps.
        refresh_every: steps between refreshes.
        every: steps between two looks.

    Returns:
        Columns mode, seed, step (updates done), age (of the cache, in steps), layer, cosine (cached against fresh
        penalty, G.2), sigma_1, coefficient (along the cached vectors). A look at a refresh is taken just before it.

    Raises:
        ValueError: for a recipe without a start, or counts below 1.

    Paper: G.2. Cost: a training step each, and a look costs about as much as one.
    """
    if min(steps, refresh_every, every) < 1:
        raise ValueError(f"steps={steps}, refresh_every={refresh_every}, every={every}: each must be at least 1")
    for recipe in recipes:
        if recipe.start is None:
            raise ValueError(f"the recipe with seed {recipe.seed} starts from nothing: give one that fine-tunes")
    starts = list(zip(obtain([recipe.start for recipe in recipes]), recipes, strict=True))
    work = partial(_rows, modes=modes, steps=steps, refresh_every=refresh_every, every=every)
    return over_checkpoints(work, {name: starts for name in modes})


def interval_tables(study: Study, recipes: Sequence[Recipe], **options: int) -> tuple[pd.DataFrame, pd.DataFrame]:
    """:func:`staleness_table` in two: how the cached penalty ages, and what it does to the coefficients.

    Where the study reads its tables instead of measuring, these are read too: following takes minutes.

    Args:
        study: whose tables these are.
        recipes, **options: of :func:`staleness_table`.

    Returns:
        The tables ``staleness`` and ``overshoot``.
    """
    followed = cache(lambda: staleness_table(recipes, **options))
    keys = ["mode", "seed", "step", "age", "layer"]
    columns = {"staleness": ["cosine"], "overshoot": ["sigma_1", "coefficient"]}
    aged, moved = (study.table(name, lambda _, own=own: followed()[keys + own]) for name, own in columns.items())
    return aged, moved


def _rows(name: str, start: tuple[Trained, Recipe], *, modes: Mapping[str, Mode], **options: int) -> list[dict]:
    trained, recipe = start
    key = {"mode": name, "seed": trained.seed}
    return [key | row for row in follow(trained.model().to(recipe.device), recipe, modes[name], **options)]


def follow(
    model: nn.Module, recipe: Recipe, mode: Mode, *, steps: int, refresh_every: int, every: int
) -> list[dict[str, Any]]:
    """Train a model in place and look at its layers every few steps, before the first and after the last included.

    Args:
        model: any that classifies the recipe's images, on the recipe's device.
        recipe: whose images and (unless the mode has its own) optimizer are used, at a constant learning rate.
        mode: how the penalty is applied; always to the top three components of every layer, so that each is seen.
        steps, refresh_every, every: see :func:`staleness_table`.

    Returns:
        Rows with step, age, layer, cosine, sigma_1, coefficient.
    """
    kind = mode.optimizer or recipe.optimizer
    optimizer = kind.build(model)
    decay = SelectiveSpectralDecay(
        model,
        lam=mode.lam,
        coefficients=mode.coefficients,
        coupling=mode.coupling,
        criterion="all",
        k_max=K_MAX,
        refresh_every=refresh_every,
    )
    decay.attach(optimizer)
    decay.refresh()  # for the look before the first step, which refreshes again
    model.train()
    rows = []
    for step in range(steps + 1):
        if step % every == 0 or step == steps:
            age = (step - 1) % refresh_every + 1 if step else 0
            rows += [{"step": step, "age": age} | row for row in look(decay)]
        if step < steps:
            images, labels = recipe.data.training_batch(recipe.batch_size, seed=recipe.seed, step=step)
            optimizer.zero_grad(set_to_none=True)
            F.cross_entropy(model(images.to(recipe.device)), labels.to(recipe.device)).backward()
            if kind.clip > 0:
                nn.utils.clip_grad_norm_(model.parameters(), kind.clip)
            optimizer.step()
    decay.detach()
    return rows


@torch.no_grad()
def look(decay: SelectiveSpectralDecay) -> list[dict[str, Any]]:
    """Every layer as it is now, against what the last refresh has cached.

    Args:
        decay: with criterion ``"all"``, after a refresh.

    Returns:
        Rows with layer, cosine, sigma_1, coefficient.
    """
    cosines, cached = decay.cached_similarity(), decay.state_dict()
    rows = []
    for name, linear in decay.layers.items():
        weight = linear.matrix()
        u, v = cached[f"{name}.u"][:, 0], cached[f"{name}.v"][:, 0]
        sigma_1 = torch.linalg.matrix_norm(weight, ord=2).item()
        row = {"layer": name, "cosine": cosines[name], "sigma_1": sigma_1, "coefficient": (u @ weight @ v).item()}
        rows.append(row)
    return rows
