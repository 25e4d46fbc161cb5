"""Rules of the house that can be read off the source: what may know of what, and what is an error in a test."""

from __future__ import annotations

import ast
import warnings
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
# From the ground up; a layer knows those below it only.
LAYERS = (
    "s2d",
    "s2d.integrations",
    "s2d.ptq",
    "s2d.models",
    "s2d.ptq.command",
    "s2d.ptq.__main__",
    "s2d.train",
    "s2d.command",
    "s2d.__main__",
    "s2d.lab",
)
# Methods of named tuples, and an attribute of torch's MultiheadAttention that a module of ours imitates.
NOT_OURS = {"_replace", "_asdict", "_fields", "_make", "_qkv_same_embed_dim"}


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


TREES = {module_name(path): ast.parse(path.read_text(encoding="utf-8")) for path in sorted(ROOT.glob("s2d/**/*.py"))}


def layer(module: str) -> int:
    """Its place in ``LAYERS``: that of the longest name that it lies in."""
    return max(i for i, name in enumerate(LAYERS) if module == name or module.startswith(f"{name}."))


def imports(tree: ast.AST, known: set[str]) -> Iterator[tuple[str, str | None, str, int]]:
    """Module, name in it (None for the module itself), name it is bound to, and line, of all imports of our own."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.split(".")[0] == "s2d":
                    yield alias.name, None, alias.asname or alias.name, node.lineno
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute here"
            if node.module.split(".")[0] == "s2d":
                for alias in node.names:
                    inner = f"{node.module}.{alias.name}"
                    found = (inner, None) if inner in known else (node.module, alias.name)
                    yield *found, alias.asname or alias.name, node.lineno


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__")


def private_uses(module: str, trees: dict[str, ast.AST]) -> list[str]:
    """Where a module imports or reads a private name of another."""
    tree, known, found, modules = trees[module], set(trees), [], set()
    for source, name, bound, line in imports(tree, known):
        if any(map(is_private, [*source.split("."), name or ""])):
            found.append(f"{module}:{line} imports {source}.{name or ''}")
        if name is None:
            modules.add(bound)
    own = attributes(tree)
    others = set().union(*(attributes(other) for name, other in trees.items() if name != module))
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and is_private(node.attr):
            base = ast.unparse(node.value)
            inherited = base in ("self", "cls", "super()")
            if base in modules or (node.attr in others - own - NOT_OURS and not inherited):
                found.append(f"{module}:{node.lineno} reads {base}.{node.attr}")
    return sorted(found)


@cache
def attributes(tree: ast.AST) -> frozenset[str]:
    """Private names that a module gives to methods, and to attributes of classes and objects."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            names.add(node.attr)
        elif isinstance(node, ast.ClassDef):
            for entry in node.body:
                names.add(getattr(entry, "name", ""))
                targets = getattr(entry, "targets", [getattr(entry, "target", None)])
                names |= {target.id for target in targets if isinstance(target, ast.Name)}
    return frozenset(filter(is_private, names))


def upward_imports(module: str, trees: dict[str, ast.AST]) -> list[str]:
    """Where a module imports from a layer that may only know of it; the integrations are for training and the lab."""
    own = LAYERS[layer(module)]
    below = set(LAYERS[: layer(module) + 1])
    users = {"s2d.train": below, "s2d.lab": below}
    allowed = ({"s2d.integrations": {"s2d", own}} | users).get(own, below - {"s2d.integrations"})
    return [
        f"{module}:{line} imports {source}"
        for source, _, _, line in imports(trees[module], set(trees))
        if LAYERS[layer(source)] not in allowed
    ]


@pytest.mark.parametrize("module", TREES)
def test_no_module_uses_a_private_name_of_another(module: str) -> None:
    assert private_uses(module, TREES) == []


@pytest.mark.parametrize("module", TREES)
def test_a_layer_knows_those_below_it_only(module: str) -> None:
    assert upward_imports(module, TREES) == []


def test_the_rules_see_what_they_forbid() -> None:
    sources = {
        "s2d": "",
        "s2d.ptq": "def _hidden(): ...",
        "s2d.ptq.a": "class Box:\n    def __init__(self):\n        self._inside = 1",
        "s2d.core": "from s2d.lab import x\ndef f():\n    import s2d.ptq.a as a",
        "s2d.lab": "x = 1",
        "s2d.lab.b": "from s2d import ptq\nfrom s2d.ptq import _hidden\nptq._hidden()\nbox._inside\nself._inside",
        "s2d.ptq.c": "from s2d.lab.b import y",
        "s2d.integrations": "",
        "s2d.integrations.d": "from s2d.ptq.a import Box\nfrom s2d.core import f\nt._replace(x=1)",
    }
    trees = {name: ast.parse(source) for name, source in sources.items()}
    assert {name: private_uses(name, trees) for name in trees if private_uses(name, trees)} == {
        "s2d.lab.b": [
            "s2d.lab.b:2 imports s2d.ptq._hidden",
            "s2d.lab.b:3 reads ptq._hidden",
            "s2d.lab.b:4 reads box._inside",
        ]
    }
    assert {name: upward_imports(name, trees) for name in trees if upward_imports(name, trees)} == {
        "s2d.core": ["s2d.core:1 imports s2d.lab", "s2d.core:3 imports s2d.ptq.a"],
        "s2d.ptq.c": ["s2d.ptq.c:1 imports s2d.lab.b"],
        "s2d.integrations.d": ["s2d.integrations.d:1 imports s2d.ptq.a"],
    }


@pytest.mark.parametrize("module", ["s2d.pcdr", "s2d.lab.results", "test_pcdr", "numpy._core.fromnumeric"])
def test_a_runtime_warning_of_our_own_is_an_error(module: str) -> None:
    with pytest.raises(RuntimeWarning, match="invalid value"):
        warnings.warn_explicit("invalid value", RuntimeWarning, "file.py", 1, module=module, registry={})


def test_torchs_own_runtime_warnings_are_none() -> None:
    message = "Guards may run slower on Python 3.13.0. Consider upgrading to Python 3.13.1+."
    with pytest.warns(RuntimeWarning, match="Guards"):
        warnings.warn_explicit(message, RuntimeWarning, "guards.py", 1, module="torch._dynamo.guards", registry={})
