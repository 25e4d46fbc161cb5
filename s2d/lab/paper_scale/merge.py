"""From measurements to tables of ours, and those beside the paper's."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
from scipy import stats

from s2d.lab.paper_scale.experiments import TABLES, Cell, Row, check_table, reported_rows, rows
from s2d.lab.paths import output_root, repository_root
from s2d.lab.results import load_table, provenance, save_table

RUN = "paper_scale"
"""The folder of ``data`` that holds what was measured with the paper's networks."""
NOT_OURS = ("value", "source", "note")
"""Columns of the paper's tables that say what the paper reports."""
DIAGNOSIS = {
    "PCDR_1": lambda layer: layer["pcdr"][0],
    "max abs activation": lambda layer: layer["max_abs"],
    "max singular value": lambda layer: layer["sigma_1"][1],
}
"""Metrics of Table 7, of a layer as ``s2d diagnose`` writes it; of the singular value the guaranteed upper end."""


def read_cells(files: Sequence[str | Path], wanted: Sequence[Cell]) -> dict[Cell, dict[str, Any]]:
    """The results of some measurements.

    Args:
        files: that the commands wrote, in any order; each is known by the end of its path.
        wanted: the measurements.

    Raises:
        ValueError: if one has no file, or a file is not what a command writes.
    """
    found = {}
    for cell in wanted:
        paths = [Path(file) for file in files if Path(file).as_posix().endswith(f"/{cell.path}")]
        if len(paths) != 1:
            raise ValueError(f"{len(paths)} files end in {cell.path}: give the one that the batch wrote")
        try:
            found[cell] = json.loads(paths[0].read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{paths[0]} is not JSON ({error}): remove it and run the batch again") from None
    return found


def value_of(row: Row, result: Mapping[str, Any], layers: Mapping[Any, int] | None = None) -> tuple[float, int]:
    """A row's value in its unit, and on how many items it was measured.

    Args:
        row: of :func:`~s2d.lab.paper_scale.experiments.rows`.
        result: what the command of its cell wrote.
        layers: the block, counted from 0, that each layer number of Table 7 is taken for; by default the same.

    Raises:
        ValueError: if the result lacks it.

    Example:
        >>> from s2d.lab.paper_scale.experiments import rows
        >>> row = rows("6", {"seeds": [0]})[0]
        >>> value_of(row, {"test": {"accuracy_quantized": 0.5, "items": 10}})
        (50.0, 10)
    """
    kind, path = row.cell.kind, row.cell.path
    try:
        if kind == "diagnose":
            printed = int(row.reported["layer"])
            ending = f".{(layers or {}).get(printed, printed)}.mlp.{row.weight}"
            (layer,) = (layer for layer in result["layers"] if f".{layer['layer']}".endswith(ending))
            return float(DIAGNOSIS[row.reported["metric"]](layer)), int(result["items"])
        if kind == "quantize":
            return 100 * float(result["test"]["accuracy_quantized"]), int(result["test"]["items"])
        name = "accuracy" if kind == "answer" else "accuracy_quantized" if row.cell.bits else "accuracy_float"
        return 100 * float(result[name]), int(result["items"])
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{path} does not hold {row.reported['metric']} ({type(error).__name__}: {error}): was its data labelled, "
            "and is the network the one of the configuration?"
        ) from None


def merged(table: str, config: Mapping[str, Any], files: Sequence[str | Path]) -> pd.DataFrame:
    """A table of ours, with the paper's columns but for its values.

    Args:
        table: a key of :data:`~s2d.lab.paper_scale.experiments.TABLES`.
        config: with ``seeds``, ``networks``, and ``sweep`` for the table of that name.
        files: of all its measurements; others may be among them.

    Returns:
        The paper's columns without ``value``, ``source`` and ``note``; then ``weight`` (Table 7), ``seed``, ``value``
        and ``items``, the number of test items.

    Raises:
        ValueError: for a measurement that is missing or damaged.
    """
    planned = rows(table, config)
    results = read_cells(files, list(dict.fromkeys(row.cell for row in planned)))
    found = []
    for row in planned:
        network = (config.get("networks") or {}).get(row.cell.training.network, {})
        layers = {int(printed): block for printed, block in network.get("layers", {}).items()}  # JSON has text keys
        value, items = value_of(row, results[row.cell], layers)
        named = {name: text for name, text in row.reported.items() if name not in NOT_OURS}
        named |= {"weight": row.weight} if row.weight else {}
        found.append(named | {"seed": row.cell.training.seed, "value": value, "items": items})
    return pd.DataFrame(found)


def save_merged(table: str, config: Mapping[str, Any], files: Sequence[str | Path], *, run: str) -> Path:
    """Write a table of ours to ``data/<run>``, with its provenance.

    Args:
        table, config, files: as of :func:`merged`; ``smoke: true`` marks a run whose numbers mean nothing.
        run: the folder; the paper's own is refused.

    Returns:
        The file.

    Raises:
        ValueError: as :func:`merged`.
    """
    results = read_cells(files, list(dict.fromkeys(row.cell for row in rows(table, config))))
    settings = {
        "seeds": list(config["seeds"]),
        "smoke_run": bool(config.get("smoke")) or any(result.get("smoke_run") for result in results.values()),
        "hardware": sorted({result["hardware"] for result in results.values() if "hardware" in result}),
    }
    source = provenance("s2d.lab.paper_scale.merge", settings)
    return save_table(merged(table, config, files), TABLES[table], run=run, source=source)


# --- beside the paper's -----------------------------------------------------------------------------------------------


def compare(ours: pd.DataFrame, table: str) -> pd.DataFrame:
    r"""Ours beside the paper's, a row a number of the paper's that we have.

    The paper prints one number. Whether it could be one more run of ours is asked of the interval in which such a run
    lies with 95 % confidence, :math:`\bar x \pm t_{n-1,\,0.975}\, s \sqrt{1 + 1/n}` over our n seeds.

    Args:
        ours: of :func:`merged`.
        table: its key in :data:`~s2d.lab.paper_scale.experiments.TABLES`.

    Returns:
        The columns that name a row, then ``reported``, ``ours`` (mean), ``std``, ``seeds``, ``difference`` (ours minus
        reported), ``low``, ``high`` and ``inside`` (``"yes"``, ``"no"``, or empty for a single seed).

    Raises:
        ValueError: for a table of ours that is not of the paper's rows.
    """
    check_table(table)
    reported = pd.DataFrame(reported_rows(table))
    by = [name for name in reported.columns if name not in NOT_OURS]
    reported[by] = reported[by].map(_key)
    text = ours.assign(**{name: ours[name].map(_key) for name in by})
    names = by + ["weight"] * ("weight" in ours)
    found = []
    for key, group in text.groupby(names, sort=False, dropna=False):
        named = dict(zip(names, key, strict=True))
        same = reported[(reported[by] == pd.Series({name: named[name] for name in by})).all(axis=1)]
        if len(same) != 1:
            raise ValueError(f"{len(same)} rows of the paper's table are {named}: merge the table anew")
        value, printed = group["value"].astype(float), float(same["value"].iloc[0])
        found.append(named | _beside(value, printed))
    return pd.DataFrame(found)


def _beside(value: pd.Series, reported: float) -> dict[str, Any]:
    n, mean = len(value), float(value.mean())
    row = {"reported": reported, "ours": mean, "std": float("nan"), "seeds": n, "difference": mean - reported}
    if n == 1:
        return row | {"low": float("nan"), "high": float("nan"), "inside": ""}
    std = float(value.std(ddof=1))
    half = float(stats.t.ppf(0.975, n - 1)) * std * (1 + 1 / n) ** 0.5
    inside = "yes" if mean - half <= reported <= mean + half else "no"
    return row | {"std": std, "low": mean - half, "high": mean + half, "inside": inside}


def _key(value: Any) -> str:
    """What names a row, whether it was read as a number or as text: nothing for what is not stated."""
    try:
        return "" if pd.isna(value) or value == "" else f"{float(value):g}"
    except ValueError:
        return str(value)


def shown(table: str, *, run: str) -> str:
    """Ours beside the paper's, for people.

    Args:
        table: a key of :data:`~s2d.lab.paper_scale.experiments.TABLES`.
        run: the folder of ours.

    Raises:
        FileNotFoundError: if ours was not made.
    """
    check_table(table)
    ours = load_table(TABLES[table], run=run)
    warning = "a smoke run: its numbers mean nothing\n" if _is_smoke(table, run) else ""
    if table == "sweep":
        return warning + ours.to_string(index=False, na_rep="")
    found = compare(ours, table)
    named = [name for name in found.columns[: list(found.columns).index("reported")] if found[name].nunique() > 1]
    numbers = found[["reported", "ours", "std", "difference"]].map(
        lambda number: "" if pd.isna(number) else f"{number:.2f}"
    )
    return warning + pd.concat([found[named], numbers, found[["seeds", "inside"]]], axis=1).to_string(index=False)


def _is_smoke(table: str, run: str) -> bool:
    files = (root / "data" / run / f"{TABLES[table]}.json" for root in (output_root(), repository_root()))
    found = next((file for file in files if file.is_file()), None)
    return found is not None and json.loads(found.read_text(encoding="utf-8"))["parameters"]["smoke_run"]
