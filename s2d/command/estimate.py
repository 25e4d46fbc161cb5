"""``s2d estimate``: what fine-tuning a network with S2D will take, before it is begun."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from s2d.console import exit_code, say
from s2d.estimate import (
    PRECISIONS,
    Estimate,
    Speed,
    Work,
    count_work,
    load_speed,
    measure_speed,
    predict,
    speed_as_text,
)
from s2d.files import write_text
from s2d.layers import linear_maps
from s2d.models.loading import load_model, model_source
from s2d.models.subject import Subject, logits
from s2d.ptq.command.arguments import (
    Parser,
    add_model_arguments,
    add_run_arguments,
    check_can_write,
    json_object,
    usable_device,
    whole,
)
from s2d.ptq.trace import call
from s2d.regularizer import CRITERIA

DESCRIPTION = """Say what fine-tuning a network with S2D will take: seconds a step, what S2D adds, memory, hours. The
operations of one step are counted, the speed of this device is measured for half a minute (or read from a file that was
measured on another one, --speed), and a model of cost puts the two together. Weights are not changed, no data is read.
Not in it: loading data, the exchange of gradients between devices, evaluation.
"""
GIB = 2**30


def parser() -> Parser:
    """The arguments of the command."""
    found = Parser(prog="s2d estimate", description=DESCRIPTION, allow_abbrev=False)
    add_model_arguments(found)
    found.add_argument("--steps", type=whole, default=1000, metavar="N", help="optimizer steps (default: 1000)")
    found.add_argument("--accumulate", type=whole, default=1, metavar="N", help="passes to a step (default: 1)")
    found.add_argument("--devices", type=whole, default=1, metavar="N", help="that train together (default: 1)")
    found.add_argument("--precision", default="float32", metavar="NAME", help=f"{', '.join(PRECISIONS)} (autocast)")
    found.add_argument("--refresh-every", type=whole, default=100, metavar="N", help="steps (default: 100)")
    found.add_argument("--k-max", type=whole, default=3, metavar="N", help="components considered (default: 3)")
    found.add_argument("--criterion", default="activation", metavar="NAME", help=", ".join(CRITERIA))
    found.add_argument("--checkpoints", type=whole, default=1, metavar="N", help="how many are kept (default: 1)")
    found.add_argument("--seconds", type=float, default=30.0, help="how long to measure the device (default: 30)")
    found.add_argument("--speed", type=Path, metavar="FILE", help="a device's speed, instead of measuring this one's")
    found.add_argument("--save-speed", type=Path, metavar="FILE", help="where to write what was measured")
    add_run_arguments(found, batch_size=32)
    return found


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; the exit code is that of :func:`s2d.console.exit_code`.

    Paper: none
    """
    return exit_code(lambda: _run(parser().parse_args(argv)))


def _run(args: argparse.Namespace) -> None:
    _check(args)
    speed = load_speed(args.speed) if args.speed is not None else None
    if speed is not None and speed.precision != args.precision:
        raise ValueError(
            f"--speed {args.speed} was measured in {speed.precision}, and --precision is {args.precision}: give "
            f"--precision {speed.precision}, or measure that device in {args.precision}"
        )
    asked, source = args.model, model_source(args)
    torch.manual_seed(args.seed)
    say("load model ...")
    subject = load_model(args, source)
    work = _count(subject, asked, args)
    if speed is None:
        speed = measure_speed(
            str(args.device), precision=args.precision, seconds=args.seconds, progress=lambda line: say(f"  {line}")
        )
    if args.save_speed is not None:
        write_text(args.save_speed, speed_as_text(speed))
    run = {
        "steps": args.steps,
        "batch_size": args.batch_size,
        "refresh_every": args.refresh_every,
        "k_max": args.k_max,
        "criterion": args.criterion,
        "devices": args.devices,
        "accumulate": args.accumulate,
    }
    estimate = predict(work, speed, **run)
    print(table(work, speed, estimate, args.checkpoints))
    if args.json is not None:
        result = {
            "model": asked,
            "device": speed.device,
            "precision": args.precision,
            "run": run,
            "estimate": estimate._asdict(),
            "checkpoints_bytes": args.checkpoints * estimate.checkpoint_bytes,
            "work": work._asdict(),
            "speed": speed._asdict(),
        }
        write_text(args.json, json.dumps(result, indent=1) + "\n")


def _check(args: argparse.Namespace) -> None:
    args.model_options, args.device = json_object(args.model_options), usable_device(args.device)
    for option, path in (("--json", args.json), ("--save-speed", args.save_speed)):
        check_can_write(option, path)
    if args.precision not in PRECISIONS:
        raise ValueError(f"--precision is {args.precision!r}: choose one of {', '.join(PRECISIONS)}")
    if args.criterion not in CRITERIA:
        raise ValueError(f"--criterion is {args.criterion!r}: choose one of {', '.join(CRITERIA)}")
    if not 1 <= args.seconds <= 3600:
        raise ValueError(f"--seconds is {args.seconds:g}: give 1 to 3600")


def _count(subject: Subject, name: str, args: argparse.Namespace) -> Work:
    model = subject.model.to(args.device).train()

    def loss(items: int) -> Tensor:
        batch = subject.batch(subject.random(items, args.seed).to(args.device))
        return logits(call(model, batch)).float().square().mean()

    maps = linear_maps(model)
    return count_work(
        model,
        loss,
        maps,
        name=name,
        precision=args.precision,
        k_max=args.k_max,
        progress=lambda line: say(f"  {line}"),
    )


def table(work: Work, speed: Speed, estimate: Estimate, checkpoints: int = 1) -> str:
    """The estimate as text.

    Args:
        work, speed, estimate: what was counted, measured and predicted.
        checkpoints: how many are kept.

    Paper: none
    """
    share = f"{100 * estimate.overhead:.1f} %"
    times = (
        ("a step without S2D", _time(estimate.step_seconds)),
        ("S2D, each step", _time(estimate.penalty_seconds)),
        ("S2D, a refresh", f"{_time(estimate.refresh_seconds)}, the first {_time(estimate.first_refresh_seconds)}"),
        ("S2D, seeing outliers before it", _time(estimate.watch_seconds)),
        ("S2D in all, beside the training", share),
        ("items a second", f"{estimate.items_per_second:.3g}"),
        ("the run", f"{_hours(estimate.hours)}, give or take {100 * estimate.margin:.0f} %"),
        ("device-hours", f"{estimate.device_hours:.3g}"),
    )
    memory = [(name, _size(size)) for name, size in estimate.memory.items()]
    memory += [("in all", _size(sum(estimate.memory.values())))]
    kept = f"{_size(estimate.checkpoint_bytes)} each, {_size(checkpoints * estimate.checkpoint_bytes)} in all"
    watched = f"{len(work.weights)} layers watched, {work.parameters / 1e6:.1f} million parameters trained"
    lines = [f"{work.name}, {work.precision}: {watched}", f"on {speed.device}", "", "time"]
    lines += [f"  {name:34}{value}" for name, value in times]
    lines += ["memory on a device"] + [f"  {name:34}{value}" for name, value in memory]
    lines += ["checkpoints", f"  {'weights, AdamW, S2D':34}{kept}"]
    return "\n".join(lines)


def _time(seconds: float) -> str:
    return f"{seconds:.3g} s" if seconds >= 1 else f"{1000 * seconds:.3g} ms"


def _hours(hours: float) -> str:
    return f"{hours:.3g} hours" if hours >= 1 else f"{60 * hours:.3g} minutes"


def _size(size: int) -> str:
    return f"{size / GIB:.2f} GiB" if size >= GIB else f"{size / 2**20:.1f} MiB"
