"""The parameters of a notebook: its defaults, and what may replace them, checked before anything is executed."""

from __future__ import annotations

import ast
import difflib
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from s2d.lab.notebook.document import PARAMETERS_TAG, load, naming, tagged

REPAIRS = {
    bool: "write true or false",
    int: "write a whole number",
    float: "write a number such as 0.1",
    str: "write it in quotes",
    list: "write a list such as [1, 2]",
    dict: "write a mapping such as {name: 1}",
}


# --- the notebook's own ----------------------------------------------------------------------------------------------


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
    notebook = load(path)
    with naming(path):
        return defaults_of(notebook)


def defaults_of(notebook: Any) -> dict[str, object]:
    """As :func:`read_parameters`, of a notebook that was read; the errors do not name the file."""
    index, cell = parameters_cell(notebook)
    place = f"cell {index} (parameters)"
    try:
        statements = ast.parse(cell.source).body
    except SyntaxError as error:
        raise ValueError(f"{place}, line {error.lineno}: {error.msg}") from None
    defaults: dict[str, object] = {}
    for statement in statements:
        with naming(f"{place}, line {statement.lineno}"):
            name, value = _assignment(statement)
            if name in defaults:
                raise ValueError(f"parameter {name!r} is set twice; keep one line")
            defaults[name] = value
    return defaults


def parameters_cell(notebook: Any) -> tuple[int, Any]:
    """The one code cell tagged ``parameters``, with its index; ValueError if it is not one."""
    found = tagged(notebook, PARAMETERS_TAG)
    if len(found) != 1:
        raise ValueError(f"{len(found)} cells are tagged 'parameters'; tag exactly one code cell")
    index, cell = found[0]
    if cell.cell_type != "code":
        raise ValueError(f"cell {index} is tagged 'parameters' but is not code; tag the code cell instead")
    return index, cell


def _assignment(statement: ast.stmt) -> tuple[str, object]:
    """Name and value of ``name = literal`` or ``name: type = literal``."""
    targets = statement.targets if isinstance(statement, ast.Assign) else [getattr(statement, "target", None)]
    value = getattr(statement, "value", None)
    is_assignment = isinstance(statement, (ast.Assign, ast.AnnAssign)) and value is not None
    if not is_assignment or len(targets) != 1 or not isinstance(targets[0], ast.Name):
        raise ValueError(f"{ast.unparse(statement)!r} is not a parameter; write 'name: type = literal'")
    name = targets[0].id
    try:
        default = ast.literal_eval(value)
    except (ValueError, TypeError, MemoryError, RecursionError):
        raise ValueError(
            f"the default of {name!r} is {ast.unparse(value)!r}, not a literal; "
            "write the value out, or derive it in the next cell"
        ) from None
    _require_plain(name, default)
    return name, default


def _require_plain(name: str, value: object) -> None:
    """Allow only values that papermill writes into a cell unchanged (it turns a tuple into a string, for one)."""
    if type(value) in (bool, int, float, str, type(None)):
        return
    if type(value) is list:
        for i, item in enumerate(value):
            _require_plain(f"{name}[{i}]", item)
    elif type(value) is dict and all(type(key) is str for key in value):
        for key, item in value.items():
            _require_plain(f"{name}[{key!r}]", item)
    else:
        raise ValueError(
            f"parameter {name!r} cannot be {value!r} ({type(value).__name__}); "
            "use bool, int, float, str, None, a list of them, or a dict with string keys"
        )


# --- what replaces them ----------------------------------------------------------------------------------------------


def resolve(given: Mapping[str, object], defaults: Mapping[str, object]) -> dict[str, object]:
    """Check parameters against the notebook's own.

    Args:
        given: name to value.
        defaults: from :func:`read_parameters`.

    Returns:
        The given parameters in the notebook's order, an int or a string such as ``"1e-4"`` as a float where the
        default is one.

    Raises:
        ValueError: a parameter the notebook does not have, or a value of another type.

    Example:
        >>> resolve({"lr": "1e-4"}, {"seed": 0, "lr": 0.1})
        {'lr': 0.0001}
        >>> resolve({"sed": 1}, {"seed": 0, "lr": 0.1})
        Traceback (most recent call last):
        ValueError: unknown parameter 'sed'; did you mean 'seed'?

    Paper: none
    """
    for name in given:
        if name not in defaults:
            close = difflib.get_close_matches(str(name), defaults, n=1)
            hint = f"did you mean {close[0]!r}?" if close else f"it has {', '.join(defaults) or 'none'}"
            raise ValueError(f"unknown parameter {name!r}; {hint}")
    return {name: _coerce(name, given[name], default) for name, default in defaults.items() if name in given}


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


def read_yaml(path: Path) -> dict[str, object]:
    """Parameters from a YAML mapping; an empty file, or one of comments only, changes nothing.

    Args:
        path: the file.

    Returns:
        Name to value, not yet checked against a notebook.

    Raises:
        ValueError: no file, not YAML, not a mapping, or a name in it twice.

    Paper: none
    """
    import yaml

    with naming(path):
        try:
            text = path.read_text(encoding="utf-8")
            node = yaml.compose(text, Loader=yaml.SafeLoader)
            data = yaml.safe_load(text)
        except FileNotFoundError:
            raise ValueError("no such parameter file") from None
        except OSError as error:
            raise ValueError(f"cannot be read ({error.strerror})") from None
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise ValueError(f"not YAML ({' '.join(str(error).split())})") from None
        if data is None:
            return {}
        if not isinstance(data, dict):
            raise ValueError(f"holds a {type(data).__name__}, not a mapping; write one 'name: value' a line")
        names = Counter(key.value for key, _ in node.value)
        repeated = [name for name, count in names.items() if count > 1]
        if repeated:
            raise ValueError(f"parameter {repeated[0]!r} is given twice; keep one line")
        return data


def read_options(pairs: Sequence[Sequence[str]], defaults: Mapping[str, object]) -> dict[str, object]:
    """Parameters from ``-p NAME VALUE``: a string parameter takes its text as it stands, so ``-p run 003`` is '003'.

    Args:
        pairs: name and text.
        defaults: from :func:`read_parameters`.

    Returns:
        Name to value, not yet checked against the defaults.

    Raises:
        ValueError: a name twice.

    Example:
        >>> read_options([("run", "003"), ("seed", "3")], {"seed": 0, "run": "laptop"})
        {'run': '003', 'seed': 3}

    Paper: none
    """
    options: dict[str, object] = {}
    for name, text in pairs:
        if name in options:
            raise ValueError(f"parameter {name!r} is given twice by -p; give it once")
        options[name] = text if isinstance(defaults.get(name), str) else _literal(text)
    return options
