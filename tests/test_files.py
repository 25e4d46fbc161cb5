"""Files and folders appear whole or not at all: what a reader sees before, during and after each way of writing."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from s2d.files import can_write, write_atomically, write_folder_atomically, write_text

# --- files ---


@pytest.mark.parametrize("content", ["", "one\ntwo\n", "ü\r\n"])
def test_text_is_written_as_it_is(content: str, tmp_path: Path) -> None:
    path = tmp_path / "new" / "folder" / "text.md"
    write_text(path, content)
    assert path.read_bytes() == content.encode()
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
@pytest.mark.parametrize("existing", [None, "old"])
def test_a_failed_write_leaves_what_was_there(tmp_path: Path, existing: str | None, error: type) -> None:
    path = tmp_path / "table.csv"
    if existing is not None:
        path.write_text(existing)

    def write(temporary: Path) -> None:
        assert temporary.parent == tmp_path and temporary.suffix == ".csv" and temporary != path
        temporary.write_text("half of the n")
        assert path.exists() == (existing is not None)  # readers meanwhile see what was there
        raise error

    with pytest.raises(error):
        write_atomically(path, write)
    assert {p.name: p.read_text() for p in tmp_path.iterdir()} == ({"table.csv": existing} if existing else {})
    write_text(path, "new")
    assert path.read_text() == "new"


def test_a_new_file_has_ordinary_permissions_even_from_a_secretive_writer(tmp_path: Path) -> None:
    (tmp_path / "ordinary").write_bytes(b"")

    def replace(temporary: Path) -> None:
        temporary.unlink()
        os.close(os.open(temporary, os.O_CREAT | os.O_WRONLY, 0o600))

    write_atomically(tmp_path / "atomic", replace)
    assert (tmp_path / "atomic").stat().st_mode == (tmp_path / "ordinary").stat().st_mode


def test_a_replaced_file_keeps_its_permissions_and_a_link_stays_one(tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    target, link = tmp_path / "there" / "target", tmp_path / "link"
    target.write_text("old")
    target.chmod(0o640)
    link.symlink_to(target)
    write_text(link, "new")
    assert link.is_symlink() and target.read_text() == "new" and target.stat().st_mode & 0o777 == 0o640


# --- folders ---


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "old").write_text("old")
    return tmp_path / "model"


def contents(folder: Path) -> dict[str, str]:
    return {path.relative_to(folder).as_posix(): path.read_text() for path in folder.rglob("*") if path.is_file()}


def fill(new: Path) -> None:
    (new / "new").write_text("new")


def test_a_folder_appears_and_replaces_another_when_asked(folder: Path) -> None:
    write_folder_atomically(folder.parent / "more" / "model", fill)
    assert contents(folder.parent) == {"model/old": "old", "more/model/new": "new"}
    write_folder_atomically(folder, fill, overwrite=True)
    assert contents(folder.parent) == {"model/new": "new", "more/model/new": "new"}
    assert sorted(path.name for path in folder.parent.iterdir()) == ["model", "more"]


def test_a_folder_in_the_way_stays(folder: Path) -> None:
    with pytest.raises(OSError):
        write_folder_atomically(folder, fill)
    assert contents(folder.parent) == {"model/old": "old"} and list(folder.parent.iterdir()) == [folder]


@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
def test_a_folder_that_cannot_be_filled_leaves_the_old_one(folder: Path, error: type) -> None:
    def half(new: Path) -> None:
        fill(new)
        raise error

    with pytest.raises(error):
        write_folder_atomically(folder, half, overwrite=True)
    assert contents(folder.parent) == {"model/old": "old"} and list(folder.parent.iterdir()) == [folder]


def test_a_folder_that_cannot_be_renamed_leaves_the_old_one(folder: Path, monkeypatch) -> None:
    real = Path.rename

    def rename(self: Path, target: Path) -> Path:
        if self.name == "new":
            raise OSError("no")
        return real(self, target)

    monkeypatch.setattr(Path, "rename", rename)
    with pytest.raises(OSError, match="no"):
        write_folder_atomically(folder, fill, overwrite=True)
    assert contents(folder.parent) == {"model/old": "old"} and list(folder.parent.iterdir()) == [folder]


# --- where one can write ---


def test_can_write_is_what_writing_finds(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    assert can_write(tmp_path / "new") and can_write(tmp_path / "file") and can_write(tmp_path / "new", folder=True)
    assert not can_write(tmp_path)  # a folder lies there
    assert can_write(tmp_path, folder=True)
    assert not can_write(tmp_path / "missing" / "new")
    assert not can_write(tmp_path / "file" / "new")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file"]


def test_a_file_name_alone_means_the_working_directory(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert can_write("a.txt")
    write_text("a.txt", "a")
    assert contents(tmp_path) == {"a.txt": "a"}
