"""The processes that train together, and what they are able to do."""

from __future__ import annotations

import os
from typing import Any

import torch

from s2d.packages import need
from s2d.train.settings import Settings


def start(settings: Settings, *, cpu: bool = False) -> Any:
    """The processes that train: this one, or those that torchrun started.

    Args:
        settings: of which ``sharding`` counts.
        cpu: whether accelerators are left alone.

    Returns:
        An ``accelerate.PartialState``, which knows them and their devices.

    Raises:
        ValueError: for ``sharding=fsdp2`` without several processes.
        ImportError: without the package accelerate.

    Paper: none.
    """
    accelerate = need("accelerate", "training")
    if settings.sharding == "fsdp2" and int(os.environ.get("WORLD_SIZE", "1")) < 2:
        raise ValueError("sharding=fsdp2 needs several processes: start with torchrun --nproc-per-node N -m s2d train")
    return accelerate.PartialState(cpu=cpu)


def check_precision(settings: Settings, device: torch.device) -> None:
    """ValueError where ``precision=bf16`` is asked for and the device cannot.

    Paper: none.
    """
    if settings.precision != "bf16":
        return
    able = torch.amp.is_autocast_available(device.type)
    if device.type == "cuda":
        able = torch.cuda.is_bf16_supported(including_emulation=False)
    if not able or device.type == "mps":
        raise ValueError(f"precision=bf16 is not supported by {device}: use precision=fp32")


def share_of(settings: Settings, ranks: int) -> tuple[int, int]:
    """Items a process takes at a time, and how often it does before a step.

    Raises:
        ValueError: if they do not make up ``batch_size``.

    Example:
        >>> from s2d.train.settings import VisionSettings
        >>> share_of(VisionSettings(batch_size=256, micro_batch_size=32), ranks=4)
        (32, 2)

    Paper: none.
    """
    whole, micro = settings.batch_size, settings.micro_batch_size
    if whole % ranks:
        raise ValueError(f"batch_size is {whole}, {ranks} processes cannot share it evenly: give a multiple of {ranks}")
    micro = micro or whole // ranks
    if whole % (micro * ranks):
        raise ValueError(
            f"batch_size is {whole}, no multiple of micro_batch_size {micro} times {ranks} processes: give one that is"
        )
    return micro, whole // (micro * ranks)
