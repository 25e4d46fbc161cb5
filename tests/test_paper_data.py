"""The transcription of the paper's tables, checked against what the paper says about them in words.

The oracle is the appendix's prose (gains, orderings, repeated rows) and a second copy of each table in its printed
layout; neither is derived from the CSV files.
"""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import pytest
import yaml

from s2d.lab import paper
from s2d.lab.paper import load_paper_table

ROOT = Path(__file__).resolve().parents[1]
NUMBERS = [6, 7, 8, 9, 10, 11]
EVERY_TABLE = [*NUMBERS, "second_hand"]
ROW_COUNTS = {6: 6, 7: 24, 8: 6, 9: 8, 10: 12, 11: 12, "second_hand": 17}
SHARED_COLUMNS = ["model", "dataset", "quantizer", "variant", "bits", "metric", "value", "unit"]
DEFAULT = {"refresh_every": 100, "k_max": 3, "tau": 0.95}


def value_of(table: pd.DataFrame, **keys: object) -> float:
    """The one value of the row with these keys; fails when there are none or several."""
    for column, key in keys.items():
        table = table[table[column] == key]
    assert len(table) == 1, f"{keys} matches {len(table)} rows"
    return float(table["value"].iloc[0])


def printed(table: pd.DataFrame, rows: list[str], columns: list[str]) -> list[list[float]]:
    """The table in its printed layout: the keys of each level in the order in which they first appear."""
    return table.pivot_table(index=rows, columns=columns, values="value", sort=False).values.tolist()


# The files


def test_every_file_is_listed_and_every_listed_file_exists() -> None:
    stems = {path.stem for path in (ROOT / "data" / "paper").glob("*.csv")}
    assert stems == {*paper.PAPER_TABLES.values(), paper.SECOND_HAND}


@pytest.mark.parametrize("name", EVERY_TABLE)
def test_row_count(name: int | str) -> None:
    assert len(load_paper_table(name)) == ROW_COUNTS[name]


@pytest.mark.parametrize("name", EVERY_TABLE)
def test_shared_columns_in_order_and_source_last(name: int | str) -> None:
    columns = list(load_paper_table(name).columns)
    assert [column for column in columns if column in SHARED_COLUMNS] == SHARED_COLUMNS
    assert columns[-1] == "source"


@pytest.mark.parametrize("name", EVERY_TABLE)
def test_no_key_is_duplicated(name: int | str) -> None:
    table = load_paper_table(name)
    assert not table.duplicated([column for column in table.columns if column not in ("value", "source")]).any()


@pytest.mark.parametrize("number", NUMBERS)
def test_first_hand_source_names_its_table(number: int) -> None:
    table = load_paper_table(number)
    assert table["source"].str.startswith("arXiv 2602.14432 appendix ").all()
    assert table["source"].str.endswith(f", Table {number}").all()


def test_second_hand_source_says_so_in_every_row() -> None:
    assert load_paper_table("second_hand")["source"].str.startswith("second-hand: ").all()


@pytest.mark.parametrize("name", EVERY_TABLE)
def test_values_lie_in_the_range_of_their_unit(name: int | str) -> None:
    table = load_paper_table(name)
    assert (table["value"] > 0).all()
    assert table["unit"].isin(["%", "s", "dimensionless"]).all()
    assert (table.loc[table["unit"] == "%", "value"] <= 100).all()
    assert (table.loc[table["metric"] == "PCDR_1", "value"] <= 1).all()


@pytest.mark.parametrize("name", EVERY_TABLE)
def test_vocabulary_is_shared(name: int | str) -> None:
    table = load_paper_table(name)
    assert set(table["model"]) <= {"SigLIP2-B/16-384", "DINOv3-B", "Qwen2.5-0.5B", "SigLIP2", "DINOv3", ""}
    assert set(table["dataset"]) <= {"ImageNet", "GSM8K", ""}
    assert set(table["quantizer"]) <= {"ERQ", "PTQ4ViT", "RepQ-ViT", "RTN", "QAT", ""}
    assert set(table["variant"]) <= {"AdamW", "Baseline", "S2D", "S2D without PCDR"}
    assert table["bits"].str.fullmatch(r"(W\dA\d|FP|FP16)?").all()


@pytest.mark.parametrize(("number", "decimals"), [(6, {1}), (7, {1, 2}), (8, {2}), (9, {1}), (10, {1}), (11, {1})])
def test_values_keep_the_printed_digits(number: int, decimals: set[int]) -> None:
    # Read as text: a float forgets whether 176.40 or 176.4 was printed.
    table = pd.read_csv(ROOT / "data" / "paper" / f"{paper.PAPER_TABLES[number]}.csv", dtype=str)
    assert set(table["value"].str.split(".").str[1].str.len()) == decimals


# The printed layout


def test_table_6_pivots_to_the_printed_layout() -> None:
    assert printed(load_paper_table(6), ["bits"], ["variant"]) == [[40.1, 73.0], [77.1, 81.9], [81.2, 82.7]]


def test_table_7_pivots_to_the_printed_layout() -> None:
    assert printed(load_paper_table(7), ["model", "layer"], ["metric", "variant"]) == [
        [0.91, 0.46, 176.40, 59.68, 10.38, 3.22],
        [0.77, 0.09, 1166.2, 614.7, 7.87, 3.96],
        [0.47, 0.11, 1048.41, 440.38, 37.29, 17.94],
        [0.45, 0.22, 115.55, 67.56, 8.67, 3.79],
    ]


def test_table_8_pivots_to_the_printed_layout() -> None:
    assert printed(load_paper_table(8), ["variant"], ["bits"]) == [[58.03, 57.04, 28.52], [76.53, 56.10, 30.69]]


def test_table_9_pivots_to_the_printed_layout() -> None:
    assert printed(load_paper_table(9), ["bits"], ["variant"]) == [
        [28.2, 29.2],
        [26.2, 24.0],
        [24.7, 22.1],
        [19.8, 17.8],
    ]


def test_table_10_pivots_to_the_printed_layout() -> None:
    table = load_paper_table(10).set_index(["refresh_every", "k_max", "tau"])
    fp16 = table.loc[table["bits"] == "FP16", "value"]
    w4a4 = table.loc[table["bits"] == "W4A4", "value"]
    assert [(*key, fp16[key], w4a4[key]) for key in fp16.index] == [
        (10, 3, 0.95, 85.0, 72.2),
        (100, 3, 0.95, 85.0, 73.0),
        (100, 5, 0.95, 85.0, 72.5),
        (100, 10, 0.95, 84.9, 72.6),
        (100, 3, 0.90, 84.9, 72.4),
        (100, 3, 0.80, 84.8, 72.8),
    ]


def test_table_11_pivots_to_the_printed_layout() -> None:
    table = load_paper_table(11)
    table["column"] = table["variant"] + table["power"].astype("string").fillna("")
    assert printed(table, ["bits"], ["column"]) == [
        [65.6, 73.0, 68.3, 69.6],
        [78.5, 81.9, 79.0, 78.7],
        [81.1, 82.7, 81.7, 82.4],
    ]


# What the text says of the tables


def test_appendix_d_without_pcdr_collapses_to_40_1() -> None:
    table = load_paper_table(6)
    assert value_of(table, variant="S2D without PCDR", bits="W4A4") == 40.1
    for bits in ("W4A4", "W5A5", "W6A6"):
        assert value_of(table, variant="S2D", bits=bits) > value_of(table, variant="S2D without PCDR", bits=bits)


def test_table_7_s2d_is_smaller_in_every_statistic_of_every_layer() -> None:
    keys = ["model", "layer", "metric"]
    wide = load_paper_table(7).pivot(index=keys, columns="variant", values="value")
    assert len(wide) == 4 * 3
    assert (wide["S2D"] < wide["AdamW"]).all()


def test_table_8_s2d_gains_at_w8a8_and_w5a5_but_not_at_w6a6() -> None:
    # The text of appendix E speaks of an improvement without naming the exception; the printed numbers have one.
    wide = load_paper_table(8).pivot(index="bits", columns="variant", values="value")
    gain = wide["S2D"] - wide["AdamW"]
    assert gain["W8A8"] > 0 and gain["W5A5"] > 0
    assert gain["W6A6"] < 0


@pytest.mark.parametrize(("bits", "gain"), [("W8A8", 2.2), ("W7A7", 2.6), ("W6A6", 2.0), ("FP", -1.0)])
def test_table_9_gains_are_those_of_the_text(bits: str, gain: float) -> None:
    table = load_paper_table(9)
    difference = value_of(table, variant="S2D", bits=bits) - value_of(table, variant="Baseline", bits=bits)
    assert difference == pytest.approx(gain, abs=1e-9)


def test_table_10_default_is_the_best_w4a4() -> None:
    table = load_paper_table(10)
    w4a4 = table[table["bits"] == "W4A4"]
    best = w4a4.loc[w4a4["value"].idxmax()]
    assert {name: best[name] for name in DEFAULT} == DEFAULT
    assert (w4a4["value"] == best["value"]).sum() == 1


def test_table_10_larger_interval_outperforms() -> None:
    table = load_paper_table(10)
    others = {"k_max": 3, "tau": 0.95, "bits": "W4A4"}
    assert value_of(table, refresh_every=100, **others) > value_of(table, refresh_every=10, **others)


def test_table_10_more_components_is_a_marginal_drop() -> None:
    table = load_paper_table(10)
    others = {"refresh_every": 100, "tau": 0.95, "bits": "W4A4"}
    assert 0 < value_of(table, k_max=3, **others) - value_of(table, k_max=10, **others) < 1


def test_table_10_changes_one_thing_at_a_time() -> None:
    table = load_paper_table(10)
    for name, default in DEFAULT.items():
        assert (table.loc[table["varied"] != name, name] == default).all()


@pytest.mark.parametrize("bits", ["W4A4", "W5A5", "W6A6"])
def test_table_11_power_2_is_best_and_every_power_beats_the_baseline(bits: str) -> None:
    table = load_paper_table(11)
    by_power = {power: value_of(table, variant="S2D", power=power, bits=bits) for power in (2, 3, 4)}
    assert by_power[2] == max(by_power.values())
    assert min(by_power.values()) > value_of(table, variant="Baseline", bits=bits)


# The same number in two places


@pytest.mark.parametrize("bits", ["W4A4", "W5A5", "W6A6"])
def test_table_6_s2d_is_table_11_power_2(bits: str) -> None:
    assert value_of(load_paper_table(6), variant="S2D", bits=bits) == value_of(
        load_paper_table(11), variant="S2D", power=2, bits=bits
    )


def test_table_6_s2d_is_the_default_row_of_table_10_at_w4a4() -> None:
    expected = value_of(load_paper_table(6), variant="S2D", bits="W4A4")
    assert value_of(load_paper_table(10), bits="W4A4", **DEFAULT) == expected


def test_second_hand_erq_agrees_with_the_appendix() -> None:
    second_hand, table_11 = load_paper_table("second_hand"), load_paper_table(11)
    erq = {"quantizer": "ERQ", "bits": "W4A4"}
    assert value_of(second_hand, variant="AdamW", **erq) == value_of(table_11, variant="Baseline", bits="W4A4")
    assert value_of(second_hand, variant="S2D", **erq) == value_of(table_11, variant="S2D", power=2, bits="W4A4")


def test_second_hand_fp16_agrees_with_the_appendix() -> None:
    second_hand = load_paper_table("second_hand")
    default = value_of(load_paper_table(10), bits="FP16", **DEFAULT)
    assert value_of(second_hand, variant="S2D", bits="FP16") == default


def test_second_hand_pairs_are_complete_and_s2d_never_loses() -> None:
    table = load_paper_table("second_hand")
    accuracy = table[table["metric"] == "top-1 accuracy"]
    wide = accuracy.pivot(index=["quantizer", "bits"], columns="variant", values="value")
    assert len(wide) == 7
    assert (wide["S2D"] >= wide["AdamW"]).all()
    assert wide[["AdamW", "S2D"]].T.to_dict("list") == {
        ("", "FP16"): [85.0, 85.0],
        ("ERQ", "W4A4"): [65.6, 73.0],
        ("PTQ4ViT", "W5A5"): [3.4, 62.0],
        ("QAT", "W3A4"): [59.9, 62.4],
        ("QAT", "W4A4"): [65.8, 69.7],
        ("RepQ-ViT", "W5A5"): [46.0, 78.0],
        ("RepQ-ViT", "W6A6"): [58.5, 80.0],
    }


def test_second_hand_costs_and_default() -> None:
    table = load_paper_table("second_hand")
    assert value_of(table, metric="SVD time per refresh", unit="s") == 18
    assert value_of(table, metric="gradient pass time", unit="s") == 6
    assert value_of(table, metric="default lam", unit="dimensionless") == 5e-4


# The loader


@pytest.mark.parametrize("number", NUMBERS)
def test_number_and_stem_load_the_same_table(number: int) -> None:
    pd.testing.assert_frame_equal(load_paper_table(number), load_paper_table(paper.PAPER_TABLES[number]))


def test_unstated_text_is_empty_and_unstated_number_is_missing() -> None:
    assert (load_paper_table(10)["quantizer"] == "").all()
    table = load_paper_table(11)
    assert table.loc[table["variant"] == "Baseline", "power"].isna().all()


@pytest.mark.parametrize("name", [5, 12, True, "6", "table06", "", None])
def test_unknown_name_lists_what_exists(name: object) -> None:
    with pytest.raises(ValueError, match="6, 7, 8, 9, 10, 11.*table06_pcdr_selection.*second_hand"):
        load_paper_table(name)  # type: ignore[arg-type]


def test_without_the_repository_the_error_carries_the_repair(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(paper, "__file__", str(tmp_path / "site-packages" / "s2d" / "lab" / "paper.py"))
    with pytest.raises(FileNotFoundError, match="clone the repository"):
        load_paper_table(6)


# The files beside the data


def test_readme_names_every_file_and_says_nothing_was_measured() -> None:
    text = (ROOT / "data" / "paper" / "README.md").read_text(encoding="utf-8")
    assert "Nothing in this folder was measured here" in text
    for stem in (*paper.PAPER_TABLES.values(), paper.SECOND_HAND):
        assert f"`{stem}.csv`" in text


def test_citation_names_the_paper_and_its_six_authors() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["cff-version"] == "1.2.0"
    assert citation["license"] == "Apache-2.0"
    cited = citation["preferred-citation"]
    assert "arXiv:2602.14432" in [identifier["value"] for identifier in cited["identifiers"]]
    assert [f"{author['given-names']} {author['family-names']}" for author in cited["authors"]] == [
        "Arnav Chavan",
        "Nahush Lele",
        "Udbhav Bamba",
        "Sankalp Dayal",
        "Aditi Raghunathan",
        "Deepak Gupta",
    ]


def test_license_is_the_full_apache_2_text() -> None:
    text = (ROOT / "LICENSE").read_text(encoding="utf-8")
    assert "Version 2.0, January 2004" in text
    assert "9. Accepting Warranty or Additional Liability." in text
    assert "APPENDIX: How to apply the Apache License to your work." in text
