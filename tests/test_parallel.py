"""The worker processes: results in order, jobs after what they need, and no orphan, lost job or silent failure."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from s2d.lab import parallel
from s2d.lab.parallel import run, worker_count


def described(x: int) -> tuple[int, int, int, str | None]:
    return x, os.getpid(), torch.get_num_threads(), os.environ.get("S2D_TEST_OF_WORKERS")


def touch(path: str, needs: str | None) -> bool:
    present = needs is None or Path(needs).exists()
    time.sleep(0.2)  # so that one that should have waited would be first
    Path(path).touch()
    return present


def fail_once_the_other_waits(folder: str, fails: bool) -> None:
    if not fails:
        (Path(folder) / str(os.getpid())).touch()
    while not (fails and list(Path(folder).iterdir())):
        time.sleep(0.01)
    raise ValueError(f"folder is {folder}")


def die(x: int) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def count_forever(pids: str) -> None:
    (Path(pids) / str(os.getpid())).touch()
    while True:
        parallel.report(1)
        time.sleep(0.01)


def names(n: int) -> list[str]:
    return [f"job {index}" for index in range(n)]


def test_results_are_in_order_from_workers_of_one_thread_with_our_environment(monkeypatch) -> None:
    for value in ("first", "second"):  # the server that workers come from is as old as the first
        monkeypatch.setenv("S2D_TEST_OF_WORKERS", value)
        found = run(described, [(x,) for x in range(5)], names=names(5), workers=2, unit="job")
        assert [row[0] for row in found] == list(range(5))
        assert os.getpid() not in {row[1] for row in found} and 1 <= len({row[1] for row in found}) <= 2
        assert {row[2:] for row in found} == {(1, value)}
    assert run(described, [], names=[], workers=2, unit="job") == []


def test_a_job_waits_for_what_it_needs(tmp_path: Path) -> None:
    files = [str(tmp_path / name) for name in "abc"]
    jobs = [(files[0], files[2]), (files[1], None), (files[2], files[1])]
    assert run(touch, jobs, names=names(3), workers=2, unit="file", after=[{2}, (), [1]]) == [True] * 3


def test_an_error_ends_the_others_and_tells_where_it_came_from(tmp_path: Path) -> None:
    jobs = [(str(tmp_path), False), (str(tmp_path), True)]
    with pytest.raises(ValueError, match="folder is") as raised:
        run(fail_once_the_other_waits, jobs, names=names(2), workers=2, unit="job")
    assert any("in fail_once_the_other_waits" in note for note in raised.value.__notes__)
    (waiting,) = tmp_path.iterdir()
    assert wait_until(lambda: gone(int(waiting.name)))


def test_a_worker_that_dies_is_named() -> None:
    with pytest.raises(RuntimeError, match=r"died \(out of memory\?\) during the big one; run again to resume"):
        run(die, [(0,)], names=["the big one"], workers=1, unit="job")


def gone(pid: int) -> bool:
    """Whether a process has ended: nothing is left of it, or only its entry for a parent that does not look."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] == "Z"
    except FileNotFoundError:
        return True


def wait_until(condition, seconds: float = 600) -> bool:
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.05)
    return condition()


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="looks processes up in /proc")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_no_worker_outlives_the_process_that_asked(number: signal.Signals, tmp_path: Path) -> None:
    script = (
        "from s2d.lab.parallel import run; from test_parallel import count_forever\n"
        f"run(count_forever, [({str(tmp_path)!r},)] * 2, names=['a', 'b'], workers=2, unit='count', total=10**9)"
    )
    path = os.pathsep.join([str(Path(__file__).parent), str(Path(parallel.__file__).parents[2])])
    asking = subprocess.Popen([sys.executable, "-c", script], env=os.environ | {"PYTHONPATH": path})
    try:
        assert wait_until(lambda: len(list(tmp_path.iterdir())) == 2)
        asking.send_signal(number)
        assert asking.wait(600) != 0
        assert wait_until(lambda: all(gone(int(path.name)) for path in tmp_path.iterdir()))
    finally:
        asking.kill()
        asking.wait()


def test_number_of_workers(monkeypatch) -> None:
    monkeypatch.setenv("S2D_WORKERS", "5")
    assert worker_count() == 5 and worker_count(3) == 3
    for text in ("0", "-1", "many"):
        monkeypatch.setenv("S2D_WORKERS", text)
        with pytest.raises(ValueError, match=f"'{text}' worker processes .*set S2D_WORKERS to a positive number"):
            worker_count()
    monkeypatch.delenv("S2D_WORKERS")
    assert worker_count() == os.cpu_count()
