r"""Quantize a model from the command line, and say what it cost in accuracy::

    python -m s2d.ptq vit_tiny_patch16_224 --pretrained --method erq --w-bits 4 --a-bits 4 \
        --calibration imagenet/train --test imagenet/val --save vit_tiny_w4a4 --json vit_tiny_w4a4.json
    python -m s2d.ptq mine.safetensors --arch vit_tiny_patch16_224 --model-options '{"num_classes": 10}' ...
    python -m s2d.ptq folder_of_a_hugging_face_model --w-bits 4 --a-bits 8 --calibration train.txt --test test.txt
    python -m s2d.ptq vit_tiny_patch16_224 --calibration random --test random

MODEL is a preset (such as minilm), the name of a timm model, a safetensors file with ``--arch``, or a Hugging Face
folder (config.json and safetensors; no code of the folder is run); a hub is asked only for ``owner/name``. Calibration
and test data are each

* a folder of images, or one with a folder of images for each class (then accuracy is measured), preprocessed as the
  model asks;
* a safetensors file with ``images`` (N, C, H, W), taken as they are, and perhaps ``labels`` (N,); or ``input_ids``
  (N, T) for a language model;
* a text file, for a language model;
* ``random``, for a smoke run: its numbers say nothing about the model.

Which items are used is drawn at random with ``--seed``. Items used for calibration are never tested on. Progress goes
to stderr, the result to stdout.

Exit codes: 0 all well; 1 failed; 2 bad input, found before anything was quantized; 130 interrupted.

Paper: none
"""

from __future__ import annotations

import argparse
import ast
import difflib
import inspect
import json
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from s2d import ptq
from s2d.files import can_write
from s2d.models import PRESETS
from s2d.packages import need
from s2d.ptq.checkpoint import check_folder
from s2d.ptq.quantizers import check_bits


def read_arguments(argv: Sequence[str] | None, prog: str = "python -m s2d.ptq") -> argparse.Namespace:
    """The arguments, and all that can be found wrong with them before the model is loaded.

    Args:
        argv: None for those of the process.
        prog: what the command is called.

    Returns:
        The options by their names; ``option`` and ``model_options`` as dictionaries, ``device`` as a torch.device.

    Raises:
        ValueError: for bad arguments, options of the method included.
        ImportError: without a package that the arguments ask for.

    Example:
        >>> read_arguments(["model", "--calibration", "random", "--option", "activations=per_token"]).option
        {'activations': 'per_token'}

    Paper: none
    """
    args = quantize_parser(prog).parse_args(argv)
    _check_method(args)
    args.option = _method_options(args)
    args.model_options = json_object(args.model_options)
    args.device = usable_device(args.device)
    _check_outputs(args)
    return args


class Parser(argparse.ArgumentParser):
    """Bad arguments as ValueError, so that all bad input is told in the same way."""

    def error(self, message: str) -> None:
        raise ValueError(f"{message} (see {self.prog} --help)")


def whole(text: str) -> int:
    """A whole number of 1 or more, of an argument."""
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of 1 or more")
    return int(text)


def quantize_parser(prog: str = "python -m s2d.ptq") -> argparse.ArgumentParser:
    parser = Parser(
        prog=prog,
        description=__doc__.partition("Paper:")[0],
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add_model_arguments(parser)
    parser.add_argument("--method", default="rtn", metavar="NAME", help=f"{', '.join(ptq.METHODS)} (default: rtn)")
    parser.add_argument("--w-bits", type=int, default=8, metavar="N", help="2 to 8; 16 or 32 for none (default: 8)")
    parser.add_argument("--a-bits", type=int, default=8, metavar="N", help="2 to 8; 16 or 32 for none (default: 8)")
    parser.add_argument(
        "--transforms",
        action="append",
        default=[],
        metavar="NAME",
        help=f"before the method, repeatable: {', '.join(ptq.TRANSFORMS) or 'none'}",
    )
    parser.add_argument("--exclude", action="append", default=[], metavar="PATTERN", help="layers to leave, repeatable")
    parser.add_argument("--option", action="append", default=[], metavar="NAME=VALUE", help="of the method, repeatable")

    parser.add_argument("--calibration", required=True, metavar="DATA", help="images, text or 'random' (see above)")
    parser.add_argument("--images", type=whole, default=32, metavar="N", help="calibration items (default: 32)")
    parser.add_argument("--test", metavar="DATA", help="the same kinds; without it nothing is measured")
    parser.add_argument("--test-images", type=whole, metavar="N", help="test items (default: all)")
    add_run_arguments(parser, batch_size=32)
    parser.add_argument("--save", type=Path, metavar="FOLDER", help="where to write the quantized model")
    parser.add_argument("--overwrite", action="store_true", help="replace an earlier model in that folder")
    return parser


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """MODEL, and what belongs to it."""
    parser.add_argument(
        "model",
        metavar="MODEL",
        help=f"{', '.join(PRESETS)}; timm model, open_clip:NAME/WEIGHTS, owner/name on the hub, Hugging Face folder, "
        ".gguf, .onnx or .safetensors file (--arch)",
    )
    parser.add_argument("--arch", metavar="NAME", help="timm model that a .safetensors file is of")
    parser.add_argument("--model-options", default="{}", metavar="JSON", help="for timm, such as '{\"img_size\": 32}'")
    parser.add_argument("--pretrained", action="store_true", help="timm's weights; needs a network")
    parser.add_argument("--sequence-length", type=whole, default=128, metavar="N", help="tokens a text item")


def add_run_arguments(parser: argparse.ArgumentParser, batch_size: int) -> None:
    """What every command takes."""
    parser.add_argument("--device", default="cpu", help="such as cuda (default: cpu)")
    parser.add_argument("--seed", type=int, default=0, help="of random weights and draws (default: 0)")
    parser.add_argument(
        "--batch-size",
        type=whole,
        default=batch_size,
        metavar="N",
        help=f"items a forward pass (default: {batch_size})",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="where to write the result")


def _check_method(args: argparse.Namespace) -> None:
    if args.method not in ptq.METHODS:
        close = difflib.get_close_matches(args.method, ptq.METHODS, n=1)
        hint = f"did you mean {close[0]!r}?" if close else f"choose one of {', '.join(ptq.METHODS)}"
        raise ValueError(f"--method {args.method!r} is unknown: {hint}")
    for name in args.transforms:
        if name not in ptq.TRANSFORMS:
            raise ValueError(f"--transforms {name!r} is unknown: choose one of {', '.join(ptq.TRANSFORMS) or 'none'}")
    check_bits(args.w_bits, "--w-bits")
    check_bits(args.a_bits, "--a-bits")


def _method_options(args: argparse.Namespace) -> dict[str, Any]:
    options: dict[str, Any] = {}
    own = inspect.signature(ptq.quantize).parameters
    for text in args.option:
        name, equals, value = text.partition("=")
        if not equals or not name.isidentifier():
            raise ValueError(f"--option {text!r} is not of the form NAME=VALUE")
        if name in own:
            raise ValueError(f"--option {name} is no option of a method: see python -m s2d.ptq --help")
        if name in options:
            raise ValueError(f"--option {name} is given twice: give it once")
        try:
            options[name] = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            options[name] = value  # a word needs no quotes
    if options:
        _rehearse(args, options)
    if "seed" in inspect.signature(ptq.METHODS[args.method]).parameters:
        options.setdefault("seed", args.seed)
    return options


def _rehearse(args: argparse.Namespace, options: dict[str, Any]) -> None:
    """Let the method refuse its options at once, on a network of two layers, not after the real one was loaded."""
    network = nn.Sequential(nn.LayerNorm(4), nn.Linear(4, 4), nn.GELU(), nn.Linear(4, 2))
    bits = {"w_bits": args.w_bits, "a_bits": args.a_bits}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            ptq.quantize(network, method=args.method, calibration=torch.randn(8, 4), **bits, **options)
        except ValueError:
            raise
        except Exception as error:  # whatever a method does with a value of the wrong type
            raise ValueError(f"{error}: is a value of --option of the right type?") from None


def json_object(text: str) -> dict[str, Any]:
    """The object that --model-options is."""
    try:
        value = json.loads(text)
    except ValueError as error:
        raise ValueError(
            f"--model-options {text!r} is not JSON ({error}): write such as '{{\"img_size\": 32}}'"
        ) from None
    if not isinstance(value, dict):
        raise ValueError(f"--model-options {text!r} is no JSON object: write such as '{{\"img_size\": 32}}'")
    return value


def usable_device(text: str) -> torch.device:
    """The device of --device, which takes tensors."""
    try:
        device = torch.device(text)
        torch.empty(1, device=device).add_(1)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = (str(error).splitlines() or [""])[0]
        raise ValueError(
            f"--device {text!r} cannot be used ({reason}): choose cpu, or a device that is there"
        ) from None
    return device


def check_can_write(option: str, path: str | Path | None, *, folder: bool = False) -> None:
    """ValueError where what an option names could not be written in the end; None is nothing to write.

    Args:
        option: for the message, such as ``"--json"``.
        path: what it was given.
        folder: whether that is to be a folder.

    Paper: none
    """
    if path is not None and not can_write(path, folder=folder):
        raise ValueError(f"{option} {path} cannot be written: give one in a folder that exists and takes files")


def _check_outputs(args: argparse.Namespace) -> None:
    if args.save is not None:
        need("safetensors.torch", "--save")
        check_folder(args.save, overwrite=args.overwrite)
    for option, path in (("--json", args.json), ("--save", args.save)):
        check_can_write(option, path, folder=option == "--save")
