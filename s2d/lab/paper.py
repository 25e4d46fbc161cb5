"""The numbers printed in the paper, read from ``data/paper``: to set ours beside, never to imitate."""

from __future__ import annotations

from pathlib import Path

import pandas as pd

PAPER_TABLES: dict[int, str] = {
    6: "table06_pcdr_selection",
    7: "table07_ffn_statistics",
    8: "table08_dinov3_ptq4vit",
    9: "table09_language_model",
    10: "table10_hyperparameters",
    11: "table11_power",
}
SECOND_HAND = "second_hand"

_INTEGER_COLUMNS = ("layer", "refresh_every", "k_max", "power")
_FLOAT_COLUMNS = ("tau", "value")


def load_paper_table(name: int | str) -> pd.DataFrame:
    """Load one table of reported numbers, one number a row.

    Args:
        name: the number of an appendix table (6 to 11), ``"second_hand"``, or the stem of a file in ``data/paper``
            (``"table09_language_model"``).

    Returns:
        The rows in printed order. ``value`` and ``tau`` are floats; ``layer``, ``refresh_every``, ``k_max`` and
        ``power`` are nullable integers (``Int64``); every other column is text. What the paper does not state is
        ``""`` in a text column and missing in a number column.

    Raises:
        ValueError: if there is no such table.
        FileNotFoundError: if ``data/paper`` is not there, as when the package is installed without the repository.

    Example:
        >>> table = load_paper_table(6)
        >>> float(table.pivot(index="bits", columns="variant", values="value").loc["W4A4", "S2D"])
        73.0

    Paper: Tables 6-11 (``second_hand``: the main text, as public commentaries report it)
    """
    stem = PAPER_TABLES.get(name, "") if isinstance(name, int) else name
    stems = [*PAPER_TABLES.values(), SECOND_HAND]
    if stem not in stems:
        numbers = ", ".join(str(number) for number in PAPER_TABLES)
        raise ValueError(f"no paper table {name!r}; give a table number ({numbers}) or one of: {', '.join(stems)}")

    # Read as text first: an empty text field stays "", because pandas drops missing keys silently in groupby and pivot.
    table = pd.read_csv(_find_table(stem), dtype=str, keep_default_na=False)
    for column in table.columns.intersection(_INTEGER_COLUMNS):
        table[column] = pd.to_numeric(table[column]).astype("Int64")
    for column in table.columns.intersection(_FLOAT_COLUMNS):
        table[column] = pd.to_numeric(table[column]).astype(float)
    return table


def _find_table(stem: str) -> Path:
    """The CSV of one table in the nearest ``data/paper`` above this file."""
    for folder in Path(__file__).resolve().parents:
        path = folder / "data" / "paper" / f"{stem}.csv"
        if path.is_file():
            return path
    raise FileNotFoundError(
        f"data/paper/{stem}.csv is in no folder above {Path(__file__).resolve()}: the reported numbers belong to the "
        "repository, not to the installed package; clone the repository and install it from there with "
        "`pip install -e .`"
    )
