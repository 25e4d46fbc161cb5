"""What the benchmarks share: weights of known spectra, errors against float64, clocks that wait, the hardware line."""

from __future__ import annotations

import csv
import io
import os
import re
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from s2d import SingularTriplets
from s2d.estimate import device_name
from s2d.files import write_text

SPECTRA = ("planted", "power law", "flat")
TABLES = Path(__file__).resolve().parents[1] / "data" / "accelerator"


def make_weight(kind: str, m: int, n: int, seed: int, device: str = "cpu") -> Tensor:
    """A random weight: three components above a gaussian bulk, ``s_i = i**-0.5``, or the gaussian bulk alone."""
    generator = torch.Generator(device).manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device=device)

    if kind == "power law":
        r = min(m, n)
        u, v = (torch.linalg.qr(normal(size, r))[0] for size in (m, n))
        return (u * torch.arange(1, r + 1, device=device) ** -0.5) @ v.T
    bulk = normal(m, n) / (m**0.5 + n**0.5)  # its largest singular value is about 1
    if kind == "planted":
        u, v = (torch.linalg.qr(normal(size, 3))[0] for size in (m, n))
        bulk.addmm_(u * torch.tensor([3.0, 2.0, 1.5], device=device), v.T)
    return bulk


def drifted(weight: Tensor, size: float, seed: int) -> Tensor:
    """The weight after a random change of this size relative to its Frobenius norm."""
    generator = torch.Generator(weight.device).manual_seed(seed)
    change = torch.randn(weight.shape, generator=generator, device=weight.device)
    return change.mul_(size * weight.norm() / change.norm()).add_(weight)


def errors(weight: Tensor, triplets: SingularTriplets) -> tuple[float, float]:
    """Largest relative error of the singular values, and that of ``U diag(s**2) V^T``, against float64.

    The oracle is the eigendecomposition of the smaller Gram matrix: several times faster than an SVD, and for the
    *largest* components squaring costs none of the digits that count here.
    """
    k = len(triplets.s)
    a, sigma, b = (part.double() for part in triplets)
    w = weight.double()
    if w.shape[0] < w.shape[1]:
        w, a, b = w.T, b, a
    squares, vectors = torch.linalg.eigh(w.T @ w)
    squares, v = squares[-k:].flip(0), vectors[:, -k:].flip(1)
    s = squares.sqrt()
    true = (w @ v * s) @ v.T
    penalty = torch.linalg.norm((a * sigma**2) @ b.T - true) / torch.linalg.norm(true)
    return ((sigma - s).abs() / s).max().item(), penalty.item()


def timed(function: Callable[[], Any], device: str = "cpu") -> tuple[float, Any]:
    """Seconds the call took, the device's queue emptied before and after, and what it returned.

    With one CPU thread the process's own time counts: on an idle machine it is the wall time, and on a busy one other
    processes count less.
    """
    wait = torch.cuda.synchronize if device.startswith("cuda") else lambda: None
    clock = time.process_time if device == "cpu" and torch.get_num_threads() == 1 else time.perf_counter
    wait()
    start = clock()
    result = function()
    wait()
    return clock() - start, result


def tensor_bytes(tensors) -> int:
    return sum(tensor.nbytes for tensor in tensors)


def hardware(device: str = "cpu") -> str:
    load = f", load {os.getloadavg()[0]:.1f}" if hasattr(os, "getloadavg") else ""
    return f"on {device_name(device)} ({torch.get_num_threads()} CPU threads{load}), torch {torch.__version__}"


def best_device() -> str:
    """The accelerator if there is one, else the processor."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def slug(device: str) -> str:
    """A device's name as part of a file's: ``NVIDIA H100 80GB HBM3`` gives ``nvidia_h100_80gb_hbm3``."""
    return re.sub(r"[^a-z0-9]+", "_", device_name(device).lower()).strip("_")


def write_table(name: str, rows: Sequence[dict[str, Any]], device: str) -> Path:
    """Write ``data/accelerator/NAME_DEVICE.csv``, a row for each measurement, with the device and torch's version.

    Args:
        name: of the table.
        rows: with the same keys each.
        device: such as ``"cuda"``.
    """
    text = io.StringIO()
    about = {"device": device_name(device), "torch": torch.__version__.partition("+")[0]}
    writer = csv.DictWriter(text, [*rows[0], *about], lineterminator="\n")
    writer.writeheader()
    writer.writerows({key: _short(value) for key, value in (row | about).items()} for row in rows)
    path = TABLES / f"{name}_{slug(device)}.csv"
    write_text(path, text.getvalue())
    print(f"written: {path}")
    return path


def _short(value: Any) -> Any:
    return f"{value:.4g}" if isinstance(value, float) else value
