"""The Snakefile: the whole batch is planned, in the right order, and bad settings are refused in one sentence."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from s2d.lab.dependencies import published_figures

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOKS = [path.stem for path in sorted(ROOT.glob("notebooks/[0-9][0-9]_*.ipynb"))]
RULES = [name.partition("_")[2] for name in NOTEBOOKS]


def plan(tmp_path: Path, *config: str) -> subprocess.CompletedProcess:
    """Plan the whole batch without running anything; a state folder of its own keeps it from the user's lock."""
    command = [
        sys.executable,
        "-m",
        "snakemake",
        "--cores",
        "2",
        "--dry-run",
        "--forceall",
        "--printshellcmds",
        "--nolock",
    ]
    return subprocess.run(
        [*command, "--config", *config],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env={"PATH": "/usr/bin:/bin", "HOME": str(tmp_path), "XDG_CACHE_HOME": str(tmp_path)},
    )


@pytest.mark.parametrize(
    ("scale", "run"), [("smoke", "smoke"), ("laptop", "laptop"), ("gpu", "gpu"), ("paper", "paper_scale")]
)
def test_every_notebook_is_run_once_with_the_parameters_of_its_scale(tmp_path, scale, run):
    done = plan(tmp_path, f"scale={scale}", "from=store")
    assert done.returncode == 0, done.stderr
    text = done.stdout + done.stderr
    assert re.findall(r"^ +threads: (\d+)$", text, re.MULTILINE) == ["2"] * len(NOTEBOOKS)  # each runs alone
    runs = re.findall(r"s2d\.lab\.notebook run notebooks/(\w+)\.ipynb (\S+) --params (\S+)", text)
    assert sorted(name for name, _, _ in runs) == NOTEBOOKS
    for name, output, params in runs:
        assert output == f"build/{run}/{name}.ipynb"
        assert params == f"notebooks/params/{scale}/{name}.yaml"


def test_scratch_uses_a_store_of_its_own(tmp_path):
    text = plan(tmp_path, "scale=laptop", "from=scratch").stdout
    assert re.search(r"S2D_STORE=\S*build/store-scratch", text)
    assert "S2D_STORE= " in plan(tmp_path, "scale=laptop", "from=store").stdout


@pytest.mark.parametrize(
    ("config", "message"),
    [("scale=papre", "SCALE=papre has no parameters"), ("from=nothing", "FROM=nothing: choose store")],
)
def test_bad_settings_are_refused(tmp_path, config, message):
    done = plan(tmp_path, config)
    assert done.returncode != 0
    assert message in done.stdout + done.stderr


def test_the_scale_paper_says_all_that_it_lacks_before_any_work(tmp_path):
    for name in ("notebooks", "s2d", "data", "paper"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__", "checkpoints"))
    shutil.copy(ROOT / "Snakefile", tmp_path)
    environment = os.environ | {"HOME": str(tmp_path), "PYTHONPATH": str(tmp_path), "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-m", "snakemake", "--cores", "1", "--config", "scale=paper"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env=environment)
    assert done.returncode != 0
    lacks = (
        "a GPU",
        "table06_pcdr_selection.csv",
        "IMAGENET=",
        "GSM8K=",
        "DOLCI=",
        "weights of SigLIP2",
        "weights of DINOv3",
    )
    assert [text for text in lacks if text not in done.stderr] == []
    assert not (tmp_path / "build").exists()


@pytest.fixture(scope="module")
def finished_batch(tmp_path_factory) -> Path:
    """A copy of the repository in which every output is there and up to date."""
    folder = tmp_path_factory.mktemp("batch")
    measured = ("real", "encoder", "language", "self_supervised")
    for name in ("notebooks", "s2d", "data/paper", *(f"data/{each}" for each in measured)):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "Snakefile", folder)
    (folder / "data" / "laptop").mkdir()
    for name in {table for tables in published_figures().values() for table in tables if table.startswith("laptop/")}:
        (folder / "data" / f"{name}.csv").write_text("written by a command, not by a notebook\n")
    planned = snakemake(folder, "--dry-run", "--forceall")
    lines = re.findall(r"^ +output: (.*)$", planned, re.MULTILINE)
    outputs = [name.removesuffix(" (update)") for line in lines for name in line.split(", ")]
    assert len(outputs) > 50
    for name in outputs:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("")
    snakemake(folder, "--touch")
    return folder


def snakemake(folder: Path, *arguments: str) -> str:
    environment = {"PATH": "/usr/bin:/bin", "HOME": str(folder), "XDG_CACHE_HOME": str(folder)}
    command = [sys.executable, "-m", "snakemake", "--cores", "2", *arguments, "--config", "scale=laptop", "from=store"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


@pytest.mark.parametrize(
    ("changed", "rerun"),
    [
        (None, set()),
        ("notebooks/params/laptop/01_outlier_origins.yaml", {"outlier_origins", "figures"}),
        ("notebooks/params/laptop/11_ablations.yaml", {"ablations", "figures"}),
        ("notebooks/90_figures.ipynb", {"figures"}),
        ("s2d/lab/staleness.py", {"ablations", "real_encoder", "figures"}),
        ("s2d/lab/origins.py", {"outlier_origins", "bound_and_pcdr", "origin_evidence", "figures"}),
        ("s2d/lab/figures/style.py", {"figures"}),
        ("s2d/lab/pages.py", set()),
        ("data/laptop/tuning.csv", {"frontier", "figures"}),
        ("data/paper/table07_ffn_statistics.csv", {"ablations", "self_supervised", "figures"}),
        ("s2d/lab/training.py", set(RULES) - {"real_networks", "by_hand"}),
        ("s2d/lab/moving/rounding.py", set()),
    ],
)
def test_a_change_reruns_what_depends_on_it_and_nothing_else(finished_batch, changed, rerun):
    path = finished_batch / (changed or "Snakefile")
    text, before = path.read_text(), path.stat()
    if changed is not None:
        path.write_text(text + "\n")
    try:
        rules = re.findall(r"^rule (\w+):$", snakemake(finished_batch, "--dry-run"), re.MULTILINE)
    finally:
        path.write_text(text)
        os.utime(path, (before.st_atime, before.st_mtime))
    assert set(rules) - {"all"} == rerun


def test_tables_that_are_there_stay_while_a_notebook_runs_and_when_it_fails(finished_batch, tmp_path):
    folder = tmp_path / "batch"
    shutil.copytree(finished_batch, folder)
    table, params = folder / "data/laptop/bound.csv", folder / "notebooks/params/laptop/03_bound_and_pcdr.yaml"
    table.write_text("committed")  # Snakemake would delete it, and studies read theirs where checkpoints are missing
    params.write_text(params.read_text() + "\nno_such_parameter: 1\n")
    command = [sys.executable, "-m", "snakemake", "--cores", "1", "build/laptop/03_bound_and_pcdr.ipynb"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, env=os.environ | {"HOME": str(folder)})
    assert done.returncode != 0 and "no_such_parameter" in done.stdout + done.stderr
    assert table.read_text() == "committed"
