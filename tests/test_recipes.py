"""The named recipes: what is tuned and on which seeds, and that each arm is what its name says."""

from __future__ import annotations

from dataclasses import replace

import pandas as pd
import pytest

from s2d.lab import recipes as named
from s2d.lab.paper import load_paper_table
from s2d.lab.recipes import (
    ABLATION_SEEDS,
    ABLATIONS,
    AS_PRINTED,
    DECOUPLED,
    EVIDENCE_SEEDS,
    EVIDENCE_VARIANTS,
    FINETUNE_LR,
    INTERVENTION_SEEDS,
    INTERVENTION_STEPS,
    INTERVENTIONS,
    RECIPE_WEIGHT_DECAY,
    SEEDS,
    SETTINGS,
    TUNING_SEEDS,
    VARIANTS,
    ablation,
    finetuning,
    intervention,
    laptop_recipes,
    pretraining,
)
from s2d.lab.results import load_table
from s2d.lab.tuning import GRID, tuning_runs
from s2d.lab.winners import SETTING_COLUMNS, winners


def test_finetuning_settings_are_the_winners_of_the_tuning_table():
    table = load_table("tuning", run="laptop")
    assert len(table) == len(tuning_runs())
    assert set(table.split) == {"validation"} and set(table.seed) == set(TUNING_SEEDS)
    chosen = winners(table).set_index("variant")
    assert set(chosen.index) == set(GRID)
    for variant in GRID:
        found = {name: value for name, value in chosen.loc[variant, SETTING_COLUMNS].items() if pd.notna(value)}
        used = {"lr": FINETUNE_LR, "weight_decay": RECIPE_WEIGHT_DECAY} | SETTINGS[variant]
        assert found == {name: used[name] for name in found}, variant
        assert set(SETTINGS[variant]) <= set(found), variant


def test_nothing_is_chosen_on_the_seeds_of_the_evidence():
    assert not set(TUNING_SEEDS) & set(EVIDENCE_SEEDS)
    assert len(EVIDENCE_SEEDS) >= 8 and len(ABLATION_SEEDS) >= 5 and len(INTERVENTION_SEEDS) >= 3
    for seeds in (SEEDS, ABLATION_SEEDS, INTERVENTION_SEEDS):
        assert len(seeds) >= 3 and set(seeds) <= set(EVIDENCE_SEEDS)


def test_every_variant_starts_from_the_same_checkpoint_and_differs():
    variants = [finetuning(variant, 0) for variant in SETTINGS]
    ablations = [ablation(group, setting, 0) for group in ABLATIONS for setting in ABLATIONS[group]]
    assert {str(recipe.start) for recipe in variants + ablations} == {str(pretraining("adamw", 0))}
    for recipes in (variants, [finetuning("S2D", 0), *ablations]):
        assert len({str(recipe) for recipe in recipes}) == len(recipes)
    assert set(VARIANTS) < set(EVIDENCE_VARIANTS) == set(SETTINGS)


def test_s2d_is_the_algorithm_as_printed():
    printed, live = finetuning("S2D", 0).s2d, finetuning("S2D, live", 0).s2d
    expected = {"criterion": "activation", "k_max": 3, "power": 2, "coefficients": "cached", "refresh_every": 100}
    assert {name: printed[name] for name in expected} == expected
    assert "coupling" not in printed  # through the gradient unless said otherwise
    assert live | {"coefficients": "cached", "lam": printed["lam"], "tau": printed["tau"]} == printed
    assert finetuning("No PCDR", 0).s2d["criterion"] == "all" and finetuning("No PCDR", 0).s2d["k_max"] is None


def test_the_papers_own_strength_and_threshold():
    lam = load_paper_table("second_hand").query("metric == 'default lam'").value.item()
    own = finetuning(AS_PRINTED, 0).s2d
    assert (own["lam"], own["tau"]) == (lam, 0.95)
    assert own | {name: finetuning("S2D", 0).s2d[name] for name in ("lam", "tau")} == finetuning("S2D", 0).s2d


def test_interventions_change_the_optimizer_and_nothing_else():
    plain = intervention("AdamW", 1)
    assert plain == pretraining("adamw", 1, steps=INTERVENTION_STEPS)
    assert intervention("SGD", 1) == pretraining("sgd", 1)
    for name in INTERVENTIONS:
        same = intervention(name, 1, steps=INTERVENTION_STEPS)
        assert replace(same, optimizer=plain.optimizer) == plain


def test_the_decoupled_variant_is_what_the_readme_says():
    s2d = finetuning(DECOUPLED, 0).s2d
    assert (s2d["coupling"], s2d["coefficients"], s2d["criterion"], s2d["k_max"]) == ("decoupled", "live", "all", None)


def test_the_notebooks_recipes_are_all_there_once():
    recipes = laptop_recipes()
    assert len({str(recipe) for recipe in recipes}) == len(recipes)
    assert {str(recipe) for recipe in named.testbed_recipes()} <= {str(recipe) for recipe in recipes}
    starts = {str(recipe.start) for recipe in recipes if recipe.start is not None}
    assert starts <= {str(recipe) for recipe in recipes}


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
