"""A PBS of one machine that loses jobs: stands for ``qsub``, ``qstat`` and ``qdel``, by the name it is called by.

One in ten submissions goes wrong, drawn from a seed, the job and how often it was tried, so every run of a batch loses
the same: the submission is refused, or the job never starts, or it is killed in the middle, a training once it has a
checkpoint. ``LOSSY_PBS`` is the folder of its state, which ``settings.json`` lies in.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

FOLDER = Path(os.environ["LOSSY_PBS"])
SETTINGS = json.loads((FOLDER / "settings.json").read_text())
FATES = ("refused", "never started", "killed")


def fate(name: str, attempt: int) -> str:
    """What happens to a submission."""
    digest = hashlib.sha256(f"{SETTINGS['seed']} {name} {attempt}".encode()).digest()
    lost = int.from_bytes(digest[:4], "big") / 2**32 < SETTINGS["loss"]
    return FATES[digest[4] % len(FATES)] if lost else "runs"


def qsub(script: Path) -> int:
    text = script.read_text()
    properties = json.loads(re.search(r"^# properties = (.*)$", text, re.MULTILINE)[1])
    name = properties["output"][0]
    (FOLDER / "jobs").mkdir(exist_ok=True)
    attempt = len(list((FOLDER / "jobs").glob(f"{name.replace('/', '!')}@*")))
    job = FOLDER / "jobs" / f"{name.replace('/', '!')}@{attempt}"
    job.mkdir()
    decided = fate(name, attempt)
    (job / "fate").write_text(decided)
    if decided == "refused":
        print("qsub: would exceed queue's limits", file=sys.stderr)
        return 1
    if decided == "never started":
        (job / "exit").write_text("-1")
    else:
        # The imports of Snakemake and of the job are done already in a server that forks; see job_server.py.
        (job / "script").write_text(text.replace(f"{sys.executable} -m", f"{SETTINGS['client']} -m"))
        subprocess.Popen(
            [sys.executable, "-S", "-E", str(Path(__file__).resolve()), "execute", str(job)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
    print(f"{job.name}.server")
    return 0


def execute(job: Path) -> None:
    """What a node does with a job."""
    with (job / "output").open("w") as output:
        running = subprocess.Popen(
            ["bash", str(job / "script")], stdout=output, stderr=subprocess.STDOUT, start_new_session=True
        )
    if (job / "fate").read_text() == "killed":
        while running.poll() is None and not in_the_middle(job.name):
            time.sleep(0.01)
        if running.poll() is None:
            os.killpg(running.pid, signal.SIGKILL)
            (job / "struck").touch()
    code = running.wait()
    (job / "exit.new").write_text(str(code if code >= 0 else 256 - code))
    (job / "exit.new").rename(job / "exit")


def in_the_middle(name: str) -> bool:
    """Whether a job has begun its work: a training has a checkpoint, anything else a line of its log."""
    kind, _, rest = name.rpartition("@")[0].replace("!", "/").removeprefix(f"{SETTINGS['work']}/").partition("/")
    path = rest.removesuffix(".json")
    if kind == "trainings":
        return any(Path(SETTINGS["runs"], path, "checkpoints").glob("step-*"))
    log = Path(SETTINGS["work"], "logs", f"{path}.log")
    return log.exists() and log.stat().st_size > 0


def qstat(job: str) -> int:
    place = FOLDER / "jobs" / job.removesuffix(".server")
    if not place.is_dir():
        print(f"qstat: Unknown Job Id {job}", file=sys.stderr)
        return 153
    code = place / "exit"
    found = {"job_state": "F", "Exit_status": int(code.read_text())} if code.exists() else {"job_state": "R"}
    print(json.dumps({"Jobs": {job: found}}))
    return 0


def main() -> int:
    called, arguments = Path(sys.argv[0]).name, sys.argv[1:]
    if called == "qsub":
        return qsub(Path(arguments[-1]))
    if called == "qstat":
        return qstat(arguments[-1])
    if arguments[:1] == ["execute"]:
        execute(Path(arguments[1]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
