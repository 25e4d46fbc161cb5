"""The parameters cell of a notebook: what is read, and what is refused."""

from __future__ import annotations

import nbformat
import pytest
from notebook_cells import COMPLETE, code, tiny, write

from s2d.lab.notebook import read_parameters


def test_read_parameters_gives_the_defaults_in_order(tmp_path):
    defaults = read_parameters(tiny(tmp_path))
    assert list(defaults) == ["seed", "lr", "shuffle", "widths", "scales", "names", "limit", "run"]
    assert defaults["widths"] == [8, 16] and defaults["limit"] is None and type(defaults["lr"]) is float


BAD_PARAMETERS = [
    ("seed = len('abc')", "the default of 'seed' is \"len('abc')\", not a literal"),
    ("seed = (1, 2)", "parameter 'seed' cannot be (1, 2) (tuple)"),
    ("seed = {1: 2}", "parameter 'seed' cannot be {1: 2} (dict)"),
    ("seed = 0\nseed = 1", "line 2: parameter 'seed' is set twice"),
    ("import os", "'import os' is not a parameter"),
    ("seed: int", "'seed: int' is not a parameter"),
    ("a, b = 1, 2", "is not a parameter"),
    ("seed =", "cell 1 (parameters), line 1: invalid syntax"),
]


@pytest.mark.parametrize(("parameters", "message"), BAD_PARAMETERS)
def test_bad_parameters_cell_is_refused(tmp_path, parameters, message):
    path = tiny(tmp_path, parameters=parameters)
    with pytest.raises(ValueError) as caught:
        read_parameters(path)
    assert str(caught.value).startswith(f"{path}: ") and message in str(caught.value)


def test_exactly_one_code_cell_holds_the_parameters(tmp_path):
    for count, cells in enumerate([[], [code("a = 1", "parameters"), code("b = 1", "parameters")]]):
        with pytest.raises(ValueError, match=f"{2 * count} cells are tagged 'parameters'"):
            read_parameters(write(tmp_path / "n.ipynb", [*cells, code(COMPLETE)]))
    markdown = nbformat.v4.new_markdown_cell("a = 1", metadata={"tags": ["parameters"]})
    with pytest.raises(ValueError, match="is not code"):
        read_parameters(write(tmp_path / "n.ipynb", [markdown, code(COMPLETE)]))
