"""Time and peak memory of each quantization method, and how both grow with the number of calibration images.

Each measurement runs in a process of its own, so that one method's peak is not another's. The models are timm's, with
random weights: time and memory do not depend on the values. Memory is what the process needs at its peak beyond model
and images, beside what the activations of the largest single layer take.

    python benchmarks/ptq_cost.py --model vit_small_patch16_224 --images 8 32
"""

from __future__ import annotations

import argparse
import multiprocessing
import resource
import sys
import time

import torch
from common import hardware

from s2d.ptq import METHODS, quantize

MIB = 2**20


def peak_memory() -> float:
    """Largest resident set of this process so far, in MiB (Linux counts in KiB, macOS in bytes)."""
    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return used / (MIB if sys.platform == "darwin" else 1024)


def measure(name: str, method: str, images: int, bits: int, threads: int, device: str) -> dict[str, float]:
    import timm

    torch.set_num_threads(threads)
    torch.manual_seed(0)
    model = timm.create_model(name).eval().to(device)
    x = torch.randn(images, *model.default_cfg["input_size"])
    widest = max(p.numel() // p.shape[1] for p in model.parameters() if p.ndim == 2)
    tokens = model.patch_embed.num_patches + 1
    one_layer = images * tokens * widest * 4 / MIB
    with torch.no_grad():
        model(x[:1].to(device))
    before, began = peak_memory(), time.perf_counter()
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated() / MIB
    quantize(model, method=method, w_bits=bits, a_bits=bits, calibration=x)
    if device == "cuda":
        torch.cuda.synchronize()
    seconds = time.perf_counter() - began
    after = torch.cuda.max_memory_allocated() / MIB if device == "cuda" else peak_memory()
    return {"seconds": seconds, "memory": after - before, "one_layer": one_layer}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", nargs="+", default=["vit_small_patch16_224"], help="names of timm's ViTs")
    parser.add_argument("--method", nargs="+", default=["rtn", "smoothquant", "repq_vit", "erq"], choices=METHODS)
    parser.add_argument("--images", type=int, nargs="+", default=[8, 32], help="numbers of calibration images")
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    print(hardware(options.device))
    print("model                     method       images  seconds  peak MiB  (widest layer's activations, MiB)")
    context = multiprocessing.get_context("spawn")
    for name in options.model:
        for method in options.method:
            for images in options.images:
                with context.Pool(1) as pool:
                    arguments = (name, method, images, options.bits, options.threads, options.device)
                    row = pool.apply(measure, arguments)
                numbers = f"{row['seconds']:8.1f} {row['memory']:9.0f}  ({row['one_layer']:.0f})"
                print(f"{name:25} {method:12} {images:6d} {numbers}", flush=True)


if __name__ == "__main__":
    main()
