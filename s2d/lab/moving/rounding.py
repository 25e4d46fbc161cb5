"""Activations on a grid of few points."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from s2d.lab.moving.picture import GREY, RED, TEAL, Choice, Picture, Slider
from s2d.ptq.quantizers import fake_quantize

BITS = range(2, 9)
GRANULARITIES = {"per tensor": (0, 1), "per token": (1,), "per channel": (0,)}
"""What shares a scale, to the axes that are reduced to find it."""
ENTRIES = 40_000  # more would not change the picture, and slow it
STORED = 32  # tokens kept for the web edition


def rounded(x: Tensor, bits: int, granularity: str, *, clip: float = 1.0, zero_point: bool = True) -> tuple:
    """Activations rounded to the nearest point of their grid.

    Args:
        x: ``(tokens, channels)``.
        bits: of the grid, which has ``2 ** bits`` points, one less where it is centred.
        granularity: a key of ``GRANULARITIES``.
        clip: how much of the range the grid spans, in (0, 1].
        zero_point: whether the grid may lie anywhere (asymmetric), or is centred (symmetric).

    Returns:
        The rounded activations, and the scales (of the first row or column where there are several).

    Example:
        >>> x = torch.tensor([[0.1, -0.4, 9.0]])
        >>> rounded(x, 4, "per tensor", zero_point=False)[0].tolist()
        [[0.0, -0.0, 9.0]]

    Paper: none.
    """
    axes = GRANULARITIES[granularity]
    low, high = x.amin(axes, keepdim=True).clamp(max=0), x.amax(axes, keepdim=True).clamp(min=0)
    if zero_point:
        scale = (clip * (high - low) / (2**bits - 1)).clamp(min=1e-12)
        zero = (-clip * low / scale).round()
        return fake_quantize(x, scale, zero, 0, 2**bits - 1), scale, zero
    last = 2 ** (bits - 1) - 1
    scale = (clip * torch.maximum(high, -low) / last).clamp(min=1e-12)
    return fake_quantize(x, scale, 0, -last, last), scale, None


def error(x: Tensor, found: Tensor) -> float:
    """Relative error, ``|found - x| / |x|``."""
    return ((found - x).norm() / x.norm()).item()


class Rounding(Picture):
    """A histogram of real activations, the grid that bits, clipping and granularity lay over it, and the error.

    Args:
        x: ``(tokens, channels)``; of more than 40,000 entries every so many tokens are taken.

    Paper: none (the grids of tables 5 to 9).
    """

    controls = {
        "bits": Slider(2, 8, 1, 4, "bits"),
        "clip": Slider(0.05, 1.0, 0.05, 1.0, "share of the range kept"),
        "granularity": Choice(tuple(GRANULARITIES), "per tensor", "one scale"),
        "grid": Choice(("asymmetric", "symmetric"), "asymmetric", "grid"),
    }
    size = (8.6, 3.4)

    def __init__(self, x: Tensor) -> None:
        super().__init__()
        self.x = x[:: max(1, -(-x.numel() // ENTRIES))].float()
        self.which = "" if len(self.x) == len(x) else " (of a sample)"
        histogram, errors = self.figure.subplots(1, 2, width_ratios=(5, 3))
        counts, edges = np.histogram(self.x.numpy(), bins=120)
        histogram.stairs(counts, edges, fill=True, color=GREY, alpha=0.6)
        histogram.set(yscale="log", xlabel="activation", ylabel="how many", title="activations and grid points")
        (self.grid,) = histogram.plot([], [], color=RED, linestyle="none", marker="|", markersize=14)
        self.height = 0.8
        (self.curve,) = errors.plot(list(BITS), [1] * len(BITS), color=TEAL, marker="o")
        (self.here,) = errors.plot([], [], color=RED, marker="o", markersize=10)
        errors.set(yscale="log", ylim=(1e-3, 1.5), xlabel="bits", title="relative error")
        self.settle(self.grid, self.curve, self.here)
        self._errors: dict[tuple, list[float]] = {}

    def numbers(self) -> dict[str, list]:
        """Some whole tokens: the histogram and the errors of the web edition are those of a sample."""
        return {"x": [[round(value, 3) for value in row] for row in self.x[:: -(-len(self.x) // STORED)].tolist()]}

    def update(self, *, bits: int, clip: float, granularity: str, grid: str) -> str:
        options = {"clip": clip, "zero_point": grid == "asymmetric"}
        key = (clip, granularity, grid)
        if key not in self._errors:
            self._errors[key] = [error(self.x, rounded(self.x, b, granularity, **options)[0]) for b in BITS]
        errors = self._errors[key]
        self.curve.set_ydata(errors)
        now = errors[bits - BITS[0]]
        self.here.set_data([bits], [now])
        values, scale, zero = rounded(self.x, bits, granularity, **options)
        step, last = scale.flatten()[0].item(), 2 ** (bits - 1) - 1
        codes = np.arange(-last, last + 1) if zero is None else np.arange(2**bits) - zero.flatten()[0].item()
        self.grid.set_data(codes * step, [self.height] * len(codes))
        zeroed = ((values == 0) & (self.x != 0)).float().mean().item()
        of = "the grid" if granularity == "per tensor" else f"the first {granularity.split()[1]}'s grid"
        return (
            f"At {bits} bits {granularity}, {grid}, {clip:.0%} of the range: relative error {now:.3f}{self.which}, "
            f"{zeroed:.0%} of the entries become 0 ({of} has steps of {step:.3f})."
        )
