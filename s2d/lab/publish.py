"""What of the store is committed, and what is fetched: few entries to start with, the rest as assets of a release.

    python -m s2d.lab.publish                    the committed folder, build/assets and data/laptop/assets.csv
    python -m s2d.lab.publish fetch              the assets into build/store, checked (make fetch)
    python -m s2d.lab.publish fetch --from DIR   from a folder or another address

Nothing needs the assets: the tables are enough for figures and notebooks, and what is not there can be trained. An
asset is one entry of the store under its own name; ``data/laptop/assets.csv`` has its sha256 and size.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import io
import os
import sys
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import astuple, dataclass, fields
from http.client import HTTPException
from pathlib import Path
from typing import BinaryIO

import yaml

from s2d import __version__
from s2d.console import interruptible
from s2d.files import write_atomically, write_text
from s2d.lab.paths import repository_root
from s2d.lab.recipes import laptop_recipes, starting_recipes
from s2d.lab.store import committed_folder, file_name, find_file, load, store_folders
from s2d.lab.training import Recipe

BUDGET = 15_000_000  # bytes that may be committed
TIMEOUT = 60  # seconds without an answer


def needed_to_start(recipe: Recipe) -> bool:
    """Whether a reader should have it at once, one of :func:`s2d.lab.recipes.starting_recipes`."""
    return recipe in starting_recipes()


COMMITTED: Callable[[Recipe], bool] = needed_to_start
"""Which of the laptop's recipes are committed (with what they start from); the rest are assets."""


@dataclass(frozen=True)
class Asset:
    """One file of the release.

    Attributes:
        name: of the file, in the release and in the store.
        sha256: of its content.
        bytes: its size.
    """

    name: str
    sha256: str
    bytes: int


def assets_path() -> Path:
    """The committed list of the assets."""
    return repository_root() / "data" / "laptop" / "assets.csv"


def read_assets(path: Path | None = None) -> list[Asset]:
    """The assets of the release.

    Raises:
        ValueError: if there is no list, or a line of it cannot be used.
    """
    path = assets_path() if path is None else path
    if not path.exists():
        raise ValueError(f"there is no {path}: it is committed by python -m s2d.lab.publish")
    rows = list(csv.DictReader(io.StringIO(path.read_text(encoding="utf-8"))))
    for number, row in enumerate(rows, start=2):
        name, digest, size = (row.get(f.name) or "" for f in fields(Asset))
        if Path(name).name != name or not name.endswith(".safetensors") or len(digest) != 64 or not size.isdigit():
            raise ValueError(f"{path}, line {number}, is no asset ({row}): restore it with git checkout")
    return [Asset(row["name"], row["sha256"], int(row["bytes"])) for row in rows]


def described(path: Path) -> Asset:
    """A file as an asset."""
    content = path.read_bytes()
    return Asset(path.name, hashlib.sha256(content).hexdigest(), len(content))


# --- publishing -------------------------------------------------------------------------------------------------------


def divided(
    recipes: Sequence[Recipe], committed: Callable[[Recipe], bool]
) -> tuple[dict[str, Recipe], dict[str, Recipe]]:
    """The recipes and what they start from, by file name: those to commit, with what these start from, and the rest."""
    kept, every = {}, {}
    for recipe in recipes:
        chosen, needed = committed(recipe), recipe
        while needed is not None:
            every[file_name(needed)] = needed
            if chosen:
                kept[file_name(needed)] = needed
            needed = needed.start
    return kept, {name: recipe for name, recipe in every.items() if name not in kept}


def publish(recipes: Sequence[Recipe], committed: Callable[[Recipe], bool] | None = None) -> tuple[list[Path], Path]:
    """Make the committed folder hold exactly what is to be committed, and a folder of assets the rest.

    Everything is checked before anything is written; a chain to today's code is asked for of every entry.

    Args:
        recipes: all that is published, with what they start from.
        committed: which of them are committed; by default :data:`COMMITTED`.

    Returns:
        The committed files, and the folder of the assets, which are to be uploaded.

    Raises:
        ValueError: if an entry is missing or cannot be used, or the committed ones are larger than :data:`BUDGET`.
    """
    kept, rest = divided(recipes, COMMITTED if committed is None else committed)
    sources = {}
    for name, recipe in (kept | rest).items():
        path = find_file(recipe)
        if path is None:
            raise ValueError(f"{name} is not in the store: train it (make figures) or fetch it (make fetch) first")
        load(path, recipe)
        sources[name] = path.read_bytes()
    size = sum(len(sources[name]) for name in kept)
    if size > BUDGET:
        raise ValueError(f"{size:,} bytes would be committed, and {BUDGET:,} may be: let publish.COMMITTED choose less")
    assets = repository_root() / "build" / "assets"
    _fill(committed_folder(), {name: sources[name] for name in kept})
    _fill(assets, {name: sources[name] for name in rest})
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(f.name for f in fields(Asset))
    writer.writerows(astuple(described(assets / name)) for name in sorted(rest))
    write_text(assets_path(), text.getvalue())
    return sorted(committed_folder() / name for name in kept), assets


def _fill(folder: Path, contents: dict[str, bytes]) -> None:
    """Make a folder's entries exactly these; files that are right already are left alone."""
    folder.mkdir(parents=True, exist_ok=True)
    for path in folder.glob("*.safetensors"):
        if path.name not in contents:
            path.unlink()
    for name, content in contents.items():
        path = folder / name
        if not path.exists() or path.read_bytes() != content:
            write_atomically(path, lambda temporary, content=content: temporary.write_bytes(content))


# --- fetching ---------------------------------------------------------------------------------------------------------


def assets_source() -> str:
    """Where assets are fetched from: ``$S2D_ASSETS``, else the release of this version.

    Raises:
        ValueError: if the repository's address is not known.
    """
    if os.environ.get("S2D_ASSETS"):
        return os.environ["S2D_ASSETS"]
    citation = yaml.safe_load((repository_root() / "CITATION.cff").read_text(encoding="utf-8"))
    if not citation.get("repository-code"):
        raise ValueError(
            "CITATION.cff names no repository-code, so the address of the release is not known: give --from, or set "
            "S2D_ASSETS, to a folder or an http(s) address"
        )
    return f"{citation['repository-code'].rstrip('/')}/releases/download/v{__version__}"


@contextmanager
def _opened(source: str, name: str) -> Iterator[BinaryIO]:
    if source.startswith(("http://", "https://")):
        with urllib.request.urlopen(f"{source.rstrip('/')}/{name}", timeout=TIMEOUT) as answer:
            yield answer
    elif Path(source).is_dir():
        with (Path(source) / name).open("rb") as file:
            yield file
    else:
        raise ValueError(f"{source} is neither a folder nor an http(s) address")


def fetch(source: str | None = None, *, folder: Path | None = None) -> list[Path]:
    """Get the assets that are not in the store; each appears there whole and checked, or not at all.

    Args:
        source: folder or address; by default :func:`assets_source`.
        folder: where to; by default the folder of the store that is written to. A file that is there is left alone.

    Returns:
        What was fetched.

    Raises:
        ValueError: if one cannot be fetched, or is not what ``data/laptop/assets.csv`` says.
    """
    from tqdm import tqdm

    folder = store_folders()[0] if folder is None else folder
    missing = [asset for asset in read_assets() if not (folder / asset.name).exists()]
    if missing and source is None:
        source = assets_source()
    total = sum(asset.bytes for asset in missing)
    with tqdm(total=total, unit="B", unit_scale=True, file=sys.stderr, mininterval=5) as bar:
        for asset in missing:
            try:
                write_atomically(
                    folder / asset.name, lambda temporary, asset=asset: _download(source, asset, temporary)
                )
            except (OSError, HTTPException, ValueError) as error:
                raise ValueError(f"{asset.name} cannot be fetched from {source}: {error}") from error
            bar.update(asset.bytes)
    return [folder / asset.name for asset in missing]


def _download(source: str, asset: Asset, temporary: Path) -> None:
    digest, size = hashlib.sha256(), 0
    with _opened(source, asset.name) as stream, temporary.open("wb") as file:
        while size <= asset.bytes and (chunk := stream.read(1 << 20)):
            file.write(chunk)
            digest.update(chunk)
            size += len(chunk)
    if (digest.hexdigest(), size) != (asset.sha256, asset.bytes):
        raise ValueError(
            f"what is there has {size} bytes and sha256 {digest.hexdigest()[:12]}..., and data/laptop/assets.csv says "
            f"{asset.bytes} and {asset.sha256[:12]}...: it is of another release, or damaged"
        )


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; see the module's text.

    Returns:
        The exit status: 0, or 2 for bad input.
    """
    parser = argparse.ArgumentParser(prog="python -m s2d.lab.publish", description=__doc__.split("\n")[0])
    verbs = parser.add_subparsers(dest="verb")
    fetching = verbs.add_parser("fetch", help="get the assets into the store")
    fetching.add_argument("--from", dest="source", metavar="URL|FOLDER", help="default: $S2D_ASSETS, else the release")
    options = parser.parse_args(arguments)
    try:
        with interruptible():
            if options.verb == "fetch":
                fetched = fetch(options.source)
                print(f"{len(fetched)} fetched, {len(read_assets()) - len(fetched)} were there")
                return 0
            committed, assets = publish(laptop_recipes())
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    size = sum(path.stat().st_size for path in committed)
    print(f"{len(committed)} entries of {size / 1e6:.1f} MB to commit in data/laptop/checkpoints")
    print(f"{len(read_assets())} assets in {assets}, listed in data/laptop/assets.csv: upload them, such as")
    print(f"  gh release upload v{__version__} {assets}/*.safetensors")
    return 0


if __name__ == "__main__":
    sys.exit(main())
