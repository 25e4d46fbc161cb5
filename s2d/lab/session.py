"""The first call of every notebook: seeds, threads and style, the same everywhere."""

from __future__ import annotations

import random

import numpy as np
import torch


def begin(seed: int) -> None:
    """Seed Python, NumPy and torch, use one thread (faster for small models, and sums have one order), set the style.

    Args:
        seed: any non-negative integer.
    """
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True, warn_only=True)
    from s2d.lab.figures.style import use_style

    use_style()
