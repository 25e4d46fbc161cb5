"""Verdicts follow from the numbers, whichever way these point."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from s2d.lab.claims import PAPER_MODE, claims_table, verdict
from s2d.lab.paper import load_paper_table
from s2d.lab.statistics import paired_interval

SEEDS = [3, 4, 5]


def rows(values: dict, **columns) -> list[dict]:
    """One row a seed and entry, with a little noise so that an interval has a width."""
    return [
        columns | {"variant": name, "seed": seed, "value": value + 0.001 * (seed - 4) * (index + 1)}
        for index, (name, value) in enumerate(values.items())
        for seed in SEEDS
    ]


def synthetic_tables(gain: float) -> dict[str, pd.DataFrame]:
    """Tables in which every claim of the paper holds when ``gain`` is positive, and its opposite when negative."""
    optimizers = {
        "AdamW": 120,
        "AdamW, lr 2e-3": 20,
        "SGD": 1,
        "AdamW, rotated basis": 2,
        "AdamW, eps 1e-3": 60,
        "AdamW, eps 1e-2": 3,
    }
    if gain < 0:
        optimizers = {name: -value for name, value in optimizers.items()}
    moments = [
        row | {"moment": moment, "validation_accuracy": 0.9 + min(gain, 0)}
        for moment in ("matched", "end")
        for row in rows(optimizers | {"Muon": 0, "AdamW, beta2 0.9": np.sign(gain) * 9})
    ]
    interventions = pd.DataFrame(moments).rename(columns={"value": "excess_kurtosis"})
    interventions.loc[interventions.variant == "AdamW, lr 2e-3", "validation_accuracy"] = 0.9
    scopes = ("over training time, within a layer", "over layers, within a network")
    correlation = pd.DataFrame(
        [
            {
                "x": x,
                "y": "max_abs",
                "scope": s,
                "correlation": gain,
                "low": gain - 0.01,
                "high": gain + 0.01,
                "seeds": 3,
            }
            for x in ("sigma_1", "pcdr_1")
            for s in scopes
        ]
    )
    bound = pd.DataFrame([{"seed": s, "layer": "a", "holds": gain > 0} for s in SEEDS])
    levels = {
        ("AdamW", "none"): 0.6,
        ("AdamW", "rotation"): 0.7,
        ("S2D", "none"): 0.65,
        ("S2D", "rotation"): 0.7 + gain,
    }
    conditioning = pd.DataFrame(
        [
            {"variant": v, "conditioning": c, "bits": "W4A4", "seed": s, "accuracy": level + 0.001 * s * len(v + c)}
            | {"online_operations": np.sign(gain) * (c == "rotation") + 0.001 * s * len(v)}
            for (v, c), level in levels.items()
            for s in SEEDS
        ]
    )
    frontier = []
    for method, bits in (("FP", "FP"), ("RTN", "W4A4"), ("ERQ", "W4A4"), ("ERQ", "W5A5"), ("ERQ", "W6A6")):
        no_pcdr = 0.7 + (gain / 2 if bits == "W6A6" else -gain)
        frontier += rows({"AdamW": 0.7, "S2D": 0.7 + gain, "No PCDR": no_pcdr}, method=method, bits=bits)
    layers = [
        {"variant": v, "seed": s, "layer": "blocks.0.mlp.fc1", "pcdr_1": x, "max_abs": x, "sigma_1": x}
        for v, level in (("AdamW", 2.0), ("S2D", 2.0 - gain))
        for s in SEEDS
        for x in [level + 0.001 * s * len(v)]
    ]
    settings = {
        ("references", "S2D"): 0.7,
        ("references", "AdamW"): 0.7 - 2 * gain,
        ("refresh interval", "10"): 0.7 - gain,
        ("k_max", "10"): 0.7 - gain,
        ("power", "3"): 0.7 - gain,
        ("power", "4"): 0.7 - gain,
        ("tau", "0.8"): 0.6 - gain,
        ("tau", "0.95"): 0.6,
    }
    ablations = [
        {"group": g, "setting": k, "seed": s, "method": m, "bits": b, "accuracy": shown + 0.001 * s * len(g + k)}
        for (g, k), level in settings.items()
        for m, b, shown in (
            *(("ERQ", bits, level) for bits in ("W4A4", "W5A5", "W6A6")),
            ("FP", "FP", 0.8 + gain * (g in ("k_max", "tau", "refresh interval"))),
        )
        for s in SEEDS
    ]
    staleness = [
        {"mode": PAPER_MODE, "seed": s, "step": step, "age": age, "layer": "a", "cosine": 0.9901 + gain / 50 + s / 1e5}
        for step, age in ((0, 0), (100, 100), (110, 10))
        for s in SEEDS
    ]
    return {
        "origins_interventions": interventions,
        "origins_correlation": correlation,
        "bound": bound,
        "ptq_conditioning": conditioning,
        "frontier": pd.DataFrame(frontier).rename(columns={"value": "accuracy"}),
        "ablation_layers": pd.DataFrame(layers),
        "ablations": pd.DataFrame(ablations),
        "staleness": pd.DataFrame(staleness),
    }


@pytest.mark.parametrize(
    ("values", "margin", "expected"),
    [
        ([1, 2, 3, 2], 0, "reproduced"),
        ([-1, -2, -3, -2], 0, "not reproduced"),
        ([1, -2, 3], 0, "undecided"),
        ([-0.1, -0.2, -0.15], 0.5, "reproduced"),  # lower, but by less than is called a loss
        ([-1.1, -1.2, -1.15], 0.5, "not reproduced"),
        ([5], 0, "undecided"),  # one seed has no interval
    ],
)
def test_verdict(values, margin, expected):
    assert verdict(paired_interval(values), margin=margin) == expected


def test_verdict_is_the_paired_t_test():
    """The interval leaves zero out exactly where scipy's test rejects at 5 %."""
    rng = np.random.default_rng(0)
    for _ in range(50):
        values = rng.normal(0.7, 1.0, size=5)
        decided = verdict(paired_interval(values)) != "undecided"
        assert decided == (stats.ttest_1samp(values, 0).pvalue < 0.05)


def test_claims_follow_the_numbers_both_ways():
    good, bad = claims_table(synthetic_tables(+0.1)), claims_table(synthetic_tables(-0.1))
    assert good.claim.is_unique and (good.claim == bad.claim).all()
    unmeasured = good.verdict == "not measured"
    assert unmeasured.sum() == 2 and (good.seeds[unmeasured] == 0).all() and (good.seeds[~unmeasured] == 3).all()
    good, bad = good[~unmeasured], bad[~unmeasured]
    assert good.claim[good.verdict != "reproduced"].tolist() == []
    assert bad.claim[bad.verdict != "not reproduced"].tolist() == []
    assert set(good.which_seeds) == {"3 4 5"}
    row = good.set_index("claim").loc["S2D is more accurate than AdamW at W4A4 (ERQ)"]
    assert row.measured == pytest.approx(10.0, abs=0.1) and row.low < row.measured < row.high


def test_claims_quote_every_row_of_the_papers_tables():
    """Each accuracy of Tables 6, 10 (W4A4) and 11 stands in the column ``reported`` of some claim."""
    claims = claims_table(synthetic_tables(0.1))
    for number in (6, 10, 11):
        quoted = " ".join(claims.reported[claims.source.str.contains(rf"Tables? .*{number}")])
        table = load_paper_table(number)
        for row in table[table.bits != "FP16"].itertuples():
            assert str(row.value) in quoted, (number, row)
    sources = set(claims.source)
    assert {"Theorem 1", "C [2]", "C [6]", "C [7]", "D", "G.2", "Table 7"} <= sources
