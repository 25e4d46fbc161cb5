"""Where the repository is, and where results go."""

from __future__ import annotations

import os
from pathlib import Path


def repository_root() -> Path:
    """The folder that holds ``pyproject.toml`` and ``notebooks``, found from this file.

    Raises:
        FileNotFoundError: when the package was installed without the repository.
    """
    root = Path(__file__).resolve().parents[2]
    if not (root / "notebooks").is_dir():
        raise FileNotFoundError(
            f"the lab needs the repository (notebooks/, data/), and {root} has none: clone it and pip install "
            "-e '.[lab]'"
        )
    return root


def output_root() -> Path:
    """Where tables and figures are written: the repository, or ``$S2D_OUTPUT`` (tests spare the committed results)."""
    return Path(os.environ.get("S2D_OUTPUT") or repository_root())
