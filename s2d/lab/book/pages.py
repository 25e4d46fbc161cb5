"""The book's computed pages: the gallery, the claims, the API."""

from __future__ import annotations

import importlib
import inspect
from html import escape
from pathlib import Path

import pandas as pd

from s2d.lab.book.stage import bring
from s2d.lab.figures.registry import PublishedFigure, sections, table_writers
from s2d.lab.paths import repository_root
from s2d.lab.results import load_table

RUN = "laptop"
API = {
    "core": ("The core", ("s2d",)),
    "ptq": ("Quantization", ("s2d.ptq", "s2d.ptq.checkpoint", "s2d.ptq.qat", "s2d.ptq.int8")),
    "models": ("Real networks", ("s2d.models", "s2d.diagnosis")),
    "train": ("Training", ("s2d.train.vision", "s2d.train.language", "s2d.train.settings", "s2d.estimate")),
    "integrations": ("Trainers", ("s2d.integrations.transformers", "s2d.integrations.lightning")),
}
SECTIONS = {
    "testbed": "The testbed",
    "origins": "Outlier origins",
    "bound": "Theorem 1 and PCDR",
    "finetuning": "Fine-tuning with S2D",
    "ptq": "Quantizers",
    "evidence": "Where outliers come from",
    "ablations": "One setting at a time",
    "frontier": "Every way of fine-tuning",
    "real": "Real networks",
    "language": "Language models",
    "encoder": "A real encoder",
    "self_supervised": "A self-supervised backbone",
    "claims": "The paper's claims",
}


def write_pages(stage: Path) -> None:
    """Write them into the stage."""
    (stage / "gallery.md").write_text(gallery(stage), encoding="utf-8")
    (stage / "claims.md").write_text(claims(load_table("claims", run=RUN)), encoding="utf-8")
    (stage / "api").mkdir()
    for name, (title, modules) in API.items():
        (stage / "api" / f"{name}.md").write_text(api(title, modules), encoding="utf-8")


def gallery(stage: Path) -> str:
    """Every published figure under its finding, with the notebook and the tables that it comes from."""
    root, writers = repository_root(), table_writers()
    parts = [
        "# Gallery: every figure under its finding",
        "Each finding is computed from the tables named below its figure; "
        "[90 draws them all](notebooks/90_figures.ipynb).",
    ]
    for section, figures in sections().items():
        parts.append(f"## {SECTIONS[section]}")
        parts += [_figure(figure, writers, root, stage) for figure in figures]
    return "\n\n".join(parts) + "\n"


def _figure(figure: PublishedFigure, writers: dict[str, str], root: Path, stage: Path) -> str:
    picture = Path("figures", RUN, f"{figure.name}.png")
    files = [Path("data", name if "/" in name else f"{RUN}/{name}").with_suffix(".csv") for name in figure.tables]
    for file in (picture, *files):
        bring(file, root, stage)
    finding = figure.finding(*(load_table(name, run=RUN) for name in figure.tables))
    sources = [f"[{file.name}]({file})" for file in files]
    sources += [f"[{name}](notebooks/{name}.ipynb)" for name in figure.measured_by(writers)]
    alternative = figure.caption.replace("`", "").replace("[", "(").replace("]", ")")
    return (
        f"### {figure.name.replace('_', ' ')}\n\n{finding}\n\n![{alternative}]({picture})\n\n"
        f"{figure.caption} *From* {' · '.join(sources)}. *Paper:* {figure.paper}."
    )


def claims(table: pd.DataFrame) -> str:
    """The claims table, each row with its verdict; ``claims.js`` lets a reader filter it."""
    shown = {
        "claim": [escape(r.claim) + _small(r.details) + _small(r.real_checkpoints) for r in table.itertuples()],
        "source": table.source.map(escape),
        "the paper": table.reported.fillna("").astype(str).map(escape),
        "here": [escape(_measured(row)) for row in table.itertuples()],
        "verdict": table.verdict.map(escape),
    }
    head = "".join(f"<th scope='col'>{name}</th>" for name in shown)
    rows = []
    for group, *cells in zip(table.group, *shown.values(), strict=True):
        inner = "".join(f"<td data-label='{name}'>{cell}</td>" for name, cell in zip(shown, cells, strict=True))
        rows.append(f"<tr data-group='{escape(group)}' data-verdict='{cells[-1]}'>{inner}</tr>")
    counts = table[table.group == "paper"].verdict.value_counts()
    said = ", ".join(f"{number} {verdict}" for verdict, number in counts.items())
    return (
        f"# Claims: what the paper says and what was measured here\n\nOf the paper's own claims: {said}. "
        "A row's group says whose claim it is: the paper's, a theorem's, or ours. Intervals are 95 % over seeds; how a "
        "verdict is reached stands in [the results](RESULTS.md).\n\n"
        "```{raw} html\n<div id='claims'><table class='claims'>"
        f"<thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table></div>\n```\n"
    )


def _small(details: object) -> str:
    return "" if pd.isna(details) or not details else f"<small>{escape(str(details))}</small>"


def _measured(row: object) -> str:
    if pd.isna(row.measured):
        return ""
    interval = "" if pd.isna(row.low) else f" [{row.low:.3g}, {row.high:.3g}]"
    seeds = "" if pd.isna(row.seeds) else f", {int(row.seeds)} seeds"
    return f"{row.measured:.3g}{interval} {row.unit}{seeds}"


def api(title: str, modules: tuple[str, ...]) -> str:
    """A page of the API reference, from the docstrings of the public names of some modules."""
    parts = [f"# {title}"]
    for name in modules:
        module = importlib.import_module(name)
        parts += [f"## `{name}`", (inspect.getdoc(module) or "").splitlines()[0]]
        members = {member: getattr(module, member) for member in public_names(name)}
        directives = [_directive(f"{name}.{key}", value) for key, value in members.items()]
        parts.append("```{eval-rst}\n" + "\n\n".join(directives) + "\n```")
    return "\n\n".join(parts) + "\n"


def public_names(name: str) -> list[str]:
    """The public functions and classes of a module: those it lists, or all that it defines.

    Example:
        >>> public_names("s2d.pcdr")
        ['activation_pcdr', 'layer_pcdr', 'outlier_rank', 'spectral_pcdr']
    """
    module = importlib.import_module(name)
    if hasattr(module, "__all__"):
        return [key for key in module.__all__ if callable(getattr(module, key))]
    return sorted(
        key
        for key, value in vars(module).items()
        if not key.startswith("_") and callable(value) and getattr(value, "__module__", "") == name
    )


def _directive(name: str, member: object) -> str:
    if not inspect.isclass(member):
        return f".. autofunction:: {name}"
    # A named tuple's fields stand in its docstring; as members they would be "alias for field number 0".
    fields = getattr(member, "_fields", ())
    return f".. autoclass:: {name}\n   :members:" + (f"\n   :exclude-members: {', '.join(fields)}" if fields else "")
