"""``s2d train`` under torchrun with real gloo processes: the result is one process's; one killed, it goes on."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from training import VIT, WORKER, image_folder, largest_difference, run, settings

from s2d.command import main

ROUNDING = 1e-5  # of weights of about 0.1, after six steps of sums in another order


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images, and a run of one process that takes chunks of three, as each of four would."""
    root = tmp_path_factory.mktemp("distributed")
    image_folder(root / "train", 12, 0)
    image_folder(root / "val", 4, 1)
    assert main(["train", *arguments(root, "one")]) == 0
    return root


def arguments(root: Path, out: str, **more: object) -> list[str]:
    sources = ["--data", str(root / "train"), "--val", str(root / "val"), "-o", str(root / out)]
    given = {"micro_batch_size": 3, "decay": "s2d", "tau": 0.3, "refresh_every": 3, "drop_path": 0.1, "clip_grad": 1.0}
    given |= {"random_erasing": 0.3, "layer_decay": 0.8}
    return [*VIT, *sources, *settings(**given | more)]


def done(out: Path) -> dict[str, float]:
    return json.loads((out / "done.json").read_text()) | {"seconds": 0}


def test_one_of_two_processes_is_killed_and_four_go_on(here):
    killed = run([str(WORKER), "4", "1", *arguments(here, "killed")], torchrun=2)
    assert killed.returncode != 0 and not (here / "killed" / "model").exists()
    # The other process may have written its checkpoint before torchrun ended it, or not.
    left = sorted(path.name for path in (here / "killed" / "checkpoints").glob("step-*"))
    assert left in (["step-2", "step-3"], ["step-3", "step-4"]), killed.stderr
    again = run(["-m", "s2d", "train", *arguments(here, "killed")], torchrun=4)
    assert again.returncode == 0, again.stderr
    assert f"goes on at {left[-1].replace('-', ' ')} of 6" in again.stderr and again.stdout.count("val accuracy") == 1
    assert largest_difference(here / "killed", here / "one") < ROUNDING
    assert done(here / "killed") == pytest.approx(done(here / "one"), rel=1e-4)


def test_shards_of_fsdp2_give_the_same_network(here):
    found = run(["-m", "s2d", "train", *arguments(here, "sharded", sharding="fsdp2")], torchrun=2)
    assert found.returncode == 0, found.stderr
    assert largest_difference(here / "sharded", here / "one") < ROUNDING
    assert done(here / "sharded") == pytest.approx(done(here / "one"), rel=1e-4)
