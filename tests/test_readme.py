"""The pages tell the truth: their code runs, their links lead somewhere, their numbers are those of the tables."""

from __future__ import annotations

import re
from pathlib import Path

import pandas as pd
import pytest
import torch

from s2d.lab import pages
from s2d.lab.figures.registry import table_writers

ROOT = Path(__file__).resolve().parents[1]
GUIDES = ("README.md", "docs/on_your_model.md", "docs/quantize.md", "docs/real_networks.md", "docs/train.md")


@pytest.mark.parametrize("page", GUIDES)
def test_every_python_block_runs(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # one of them saves a model
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(encoding="utf-8"), re.DOTALL)
    assert len(blocks) >= 2
    model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.GELU(), torch.nn.Linear(16, 4))
    batch = torch.randn(32, 8)
    names = {"model": model, "batch": batch, "weight": model[0].weight}
    names["optimizer"] = torch.optim.AdamW(model.parameters())
    for block in blocks:
        exec(compile(block, page, "exec"), names)
    if "decay" in names:
        model(batch).sum().backward()
        names["optimizer"].step()
        assert len(names["decay"].report()) == 2


@pytest.mark.parametrize(
    "page", [*GUIDES, "RESULTS.md", "REPRODUCING.md", "CONTRIBUTING.md", "figures/README.md", "data/laptop/README.md"]
)
def test_links_lead_somewhere(page):
    path = ROOT / page
    for target in re.findall(r"\]\(([^)#]+)\)", path.read_text(encoding="utf-8")):
        if not target.startswith("http"):
            assert (path.parent / target).exists(), target


@pytest.mark.parametrize("page", pages.PAGES)
def test_every_computed_part_is_what_the_tables_give(page):
    text = (ROOT / page).read_text(encoding="utf-8")
    assert pages.BLOCK.search(text)
    assert pages.fill(text) == text, "run python -m s2d.lab.pages"


def test_the_list_of_tables_names_the_notebook_that_writes_each():
    listed = {}
    for line in (ROOT / "data/laptop/README.md").read_text(encoding="utf-8").splitlines():
        if row := re.match(r"\| (`.*?) \| ([\d, ]+) \|", line):
            listed |= dict.fromkeys(re.findall(r"`(\w+)`", row[1]), row[2].split(", "))
    writers = {table: notebook[:2] for table, notebook in table_writers().items() if "/" not in table}
    assert set(listed) == set(writers)
    assert all(writers[table] in numbers for table, numbers in listed.items())


def test_a_reader_gets_through_the_readme_in_a_minute():
    prose = re.sub(r"```.*?```", "", (ROOT / "README.md").read_text(encoding="utf-8"), flags=re.DOTALL)
    assert len(prose.split()) <= 900


def test_cells_are_means_and_deviations_over_seeds_in_points(monkeypatch):
    methods = ("RTN, symmetric", "RepQ-ViT", "ERQ")
    rows = [("a", seed, "FP", "FP", full) for seed, full in ((0, 0.9), (1, 0.8))]
    rows += [("a", seed, method, "W4A4", 0.7) for seed in (0, 1) for method in methods]
    rows += [("a", seed, method, "W3A3", 0.5) for seed in (0, 1) for method in methods]
    table = pd.DataFrame(rows, columns=["variant", "seed", "method", "bits", "accuracy"])
    monkeypatch.setattr(pages, "load_table", lambda name, run: table)
    assert pages.fine_tuning().splitlines()[-1] == "| a | 85.0 ± 7.1 | 70.0 ± 0.0 | 70.0 ± 0.0 | 50.0 ± 0.0 |"
    # Within a seed: 20 and 10 points, not the difference of the means with the spread of either.
    assert pages.points_lost().splitlines()[-1].startswith("| a | 15.0 ± 7.1 |")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("<!-- computed: nonsense -->\n<!-- end -->", "no computed part 'nonsense'"),
        ("<!-- computed: claims -->", "no end"),
    ],
)
def test_a_page_with_a_wrong_mark_is_refused(text, message):
    with pytest.raises(ValueError, match=message):
        pages.fill(text)
