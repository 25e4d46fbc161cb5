"""A study is measured where its checkpoints are, read where they are not, and trained where it is another one."""

from __future__ import annotations

import json

import pandas as pd
import pytest

from s2d.lab import study as study_module
from s2d.lab.data import ClutteredDigits
from s2d.lab.models import DigitsViT
from s2d.lab.results import save_table
from s2d.lab.study import Study, largest_difference
from s2d.lab.training import Recipe

RECIPES = {"a": [Recipe(seed=seed, steps=1, data=ClutteredDigits(), model=DigitsViT(width=16)) for seed in (0, 1)]}
SOURCE = {"parameters": {"seeds": [0, 1], "shape": (1, 2)}, "source": "new code"}


@pytest.fixture
def repository(tmp_path, monkeypatch):
    """A repository with one committed table, and an empty store."""
    folder = tmp_path / "data" / "laptop"
    folder.mkdir(parents=True)
    (folder / "grown.csv").write_text("variant,value,note\na,0.5,\nb,0.123457,None\n")
    (folder / "grown.json").write_text(json.dumps({"parameters": {"seeds": [0, 1], "shape": [1, 2]}, "source": "old"}))
    monkeypatch.setattr(study_module, "repository_root", lambda: tmp_path)
    monkeypatch.delenv("S2D_STORE", raising=False)
    monkeypatch.setattr(study_module, "find_file", lambda recipe: None)
    monkeypatch.setattr(study_module, "obtain_checkpoints", lambda recipes: {"trained": list(recipes)})
    return tmp_path


def measure(checkpoints, factor):
    return pd.DataFrame({"measured": [str(checkpoints)], "factor": [factor]})


def test_missing_checkpoints_and_the_same_parameters_read_the_committed_table(repository, monkeypatch):
    study = Study(RECIPES, run="laptop", source=SOURCE)
    assert study.recorded and study.missing == 2
    table = study.table("grown", measure, 3)
    assert table.value.tolist() == [0.5, 0.123457] and pd.isna(table.note[0]) and table.note[1] == "None"
    assert "2 of 2 checkpoints are not here" in str(study)
    # Saved again it is the same file, and says what made it.
    monkeypatch.setenv("S2D_OUTPUT", str(repository / "again"))
    path = save_table(table, "grown", run="laptop", source=SOURCE)
    assert path.read_text() == (repository / "data" / "laptop" / "grown.csv").read_text()
    assert json.loads(path.with_suffix(".json").read_text())["source"] == "old"


@pytest.mark.parametrize(
    ("run", "name", "parameters"),
    [
        ("laptop", "grown", {"seeds": [0, 2], "shape": [1, 2]}),
        ("laptop", "unknown", SOURCE["parameters"]),
        ("smoke", "grown", SOURCE["parameters"]),
    ],
)
def test_another_study_is_trained(repository, run, name, parameters):
    table = Study(RECIPES, run=run, source={"parameters": parameters}).table(name, measure, 3)
    assert table.measured[0] == "{'trained': ['a']}" and table.factor[0] == 3


def test_a_store_of_its_own_is_trained(repository, monkeypatch):
    monkeypatch.setenv("S2D_STORE", str(repository / "scratch"))
    study = Study(RECIPES, run="laptop", source=SOURCE)
    assert not study.recorded and study.table("grown", measure, 3).factor[0] == 3


def test_checkpoints_that_are_there_are_measured(repository, monkeypatch):
    monkeypatch.setattr(study_module, "find_file", lambda recipe: repository)
    study = Study(RECIPES, run="laptop", source=SOURCE)
    assert str(study) == "measured on 2 checkpoints"
    assert study.table("grown", measure, 3).factor[0] == 3


def test_a_part_has_the_recipes_asked_for_and_is_read_like_the_whole(repository):
    whole = Study(RECIPES, run="laptop", source=SOURCE)
    part = whole.only({"a": "renamed"}, seeds=[1])
    assert [recipe.seed for recipe in part.recipes["renamed"]] == [1]
    assert part.recorded and part.table("grown", measure, 3).value[0] == 0.5


def test_a_reader_reads_what_could_be_measured(repository, monkeypatch):
    monkeypatch.setattr(study_module, "find_file", lambda recipe: repository)
    study = Study(RECIPES, run="laptop", source=SOURCE, measure=False)
    assert study.table("grown", measure, 3).value[0] == 0.5 and "measure = True" in str(study)
    assert study.only({"a": "b"}).table("grown", measure, 3).value[0] == 0.5


def test_an_exercise_reads_the_committed_table_under_its_own_label(repository):
    assert Study(RECIPES, run="mine", source=SOURCE).table("grown", measure, 3).value[0] == 0.5


TABLE = pd.DataFrame({"seed": [2, 3, 4], "accuracy": [0.5, 0.75, 0.25]})


def test_rows_measured_again_are_compared_by_name():
    again = pd.DataFrame({"seed": [4, 3], "accuracy": [0.25, 0.5]})
    assert largest_difference(TABLE, again, ["seed"], "accuracy") == 0.25


@pytest.mark.parametrize(
    ("table", "says"),
    [(TABLE.iloc[:1], "no row {'seed': 4}"), (pd.concat([TABLE, TABLE]), "rows twice that seed should name")],
)
def test_rows_that_cannot_be_compared_are_named(table, says):
    with pytest.raises(ValueError, match=says):
        largest_difference(table, TABLE.iloc[2:], ["seed"], "accuracy")
