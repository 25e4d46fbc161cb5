"""The book's sources in one folder, laid out as the repository is, so that links between pages hold as they are."""

from __future__ import annotations

import ast
import base64
import importlib
import inspect
import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import nbformat

from s2d.lab.book.mathml import markup
from s2d.lab.moving.picture import MOVING

PAGES = (
    "README.md",
    "RESULTS.md",
    "REPRODUCING.md",
    "CONTRIBUTING.md",
    "CHANGELOG.md",
    "docs/*.md",
    "examples/*.md",
    "data/*/README.md",
    "figures/README.md",
    "notebooks/[0-9][0-9]_*.ipynb",
)
LINK = re.compile(r"(?P<image>!?)\[(?P<text>(?:[^\[\]]|\[[^\]]*\])*)\]\((?P<target>[^)\s]+)\)")
FOLDED = re.compile(r"<details>.*?</details>", re.DOTALL)
HEADING = re.compile(r"^#+ (.+)$", re.MULTILINE)
MARKS = re.compile(r"[*`$]|\[|\]\([^)]*\)")
DRAWING = ("s2d.lab.figures", "s2d.lab.moving", "s2d.lab.moving.still")


def stage(root: Path, target: Path) -> None:
    """Lay the sources out.

    Args:
        root: of the repository.
        target: made anew; what was there is removed.

    Raises:
        FileNotFoundError: if a page links to what the repository does not have, naming page and link.
    """
    shutil.rmtree(target, ignore_errors=True)
    pages = {path.relative_to(root) for pattern in PAGES for path in root.glob(pattern)}
    for page in sorted(pages):
        made = target / page
        made.parent.mkdir(parents=True, exist_ok=True)
        if page.suffix == ".ipynb":
            notebook = nbformat.read(root / page, as_version=4)
            for cell in notebook.cells:
                if cell.cell_type == "markdown":
                    cell.source = FOLDED.sub(_unfolded, _linked(cell.source, page, root, target))
            _with_pictures(notebook, made)
            nbformat.write(notebook, made)
        else:
            made.write_text(_linked((root / page).read_text(encoding="utf-8"), page, root, target), encoding="utf-8")
    for page in (root / "docs" / "book").glob("*.md"):
        shutil.copyfile(page, target / page.name)


def bring(file: Path, root: Path, target: Path) -> None:
    """Copy a file of the repository to its place in the stage, once."""
    made = target / file
    if not made.exists():
        made.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(root / file, made)


def _linked(text: str, page: Path, root: Path, target: Path) -> str:
    """The page with what it links to beside it: files are brought along, a folder is its README or a mere word."""

    def follow(match: re.Match[str]) -> str:
        address = match["target"]
        path, _, anchor = address.partition("#")
        if not path or re.match(r"[a-z]+:", address):
            return match[0]
        where = (root / page.parent / path).resolve()
        if not where.is_relative_to(root) or not where.exists():
            raise FileNotFoundError(f"{page} links to {address}, which the repository does not have: mend the link")
        if where.is_dir() and not (where / "README.md").is_file():
            return match["text"]
        if where.is_dir():
            return f"{match['image']}[{match['text']}]({path.rstrip('/')}/README.md)"
        file = where.relative_to(root)
        if not any(file.match(pattern) for pattern in PAGES if file.suffix in (".md", ".ipynb")):
            bring(file, root, target)
        return match[0]

    return LINK.sub(follow, text)


def _unfolded(match: re.Match[str]) -> str:
    """A folded solution is HTML, in which MyST leaves formulas and code as they are."""
    text = re.sub(r"\$([^$]+)\$", lambda formula: markup(formula[1], "inline"), match[0])
    return re.sub(r"`([^`]+)`", r"<code>\1</code>", text)


def _with_pictures(notebook: Any, path: Path) -> None:
    """Pictures become files with a text alternative; those that move bring the numbers they are drawn from."""
    heading = ""
    for number, cell in enumerate(notebook.cells):
        if cell.cell_type == "markdown":
            heading = (HEADING.findall(cell.source) or [heading])[-1]
            continue
        outputs, said = [], ""
        for index, output in enumerate(cell.get("outputs", [])):
            data = output.get("data", {})
            said = data.get("text/markdown", said)
            if "image/png" not in data:
                outputs.append(output)
                continue
            file = path.with_name(f"{path.stem}_files") / f"{number}_{index}.png"
            file.parent.mkdir(exist_ok=True)
            file.write_bytes(base64.b64decode(data["image/png"]))
            alternative = _plain(_alternative(data.get("text/plain", ""), said, cell.source, heading))
            outputs.append(_markdown(f"![{alternative}]({file.parent.name}/{file.name})"))
            if MOVING in data:
                outputs.append(_html(moving_html(data[MOVING], alternative)))
        cell["outputs"] = outputs


def _alternative(plain: str, said: str, code: str, heading: str) -> str:
    """What a reader who does not see the picture is told: its sentence, its finding, or what the function draws."""
    if plain and not plain.startswith("<"):
        return plain
    if said:
        return said
    return ": ".join([heading, *dict.fromkeys(_drawn(code))][:2])


def _drawn(code: str) -> Iterator[str]:
    """The first line of the docstring of every drawing function that a cell calls."""
    modules = [importlib.import_module(name) for name in DRAWING]
    modules += [
        importlib.import_module(f"s2d.lab.figures.{p.stem}") for p in Path(modules[0].__file__).parent.glob("[a-z]*.py")
    ]
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.Call):
            name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            found = next((getattr(module, name) for module in modules if hasattr(module, name)), None)
            if found is not None and name != "explore" and inspect.getdoc(found):
                yield inspect.getdoc(found).splitlines()[0]


def _plain(text: str) -> str:
    return " ".join(MARKS.sub("", text).split())


def moving_html(moving: dict[str, Any], sentence: str) -> str:
    """The place where ``moving.js`` puts a picture with its controls; without scripts the still picture is all."""
    numbers = json.dumps(moving, separators=(",", ":")).replace("<", "\\u003c")
    return f'<div class="moving" aria-label="{sentence}"><script type="application/json">{numbers}</script></div>'


def _markdown(text: str) -> Any:
    return nbformat.v4.new_output("display_data", data={"text/markdown": text})


def _html(text: str) -> Any:
    return nbformat.v4.new_output("display_data", data={"text/html": text})
