"""Notebooks as documents: ids that a run can be repeated with."""

from __future__ import annotations

import json

import pytest
from notebook_cells import tiny

from s2d.lab.notebook.document import load


def test_notebook_without_cell_ids_gets_the_same_ids_each_time(tmp_path):
    path = tiny(tmp_path)
    data = json.loads(path.read_text())
    data["nbformat_minor"] = 4
    for cell in data["cells"]:
        del cell["id"]
    path.write_text(json.dumps(data))
    assert [cell.id for cell in load(path).cells] == ["cell-0", "cell-1", "cell-2"]


def test_repeated_cell_id_is_bad_input(tmp_path):
    path = tiny(tmp_path)
    path.write_text(path.read_text().replace("id-2", "id-1"))
    with pytest.raises(ValueError, match="cell id 'id-1' is used twice"):
        load(path)
