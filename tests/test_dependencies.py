"""Dependencies read from source: what counts as code, what an import leads to, and which files that makes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from s2d.lab import dependencies
from s2d.lab.dependencies import closure, code_hash, imported_modules, notebook_modules

ROOT = Path(__file__).resolve().parents[1]

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
        return dependencies.code_only(path)

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
        ("return pi", "return 2 * pi"),
        ("        return pi", "        if r > 0:\n            return pi"),
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
        ('"""Überschrift."""; x = 1\n', '"""Überschrift."""; x = 2\n'),
        ("x = 1\nif x:\n    y = 2\n    z = 3\n", "x = 1\nif x:\n    y = 2\nz = 3\n"),
    ],
)
def test_code_beside_a_docstring_and_text_over_lines_count(code_only, one: str, two: str) -> None:
    assert code_only(one) != code_only(two)


# --- imports ---


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A small project: a core that hands names on, a lab, and a folder of drawings."""
    folder = tmp_path / "s2d"
    files = {
        "__init__.py": "from s2d.a import f\nfrom s2d.b import g as h\n__version__ = '1'\n",
        "a.py": "import math\ndef f(): ...\n",
        "b.py": "from s2d.a import f\ndef g(): ...\n",
        "sub/__init__.py": "from .c import deep\nfrom s2d.b import g\nTABLE = {}\n",
        "sub/c.py": "from ..a import f\nfrom . import d\ndeep = 1\n",
        "sub/d.py": "",
        "lab/__init__.py": "",
        "lab/late.py": "def f():\n    from s2d.sub import deep\n    import importlib\n"
        "    importlib.import_module('s2d.b')\n    importlib.import_module(name)\n",
        "lab/circle.py": "import s2d.lab.back\n",
        "lab/back.py": "from s2d.lab import circle\n",
        "lab/figures/__init__.py": "",
        "lab/figures/style.py": "from s2d.b import g\n",
        "lab/show.py": "from s2d.lab.figures.style import x\n",
    }
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    monkeypatch.setattr(dependencies, "PACKAGE", folder)
    return folder


@pytest.mark.parametrize(
    ("modules", "files"),
    [
        (["s2d.a"], ["a.py"]),
        (["s2d.b", "s2d.b"], ["a.py", "b.py"]),
        (["s2d"], ["__init__.py", "a.py", "b.py"]),
        (["s2d.sub"], ["a.py", "b.py", "sub/__init__.py", "sub/c.py", "sub/d.py"]),
        (["s2d.sub.c"], ["a.py", "sub/c.py", "sub/d.py"]),
        (["s2d.lab.late"], ["a.py", "b.py", "lab/late.py", "sub/c.py", "sub/d.py"]),
        (["s2d.lab.circle"], ["lab/back.py", "lab/circle.py"]),
        (["numpy", "s2dx.other"], []),
        ([], []),
    ],
)
def test_closure(package: Path, modules: list[str], files: list[str]) -> None:
    assert [path.relative_to(package).as_posix() for path in closure(modules)] == files


def test_what_is_left_out_is_not_entered(package: Path) -> None:
    assert [path.name for path in closure(["s2d.lab.show"])] == ["a.py", "b.py", "style.py", "show.py"]
    assert [path.name for path in closure(["s2d.lab.show"], without=dependencies.DRAWING)] == ["show.py"]
    assert len(closure(["s2d.lab.show"], without=["s2d.lab.fig"])) == 4  # a prefix of a name is no package


@pytest.mark.parametrize(
    ("source", "modules"),
    [
        ("import s2d.b as b, math", ["s2d.b"]),
        ("from s2d import f, h", ["s2d.a", "s2d.b"]),
        ("from s2d import h as other, __version__", ["s2d.b", "s2d"]),
        ("from s2d import b", ["s2d.b"]),
        ("from s2d.sub import deep, g, TABLE", ["s2d.sub.c", "s2d.b", "s2d.sub"]),
        ("from s2d.a import f, f", ["s2d.a"]),
        ("from math import pi\nx = 's2d.a'", []),
    ],
)
def test_an_import_leads_to_where_the_name_is_defined(package: Path, source: str, modules: list[str]) -> None:
    assert imported_modules(source) == modules


def test_a_module_that_is_not_there_is_named(package: Path) -> None:
    with pytest.raises(ValueError, match="there is no module s2d.lab.gone under .*: mend the import"):
        closure(["s2d.lab.gone"])


@pytest.mark.parametrize("module", ["s2d.lab.results", "s2d.lab.evaluate"])
def test_the_closure_holds_every_module_that_python_loads(module: str) -> None:
    """Against the interpreter; it also runs the packages' own files, which load what nothing here may need."""
    code = f"import sys, {module}; print(*(m.__file__ for n, m in sys.modules.items() if n.split('.')[0] == 's2d'))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    loaded = {Path(name) for name in done.stdout.split() if not name.endswith("__init__.py")}
    assert loaded - set(closure(["s2d", "s2d.ptq"])) - set(closure([module])) == set()
    assert ROOT.joinpath(*module.split(".")).with_suffix(".py") in loaded


# --- hashes ---


def test_the_hash_changes_with_code_and_place_alone(package: Path) -> None:
    paths = closure(["s2d.b"])
    first = code_hash(paths)
    assert code_hash(reversed(paths)) == first == code_hash(paths + paths)
    assert code_hash(paths[:1]) != first
    path = package / "a.py"
    path.write_text('"""Said differently."""\n# and remarked upon\n' + path.read_text())
    assert code_hash(paths) == first
    path.write_text(path.read_text() + "x = 1\n")
    assert code_hash(paths) != first
    same = (package / "lab" / "late.py").read_text()
    (package / "moved.py").write_text(same)
    assert code_hash([package / "moved.py"]) != code_hash([package / "lab" / "late.py"])


def test_the_hash_does_not_depend_on_where_the_package_lies(package: Path, tmp_path: Path, monkeypatch) -> None:
    first = code_hash(closure(["s2d.sub"]))
    package.rename(tmp_path / "elsewhere")
    monkeypatch.setattr(dependencies, "PACKAGE", tmp_path / "elsewhere")
    assert code_hash(closure(["s2d.sub"])) == first


def test_files_of_others_have_no_hash(package: Path, tmp_path: Path) -> None:
    (tmp_path / "other.py").write_text("")
    with pytest.raises(ValueError, match="other.py is not in the package"):
        code_hash([tmp_path / "other.py"])


# --- notebooks ---


def test_the_modules_of_a_notebook(package: Path, tmp_path: Path) -> None:
    cells = [
        {"cell_type": "markdown", "source": ["from s2d import h"]},
        {"cell_type": "code", "source": ["from s2d import f\n", "import math"]},
        {"cell_type": "code", "source": ["from s2d.sub import deep"]},
    ]
    path = tmp_path / "01_some.ipynb"
    path.write_text(json.dumps({"cells": cells}))
    assert notebook_modules(path) == ["s2d.a", "s2d.sub.c"]


def test_planning_imports_nothing_of_the_project() -> None:
    code = (
        "import runpy, sys; d = runpy.run_path('s2d/lab/dependencies.py'); "
        "paths = d['closure'](['s2d.lab.frontier']); "
        "print(len(paths), [m for m in sys.modules if m.split('.')[0] in ('s2d', 'torch', 'numpy')])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    count, imported = done.stdout.split(maxsplit=1)
    assert int(count) > 10 and imported.strip() == "[]"
