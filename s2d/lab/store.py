"""Trained checkpoints, memoised on disk by a hash of their whole recipe.

An entry is one safetensors file: the weights in float16, and in its header the recipe, the training history, the code
that made it and a checksum over all of that. An entry is used only if everything in it agrees with what is asked for;
one that does not is an error that names the file and the repair, never a silent substitute. To look at an entry takes
no model: none is built, traced or calibrated before :meth:`Trained.model`.

The file's name holds the recipe's key (:mod:`s2d.lab.identity`). The code is not part of it: an entry that other code
made is used where the ledger (:mod:`s2d.lab.ledger`) has a chain of replays from that code to today's. While the code
is being edited, ``S2D_ANY_CODE=1`` uses entries without asking for the chain; :mod:`s2d.lab.publish` asks all the same.

Two folders are searched: ``build/store`` (whatever was trained or fetched here) and ``data/laptop/checkpoints``
(committed, so that a first run takes minutes). ``$S2D_STORE`` names a single folder instead: the committed entries are
then not looked at.
"""

from __future__ import annotations

import copy
import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from s2d.lab import parallel
from s2d.lab.files import read_tensors, write_tensors
from s2d.lab.identity import code_hash, describe, kind, recipe_key, versions
from s2d.lab.ledger import chain, read_ledger
from s2d.lab.paths import repository_root
from s2d.lab.training import Recipe, train

SCHEMA = 2


@dataclass(frozen=True)
class Trained:
    """A trained checkpoint.

    Attributes:
        recipe: what was asked for.
        weights: name to float16 tensor.
        history: one row a measurement (step, loss, validation_accuracy, excess_kurtosis, neuron_kurtosis, max_abs).
        code: kind and code hash of this training and of those it descends from, the first one first.
    """

    recipe: Recipe
    weights: dict[str, Tensor]
    history: list[dict[str, float]]
    code: tuple[tuple[str, str], ...] = ()

    @property
    def seed(self) -> int:
        """The seed of the pretraining this descends from: what pairs variants in a table."""
        return self.recipe.origin.seed

    def model(self) -> nn.Module:
        """The model with these weights, float32, in evaluation mode.

        Raises:
            ValueError: if the weights do not fit the model that the recipe builds today.
        """
        blank = json.dumps(describe([self.recipe.model, self.recipe.prepare, self.recipe.data]))
        if blank not in _BLANKS:
            _BLANKS[blank] = self.recipe.blank()
        model = copy.deepcopy(_BLANKS[blank])
        try:
            model.load_state_dict({name: tensor.float() for name, tensor in self.weights.items()})
        except RuntimeError as error:
            reason = " ".join(str(error).split())
            raise ValueError(f"the weights are of another architecture than {self.recipe.model}: {reason}") from error
        return model.eval()


_BLANKS: dict[str, nn.Module] = {}  # models to load weights into, each built once: that of QAT is calibrated for it


def file_name(recipe: Recipe) -> str:
    """The name of a recipe's entry: what it is, for people, and its key.

    Example:
        >>> from s2d.lab.recipes import pretraining
        >>> file_name(pretraining("sgd", seed=1)).startswith("pretrain-sgd-seed1-")
        True
    """
    stage = "pretrain" if recipe.start is None else "finetune"
    stage = stage if recipe.prepare is None else recipe.prepare.stage
    method = recipe.optimizer.name + ("-s2d" if recipe.s2d is not None else "")
    return f"{stage}-{method}-seed{recipe.seed}-{recipe_key(recipe)}.safetensors"


def checksum(weights: Mapping[str, Tensor], description: Mapping[str, Any]) -> str:
    """One hash over names, shapes, types and values of the weights and over everything said about them."""
    digest = hashlib.sha256(json.dumps(description, sort_keys=True).encode())
    for name in sorted(weights):
        tensor = weights[name].contiguous()
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(tensor.view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def committed_folder() -> Path:
    """The committed entries."""
    return repository_root() / "data" / "laptop" / "checkpoints"


def store_folders() -> list[Path]:
    """The folders searched, the one written to first."""
    if os.environ.get("S2D_STORE"):
        return [Path(os.environ["S2D_STORE"])]
    return [repository_root() / "build" / "store", committed_folder()]


def find_file(recipe: Recipe) -> Path | None:
    """The file of a recipe's entry, unread, or None when there is none."""
    paths = (folder / file_name(recipe) for folder in store_folders())
    return next((path for path in paths if path.exists()), None)


def find(recipe: Recipe) -> Trained | None:
    """The stored result of a recipe, or None when there is none.

    Raises:
        ValueError: see :func:`load`; with ``S2D_ANY_CODE`` set, not for the code.
    """
    path = find_file(recipe)
    return None if path is None else load(path, recipe, any_code=bool(os.environ.get("S2D_ANY_CODE")))


def load(path: Path, recipe: Recipe, *, any_code: bool = False) -> Trained:
    """Read an entry and check everything that can be checked without building a model.

    Args:
        path: the entry.
        recipe: whose result it has to be.
        any_code: use it whatever code made it.

    Raises:
        ValueError: if it is truncated, of another schema or recipe, damaged, not finite, or made by code from which no
            chain of replays leads to today's.
    """
    repair = "delete it, then train (make figures) or fetch (make fetch) it again"
    weights, metadata = read_tensors(path)
    schema = metadata.get("schema") if isinstance(metadata, dict) else None
    if schema != SCHEMA:
        raise ValueError(f"{path} has schema {schema} and this code reads {SCHEMA}: {repair}")
    said = {name: value for name, value in metadata.items() if name != "checksum"}
    if metadata.get("checksum") != checksum(weights, said):
        raise ValueError(f"{path} is damaged (it does not match its checksum): {repair}")
    if said["key"] != recipe_key(recipe) or said["recipe"] != describe(recipe):
        raise ValueError(f"{path} holds the result of another recipe than its name says: {repair}")
    if said["shapes"] != _shapes(weights) or not all(tensor.isfinite().all() for tensor in weights.values()):
        raise ValueError(f"{path} holds weights of another shape than it says, or some that are not finite: {repair}")
    code = tuple(tuple(pair) for pair in said["code"])
    if not any_code:
        check_code(path, recipe, code)
    return Trained(recipe, weights, said["history"], code)


def check_code(path: Path, recipe: Recipe, code: Sequence[tuple[str, str]]) -> None:
    """Refuse an entry unless the ledger leads from the code that made it, and made what it began with, to today's.

    Args:
        path: named in the error.
        recipe: of the entry.
        code: kind and code hash of each training, the first one first.

    Raises:
        ValueError: naming the kind and the repair.
    """
    lineage = [recipe]
    while lineage[0].start is not None:
        lineage.insert(0, lineage[0].start)
    for step, (made_kind, made) in zip(lineage, code, strict=True):
        if (kind(step), code_hash(step)) == (made_kind, made):
            continue
        if made_kind != kind(step) or chain(made, code_hash(step), made_kind, read_ledger()) is None:
            raise ValueError(
                f"{path}: its {made_kind} was trained by other code ({made}; today's is {code_hash(step)}), and the "
                "ledger has no replay that leads from there to here. Measure whether the numbers are the same (make "
                "replay AGAINST=<commit of that code>), or raise the version of what changed in s2d/lab/identity.py "
                "and train again. S2D_ANY_CODE=1 uses it all the same, while you edit"
            )


def _shapes(weights: Mapping[str, Tensor]) -> dict[str, list[int]]:
    return {name: list(weights[name].shape) for name in sorted(weights)}


def write_entry(
    path: Path,
    recipe: Recipe,
    weights: Mapping[str, Tensor],
    history: Sequence[Mapping[str, float]],
    code: Sequence[tuple[str, str]],
) -> None:
    """Write one entry, atomically.

    Args:
        path: where to.
        recipe: what was trained.
        weights, history: from :func:`s2d.lab.training.train`.
        code: see :class:`Trained`.
    """
    said = {
        "schema": SCHEMA,
        "key": recipe_key(recipe),
        "recipe": describe(recipe),
        "versions": versions(recipe),
        "code": [list(pair) for pair in code],
        "shapes": _shapes(weights),
        "torch": torch.__version__,
        "history": list(history),
    }
    said = json.loads(json.dumps(said))
    write_tensors(path, weights, said | {"checksum": checksum(weights, said)})


def train_and_store(recipe: Recipe, progress=lambda steps: None) -> None:
    """Train one recipe whose start, if any, is stored already.

    An unfinished run is kept under a name that holds the hash of its code, so that it is never continued by other code.

    Args:
        recipe: what to train.
        progress: called with the number of steps just done.

    Raises:
        ValueError: if the start is not stored; see :func:`s2d.lab.training.train`.
    """
    start = None if recipe.start is None else find(recipe.start)
    if recipe.start is not None and start is None:
        raise ValueError(f"the checkpoint to fine-tune is not in the store: {file_name(recipe.start)}")
    own = (kind(recipe), code_hash(recipe))
    path = store_folders()[0] / file_name(recipe)
    partial = path.with_name(f"{path.stem}-{own[1]}.partial")
    weights, history = train(recipe, None if start is None else start.weights, partial=partial, progress=progress)
    write_entry(path, recipe, weights, history, (*(() if start is None else start.code), own))


def _missing(recipes: Sequence[Recipe]) -> list[Recipe]:
    """The recipes that are not stored, and what these start from where that is not stored: each once, starts first."""
    ordered: dict[str, Recipe] = {}
    for recipe in recipes:
        if recipe_key(recipe) not in ordered and find_file(recipe) is None:
            before = [] if recipe.start is None else _missing([recipe.start])
            for needed in [*before, recipe]:
                ordered.setdefault(recipe_key(needed), needed)
    return list(ordered.values())


def obtain(recipes: Sequence[Recipe], *, workers: int | None = None) -> list[Trained]:
    """The results of some recipes: from the store where they are there, trained (in parallel processes) where not.

    Training shows one progress bar over all runs. It can be interrupted; the next call resumes each unfinished run.

    Args:
        recipes: what is wanted.
        workers: training processes; by default ``$S2D_WORKERS`` or the number of cores. One thread each.

    Returns:
        One result a recipe, in order.

    Raises:
        ValueError: see :func:`find` and :func:`s2d.lab.training.train`.
        RuntimeError: if a training process dies.

    Example:
        >>> obtain([])
        []
    """
    missing = _missing(recipes)
    # What is there is read first: an entry that cannot be used is reported before hours of training, not after.
    needed = {recipe_key(r): r for r in [*recipes, *(r.start for r in missing if r.start is not None)]}
    stored = {key: find(recipe) for key, recipe in needed.items()}
    if missing:
        # Runs on one accelerator follow each other.
        accelerated = any(recipe.device != "cpu" for recipe in missing)
        _train_all(missing, 1 if accelerated else parallel.worker_count(workers))
        stored |= {recipe_key(recipe): find(recipe) for recipe in missing}
    return [stored[recipe_key(recipe)] for recipe in recipes]


def obtain_checkpoints(recipes: Mapping[str, Sequence[Recipe]]) -> dict[str, list[Trained]]:
    """:func:`obtain` for several variants at once, so that what is missing is shared out over the cores in one go.

    Args:
        recipes: variant to one recipe a seed.

    Returns:
        Variant to one result a seed, in order.
    """
    results = iter(obtain([recipe for group in recipes.values() for recipe in group]))
    return {variant: [next(results) for _ in group] for variant, group in recipes.items()}


def _train_all(missing: list[Recipe], workers: int) -> None:
    """Train recipes in worker processes, each once what it starts from is stored."""
    place = {recipe_key(recipe): index for index, recipe in enumerate(missing)}
    starts = [None if recipe.start is None else place.get(recipe_key(recipe.start)) for recipe in missing]
    parallel.run(
        _train,
        [(recipe,) for recipe in missing],
        names=[file_name(recipe) for recipe in missing],
        workers=workers,
        unit="step",
        total=sum(recipe.steps for recipe in missing),
        after=[set() if start is None else {start} for start in starts],
        label=f"training {len(missing)} runs",
    )


def _train(recipe: Recipe) -> None:
    train_and_store(recipe, parallel.report)
