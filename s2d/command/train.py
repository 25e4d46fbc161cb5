"""``s2d train``: fine-tune an image classifier or a language model, with or without S2D."""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from s2d.console import exit_code
from s2d.files import write_text
from s2d.ptq.command.arguments import Parser, add_model_arguments, check_can_write, json_object
from s2d.train.settings import LanguageSettings, VisionSettings, read_settings, recipe_names

DESCRIPTION = """Fine-tune a network, with or without S2D. OUT/model becomes an ordinary checkpoint, OUT/history.csv has
a row an epoch, OUT/settings.json everything that was resolved, OUT/done.json comes last. Started again with the same
arguments a run goes on from its last checkpoint, also on another number of processes:

    s2d train vision siglip2-b16 --data imagenet/train --val imagenet/val --recipe vision-s2d -o runs/s2d
    torchrun --nproc-per-node 8 -m s2d train vision ... (the same; FSDP2 by --set sharding=fsdp2)

SOURCE is, for vision, a folder with a folder for each class, wds/PATTERN (tar files, such as wds/train-{000..099}.tar),
or hfds/NAME:SPLIT (a hub's name or a folder that datasets.load_dataset reads); for language, a file of JSON lines with
messages, or question and answer, or hfds/NAME:SPLIT with such columns.
"""


def parser() -> Parser:
    """The arguments of the command."""
    found = Parser(
        prog="s2d train",
        description=DESCRIPTION,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    found.add_argument("kind", choices=("vision", "language"), help="what the model is of")
    add_model_arguments(found)
    found.add_argument("--data", required=True, metavar="SOURCE", help="what is trained on")
    found.add_argument("--val", metavar="SOURCE", help="what each epoch is measured on; nothing is chosen by it")
    found.add_argument("-o", "--output", required=True, type=Path, metavar="OUT", help="folder of the run")
    found.add_argument("--recipe", metavar="FILE", help=f"YAML of settings, or one of {', '.join(recipe_names())}")
    found.add_argument(
        "--set", action="append", default=[], nargs="+", metavar="NAME=VALUE", help="a setting over the recipe's"
    )
    found.add_argument("--resume", default="auto", choices=("auto", "never"), help="go on with a run (default: auto)")
    found.add_argument("--cpu", action="store_true", help="leave accelerators alone")
    found.add_argument("--json", type=Path, metavar="FILE", help="where to write what done.json says")
    return found


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; the exit code is that of :func:`s2d.console.exit_code`.

    Paper: none
    """
    return exit_code(lambda: _run(parser().parse_args(argv)))


def _run(args: argparse.Namespace) -> None:
    kind = VisionSettings if args.kind == "vision" else LanguageSettings
    settings = read_settings(kind, args.recipe, [text for group in args.set for text in group])
    check_can_write("--json", args.json)
    common: dict[str, Any] = {"val": args.val, "settings": settings, "resume": args.resume, "cpu": args.cpu}
    if args.kind == "vision":
        from s2d.train.vision import train_vision

        result = train_vision(
            args.model,
            args.data,
            args.output,
            arch=args.arch,
            model_options=json_object(args.model_options),
            pretrained=args.pretrained,
            **common,
        )
    else:
        from s2d.train.language import train_language

        given = {"arch": args.arch, "pretrained": args.pretrained, "model-options": json_object(args.model_options)}
        for name in (name for name, value in given.items() if value):
            raise ValueError(f"--{name} is not for a language model: leave it out")
        result = train_language(args.model, args.data, args.output, **common)
    if os.environ.get("RANK", "0") == "0":
        print("\n".join(f"{name.replace('_', ' '):16}  {_shown(value)}" for name, value in result.items()))
        if args.json is not None:
            write_text(args.json, json.dumps(result, indent=1) + "\n")


def _shown(value: Any) -> str:
    return f"{value:.6g}" if isinstance(value, float) else str(value)
