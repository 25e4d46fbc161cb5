"""Small notebooks that several test files write and read."""

from __future__ import annotations

import nbformat

DEFAULTS = """\
seed: int = 0  # random seed
lr: float = 0.1  # learning rate
shuffle: bool = False  # whether to shuffle
widths: list[int] = [8, 16]  # hidden widths
scales: list[float] = [0.5]  # input scales
names: list[str] = []  # layers to watch, all if empty
limit: int | None = None  # cut-off, none if None
run: str = "laptop"  # output label"""

COMPLETE = "from s2d.lab.notebook import complete\ncomplete()"


def code(source, *tags, count=None, outputs=()):
    cell = nbformat.v4.new_code_cell(source, execution_count=count, outputs=list(outputs))
    if tags:
        cell.metadata["tags"] = list(tags)
    return cell


def write(path, cells):
    """Write a notebook with fixed cell ids."""
    for index, cell in enumerate(cells):
        cell["id"] = f"id-{index}"
    kernel = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
    nbformat.write(nbformat.v4.new_notebook(cells=cells, metadata=kernel), path)
    return path


def tiny(folder, *sources, parameters=DEFAULTS, last=COMPLETE):
    """A parameters cell, the given code cells and the completing cell."""
    folder.mkdir(parents=True, exist_ok=True)
    cells = [nbformat.v4.new_markdown_cell("# Do little"), code(parameters, "parameters")]
    return write(folder / "tiny.ipynb", [*cells, *map(code, [*sources, last])])


def read(path):
    return nbformat.read(path, as_version=4)


def printed(path):
    """All stdout stored in a notebook."""
    outputs = [output for cell in read(path).cells for output in cell.get("outputs", [])]
    return "".join(output.text for output in outputs if output.get("name") == "stdout")


def errors(path):
    """All errors stored in a notebook, with the index of their cell."""
    cells = enumerate(read(path).cells)
    return [(i, o.ename) for i, cell in cells for o in cell.get("outputs", []) if o.output_type == "error"]
