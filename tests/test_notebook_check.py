"""The static check: a notebook that keeps every rule, and each rule broken once."""

from __future__ import annotations

import nbformat
import pytest
from notebook_cells import code, write

from s2d.lab.notebook import check_notebook
from s2d.lab.notebook.cli import main


def template():
    """The cells of a notebook that keeps every rule."""
    return [
        nbformat.v4.new_markdown_cell("# Measure a thing\nhttps://example.org/home/work/x and ../work/y are no paths."),
        code('seed: int = 0  # random seed\nrun: str = "laptop"  # output label', "parameters", count=1),
        code("bound = 2.0\nassert bound > 1", count=2),
        code("print(f'{bound % 2:.1f}')", "nbval-check-output", count=3),
        code(" "),
        code("from s2d.lab.notebook import complete\ncomplete()", count=4),
    ]


def test_template_has_no_findings(tmp_path, capsys):
    path = write(tmp_path / "good.ipynb", template())
    assert check_notebook(path) == []
    assert main(["check", str(path)]) == 0 and capsys.readouterr().out == ""


def _parameters(source):
    return lambda cells: cells[1].update(source=source)


def _source(index, source):
    return lambda cells: cells[index].update(source=source)


def _error(cells):
    cells[2].outputs = [nbformat.v4.new_output("error", ename="ValueError", evalue="no", traceback=[])]


def _printed_path(cells):
    cells[3].outputs = [nbformat.v4.new_output("stream", name="stdout", text="saved\n/tmp/out/a.csv\n")]


FINDINGS = [
    (_parameters("seed = 0  # s\nrun: str = 'a'  # r"), "cell 1 (parameters), line 1: no typed assignment"),
    (_parameters("seed: int = 0\nrun: str = 'a'  # r"), "cell 1 (parameters), line 1: no comment"),
    (_parameters("seed: int = 0  # s\nrun: str = '#a'"), "cell 1 (parameters), line 2: no comment"),
    (_parameters("seed: int = 0  # 0 = any\nrun: str = 'a'  # r"), "line 1: a second '=' hides the line"),
    (_parameters("# labels\nseed: int = 0  # s\nrun: str = 'a'  # r"), "line 1: no typed assignment"),
    (_parameters("seed: int = 0; b: int = 1  # s\nrun: str = 'a'  # r"), "line 1: no typed assignment"),
    (_parameters("seed: float = 0  # s\nrun: str = 'a'  # r"), "line 1: the default is not of type float"),
    (_parameters("seeds: list[float] = [0]  # s\nrun: str = 'a'  # r"), "the default is not of type list[float]"),
    (_parameters("seed: int = f(0)  # s\nrun: str = 'a'  # r"), "not a literal"),
    (_parameters("lr: float = 0.1  # l\nrun: str = 'a'  # r"), "the first parameter must be 'seed' or 'seeds'"),
    (_parameters("seed: int = 0  # s"), "the last parameter must be 'run'"),
    (lambda cells: cells[1].metadata.pop("tags"), "0 cells are tagged 'parameters'"),
    (lambda cells: cells[2].update(execution_count=None), "cell 2: execution count None, not 2"),
    (lambda cells: cells[5].update(execution_count=5), "cell 5: execution count 5, not 4"),
    (_source(2, "bound = 2.0"), "no visible assert"),
    (lambda cells: cells[2].metadata.update(tags=["hide-input"]), "no visible assert"),
    (lambda cells: cells[2].metadata.update(jupyter={"source_hidden": True}), "no visible assert"),
    (lambda cells: cells[3].metadata.pop("tags"), "0 code cells are tagged 'nbval-check-output'"),
    (lambda cells: cells[2].metadata.update(tags=["nbval-check-output"]), "2 code cells are tagged"),
    (_source(3, "def f():\n    return 1"), "cell 3: def f"),
    (_source(3, "if True:\n    class A:\n        pass"), "cell 3: class A"),
    (_source(3, "%matplotlib inline"), "cell 3: magic or shell escape: %matplotlib inline"),
    (_source(3, "files = !ls"), "cell 3: magic or shell escape: files = !ls"),
    (_source(3, "print?"), "cell 3: magic or shell escape: print?"),
    (_source(3, "get_ipython().system('ls')"), "cell 3: magic or shell escape: get_ipython()"),
    (_source(3, "for"), "cell 3: invalid syntax"),
    (_source(5, "print('done')"), "cell 5: the last code cell does not call complete(...)"),
    (_source(5, "# complete()"), "cell 5: the last code cell does not call complete(...)"),
    (_source(0, "Saved in /home/me/x.csv"), "cell 0: absolute path /home/me/x.csv"),
    (_source(3, "print('file:///work/main/a')"), "cell 3: absolute path /work/main/a"),
    (_printed_path, "cell 3: absolute path /tmp/out/a.csv"),
    (lambda cells: cells[2].metadata.update(at="/Users/me/"), "cell 2: absolute path /Users/me/"),
    (_error, "cell 2: stored error ValueError: no"),
    (lambda cells: cells[2].metadata.update(tags=["injected-parameters"]), "cell 2: injected parameters"),
]


@pytest.mark.parametrize(("change", "finding"), FINDINGS)
def test_one_broken_rule_is_one_finding(tmp_path, capsys, change, finding):
    cells = template()
    change(cells)
    path = write(tmp_path / "bad.ipynb", cells)
    findings = check_notebook(path)
    assert len(findings) == 1 and findings[0].startswith(f"{path}: ") and finding in findings[0]
    assert main(["check", str(path)]) == 1 and capsys.readouterr().out == findings[0] + "\n"


def test_a_teaching_cell_may_define_what_it_teaches(tmp_path):
    cells = template()
    cells[2].source = "class A:\n    def f(self):\n        return 1\n\n\nassert A().f() == 1"
    assert len(check_notebook(write(tmp_path / "n.ipynb", cells))) == 2
    cells[2].metadata["tags"] = ["teaching"]
    assert check_notebook(write(tmp_path / "n.ipynb", cells)) == []
    cells[3].source = "def g(): ..."
    (finding,) = check_notebook(write(tmp_path / "n.ipynb", cells))
    assert "cell 3: def g; move it into the package" in finding and "tag the cell 'teaching'" in finding


def test_parameter_over_two_lines_is_found(tmp_path):
    cells = template()
    cells[1].source = "seeds: list[int] = [\n    1]  # s\nrun: str = 'a'  # r"
    findings = check_notebook(write(tmp_path / "bad.ipynb", cells))
    assert [("line 1" in f or "line 2" in f) and "not one whole statement" in f for f in findings] == [True, True]


def test_check_names_the_wrong_kernel_and_goes_on_to_the_next_notebook(tmp_path, capsys):
    paths = [write(tmp_path / name, template()) for name in ("a.ipynb", "b.ipynb")]
    for path in paths:
        path.write_text(path.read_text().replace('"name": "python3"', '"name": "conda"'))
    assert main(["check", *map(str, paths)]) == 1
    assert capsys.readouterr().out == "".join(
        f"{path}: the kernel is 'conda', not 'python3'; run refresh\n" for path in paths
    )
