"""A report as one page: a file that needs nothing beside it, figures inside."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable, Sequence
from html import escape
from pathlib import Path
from typing import Any

from s2d.files import write_text
from s2d.packages import need

STYLE = """
body { font: 16px/1.55 Georgia, serif; color: #222; max-width: 62rem; margin: 2.5rem auto; padding: 0 1.2rem; }
h1, h2 { font-weight: 600; line-height: 1.25; } h1 { font-size: 1.7rem; } h2 { font-size: 1.2rem; margin-top: 2.2rem; }
p.about { color: #666; } img { width: 100%; height: auto; margin: .4rem 0 1rem; }
pre { background: #f4f4f2; padding: .7rem .9rem; overflow-x: auto; font-size: .85rem; }
div.wide { overflow-x: auto; } table { border-collapse: collapse; font: .78rem/1.5 system-ui, sans-serif; }
td, th { padding: .2rem .6rem; text-align: right; border-bottom: 1px solid #e4e4e0; white-space: nowrap; }
td:first-child, th:first-child { text-align: left; } dt { font-weight: 600; } dd { margin: 0 0 .5rem 1.2rem; }
"""


def write_page(path: Path, title: str, about: str, parts: Sequence[str]) -> None:
    """Write the page, whole or not at all.

    Args:
        path: of the file.
        title, about: plain text.
        parts: HTML.

    Paper: none
    """
    head = [
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>{escape(title)}</title><style>{STYLE}</style></head><body>",
        f"<h1>{escape(title)}</h1><p class='about'>{escape(about)}</p>",
    ]
    write_text(path, "\n".join([*head, *parts, "</body></html>\n"]))


def picture(alternative: str, draw: Callable[[Any], None]) -> str:
    """A figure as an image in the page.

    Args:
        alternative: what it shows, for who cannot see it.
        draw: called with a ``matplotlib.figure.Figure``.

    Raises:
        ImportError: without the package matplotlib.

    Paper: none
    """
    figure = need("matplotlib.figure", "--html").Figure(figsize=(11, 3.6), dpi=130, layout="constrained")
    draw(figure)
    for axes in figure.axes:
        axes.spines[["top", "right"]].set_visible(False)
    stream = io.BytesIO()
    figure.savefig(stream, format="png")
    source = f"data:image/png;base64,{base64.b64encode(stream.getvalue()).decode()}"
    return f"<img alt='{escape(alternative, quote=True)}' src='{source}'>"


def table(head: Sequence[str], rows: Sequence[Sequence[str]], colours: Sequence[str] | None = None) -> str:
    """A table that scrolls by itself where the page is narrow.

    Args:
        head: of the columns.
        rows: cells as text.
        colours: of the rows, in CSS's words.

    Paper: none
    """
    colours = colours or ["inherit"] * len(rows)
    body = "".join(
        f'<tr style="color: {colour}">' + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>\n"
        for colour, row in zip(colours, rows, strict=True)
    )
    names = "".join(f"<th>{escape(name)}</th>" for name in head)
    return f"<div class='wide'><table><tr>{names}</tr>\n{body}</table></div>"
