"""What names a stored result: its recipe and versions set by hand; and the code that made it, as provenance.

The *key* of a recipe is a hash of the recipe as plain JSON, class names and everything it starts from included, and of
the :data:`VERSIONS` of what it uses. The code is not in it: whether an edit changes numbers is measured
(:mod:`s2d.lab.replay`), and where it does the version is raised, which gives exactly the recipes concerned another key.

Every field of a recipe is recorded, defaults too: a default that is changed later then changes the keys of the recipes
that follow it, instead of silently changing what an old key means. A field *added* later would change every key, so it
is declared with the value under which the code does what it did before the field was there::

    label_smoothing: float = field(default=0.0, metadata={"absent": 0.0})

and is left out where it has that value. The comparison is with ``absent``, never with the default, so changing the
default stays safe.

The *code hash* of a recipe covers the modules that its training imports (:mod:`s2d.lab.dependencies`); comments,
docstrings and blank lines do not count. It is that of the source as it was when this process began.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from functools import cache
from pathlib import Path
from typing import Any

from s2d.lab.dependencies import PACKAGE, PROJECT, closure, code_only, read_source

VERSIONS = {
    "loop": 1,  # s2d.lab.training: every recipe
    "s2d": 1,  # SelectiveSpectralDecay in any mode
    "FakeQuantization": 1,
    "Capped": 1,
    "LessAdaptive": 1,
    "Orthogonal": 1,
    "RotatedBasis": 1,
}
"""Version of each component, raised by hand when its numbers change: see :func:`components` for the names there are.

A component that is not named here has version 1, and a version of 1 is not written into the key, so naming one more
orphans nothing."""

CONTINUOUS = ("lam", "tau", "refresh_every")
"""Settings of S2D that are a number put into the same code; every other one selects which code runs."""


# --- the recipe -------------------------------------------------------------------------------------------------------


def describe(value: Any) -> Any:
    """A recipe, or a part of one, as plain JSON types; a dataclass has its class name under ``"class"``.

    Example:
        >>> from s2d.lab.training import Optimizer
        >>> described = describe(Optimizer(lr=0.1))
        >>> described["class"], described["lr"], described["betas"]
        ('Optimizer', 0.1, [0.9, 0.999])
    """
    if is_dataclass(value):
        kept = {f.name: getattr(value, f.name) for f in fields(value)}
        for f in fields(value):
            if "absent" in f.metadata and kept[f.name] == f.metadata["absent"]:
                del kept[f.name]
        return {"class": type(value).__name__} | {name: describe(part) for name, part in kept.items()}
    if isinstance(value, Mapping):
        return {str(name): describe(part) for name, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [describe(part) for part in value]
    return value


def rebuild(description: Any, classes: Mapping[str, type]) -> Any:
    """What :func:`describe` described.

    Args:
        description: plain JSON types.
        classes: name to dataclass.

    Raises:
        ValueError: for a class or a field that this code does not know.

    Example:
        >>> from s2d.lab.training import Optimizer
        >>> rebuild(describe(Optimizer(lr=0.1)), {"Optimizer": Optimizer}) == Optimizer(lr=0.1)
        True
    """
    if isinstance(description, list):
        return tuple(rebuild(part, classes) for part in description)
    if not isinstance(description, dict):
        return description
    parts = {name: rebuild(part, classes) for name, part in description.items() if name != "class"}
    if "class" not in description:
        return parts
    name = description["class"]
    if name not in classes:
        raise ValueError(f"this code knows no {name}: it knows {', '.join(sorted(classes))}")
    try:
        return classes[name](**parts)
    except TypeError as error:
        raise ValueError(f"this code's {name} has other fields ({error})") from error


def components(recipe: Any) -> set[str]:
    """What a recipe and everything it starts from use, by the names that :data:`VERSIONS` may have.

    They are ``"loop"``, the class names, ``"s2d"``, and the settings that select which code runs, such as ``"s2d
    coupling=decoupled"`` or ``"Optimizer name=sgd"``: the narrower the name that is raised, the fewer entries are
    trained again.

    Example:
        >>> from s2d.lab.recipes import pretraining
        >>> {"loop", "ClutteredDigits", "Optimizer name=sgd"} <= components(pretraining("sgd", seed=0))
        True
    """
    found = {"loop"}

    def visit(value: Any) -> None:
        if is_dataclass(value):
            name, parts = type(value).__name__, {f.name: getattr(value, f.name) for f in fields(value)}
            found.update({name}, (f"{name} {field}={part}" for field, part in parts.items() if isinstance(part, str)))
            for part in parts.values():
                visit(part)
        elif isinstance(value, Mapping):  # the only one in a recipe is S2D's
            found.update({"s2d"}, (f"s2d {name}={mode}" for name, mode in value.items() if name not in CONTINUOUS))

    visit(recipe)
    return found


def versions(recipe: Any) -> dict[str, int]:
    """The versions above 1 of what the recipe uses: the part of its key that is set by hand."""
    used = components(recipe)
    return {name: version for name, version in sorted(VERSIONS.items()) if name in used and version != 1}


def recipe_key(recipe: Any) -> str:
    """The hash that names an entry of the store."""
    identity = {"recipe": describe(recipe), "versions": versions(recipe)}
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:16]


def kind(recipe: Any) -> str:
    """The path through the code that a recipe takes: two of one kind differ in numbers only.

    Example:
        >>> from s2d.lab.recipes import pretraining
        >>> kind(pretraining("sgd", seed=0)) == kind(pretraining("sgd", seed=1, steps=10))
        True
        >>> kind(pretraining("sgd", seed=0)) == kind(pretraining("adamw", seed=0))
        False
    """
    optimizer = recipe.optimizer
    words = ["pretraining" if recipe.start is None else "fine-tuning"]
    words += [type(part).__name__ for part in (recipe.data, recipe.model, recipe.prepare) if part is not None]
    words.append(f"{type(optimizer).__name__}({optimizer.name}{', clipped' if optimizer.clip > 0 else ''})")
    if recipe.s2d is not None:
        modes = (f"{name}={value}" for name, value in sorted(recipe.s2d.items()) if name not in CONTINUOUS)
        words.append(f"s2d({', '.join(modes)})")
    return " ".join(words + [recipe.device] * (recipe.device != "cpu"))


# --- the code ---------------------------------------------------------------------------------------------------------

# Read at once: a file that is edited while a run trains is not the code that trains it.
_TEXTS = {path: read_source(path) for path in PACKAGE.rglob("*.py")}


def _roots(recipe: Any) -> tuple[frozenset[str], tuple[str, ...]]:
    """The modules of the classes in a recipe, and those not to follow from there."""
    parts = [recipe, recipe.optimizer, recipe.data, recipe.model, recipe.prepare]
    roots = frozenset(type(part).__module__ for part in parts if part is not None)
    for module in roots:
        if module.partition(".")[0] != PROJECT:
            raise ValueError(
                f"the recipe uses a class of {module}: put it into s2d/lab, so that the store knows its code"
            )
    # The loop imports the regularizer only for recipes with S2D.
    return roots, () if recipe.s2d is not None else ("s2d.regularizer",)


def code_files(recipe: Any) -> list[Path]:
    """The files that decide what a recipe's training does from its start on.

    Raises:
        ValueError: if a part of the recipe is of a class outside this package, whose code could not be told apart.

    Example:
        >>> from s2d.lab.recipes import pretraining
        >>> [path.name for path in code_files(pretraining("sgd", seed=0))][-1]
        'outliers.py'
    """
    roots, without = _roots(recipe)
    return closure(roots, without=without, read=_TEXTS.__getitem__)


@cache
def _hash(roots: frozenset[str], without: tuple[str, ...]) -> str:
    paths = closure(roots, without=without, read=_TEXTS.__getitem__)
    modules = {".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts): path for path in paths}
    digest = hashlib.sha256()
    for name, path in sorted(modules.items()):
        digest.update(f"{name}\n{code_only(path, read=_TEXTS.__getitem__)}\n".encode())
    return digest.hexdigest()[:16]


def code_hash(recipe: Any) -> str:
    """Hash of the code in :func:`code_files`; comments, docstrings and blank lines do not count."""
    return _hash(*_roots(recipe))
