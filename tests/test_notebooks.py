"""The committed notebooks keep to the template, agree with the recipes, and the batch knows them all."""

from __future__ import annotations

import re
from pathlib import Path

import nbformat
import pytest
import yaml

from s2d.lab.dependencies import published_figures
from s2d.lab.notebook import check_notebook, read_parameters
from s2d.lab.recipes import (
    ABLATION_SEEDS,
    EVIDENCE_SEEDS,
    FINETUNE_STEPS,
    INTERVENTION_SEEDS,
    PRETRAIN_STEPS,
    SEEDS,
    VARIANTS,
)

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOKS = sorted(ROOT.glob("notebooks/[0-9][0-9]_*.ipynb"))
SEEDS_OF = {"10_origin_evidence": INTERVENTION_SEEDS, "11_ablations": ABLATION_SEEDS, "12_frontier": EVIDENCE_SEEDS}
SCALES = sorted(path.name for path in (ROOT / "notebooks" / "params").iterdir())


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_template(path):
    assert check_notebook(path) == []


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_defaults_are_the_recipes_of_the_committed_store(path):
    expected = {
        "seeds": list(SEEDS_OF.get(path.stem, SEEDS)),
        "adamw_steps": PRETRAIN_STEPS["adamw"],
        "sgd_steps": PRETRAIN_STEPS["sgd"],
        "finetune_steps": FINETUNE_STEPS,
        "variants": list(VARIANTS),
        "run": "laptop",
    }
    defaults = read_parameters(path)
    assert {name: defaults[name] for name in expected if name in defaults} == {
        name: value for name, value in expected.items() if name in defaults
    }


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_every_scale_names_known_parameters_and_its_own_output(path, scale):
    overrides = yaml.safe_load((ROOT / "notebooks" / "params" / scale / f"{path.stem}.yaml").read_text()) or {}
    defaults = read_parameters(path)
    assert set(overrides) <= set(defaults)
    assert (defaults | overrides)["run"] == {"paper": "paper_scale"}.get(scale, scale)  # data/paper is the paper's


def test_shared_parameters_agree_between_the_notebooks_of_a_scale():
    """A fine-tuning notebook that expects other pretraining steps than the first would train everything again."""
    for scale in SCALES:
        seen: dict[str, object] = {}
        for path in NOTEBOOKS:
            overrides = yaml.safe_load((ROOT / "notebooks" / "params" / scale / f"{path.stem}.yaml").read_text()) or {}
            for name, value in (read_parameters(path) | overrides).items():
                if name in ("adamw_steps", "sgd_steps", "finetune_steps", "width", "depth", "canvas"):
                    assert seen.setdefault(name, value) == value, (scale, path.stem, name)


def test_the_readme_knows_every_notebook():
    readme = (ROOT / "README.md").read_text()
    assert [path.name for path in NOTEBOOKS if f"notebooks/{path.name}" not in readme] == []


def test_committed_figures_are_those_the_batch_draws():
    figures = ROOT / "figures" / "laptop"
    expected = {f"{name}.{kind}" for name in published_figures() for kind in ("svg", "png")}
    assert {path.name for path in figures.iterdir()} == expected


@pytest.mark.parametrize("place", range(len(NOTEBOOKS)), ids=lambda place: NOTEBOOKS[place].stem)
def test_every_notebook_leads_to_the_one_before_the_next_and_the_guides(place):
    last = nbformat.read(NOTEBOOKS[place], as_version=4).cells[-1]
    linked = set(re.findall(r"\]\(([^)#]+)", last.source))
    around = NOTEBOOKS[max(place - 1, 0) : place] + NOTEBOOKS[place + 1 : place + 2]
    assert linked == {path.name for path in around} | {"../README.md", "../docs/on_your_model.md"}
    assert all((ROOT / "notebooks" / target).exists() for target in linked)
