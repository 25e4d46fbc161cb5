"""The ablation tables: pairing by seed, both sides of a comparison, and what each criterion picks, by hand."""

from __future__ import annotations

import math

import numpy as np
import pandas as pd
import pytest
import torch

from s2d.lab.ablations import (
    BASELINE,
    REFERENCES,
    SELECTION_CRITERIA,
    ablation_recipes,
    ablation_table,
    baseline_setting,
    beside_reported,
    paired_differences,
    reported_ablations,
    selection_table,
    with_baseline,
)
from s2d.lab.data import ClutteredDigits
from s2d.lab.figures import ablations as draw
from s2d.lab.figures.style import use_style
from s2d.lab.models import DigitsViT
from s2d.lab.paper import load_paper_table
from s2d.lab.quantization import methods_table, quantization_table
from s2d.lab.recipes import ABLATIONS, AS_PRINTED, finetuning
from s2d.lab.statistics import points_lost
from s2d.lab.store import Trained
from s2d.lab.training import Recipe

TAU = ("tau", "0.8")
BASE = (REFERENCES, BASELINE)


def untrained(seed: int) -> Trained:
    """A stored checkpoint as the tables take it, without the training."""
    recipe = Recipe(seed=seed, steps=1, data=ClutteredDigits(canvas=16), model=DigitsViT(width=16, depth=1))
    weights = {name: tensor.half() for name, tensor in recipe.model.build(seed).state_dict().items()}
    return Trained(recipe, weights, [])


def long(accuracies: dict[tuple[str, str], list[float]], **cell) -> pd.DataFrame:
    """A table of one method and bit width, with seeds from 3 on; full precision is 0.9 everywhere."""
    cell = {"method": "ERQ", "bits": "W4A4", "images": 100} | cell
    rows = [
        {"group": group, "setting": setting, "seed": seed, "accuracy": accuracy, "points_lost": 100 * (0.9 - accuracy)}
        | cell
        for (group, setting), values in accuracies.items()
        for seed, accuracy in enumerate(values, start=3)
    ]
    return pd.DataFrame(rows)


@pytest.fixture(autouse=True)
def _one_process(monkeypatch):
    monkeypatch.setenv("S2D_WORKERS", "1")


def test_recipes_differ_from_the_baseline_in_one_setting():
    recipes = ablation_recipes([3, 4], steps=10)
    assert set(recipes) == {(REFERENCES, v) for v in ("S2D", AS_PRINTED, "AdamW", "No PCDR")} | {
        (group, setting) for group in ABLATIONS for setting in ABLATIONS[group]
    }
    baseline = recipes[BASE][0]
    assert baseline == finetuning("S2D", 3, steps=10)
    for (group, setting), (recipe, _) in recipes.items():
        if group != REFERENCES:
            assert {k: v for k, v in recipe.s2d.items() if v != baseline.s2d[k]} == ABLATIONS[group][setting]


def test_unknown_group():
    with pytest.raises(ValueError, match="unknown group 'taus': choose among refresh interval, k_max, tau"):
        ablation_recipes([3], groups=["taus"])


def test_the_baseline_has_a_name_in_each_group_that_no_ablation_has():
    baseline = finetuning("S2D", 3)
    names = {group: baseline_setting(group, baseline) for group in ABLATIONS}
    assert names["refresh interval"] == "100" and names["coefficients"] == "cached" and names["power"] == "2"
    assert all(names[group] not in ABLATIONS[group] for group in ABLATIONS)


def test_rows_are_those_of_the_quantization_tables():
    checkpoints = {BASE: [untrained(0), untrained(1)], TAU: [untrained(2), untrained(3)]}
    table = ablation_table(checkpoints, ["W4A4"], images=40, calibration_sets=2)
    assert list(table.columns) == ["group", "setting", "seed", "method", "bits", "images", "accuracy", "points_lost"]
    assert len(table) == 2 * 2 * (1 + 2 + 1)  # settings, seeds, FP and two grids and ERQ
    assert not table.duplicated(["group", "setting", "seed", "method", "bits"]).any() and set(table.images) == {40}
    rows = table[(table.group == "tau") & (table.seed == 3)].set_index("method").accuracy
    alone = {"x": checkpoints[TAU][1:]}
    erq = methods_table(alone, ["W4A4"], methods=["ERQ"], calibration_sets=2, images=40)
    assert rows["ERQ"] == erq[erq.method == "ERQ"].accuracy.mean()
    assert rows["FP"] == erq[erq.method == "FP"].accuracy.item()
    assert np.allclose(table.points_lost, points_lost(table, ["group", "setting", "seed"]))
    rtn = quantization_table(alone, ["W4A4"], images=40).set_index("grid").accuracy
    assert rows["RTN, symmetric"] == rtn["symmetric"] and rows["RTN, asymmetric"] == rtn["asymmetric"]


def test_differences_are_taken_within_a_seed():
    # The seeds lie far apart; within each the ablation is 1, 2 and 3 points above, and loses as many fewer.
    table = long({BASE: [0.1, 0.5, 0.9], TAU: [0.11, 0.52, 0.93]})
    found = paired_differences(table).set_index("measure")
    assert found.index.tolist() == ["accuracy", "points lost"]
    for measure, sign in (("accuracy", 1), ("points lost", -1)):
        row = found.loc[measure]
        assert (row.group, row.setting, row.method, row.bits, row.seeds) == (*TAU, "ERQ", "W4A4", 3)
        assert row.difference == pytest.approx(sign * 2) and row["std"] == pytest.approx(1)
        # 4.302653 is the 97.5 % quantile of t with two degrees of freedom, from a printed table.
        assert row.high - row.difference == pytest.approx(4.302653 * 1 / math.sqrt(3), rel=1e-5)
    shuffled = paired_differences(table.sample(frac=1, random_state=0)).set_index("measure")
    assert shuffled.difference.to_dict() == pytest.approx(found.difference.to_dict())


def test_every_method_has_its_own_difference_and_full_precision_loses_nothing():
    erq = long({BASE: [0.5, 0.6], TAU: [0.6, 0.7]})
    full = long({BASE: [0.9, 0.9], TAU: [0.8, 0.8]}, method="FP", bits="FP")
    found = paired_differences(pd.concat([full, erq]))
    assert found[["measure", "method"]].apply(tuple, axis=1).tolist() == [
        ("accuracy", "FP"), ("accuracy", "ERQ"), ("points lost", "ERQ")
    ]  # fmt: skip
    assert found.difference.tolist() == pytest.approx([-10, 10, -10])


def test_a_missing_baseline():
    table = long({BASE: [0.1], TAU: [0.2, 0.3]})
    with pytest.raises(ValueError, match="not there for every seed: measure it on the seeds of the ablations"):
        paired_differences(table)
    with pytest.raises(ValueError, match="AdamW"):
        paired_differences(table, baseline=(REFERENCES, "AdamW"))


def test_an_ablation_of_fewer_seeds_uses_those_it_has():
    row = paired_differences(long({BASE: [0.1, 0.2, 0.3], TAU: [0.2, 0.4]})).iloc[0]
    assert row.seeds == 2 and row.difference == pytest.approx(15)


def test_the_baseline_stands_in_each_group():
    baseline = finetuning("S2D", 3)
    table = with_baseline(long({BASE: [0.4], TAU: [0.5], ("power", "4"): [0.6]}), baseline)
    cells = table.set_index(["group", "setting"]).accuracy.to_dict()
    own = ("tau", str(baseline.s2d["tau"]))
    assert cells == {BASE: 0.4, TAU: 0.5, ("power", "4"): 0.6, own: 0.4, ("power", "2"): 0.4}


def test_reported_numbers_are_those_of_the_paper():
    reported = reported_ablations().set_index(["group", "setting", "bits"]).reported
    assert not reported.index.duplicated().any()
    # As printed in Tables 6, 10 and 11.
    assert reported[("refresh interval", "10", "W4A4")] == 72.2
    assert reported[("k_max", "10", "FP")] == 84.9 and reported[("k_max", "3", "FP")] == 85.0
    assert reported[("tau", "0.9", "W4A4")] == 72.4 and reported[("tau", "0.95", "W4A4")] == 73.0
    assert reported[("power", "3", "W4A4")] == 68.3
    assert reported[(REFERENCES, "No PCDR", "W4A4")] == 40.1 and reported[(REFERENCES, "AdamW", "W4A4")] == 65.6
    # Every number of the three tables is there, and Table 10's baseline in two more groups.
    assert len(reported) == sum(len(load_paper_table(n)) for n in (6, 10, 11)) + 4


def test_measured_and_reported_stand_in_their_own_columns():
    measured = long({BASE: [0.4, 0.6], TAU: [0.7, 0.9]})
    baseline = finetuning("S2D", 3)
    own = ("tau", str(baseline.s2d["tau"]))
    both = beside_reported(measured, baseline, method="ERQ", bits=["W4A4"])
    assert list(both.columns) == ["measured FP", "measured W4A4", "reported FP", "reported W4A4"]
    assert both.loc[TAU, "measured W4A4"] == 80.0 and both.loc[TAU, "reported W4A4"] == 72.8
    assert both.loc[own, "measured W4A4"] == 50.0 and math.isnan(both.loc[own, "reported W4A4"])
    assert math.isnan(both.loc[("power", "4"), "measured W4A4"]) and both.loc[("power", "4"), "reported W4A4"] == 69.6
    assert both.index[0][0] == REFERENCES
    taus = [setting for group, setting in both.index if group == "tau"]
    assert taus == sorted({own[1], "0.8", "0.9", "0.95"})  # as numbers, whichever side they come from
    assert [setting for group, setting in both.index if group == "k_max"] == ["3", "5", "10"]


def test_selection_by_hand(monkeypatch):
    """Attention's output weight gets the spectrum 3, 1, 1, 1, ...: shares of squared mass 9, 10 and 11 of 9 + 15."""
    trained = untrained(0)
    name = "blocks.0.attn.proj"
    u, _, v = torch.linalg.svd(trained.weights[f"{name}.weight"].double())
    spectrum = torch.tensor([3.0] + [1.0] * 15, dtype=torch.float64)
    trained.weights[f"{name}.weight"] = (u * spectrum @ v).float()  # the shares do not care about the sixteenth bit
    criteria = {f"spectral, tau {tau}": {"criterion": "spectral", "tau": tau} for tau in (0.3, 0.4, 0.45, 0.5)}
    criteria["all"] = {"criterion": "all", "tau": 1.0}
    table = selection_table({"AdamW": [trained]}, criteria, images=8)
    ranks = table[table.layer == name].set_index("criterion")["rank"].to_dict()
    # 9/24 = 0.375, 10/24 = 0.417, 11/24 = 0.458
    assert ranks == {
        "spectral, tau 0.3": 1,
        "spectral, tau 0.4": 2,
        "spectral, tau 0.45": 3,
        "spectral, tau 0.5": 0,
    } | {"all": 3}


def test_activation_form_picks_a_layer_of_rank_one():
    trained = untrained(1)
    name = "blocks.0.mlp.fc1"
    rows, columns = trained.weights[f"{name}.weight"].shape
    trained.weights[f"{name}.weight"] = torch.outer(torch.linspace(1, 2, rows), torch.linspace(-1, 1, columns))
    table = selection_table({"AdamW": [trained]}, images=8)
    ranks = table[table.layer == name].set_index("criterion")["rank"]
    assert ranks["activation, tau 0.95"] == ranks["spectral, tau 0.95"] == 1 and ranks["top 3 of every layer"] == 3
    assert len(draw.selection(table).axes) == 2  # the table and its colour bar


def test_a_higher_threshold_picks_no_more_layers():
    table = selection_table({"AdamW": [untrained(seed) for seed in range(3)]}, images=16)
    picked = table.pivot(index=["seed", "layer"], columns="criterion", values="rank") > 0
    assert set(picked.columns) == set(SELECTION_CRITERIA)
    for high, low in (("activation, tau 0.95", "activation, tau 0.6"), ("spectral, tau 0.6", "spectral, tau 0.2")):
        assert not (picked[high] & ~picked[low]).any()


def test_unknown_criterion():
    with pytest.raises(ValueError, match="mass has criterion 'mass': choose activation, spectral or all"):
        selection_table({}, {"mass": {"criterion": "mass", "tau": 0.5}})


def test_figure_of_the_differences():
    erq = long({BASE: [0.5, 0.6], TAU: [0.6, 0.7], ("power", "4"): [0.4, 0.5]})
    full = long({BASE: [0.9, 0.9], TAU: [0.8, 0.8], ("power", "4"): [0.9, 0.9]}, method="FP", bits="FP")
    use_style()
    figure = draw.ablations(paired_differences(pd.concat([erq, full])))
    assert [axis.get_title(loc="left") for axis in figure.axes] == ["full precision", "ERQ, W4A4"]
    # tau 0.8 is ten points better than S2D under ERQ, and the figure has S2D minus it: left, against the claim.
    filled = [line.get_xdata()[0] for line in figure.axes[1].lines if line.get_marker() == "o"]
    assert min(filled) < -9.9 and max(filled) > 9.9
    assert {text.get_text() for text in figure.axes[0].get_yticklabels()} == {"tau: 0.8", "power: 4"}
