"""What a notebook calls in its last cell, and how the runner learns of it."""

from __future__ import annotations

import json
import os
from pathlib import Path

MARKER_VARIABLE = "S2D_COMPLETION_MARKER"
"""Environment variable with the path of the completion marker, set by the runner for the kernel."""


def complete(*outputs: str | os.PathLike[str]) -> None:
    """Declare, in a notebook's last cell, that it has written what it promised.

    Prints one line, ``complete: N files``, the same with and without the runner. Under the runner it also writes the
    completion marker; without that marker the runner counts the run as failed.

    Args:
        *outputs: Files or folders the notebook promises to have written, relative to the working directory.

    Raises:
        FileNotFoundError: An output is missing or empty.

    Example:
        >>> complete()
        complete: 0 files

    Paper: none
    """
    paths = [Path(output) for output in outputs]
    for path in paths:
        state = "missing" if not path.exists() else "empty" if _is_empty(path) else None
        if state is not None:
            raise FileNotFoundError(f"complete: {path} is {state}; write it before this cell or do not promise it")
    marker = os.environ.get(MARKER_VARIABLE)
    if marker:
        Path(marker).write_text(json.dumps([Path(os.path.relpath(path)).as_posix() for path in paths]))
    print(f"complete: {len(paths)} files")


def _is_empty(path: Path) -> bool:
    return not any(path.iterdir()) if path.is_dir() else path.stat().st_size == 0
