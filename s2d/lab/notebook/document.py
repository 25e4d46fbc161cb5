"""A notebook as a document: read, written, cleared, and the cells in it."""

from __future__ import annotations

import copy
import json
import os
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from s2d.files import write_text

PARAMETERS_TAG = "parameters"
INJECTED_TAG = "injected-parameters"
PAPERMILL_ERROR_TAG = "papermill-error-cell-tag"

# Written in place of what the kernel reports, which names the machine's exact Python version.
KERNELSPEC = {"display_name": "Python 3 (ipykernel)", "language": "python", "name": "python3"}
LANGUAGE_INFO = {
    "file_extension": ".py",
    "mimetype": "text/x-python",
    "name": "python",
    "nbconvert_exporter": "python",
    "pygments_lexer": "ipython3",
}


@contextmanager
def naming(where: object) -> Iterator[None]:
    """Say where, in front of what a ValueError in the block says.

    Args:
        where: a path, say, or the place in a notebook.

    Raises:
        ValueError: ``where: message``.

    Example:
        >>> with naming("cell 3"):
        ...     int("four")
        Traceback (most recent call last):
        ValueError: cell 3: invalid literal for int() with base 10: 'four'

    Paper: none
    """
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None


def load(path: str | os.PathLike[str]) -> Any:
    """Read a notebook of format 4.

    Args:
        path: the notebook.

    Returns:
        Its content, as nbformat has it, with an id for every cell.

    Raises:
        ValueError: in one line, for anything else.

    Paper: none
    """
    import nbformat

    with naming(path):
        data = _read_json(Path(path))
        if not isinstance(data, dict) or data.get("nbformat") != 4 or not isinstance(data.get("cells"), list):
            raise ValueError("not a notebook of format 4; open it in JupyterLab and save it again")
        _give_ids(data)
        try:
            nbformat.validate(data)
        except nbformat.ValidationError as error:
            raise ValueError(f"not a valid notebook ({str(error).splitlines()[0]})") from None
        return nbformat.v4.reads(json.dumps(data))


def _read_json(path: Path) -> object:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError("no such notebook") from None
    except OSError as error:
        raise ValueError(f"cannot be read ({error.strerror})") from None
    except ValueError as error:
        raise ValueError(f"not a notebook, not even JSON ({error})") from None


def _give_ids(data: dict[str, Any]) -> None:
    """Cell ids came with 4.5. nbformat would make random ones, and a run could not be repeated byte by byte."""
    minor = data.get("nbformat_minor")
    data["nbformat_minor"] = max(5, minor) if isinstance(minor, int) else 5
    cells = [(index, cell) for index, cell in enumerate(data["cells"]) if isinstance(cell, dict)]
    for index, cell in cells:
        cell.setdefault("id", f"cell-{index}")
    repeated = [name for name, count in Counter(str(cell["id"]) for _, cell in cells).items() if count > 1]
    if repeated:
        raise ValueError(f"cell id {repeated[0]!r} is used twice; give one of the cells another id")


def save(notebook: Any, path: str | os.PathLike[str]) -> None:
    """Write a notebook, whole or not at all.

    Args:
        notebook: from :func:`load`.
        path: the file.

    Paper: none
    """
    import nbformat

    write_text(path, nbformat.writes(notebook) + "\n")


def tags(cell: Any) -> list[str]:
    """The tags of a cell."""
    return list(cell.metadata.get("tags", []))


def tagged(notebook: Any, tag: str) -> list[tuple[int, Any]]:
    """The cells with a tag, each with its index among all cells."""
    return [(index, cell) for index, cell in enumerate(notebook.cells) if tag in tags(cell)]


def code_cells(notebook: Any) -> list[tuple[int, Any]]:
    """The cells a kernel executes, each with its index among all cells."""
    return [(i, cell) for i, cell in enumerate(notebook.cells) if cell.cell_type == "code" and cell.source.strip()]


def cleared(notebook: Any) -> Any:
    """A copy without anything an earlier run left behind, so that nothing old can look like new."""
    notebook = copy.deepcopy(notebook)
    notebook.cells = [cell for cell in notebook.cells if INJECTED_TAG not in tags(cell)]
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs = []
            cell.execution_count = None
    tidy_(notebook)
    return notebook


def tidy_(notebook: Any) -> None:
    """Drop, in place, what differs between two equal runs: times, machine paths, versions, random ids."""
    notebook.cells = [cell for cell in notebook.cells if PAPERMILL_ERROR_TAG not in tags(cell)]
    for cell in notebook.cells:
        cell.metadata.pop("papermill", None)
        cell.metadata.pop("execution", None)
        if not tags(cell):
            cell.metadata.pop("tags", None)  # papermill adds an empty list everywhere
        if INJECTED_TAG in tags(cell):
            cell.id = INJECTED_TAG
    for key in ("papermill", "widgets"):
        notebook.metadata.pop(key, None)
    notebook.metadata["kernelspec"] = dict(KERNELSPEC)
    notebook.metadata["language_info"] = dict(LANGUAGE_INFO)
