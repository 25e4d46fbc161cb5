"""The command line: parameters arrive as typed, and all bad input is found before anything is executed."""

from __future__ import annotations

from pathlib import Path

import pytest
from notebook_cells import tiny

from s2d.lab.notebook import execute, run
from s2d.lab.notebook.cli import main


@pytest.fixture
def executed(monkeypatch):
    """Replaces the execution; holds the parameters of each run that would have started."""
    runs = []

    def pretend(notebook, source, parameters, timeout):
        runs.append(parameters)
        return execute.Watch(source.stem, notebook=notebook)

    monkeypatch.setattr(run, "execute", pretend)
    return runs


BAD_OPTIONS = [
    (["-p", "sed", "1"], "unknown parameter 'sed'; did you mean 'seed'?"),
    (["-p", "zzz", "1"], "unknown parameter 'zzz'; it has seed, lr,"),
    (["-p", "seed", "1", "-p", "seed", "2"], "parameter 'seed' is given twice by -p"),
    (["-p", "seed", "0.5"], "parameter 'seed' takes int, got 0.5 (float)"),
    (["-p", "seed", "true"], "parameter 'seed' takes int, got True (bool)"),
    (["-p", "seed", "010"], "parameter 'seed' takes int, got '010' (str)"),
    (["-p", "seed", "None"], "parameter 'seed' takes int, got None (NoneType)"),
    (["-p", "lr", "fast"], "parameter 'lr' takes float, got 'fast' (str); write a number"),
    (["-p", "lr", "nan"], "parameter 'lr' takes float, got 'nan' (str)"),
    (["-p", "lr", "True"], "parameter 'lr' takes float, got True (bool)"),
    (["-p", "shuffle", "1"], "parameter 'shuffle' takes bool, got 1 (int); write true or false"),
    (["-p", "widths", "8"], "parameter 'widths' takes list, got 8 (int)"),
    (["-p", "widths", "[8, 1.5]"], "parameter 'widths[1]' takes int, got 1.5 (float)"),
    (["-p", "widths", "[]"], "parameter 'widths' is an empty list; give at least one value such as 8"),
    (["-p", "limit", "(1, 2)"], "parameter 'limit' cannot be (1, 2) (tuple)"),
    (["--timeout", "0"], "timeout must be a whole number of seconds, at least 1, got 0"),
    (["--params", "missing.yaml"], "missing.yaml: no such parameter file"),
    (["--params", "a.yaml", "--params", "b.yaml"], "--params is given twice"),
]


@pytest.mark.parametrize(("options", "message"), BAD_OPTIONS)
def test_bad_option_is_one_clear_line(tmp_path, capsys, executed, options, message):
    path, output = tiny(tmp_path), tmp_path / "out.ipynb"
    assert main(["run", str(path), str(output), *options]) == 2
    stderr = capsys.readouterr().err
    assert message in stderr and stderr.count("\n") == 1
    assert executed == [] and not output.exists()


BAD_YAML = [
    ("- seed\n", "holds a list, not a mapping"),
    ("seed\n", "holds a str, not a mapping"),
    ("seed: 1\nseed: 2\n", "parameter 'seed' is given twice"),
    ("seed: [1\n", "not YAML"),
    ("{[1]: 2}", "not YAML"),
    ("run: 003\n", "parameter 'run' takes str, got 3 (int); write it in quotes"),
    ("run: on\n", "parameter 'run' takes str, got True (bool); write it in quotes"),
    ("limit: 2024-01-01\n", "parameter 'limit' cannot be datetime.date(2024, 1, 1)"),
    ("1: 2\n", "unknown parameter 1"),
]


@pytest.mark.parametrize(("text", "message"), BAD_YAML)
def test_bad_parameter_file_is_one_clear_line(tmp_path, capsys, executed, text, message):
    params = tmp_path / "params.yaml"
    params.write_text(text)
    path, output = tiny(tmp_path), tmp_path / "out.ipynb"
    assert main(["run", str(path), str(output), "--params", str(params)]) == 2
    stderr = capsys.readouterr().err
    assert message in stderr and stderr.count("\n") == 1
    assert executed == [] and not output.exists()


GOOD_OPTIONS = [
    (["-p", "lr", "1e-4"], {"lr": 1e-4}),
    (["-p", "lr", "2"], {"lr": 2.0}),
    (["-p", "run", "003"], {"run": "003"}),
    (["-p", "run", "true", "-p", "shuffle", "true"], {"shuffle": True, "run": "true"}),
    (["-p", "names", "['fc1', 'fc2']"], {"names": ["fc1", "fc2"]}),
    (["-p", "names", "[]", "-p", "scales", "[1, 0.5]"], {"scales": [1.0, 0.5], "names": []}),
    (["-p", "limit", "null"], {"limit": None}),
    (["-p", "limit", "some text"], {"limit": "some text"}),
]


@pytest.mark.parametrize(("options", "expected"), GOOD_OPTIONS)
def test_good_option_takes_the_type_of_the_default(tmp_path, executed, options, expected):
    assert main(["run", str(tiny(tmp_path)), str(tmp_path / "out.ipynb"), *options]) == 0
    assert [repr(run) for run in executed] == [repr(expected)]  # repr tells 2.0 from 2 and sees the order


def test_option_overrides_file_and_a_file_of_comments_changes_nothing(tmp_path, executed):
    path, params = tiny(tmp_path), tmp_path / "params.yaml"
    arguments = ["run", str(path), str(tmp_path / "out.ipynb"), "--params", str(params)]
    params.write_text("lr: 1e-3\nseed: 5\n")
    assert main([*arguments, "-p", "seed", "6"]) == 0
    params.write_text("# the defaults\n")
    assert main(arguments) == 0
    assert executed == [{"seed": 6, "lr": 1e-3}, {}]


BAD_NOTEBOOKS = {
    "text": ("not json", "not even JSON"),
    "list": ("[]", "not a notebook of format 4"),
    "old": ('{"nbformat": 3, "worksheets": []}', "not a notebook of format 4"),
    "cell": ('{"nbformat": 4, "nbformat_minor": 5, "metadata": {}, "cells": [{"a": 1}]}', "not a valid notebook"),
}


@pytest.mark.parametrize("command", ["run", "refresh", "check"])
@pytest.mark.parametrize("kind", [*BAD_NOTEBOOKS, "missing", "folder"])
def test_bad_notebook_is_bad_input(tmp_path, capsys, executed, command, kind):
    text, message = BAD_NOTEBOOKS.get(kind, ("", {"missing": "no such notebook", "folder": "cannot be read"}.get(kind)))
    path = tmp_path / "bad.ipynb"
    if kind == "folder":
        path.mkdir()
    elif kind != "missing":
        path.write_text(text)
    assert main([command, str(path), *([str(tmp_path / "out.ipynb")] if command == "run" else [])]) == 2
    stderr = capsys.readouterr().err
    assert message in stderr and stderr.count("\n") == 1 and executed == []


def test_bad_last_notebook_stops_refresh_before_the_first(tmp_path, executed):
    assert main(["refresh", str(tiny(tmp_path)), str(tmp_path / "missing.ipynb")]) == 2
    assert executed == []


def test_output_must_be_another_notebook(tmp_path, executed):
    path = tiny(tmp_path)
    (tmp_path / "file").write_text("")
    for output, message in [
        (path, "is the source itself"),
        (tmp_path / "out.txt", "must be an .ipynb file"),
        (tmp_path / "file" / "out.ipynb", "cannot be made a folder"),
        (Path("/proc/out.ipynb"), "/proc: not writable"),
    ]:
        with pytest.raises(ValueError, match=message):
            run.run_notebook(path, output)
    assert executed == []


def test_command_line_without_a_command_is_bad_input():
    with pytest.raises(SystemExit) as caught:
        main([])
    assert caught.value.code == 2
