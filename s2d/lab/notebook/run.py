"""Run a notebook into another file, or refresh it in place, whole or not at all."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from s2d.files import can_write
from s2d.lab.notebook.document import cleared, load, naming, save
from s2d.lab.notebook.execute import NotebookError, execute
from s2d.lab.notebook.parameters import defaults_of, resolve


def run_notebook(
    source: str | os.PathLike[str],
    output: str | os.PathLike[str],
    parameters: Mapping[str, object] | None = None,
    *,
    timeout: int | None = None,
) -> Path:
    """Execute a notebook with other parameters and store it elsewhere, whole or not at all.

    Everything about the input is checked before the first cell runs. Progress goes to stderr, what the cells print
    goes through as it comes. Two runs of a deterministic notebook write the same bytes. A failed run leaves an older
    output as it was and keeps what it has beside it, as ``<output stem>.failed.ipynb``.

    Args:
        source: The notebook; the kernel works in its folder.
        output: Where to store the executed notebook (``.ipynb``); its folder is made if need be.
        parameters: Values that replace defaults; each must be a parameter of the notebook and of its type.
        timeout: Seconds one cell may take, at least 1; None for no limit.

    Returns:
        The path of the output.

    Raises:
        ValueError: Bad input; nothing was executed.
        NotebookError: The notebook failed; the message names the cell, the error and the notebook kept.
        KeyboardInterrupt: Interrupted, with the same message.

    Example:
        >>> run_notebook("notebooks/01_origins.ipynb", "out/01.ipynb", {"seed": 1})  # doctest: +SKIP
        PosixPath('out/01.ipynb')

    Paper: none
    """
    source, output = Path(source), Path(output)
    notebook, values = _checked(source, parameters or {}, timeout)
    if output.suffix != ".ipynb" or output.is_dir():
        raise ValueError(f"{output}: the output must be an .ipynb file")
    if output.resolve() == source.resolve():
        raise ValueError(f"{output}: the output is the source itself; use refresh, or give another output")
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"{output.parent}: cannot be made a folder ({error.strerror})") from None
    if not can_write(output):
        raise ValueError(f"{output.parent}: not writable; give another output")
    _run_to(source, notebook, output, values, timeout)
    return output


def refresh_notebook(path: str | os.PathLike[str], *, timeout: int | None = None) -> None:
    """Execute a notebook at its defaults and store the outputs in the notebook itself.

    On failure the notebook stays as it was, and what there is is kept beside it as ``<stem>.failed.ipynb``.

    Args:
        path: The notebook.
        timeout: Seconds one cell may take, at least 1; None for no limit.

    Raises:
        ValueError: Bad input; nothing was executed.
        NotebookError: The notebook failed.
        KeyboardInterrupt: Interrupted.

    Paper: none
    """
    path = Path(path)
    notebook, values = _checked(path, {}, timeout)
    _run_to(path, notebook, path, values, timeout)


def _checked(source: Path, parameters: Mapping[str, object], timeout: int | None) -> tuple[Any, dict[str, object]]:
    """The notebook and the values of its parameters, if all of the input is sound."""
    if timeout is not None and (type(timeout) is not int or timeout < 1):
        raise ValueError(f"timeout must be a whole number of seconds, at least 1, got {timeout!r}")
    notebook = load(source)
    with naming(source):
        return notebook, resolve(parameters, defaults_of(notebook))


def _run_to(source: Path, notebook: Any, output: Path, parameters: dict[str, object], timeout: int | None) -> None:
    """Execute and store: the result at output, or what there is of it beside output as ``<stem>.failed.ipynb``."""
    failed = output.with_name(f"{output.stem}.failed.ipynb")
    watch = execute(cleared(notebook), source, parameters, timeout)
    if watch.failure is None:
        save(watch.notebook, output)
        failed.unlink(missing_ok=True)
        return
    save(watch.notebook, failed)
    ename, evalue = watch.failure
    message = f"{watch.label()}: {ename}: {' '.join(evalue.split())}; kept as {failed}"
    raise (KeyboardInterrupt if watch.interrupted else NotebookError)(message)
