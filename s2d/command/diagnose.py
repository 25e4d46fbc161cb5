"""``s2d diagnose``: which layers have outliers, what makes them, and what to do about it."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

import torch

from s2d.command.data import Stream, open_data
from s2d.command.letter import write_letter
from s2d.console import exit_code, say
from s2d.diagnosis import LayerDiagnosis, diagnose
from s2d.files import write_text
from s2d.models.loading import load_model, model_source
from s2d.packages import need
from s2d.ptq.command.arguments import (
    Parser,
    add_model_arguments,
    add_run_arguments,
    check_can_write,
    json_object,
    usable_device,
    whole,
)
from s2d.ptq.command.items import RANDOM

DESCRIPTION = """Let data pass through a network, a batch at a time, and look at every linear layer: how large its
activations get, how heavy their tails are, in which channel and at which token the largest are, how near they come to
the bound of Theorem 1, which part of them the top singular components make (PCDR), and what S2D would select.

DATA is a folder of images, a safetensors file, a text, or 'random'; see s2d quantize --help.
"""


def parser() -> Parser:
    """The arguments of the command."""
    found = Parser(prog="s2d diagnose", description=DESCRIPTION, allow_abbrev=False)
    add_model_arguments(found)
    found.add_argument("--data", default=RANDOM, metavar="DATA", help="what passes through (default: random)")
    found.add_argument("--images", type=whole, default=64, metavar="N", help="items, drawn at random (default: 64)")
    found.add_argument("--strict", action="store_true", help="stop at an image that cannot be read")
    found.add_argument("--tau", type=float, default=0.95, help="threshold of PCDR (default: 0.95)")
    found.add_argument("--k-max", type=whole, default=3, metavar="N", help="components considered (default: 3)")
    found.add_argument("--html", type=Path, metavar="FILE", help="where to write a report with figures")
    add_run_arguments(found, batch_size=8)
    return found


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; the exit code is that of :func:`s2d.console.exit_code`.

    Paper: none
    """
    return exit_code(lambda: _run(parser().parse_args(argv)))


def _run(args: argparse.Namespace) -> None:
    args.model_options, args.device = json_object(args.model_options), usable_device(args.device)
    for option, path in (("--json", args.json), ("--html", args.html)):
        check_can_write(option, path)
    if args.html is not None:
        need("matplotlib", "--html")
    if not 0 < args.tau <= 1:
        raise ValueError(f"--tau is {args.tau}: a dominance ratio lies in (0, 1]")
    asked, source = args.model, model_source(args)
    torch.manual_seed(args.seed)
    say("load model ...")
    subject = load_model(args, source)
    subject.model.to(args.device)
    items = open_data(args.data, "--data", subject, args)
    positions = items.draw(args.images, args.seed, set())
    stream = Stream(items, positions, subject, args)
    rows = diagnose(subject.model, stream, k_max=args.k_max, tau=args.tau, progress=lambda line: say(f"  {line}"))
    result = {
        "model": asked,
        "loaded": subject.name,
        "data": args.data,
        "items": len(positions) - len(stream.unreadable),
        "unreadable": [str(file) for file in stream.unreadable],
        "tau": args.tau,
        "seed": args.seed,
        "layers": [row._asdict() | {"finding": row.finding} for row in rows],
    }
    print(table(rows))
    print("\n" + "\n".join(summary(rows, args.tau)))
    if args.json is not None:
        write_text(args.json, json.dumps(result, indent=1) + "\n")
    if args.html is not None:
        write_letter(args.html, result, rows, summary(rows, args.tau), advice(rows, asked))
        say(f"written: {args.html}")


COLUMNS = (
    "layer",
    "largest",
    "over rms",
    "kurtosis",
    "channel",
    "token",
    "sigma_1",
    "tightness",
    "PCDR",
    "on u_1",
    "input over rms",
    "k",
)


def cells(row: LayerDiagnosis) -> tuple[str, ...]:
    """A layer as text, in the order of ``COLUMNS``."""
    return (
        row.layer,
        f"{row.max_abs:.4g}",
        f"{row.ratio:.1f}",
        f"{row.excess_kurtosis:.1f}",
        f"{row.channel} ({row.channel_share:.0%})",
        "" if row.position is None else f"{row.position} ({row.position_share:.0%})",
        f"{row.sigma_1[1]:.3g}",
        f"{row.tightness:.2f}",
        " ".join(f"{value:.2f}" for value in row.pcdr),
        f"{row.on_u1:.2f}",
        f"{row.input_ratio:.1f}",
        "-" if row.rank is None else str(row.rank),
    )


def table(rows: list[LayerDiagnosis]) -> str:
    """All layers, one a line."""
    lines = [COLUMNS, *map(cells, rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(COLUMNS))]
    return "\n".join(
        "  ".join(f"{cell:{'<' if column == 0 else '>'}{widths[column]}}" for column, cell in enumerate(line)).rstrip()
        for line in lines
    )


def summary(rows: list[LayerDiagnosis], tau: float) -> list[str]:
    """What was found, a sentence each."""
    ill = sorted((row for row in rows if row.has_outliers), key=lambda row: -row.max_abs)
    if not ill:
        worst = max(rows, key=lambda row: row.excess_kurtosis)
        return [
            f"None of {len(rows)} layers has outliers: the largest excess kurtosis is {worst.excess_kurtosis:.1f} "
            f"({worst.layer}).",
        ]
    spectral = [row for row in ill if row.finding == "spectral"]
    others = [row for row in ill if row.finding == "not spectral"]
    first = ill[0]
    place = "" if first.position is None else f", at token {first.position}"
    found = [
        f"{len(ill)} of {len(rows)} layers have outliers. The largest is {first.max_abs:.4g}, {first.ratio:.0f} times "
        f"the layer's root mean square, in channel {first.channel} of {first.layer}{place}.",
    ]
    if spectral:
        names = _listed([f"{row.layer} (top {row.rank})" for row in spectral])
        found.append(
            f"Made by the top singular components (PCDR of {tau:g} or more), so S2D would let these decay: {names}."
        )
    if others:
        names = _listed([f"{row.layer} (PCDR {max(row.pcdr):.2f})" for row in others])
        found.append(f"Not made by the top {len(others[0].pcdr)} components, so S2D would leave them alone: {names}.")
    return found


def _listed(names: list[str], most: int = 6) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def advice(rows: list[LayerDiagnosis], model: str) -> list[tuple[str, str]]:
    """What to do: a reason, and a command."""
    findings = {row.finding for row in rows}
    found = []
    if "spectral" in findings:
        found.append(
            (
                "Let the components that make the outliers decay, keeping the outputs as they are, without labels:",
                f"s2d condition {model} --data DATA -o conditioned",
            )
        )
    if "not spectral" in findings:
        found.append(
            (
                "Outliers that no few components make stay. A scale for each token, or a rotation, deals with those:",
                f"s2d quantize {model} --w-bits 8 --a-bits 8 --option activations=per_token --calibration DATA",
            )
        )
    found.append(
        (
            "Whether it matters is for the quantizer to say: measure what 8 and 4 bits cost.",
            f"s2d quantize {model} --method rtn --w-bits 8 --a-bits 8 --calibration DATA --test OTHER_DATA",
        )
    )
    return found
