"""What a notebook calls in its last cell: one line, one marker, and no broken promise."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from s2d.lab.notebook import complete
from s2d.lab.notebook.complete import MARKER_VARIABLE


def test_complete_prints_the_same_line_and_writes_the_marker(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "figures").mkdir()
    (tmp_path / "figures" / "a.svg").write_text("<svg/>")
    monkeypatch.delenv(MARKER_VARIABLE, raising=False)
    complete("figures", tmp_path / "figures" / "a.svg")
    monkeypatch.setenv(MARKER_VARIABLE, str(tmp_path / "marker"))
    complete("figures", tmp_path / "figures" / "a.svg")
    assert capsys.readouterr().out == "complete: 2 files\n" * 2
    assert json.loads((tmp_path / "marker").read_text()) == ["figures", "figures/a.svg"]


@pytest.mark.parametrize("kind", ["missing", "empty", "folder"])
def test_complete_refuses_a_broken_promise(tmp_path, monkeypatch, kind):
    monkeypatch.setenv(MARKER_VARIABLE, str(tmp_path / "marker"))
    path = tmp_path / "promised"
    if kind == "empty":
        path.touch()
    elif kind == "folder":
        path.mkdir()
    with pytest.raises(FileNotFoundError, match="promised is (missing|empty); write it"):
        complete(path)
    assert not (tmp_path / "marker").exists()


def test_module_imports_light():
    """Notebooks import it for `complete`; the packages of the runner are for the runner."""
    load = (
        "import sys, s2d.lab.notebook\n"
        "print(sorted({'timm', 'papermill', 'nbformat', 'yaml', 'zmq'} & set(sys.modules)))"
    )
    result = subprocess.run([sys.executable, "-c", load], capture_output=True, text=True, check=True)
    assert result.stdout == "[]\n"
