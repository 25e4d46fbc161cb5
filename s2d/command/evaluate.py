"""``s2d eval``: accuracy or perplexity of a network, and of a quantized copy beside it."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

import torch

from s2d.command.data import open_data
from s2d.console import exit_code, say
from s2d.files import can_write, write_text
from s2d.models.loading import load_model, model_source
from s2d.models.subject import probe
from s2d.ptq.checkpoint import load_quantized
from s2d.ptq.command.arguments import (
    Parser,
    add_model_arguments,
    add_run_arguments,
    json_object,
    usable_device,
    whole,
)
from s2d.ptq.command.compare import compare
from s2d.ptq.command.ready import check_labels

DESCRIPTION = """Measure a network on test data: accuracy where the data has labels (a folder of images for each class),
perplexity of a text for a language model. With --quantized, a folder that s2d quantize --save wrote, both networks are
measured, and how far their outputs are apart.
"""


def parser() -> Parser:
    """The arguments of the command."""
    found = Parser(prog="s2d eval", description=DESCRIPTION, allow_abbrev=False)
    add_model_arguments(found)
    found.add_argument(
        "--test", required=True, metavar="DATA", help="images, text or 'random'; see s2d quantize --help"
    )
    found.add_argument("--test-images", type=whole, metavar="N", help="test items (default: all)")
    found.add_argument("--quantized", type=Path, metavar="FOLDER", help="a quantized copy of MODEL")
    add_run_arguments(found, batch_size=32)
    return found


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; the exit code is that of :func:`s2d.console.exit_code`.

    Paper: none
    """
    return exit_code(lambda: _run(parser().parse_args(argv)))


def _run(args: argparse.Namespace) -> None:
    args.model_options, args.device = json_object(args.model_options), usable_device(args.device)
    args.images = 64  # of random data
    if args.json is not None and not can_write(args.json):
        raise ValueError(f"--json {args.json} cannot be written: give one in a folder that exists and takes files")
    if args.quantized is not None and not args.quantized.is_dir():
        raise ValueError(f"--quantized {args.quantized} is no folder: give one that s2d quantize --save wrote")
    asked, source = args.model, model_source(args)
    torch.manual_seed(args.seed)
    say("load model ...")
    subject = load_model(args, source)
    subject.model.to(args.device)
    other = subject.model if args.quantized is None else load_quantized(subject.model, args.quantized).to(args.device)
    items = open_data(args.test, "--test", subject, args)
    tested = items.draw(args.test_images, args.seed, set())
    found = probe(subject, items.read(tested[:1]).to(args.device), f"--test {args.test}")
    check_labels(items, found, "--test")
    say("test ...")
    measured = compare(subject, other, items, tested, args.batch_size, args.device)
    if args.quantized is None:
        measured = {name: value for name, value in measured.items() if name.endswith("_float")}
        if not measured:
            raise ValueError(
                f"--test {args.test} has no labels, and {asked} is no language model: there is nothing to measure "
                "without --quantized"
            )
    for name, value in ({"items": len(tested)} | measured).items():
        print(f"{name.replace('_', ' '):22}  {value:.6g}")
    result = {"model": asked, "quantized": args.quantized and str(args.quantized), "data": args.test, "seed": args.seed}
    if args.json is not None:
        write_text(args.json, json.dumps(result | {"items": len(tested)} | measured, indent=1) + "\n")
