"""The command line of the notebook runner."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from s2d.console import interruptible, say
from s2d.lab.notebook.check import check_notebook
from s2d.lab.notebook.execute import NotebookError
from s2d.lab.notebook.parameters import read_options, read_parameters, read_yaml
from s2d.lab.notebook.run import refresh_notebook, run_notebook


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        argv: The arguments; None for those of the process.

    Returns:
        The exit code: 0 all well, 1 a notebook failed or has findings, 2 bad input, 130 interrupted.

    Paper: none
    """
    args = _parser().parse_args(argv)
    try:
        with interruptible():
            return args.function(args)
    except ValueError as error:
        say(f"error: {error}")
        return 2
    except (NotebookError, OSError) as error:
        say(f"error: {error}")
        return 1
    except KeyboardInterrupt as error:
        say(f"interrupted: {error}" if str(error) else "interrupted")
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m s2d.lab.notebook",
        description="Run, refresh and check notebooks strictly.",
        epilog="Exit codes: 0 all well; 1 a notebook failed or has findings; 2 bad input; 130 interrupted.",
        allow_abbrev=False,
    )
    commands = parser.add_subparsers(dest="command", required=True)

    run = commands.add_parser("run", help="execute with parameters into OUTPUT", allow_abbrev=False)
    run.add_argument("notebook", type=Path, metavar="NOTEBOOK")
    run.add_argument("output", type=Path, metavar="OUTPUT")
    run.add_argument("--params", type=Path, action="append", default=[], metavar="FILE.yaml")
    run.add_argument(
        "-p",
        nargs=2,
        action="append",
        default=[],
        dest="options",
        metavar=("NAME", "VALUE"),
        help="one parameter; overrides the file",
    )
    run.set_defaults(function=_run_command)

    refresh = commands.add_parser("refresh", help="execute at the defaults, in place", allow_abbrev=False)
    refresh.add_argument("notebooks", type=Path, nargs="+", metavar="NOTEBOOK")
    refresh.set_defaults(function=_refresh_command)
    for command in (run, refresh):
        command.add_argument("--timeout", type=int, metavar="SECONDS", help="limit for one cell (default: none)")

    check = commands.add_parser("check", help="check against the template", allow_abbrev=False)
    check.add_argument("notebooks", type=Path, nargs="+", metavar="NOTEBOOK")
    check.set_defaults(function=_check_command)
    return parser


def _run_command(args: argparse.Namespace) -> int:
    if len(args.params) > 1:
        raise ValueError("--params is given twice; give one file")
    defaults = read_parameters(args.notebook)
    parameters = read_yaml(args.params[0]) if args.params else {}
    parameters |= read_options(args.options, defaults)
    run_notebook(args.notebook, args.output, parameters, timeout=args.timeout)
    return 0


def _refresh_command(args: argparse.Namespace) -> int:
    for path in args.notebooks:  # bad input among the last stops the first
        read_parameters(path)
    failures = 0
    for path in args.notebooks:
        try:
            refresh_notebook(path, timeout=args.timeout)
        except NotebookError as error:
            failures += 1
            say(f"error: {error}")
    return 1 if failures else 0


def _check_command(args: argparse.Namespace) -> int:
    findings = [finding for path in args.notebooks for finding in check_notebook(path)]
    for finding in findings:
        print(finding)
    return 1 if findings else 0
