"""Execute a notebook once with papermill, and follow it closely enough to tell a success from anything else."""

from __future__ import annotations

import logging
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from s2d.console import say
from s2d.lab.notebook.complete import MARKER_VARIABLE
from s2d.lab.notebook.document import code_cells, tidy_


class NotebookError(RuntimeError):
    """A notebook started but did not reach its end."""


@dataclass
class Watch:
    """Follows one run: reports each cell, and holds the live notebook, which papermill drops when it fails."""

    name: str
    notebook: Any = None
    cell: Any = None
    position: int = 0
    total: int = 0
    began: float = 0.0
    failure: tuple[str, str] | None = None  # ename and evalue, as Jupyter calls them
    interrupted: bool = False

    def on_start(self, notebook: Any) -> None:
        self.notebook = notebook
        self.total = len(code_cells(notebook))

    def on_cell_start(self, cell: Any, cell_index: int) -> None:
        self.cell = cell
        self.position += 1
        self.began = time.monotonic()
        say(f"{self.label()} ... {cell.source.strip().splitlines()[0][:60]}")

    def on_cell_end(self, cell: Any, cell_index: int, execute_reply: dict[str, Any]) -> None:
        content = execute_reply["content"]
        seconds = f"{time.monotonic() - self.began:.1f} s"
        if content["status"] != "ok":
            from papermill.exceptions import strip_color

            self.failure = (content.get("ename", "Error"), content.get("evalue", ""))
            say(f"{self.label()} ... failed after {seconds}")
            say(strip_color("\n".join(content.get("traceback", []))))
            return
        say(f"{self.label()} ... {seconds}")
        # exit() raises nothing: the kernel goes away a moment later, perhaps after some more cells.
        if any(item.get("source") == "ask_exit" for item in content.get("payload", [])):
            self.failure = ("SystemExit", "exit() called in a cell")
            raise NotebookError(self.failure[1])

    def label(self) -> str:
        where = f"cell {self.position}/{self.total}" if self.position else "before the first cell"
        return f"[{self.name}] {where}"

    def fail(self, ename: str, evalue: str) -> None:
        """Note a failure that no cell raised, and store it in the cell so that the notebook shows it."""
        if self.failure is None:
            self.failure = (ename, evalue)
        stored = self.cell is not None and any(output.output_type == "error" for output in self.cell.outputs)
        if self.cell is not None and not stored:
            import nbformat

            ename, evalue = self.failure
            error = nbformat.v4.new_output("error", ename=ename, evalue=evalue, traceback=[f"{ename}: {evalue}"])
            self.cell.outputs.append(error)


def _kernel_manager(folder: Path, environment: dict[str, str]) -> type:
    """A kernel manager for this very interpreter: an installed 'python3' kernel may belong to another one."""
    import zmq
    from ipykernel.kernelspec import get_kernel_dict
    from jupyter_client.kernelspec import KernelSpec
    from jupyter_client.manager import AsyncKernelManager

    class ThisPython(AsyncKernelManager):
        def __init__(self, **kwargs: Any) -> None:
            super().__init__(**kwargs)
            if zmq.has("ipc"):  # sockets in our own folder: kernels side by side can race for one TCP port
                self.transport = "ipc"
                self.connection_file = str(folder / "kernel.json")

        @property
        def kernel_spec(self) -> KernelSpec:
            quiet = ["--log-level=CRITICAL"]  # what a kernel logs while it is stopped is noise beside our one line
            return KernelSpec(**get_kernel_dict(extra_arguments=quiet), env=environment)

    return ThisPython


def execute(notebook: Any, source: Path, parameters: dict[str, object], timeout: int | None) -> Watch:
    """Execute a cleared notebook; the returned watch holds the notebook as far as it got, and the failure if any."""
    import papermill

    watch = Watch(source.stem, notebook=notebook)
    with tempfile.TemporaryDirectory(prefix="s2d-notebook-") as folder:
        marker = Path(folder) / "complete.json"
        try:
            papermill.execute_notebook(
                notebook,
                None,  # papermill would save half a notebook here after every cell
                parameters,
                kernel_name="python3",
                kernel_manager_class=_kernel_manager(Path(folder), {MARKER_VARIABLE: str(marker)}),
                resources={"metadata": {"path": str(source.resolve().parent)}},  # the kernel's working directory
                request_save_on_cell_execute=False,
                progress_bar=False,
                stdout_file=sys.stdout,
                stderr_file=sys.stderr,
                start_timeout=120,
                execution_timeout=timeout,
                iopub_timeout=60,  # the default of 4 s fails sound cells on a busy machine
                force_raise_errors=True,  # even in a cell tagged raises-exception
                skip_cells_with_tag="",  # no tag may skip a cell
                coalesce_streams=True,  # how a stream is cut into pieces is chance
                record_timing=False,
                on_notebook_start=watch.on_start,
                on_cell_execute=watch.on_cell_start,
                on_cell_executed=watch.on_cell_end,
            )
        except KeyboardInterrupt:
            watch.interrupted = True
            watch.fail("KeyboardInterrupt", "the runner was interrupted")
            # nbclient's interrupted task may still see the kernel go, and nobody awaits it: a traceback after our line.
            logging.getLogger("asyncio").addFilter(_not_dead_kernel)
        except Exception as error:  # whatever papermill, nbclient or the kernel raised, the run has failed
            watch.fail(type(error).__name__, (str(error).strip().splitlines() or [""])[0])
        if watch.failure is None and not (marker.is_file() and watch.position == watch.total):
            watch.fail("Incomplete", "stopped before its last cell: complete() was not reached")
    tidy_(watch.notebook)
    return watch


def _not_dead_kernel(record: logging.LogRecord) -> bool:
    return not (record.exc_info and getattr(record.exc_info[0], "__name__", "") == "DeadKernelError")
