"""The command, from its arguments to its result."""

from __future__ import annotations

import argparse
import json
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from s2d import ptq
from s2d.console import exit_code, say
from s2d.files import write_text
from s2d.models.loading import load_model, model_source
from s2d.models.subject import Subject, probe
from s2d.ptq.checkpoint import save_quantized
from s2d.ptq.command.arguments import read_arguments
from s2d.ptq.command.compare import compare
from s2d.ptq.command.items import RANDOM, open_items
from s2d.ptq.command.ready import check_labels, draw_calibration, draw_tests, ready
from s2d.ptq.command.report import describe, table


def main(argv: Sequence[str] | None = None, prog: str = "python -m s2d.ptq") -> int:
    """Run the command line.

    Args:
        argv: the arguments; None for those of the process.
        prog: what the command is called.

    Returns:
        The exit code: 0 all well, 1 failed, 2 bad input, 130 interrupted.

    Paper: none
    """

    def action() -> None:
        args = read_arguments(argv, prog)
        result = _run(args)
        print(table(result))
        if args.json is not None:
            write_text(args.json, json.dumps(result, indent=1, default=repr) + "\n")

    return exit_code(action)


def _run(args: argparse.Namespace) -> dict[str, Any]:
    """Everything, from the arguments to the result."""
    source = model_source(args)
    calibration = open_items(args.calibration, "--calibration")
    test = None if args.test is None else open_items(args.test, "--test")
    seconds: dict[str, float] = {}
    torch.manual_seed(args.seed)

    with stage("load model", seconds):
        subject = load_model(args, source)
        subject.model.to(args.device)
    with stage("read calibration data", seconds):
        calibration = ready(calibration, args.calibration, "--calibration", subject, args)
        chosen = draw_calibration(calibration, args)
        data = calibration.read(chosen).to(args.device)
        probe(subject, data[:1], f"--calibration {args.calibration}")
        tested: list[int] = []
        if args.test is not None:
            test = ready(test, args.test, "--test", subject, args)
            tested = draw_tests(test, {calibration.keys[i] for i in chosen}, args)
            found = probe(subject, test.read(tested[:1]).to(args.device), f"--test {args.test}")
            check_labels(test, found, "--test")
    if RANDOM in (args.calibration, args.test):
        say("warning: random data: this is a smoke run, its accuracy and errors mean nothing")

    quantized = _quantize(subject, data, args, seconds)
    result = describe(args, subject, quantized, seconds)
    if test is not None:
        with stage("test", seconds):
            measured = compare(subject, quantized, test, tested, args.batch_size, args.device)
        result |= {"test": {"data": args.test, "items": len(tested)} | measured}
    if args.save is not None:
        with stage("save", seconds):
            save_quantized(quantized, args.save, overwrite=args.overwrite)
    return result


def _quantize(subject: Subject, data: Tensor, args: argparse.Namespace, seconds: dict[str, float]) -> nn.Module:
    with stage("quantize", seconds), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        quantized = ptq.quantize(
            subject.model,
            method=args.method,
            w_bits=args.w_bits,
            a_bits=args.a_bits,
            calibration=subject.batch(data),
            transforms=args.transforms,
            exclude=args.exclude,
            batch_size=args.batch_size,
            progress=lambda line: say(f"  {line}"),
            **args.option,
        )
    for warning in caught:
        if issubclass(warning.category, UserWarning):
            say(f"warning: {warning.message}")
    return quantized


@contextmanager
def stage(name: str, seconds: dict[str, float]) -> Iterator[None]:
    """Announce a stage, and keep how long it took."""
    say(f"{name} ...")
    start = time.perf_counter()
    yield
    seconds[name] = time.perf_counter() - start
    say(f"{name}: {seconds[name]:.1f} s")
