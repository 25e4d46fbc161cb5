"""The README tells the truth: its code runs, its links lead somewhere, its numbers are those of the tables."""

from __future__ import annotations

import re
from pathlib import Path

import pandas as pd
import pytest
import torch

from s2d.lab.recipes import CONTROLS, DECOUPLED, EVIDENCE_SEEDS, EVIDENCE_VARIANTS

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_every_python_block_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # one of them saves a model
    blocks = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert len(blocks) >= 2
    model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.GELU(), torch.nn.Linear(16, 4))
    batch = torch.randn(32, 8)
    names = {"model": model, "batch": batch, "weight": model[0].weight, "torch": torch}
    names["optimizer"] = torch.optim.AdamW(model.parameters())
    for block in blocks:
        exec(compile(block, "README.md", "exec"), names)
    model(batch).sum().backward()
    names["optimizer"].step()
    assert len(names["decay"].report()) == 2


def test_links_lead_somewhere():
    for page in (ROOT / "README.md", ROOT / "figures" / "README.md"):
        for target in re.findall(r"\]\(([^)#]+)\)", page.read_text(encoding="utf-8")):
            if not target.startswith("http"):
                assert (page.parent / target).exists(), target


def percent(table: pd.DataFrame, variant: str, grid: str, bits: str) -> str:
    values = 100 * table.query("variant == @variant and grid == @grid and bits == @bits").accuracy
    return f"{values.mean():.1f} ± {values.std():.1f}"


COLUMNS = [("symmetric", "FP"), ("symmetric", "W4A4"), ("asymmetric", "W4A4"), ("asymmetric", "W3A3")]


@pytest.mark.parametrize(
    ("row", "variant"),
    [
        ("AdamW, weight decay 0.01", "AdamW"),
        ("AdamW, tuned weight decay (0.5)", "AdamW, tuned weight decay"),
        ("No PCDR: every component", "No PCDR"),
        ("Top 3 of every layer, unselected", "Top 3 of every layer"),
        ("S2D: up to 3 components where PCDR selects", "S2D"),
    ],
)
def test_finetuning_rows_are_those_of_the_table(row, variant):
    table = pd.read_csv(ROOT / "data" / "laptop" / "ptq.csv")
    cells = [percent(table, variant, grid, bits) for grid, bits in COLUMNS]
    assert f"| {row} | {' | '.join(cells)} |" in README


@pytest.mark.parametrize("optimizer", ["AdamW", "SGD"])
def test_pretraining_rows_are_those_of_the_table(optimizer):
    table = pd.read_csv(ROOT / "data" / "laptop" / "origins_ptq.csv")
    kurtosis = pd.read_csv(ROOT / "data" / "laptop" / "origins_outliers.csv").query("variant == @optimizer")
    cells = [f"{kurtosis.excess_kurtosis.mean():.1f} ± {kurtosis.excess_kurtosis.std():.1f}"]
    cells += [percent(table, optimizer, grid, bits) for grid, bits in COLUMNS]
    assert f"| {optimizer} | {' | '.join(cells)} |" in README


@pytest.mark.parametrize("variant", ["SGD", "AdamW", "S2D", "No PCDR"])
def test_method_rows_are_those_of_the_table(variant):
    table = pd.read_csv(ROOT / "data" / "laptop" / "ptq_methods.csv").query("variant == @variant")
    mean = 100 * table.groupby(["bits", "method"]).accuracy.mean()
    cells = [
        f"{mean[bits, method]:.1f}" for bits in ("W4A4", "W3A3") for method in ("RTN", "PTQ4ViT", "RepQ-ViT", "ERQ")
    ]
    assert f"| {variant} | {mean['FP', 'FP']:.1f} | {' | '.join(cells)} |" in README


def test_other_quantization_figures_are_those_of_the_tables():
    qat = pd.read_csv(ROOT / "data" / "laptop" / "ptq_qat.csv")
    mean = 100 * qat.groupby(["variant", "training"]).accuracy.mean().unstack()
    for variant in ("AdamW", "S2D"):
        assert f"{variant} {mean.PTQ[variant]:.1f} to {mean.QAT[variant]:.1f}" in README
    table = pd.read_csv(ROOT / "data" / "laptop" / "ptq_conditioning.csv").query("bits == 'W4A4'")
    mean = 100 * table.groupby(["conditioning", "variant"]).accuracy.mean().unstack()
    for name in ("none", "SmoothQuant", "rotation"):
        assert f"{name} {mean.AdamW[name]:.1f} / {mean.S2D[name]:.1f}" in README
    assert (pd.read_csv(ROOT / "data" / "laptop" / "ptq_int8.csv").agreement == 1).all()


EVIDENCE = [
    ("FP", "FP"),
    ("RTN", "W4A4"),
    ("RTN, asymmetric", "W4A4"),
    ("ERQ", "W4A4"),
    ("RTN", "W3A3"),
    ("RepQ-ViT", "W3A3"),
    ("ERQ", "W3A3"),
]


@pytest.mark.parametrize("variant", [*EVIDENCE_VARIANTS, *CONTROLS])
def test_evidence_rows_are_those_of_the_table(variant):
    table = pd.read_csv(ROOT / "data" / "laptop" / "frontier.csv").query("variant == @variant")
    assert table.seed.nunique() == len(EVIDENCE_SEEDS)
    accuracy = 100 * table.set_index(["method", "bits"]).accuracy
    cells = [f"{accuracy[cell].mean():.1f} ± {accuracy[cell].std():.1f}" for cell in EVIDENCE]
    assert f"| {variant} | {' | '.join(cells)} |" in README


def test_verdicts_and_targets_are_counted_right():
    verdicts = pd.read_csv(ROOT / "data" / "laptop" / "claims.csv").verdict.value_counts()
    counted = [f"{verdicts[name]} {name}" for name in ("reproduced", "not reproduced", "undecided")]
    assert f"Of {verdicts.sum()} claims {counted[0]}, {counted[1]}, {counted[2]}" in README
    reach = pd.read_csv(ROOT / "data" / "laptop" / "frontier_reach.csv")
    for variant, name in ((DECOUPLED, "decoupled spectral decay"), ("Spectral-norm cap", "the cap")):
        own = reach[reach.variant == variant]
        assert f"{name} reaches {own.reached.sum()} of {len(own)}" in README


def test_intervention_figures_are_those_of_the_table():
    table = pd.read_csv(ROOT / "data" / "laptop" / "origins_interventions.csv").query("moment == 'end'")
    mean = table.groupby("variant")[["excess_kurtosis", "validation_accuracy"]].mean()
    for variant in ("AdamW, lr 2e-3", "AdamW, rotated basis", "Muon"):
        row = mean.loc[variant]
        assert f"| {variant} | {row.excess_kurtosis:.1f} | {100 * row.validation_accuracy:.1f} |" in README


def test_theorem_figures_are_those_of_the_table():
    bound = pd.read_csv(ROOT / "data" / "laptop" / "bound.csv")
    assert bound.holds.all()
    assert f"all {len(bound)} layers checked ({bound.tokens.sum():,} inputs)" in README
    assert (bound.upper / bound.lower - 1).max() <= 0.001
