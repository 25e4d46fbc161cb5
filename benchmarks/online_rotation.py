"""What rotating the inputs of Linear layers online adds to their time, both sides in this process.

    python benchmarks/online_rotation.py                                      # laptop ViT and ViT-S, 1 CPU thread
    python benchmarks/online_rotation.py --model vit_base_patch16_224 --batch 8
    python benchmarks/online_rotation.py --device cuda --dtype float16 --model vit_base_patch16_224 --batch 64

A whole forward pass, without rotation, with Hadamard rotations (inputs of all Linear layers, queries and keys; also
inputs alone) and with dense ones ("learned", whose values do not matter to the time), and the four Linear layers of a
block by themselves. Sides take turns, so that a change of the machine's speed meets all of them.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from common import hardware, timed
from torch import Tensor, nn

from s2d.lab.models import DigitsViT
from s2d.ptq.prepare import prepare
from s2d.ptq.rotation import Rotation, rotate, rotation_flops
from s2d.ptq.sites import QuantizedLinear, quantized_layers

Sides = dict[str, Callable[[], Any]]


def build(name: str, batch: int, device: str, dtype: torch.dtype) -> tuple[nn.Module, Tensor]:
    """A model of random weights, and images."""
    torch.manual_seed(0)
    if name == "laptop":
        model = DigitsViT().build(0)
        size = (model.patch_embed.proj.in_channels, *model.patch_embed.img_size)
    else:
        import timm  # 7 s of import, of no use to the laptop model

        model = timm.create_model(name)
        size = model.default_cfg["input_size"]
    images = torch.randn(batch, *size, device=device, dtype=dtype)
    return model.eval().to(device, dtype), images


def make_dense(model: nn.Module) -> None:
    """Swap the Hadamard rotations of a model for dense matrices of the same values."""
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, Rotation):
                dense = Rotation(**(child.config() | {"kind": "learned"})).to(child.signs.device, child.signs.dtype)
                setattr(parent, name, dense)


def whole_model(model: nn.Module, images: Tensor) -> Sides:
    """Forward passes. Turned queries and keys need the products of attention apart, the other sides have it fused."""
    transforms = {
        "none": lambda model, batches: None,
        "hadamard, inputs only": partial(rotate, heads=False),
        "hadamard": rotate,
        "dense, inputs only": lambda model, batches: (rotate(model, batches, heads=False), make_dense(model)),
    }
    sides = {}
    for label, transform in transforms.items():
        prepared = prepare(model, images[:2])
        transform(prepared, [images[:2]])
        sides[label] = partial(prepared.to(images.dtype), images)
    return sides


def block_layers(model: nn.Module, images: Tensor) -> dict[str, Sides]:
    """The Linear layers of one block, each on random inputs with as many tokens as the model has."""
    prepared = prepare(model, images[:2])
    tokens = len(images) * prepared.pos_embed.shape[1]
    found = {}
    for name, site in quantized_layers(prepared).items():
        if not (isinstance(site, QuantizedLinear) and name.startswith("blocks.0.")):
            continue
        x = torch.randn(tokens, site.in_features, device=images.device, dtype=images.dtype)
        sides: Sides = {"none": partial(nn.functional.linear, x, site.weight, site.bias)}
        for kind in ("hadamard", "learned"):
            rotation = Rotation(site.in_features, kind=kind).to(images.device, images.dtype)
            sides["dense" if kind == "learned" else kind] = partial(rotated_linear, rotation, site, x)
        label = f"{name.removeprefix('blocks.0.')} {site.in_features} to {site.out_features}"
        share = rotation_flops(site.in_features) / (2 * site.in_features * site.out_features)
        found[f"{label} (operations {100 * share:.1f} %)"] = sides
    return found


def rotated_linear(rotation: Rotation, site: QuantizedLinear, x: Tensor) -> Tensor:
    return nn.functional.linear(rotation(x), site.weight, site.bias)


@torch.inference_mode()
def compare(title: str, sides: Sides, rounds: int, device: str) -> None:
    """Print the median time of every side, and the median over rounds of its ratio to the first."""
    for run in sides.values():
        run()  # warm up
    once = max(timed(run, device)[0] for run in sides.values())
    repeats = max(1, int(0.02 / max(once, 1e-6)))  # a clock needs something to measure
    times: dict[str, list[float]] = {label: [] for label in sides}
    for index in range(rounds):
        for label in list(sides)[:: 1 if index % 2 else -1]:
            seconds, _ = timed(lambda run=sides[label]: [run() for _ in range(repeats)], device)
            times[label].append(1000 * seconds / repeats)
    print(title)
    plain, *_ = times.values()
    for label, values in times.items():
        # Neighbouring runs share the machine's mood, so each round is compared by itself.
        low, ratio, high = statistics.quantiles([value / base for value, base in zip(values, plain, strict=True)], n=4)
        print(f"  {label:22s} {statistics.median(values):9.3f} ms   ratio {ratio:5.2f} ({low:.2f} to {high:.2f})")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--model", nargs="+", default=["laptop", "vit_small_patch16_224"], help="laptop, or timm's names"
    )
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", choices=("float32", "float16", "bfloat16"), default="float32")
    parser.add_argument("--batch", type=int, default=8, help="images a forward pass")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1, help="CPU threads")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    for name in args.model:
        model, images = build(name, args.batch, args.device, getattr(torch, args.dtype))
        compare(f"{name}, forward pass of {args.batch} images", whole_model(model, images), args.rounds, args.device)
        for label, sides in block_layers(model, images).items():
            compare(f"{name}, {label}", sides, args.rounds, args.device)
    print(f"{hardware(args.device)}; {args.dtype}, batch {args.batch}, quartiles over {args.rounds} rounds")


if __name__ == "__main__":
    main()
