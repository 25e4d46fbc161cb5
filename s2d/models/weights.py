"""Weights in files: safetensors only, never by unpickling."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from s2d.packages import need


def read_safetensors(path: Path, option: str, repair: str) -> dict[str, Tensor]:
    """The tensors of a file, on the CPU.

    Args:
        path: a safetensors file.
        option: what the file was given as, for the message.
        repair: what to do about a damaged one.

    Raises:
        ValueError: for a file that is damaged.
        ImportError: without the package safetensors.

    Paper: none
    """
    safetensors = need("safetensors.torch", "a .safetensors file")
    try:
        return safetensors.load_file(path)
    except Exception as error:  # of the safetensors package
        raise ValueError(f"{option} {path} cannot be read ({error}): {repair}") from None
