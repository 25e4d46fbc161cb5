"""Files and folders that appear whole or not at all: every result of this package is written through here."""

from __future__ import annotations

import shutil
import stat
import tempfile
import uuid
from collections.abc import Callable
from os import PathLike
from pathlib import Path


def write_atomically(path: str | PathLike[str], write: Callable[[Path], object]) -> None:
    """Let ``write`` fill a temporary neighbour of ``path``, then rename it: readers see the old file or the new one.

    A file that is replaced keeps its permissions, a symbolic link stays one (its target is replaced), and a new file
    has the permissions any other new file would get.

    Args:
        path: the file to make; its folder is created.
        write: called with the temporary path, which has the same suffix.

    Raises:
        OSError: if the folder cannot be created or takes no files; and whatever ``write`` raises. ``path`` is then as
            it was, and nothing is left beside it.

    Example:
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     write_atomically(f"{folder}/new/answer.txt", lambda temporary: temporary.write_text("42"))
        ...     Path(folder, "new", "answer.txt").read_text()
        '42'

    Paper: none
    """
    path = Path(path).resolve()
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = _neighbour(path)
    try:
        temporary.touch(exist_ok=False)
        # Writers such as safetensors' make the file anew, for its owner alone.
        mode = (path if path.exists() else temporary).stat().st_mode
        write(temporary)
        temporary.chmod(stat.S_IMODE(mode))
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: str | PathLike[str], text: str) -> None:
    """Write a text file atomically, in UTF-8, line ends as they are.

    Args:
        path: the file to make; its folder is created.
        text: its content.

    Raises:
        OSError: as :func:`write_atomically`.

    Example:
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     write_text(f"{folder}/answer.txt", "42")
        ...     Path(folder, "answer.txt").read_text()
        '42'

    Paper: none
    """
    write_atomically(path, lambda temporary: temporary.write_bytes(text.encode()))


def write_folder_atomically(
    folder: str | PathLike[str], fill: Callable[[Path], object], *, overwrite: bool = False
) -> None:
    """Let ``fill`` put files into a temporary neighbour of ``folder``, then rename that.

    Args:
        folder: the folder to make; the one it lies in is created.
        fill: called with the temporary folder, which is empty.
        overwrite: put it in the place of an existing folder, whatever that holds.

    Raises:
        OSError: if a folder cannot be created or renamed, or holds something and is not to be overwritten; and
            whatever ``fill`` raises. ``folder`` is then as it was, and nothing is left beside it.

    Example:
        >>> with tempfile.TemporaryDirectory() as parent:
        ...     write_folder_atomically(f"{parent}/new", lambda new: (new / "answer.txt").write_text("42"))
        ...     Path(parent, "new", "answer.txt").read_text()
        '42'

    Paper: none
    """
    folder = Path(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    new, old = temporary / "new", temporary / "old"
    try:
        new.mkdir()  # mkdtemp's own is for its owner alone
        fill(new)
        try:
            if overwrite and folder.exists():
                folder.rename(old)
            new.rename(folder)
        except BaseException:
            if old.exists() and not folder.exists():
                old.rename(folder)
            raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def can_write(path: str | PathLike[str], *, folder: bool = False) -> bool:
    """Whether a file (or folder) can be made at a path whose own folder exists, found out by making one beside it.

    Permissions alone do not tell: an administrator passes them, and some file systems take no files at all.

    Args:
        path: where the file or folder would be.
        folder: whether it would be a folder.

    Returns:
        False if the folder around it is missing or takes no files, or a folder lies where the file would be.

    Example:
        >>> with tempfile.TemporaryDirectory() as here:
        ...     can_write(f"{here}/file"), can_write(here), can_write(f"{here}/missing/file")
        (True, False, False)

    Paper: none
    """
    path = Path(path).resolve()
    try:
        with tempfile.NamedTemporaryFile(dir=path.parent):
            return folder or not path.is_dir()
    except OSError:
        return False


def _neighbour(path: Path) -> Path:
    """A new, hidden name in the same folder (the same file system, so that renaming is atomic)."""
    return path.with_name(f".{path.stem}-{uuid.uuid4().hex[:8]}{path.suffix}")
