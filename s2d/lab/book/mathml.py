"""Equations as MathML, which browsers draw themselves: no script, no network, and a screen reader can read them."""

from __future__ import annotations

import re
from typing import Any

from latex2mathml.converter import convert


def markup(latex: str, display: str) -> str:
    """A formula as MathML.

    Args:
        latex: without its dollars.
        display: "inline" or "block".

    Raises:
        ValueError: if it is none, with the formula.
    """
    try:
        made = convert(latex.strip(), display=display)
    except Exception as error:  # the library's own exceptions have no common base
        raise ValueError(f"not a formula that can be shown: {latex!r} ({type(error).__name__}: {error})") from error
    if unknown := re.search(r">(\\[a-zA-Z]+)<", made):
        raise ValueError(f"not a formula that can be shown: {latex!r} has the unknown command {unknown[1]}")
    return made


def _inline(translator: Any, node: Any) -> None:
    from docutils.nodes import SkipNode

    translator.body.append(markup(node.astext(), "inline"))
    raise SkipNode


def _block(translator: Any, node: Any) -> None:
    from docutils.nodes import SkipNode

    translator.body.append(f'<div class="math">{markup(node.astext(), "block")}</div>')
    raise SkipNode


def setup(app: Any) -> dict[str, bool]:
    """What Sphinx calls."""
    app.add_html_math_renderer("mathml", (_inline, None), (_block, None))
    return {"parallel_read_safe": True, "parallel_write_safe": True}
