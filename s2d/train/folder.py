"""The folder of a run: its settings, its history, at most two checkpoints, and in the end what came of it."""

from __future__ import annotations

import csv
import io
import json
import platform
import shutil
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import s2d
from s2d.console import say
from s2d.files import can_write, write_folder_atomically, write_text
from s2d.packages import need

SETTINGS, HISTORY, DONE = "settings.json", "history.csv", "done.json"
MODEL, CHECKPOINTS = "model", "checkpoints"
KEPT = 2


class RunFolder:
    """Where a run keeps what it knows; every file in it appears whole or not at all.

    Args:
        path: ``OUT``.

    Paper: none.
    """

    def __init__(self, path: Path) -> None:
        self.path = Path(path)
        self.model, self.checkpoints = self.path / MODEL, self.path / CHECKPOINTS

    # --- settings

    def check(self, asked: Mapping[str, Any], *, resume: str, free: set[str]) -> None:
        """ValueError unless a run of these settings may begin or go on here; nothing is written.

        Args:
            asked: what :meth:`begin` will write.
            resume: ``"auto"``, or ``"never"`` to refuse a folder that holds a run.
            free: names of settings that may differ.
        """
        nearest = next(path for path in (self.path.absolute(), *self.path.absolute().parents) if path.exists())
        if not can_write(nearest / SETTINGS):
            raise ValueError(f"-o {self.path} cannot be written: give a folder in one that takes files")
        file = self.path / SETTINGS
        if not file.exists():
            # What begins with a dot is left of a first file whose writing was interrupted.
            if self.path.exists() and any(not path.name.startswith(".") for path in self.path.iterdir()):
                raise ValueError(f"-o {self.path} holds something else than a run: give a folder that is empty or new")
            return
        if resume == "never":
            raise ValueError(f"-o {self.path} holds a run: give another folder, or --resume auto to go on with it")
        try:
            stored = json.loads(file.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{file} is not JSON ({error}): remove {self.path} to start anew") from None
        asked = json.loads(json.dumps(asked))
        for part in ("kind", "model", "data", "settings"):
            old, new = stored.get(part), asked[part]
            if isinstance(new, dict) and isinstance(old, dict):
                for name in {**old, **new}:
                    if name not in free and old.get(name) != new.get(name):
                        self._differs(f"{part}: {name}={old.get(name)!r}", f"{new.get(name)!r}")
            elif old != new:
                self._differs(f"{part} {old!r}", f"{new!r}")
        for name, version in stored.get("versions", {}).items():
            if asked["versions"].get(name) != version:
                say(f"note: {self.path} was begun with {name} {version}, this is {asked['versions'].get(name)}")

    def _differs(self, old: str, new: str) -> None:
        raise ValueError(
            f"-o {self.path} holds a run with {old}, asked is {new}: ask for the same to go on, give another folder, "
            "or remove it to start anew"
        )

    def begin(self, asked: Mapping[str, Any]) -> None:
        """Write ``settings.json``, and clear away what interrupted writing left behind."""
        write_text(self.path / SETTINGS, json.dumps(asked, indent=1) + "\n")
        for left in [*self.path.glob(".*"), *self.checkpoints.glob(".*")]:
            shutil.rmtree(left, ignore_errors=True) if left.is_dir() else left.unlink(missing_ok=True)

    def done(self) -> dict[str, Any] | None:
        """What ``done.json`` says; None if the run is not done."""
        file = self.path / DONE
        return json.loads(file.read_text(encoding="utf-8")) if file.exists() else None

    def finish(self, result: Mapping[str, Any]) -> None:
        """Write ``done.json``, the last file of a run."""
        write_text(self.path / DONE, json.dumps(result, indent=1) + "\n")

    # --- history

    def write_history(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Write ``history.csv``, a row an epoch."""
        text = io.StringIO()
        if rows:
            writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)
        write_text(self.path / HISTORY, text.getvalue())

    # --- checkpoints

    def names(self) -> list[Path]:
        """The checkpoints there are, the newest first."""
        found = [path for path in self.checkpoints.glob("step-*") if path.is_dir()]
        return sorted(found, key=lambda path: int(path.name.rpartition("-")[2]), reverse=True)

    def save(self, step: int, tensors: Mapping[str, Tensor], notes: Mapping[str, Any]) -> None:
        """Write a checkpoint, and remove all but the newest ``KEPT``."""
        safetensors = need("safetensors.torch", "a checkpoint")

        def fill(new: Path) -> None:
            safetensors.save_file(dict(tensors), new / "state.safetensors")
            (new / "notes.json").write_text(json.dumps(notes) + "\n", encoding="utf-8")

        try:
            write_folder_atomically(self.checkpoints / f"step-{step}", fill, overwrite=True)
        except OSError as error:
            raise OSError(
                f"the checkpoint of step {step} could not be written ({error}): make room and start again; the one "
                "before it is kept"
            ) from None
        for old in self.names()[KEPT:]:
            hidden = old.rename(old.with_name(f".{old.name}"))  # so that no half of it is taken for a checkpoint
            shutil.rmtree(hidden, ignore_errors=True)

    def load(self) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """Tensors and notes of the newest checkpoint that can be read; None where there is none.

        A file that a crash of the machine cut short is passed over with a warning.

        Raises:
            ValueError: if there are checkpoints, and none can be read.
        """
        safetensors = need("safetensors.torch", "a checkpoint")
        found = self.names()
        for path in found:
            try:
                notes = json.loads((path / "notes.json").read_text(encoding="utf-8"))
                return safetensors.load_file(path / "state.safetensors"), notes
            except Exception as error:  # of the safetensors package, or of JSON
                say(f"warning: {path} cannot be read ({error}): passed over")
        if found:
            raise ValueError(f"no checkpoint in {self.checkpoints} can be read: remove {self.path} to start anew")
        return None


def versions() -> dict[str, str]:
    """Of Python and the packages that a result may depend on.

    Example:
        >>> {"python", "s2d", "torch"} <= set(versions())
        True

    Paper: none.
    """
    packages = [name for name in ("accelerate", "datasets", "timm", "transformers") if _version(name)]
    own = {"python": platform.python_version(), "s2d": s2d.__version__, "torch": torch.__version__}
    return own | {name: _version(name) for name in packages}


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None
