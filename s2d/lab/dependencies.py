"""Which code a result depends on, read from the source: nothing is imported and nothing runs.

The planner (``Snakefile``) loads this file alone, so it stands on the standard library only.
"""

from __future__ import annotations

import ast
import hashlib
import io
import json
import tokenize
from collections.abc import Callable, Iterable, Sequence
from functools import cache
from pathlib import Path

PROJECT = "s2d"
PACKAGE = Path(__file__).resolve().parents[1]

DRAWING = ("s2d.lab.figures", "s2d.lab.moving", "s2d.lab.exercises")
"""What no table depends on, though notebooks import it to show what they measure or to check an answer."""


# --- code -------------------------------------------------------------------------------------------------------------


def read_source(path: Path) -> str:
    """The text of a source file."""
    return Path(path).read_text(encoding="utf-8")


def code_only(path: Path, *, read: Callable[[Path], str] = read_source) -> str:
    """Source text without comments, docstrings and blank lines: what can change a result.

    Args:
        path: a Python file.
        read: gives its text.

    Returns:
        The lines that are left, in order.

    Raises:
        SyntaxError: if the file is not Python.

    Example:
        >>> code_only(PACKAGE / "lab" / "dependencies.py").splitlines()[0]
        'from __future__ import annotations'
    """
    return _code(read(path))


@cache
def _code(source: str) -> str:
    lines, text = source.splitlines(), set()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        (first, column), (last, _) = token.start, token.end
        if token.type == tokenize.COMMENT:
            lines[first - 1] = lines[first - 1][:column]
        elif first != last and token.type not in (tokenize.NL, tokenize.NEWLINE):
            text.update(range(first - 1, last))  # a string over several lines, whose blank lines and spaces count
    for doc in _docstrings(ast.parse(source)):
        before = lines[doc.lineno - 1][: doc.col_offset]
        after = lines[doc.end_lineno - 1].encode()[doc.end_col_offset :]  # ast counts bytes
        if not before.strip() and not after.strip():  # beside code on its line it stays, and counts
            rows = range(doc.lineno - 1, doc.end_lineno)
            text.difference_update(rows)
            for row in rows:
                lines[row] = ""
    kept = [row for row, line in enumerate(lines) if row in text or line.strip()]
    return "\n".join(lines[row] if row in text else lines[row].rstrip() for row in kept)


def _docstrings(tree: ast.Module) -> list[ast.stmt]:
    documented = ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef
    nodes = (node for node in ast.walk(tree) if isinstance(node, documented))
    return [node.body[0] for node in nodes if ast.get_docstring(node) is not None]


def code_hash(paths: Iterable[Path]) -> str:
    """Hash of the code in some files of the package, whatever their order; comments and docstrings do not count.

    Args:
        paths: files under the package.

    Returns:
        16 hexadecimal digits.

    Raises:
        ValueError: for a file outside the package.

    Example:
        >>> len(code_hash(closure(["s2d.lab.paths"])))
        16
    """
    digest = hashlib.sha256()
    for path in sorted({Path(path).resolve() for path in paths}):
        if not path.is_relative_to(PACKAGE):
            raise ValueError(f"{path} is not in the package {PACKAGE}: give files that `closure` lists")
        digest.update(f"{path.relative_to(PACKAGE).as_posix()}\n{code_only(path)}\n".encode())
    return digest.hexdigest()[:16]


# --- imports ----------------------------------------------------------------------------------------------------------


def closure(
    modules: Iterable[str], *, without: Sequence[str] = (), read: Callable[[Path], str] = read_source
) -> list[Path]:
    """The project's files that some modules need: their own, those they import, those these import, and so on.

    Imports inside functions count. A name that a package hands on (``from s2d import linear_maps``) leads to the module
    that defines it, not to all that the package's ``__init__`` imports.

    Args:
        modules: dotted names; those of other projects are left out.
        without: modules and packages that are not entered.
        read: gives the text of a file.

    Returns:
        Absolute paths, sorted.

    Raises:
        ValueError: for a module of the project that has no file.

    Example:
        >>> [path.name for path in closure(["s2d.pcdr"])]
        ['checks.py', 'pcdr.py', 'spectral.py']
    """
    seen: dict[str, Path] = {}
    waiting = list(modules)
    while waiting:
        module = waiting.pop()
        if module in seen or not _is_in(module, (PROJECT,)) or _is_in(module, without):
            continue
        path = _file(module)
        if path is None:
            raise ValueError(f"there is no module {module} under {PACKAGE}: mend the import")
        seen[module] = path
        waiting += imported_modules(read(path), module)
    return sorted(seen.values())


def imported_modules(source: str, module: str = "") -> list[str]:
    """The project's modules that a piece of source imports.

    Args:
        source: Python text.
        module: its own dotted name, which relative imports start from.

    Returns:
        Dotted names in the order of the text; a name that a package hands on leads to where it is defined.

    Example:
        >>> imported_modules("import json; from s2d import linear_maps; from s2d.lab import paths")
        ['s2d.layers', 's2d.lab.paths']
    """
    found = []
    for node in _import_statements(source):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.Call):
            found.append(node.args[0].value)
        else:
            base = _base(node, module)
            found += [_definer(base, alias.name) for alias in node.names] if _is_in(base, (PROJECT,)) else []
    return [name for name in dict.fromkeys(found) if _is_in(name, (PROJECT,))]


def _is_in(module: str, packages: Sequence[str]) -> bool:
    return any(module == package or module.startswith(f"{package}.") for package in packages)


def _file(module: str) -> Path | None:
    path = PACKAGE.joinpath(*module.split(".")[1:])
    candidates = (path.with_suffix(".py"), path / "__init__.py")
    return next((candidate for candidate in candidates if candidate.is_file()), None)


@cache
def _import_statements(source: str) -> list[ast.AST]:
    """Import statements wherever they stand, and ``import_module`` with a name written out."""
    return [
        node
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Import | ast.ImportFrom)
        or (
            isinstance(node, ast.Call)
            and getattr(node.func, "attr", getattr(node.func, "id", None)) == "import_module"
            and isinstance(node.args[0], ast.Constant)
        )
    ]


def _base(node: ast.ImportFrom, module: str) -> str:
    """The absolute name of the module after ``from``."""
    if not node.level:
        return node.module
    path = _file(module)
    folder = module.split(".") if path is not None and path.name == "__init__.py" else module.split(".")[:-1]
    return ".".join([*folder[: len(folder) - node.level + 1], *([node.module] if node.module else [])])


def _definer(base: str, name: str) -> str:
    """The module that defines what ``from base import name`` gives."""
    if _file(f"{base}.{name}") is not None:
        return f"{base}.{name}"
    path = _file(base)
    if path is not None and path.name == "__init__.py":
        for node in _import_statements(path.read_text(encoding="utf-8")):
            if isinstance(node, ast.ImportFrom) and _is_in(_base(node, base), (PROJECT,)):
                for alias in node.names:
                    if name == (alias.asname or alias.name):
                        return _definer(_base(node, base), alias.name)
    return base


# --- notebooks --------------------------------------------------------------------------------------------------------


def notebook_code(path: Path) -> str:
    """The code of a notebook's cells, one after the other.

    Args:
        path: an ``.ipynb`` file, of plain Python (no magics).
    """
    cells = json.loads(Path(path).read_text(encoding="utf-8"))["cells"]
    return "\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "code")


def notebook_modules(path: Path) -> list[str]:
    """The project's modules that a notebook imports."""
    return imported_modules(notebook_code(path))


def saved_tables(source: str) -> list[str]:
    """Names of the tables that some source writes: the second argument of every ``save_table``.

    Raises:
        ValueError: for a name that is not written out, which nobody could plan with.

    Example:
        >>> saved_tables('save_table(bound, "bound", run=run, source=source)')
        ['bound']
    """
    return [_written_out(call, 1) for call in _calls(source, "save_table")]


def loaded_tables(source: str) -> list[str]:
    """Names of the tables that some source reads: the first argument of every ``load_table``.

    Raises:
        ValueError: for a name that is not written out.

    Example:
        >>> loaded_tables('tuning = load_table("laptop/tuning", run=run)')
        ['laptop/tuning']
    """
    return [_written_out(call, 0) for call in _calls(source, "load_table")]


def published_figures(folder: Path = PACKAGE / "lab" / "figures") -> dict[str, list[str]]:
    """Every published figure and the tables it is drawn from, as :mod:`s2d.lab.figures.registry` knows them.

    Args:
        folder: whose functions are looked through for the decorator ``@published(tables=[...])``.

    Raises:
        ValueError: for tables that are not written out.

    Example:
        >>> published_figures()["bound_tightness"]
        ['bound']
    """
    found = {}
    for path in sorted(folder.glob("*.py")):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            for call in getattr(node, "decorator_list", []):
                if isinstance(call, ast.Call) and getattr(call.func, "id", None) == "published":
                    (tables,) = (keyword.value for keyword in call.keywords if keyword.arg == "tables")
                    found[node.name] = _literal(tables, f"{path.name}: the tables of {node.name}")
    return found


def _calls(source: str, function: str) -> list[ast.Call]:
    nodes = (node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call))
    return sorted((n for n in nodes if getattr(n.func, "id", None) == function), key=lambda n: n.lineno)


def _written_out(call: ast.Call, position: int) -> str:
    return _literal(call.args[position], f"line {call.lineno}: the table's name")


def _literal(node: ast.expr, what: str):
    try:
        return ast.literal_eval(node)
    except ValueError:
        raise ValueError(
            f"{what} is {ast.unparse(node)}: write it out, so that the batch can be planned without running it"
        ) from None
