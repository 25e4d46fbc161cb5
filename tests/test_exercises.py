"""What the exercises say to an answer, and every exercise of every notebook done as its solution says."""

from __future__ import annotations

from pathlib import Path

import nbformat
import pytest
import yaml

from s2d.lab.exercises import check
from s2d.lab.notebook import run_notebook


@pytest.mark.parametrize(
    ("answer", "truth", "hints", "says", "is_right"),
    [
        (None, 3.0, "", "q: not answered yet", None),
        (3.0, 3.0, "", "q: 3.0 is right", True),
        (2.98, 3.0, "", "q: 2.98 is right", True),
        (3, 3.0, "", "q: 3 is right", True),
        (2.0, 3.0, {"low": "look up", "high": "look down"}, "q: 2.0 is too low; hint: look up", False),
        (9.0, 3.0, {"low": "look up", "high": "look down"}, "q: 9.0 is too high; hint: look down", False),
        (
            9.0,
            3.0,
            {9.0: "that is its square", "high": "look down"},
            "q: 9.0 is too high; hint: that is its square",
            False,
        ),
        ("fc1", "fc2", "which reads the wide side?", "q: fc1 is not it; hint: which reads the wide side?", False),
        ("fc1", "fc2", {"fc1": "it writes it"}, "q: fc1 is not it; hint: it writes it", False),
        (True, 3.0, "a number", "q: True is not it; hint: a number", False),
        ([1, 2.001], [1, 2.0], "", "q: [1, 2.001] is right", True),
        ([1], [1, 2.0], "", "q: [1] is not it", False),
        ("three", 3.0, {"low": "look up"}, "q: three is not it", False),
    ],
)
def test_an_answer_gets_what_it_deserves(answer, truth, hints, says, is_right, capsys) -> None:
    assert check("q", answer, truth, hints=hints) is is_right
    assert capsys.readouterr().out == says + "\n"


# --- the notebooks' exercises, run by papermill ---

ROOT = Path(__file__).resolve().parents[1]
EXERCISES = yaml.safe_load((ROOT / "notebooks" / "exercises.yaml").read_text())
NAMES = [f"{exercise['notebook'][:2]} {' '.join(exercise['change'])}" for exercise in EXERCISES]


def verdicts(path: Path) -> list[str]:
    """What the cell tagged 'exercise' of an executed notebook printed."""
    notebook = nbformat.read(path, as_version=4)
    (cell,) = (cell for cell in notebook.cells if "exercise" in cell.metadata.get("tags", []))
    return "".join(output.get("text", "") for output in cell.outputs).splitlines()


@pytest.mark.parametrize("exercise", EXERCISES, ids=NAMES)
def test_the_solution_of_an_exercise_is_right(exercise: dict, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("S2D_OUTPUT", str(tmp_path))
    monkeypatch.setenv("S2D_WORKERS", "1")
    notebook = ROOT / "notebooks" / f"{exercise['notebook']}.ipynb"
    answers = exercise["answers"]
    # At the laptop scale the notebook's own defaults, which read what the batch measures.
    scale = ROOT / "notebooks" / "params" / exercise.get("scale", "") / f"{exercise['notebook']}.yaml"
    changed = (yaml.safe_load(scale.read_text()) if "scale" in exercise else {}) | exercise["change"]
    changed |= {"answers": answers, "run": "mine"}
    said = verdicts(run_notebook(notebook, tmp_path / "done.ipynb", changed))
    assert len(said) == len(answers)
    for line, answer in zip(said, answers, strict=True):
        assert line.endswith("not answered yet" if answer is None else f"{answer} is right"), line
    assert not (tmp_path / "data" / "laptop").exists()


@pytest.mark.parametrize("name", sorted({exercise["notebook"] for exercise in EXERCISES}))
def test_every_exercise_has_a_folded_solution_and_is_unanswered_in_the_repository(name: str) -> None:
    path = ROOT / "notebooks" / f"{name}.ipynb"
    text = "".join(cell.source for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "markdown")
    said = verdicts(path)
    assert said and all(line.endswith("not answered yet") for line in said)
    assert text.count("<details><summary>Solution</summary>") == len(said) >= 2
    asked = [exercise["answers"] for exercise in EXERCISES if exercise["notebook"] == name]
    assert all(any(answer is not None for answer in of_one) for of_one in zip(*asked, strict=True))
