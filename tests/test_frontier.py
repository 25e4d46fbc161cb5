"""The front and the comparisons on it, against closed forms on tables made here; site errors on a real checkpoint."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from s2d.lab.data import ClutteredDigits
from s2d.lab.figures import frontier as draw
from s2d.lab.figures.style import use_style
from s2d.lab.frontier import (
    MEAN_METHOD,
    ROUNDED_METHODS,
    SITE_KINDS,
    STRONG_METHODS,
    compare,
    comparisons,
    frontier_table,
    keeping,
    means_by_quantizer,
    search_points,
    site_error_table,
    with_means,
)
from s2d.lab.models import DigitsViT
from s2d.lab.recipes import EVIDENCE_VARIANTS, finetuning
from s2d.lab.statistics import points_lost
from s2d.lab.store import Trained
from s2d.lab.training import Recipe
from s2d.lab.tuning import GRID
from s2d.lab.winners import SETTING_COLUMNS, winners

CELLS = [("FP", "FP"), *((m, b) for m in (*ROUNDED_METHODS, *STRONG_METHODS) for b in ("W4A4", "W3A3"))]


def made_up(levels: dict[str, float], seeds=(3, 4, 5), noise: float = 0.001) -> pd.DataFrame:
    """Every variant at its level in every cell, with a noise that is shared within a seed."""
    rng = np.random.default_rng(0)
    shared = {(seed, cell): noise * rng.standard_normal() for seed in seeds for cell in CELLS}
    table = pd.DataFrame(
        [
            {"variant": v, "seed": s, "method": m, "bits": b, "images": 10, "accuracy": level + shared[s, (m, b)]}
            for v, level in levels.items()
            for s in seeds
            for m, b in CELLS
        ]
    )
    return lost_again(table)


def lost_again(table: pd.DataFrame) -> pd.DataFrame:
    """The table with its points lost after its accuracies were changed."""
    return table.assign(points_lost=points_lost(table, ["variant", "seed"]))


def test_comparison_is_within_seeds():
    table = made_up({"AdamW": 0.7, "S2D": 0.72}, noise=0.1)  # the noise is far larger, and cancels within a seed
    found = compare(table, "S2D", "AdamW")
    accuracy, lost = (found[found.measure == measure] for measure in ("accuracy", "points lost"))
    assert accuracy[["method", "bits"]].apply(tuple, axis=1).tolist() == CELLS
    assert lost[["method", "bits"]].apply(tuple, axis=1).tolist() == CELLS[1:]
    assert np.allclose(accuracy.difference, 2.0) and np.allclose(accuracy["std"], 0) and (accuracy.seeds == 3).all()
    assert (accuracy.says == "more").all()
    # Two points better everywhere, in full precision too: it trains better and does not quantize better.
    assert (lost.difference == 0).all() and (lost.says == "equivalent").all()


def test_points_lost_tell_quantizing_better_from_training_better():
    table = made_up({"AdamW": 0.7, "quantizes better": 0.7}, noise=0.0)
    table.loc[(table.variant != "AdamW") & (table.method == "ERQ"), "accuracy"] += 0.05
    found = compare(lost_again(table), "quantizes better", "AdamW").set_index(["measure", "method", "bits"])
    assert found.difference["accuracy", "ERQ", "W4A4"] == pytest.approx(5)
    assert found.difference["points lost", "ERQ", "W4A4"] == pytest.approx(-5)
    assert found.says["points lost", "ERQ", "W4A4"] == "less" and found.says["accuracy", "FP", "FP"] == "equivalent"


def test_comparison_interval_is_scipys():
    table = made_up({"AdamW": 0.7, "S2D": 0.7})
    values = [0.01, 0.03, -0.01]
    rows = (table.variant == "S2D") & (table.method == "ERQ") & (table.bits == "W4A4")
    other = table[(table.variant == "AdamW") & (table.method == "ERQ") & (table.bits == "W4A4")].accuracy.to_numpy()
    table.loc[rows, "accuracy"] = other + values
    cells = compare(lost_again(table), "S2D", "AdamW").set_index(["measure", "method", "bits"])
    expected = stats.ttest_1samp(100 * np.array(values), 0).confidence_interval(0.95)
    for measure, sign in (("accuracy", 1), ("points lost", -1)):
        cell = cells.loc[(measure, "ERQ", "W4A4")]
        assert sorted([sign * cell.low, sign * cell.high]) == pytest.approx([expected.low, expected.high])


def test_comparisons_are_all_pairs_with_the_rivals():
    table = made_up({"AdamW": 0.7, "AdamW, tuned weight decay": 0.71, "S2D": 0.72})
    found = comparisons(table, ["AdamW", "AdamW, tuned weight decay"])
    pairs = found[["first", "second"]].drop_duplicates().apply(tuple, axis=1).tolist()
    assert pairs == [
        ("AdamW, tuned weight decay", "AdamW"),
        ("S2D", "AdamW"),
        ("AdamW", "AdamW, tuned weight decay"),
        ("S2D", "AdamW, tuned weight decay"),
    ]
    assert len(found) == len(pairs) * (2 * len(CELLS) - 1)


def test_means_are_over_quantizers_that_all_have_the_width():
    table = made_up({"AdamW": 0.7}, noise=0.1)
    further = table[(table.method == "ERQ") & (table.bits == "W4A4")].assign(bits="W6A6", accuracy=0.1)
    found = with_means(pd.concat([table, further], ignore_index=True))
    means = found[found.method == MEAN_METHOD]
    assert sorted(means.bits.unique()) == ["W3A3", "W4A4"] and len(means) == 2 * 3
    one = table[(table.seed == 4) & (table.bits == "W4A4")]
    row = means[(means.seed == 4) & (means.bits == "W4A4")].squeeze()
    assert row.accuracy == pytest.approx(one.accuracy.mean())
    assert row.points_lost == pytest.approx(one.points_lost.mean()) and len(one) == 5


def test_only_seeds_of_both_are_compared():
    table = made_up({"AdamW": 0.7, "S2D": 0.72})
    fewer = table[(table.variant == "AdamW") | (table.seed == 4)]
    assert (compare(fewer, "S2D", "AdamW").seeds == 1).all()
    apart = table[((table.variant == "AdamW") & (table.seed == 3)) | ((table.variant == "S2D") & (table.seed == 4))]
    with pytest.raises(ValueError, match="no seed in common"):
        compare(apart, "S2D", "AdamW")
    with pytest.raises(ValueError, match="no variant 'SGD' in the table: it has AdamW, S2D"):
        compare(table, "SGD", "AdamW")


def tuning(rows: list[dict]) -> pd.DataFrame:
    """A tuning table with what is left out empty, both bit widths alike."""
    table = pd.DataFrame([dict.fromkeys(SETTING_COLUMNS) | row for row in rows])
    return table.assign(**{"ERQ W4A4": table.low_bits - 0.1})


def test_search_points_are_means_over_the_tuning_seeds():
    rows = [
        {"variant": "AdamW", "lr": lr, "seed": seed, "FP": full + step, "low_bits": low - step}
        for lr, full, low in ((1e-3, 0.9, 0.5), (2e-3, 0.8, 0.6), (4e-3, 0.7, 0.4))
        for seed, step in ((0, 0.01), (1, -0.01))
    ]
    points = search_points(tuning(rows))
    assert points.full.tolist() == pytest.approx([90, 80, 70]) and points.low.tolist() == pytest.approx([50, 60, 40])
    assert points.front.tolist() == [True, True, False] and points.chosen.tolist() == [True, False, False]
    assert search_points(tuning(rows), "ERQ W4A4").low.tolist() == pytest.approx([40, 50, 30])
    assert keeping(points) == pytest.approx(89.5)
    with pytest.raises(ValueError, match="no column 'RTN W4A4': choose one of lr, weight_decay"):
        search_points(tuning(rows), "RTN W4A4")


def test_winners_keep_full_precision():
    rows = [
        {"variant": "AdamW", "lr": 1e-3, "seed": 0, "FP": 0.90, "low_bits": 0.5},
        {"variant": "AdamW", "lr": 2e-3, "seed": 0, "FP": 0.89, "low_bits": 0.8},  # full precision decides for AdamW
        {"variant": "X", "lam": 1.0, "seed": 0, "FP": 0.80, "low_bits": 0.9},  # loses full precision
        {"variant": "X", "lam": 2.0, "seed": 0, "FP": 0.896, "low_bits": 0.7},
        {"variant": "X", "lam": 3.0, "seed": 0, "FP": 0.95, "low_bits": 0.6},
        {"variant": "Y", "lam": 1.0, "seed": 0, "FP": 0.70, "low_bits": 0.9},  # none keeps it: the nearest wins
        {"variant": "Y", "lam": 2.0, "seed": 0, "FP": 0.80, "low_bits": 0.1},
    ]
    chosen = winners(tuning(rows)).set_index("variant")
    assert chosen.lr["AdamW"] == 1e-3 and chosen.lam["X"] == 2.0 and chosen.lam["Y"] == 2.0


def test_every_variant_has_equally_many_settings_each_once():
    assert set(GRID) < set(EVIDENCE_VARIANTS)
    assert len({len(settings) for settings in GRID.values()}) == 1
    recipes = {str(finetuning(variant, seed=0, **setting)) for variant in GRID for setting in GRID[variant]}
    assert len(recipes) == sum(map(len, GRID.values()))


def test_figures_show_every_arm():
    use_style()
    levels = {variant: 0.7 + index / 100 for index, variant in enumerate(EVIDENCE_VARIANTS)}
    table = made_up(levels)
    differences = comparisons(table, ["AdamW"])
    figure = draw.frontier_differences(differences)
    titles = ["full precision", "RTN, symmetric, W4A4", "ERQ, W4A4"]
    assert [axis.get_title(loc="left") for axis in figure.axes] == titles
    points = [line for line in figure.axes[2].lines if line.get_marker() == "o"]
    accuracies = [line.get_xdata()[0] for line in points if line.get_markerfacecolor() != "white"]
    assert len(accuracies) == len(EVIDENCE_VARIANTS) - 1 and min(accuracies) > 0  # all above AdamW, to the right
    assert {text.get_text() for text in figure.axes[0].get_yticklabels()} == set(EVIDENCE_VARIANTS) - {"AdamW"}
    assert len(draw.frontier_test(table).axes) == 2
    outliers = pd.DataFrame({"variant": list(levels), "seed": 3, "excess_kurtosis": list(levels.values())})
    figure = draw.frontier_outliers(outliers)
    assert [text.get_text() for text in figure.axes[0].get_yticklabels()] == list(EVIDENCE_VARIANTS)


def test_frontier_and_site_errors_on_a_checkpoint(monkeypatch):
    monkeypatch.setenv("S2D_WORKERS", "1")
    recipe = Recipe(seed=3, steps=1, data=ClutteredDigits(canvas=16), model=DigitsViT(width=16, depth=1))
    weights = {name: tensor.half() for name, tensor in recipe.model.build(3).state_dict().items()}
    checkpoints = {"AdamW": [Trained(recipe, weights, [])]}
    table = frontier_table(checkpoints, bits=["W8A8"], erq_bits=["W6A6"], images=40)
    assert table.groupby(["method", "bits"]).size().to_dict() == {
        ("FP", "FP"): 1,
        ("RTN, symmetric", "W8A8"): 1,
        ("RTN, asymmetric", "W8A8"): 1,
        **{(method, "W8A8"): 1 for method in STRONG_METHODS},
        ("ERQ", "W6A6"): 1,
    }
    full = table[table.method == "FP"].accuracy.item()
    assert np.allclose(table.points_lost, 100 * (full - table.accuracy))
    coarse = site_error_table(checkpoints, 3, images=40)
    fine = site_error_table(checkpoints, 8, images=40)
    assert coarse.kind.tolist() == list(SITE_KINDS) == fine.kind.tolist()
    assert (coarse.logit_error > 10 * fine.logit_error).all() and (fine.logit_error > 0).all()
    text = means_by_quantizer(table, ["AdamW"])
    assert text.shape == (1, 7) and text["FP", "FP"].iloc[0].endswith("± 0.0")
    assert means_by_quantizer(table, ["AdamW"], "points lost").shape == (1, 6)
    with pytest.raises(ValueError, match="unknown measure 'error': choose accuracy or points lost"):
        means_by_quantizer(table, ["AdamW"], "error")


def test_site_error_refuses_strange_bits():
    with pytest.raises(ValueError, match="bits"):
        site_error_table({}, 1)
