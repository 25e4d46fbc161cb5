"""Cluttered digits: real handwritten digits on a canvas with pieces of other digits, made on the fly.

The sources are scikit-learn's ``load_digits`` (1,797 scans of 8x8 pixels, shipped with the package, no network). Clean
digits are so easy that four-bit activations cost nothing; the clutter makes the network work for its answer.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
from torch import Tensor

# The split is over source digits, made once with a fixed seed, before anything else touches the data.
SPLIT_SEED = 20260222
SPLIT_SIZES = {"train": 1100, "validation": 200, "calibration": 100, "test": 397}
SPLITS = tuple(SPLIT_SIZES)
SOURCE_SIZE = 8


@cache
def source_digits() -> tuple[np.ndarray, np.ndarray]:
    """All source digits: images ``(1797, 8, 8)`` in [0, 1] and labels ``(1797,)``."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    return (digits.images / 16.0).astype(np.float32), digits.target.astype(np.int64)


@cache
def split_indices(split: str) -> np.ndarray:
    """Indices of the source digits that belong to one split; the four splits are disjoint and cover everything.

    Args:
        split: one of ``train``, ``validation``, ``calibration``, ``test``.

    Raises:
        ValueError: for an unknown split.

    Example:
        >>> len(split_indices("test"))
        397
    """
    if split not in SPLIT_SIZES:
        raise ValueError(f"unknown split {split!r}: choose one of {', '.join(SPLITS)}")
    order = np.random.default_rng(SPLIT_SEED).permutation(sum(SPLIT_SIZES.values()))
    ends = np.cumsum(list(SPLIT_SIZES.values()))
    position = SPLITS.index(split)
    return order[ends[position] - SPLIT_SIZES[split] : ends[position]]


@dataclass(frozen=True)
class ClutteredDigits:
    """The data recipe: how a source digit becomes an image.

    Attributes:
        canvas: side of the square image, in pixels.
        fragments: how many pieces of other digits are pasted as clutter, anywhere on the canvas.
        fragment_size: side of each square piece, in pixels.
        jitter: how many places the digit may be moved along each side, around the middle; None: anywhere. A vision
            transformer learns every place anew, so this decides how many images it needs, not how hard one image is.
    """

    canvas: int = 16
    fragments: int = 4
    fragment_size: int = 3
    jitter: int | None = 4

    def __post_init__(self) -> None:
        if self.canvas < SOURCE_SIZE:
            raise ValueError(f"canvas is {self.canvas}: a digit is {SOURCE_SIZE} pixels wide, use at least that")
        if not 1 <= self.fragment_size <= SOURCE_SIZE:
            raise ValueError(f"fragment_size is {self.fragment_size}: choose 1 to {SOURCE_SIZE}")
        if self.fragments < 0:
            raise ValueError(f"fragments is {self.fragments}: choose 0 or more")
        if self.jitter is not None and self.jitter < 0:
            raise ValueError(f"jitter is {self.jitter}: choose 0 or more, or None for any place")

    @property
    def item_shape(self) -> tuple[int, ...]:
        """What one item is: an image ``(1, canvas, canvas)``."""
        return (1, self.canvas, self.canvas)

    def _compose(self, digit: np.ndarray, pool: np.ndarray, rng: np.random.Generator) -> Tensor:
        """Fragments from ``pool`` at random places, then each digit over them, so that no digit is itself damaged."""
        images, _ = source_digits()
        n = len(digit)
        canvas = np.zeros((n, self.canvas, self.canvas), dtype=np.float32)

        def paste(patches: np.ndarray, *, over: bool, jitter: int | None = None) -> None:
            size = patches.shape[-1]
            free = self.canvas - size
            moved = free if jitter is None else min(jitter, free)
            first = (free - moved) // 2
            corner = rng.integers(first, first + moved + 1, size=(n, 2))
            rows = corner[:, 0, None, None] + np.arange(size)[None, :, None]
            columns = corner[:, 1, None, None] + np.arange(size)[None, None, :]
            where = (np.arange(n)[:, None, None], rows, columns)
            canvas[where] = patches if over else np.maximum(canvas[where], patches)

        span = np.arange(self.fragment_size)
        for _ in range(self.fragments):
            other = pool[rng.integers(0, len(pool), size=n)]
            corner = rng.integers(0, SOURCE_SIZE - self.fragment_size + 1, size=(n, 2))
            rows = corner[:, 0, None, None] + span[None, :, None]
            paste(images[other[:, None, None], rows, corner[:, 1, None, None] + span[None, None, :]], over=False)
        paste(images[digit], over=True, jitter=self.jitter)
        # Centred and scaled by constants rather than by measured moments, so no split leaks into another.
        return torch.from_numpy((canvas - 0.15) / 0.3).unsqueeze(1)

    def training_batch(self, batch_size: int, *, seed: int, step: int) -> tuple[Tensor, Tensor]:
        """The batch of one training step: a pure function of seed and step, so a resumed run sees the same data.

        Args:
            batch_size: number of images.
            seed: seed of the run.
            step: index of the step.

        Returns:
            Images ``(batch_size, 1, canvas, canvas)`` and labels ``(batch_size,)``.
        """
        rng = np.random.default_rng([seed, step])
        pool = split_indices("train")
        digit = pool[rng.integers(0, len(pool), size=batch_size)]
        return self._compose(digit, pool, rng), torch.from_numpy(source_digits()[1][digit])

    def fixed_set(self, split: str, n: int | None = None, *, seed: int = 0) -> tuple[Tensor, Tensor]:
        """A fixed set of images from one split; every source digit appears equally often, up to rounding.

        Args:
            split: ``validation``, ``calibration`` or ``test`` (``train`` works too).
            n: number of images; ``None`` uses each source digit of the split once.
            seed: which placement and clutter to draw.

        Returns:
            Images ``(n, 1, canvas, canvas)`` and labels ``(n,)``.

        Raises:
            ValueError: if ``n`` is not positive or the split is unknown.

        Example:
            >>> images, labels = ClutteredDigits().fixed_set("calibration", 32)
            >>> tuple(images.shape)
            (32, 1, 16, 16)
        """
        pool = split_indices(split)
        n = len(pool) if n is None else n
        if n < 1:
            raise ValueError(f"n is {n}: ask for at least one image of the {split} split")
        rng = np.random.default_rng([SPLIT_SEED, SPLITS.index(split), seed])
        digit = np.resize(pool, n)
        return self._compose(digit, pool, rng), torch.from_numpy(source_digits()[1][digit])
