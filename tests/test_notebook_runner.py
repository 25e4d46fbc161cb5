"""The strict notebook runner: every way a run can be silently wrong, made to happen."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import nbformat
import pytest
from notebook_cells import COMPLETE, DEFAULTS, code, errors, printed, read, tiny, write

from s2d.lab.notebook import NotebookError, run_notebook
from s2d.lab.notebook.cli import main

ROOT = Path(__file__).resolve().parents[1]
SAFETY = 600  # seconds after which a test that waits for something has failed


@pytest.fixture(autouse=True)
def _kernels_find_s2d(monkeypatch):
    """A kernel starts in the notebook's folder, so an uninstalled checkout needs its root on the path."""
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])))


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
            assert main([*arguments, "-p", "seed", "7", "-p", "widths", "[4]"]) == 0
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
    assert main(["refresh", str(path)]) == 0
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
    assert main(["run", str(path), str(output), *(["--timeout", "2"] if kind == "hangs" else [])]) == 1
    last = capsys.readouterr().err.splitlines()[-1]
    kept = output.with_name("tiny.failed.ipynb")
    assert last.startswith(f"error: [tiny] cell 3/4: {message}") and last.endswith(f"kept as {kept}")
    assert list(output.parent.iterdir()) == [kept]
    assert printed(kept) == "before\n" and [index for index, _ in errors(kept)] == [3]


def test_run_that_never_completes_is_a_failure(tmp_path):
    path = tiny(tmp_path, last="print('all is well')")
    output = tmp_path / "out.ipynb"
    output.write_text("an older result")
    with pytest.raises(NotebookError, match="stopped before its last cell"):
        run_notebook(path, output)
    assert output.read_text() == "an older result"


def test_missing_promised_file_is_a_failure_even_where_errors_are_allowed(tmp_path):
    cells = [code(DEFAULTS, "parameters"), code(COMPLETE.replace("()", "('table.csv')"), "raises-exception")]
    path = write(tmp_path / "tiny.ipynb", cells)
    with pytest.raises(NotebookError, match="cell 2/2: FileNotFoundError: complete: table.csv is missing"):
        run_notebook(path, tmp_path / "out.ipynb")


def test_failed_refresh_leaves_the_notebook_and_goes_on(tmp_path, capsys):
    bad = tiny(tmp_path / "bad", "raise KeyError('x')")
    worse = tiny(tmp_path / "worse", "raise OSError('y')")
    before = bad.read_bytes()
    assert main(["refresh", str(bad), str(worse)]) == 1
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
