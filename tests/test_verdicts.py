"""Verdicts of two batches side by side."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import pytest

from s2d.lab import verdicts
from s2d.lab.claims import NOT_MEASURED, OWN_WORDS
from s2d.lab.results import load_table
from s2d.lab.statistics import VERDICTS

COLUMNS = ["group", "claim", "unit", "measured", "low", "high", "verdict"]


def claims(*rows) -> pd.DataFrame:
    return pd.DataFrame([["paper", f"claim {i}", "points", *row] for i, row in enumerate(rows)], columns=COLUMNS)


def test_only_yes_against_no_is_a_reversal():
    words = [*VERDICTS, *OWN_WORDS.values()]
    reversals = {(a, b) for a in words for b in words if verdicts.agreement(a, b) == "reversed"}
    expected = {("reproduced", "not reproduced"), ("holds", "does not hold")}
    assert reversals == expected | {(b, a) for a, b in expected}
    assert all(verdicts.agreement(word, word) == "same" for word in words)


def test_the_comparison_by_hand():
    here = claims((2, 1, 3, "reproduced"), (2, 1, 3, "reproduced"), (0, -9, 9, "undecided"), (1, 0, 2, NOT_MEASURED))
    there = claims((4, 3.5, 5, "reproduced"), (-2, -3, -1, "not reproduced"), (1, 0.5, 2, "reproduced"), (1, 0, 2, "x"))
    table = verdicts.compared(here, {"default": there.iloc[::-1]})
    assert table.agreement.tolist() == ["same", "reversed", "changed"]
    assert table.overlap.tolist() == [False, False, True]
    assert table.verdict.tolist() == ["reproduced", "not reproduced", "reproduced"]
    assert verdicts.summary(table) == (
        "default: 1 of 3 verdicts the same, 1 changed, 1 reversed; the intervals overlap in 1 of 3."
    )


def test_other_claims_are_refused():
    with pytest.raises(ValueError, match="default: the tables differ in the claim 'claim 1'"):
        verdicts.compared(claims((1, 0, 2, "undecided")), {"default": claims(*[(1, 0, 2, "undecided")] * 2)})


def test_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys):
    monkeypatch.setenv("S2D_OUTPUT", str(tmp_path))
    committed = load_table("claims", run="laptop")
    other = tmp_path / "claims.csv"
    committed.assign(verdict=committed.verdict.replace("reproduced", "not reproduced")).to_csv(other, index=False)
    verdicts.main([f"default={other}"])
    table = load_table("verdicts", run="laptop")
    changed = (committed.verdict == "reproduced").sum()
    assert (table.agreement == "reversed").sum() == changed > 0
    assert f"{changed} reversed" in capsys.readouterr().out
    for wrong in ("default", f"default={tmp_path}/none.csv", f"={other}"):
        with pytest.raises(SystemExit):
            verdicts.main([wrong])
        assert f"{wrong!r}: give a name and a table that is there" in capsys.readouterr().err
    other.write_text("a,b\n1,2\n")
    with pytest.raises(SystemExit):
        verdicts.main([f"default={other}"])
    assert "default: not a table of claims, it has no column 'claim'" in capsys.readouterr().err
