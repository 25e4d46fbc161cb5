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
from s2d.lab.paths import output_root, repository_root

PACKAGES = ("torch", "timm", "numpy", "pandas", "scikit-learn", "matplotlib")


def source_hash() -> str:
    """Hash of the package's source files: two tables with the same hash were made by the same code."""
    package = Path(__file__).resolve().parents[1]
    digest = hashlib.sha256()
    for path in sorted(package.rglob("*.py")):
        digest.update(f"{path.relative_to(package).as_posix()}\n".encode() + path.read_bytes())
    return digest.hexdigest()[:16]


def provenance(notebook: str, parameters: Mapping[str, Any]) -> dict[str, Any]:
    """What a reader needs to make a result again.

    Args:
        notebook: stem of the notebook.
        parameters: the notebook's parameters, seeds among them.

    Returns:
        Plain JSON types; no time stamps and no machine names, so that a second run gives the same bytes.
    """
    versions = {"python": platform.python_version()} | {name: version(name) for name in PACKAGES}
    return {"notebook": notebook, "parameters": dict(parameters), "source": source_hash(), "versions": versions}


def _table_folder(run: str) -> Path:
    if not run or "/" in run or run.startswith("."):
        raise ValueError(f"run is {run!r}: give a plain label such as 'laptop'")
    return Path("data") / run


def save_table(table: pd.DataFrame, name: str, *, run: str, source: Mapping[str, Any]) -> Path:
    """Write ``data/<run>/<name>.csv`` and beside it ``<name>.json`` with its provenance.

    Args:
        table: no index is written.
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
    described = json.dumps(source, indent=1, sort_keys=True) + "\n"
    rows = table.to_csv(index=False, float_format="%.6g", lineterminator="\n")
    write_text(path.with_suffix(".json"), described)
    write_text(path, rows)
    return path


def _existing(file: str, run: str) -> Path | None:
    """``data/<run>/<file>``: one just written, else the committed one."""
    candidates = (root / _table_folder(run) / file for root in (output_root(), repository_root()))
    return next((path for path in candidates if path.exists()), None)


def load_table(name: str, *, run: str) -> pd.DataFrame:
    """Read ``data/<run>/<name>.csv``: one just written, else the committed one.

    Raises:
        FileNotFoundError: naming the notebook to run.
    """
    path = _existing(f"{name}.csv", run)
    if path is None:
        raise FileNotFoundError(
            f"no table data/{run}/{name}.csv: run `make figures SCALE={run}` or the notebook that writes it"
        )
    return pd.read_csv(path, keep_default_na=False, na_values=[""])


def load_sources(names: Sequence[str], *, run: str) -> dict[str, Any]:
    """The provenance of several tables, for the figures drawn from them."""
    paths = {name: _existing(f"{name}.json", run) for name in names}
    return {name: json.loads(path.read_text(encoding="utf-8")) for name, path in paths.items() if path is not None}


def mean_and_spread(table: pd.DataFrame, by: list[str], values: list[str]) -> pd.DataFrame:
    """Mean and sample standard deviation over the seeds of each group.

    Args:
        table: long, with one row a seed and group.
        by: grouping columns, kept in order of appearance.
        values: columns to average.

    Returns:
        ``by`` + ``seeds`` (how many) + for each value ``<value>`` and ``<value>_std``.

    Example:
        >>> t = pd.DataFrame({"variant": ["a", "a"], "seed": [0, 1], "accuracy": [0.5, 0.7]})
        >>> float(mean_and_spread(t, ["variant"], ["accuracy"]).accuracy.iloc[0])
        0.6
    """
    groups = table.groupby(by, sort=False, dropna=False)
    out = groups["seed"].nunique().rename("seeds").to_frame()
    for value in values:
        out[value], out[f"{value}_std"] = groups[value].mean(), groups[value].std(ddof=1)
    return out.reset_index()
