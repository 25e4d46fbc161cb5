"""The ledger of replays: lines that are only added, and the chain that an entry needs."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest

from s2d.lab.ledger import Line, append_lines, chain, ledger_path, read_ledger


def line(old: str, new: str, kind: str = "k", cpu: str = "AVX2", steps: int = 55) -> Line:
    return Line(kind, old, new, "c0ffee", steps, "s2d=2", "2.6.0", cpu)


def test_lines_are_added_once(tmp_path: Path) -> None:
    path = tmp_path / "data" / "ledger.csv"
    assert read_ledger(path) == []
    first, second = line("a", "b", 'pretraining s2d(k_max=3, "x")'), line("b", "c")
    assert append_lines([first, second, second, line("c", "c")], path) == [first, second]
    assert read_ledger(path) == [first, second]
    before = path.read_bytes()
    assert append_lines([line("b", "c", steps=3)], path) == [] and path.read_bytes() == before
    other_cpu = line("b", "c", cpu="DEFAULT")  # another machine agrees: that is news
    assert append_lines([other_cpu], path) == [other_cpu]
    assert path.read_bytes().startswith(before) and read_ledger(path) == [first, second, other_cpu]


@pytest.mark.parametrize("text", ["", "kind,old\n", "HEADER\na,b\n", "HEADER\nk,a,b,c,many,,2.6,AVX2\n"])
def test_a_ledger_that_cannot_be_read_is_named(tmp_path: Path, text: str) -> None:
    path = tmp_path / "ledger.csv"
    append_lines([line("a", "b")], path)
    path.write_text(text.replace("HEADER", path.read_text().splitlines()[0]))
    with pytest.raises(ValueError, match="ledger.csv.*restore it with git checkout"):
        read_ledger(path)


def test_chains() -> None:
    lines = [line("a", "b"), line("c", "b"), line("c", "d"), line("a", "x", "other"), line("x", "d", "other")]
    for order in itertools.permutations(lines):
        assert chain("a", "d", "k", order) == lines[:3]
        assert chain("d", "a", "k", order) == lines[2::-1]
        assert chain("a", "d", "other", order) == lines[3:]
        assert chain("a", "x", "k", order) is None and chain("a", "d", "third", order) is None
        assert chain("q", "q", "k", order) == []
    assert chain("a", "c", "k", [line("a", "b"), line("b", "a")]) is None  # a circle ends
    shortcut = line("a", "d")
    assert chain("a", "d", "k", [*lines, shortcut]) == [shortcut]


def test_the_committed_ledger_can_be_read() -> None:
    lines = read_ledger()
    assert lines == read_ledger(ledger_path())
    assert len({(entry.kind, entry.old, entry.new, entry.cpu) for entry in lines}) == len(lines)
    assert all(entry.steps > 0 and entry.old != entry.new for entry in lines)
