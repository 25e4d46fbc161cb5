"""Verdicts follow from the numbers, whichever way these point; each claim of the paper is counted once."""

from __future__ import annotations

import re

import numpy as np
import pandas as pd
import pytest

from s2d.lab.ablations import REFERENCE_VARIANTS, REFERENCES
from s2d.lab.claims import DOSES, GROUPS, NOT_MEASURED, claims_table, headline, undecided_share
from s2d.lab.figures import claims as draw
from s2d.lab.figures.style import use_style
from s2d.lab.frontier import ROUNDED_METHODS, STRONG_METHODS
from s2d.lab.paper import load_paper_table
from s2d.lab.recipes import ABLATIONS, AS_PRINTED, EVIDENCE_VARIANTS, INTERVENTIONS
from s2d.lab.staleness import PAPER_MODE
from s2d.lab.statistics import points_lost

SEEDS = [3, 4, 5]
TABLE_9 = ["W8A8", "W7A7", "W6A6"]
RUNS = ("4x", "SGD", "2x", "1x", "wide")  # of the testbed's table
CELLS = [
    f"{name} {bits}" for bits in ("W4A4", "W3A3") for name in ("RTN symmetric", "RTN asymmetric", "RepQ-ViT", "ERQ")
]
# Better and better: each is ahead of what stands left of it, where the paper or a row of ours compares the two.
ORDER = ["No PCDR", "AdamW", "AdamW, tuned weight decay", "S2D, the paper's lam and tau", "Decoupled spectral decay"]
ORDER += ["Spectral-norm cap", "S2D", "S2D, live"]


def jitter(seed: int, index: int = 0) -> float:
    """A little noise that differs between the things compared, so that intervals have a width."""
    return 0.0002 * (seed - 4) * (index + 1)


def interventions(gain: float) -> pd.DataFrame:
    kurtosis = dict.fromkeys(INTERVENTIONS, 20.0 - 100 * gain)  # every change of AdamW lowers it
    kurtosis |= {"AdamW": 20.0, "AdamW, beta2 0.999": 20.0 + 100 * gain}
    rows = [
        {"variant": name, "seed": seed, "moment": moment, "excess_kurtosis": value + jitter(seed, index)}
        | {"validation_accuracy": 0.8 + (min(gain, 0) if "rotated" in name else 0) + jitter(seed, index)}
        for index, (name, value) in enumerate(kurtosis.items())
        for moment in ("matched", "end")
        for seed in SEEDS
    ]
    return pd.DataFrame(rows)


def growth_runs(gain: float) -> pd.DataFrame:
    grown = {"1x": 1, "2x": 2, "4x": 3, "wide": 4, "SGD": 0}
    rows = []
    for index, run in enumerate(RUNS):
        for seed in SEEDS:
            for kernel in ("native", "default"):
                level = gain * grown[run] + jitter(seed, index)
                row = {"kernel": kernel, "run": run, "seed": seed, "FP": 0.9, "matched_kurtosis": 5 + level}
                row |= {"excess_kurtosis": (100 if run == "wide" else 10) + level, "sigma_1": 5 + level}
                rows.append(row | {cell: 0.8 - level for cell in CELLS})
    return pd.DataFrame(rows)


def correlations(gain: float) -> pd.DataFrame:
    scopes = ("over training time, within a layer", "over layers, within a network")
    found = {"correlation": gain, "low": gain - 0.01, "high": gain + 0.01, "seeds": 3, "layers": 16, "lengths": 3}
    return pd.DataFrame(
        [{"x": x, "y": "max_abs", "scope": scope} | found for x in ("sigma_1", "pcdr_1") for scope in scopes]
    )


def frontier(gain: float) -> pd.DataFrame:
    cells = [(method, bits) for bits in ("W4A4", "W3A3") for method in (*ROUNDED_METHODS, *STRONG_METHODS)]
    rows = []
    for index, variant in enumerate(ORDER):
        for seed in SEEDS:
            for method, bits in [("FP", "FP"), *cells, ("ERQ", "W5A5"), ("ERQ", "W6A6")]:
                # A tenth of the gain in full precision: the rest is quantization's.
                level = 0.7 + index * gain * (0.1 if method == "FP" else 1) + jitter(seed, index)
                rows.append({"variant": variant, "seed": seed, "method": method, "bits": bits, "accuracy": level})
    table = pd.DataFrame(rows).assign(images=100)
    return table.assign(points_lost=points_lost(table, ["variant", "seed"]))


def ablations(gain: float) -> pd.DataFrame:
    levels = {(REFERENCES, variant): 0.7 for variant in REFERENCE_VARIANTS}
    levels |= {(group, setting): 0.7 - gain for group in ABLATIONS for setting in ABLATIONS[group]}
    levels |= {(REFERENCES, "AdamW"): 0.7 - 2 * gain, ("tau", "0.95"): 0.7}
    return pd.DataFrame(
        [
            {"group": group, "setting": setting, "seed": seed, "method": "ERQ", "bits": bits}
            | {"accuracy": level + jitter(seed, index)}
            for index, ((group, setting), level) in enumerate(levels.items())
            for bits in ("W4A4", "W5A5", "W6A6")
            for seed in SEEDS
        ]
    )


def synthetic_tables(gain: float) -> dict[str, pd.DataFrame]:
    """Tables in which every claim of the paper holds when ``gain`` is positive, and its opposite when negative."""
    levels = {("AdamW", "none"): 0.6, ("AdamW", "rotation"): 0.7, ("S2D", "none"): 0.6, ("S2D", "rotation"): 0.7 + gain}
    conditioning = [
        {"variant": variant, "conditioning": name, "bits": "W4A4", "seed": seed}
        | {"accuracy": level + jitter(seed, index), "online_operations": np.sign(gain) * (name == "rotation")}
        for index, ((variant, name), level) in enumerate(levels.items())
        for seed in SEEDS
    ]
    layers = [
        {"variant": variant, "seed": seed, "layer": "blocks.0.mlp.fc1"}
        | dict.fromkeys(("pcdr_1", "max_abs", "sigma_1"), level + jitter(seed, index))
        for index, (variant, level) in enumerate((("AdamW", 2.0), ("S2D", 2.0 - gain)))
        for seed in SEEDS
    ]
    staleness = [
        {"mode": mode, "seed": seed, "step": step, "age": age, "layer": "a", "cosine": 0.99 + gain / 50 + seed / 1e5}
        for mode in (PAPER_MODE, f"{PAPER_MODE}, lr / 100")
        for step, age in ((0, 0), (100, 100), (110, 10))
        for seed in SEEDS
    ]
    outliers = [
        {"variant": variant, "seed": seed, "excess_kurtosis": 20 - gain * index + jitter(seed, index)}
        for index, variant in enumerate(("AdamW", "S2D"))
        for seed in SEEDS
    ]
    tiny = [
        {"variant": variant, "seed": seed, "grid": grid, "bits": bits, "exact_match": level + jitter(seed, index)}
        for index, (variant, level) in enumerate((("AdamW", 0.6), (AS_PRINTED, 0.6 + gain), ("S2D", 0.6 + gain)))
        for grid, widths in (("none", ["FP"]), *((g, TABLE_9 + ["W4A4"]) for g in ("symmetric", "asymmetric")))
        for bits in widths
        for seed in SEEDS
    ]
    published = [
        {
            "model": "m",
            "training": training,
            "bits": bits,
            "problems": 9,
            "exact_match": 0.5 + gain * (training == "S2D"),
        }
        for training in ("none", "AdamW", "S2D")
        for bits in ("FP", *TABLE_9)
    ]
    arms = {"AdamW": 0.5, "No PCDR": 0.5 - gain, "S2D": 0.5 + gain}
    evidence = [
        {"variant": variant, "seed": seed, "method": method, "bits": bits, "key": f"{variant} {seed}"}
        | {"accuracy": (0.9 if method == "FP" else level) + jitter(seed, index), "logit_error": 1.0 - level}
        for index, (variant, level) in enumerate(arms.items())
        for method, bits in (("FP", "FP"), ("RTN", "W4A4"), ("ERQ", "W4A4"))
        for seed in SEEDS
    ]
    encoder_layers = [
        {"variant": variant, "seed": seed, "key": f"{variant} {seed}", "layer": "encoder.encoder.layer.0.output.dense"}
        | dict.fromkeys(("pcdr_1", "max_abs", "sigma_1", "input_ratio"), 2 - level + jitter(seed, index))
        for index, (variant, level) in enumerate(arms.items())
        for seed in SEEDS
    ]
    backbone = [
        {"variant": variant, "seed": seed, "method": method, "bits": bits, "accuracy": level + jitter(seed, index)}
        for index, (variant, level) in enumerate((("AdamW", 0.6), (AS_PRINTED, 0.6 + gain), ("S2D", 0.6 + gain)))
        for method, widths in (("FP", ["FP"]), *((m, ["W8A8", "W6A6", "W5A5"]) for m in ("PTQ4ViT", "ERQ")))
        for bits in widths
        for seed in SEEDS
    ]
    conditioned = {"network": "n", "form": ["S2D, as printed", "cap"], "max_abs_before": 9.0, "max_abs": 9.0 - gain}
    return {
        "encoder/evidence": pd.DataFrame(evidence),
        "encoder/layers": pd.DataFrame(encoder_layers),
        "language/tiny": pd.DataFrame(tiny),
        "language/smollm2": pd.DataFrame(published),
        "self_supervised/evidence": pd.DataFrame(backbone),
        "real/conditioning": pd.DataFrame(conditioned | {"sigma_1_before": 2.0, "sigma_1": 2.0 - gain}),
        "laptop/testbed": growth_runs(gain),
        "origins_interventions": interventions(gain),
        "origins_correlation": correlations(gain),
        "bound": pd.DataFrame([{"seed": seed, "layer": "a", "holds": gain > 0} for seed in SEEDS]),
        "ptq_conditioning": pd.DataFrame(conditioning),
        "frontier": frontier(gain),
        "frontier_outliers": pd.DataFrame(outliers),
        "ablation_layers": pd.DataFrame(layers),
        "ablations": ablations(gain),
        "staleness": pd.DataFrame(staleness),
    }


@pytest.fixture(scope="module")
def good() -> pd.DataFrame:
    return claims_table(synthetic_tables(+0.1))


def test_the_synthetic_tables_have_every_arm():
    assert set(ORDER) == set(EVIDENCE_VARIANTS)


def test_claims_follow_the_numbers_both_ways(good):
    bad = claims_table(synthetic_tables(-0.1))
    assert good.claim.is_unique and (good.claim == bad.claim).all()
    assert (good.verdict != NOT_MEASURED).all()
    # "No PCDR" is the one arm that the synthetic tables put below AdamW, as the paper does.
    own_loss = good.claim.str.startswith("No PCDR: ")
    words = {"paper": ("reproduced", "not reproduced"), "ours": ("holds", "does not hold")}
    words["theorem"] = words["ours"]
    for table, right, wrong in ((good, 0, 1), (bad, 1, 0)):
        expected = [words[group][wrong if own else right] for group, own in zip(table.group, own_loss, strict=True)]
        assert table.verdict.tolist() == expected, table[table.verdict != expected][["claim", "measured", "verdict"]]
    assert (good.seeds == 3).all()
    row = good.set_index("claim").loc["S2D is more accurate than AdamW at W4A4 (ERQ)"]
    assert row.measured == pytest.approx(50.0, abs=0.1) and row.low < row.measured < row.high


def test_groups_stand_in_order_and_the_paper_alone_is_counted(good):
    assert list(dict.fromkeys(good.group)) == list(GROUPS)
    paper = good[good.group == "paper"]
    assert headline(good) == (
        f"Of {len(paper)} independent claims of the paper all are measured here: {len(paper)} reproduced."
    )
    assert good[good.group == "theorem"].source.tolist() == ["Theorem 1", "D"]
    assert undecided_share(good) == 0
    changed = good.assign(verdict=good.verdict.where(good.claim != paper.claim.iloc[0], "undecided"))
    assert headline(changed).endswith("reproduced, 1 undecided.")
    assert undecided_share(changed) == pytest.approx(1 / len(good))
    lacking = good.assign(verdict=good.verdict.where(good.claim != paper.claim.iloc[0], NOT_MEASURED))
    assert f"{len(paper) - 1} can be measured here" in headline(lacking) and "; 1 cannot." in headline(lacking)


def test_effects_smaller_than_a_point_are_equivalent_where_points_are_measured():
    tables = synthetic_tables(0.1)
    flat = frontier(0.0)
    flat["accuracy"] += np.random.default_rng(0).normal(0, 0.0005, len(flat))
    flat["points_lost"] = points_lost(flat, ["variant", "seed"])
    found = claims_table(tables | {"frontier": flat}).set_index("claim")
    assert found.verdict["S2D is more accurate than AdamW at W4A4 (ERQ)"] == "equivalent"
    assert found.excludes_size["S2D is more accurate than AdamW at W4A4 (ERQ)"] == "yes"
    assert found.verdict["S2D costs no accuracy in full precision: less AdamW's"] == "reproduced"
    # A kurtosis has no band of one point but a band of its own, a tenth of a power of ten.
    for size, says in ((0.5, "equivalent"), (100.0, "undecided")):
        close = growth_runs(0.0).assign(
            excess_kurtosis=lambda t, size=size: 5 + size * t.seed.map({3: 0.02, 4: -0.04, 5: 0.02}) * (t.run == "2x")
        )
        found = claims_table(tables | {"laptop/testbed": close}).set_index("claim")
        assert found.verdict["AdamW has more excess kurtosis than SGD, at equal accuracy"] == says


def test_the_reported_size_is_judged_apart_from_the_sign(good):
    row = good.set_index("claim").loc["S2D is more accurate than AdamW at W4A4 (ERQ)"]
    assert (row.verdict, row.reported_size, row.excludes_size) == ("reproduced", 7.4, "yes")
    exact = frontier(0.0)
    exact.loc[(exact.variant == "S2D") & (exact.method == "ERQ"), "accuracy"] += 0.074
    found = claims_table(synthetic_tables(0.1) | {"frontier": exact}).set_index("claim")
    assert found.excludes_size["S2D is more accurate than AdamW at W4A4 (ERQ)"] == "no"
    assert (good.excludes_size[good.reported_size.isna()] == "").all()


def test_a_reported_size_of_table_7_is_the_mean_fall(good):
    size = good.set_index("claim").reported_size["S2D lowers the largest singular value of the feed-forward layers"]
    printed = [(10.38, 3.22), (7.87, 3.96), (37.29, 17.94), (8.67, 3.79)]
    assert size == pytest.approx(100 * np.mean([1 - after / before for before, after in printed]), abs=1e-3)


def test_claims_quote_every_row_of_the_papers_tables(good):
    """Each accuracy of Tables 6, 10 (W4A4) and 11 stands in some claim that names the table."""
    for number in (6, 10, 11):
        rows = good[(good.group == "paper") & good.source.str.contains(rf"Tables? .*{number}")]
        quoted = " ".join([*rows.reported, *rows.details])
        table = load_paper_table(number)
        for row in table[table.bits != "FP16"].itertuples():
            assert str(row.value) in quoted, (number, row)
    sources = " ".join(good.source)
    assert all(
        name in sources
        for name in ("abstract", "C [2]", "C [6]", "C [7]", "D", "G.2", *map("Table {}".format, (7, 8, 9)))
    )


def test_the_paper_has_one_row_a_claim(good):
    """Bit widths, doses and thresholds of one comparison are details, not further claims."""
    paper = good[good.group == "paper"]
    for text in ("S2D is more accurate than AdamW at", "S2D is more accurate than No PCDR", "adaptivity", "threshold"):
        assert paper.claim.str.contains(text, regex=False).sum() == 1, text
    assert (paper.source == "Table 10").sum() == 3 and (paper.source == "Table 7").sum() == 3
    assert (paper.source == "Table 11").sum() == 3
    doses = paper[paper.source == "C [7]"].details.item()
    assert all(dose in doses for knob in DOSES.values() for dose in knob) and doses.count("fall") == 2


def test_settings_that_were_not_trained_are_not_measured():
    tables = synthetic_tables(0.1)
    few = tables["ablations"][tables["ablations"].group.isin([REFERENCES, "k_max"])]
    found = claims_table(tables | {"ablations": few}).set_index("claim")
    assert found.verdict["three components beat ten, at W4A4 (ERQ)"] == "reproduced"
    for claim in ("power 2 beats 3, at W4A4 (ERQ)", "the strict threshold 0.95 beats 0.8, at W4A4 (ERQ)"):
        assert found.verdict[claim] == NOT_MEASURED and found.details[claim]


def test_kernels_are_no_samples():
    """A seed measured on three kernels counts once."""
    tables = synthetic_tables(0.1)
    row = claims_table(tables).set_index("source").loc["C [2]"].iloc[0]
    assert row.seeds == 3 and row.which_seeds == "3 4 5"


def test_differences_print_as_zero_where_they_are_zero():
    tables = synthetic_tables(0.1)
    full = tables["frontier"].method == "FP"
    tables["frontier"].loc[full, "accuracy"] = 0.3 + tables["frontier"].seed[full] / 10
    row = claims_table(tables).set_index("claim").loc["S2D costs no accuracy in full precision: less AdamW's"]
    assert (row.measured, row.low, row.high) == (0.0, 0.0, 0.0)


def test_the_figure_shows_each_measured_claim_once(good):
    use_style()
    measured = good[good.verdict != NOT_MEASURED]
    papers = measured.group == "paper"
    for figure, own in ((draw.claims(good), measured[papers]), (draw.claims_ours(good), measured[~papers])):
        labels = [text.get_text().replace("\n", " ") for text in figure.axes[0].get_yticklabels()]
        assert sorted(label for label in labels if label in set(good.claim)) == sorted(own.claim)
    assert papers.sum() <= 26  # rows that can be read


def test_every_claim_of_the_paper_has_a_topic(good):
    assert "Further claims" not in set(good[good.group == "paper"].source.map(draw._topic))


def test_what_was_seen_on_real_checkpoints_stands_beside_the_claim(good):
    seen = good.set_index("claim").real_checkpoints
    seen = seen[seen != ""]
    assert len(seen) == 11 and all("one seed" in text or f"{len(SEEDS)} seeds" in text for text in seen)
    assert "as printed 9 to 8.9" in seen["S2D lowers the largest activation of the feed-forward layers"]
    assert "W8A8 +10.0" in seen.filter(like="language model").iloc[0]
    beats = seen["S2D is more accurate than AdamW at W4A4 (ERQ)"]
    assert re.search(r"seeds: \+(9|10)\.\d \[.*\] points, reproduced", beats)
    assert seen.filter(like="S2D costs no accuracy").iloc[0].endswith("points, reproduced")  # within the margin
