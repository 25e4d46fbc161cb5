"""What S2D adds to a training step of the laptop model: AdamW with and without it, both sides in this process.

    python benchmarks/step_overhead.py

Blocks of steps alternate between the two sides, so that a change of the machine's speed meets both. A block is one
whole refresh interval, so the refresh is paid for in full.
"""

from __future__ import annotations

import platform
import statistics
import time

import torch
import torch.nn.functional as F
from tqdm import trange

from s2d import SelectiveSpectralDecay
from s2d.lab.recipes import finetuning

REFRESH_EVERY = 100
BLOCKS = 5


def make_side(with_s2d: bool):
    """A function that trains one block of steps."""
    recipe = finetuning("S2D", seed=0, refresh_every=REFRESH_EVERY)
    model = recipe.model.build(0).train()
    optimizer = recipe.optimizer.build(model)
    if with_s2d:
        SelectiveSpectralDecay(model, **recipe.s2d).attach(optimizer)
    batch = recipe.data.training_batch(recipe.batch_size, seed=0, step=0)

    def block() -> float:
        start = time.perf_counter()
        for _ in range(REFRESH_EVERY):
            F.cross_entropy(model(batch[0]), batch[1]).backward()
            optimizer.step()
            optimizer.zero_grad()
        return (time.perf_counter() - start) / REFRESH_EVERY

    return block


def main() -> None:
    torch.set_num_threads(1)
    sides = {"AdamW": make_side(False), "AdamW + S2D": make_side(True)}
    times: dict[str, list[float]] = {name: [] for name in sides}
    for block in sides.values():
        block()  # warm up
    for _ in trange(BLOCKS, desc="blocks", leave=False):
        for name, block in sides.items():
            times[name].append(block())
    median = {name: statistics.median(values) for name, values in times.items()}
    for name, seconds in median.items():
        spread = (max(times[name]) - min(times[name])) * 500
        print(f"{name:12s} {1000 * seconds:7.2f} ms a step (median of {BLOCKS} blocks, half range {spread:.2f} ms)")
    print(f"ratio        {median['AdamW + S2D'] / median['AdamW']:7.3f}")
    print(f"on {platform.machine()}, 1 thread, torch {torch.__version__}, refresh_every={REFRESH_EVERY}")


if __name__ == "__main__":
    main()
