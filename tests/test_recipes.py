"""The named recipes: what the committed store holds, and that fine-tuning uses the winners of the tuning table."""

from __future__ import annotations

import pytest

from s2d.lab.recipes import (
    PRETRAIN_STEPS,
    SEEDS,
    TUNED_LAM,
    TUNED_TAU,
    TUNED_WEIGHT_DECAY,
    VARIANTS,
    finetuning,
    laptop_recipes,
    pretraining,
)
from s2d.lab.results import load_table
from s2d.lab.store import _file_name, _load, committed_folder
from s2d.lab.tuning import GRID, winners


def test_the_committed_store_holds_exactly_the_laptop_recipes():
    wanted = {_file_name(recipe) for recipe in laptop_recipes()}
    present = {path.name for path in committed_folder().glob("*.safetensors")}
    assert present == wanted, "train them (make figures), then python -m s2d.lab.store"


@pytest.mark.parametrize("recipe", laptop_recipes(), ids=_file_name)
def test_committed_entries_are_whole_and_theirs(recipe):
    path = committed_folder() / _file_name(recipe)
    trained = _load(path, recipe)
    assert path.stat().st_size < 1_000_000
    assert trained.history[-1]["step"] == recipe.steps


def test_the_committed_store_stays_small():
    assert sum(path.stat().st_size for path in committed_folder().glob("*")) < 15_000_000


def test_finetuning_settings_are_the_winners_of_the_tuning_table():
    table = load_table("tuning", run="laptop")
    assert len(table) == len(GRID)
    assert set(table.split) == {"validation"}
    chosen = winners(table).set_index("variant")
    assert chosen.weight_decay["AdamW, tuned weight decay"] == TUNED_WEIGHT_DECAY
    assert {variant: chosen.lam[variant] for variant in TUNED_LAM} == TUNED_LAM
    assert chosen.tau["S2D"] == TUNED_TAU


def test_every_variant_starts_from_the_same_checkpoint_and_differs():
    recipes = [finetuning(variant, 0) for variant in VARIANTS]
    assert {str(recipe.start) for recipe in recipes} == {str(pretraining("adamw", 0))}
    assert len({str(recipe) for recipe in recipes}) == len(VARIANTS)
    assert len(SEEDS) >= 3 and set(PRETRAIN_STEPS) == {"adamw", "sgd"}


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: pretraining("adam", 0), "unknown optimizer 'adam'"),
        (lambda: finetuning("S3D", 0), "unknown variant 'S3D'"),
        (lambda: finetuning("AdamW", 0, lam=1.0), "AdamW has no lam or tau"),
        (lambda: pretraining("adamw", 0, canvas=4), "canvas is 4"),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call()
