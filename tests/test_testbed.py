"""The testbed's table and what is found in it: findings by hand, and the command from nothing on two kernels."""

from __future__ import annotations

import os
from math import log
from pathlib import Path

import matplotlib
import pandas as pd
import pytest

from s2d.lab import recipes as named
from s2d.lab import testbed
from s2d.lab.figures.testbed import testbed_points_lost as draw_points_lost
from s2d.lab.figures.testbed import testbed_runs as draw_runs
from s2d.lab.identity import recipe_key
from s2d.lab.results import load_table, save_table
from s2d.lab.store import Trained

matplotlib.use("agg")

KURTOSIS = {"1x": 4.0, "2x": 10.0, "4x": 19.0, "SGD": 0.25, "wide": 38.0}
LOST = {"1x": 0.02, "2x": 0.05, "4x": 0.15, "SGD": 0.10, "wide": 0.20}


def run_row(kernel: str, seed: int, run: str, **changed) -> dict:
    """A run as it should be: kurtosis, sigma_1 and points lost grow, AdamW (2x) loses 5 points less than SGD."""
    row = {"kernel": kernel, "capability": kernel.upper(), "run": run, "seed": seed, "early_loss": 1.0}
    row |= {"best_validation_accuracy": 0.80, "validation_accuracy": 0.79, "matched_kurtosis": KURTOSIS[run]}
    row |= {"excess_kurtosis": KURTOSIS[run], "sigma_1": KURTOSIS[run] / 10, "FP": 0.80}
    return row | {cell: 0.80 - LOST[run] for cell in testbed.CELLS} | changed


def whole(**changed) -> pd.DataFrame:
    """Two kernels, two seeds, every run; ``changed`` maps "kernel seed run" to other values."""
    keys = [(k, s, r) for k in ("native", "default") for s in (2, 3) for r in testbed.RUNS]
    return pd.DataFrame([run_row(k, s, r, **changed.get(f"{k}_{s}_{r}", {})) for k, s, r in keys])


def found(table: pd.DataFrame, name: str) -> pd.Series:
    rows = testbed.findings(table).set_index("finding")
    return rows.loc[next(finding for finding in rows.index if name in finding)]


# --- findings ---


@pytest.mark.parametrize(
    ("name", "target", "value"),
    [
        ("ln 10 minus the loss after a tenth of the steps: SGD", "above 0.1", log(10) - 1.0),
        ("points of validation accuracy lost since its best: 4x", "below 2", 1.0),
        ("points of test accuracy, 2x minus SGD", "between -3 and 3", 0.0),
        ("ten times SGD's: 4x where both first reach 90%", "above 0", 19.0 - 2.5),
        ("ten times SGD's: 2x at the end", "above 0", 10.0 - 2.5),
        ("ten times SGD's: 4x at the end", "above 0", 19.0 - 2.5),
        ("excess kurtosis, smaller of the increases", "above 0", 6.0),
        ("largest sigma_1 of an FFN weight", "above 0", 0.6),
        ("points lost, smaller of the increases from 1x to 2x and from 2x to 4x: ERQ W3A3", "above 0", 3.0),
        ("points lost, 2x minus SGD: RTN symmetric W4A4", "the same sign in every run", -5.0),
        ("width 128 minus width 64", "above 0", 28.0),
    ],
)
def test_what_holds_everywhere(name, target, value):
    row = found(whole(), name)
    assert row.target == target
    assert (row.held, row.runs, row.seeds) == (4, 4, 2)
    assert [row["mean"], row.low, row.high] == pytest.approx([value] * 3)


def test_kurtosis_of_the_wide_runs_is_short_of_the_paper():
    row = found(whole(), "excess kurtosis at width 128")
    assert (row.target, row.held, row.runs, row["mean"]) == ("above 100", 0, 4, 38.0)


@pytest.mark.parametrize(
    ("name", "changed"),
    [
        ("ln 10 minus the loss after a tenth of the steps: 4x", {"early_loss": 2.25}),
        ("lost since its best: 4x", {"validation_accuracy": 0.77}),
        ("ten times SGD's: 4x at the end", {"excess_kurtosis": 2.4}),
        ("ten times SGD's: 4x where", {"matched_kurtosis": 2.4}),
        ("excess kurtosis, smaller of the increases", {"excess_kurtosis": 9.0}),
        ("largest sigma_1", {"sigma_1": 0.9}),
        ("from 2x to 4x: ERQ W3A3", {"ERQ W3A3": 0.76}),
    ],
)
def test_one_run_that_fails_is_counted(name, changed):
    row = found(whole(default_3_4x=changed), name)
    assert (row.held, row.runs) == (3, 4)
    untouched = testbed.findings(whole()).held.sum()
    assert testbed.findings(whole(default_3_4x=changed)).held.sum() < untouched


def test_growth_has_to_be_seen_at_both_steps():
    row = found(whole(native_2_1x={"excess_kurtosis": 11.0}), "excess kurtosis, smaller of the increases")
    assert (row.held, row["mean"]) == (3, ((-1 + 6) / 2 + 6) / 2)  # kernels of seed 2 averaged, then seeds


def test_outliers_below_zero_are_not_ten_times_less_of_nothing():
    changed = {f"{kernel}_2_SGD": {"excess_kurtosis": -1.0} for kernel in ("native", "default")}
    assert found(whole(**changed), "4x at the end")["mean"] == pytest.approx((19.0 + 16.5) / 2)


def test_who_loses_more_counts_the_runs_on_the_side_of_the_mean():
    changed = {"default_3_SGD": {"ERQ W4A4": 0.79}}  # here SGD loses 1 point and AdamW 5: +4 among -5, -5, -5
    row = found(whole(**changed), "2x minus SGD: ERQ W4A4")
    assert (row.held, row.runs, row["mean"]) == (3, 4, pytest.approx((-5 + (-5 + 4) / 2) / 2))
    half = 12.7062047362 * abs(-5 + 0.5) / 2  # Student's t with one degree of freedom; s / sqrt(2) = |d1 - d2| / 2
    assert [row.low, row.high] == pytest.approx([row["mean"] - half, row["mean"] + half])


def test_standard_deviation_is_over_all_runs_of_a_kind():
    table = whole(**{f"{kernel}_3_4x": {"FP": 0.82} for kernel in ("native", "default")})
    row = found(table, "standard deviation of the test accuracy, points: 4x")
    assert (row.held, row.runs, row.seeds) == (0, 1, 2)
    assert row["mean"] == pytest.approx((4 / 3) ** 0.5)  # 80, 82, 80, 82
    assert found(table, "points: SGD")["mean"] == pytest.approx(0)
    assert found(table, "points: SGD").held == 1


def test_what_is_missing_shows_as_fewer_runs():
    table = whole(native_2_4x={"matched_kurtosis": float("nan")})
    assert found(table, "4x where both first reach").runs == 3
    table = table[table.run != "wide"].query("not (kernel == 'default' and seed == 3 and run == 'SGD')")
    assert found(table, "2x at the end").runs == 3 and found(table, "lost since its best: 2x").runs == 4
    row = found(table, "excess kurtosis at width 128")
    assert (row.runs, row.held) == (0, 0) and pd.isna(row["mean"])


def test_a_run_that_is_there_twice_is_refused():
    with pytest.raises(ValueError, match="kernel native, seed 2, run 4x is there twice"):
        testbed.findings(pd.concat([whole(), whole()[:1]]))


# --- rows ---


def test_the_runs_are_those_the_testbed_needs():
    recipes = [r for run in testbed.RUNS if run != "wide" for r in testbed.recipes(run)]
    assert {recipe_key(r) for r in recipes} == {recipe_key(r) for r in named.testbed_recipes()}
    assert [r.seed for r in testbed.recipes("wide")] == list(named.WIDE_SEEDS)
    with pytest.raises(ValueError, match="unknown run '8x': choose among 4x, SGD"):
        testbed.recipes("8x")


def test_a_row_reads_the_history():
    (recipe,) = testbed.recipes("4x", [2], smoke=True)
    levels = {0: 0.1, 1: 0.5, 2: 0.7, 3: 0.95, recipe.steps: 0.85}
    history = [
        {"step": step, "loss": 3.0 - step / 10, "validation_accuracy": level, "excess_kurtosis": 10.0 * level}
        | {"neuron_kurtosis": 1.0, "max_abs": 2.0 * level}
        for step, level in levels.items()
    ]
    weights = {name: tensor.half() for name, tensor in recipe.model.build(0).state_dict().items()}
    row = testbed.run_row(Trained(recipe, weights, history), images=32)
    assert (row["early_step"], row["early_loss"]) == (3, 2.7)  # the first at or after a tenth of 26 steps
    assert (row["best_validation_accuracy"], row["validation_accuracy"]) == (0.95, 0.85)
    assert row["matched_kurtosis"] == pytest.approx(9.0)  # four fifths of the way from 0.7 to 0.95
    assert (row["excess_kurtosis"], row["max_abs"]) == (8.5, 1.7)
    matrices = {
        name.removesuffix(".weight"): w.double() for name, w in weights.items() if ".mlp.fc" in name and w.ndim == 2
    }
    largest = {name: w.svd().S[0].item() for name, w in matrices.items()}
    assert row["sigma_1_layer"] == max(largest, key=largest.get)
    assert row["sigma_1"] == pytest.approx(max(largest.values()), rel=1e-5)
    unreached = testbed.run_row(Trained(recipe, weights, [*history[:3], history[-1]]), images=32)
    assert pd.isna(unreached["matched_kurtosis"])


# --- the command ---


def test_a_process_with_another_kernel_is_refused(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("ATEN_CPU_CAPABILITY", "avx2")
    with pytest.raises(ValueError, match="not default: start it by --kernels default"):
        testbed.measure("default", ["4x"], [2], scale="smoke", stored=False)


def test_every_kernel_has_a_store_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("S2D_OUTPUT", str(tmp_path))
    monkeypatch.setenv("S2D_STORE", "ordinary")
    monkeypatch.setenv("ATEN_CPU_CAPABILITY", "avx2")
    native, default = testbed.environment("native"), testbed.environment("default", workers=3)
    assert native["S2D_STORE"] == "ordinary" and "ATEN_CPU_CAPABILITY" not in native
    assert default["ATEN_CPU_CAPABILITY"] == "default" and default["S2D_WORKERS"] == "3"
    assert default["S2D_STORE"] == str(tmp_path / "build" / "kernels" / "default")


def test_rows_of_other_code_are_not_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys):
    monkeypatch.setenv("S2D_OUTPUT", str(tmp_path))
    monkeypatch.delenv("S2D_ANY_CODE", raising=False)
    with pytest.raises(ValueError, match="nothing was measured yet"):
        testbed.merged_rows("smoke")
    path = testbed.rows_file("native", "smoke")
    path.parent.mkdir(parents=True)
    rows = whole().query("kernel == 'native'").assign(code=testbed.code())
    rows.loc[rows.seed == 3, "code"] = "other"
    rows.iloc[::-1].to_csv(path, index=False)
    merged = testbed.merged_rows("smoke")
    assert merged.seed.unique().tolist() == [2] and merged.run.tolist() == list(testbed.RUNS)
    assert "5 rows are of other code, not used" in capsys.readouterr().err
    monkeypatch.setenv("S2D_ANY_CODE", "1")
    assert len(testbed.merged_rows("smoke")) == 10


def test_a_kernel_is_added_to_the_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys):
    monkeypatch.setenv("S2D_OUTPUT", str(tmp_path))
    monkeypatch.delenv("S2D_ANY_CODE", raising=False)
    rows = whole().assign(code="other")
    save_table(rows.query("kernel == 'default'"), "testbed", run="smoke", source={})
    path = testbed.rows_file("native", "smoke")
    path.parent.mkdir(parents=True)
    rows.query("kernel == 'native'").to_csv(path, index=False)
    arguments = ["--scale", "smoke", "--add", "--kernels"]
    with pytest.raises(SystemExit):
        testbed.main(arguments)
    assert "rows that code other measured" in capsys.readouterr().err
    monkeypatch.setenv("S2D_ANY_CODE", "1")
    before = path.read_bytes()
    testbed.main(arguments)
    table = load_table("testbed", run="smoke")
    assert table.groupby("kernel").size().to_dict() == {"native": 10, "default": 10} and set(table.code) == {"other"}
    assert path.read_bytes() == before


def test_two_kernels_from_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys):
    """One kernel in this process, the other in a child; then both tables; then nothing is left to do."""
    here = os.environ.get("ATEN_CPU_CAPABILITY", "native")
    other = "native" if here == "default" else "default"
    monkeypatch.setenv("S2D_OUTPUT", str(tmp_path))
    monkeypatch.setenv("S2D_STORE", str(tmp_path / "store"))
    monkeypatch.setenv("S2D_WORKERS", "1")
    monkeypatch.delenv("S2D_ANY_CODE", raising=False)
    seeds = [2, 3]
    arguments = ["--scale", "smoke", "--seeds", "2", "3", "--runs", "4x", "SGD"]
    testbed.main([*arguments, "--kernel", here])
    testbed.main([*arguments, "--kernels", other])
    table = load_table("testbed", run="smoke")
    assert sorted(table.kernel.unique()) == sorted([here, other])
    assert (table.groupby("kernel").capability.nunique() == 1).all()
    assert table.set_index("kernel").capability["default"].unique().tolist() == ["DEFAULT"]
    assert table.groupby(["kernel", "run"]).seed.apply(list).tolist() == [[2, 3]] * 4
    assert table[list(testbed.CELLS)].stack().between(0, 1).all() and table.sigma_1.gt(0).all()
    found = load_table("testbed_findings", run="smoke").set_index("finding")
    assert found.runs[found.index.str.endswith("4x at the end")].tolist() == [4]
    assert "standard deviation" in capsys.readouterr().out
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "build").rglob("*.csv")}
    testbed.measure(here, ["4x", "SGD"], seeds, scale="smoke", stored=False)
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "build").rglob("*.csv")} == before


# --- figures ---


def test_figures_show_every_run():
    table = whole()
    runs, lost = draw_runs(table), draw_points_lost(table)
    assert len(runs.axes) == 3 and len(lost.axes) == len(testbed.CELLS)
    markers = [line for line in runs.axes[1].lines if line.get_linestyle() == "None"]
    drawn = sorted(value for line in markers for value in line.get_ydata())
    assert drawn == sorted(table[table.run != "wide"].excess_kurtosis)
    assert [text.get_text() for text in lost.legends[0].get_texts()] == ["native kernel", "default kernel"]
    for figure in (runs, lost):
        matplotlib.pyplot.close(figure)
