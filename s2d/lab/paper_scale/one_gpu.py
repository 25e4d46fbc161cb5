"""Give a command a GPU of its own on a machine with several: python one_gpu.py COMMAND ...

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


def take(devices: list[str], folder: Path, *, wait: float = 1.0) -> str | None:
    """A GPU that no other command of ours holds; waits until there is one.

    Args:
        devices: to choose among; with none, nothing is taken.
        folder: of the locks.
        wait: seconds between two looks.

    Returns:
        The device; its lock is held until this process, and what it becomes, has ended.
    """
    while devices:
        for device in devices:
            lock = os.open(folder / f"s2d-gpu-{device.replace('/', '-')}.lock", os.O_RDWR | os.O_CREAT, 0o666)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                os.close(lock)
                continue
            os.set_inheritable(lock, True)
            return device
        time.sleep(wait)
    return None


def main() -> None:
    """Become the command."""
    device = take(visible(), Path(tempfile.gettempdir()))
    if device is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = device
    os.execvp(sys.argv[1], sys.argv[1:])


if __name__ == "__main__":
    main()
