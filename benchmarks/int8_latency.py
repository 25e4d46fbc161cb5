"""Real int8 (ONNX Runtime's integer kernels) beside floating point: latency, file size, agreement with the simulation.

    python benchmarks/int8_latency.py                                # ViT-S at 224, about two minutes
    python benchmarks/int8_latency.py --model vit_base_patch16_224 --batches 1,8
    python benchmarks/int8_latency.py --quick                        # a small ViT, some seconds

Weights are random (a trained model takes as long); the head is drawn wider than timm's, or all logits would be zero.
Round-to-nearest W8A8 calibrated on random images. All sides take turns, call by call, so that a busy machine slows
them alike; the median call is reported. "Error" is the median over images of |logits - other| / |other|. The simulation
it is compared with has attention products in floating point, as the exported model has. Sums in another order round an
input to the next code here and there, and a deep model of random weights makes that large: the last row, the same
simulation in float64, shows how large.
"""

from __future__ import annotations

import argparse
import copy
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import onnxruntime
import timm
import torch
from common import hardware
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from s2d.ptq import quantize
from s2d.ptq.int8 import OPSET, Int8Session, export_int8, saturates, without_product_quantizers

Run = Callable[[Tensor], Tensor]


def make_model(name: str) -> nn.Module:
    torch.manual_seed(0)
    if name == "small":
        model = VisionTransformer(img_size=32, patch_size=4, embed_dim=128, depth=4, num_heads=4, num_classes=10)
    else:
        model = timm.create_model(name)
    nn.init.normal_(model.head.weight, std=model.head.in_features**-0.5)
    return model.eval()


def onnx_float(model: nn.Module, example: Tensor, path: Path, threads: int) -> Run:
    """ONNX Runtime in float32: what int8 has to beat in the same runtime."""
    dynamic = ({0: torch.export.Dim("batch")},)
    program = torch.onnx.export(
        model, (example,), dynamo=True, opset_version=OPSET, dynamic_shapes=dynamic, verbose=False
    )
    program.save(str(path), external_data=False)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = threads, 3
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    return lambda images: torch.from_numpy(session.run(None, {name: images.numpy()})[0])


def medians(sides: dict[str, Run], images: Tensor, rounds: int) -> dict[str, float]:
    """Milliseconds of the median call of every side, the sides taking turns."""
    times: dict[str, list[float]] = {name: [] for name in sides}
    for turn in range(rounds + 1):
        for name, run in sides.items():
            start = time.perf_counter()
            run(images)
            if turn:  # the first call warms up
                times[name].append(1e3 * (time.perf_counter() - start))
    return {name: statistics.median(values) for name, values in times.items()}


def error(found: Tensor, other: Tensor) -> str:
    relative = (found - other).norm(dim=1) / other.norm(dim=1)
    agreement = (found.argmax(1) == other.argmax(1)).double().mean().item()
    return f"{relative.median().item():9.1e} {100 * agreement:6.1f} %"


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="vit_small_patch16_224", help="a timm ViT, or 'small'")
    parser.add_argument("--batches", default="1,8", help="batch sizes, comma-separated")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=15, help="calls that are timed, of each side")
    parser.add_argument("--quick", action="store_true", help="the small model, 5 rounds")
    args = parser.parse_args()
    if args.quick:
        args.model, args.rounds = "small", 5
    torch.set_num_threads(args.threads)
    model = make_model(args.model)
    size = model.patch_embed.img_size[0]
    images = torch.randn(16, 3, size, size, generator=torch.Generator().manual_seed(1))
    calibration = torch.randn(16, 3, size, size, generator=torch.Generator().manual_seed(2))
    quantized = quantize(model, w_bits=8, a_bits=8, calibration=calibration, batch_size=8)
    simulation = without_product_quantizers(quantized)

    with tempfile.TemporaryDirectory() as folder:
        int8_file, float_file = Path(folder) / "int8.onnx", Path(folder) / "float.onnx"
        with torch.inference_mode(False):
            export_int8(quantized, images[:2], int8_file)
            in_float = onnx_float(model, images[:2], float_file, args.threads)
        sides: dict[str, Run] = {
            "torch float32": model,
            "ONNX Runtime float32": in_float,
            "ONNX Runtime int8": Int8Session(int8_file, args.threads),
            "... with uint8 weights": Int8Session(int8_file, args.threads, uint8_weights=True),
            "simulated W8A8 (torch)": simulation,
        }
        megabytes = {"int8": int8_file.stat().st_size / 1e6, "float32": float_file.stat().st_size / 1e6}

    batches = [int(batch) for batch in args.batches.split(",")]
    times = {batch: medians(sides, images[:batch], args.rounds) for batch in batches}
    expected, plain = simulation(images), model(images)
    columns = "".join(f"{f'batch {batch}':>12}" for batch in batches)
    print(f"{'':24}{columns}   error against the simulation   against float32 (top-1 agreement)")
    for name, run in sides.items():
        found = run(images)
        row = "".join(f"{times[batch][name]:9.2f} ms" for batch in batches)
        print(f"{name:24}{row}   {error(found, expected):>28}   {error(found, plain)}")
    exact = copy.deepcopy(simulation).double()(images.double()).float()
    blank = " " * len(columns)
    print(f"{'simulated in float64':24}{blank}   {error(exact, expected):>28}   {error(exact, plain)}")
    ratios = ", ".join(
        f"{times[batch]['ONNX Runtime float32'] / times[batch]['ONNX Runtime int8']:.2f}x at batch {batch}"
        for batch in batches
    )
    print(f"int8 against float32 in the same runtime: {ratios}; files {megabytes['int8']:.1f} and", end=" ")
    print(f"{megabytes['float32']:.1f} MB")
    print(
        f"this processor's int8 kernels {'saturate: weights are held as uint8' if saturates() else 'do not saturate'}"
    )
    print(
        f"{args.model}, {args.threads} thread(s) of {os.cpu_count()}, ONNX Runtime {onnxruntime.__version__}, ", end=""
    )
    print(hardware())


if __name__ == "__main__":
    main()
