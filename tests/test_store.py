"""Training that can be interrupted, and the store that keeps what was trained: nothing is ever substituted silently."""

from __future__ import annotations

import ast
import dataclasses
import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

import s2d
from s2d.lab import store
from s2d.lab.data import ClutteredDigits
from s2d.lab.files import read_tensors, write_atomically, write_tensors
from s2d.lab.models import DigitsViT
from s2d.lab.optimizers import LessAdaptive
from s2d.lab.store import Trained, find, obtain, publish, recipe_key
from s2d.lab.training import Optimizer, Recipe, accuracy, learning_rate, train

TINY = Recipe(
    seed=0,
    steps=6,
    warmup=2,
    batch_size=8,
    model=DigitsViT(image_size=16, patch_size=4, width=16, depth=1, heads=2),
    measure_every=4,
)
SGD = replace(TINY, optimizer=Optimizer("sgd", lr=0.05, weight_decay=0.01, clip=1.0))
# Refreshed at steps 0 and 3: a run resumed in between needs the triplets it was interrupted with.
S2D = replace(TINY, s2d={"lam": 0.1, "k_max": 3, "tau": 0.5, "refresh_every": 3})
S2D_LIVE = replace(SGD, s2d={"lam": 0.1, "k_max": 2, "criterion": "all", "coefficients": "live", "refresh_every": 4})
RECIPES = {"adamw": TINY, "sgd": SGD, "s2d": S2D, "s2d-live": S2D_LIVE}
FINETUNE = replace(TINY, seed=7, steps=3, start=TINY)


@pytest.fixture(scope="module")
def results() -> dict[str, tuple[dict[str, Tensor], list[dict[str, float]]]]:
    """Each recipe trained without interruption and without a partial file."""
    return {name: train(recipe) for name, recipe in RECIPES.items()}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty store."""
    monkeypatch.setenv("S2D_STORE", str(tmp_path / "store"))
    return tmp_path / "store"


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The file of one stored entry, of TINY; copied by the tests that damage it."""
    path = tmp_path_factory.mktemp("stored")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("S2D_STORE", str(path))
        store._train_and_store(TINY)
    (entry,) = path.iterdir()
    return entry


@pytest.fixture
def entry(folder: Path, stored: Path) -> Path:
    """A store of its own that holds TINY."""
    folder.mkdir()
    return Path(shutil.copy(stored, folder))


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return list(a) == list(b) and all(torch.equal(a[name], b[name]) and a[name].dtype == b[name].dtype for name in a)


def assert_close(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Equal up to two units in the last place of the half precision that weights are stored in."""
    assert list(found) == list(expected)
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name].float(), tensor.float(), rtol=2e-3, atol=1e-4, msg=name)


def interrupting(after: int):
    """A progress callback that is interrupted at its ``after``-th call."""
    calls = []

    def progress(steps: int) -> None:
        calls.append(steps)
        if len(calls) == after:
            raise KeyboardInterrupt

    return progress


# --- recipes ---


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 0}, "steps=0"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"measure_every": 0}, "measure_every=0"),
        ({"data": ClutteredDigits(canvas=24)}, "canvas 24 and model image_size 16 must be equal"),
        ({"start": replace(TINY, model=replace(TINY.model, width=32))}, "cannot fine-tune .*width=32.* as .*width=16"),
    ],
)
def test_recipes_that_cannot_be_trained(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(TINY, **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"name": "lion"}, "unknown optimizer 'lion': choose 'adamw' or 'sgd'"),
        ({"lr": 0.0}, "lr is 0.0: it must be positive"),
        ({"lr": -1.0}, "lr is -1.0"),
        ({"lr": float("nan")}, "lr is nan"),
    ],
)
def test_optimizers_that_cannot_be_built(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Optimizer(**options)


def test_a_recipe_is_plain_json() -> None:
    described = replace(FINETUNE, s2d={"lam": 0.1}).as_dict()
    assert json.loads(json.dumps(described)) == described
    assert described["start"]["seed"] == 0 and described["optimizer"]["betas"] == list(TINY.optimizer.betas)


def test_weight_matrices_are_decayed_and_vectors_are_not() -> None:
    model = TINY.model.build(0)
    names = {parameter: name for name, parameter in model.named_parameters()}
    groups = replace(TINY.optimizer, weight_decay=0.3).build(model).param_groups
    decayed = {names[p] for g in groups if g["weight_decay"] == 0.3 for p in g["params"]}
    kept = {names[p] for g in groups if g["weight_decay"] == 0 for p in g["params"]}
    assert {"blocks.0.mlp.fc1.weight", "blocks.0.attn.qkv.weight", "patch_embed.proj.weight", "head.weight"} <= decayed
    assert {"head.bias", "pos_embed", "cls_token"} <= kept
    assert decayed | kept == {name for name, p in model.named_parameters() if p.requires_grad}


def test_learning_rate_by_hand() -> None:
    recipe = replace(TINY, steps=20, warmup=4, optimizer=Optimizer(lr=1.0))
    rates = [learning_rate(recipe, step) for step in range(20)]
    assert rates == pytest.approx([0.25, 0.5, 0.75] + [1.0] * 14 + [0.75, 0.5, 0.25])
    assert learning_rate(replace(recipe, warmup=0, steps=1), 0) == 1.0


def test_building_a_model_leaves_the_random_state_alone() -> None:
    state = torch.get_rng_state()
    weights = TINY.model.build(3).state_dict()
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(1)
    assert same(TINY.model.build(3).state_dict(), weights)
    assert not same(TINY.model.build(4).state_dict(), weights)


# --- training ---


@pytest.mark.parametrize("name", RECIPES)
def test_weights_are_half_precision_and_have_moved(name: str, results: dict) -> None:
    weights, _ = results[name]
    initial = RECIPES[name].model.build(0).state_dict()
    assert list(weights) == list(initial)
    assert {tensor.dtype for tensor in weights.values()} == {torch.float16}
    assert not torch.allclose(weights["blocks.0.mlp.fc1.weight"].float(), initial["blocks.0.mlp.fc1.weight"], atol=1e-4)


def test_the_recipes_give_different_weights(results: dict) -> None:
    key = "blocks.0.mlp.fc1.weight"
    weights = {name: result[0][key].float() for name, result in results.items()}
    assert len({tensor.numpy().tobytes() for tensor in weights.values()}) == len(RECIPES)
    # S2D pushes the largest singular value down, and is all that sets these pairs apart.
    largest = {name: torch.linalg.svdvals(tensor)[0] for name, tensor in weights.items()}
    assert largest["s2d"] < largest["adamw"] and largest["s2d-live"] < largest["sgd"]


@pytest.mark.parametrize("name", RECIPES)
def test_history(name: str, results: dict) -> None:
    recipe, (weights, history) = RECIPES[name], results[name]
    assert [row["step"] for row in history] == [0, 4, 6]
    for row in history:
        assert {"loss", "validation_accuracy", "excess_kurtosis", "neuron_kurtosis", "max_abs"} <= set(row)
        assert all(torch.isfinite(torch.tensor(float(value))) for value in row.values())
        assert 1.5 < row["loss"] < 4
    # The last row is of the weights that are returned, as rounded.
    images, labels = recipe.data.fixed_set("validation", 800)
    model = Trained(recipe, weights, history).model()
    with torch.no_grad():
        hits = (model(images).argmax(-1) == labels).double().mean().item()
    assert history[-1]["validation_accuracy"] == pytest.approx(hits, abs=2 / 800)
    assert accuracy(model, images, labels, batch_size=100) == pytest.approx(hits, abs=2 / 800)


def test_training_twice_gives_the_same_bits(results: dict) -> None:
    torch.manual_seed(99)
    weights, history = train(TINY)
    assert same(weights, results["adamw"][0]) and history == results["adamw"][1]
    assert not same(train(replace(TINY, seed=1))[0], weights)


@pytest.mark.parametrize("after", [1, 3, 4, 6])
@pytest.mark.parametrize("name", RECIPES)
def test_an_interrupted_run_ends_as_if_it_had_not_been(name: str, after: int, results: dict, tmp_path: Path) -> None:
    partial = tmp_path / "run.partial"
    with pytest.raises(KeyboardInterrupt, match=f"interrupted at step {after - 1}; run again to resume"):
        train(RECIPES[name], partial=partial, save_every=2, progress=interrupting(after))
    # Step s is saved before it is taken, so the call that ends step `after - 1` follows the last save before it.
    saved = (after - 1) // 2 * 2
    assert partial.exists() == (saved > 0)
    if saved:
        assert read_tensors(partial)[1]["step"] == saved
    done: list[int] = []
    weights, history = train(RECIPES[name], partial=partial, save_every=2, progress=done.append)
    assert sum(done) == 6 and done == ([saved] if saved else []) + [1] * (6 - saved)
    assert same(weights, results[name][0])
    assert history == results[name][1]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", RECIPES)
def test_a_run_interrupted_again_and_again(name: str, results: dict, tmp_path: Path) -> None:
    partial = tmp_path / "run.partial"
    for after in (2, 3, 3):  # the first call after a resume reports the steps done before
        with pytest.raises(KeyboardInterrupt):
            train(RECIPES[name], partial=partial, save_every=1, progress=interrupting(after))
    assert read_tensors(partial)[1]["step"] > 1
    weights, history = train(RECIPES[name], partial=partial, save_every=1)
    assert same(weights, results[name][0]) and history == results[name][1]


def test_saving_does_not_disturb_the_run(results: dict, tmp_path: Path) -> None:
    weights, history = train(S2D, partial=tmp_path / "run.partial", save_every=1)
    assert same(weights, results["s2d"][0]) and history == results["s2d"][1]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("keep", [0, 7, 100, 5000])
def test_a_truncated_partial_file_is_named(keep: int, tmp_path: Path) -> None:
    partial = tmp_path / "run.partial"
    with pytest.raises(KeyboardInterrupt):
        train(TINY, partial=partial, save_every=2, progress=interrupting(4))
    partial.write_bytes(partial.read_bytes()[:keep])
    with pytest.raises(ValueError, match="run.partial is truncated or not a checkpoint.*delete it"):
        train(TINY, partial=partial)


def test_start_weights_are_where_a_finetuning_begins(results: dict) -> None:
    start = results["adamw"][0]
    still = replace(FINETUNE, optimizer=Optimizer(lr=1e-12))
    weights, history = train(still, start)
    assert same(weights, start)
    assert history[0]["validation_accuracy"] == results["adamw"][1][-1]["validation_accuracy"]
    moved, _ = train(FINETUNE, start)
    assert not same(moved, start)


def test_start_weights_exactly_when_the_recipe_has_a_start(results: dict) -> None:
    for recipe, start in ((TINY, results["adamw"][0]), (FINETUNE, None)):
        with pytest.raises(ValueError, match="exactly when the recipe has a start"):
            train(recipe, start)


def test_clipping_bounds_the_step(results: dict) -> None:
    clipped = replace(TINY, optimizer=Optimizer("sgd", lr=1.0, weight_decay=0.0, momentum=0.0, clip=1e-3))
    weights, _ = train(clipped)
    initial = clipped.model.build(0).state_dict()
    moved = sum((weights[n].double() - t.half().double()).square().sum() for n, t in initial.items()).sqrt()
    # Six steps of at most lr * clip, and what rounding to float16 adds or hides.
    assert 0 < moved < 6 * 1e-3 + 0.01
    loose, _ = train(replace(clipped, optimizer=replace(clipped.optimizer, clip=0.0)))
    far = sum((loose[n].double() - t.half().double()).square().sum() for n, t in initial.items()).sqrt()
    assert far > 0.1


@pytest.mark.parametrize("measure_every", [1, 100])
def test_a_diverging_run_is_an_error(measure_every: int, tmp_path: Path) -> None:
    wild = replace(TINY, optimizer=Optimizer("sgd", lr=1e30), measure_every=measure_every)
    with pytest.raises(ValueError, match=r"lower lr=1e\+30"):
        train(wild, partial=tmp_path / "run.partial")


# --- keys ---


def other(value):
    """Some other value of the same kind."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, (int, float)):
        return value + 1
    if isinstance(value, tuple):
        return (*value[:-1], other(value[-1]))
    if isinstance(value, dict):
        return {**value, "lam": 9.0}
    raise AssertionError(f"say in OTHERS how {value!r} changes")


FRAGMENTS = ClutteredDigits(fragments=5)
OTHERS = {
    "optimizer": [Optimizer("sgd")],
    "data": [FRAGMENTS, ClutteredDigits(fragment_size=4)],
    "model": [replace(TINY.model, **{f: v}) for f, v in (("patch_size", 8), ("width", 32), ("depth", 2), ("heads", 4))],
    "start": [SGD, replace(TINY, seed=5), replace(FINETUNE, seed=8)],
    "s2d": [{}, {"lam": 0.1}, {"lam": 0.2}, {"lam": 0.1, "tau": 0.5}],
    "device": ["cuda"],
}


def test_the_key_changes_with_every_field_of_a_recipe() -> None:
    variants = [TINY]
    for field in dataclasses.fields(Recipe):
        values = OTHERS.get(field.name) or [other(getattr(TINY, field.name))]
        variants += [replace(TINY, **{field.name: value}) for value in values]
    for field in dataclasses.fields(Optimizer):
        if field.name != "name":
            changed = replace(TINY.optimizer, **{field.name: other(getattr(TINY.optimizer, field.name))})
            variants.append(replace(TINY, optimizer=changed))
    larger = {"data": ClutteredDigits(canvas=24), "model": replace(TINY.model, image_size=24)}
    variants.append(replace(TINY, **larger))
    variants.append(replace(TINY, start=replace(FINETUNE, start=SGD)))  # a start's start counts too
    keys = [recipe_key(recipe) for recipe in variants]
    assert len(set(keys)) == len(keys)
    assert recipe_key(dataclasses.replace(TINY)) == keys[0]


def test_the_key_changes_with_the_code(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    before = {recipe: recipe_key(RECIPES[recipe]) for recipe in RECIPES}
    monkeypatch.setattr(store, "code_fingerprint", lambda *uses: asked.append(uses[0]) or "other")
    assert all(recipe_key(RECIPES[recipe]) != key for recipe, key in before.items())
    recipe_key(replace(FINETUNE, start=S2D))  # a plain fine-tuning of a checkpoint that S2D made
    recipe_key(FINETUNE)
    assert asked == [False, False, True, True, True, False]


def imported_by(path: Path, package: Path) -> set[Path]:
    """Files of the package that a file imports, directly or through others."""
    found: set[Path] = set()
    waiting = [path]
    while waiting:
        for node in ast.walk(ast.parse(waiting.pop().read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("s2d"):
                module = package.joinpath(*node.module.split(".")[1:])
                candidates = [module.with_suffix(".py"), *((module / f"{a.name}.py") for a in node.names)]
                new = {c for c in candidates if c.is_file()} - found
                found |= new
                waiting += new
    return found


def test_the_code_that_counts_is_what_training_imports() -> None:
    package = Path(s2d.__file__).parent
    imported = {p.relative_to(package).as_posix() for p in imported_by(package / "lab" / "training.py", package)}
    # How tensors are written decides neither weights nor history.
    assert imported | {"lab/training.py"} == {*store.TRAINING_CODE, *store.S2D_CODE, "lab/files.py"}
    assert not set(store.TRAINING_CODE) & set(store.S2D_CODE)


def test_the_fingerprint_changes_with_each_file_that_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    original = store._code_only
    package = Path(s2d.__file__).parent
    plain, with_s2d = (store.code_fingerprint.__wrapped__(flag) for flag in (False, True))
    assert plain != with_s2d
    changed = {}
    texts = {path: original(path) for path in package.rglob("*.py")}
    for path in texts:
        name = path.relative_to(package).as_posix()
        monkeypatch.setattr(store, "_code_only", lambda p, path=path: texts[p] + ("\nx = 1" if p == path else ""))
        now = [store.code_fingerprint.__wrapped__(flag) for flag in (False, True)]
        changed[name] = (now[0] != plain, now[1] != with_s2d)
    assert {name for name, (first, _) in changed.items() if first} == set(store.TRAINING_CODE)
    assert {name for name, (_, second) in changed.items() if second} == {*store.TRAINING_CODE, *store.S2D_CODE}


def test_the_other_optimizers_code_counts_for_their_recipes_and_what_starts_from_them(monkeypatch) -> None:
    eps = replace(TINY, optimizer=LessAdaptive("adamw", eps=1e-3))
    recipes = [TINY, eps, replace(FINETUNE, start=eps)]
    before = [recipe_key(recipe) for recipe in recipes]
    original = store._code_only
    monkeypatch.setattr(store, "_code_only", lambda p: original(p) + ("\nx = 1" if p.name == "optimizers.py" else ""))
    store.code_fingerprint.cache_clear()
    now = [recipe_key(recipe) for recipe in recipes]
    store.code_fingerprint.cache_clear()
    assert [a == b for a, b in zip(before, now, strict=True)] == [True, False, False]


SOURCE = '''"""A module."""

from math import pi  # a constant

TEXT = "# not a comment"


class Shape:
    """A class.

    With a longer docstring.
    """

    sides = 4  # of a square

    def area(self, r):
        """A method."""
        return pi * r**2


async def wait():
    return 1
'''


@pytest.fixture
def code_only(tmp_path: Path):
    def apply(source: str) -> str:
        path = tmp_path / "module.py"
        path.write_text(source, encoding="utf-8")
        return store._code_only(path)

    return apply


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("  # a constant", ""),
        ("# of a square", "# of a rectangle, not necessarily a square"),
        ('"""A module."""', '"""Another module,\n\nwith more to say."""'),
        ('"""A module."""\n', ""),
        ("    With a longer docstring.\n", ""),
        ('        """A method."""\n', ""),
        ('        """A method."""\n', "        '''Another.'''\n        # and a comment\n"),
        ("\n\nclass", "\n\n\n# a heading\n\nclass"),
        ("    sides = 4", "\n    sides = 4"),
        ("pi * r**2", "pi * r**2   "),
    ],
)
def test_comments_docstrings_and_blank_lines_do_not_count(code_only, old: str, new: str) -> None:
    assert SOURCE.count(old) >= 1
    assert code_only(SOURCE.replace(old, new, 1)) == code_only(SOURCE)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ('"# not a comment"', '"# another text"'),
        ("sides = 4", "sides = 5"),
        ("r**2", "r**3"),
        ("return pi", "return 2 * pi"),
        ("class Shape", "class Form"),
        ("        return pi", "        if r > 0:\n            return pi"),
        ("return 1", "return 2"),
        ("async def", "def"),
    ],
)
def test_code_counts(code_only, old: str, new: str) -> None:
    assert SOURCE.count(old) == 1
    assert code_only(SOURCE.replace(old, new)) != code_only(SOURCE)


@pytest.mark.parametrize(
    ("one", "two"),
    [
        ('def f(a=1): "Doc."\n', 'def f(a=2): "Doc."\n'),
        ('class A(int): "Doc."\n', 'class A(str): "Doc."\n'),
        ('"""Doc."""; x = 1\n', '"""Doc."""; x = 2\n'),
        ('def f():\n    """Doc."""; return 1\n', 'def f():\n    """Doc."""; return 2\n'),
        ('x = """a\n\nb"""\n', 'x = """a\nb"""\n'),
        ('x = """a  \nb"""\n', 'x = """a\nb"""\n'),
        ("x = 1\nif x:\n    y = 2\n    z = 3\n", "x = 1\nif x:\n    y = 2\nz = 3\n"),
    ],
)
def test_code_beside_a_docstring_and_text_over_lines_count(code_only, one: str, two: str) -> None:
    assert code_only(one) != code_only(two)


# --- the store ---


def test_round_trip(folder: Path, results: dict) -> None:
    assert find(TINY) is None
    store._train_and_store(TINY)
    trained = find(TINY)
    assert trained.recipe == TINY
    assert same(dict(sorted(trained.weights.items())), dict(sorted(results["adamw"][0].items())))
    assert trained.history == results["adamw"][1]
    assert [path.suffix for path in folder.iterdir()] == [".safetensors"]  # nothing left over
    assert (folder / store._file_name(TINY)).exists()


def test_a_trained_checkpoint_as_a_model(entry: Path) -> None:
    trained = find(TINY)
    model = trained.model()
    assert not any(module.training for module in model.modules())
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert all(torch.equal(tensor, trained.weights[name].float()) for name, tensor in model.state_dict().items())
    with torch.no_grad():
        model.head.weight.zero_()
    assert trained.model().head.weight.abs().sum() > 0  # a fresh one each time
    assert trained.seed == 0 and Trained(replace(FINETUNE, start=replace(TINY, seed=3)), {}, []).seed == 3


def test_what_is_missing_is_none(entry: Path) -> None:
    assert find(TINY) is not None
    assert find(SGD) is None
    assert find(replace(TINY, seed=1)) is None


def test_an_entry_made_by_other_code_is_not_found(entry: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store, "code_fingerprint", lambda *uses: "other")
    assert find(TINY) is None


@pytest.mark.parametrize("keep", [0, 4, 8, 9, 300, 0.5, -1])
def test_a_truncated_entry_is_named(entry: Path, keep: float) -> None:
    content = entry.read_bytes()
    entry.write_bytes(content[: int(keep * len(content)) if keep == 0.5 else keep])
    with pytest.raises(ValueError, match=f"{entry.name} is truncated or not a checkpoint.*delete it"):
        find(TINY)


def test_an_entry_with_something_appended_is_named(entry: Path) -> None:
    entry.write_bytes(entry.read_bytes() + b"\0")
    with pytest.raises(ValueError, match=entry.name):
        find(TINY)


def test_an_entry_of_another_program_is_named(entry: Path) -> None:
    from safetensors.torch import save_file

    for metadata in (None, {"other": "{}"}, {"s2d": "{"}):
        save_file(dict(find_weights(entry)) if metadata is None else {"x": torch.ones(1)}, entry, metadata=metadata)
        with pytest.raises(ValueError, match=f"{entry.name} is truncated or not a checkpoint"):
            find(TINY)
        with pytest.raises(ValueError, match=entry.name):
            obtain([TINY])


def find_weights(path: Path) -> dict[str, Tensor]:
    return read_tensors(path)[0]


def test_flipped_weight_bits_are_noticed(entry: Path) -> None:
    content = bytearray(entry.read_bytes())
    start = 8 + int.from_bytes(content[:8], "little")
    for position in (start, (start + len(content)) // 2, len(content) - 1):
        flipped = content.copy()
        flipped[position] ^= 1
        entry.write_bytes(flipped)
        with pytest.raises(ValueError, match=f"{entry.name} is damaged"):
            find(TINY)


def test_no_flipped_bit_changes_a_result(entry: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Anywhere in the header: either an error that names the file, or exactly the result that was stored."""
    content = bytearray(entry.read_bytes())
    expected = find(TINY)
    header = 8 + int.from_bytes(content[:8], "little")
    model = TINY.model.build(0)
    monkeypatch.setattr(DigitsViT, "build", lambda self, seed: model)  # building it each time takes most of the time
    silent = []
    for position in [*range(8), *range(8, header, 7)]:
        flipped = content.copy()
        flipped[position] ^= 1 << position % 7
        entry.write_bytes(flipped)
        try:
            found = find(TINY)
        except ValueError as error:
            assert entry.name in str(error)
            continue
        if found.history != expected.history or not same(found.weights, expected.weights) or found.recipe != TINY:
            silent.append(position)
    assert not silent, (
        f"{len(silent)} flips gave another result silently, such as {bytes(content[silent[0] - 40 :][:60])}"
    )


def test_an_entry_of_another_recipe_under_the_right_name(entry: Path) -> None:
    other_recipe = replace(TINY, seed=1)
    copied = Path(shutil.copy(entry, entry.with_name(store._file_name(other_recipe))))
    with pytest.raises(ValueError, match=f"{copied.name} holds the result of another recipe.*delete it"):
        find(other_recipe)
    assert find(TINY) is not None


def test_an_entry_of_the_right_key_but_another_recipe(entry: Path) -> None:
    weights, metadata = read_tensors(entry)
    write_tensors(entry, weights, metadata | {"recipe": replace(TINY, seed=1).as_dict()})
    with pytest.raises(ValueError, match=f"{entry.name} holds the result of another recipe"):
        find(TINY)


def test_an_entry_of_the_right_recipe_but_other_code(entry: Path) -> None:
    weights, metadata = read_tensors(entry)
    write_tensors(entry, weights, metadata | {"key": "0" * 16})
    with pytest.raises(ValueError, match=f"{entry.name} holds the result of another recipe"):
        find(TINY)


def test_an_entry_of_another_architecture(entry: Path) -> None:
    weights, metadata = read_tensors(entry)
    wider = {n: t.half() for n, t in replace(TINY.model, width=32).build(0).state_dict().items()}
    fewer = {n: t for n, t in weights.items() if n != "head.bias"}
    for changed in (wider, fewer):
        write_tensors(entry, changed, metadata | {"checksum": store._checksum(changed)})
        with pytest.raises(ValueError, match=f"{entry.name} is of another architecture.*delete it"):
            find(TINY)


def test_the_checksum_sees_names_shapes_types_and_values() -> None:
    weights = {"a": torch.arange(6.0).half().view(2, 3), "b": torch.tensor(1.0).half()}
    variants = [
        weights,
        weights | {"a": weights["a"].view(3, 2)},
        weights | {"a": weights["a"].view(torch.bfloat16)},
        weights | {"b": torch.tensor(2.0).half()},
        {"a": weights["a"], "c": weights["b"]},
        {"a": weights["a"]},
        weights | {"a": weights["a"].flip(0)},
    ]
    assert len({store._checksum(v) for v in variants}) == len(variants)
    assert store._checksum(dict(reversed(weights.items()))) == store._checksum(weights)
    assert store._checksum(weights | {"a": weights["a"].T.contiguous().T}) == store._checksum(weights)


def test_a_failed_run_leaves_no_entry(folder: Path, results: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store, "train", lambda *a, **k: (_ for _ in ()).throw(ValueError("the loss is nan")))
    with pytest.raises(ValueError, match="the loss is nan"):
        store._train_and_store(TINY)
    assert not folder.exists() or list(folder.iterdir()) == []
    monkeypatch.undo()


def test_an_interrupted_entry_leaves_only_its_partial_file(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store, "train", lambda *a, **k: train(*a, **k | {"save_every": 2}))
    with pytest.raises(KeyboardInterrupt):
        store._train_and_store(TINY, interrupting(4))
    (left,) = folder.iterdir()
    assert left.name == store._file_name(TINY).replace(".safetensors", ".partial")
    assert find(TINY) is None
    store._train_and_store(TINY)
    assert [path.name for path in folder.iterdir()] == [store._file_name(TINY)]


def test_a_finetuning_needs_its_start(folder: Path) -> None:
    with pytest.raises(ValueError, match="the checkpoint to fine-tune is not in the store: pretrain-adamw-seed0-"):
        store._train_and_store(FINETUNE)


def test_file_names_say_what_they_hold() -> None:
    assert store._file_name(SGD) == f"pretrain-sgd-seed0-{recipe_key(SGD)}.safetensors"
    recipe = replace(FINETUNE, s2d={"lam": 0.1})
    assert store._file_name(recipe) == f"finetune-adamw-s2d-seed7-{recipe_key(recipe)}.safetensors"


def test_starts_come_first_and_each_recipe_once() -> None:
    second = replace(FINETUNE, seed=8)
    deep = replace(FINETUNE, seed=9, start=FINETUNE)
    assert store._with_starts([deep, second, SGD, TINY, deep]) == [TINY, FINETUNE, deep, second, SGD]


def test_s2d_store_hides_the_committed_entries(stored: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("S2D_STORE", raising=False)
    monkeypatch.setattr(store, "repository_root", lambda: tmp_path)
    assert store.store_folders() == [tmp_path / "build" / "store", tmp_path / "data" / "laptop" / "checkpoints"]
    assert find(TINY) is None
    store.committed_folder().mkdir(parents=True)
    shutil.copy(stored, store.committed_folder())
    assert find(TINY) is not None
    monkeypatch.setenv("S2D_STORE", str(tmp_path / "mine"))
    assert store.store_folders() == [tmp_path / "mine"]
    assert find(TINY) is None
    # What was trained here wins over what is committed.
    monkeypatch.delenv("S2D_STORE")
    own = tmp_path / "build" / "store" / stored.name
    own.parent.mkdir(parents=True)
    own.write_bytes(b"")
    with pytest.raises(ValueError, match="build.*store"):
        find(TINY)


def test_publish_makes_the_committed_folder_exact(
    stored: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("S2D_STORE", raising=False)
    monkeypatch.setattr(store, "repository_root", lambda: tmp_path)
    with pytest.raises(ValueError, match=f"{stored.stem}.safetensors is not in the store: train it first"):
        publish([TINY])
    own = tmp_path / "build" / "store"
    own.mkdir(parents=True)
    shutil.copy(stored, own)
    committed = store.committed_folder()
    committed.mkdir(parents=True)
    (committed / "pretrain-adamw-seed0-old.safetensors").write_bytes(b"old")
    for _ in range(2):
        assert publish([TINY, TINY]) == [committed / stored.name]
        assert [path.name for path in committed.iterdir()] == [stored.name]
        assert (committed / stored.name).read_bytes() == stored.read_bytes()
    # A damaged entry is not published, and what is committed stays.
    (own / stored.name).write_bytes(stored.read_bytes()[:-1])
    with pytest.raises(ValueError, match="truncated"):
        publish([TINY])
    assert (committed / stored.name).read_bytes() == stored.read_bytes()


# --- obtain: processes, so only what needs them ---


def test_obtain_trains_what_is_missing_and_only_that(
    folder: Path, results: dict, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = [replace(FINETUNE, s2d=S2D.s2d), SGD, FINETUNE, SGD]
    got = obtain(wanted, workers=1)
    assert [trained.recipe for trained in got] == wanted
    assert sorted(path.name for path in folder.iterdir()) == sorted(
        store._file_name(recipe) for recipe in (TINY, *wanted[:3])
    )
    # Trained in another process: the same as here, up to how this process and that one round (threads, alignment).
    assert_close(got[1].weights, results["sgd"][0])
    expected, history = train(FINETUNE, results["adamw"][0])
    assert_close(got[2].weights, expected)
    assert [list(row) for row in got[2].history] == [list(row) for row in history]
    for row, wanted_row in zip(got[2].history, history, strict=True):
        assert row == pytest.approx(wanted_row, rel=1e-2)

    before = {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
    monkeypatch.setattr(store, "_train_all", lambda *a: pytest.fail("trained again"))
    monkeypatch.setattr(store, "train", lambda *a, **k: pytest.fail("trained again"))
    again = obtain(wanted[::-1])
    assert [trained.recipe for trained in again] == wanted[::-1]
    assert all(same(a.weights, b.weights) and a.history == b.history for a, b in zip(again, got[::-1], strict=True))
    assert {path.name: path.stat().st_mtime_ns for path in folder.iterdir()} == before
    assert obtain([]) == []


def test_obtain_passes_on_the_error_of_a_worker(folder: Path) -> None:
    wild = replace(TINY, optimizer=Optimizer("sgd", lr=1e30), measure_every=1)
    with pytest.raises(ValueError, match=r"lower lr=1e\+30"):
        obtain([wild], workers=1)
    assert not folder.exists() or not list(folder.glob("*.safetensors"))


def test_obtain_asks_for_what_is_missing_only(entry: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr(store, "_train_all", lambda missing, workers: asked.append(missing))
    assert [t.recipe if t else None for t in obtain([FINETUNE, TINY, SGD])] == [None, TINY, None]
    assert asked == [[FINETUNE, SGD]]


@pytest.mark.parametrize(("workers", "environment", "expected"), [(3, "5", 3), (None, "5", 5), (None, None, None)])
def test_number_of_workers(
    workers: int | None, environment: str | None, expected: int | None, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import os

    asked = []
    monkeypatch.setattr(store, "_train_all", lambda missing, workers: asked.append((missing, workers)))
    monkeypatch.delenv("S2D_WORKERS", raising=False)
    if environment is not None:
        monkeypatch.setenv("S2D_WORKERS", environment)
    obtain([FINETUNE], workers=workers)
    assert asked == [([TINY, FINETUNE], expected or os.cpu_count())]
    obtain([replace(TINY, device="cuda")], workers=4)  # runs on one accelerator follow each other
    assert asked[1][1] == 1


# --- files ---


def test_tensors_round_trip_with_their_description(tmp_path: Path) -> None:
    path = tmp_path / "new" / "file.safetensors"
    tensors = {
        "a": torch.arange(6.0).view(2, 3).T,
        "b": torch.tensor(3, dtype=torch.int64),
        "c": torch.ones(2).bfloat16(),
    }
    metadata = {"text": "ü", "number": 1.5, "list": [1, {"x": None}]}
    write_tensors(path, tensors, metadata)
    loaded, described = read_tensors(path)
    assert described == metadata and set(loaded) == set(tensors)
    assert all(torch.equal(loaded[n], t) and loaded[n].dtype == t.dtype for n, t in tensors.items())
    first = path.read_bytes()
    write_tensors(path, tensors, dict(reversed(metadata.items())))
    assert path.read_bytes() == first
    assert list(path.parent.iterdir()) == [path]


def test_a_missing_file_is_not_a_damaged_one(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no checkpoint at .*nothing.safetensors"):
        read_tensors(tmp_path / "nothing.safetensors")


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("existing", [None, b"old"])
def test_a_failed_write_leaves_the_old_file(tmp_path: Path, existing: bytes | None, error: type) -> None:
    path = tmp_path / "table.csv"
    if existing is not None:
        path.write_bytes(existing)

    def write(temporary: Path) -> None:
        assert temporary.parent == tmp_path and temporary.suffix == ".csv" and temporary != path
        temporary.write_bytes(b"half")
        raise error

    with pytest.raises(error):
        write_atomically(path, write)
    assert [(p.name, p.read_bytes()) for p in tmp_path.iterdir()] == ([("table.csv", b"old")] if existing else [])


def test_a_written_file_has_ordinary_permissions(tmp_path: Path) -> None:
    (tmp_path / "ordinary").write_bytes(b"")
    write_atomically(tmp_path / "atomic", lambda temporary: temporary.write_bytes(b"x"))
    assert (tmp_path / "atomic").stat().st_mode == (tmp_path / "ordinary").stat().st_mode


def test_obtain_checkpoints_asks_once_and_keeps_variants_apart(monkeypatch):
    calls = []

    def fake(recipes):
        calls.append(list(recipes))
        return [f"result of seed {recipe.seed}" for recipe in recipes]

    monkeypatch.setattr(store, "obtain", fake)
    recipes = {"a": [replace(TINY, seed=1), replace(TINY, seed=2)], "b": [replace(TINY, seed=3)]}
    assert store.obtain_checkpoints(recipes) == {
        "a": ["result of seed 1", "result of seed 2"],
        "b": ["result of seed 3"],
    }
    assert len(calls) == 1
