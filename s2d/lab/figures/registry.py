"""Which figures are published: each a function of tables, with the finding that it shows and where the paper has it.

A figure is added by a function in the file of its notebook (:func:`published`) and a call in that notebook; the figures
notebook, the batch and ``figures/README.md`` follow.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib.pyplot as plt
from matplotlib.figure import Figure

from s2d.files import write_text
from s2d.lab.dependencies import notebook_code, saved_tables
from s2d.lab.figures.style import save_figure
from s2d.lab.paths import output_root, repository_root
from s2d.lab.results import load_table


@dataclass(frozen=True)
class PublishedFigure:
    """A figure of the folder ``figures/``.

    Attributes:
        draw: a function of its tables.
        tables: their names, as :func:`s2d.lab.results.load_table` takes them.
        finding: a function of the same tables: what the figure shows, in one sentence with the numbers in it.
        paper: what of the paper it is about.
    """

    draw: Callable[..., Figure]
    tables: tuple[str, ...]
    finding: Callable[..., str]
    paper: str

    @property
    def name(self) -> str:
        """The stem of its files."""
        return self.draw.__name__

    @property
    def caption(self) -> str:
        """The first line of the function's docstring."""
        return inspect.getdoc(self.draw).splitlines()[0]

    def measured_by(self, writers: Mapping[str, str]) -> list[str]:
        """The notebooks that write its tables, each once.

        Args:
            writers: from :func:`table_writers`.
        """
        return list(dict.fromkeys(writers[name] for name in self.tables if name in writers))


_FIGURES: list[PublishedFigure] = []


def published(*, tables: Sequence[str], finding: Callable[..., str], paper: str = "none") -> Callable:
    """Decorate a function that draws a published figure; it stays as it is, and its name becomes the files' name.

    Args:
        tables: what it is called with, written out (the batch reads them from the source); ``laptop/tuning`` and
            ``paper/table06_pcdr_selection`` stand for tables that are the same at every scale.
        finding: called with the same tables; a sentence for the reader, computed from them.
        paper: the tables, theorems or appendices it is about.

    Raises:
        ValueError: if a figure of that name is there already, or has no docstring to be its caption.
    """

    def register(draw: Callable[..., Figure]) -> Callable[..., Figure]:
        if draw.__name__ in {figure.name for figure in _FIGURES}:
            raise ValueError(f"there are two figures {draw.__name__}: they would overwrite each other, rename one")
        if not draw.__doc__:
            raise ValueError(f"figure {draw.__name__} has no docstring: its first line is the caption, write one")
        _FIGURES.append(PublishedFigure(draw, tuple(tables), finding, paper))
        return draw

    return register


def sections() -> dict[str, list[PublishedFigure]]:
    """All published figures by the file they are drawn in, in the order of the notebooks and of the files.

    Example:
        >>> [figure.name for figure in sections()["bound"]]
        ['bound_tightness', 'pcdr_layers', 'pcdr_correlation']
    """
    from s2d.lab.figures import (
        ablations,
        bound,
        claims,
        encoder,
        evidence,
        finetuning,
        frontier,
        language,
        origins,
        ptq,
        real,
        self_supervised,
        testbed,
    )

    modules = (testbed, origins, bound, finetuning, ptq, evidence, ablations, frontier)
    modules += (real, language, encoder, self_supervised, claims)
    names = [module.__name__ for module in modules]
    return {name.rpartition(".")[2]: [f for f in _FIGURES if f.draw.__module__ == name] for name in names}


def draw_all(section: str, *, run: str) -> list[Path]:
    """Draw the figures of a section from their tables, show each under its finding, and save them.

    Args:
        section: a key of :func:`sections`.
        run: label of the tables read and of the output folder.

    Returns:
        The files written, two a figure.

    Raises:
        ValueError: for an unknown section.
        FileNotFoundError: if a table is not there, naming the notebook to run.
    """
    from IPython.display import Markdown, display

    known = sections()
    if section not in known:
        raise ValueError(f"no section {section!r}: choose one of {', '.join(known)}")
    written = []
    for entry in known[section]:
        tables = [load_table(name, run=run) for name in entry.tables]
        drawn = entry.draw(*tables)
        display(Markdown(f"**`{entry.name}`** {entry.finding(*tables)}"), drawn)
        written += save_figure(drawn, entry.name, run=run, tables=entry.tables)
        plt.close(drawn)
    return written


def table_writers() -> dict[str, str]:
    """Each table that a notebook writes, to the stem of that notebook."""
    notebooks = sorted((repository_root() / "notebooks").glob("[0-9][0-9]_*.ipynb"))
    return {table: path.stem for path in notebooks for table in saved_tables(notebook_code(path))}


def index() -> str:
    """The text of ``figures/README.md``: every figure, where its tables come from, what of the paper it is about."""
    writers = table_writers()
    rows = [
        f"| `{figure.name}` | {figure.caption} | {', '.join(f'`{name}.csv`' for name in figure.tables)} "
        f"| {', '.join(figure.measured_by(writers)) or 'none'} "
        f"| {figure.paper} |"
        for figures in sections().values()
        for figure in figures
    ]
    return "\n".join([_INTRODUCTION, *rows, ""])


_INTRODUCTION = """\
# Figures

Drawn by [`notebooks/90_figures.ipynb`](../notebooks/90_figures.ipynb) from tables alone (`make figures`), one folder a
scale. Each SVG and PNG carries the SHA-256 of its tables in its metadata (`Description`); the JSON beside a table in
`data/` says how that was made. This list is written by the same notebook, from the functions in `s2d/lab/figures/`.

| figure | what it shows | tables | notebook of the tables | paper |
|---|---|---|---|---|"""


def write_index() -> Path:
    """Write ``figures/README.md``; the same at every scale."""
    path = output_root() / "figures" / "README.md"
    write_text(path, index())
    return path
