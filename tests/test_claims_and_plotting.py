"""Verdicts follow from the numbers, and figures are files with provenance and the same bytes twice."""

from __future__ import annotations

import json

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from s2d.lab import plotting
from s2d.lab.claims import claims_table, reported_pcdr_selection, verdict
from s2d.lab.results import save_table


def synthetic_tables(s2d_gain: float) -> dict[str, pd.DataFrame]:
    """Tables in which S2D is better than AdamW by a known amount at W4A4."""
    seeds = [0, 1, 2]
    origins = pd.DataFrame(
        [{"variant": v, "seed": s, "excess_kurtosis": k + s} for v, k in (("AdamW", 20), ("SGD", 1)) for s in seeds]
    )
    accuracy = {"AdamW": 0.7, "S2D": 0.7 + s2d_gain, "No PCDR": 0.6}
    ptq = pd.DataFrame(
        [
            {"variant": v, "seed": s, "grid": "symmetric", "bits": b, "accuracy": 0.9 if b == "FP" else a}
            for v, a in accuracy.items()
            for s in seeds
            for b in ("FP", "W4A4")
        ]
    )
    layers = pd.DataFrame(
        [
            {"variant": v, "seed": s, "layer": "blocks.0.mlp.fc1", "pcdr_1": x, "max_abs": x, "sigma_1": x}
            for v, x in (("AdamW", 2.0), ("S2D", 1.0))
            for s in seeds
        ]
    )
    methods = ptq[(ptq.grid == "symmetric") & (ptq.bits == "W4A4")].assign(method="ERQ")
    return {"origins_outliers": origins, "ptq": ptq, "ptq_methods": methods, "finetuning_layers": layers}


@pytest.mark.parametrize(
    ("values", "sign", "expected"),
    [
        ([1, 2, 3], +1, "reproduced"),
        ([-1, -2, -3], +1, "not reproduced"),
        ([-1, -2, -3], -1, "reproduced"),
        ([1, -2, 3], +1, "undecided"),
        ([0, 1, 2], +1, "undecided"),
    ],
)
def test_verdict(values, sign, expected):
    assert verdict(pd.Series(values), sign) == expected


def test_claims_follow_the_numbers_both_ways():
    good = claims_table(synthetic_tables(+0.2)).set_index("claim")
    row = good.loc["S2D is more accurate than AdamW at W4A4 under RTN"]
    assert row.measured == pytest.approx(20.0) and row.seeds == 3 and row.verdict == "reproduced"
    bad = claims_table(synthetic_tables(-0.05)).set_index("claim")
    for quantizer in ("RTN", "ERQ"):
        assert bad.verdict[f"S2D is more accurate than AdamW at W4A4 under {quantizer}"] == "not reproduced"
    assert good.verdict["S2D leaves full precision as it is"] == "reproduced"


def test_reported_table_joins_tables_6_and_11():
    wide = reported_pcdr_selection().pivot(index="bits", columns="variant", values="value")
    assert wide.loc["W4A4"].to_dict() == {"AdamW": 65.6, "No PCDR": 40.1, "S2D": 73.0}


def test_figures_carry_provenance_and_have_the_same_bytes_twice(tmp_path, monkeypatch):
    monkeypatch.setenv("S2D_OUTPUT", str(tmp_path))
    plotting.use_style()
    ptq = synthetic_tables(0.1)["ptq"]
    save_table(ptq, "ptq", run="unit", source={"parameters": {"seeds": [0, 1, 2]}})
    bytes_seen = []
    for _ in range(2):
        figure = plotting.accuracy_by_bits(ptq)
        paths = plotting.save_figure(figure, "accuracy", run="unit", tables=["ptq"])
        plotting.plt.close(figure)
        bytes_seen.append([path.read_bytes() for path in paths])
    assert bytes_seen[0] == bytes_seen[1]
    svg, png = paths
    assert "<text" in svg.read_text()  # text stays text, so that it can be searched and read aloud
    description = json.loads(Image.open(png).text["Description"])
    assert description["ptq"]["parameters"] == {"seeds": [0, 1, 2]}
    pixels = np.asarray(Image.open(png).convert("L"))
    assert (pixels < 250).mean() > 0.01  # something is drawn
