"""What names a stored result: every part of the recipe and the versions, and what counts as its code."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest

from s2d.lab import identity
from s2d.lab.data import ClutteredDigits
from s2d.lab.dependencies import PACKAGE
from s2d.lab.identity import (
    VERSIONS,
    code_files,
    code_hash,
    components,
    describe,
    kind,
    rebuild,
    recipe_key,
    versions,
)
from s2d.lab.models import DigitsViT
from s2d.lab.optimizers import Capped, LessAdaptive, Orthogonal, RotatedBasis
from s2d.lab.qat import FakeQuantization
from s2d.lab.recipes import laptop_recipes
from s2d.lab.training import Optimizer, Recipe

TINY = Recipe(
    seed=0,
    steps=6,
    warmup=2,
    batch_size=8,
    data=ClutteredDigits(canvas=12),
    model=DigitsViT(image_size=12, patch_size=4, width=16, depth=1, heads=2),
    measure_every=4,
)
SGD = replace(TINY, optimizer=Optimizer("sgd", lr=0.05))
FINETUNE = replace(TINY, seed=7, steps=3, start=TINY)
S2D = replace(FINETUNE, s2d={"lam": 0.1, "criterion": "all", "k_max": None, "coupling": "decoupled"})
QAT = replace(FINETUNE, prepare=FakeQuantization(3, 3))
CLASSES = {
    c.__name__: c for c in (Recipe, Optimizer, Capped, LessAdaptive, DigitsViT, ClutteredDigits, FakeQuantization)
}


# --- the recipe ---


@pytest.mark.parametrize("recipe", [TINY, S2D, QAT, replace(FINETUNE, optimizer=Capped(cap=2.0))])
def test_a_recipe_is_plain_json_and_comes_back(recipe: Recipe) -> None:
    described = json.loads(json.dumps(describe(recipe)))
    assert described == describe(recipe)
    assert described["class"] == "Recipe" and described["optimizer"]["class"] == type(recipe.optimizer).__name__
    assert rebuild(described, CLASSES) == recipe


def test_what_this_code_cannot_rebuild_is_named() -> None:
    described = describe(TINY)
    with pytest.raises(ValueError, match="knows no Lion: it knows .*Optimizer"):
        rebuild(described | {"optimizer": {"class": "Lion"}}, CLASSES)
    with pytest.raises(ValueError, match="Recipe has other fields .*label_smoothing"):
        rebuild(described | {"label_smoothing": 0.1}, CLASSES)


def other(value):
    """Some other value of the same kind."""
    if isinstance(value, (int, float)):
        return value + 1
    if isinstance(value, tuple):
        return (*value[:-1], other(value[-1]))
    raise AssertionError(f"say in OTHERS how {value!r} changes")


OTHERS = {
    "optimizer": [
        Optimizer("sgd"),
        *(kind_of() for kind_of in (LessAdaptive, RotatedBasis, Orthogonal, Capped)),
        *(
            replace(TINY.optimizer, **{f.name: other(getattr(TINY.optimizer, f.name))})
            for f in dataclasses.fields(Optimizer)
            if f.name != "name"
        ),
    ],
    "data": [ClutteredDigits(canvas=12, fragments=5), ClutteredDigits(canvas=12, fragment_size=4)],
    "model": [replace(TINY.model, **{f: v}) for f, v in (("patch_size", 8), ("width", 32), ("depth", 2), ("heads", 4))],
    "start": [SGD, TINY, replace(TINY, seed=5), replace(FINETUNE, seed=8), replace(FINETUNE, start=SGD)],
    "prepare": [FakeQuantization(3, 3), FakeQuantization(3, 4), FakeQuantization(3, 3, calibration_images=8)],
    "s2d": [{}, {"lam": 0.1}, {"lam": 0.2}, {"lam": 0.1, "tau": 0.5}],
    "device": ["cuda"],
}


def test_the_key_changes_with_every_field_of_a_recipe() -> None:
    variants = [TINY]
    for f in dataclasses.fields(Recipe):
        values = OTHERS.get(f.name) or [other(getattr(TINY, f.name))]
        variants += [replace(TINY, **{f.name: value}) for value in values]
    variants.append(replace(TINY, data=ClutteredDigits(canvas=24), model=replace(TINY.model, image_size=24)))
    keys = [recipe_key(recipe) for recipe in variants]
    assert len(set(keys)) == len(keys) > 25
    assert recipe_key(replace(TINY)) == keys[0]


def test_two_classes_with_equal_fields_have_two_keys() -> None:
    @dataclass(frozen=True)
    class Renamed(Optimizer):
        pass

    @dataclass(frozen=True)
    class OtherViT(DigitsViT):
        pass

    assert dataclasses.asdict(Renamed()) == dataclasses.asdict(Optimizer())
    recipes = [
        TINY,
        replace(TINY, optimizer=Renamed()),
        replace(TINY, model=OtherViT(**dataclasses.asdict(TINY.model))),
    ]
    recipes += [replace(FINETUNE, start=replace(TINY, optimizer=kind_of())) for kind_of in (Optimizer, Renamed)]
    assert len({recipe_key(recipe) for recipe in recipes}) == len(recipes)


def test_a_field_added_later_is_left_out_where_it_changes_nothing() -> None:
    @dataclass(frozen=True)
    class Before:
        lr: float = 1.0

    @dataclass(frozen=True)
    class After:
        lr: float = 1.0
        smoothing: float = field(default=0.1, metadata={"absent": 0.0})  # its default is not what was there before

    After.__name__ = "Before"
    assert describe(After(smoothing=0.0)) == describe(Before())
    assert describe(After()) == describe(Before()) | {"smoothing": 0.1}


# --- versions ---


def test_a_raised_version_changes_the_keys_of_what_uses_it_and_of_its_descendants(monkeypatch) -> None:
    capped = replace(TINY, optimizer=Capped())
    recipes = [TINY, SGD, FINETUNE, S2D, QAT, capped, replace(FINETUNE, start=capped), replace(FINETUNE, start=S2D)]
    before = [recipe_key(recipe) for recipe in recipes]

    def changed(name: str) -> list[int]:
        with monkeypatch.context() as patch:
            patch.setitem(VERSIONS, name, VERSIONS.get(name, 1) + 1)
            now = [recipe_key(recipe) for recipe in recipes]
            assert all((name in versions(r)) == (name in components(r)) for r in recipes)
        return [index for index, recipe in enumerate(recipes) if now[index] != before[index]]

    assert changed("loop") == list(range(8))
    assert changed("s2d") == changed("s2d coupling=decoupled") == changed("s2d k_max=None") == [3, 7]
    assert changed("s2d criterion=spectral") == changed("s2d lam=0.1") == []
    assert changed("Optimizer name=sgd") == [1]
    assert changed("FakeQuantization") == [4]
    assert changed("Capped") == [5, 6]
    assert changed("ClutteredDigits") == list(range(8))
    assert [recipe_key(recipe) for recipe in recipes] == before


def test_naming_another_component_orphans_nothing(monkeypatch) -> None:
    before = recipe_key(TINY)
    monkeypatch.setitem(VERSIONS, "ClutteredDigits", 1)
    assert recipe_key(TINY) == before and versions(TINY) == {}


def test_every_version_is_of_something_that_a_recipe_uses() -> None:
    used = set().union(*(components(recipe) for recipe in laptop_recipes()))
    assert set(VERSIONS) <= used
    assert all(isinstance(version, int) and version >= 1 for version in VERSIONS.values())


# --- the path through the code ---


def test_recipes_of_one_kind_differ_in_numbers_only() -> None:
    numbers = [replace(TINY, seed=3, steps=9, optimizer=Optimizer(lr=1.0, weight_decay=0.5))]
    numbers.append(replace(TINY, model=replace(TINY.model, width=32)))
    assert {kind(recipe) for recipe in numbers} == {kind(TINY)}
    assert kind(replace(S2D, s2d=S2D.s2d | {"lam": 1.0, "tau": 0.1, "refresh_every": 9})) == kind(S2D)
    modes = [TINY, SGD, FINETUNE, S2D, QAT, replace(TINY, optimizer=Optimizer(clip=1.0)), replace(TINY, device="cuda")]
    modes += [replace(TINY, optimizer=kind_of()) for kind_of in (LessAdaptive, RotatedBasis, Orthogonal, Capped)]
    modes += [replace(S2D, s2d=S2D.s2d | changed) for changed in ({"k_max": 3}, {"power": 3}, {"coupling": "gradient"})]
    assert len({kind(recipe) for recipe in modes}) == len(modes)


# --- the code ---


def code_names(recipe: Recipe) -> set[str]:
    return {path.relative_to(PACKAGE).as_posix() for path in code_files(recipe)}


def test_the_code_of_a_recipe_comes_from_its_imports() -> None:
    loop = {"outliers.py", "checks.py", "files.py"} | {
        f"lab/{name}.py" for name in ("data", "files", "models", "training")
    }
    assert code_names(TINY) == code_names(SGD) == code_names(FINETUNE) == loop
    assert code_names(replace(TINY, optimizer=Orthogonal())) >= loop | {"lab/optimizers.py"}
    assert code_names(S2D) >= loop | {"regularizer.py", "pcdr.py", "spectral.py", "layers.py", "watch.py"}
    assert "layers.py" in code_names(QAT) and "regularizer.py" not in code_names(QAT)
    for recipe in (TINY, S2D, QAT):  # neither the names of recipes, nor how results are kept, decide a result
        assert not code_names(recipe) & {"lab/recipes.py", "lab/store.py", "lab/identity.py", "__init__.py"}
    assert len({code_hash(recipe) for recipe in (TINY, replace(TINY, optimizer=Capped()), S2D, QAT)}) == 4


def test_training_loads_no_more_than_its_code() -> None:
    """What Python loads, as an oracle for what the import statements say: beside the packages' own re-exports."""
    script = "import sys, s2d; a = set(sys.modules); import s2d.lab.training; print(*(set(sys.modules) - a))"
    loaded = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout.split()
    lab = {f"{name.replace('.', '/')}.py".removeprefix("s2d/") for name in loaded if name.startswith("s2d.lab.")}
    assert lab == {name for name in code_names(TINY) if name.startswith("lab/")}


def test_the_hash_changes_with_the_code_of_the_recipe_alone(monkeypatch) -> None:
    recipes = {"adamw": TINY, "s2d": S2D, "qat": QAT}
    before = {name: code_hash(recipe) for name, recipe in recipes.items()}
    own = {name: code_names(recipe) for name, recipe in recipes.items()}
    identity._hash.cache_clear()
    for name in ("lab/training.py", "pcdr.py", "ptq/quantizers.py", "layers.py", "lab/recipes.py", "bound.py"):
        for added, counts in (("\n# a comment\n", False), ("\nx = 1\n", True)):
            path = PACKAGE / name
            with monkeypatch.context() as patch:
                patch.setitem(identity._TEXTS, path, identity._TEXTS[path] + added)
                now = {name: code_hash(recipe) for name, recipe in recipes.items()}
                identity._hash.cache_clear()
            expected = {which for which in recipes if counts and name in own[which]}
            assert {which for which in recipes if now[which] != before[which]} == expected, name


def test_the_source_is_that_of_the_start_of_the_process(monkeypatch) -> None:
    before = code_hash(S2D)
    identity._hash.cache_clear()
    monkeypatch.setattr(Path, "read_text", lambda *a, **k: pytest.fail("read again"))
    assert code_hash(S2D) == before


def test_a_class_from_elsewhere_is_refused() -> None:
    @dataclass(frozen=True)
    class Mine(Optimizer):
        pass

    with pytest.raises(ValueError, match="a class of .*test_identity: put it into s2d/lab"):
        code_hash(replace(TINY, optimizer=Mine()))
