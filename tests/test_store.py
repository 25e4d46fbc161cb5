"""Training that can be interrupted, and the store that keeps what was trained: nothing is ever substituted silently."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from s2d.lab import ledger, store
from s2d.lab.data import ClutteredDigits
from s2d.lab.files import read_tensors, write_tensors
from s2d.lab.identity import code_hash, kind, recipe_key
from s2d.lab.ledger import Line
from s2d.lab.models import DigitsViT
from s2d.lab.qat import FakeQuantization
from s2d.lab.store import Trained, checksum, file_name, find, obtain, train_and_store, write_entry
from s2d.lab.training import Optimizer, Recipe, accuracy, learning_rate, train

TINY = Recipe(
    seed=0,
    steps=6,
    warmup=2,
    batch_size=8,
    data=ClutteredDigits(canvas=12),
    model=DigitsViT(image_size=12, patch_size=4, width=16, depth=1, heads=2),
    measure_every=4,
)
SGD = replace(TINY, optimizer=Optimizer("sgd", lr=0.05, weight_decay=0.01, clip=1.0))
# Refreshed at steps 0 and 3: a run resumed in between needs the triplets it was interrupted with.
S2D = replace(TINY, s2d={"lam": 0.1, "k_max": 3, "tau": 0.5, "refresh_every": 3})
S2D_LIVE = replace(SGD, s2d={"lam": 0.1, "k_max": 2, "criterion": "all", "coefficients": "live", "refresh_every": 4})
RECIPES = {"adamw": TINY, "sgd": SGD, "s2d": S2D, "s2d-live": S2D_LIVE}
FINETUNE = replace(TINY, seed=7, steps=3, start=TINY)
QAT = replace(FINETUNE, seed=8, steps=6, prepare=FakeQuantization(w_bits=3, a_bits=3, calibration_images=16))


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
        train_and_store(TINY)
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
    assert found.keys() == expected.keys()
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
        ({"data": ClutteredDigits(canvas=24)}, r"items of the shape \(1, 24, 24\) and .* takes \(1, 12, 12\)"),
        ({"start": replace(TINY, model=replace(TINY.model, width=32))}, "cannot fine-tune .*width=32.* as .*width=16"),
        ({"start": QAT}, "cannot start from a model prepared by FakeQuantization.*start from what that began with"),
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
    assert rates == pytest.approx([0.25, 0.5, 0.75] + [1.0] * 8 + [tenths / 10 for tenths in range(9, 0, -1)])
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


def test_an_interrupted_run_of_a_prepared_model_ends_as_if_it_had_not_been(results: dict, tmp_path: Path) -> None:
    start, partial = results["adamw"][0], tmp_path / "run.partial"
    weights, history = train(QAT, start)
    with pytest.raises(KeyboardInterrupt):
        train(QAT, start, partial=partial, save_every=2, progress=interrupting(4))
    assert read_tensors(partial)[1]["step"] == 2
    resumed, again = train(QAT, start, partial=partial, save_every=2)
    assert same(resumed, weights) and again == history
    assert weights.keys() > start.keys()  # the grids of the quantizers are trained weights' neighbours
    assert not same({name: weights[name] for name in start}, start)


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


# --- the store ---


def test_round_trip(folder: Path, results: dict) -> None:
    assert find(TINY) is None
    train_and_store(TINY)
    trained = find(TINY)
    assert trained.recipe == TINY
    assert same(dict(sorted(trained.weights.items())), dict(sorted(results["adamw"][0].items())))
    assert trained.history == results["adamw"][1]
    assert [path.suffix for path in folder.iterdir()] == [".safetensors"]  # nothing left over
    assert (folder / file_name(TINY)).exists()


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


def test_a_prepared_model_comes_back_without_its_start(folder: Path, results: dict, monkeypatch) -> None:
    weights, history = train(QAT, results["adamw"][0])
    write_entry(
        folder / file_name(QAT), QAT, weights, history, [(kind(TINY), code_hash(TINY)), (kind(QAT), code_hash(QAT))]
    )
    with monkeypatch.context() as patch:  # to look at an entry builds and calibrates nothing
        patch.setattr(DigitsViT, "build", lambda *a: pytest.fail("built"))
        trained = find(QAT)
    trained_model = QAT.prepare.apply(Trained(TINY, *results["adamw"]).model(), QAT.data)
    trained_model.load_state_dict({name: tensor.float() for name, tensor in weights.items()})
    images, labels = QAT.data.fixed_set("test", 64)
    with torch.no_grad():
        assert torch.equal(trained.model()(images), trained_model.eval()(images))
    assert trained.seed == 0 and trained.history[-1] == history[-1]


def test_weights_that_do_not_fit_todays_model_are_an_error(results: dict) -> None:
    fewer = {name: tensor for name, tensor in results["adamw"][0].items() if name != "head.bias"}
    with pytest.raises(ValueError, match=r"another architecture than DigitsViT\(.*head.bias"):
        Trained(TINY, fewer, []).model()


def test_what_is_missing_is_none(entry: Path) -> None:
    assert find(TINY) is not None
    assert find(SGD) is None
    assert find(replace(TINY, seed=1)) is None


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
        save_file(read_tensors(entry)[0] if metadata is None else {"x": torch.ones(1)}, entry, metadata=metadata)
        with pytest.raises(ValueError, match=f"{entry.name} is truncated or not a checkpoint"):
            find(TINY)
        with pytest.raises(ValueError, match=entry.name):
            obtain([TINY])
        write_tensors(entry, {"x": torch.ones(1)}, {})


def rewritten(entry: Path, weights: dict[str, Tensor] | None = None, **changed) -> None:
    """Write an entry anew with other contents and a checksum that agrees with them."""
    found, said = read_tensors(entry)
    weights = found if weights is None else weights
    said = {name: value for name, value in (said | changed).items() if name != "checksum"}
    write_tensors(entry, weights, said | {"checksum": checksum(weights, said)})


@pytest.mark.parametrize("schema", [None, 1, 3, "2"])
def test_an_entry_of_another_schema_is_named(entry: Path, schema) -> None:
    rewritten(entry, schema=schema)
    with pytest.raises(ValueError, match=f"{entry.name} has schema {schema} and this code reads 2: delete it.*fetch"):
        find(TINY)
    write_tensors(entry, {"x": torch.ones(1)}, [])
    with pytest.raises(ValueError, match=f"{entry.name} has schema None"):
        find(TINY)


def test_flipped_weight_bits_are_noticed(entry: Path) -> None:
    content = bytearray(entry.read_bytes())
    start = 8 + int.from_bytes(content[:8], "little")
    for position in (start, (start + len(content)) // 2, len(content) - 1):
        flipped = content.copy()
        flipped[position] ^= 1
        entry.write_bytes(flipped)
        with pytest.raises(ValueError, match=f"{entry.name} is damaged"):
            find(TINY)


def test_no_flipped_bit_changes_a_result(entry: Path) -> None:
    """Anywhere in the header: either an error that names the file, or exactly the result that was stored."""
    content = bytearray(entry.read_bytes())
    expected = find(TINY)
    header = 8 + int.from_bytes(content[:8], "little")
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
        if (
            found.history != expected.history
            or not same(found.weights, expected.weights)
            or found.code != expected.code
        ):
            silent.append(position)
    assert not silent, (
        f"{len(silent)} flips gave another result silently, such as {bytes(content[silent[0] - 40 :][:60])}"
    )


def test_an_entry_of_another_recipe_under_the_right_name(entry: Path) -> None:
    other_recipe = replace(TINY, seed=1)
    copied = Path(shutil.copy(entry, entry.with_name(file_name(other_recipe))))
    with pytest.raises(ValueError, match=f"{copied.name} holds the result of another recipe.*delete it"):
        find(other_recipe)
    assert find(TINY) is not None


def test_an_entry_whose_header_contradicts_itself_or_its_name(entry: Path) -> None:
    content = entry.read_bytes()
    for changed in ({"recipe": {}}, {"key": "0" * 16}):
        rewritten(entry, **changed)
        with pytest.raises(ValueError, match=f"{entry.name} holds the result of another recipe"):
            find(TINY)
        entry.write_bytes(content)


def test_an_entry_with_other_shapes_or_without_finite_weights(entry: Path) -> None:
    content = entry.read_bytes()
    weights = read_tensors(entry)[0]
    broken = {name: tensor.clone() for name, tensor in weights.items()}
    broken["head.bias"][3] = torch.nan
    fewer = {name: tensor for name, tensor in weights.items() if name != "head.bias"}
    for changed in (broken, fewer, weights | {"head.bias": torch.zeros(11).half()}):
        rewritten(entry, changed)
        with pytest.raises(
            ValueError, match=f"{entry.name} holds weights of another shape .* or .* not finite: delete it"
        ):
            find(TINY)
        entry.write_bytes(content)


# --- the code that made an entry ---


@pytest.fixture
def book(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A ledger of its own, empty."""
    path = tmp_path / "ledger.csv"
    monkeypatch.setattr(ledger, "ledger_path", lambda: path)
    return path


def line(old: str, new: str, of: Recipe = TINY) -> Line:
    return Line(kind(of), old, new, "c0ffee", 50, "", torch.__version__, "AVX2")


def test_an_entry_made_by_other_code_needs_a_chain_in_the_ledger(entry: Path, book: Path, monkeypatch) -> None:
    rewritten(entry, code=[[kind(TINY), "a" * 16]])
    refusal = (
        f"{entry.name}: its pretraining .* other code .{'a' * 16}; today's is {code_hash(TINY)}.*make replay AGAINST"
    )
    with pytest.raises(ValueError, match=refusal):
        find(TINY)
    ledger.append_lines([line("a" * 16, "b" * 16), line(code_hash(TINY), "b" * 16, SGD)])
    with pytest.raises(ValueError, match=refusal):  # the second line is of another kind
        find(TINY)
    monkeypatch.setenv("S2D_ANY_CODE", "1")
    assert find(TINY).code == ((kind(TINY), "a" * 16),)
    monkeypatch.delenv("S2D_ANY_CODE")
    ledger.append_lines([line(code_hash(TINY), "b" * 16)])  # equality has no direction
    assert find(TINY) is not None


def test_an_entry_of_another_kind_than_its_recipe_is_refused(entry: Path, book: Path) -> None:
    rewritten(entry, code=[[kind(SGD), code_hash(SGD)]])
    with pytest.raises(ValueError, match=f"{entry.name}: its pretraining"):
        find(TINY)


def test_the_code_of_every_ancestor_counts(entry: Path, book: Path) -> None:
    rewritten(entry, code=[[kind(TINY), "a" * 16]])
    ledger.append_lines([line("a" * 16, code_hash(TINY))])
    train_and_store(FINETUNE)
    assert find(FINETUNE).code == ((kind(TINY), "a" * 16), (kind(FINETUNE), code_hash(FINETUNE)))
    book.unlink()
    with pytest.raises(ValueError, match="finetune.*: its pretraining .* was trained by other code"):
        find(FINETUNE)


def test_an_unfinished_run_is_not_continued_by_other_code(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store, "train", lambda *a, **k: train(*a, **k | {"save_every": 2}))
    with pytest.raises(KeyboardInterrupt):
        train_and_store(TINY, interrupting(4))
    monkeypatch.setattr(store, "code_hash", lambda recipe: "f" * 16)
    done: list[int] = []
    train_and_store(TINY, done.append)
    assert done == [1] * 6


def test_the_checksum_sees_names_shapes_types_values_and_what_is_said() -> None:
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
    assert len({checksum(v, {}) for v in variants}) == len(variants)
    assert checksum(dict(reversed(weights.items())), {"x": 1, "y": 2}) == checksum(weights, {"y": 2, "x": 1})
    assert checksum(weights | {"a": weights["a"].T.contiguous().T}, {}) == checksum(weights, {})
    assert checksum(weights, {"x": 1}) != checksum(weights, {"x": 2})


def test_a_failed_run_leaves_no_entry(folder: Path, results: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store, "train", lambda *a, **k: (_ for _ in ()).throw(ValueError("the loss is nan")))
    with pytest.raises(ValueError, match="the loss is nan"):
        train_and_store(TINY)
    assert not folder.exists() or list(folder.iterdir()) == []
    monkeypatch.undo()


def test_an_interrupted_entry_leaves_only_its_partial_file(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store, "train", lambda *a, **k: train(*a, **k | {"save_every": 2}))
    with pytest.raises(KeyboardInterrupt):
        train_and_store(TINY, interrupting(4))
    (left,) = folder.iterdir()
    assert left.name == file_name(TINY).replace(".safetensors", f"-{code_hash(TINY)}.partial")
    assert find(TINY) is None
    train_and_store(TINY)
    assert [path.name for path in folder.iterdir()] == [file_name(TINY)]


def test_a_finetuning_needs_its_start(folder: Path) -> None:
    with pytest.raises(ValueError, match="the checkpoint to fine-tune is not in the store: pretrain-adamw-seed0-"):
        train_and_store(FINETUNE)


def test_file_names_say_what_they_hold() -> None:
    assert file_name(QAT) == f"qat-adamw-seed8-{recipe_key(QAT)}.safetensors"
    assert file_name(SGD) == f"pretrain-sgd-seed0-{recipe_key(SGD)}.safetensors"
    recipe = replace(FINETUNE, s2d={"lam": 0.1})
    assert file_name(recipe) == f"finetune-adamw-s2d-seed7-{recipe_key(recipe)}.safetensors"


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


# --- obtain: processes, so only what needs them ---


def test_obtain_trains_what_is_missing_and_only_that(
    folder: Path, results: dict, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = [replace(FINETUNE, s2d=S2D.s2d), SGD, FINETUNE, SGD]
    got = obtain(wanted, workers=1)
    assert [trained.recipe for trained in got] == wanted
    assert sorted(path.name for path in folder.iterdir()) == sorted(file_name(recipe) for recipe in (TINY, *wanted[:3]))
    # Trained in another process: the same as here, up to how this process and that one round (threads, alignment).
    assert_close(got[1].weights, results["sgd"][0])
    expected, history = train(FINETUNE, results["adamw"][0])
    assert_close(got[2].weights, expected)
    assert [row.keys() for row in got[2].history] == [row.keys() for row in history]
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


def test_obtain_asks_for_what_is_missing_only_starts_first(entry: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr(store, "_train_all", lambda missing, workers: asked.append(missing))
    assert [t.recipe if t else None for t in obtain([FINETUNE, TINY, SGD])] == [None, TINY, None]
    assert asked == [[FINETUNE, SGD]]
    entry.unlink()
    second, deep = replace(FINETUNE, seed=9), replace(FINETUNE, seed=10, start=FINETUNE)
    obtain([deep, second, SGD, TINY, deep])
    assert asked[1] == [TINY, FINETUNE, deep, second, SGD]


def test_a_start_is_not_asked_for_where_the_result_is_there(entry: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    train_and_store(FINETUNE)
    entry.unlink()
    monkeypatch.setattr(store, "_train_all", lambda *a: pytest.fail("trained again"))
    assert obtain([FINETUNE])[0].seed == 0


def test_a_start_that_cannot_be_used_is_reported_before_anything_is_trained(entry: Path, monkeypatch) -> None:
    entry.write_bytes(entry.read_bytes()[:-1])
    monkeypatch.setattr(store, "_train_all", lambda *a: pytest.fail("trained"))
    with pytest.raises(ValueError, match=f"{entry.name} is truncated"):
        obtain([FINETUNE, SGD])


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
