"""Fashion-MNIST: 70,000 small photographs of clothes in ten classes, for networks that were trained on large ones.

A real classification task on real images, with a free licence and no download from a hub: Debian packages the files
(``dataset-fashion-mnist``, 31 MB).
"""

from __future__ import annotations

import gzip
import hashlib
import os
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

FILES = {
    "train-images-idx3-ubyte.gz": "b0564c3eedabfbf835052cff8503ea422014ce006caf5b757f851416ee8300c7",
    "train-labels-idx1-ubyte.gz": "0ae29f65d86684f32d1b9c85147786c547b9c6aebcaf235f0400a0cce308b056",
    "t10k-images-idx3-ubyte.gz": "cc1d090a38ace84dfa1aa66e3ada7c336ef481a96936906477e6dd344da56eaa",
    "t10k-labels-idx1-ubyte.gz": "8d3605d196f4be44669e46906da9733c8131fef761fdbfec72c424d5222f1a05",
}
"""As Debian packages them: file to SHA-256."""
PARTS = ("train", "t10k")
CLASSES = 10
SIDE = 28
# The published test images are the test split; the others are split once with a fixed seed, and the rest is trained on.
SPLIT_SEED = 20260222
HELD_OUT = {"validation": 4000, "calibration": 1000}
SPLITS = ("train", *HELD_OUT, "test")
# Of ImageNet, on which (or on more of its kind) the backbones were trained.
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def fashion_folder() -> Path:
    """Where the files are: ``$S2D_FASHION_MNIST``, else where Debian puts them."""
    return Path(os.environ.get("S2D_FASHION_MNIST") or "/usr/share/datasets/fashion-mnist")


@cache
def _read(folder: Path) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    parts: dict[str, np.ndarray] = {}
    for name, digest in FILES.items():
        path = folder / name
        if not path.is_file():
            raise FileNotFoundError(
                f"no {path}: install Debian's package dataset-fashion-mnist, or unpack it anywhere (apt-get download "
                "dataset-fashion-mnist && dpkg -x dataset-fashion-mnist_*.deb FOLDER) and set "
                "S2D_FASHION_MNIST=FOLDER/usr/share/datasets/fashion-mnist"
            )
        content = path.read_bytes()
        found = hashlib.sha256(content).hexdigest()
        if found != digest:
            raise ValueError(f"{path} has the SHA-256 {found}, and the published file has {digest}: install it anew")
        values = np.frombuffer(gzip.decompress(content), dtype=np.uint8)
        parts[name] = values[16:].reshape(-1, SIDE, SIDE) if "images" in name else values[8:].astype(np.int64)
    return {part: (parts[f"{part}-images-idx3-ubyte.gz"], parts[f"{part}-labels-idx1-ubyte.gz"]) for part in PARTS}


def photographs(split: str) -> tuple[np.ndarray, np.ndarray]:
    """The images and labels of one split; the four are disjoint and cover everything.

    Args:
        split: ``train``, ``validation``, ``calibration`` or ``test``.

    Returns:
        Grey values ``(n, 28, 28)``, uint8, and labels ``(n,)`` from 0 to 9.

    Raises:
        FileNotFoundError: naming the package to install.
        ValueError: for an unknown split, or files that are not the published ones.

    Paper: none.
    """
    if split not in SPLITS:
        raise ValueError(f"unknown split {split!r}: choose one of {', '.join(SPLITS)}")
    return _split(split, fashion_folder())


@cache
def _split(split: str, folder: Path) -> tuple[np.ndarray, np.ndarray]:
    if split == "test":
        return _read(folder)["t10k"]
    images, labels = _read(folder)["train"]
    order = np.random.default_rng(SPLIT_SEED).permutation(len(images))
    ends = dict(zip(HELD_OUT, np.cumsum(list(HELD_OUT.values())).tolist(), strict=True))
    last = max(ends.values())
    chosen = order[last:] if split == "train" else order[ends[split] - HELD_OUT[split] : ends[split]]
    return images[chosen], labels[chosen]


@dataclass(frozen=True)
class FashionMNIST:
    """The data recipe: Fashion-MNIST at the size, in the colours and on the scale that a backbone was trained with.

    Attributes:
        image_size: side of the square image, in pixels; the 28 of the files are interpolated to others.
    """

    image_size: int = 28

    def __post_init__(self) -> None:
        if self.image_size < 1:
            raise ValueError(f"image_size is {self.image_size}: give a positive number of pixels")

    @property
    def item_shape(self) -> tuple[int, ...]:
        """What one item is: an image ``(3, image_size, image_size)``."""
        return (3, self.image_size, self.image_size)

    def _items(self, split: str, chosen: np.ndarray) -> tuple[Tensor, Tensor]:
        images, labels = photographs(split)
        grey = torch.from_numpy(images[chosen])[:, None].float() / 255
        grey = F.interpolate(grey, size=self.image_size, mode="bilinear", align_corners=False)
        mean, std = (torch.tensor(values).view(3, 1, 1) for values in (MEAN, STD))
        return (grey - mean) / std, torch.from_numpy(labels[chosen])

    def training_batch(self, batch_size: int, *, seed: int, step: int) -> tuple[Tensor, Tensor]:
        """The batch of one training step: a pure function of seed and step, so a resumed run sees the same data.

        Args:
            batch_size: number of images.
            seed: seed of the run.
            step: index of the step.

        Returns:
            Images ``(batch_size, 3, image_size, image_size)`` and labels ``(batch_size,)``.
        """
        total = len(photographs("train")[1])
        return self._items("train", np.random.default_rng([seed, step]).integers(0, total, size=batch_size))

    def fixed_set(self, split: str, n: int | None = None, *, seed: int = 0) -> tuple[Tensor, Tensor]:
        """A fixed set of images from one split, none of them twice.

        Args:
            split: ``validation``, ``calibration`` or ``test`` (``train`` works too).
            n: number of images; ``None`` uses all.
            seed: which are drawn.

        Returns:
            Images ``(n, 3, image_size, image_size)`` and labels ``(n,)``.

        Raises:
            ValueError: if ``n`` is not positive or more than there are, or the split is unknown.
        """
        total = len(photographs(split)[1])
        n = total if n is None else n
        if not 1 <= n <= total:
            raise ValueError(f"n is {n}: the {split} split has 1 to {total} images")
        return self._items(split, np.random.default_rng([SPLIT_SEED, SPLITS.index(split), seed]).permutation(total)[:n])
