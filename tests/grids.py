"""Quantization grids from their definition: the oracle of several test files."""

from __future__ import annotations

import numpy as np


def grid_by_hand(values: np.ndarray, n_bits: int, symmetric: bool, granularity: str) -> tuple[np.ndarray, ...]:
    """Scale and zero point (broadcastable to ``values``) and the code range, from the definition, in float64."""
    axes = {"per_tensor": None, "per_channel": tuple(range(1, values.ndim)), "per_token": -1}[granularity]
    low = np.minimum(values.min(axis=axes, keepdims=True), 0)
    high = np.maximum(values.max(axis=axes, keepdims=True), 0)
    if symmetric:
        q_max = 2 ** (n_bits - 1) - 1
        return np.maximum(-low, high) / q_max, np.zeros_like(low), -q_max, q_max
    q_max = 2**n_bits - 1
    scale = (high - low) / q_max
    return scale, np.round(-low / scale), 0, q_max
