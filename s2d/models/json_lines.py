"""Files of JSON lines, one thing a line; what is wrong is named by its line."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

T = TypeVar("T")


def read_json_lines(path: str | Path, kind: str, needs: str, parse: Callable[[Any], T]) -> list[T]:
    """What the lines of a file hold; empty ones are passed over.

    Args:
        path: of the file.
        kind: what a line is, for messages: ``"problem"``.
        needs: what a line has to have.
        parse: makes it of the decoded line; KeyError, TypeError and ValueError of it are about that line.

    Raises:
        FileNotFoundError: for a missing file, or one that ``parse`` misses, by the line.
        ValueError: for a line that is none, by its number, or a file without any.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     file = Path(folder) / "ages.jsonl"
        ...     _ = file.write_text('{"age": 3}')
        ...     read_json_lines(file, "age", "age", lambda row: row["age"])
        [3]
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no {kind}s at {path}: give a file of JSON lines, each with {needs}")
    found = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        if not line.strip():
            continue
        try:
            found.append(parse(json.loads(line)))
        except FileNotFoundError as error:
            raise FileNotFoundError(f"{path}, line {number}: {error}") from None
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(
                f"{path}, line {number} is no {kind} ({type(error).__name__}: {error}): each needs {needs}"
            ) from None
    if not found:
        raise ValueError(f"{path} has no {kind}s")
    return found
