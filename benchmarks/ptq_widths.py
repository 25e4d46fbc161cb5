"""CPU time of evaluating one small ViT under many quantizers: one ``quantize`` at a time, and ``quantize_each``.

The settings are those of a checkpoint of the lab: round-to-nearest on both grids at four bit widths, RepQ-ViT, ERQ and
PTQ4ViT at two, each with the logits of all test images. Both ways take turns within one process, cell by cell, and the
least of several times counts, so that a busy machine slows both alike. The weights are random; with trained ones
PTQ4ViT's search is somewhat shorter. ``--against`` takes the first way with the code of another commit:

    python benchmarks/ptq_widths.py --against bd8c35b --repeats 3
"""

from __future__ import annotations

import argparse
import importlib
import io
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterator
from types import ModuleType

import torch
from common import hardware, timed
from torch import Tensor

RTN = [
    {"method": "rtn", "w_bits": bits, "a_bits": bits, "symmetric": symmetric}
    for symmetric in (True, False)
    for bits in (8, 6, 4, 3)
]
STRONG = [
    {"method": method, "w_bits": bits, "a_bits": bits} for method in ("repq_vit", "erq", "ptq4vit") for bits in (4, 3)
]
MODULES = ("s2d.ptq", "s2d.lab.quantization")


def package_modules() -> dict[str, ModuleType]:
    return {name: module for name, module in sys.modules.items() if name.partition(".")[0] == "s2d"}


def load(folder: str | None) -> tuple[ModuleType, ...]:
    """``MODULES`` as they are in a folder, beside those that are loaded already; None for today's."""
    if folder is None:
        return tuple(importlib.import_module(name) for name in MODULES)
    before = package_modules()
    for name in before:
        del sys.modules[name]
    sys.path.insert(0, folder)
    try:
        return tuple(importlib.import_module(name) for name in MODULES)
    finally:
        sys.path.remove(folder)
        for name in package_modules():
            del sys.modules[name]
        sys.modules.update(before)


def unpack(commit: str, folder: str) -> None:
    """The package as it was at a commit."""
    archive = subprocess.run(["git", "archive", commit, "s2d"], check=True, capture_output=True).stdout
    with tarfile.open(fileobj=io.BytesIO(archive)) as tar:
        tar.extractall(folder, filter="data")


def one_by_one(modules, model, settings: list[dict], images: Tensor, test: Tensor) -> Iterator[Tensor]:
    ptq, quantization = modules
    for setting in settings:
        quantized = ptq.quantize(model, calibration=images, batch_size=len(images), **setting)
        yield quantization.logits_of(quantized, test)


def together(modules, model, settings: list[dict], images: Tensor, test: Tensor) -> Iterator[Tensor]:
    ptq, quantization = modules
    for quantized in ptq.quantize_each(model, settings, calibration=images, batch_size=len(images)):
        yield quantization.logits_of(quantized, test)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--depth", type=int, default=4)
    parser.add_argument("--images", type=int, default=1588, help="test images")
    parser.add_argument("--repeats", type=int, default=3, help="the least time of so many counts")
    parser.add_argument("--against", metavar="COMMIT", help="quantize one by one with the code of this commit")
    options = parser.parse_args()
    torch.set_num_threads(1)

    from s2d.lab.data import ClutteredDigits
    from s2d.lab.models import DigitsViT

    now = load(None)
    with tempfile.TemporaryDirectory() as folder:
        if options.against:
            unpack(options.against, folder)
        before = load(folder if options.against else None)
    data = ClutteredDigits(canvas=16)
    model = DigitsViT(width=options.width, depth=options.depth).build(0).eval()
    (test, _), (images, _) = data.fixed_set("test", options.images), data.fixed_set("calibration", 256)

    print(f"width {options.width}, depth {options.depth}, {options.images} images, {hardware()}")
    print("method     settings  one by one  together  ratio  (CPU seconds)", flush=True)
    sums = [0.0, 0.0]
    for settings, calibration in ((RTN, images), (STRONG, images[:32])):
        least: dict[tuple[int, int], float] = {}
        for _ in range(options.repeats):
            arguments = (model, settings, calibration, test)
            ways = one_by_one(before, *arguments), together(now, *arguments)
            for cell in range(len(settings)):
                found = []
                for way, logits in enumerate(ways):
                    seconds, result = timed(lambda logits=logits: next(logits))
                    least[cell, way] = min(seconds, least.get((cell, way), seconds))
                    found.append(result)
                if not torch.equal(*found):
                    print(f"other logits under {settings[cell]}: {(found[0] - found[1]).abs().max():.1e} apart")
        for method in dict.fromkeys(setting["method"] for setting in settings):
            cells = [cell for cell, setting in enumerate(settings) if setting["method"] == method]
            old, new = (sum(least[cell, way] for cell in cells) for way in (0, 1))
            sums = [sums[0] + old, sums[1] + new]
            print(f"{method:10} {len(cells):8d} {old:11.2f} {new:9.2f} {old / new:6.2f}", flush=True)
    print(f"{'all':10} {len(RTN) + len(STRONG):8d} {sums[0]:11.2f} {sums[1]:9.2f} {sums[0] / sums[1]:6.2f}")


if __name__ == "__main__":
    main()
