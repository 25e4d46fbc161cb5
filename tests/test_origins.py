"""Matched levels in closed form, outliers planted at a known place, correlations against scipy and known orderings."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from scipy.stats import spearmanr
from torch import nn

from s2d.lab import origins
from s2d.lab.evaluate import layer_statistics, with_points_lost
from s2d.lab.figures import evidence as draw
from s2d.lab.figures import style
from s2d.lab.figures.bound import pcdr_correlation
from s2d.lab.figures.ptq import accuracy_by_bits
from s2d.lab.frontier import frontier_table
from s2d.lab.models import DigitsViT
from s2d.lab.optimizers import LessAdaptive, Orthogonal, RotatedBasis, random_rotation
from s2d.lab.recipes import INTERVENTIONS
from s2d.lab.store import Trained
from s2d.lab.training import Optimizer, Recipe

MODEL = DigitsViT(width=16, depth=2, heads=2)
RECIPE = Recipe(seed=0, steps=6, model=MODEL)


def history(*accuracies: float) -> list[dict[str, float]]:
    """Measurements 100 steps apart; kurtosis is the step over 10, the largest entry the square of the kurtosis."""
    return [
        {
            "step": 100 * i,
            "loss": 1.0,
            "validation_accuracy": accuracy,
            "excess_kurtosis": 10.0 * i,
            "neuron_kurtosis": 1.0 + i,
            "max_abs": 100.0 * i**2,
        }
        for i, accuracy in enumerate(accuracies)
    ]


def trained(model: nn.Module | None = None, rows: list | None = None, **changes) -> Trained:
    """A checkpoint of some model, by default a fresh one."""
    weights = (MODEL.build(0) if model is None else model).state_dict()
    return Trained(replace(RECIPE, **changes), weights, rows or history(0.1))


# --- matched accuracy -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("level", "step", "kurtosis", "max_abs"),
    [
        (0.2, 50, 5, 50),  # halfway up the first rise
        (0.3, 100, 10, 100),  # exactly at a measurement
        (0.35, 225, 22.5, 525),  # a quarter from the third (0.3 again after a dip) to the fourth
        (0.5, 300, 30, 900),  # the last
    ],
)
def test_a_run_is_read_where_it_first_reaches_the_level(level, step, kurtosis, max_abs):
    run = history(0.1, 0.3, 0.3, 0.5)
    row = origins.at_accuracy(run, level)
    assert row["step"] == pytest.approx(step) and row["excess_kurtosis"] == pytest.approx(kurtosis)
    assert row["max_abs"] == pytest.approx(max_abs) and row["validation_accuracy"] == pytest.approx(level)


def test_a_dip_after_the_level_does_not_count():
    assert origins.at_accuracy(history(0.1, 0.5, 0.2, 0.6), 0.4)["step"] == pytest.approx(75)


def test_a_run_that_begins_above_the_level_is_read_at_its_beginning():
    assert origins.at_accuracy(history(0.4, 0.5), 0.3) == history(0.4)[0]


def test_a_level_that_is_never_reached():
    with pytest.raises(ValueError, match="0.9 is never reached, only 0.5: compare at that or train longer"):
        origins.at_accuracy(history(0.1, 0.5, 0.4), 0.9)


def test_the_common_level_of_a_seed_is_the_least_of_its_best():
    runs = {
        "high": [trained(rows=history(0.1, 0.5, 0.9), seed=0), trained(rows=history(0.1, 0.2, 0.3), seed=1)],
        "low": [trained(rows=history(0.1, 0.6, 0.4), seed=0), trained(rows=history(0.2, 0.4, 0.8), seed=1)],
    }
    table = origins.matched_table(runs)
    matched, end = (table[table.moment == moment] for moment in ("matched", "end"))
    # In seed 0 the best of "low", not its last; in seed 1 what "high" ends at. Neither seed moves the other.
    np.testing.assert_allclose(matched.validation_accuracy, [0.6, 0.3, 0.6, 0.3])
    np.testing.assert_allclose(matched.step, [125, 200, 100, 50])
    np.testing.assert_allclose(matched.excess_kurtosis, [12.5, 20, 10, 5])
    assert end.validation_accuracy.tolist() == [0.9, 0.3, 0.4, 0.8] and set(end.step) == {200}
    assert matched.variant.tolist() == ["high", "high", "low", "low"]


def test_nothing_to_compare():
    with pytest.raises(ValueError, match="no checkpoints"):
        origins.matched_table({})
    with pytest.raises(ValueError, match="no checkpoints"):
        origins.growth_table({"AdamW": []})


# --- doses ------------------------------------------------------------------------------------------------------------


def test_doses_are_read_from_the_optimizer_and_not_from_its_name():
    kinds = {
        "AdamW": Optimizer("adamw", betas=(0.9, 0.99)),
        "x": LessAdaptive("adamw", betas=(0.9, 0.99), eps=1e-2),
        "y": LessAdaptive("adamw", betas=(0.9, 0.99), eps=1e-4),
        "z": Optimizer("adamw", betas=(0.9, 0.5)),
        "both": LessAdaptive("adamw", betas=(0.9, 0.5), eps=1e-2),
        "turned": RotatedBasis("adamw", betas=(0.9, 0.99)),
        "Muon": Orthogonal("adamw", betas=(0.9, 0.99)),
        "slow": Optimizer("adamw", lr=1e-5, betas=(0.9, 0.99)),  # differs in neither, but not in them alone
        "SGD": Optimizer("sgd"),
    }
    table = origins.matched_table({name: [trained(optimizer=o)] for name, o in kinds.items()})
    at_end = origins.dose_table(table[table.moment == "end"])
    found = {knob: list(zip(part.variant, part.dose, strict=True)) for knob, part in at_end.groupby("knob")}
    assert found["eps"] == [("AdamW", 1e-8), ("y", 1e-4), ("x", 1e-2)]
    assert found["beta2"] == [("z", 0.5), ("AdamW", 0.99)]


def test_the_eps_of_plain_adamw_is_torchs():
    model = MODEL.build(0)
    assert LessAdaptive.eps == Optimizer("adamw").build(model).defaults["eps"]


def doses(*responses: tuple[float, ...]) -> pd.DataFrame:
    """The kurtosis of each seed at doses 1, 2, 3, ..."""
    return pd.DataFrame(
        {"knob": "eps", "seed": seed, "dose": float(dose), "excess_kurtosis": kurtosis}
        for seed, response in enumerate(responses)
        for dose, kurtosis in enumerate(response, start=1)
    )


def test_a_response_is_asked_within_each_seed():
    """Seeds far apart, each falling: the pool of both would hardly correlate."""
    table = doses((103.0, 102.0, 101.0), (3.0, 2.0, 1.0))
    found = origins.dose_response(table).iloc[0]
    assert (found.knob, found.correlation, found.low, found.high, found.seeds) == ("eps", -1.0, -1.0, -1.0, 2)
    assert abs(table.dose.corr(table.excess_kurtosis, method="spearman")) < 0.5


def test_seeds_that_disagree_have_a_wide_interval():
    found = origins.dose_response(doses((1.0, 2.0, 3.0), (3.0, 2.0, 1.0), (1.0, 3.0, 2.0))).iloc[0]
    assert found.correlation == pytest.approx((1 - 1 + 0.5) / 3) and found.low < 0 < found.high


def test_one_dose_is_no_response():
    with pytest.raises(ValueError, match="eps has the dose 1.0 only: a response needs two"):
        origins.dose_response(doses((1.0,), (2.0,)))


@pytest.mark.parametrize("baseline", ["Adam", "SGD"])
def test_a_baseline_without_doses(baseline):
    table = origins.matched_table({"SGD": [trained(optimizer=Optimizer("sgd"))], "AdamW": [trained()]})
    with pytest.raises(ValueError, match=f"baseline '{baseline}' is no AdamW of this table"):
        origins.dose_table(table, baseline=baseline)


# --- where the outliers sit -------------------------------------------------------------------------------------------


def planted(channel: int = 5, offset: float = 1000.0) -> nn.Module:
    """A fresh network in which the bias of one feed-forward layer adds an offset to one channel of every token."""
    model = MODEL.build(0)
    with torch.no_grad():
        model.blocks[1].mlp.fc2.bias[channel] = offset
    return model


def test_a_planted_offset_is_found_where_it_is_and_not_before():
    table = origins.outlier_location_table({"planted": [trained(planted())]}, images=16).set_index("layer")
    assert table.index.tolist() == ["embedding", "blocks.0", "blocks.1"]
    last = table.loc["blocks.1"]
    assert last.channel == 5 and last.energy_share > 0.999 and last.direction_share > 0.999
    assert last["mean"] == pytest.approx(1000, abs=10) and last["std"] < 10
    assert last.class_mean_abs == pytest.approx(1000, abs=10) and last.patch_mean_abs == pytest.approx(1000, abs=10)
    assert last.ceiling == pytest.approx(15**0.5) and last.normed_max_abs == pytest.approx(15**0.5, rel=1e-3)
    assert (table.energy_share < table.direction_share).all()  # a channel is one direction among all
    assert (table.energy_share[:2] < 0.6).all() and (table.normed_max_abs[:2] < 3.5).all()


def test_an_offset_on_the_class_token_alone_is_seen_there():
    model = MODEL.build(0)
    with torch.no_grad():
        model.cls_token[..., 3] = 1000.0
    first = origins.outlier_location_table({"planted": [trained(model)]}, images=4).iloc[0]
    assert first.layer == "embedding" and first.channel == 3
    assert first.class_mean_abs == pytest.approx(1000, abs=5) and first.patch_mean_abs < 5
    # One token of 17: the closed form of a mean and spread over tokens.
    assert first["mean"] == pytest.approx(1000 / 17, abs=3)
    assert first["std"] == pytest.approx(1000 * (16 / 17**2) ** 0.5, rel=0.02)


@pytest.mark.parametrize("width", [1, 2, 7])
def test_the_share_of_the_largest_direction_in_closed_form(width):
    """Orthogonal tokens of known lengths: the longest one's share, in whatever basis."""
    lengths = torch.arange(1.0, width + 1)
    turn = random_rotation(width, torch.Generator().manual_seed(0))
    for stream in (torch.diag(lengths), torch.diag(lengths) @ turn):
        expected = width**2 / lengths.square().sum().item()
        assert origins.largest_direction_share(stream[None]) == pytest.approx(expected, rel=1e-5)
    assert origins.largest_direction_share(torch.eye(width)[None]) == pytest.approx(1 / width)


def test_streams_are_those_of_the_forward_pass():
    model = MODEL.build(0).eval()
    images, _ = RECIPE.data.fixed_set("calibration", 4)
    streams = origins.residual_streams(model, images)
    with torch.no_grad():
        torch.testing.assert_close(model.norm(streams["blocks.1"]), model.forward_features(images))
        torch.testing.assert_close(model.blocks[0](streams["embedding"]), streams["blocks.0"])
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_writers_name_the_planted_layer_and_add_up():
    model = planted()
    with torch.no_grad():
        model.pos_embed[..., 5] = 50.0
    table = origins.outlier_writers_table({"planted": [trained(model)]}, images=16).set_index("writer")
    where = origins.outlier_location_table({"planted": [trained(model)]}, images=16)
    assert table["mean"]["pos_embed"] == pytest.approx(50) and table["std"]["pos_embed"] == 0
    assert table["mean"].idxmax() == "blocks.1.mlp.fc2" and set(table.channel) == {5}
    assert table.bias["blocks.1.mlp.fc2"] == 1000.0 and table["mean"]["blocks.1.mlp.fc2"] == pytest.approx(1000, abs=5)
    assert table["mean"].sum() == pytest.approx(where["mean"].iloc[-1], rel=1e-5)
    assert table.bias.isna().tolist() == [True, True] + [False] * 4
    assert table["mean"].drop(["blocks.1.mlp.fc2", "pos_embed"]).abs().max() < 5


# --- growth -----------------------------------------------------------------------------------------------------------


def test_growth_has_a_row_a_layer_and_the_numbers_of_layer_statistics():
    runs = [trained(planted(), steps=steps) for steps in (2, 6)]
    table = origins.growth_table({"short": runs[:1], "long": runs[1:]}, images=8)
    assert len(table) == 2 * 8 and table.groupby("steps").layer.nunique().tolist() == [8, 8]
    own = layer_statistics(runs[0], images=8, k_max=1)
    for column in ("layer", "sigma_1", "pcdr_1", "max_abs", "excess_kurtosis"):
        assert table[column][:8].tolist() == own[column].tolist()
    np.testing.assert_allclose(table.bound, table.sigma_1 * table.input_norm)
    assert (table.max_abs <= table.bound * 1.0001).all()


def test_input_norms_are_those_of_layer_norm():
    """A LayerNorm without gains gives every token of width d the norm sqrt(d), up to its eps."""
    norms = origins.largest_input_norms(planted().eval(), RECIPE.data.fixed_set("calibration", 4)[0])
    for name in ("blocks.0.attn.qkv", "blocks.0.mlp.fc1", "blocks.1.attn.qkv", "blocks.1.mlp.fc1"):
        assert norms[name] == pytest.approx(4.0, rel=1e-3)


def test_the_summary_has_a_row_a_run_with_the_numbers_of_each():
    runs = {f"{steps} steps": [trained(planted(), history(0.1, 0.5), steps=steps)] for steps in (2, 6)}
    with torch.no_grad():
        runs["6 steps"][0].weights["blocks.1.mlp.fc1.weight"].copy_(7 * torch.eye(64, 16))
    table = origins.growth_summary(runs, bits=["W4A4"], images=16)
    assert table.steps.tolist() == [2, 6] and table.excess_kurtosis.tolist() == [10, 10]
    assert table.ffn_sigma_1[1] == pytest.approx(7) and table.ffn_sigma_1[0] < 2
    measured = frontier_table(runs, bits=["W4A4"], methods=["ERQ"], erq_bits=(), images=16)
    erq = measured[(measured.method == "ERQ") & (measured.variant == "6 steps")].accuracy.iloc[0]
    assert table["ERQ W4A4"][1] == erq
    assert list(table.columns[4:]) == ["FP", "RTN, symmetric W4A4", "RTN, asymmetric W4A4", "ERQ W4A4"]


def test_a_channel_that_carries_everything_meets_the_ceiling():
    """Entries of which one in w is +-a and the rest nothing: w - 3, up to the noise of a fresh network."""
    model = MODEL.build(0)
    with torch.no_grad():
        model.pos_embed[:, ::2, 3], model.pos_embed[:, 1::2, 3] = 1e4, -1e4
    row = origins.width_table({"planted": [trained(model)]}, images=8).iloc[0]
    assert row.width == 16 and row.ceiling == 13
    assert row.excess_kurtosis == pytest.approx(13, abs=0.1) and row.largest_block == pytest.approx(13, abs=0.1)


# --- correlation ------------------------------------------------------------------------------------------------------


def growth(seeds: int = 3, layers: int = 6, lengths: int = 3, noise: int = 0) -> pd.DataFrame:
    """All columns random and apart from each other, with a fixed seed."""
    rng = np.random.default_rng(noise)
    index = [(s, f"l{i}", 100 * (t + 1)) for s in range(seeds) for i in range(layers) for t in range(lengths)]
    columns = ["sigma_1", "pcdr_1", "max_abs", "excess_kurtosis", "bound"]
    table = pd.DataFrame(index, columns=["seed", "layer", "steps"])
    return table.assign(**{c: rng.normal(size=len(table)) for c in columns})


def test_a_monotone_relation_has_correlation_one_everywhere():
    table = growth().assign(max_abs=lambda t: np.exp(t.sigma_1), excess_kurtosis=lambda t: -t.sigma_1)
    found = origins.correlation_table(table, resamples=200).set_index(["x", "y"]).loc["sigma_1"]
    for y, sign in (("max_abs", 1), ("excess_kurtosis", -1)):
        np.testing.assert_allclose(found.loc[[y], ["correlation", "low", "high"]], sign)
    assert (found.seeds == 3).all() and (found.layers == 6).all() and (found.lengths == 3).all()


def test_correlations_are_scipys_on_each_group():
    table = growth(seeds=2, layers=5, lengths=4)
    found = origins.correlation_table(table, resamples=10).set_index(["x", "y", "scope"]).correlation
    for x, y in origins.PAIRS:

        def mean_over(groups, x=x, y=y) -> float:
            return float(np.mean([spearmanr(part[x], part[y]).statistic for _, part in groups]))

        assert found[x, y, "all together"] == pytest.approx(spearmanr(table[x], table[y]).statistic)
        layers = mean_over(table.groupby(["seed", "steps"]))
        assert found[x, y, "over layers, within a network"] == pytest.approx(layers)
        time = mean_over(table.groupby(["seed", "layer"]))
        assert found[x, y, "over training time, within a layer"] == pytest.approx(time)


def test_scopes_can_disagree():
    """Layers ordered one way, each falling over time: positive over layers, negative over time."""
    table = growth().assign(
        sigma_1=lambda t: t.layer.str[1:].astype(float),
        max_abs=lambda t: t.layer.str[1:].astype(float) - t.steps / 1000,
    )
    table["sigma_1"] += table.steps / 1000
    correlation = origins.correlation_table(table, resamples=10)
    found = correlation[(correlation.x == "sigma_1") & (correlation.y == "max_abs")].set_index("scope").correlation
    assert found["over layers, within a network"] == pytest.approx(1)
    assert found["over training time, within a layer"] == pytest.approx(-1)


def test_the_order_of_the_rows_does_not_matter():
    table = growth()
    shuffled = table.sample(frac=1, random_state=0)
    expected = origins.correlation_table(table, resamples=5).correlation
    np.testing.assert_allclose(origins.correlation_table(shuffled, resamples=5).correlation, expected)


def test_intervals_cover_no_correlation_about_as_often_as_they_say():
    """Columns that have nothing to do with each other: about 1 interval in 20 may miss 0."""
    tables = [origins.correlation_table(growth(6, 12, 3, noise=n), resamples=300, seed=n) for n in range(30)]
    together = pd.concat(tables).query("scope == 'all together'")
    covered = ((together.low <= 0) & (together.high >= 0)).mean()
    assert 0.88 <= covered <= 1


def test_whole_clusters_are_resampled():
    """A hundred copies in time of the same measurements are no new evidence: the interval stays as wide."""
    once = growth(lengths=2)
    copies = [once.assign(steps=once.steps + 1000 * i) for i in range(50)]
    pair = {"x": ["sigma_1"], "y": ["max_abs"], "scope": ["all together"]}
    few, many = (
        origins.correlation_table(table, resamples=500).merge(pd.DataFrame(pair)).iloc[0]
        for table in (once, pd.concat(copies))
    )
    assert few.correlation == pytest.approx(many.correlation, abs=0.02)
    assert many.high - many.low == pytest.approx(few.high - few.low, rel=0.2)
    assert few.high - few.low > 0.2


@pytest.mark.parametrize(("factor", "alike"), [("seed", "layer"), ("layer", "seed")])
def test_seeds_and_layers_are_both_drawn(factor, alike):
    """Everything depends on one factor alone: its few values decide how wide the interval is, not their copies."""
    table = growth(6, 6, 2)
    table[["sigma_1", "max_abs"]] = table.groupby(factor)[["sigma_1", "max_abs"]].transform("first")
    assert (table.groupby(factor)[alike].nunique() == 6).all()
    found = origins.correlation_table(table, resamples=300).iloc[0]
    assert (found.x, found.y, found.scope) == ("sigma_1", "max_abs", "all together")
    assert found.high - found.low > 0.8  # six points


def test_the_seed_decides_the_interval():
    one, same, other = (origins.correlation_table(growth(), resamples=50, seed=s) for s in (1, 1, 2))
    pd.testing.assert_frame_equal(one, same)
    assert not one.low.equals(other.low) and one.correlation.equals(other.correlation)


@pytest.mark.parametrize(
    ("table", "message"),
    [
        (growth().iloc[1:], "sigma_1 is not known once for every seed, layer, steps"),
        (pd.concat([growth(), growth().iloc[:1]]), "sigma_1 is not known once"),
        (growth().assign(pcdr_1=float("nan")), "pcdr_1 is not known once"),
        (growth().assign(max_abs=2.0), "max_abs is 2.0 everywhere: there is nothing to correlate"),
        (growth(lengths=1), "6 layers and 1 lengths: a correlation over them needs two"),
        (growth(layers=1), "1 layers and 3 lengths"),
    ],
)
def test_tables_without_a_correlation(table, message):
    with pytest.raises(ValueError, match=message):
        origins.correlation_table(table, resamples=5)


def layers(seeds: int = 3, count: int = 8, noise: int = 0) -> pd.DataFrame:
    """AdamW's layers have ten times SGD's singular values and activations; within a network both are random."""
    rng = np.random.default_rng(noise)
    index = [(v, s, f"l{i}") for v in ("AdamW", "SGD") for s in range(seeds) for i in range(count)]
    table = pd.DataFrame(index, columns=["variant", "seed", "layer"])
    columns = ["sigma_1", "max_abs", "pcdr_1", "spectral_pcdr_1"]
    table = table.assign(**{c: rng.uniform(1, 2, size=len(table)) for c in columns})
    table.loc[table.variant == "AdamW", ["sigma_1", "max_abs"]] *= 10
    return table


def test_a_correlation_over_optimizers_can_vanish_within_them():
    table = layers(seeds=12, count=20)
    found = origins.layer_correlation_table(table, resamples=200).set_index(["variant", "x", "scope"])
    pooled = found.loc["AdamW and SGD", "sigma_1", "all together"]
    assert pooled.correlation > 0.6 and pooled.low > 0.5
    for variant in ("AdamW and SGD", "AdamW", "SGD"):
        within = found.loc[variant, "sigma_1", "over layers, within a network"]
        assert abs(within.correlation) < 0.2 and within.low < 0 < within.high


def test_layer_correlations_are_scipys_within_each_network():
    table = layers()
    found = origins.layer_correlation_table(table, resamples=5).set_index(["variant", "x", "scope"])
    for variant, part in [("AdamW and SGD", table), *table.groupby("variant")]:
        networks = [network for _, network in part.groupby(["variant", "seed"])]
        each = [spearmanr(network.pcdr_1, network.max_abs).statistic for network in networks]
        assert found.correlation[variant, "pcdr_1", "over layers, within a network"] == pytest.approx(np.mean(each))
        together = spearmanr(part.pcdr_1, part.max_abs).statistic
        assert found.correlation[variant, "pcdr_1", "all together"] == pytest.approx(together)
        assert (found.loc[variant].seeds == 3).all() and (found.loc[variant].layers == 8).all()


def test_one_layer_has_no_correlation_over_layers():
    with pytest.raises(ValueError, match="1 layers: a correlation over them needs two"):
        origins.layer_correlation_table(layers(count=1))


# --- points lost ------------------------------------------------------------------------------------------------------


def test_points_are_lost_against_the_same_checkpoint_on_the_same_grid():
    rows = [
        ("AdamW", 2, "symmetric", "FP", 0.9),
        ("AdamW", 2, "symmetric", "W4A4", 0.7),
        ("AdamW", 2, "asymmetric", "FP", 0.9),
        ("AdamW", 2, "asymmetric", "W4A4", 0.8),
        ("SGD", 3, "symmetric", "FP", 0.5),
        ("SGD", 3, "symmetric", "W4A4", 0.6),
    ]
    table = pd.DataFrame(rows, columns=["variant", "seed", "grid", "bits", "accuracy"])
    np.testing.assert_allclose(with_points_lost(table).points_lost, [0, 20, 0, 10, 0, -10])
    with pytest.raises(ValueError, match="no accuracy in full precision"):
        with_points_lost(table[1:])


# --- figures ----------------------------------------------------------------------------------------------------------


def test_every_intervention_has_a_colour_and_a_marker_of_its_own():
    for marks in (style.COLOURS, style.MARKERS):
        assert len({marks[name] for name in INTERVENTIONS}) == len(INTERVENTIONS)


def test_figures_are_drawn_from_the_tables_alone():
    kinds = {"AdamW": Optimizer("adamw"), "SGD": Optimizer("sgd"), "less": LessAdaptive("adamw", eps=1e-2)}
    runs = {name: [trained(planted(), history(0.1, 0.5), optimizer=o)] for name, o in kinds.items()}
    matched = origins.matched_table(runs)
    row = {"seed": 0, "grid": "asymmetric", "accuracy": 0.5}
    ptq = pd.DataFrame([row | {"variant": v, "bits": b} for v in kinds for b in ("FP", "W4A4", "W3A3")])
    shown = {name: runs[name] for name in ("AdamW", "SGD")}
    where, writers = (make(shown, images=4) for make in (origins.outlier_location_table, origins.outlier_writers_table))
    measured = growth().assign(sigma_1=lambda t: t.sigma_1.abs(), max_abs=lambda t: t.max_abs.abs())
    summary = pd.DataFrame(
        {"steps": n, "seed": seed, "excess_kurtosis": n / 100, "ffn_sigma_1": 2.0, "FP": 0.9, "ERQ W3A3": 0.8}
        for n in (1000, 2000)
        for seed in (2, 3)
    )
    widths = origins.width_table(shown, images=4)
    figures = [
        draw.origins_interventions(matched, ptq),
        draw.origins_doses(matched),
        draw.origins_where(where, writers),
        draw.origins_growth(measured, origins.correlation_table(measured, resamples=5)),
        draw.origins_severity(summary, widths),
        pcdr_correlation(layers(), origins.layer_correlation_table(layers(), resamples=5)),
    ]
    assert [len(figure.axes) for figure in figures] == [3, 2, 4, 2, 4, 2]
    assert [tick.get_text() for tick in figures[0].axes[0].get_yticklabels()] == list(kinds)
    assert [tick.get_text() for tick in figures[1].axes[0].get_xticklabels()] == ["1e-08", "0.01"]
    for figure in figures:
        draw.plt.close(figure)


def test_two_grids_are_not_drawn_as_one():
    row = {"variant": "AdamW", "seed": 0, "accuracy": 0.5}
    table = pd.DataFrame([row | {"grid": g, "bits": b} for g in ("symmetric", "asymmetric") for b in ("FP", "W4A4")])
    with pytest.raises(ValueError, match="the grids symmetric, asymmetric: draw one at a time"):
        accuracy_by_bits(table)
    figure = accuracy_by_bits(table[table.grid == "symmetric"])
    assert "symmetric grid" in figure.get_supxlabel()
    draw.plt.close(figure)
