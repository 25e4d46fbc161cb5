"""``s2d eval``: accuracy, perplexity or right answers of a network, and of a quantized copy beside it."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn

from s2d.command.data import open_data
from s2d.console import exit_code, say
from s2d.files import write_text
from s2d.models import problems
from s2d.models.loading import load_model, model_source
from s2d.models.problems import read_problems, solve
from s2d.models.questions import anls, answer, exact_match, read_questions
from s2d.models.subject import Subject, probe
from s2d.packages import need
from s2d.ptq.checkpoint import load_quantized
from s2d.ptq.command.arguments import (
    Parser,
    add_model_arguments,
    add_run_arguments,
    check_can_write,
    json_object,
    usable_device,
    whole,
)
from s2d.ptq.command.compare import compare
from s2d.ptq.command.ready import check_labels

DESCRIPTION = """Measure a network on test data: accuracy where the data has labels (a folder of images for each class),
perplexity of a text for a language model. With --quantized, a folder that s2d quantize --save wrote, both networks are
measured, and how far their outputs are apart. With --questions, a file of JSON lines, a language model is asked word
problems (question, answer: GSM8K's files as they are; the last number it says counts), a vision-language model
questions about pictures (image, question, answers: GQA's exact match, with --score anls DocVQA's), zero-shot and
decoded greedily.
"""
SCORES = {"exact": exact_match, "anls": anls}


def parser() -> Parser:
    """The arguments of the command."""
    found = Parser(prog="s2d eval", description=DESCRIPTION, allow_abbrev=False)
    add_model_arguments(found)
    asked = found.add_mutually_exclusive_group(required=True)
    asked.add_argument("--test", metavar="DATA", help="images, text or 'random'; see s2d quantize --help")
    asked.add_argument("--questions", type=Path, metavar="FILE", help="JSON lines: word problems, or about pictures")
    found.add_argument("--score", choices=SCORES, default="exact", help="of answers about pictures (default: exact)")
    found.add_argument("--max-new-tokens", type=whole, default=256, metavar="N", help="of an answer (default: 256)")
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
    check_can_write("--json", args.json)
    if args.quantized is not None and not args.quantized.is_dir():
        raise ValueError(f"--quantized {args.quantized} is no folder: give one that s2d quantize --save wrote")
    if args.questions is not None and not args.questions.is_file():
        raise ValueError(f"no questions at {args.questions}: give a file of JSON lines")
    asked, source = args.model, model_source(args)
    torch.manual_seed(args.seed)
    say("load model ...")
    subject = load_model(args, source)
    subject.model.to(args.device)
    other = subject.model if args.quantized is None else load_quantized(subject.model, args.quantized).to(args.device)
    count, measured = _answers(subject, other, args) if args.questions else _outputs(subject, other, args)
    for name, value in ({"items": count} | measured).items():
        print(f"{name.replace('_', ' '):22}  {value:.6g}")
    result = {"model": asked, "quantized": args.quantized and str(args.quantized)}
    result |= {"data": str(args.questions or args.test), "seed": args.seed}
    if args.json is not None:
        write_text(args.json, json.dumps(result | {"items": count} | measured, indent=1) + "\n")


def _outputs(subject: Subject, other: nn.Module, args: argparse.Namespace) -> tuple[int, dict[str, float]]:
    """How many items were tested, and what their outputs say."""
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
                f"--test {args.test} has no labels, and {args.model} is no language model: there is nothing to measure "
                "without --quantized"
            )
    return len(tested), measured


def _answers(subject: Subject, other: nn.Module, args: argparse.Namespace) -> tuple[int, dict[str, float]]:
    """How many questions were asked, and the share of right answers."""
    if not hasattr(subject.model, "generate"):
        raise ValueError(f"--questions needs a model that generates text, {args.model} does not: give --test")
    if getattr(subject.model.config, "vision_config", None) is not None:
        transformers = need("transformers", "questions about pictures")
        processor = transformers.AutoProcessor.from_pretrained(subject.folder, local_files_only=True)
        read, ask, teller, score = read_questions, answer, processor, SCORES[args.score]
    else:
        read, ask, teller, score = read_problems, solve, subject.tokenizer(), problems.exact_match
    asked = read(args.questions)
    if args.test_images is not None and args.test_images < len(asked):
        order = torch.randperm(len(asked), generator=torch.Generator().manual_seed(args.seed))
        asked = [asked[i] for i in sorted(order[: args.test_images].tolist())]
    options = {"batch_size": args.batch_size, "max_new_tokens": args.max_new_tokens}
    name = "anls" if score is anls else "exact_match"
    models = {f"{name}_float": subject.model} | ({} if args.quantized is None else {f"{name}_quantized": other})
    return len(asked), {key: score(ask(model, teller, asked, **options), asked) for key, model in models.items()}
