"""Give a command GPUs of its own on a machine with several: python own_gpus.py COUNT COMMAND ...

On a cluster the scheduler does this. Here each visible GPU has a lock in the temporary folder, which ends with the
process that holds it, however that ends. Run by its path, so that torch is not imported to wait.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path


def visible() -> list[str]:
    """The GPUs that may be used: of ``CUDA_VISIBLE_DEVICES``, else all that ``nvidia-smi`` lists."""
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    if named is not None:
        return [word for word in named.split(",") if word]
    if shutil.which("nvidia-smi") is None:
        return []
    listed = subprocess.run(
        ["nvidia-smi", "--query-gpu=index", "--format=csv,noheader"], capture_output=True, text=True, check=True
    )
    return listed.stdout.split()


def take(devices: list[str], count: int, folder: Path, *, wait: float = 1.0) -> list[str]:
    """Some GPUs that no other command of ours holds; waits until there are as many.

    Args:
        devices: to choose among.
        count: how many; all or none are taken, so that no two commands wait for each other.
        folder: of the locks.
        wait: seconds between two looks.

    Returns:
        The devices; their locks are held until this process, and what it becomes, has ended.

    Raises:
        ValueError: for more than there are.
    """
    if count > len(devices):
        raise ValueError(f"a job wants {count} GPUs, and {len(devices)} are visible here: set gpu lower in the YAML")
    while True:
        held: dict[str, int] = {}
        for device in devices:
            lock = os.open(folder / f"s2d-gpu-{device.replace('/', '-')}.lock", os.O_RDWR | os.O_CREAT, 0o666)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                os.close(lock)
                continue
            held[device] = lock
            if len(held) == count:
                for lock in held.values():
                    os.set_inheritable(lock, True)
                return list(held)
        for lock in held.values():
            os.close(lock)
        time.sleep(wait)


def main() -> None:
    """Become the command; one that wants no GPU becomes it as it is."""
    count = int(sys.argv[1])
    if count:
        try:
            os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(take(visible(), count, Path(tempfile.gettempdir())))
        except ValueError as error:
            sys.exit(f"error: {error}")
    os.execvp(sys.argv[2], sys.argv[2:])


if __name__ == "__main__":
    main()
