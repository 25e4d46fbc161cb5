"""Check a committed notebook against the template, without executing it."""

from __future__ import annotations

import ast
import os
import re
from collections.abc import Iterator, Mapping
from typing import Any

from s2d.lab.notebook.document import INJECTED_TAG, code_cells, load, tagged, tags
from s2d.lab.notebook.parameters import defaults_of, parameters_cell

CHECK_OUTPUT_TAG = "nbval-check-output"
TEACHING_TAG = "teaching"
DEFINITIONS = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
HIDING_TAGS = {"hide-cell", "hide-input", "remove-cell", "remove-input"}

# A path counts as absolute where no name or dot stands before its first slash: `../work/x` and `a.org/home/` do not.
MACHINE_PATH = re.compile(r"(?<![\w.~-])/(?:home|root|tmp|work|Users)/[^\s\"']*")
MAGIC_LINE = re.compile(r"^\s*[%!?]|\?\s*$|=\s*[%!]")


def check_notebook(path: str | os.PathLike[str]) -> list[str]:
    """Check a committed notebook against the template, without executing it.

    The template: typed and commented parameters, of which the first is ``seed`` or ``seeds`` and the last ``run``; a
    visible assert; one summary tagged ``nbval-check-output``; :func:`s2d.lab.notebook.complete` in the last code cell;
    outputs of one execution from top to bottom; no stored errors, magics or paths of a machine; and no functions or
    classes, but for cells tagged ``teaching``.

    Args:
        path: The notebook.

    Returns:
        The findings, one line each, with the notebook and the cell (counted from 0 over all cells); empty if none.

    Raises:
        ValueError: Not a notebook.

    Paper: none
    """
    notebook = load(path)
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
        names = list(defaults_of(notebook))
        index, cell = parameters_cell(notebook)
    except ValueError as error:
        yield str(error)
        return
    for number, line in enumerate(cell.source.splitlines(), start=1):
        problem = _parameter_line_problem(line) if line.strip() else None
        if problem:
            yield f"cell {index} (parameters), line {number}: {problem}: {line.strip()}"
    if not names or names[0] not in ("seed", "seeds"):
        yield f"cell {index} (parameters): the first parameter must be 'seed' or 'seeds'"
    if not names or names[-1] != "run":
        yield f"cell {index} (parameters): the last parameter must be 'run'"


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
    cells = code_cells(notebook)
    for index, cell in cells:
        problem = _syntax_problem(cell.source)
        if problem:
            yield f"cell {index}: {problem}"
        for node in _nodes(cell):
            if isinstance(node, ast.Name) and node.id == "get_ipython":
                yield f"cell {index}: magic or shell escape: get_ipython()"
            elif isinstance(node, DEFINITIONS) and TEACHING_TAG not in tags(cell):
                kind = "class" if isinstance(node, ast.ClassDef) else "def"
                yield (
                    f"cell {index}: {kind} {node.name}; move it into the package, where it is tested, or tag the cell "
                    f"'{TEACHING_TAG}' if the code itself is the lesson"
                )
    if not any(_is_visible(cell) and isinstance(node, ast.Assert) for _, cell in cells for node in _nodes(cell)):
        yield "no visible assert; end the cell that makes a claim with one"


def _syntax_problem(source: str) -> str | None:
    try:
        ast.parse(source)
    except SyntaxError as error:
        magic = next((line for line in source.splitlines() if MAGIC_LINE.search(line)), None)
        return error.msg if magic is None else f"magic or shell escape: {magic.strip()}"
    return None


def _nodes(cell: Any) -> list[ast.AST]:
    """All that a cell consists of, in Python's terms; nothing if it is not Python."""
    return [] if _syntax_problem(cell.source) else list(ast.walk(ast.parse(cell.source)))


def _is_visible(cell: Any) -> bool:
    return not cell.metadata.get("jupyter", {}).get("source_hidden") and not HIDING_TAGS & set(tags(cell))


def _ending_findings(notebook: Any) -> Iterator[str]:
    checked = sum(cell.cell_type == "code" for _, cell in tagged(notebook, CHECK_OUTPUT_TAG))
    if checked != 1:
        yield f"{checked} code cells are tagged '{CHECK_OUTPUT_TAG}'; tag exactly one, the summary"
    cells = code_cells(notebook)
    if not cells:
        yield "no code cells"
        return
    index, last = cells[-1]
    called = [node.func for node in _nodes(last) if isinstance(node, ast.Call)]
    if not any(getattr(function, "id", getattr(function, "attr", None)) == "complete" for function in called):
        yield f"cell {index}: the last code cell does not call complete(...)"


def _output_findings(notebook: Any) -> Iterator[str]:
    kernel = notebook.metadata.get("kernelspec", {}).get("name")
    if kernel != "python3":
        yield f"the kernel is {kernel!r}, not 'python3'; run refresh"
    for expected, (index, cell) in enumerate(code_cells(notebook), start=1):
        if cell.execution_count != expected:
            yield f"cell {index}: execution count {cell.execution_count}, not {expected}; run refresh"
    for index, cell in enumerate(notebook.cells):
        if INJECTED_TAG in tags(cell):
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
