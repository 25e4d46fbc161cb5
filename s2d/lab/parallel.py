"""One pool of worker processes, for training and for measuring: one thread each, started once, results in order.

The workers are forked from a server that has imported torch and timm (7 s) once. They leave when the process that asked
for them is gone, and are ended when it is interrupted; what they were doing is then lost, so work that takes long keeps
its own unfinished state.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import traceback
from collections.abc import Callable, Collection, Sequence
from multiprocessing.connection import Connection, wait
from typing import Any

import torch

PRELOADED = ("s2d.lab.quantization", "s2d.lab.recipes", "sklearn.datasets", "timm.models.vision_transformer")
"""What every worker needs and what takes long to import."""

_shared: Any = None  # in a worker: the units of work done by all of them


def worker_count(wanted: int | None = None) -> int:
    """How many processes to use: what is asked for, else ``$S2D_WORKERS``, else the number of cores.

    Raises:
        ValueError: if it is not a positive number.

    Example:
        >>> worker_count(3)
        3
    """
    text = str(wanted or os.environ.get("S2D_WORKERS") or os.cpu_count() or 1)
    if not text.isdigit() or int(text) < 1:
        raise ValueError(f"{text!r} worker processes cannot be started: set S2D_WORKERS to a positive number")
    return int(text)


def report(units: int) -> None:
    """Inside a worker: move the progress bar, and leave if the process that asked for the work is gone."""
    parent = multiprocessing.parent_process()
    if parent is not None and not parent.is_alive():  # it was killed: an orphan would go on for minutes, unseen
        sys.exit(1)
    with _shared.get_lock():
        _shared.value += units


def run(
    work: Callable[..., Any],
    jobs: Sequence[tuple],
    *,
    names: Sequence[str],
    workers: int,
    unit: str,
    total: int | None = None,
    after: Sequence[Collection[int]] | None = None,
    label: str = "",
) -> list[Any]:
    """Call ``work(*job)`` for every job in worker processes.

    Args:
        work: importable by its name.
        jobs: arguments; these and the results are pickled.
        names: of the jobs, for error messages.
        workers: how many processes at most.
        unit: what the progress bar counts.
        total: units of all jobs together, where the work itself calls :func:`report`; by default a job is a unit.
        after: for every job the indices of those that must be finished before; by default none.
        label: what the progress bar says.

    Returns:
        The results, in the order of the jobs.

    Raises:
        RuntimeError: if a worker dies, naming its job.
        Exception: what a job raised, with its traceback as a note; the other workers are ended.

    Example:
        >>> run(pow, [(2, 3), (3, 2)], names=["2^3", "3^2"], workers=1, unit="power")
        [8, 9]
    """
    from tqdm import tqdm

    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(PRELOADED))
    counter = context.Value("q", 0)
    waiting = {index: set(after[index]) if after else set() for index in range(len(jobs))}
    results: dict[int, Any] = {}
    idle: list[Connection] = []
    running: dict[Connection, int] = {}
    processes: list[multiprocessing.Process] = []
    # No bar is redrawn more than every few seconds: in a log each redraw is a line.
    bar = tqdm(total=total or len(jobs), unit=unit, desc=label or None, file=sys.stderr, mininterval=5)
    try:
        while waiting or running:
            for index in [index for index, before in waiting.items() if before <= results.keys()]:
                if not idle and len(processes) < workers:
                    idle.append(_start(context, work, counter, count=total is None, processes=processes))
                if idle:
                    running[idle[-1]] = index
                    idle.pop().send(jobs[index])
                    del waiting[index]
            for connection in wait(list(running), timeout=1):
                index = running.pop(connection)
                results[index] = _result(connection, names[index])
                idle.append(connection)
            bar.update(counter.value - bar.n)
    finally:
        bar.close()
        for process in processes:
            process.terminate()
        for process in processes:
            process.join(10)
            process.kill()  # one that does not listen
    return [results[index] for index in range(len(jobs))]


def _start(context: Any, work: Callable, counter: Any, *, count: bool, processes: list) -> Connection:
    """A new worker, and our end of the pipe to it."""
    ours, theirs = context.Pipe()
    arguments = (theirs, work, counter, count, dict(os.environ))
    process = context.Process(target=_serve, args=arguments, daemon=True)
    process.start()
    processes.append(process)
    theirs.close()  # so that its death is the end of the pipe
    return ours


def _result(connection: Connection, name: str) -> Any:
    try:
        succeeded, result = connection.recv()
    except (EOFError, ConnectionError) as error:
        raise RuntimeError(f"a worker process died (out of memory?) during {name}; run again to resume") from error
    if not succeeded:
        raise result
    return result


def _serve(connection: Connection, work: Callable, counter: Any, count: bool, environment: dict[str, str]) -> None:
    """A worker's life: jobs from the pipe, results into it, until there is nobody at the other end."""
    global _shared
    _shared = counter
    os.environ.clear()  # the server's is that of its own start
    os.environ.update(environment)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the process that asked decides
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(1))  # so that no temporary file is left
    torch.set_num_threads(1)
    while True:
        try:
            job = connection.recv()
        except (EOFError, ConnectionError):
            return
        try:
            outcome = True, work(*job)
            if count:
                report(1)
        except Exception as error:
            error.add_note(traceback.format_exc())
            outcome = False, error
        connection.send(outcome)
