"""The ledger ``data/laptop/ledger.csv``: which versions of the code were seen to train the same, bit for bit.

One line is one replay (:mod:`s2d.lab.replay`) of one kind of recipe: code hash before, code hash after, and on how
many steps they were equal. Lines are only added. An entry of the store may be used while a chain of lines leads from
the code that made it to today's.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable
from dataclasses import astuple, dataclass, fields
from pathlib import Path

from s2d.files import write_text
from s2d.lab.paths import repository_root


@dataclass(frozen=True)
class Line:
    """One replay that was equal.

    Attributes:
        kind: of the recipe (:func:`s2d.lab.identity.kind`).
        old, new: code hashes (:func:`s2d.lab.identity.code_hash`).
        commit: that of the old code.
        steps: how many steps were equal, first and last window together.
        versions: those above 1, such as ``"s2d=2"``.
        torch: its version.
        cpu: the kernels torch chose, such as ``"AVX2"``.
    """

    kind: str
    old: str
    new: str
    commit: str
    steps: int
    versions: str
    torch: str
    cpu: str


def ledger_path() -> Path:
    """The committed ledger."""
    return repository_root() / "data" / "laptop" / "ledger.csv"


def read_ledger(path: Path | None = None) -> list[Line]:
    """The lines of the ledger; none where there is no file.

    Raises:
        ValueError: if a line cannot be read.
    """
    path = ledger_path() if path is None else path
    if not path.exists():
        return []
    names = [f.name for f in fields(Line)]
    rows = list(csv.reader(io.StringIO(path.read_text(encoding="utf-8"))))
    if not rows or rows[0] != names:
        raise ValueError(f"{path} has not the columns {', '.join(names)}: restore it with git checkout")
    for number, row in enumerate(rows[1:], start=2):
        if len(row) != len(names) or not row[names.index("steps")].isdigit():
            raise ValueError(f"{path}, line {number}, cannot be read ({','.join(row)}): restore it with git checkout")
    return [Line(**dict(zip(names, row, strict=True)) | {"steps": int(row[4])}) for row in rows[1:]]


def append_lines(lines: Iterable[Line], path: Path | None = None) -> list[Line]:
    """Add the lines that the ledger does not hold yet.

    Returns:
        Those that were new. A line that says no more than an older one (same kind, code and kernels) is not.
    """
    path = ledger_path() if path is None else path
    present = read_ledger(path)
    known = {(line.kind, line.old, line.new, line.cpu) for line in present}
    added = []
    for line in lines:
        if line.old != line.new and (line.kind, line.old, line.new, line.cpu) not in known:
            known.add((line.kind, line.old, line.new, line.cpu))
            added.append(line)
    if added:
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(f.name for f in fields(Line))
        writer.writerows(astuple(line) for line in present + added)
        write_text(path, text.getvalue())
    return added


def chain(old: str, new: str, kind: str, lines: Iterable[Line]) -> list[Line] | None:
    """The shortest way from one code hash to another over replays of one kind; equality has no direction.

    Returns:
        The lines in order, none where the hashes are equal already; None where no chain leads there.

    Example:
        >>> ab, bc = (Line("k", *pair, "c0ffee", 50, "", "2.6", "AVX2") for pair in (("a", "b"), ("b", "c")))
        >>> len(chain("c", "a", "k", [ab, bc])), chain("a", "d", "k", [ab, bc])
        (2, None)
    """
    ways: dict[str, list[Line]] = {old: []}
    waiting = [old]
    own = [line for line in lines if line.kind == kind]
    while waiting:
        here = waiting.pop(0)
        if here == new:
            return ways[here]
        for line in own:
            for there in {line.old: [line.new], line.new: [line.old]}.get(here, []):
                if there not in ways:
                    ways[there] = [*ways[here], line]
                    waiting.append(there)
    return None
