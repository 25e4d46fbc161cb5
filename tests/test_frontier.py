"""The front and the comparisons on it, against closed forms on tables made here; site errors on a real checkpoint."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from s2d.lab.frontier import (
    CONTROL,
    PAPER,
    SITE_KINDS,
    STRONG_METHODS,
    compare,
    controls_table,
    frontier_table,
    means_by_quantizer,
    reach_table,
    search_points,
    site_error_table,
    strong_gains,
)
from s2d.lab.recipes import DECOUPLED, S2D_TUNED, finetuning, pretraining
from s2d.lab.store import obtain
from s2d.lab.tuning import GRID, winners

ROUNDED = [(method, bits) for method in ("RTN", "RTN, asymmetric") for bits in ("W4A4", "W3A3")]
CELLS = [("FP", "FP"), *ROUNDED, *((m, b) for m in STRONG_METHODS for b in ("W4A4", "W3A3"))]


def made_up(levels: dict[str, float], seeds=(3, 4, 5), noise: float = 0.001) -> pd.DataFrame:
    """Every variant at its level in every cell, with a noise that is shared within a seed."""
    rng = np.random.default_rng(0)
    shared = {(seed, cell): noise * rng.standard_normal() for seed in seeds for cell in CELLS}
    return pd.DataFrame(
        [
            {"variant": v, "seed": s, "method": m, "bits": b, "images": 10, "accuracy": level + shared[s, (m, b)]}
            for v, level in levels.items()
            for s in seeds
            for m, b in CELLS
        ]
    )


def test_comparison_is_within_seeds():
    table = made_up({"AdamW": 0.7, "S2D": 0.72}, noise=0.1)  # the noise is far larger, and cancels within a seed
    found = compare(table, "S2D", "AdamW")
    assert found[["method", "bits"]].apply(tuple, axis=1).tolist() == CELLS
    assert np.allclose(found.difference, 2.0) and np.allclose(found["std"], 0) and (found.seeds == 3).all()


def test_comparison_interval_is_scipys():
    table = made_up({"AdamW": 0.7, "S2D": 0.7})
    values = [0.01, 0.03, -0.01]
    rows = (table.variant == "S2D") & (table.method == "RTN") & (table.bits == "W4A4")
    other = table[(table.variant == "AdamW") & (table.method == "RTN") & (table.bits == "W4A4")].accuracy.to_numpy()
    table.loc[rows, "accuracy"] = other + values
    cell = compare(table, "S2D", "AdamW").set_index(["method", "bits"]).loc[("RTN", "W4A4")]
    expected = stats.ttest_1samp(100 * np.array(values), 0).confidence_interval(0.95)
    assert (cell.low, cell.high) == pytest.approx((expected.low, expected.high))


def test_only_seeds_of_both_are_compared():
    table = made_up({"AdamW": 0.7, "S2D": 0.72})
    fewer = table[(table.variant == "AdamW") | (table.seed == 4)]
    assert (compare(fewer, "S2D", "AdamW").seeds == 1).all()
    apart = table[((table.variant == "AdamW") & (table.seed == 3)) | ((table.variant == "S2D") & (table.seed == 4))]
    with pytest.raises(ValueError, match="no seed in common"):
        compare(apart, "S2D", "AdamW")
    with pytest.raises(ValueError, match="no variant 'SGD' in the table: it has AdamW, S2D"):
        compare(table, "SGD", "AdamW")


def test_reach_follows_the_numbers():
    far = reach_table(made_up({"AdamW": 0.5, CONTROL: 0.6, PAPER: 0.7, S2D_TUNED: 0.7, DECOUPLED: 0.9}))
    assert far.reached.all() and len(far) == 30
    table = made_up({**dict.fromkeys(("AdamW", CONTROL, PAPER, S2D_TUNED), 0.5), DECOUPLED: 0.5})
    level = reach_table(table)
    assert level[level.target <= 0].reached.all() and not level[level.target > 0].reached.any()
    with pytest.raises(ValueError, match="no RTN at W3A3 in the table"):
        reach_table(table[(table.method != "RTN") | (table.bits != "W3A3")])


def test_strong_gains_are_within_seeds():
    table = made_up({"AdamW": 0.5, "S2D": 0.6}, noise=0.1)
    table.loc[(table.variant == "S2D") & (table.method == "ERQ"), "accuracy"] -= 0.15
    gains = strong_gains(table).set_index("method")
    assert np.allclose(gains[["full", "rounded"]], 10) and len(gains) == 3 * 3 * 2
    assert np.allclose(gains.strong["ERQ"], -5) and np.allclose(gains.strong["RepQ-ViT"], 10)


def test_controls_are_called_by_their_interval():
    table = made_up({PAPER: 0.7, "better": 0.8, "worse": 0.6})
    table.loc[(table.variant == "better") & (table.seed == 3), "accuracy"] += 0.001  # an interval with a width
    says = controls_table(table, ["better", "worse"]).groupby("first").says.unique()
    assert says["better"].tolist() == ["better"] and says["worse"].tolist() == ["worse"]


def test_search_points_are_those_of_the_shared_seed():
    tuning = pd.DataFrame(
        {
            "variant": ["a", "b", "b", "b"],
            "steps": [None, None, None, 2000],
            "seed": [0, 0, 1, 0],
            "FP": [0.9, 0.8, 0.1, 1.0],
            "RTN W4A4": [0.5, 0.4, 1.0, 1.0],
            "ERQ W4A4": [0.5, 0.6, 1.0, 1.0],
        }
    )
    rtn, erq = search_points(tuning, "RTN"), search_points(tuning, "ERQ")
    assert rtn.front.tolist() == [True, False, False] and erq.front.tolist() == [True, True, False]
    assert rtn.full.tolist() == [90.0, 80.0, 100.0] and rtn.longer.tolist() == [False, False, True]


def test_winners_prefer_many_seeds_and_keep_full_precision():
    rows = [
        {"variant": "AdamW", "lr": None, "steps": None, "lam": None, "seed": 0, "FP": 0.9, "RTN W4A4": 0.5},
        {"variant": "AdamW", "lr": None, "steps": None, "lam": None, "seed": 1, "FP": 0.9, "RTN W4A4": 0.5},
        {
            "variant": "X",
            "lr": None,
            "steps": None,
            "lam": 1.0,
            "seed": 0,
            "FP": 0.80,
            "RTN W4A4": 0.9,
        },  # loses full precision
        {"variant": "X", "lr": None, "steps": None, "lam": 2.0, "seed": 0, "FP": 0.90, "RTN W4A4": 0.7},
        {"variant": "X", "lr": None, "steps": None, "lam": 3.0, "seed": 0, "FP": 0.90, "RTN W4A4": 0.6},
    ]
    chosen = winners(pd.DataFrame(rows)).set_index("variant")
    assert chosen.lam["X"] == 2.0
    longer = pd.DataFrame([*rows, rows[4] | {"lam": 4.0, "steps": 2000, "RTN W4A4": 0.99}])
    assert winners(longer).set_index("variant").lam["X"] == 2.0
    more = pd.DataFrame([*rows, rows[4] | {"seed": 1, "RTN W4A4": 0.65}])
    assert winners(more).set_index("variant").lam["X"] == 3.0


def test_the_grid_tries_each_setting_once():
    assert len({str(sorted(setting.items())) for setting in GRID}) == len(GRID)
    assert len({str(finetuning(seed=0, **setting)) for setting in GRID}) == len(GRID)


def test_frontier_and_site_errors_on_a_checkpoint():
    checkpoints = {"AdamW": obtain([pretraining("adamw", 0)])}
    table = frontier_table(checkpoints, bits=["W8A8"], erq_bits=["W6A6"], images=40)
    assert table.groupby(["method", "bits"]).size().to_dict() == {
        ("FP", "FP"): 1,
        ("RTN", "W8A8"): 1,
        ("RTN, asymmetric", "W8A8"): 1,
        **{(method, "W8A8"): 1 for method in STRONG_METHODS},
        ("ERQ", "W6A6"): 1,
    }
    assert table.accuracy.between(0.7, 1).all()
    coarse = site_error_table(checkpoints, 3, images=40)
    fine = site_error_table(checkpoints, 8, images=40)
    assert coarse.kind.tolist() == list(SITE_KINDS) == fine.kind.tolist()
    assert (coarse.logit_error > 10 * fine.logit_error).all() and (fine.logit_error > 0).all()
    text = means_by_quantizer(table, ["AdamW"])
    assert text.shape == (1, 7) and text["FP", "FP"].iloc[0].endswith("± 0.0")


def test_site_error_refuses_strange_bits():
    with pytest.raises(ValueError, match="bits"):
        site_error_table({}, 1)
