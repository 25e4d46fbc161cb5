"""Stage the sources, and let Sphinx make a site of them."""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from s2d.files import write_folder_atomically
from s2d.lab.book.pages import write_pages
from s2d.lab.book.stage import stage
from s2d.lab.paths import repository_root

DEFAULT = "build/book"


def build(target: Path) -> Path:
    """Build the site; warnings of Sphinx (a link to nowhere, a formula that is none) are errors.

    Args:
        target: folder of the site, replaced as a whole when all went well.

    Returns:
        Its first page.

    Raises:
        RuntimeError: with what Sphinx said, if it failed; the old site is still there.
    """
    root = repository_root()
    source = target.with_name(f"{target.name}.source")
    stage(root, source)
    write_pages(source)

    def made(folder: Path) -> None:
        command = [sys.executable, "-m", "sphinx", "--quiet", "--fail-on-warning", "--keep-going", "--jobs", "auto"]
        command += ["-E", "-b", "html", "-d", f"{target}.doctrees", "-c", f"{root}/docs/book", f"{source}", f"{folder}"]
        run = subprocess.run(command, capture_output=True, text=True)
        if run.returncode:
            raise RuntimeError(f"Sphinx did not build the book:\n{run.stderr.strip() or run.stdout.strip()}")

    write_folder_atomically(target, made, overwrite=True)
    return target / "index.html"


def main(arguments: Sequence[str] | None = None) -> int:
    """The command's exit status."""
    parser = argparse.ArgumentParser(prog="python -m s2d.lab.book", description=__doc__)
    parser.add_argument("target", nargs="?", default=DEFAULT, help=f"folder of the site (default {DEFAULT})")
    try:
        print(build(Path(parser.parse_args(arguments).target).resolve()))
    except (OSError, RuntimeError) as error:
        print(error, file=sys.stderr)
        return 1
    return 0
