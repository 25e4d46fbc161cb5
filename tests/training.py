"""What the tests of ``s2d train`` share: made images and conversations, a tiny network, and the command."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file

ROOT = Path(__file__).parents[1]
WORKER = Path(__file__).with_name("train_worker.py")
SIZES = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2}
VIT = ["vision", "vit_tiny_patch16_224", "--model-options", json.dumps(SIZES), "--cpu"]
COLOURS = ("blue", "green", "red")


def picture(colour: int, seed: list[int]) -> Image.Image:
    """Noise with one channel brighter, which is its class."""
    pixels = np.random.default_rng(seed).integers(0, 100, (32, 32, 3))
    pixels[..., colour] += 110
    return Image.fromarray(pixels.astype(np.uint8))


def image_folder(root: Path, count: int, seed: int, names: tuple[str, ...] = COLOURS) -> Path:
    """A folder with a folder for each class, of ``count`` PNGs each."""
    for label, name in enumerate(names):
        (root / name).mkdir(parents=True)
        for i in range(count):
            picture(label % 3, [seed, label, i]).save(root / name / f"{i}.png")
    return root


def settings(**given: object) -> list[str]:
    """``--set`` for a small and quick run."""
    small = {"epochs": 2, "batch_size": 12, "lr": 1e-3, "workers": 0, "checkpoint_every": 2, "warmup_epochs": 0.5}
    return ["--set", *(f"{name}={value}" for name, value in (small | given).items())]


def run(command: list[str], *, torchrun: int = 0) -> subprocess.CompletedProcess:
    """A command in processes of its own, with as many threads as this one, so that sums have the same order."""
    launcher = [sys.executable]
    if torchrun:
        launcher += ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(torchrun)]
    environment = os.environ | {
        "PYTHONPATH": f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}",
        "OMP_NUM_THREADS": str(torch.get_num_threads()),
    }
    return subprocess.run([*launcher, *command], capture_output=True, text=True, env=environment, timeout=600)


def weights(out: Path) -> dict[str, torch.Tensor]:
    return load_file(out / "model" / "model.safetensors")


def largest_difference(one: Path, other: Path) -> float:
    a, b = weights(one), weights(other)
    assert a.keys() == b.keys()
    return max((a[name] - b[name]).abs().max().item() for name in a)
