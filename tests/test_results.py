"""Tables on disk: what is read is what was measured, the bytes are the same every time, and errors say what to do."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

import s2d
from s2d.lab import results
from s2d.lab.results import load_sources, load_table, provenance, save_table, source_hash

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
        source = provenance("01_test", {"seed": 0, "bits": ["W4A4"]})
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
    source = provenance("01_test", {"seed": 0, "lr": 1e-3, "bits": ["FP", "W4A4"], "steps": None, "fast": True})
    path = save_table(TABLE, "ptq", run="laptop", source=source)
    assert json.loads(path.with_suffix(".json").read_text(encoding="utf-8")) == source
    assert load_sources(["ptq"], run="laptop") == {"ptq": source}


def test_a_new_table_replaces_the_old(output: Path) -> None:
    save_table(TABLE, "ptq", run="laptop", source=SOURCE)
    save_table(TABLE[:1], "ptq", run="laptop", source=SOURCE | {"notebook": "02"})
    assert len(load_table("ptq", run="laptop")) == 1
    assert load_sources(["ptq"], run="laptop")["ptq"]["notebook"] == "02"


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
        load_sources(["ptq"], run=run)
    assert not output.exists()


def test_a_missing_table_says_how_to_make_it(output: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no table data/gpu/ptq.csv: run `make figures SCALE=gpu`"):
        load_table("ptq", run="gpu")


def test_what_was_just_written_wins_over_what_is_committed(output: Path) -> None:
    committed = results.repository_root() / "data" / "laptop"
    committed.mkdir(parents=True)
    (committed / "ptq.csv").write_text("x\n1\n")
    (committed / "ptq.json").write_text('{"notebook": "committed"}')
    (committed / "other.json").write_text('{"notebook": "other"}')
    assert load_table("ptq", run="laptop").x.tolist() == [1]
    save_table(pd.DataFrame({"x": [2]}), "ptq", run="laptop", source={"notebook": "new"})
    assert load_table("ptq", run="laptop").x.tolist() == [2]
    assert (committed / "ptq.csv").read_text() == "x\n1\n"
    sources = load_sources(["ptq", "other", "none"], run="laptop")
    assert sources == {"ptq": {"notebook": "new"}, "other": {"notebook": "other"}}


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
    made = provenance("02_quantize", given)
    assert set(made) == {"notebook", "parameters", "source", "versions"}
    assert made["notebook"] == "02_quantize" and made["parameters"] == given
    assert made["versions"]["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert set(made["versions"]) > {"python", "torch", "timm", "numpy"}
    given["seed"] = 4
    assert made["parameters"]["seed"] == 3


def test_provenance_has_no_times_and_no_machine() -> None:
    import os
    import platform
    import time

    texts = [json.dumps(provenance("01", {"seed": 0}), sort_keys=True) for _ in range(2)]
    assert texts[0] == texts[1]
    assert not re.search(r"\d{4}-\d\d-\d\d|\d\d:\d\d", texts[0])
    assert str(int(time.time()))[:6] not in texts[0]
    machine = {platform.node(), os.getcwd(), str(Path.home()), platform.machine(), platform.release()}
    assert not [name for name in machine if len(name) > 3 and name in texts[0]]


def test_the_source_hash_changes_with_the_code_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "s2d"
    ignore = shutil.ignore_patterns("__pycache__")
    shutil.copytree(Path(s2d.__file__).parent, package, ignore=ignore)
    monkeypatch.setattr(results, "__file__", str(package / "lab" / "results.py"))
    copied = source_hash()
    monkeypatch.undo()
    assert copied == source_hash()  # where the package lies does not matter
    monkeypatch.setattr(results, "__file__", str(package / "lab" / "results.py"))
    seen = {copied}
    (package / "notes.txt").write_text("not code")
    assert source_hash() == copied
    for change in (
        lambda: (package / "bound.py").write_text((package / "bound.py").read_text() + "x = 1\n"),
        lambda: (package / "new.py").write_text(""),
        lambda: (package / "new.py").rename(package / "lab" / "new.py"),
    ):
        change()
        assert source_hash() not in seen
        seen.add(source_hash())


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
