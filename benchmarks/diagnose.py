"""Time and memory of ``s2d diagnose``, and that neither the one nor the other grows faster than the number of images.

    python benchmarks/diagnose.py                                # a ViT-B on the accelerator, or 2 CPU threads
    python benchmarks/diagnose.py --model vit_small_patch16_224 --images 8 16 --write

Random weights and images: time and memory hardly depend on the values, but for the singular vectors of a layer (a
pretrained network has gaps, which is faster). Each number of images runs in a process of its own, so that one peak is
not another's; memory is what the process holds at its peak beyond model and libraries.
"""

from __future__ import annotations

import argparse
import multiprocessing
import resource
import sys
import time
from collections.abc import Iterator

import torch
from common import best_device, hardware, write_table

from s2d.diagnosis import diagnose

MIB = 2**20


def peak_memory() -> float:
    """Largest resident set of this process so far, in MiB (Linux counts in KiB, macOS in bytes)."""
    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return used / (MIB if sys.platform == "darwin" else 1024)


def measure(name: str, images: int, batch: int, threads: int, device: str) -> dict[str, float | int | str]:
    import timm

    torch.set_num_threads(threads)
    torch.manual_seed(0)
    model = timm.create_model(name).eval().to(device)
    size = model.default_cfg["input_size"]

    def stream() -> Iterator[torch.Tensor]:
        for start in range(0, images, batch):
            yield torch.randn(min(batch, images - start), *size, device=device)

    with torch.no_grad():
        model(torch.randn(1, *size, device=device))
    on_cpu = device == "cpu"
    before = peak_memory() if on_cpu else torch.cuda.memory_allocated() / MIB
    began = time.perf_counter()
    rows = diagnose(model, stream())
    if not on_cpu:
        torch.cuda.synchronize()
    seconds = time.perf_counter() - began
    after = peak_memory() if on_cpu else torch.cuda.max_memory_allocated() / MIB
    about = {"model": name, "images": images, "batch": batch, "threads": threads, "layers": len(rows)}
    return about | {"seconds": seconds, "peak_mib": after - before, "in_all_mib": after}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="vit_base_patch16_224", help="a name of timm's")
    parser.add_argument("--images", type=int, nargs="+", default=[16, 64])
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", default=best_device())
    parser.add_argument("--write", action="store_true", help="keep the table in data/accelerator")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    print(f"{'images':>6s} {'layers':>6s} {'seconds':>8s} {'peak MiB':>9s} {'in all':>7s}")
    rows = []
    for images in args.images:
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            row = pool.apply(measure, (args.model, images, args.batch, args.threads, args.device))
        rows.append(row)
        print(f"{images:6d} {row['layers']:6d} {row['seconds']:8.1f} {row['peak_mib']:9.0f} {row['in_all_mib']:7.0f}")
    print(f"{hardware(args.device)}; {args.model}, batches of {args.batch}")
    if args.write:
        write_table(f"diagnose_{args.model}", rows, args.device)


if __name__ == "__main__":
    main()
