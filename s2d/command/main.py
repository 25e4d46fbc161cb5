"""The command ``s2d`` and its parts."""

from __future__ import annotations

import difflib
import sys
from collections.abc import Callable, Sequence
from functools import partial

from s2d.command import condition, diagnose, estimate, evaluate, train
from s2d.console import exit_code, say
from s2d.packages import need
from s2d.ptq import command as quantize
from s2d.ptq.command.arguments import Parser, quantize_parser

COMMANDS: dict[str, tuple[Callable[..., int], Callable[[], Parser], str]] = {
    "diagnose": (diagnose.main, diagnose.parser, "which layers have outliers, what makes them, and what to do"),
    "condition": (condition.main, condition.parser, "let these components decay, and keep the network to what it did"),
    "train": (train.main, train.parser, "fine-tune a classifier or a language model, with S2D or without"),
    "quantize": (
        partial(quantize.main, prog="s2d quantize"),
        partial(quantize_parser, "s2d quantize"),
        "quantize a network, and say what it cost",
    ),
    "estimate": (estimate.main, estimate.parser, "what fine-tuning it will take: time, memory, hours"),
    "eval": (evaluate.main, evaluate.parser, "accuracy or perplexity, also of a quantized network"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run ``s2d``.

    Args:
        argv: the arguments; None for those of the process.

    Returns:
        The exit code: 0 all well, 1 failed, 2 bad input, 130 interrupted.

    Paper: none
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    if not argv or argv[0] in ("-h", "--help"):
        print(_help())
        return 0 if argv else 2
    if argv[0] == "--print-completion":
        return exit_code(lambda: print(completion(argv[1] if len(argv) > 1 else "bash")))
    if argv[0] not in COMMANDS:
        close = difflib.get_close_matches(argv[0], COMMANDS, n=1)
        hint = f"did you mean {close[0]!r}?" if close else f"choose one of {', '.join(COMMANDS)}"
        say(f"error: unknown command {argv[0]!r}: {hint} (see s2d --help)")
        return 2
    return COMMANDS[argv[0]][0](argv[1:])


def _help() -> str:
    width = max(map(len, COMMANDS))
    lines = ["usage: s2d COMMAND ...", "", "Selective Spectral Decay on networks that somebody else trained.", ""]
    lines += [f"  {name:{width}}  {text}" for name, (_, _, text) in COMMANDS.items()]
    lines += [
        "",
        "s2d COMMAND --help says more; s2d --print-completion bash (zsh, tcsh, fish) a completion script.",
    ]
    return "\n".join(lines)


def completion(shell: str) -> str:
    """A script that completes ``s2d`` in a shell.

    Args:
        shell: such as ``"bash"`` or ``"zsh"``.

    Raises:
        ValueError: for another shell.
        ImportError: without the package shtab.

    Paper: none
    """
    shtab = need("shtab", "--print-completion")
    if shell not in shtab.SUPPORTED_SHELLS:
        raise ValueError(f"unknown shell {shell!r}: choose one of {', '.join(shtab.SUPPORTED_SHELLS)}")
    whole = Parser(prog="s2d")
    commands = whole.add_subparsers()
    for name, (_, parser, text) in COMMANDS.items():
        commands.add_parser(name, parents=[parser()], add_help=False, help=text)
    return shtab.complete(whole, shell=shell)
