"""A server that forks a process for each job, with the heavy packages imported already; see ``job_client.py``.

    python tests/job_server.py SOCKET

Importing torch, timm and transformers takes seconds, many times what a job of the miniature batch computes. A job is
the same command with the same arguments, in a process of its own that can be killed; only its imports were done before.
The server ends when what started it closes its standard input.
"""

from __future__ import annotations

import importlib
import json
import os
import runpy
import select
import signal
import socket
import sys
import traceback

PRELOADED = (
    "s2d.command.main",
    "s2d.lab.paper_scale.command",
    "timm",
    "timm.optim",
    "transformers",
    "transformers.models.qwen2.modeling_qwen2",
    "accelerate",
    "safetensors.torch",
    "PIL.Image",
    "snakemake.cli",
)


def serve(path: str) -> None:
    for name in PRELOADED:
        importlib.import_module(name)
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(path)
    listener.listen(64)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # children of the server are its handlers, nobody waits for them
    while True:
        ready, _, _ = select.select([listener, sys.stdin], [], [])
        if sys.stdin in ready:
            os._exit(0)
        connection, _ = listener.accept()
        if os.fork() == 0:
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            listener.close()
            handle(connection)
        connection.close()


def handle(connection: socket.socket) -> None:
    """Run one job; kill it when the client is gone."""
    message, streams, _, _ = socket.recv_fds(connection, 1 << 20, 2)
    job = json.loads(message)
    worker = os.fork()
    if worker == 0:
        os.setpgid(0, 0)
        connection.close()
        for stream, number in zip(streams, (1, 2), strict=True):
            os.dup2(stream, number)
        os._exit(run(job))
    while True:
        gone, status = os.waitpid(worker, os.WNOHANG)
        if gone:
            connection.send(bytes([os.waitstatus_to_exitcode(status) & 255]))
            os._exit(0)
        if select.select([connection], [], [], 0.01)[0]:  # it says nothing more, so this is its end
            os.killpg(worker, signal.SIGKILL)
            os._exit(1)


def run(job: dict) -> int:
    """The exit code of ``python -m MODULE ...``."""
    os.chdir(job["folder"])
    os.environ.clear()
    os.environ.update(job["environment"])
    module, sys.argv = job["arguments"][1], [job["arguments"][1], *job["arguments"][2:]]
    sys.path[:] = [job["folder"], *sys.path]
    try:
        runpy.run_module(module, run_name="__main__", alter_sys=True)
        return 0
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
        return 1
    finally:
        sys.stdout.flush()
        sys.stderr.flush()


if __name__ == "__main__":
    serve(sys.argv[1])
