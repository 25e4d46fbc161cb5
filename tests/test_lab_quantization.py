"""The quantization tables: what is measured, that settings reach the quantizers, and that processes change nothing."""

from __future__ import annotations

import pandas as pd
import pytest
import torch

from s2d.lab import quantization
from s2d.lab.data import ClutteredDigits
from s2d.lab.figures import ptq as draw
from s2d.lab.models import DigitsViT
from s2d.lab.quantization import (
    CONDITIONING,
    METHODS,
    conditioning_table,
    int8_table,
    logit_error,
    logits_of,
    methods_table,
    online_operations,
    qat_table,
    quantization_table,
)
from s2d.lab.store import Trained
from s2d.lab.training import Recipe
from s2d.ptq import METHODS as PTQ_METHODS
from s2d.ptq import TRANSFORMS, quantize


def untrained(seed: int) -> Trained:
    """A stored checkpoint as the tables take it, without the training."""
    recipe = Recipe(seed=seed, steps=1, data=ClutteredDigits(canvas=16), model=DigitsViT(width=16, depth=1))
    weights = {name: tensor.half() for name, tensor in recipe.model.build(seed).state_dict().items()}
    return Trained(recipe, weights, [])


@pytest.fixture(scope="module")
def checkpoints():
    return {"AdamW": [untrained(0), untrained(1)], "S2D": [untrained(2), untrained(3)]}


@pytest.fixture(autouse=True)
def _one_process(monkeypatch):
    monkeypatch.setenv("S2D_WORKERS", "1")


def test_names_are_those_of_the_package():
    assert {setting["method"] for setting in METHODS.values()} <= set(PTQ_METHODS)
    assert {name for names in CONDITIONING.values() for name in names} <= set(TRANSFORMS.values())


def test_rows_of_round_to_nearest(checkpoints):
    table = quantization_table(checkpoints, ["FP", "W8A8", "W3A3"], images=40, calibration_images=16)
    assert len(table) == 2 * 2 * 2 * 3  # variants, seeds, grids, bits
    full = table[table.bits == "FP"]
    assert (full.logit_error == 0).all() and set(table.images) == {40} and set(table.split) == {"test"}
    mean = table.groupby("bits").logit_error.mean()
    assert 0 < mean["W8A8"] < mean["W3A3"]
    row = table.query("variant == 'S2D' and seed == 3 and grid == 'asymmetric' and bits == 'W3A3'").iloc[0]
    trained = checkpoints["S2D"][1]
    (x, y), (images, _) = trained.recipe.data.fixed_set("test", 40), trained.recipe.data.fixed_set("calibration", 16)
    logits = logits_of(quantize(trained.model(), w_bits=3, a_bits=3, calibration=images), x)
    assert row.accuracy == (logits.argmax(-1) == y).double().mean()
    assert row.logit_error == pytest.approx(logit_error(logits, logits_of(trained.model(), x)), rel=1e-4)


def test_every_method_on_disjoint_calibration_sets(checkpoints):
    table = methods_table({"AdamW": checkpoints["AdamW"][:1]}, ["W8A8", "W4A4"], calibration_sets=2, images=20)
    quantized = table[table.method != "FP"]
    assert len(table) == 1 + len(METHODS) * 2 * 2
    assert quantized.groupby(["method", "bits"]).calibration_set.nunique().eq(2).all()
    errors = quantized.groupby(["method", "bits"]).logit_error.mean().unstack()
    assert (errors["W8A8"] < errors["W4A4"]).all()
    assert quantized.groupby("calibration_set").logit_error.mean().nunique() == 2  # the sets are not the same
    first, second = quantization._calibration_sets(checkpoints["AdamW"][0], 2)
    assert len(first) == len(second) == quantization.METHOD_CALIBRATION_IMAGES
    assert not (first.flatten(1)[:, None] == second.flatten(1)).all(-1).any()


def test_processes_give_the_same_rows(checkpoints, monkeypatch):
    one = methods_table(checkpoints, ["W4A4"], methods=["RTN"], calibration_sets=1, images=20)
    monkeypatch.setenv("S2D_WORKERS", "2")
    two = methods_table(checkpoints, ["W4A4"], methods=["RTN"], calibration_sets=1, images=20)
    pd.testing.assert_frame_equal(one, two)


def test_conditioning_and_its_online_cost(checkpoints):
    table = conditioning_table(
        checkpoints, ["W4A4"], conditioning=["none", "SmoothQuant", "rotation"], calibration_sets=1, images=20
    )
    cost = table.groupby("conditioning").online_operations.agg(["min", "max"])
    assert cost.loc["none"].eq(0).all() and cost.loc["SmoothQuant"].eq(0).all()  # folded into the weights
    assert 0 < cost.loc["rotation", "min"] == cost.loc["rotation", "max"] < 0.5
    draw.ptq_conditioning(table)


def test_online_operations_by_hand():
    model = torch.nn.Sequential(torch.nn.Linear(8, 4)).eval()
    rotations = [TRANSFORMS["rotation"]]  # as functions: applied as they are
    quantized = quantize(model, w_bits=4, a_bits=4, calibration=torch.randn(16, 8), transforms=rotations)
    # The signs and three butterfly stages of 8 channels, over the 2 * 8 * 4 operations of the layer.
    assert online_operations(quantized, torch.randn(1, 8)) == pytest.approx((8 + 3 * 8) / (2 * 8 * 4))


def test_int8_beside_its_simulation(checkpoints):
    table = int8_table({"S2D": checkpoints["S2D"][:1]}, images=60)
    assert table.agreement.iloc[0] > 0.95 and table.logit_difference.iloc[0] < 1e-4
    assert abs(table.int8 - table.simulated).iloc[0] < 0.05


def test_qat_rows_pair_variants(checkpoints):
    table = qat_table({"S2D": checkpoints["S2D"]}, {"S2D": checkpoints["S2D"]}, "W3A3", images=20)
    assert table.groupby("training").size().to_dict() == {"FP": 2, "PTQ": 2, "QAT": 2}
    wide = table.pivot(index="seed", columns="training", values="accuracy")
    assert wide["QAT"].tolist() == wide["FP"].tolist()  # the same checkpoints were given as trained ones
    assert (
        table.query("training == 'FP'").bits.eq("FP").all() and table.query("training == 'QAT'").bits.eq("W3A3").all()
    )
    draw.ptq_qat(table.assign(variant="AdamW"))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda c: methods_table(c, ["W4A4"], methods=["GPTQ"]), "unknown method 'GPTQ': choose among RTN"),
        (lambda c: methods_table(c, ["4 bits"]), "not of the form W4A4"),
        (lambda c: conditioning_table(c, ["W4A4"], conditioning=["twist"]), "unknown conditioning 'twist'"),
        (lambda c: quantization_table(c, ["W4A4"], grids=["odd"]), "unknown grid 'odd'"),
    ],
)
def test_unknown_names_stop_before_any_work(checkpoints, call, message):
    with pytest.raises(ValueError, match=message):
        call(checkpoints)


def test_figures_of_all_methods(checkpoints):
    table = methods_table(checkpoints, ["W8A8", "W4A4"], methods=["RTN", "ERQ"], calibration_sets=1, images=20)
    figure = draw.ptq_methods(table)
    titles = ["points lost, W8A8", "points lost, W4A4", "relative logit error, W4A4"]
    assert [axis.get_title(loc="left") for axis in figure.axes] == titles
    assert [tick.get_text() for tick in figure.axes[0].get_yticklabels()] == ["RTN", "ERQ"]
