"""``s2d condition``: let the components that make a network's outliers decay, without labels, and save the result."""

from __future__ import annotations

import argparse
import json
import shlex
import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from s2d.command.data import open_data
from s2d.command.outcome import before_and_after, write_outcome
from s2d.console import exit_code, say
from s2d.files import write_folder_atomically, write_text
from s2d.models.conditioning import (
    FORMS,
    LAM,
    Conditioned,
    checked_settings,
    condition,
    cosines,
    item_vectors,
    output_of,
)
from s2d.models.loading import load_model, model_source
from s2d.models.saving import save_checkpoint
from s2d.models.subject import Subject, probe
from s2d.packages import need
from s2d.ptq import parse_bits, quantize
from s2d.ptq.command.arguments import (
    Parser,
    add_model_arguments,
    add_run_arguments,
    check_can_write,
    json_object,
    usable_device,
    whole,
)
from s2d.ptq.command.items import Items
from s2d.ptq.command.ready import check_labels

DESCRIPTION = """Fine-tune a network to itself, without labels, while the singular components that make its outliers
decay. The result is an ordinary checkpoint of the same class, with report.json beside it. A run that was interrupted
goes on where it was when it is started again with the same arguments.

DATA is a folder of images, a safetensors file or a text; see s2d quantize --help. A part of it, never trained on, says
how faithful the network still is; --test takes other data for the comparison in the end.
"""


def parser() -> Parser:
    """The arguments of the command."""
    found = Parser(prog="s2d condition", description=DESCRIPTION, allow_abbrev=False)
    add_model_arguments(found)
    found.add_argument("--data", required=True, metavar="DATA", help="what is trained on")
    found.add_argument("-o", "--output", required=True, type=Path, metavar="FOLDER", help="where the result goes")
    found.add_argument("--overwrite", action="store_true", help="replace an earlier result in that folder")
    found.add_argument("--labels", action="store_true", help="train on the labels of DATA too")
    found.add_argument(
        "--form",
        default="decoupled",
        choices=FORMS,
        help="how components decay: as the paper prints it, live, decoupled, or a cap (default: decoupled)",
    )
    strengths = ", ".join(f"{value:g} {form}" for form, value in LAM.items())
    found.add_argument("--include", action="append", default=[], metavar="PATTERN", help="layers, repeatable")
    found.add_argument("--lam", type=float, help=f"strength (default: {strengths})")
    found.add_argument("--tau", type=float, default=0.9, help="threshold of PCDR (default: 0.9)")
    found.add_argument("--k-max", type=whole, default=3, metavar="N", help="components considered (default: 3)")
    found.add_argument("--cap", type=float, help="where spectral norms end, with --form cap")
    found.add_argument("--target-max", type=float, metavar="X", help="decay until no activation is larger")
    found.add_argument("--target-sigma", type=float, metavar="X", help="decay until no spectral norm is larger")
    found.add_argument("--fidelity", type=float, default=0.98, help="least cosine with the original (default: 0.98)")
    found.add_argument("--steps", type=whole, default=300, metavar="N", help="of AdamW (default: 300)")
    found.add_argument("--lr", type=float, default=1e-4, help="of AdamW (default: 1e-4)")
    found.add_argument("--look-every", type=whole, default=25, metavar="N", help="steps between looks (default: 25)")
    found.add_argument("--held", type=whole, default=128, metavar="N", help="items of DATA for looks (default: 128)")
    found.add_argument("--test", metavar="DATA", help="for the comparison (default: the items for looks)")
    found.add_argument("--test-images", type=whole, default=128, metavar="N", help="test items (default: 128)")
    found.add_argument("--bits", default="W8A8,W6A6,W4A4", help="RTN before and after (default: W8A8,W6A6,W4A4)")
    found.add_argument("--html", type=Path, metavar="FILE", help="where to write a report with figures")
    add_run_arguments(found, batch_size=16)
    return found


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; the exit code is that of :func:`s2d.console.exit_code`.

    Paper: none
    """
    return exit_code(lambda: _run(parser().parse_args(argv)))


def _run(args: argparse.Namespace) -> None:
    args.model_options, args.device, args.images = json_object(args.model_options), usable_device(args.device), 512
    bits = [parse_bits(text) for text in args.bits.split(",")]
    names = ("steps", "lr", "form", "lam", "tau", "k_max", "cap", "target_max", "target_sigma", "look_every")
    settings = {name: getattr(args, name) for name in names} | {"least_fidelity": args.fidelity}
    checked_settings(**settings)
    need("safetensors.torch", "saving the result")
    if args.html is not None:
        need("matplotlib", "--html")
    _check_output(args)
    asked, source = args.model, model_source(args)
    torch.manual_seed(args.seed)
    say("load model ...")
    subject = load_model(args, source)
    subject.model.to(args.device)
    items = open_data(args.data, "--data", subject, args)
    order = items.draw(None, args.seed, set())
    held, trained = order[: args.held], order[args.held :]
    if len(trained) < args.batch_size:
        raise ValueError(
            f"--data {args.data} has {len(order)} items, of which {args.held} are for looks (--held): give more data, "
            "or fewer --held"
        )
    found = probe(subject, items.read(held[:1]).to(args.device), f"--data {args.data}")
    include = _chosen(subject, args)
    loss = _label_loss(items, trained, found, args) if args.labels else None
    test, tested = items, held
    if args.test is not None:
        test = open_data(args.test, "--test", subject, args)
        tested = test.draw(args.test_images, args.seed, {items.keys[i] for i in order})
        if not tested:
            raise ValueError(f"--test {args.test}: all its items are trained on: give other data")
    calibration = _batch(subject, items, trained[:32], args)
    wanted = _outputs(subject, test, tested, args)
    before = _quantized(subject, calibration, bits, wanted, test, tested, args)
    state = args.output.with_name(f".{args.output.name}.s2d-state")
    done = condition(
        subject.model,
        lambda step: _batch(subject, items, _drawn(trained, step, args), args),
        [_batch(subject, items, held[start : start + 32], args) for start in range(0, len(held), 32)],
        **settings,
        include=include,
        loss=loss,
        folder=state,
        progress=lambda line: say(f"  {line}"),
    )
    after_wanted = _outputs(subject, test, tested, args)
    after = _quantized(subject, calibration, bits, after_wanted, test, tested, args)
    fidelity = cosines(after_wanted, wanted).mean().item()
    report = _report(args, asked, subject, done, before, after, fidelity, len(tested))
    _save(subject, source, args, report)
    shutil.rmtree(state, ignore_errors=True)
    print(table(report))
    if not done.within_budget:
        say(f"warning: no look keeps a cosine of {args.fidelity}: lower --lam or --lr, or give more --steps")
    if args.json is not None:
        write_text(args.json, json.dumps(report, indent=1) + "\n")
    if args.html is not None:
        write_outcome(args.html, report, _again(subject, source, args))
        say(f"written: {args.html}")


def _again(subject: Subject, source: str, args: argparse.Namespace) -> str | None:
    """How the commands name the result, where they can load it."""
    if subject.folder is not None or source == "timm folder":
        return shlex.quote(str(args.output))
    if source in ("onnx", "open_clip"):
        return None
    words = [str(args.output / "model.safetensors"), "--arch", args.arch or args.model]
    words += ["--model-options", json.dumps(args.model_options)] if args.model_options else []
    return shlex.join(words)


def _check_output(args: argparse.Namespace) -> None:
    if args.output.exists() and not args.overwrite:
        raise ValueError(f"-o {args.output} exists: give another folder, or --overwrite")
    for option, path in (("-o", args.output), ("--json", args.json), ("--html", args.html)):
        check_can_write(option, path, folder=option == "-o")


def _chosen(subject: Subject, args: argparse.Namespace) -> list[str] | None:
    """The layers to condition: those inside the blocks that the patterns name."""
    watched = list(subject.watch())
    for pattern in args.include:
        if not any(fnmatch(name, pattern) for name in watched):
            raise ValueError(f"--include {pattern!r} names no layer: there are {', '.join(watched)}")
    if args.include:
        watched = [name for name in watched if any(fnmatch(name, pattern) for pattern in args.include)]
    return watched or None


def _drawn(positions: list[int], step: int, args: argparse.Namespace) -> list[int]:
    """The items of a step: a pure function of seed and step, so that a resumed run sees the same."""
    generator = torch.Generator().manual_seed(args.seed * 1_000_003 + step)
    return [positions[i] for i in torch.randint(len(positions), (args.batch_size,), generator=generator).tolist()]


def _batch(subject: Subject, items: Items, positions: list[int], args: argparse.Namespace) -> Any:
    return subject.batch(items.read(positions).to(args.device))


@torch.no_grad()
def _outputs(subject: Subject, items: Items, positions: list[int], args: argparse.Namespace) -> Tensor:
    parts = [positions[start : start + 32] for start in range(0, len(positions), 32)]
    return torch.cat([_vectors(subject.model, _batch(subject, items, part, args)) for part in parts])


def _vectors(model: nn.Module, batch: Any) -> Tensor:
    return item_vectors(output_of(model, batch), batch).float().cpu()


def _label_loss(items: Items, trained: list[int], found: Tensor, args: argparse.Namespace) -> Callable:
    if items.labels is None:
        raise ValueError(f"--labels: {args.data} has none: give a folder of images for each class, or leave it out")
    check_labels(items, found, "--data")

    def loss(output: Tensor, step: int) -> Tensor:
        labels = torch.tensor([items.labels[i] for i in _drawn(trained, step, args)], device=output.device)
        return F.cross_entropy(output.float(), labels)

    return loss


@torch.no_grad()
def _quantized(
    subject: Subject,
    calibration: Any,
    bits: list[tuple[int, int]],
    wanted: Tensor,
    items: Items,
    positions: list[int],
    args: argparse.Namespace,
) -> dict[str, float]:
    """Relative error (not squared) of the outputs under RTN, by bit width."""
    errors = {}
    for w_bits, a_bits in bits:
        say(f"RTN W{w_bits}A{a_bits} ...")
        copy = quantize(subject.model, w_bits=w_bits, a_bits=a_bits, calibration=calibration)
        square = 0.0
        for start in range(0, len(positions), 32):
            output = _vectors(copy, _batch(subject, items, positions[start : start + 32], args))
            square += (output - wanted[start : start + 32]).square().sum().item()
        errors[f"W{w_bits}A{a_bits}"] = (square / wanted.square().sum().item()) ** 0.5
    return errors


def _report(
    args: argparse.Namespace,
    asked: str,
    subject: Subject,
    done: Conditioned,
    before: dict[str, float],
    after: dict[str, float],
    fidelity: float,
    tested: int,
) -> dict[str, Any]:
    names = (
        "form",
        "include",
        "lam",
        "tau",
        "k_max",
        "cap",
        "target_max",
        "target_sigma",
        "fidelity",
        "steps",
        "lr",
        "batch_size",
    )
    return {
        "model": asked,
        "loaded": subject.name,
        "data": args.data,
        "settings": {name: getattr(args, name) for name in names}
        | {"lam": LAM.get(args.form) if args.lam is None else args.lam, "seed": args.seed, "labels": args.labels},
        "before": asdict(done.looks[0]),
        "after": asdict(done.chosen),
        "on_target": done.on_target,
        "within_budget": done.within_budget,
        "test": {"data": args.test or f"{args.data} (held back)", "items": tested, "fidelity": fidelity},
        "rtn_error": {"before": before, "after": after},
        "looks": [asdict(look) for look in done.looks],
    }


def table(report: dict[str, Any]) -> str:
    """Before and after, one line a fact."""
    rows = [("", "before", "after"), *before_and_after(report)]
    rows.insert(3, (f"cosine, {report['test']['items']} test items", "1", f"{report['test']['fidelity']:.4f}"))
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    lines = [f"{name:{widths[0]}}  {one:>{widths[1]}}  {two:>{widths[2]}}" for name, one, two in rows]
    return "\n".join(
        [*lines, f"the weights are those of step {report['after']['step']} of {report['settings']['steps']}"]
    )


def _save(subject: Subject, source: str, args: argparse.Namespace, report: dict[str, Any]) -> None:
    """An ordinary checkpoint of the same class: a folder of Hugging Face or timm."""

    def fill(folder: Path) -> None:
        save_checkpoint(subject, folder)
        (folder / "report.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")

    try:
        write_folder_atomically(args.output, fill, overwrite=args.overwrite)
    except OSError as error:
        raise OSError(
            f"{args.output} could not be written ({error}): make room and start again, the training is kept"
        ) from None
