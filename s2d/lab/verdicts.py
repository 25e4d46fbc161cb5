"""Do the verdicts depend on the CPU? The claims of two batches, each trained from scratch, side by side.

    ATEN_CPU_CAPABILITY=default make figures FROM=scratch                  (in another clone, or on another machine)
    python -m s2d.lab.verdicts default=../other/data/laptop/claims.csv     (here)

writes ``data/laptop/verdicts.csv``: each claim of the committed table beside that of every table named.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path

import pandas as pd

from s2d.lab.claims import NOT_MEASURED, OWN_WORDS
from s2d.lab.results import load_table, provenance, save_table

OPPOSITE = {frozenset(OWN_WORDS), frozenset(OWN_WORDS.values())}
"""Pairs of verdicts that contradict each other; every other pair has one that is no decision, or says "the same"."""
SAME, CHANGED, REVERSED = AGREEMENTS = ("same", "changed", "reversed")


def agreement(one: str, other: str) -> str:
    """How two verdicts of one claim stand to each other.

    Returns:
        One of ``AGREEMENTS``; reversed where one says yes and the other no.

    Example:
        >>> agreement("holds", "holds"), agreement("holds", "undecided"), agreement("holds", "does not hold")
        ('same', 'changed', 'reversed')
    """
    return SAME if one == other else REVERSED if frozenset((one, other)) in OPPOSITE else CHANGED


def compared(here: pd.DataFrame, others: Mapping[str, pd.DataFrame]) -> pd.DataFrame:
    """Every claim as two batches measured it.

    Args:
        here: from :func:`s2d.lab.claims.claims_table`.
        others: name of a batch to its table, of the same claims.

    Returns:
        Columns kernel (the other batch's name), group, claim, unit, measured_here, low_here, high_here, verdict_here,
        measured, low, high, verdict (the other's), overlap (whether the two intervals do) and agreement
        (:func:`agreement`); without what neither measured.

    Raises:
        ValueError: if a table has other columns or claims.
    """
    numbers = ["measured", "low", "high", "verdict"]
    parts = []
    for name, other in others.items():
        if lacking := {"claim", *numbers} - set(other.columns):
            raise ValueError(f"{name}: not a table of claims, it has no column {min(lacking)!r}")
        odd = sorted(set(here.claim) ^ set(other.claim))
        if odd:
            raise ValueError(f"{name}: the tables differ in the claim {odd[0]!r}; make both with the same code")
        both = here[["group", "claim", "unit", *numbers]].merge(
            other[["claim", *numbers]], on="claim", suffixes=("_here", ""), validate="one_to_one"
        )
        both = both[(both.verdict_here != NOT_MEASURED) & (both.verdict != NOT_MEASURED)]
        both = both.assign(
            overlap=(both.low_here <= both.high) & (both.low <= both.high_here),
            agreement=[agreement(*pair) for pair in zip(both.verdict_here, both.verdict, strict=True)],
        )
        parts.append(both.assign(kernel=name)[["kernel", *both.columns]])
    return pd.concat(parts, ignore_index=True)


def summary(table: pd.DataFrame) -> str:
    """The comparison in a sentence a batch.

    Args:
        table: from :func:`compared`.

    Example:
        >>> rows = [["avx2", "same", True], ["avx2", "changed", True]]
        >>> summary(pd.DataFrame(rows, columns=["kernel", "agreement", "overlap"]))
        'avx2: 1 of 2 verdicts the same, 1 changed, 0 reversed; the intervals overlap in 2 of 2.'
    """
    return " ".join(
        f"{name}: {(rows.agreement == SAME).sum()} of {len(rows)} verdicts the same, "
        f"{(rows.agreement == CHANGED).sum()} changed, {(rows.agreement == REVERSED).sum()} reversed; "
        f"the intervals overlap in {rows.overlap.sum()} of {len(rows)}."
        for name, rows in table.groupby("kernel", sort=False)
    )


def main(argv: Sequence[str] | None = None) -> None:
    """Compare, write the table, print what differs."""
    parser = argparse.ArgumentParser(
        prog="python -m s2d.lab.verdicts", description="The committed verdicts beside those of other batches."
    )
    parser.add_argument("others", nargs="+", metavar="NAME=CLAIMS.CSV", help="a batch's name and its table of claims")
    arguments = parser.parse_args(argv)
    others = {}
    for text in arguments.others:
        name, _, path = text.partition("=")
        if not (name and Path(path).is_file()):
            parser.error(f"{text!r}: give a name and a table that is there, such as default=data/laptop/claims.csv")
        others[name] = pd.read_csv(path)
    try:
        table = compared(load_table("claims", run="laptop"), others)
    except ValueError as error:
        parser.error(str(error))
    source = provenance("s2d.lab.verdicts", {"kernels": list(others)})
    save_table(table, "verdicts", run="laptop", source=source)
    print(summary(table))
    print(table[table.agreement != SAME].drop(columns="group").round(2).to_string(index=False))


if __name__ == "__main__":
    main()
