"""The paper's batch in miniature, from training to tables; and again on a cluster that loses jobs.

Jobs are the real commands on small random networks of the paper's classes and made data (``paper/tiny.yaml``), each in
a process of its own. Only their imports are done beforehand, by a server that forks (``job_server.py``): with them
forty jobs would take minutes, and measure how fast torch is imported.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pandas as pd
import pytest
import yaml

from s2d.lab.paper_scale.experiments import TABLES, reported_rows
from s2d.lab.paper_scale.merge import compare
from s2d.lab.paper_scale.split import put_aside
from s2d.lab.paper_scale.tiny import make_tiny

ROOT = Path(__file__).resolve().parents[1]
PAPERS = [table for table in TABLES if table != "sweep"]
SWEEP = "{network: SigLIP2-B/16-384, quantizer: ERQ, bits: [W4A4], set: {lr: [5e-3, 1e-2]}}"
LOST = "6 7 8 9 11"  # tables of the batch whose jobs are lost: 42 jobs
ENVIRONMENT = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}


@pytest.fixture(scope="module")
def client() -> Iterator[str]:
    """What stands for ``python`` in a command of a job."""
    with tempfile.TemporaryDirectory() as folder:  # the path of a socket has to be short
        socket = Path(folder, "socket")
        server = subprocess.Popen(
            [sys.executable, str(ROOT / "tests" / "job_server.py"), str(socket)],
            stdin=subprocess.PIPE,
            env=os.environ | ENVIRONMENT,
        )
        try:
            while not socket.exists():
                assert server.poll() is None, "the server of jobs has ended"
                time.sleep(0.05)
            yield f"{sys.executable} -S -E {ROOT}/tests/job_client.py {socket}"
        finally:
            server.stdin.close()
            server.wait()


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("made") / "tiny"
    make_tiny(folder)
    return folder


def place(folder: Path, made: Path) -> Path:
    """A folder from which the batch can be started, with nothing in it but what the batch reads."""
    for name in ("paper", "profiles"):
        shutil.copytree(ROOT / name, folder / name)
    (folder / "build").mkdir()
    (folder / "build" / "tiny").symlink_to(made)
    return folder


def snakemake(folder: Path, *arguments: str, path: str = "", **environment: str) -> subprocess.CompletedProcess:
    """The batch in miniature; the last arguments are of ``--config``."""
    command = [sys.executable, "-m", "snakemake", "-s", "paper/Snakefile", "--configfile", "paper/tiny.yaml"]
    environment = (
        ENVIRONMENT
        | {"S2D_OUTPUT": str(folder), "HOME": str(folder), "PATH": f"{path}{os.environ['PATH']}"}
        | environment
    )
    return subprocess.run([*command, *arguments], cwd=folder, capture_output=True, text=True, env=environment)


@pytest.fixture(scope="module")
def tables(client, made, tmp_path_factory) -> dict[str, Path]:
    """Every table of the paper, made on this machine."""
    folder = place(tmp_path_factory.mktemp("local"), made)
    put_aside(made / "imagenet" / "train", folder / "split", share=0.25, seed=0)
    asked = [f"tables={' '.join(TABLES)}", f"IMAGENET_SPLIT={folder / 'split'}", f"sweep={SWEEP}"]
    done = snakemake(folder, "--cores", "2", "--config", f"python={client}", *asked)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return {table: folder / "data" / "tiny" / f"{TABLES[table]}.csv" for table in TABLES}


def test_a_sweep_has_a_row_for_each_setting_on_the_images_put_aside(tables):
    found = pd.read_csv(tables["sweep"], keep_default_na=False)
    assert list(zip(found["lr"], found["bits"], strict=True)) == [
        (lr, b) for lr in (5e-3, 1e-2) for b in ("FP", "W4A4")
    ]
    assert (found["items"] == 16).all() and set(found["dataset"]) == {"put aside"}


def test_every_number_of_the_paper_that_a_job_can_give_has_one_of_ours(tables):
    left_out = {"SVD time per refresh", "gradient pass time", "default lam"}
    for table in PAPERS:
        reported = [row for row in reported_rows(table) if row["metric"] not in left_out]
        ours = pd.read_csv(tables[table], keep_default_na=False, na_values=[""])
        beside = compare(ours, table)
        assert len(beside) == len(reported) * (2 if table == "7" else 1), table  # both matrices of the FFN
        assert beside["ours"].notna().all() and (beside["seeds"] == 1).all()
        assert (ours["items"] == {"7": 8, "9": 6}.get(table, 32)).all()
        assert json.loads(tables[table].with_suffix(".json").read_text())["parameters"]["smoke_run"]


def test_the_miniature_measures_what_its_jobs_did(tables):
    """Tables that were the same whatever the jobs did would show nothing."""
    folder = tables["6"].parents[2]
    erq = pd.concat(pd.read_csv(tables[table]) for table in ("6", "11"))
    assert erq["value"].nunique() > 2 and erq["value"].max() > 30  # of four classes
    found = json.loads((folder / "build/paper_tiny/trainings/siglip2-b-16-384/s2d/seed0.json").read_text())
    assert found["s2d_layers"] > 0  # so that resuming a training resumes a decay
    language = pd.read_csv(tables["9"])
    assert 0 < language["value"].max() < 100
    runs = folder / "build" / "paper_tiny" / "runs" / "siglip2-b-16-384"
    settings = json.loads((runs / "s2d-power-3" / "seed0" / "settings.json").read_text())["settings"]
    assert (settings["decay"], settings["power"], settings["criterion"]) == ("s2d", 3, "activation")
    assert (
        json.loads((runs / "s2d_without_pcdr" / "seed0" / "settings.json").read_text())["settings"]["criterion"]
        == "all"
    )
    assert (runs / "s2d-qat-W3A4" / "seed0" / "quantized").is_dir()


@pytest.fixture(scope="module")
def lossy(client, made, tmp_path_factory) -> tuple[Path, subprocess.CompletedProcess]:
    """The batch by the profile of a PBS cluster, whose commands here lose one job in ten."""
    folder = place(tmp_path_factory.mktemp("lossy"), made)
    (folder / "bin").mkdir()
    for name in ("qsub", "qstat", "qdel"):
        script = folder / "bin" / name
        script.write_text(f'#!/bin/sh\nexec {sys.executable} -S -E {folder}/bin/commands/{name} "$@"\n')
        script.chmod(0o755)
        (folder / "bin" / "commands").mkdir(exist_ok=True)
        (folder / "bin" / "commands" / name).symlink_to(ROOT / "tests" / "lossy_pbs.py")
    state = folder / "pbs"
    state.mkdir()
    tiny = yaml.safe_load((folder / "paper" / "tiny.yaml").read_text())
    settings = {"seed": 22, "loss": 0.1, "client": client, "work": tiny["work"], "runs": tiny["runs"]}
    (state / "settings.json").write_text(json.dumps(settings))
    arguments = [
        "--workflow-profile",
        "profiles/cluster-generic",
        "--jobs",
        "3",
        "--seconds-between-status-checks",
        "1",
    ]
    own = {"path": f"{folder}/bin:{Path(sys.executable).parent}:", "LOSSY_PBS": str(state)}
    done = snakemake(folder, *arguments, "--config", f"tables={LOST}", f"python={client}", **own)
    return folder, done


def test_a_batch_of_which_one_job_in_ten_is_lost_finishes_by_itself_with_the_same_tables(lossy, tables):
    folder, done = lossy
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    jobs = list((folder / "pbs" / "jobs").iterdir())
    names = {job.name.rpartition("@")[0] for job in jobs}
    lost = [job for job in jobs if (job / "fate").read_text() != "runs"]
    assert len(names) >= 40 and len(jobs) == len(names) + len([job for job in lost if not finished(job)])
    assert {(job / "fate").read_text() for job in lost} == {"refused", "never started", "killed"}
    for table in LOST.split():
        again = folder / "data" / "tiny" / f"{TABLES[table]}.csv"
        assert again.read_bytes() == tables[table].read_bytes(), table


def finished(job: Path) -> bool:
    return (job / "exit").exists() and (job / "exit").read_text() == "0"


def test_a_training_that_was_killed_went_on_from_its_checkpoint(lossy):
    folder, _ = lossy
    struck = [job.name.rpartition("@")[0] for job in (folder / "pbs" / "jobs").iterdir() if (job / "struck").exists()]
    killed = [name.replace("!", "/") for name in struck if "trainings!" in name]
    assert killed
    for name in killed:
        log = folder / name.replace("/trainings/", "/logs/").replace(".json", "/train.log")
        assert "goes on at step" in log.read_text()
