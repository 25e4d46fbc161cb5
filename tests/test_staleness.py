"""The interval between two refreshes: closed forms for a single layer, and what each mode may and may not do."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pandas as pd
import pytest
import torch

from s2d.lab import staleness
from s2d.lab.data import ClutteredDigits
from s2d.lab.figures import ablations as draw
from s2d.lab.models import DigitsViT
from s2d.lab.recipes import finetuning
from s2d.lab.staleness import MODES, PLAIN_SGD, Mode, follow, staleness_table
from s2d.lab.training import Optimizer, Recipe
from s2d.layers import linear_maps

WEIGHT = torch.diag(torch.tensor([4.0, 2.0, 1.0, 0.5]))


class OneLayer(torch.nn.Module):
    """A single linear layer, for the loop's optimizer recipe."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(4, 4, bias=False)
        self.layer.weight.data = WEIGHT.clone()

    def forward(self, x):
        return self.layer(x)

    def no_weight_decay(self) -> set[str]:
        return set()


def blank(optimizer: Optimizer = PLAIN_SGD):
    """A recipe whose images are all zero, so that the task has no gradient and only the penalty moves the weight."""
    images, labels = torch.zeros(2, 4), torch.tensor([0, 1])
    data = SimpleNamespace(training_batch=lambda batch_size, seed, step: (images, labels))
    return SimpleNamespace(optimizer=optimizer, data=data, batch_size=2, seed=0, device="cpu")


def followed(mode: Mode, *, steps: int, refresh_every: int = 1000, optimizer: Optimizer = PLAIN_SGD) -> pd.DataFrame:
    rows = follow(OneLayer(), blank(optimizer), mode, steps=steps, refresh_every=refresh_every, every=1)
    return pd.DataFrame(rows).set_index("step")


def test_frozen_penalty_under_sgd_follows_the_exact_recursion():
    lr, lam, steps = PLAIN_SGD.lr, 0.05, 80
    table = followed(Mode(lam=lam), steps=steps)
    expected = [4.0]
    for _ in range(steps):
        expected.append(expected[-1] - lr * lam * 4.0**2)
    assert table.coefficient.tolist() == pytest.approx(expected, abs=1e-4)
    assert table.coefficient.iloc[-1] < 0  # 1 / (lr lam s_0) is 50 steps
    # The second component falls by lr lam 2^2 a step; whichever is largest in magnitude is sigma_1.
    second = [2.0 - lr * lam * 4 * t for t in range(steps + 1)]
    largest = [max(abs(a), abs(b), 0.5) for a, b in zip(expected, second, strict=True)]
    assert table.sigma_1.tolist() == pytest.approx(largest, abs=1e-4)


def test_live_coefficients_under_sgd_follow_theirs():
    lr, lam = PLAIN_SGD.lr, 0.05
    table = followed(Mode(lam=lam, coefficients="live"), steps=60)
    expected = [4.0]
    for _ in range(60):
        expected.append(expected[-1] - lr * lam * expected[-1] ** 2)
    assert table.coefficient.tolist() == pytest.approx(expected, abs=1e-4)
    assert table.coefficient.min() > 0


@pytest.mark.parametrize("lam", [5e-4, 5e-2])
def test_under_adam_the_step_is_the_learning_rate_whatever_the_strength(lam):
    adam = Optimizer("adamw", lr=0.1, weight_decay=0.0)
    table = followed(Mode(lam=lam), steps=60, optimizer=adam)
    assert table.coefficient.tolist() == pytest.approx([4.0 - 0.1 * t for t in range(61)], abs=1e-2)


def test_decoupled_decay_by_hand_and_never_past_zero():
    lr, lam = PLAIN_SGD.lr, 0.5  # SGD's gradient is zero here: the decay alone moves the weight
    cached = followed(Mode(lam=lam, coupling="decoupled"), steps=40).coefficient
    assert cached.tolist() == pytest.approx([max(4.0 - lr * lam * 16 * t, 0.0) for t in range(41)], abs=1e-5)
    live = followed(Mode(lam=lam, coefficients="live", coupling="decoupled"), steps=40).coefficient
    expected = [4.0]
    for _ in range(40):
        expected.append(expected[-1] - lr * lam * expected[-1] ** 2)
    assert live.tolist() == pytest.approx(expected, abs=1e-5)


def test_cosine_after_a_refresh_and_as_the_component_vanishes():
    table = followed(Mode(lam=0.05), steps=81, refresh_every=40)
    assert table.cosine[0] == pytest.approx(1, abs=1e-5)
    assert table.age[[0, 1, 40, 41, 80, 81]].tolist() == [0, 1, 40, 1, 40, 1]
    # One step after a refresh: 4 -> 3.92, 2 -> 1.98, 1 -> 0.995, and the penalty goes with their squares.
    old, new = torch.tensor([4.0, 2.0, 1.0]) ** 2, torch.tensor([3.92, 1.98, 0.995]) ** 2
    assert table.cosine[1] == pytest.approx(torch.cosine_similarity(old, new, dim=0).item(), abs=1e-5)
    assert table.cosine[40] < table.cosine[1] and table.cosine[41] > table.cosine[40]


def test_overshot_component_has_cosine_below_zero():
    # After 80 steps the first two are -2.4 and 0.4, so a fresh penalty pushes the first the other way.
    assert followed(Mode(lam=0.05), steps=120).cosine.iloc[-1] < -0.5


@pytest.mark.parametrize("mode", MODES.values(), ids=MODES)
def test_nothing_moves_at_a_vanishing_learning_rate(mode):
    still = Optimizer("sgd", lr=1e-12, weight_decay=0.0, momentum=0.0)
    table = followed(mode._replace(optimizer=still), steps=20)
    assert table.cosine.min() == pytest.approx(1, abs=1e-5)
    assert table.coefficient.tolist() == pytest.approx([4.0] * 21) and table.sigma_1.tolist() == [4.0] * 21


@pytest.fixture
def recipe(monkeypatch):
    """A fine-tuning of a tiny, untrained network."""
    start = Recipe(seed=3, steps=1, data=ClutteredDigits(canvas=16), model=DigitsViT(width=16, depth=1))

    def untrained(recipes):
        return [
            staleness.Trained(r, {n: t.half() for n, t in r.model.build(3).state_dict().items()}, []) for r in recipes
        ]

    monkeypatch.setattr(staleness, "obtain", untrained)
    monkeypatch.setenv("S2D_WORKERS", "1")
    return replace(start, seed=1003, start=start, batch_size=8)


def test_rows_of_the_table(recipe):
    modes = {name: MODES[name] for name in ("no penalty", "live, decoupled")}
    table = staleness_table([recipe], modes, steps=6, refresh_every=4, every=3)
    assert list(table.columns) == ["mode", "seed", "step", "age", "layer", "cosine", "sigma_1", "coefficient"]
    assert table.groupby("mode", sort=False).step.unique().map(list).to_dict() == {name: [0, 3, 6] for name in modes}
    assert table.age[table.step == 6].eq(2).all() and set(table.seed) == {3}
    layers = set(linear_maps(recipe.model.build(0)))
    assert table.groupby(["mode", "step"]).layer.agg(set).eq(layers).all()
    assert table.cosine.abs().max() <= 1 and (table.coefficient <= table.sigma_1 + 1e-4).all()
    first = table[table.step == 0]
    assert first.cosine.min() > 0.999 and first.coefficient.tolist() == pytest.approx(first.sigma_1.tolist(), rel=1e-3)
    again = staleness_table([recipe], modes, steps=6, refresh_every=4, every=3)
    pd.testing.assert_frame_equal(table, again)
    rows = draw.staleness(table).axes[0].get_yticklabels()
    assert [tick.get_text() for tick in rows] == list(modes)
    assert len(draw.overshoot(table).axes) == 2  # one of the two modes is at rest


def test_a_step_without_penalty_is_a_step_of_adamw(recipe):
    followed, twin = recipe.model.build(0), recipe.model.build(0)
    follow(followed, recipe, Mode(lam=0.0), steps=1, refresh_every=5, every=5)
    images, labels = recipe.data.training_batch(recipe.batch_size, seed=recipe.seed, step=0)
    optimizer = torch.optim.AdamW(twin.parameters(), lr=recipe.optimizer.lr, weight_decay=0.0)
    torch.nn.functional.cross_entropy(twin(images), labels).backward()
    optimizer.step()
    name = "blocks.0.mlp.fc1.bias"  # a bias: the recipe does not decay it
    assert torch.allclose(followed.state_dict()[name], twin.state_dict()[name], atol=1e-6)


def test_the_gradient_is_clipped_as_in_training(recipe):
    """With plain SGD a step is no longer than the learning rate times the clip, whatever the gradient."""
    clipped = Optimizer("sgd", lr=1.0, weight_decay=0.0, momentum=0.0, clip=1e-3)
    model = recipe.model.build(0)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    follow(model, recipe, Mode(lam=0.0, optimizer=clipped), steps=1, refresh_every=5, every=5)
    moved = sum((tensor - before[name]).square().sum() for name, tensor in model.state_dict().items()).sqrt().item()
    assert moved == pytest.approx(1e-3, rel=1e-3)


@pytest.mark.parametrize("counts", [{"steps": 0}, {"refresh_every": 0}, {"every": -1}])
def test_bad_counts(counts):
    name, value = next(iter(counts.items()))
    with pytest.raises(ValueError, match=f"{name}={value}.*each must be at least 1"):
        staleness_table([finetuning("AdamW", seed=0)], **counts)


def test_a_recipe_without_a_start():
    with pytest.raises(ValueError, match="seed 7 starts from nothing: give one that fine-tunes"):
        staleness_table([Recipe(seed=7, steps=1)])
