"""``s2d train`` that is killed in the middle of a step or of writing a checkpoint; test_train_*.py start it.

    [torchrun --nproc-per-node 2] tests/train_worker.py STEP RANK ARGUMENTS OF s2d train

On rank RANK the process kills itself (SIGKILL, nothing is cleaned up) while the checkpoint of step STEP is written: so
the moment depends on what is on the disk, not on a clock.
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

import safetensors.torch

from s2d.command import train
from s2d.train import vision


def main() -> None:
    step, rank, *arguments = sys.argv[1:]
    mine = os.environ.get("RANK", "0") == rank
    save, gather = safetensors.torch.save_file, vision.gather

    def save_file(tensors: dict, path: object, *more: object, **options: object) -> None:
        save(tensors, path, *more, **options)
        if mine and any(f"step-{step}" in part or f"checkpoint-{step}" in part for part in Path(path).parts):
            os.kill(os.getpid(), signal.SIGKILL)

    def gathered(model: object, optimizer: object) -> dict:
        found = gather(model, optimizer)
        counts = [value for name, value in found.items() if name.startswith("optimizer.") and name.endswith(".step")]
        if mine and rank != "0" and counts and int(counts[0]) == int(step):
            os.kill(os.getpid(), signal.SIGKILL)
        return found

    safetensors.torch.save_file, vision.gather = save_file, gathered
    raise SystemExit(train.main(arguments))


if __name__ == "__main__":
    main()
