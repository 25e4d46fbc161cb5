"""What is committed and what is fetched: exactly what is listed, checked, and whole or not at all."""

from __future__ import annotations

import shutil
import threading
from dataclasses import replace
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch

from s2d import __version__
from s2d.lab import ledger, publish, store
from s2d.lab.data import ClutteredDigits
from s2d.lab.identity import code_hash, kind
from s2d.lab.models import DigitsViT
from s2d.lab.publish import Asset, described, fetch, main, needed_to_start, read_assets
from s2d.lab.recipes import laptop_recipes, starting_recipes
from s2d.lab.store import committed_folder, file_name, find, load, write_entry
from s2d.lab.training import Recipe

TINY = Recipe(
    seed=0,
    steps=6,
    data=ClutteredDigits(canvas=12),
    model=DigitsViT(image_size=12, width=16, depth=1, heads=2),
)
OTHER = replace(TINY, seed=1)
FINETUNE = replace(TINY, seed=7, start=TINY)
ALL = [TINY, FINETUNE, OTHER]


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A repository of its own, in whose store the three results are."""
    for module in (publish, store, ledger):
        monkeypatch.setattr(module, "repository_root", lambda: tmp_path)
    monkeypatch.delenv("S2D_STORE", raising=False)
    monkeypatch.delenv("S2D_ASSETS", raising=False)
    for recipe in ALL:
        weights = {"w": torch.full((4, 3), float(recipe.seed)).half()}
        code = [(kind(r), code_hash(r)) for r in (recipe.start, recipe) if r is not None]
        write_entry(tmp_path / "build" / "store" / file_name(recipe), recipe, weights, [], code)
    return tmp_path


@pytest.fixture
def published(root: Path) -> Path:
    """The same where TINY is committed and the others are assets; gives the folder of the assets."""
    _, assets = publish.publish(ALL, lambda recipe: recipe == TINY)
    shutil.rmtree(root / "build" / "store")
    return assets


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_what_is_chosen_is_committed_with_its_starts_and_the_rest_are_assets(root: Path) -> None:
    committed_folder().mkdir(parents=True)
    (committed_folder() / "pretrain-adamw-seed0-old.safetensors").write_bytes(b"old")
    for _ in range(2):
        committed, assets = publish.publish(ALL, lambda recipe: recipe == FINETUNE)
        assert names(committed_folder()) == sorted(map(file_name, (TINY, FINETUNE))) == [p.name for p in committed]
        assert names(assets) == [file_name(OTHER)]
        assert read_assets() == [described(root / "build" / "store" / file_name(OTHER))]
    assert all(p.read_bytes() == (root / "build" / "store" / p.name).read_bytes() for p in committed)


def test_nothing_is_written_unless_everything_can_be_published(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    entry = root / "build" / "store" / file_name(OTHER)
    content = entry.read_bytes()
    entry.write_bytes(content[:-1])
    with pytest.raises(ValueError, match=f"{entry.name} is truncated"):
        publish.publish(ALL)
    entry.unlink()
    with pytest.raises(ValueError, match=f"{entry.name} is not in the store: train it .* or fetch"):
        publish.publish(ALL)
    write_entry(entry, OTHER, {"w": torch.ones(1).half()}, [], [(kind(OTHER), "a" * 16)])
    monkeypatch.setenv("S2D_ANY_CODE", "1")  # for one's own use, not for that of others
    assert find(OTHER) is not None
    with pytest.raises(ValueError, match=f"{entry.name}: .* was trained by other code"):
        publish.publish(ALL)
    entry.write_bytes(content)
    monkeypatch.setattr(publish, "BUDGET", 1000)
    monkeypatch.setattr(publish, "COMMITTED", lambda recipe: True)
    with pytest.raises(
        ValueError, match="bytes would be committed, and 1,000 may be: let publish.COMMITTED choose less"
    ):
        publish.publish(ALL)
    assert names(root) == ["build"] and names(root / "build") == ["store"]


def test_what_a_reader_needs_to_start() -> None:
    kept, rest = publish.divided(laptop_recipes(), needed_to_start)
    assert kept.keys() == publish.divided(starting_recipes(), needed_to_start)[0].keys()
    assert rest and not kept.keys() & rest.keys()
    assert kept.keys() | rest.keys() >= set(map(file_name, laptop_recipes()))


def test_assets_are_fetched_from_a_folder(published: Path) -> None:
    assert find(OTHER) is None and find(TINY) is not None
    fetched = fetch(str(published))
    assert sorted(path.name for path in fetched) == sorted(map(file_name, (FINETUNE, OTHER)))
    assert find(OTHER).weights["w"][0, 0] == 1 and find(FINETUNE).weights["w"][0, 0] == 7
    assert fetch("nowhere") == []  # all are there: nothing is asked for


def test_a_result_of_ones_own_is_left_alone(root: Path, published: Path) -> None:
    own = root / "build" / "store" / file_name(OTHER)
    own.parent.mkdir()
    own.write_bytes(b"mine")
    fetch(str(published))
    assert own.read_bytes() == b"mine"


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *arguments) -> None:
        """Nothing on stderr."""


@pytest.fixture
def address(published: Path):
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(published)))
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()
    thread.join()


def test_assets_are_fetched_over_http(address: str, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.setenv("S2D_ASSETS", f"{address}/")
    assert main(["fetch"]) == 0 and "2 fetched, 0 were there" in capsys.readouterr().out
    assert find(OTHER).weights["w"][0, 0] == 1
    assert main(["fetch", "--from", "nowhere"]) == 0 and "0 fetched, 2 were there" in capsys.readouterr().out


@pytest.mark.parametrize("over_http", [False, True])
@pytest.mark.parametrize("damage", ["missing", "short", "long", "flipped"])
def test_an_asset_that_is_not_what_the_list_says_does_not_appear(
    damage: str, over_http: bool, root: Path, published: Path, address: str
) -> None:
    path = published / file_name(OTHER)
    content = path.read_bytes()
    changed = {"short": content[:-1], "long": content + b"x", "flipped": content[:-1] + bytes([content[-1] ^ 1])}
    path.unlink() if damage == "missing" else path.write_bytes(changed[damage])
    source = address if over_http else str(published)
    reason = "404|No such file" if damage == "missing" else f"what is there has {len(changed[damage])} bytes"
    with pytest.raises(ValueError, match=f"{path.name} cannot be fetched from {source}: .*({reason})"):
        fetch(source)
    assert path.name not in names(root / "build" / "store")
    path.write_bytes(content)
    fetch(source)
    assert find(OTHER) is not None


def test_where_assets_come_from(root: Path, published: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    (root / "CITATION.cff").write_text("title: s2d\n")
    assert main(["fetch"]) == 2
    assert "CITATION.cff names no repository-code" in capsys.readouterr().err
    (root / "CITATION.cff").write_text("title: s2d\nrepository-code: https://example.org/s2d/\n")
    assert publish.assets_source() == f"https://example.org/s2d/releases/download/v{__version__}"
    monkeypatch.setenv("S2D_ASSETS", "somewhere")
    assert publish.assets_source() == "somewhere"
    with pytest.raises(ValueError, match="cannot be fetched from somewhere: somewhere is neither a folder nor an http"):
        fetch()


@pytest.mark.parametrize(
    "line", ["../x.safetensors,{0},3", "x.txt,{0},3", "x.safetensors,{0},many", "x.safetensors,ab,3", "x"]
)
def test_a_list_that_cannot_be_used_is_named(line: str, root: Path) -> None:
    with pytest.raises(ValueError, match="there is no .*assets.csv"):
        read_assets()
    path = publish.assets_path()
    path.parent.mkdir(parents=True)
    path.write_text(f"name,sha256,bytes\nok.safetensors,{'a' * 64},3\n")
    assert read_assets() == [Asset("ok.safetensors", "a" * 64, 3)]
    path.write_text("name,sha256,bytes\n" + line.format("a" * 64) + "\n")
    with pytest.raises(ValueError, match="assets.csv, line 2, is no asset"):
        read_assets()


# --- what this repository holds ---


def test_the_committed_entries_are_what_is_to_be_committed_and_the_rest_are_assets() -> None:
    kept, rest = publish.divided(laptop_recipes(), publish.COMMITTED)
    assert {path.name for path in committed_folder().glob("*")} == kept.keys(), "python -m s2d.lab.publish"
    assert {asset.name for asset in read_assets()} == rest.keys(), "python -m s2d.lab.publish"
    assert sum(path.stat().st_size for path in committed_folder().glob("*")) <= publish.BUDGET


def test_every_committed_entry_is_whole_and_a_chain_leads_from_its_code_to_todays() -> None:
    for recipe in laptop_recipes():
        path = committed_folder() / file_name(recipe)
        if path.exists():
            assert load(path, recipe).history[-1]["step"] == recipe.steps
