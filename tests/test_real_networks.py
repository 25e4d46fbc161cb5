"""Reports of the command ``s2d`` put together as tables, and the pages that are computed from them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from s2d.command import main
from s2d.lab import pages, real_networks

SHAPE = {"img_size": 16, "patch_size": 8, "embed_dim": 16, "depth": 1, "num_heads": 2, "num_classes": 3}
MODEL = ["vit_tiny_patch16_224", "--model-options", json.dumps(SHAPE)]


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("S2D_OUTPUT", str(tmp_path))
    images = torch.randn(80, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    save_file({"images": images}, "data.safetensors")
    assert main(["diagnose", *MODEL, "--data", "data.safetensors", "--images", "80", "--json", "one.json"]) == 0
    report = json.loads(Path("one.json").read_text())
    report["layers"][1]["finding"] = "spectral"
    Path("ill.json").write_text(json.dumps(report))
    arguments = ["--steps", "4", "--look-every", "2", "--held", "16", "--bits", "W8A8,W4A4", "-o", "out"]
    assert main(["condition", *MODEL, "--data", "data.safetensors", *arguments]) == 0
    return tmp_path


def test_reports_become_tables(here: Path, capsys: pytest.CaptureFixture) -> None:
    report = json.loads(Path("one.json").read_text())
    table = real_networks.diagnosis_table([Path("one.json"), Path("ill.json")])
    ill = report["layers"][1:2]
    assert table.layer.tolist() == [row["layer"] for row in ill]
    assert table.sigma_1.tolist() == [row["sigma_1"][1] for row in ill]
    assert table.pcdr_1.tolist() == [row["pcdr"][0] for row in ill] and set(table.layers) == {len(report["layers"])}
    run = json.loads(Path("out/report.json").read_text())
    (row,) = real_networks.conditioning_table([Path("out")]).to_dict("records")
    assert (row["max_abs_before"], row["max_abs"]) == (run["before"]["max_abs"], run["after"]["max_abs"])
    assert row["W4A4"] == run["rtn_error"]["after"]["W4A4"] and row["fidelity"] == run["test"]["fidelity"]
    real_networks.main(["inputs", "one.json", "one.json"])
    saved = Path("data/real/inputs.csv").read_text().splitlines()
    assert len(saved) == 1 + len(report["layers"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["diagnosis", "nowhere.json"], "is no report"),
        (["diagnosis", "one.json"], "no layer of these reports has outliers"),
        (["diagnosis", "out/report.json"], "no report of s2d diagnose"),
        (["conditioning", "nowhere"], "is no report"),
        (["inputs", "one.json"], "give two reports"),
    ],
)
def test_what_is_no_report_is_refused(arguments: list[str], message: str, here: Path, capsys) -> None:
    with pytest.raises(SystemExit):
        real_networks.main(arguments)
    assert message in capsys.readouterr().err


def test_the_page_says_what_the_committed_tables_say() -> None:
    from s2d.lab.results import load_table

    table = load_table("diagnosis", run="real")
    text = pages.diagnosis()
    for network, layers in table.groupby("network"):
        assert f"| {network} | {len(layers)} of {layers.layers.iloc[0]}" in text
        assert f"`{layers.loc[layers.max_abs.idxmax(), 'layer']}`" in text
    rows = load_table("conditioning", run="real")
    assert pages.conditioning().count("\n") == len(rows) + 2
    # What the text beside the tables rests on: threefold, faithful, and rounding at six bits hardly better for it.
    best = rows[rows.form == "spectral-norm cap"].iloc[0]
    assert best.max_abs < best.max_abs_before / 3 and best.fidelity > 0.98
    assert 0.8 < best.W6A6 / best.W6A6_before < 1
    inputs = load_table("inputs", run="real")
    assert (inputs.input_ratio_after / inputs.input_ratio_before).between(0.7, 1.1).all()
