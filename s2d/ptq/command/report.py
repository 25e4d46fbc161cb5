"""The result: for machines, and for people."""

from __future__ import annotations

import argparse
import os
import platform
import sys
from typing import Any

import torch
from torch import nn

import s2d
from s2d import ptq
from s2d.models.subject import Subject
from s2d.ptq.checkpoint import quantized_size
from s2d.ptq.command.items import RANDOM
from s2d.ptq.sites import sites


def describe(
    args: argparse.Namespace, subject: Subject, quantized: nn.Module, seconds: dict[str, float]
) -> dict[str, Any]:
    """All there is to know of a run but its test.

    Args:
        args: from :func:`s2d.ptq.command.arguments.read_arguments`.
        subject: the model in floating point.
        quantized: its quantized copy.
        seconds: of each stage; kept, so that later stages join it.

    Returns:
        What ``--json`` writes.

    Paper: none
    """
    left_out = [row["site"] for row in ptq.coverage(quantized) if row["kind"] == "left out"]
    packages = [name for name in ("timm", "transformers") if name in sys.modules]
    return {
        "model": subject.name,
        "kind": subject.kind,
        "method": args.method,
        "options": args.option,
        "transforms": args.transforms,
        "w_bits": args.w_bits,
        "a_bits": args.a_bits,
        "calibration": {"data": args.calibration, "items": args.images},
        "smoke_run": RANDOM in (args.calibration, args.test) or "random weights" in subject.name,
        "size": quantized_size(quantized, subject.model),
        "coverage": {"quantized": len(sites(quantized)), "left_out": left_out},
        "seconds": seconds,
        "seed": args.seed,
        "versions": {"python": platform.python_version(), "s2d": s2d.__version__, "torch": torch.__version__}
        | {name: sys.modules[name].__version__ for name in packages},
        "hardware": _hardware(args.device),
    }


def _hardware(device: torch.device) -> str:
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or "cpu"
    return f"{name} ({platform.machine()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads)"


def table(result: dict[str, Any]) -> str:
    """The result for people, one line a fact."""
    unit = result["kind"]
    rows = [("model", result["model"])]
    options = "".join(f", {name}={value}" for name, value in result["options"].items())
    before = "".join(f"{name}, then " for name in result["transforms"])
    rows.append(("method", f"{before}{result['method']}{options}"))
    rows.append(("bits", f"W{result['w_bits']}A{result['a_bits']}"))
    rows.append(("calibration", f"{result['calibration']['items']} {unit} of {result['calibration']['data']}"))
    test = result.get("test")
    if test is not None:
        rows.append(("test", f"{test['items']} {unit} of {test['data']}"))
        for name, text in (("accuracy", "{:.2%}"), ("perplexity", "{:.3f}")):
            if f"{name}_float" in test:
                values = [text.format(test[f"{name}_{side}"]) for side in ("float", "quantized")]
                rows.append((f"{name}, floating point", values[0]))
                rows.append((f"{name}, quantized", values[1]))
        rows.append(("relative logit error", f"{test['logit_error']:.2e}"))
        rows.append(("top-1 agreement", f"{test['agreement']:.2%}"))
    size, coverage = result["size"], result["coverage"]
    megabytes = [f"{size[name] / 1e6:.2f} MB" for name in ("quantized", "float_model")]
    rows.append(("size, codes packed", f"{megabytes[0]}, in floating point {megabytes[1]} ({size['ratio']:.1f} times)"))
    rows.append(("sites", f"{coverage['quantized']} quantized, {len(coverage['left_out'])} left in floating point"))
    rows.append(("seconds", ", ".join(f"{name} {value:.1f}" for name, value in result["seconds"].items())))
    if result["smoke_run"]:
        rows.append(("note", "random weights or data: accuracy and errors mean nothing"))
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{name:{width}}  {value}" for name, value in rows)
