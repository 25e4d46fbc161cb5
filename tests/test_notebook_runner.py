"""The strict notebook runner: every way a run can be silently wrong, made to happen."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import nbformat
import pytest

from s2d.lab import notebook as runner

ROOT = Path(__file__).resolve().parents[1]
SAFETY = 600  # seconds after which a test that waits for something has failed

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


@pytest.fixture(autouse=True)
def _kernels_find_s2d(monkeypatch):
    """A kernel starts in the notebook's folder, so an uninstalled checkout needs its root on the path."""
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])))


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


# --- runs that succeed -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """One notebook run twice, with values papermill could get wrong and leftovers of earlier runs in the source."""
    folder = tmp_path_factory.mktemp("finished")
    stale = nbformat.v4.new_output("stream", name="stdout", text="STALE\n")
    leftover = code("lr = 99.0", "injected-parameters", count=2)
    report = "print([seed, lr, shuffle, widths, scales, names, limit, run])\nlr"
    promise = (
        "from pathlib import Path\nfrom s2d.lab.notebook import complete\n"
        "Path('table.csv').write_text('a,b')\ncomplete('table.csv', Path.cwd() / 'table.csv')"
    )
    cells = [
        nbformat.v4.new_markdown_cell("# Do little"),
        code(DEFAULTS, "parameters", count=1),
        leftover,
        code(report, "skip-execution", count=7, outputs=[stale]),
        code("  "),
        code("import sys\nfor i in range(50):\n    print(i, flush=True)\nprint('warned', file=sys.stderr)"),
        code(promise),
    ]
    (folder / "books").mkdir()
    source = write(folder / "books" / "tiny.ipynb", cells)
    params = folder / "params.yaml"
    params.write_text("run: 'it''s \"C:\\new\"'\nlr: 1e-4\nscales: [1, 2e-3]\nseed: 1\nlimit: 3\n")
    (folder / "one").mkdir()
    (folder / "one" / "tiny.failed.ipynb").write_text("from an earlier failure")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(ROOT))
        for place in ("one", "two"):
            arguments = ["run", str(source), str(folder / place / "tiny.ipynb"), "--params", str(params)]
            assert runner.main([*arguments, "-p", "seed", "7", "-p", "widths", "[4]"]) == 0
    return folder


def test_parameters_arrive_as_typed(finished):
    values = [7, 1e-4, False, [4], [1.0, 0.002], [], 3, 'it\'s "C:\\new"']
    assert f"{values}\n" in printed(finished / "one" / "tiny.ipynb")


def test_output_is_the_same_bytes_and_tells_no_machine(finished):
    one, two = ((finished / place / "tiny.ipynb").read_bytes() for place in ("one", "two"))
    assert one == two
    for word in (b"papermill", b"time", b"duration", str(finished).encode(), sys.prefix.encode()):
        assert word not in one


def test_output_keeps_ids_and_shows_the_injected_cell(finished):
    cells = read(finished / "one" / "tiny.ipynb").cells
    assert [cell.id for cell in cells] == ["id-0", "id-1", "injected-parameters", "id-3", "id-4", "id-5", "id-6"]
    assert cells[2].metadata.tags == ["injected-parameters"]
    assert cells[2].source.startswith("# Parameters\nseed = 7\nlr = 0.0001\n")


def test_nothing_stale_survives_and_no_cell_is_skipped(finished):
    text = (finished / "one" / "tiny.ipynb").read_text()
    assert "STALE" not in text and "99.0" not in text
    counts = [cell.execution_count for cell in read(finished / "one" / "tiny.ipynb").cells if cell.cell_type == "code"]
    assert counts == [1, 2, 3, None, 4, 5]


def test_only_the_output_is_left(finished):
    assert [path.name for path in (finished / "one").iterdir()] == ["tiny.ipynb"]


def test_kernel_works_in_the_folder_of_the_source(finished):
    assert (finished / "books" / "table.csv").read_text() == "a,b"
    assert printed(finished / "one" / "tiny.ipynb").endswith("complete: 2 files\n")


def test_refresh_stores_outputs_in_place(tmp_path, capsys):
    path = tiny(tmp_path, "print('lr', lr)", f"import sys\nassert sys.executable == {sys.executable!r}")
    path.chmod(0o640)
    assert runner.main(["refresh", str(path)]) == 0
    assert path.stat().st_mode & 0o777 == 0o640
    cells = [cell for cell in read(path).cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in cells] == [1, 2, 3, 4]
    assert printed(path) == "lr 0.1\ncomplete: 0 files\n"
    assert "injected" not in path.read_text() and read(path).metadata.kernelspec.name == "python3"
    assert [p.name for p in tmp_path.iterdir()] == ["tiny.ipynb"]
    captured = capsys.readouterr()
    assert "[tiny] cell 2/4 ... " in captured.err and "lr 0.1\n" in captured.out


# --- runs that fail --------------------------------------------------------------------------------------------------

FAILURES = {
    "raises": ("1 / 0", "ZeroDivisionError: division by zero"),
    "exits": ("import sys; sys.exit(0)", "SystemExit: 0"),
    "asks to exit": ("exit()", "SystemExit: exit() called"),
    "kills itself": ("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", "DeadKernelError"),
    "leaves": ("import os; os._exit(0)", "DeadKernelError"),
    "hangs": ("import time; time.sleep(60)", "CellTimeoutError"),
}


@pytest.mark.parametrize("kind", FAILURES)
def test_failed_run_leaves_no_output(tmp_path, capsys, kind):
    source, message = FAILURES[kind]
    path = tiny(tmp_path, "print('before')", source)
    output = tmp_path / "out" / "tiny.ipynb"
    assert runner.main(["run", str(path), str(output), *(["--timeout", "2"] if kind == "hangs" else [])]) == 1
    last = capsys.readouterr().err.splitlines()[-1]
    kept = output.with_name("tiny.failed.ipynb")
    assert last.startswith(f"error: [tiny] cell 3/4: {message}") and last.endswith(f"kept as {kept}")
    assert list(output.parent.iterdir()) == [kept]
    assert printed(kept) == "before\n" and [index for index, _ in errors(kept)] == [3]


def test_run_that_never_completes_is_a_failure(tmp_path):
    path = tiny(tmp_path, last="print('all is well')")
    output = tmp_path / "out.ipynb"
    output.write_text("an older result")
    with pytest.raises(runner.NotebookError, match="stopped before its last cell"):
        runner.run_notebook(path, output)
    assert output.read_text() == "an older result"


def test_missing_promised_file_is_a_failure_even_where_errors_are_allowed(tmp_path):
    cells = [code(DEFAULTS, "parameters"), code(COMPLETE.replace("()", "('table.csv')"), "raises-exception")]
    path = write(tmp_path / "tiny.ipynb", cells)
    with pytest.raises(runner.NotebookError, match="cell 2/2: FileNotFoundError: complete: table.csv is missing"):
        runner.run_notebook(path, tmp_path / "out.ipynb")


def test_failed_refresh_leaves_the_notebook_and_goes_on(tmp_path, capsys):
    bad = tiny(tmp_path / "bad", "raise KeyError('x')")
    worse = tiny(tmp_path / "worse", "raise OSError('y')")
    before = bad.read_bytes()
    assert runner.main(["refresh", str(bad), str(worse)]) == 1
    assert bad.read_bytes() == before
    message = capsys.readouterr().err
    assert "KeyError" in message and "OSError: y" in message
    assert errors(tmp_path / "bad" / "tiny.failed.ipynb") == [(2, "KeyError")]


def is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    return True


def wait_until(happened: Callable[[], bool]) -> None:
    """Wait for an event; the limit is there for a test that fails, not for a machine that is busy."""
    end = time.monotonic() + SAFETY
    while not happened():
        assert time.monotonic() < end, "it never happened"
        time.sleep(0.05)


def test_interrupted_run_stops_its_kernel(tmp_path):
    # The cell never ends by itself: however busy the machine is, the interrupt finds it running.
    path = tiny(tmp_path, "import os, time\nprint('pid', os.getpid(), flush=True)\nwhile True:\n    time.sleep(1)")
    runs = {}
    for number in (signal.SIGINT, signal.SIGTERM):  # side by side, to save time
        output = tmp_path / number.name / "tiny.ipynb"
        command = [sys.executable, "-m", "s2d.lab.notebook", "run", str(path), str(output)]
        runs[number] = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT)
    for number, process in runs.items():
        kernel = int(process.stdout.readline().split()[1])  # what a cell prints comes through while it runs
        process.send_signal(number)
        _, stderr = process.communicate(timeout=SAFETY)
        assert process.returncode == 130
        assert stderr.splitlines()[-1].startswith("interrupted: [tiny] cell 2/3: KeyboardInterrupt")
        assert [kept.name for kept in (tmp_path / number.name).iterdir()] == ["tiny.failed.ipynb"]
        wait_until(lambda kernel=kernel: not is_alive(kernel))


# --- bad input, all found before anything is executed ----------------------------------------------------------------


@pytest.fixture
def executed(monkeypatch):
    """Replaces the execution; holds the parameters of each run that would have started."""
    runs = []

    def pretend(notebook, source, parameters, timeout):
        runs.append(parameters)
        return runner._Watch(source.stem, notebook=notebook)

    monkeypatch.setattr(runner, "_execute", pretend)
    return runs


BAD_OPTIONS = [
    (["-p", "sed", "1"], "unknown parameter 'sed'; did you mean 'seed'?"),
    (["-p", "zzz", "1"], "unknown parameter 'zzz'; it has seed, lr,"),
    (["-p", "seed", "1", "-p", "seed", "2"], "parameter 'seed' is given twice by -p"),
    (["-p", "seed", "0.5"], "parameter 'seed' takes int, got 0.5 (float)"),
    (["-p", "seed", "true"], "parameter 'seed' takes int, got True (bool)"),
    (["-p", "seed", "010"], "parameter 'seed' takes int, got '010' (str)"),
    (["-p", "seed", "None"], "parameter 'seed' takes int, got None (NoneType)"),
    (["-p", "lr", "fast"], "parameter 'lr' takes float, got 'fast' (str); write a number"),
    (["-p", "lr", "nan"], "parameter 'lr' takes float, got 'nan' (str)"),
    (["-p", "lr", "True"], "parameter 'lr' takes float, got True (bool)"),
    (["-p", "shuffle", "1"], "parameter 'shuffle' takes bool, got 1 (int); write true or false"),
    (["-p", "widths", "8"], "parameter 'widths' takes list, got 8 (int)"),
    (["-p", "widths", "[8, 1.5]"], "parameter 'widths[1]' takes int, got 1.5 (float)"),
    (["-p", "widths", "[]"], "parameter 'widths' is an empty list; give at least one value such as 8"),
    (["-p", "limit", "(1, 2)"], "parameter 'limit' cannot be (1, 2) (tuple)"),
    (["--timeout", "0"], "timeout must be a whole number of seconds, at least 1, got 0"),
    (["--params", "missing.yaml"], "missing.yaml: no such parameter file"),
    (["--params", "a.yaml", "--params", "b.yaml"], "--params is given twice"),
]


@pytest.mark.parametrize(("options", "message"), BAD_OPTIONS)
def test_bad_option_is_one_clear_line(tmp_path, capsys, executed, options, message):
    path, output = tiny(tmp_path), tmp_path / "out.ipynb"
    assert runner.main(["run", str(path), str(output), *options]) == 2
    stderr = capsys.readouterr().err
    assert message in stderr and stderr.count("\n") == 1
    assert executed == [] and not output.exists()


BAD_YAML = [
    ("- seed\n", "holds a list, not a mapping"),
    ("seed\n", "holds a str, not a mapping"),
    ("seed: 1\nseed: 2\n", "parameter 'seed' is given twice"),
    ("seed: [1\n", "not YAML"),
    ("{[1]: 2}", "not YAML"),
    ("run: 003\n", "parameter 'run' takes str, got 3 (int); write it in quotes"),
    ("run: on\n", "parameter 'run' takes str, got True (bool); write it in quotes"),
    ("limit: 2024-01-01\n", "parameter 'limit' cannot be datetime.date(2024, 1, 1)"),
    ("1: 2\n", "unknown parameter 1"),
]


@pytest.mark.parametrize(("text", "message"), BAD_YAML)
def test_bad_parameter_file_is_one_clear_line(tmp_path, capsys, executed, text, message):
    params = tmp_path / "params.yaml"
    params.write_text(text)
    path, output = tiny(tmp_path), tmp_path / "out.ipynb"
    assert runner.main(["run", str(path), str(output), "--params", str(params)]) == 2
    stderr = capsys.readouterr().err
    assert message in stderr and stderr.count("\n") == 1
    assert executed == [] and not output.exists()


GOOD_OPTIONS = [
    (["-p", "lr", "1e-4"], {"lr": 1e-4}),
    (["-p", "lr", "2"], {"lr": 2.0}),
    (["-p", "run", "003"], {"run": "003"}),
    (["-p", "run", "true", "-p", "shuffle", "true"], {"shuffle": True, "run": "true"}),
    (["-p", "names", "['fc1', 'fc2']"], {"names": ["fc1", "fc2"]}),
    (["-p", "names", "[]", "-p", "scales", "[1, 0.5]"], {"scales": [1.0, 0.5], "names": []}),
    (["-p", "limit", "null"], {"limit": None}),
    (["-p", "limit", "some text"], {"limit": "some text"}),
]


@pytest.mark.parametrize(("options", "expected"), GOOD_OPTIONS)
def test_good_option_takes_the_type_of_the_default(tmp_path, executed, options, expected):
    assert runner.main(["run", str(tiny(tmp_path)), str(tmp_path / "out.ipynb"), *options]) == 0
    assert [repr(run) for run in executed] == [repr(expected)]  # repr tells 2.0 from 2 and sees the order


def test_option_overrides_file_and_a_file_of_comments_changes_nothing(tmp_path, executed):
    path, params = tiny(tmp_path), tmp_path / "params.yaml"
    arguments = ["run", str(path), str(tmp_path / "out.ipynb"), "--params", str(params)]
    params.write_text("lr: 1e-3\nseed: 5\n")
    assert runner.main([*arguments, "-p", "seed", "6"]) == 0
    params.write_text("# the defaults\n")
    assert runner.main(arguments) == 0
    assert executed == [{"seed": 6, "lr": 1e-3}, {}]


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
def test_bad_parameters_cell_is_refused(tmp_path, executed, parameters, message):
    path = tiny(tmp_path, parameters=parameters)
    with pytest.raises(ValueError) as caught:
        runner.run_notebook(path, tmp_path / "out.ipynb")
    assert message in str(caught.value) and executed == []


def test_exactly_one_code_cell_holds_the_parameters(tmp_path):
    for count, cells in enumerate([[], [code("a = 1", "parameters"), code("b = 1", "parameters")]]):
        with pytest.raises(ValueError, match=f"{2 * count} cells are tagged 'parameters'"):
            runner.read_parameters(write(tmp_path / "n.ipynb", [*cells, code(COMPLETE)]))
    markdown = nbformat.v4.new_markdown_cell("a = 1", metadata={"tags": ["parameters"]})
    with pytest.raises(ValueError, match="is not code"):
        runner.read_parameters(write(tmp_path / "n.ipynb", [markdown, code(COMPLETE)]))


BAD_NOTEBOOKS = {
    "text": ("not json", "not even JSON"),
    "list": ("[]", "not a notebook of format 4"),
    "old": ('{"nbformat": 3, "worksheets": []}', "not a notebook of format 4"),
    "cell": ('{"nbformat": 4, "nbformat_minor": 5, "metadata": {}, "cells": [{"a": 1}]}', "not a valid notebook"),
}


@pytest.mark.parametrize("command", ["run", "refresh", "check"])
@pytest.mark.parametrize("kind", [*BAD_NOTEBOOKS, "missing", "folder"])
def test_bad_notebook_is_bad_input(tmp_path, capsys, executed, command, kind):
    text, message = BAD_NOTEBOOKS.get(kind, ("", {"missing": "no such notebook", "folder": "cannot be read"}.get(kind)))
    path = tmp_path / "bad.ipynb"
    if kind == "folder":
        path.mkdir()
    elif kind != "missing":
        path.write_text(text)
    assert runner.main([command, str(path), *([str(tmp_path / "out.ipynb")] if command == "run" else [])]) == 2
    stderr = capsys.readouterr().err
    assert message in stderr and stderr.count("\n") == 1 and executed == []


def test_repeated_cell_id_is_bad_input(tmp_path):
    path = tiny(tmp_path)
    path.write_text(path.read_text().replace("id-2", "id-1"))
    with pytest.raises(ValueError, match="cell id 'id-1' is used twice"):
        runner.check_notebook(path)


def test_output_must_be_another_notebook(tmp_path, executed):
    path = tiny(tmp_path)
    (tmp_path / "file").write_text("")
    for output, message in [
        (path, "is the source itself"),
        (tmp_path / "out.txt", "must be an .ipynb file"),
        (tmp_path / "file" / "out.ipynb", "cannot be made a folder"),
    ]:
        with pytest.raises(ValueError, match=message):
            runner.run_notebook(path, output)
    assert executed == []


def test_bad_last_notebook_stops_refresh_before_the_first(tmp_path, executed):
    assert runner.main(["refresh", str(tiny(tmp_path)), str(tmp_path / "missing.ipynb")]) == 2
    assert executed == []


def test_notebook_without_cell_ids_gets_the_same_ids_each_time(tmp_path):
    path = tiny(tmp_path)
    data = json.loads(path.read_text())
    data["nbformat_minor"] = 4
    for cell in data["cells"]:
        del cell["id"]
    path.write_text(json.dumps(data))
    assert [cell.id for cell in runner._load(path).cells] == ["cell-0", "cell-1", "cell-2"]


def test_read_parameters_gives_the_defaults_in_order(tmp_path):
    defaults = runner.read_parameters(tiny(tmp_path))
    assert list(defaults) == ["seed", "lr", "shuffle", "widths", "scales", "names", "limit", "run"]
    assert defaults["widths"] == [8, 16] and defaults["limit"] is None and type(defaults["lr"]) is float


# --- complete --------------------------------------------------------------------------------------------------------


def test_complete_prints_the_same_line_and_writes_the_marker(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "figures").mkdir()
    (tmp_path / "figures" / "a.svg").write_text("<svg/>")
    monkeypatch.delenv(runner.MARKER_VARIABLE, raising=False)
    runner.complete("figures", tmp_path / "figures" / "a.svg")
    monkeypatch.setenv(runner.MARKER_VARIABLE, str(tmp_path / "marker"))
    runner.complete("figures", tmp_path / "figures" / "a.svg")
    assert capsys.readouterr().out == "complete: 2 files\n" * 2
    assert json.loads((tmp_path / "marker").read_text()) == ["figures", "figures/a.svg"]


@pytest.mark.parametrize("kind", ["missing", "empty", "folder"])
def test_complete_refuses_a_broken_promise(tmp_path, monkeypatch, kind):
    monkeypatch.setenv(runner.MARKER_VARIABLE, str(tmp_path / "marker"))
    path = tmp_path / "promised"
    if kind == "empty":
        path.touch()
    elif kind == "folder":
        path.mkdir()
    with pytest.raises(FileNotFoundError, match="promised is (missing|empty); write it"):
        runner.complete(path)
    assert not (tmp_path / "marker").exists()


# --- check -----------------------------------------------------------------------------------------------------------


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
    assert runner.check_notebook(path) == []
    assert runner.main(["check", str(path)]) == 0 and capsys.readouterr().out == ""


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
    findings = runner.check_notebook(path)
    assert len(findings) == 1 and findings[0].startswith(f"{path}: ") and finding in findings[0]
    assert runner.main(["check", str(path)]) == 1 and capsys.readouterr().out == findings[0] + "\n"


def test_parameter_over_two_lines_is_found(tmp_path):
    cells = template()
    cells[1].source = "seeds: list[int] = [\n    1]  # s\nrun: str = 'a'  # r"
    findings = runner.check_notebook(write(tmp_path / "bad.ipynb", cells))
    assert [("line 1" in f or "line 2" in f) and "not one whole statement" in f for f in findings] == [True, True]


def test_check_names_the_wrong_kernel_and_goes_on_to_the_next_notebook(tmp_path, capsys):
    paths = [write(tmp_path / name, template()) for name in ("a.ipynb", "b.ipynb")]
    for path in paths:
        path.write_text(path.read_text().replace('"name": "python3"', '"name": "conda"'))
    assert runner.main(["check", *map(str, paths)]) == 1
    assert capsys.readouterr().out == "".join(
        f"{path}: the kernel is 'conda', not 'python3'; run refresh\n" for path in paths
    )


# --- the module itself -----------------------------------------------------------------------------------------------


def test_module_imports_light():
    """Notebooks import it for `complete`; loaded from its file, so that s2d's own imports do not count."""
    load = (
        "import importlib.util, sys\n"
        f"spec = importlib.util.spec_from_file_location('light', {runner.__file__!r})\n"
        "module = sys.modules['light'] = importlib.util.module_from_spec(spec)\n"
        "spec.loader.exec_module(module)\n"
        "print(sorted({'torch', 'timm', 'papermill', 'nbformat', 'yaml'} & set(sys.modules)))"
    )
    result = subprocess.run([sys.executable, "-c", load], capture_output=True, text=True, check=True)
    assert result.stdout == "[]\n"


def test_command_line_without_a_command_is_bad_input():
    with pytest.raises(SystemExit) as caught:
        runner.main([])
    assert caught.value.code == 2
