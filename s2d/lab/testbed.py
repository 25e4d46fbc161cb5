"""What the testbed must show, measured: the pretrainings that everything begins with, on each of torch's CPU kernels.

    python -m s2d.lab.testbed                                   (hours from nothing; resumes where it was stopped)
    python -m s2d.lab.testbed --kernels native --runs 4x SGD    (a piece of it)
    python -m s2d.lab.testbed --kernels                         (nothing new: the tables from the rows there are)
    python -m s2d.lab.testbed --add --kernels default           (one more kernel beside what the committed table has)

writes ``data/laptop/testbed.csv``, one row a run, and ``data/laptop/testbed_findings.csv``, what these say.

torch picks its kernels once, when it is imported, by ``ATEN_CPU_CAPABILITY``. So every kernel has a process of its own,
with a store of its own (``build/kernels/<kernel>``; the native one has the ordinary store), and leaves its rows in
``build/testbed``. Rows that other code measured are not used, as in the store (``S2D_ANY_CODE=1`` uses them).
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import cache, partial
from math import inf, log
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd
import torch

from s2d.files import write_text
from s2d.lab.evaluate import CALIBRATION_IMAGES
from s2d.lab.identity import recipe_key
from s2d.lab.origins import at_accuracy
from s2d.lab.paths import output_root
from s2d.lab.quantization import METHOD_CALIBRATION_IMAGES, METHODS, TEST_IMAGES, Subject, over_checkpoints, setting
from s2d.lab.recipes import (
    EVIDENCE_SEEDS,
    GROWTH_STEPS,
    INTERVENTION_STEPS,
    PRETRAIN_STEPS,
    WIDE,
    WIDE_SEEDS,
    pretraining,
)
from s2d.lab.results import load_table, provenance, save_table
from s2d.lab.statistics import paired_interval
from s2d.lab.store import Trained, find_file, obtain_checkpoints
from s2d.lab.training import Recipe
from s2d.layers import linear_maps
from s2d.ptq import parse_bits

KERNELS = {"native": None, "avx2": "AVX2", "default": "DEFAULT"}
"""Kernels by the name ``ATEN_CPU_CAPABILITY`` has for them, and what torch then says it has; native: what it picks."""
RUNS: dict[str, dict[str, Any]] = {
    "4x": {"optimizer": "adamw", "steps": GROWTH_STEPS[2]},
    "SGD": {"optimizer": "sgd", "steps": PRETRAIN_STEPS["sgd"]},
    "2x": {"optimizer": "adamw", "steps": GROWTH_STEPS[1]},
    "1x": {"optimizer": "adamw", "steps": GROWTH_STEPS[0]},
    "wide": {"optimizer": "adamw", "steps": INTERVENTION_STEPS, "width": WIDE},
}
"""The trainings of one seed, most important first; of AdamW where nothing else is said."""
BITS = ("W4A4", "W3A3")
QUANTIZERS = ("RTN symmetric", "RTN asymmetric", "RepQ-ViT", "ERQ")
CELLS = tuple(f"{quantizer} {bits}" for bits in BITS for quantizer in QUANTIZERS)
"""Columns of accuracies at low bits."""
CALIBRATION_SETS = 1  # of 32 images, for the published methods
MATCHED_ACCURACY = 0.9  # of validation: late in SGD's training, half-way through AdamW's
SMOKE = 150  # by how much a trial run is shorter


def recipes(run: str, seeds: Sequence[int] = EVIDENCE_SEEDS, *, smoke: bool = False) -> list[Recipe]:
    """The recipes of one kind of run.

    Args:
        run: a key of :data:`RUNS`.
        seeds: one recipe each; of the wide runs only ``WIDE_SEEDS`` (they are long).
        smoke: the same in small, to try the command: a few steps of a tiny network.

    Raises:
        ValueError: for another run.

    Example:
        >>> [recipe.model.width for recipe in recipes("wide", [2, 9])]
        [128]
    """
    if run not in RUNS:
        raise ValueError(f"unknown run {run!r}: choose among {', '.join(RUNS)}")
    options = dict(RUNS[run])
    if smoke:
        options |= {"steps": options["steps"] // SMOKE, "width": options.get("width", 64) // 4, "depth": 1}
    return [pretraining(seed=seed, **options) for seed in seeds if run != "wide" or seed in WIDE_SEEDS]


# --- one row a run ----------------------------------------------------------------------------------------------------


def run_row(trained: Trained, *, images: int = TEST_IMAGES) -> dict[str, Any]:
    """Everything measured on one run.

    Args:
        trained: a pretraining.
        images: test images.

    Returns:
        optimizer, steps, width, seed, key (of the store); early_step and early_loss (of one batch, at the first
        measurement at or after a tenth of the steps); best_validation_accuracy and validation_accuracy (best of the
        training, at its end); matched_kurtosis (excess kurtosis where the validation accuracy first reaches
        :data:`MATCHED_ACCURACY`, NaN where it never does); excess_kurtosis, neuron_kurtosis, max_abs (of the residual
        stream, at the end); sigma_1 and sigma_1_layer (largest of the FFN weights); FP and :data:`CELLS` (test
        accuracies).
    """
    recipe, history = trained.recipe, trained.history
    early = next(row for row in history if row["step"] >= recipe.steps / 10)
    best, end = max(row["validation_accuracy"] for row in history), history[-1]
    reached = best >= MATCHED_ACCURACY
    sigma = {
        name: torch.linalg.matrix_norm(linear.matrix(), ord=2).item()
        for name, linear in linear_maps(trained.model()).items()
        if ".mlp." in name
    }
    layer = max(sigma, key=sigma.get)
    return {
        "optimizer": recipe.optimizer.name,
        "steps": recipe.steps,
        "width": recipe.model.width,
        "seed": recipe.seed,
        "key": recipe_key(recipe),
        "early_step": early["step"],
        "early_loss": early["loss"],
        "best_validation_accuracy": best,
        "validation_accuracy": end["validation_accuracy"],
        "matched_kurtosis": at_accuracy(history, MATCHED_ACCURACY)["excess_kurtosis"] if reached else float("nan"),
        "excess_kurtosis": end["excess_kurtosis"],
        "neuron_kurtosis": end["neuron_kurtosis"],
        "max_abs": end["max_abs"],
        "sigma_1": sigma[layer],
        "sigma_1_layer": layer,
    } | _accuracies(trained, images)


def _accuracies(trained: Trained, images: int) -> dict[str, float]:
    subject = Subject("", trained, "test", images)
    data = trained.recipe.data
    many, _ = data.fixed_set("calibration", CALIBRATION_IMAGES)
    few, _ = data.fixed_set("calibration", CALIBRATION_SETS * METHOD_CALIBRATION_IMAGES)
    options = {
        "RTN symmetric": {"symmetric": True},
        "RTN asymmetric": {"symmetric": False},
        "RepQ-ViT": METHODS["RepQ-ViT"],
        "ERQ": METHODS["ERQ"],
    }
    found: dict[str, list[float]] = {cell: [] for cell in CELLS}
    for names, calibrations in ((QUANTIZERS[:2], [many]), (QUANTIZERS[2:], few.split(METHOD_CALIBRATION_IMAGES))):
        cells = {f"{name} {bits}": setting(parse_bits(bits), **options[name]) for bits in BITS for name in names}
        for calibration in calibrations:
            for cell, result in zip(cells, subject.measured(list(cells.values()), calibration), strict=True):
                found[cell].append(result["accuracy"])
    means = {cell: sum(values) / len(values) for cell, values in found.items()}
    return {"FP": subject.compared(subject.full)["accuracy"]} | means


def _work(run: str, trained: Trained, *, images: int) -> list[dict[str, Any]]:
    return [{"run": run} | run_row(trained, images=images)]


# --- one file a kernel ------------------------------------------------------------------------------------------------


def rows_file(kernel: str, scale: str) -> Path:
    """Where a kernel leaves its rows."""
    return output_root() / "build" / "testbed" / scale / f"{kernel}.csv"


@cache  # what was read when the process began measured its rows, though a file be edited meanwhile
def code() -> str:
    """Hash of the code that measures, and of everything it imports; comments and docstrings do not count."""
    return provenance("s2d.lab.testbed", {})["source"]


def read_rows(kernel: str, scale: str) -> pd.DataFrame:
    """The rows of a kernel that today's code measured; with ``S2D_ANY_CODE`` set, all of them."""
    path = rows_file(kernel, scale)
    if not path.exists():
        return pd.DataFrame(columns=["run", "key", "code"])
    rows = pd.read_csv(path)
    used = rows if os.environ.get("S2D_ANY_CODE") else rows[rows.code == code()]
    if len(used) < len(rows):
        print(f"{path}: {len(rows) - len(used)} rows are of other code, not used", file=sys.stderr)
    return used


def rows_of_the_table(scale: str) -> None:
    """Put the table's rows where each kernel leaves its own, for kernels that have none here.

    Raises:
        FileNotFoundError: if there is no table.
        ValueError: if other code measured them, unless ``S2D_ANY_CODE`` is set.
    """
    table = load_table("testbed", run=scale)
    other = sorted(set(table.code) - {code()})
    if other and not os.environ.get("S2D_ANY_CODE"):
        raise ValueError(
            f"the table has rows that code {', '.join(other)} measured, and this is {code()}: measure them again "
            "(without --add), or keep them by S2D_ANY_CODE=1"
        )
    for kernel, rows in table.groupby("kernel"):
        if not rows_file(kernel, scale).exists():
            write_text(rows_file(kernel, scale), rows.to_csv(index=False))


def measure(kernel: str, runs: Sequence[str], seeds: Sequence[int], *, scale: str, stored: bool) -> None:
    """Measure what is not measured yet, in this process, which has to have the kernel.

    Args:
        kernel: a key of :data:`KERNELS`.
        runs: keys of :data:`RUNS`; rows are written after each.
        seeds: see :func:`recipes`.
        scale: ``"laptop"`` or ``"smoke"``.
        stored: measure what the store has, and train nothing.

    Raises:
        ValueError: if torch runs another kernel.
    """
    capability = torch.backends.cpu.get_cpu_capability()
    if os.environ.get("ATEN_CPU_CAPABILITY", "native") != kernel or KERNELS[kernel] not in (None, capability):
        raise ValueError(
            f"this process has the kernel {capability}, not {kernel}: start it by --kernels {kernel}, or leave that "
            "out where the CPU does not have it"
        )
    torch.set_num_threads(1)
    smoke = scale == "smoke"
    images = 64 if smoke else TEST_IMAGES
    known = set(read_rows(kernel, scale).key)
    wanted = {run: [r for r in recipes(run, seeds, smoke=smoke) if recipe_key(r) not in known] for run in runs}
    if stored:
        wanted = {run: [r for r in group if find_file(r) is not None] for run, group in wanted.items()}
    trained = obtain_checkpoints(wanted)  # all at once, so that the cores share everything there is to train
    for run, checkpoints in trained.items():
        if checkpoints:
            print(f"{kernel}: measuring {len(checkpoints)} runs {run}", file=sys.stderr, flush=True)
            rows = over_checkpoints(partial(_work, images=images), {run: checkpoints})
            rows = rows.assign(kernel=kernel, capability=capability, code=code())
            known = read_rows(kernel, scale)
            rows = pd.concat([known, rows]) if len(known) else rows
            rows = rows.drop_duplicates(["run", "seed"], keep="last")  # of another version of the recipe
            write_text(rows_file(kernel, scale), rows.to_csv(index=False))


def merged_rows(scale: str = "laptop") -> pd.DataFrame:
    """The rows of all kernels that were measured, in order.

    Returns:
        Columns kernel (asked for), capability (what torch says it has), code (hash of what measured it), run
        (:data:`RUNS`), and those of :func:`run_row`.

    Raises:
        ValueError: if there are none.
    """
    tables = [rows for kernel in KERNELS if len(rows := read_rows(kernel, scale))]
    if not tables:
        raise ValueError("nothing was measured yet by today's code: run python -m s2d.lab.testbed")
    table = pd.concat(tables, ignore_index=True)
    first = ["kernel", "capability", "code"]
    table = table[[*first, *[c for c in table.columns if c not in first]]]
    order = {name: index for index, name in enumerate([*KERNELS, *RUNS])}
    places = {"kernel": table.kernel.map(order), "run": table.run.map(order), "seed": table.seed}
    return table.loc[pd.DataFrame(places).sort_values(list(places), kind="stable").index].reset_index(drop=True)


def environment(kernel: str, workers: int | None = None) -> dict[str, str]:
    """The environment of a process that has a kernel."""
    changed = dict(os.environ)
    changed.pop("ATEN_CPU_CAPABILITY", None)
    if kernel != "native":
        changed |= {"ATEN_CPU_CAPABILITY": kernel, "S2D_STORE": str(output_root() / "build" / "kernels" / kernel)}
    return changed if workers is None else changed | {"S2D_WORKERS": str(workers)}


# --- findings ---------------------------------------------------------------------------------------------------------


class Finding(NamedTuple):
    """Something that has to be so in every run: a number computed from the runs of one seed, and its bounds.

    Attributes:
        name: what the number is.
        needs: the runs it is computed from.
        value: a function of these, run to row.
        above, below: the bounds, exclusive; a finding without bounds asks for the same sign in every run.
    """

    name: str
    needs: tuple[str, ...]
    value: Callable[[Mapping[str, pd.Series]], float]
    above: float = -inf
    below: float = inf

    @property
    def target(self) -> str:
        """The bounds in words."""
        if self.below < inf:
            return f"below {self.below:g}" if self.above == -inf else f"between {self.above:g} and {self.below:g}"
        return "the same sign in every run" if self.above == -inf else f"above {self.above:g}"

    def held(self, values: pd.Series) -> pd.Series:
        """In which of the runs it is so."""
        if (self.above, self.below) == (-inf, inf):
            return values * values.mean() > 0
        return (values > self.above) & (values < self.below)


def points_lost(row: Mapping[str, Any], cell: str) -> float:
    """Accuracy in full precision minus that of a column of :data:`CELLS`, in points.

    Example:
        >>> points_lost({"FP": 0.75, "ERQ W3A3": 0.5}, "ERQ W3A3")
        25.0
    """
    return 100 * (row["FP"] - row[cell])


GROWTH = ("1x", "2x", "4x")


def _smaller_increase(rows: Mapping[str, pd.Series], measured) -> float:
    short, middle, long = (measured(rows[run]) for run in GROWTH)
    return min(middle - short, long - middle)


def _early(rows: Mapping[str, pd.Series], run: str) -> float:
    return log(10) - rows[run].early_loss


def _fall(rows: Mapping[str, pd.Series], run: str) -> float:
    return 100 * (rows[run].best_validation_accuracy - rows[run].validation_accuracy)


def _over_sgd(rows: Mapping[str, pd.Series], run: str, column: str) -> float:
    return rows[run][column] - 10 * max(rows["SGD"][column], 0.0)


def _growth(rows: Mapping[str, pd.Series], column: str) -> float:
    return _smaller_increase(rows, lambda row: row[column])


def _lost_growth(rows: Mapping[str, pd.Series], cell: str) -> float:
    return _smaller_increase(rows, lambda row: points_lost(row, cell))


def _lost_difference(rows: Mapping[str, pd.Series], cell: str) -> float:
    return points_lost(rows["2x"], cell) - points_lost(rows["SGD"], cell)


def _ahead(rows: Mapping[str, pd.Series]) -> float:
    return 100 * (rows["2x"].FP - rows["SGD"].FP)


def _wider(rows: Mapping[str, pd.Series]) -> float:
    return rows["wide"].excess_kurtosis - rows["2x"].excess_kurtosis


def _wide(rows: Mapping[str, pd.Series]) -> float:
    return rows["wide"].excess_kurtosis


_TENTH = "ln 10 minus the loss after a tenth of the steps"
_FALL = "points of validation accuracy lost since its best"
_TEN_TIMES = "excess kurtosis of AdamW minus ten times SGD's"
_INCREASE = "smaller of the increases from 1x to 2x and from 2x to 4x"
FINDINGS = (
    # The loss is that of one batch; 0.1 is several times what it varies by between batches at chance. The shorter
    # runs are not asked: the warm-up takes their tenth.
    *(Finding(f"{_TENTH}: {run}", (run,), partial(_early, run=run), above=0.1) for run in ("4x", "SGD")),
    *(Finding(f"{_FALL}: {run}", (run,), partial(_fall, run=run), below=2) for run in (*GROWTH, "SGD")),
    Finding("points of test accuracy, 2x minus SGD (equal accuracy)", ("2x", "SGD"), _ahead, above=-3, below=3),
    Finding(
        f"{_TEN_TIMES}: 4x where both first reach {MATCHED_ACCURACY:.0%} of validation images",
        ("4x", "SGD"),
        partial(_over_sgd, run="4x", column="matched_kurtosis"),
        above=0,
    ),
    *(
        Finding(
            f"{_TEN_TIMES}: {run} at the end",
            (run, "SGD"),
            partial(_over_sgd, run=run, column="excess_kurtosis"),
            above=0,
        )
        for run in ("2x", "4x")
    ),
    *(
        Finding(f"{what}, {_INCREASE}", GROWTH, partial(_growth, column=column), above=0)
        for what, column in (("excess kurtosis", "excess_kurtosis"), ("largest sigma_1 of an FFN weight", "sigma_1"))
    ),
    *(
        Finding(f"points lost, {_INCREASE}: {cell}", GROWTH, partial(_lost_growth, cell=cell), above=0)
        for cell in CELLS
    ),
    *(
        Finding(f"points lost, 2x minus SGD: {cell}", ("2x", "SGD"), partial(_lost_difference, cell=cell))
        for cell in CELLS
    ),
    Finding(f"excess kurtosis, width {WIDE} minus width 64", ("wide", "2x"), _wider, above=0),
    Finding(f"excess kurtosis at width {WIDE}", ("wide",), _wide, above=100),
)
"""What section 2 of the issue asks of the testbed, one number a seed and kernel."""


def findings(table: pd.DataFrame) -> pd.DataFrame:
    """What the runs say: each finding, in how many runs it held, and its mean over the seeds with a 95 % interval.

    A seed gives about the same on each kernel, so the kernels' values of a seed are averaged before the interval is
    taken: seeds are what is independent.

    Args:
        table: from :func:`merged_rows`; what it lacks shows as fewer runs, none at all as an empty mean.

    Returns:
        Columns finding, target, held, runs (how many pairs of kernel and seed have the runs that it needs, and in how
        many it held), seeds, mean, low, high. The last rows hold the standard deviation of the final test accuracy over
        all runs of a kind, in points: one number, without interval.

    Raises:
        ValueError: if a run is there twice.
    """
    twice = table.duplicated(["kernel", "seed", "run"])
    if twice.any():
        first = table[twice].iloc[0]
        raise ValueError(
            f"kernel {first.kernel}, seed {first.seed}, run {first.run} is there twice: keep one row a run"
        )
    pairs = {pair: {row.run: row for _, row in group.iterrows()} for pair, group in table.groupby(["kernel", "seed"])}
    rows = []
    for finding in FINDINGS:
        known = {pair: finding.value(runs) for pair, runs in pairs.items() if set(finding.needs) <= runs.keys()}
        values = pd.Series(known, dtype=float).dropna()
        row = {"finding": finding.name, "target": finding.target, "held": int(finding.held(values).sum())}
        row |= {"runs": len(values), "seeds": 0}
        if len(values):
            interval = paired_interval(values.groupby(level=1).mean())
            row |= {"seeds": interval.n, "mean": interval.mean, "low": interval.low, "high": interval.high}
        rows.append(row)
    for run in (*GROWTH, "SGD"):
        accuracy = 100 * table[table.run == run].FP
        row = {"finding": f"standard deviation of the test accuracy, points: {run}", "target": "at most 1"}
        spread = accuracy.std(ddof=1)
        row |= {"held": int(spread <= 1), "runs": int(len(accuracy) > 1)}
        rows.append(row | {"seeds": table[table.run == run].seed.nunique(), "mean": spread})
    return pd.DataFrame(rows, columns=["finding", "target", "held", "runs", "seeds", "mean", "low", "high"])


# --- the command ------------------------------------------------------------------------------------------------------


def main(argv: Sequence[str] | None = None) -> None:
    """Measure on every kernel, then write both tables and print the findings."""
    parser = argparse.ArgumentParser(
        prog="python -m s2d.lab.testbed", description="Measure what the testbed must show."
    )
    parser.add_argument("--kernels", nargs="*", choices=list(KERNELS), default=list(KERNELS), help="default: all")
    parser.add_argument(
        "--runs", nargs="+", choices=list(RUNS), default=list(RUNS), help="default: all; wide is native's"
    )
    parser.add_argument("--seeds", nargs="+", type=int, default=list(EVIDENCE_SEEDS), metavar="SEED")
    parser.add_argument("--workers", type=int, help="processes (default: $S2D_WORKERS or the number of cores)")
    parser.add_argument("--scale", choices=["laptop", "smoke"], default="laptop", help="smoke: seconds, to try it")
    parser.add_argument("--add", action="store_true", help="keep the committed rows of other runs and kernels")
    parser.add_argument("--stored", action="store_true", help="measure what is in the stores, train nothing")
    parser.add_argument("--kernel", choices=list(KERNELS), help=argparse.SUPPRESS)  # what the child is called with
    arguments = parser.parse_args(argv)
    if arguments.workers is not None and arguments.workers < 1:
        parser.error(f"--workers is {arguments.workers}: give at least 1")
    if arguments.kernel is not None:
        measure(arguments.kernel, arguments.runs, arguments.seeds, scale=arguments.scale, stored=arguments.stored)
        return
    if arguments.add:
        try:
            rows_of_the_table(arguments.scale)
        except ValueError as error:
            parser.error(str(error))
    for kernel in arguments.kernels:
        # The wide runs are about width, not about kernels.
        runs = [run for run in arguments.runs if run != "wide" or kernel == "native"]
        command = [sys.executable, "-m", "s2d.lab.testbed", "--kernel", kernel, "--scale", arguments.scale]
        command += ["--seeds", *map(str, arguments.seeds)] + ["--stored"] * arguments.stored
        if runs and (
            failed := subprocess.run([*command, "--runs", *runs], env=environment(kernel, arguments.workers)).returncode
        ):
            raise SystemExit(
                f"the kernel {kernel} ended with {failed}: mend that and run again to resume, or leave it out"
            )
    table = merged_rows(arguments.scale)
    found = findings(table)
    parameters = {"matched_accuracy": MATCHED_ACCURACY, "calibration_sets": CALIBRATION_SETS}
    parameters |= {name: sorted(set(table[name].tolist())) for name in ("kernel", "seed", "run")}
    source = provenance("s2d.lab.testbed", parameters)
    save_table(table, "testbed", run=arguments.scale, source=source)
    save_table(found, "testbed_findings", run=arguments.scale, source=source)
    print(found.round(2).to_string(index=False))


if __name__ == "__main__":
    main()
