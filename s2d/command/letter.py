"""The diagnosis as a page that reads like a doctor's letter: what was found, where, why, and what to do."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

from s2d.command.page import picture, table, write_page
from s2d.diagnosis import OUTLIER_KURTOSIS, LayerDiagnosis
from s2d.packages import need

COLOURS = {"spectral": "#d1495b", "not spectral": "#c98a16", "no outliers": "#7a8a99"}
LEGEND = {
    "spectral": "outliers made by the top components: S2D acts",
    "not spectral": "outliers that S2D leaves alone",
    "no outliers": "no outliers",
}
TERMS = {
    "largest, over rms": "the largest absolute output (without bias), and that over the layer's root mean square",
    "kurtosis": f"excess kurtosis of all outputs; 0 for a normal distribution, outliers from {OUTLIER_KURTOSIS:.0f} on",
    "channel, token": "where most of the 16 largest outputs are, and how many of them",
    "sigma_1": "the spectral norm, from above and guaranteed",
    "tightness": "|W x| / (sigma_1 |x|) at the largest output: how near it comes to the bound of Theorem 1",
    "PCDR": "the part of the largest outputs that the top 1, 2, ... singular components make",
    "on u_1": "the part of the first left singular vector's energy that lies on the channel",
    "input over rms": "the largest input over the inputs' root mean square: what a grid for all inputs has to span",
    "k": "how many components S2D would let decay; - where it leaves the layer alone",
}


def write_letter(
    path: Path,
    result: dict[str, Any],
    rows: Sequence[LayerDiagnosis],
    summary: Sequence[str],
    advice: Sequence[tuple[str, str]],
) -> None:
    """Write the page: one file, figures inside.

    Args:
        path: of the page.
        result: with model, data, items, tau and unreadable files.
        rows: one a layer.
        summary: what was found, a sentence each.
        advice: what to do: a reason and a command.

    Raises:
        ImportError: without the package matplotlib.

    Paper: none
    """
    from s2d.command.diagnose import COLUMNS, cells

    about = f"{result['items']} items of {result['data']}; PCDR threshold {result['tau']:g}; seed {result['seed']}."
    if result["unreadable"]:
        about += f" {len(result['unreadable'])} files could not be read: {', '.join(result['unreadable'])}."
    parts = [
        "<h2>Findings</h2>" + "".join(f"<p>{escape(sentence)}</p>" for sentence in summary),
        picture("largest activation of each layer", lambda figure: _largest(figure, rows)),
    ]
    if any(row.has_outliers for row in rows):
        parts.append(f"<h2>Why</h2><p>{escape(_why(rows))}</p>")
        parts.append(picture("PCDR and tightness", lambda figure: _causes(figure, rows)))
    parts.append("<h2>What to do</h2>")
    parts += [f"<p>{escape(reason)}</p><pre>{escape(command)}</pre>" for reason, command in advice]
    colours = [COLOURS[row.finding] if row.has_outliers else "inherit" for row in rows]
    parts.append("<h2>All layers</h2>" + table(COLUMNS, [cells(row) for row in rows], colours) + "<dl>")
    parts += [f"<dt>{escape(term)}</dt><dd>{escape(text)}</dd>" for term, text in TERMS.items()]
    write_page(path, f"Diagnosis of {result['model']}", about, [*parts, "</dl>"])


def _why(rows: Sequence[LayerDiagnosis]) -> str:
    ill = [row for row in rows if row.has_outliers]
    near = max(ill, key=lambda row: row.tightness)
    text = (
        "An output is at most sigma_1 times the length of its input (Theorem 1). Nearest to that comes the largest "
        f"output of {near.layer}: its vector has {near.tightness:.0%} of the length that the spectral norm allows. "
    )
    spectral = [row for row in ill if row.finding == "spectral"]
    if not spectral:
        return (
            text + "In no layer do a few components make the outliers: they come from inputs, or from many components."
        )
    best = max(spectral, key=lambda row: row.on_u1 * row.tightness)
    return text + (
        f"In {best.layer} the first left singular vector has {best.on_u1:.0%} of its energy on channel {best.channel}, "
        "where the outliers are: lower sigma_1, and they fall with it."
    )


def _largest(figure: Any, rows: Sequence[LayerDiagnosis]) -> None:
    axes = figure.add_subplot()
    axes.bar(range(len(rows)), [row.max_abs for row in rows], color=[COLOURS[row.finding] for row in rows], width=0.8)
    axes.set_yscale("log")
    axes.set_ylabel("largest |output|")
    worst = max(range(len(rows)), key=lambda i: rows[i].max_abs)
    axes.set_title(f"The largest output, {rows[worst].max_abs:.3g}, is that of {rows[worst].layer}", loc="left")
    tall = sorted(range(len(rows)), key=lambda i: -rows[i].max_abs)[:6]
    axes.set_xticks(sorted(tall), [_short(rows[i].layer) for i in sorted(tall)], rotation=20, ha="right", fontsize=8)
    axes.margins(x=0.01)
    patches = need("matplotlib.patches", "--html")
    shown = [finding for finding in COLOURS if any(row.finding == finding for row in rows)]
    axes.legend(handles=[patches.Patch(color=COLOURS[f], label=LEGEND[f]) for f in shown], frameon=False, fontsize=8)


def _causes(figure: Any, rows: Sequence[LayerDiagnosis]) -> None:
    left, right = figure.subplots(1, 2)
    for finding, colour in COLOURS.items():
        some = [row for row in rows if row.finding == finding]
        size = 14 if finding == "no outliers" else 42
        last = [row.pcdr[-1] for row in some]
        left.scatter([row.excess_kurtosis for row in some], last, s=size, c=colour, edgecolors="white", linewidths=0.4)
        right.scatter([row.on_u1 for row in some], [row.tightness for row in some], s=size, c=colour,
                      edgecolors="white", linewidths=0.4)  # fmt: skip
    left.set_xscale("symlog", linthresh=1)
    left.axvline(OUTLIER_KURTOSIS, color="#bbb", lw=0.8, zorder=0)
    left.set(xlabel="excess kurtosis", ylabel=f"PCDR_{len(rows[0].pcdr)}", ylim=(-0.03, 1.06))
    left.set_title("How far the top components make the outliers", loc="left", fontsize=10)
    right.set(xlabel="energy of u_1 on the outlier channel", ylabel="tightness", xlim=(-0.03, 1.03), ylim=(0, 1.03))
    right.set_title("Whether sigma_1 bounds them tightly", loc="left", fontsize=10)
    for place, row in enumerate(sorted((row for row in rows if row.has_outliers), key=lambda row: -row.max_abs)[:4]):
        to_the_left = row.on_u1 > 0.7
        right.annotate(
            _short(row.layer),
            (row.on_u1, row.tightness),
            xytext=(-6 if to_the_left else 6, 2 - 9 * (place % 2)),
            textcoords="offset points",
            ha="right" if to_the_left else "left",
            fontsize=7,
        )


def _short(name: str) -> str:
    """A layer's name without what every name begins with."""
    parts = name.split(".")
    start = next((i for i, part in enumerate(parts) if part.isdigit()), 0)
    return ".".join(parts[start:])
