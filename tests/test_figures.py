"""Published figures: the registry, the batch and the folder agree; a file changes with its tables and drawing alone."""

from __future__ import annotations

import hashlib
import inspect
import json
from pathlib import Path

import matplotlib
import numpy as np
import pandas as pd
import pytest
from PIL import Image

from s2d.lab import dependencies
from s2d.lab.figures import claims, registry, style
from s2d.lab.figures.ptq import ptq_accuracy
from s2d.lab.figures.registry import draw_all, index, published, sections, write_index
from s2d.lab.paper import load_paper_table
from s2d.lab.results import load_table, save_table

matplotlib.use("agg")

ROOT = Path(__file__).resolve().parents[1]
FIGURES = [figure for figures in sections().values() for figure in figures]


@pytest.fixture
def output(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("S2D_OUTPUT", str(tmp_path))
    style.use_style()
    return tmp_path


def ptq_table(level: float = 0.7) -> pd.DataFrame:
    return pd.DataFrame(
        [
            {"variant": "AdamW", "seed": seed, "grid": grid, "bits": bits, "accuracy": accuracy}
            for seed in range(3)
            for grid in ("symmetric", "asymmetric")
            for bits, accuracy in (("FP", 0.9), ("W4A4", level))
        ]
    )


# --- the registry ---


def test_the_planner_reads_what_the_registry_holds():
    """The batch plans by the decorators' text; what runs is what they registered."""
    assert dependencies.published_figures() == {figure.name: list(figure.tables) for figure in FIGURES}


def test_every_file_of_drawings_is_a_section():
    modules = {path.stem for path in (ROOT / "s2d" / "lab" / "figures").glob("*.py")}
    assert set(sections()) == modules - {"__init__", "registry", "style"}
    assert all(sections().values())


@pytest.mark.parametrize("figure", FIGURES, ids=lambda figure: figure.name)
def test_drawing_and_finding_take_the_tables(figure):
    for function in (figure.draw, figure.finding):
        needed = [p for p in inspect.signature(function).parameters.values() if p.default is p.empty]
        assert len(needed) == len(figure.tables)
    assert figure.caption.endswith(".")


def test_two_figures_of_a_name_are_refused(monkeypatch):
    monkeypatch.setattr(registry, "_FIGURES", [])

    def bound(table):
        """A caption."""

    assert published(tables=["bound"], finding=str)(bound) is bound
    with pytest.raises(ValueError, match="there are two figures bound: they would overwrite each other"):
        published(tables=["bound"], finding=str)(bound)


def test_a_figure_without_a_caption_is_refused(monkeypatch):
    monkeypatch.setattr(registry, "_FIGURES", [])
    with pytest.raises(ValueError, match="figure bare has no docstring"):

        @published(tables=["bound"], finding=str)
        def bare(table):
            return table

    assert registry._FIGURES == []


def test_the_list_of_figures_is_the_registry(output):
    text = index()
    assert [line.split("`")[1] for line in text.splitlines() if line.startswith("| `")] == [f.name for f in FIGURES]
    assert "| `bound_tightness` | " in text and "| `bound.csv` | 03_bound_and_pcdr | Theorem 1 (A.1) |" in text
    assert write_index().read_text() == text == (ROOT / "figures" / "README.md").read_text()
    assert write_index() == output / "figures" / "README.md"


# --- drawing all of a section ---


def test_a_section_is_drawn_saved_and_shown(output, monkeypatch):
    shown, open_before = [], style.mpl.pyplot.get_fignums()
    monkeypatch.setattr("IPython.display.display", lambda *things: shown.extend(things))
    written = draw_all("bound", run="laptop")
    names = [figure.name for figure in sections()["bound"]]
    expected = [f"{name}.{kind}" for name in names for kind in ("svg", "png")]
    assert [path.relative_to(output / "figures" / "laptop").as_posix() for path in written] == expected
    assert all(path.stat().st_size > 5000 for path in written)
    bound = load_table("bound", run="laptop")
    finding = shown[0].data
    assert "bound_tightness" in finding and f"Of {len(bound)} layers 0 exceed" in finding
    assert f"{bound.tightness.max():.3f}" in finding
    assert style.mpl.pyplot.get_fignums() == open_before


def test_an_unknown_section_is_named():
    with pytest.raises(ValueError, match="no section 'spectra': choose one of testbed, origins, bound"):
        draw_all("spectra", run="laptop")


def test_a_missing_table_says_which_notebook(output, monkeypatch):
    monkeypatch.setattr("IPython.display.display", lambda *things: None)
    with pytest.raises(FileNotFoundError, match="no table data/elsewhere/bound.csv: run `make figures"):
        draw_all("bound", run="elsewhere")
    assert not (output / "figures").exists()


# --- files ---


def files(table: pd.DataFrame, source: dict) -> list[bytes]:
    save_table(table, "ptq", run="unit", source=source)
    figure = ptq_accuracy(table)
    paths = style.save_figure(figure, "ptq_accuracy", run="unit", tables=["ptq"])
    style.mpl.pyplot.close(figure)
    return [path.read_bytes() for path in paths]


def test_files_have_the_same_bytes_while_table_and_drawing_are_the_same(output):
    first = files(ptq_table(), {"source": "1"})
    assert files(ptq_table(), {"source": "1"}) == first
    assert files(ptq_table(), {"source": "2", "versions": {"torch": "9"}}) == first  # the table's own provenance
    other = files(ptq_table(0.6), {"source": "1"})
    assert all(a != b for a, b in zip(first, other, strict=True))


def test_files_carry_the_digest_of_their_tables(output):
    files(ptq_table(), {"source": "1"})
    folder = output / "figures" / "unit"
    digest = hashlib.sha256((output / "data" / "unit" / "ptq.csv").read_bytes()).hexdigest()
    image = Image.open(folder / "ptq_accuracy.png")
    assert json.loads(image.text["Description"]) == {"ptq": digest}
    svg = (folder / "ptq_accuracy.svg").read_text()
    assert digest in svg and "<dc:date>" not in svg
    assert "<text" in svg  # text stays text, so that it can be searched and read aloud
    assert (np.asarray(image.convert("L")) < 250).mean() > 0.01  # something is drawn


# --- findings follow the numbers ---


def test_symmetric_and_asymmetric_grids_are_not_mixed():
    table = ptq_table()
    table.loc[table.grid == "asymmetric", "accuracy"] = 0.1
    finding = next(figure.finding for figure in FIGURES if figure.name == "ptq_accuracy")
    assert finding(table) == "Mean test accuracy at FP: AdamW 90.0. Mean test accuracy at W4A4: AdamW 70.0."


def test_violations_are_counted():
    finding = next(figure.finding for figure in FIGURES if figure.name == "bound_tightness")
    table = pd.DataFrame({"layer": ["a", "b"], "tightness": [0.5, 1.25], "holds": [True, False]})
    assert finding(table) == "Of 2 layers 1 exceed the bound; the closest, b, reaches 1.250 of it."


def test_what_selection_buys_on_both_sides():
    finding = next(figure.finding for figure in FIGURES if figure.name == "measured_and_reported")
    rows = [("S2D", 0.5), ("No PCDR", 0.75), ("AdamW", 0.5)]
    frontier = pd.DataFrame(
        [{"variant": v, "seed": 3, "method": "ERQ", "bits": "W4A4", "accuracy": a} for v, a in rows]
    )
    said = finding(frontier, load_paper_table(6), load_paper_table(11))
    assert "reported: W6A6 +1.5; W5A5 +4.8; W4A4 +32.9." in said and "measured: W4A4 -25.0." in said


def test_reported_table_joins_tables_6_and_11():
    wide = claims.reported_pcdr_selection(load_paper_table(6), load_paper_table(11))
    wide = wide.pivot(index="bits", columns="variant", values="value")
    assert wide.loc["W4A4"].to_dict() == {"AdamW": 65.6, "No PCDR": 40.1, "S2D": 73.0}
