"""What the guaranteed enclosure of the spectral norm costs beside ``torch.linalg.matrix_norm(w, 2)``, in this process.

    python benchmarks/bound.py

Rounds alternate between the two sides, so that a change of the machine's speed meets both; the median round counts, in
CPU time of this process, so that other processes count less. Every enclosure is compared with the norm in float64.
"""

from __future__ import annotations

import platform
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor

from s2d.bound import spectral_norm_bounds

SHAPES = (
    (16, 16),
    (64, 64),
    (64, 192),
    (192, 64),
    (128, 128),
    (256, 256),
    (384, 1536),
    (768, 768),
    (2304, 768),
    (768, 3072),
    (2048, 2048),
)
ROUNDS = 7
SECONDS = 0.05  # at least, of one side in one round
MATRICES = 5  # of each kind: how many iterations an enclosure takes depends on the matrix


def gaussian(m: int, n: int) -> Tensor:
    return torch.randn(m, n)


def planted(m: int, n: int) -> Tensor:
    """One large singular value above a geometric tail, as a layer with outliers has."""
    r = min(m, n)
    s = 0.97 ** torch.arange(r)
    s[0] = 3.0
    return (torch.linalg.qr(torch.randn(m, r))[0] * s) @ torch.linalg.qr(torch.randn(n, r))[0].T


def seconds_a_call(function: Callable[[Tensor], object], weights: list[Tensor], passes: int) -> float:
    start = time.process_time()
    for _ in range(passes):
        for weight in weights:
            function(weight)
    return (time.process_time() - start) / (passes * len(weights))


def norm(weight: Tensor) -> float:
    return torch.linalg.matrix_norm(weight, 2).item()


def main() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    print(f"{'shape':>10s} {'spectrum':8s} {'matrix_norm':>12s} {'bounds':>12s} {'ratio':>6s} {'width':>8s}")
    for shape in SHAPES:
        for kind in (gaussian, planted):
            weights = [kind(*shape) for _ in range(MATRICES if shape[0] * shape[1] < 1e6 else 1)]
            width = 0.0
            for weight in weights:
                lower, upper = spectral_norm_bounds(weight)
                assert lower <= norm(weight.double()) <= upper
                width = max(width, upper / lower - 1)
            passes = max(1, round(SECONDS / (len(weights) * seconds_a_call(norm, weights, 1))))
            sides = {norm: [], spectral_norm_bounds: []}
            for _ in range(ROUNDS if passes > 1 else 3):
                for side, times in sides.items():
                    times.append(seconds_a_call(side, weights, passes))
            theirs, ours = (1000 * statistics.median(times) for times in sides.values())
            print(
                f"{shape[0]:5d}x{shape[1]:<4d} {kind.__name__:8s} {theirs:9.3f} ms {ours:9.3f} ms {ours / theirs:6.2f} "
                f"{width:8.1e}",
                flush=True,
            )
    print(f"float32 on {platform.machine()}, 1 thread, torch {torch.__version__}")


if __name__ == "__main__":
    main()
