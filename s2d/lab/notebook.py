"""Run, refresh and check notebooks strictly.

papermill executes the cells, but alone it lets a misspelled parameter, a dead kernel or a ``sys.exit(0)`` pass for a
success. Here every parameter is checked before anything runs, the notebook itself has to report that it reached its
end (:func:`complete`), and the output file appears whole or not at all::

    python -m s2d.lab.notebook run notebooks/01_origins.ipynb out/01_origins.ipynb --params params/smoke/01_origins.yaml
    python -m s2d.lab.notebook refresh notebooks/01_origins.ipynb
    python -m s2d.lab.notebook check notebooks/*.ipynb

Exit codes: 0 all well; 1 a notebook failed or has findings; 2 bad input, nothing was executed; 130 interrupted.

The kernel is always the Python that runs this module, and it works in the folder of the source notebook, as under
nbval and in JupyterLab.

Paper: none
"""

# Notebooks import this module for `complete`, so its own imports stay in the standard library; nbformat and papermill
# are imported where they are used.
from __future__ import annotations

import argparse
import ast
import copy
import difflib
import json
import logging
import os
import re
import signal
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from s2d.files import can_write, write_text

__all__ = [
    "NotebookError",
    "check_notebook",
    "complete",
    "main",
    "read_parameters",
    "refresh_notebook",
    "run_notebook",
]

MARKER_VARIABLE = "S2D_COMPLETION_MARKER"
PARAMETERS_TAG = "parameters"
INJECTED_TAG = "injected-parameters"
PAPERMILL_ERROR_TAG = "papermill-error-cell-tag"
CHECK_OUTPUT_TAG = "nbval-check-output"
HIDING_TAGS = {"hide-cell", "hide-input", "remove-cell", "remove-input"}

# Written in place of what the kernel reports, which names the machine's exact Python version.
KERNELSPEC = {"display_name": "Python 3 (ipykernel)", "language": "python", "name": "python3"}
LANGUAGE_INFO = {
    "file_extension": ".py",
    "mimetype": "text/x-python",
    "name": "python",
    "nbconvert_exporter": "python",
    "pygments_lexer": "ipython3",
}

# A path counts as absolute where no name or dot stands before its first slash: `../work/x` and `a.org/home/` do not.
MACHINE_PATH = re.compile(r"(?<![\w.~-])/(?:home|root|tmp|work|Users)/[^\s\"']*")
MAGIC_LINE = re.compile(r"^\s*[%!?]|\?\s*$|=\s*[%!]")

REPAIRS = {
    bool: "write true or false",
    int: "write a whole number",
    float: "write a number such as 0.1",
    str: "write it in quotes",
    list: "write a list such as [1, 2]",
    dict: "write a mapping such as {name: 1}",
}


class NotebookError(RuntimeError):
    """A notebook started but did not reach its end."""


# --- called from inside a notebook -----------------------------------------------------------------------------------


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
        if not path.exists():
            raise FileNotFoundError(f"complete: {path} is missing; write it before this cell or do not promise it")
        if _is_empty(path):
            raise FileNotFoundError(f"complete: {path} is empty; write it before this cell or do not promise it")
    marker = os.environ.get(MARKER_VARIABLE)
    if marker:
        Path(marker).write_text(json.dumps([Path(os.path.relpath(path)).as_posix() for path in paths]))
    print(f"complete: {len(paths)} files")


def _is_empty(path: Path) -> bool:
    return not any(path.iterdir()) if path.is_dir() else path.stat().st_size == 0


# --- reading and writing notebooks -----------------------------------------------------------------------------------


def _load(path: str | os.PathLike[str]) -> Any:
    """Read a version 4 notebook; ValueError, in one line, for anything else."""
    import nbformat

    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
        data = json.loads(text)
    except FileNotFoundError:
        raise ValueError(f"{path}: no such notebook") from None
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror})") from None
    except ValueError as error:
        raise ValueError(f"{path}: not a notebook, not even JSON ({error})") from None
    if not isinstance(data, dict) or data.get("nbformat") != 4 or not isinstance(data.get("cells"), list):
        raise ValueError(f"{path}: not a notebook of format 4; open it in JupyterLab and save it again")
    # Cell ids came with 4.5. nbformat would make random ones, and a run could not be repeated byte by byte.
    minor = data.get("nbformat_minor")
    data["nbformat_minor"] = max(5, minor) if isinstance(minor, int) else 5
    for index, cell in enumerate(data["cells"]):
        if isinstance(cell, dict):
            cell.setdefault("id", f"cell-{index}")
    ids = Counter(str(cell["id"]) for cell in data["cells"] if isinstance(cell, dict))
    repeated = [name for name, count in ids.items() if count > 1]
    if repeated:
        raise ValueError(f"{path}: cell id {repeated[0]!r} is used twice; give one of the cells another id")
    try:
        nbformat.validate(data)
    except nbformat.ValidationError as error:
        raise ValueError(f"{path}: not a valid notebook ({str(error).splitlines()[0]})") from None
    return nbformat.v4.reads(json.dumps(data))


def _write(notebook: Any, path: Path) -> None:
    import nbformat

    write_text(path, nbformat.writes(notebook) + "\n")


def _tags(cell: Any) -> list[str]:
    return list(cell.metadata.get("tags", []))


def _code_cells(notebook: Any) -> list[tuple[int, Any]]:
    """The cells a kernel executes, each with its index among all cells."""
    return [(i, cell) for i, cell in enumerate(notebook.cells) if cell.cell_type == "code" and cell.source.strip()]


def _cleared(notebook: Any) -> Any:
    """A copy without anything an earlier run left behind, so that nothing old can look like new."""
    notebook = copy.deepcopy(notebook)
    notebook.cells = [cell for cell in notebook.cells if INJECTED_TAG not in _tags(cell)]
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs = []
            cell.execution_count = None
    _tidy(notebook)
    return notebook


def _tidy(notebook: Any) -> None:
    """Drop, in place, what differs between two equal runs: times, machine paths, versions, random ids."""
    notebook.cells = [cell for cell in notebook.cells if PAPERMILL_ERROR_TAG not in _tags(cell)]
    for cell in notebook.cells:
        cell.metadata.pop("papermill", None)
        cell.metadata.pop("execution", None)
        if not _tags(cell):
            cell.metadata.pop("tags", None)  # papermill adds an empty list everywhere
        if INJECTED_TAG in _tags(cell):
            cell.id = INJECTED_TAG
    for key in ("papermill", "widgets"):
        notebook.metadata.pop(key, None)
    notebook.metadata["kernelspec"] = dict(KERNELSPEC)
    notebook.metadata["language_info"] = dict(LANGUAGE_INFO)


# --- parameters ------------------------------------------------------------------------------------------------------


def read_parameters(path: str | os.PathLike[str]) -> dict[str, object]:
    """Read the default parameters of a notebook without executing it.

    Args:
        path: The notebook.

    Returns:
        Name to default value, in the order of the ``parameters`` cell.

    Raises:
        ValueError: Not a notebook, not exactly one ``parameters`` cell, or a line in it that is not
            ``name = literal``.

    Example:
        >>> read_parameters("notebooks/01_origins.ipynb")  # doctest: +SKIP
        {'seed': 0, 'lr': 0.0001, 'run': 'laptop'}

    Paper: none
    """
    return _defaults(_load(path), path)


def _defaults(notebook: Any, path: str | os.PathLike[str]) -> dict[str, object]:
    tagged = [(i, cell) for i, cell in enumerate(notebook.cells) if PARAMETERS_TAG in _tags(cell)]
    if len(tagged) != 1:
        raise ValueError(f"{path}: {len(tagged)} cells are tagged 'parameters'; tag exactly one code cell")
    index, cell = tagged[0]
    if cell.cell_type != "code":
        raise ValueError(f"{path}: cell {index} is tagged 'parameters' but is not code; tag the code cell instead")
    try:
        statements = ast.parse(cell.source).body
    except SyntaxError as error:
        raise ValueError(f"{path}: cell {index} (parameters), line {error.lineno}: {error.msg}") from None
    defaults: dict[str, object] = {}
    for statement in statements:
        where = f"{path}: cell {index} (parameters), line {statement.lineno}"
        name, value = _assignment(statement, where)
        if name in defaults:
            raise ValueError(f"{where}: parameter {name!r} is set twice; keep one line")
        defaults[name] = value
    return defaults


def _assignment(statement: ast.stmt, where: str) -> tuple[str, object]:
    """Name and value of ``name = literal`` or ``name: type = literal``."""
    targets = statement.targets if isinstance(statement, ast.Assign) else [getattr(statement, "target", None)]
    value = getattr(statement, "value", None)
    is_assignment = isinstance(statement, (ast.Assign, ast.AnnAssign)) and value is not None
    if not is_assignment or len(targets) != 1 or not isinstance(targets[0], ast.Name):
        raise ValueError(f"{where}: {ast.unparse(statement)!r} is not a parameter; write 'name: type = literal'")
    name = targets[0].id
    try:
        default = ast.literal_eval(value)
    except (ValueError, TypeError, MemoryError, RecursionError):
        raise ValueError(
            f"{where}: the default of {name!r} is {ast.unparse(value)!r}, not a literal; "
            "write the value out, or derive it in the next cell"
        ) from None
    _require_plain(name, default, where=f"{where}: ")
    return name, default


def _require_plain(name: str, value: object, where: str = "") -> None:
    """Allow only values that papermill writes into a cell unchanged (it turns a tuple into a string, for one)."""
    if type(value) in (bool, int, float, str, type(None)):
        return
    if type(value) is list:
        for i, item in enumerate(value):
            _require_plain(f"{name}[{i}]", item, where)
    elif type(value) is dict and all(type(key) is str for key in value):
        for key, item in value.items():
            _require_plain(f"{name}[{key!r}]", item, where)
    else:
        raise ValueError(
            f"{where}parameter {name!r} cannot be {value!r} ({type(value).__name__}); "
            "use bool, int, float, str, None, a list of them, or a dict with string keys"
        )


def _resolve(given: Mapping[str, object], defaults: Mapping[str, object], path: Path) -> dict[str, object]:
    """The given parameters, checked against the notebook's own, in the notebook's order."""
    for name in given:
        if name not in defaults:
            close = difflib.get_close_matches(str(name), defaults, n=1)
            hint = f"did you mean {close[0]!r}?" if close else f"it has {', '.join(defaults) or 'none'}"
            raise ValueError(f"{path}: unknown parameter {name!r}; {hint}")
    try:
        return {name: _coerce(name, given[name], default) for name, default in defaults.items() if name in given}
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def _coerce(name: str, value: object, default: object) -> object:
    """The value as the type of the default: exact, but for an int or a string such as '1e-4' where a float is due."""
    _require_plain(name, value)
    if default is None:
        return value
    if isinstance(default, float):
        value = _as_float(value)
    if type(value) is not type(default):
        raise ValueError(
            f"parameter {name!r} takes {type(default).__name__}, got {value!r} ({type(value).__name__}); "
            f"{REPAIRS[type(default)]}"
        )
    if isinstance(value, list) and isinstance(default, list) and default:
        if not value:
            raise ValueError(f"parameter {name!r} is an empty list; give at least one value such as {default[0]!r}")
        model = next((item for item in default if isinstance(item, float)), default[0])
        return [_coerce(f"{name}[{i}]", item, model) for i, item in enumerate(value)]
    return value


def _as_float(value: object) -> object:
    """An int, or a string that reads as a number, as a float; anything else unchanged."""
    if isinstance(value, str):  # YAML 1.1 takes 1e-4 for a string: it wants 1.0e-4
        number = _literal(value)
        value = number if type(number) in (int, float) else value
    return float(value) if type(value) is int else value


def _literal(text: str) -> object:
    """What the text means as a Python literal; the text itself where it is none."""
    words = {"true": True, "false": False, "null": None}
    try:
        return words[text] if text in words else ast.literal_eval(text.strip())
    except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):
        return text


def _read_yaml(path: Path) -> dict[str, object]:
    """Parameters from a YAML mapping; an empty file, or one of comments only, changes nothing."""
    import yaml

    try:
        text = path.read_text(encoding="utf-8")
        node = yaml.compose(text, Loader=yaml.SafeLoader)
        data = yaml.safe_load(text)
    except FileNotFoundError:
        raise ValueError(f"{path}: no such parameter file") from None
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror})") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not YAML ({' '.join(str(error).split())})") from None
    if data is None:
        return {}
    if not isinstance(data, dict):
        raise ValueError(f"{path}: holds a {type(data).__name__}, not a mapping; write one 'name: value' a line")
    names = Counter(key.value for key, _ in node.value)
    repeated = [name for name, count in names.items() if count > 1]
    if repeated:
        raise ValueError(f"{path}: parameter {repeated[0]!r} is given twice; keep one line")
    return data


def _read_options(pairs: Sequence[Sequence[str]], defaults: Mapping[str, object]) -> dict[str, object]:
    """Parameters from ``-p NAME VALUE``: a string parameter takes its text as it stands, so ``-p run 003`` is '003'."""
    options: dict[str, object] = {}
    for name, text in pairs:
        if name in options:
            raise ValueError(f"parameter {name!r} is given twice by -p; give it once")
        options[name] = text if isinstance(defaults.get(name), str) else _literal(text)
    return options


# --- executing -------------------------------------------------------------------------------------------------------


@dataclass
class _Watch:
    """Follows one run: reports each cell, and holds the live notebook, which papermill drops when it fails."""

    name: str
    notebook: Any = None
    cell: Any = None
    position: int = 0
    total: int = 0
    began: float = 0.0
    failure: tuple[str, str] | None = None  # ename and evalue, as Jupyter calls them
    interrupted: bool = False

    def on_start(self, notebook: Any) -> None:
        self.notebook = notebook
        self.total = len(_code_cells(notebook))

    def on_cell_start(self, cell: Any, cell_index: int) -> None:
        self.cell = cell
        self.position += 1
        self.began = time.monotonic()
        _say(f"{self.label()} ... {cell.source.strip().splitlines()[0][:60]}")

    def on_cell_end(self, cell: Any, cell_index: int, execute_reply: dict[str, Any]) -> None:
        content = execute_reply["content"]
        seconds = f"{time.monotonic() - self.began:.1f} s"
        if content["status"] != "ok":
            from papermill.exceptions import strip_color

            self.failure = (content.get("ename", "Error"), content.get("evalue", ""))
            _say(f"{self.label()} ... failed after {seconds}")
            _say(strip_color("\n".join(content.get("traceback", []))))
            return
        _say(f"{self.label()} ... {seconds}")
        # exit() raises nothing: the kernel goes away a moment later, perhaps after some more cells.
        if any(item.get("source") == "ask_exit" for item in content.get("payload", [])):
            self.failure = ("SystemExit", "exit() called in a cell")
            raise NotebookError(self.failure[1])

    def label(self) -> str:
        where = f"cell {self.position}/{self.total}" if self.position else "before the first cell"
        return f"[{self.name}] {where}"

    def fail(self, ename: str, evalue: str) -> None:
        """Note a failure that no cell raised, and store it in the cell so that the notebook shows it."""
        if self.failure is None:
            self.failure = (ename, evalue)
        stored = self.cell is not None and any(output.output_type == "error" for output in self.cell.outputs)
        if self.cell is not None and not stored:
            import nbformat

            ename, evalue = self.failure
            error = nbformat.v4.new_output("error", ename=ename, evalue=evalue, traceback=[f"{ename}: {evalue}"])
            self.cell.outputs.append(error)


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _kernel_manager(folder: Path, environment: dict[str, str]) -> type:
    """A kernel manager for this very interpreter: an installed 'python3' kernel may belong to another one."""
    import zmq
    from ipykernel.kernelspec import get_kernel_dict
    from jupyter_client.kernelspec import KernelSpec
    from jupyter_client.manager import AsyncKernelManager

    class ThisPython(AsyncKernelManager):
        def __init__(self, **kwargs: Any) -> None:
            super().__init__(**kwargs)
            if zmq.has("ipc"):  # sockets in our own folder: kernels side by side can race for one TCP port
                self.transport = "ipc"
                self.connection_file = str(folder / "kernel.json")

        @property
        def kernel_spec(self) -> KernelSpec:
            quiet = ["--log-level=CRITICAL"]  # what a kernel logs while it is stopped is noise beside our one line
            return KernelSpec(**get_kernel_dict(extra_arguments=quiet), env=environment)

    return ThisPython


def _execute(notebook: Any, source: Path, parameters: dict[str, object], timeout: int | None) -> _Watch:
    """Execute a cleared notebook; the returned watch holds the notebook as far as it got, and the failure if any."""
    import papermill

    watch = _Watch(source.stem, notebook=notebook)
    with tempfile.TemporaryDirectory(prefix="s2d-notebook-") as folder:
        marker = Path(folder) / "complete.json"
        try:
            papermill.execute_notebook(
                notebook,
                None,  # papermill would save half a notebook here after every cell
                parameters,
                kernel_name="python3",
                kernel_manager_class=_kernel_manager(Path(folder), {MARKER_VARIABLE: str(marker)}),
                resources={"metadata": {"path": str(source.resolve().parent)}},  # the kernel's working directory
                request_save_on_cell_execute=False,
                progress_bar=False,
                stdout_file=sys.stdout,
                stderr_file=sys.stderr,
                start_timeout=120,
                execution_timeout=timeout,
                iopub_timeout=60,  # the default of 4 s fails sound cells on a busy machine
                force_raise_errors=True,  # even in a cell tagged raises-exception
                skip_cells_with_tag="",  # no tag may skip a cell
                coalesce_streams=True,  # how a stream is cut into pieces is chance
                record_timing=False,
                on_notebook_start=watch.on_start,
                on_cell_execute=watch.on_cell_start,
                on_cell_executed=watch.on_cell_end,
            )
        except KeyboardInterrupt:
            watch.interrupted = True
            watch.fail("KeyboardInterrupt", "the runner was interrupted")
            # nbclient's interrupted task may still see the kernel go, and nobody awaits it: a traceback after our line.
            logging.getLogger("asyncio").addFilter(_not_dead_kernel)
        except Exception as error:  # whatever papermill, nbclient or the kernel raised, the run has failed
            watch.fail(type(error).__name__, (str(error).strip().splitlines() or [""])[0])
        if watch.failure is None and not (marker.is_file() and watch.position == watch.total):
            watch.fail("Incomplete", "stopped before its last cell: complete() was not reached")
    _tidy(watch.notebook)
    return watch


def _not_dead_kernel(record: logging.LogRecord) -> bool:
    return not (record.exc_info and getattr(record.exc_info[0], "__name__", "") == "DeadKernelError")


def _run_to(source: Path, notebook: Any, output: Path, parameters: dict[str, object], timeout: int | None) -> None:
    """Execute and store: the result at output, or what there is of it beside output as ``<stem>.failed.ipynb``."""
    failed = output.with_name(f"{output.stem}.failed.ipynb")
    watch = _execute(_cleared(notebook), source, parameters, timeout)
    if watch.failure is None:
        _write(watch.notebook, output)
        failed.unlink(missing_ok=True)
        return
    _write(watch.notebook, failed)
    ename, evalue = watch.failure
    message = f"{watch.label()}: {ename}: {' '.join(evalue.split())}; kept as {failed}"
    raise (KeyboardInterrupt if watch.interrupted else NotebookError)(message)


def _check_timeout(timeout: int | None) -> None:
    if timeout is not None and (type(timeout) is not int or timeout < 1):
        raise ValueError(f"timeout must be a whole number of seconds, at least 1, got {timeout!r}")


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
    _check_timeout(timeout)
    notebook = _load(source)
    values = _resolve(parameters or {}, _defaults(notebook, source), source)
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
    _check_timeout(timeout)
    notebook = _load(path)
    _defaults(notebook, path)
    _run_to(path, notebook, path, {}, timeout)


# --- checking --------------------------------------------------------------------------------------------------------


def check_notebook(path: str | os.PathLike[str]) -> list[str]:
    """Check a committed notebook against the template, without executing it.

    Args:
        path: The notebook.

    Returns:
        The findings, one line each, with the notebook and the cell (counted from 0 over all cells); empty if none.

    Raises:
        ValueError: Not a notebook.

    Paper: none
    """
    notebook = _load(path)
    findings = [
        *_parameter_findings(notebook),
        *_code_findings(notebook),
        *_ending_findings(notebook),
        *_output_findings(notebook),
        *_path_findings(notebook),
    ]
    return [f"{path}: {finding}" for finding in findings]


def _parameter_findings(notebook: Any) -> Iterator[str]:
    try:
        names = list(_defaults(notebook, ""))
    except ValueError as error:
        yield str(error).removeprefix(": ")
        return
    index, cell = next((i, cell) for i, cell in _code_cells_tagged(notebook, PARAMETERS_TAG))
    for number, line in enumerate(cell.source.splitlines(), start=1):
        problem = _parameter_line_problem(line) if line.strip() else None
        if problem:
            yield f"cell {index} (parameters), line {number}: {problem}: {line.strip()}"
    if not names or names[0] not in ("seed", "seeds"):
        yield f"cell {index} (parameters): the first parameter must be 'seed' or 'seeds'"
    if not names or names[-1] != "run":
        yield f"cell {index} (parameters): the last parameter must be 'run'"


def _code_cells_tagged(notebook: Any, tag: str) -> list[tuple[int, Any]]:
    return [(i, cell) for i, cell in enumerate(notebook.cells) if cell.cell_type == "code" and tag in _tags(cell)]


def _parameter_line_problem(line: str) -> str | None:
    """What keeps the line from being ``name: type = literal  # comment``, if anything."""
    shape = "write 'name: type = literal  # comment'"
    try:
        statements = ast.parse(line).body
    except SyntaxError:
        return f"not one whole statement; {shape}"
    if len(statements) != 1 or not isinstance(statements[0], ast.AnnAssign) or statements[0].value is None:
        return f"no typed assignment; {shape}"
    statement = statements[0]
    comment = line.encode()[statement.end_col_offset :].decode().strip()
    if not comment.startswith("#") or not comment.strip("# "):
        return f"no comment; {shape}"
    if line.count("=") != 1:
        return "a second '=' hides the line from papermill; reword it"
    annotation = ast.unparse(statement.annotation)
    if not _fits(annotation, ast.literal_eval(statement.value)):
        return f"the default is not of type {annotation}, and the default decides the type"
    return None


def _fits(annotation: str, default: object) -> bool:
    """Whether a default is of the plain type it is annotated with; other annotations are not judged."""
    if annotation in ("bool", "int", "float", "str"):
        return type(default).__name__ == annotation
    items = re.fullmatch(r"list\[(.+)\]", annotation)
    if items:
        return isinstance(default, list) and all(_fits(items[1], item) for item in default)
    return True


def _code_findings(notebook: Any) -> Iterator[str]:
    asserted = False
    for index, cell in _code_cells(notebook):
        try:
            tree = ast.parse(cell.source)
        except SyntaxError as error:
            magic = next((line for line in cell.source.splitlines() if MAGIC_LINE.search(line)), None)
            yield f"cell {index}: " + (f"magic or shell escape: {magic.strip()}" if magic else f"{error.msg}")
            continue
        asserted = asserted or (_is_visible(cell) and any(isinstance(node, ast.Assert) for node in ast.walk(tree)))
        for node in ast.walk(tree):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
                kind = "class" if isinstance(node, ast.ClassDef) else "def"
                yield f"cell {index}: {kind} {node.name}; move it into the package, where it is tested"
            elif isinstance(node, ast.Name) and node.id == "get_ipython":
                yield f"cell {index}: magic or shell escape: get_ipython()"
    if not asserted:
        yield "no visible assert; end the cell that makes a claim with one"


def _is_visible(cell: Any) -> bool:
    return not cell.metadata.get("jupyter", {}).get("source_hidden") and not HIDING_TAGS & set(_tags(cell))


def _ending_findings(notebook: Any) -> Iterator[str]:
    checked = len(_code_cells_tagged(notebook, CHECK_OUTPUT_TAG))
    if checked != 1:
        yield f"{checked} code cells are tagged '{CHECK_OUTPUT_TAG}'; tag exactly one, the summary"
    code = _code_cells(notebook)
    if not code:
        yield "no code cells"
    elif not _calls_complete(code[-1][1].source):
        yield f"cell {code[-1][0]}: the last code cell does not call complete(...)"


def _calls_complete(source: str) -> bool:
    try:
        calls = [node.func for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call)]
    except SyntaxError:
        return False
    return any(getattr(func, "id", getattr(func, "attr", None)) == "complete" for func in calls)


def _output_findings(notebook: Any) -> Iterator[str]:
    kernel = notebook.metadata.get("kernelspec", {}).get("name")
    if kernel != "python3":
        yield f"the kernel is {kernel!r}, not 'python3'; run refresh"
    for expected, (index, cell) in enumerate(_code_cells(notebook), start=1):
        if cell.execution_count != expected:
            yield f"cell {index}: execution count {cell.execution_count}, not {expected}; run refresh"
    for index, cell in enumerate(notebook.cells):
        if INJECTED_TAG in _tags(cell):
            yield f"cell {index}: injected parameters of an earlier run; run refresh"
        for output in cell.get("outputs", []):
            if output.output_type == "error":
                yield f"cell {index}: stored error {output.ename}: {' '.join(output.evalue.split())}"


def _path_findings(notebook: Any) -> Iterator[str]:
    parts = [("metadata", notebook.metadata), *((f"cell {i}", cell) for i, cell in enumerate(notebook.cells))]
    for where, part in parts:
        found = [match for text in _strings(part) for match in MACHINE_PATH.findall(text)]
        for match in dict.fromkeys(found):  # each once, in order
            yield f"{where}: absolute path {match}"


def _strings(value: object) -> Iterator[str]:
    """Every string in a JSON value, keys included."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield key
            yield from _strings(item)
    elif isinstance(value, list):
        for item in value:
            yield from _strings(item)


# --- command line ----------------------------------------------------------------------------------------------------


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m s2d.lab.notebook",
        description="Run, refresh and check notebooks strictly.",
        epilog="Exit codes: 0 all well; 1 a notebook failed or has findings; 2 bad input; 130 interrupted.",
        allow_abbrev=False,
    )
    commands = parser.add_subparsers(dest="command", required=True)

    run = commands.add_parser("run", help="execute with parameters into OUTPUT", allow_abbrev=False)
    run.add_argument("notebook", type=Path, metavar="NOTEBOOK")
    run.add_argument("output", type=Path, metavar="OUTPUT")
    run.add_argument("--params", type=Path, action="append", default=[], metavar="FILE.yaml")
    run.add_argument(
        "-p",
        nargs=2,
        action="append",
        default=[],
        dest="options",
        metavar=("NAME", "VALUE"),
        help="one parameter; overrides the file",
    )
    run.set_defaults(function=_run_command)

    refresh = commands.add_parser("refresh", help="execute at the defaults, in place", allow_abbrev=False)
    refresh.add_argument("notebooks", type=Path, nargs="+", metavar="NOTEBOOK")
    refresh.set_defaults(function=_refresh_command)
    for command in (run, refresh):
        command.add_argument("--timeout", type=int, metavar="SECONDS", help="limit for one cell (default: none)")

    check = commands.add_parser("check", help="check against the template", allow_abbrev=False)
    check.add_argument("notebooks", type=Path, nargs="+", metavar="NOTEBOOK")
    check.set_defaults(function=_check_command)
    return parser


def _run_command(args: argparse.Namespace) -> int:
    if len(args.params) > 1:
        raise ValueError("--params is given twice; give one file")
    defaults = read_parameters(args.notebook)
    parameters = _read_yaml(args.params[0]) if args.params else {}
    parameters |= _read_options(args.options, defaults)
    run_notebook(args.notebook, args.output, parameters, timeout=args.timeout)
    return 0


def _refresh_command(args: argparse.Namespace) -> int:
    for path in args.notebooks:  # bad input among the last stops the first
        read_parameters(path)
    failures = 0
    for path in args.notebooks:
        try:
            refresh_notebook(path, timeout=args.timeout)
        except NotebookError as error:
            failures += 1
            _say(f"error: {error}")
    return 1 if failures else 0


def _check_command(args: argparse.Namespace) -> int:
    findings = [finding for path in args.notebooks for finding in check_notebook(path)]
    for finding in findings:
        print(finding)
    return 1 if findings else 0


@contextmanager
def _interruptible() -> Iterator[None]:
    """Turn the first SIGINT or SIGTERM into KeyboardInterrupt and ignore more, so that cleaning up is not cut short."""
    if threading.current_thread() is not threading.main_thread():
        yield  # only the main thread may set handlers
        return

    # A signal the caller had ignored (nohup) stays ignored.
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    before = {number: handler for number, handler in before.items() if handler not in (signal.SIG_IGN, None)}

    def interrupt(number: int, frame: object) -> None:
        for handled in before:
            signal.signal(handled, signal.SIG_IGN)
        raise KeyboardInterrupt

    try:
        for number in before:
            signal.signal(number, interrupt)
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        argv: The arguments; None for those of the process.

    Returns:
        The exit code: 0 all well, 1 a notebook failed or has findings, 2 bad input, 130 interrupted.

    Paper: none
    """
    args = _parser().parse_args(argv)
    try:
        with _interruptible():
            return args.function(args)
    except ValueError as error:
        _say(f"error: {error}")
        return 2
    except (NotebookError, OSError) as error:
        _say(f"error: {error}")
        return 1
    except KeyboardInterrupt as error:
        _say(f"interrupted: {error}" if str(error) else "interrupted")
        return 130


if __name__ == "__main__":
    sys.exit(main())
