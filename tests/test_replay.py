"""Replays: what is asked of both versions of the code, how a difference is told, and one against a real commit."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from s2d.lab import replay
from s2d.lab.data import ClutteredDigits
from s2d.lab.dependencies import PACKAGE
from s2d.lab.identity import describe, kind
from s2d.lab.ledger import Line
from s2d.lab.models import DigitsViT
from s2d.lab.optimizers import Capped
from s2d.lab.qat import FakeQuantization
from s2d.lab.recipes import laptop_recipes
from s2d.lab.replay import Report, advice, first_difference, jobs_for, one_of_each_kind, shortened, trajectory
from s2d.lab.store import write_entry
from s2d.lab.training import Optimizer, Recipe, train

TINY = Recipe(
    seed=0,
    steps=40,
    warmup=2,
    batch_size=8,
    data=ClutteredDigits(canvas=12),
    model=DigitsViT(image_size=12, width=16, depth=1, heads=2),
)
SGD = replace(TINY, optimizer=Optimizer("sgd", lr=0.05))
S2D = replace(TINY, seed=7, start=TINY, s2d={"lam": 0.1, "criterion": "activation", "tau": 0.5, "refresh_every": 100})
QAT = replace(TINY, seed=8, start=S2D, prepare=FakeQuantization(3, 3, calibration_images=16))
CAPPED = replace(TINY, seed=7, start=TINY, optimizer=Capped(cap=2.0))


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """For files of weights; the store is empty."""
    monkeypatch.setenv("S2D_STORE", str(tmp_path / "store"))
    return tmp_path


def result_of(recipe: Recipe, folder: Path) -> tuple[dict, dict]:
    return trajectory(jobs_for([recipe], folder))


def test_one_recipe_of_each_kind() -> None:
    every = laptop_recipes()
    chosen = one_of_each_kind(every)
    assert len({kind(recipe) for recipe in chosen}) == len(chosen) and {kind(r) for r in every} == set(
        map(kind, chosen)
    )
    assert one_of_each_kind([TINY, replace(TINY, seed=3), SGD, S2D, QAT], ["sgd", "Fake"]) == [SGD, QAT]
    with pytest.raises(ValueError, match="no kind of recipe contains lion: there are\n  pretraining"):
        one_of_each_kind([TINY, SGD], ["lion"])


@pytest.mark.parametrize("recipe", [TINY, SGD, S2D, QAT, CAPPED], ids=["adamw", "sgd", "s2d", "qat", "cap"])
def test_a_trajectory_repeats_and_has_refreshes_and_measurements_in_it(recipe: Recipe, folder: Path) -> None:
    first, second = result_of(recipe, folder), result_of(recipe, folder)
    assert first_difference(0, first, second) is None
    (job,) = first[1]["jobs"]
    assert job["kind"] == kind(recipe)
    assert [len(window["losses"]) for window in job["windows"]] == [25, 30]
    assert [row["step"] for row in job["windows"][0]["history"]] == [0, 10, 20]
    assert [row["step"] for row in job["windows"][1]["history"]] == [10, 20, 30, 40]
    moved = {name.rpartition(".")[2] for name in first[0] if ".decay." in name or "/decay." in name}
    assert bool(moved) == (recipe.s2d is not None)
    if recipe.s2d is not None:  # the made-up weights have something to select
        assert all(any(row["selected_layers"] for row in window["history"]) for window in job["windows"])
    assert any(name.startswith("0/1/final.") for name in first[0])


def test_the_last_steps_are_those_of_the_schedule(folder: Path) -> None:
    """From stored weights, with another oracle: a run whose whole schedule is these steps at the same rates."""
    recipe = replace(TINY, steps=40, warmup=0, measure_every=10)
    weights, history = train(recipe)
    write_entry(folder / "store" / replay.file_name(recipe), recipe, weights, history, [(kind(recipe), "a" * 16)])
    tensors, said = result_of(recipe, folder)
    images, labels = recipe.data.training_batch(recipe.batch_size, seed=recipe.seed, step=10)
    model = recipe.model.build(0)
    model.load_state_dict({name: tensor.float() for name, tensor in weights.items()})
    loss = torch.nn.functional.cross_entropy(model(images), labels).item()
    assert said["jobs"][0]["windows"][1]["losses"][0] == pytest.approx(loss)
    assert said["jobs"][0]["windows"][0]["losses"][0] == history[0]["loss"]
    assert {name: tensor.dtype for name, tensor in tensors.items() if "final" in name}.values() == {
        torch.float16
    } or all(tensor.dtype == torch.float16 for name, tensor in tensors.items() if "final" in name)


def test_a_shortened_recipe_keeps_its_schedule_and_kind() -> None:
    short = shortened(S2D)
    assert short.s2d["refresh_every"] == short.measure_every == 10
    assert (short.steps, short.optimizer, kind(short)) == (S2D.steps, S2D.optimizer, kind(S2D))


def test_what_another_version_does_not_know_is_said_and_the_rest_goes_on() -> None:
    unknown = describe(TINY) | {"smoothing": 0.1}
    _, said = trajectory([{"recipe": unknown, "windows": []}, {"recipe": describe(SGD), "windows": []}])
    assert "Recipe has other fields" in said["jobs"][0]["error"] and said["jobs"][1]["kind"] == kind(SGD)
    json.dumps(said)


def test_the_first_difference_is_told() -> None:
    def result(losses=(1.0, 2.0), history=(), **tensors) -> tuple[dict, dict]:
        window = {"losses": list(losses), "history": list(history)}
        named = {f"3/0/{name}": tensor for name, tensor in tensors.items()} | {"4/0/a": torch.ones(1)}
        return named, {"jobs": [None] * 3 + [{"windows": [window]}]}

    a = result(a=torch.ones(2), b=torch.zeros(3))
    assert first_difference(3, a, result(a=torch.ones(2), b=torch.zeros(3))) is None
    told = {
        "first steps: the loss at the 2. of them was 2.0 and is 2.5": result(
            (1.0, 2.5), a=torch.ones(2), b=torch.zeros(3)
        ),
        "first steps: b differs by 0.5 at most": result(a=torch.ones(2), b=torch.tensor([0, 0.5, 0])),
        "first steps: b differs by 0 at most": result(a=torch.ones(2), b=torch.tensor([0, -0.0, 0])),
        "first steps: b was (3,) of torch.float32 and is missing": result(a=torch.ones(2)),
        "first steps: a was (2,) of torch.float32 and is (3,) of torch.float32": result(
            a=torch.ones(3), b=torch.zeros(3)
        ),
        "first steps: the measurements were [] and are [{'x': 1}]": result(
            history=[{"x": 1}], a=torch.ones(2), b=torch.zeros(3)
        ),
    }
    assert [first_difference(3, a, other) for other in told.values()] == list(told)
    nan = result((float("nan"),), a=torch.tensor([torch.nan]))
    assert first_difference(3, nan, result((float("nan"),), a=torch.tensor([torch.nan]))) is None


def test_the_narrowest_version_is_advised(folder: Path) -> None:
    line = Line("k", "a", "b", "c0ffee", 55, "", "2.6", "AVX2")
    every = [TINY, SGD, S2D, QAT, CAPPED]

    def advised(*unequal: Recipe) -> str:
        report = Report([(r, line) for r in every if r not in unequal], [(r, "differs") for r in unequal])
        return advice(report, every)

    assert 'VERSIONS: "Optimizer name=sgd": 2, which has 1 recipes' in advised(SGD)
    assert '"FakeQuantization": 2' in advised(QAT) and '"Capped": 2' in advised(CAPPED)
    assert '"s2d": 2, which has 2' in advised(S2D) or '"s2d criterion=activation": 2, which has 2' in advised(S2D)
    assert '"loop": 2, which has 5 recipes' in advised(*every)
    assert "none is stored here" in advised(SGD)
    weights = {"w": torch.ones(1).half()}
    write_entry(folder / "store" / replay.file_name(QAT), QAT, weights, [], [("k", "a")] * 3)
    assert replay.file_name(QAT) in advised(S2D)  # it descends from what changed
    assert replay.file_name(QAT) not in advised(CAPPED)


# --- against a commit, with processes of both versions ---

SCRIPT = """
import sys
from dataclasses import replace
from s2d.lab.data import ClutteredDigits
from s2d.lab.models import DigitsViT
from s2d.lab.replay import replay, show
from s2d.lab.training import Optimizer, Recipe

tiny = Recipe(0, 40, warmup=2, batch_size=8, data=ClutteredDigits(12), model=DigitsViT(12, width=16, depth=1, heads=2))
recipes = [tiny, replace(tiny, optimizer=Optimizer("sgd", lr=0.05)), replace(tiny, start=tiny, s2d={"lam": 0.1})]
sys.exit(show(replay(sys.argv[1], recipes), recipes))
"""


@pytest.fixture(scope="module")
def clone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A repository of its own with this package, in two commits: without the module of replays, and with it."""
    root = tmp_path_factory.mktemp("clone")
    shutil.copytree(PACKAGE, root / "s2d", ignore=shutil.ignore_patterns("__pycache__"))
    (root / "notebooks").mkdir()
    (root / "notebooks" / "README.md").write_text("so that this is a repository of the lab\n")
    module = root / "s2d" / "lab" / "replay.py"
    text = module.read_text()
    git(root, "init", "-q")
    module.write_text("")
    commit(root)
    module.write_text(text)
    commit(root)
    return root


def git(root: Path, *arguments: str) -> None:
    who = ["-c", "user.name=test", "-c", "user.email=test@example.org", "-c", "commit.gpgsign=false"]
    subprocess.run(["git", *who, *arguments], cwd=root, check=True)


def commit(root: Path) -> None:
    git(root, "add", "-A")
    git(root, "commit", "-qm", "a version")


def run(root: Path, *arguments: str, script: str = SCRIPT) -> subprocess.CompletedProcess:
    environment = os.environ | {"PYTHONPATH": str(root), "S2D_STORE": str(root / "build" / "store")}
    return subprocess.run(
        [sys.executable, "-c", script, *arguments], cwd=root, env=environment, capture_output=True, text=True
    )


def edit(path: Path, old: str, new: str) -> None:
    assert path.read_text().count(old) == 1
    path.write_text(path.read_text().replace(old, new))


def test_replay_tells_an_edit_that_changes_numbers_from_one_that_does_not(clone: Path) -> None:
    training = clone / "s2d" / "lab" / "training.py"
    original = training.read_text()
    edit(training, "momentum=self.momentum)", "momentum=0.5 * self.momentum)")
    edit(training, "    return recipe.optimizer.lr * min(", "    return 1.0 * recipe.optimizer.lr * min(")
    done = run(clone, "HEAD")
    training.write_text(original)
    assert done.returncode == 1, done.stderr
    rows = done.stdout.splitlines()
    assert [row[:18].rstrip() for row in rows[:3]] == ["equal on  55 steps", "equal on  55 steps", "UNEQUAL"]
    assert "Optimizer(sgd): first steps: the loss at the" in rows[2]
    assert "2 new lines in data/laptop/ledger.csv" in rows[3] and '"Optimizer name=sgd": 2' in rows[4]
    ledger = (clone / "data" / "laptop" / "ledger.csv").read_text().splitlines()
    assert len(ledger) == 3 and "sgd" not in "".join(ledger)
    worktrees = subprocess.run(["git", "worktree", "list"], cwd=clone, capture_output=True, text=True).stdout
    assert len(worktrees.splitlines()) == 1


def test_a_comment_needs_no_replay(clone: Path) -> None:
    edit(clone / "s2d" / "lab" / "training.py", "MEASURE_IMAGES = 256", "MEASURE_IMAGES = 256  # enough")
    done = run(clone, "HEAD")
    git(clone, "checkout", "-q", "s2d")
    assert done.returncode == 0, done.stderr
    assert [row.split("  ")[0] for row in done.stdout.splitlines()] == ["same code"] * 3 + ["no new lines"]


def test_commits_that_cannot_be_replayed_are_refused(clone: Path) -> None:
    script = "import sys; from s2d.lab.replay import main; sys.exit(main(sys.argv[1:]))"
    for commit, message in (("HEAD~1", "is from before there were replays"), ("nothing", "rev-parse")):
        done = run(clone, "--against", commit, "--recipes", "sgd", script=script)
        assert done.returncode == 2 and message in done.stderr
    done = run(clone, script=script)
    assert done.returncode == 2 and "give --against COMMIT" in done.stderr
