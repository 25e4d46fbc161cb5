"""Did an edit change the numbers? Train with the code of a commit and with today's, on this machine, and compare bits.

    python -m s2d.lab.replay --against main                    (make replay AGAINST=main)
    python -m s2d.lab.replay --against main --recipes Capped   (only kinds whose name contains the text)

One recipe of each kind (:func:`s2d.lab.identity.kind`) whose code differs is trained by both for the first 25 steps,
with a refresh of S2D every 10, and for the last 30 of its schedule. Equal means: every step's loss, the whole state
(weights, optimizer, S2D), the measurements and the final weights have the same bits. Then a line goes into the ledger
(:mod:`s2d.lab.ledger`), which lets the entries of the store that the old code made be used. It says that so many steps
were equal, and proves nothing about others. Unequal is exit status 1, with the version to raise.

The last steps begin with the recipe's own stored result where there is one, the first ones with that of its start; else
with made-up weights that have one large singular value each, so that S2D and the cap have something to do.

The other commit runs its own copy of this module, in a worktree of its own, through the one command that must stay as
it is: ``python -m s2d.lab.replay --trajectory JOBS.json OUT.safetensors``. JOBS.json is a list of ``{"recipe": a
description, "windows": [{"first": 0, "last": 25, "weights": a safetensors file or null, "finish": false}, ...]}``; a
job without windows asks only for kind and code hash. OUT.safetensors has the tensors under ``job/window/name``, and in
its description ``package``, ``cpu``, ``torch`` and one ``{"kind", "code", "windows": [{"losses", "history"}, ...]}`` or
``{"error"}`` a job.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, is_dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from s2d.console import interruptible
from s2d.lab.files import read_tensors, write_tensors
from s2d.lab.identity import VERSIONS, code_hash, components, describe, kind, rebuild, versions
from s2d.lab.ledger import Line, append_lines
from s2d.lab.paths import repository_root
from s2d.lab.store import checksum, file_name, find_file, load
from s2d.lab.training import Recipe, Run

FIRST_STEPS = 25  # past two refreshes
LAST_STEPS = 30
REFRESH_EVERY = 10


# --- the stable half: what one version of the code computes -----------------------------------------------------------


def trajectory(jobs: Sequence[Mapping[str, Any]]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Train windows of recipes and keep everything.

    Args:
        jobs: see the module's text.

    Returns:
        The tensors by ``job/window/name``, and the description of them.
    """
    from s2d.lab import recipes

    # Whatever a named recipe can be made of is imported there.
    classes = {name: value for name, value in vars(recipes).items() if isinstance(value, type) and is_dataclass(value)}
    tensors: dict[str, Tensor] = {}
    said = {
        "package": str(Path(__file__).resolve().parents[1]),
        "cpu": torch.backends.cpu.get_cpu_capability(),
        "torch": torch.__version__,
        "jobs": [],
    }
    for index, job in enumerate(jobs):
        try:
            recipe = rebuild(job["recipe"], classes)
        except ValueError as error:
            said["jobs"].append({"error": str(error)})
            continue
        row = {"kind": kind(recipe), "code": code_hash(recipe), "windows": []}
        for number, window in enumerate(job["windows"]):
            found, told = _window(recipe, window)
            tensors |= {f"{index}/{number}/{name}": tensor.clone() for name, tensor in found.items()}
            row["windows"].append(told)
        said["jobs"].append(row)
    return tensors, said


def _window(recipe: Recipe, window: Mapping[str, Any]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    weights = None if window["weights"] is None else read_tensors(Path(window["weights"]))[0]
    run = Run(recipe, weights)
    losses = [run.step(step).item() for step in range(window["first"], window["last"])]
    tensors = {name: torch.as_tensor(value).detach().cpu() for name, value in run.state().items()}
    if window["finish"]:
        final, _ = run.finish()
        tensors |= {f"final.{name}": tensor for name, tensor in final.items()}
    return tensors, {"losses": losses, "history": run.history}


# --- what to compare --------------------------------------------------------------------------------------------------


def one_of_each_kind(recipes: Sequence[Recipe], texts: Sequence[str] = ()) -> list[Recipe]:
    """The first recipe of each kind; of kinds whose name contains one of the texts, when there are any.

    Raises:
        ValueError: if no kind contains them.

    Example:
        >>> from s2d.lab.recipes import laptop_recipes
        >>> [recipe.optimizer.name for recipe in one_of_each_kind(laptop_recipes(), ["sgd"])]
        ['sgd']
    """
    kinds: dict[str, Recipe] = {}
    for recipe in recipes:
        kinds.setdefault(kind(recipe), recipe)
    chosen = [recipe for name, recipe in kinds.items() if not texts or any(text in name for text in texts)]
    if not chosen:
        raise ValueError(f"no kind of recipe contains {', '.join(texts)}: there are\n  " + "\n  ".join(kinds))
    return chosen


def shortened(recipe: Recipe) -> Recipe:
    """The recipe with refreshes and measurements every 10 steps; its schedule stays."""
    s2d = None if recipe.s2d is None else recipe.s2d | {"refresh_every": REFRESH_EVERY}
    return replace(recipe, s2d=s2d, measure_every=REFRESH_EVERY)


def made_up_weights(recipe: Recipe) -> dict[str, Tensor]:
    """Fresh weights in which every matrix of a block has one large singular value: outliers for S2D and the cap."""
    model = recipe.model.build(recipe.seed)
    generator = torch.Generator().manual_seed(recipe.seed)
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for name, tensor in weights.items():
        if name.startswith("blocks.") and tensor.ndim == 2:
            u, v = (torch.nn.functional.normalize(torch.randn(n, generator=generator), dim=0) for n in tensor.shape)
            tensor.add_(4 * torch.outer(u, v))
    return weights


def _stored_weights(recipe: Recipe) -> dict[str, Tensor] | None:
    path = find_file(recipe)
    return None if path is None else load(path, recipe, any_code=True).weights


def jobs_for(recipes: Sequence[Recipe], folder: Path) -> list[dict[str, Any]]:
    """What both versions of the code are asked for, the weights they begin with written to ``folder``."""

    def file(name: str, weights: Mapping[str, Tensor]) -> str:
        write_tensors(folder / f"{name}.safetensors", weights, {})
        return str(folder / f"{name}.safetensors")

    jobs = []
    for index, recipe in enumerate(recipes):
        before = None if recipe.start is None else _stored_weights(recipe.start) or made_up_weights(recipe)
        after = before if recipe.prepare is not None else _stored_weights(recipe) or made_up_weights(recipe)
        begin = None if before is None else file(f"{index}-first", before)
        end = {"first": max(0, recipe.steps - LAST_STEPS), "last": recipe.steps, "finish": True}
        windows = [
            {"first": 0, "last": min(FIRST_STEPS, recipe.steps), "weights": begin, "finish": False},
            end | {"weights": file(f"{index}-last", after)},
        ]
        jobs.append({"recipe": describe(shortened(recipe)), "windows": windows})
    return jobs


# --- running both -----------------------------------------------------------------------------------------------------


def _git(*arguments: str) -> str:
    done = subprocess.run(["git", *arguments], cwd=repository_root(), capture_output=True, text=True)
    if done.returncode:
        raise ValueError(f"git {' '.join(arguments)}: {done.stderr.strip()}")
    return done.stdout.strip()


@contextmanager
def worktree(commit: str, folder: Path) -> Iterator[Path]:
    """The files of a commit, for as long as they are needed.

    Raises:
        ValueError: if there is no such commit, or its code has not the command that is needed.
    """
    path = folder / "worktree"
    _git("worktree", "add", "--detach", str(path), commit)
    try:
        module = path / "s2d" / "lab" / "replay.py"
        if not module.is_file() or "--trajectory" not in module.read_text(encoding="utf-8"):
            raise ValueError(
                f"commit {commit} is from before there were replays (its s2d.lab.replay has no --trajectory): choose a "
                "later one, whose code made the entries"
            )
        yield path
    finally:
        _git("worktree", "remove", "--force", str(path))


def _start(root: Path, jobs: Path, out: Path) -> subprocess.Popen:
    environment = os.environ | {"PYTHONPATH": str(root), "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "s2d.lab.replay", "--trajectory", str(jobs), str(out)]
    return subprocess.Popen(command, cwd=root, env=environment)


def run_both(roots: Sequence[Path], jobs: Sequence[Mapping[str, Any]], folder: Path) -> list[tuple[dict, dict]]:
    """Tensors and description of the same jobs by the code in each root, side by side.

    Raises:
        RuntimeError: if one of them fails.
    """
    asked = folder / "jobs.json"
    asked.write_text(json.dumps(list(jobs)), encoding="utf-8")
    outs = [folder / f"out{index}.safetensors" for index in range(len(roots))]
    running = [_start(root, asked, out) for root, out in zip(roots, outs, strict=True)]
    try:
        for root, process in zip(roots, running, strict=True):
            if process.wait():
                raise RuntimeError(f"the replay by the code in {root} failed (exit status {process.returncode})")
    finally:
        for process in running:
            process.kill()
            process.wait()
    results = [read_tensors(out) for out in outs]
    for root, (_, said) in zip(roots, results, strict=True):
        if Path(said["package"]) != (root / "s2d").resolve():
            raise RuntimeError(f"the replay imported {said['package']} instead of the code in {root}")
    return results


# --- the verdict ------------------------------------------------------------------------------------------------------


@dataclass
class Report:
    """What a replay found.

    Attributes:
        equal: recipe and the line for the ledger.
        unequal: recipe and its first difference.
        same_code: recipes whose code hash is the same, which were not run.
        incomparable: recipe and why the old code cannot run it.
    """

    equal: list[tuple[Recipe, Line]] = field(default_factory=list)
    unequal: list[tuple[Recipe, str]] = field(default_factory=list)
    same_code: list[Recipe] = field(default_factory=list)
    incomparable: list[tuple[Recipe, str]] = field(default_factory=list)

    def culprits(self) -> list[str]:
        """The components that every unequal training uses and no equal one does: candidates for a raised version."""

        def own(recipe: Recipe) -> set[str]:
            return components(replace(recipe, start=None))  # both began with the same weights

        used = [own(recipe) for recipe, _ in self.unequal]
        return sorted(set.intersection(*used).difference(*(own(recipe) for recipe, _ in self.equal))) if used else []


def first_difference(index: int, old: tuple[dict, dict], new: tuple[dict, dict]) -> str | None:
    """The first thing in which two trajectories of one job differ, in words; None if they are equal."""
    windows = [said["jobs"][index]["windows"] for _, said in (old, new)]
    for number, (before, after) in enumerate(zip(*windows, strict=True)):
        where = ("first steps", "last steps")[number]
        for step, (a, b) in enumerate(zip(before["losses"], after["losses"], strict=True), start=1):
            if repr(a) != repr(b):
                return f"{where}: the loss at the {step}. of them was {a!r} and is {b!r}"
        prefix = f"{index}/{number}/"
        states = [{n.removeprefix(prefix): t for n, t in r[0].items() if n.startswith(prefix)} for r in (old, new)]
        for name in sorted(states[0] | states[1]):
            a, b = (state.get(name) for state in states)
            if a is None or b is None or (a.shape, a.dtype) != (b.shape, b.dtype):
                kinds = ("missing" if t is None else f"{tuple(t.shape)} of {t.dtype}" for t in (a, b))
                return f"{where}: {name} was {' and is '.join(kinds)}"
            if checksum({"": a}, {}) != checksum({"": b}, {}):
                return f"{where}: {name} differs by {(a.double() - b.double()).abs().max().item():.3g} at most"
        if json.dumps(before["history"], sort_keys=True) != json.dumps(after["history"], sort_keys=True):
            return f"{where}: the measurements were {before['history']} and are {after['history']}"
    return None


def replay(commit: str, recipes: Sequence[Recipe]) -> Report:
    """Compare the code of a commit with today's, on one recipe a kind.

    Args:
        commit: whatever git understands.
        recipes: of one kind each.

    Returns:
        What was found; the ledger is not written.

    Raises:
        ValueError: see :func:`worktree`.
    """
    commit = _git("rev-parse", "--verify", f"{commit}^{{commit}}")
    report = Report()
    with tempfile.TemporaryDirectory(prefix="s2d-replay-") as name, worktree(commit, Path(name)) as old_root:
        roots, folder = (old_root, repository_root()), Path(name)
        asked = [{"recipe": describe(shortened(recipe)), "windows": []} for recipe in recipes]
        (_, old), (_, new) = run_both(roots, asked, folder)
        differing = []
        for recipe, before, after in zip(recipes, old["jobs"], new["jobs"], strict=True):
            if "error" in before or before["kind"] != after["kind"]:
                report.incomparable.append((recipe, before.get("error", f"it was {before.get('kind')}")))
            elif before["code"] == after["code"]:
                report.same_code.append(recipe)
            else:
                differing.append((recipe, before, after))
        if differing:
            jobs = jobs_for([recipe for recipe, _, _ in differing], folder)
            results = run_both(roots, jobs, folder)
        for index, (recipe, before, after) in enumerate(differing):
            difference = first_difference(index, *results)
            if difference is not None:
                report.unequal.append((recipe, difference))
                continue
            steps = sum(window["last"] - window["first"] for window in jobs[index]["windows"])
            raised = ";".join(f"{name}={version}" for name, version in versions(recipe).items())
            machine = (results[1][1]["torch"], results[1][1]["cpu"])
            line = Line(kind(recipe), before["code"], after["code"], commit[:12], steps, raised, *machine)
            report.equal.append((recipe, line))
    return report


def advice(report: Report, recipes: Sequence[Recipe]) -> str:
    """What to do about what was unequal: the narrowest version to raise, and which entries are then trained again."""
    users = {
        name: [recipe for recipe in recipes if name in components(recipe)] for name in report.culprits() or ["loop"]
    }
    name = min(users, key=lambda name: (len(users[name]), name != "loop"))
    entries = [file_name(recipe) for recipe in users[name] if find_file(recipe) is not None]
    listed = "".join(f"\n  {entry}" for entry in entries) or "\n  none is stored here"
    return (
        "If the edit was not meant to change numbers, mend it. If it was, raise the version of what it changed in "
        f's2d/lab/identity.py, VERSIONS: "{name}": {VERSIONS.get(name, 1) + 1}, which has {len(users[name])} recipes. '
        f"These entries are then trained again (make figures):{listed}"
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; see the module's text.

    Returns:
        The exit status: 0 if all that could be compared was equal, 1 if something was not, 2 for bad input.
    """
    from s2d.lab.recipes import laptop_recipes

    parser = argparse.ArgumentParser(prog="python -m s2d.lab.replay", description=__doc__.split("\n")[0])
    parser.add_argument("--against", metavar="COMMIT", help="the commit whose code made the entries")
    parser.add_argument("--recipes", nargs="+", default=[], metavar="TEXT", help="only kinds that contain one of these")
    parser.add_argument("--trajectory", nargs=2, type=Path, metavar=("JOBS", "OUT"), help="for replays themselves")
    options = parser.parse_args(arguments)
    if (options.against is None) == (options.trajectory is None):
        parser.error("give --against COMMIT")
    if options.trajectory is not None:
        torch.set_num_threads(1)
        jobs, out = options.trajectory
        write_tensors(out, *trajectory(json.loads(jobs.read_text(encoding="utf-8"))))
        return 0
    known = laptop_recipes()
    try:
        with interruptible():
            report = replay(options.against, one_of_each_kind(known, options.recipes))
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    return show(report, known)


def show(report: Report, recipes: Sequence[Recipe]) -> int:
    """Print a report, write the ledger, and return the exit status.

    Args:
        report: from :func:`replay`.
        recipes: those whose entries are looked for when a version has to be raised.
    """
    for recipe in report.same_code:
        print(f"same code           {kind(recipe)}")
    for recipe, line in report.equal:
        print(f"equal on {line.steps:3} steps  {kind(recipe)}")
    for recipe, reason in report.incomparable:
        print(f"unknown to it       {kind(recipe)}: {reason}")
    for recipe, difference in report.unequal:
        print(f"UNEQUAL             {kind(recipe)}: {difference}")
    added = append_lines(line for _, line in report.equal)
    print(f"{len(added)} new lines in data/laptop/ledger.csv: commit them with the edit" if added else "no new lines")
    if report.unequal:
        print(advice(report, recipes))
    return 1 if report.unequal or (report.incomparable and not (report.equal or report.same_code)) else 0


if __name__ == "__main__":
    sys.exit(main())
