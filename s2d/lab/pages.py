"""The parts of the pages that are computed: every number in them comes from a committed table.

python -m s2d.lab.pages        rewrites what stands between ``<!-- computed: NAME -->`` and ``<!-- end -->``
python -m s2d.lab.pages check  says which parts are not what the tables give (exit status 1)
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterable, Sequence

import pandas as pd

from s2d.files import write_text
from s2d.lab.encoder_evidence import LOWEST, by_quantizer
from s2d.lab.paper_scale import hours
from s2d.lab.paper_scale.configuration import read_configuration
from s2d.lab.paper_scale.experiments import TABLES
from s2d.lab.paths import repository_root
from s2d.lab.recipes import S2D_DECOUPLED
from s2d.lab.results import load_table
from s2d.lab.statistics import mean_and_deviation

PAGES = ("README.md", "RESULTS.md", "REPRODUCING.md", "docs/real_networks.md")
RUN = "laptop"
BLOCK = re.compile(r"<!-- computed: (?P<name>[a-z0-9 ,_-]+) -->\n(?P<text>.*?)<!-- end -->", re.DOTALL)


def markdown_table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table of Markdown.

    Example:
        >>> print(markdown_table(["a", "b"], [["1", "2"]]))
        | a | b |
        |---|---|
        | 1 | 2 |
    """
    lines = [list(header), ["---"] * len(header), *map(list, rows)]
    return "\n".join(f"|{'|'.join(line)}|" if line[0] == "---" else f"| {' | '.join(line)} |" for line in lines)


def _accuracies(table: pd.DataFrame, cells: Sequence[tuple[str, str]]) -> list[str]:
    accuracy = 100 * table.set_index(["method", "bits"]).accuracy
    return [mean_and_deviation(accuracy[cell]) for cell in cells]


def _lost(table: pd.DataFrame, cells: Sequence[tuple[str, str]]) -> list[str]:
    wide = 100 * table.pivot(index="seed", columns=["method", "bits"], values="accuracy")
    return [mean_and_deviation(wide["FP", "FP"] - wide[cell]) for cell in cells]


def fine_tuning() -> str:
    """Accuracy of every arm in full precision and under RTN and ERQ, on the evidence seeds."""
    table = load_table("frontier", run=RUN)
    cells = [("FP", "FP"), ("RTN, symmetric", "W4A4"), ("ERQ", "W4A4"), ("ERQ", "W3A3")]
    return _arms(table, cells)


def _arms(table: pd.DataFrame, cells: Sequence[tuple[str, str]]) -> str:
    header = ["fine-tuning", *(" ".join(dict.fromkeys(cell)) for cell in cells)]
    names = list(dict.fromkeys(table.variant))
    return markdown_table(header, ([name, *_accuracies(table[table.variant == name], cells)] for name in names))


FEW = ("AdamW", "AdamW, tuned weight decay", "No PCDR", "S2D", S2D_DECOUPLED)


def encoder() -> str:
    """Arms on the real encoder that all seeds were measured for: accuracy under the weak and the strong quantizer."""
    table = by_quantizer(load_table("evidence", run="encoder")).query("variant in @FEW")
    seeds = table.groupby("variant").seed.transform("nunique")
    table = table[seeds == seeds.max()]
    cells = [("FP", "FP"), ("RTN", LOWEST), ("ERQ", LOWEST), ("RTN, per token", LOWEST)]
    return (
        f"{seeds.max()} seeds on which nothing was chosen, {table['items'].iloc[0]:,} test glosses, accuracy in per "
        f"cent, mean ± standard deviation over seeds ([`evidence.csv`](data/encoder/evidence.csv)):\n\n"
        f"{_arms(table, cells)}"
    )


def points_lost() -> str:
    """Full precision minus quantized accuracy of every arm, under every quantizer."""
    table = load_table("frontier", run=RUN)
    wanted = ("RTN, symmetric", "RTN, asymmetric", "PTQ4ViT", "RepQ-ViT", "ERQ")
    measured = set(zip(table.method, table.bits, strict=True))
    cells = [(method, bits) for bits in ("W4A4", "W3A3") for method in wanted if (method, bits) in measured]
    header = ["points lost", *(" ".join(reversed(cell)) for cell in cells)]
    names = list(dict.fromkeys(table.variant))
    return markdown_table(header, ([name, *_lost(table[table.variant == name], cells)] for name in names))


def testbed() -> str:
    """What the testbed was chosen to show, and in how many runs it does."""
    table = load_table("testbed_findings", run=RUN)

    def value(row) -> str:
        if pd.isna(row.mean):
            return "not run"
        return f"{row.mean:.3g}" + ("" if pd.isna(row.low) else f" [{row.low:.3g}, {row.high:.3g}]")

    rows = ([row.finding, row.target, f"{row.held} of {row.runs}", value(row)] for row in table.itertuples())
    return markdown_table(["finding", "target", "held in", "mean [95 % interval over seeds]"], rows)


def verdicts() -> str:
    """How many independent claims of the paper have which verdict."""
    from s2d.lab.claims import headline

    return f"{headline(load_table('claims', run=RUN))} ([`claims.csv`](data/{RUN}/claims.csv))"


def claims() -> str:
    """Every claim with its verdict."""
    table = load_table("claims", run=RUN).fillna({"reported": ""})

    def number(row) -> str:
        if pd.isna(row.measured):
            return ""
        interval = "" if pd.isna(row.low) else f" [{row.low:.3g}, {row.high:.3g}]"
        return f"{row.measured:.3g}{interval} {row.unit}"

    header = ["group", "claim", "where", "reported", "measured here [95 % interval]", "seeds", "verdict"]
    rows = (
        [row.group, row.claim, row.source, str(row.reported), number(row), str(row.seeds), row.verdict]
        for row in table.itertuples()
    )
    return markdown_table(header, ([str(cell).replace("|", "\\|") for cell in row] for row in rows))


def kernels() -> str:
    """The verdicts of a batch trained from scratch on another CPU kernel, and where they differ."""
    from s2d.lab.verdicts import SAME, summary

    table = load_table("verdicts", run=RUN)

    def number(measured: float, low: float, high: float, unit: str) -> str:
        return f"{measured:.3g} [{low:.3g}, {high:.3g}] {unit}"

    header = ["claim", "committed", "measured", "kernel", "there", "measured there"]
    rows = [
        [row.claim, row.verdict_here, number(row.measured_here, row.low_here, row.high_here, row.unit)]
        + [row.kernel, row.verdict, number(row.measured, row.low, row.high, row.unit)]
        for row in table[table.agreement != SAME].itertuples()
    ]
    return f"{summary(table)}\n\n{markdown_table(header, rows)}" if rows else summary(table)


def theorem() -> str:
    """Theorem 1 on every layer."""
    bound = load_table("bound", run=RUN)
    wide = (bound.upper / bound.lower - 1).max()
    held = "held for all" if bound.holds.all() else f"FAILED for {(~bound.holds).sum()} of"
    return (
        f"Theorem 1 {held} {len(bound)} layers checked ({bound.tokens.sum():,} inputs), with enclosures of the "
        f"spectral norm at most {100 * wide:.1g} % wide ([`bound.csv`](data/{RUN}/bound.csv))."
    )


def figures() -> str:
    """Every published figure under its finding."""
    from s2d.lab.figures.registry import sections  # matplotlib: only for this page

    parts = []
    for figure in (figure for group in sections().values() for figure in group):
        tables = [load_table(name, run=RUN) for name in figure.tables]
        parts.append(f"**{figure.finding(*tables)}**\n\n![{figure.caption}](figures/{RUN}/{figure.name}.png)")
    return "\n\n".join(parts)


def diagnosis() -> str:
    """The worst layers of the networks that can be installed, and how many of their layers are ill."""
    table = load_table("diagnosis", run="real")
    rows = []
    for network, layers in table.groupby("network", sort=False):
        spectral = (layers.finding == "spectral").sum()
        ill = f"{len(layers)} of {layers.layers.iloc[0]}, {spectral} of them spectral"
        for row in layers.nlargest(3, "max_abs").itertuples():
            place = "" if pd.isna(row.position) else f", token {int(row.position)}"
            rows.append(
                [network, ill, f"`{row.layer}`", f"{row.max_abs:.4g} ({row.ratio:.0f} rms)", f"{row.channel}{place}"]
                + [f"{row.tightness:.2f}", f"{row.pcdr_1:.2f}, {row.pcdr_3:.2f}", f"{row.on_u1:.2f}", row.finding]
            )
            network = ill = ""
    header = ["network", "layers with outliers", "the largest", "activation", "channel", "tightness"]
    return markdown_table([*header, "PCDR_1, PCDR_3", "on u_1", "finding"], rows)


def conditioning() -> str:
    """What conditioning a real network lowers, and what it costs."""
    table = load_table("conditioning", run="real")
    bits = [name for name in table.columns if re.fullmatch(r"W\dA\d", name)]
    first = table.iloc[0]
    rows = [["as published", "", f"{first.max_abs_before:.0f}", f"{table.sigma_1_before.max():.1f}", "1"]]
    rows[0] += [f"{first[f'{name}_before']:.3f}" for name in bits]
    for entry in table.to_dict("records"):
        if entry["form"] == "spectral-norm cap":
            strength = f"cap {entry['cap']:g}"
        else:
            strength = f"lam {entry['lam']:g}, tau {entry['tau']:g}, k_max {entry['k_max']}"
        where = "" if entry["layers"] == "all" else f" of `{entry['layers']}`"
        rows.append(
            [entry["form"] + where, strength, f"{entry['max_abs']:.0f}", f"{entry['sigma_1']:.1f}"]
            + [f"{entry['fidelity']:.4f}", *(f"{entry[name]:.3f}" for name in bits)]
        )
    header = ["conditioned by", "strength", "largest activation", "largest sigma_1", "cosine"]
    return markdown_table([*header, *(f"RTN {name}" for name in bits)], rows)


def inputs() -> str:
    """Whether the inputs that a quantizer rounds follow the outputs that conditioning lowers."""
    table = load_table("inputs", run="real")
    ffn = table[table.layer.str.fullmatch(r".*\d\.output\.dense")]
    lower = ffn.max_abs_before / ffn.max_abs_after
    kept = table.input_ratio_after / table.input_ratio_before
    return (
        f"The largest outputs of the {len(ffn)} FFNs fell {lower.min():.1f} to {lower.max():.1f} times (geometric mean "
        f"{lower.prod() ** (1 / len(lower)):.1f}). The largest inputs, over their root mean square, did "
        f"not follow: {kept.min():.2f} to {kept.max():.2f} times what they were, over all {len(table)} layers, "
        f"{table.input_ratio_after.max():.0f} at most ([`inputs.csv`](../data/real/README.md))."
    )


def paper_hours() -> str:
    """What each table of the paper takes with the paper's networks, of :mod:`s2d.lab.paper_scale.hours`."""
    table = hours.table(read_configuration("paper/paper.yaml"))
    names = [TABLES.get(name, name) for name in table["table"]]
    rows = zip(names, table["trainings"], table["measurements"], table["hours"], strict=True)
    return markdown_table(
        ["table", "trainings", "measurements", "hours a seed"],
        ([name.replace("_", " "), str(made), str(cells), f"{time:.1f}"] for name, made, cells, time in rows),
    )


COMPUTED: dict[str, Callable[[], str]] = {
    "fine-tuning": fine_tuning,
    "encoder": encoder,
    "points lost": points_lost,
    "testbed": testbed,
    "verdicts": verdicts,
    "claims": claims,
    "kernels": kernels,
    "theorem": theorem,
    "figures": figures,
    "diagnosis": diagnosis,
    "conditioning": conditioning,
    "inputs": inputs,
    "paper hours": paper_hours,
}
"""What can stand in a page, by name."""


def fill(text: str) -> str:
    """A page with every computed part as the tables give it.

    Args:
        text: the page.

    Raises:
        ValueError: for an unknown name, or a part without an end.
    """
    names = re.findall(r"<!-- computed: ([^>]*?) -->", text)
    for name in names:
        if name not in COMPUTED:
            raise ValueError(f"no computed part {name!r}: there are {', '.join(COMPUTED)}")
    if len(BLOCK.findall(text)) != len(names):
        raise ValueError("a computed part has no end: write <!-- end --> after each")
    return BLOCK.sub(
        lambda m: f"<!-- computed: {m['name']} -->\n{COMPUTED[m['name']]()}\n<!-- end -->",
        text,
    )


def main(argv: Sequence[str]) -> int:
    """Rewrite the pages, or check them."""
    stale = []
    for name in PAGES:
        path = repository_root() / name
        old = path.read_text(encoding="utf-8")
        new = fill(old)
        if new != old:
            stale.append(name)
            if list(argv) != ["check"]:
                write_text(path, new)
                print(f"{name}: rewritten")
    if list(argv) == ["check"] and stale:
        print(f"{', '.join(stale)}: not what the tables give; run python -m s2d.lab.pages", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
