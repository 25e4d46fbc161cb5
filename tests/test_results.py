"""Tables on disk: what is read is what was measured, the bytes are the same every time, and errors say what to do."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

import s2d
from s2d.lab import dependencies, results
from s2d.lab.results import load_table, provenance, save_table, table_digests

SOURCE = {"notebook": "01_test", "parameters": {"seed": 0}}
TABLE = pd.DataFrame(
    {
        "variant": ["AdamW", "S2D, tuned", 'a "quoted" one', "ü"],
        "seed": [0, 1, 2, 1000000],
        "images": [1588, 16777217, 3, -4],
        "accuracy": [0.123456, 1.0, 1e-12, np.nan],
        "kurtosis": [1.5e30, -0.25, 3.0, 123456.0],
        "holds": [True, False, True, True],
    }
)


@pytest.fixture
def output(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where results go, and a repository without any."""
    monkeypatch.setenv("S2D_OUTPUT", str(tmp_path / "output"))
    monkeypatch.setattr(results, "repository_root", lambda: tmp_path / "repository")
    return tmp_path / "output"


# --- tables ---


def test_round_trip(output: Path) -> None:
    path = save_table(TABLE, "ptq", run="laptop", source=SOURCE)
    assert path == output / "data" / "laptop" / "ptq.csv"
    pd.testing.assert_frame_equal(load_table("ptq", run="laptop"), TABLE)


def test_six_digits_are_kept(output: Path) -> None:
    values = np.array([np.pi, 1e5 * np.pi, 1e-20 * np.pi, 2 / 3, 0.1])
    save_table(pd.DataFrame({"x": values}), "digits", run="laptop", source=SOURCE)
    got = load_table("digits", run="laptop").x.to_numpy()
    np.testing.assert_allclose(got, values, rtol=5e-6)
    assert not np.array_equal(got, values)  # so that tables do not differ in the last bits of a sum


def test_words_that_look_like_nothing_are_words(output: Path) -> None:
    table = pd.DataFrame({"criterion": ["None", "NA", "null", "nan", "FP"], "lam": [None, 0.1, None, 0.2, 0.3]})
    save_table(table, "words", run="laptop", source=SOURCE)
    pd.testing.assert_frame_equal(load_table("words", run="laptop"), table)


def test_two_files_and_no_others(output: Path) -> None:
    save_table(TABLE, "ptq", run="laptop", source=SOURCE)
    save_table(TABLE, "ptq", run="laptop", source=SOURCE)
    assert sorted(p.relative_to(output).as_posix() for p in output.rglob("*") if p.is_file()) == [
        "data/laptop/ptq.csv",
        "data/laptop/ptq.json",
    ]


def test_the_same_bytes_every_time(output: Path) -> None:
    def save() -> list[bytes]:
        source = provenance("s2d.lab.tuning", {"seed": 0, "bits": ["W4A4"]})
        path = save_table(TABLE, "ptq", run="laptop", source=source)
        return [path.read_bytes(), path.with_suffix(".json").read_bytes()]

    first = save()
    assert save() == first
    assert all(b"\r" not in content and content.endswith(b"\n") for content in first)
    # The order in which parameters are written down does not show.
    reordered = {"versions": {}, "notebook": "01"}, {"notebook": "01", "versions": {}}
    texts = [save_table(TABLE, "o", run="laptop", source=s).with_suffix(".json").read_bytes() for s in reordered]
    assert texts[0] == texts[1]


def test_the_sidecar_is_the_source(output: Path) -> None:
    given = {"seed": 0, "lr": 1e-3, "bits": ["FP", "W4A4"], "steps": None, "fast": True}
    source = provenance("s2d.lab.tuning", given)
    path = save_table(TABLE, "ptq", run="laptop", source=source)
    assert json.loads(path.with_suffix(".json").read_text(encoding="utf-8")) == source


def test_a_new_table_replaces_the_old(output: Path) -> None:
    save_table(TABLE, "ptq", run="laptop", source=SOURCE)
    path = save_table(TABLE[:1], "ptq", run="laptop", source=SOURCE | {"notebook": "02"})
    assert len(load_table("ptq", run="laptop")) == 1
    assert json.loads(path.with_suffix(".json").read_text())["notebook"] == "02"


def test_runs_do_not_mix(output: Path) -> None:
    save_table(TABLE[:1], "ptq", run="smoke", source=SOURCE)
    save_table(TABLE[:2], "ptq", run="laptop", source=SOURCE)
    assert [len(load_table("ptq", run=run)) for run in ("smoke", "laptop")] == [1, 2]


@pytest.mark.parametrize("table", [pd.DataFrame(), TABLE[:0], pd.DataFrame(index=[0, 1])])
def test_an_empty_table_is_refused(table: pd.DataFrame, output: Path) -> None:
    with pytest.raises(ValueError, match="table ptq has no rows: nothing was measured"):
        save_table(table, "ptq", run="laptop", source=SOURCE)
    assert not output.exists()


@pytest.mark.parametrize("run", ["", ".", "..", ".hidden", "a/b", "../laptop", "/tmp"])
def test_strange_run_labels_are_refused(run: str, output: Path) -> None:
    message = f"run is {re.escape(repr(run))}: give a plain label"
    with pytest.raises(ValueError, match=message):
        save_table(TABLE, "ptq", run=run, source=SOURCE)
    with pytest.raises(ValueError, match=message):
        load_table("ptq", run=run)
    with pytest.raises(ValueError, match=message):
        table_digests(["ptq"], run=run)
    assert not output.exists()


def test_a_missing_table_says_how_to_make_it(output: Path) -> None:
    for read in (load_table, lambda name, run: table_digests([name], run=run)):
        with pytest.raises(FileNotFoundError, match="no table data/gpu/ptq.csv: run `make figures SCALE=gpu`"):
            read("ptq", run="gpu")


def test_a_name_with_a_run_in_it_is_the_same_at_every_scale(output: Path) -> None:
    save_table(TABLE, "tuning", run="laptop", source=SOURCE)
    pd.testing.assert_frame_equal(load_table("laptop/tuning", run="smoke"), TABLE)
    assert table_digests(["laptop/tuning"], run="smoke").keys() == {"laptop/tuning"}
    for name in ("../tuning", "data/laptop/tuning", "/tuning"):
        with pytest.raises((ValueError, FileNotFoundError), match="plain label|no table data/smoke"):
            load_table(name, run="smoke")


def test_a_readers_own_runs_read_the_committed_tables_where_they_made_none(output: Path) -> None:
    committed = results.repository_root() / "data" / "laptop"
    committed.mkdir(parents=True)
    (committed / "bound.csv").write_text("y\n1\n")
    assert load_table("bound", run="mine").columns.tolist() == ["y"]
    save_table(pd.DataFrame({"x": [1]}), "bound", run="mine", source={})
    assert load_table("bound", run="mine").columns.tolist() == ["x"]
    with pytest.raises(FileNotFoundError, match="data/smoke/bound.csv"):
        load_table("bound", run="smoke")


def test_digests_are_of_the_bytes(output: Path) -> None:
    path = save_table(TABLE, "ptq", run="laptop", source=SOURCE)
    digests = table_digests(["ptq"], run="laptop")
    assert digests == {"ptq": hashlib.sha256(path.read_bytes()).hexdigest()}
    save_table(TABLE, "ptq", run="laptop", source=SOURCE | {"source": "another"})
    assert table_digests(["ptq"], run="laptop") == digests
    save_table(TABLE[:2], "ptq", run="laptop", source=SOURCE)
    assert table_digests(["ptq"], run="laptop") != digests


def test_what_was_just_written_wins_over_what_is_committed(output: Path) -> None:
    committed = results.repository_root() / "data" / "laptop"
    committed.mkdir(parents=True)
    (committed / "ptq.csv").write_text("x\n1\n")
    assert load_table("ptq", run="laptop").x.tolist() == [1]
    before = table_digests(["ptq"], run="laptop")
    save_table(pd.DataFrame({"x": [2]}), "ptq", run="laptop", source={"notebook": "new"})
    assert load_table("ptq", run="laptop").x.tolist() == [2]
    assert (committed / "ptq.csv").read_text() == "x\n1\n"
    assert table_digests(["ptq"], run="laptop") != before


def test_without_s2d_output_results_go_to_the_repository(monkeypatch: pytest.MonkeyPatch) -> None:
    from s2d.lab.paths import output_root, repository_root

    assert (repository_root() / "pyproject.toml").is_file()
    for value in (None, ""):
        monkeypatch.delenv("S2D_OUTPUT", raising=False)
        if value is not None:
            monkeypatch.setenv("S2D_OUTPUT", value)
        assert output_root() == repository_root()
    monkeypatch.setenv("S2D_OUTPUT", "/somewhere/else")
    assert output_root() == Path("/somewhere/else")


# --- provenance ---


def test_provenance_says_what_a_reader_needs() -> None:
    import torch

    given = {"seed": 3, "bits": ["W4A4"]}
    made = provenance("s2d.lab.tuning", given)
    assert set(made) == {"notebook", "parameters", "source", "versions"}
    assert made["notebook"] == "s2d.lab.tuning" and made["parameters"] == given
    assert made["versions"]["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert set(made["versions"]) > {"python", "torch", "timm", "numpy"}
    given["seed"] = 4
    assert made["parameters"]["seed"] == 3


def test_provenance_has_no_times_and_no_machine() -> None:
    import os
    import platform
    import time

    texts = [json.dumps(provenance("s2d.lab.tuning", {"seed": 0}), sort_keys=True) for _ in range(2)]
    assert texts[0] == texts[1]
    assert not re.search(r"\d{4}-\d\d-\d\d|\d\d:\d\d", texts[0])
    assert str(int(time.time()))[:6] not in texts[0]
    machine = {platform.node(), os.getcwd(), str(Path.home()), platform.machine(), platform.release()}
    assert not [name for name in machine if len(name) > 3 and name in texts[0]]


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the package and of one notebook, to be edited."""
    package = tmp_path / "s2d"
    shutil.copytree(Path(s2d.__file__).parent, package, ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "notebooks").mkdir()
    shutil.copy(Path(s2d.__file__).parents[1] / "notebooks" / "03_bound_and_pcdr.ipynb", tmp_path / "notebooks")
    monkeypatch.setattr(dependencies, "PACKAGE", package)
    monkeypatch.setattr(results, "repository_root", lambda: tmp_path)
    return package


def test_the_source_hash_covers_what_a_table_depends_on(package: Path) -> None:
    def source() -> str:
        return provenance("03_bound_and_pcdr", {})["source"]

    first = source()
    for name, changes in {
        "bound.py": True,  # imported by the notebook itself
        "spectral.py": True,  # through other modules
        "lab/evaluate.py": True,
        "lab/figures/bound.py": False,  # drawings
        "lab/figures/style.py": False,
        "lab/claims.py": False,  # of other notebooks
        "ptq/command/run.py": False,
    }.items():
        path = package / name
        before = path.read_text()
        path.write_text("# a comment\n" + before.replace(".\n", "!\n", 1))  # docstrings come first
        assert source() == first, name
        path.write_text(before + "\nx = 1\n")
        assert (source() != first) == changes, name
        path.write_text(before)
    assert source() == first


def test_a_notebook_that_is_not_there_has_no_provenance(package: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no notebook notebooks/09_new.ipynb: give the stem"):
        provenance("09_new", {})


# --- writing ---


def test_a_table_that_cannot_be_written_leaves_both_old_files(output: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = save_table(TABLE, "ptq", run="laptop", source=SOURCE)
    before = path.read_bytes(), path.with_suffix(".json").read_bytes()
    with pytest.raises(TypeError):
        save_table(TABLE[:1], "ptq", run="laptop", source={"notebook": object()})
    broken = TABLE[:1].copy()
    monkeypatch.setattr(pd.DataFrame, "to_csv", lambda *a, **k: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        save_table(broken, "ptq", run="laptop", source=SOURCE | {"notebook": "02"})
    assert (path.read_bytes(), path.with_suffix(".json").read_bytes()) == before
