"""Tables and figures on disk: written whole, with where they come from, the same bytes every time."""

from __future__ import annotations

import hashlib
import json
import platform
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pandas as pd

from s2d.files import write_text
from s2d.lab.dependencies import DRAWING, closure, code_hash, notebook_modules
from s2d.lab.paths import output_root, repository_root

COMMITTED = "laptop"
MINE = "mine"
"""The label of a reader's own runs: what they did not make themselves is read from the committed tables."""
PACKAGES = ("torch", "timm", "numpy", "pandas", "scikit-learn", "matplotlib")


def provenance(made_by: str, parameters: Mapping[str, Any]) -> dict[str, Any]:
    """What a reader needs to make a result again.

    Args:
        made_by: stem of the notebook, or the module (``s2d.lab.tuning``), that makes it.
        parameters: the notebook's parameters, seeds among them.

    Returns:
        Plain JSON types; no time stamps and no machine names, so that a second run gives the same bytes. ``source``
        hashes the code that the notebook imports, and what that imports in turn: not drawings, comments or docstrings.

    Raises:
        FileNotFoundError: if there is no such notebook.

    Example:
        >>> sorted(provenance("s2d.lab.tuning", {"seeds": [0]}))
        ['notebook', 'parameters', 'source', 'versions']
    """
    versions = {"python": platform.python_version()} | {name: version(name) for name in PACKAGES}
    source = code_hash(closure(_modules(made_by), without=DRAWING))
    return {"notebook": made_by, "parameters": dict(parameters), "source": source, "versions": versions}


def _modules(made_by: str) -> list[str]:
    if made_by.startswith("s2d."):
        return [made_by]
    path = repository_root() / "notebooks" / f"{made_by}.ipynb"
    if not path.is_file():
        raise FileNotFoundError(f"no notebook notebooks/{made_by}.ipynb: give the stem of the one that calls this")
    return notebook_modules(path)


def _table_folder(run: str) -> Path:
    if not run or "/" in run or run.startswith("."):
        raise ValueError(f"run is {run!r}: give a plain label such as 'laptop'")
    return Path("data") / run


def save_table(table: pd.DataFrame, name: str, *, run: str, source: Mapping[str, Any]) -> Path:
    """Write ``data/<run>/<name>.csv`` and beside it ``<name>.json`` with its provenance.

    Args:
        table: no index is written. One that was read from a committed table (:class:`s2d.lab.study.Study`) keeps the
            provenance it came with.
        name: file stem.
        run: output label, usually the scale.
        source: from :func:`provenance`.

    Raises:
        ValueError: for an empty table or a strange label.
    """
    if table.empty:
        raise ValueError(f"table {name} has no rows: nothing was measured")
    if run == "paper":
        raise ValueError("run is 'paper': data/paper holds what the paper reports, and nothing measured here")
    path = output_root() / _table_folder(run) / f"{name}.csv"
    described = json.dumps(table.attrs.get("provenance", source), indent=1, sort_keys=True) + "\n"
    rows = table.to_csv(index=False, float_format="%.6g", lineterminator="\n")
    write_text(path.with_suffix(".json"), described)
    write_text(path, rows)
    return path


def _existing(name: str, run: str) -> Path:
    """The file of a table: one just written, else the committed one."""
    own_run, _, stem = name.rpartition("/")
    file = _table_folder(own_run or run) / f"{stem}.csv"
    paths = [root / file for root in (output_root(), repository_root())]
    if not own_run and run == MINE:
        paths.append(repository_root() / _table_folder(COMMITTED) / f"{stem}.csv")
    found = next((path for path in paths if path.exists()), None)
    if found is None:
        raise FileNotFoundError(
            f"no table {file.as_posix()}: run `make figures SCALE={run}` or the notebook that writes it"
        )
    return found


def load_table(name: str, *, run: str) -> pd.DataFrame:
    """Read ``data/<run>/<name>.csv``: one just written, else the committed one.

    Args:
        name: file stem; ``laptop/tuning`` names the run itself, for a table that is the same at every scale.
        run: output label, usually the scale; under ``mine`` what is not there is read from the laptop's.

    Raises:
        FileNotFoundError: naming the notebook to run.
    """
    return pd.read_csv(_existing(name, run), keep_default_na=False, na_values=[""])


def table_digests(names: Sequence[str], *, run: str) -> dict[str, str]:
    """What identifies the content of some tables: SHA-256 of their files.

    Args:
        names: as :func:`load_table` takes them.
        run: output label, usually the scale.

    Raises:
        FileNotFoundError: naming the notebook to run.
    """
    return {name: hashlib.sha256(_existing(name, run).read_bytes()).hexdigest() for name in names}
