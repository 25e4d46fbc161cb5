"""The commands of the paper's batch; ``paper/Snakefile`` calls the first four::

python -m s2d.lab.paper_scale check   what the batch needs and this place lacks
python -m s2d.lab.paper_scale answer  GSM8K, by a model that is quantized or not
python -m s2d.lab.paper_scale merge   a table of ours out of its measurements
python -m s2d.lab.paper_scale show    ours beside the paper's
python -m s2d.lab.paper_scale split   training images put aside, to choose settings by
python -m s2d.lab.paper_scale tiny    the data of paper/tiny.yaml, the batch in miniature
python -m s2d.lab.paper_scale hours   what it takes
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

import torch

from s2d.console import exit_code, say
from s2d.files import write_text
from s2d.lab.paper_scale import answers, hours, merge, requirements, split, tiny
from s2d.lab.paper_scale.configuration import read_configuration
from s2d.lab.paper_scale.experiments import TABLES, check_table, with_locations
from s2d.ptq.command.arguments import Parser, check_can_write, usable_device, whole


def parser() -> Parser:
    """The arguments of the command."""
    found = Parser(prog="python -m s2d.lab.paper_scale", description="The paper's own tables, at its own scale.")
    commands = found.add_subparsers(dest="command", required=True)

    check = commands.add_parser("check", help="say all that is missing, before anything is begun")
    _add_configuration(check)
    check.add_argument("data", nargs="*", metavar="NAME=VALUE", help="where data is, such as IMAGENET=FOLDER")
    check.add_argument("--gpu", action="store_true", help="jobs run on this machine, on a GPU")
    check.add_argument("--made", action="store_true", help="the tables of the batch have to be there")

    answer = commands.add_parser("answer", help="GSM8K, without examples")
    answer.add_argument("model", metavar="MODEL", help="a folder of a language model")
    answer.add_argument("--problems", required=True, metavar="FOLDER", help="with train.jsonl and test.jsonl")
    answer.add_argument("--bits", default="FP", help="such as W8A8 (default: FP)")
    answer.add_argument("--method", default="rtn", metavar="NAME", help="of quantization (default: rtn)")
    answer.add_argument("--calibration", type=whole, default=64, metavar="N", help="training problems (default: 64)")
    answer.add_argument("--items", type=whole, metavar="N", help="test problems (default: all)")
    answer.add_argument("--new-tokens", type=whole, default=512, metavar="N", help="of an answer (default: 512)")
    answer.add_argument("--batch-size", type=whole, default=32, metavar="N", help="problems at a time (default: 32)")
    answer.add_argument("--device", default="cpu", help="such as cuda (default: cpu)")
    answer.add_argument("--seed", type=int, default=0, help="of the calibration problems (default: 0)")
    answer.add_argument("--json", type=Path, required=True, metavar="FILE", help="where to write the result")

    merging = commands.add_parser("merge", help="a table of ours out of its measurements")
    merging.add_argument("table", metavar="TABLE", help=", ".join(TABLES))
    _add_configuration(merging)
    merging.add_argument("--cells", nargs="+", required=True, metavar="FILE", help="what the commands wrote")

    show = commands.add_parser("show", help="ours beside the paper's, with the spread over seeds")
    show.add_argument("tables", nargs="*", metavar="TABLE", help=f"{', '.join(TABLES)} (default: all that are there)")
    show.add_argument("--run", default=merge.RUN, help=f"the folder of data/ (default: {merge.RUN})")

    splitting = commands.add_parser("split", help="put training images aside, to choose settings by")
    splitting.add_argument("source", type=Path, metavar="FOLDER", help="with a folder of images for each class")
    splitting.add_argument("-o", "--output", type=Path, required=True, metavar="FOLDER", help="to make")
    splitting.add_argument("--share", type=float, default=0.02, help="of each class put aside (default: 0.02)")
    splitting.add_argument("--seed", type=int, default=0, help="of the draw (default: 0)")

    tiny_data = commands.add_parser("tiny", help="the data of paper/tiny.yaml: the batch in miniature")
    tiny_data.add_argument("-o", "--output", type=Path, required=True, metavar="FOLDER", help="to make")

    hour = commands.add_parser("hours", help="the hours on an accelerator that the batch takes, and from what")
    _add_configuration(hour)
    return found


def _add_configuration(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--config", default="paper/paper.yaml", metavar="FILE", help="YAML, or the configuration itself as JSON"
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command.

    Args:
        argv: the arguments; None for those of the process.

    Returns:
        The exit code: 0 all well, 1 failed, 2 bad input or something is missing, 130 interrupted.
    """

    def action() -> None:
        args = parser().parse_args(argv)
        globals()[f"_{args.command}"](args)

    return exit_code(action)


def _check(args: argparse.Namespace) -> None:
    config = read_configuration(args.config)
    for text in args.data:
        name, equals, value = text.partition("=")
        if not equals or name.lower() not in (config.get("data") or {}):
            raise ValueError(f"{text!r} is no place of data: give such as IMAGENET=FOLDER")
        config[name] = value
    config = with_locations(config)
    missing = requirements.lacking_tables(config) if args.made else []
    if missing or not args.made:  # the data is for making the tables
        missing += requirements.lacking(config, gpu=False)
    if args.gpu and not requirements.has_gpu():
        missing.insert(0, requirements.GPU)
    if missing:
        raise ValueError(requirements.refusal(missing))


def _answer(args: argparse.Namespace) -> None:
    device = usable_device(args.device)
    check_can_write("--json", args.json)
    torch.manual_seed(args.seed)
    result = answers.measure(
        args.model,
        args.problems,
        args.bits,
        method=args.method,
        calibration=args.calibration,
        items=args.items,
        new_tokens=args.new_tokens,
        rows=args.batch_size,
        device=str(device),
        seed=args.seed,
    )
    print(f"{result['accuracy']:.2%} of {result['items']} problems solved")
    write_text(args.json, json.dumps(result, indent=1) + "\n")


def _merge(args: argparse.Namespace) -> None:
    check_table(args.table)
    config = read_configuration(args.config)
    say(f"written: {merge.save_merged(args.table, config, args.cells, run=config['run'])}")


def _show(args: argparse.Namespace) -> None:
    for table in args.tables:
        check_table(table)
    found = 0
    for table in args.tables or TABLES:
        try:
            text = merge.shown(table, run=args.run)
        except FileNotFoundError as error:
            if args.tables:
                raise ValueError(f"{error}; the batch makes it: make paper") from None
            continue
        print(f"{TABLES[table]}\n{text}\n")
        found += 1
    if not found:
        raise ValueError(f"data/{args.run} has none of the tables: make paper makes them")


def _split(args: argparse.Namespace) -> None:
    counts = split.put_aside(args.source, args.output, share=args.share, seed=args.seed)
    print(f"{counts['train']} images to train on, {counts['val']} put aside: IMAGENET_SPLIT={args.output}")


def _tiny(args: argparse.Namespace) -> None:
    if args.output.exists():
        say(f"{args.output} is there")
        return
    tiny.make_tiny(args.output)
    say(f"written: {args.output}")


def _hours(args: argparse.Namespace) -> None:
    config = read_configuration(args.config)
    print(hours.table(config).to_string(index=False))
