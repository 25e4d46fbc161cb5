"""Trained checkpoints, memoised on disk by a hash of their whole recipe.

An entry is one safetensors file: the weights in float16, and in its header the recipe, the fingerprint of the code that
made it, the training history and a checksum of the weights. An entry is used only if all of that agrees with what is
asked for; one that does not is an error, never a silent substitute.

Two folders are searched: ``build/store`` (whatever was trained here) and ``data/laptop/checkpoints`` (committed, so
that a first run takes minutes). ``$S2D_STORE`` names a single folder instead: the committed entries are then not looked
at.
"""

from __future__ import annotations

import ast
import copy
import hashlib
import io
import json
import multiprocessing
import os
import sys
import tokenize
from collections.abc import Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from torch import Tensor, nn

from s2d.files import write_atomically
from s2d.lab.files import read_tensors, write_tensors
from s2d.lab.models import DigitsViT
from s2d.lab.paths import repository_root
from s2d.lab.training import Optimizer, Recipe, train

# What decides the weights and the history. The regularizer's and the quantizers' files count only for recipes that use
# them.
TRAINING_CODE = ("lab/data.py", "lab/models.py", "lab/training.py", "outliers.py")
S2D_CODE = ("distributed.py", "layers.py", "pcdr.py", "regularizer.py", "spectral.py", "watch.py")
OPTIMIZER_CODE = ("lab/optimizers.py",)
QAT_CODE = (
    "lab/qat.py",
    *(f"ptq/{name}.py" for name in ("attention", "calibrate", "prepare", "qat", "quantizers", "rtn", "sites", "trace")),
)


@dataclass(frozen=True)
class Trained:
    """A trained checkpoint.

    Attributes:
        recipe: what was asked for.
        weights: name to float16 tensor.
        history: one row a measurement (step, loss, validation_accuracy, excess_kurtosis, neuron_kurtosis, max_abs).
    """

    recipe: Recipe
    weights: dict[str, Tensor]
    history: list[dict[str, float]]

    @property
    def seed(self) -> int:
        """The seed of the pretraining this descends from: what pairs variants in a table."""
        before = _starting_point(self.recipe)
        return self.recipe.seed if before is None else Trained(before, {}, []).seed

    def model(self) -> nn.Module:
        """The model with these weights, float32, in evaluation mode."""
        model = copy.deepcopy(_blank(self.recipe.model))
        model.load_state_dict({name: tensor.float() for name, tensor in self.weights.items()})
        return model.eval()


def _code_only(path: Path) -> str:
    """Source text without comments, docstrings and blank lines: what can change a result."""
    source = path.read_text(encoding="utf-8")
    lines, text = source.splitlines(), set()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        (first, column), (last, _) = token.start, token.end
        if token.type == tokenize.COMMENT:
            lines[first - 1] = lines[first - 1][:column]
        elif first != last and token.type not in (tokenize.NL, tokenize.NEWLINE):
            text.update(range(first - 1, last))  # a string over several lines, whose blank lines and spaces count
    documented = ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, documented) and ast.get_docstring(node) is not None:
            doc = node.body[0]
            before, after = (
                lines[doc.lineno - 1][: doc.col_offset],
                lines[doc.end_lineno - 1].encode()[doc.end_col_offset :],
            )
            if not before.strip() and not after.strip():  # beside code on its line it stays, and counts
                rows = range(doc.lineno - 1, doc.end_lineno)
                text.difference_update(rows)
                for row in rows:
                    lines[row] = ""
    return "\n".join(
        line if row in text else line.rstrip() for row, line in enumerate(lines) if row in text or line.strip()
    )


def _starting_point(recipe: Recipe) -> Recipe | None:
    """The recipe whose result this one goes on from: by fine-tuning, or by QAT (:mod:`s2d.lab.qat`)."""
    return recipe.start or getattr(recipe.model, "of", None)


@cache
def code_fingerprint(with_s2d: bool, with_qat: bool = False, with_optimizers: bool = False) -> str:
    """Hash of the code that a training run depends on; comments and docstrings do not count."""
    package = Path(__file__).resolve().parents[1]
    digest = hashlib.sha256()
    extra = [(with_s2d, S2D_CODE), (with_qat, QAT_CODE), (with_optimizers, OPTIMIZER_CODE)]
    for name in TRAINING_CODE + tuple(name for used, code in extra if used for name in code):
        digest.update(f"{name}\n{_code_only(package / name)}\n".encode())
    return digest.hexdigest()[:16]


def _uses_s2d(recipe: Recipe) -> bool:
    before = _starting_point(recipe)
    return recipe.s2d is not None or (before is not None and _uses_s2d(before))


def _uses_other_optimizers(recipe: Recipe) -> bool:
    before = _starting_point(recipe)
    return type(recipe.optimizer) is not Optimizer or (before is not None and _uses_other_optimizers(before))


def _fingerprint(recipe: Recipe) -> str:
    return code_fingerprint(_uses_s2d(recipe), hasattr(recipe.model, "of"), _uses_other_optimizers(recipe))


def recipe_key(recipe: Recipe) -> str:
    """The hash that names an entry: recipe (with all it starts from) and code."""
    identity = {"recipe": recipe.as_dict(), "code": _fingerprint(recipe)}
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:16]


def _file_name(recipe: Recipe) -> str:
    kind = "qat" if hasattr(recipe.model, "of") else "finetune" if recipe.start is not None else "pretrain"
    method = recipe.optimizer.name + ("-s2d" if recipe.s2d is not None else "")
    return f"{kind}-{method}-seed{recipe.seed}-{recipe_key(recipe)}.safetensors"


def _checksum(weights: dict[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name in sorted(weights):
        tensor = weights[name].contiguous()
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(tensor.view(torch.uint8).numpy().tobytes() if tensor.ndim else bytes(str(tensor.item()), "ascii"))
    return digest.hexdigest()


def _history_checksum(history: list[dict[str, float]] | None) -> str:
    return hashlib.sha256(json.dumps(history, sort_keys=True).encode()).hexdigest()


def committed_folder() -> Path:
    """The committed entries."""
    return repository_root() / "data" / "laptop" / "checkpoints"


def store_folders() -> list[Path]:
    """The folders searched, the one written to first."""
    if os.environ.get("S2D_STORE"):
        return [Path(os.environ["S2D_STORE"])]
    return [repository_root() / "build" / "store", committed_folder()]


def find(recipe: Recipe) -> Trained | None:
    """The stored result of a recipe, or None when there is none.

    Raises:
        ValueError: if an entry has the right name but is truncated, foreign, or of another architecture.
    """
    for folder in store_folders():
        path = folder / _file_name(recipe)
        if path.exists():
            return _load(path, recipe)
    return None


def _load(path: Path, recipe: Recipe) -> Trained:
    weights, metadata = read_tensors(path)
    if metadata.get("key") != recipe_key(recipe) or metadata.get("recipe") != recipe.as_dict():
        raise ValueError(f"{path} holds the result of another recipe than its name says: delete it and run again")
    if metadata.get("checksum") != _checksum(weights):
        raise ValueError(f"{path} is damaged (its weights do not match their checksum): delete it and run again")
    if metadata.get("history_checksum") != _history_checksum(metadata.get("history")):
        raise ValueError(f"{path} is damaged (its history does not match its checksum): delete it and run again")
    if {name: tuple(tensor.shape) for name, tensor in weights.items()} != _shapes(recipe.model):
        raise ValueError(f"{path} is of another architecture than {recipe.model}: delete it and run again")
    return Trained(recipe, weights, metadata["history"])


@cache
def _blank(model: DigitsViT) -> nn.Module:
    """A model to load weights into, built once: that of QAT is calibrated for it."""
    return model.build(0)


@cache
def _shapes(model: DigitsViT) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in _blank(model).state_dict().items()}


def _train_and_store(recipe: Recipe, progress=lambda steps: None) -> None:
    """Train one recipe whose start, if any, is stored already."""
    start = None
    if recipe.start is not None:
        found = find(recipe.start)
        if found is None:
            raise ValueError(f"the checkpoint to fine-tune is not in the store: {_file_name(recipe.start)}")
        start = found.weights
    path = store_folders()[0] / _file_name(recipe)
    partial = path.with_suffix(".partial")
    weights, history = train(recipe, start, partial=partial, progress=progress)
    metadata = {
        "key": recipe_key(recipe),
        "recipe": recipe.as_dict(),
        "code": _fingerprint(recipe),
        "checksum": _checksum(weights),
        "history_checksum": _history_checksum(history),
        "torch": torch.__version__,
        "history": history,
    }
    write_tensors(path, weights, metadata)


_counter = None  # steps done by all workers; set in each worker by its initializer


def _start_worker(counter) -> None:
    global _counter
    _counter = counter
    torch.set_num_threads(1)


def _work(recipe: Recipe) -> None:
    parent = multiprocessing.parent_process()

    def progress(steps: int) -> None:
        if not parent.is_alive():  # it was killed: an orphan would go on training for minutes, unseen
            os._exit(1)  # an exception would only be handed to a pool that nobody reads
        with _counter.get_lock():
            _counter.value += steps

    _train_and_store(recipe, progress)


def _with_starts(recipes: Sequence[Recipe]) -> list[Recipe]:
    """The recipes and everything they start from, each once, starts first."""
    ordered: dict[str, Recipe] = {}
    for recipe in recipes:
        before = _starting_point(recipe)
        for needed in [*(_with_starts([before]) if before is not None else []), recipe]:
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
        >>> from s2d.lab.recipes import pretraining
        >>> obtain([pretraining("adamw", seed=0)])[0].recipe.optimizer.name  # from the committed store
        'adamw'
    """
    stored = {recipe_key(recipe): find(recipe) for recipe in _with_starts(recipes)}
    missing = [recipe for recipe in _with_starts(recipes) if stored[recipe_key(recipe)] is None]
    if missing:
        workers = workers or int(os.environ.get("S2D_WORKERS") or os.cpu_count() or 1)
        if any(recipe.device != "cpu" for recipe in missing):
            workers = 1  # runs on one accelerator follow each other
        _train_all(missing, workers)
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
    from tqdm import tqdm

    keys = {recipe_key(recipe) for recipe in missing}
    context = multiprocessing.get_context("spawn")
    counter = context.Value("q", 0)
    total = sum(recipe.steps for recipe in missing)
    pool = ProcessPoolExecutor(min(workers, len(missing)), context, initializer=_start_worker, initargs=(counter,))
    # No bar is redrawn more than every few seconds: in a log each redraw is a line.
    bar = tqdm(total=total, unit="step", desc=f"training {len(missing)} runs", file=sys.stderr, mininterval=5)
    waiting, running = list(missing), {}
    try:
        while waiting or running:
            for recipe in list(waiting):
                # A run can begin once what it starts from is stored.
                before = _starting_point(recipe)
                if before is None or recipe_key(before) not in keys:
                    running[pool.submit(_work, recipe)] = recipe
                    waiting.remove(recipe)
            done, _ = wait(running, timeout=1, return_when=FIRST_COMPLETED)
            bar.update(counter.value - bar.n)
            for future in done:
                recipe = running.pop(future)
                try:
                    future.result()
                except BrokenProcessPool as error:
                    raise RuntimeError(
                        f"a training process died (out of memory?) during {_file_name(recipe)}; run again to resume"
                    ) from error
                keys.discard(recipe_key(recipe))
    finally:
        bar.close()
        pool.shutdown(wait=False, cancel_futures=True)
        for process in list((pool._processes or {}).values()) if running else []:
            process.terminate()  # an interrupted run resumes from its last save


def publish(recipes: Sequence[Recipe]) -> list[Path]:
    """Make the committed folder hold exactly the given recipes (and what they start from), copied from the store.

    Raises:
        ValueError: if one of them has not been trained.
    """
    wanted = {}
    for recipe in _with_starts(recipes):
        source = next((f / _file_name(recipe) for f in store_folders() if (f / _file_name(recipe)).exists()), None)
        if source is None:
            raise ValueError(f"{_file_name(recipe)} is not in the store: train it first (make figures)")
        _load(source, recipe)
        wanted[_file_name(recipe)] = source.read_bytes()
    folder = committed_folder()
    folder.mkdir(parents=True, exist_ok=True)
    for path in folder.glob("*.safetensors"):
        if path.name not in wanted:
            path.unlink()
    for name, content in wanted.items():
        if not (folder / name).exists() or (folder / name).read_bytes() != content:
            write_atomically(folder / name, lambda temporary, content=content: temporary.write_bytes(content))
    return sorted(folder / name for name in wanted)


if __name__ == "__main__":
    from s2d.lab.recipes import laptop_recipes

    for published in publish(laptop_recipes()):
        print(published.relative_to(repository_root()), f"{published.stat().st_size / 1e6:.2f} MB")
