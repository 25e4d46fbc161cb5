"""The named recipes: what the committed store holds, and that fine-tuning uses the winners of the tuning table."""

from __future__ import annotations

from dataclasses import replace

import pandas as pd
import pytest

from s2d.lab.recipes import (
    ABLATIONS,
    DECOUPLED,
    EVIDENCE_SEEDS,
    INTERVENTIONS,
    PRETRAIN_STEPS,
    SEEDS,
    SETTINGS,
    VARIANTS,
    ablation,
    finetuning,
    intervention,
    pretraining,
)
from s2d.lab.results import load_table
from s2d.lab.tuning import SETTING_COLUMNS, tuning_runs, winners


def test_finetuning_settings_are_the_winners_of_the_tuning_table():
    table = load_table("tuning", run="laptop")
    assert len(table) == len(tuning_runs())
    assert set(table.split) == {"validation"}
    chosen = winners(table).set_index("variant")
    assert set(chosen.index) == set(SETTINGS)
    for variant, settings in SETTINGS.items():
        found = {name: value for name, value in chosen.loc[variant, SETTING_COLUMNS].items() if pd.notna(value)}
        assert set(found.items()) <= set(settings.items()), variant
        tried = {name for name in settings if table[table.variant == variant][name].notna().any()}
        assert {name: settings[name] for name in tried} == {name: found.get(name) for name in tried}, variant
    assert not set(table.seed) & set(EVIDENCE_SEEDS)


def test_every_variant_starts_from_the_same_checkpoint_and_differs():
    recipes = [finetuning(variant, 0) for variant in SETTINGS]
    recipes += [ablation(group, setting, 0) for group in ABLATIONS for setting in ABLATIONS[group]]
    assert {str(recipe.start) for recipe in recipes} == {str(pretraining("adamw", 0))}
    assert len({str(recipe) for recipe in recipes}) == len(recipes)
    assert set(VARIANTS) < set(SETTINGS)
    assert len(SEEDS) >= 3 and set(PRETRAIN_STEPS) == {"adamw", "sgd"}


def test_interventions_change_the_optimizer_and_nothing_else():
    plain = intervention("AdamW", 1)
    assert plain == pretraining("adamw", 1) and intervention("SGD", 1) == pretraining("sgd", 1)
    for name in INTERVENTIONS:
        assert replace(intervention(name, 1, steps=4000), optimizer=plain.optimizer, measure_every=250) == plain


def test_the_decoupled_variant_is_what_the_readme_says():
    s2d = finetuning(DECOUPLED, 0).s2d
    assert (s2d["coupling"], s2d["coefficients"], s2d["criterion"], s2d["k_max"]) == ("decoupled", "live", "all", None)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: pretraining("adam", 0), "unknown optimizer 'adam'"),
        (lambda: finetuning("S3D", 0), "unknown variant 'S3D'"),
        (lambda: finetuning("AdamW", 0, lam=1.0), "AdamW has no setting 'lam': it has lr, weight_decay"),
        (lambda: intervention("Adagrad", 0), "unknown intervention 'Adagrad'"),
        (lambda: ablation("power", "5", 0), "unknown ablation 'power', '5'"),
        (lambda: pretraining("adamw", 0, canvas=4), "canvas is 4"),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call()
