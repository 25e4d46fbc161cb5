"""What is installed: pyproject.toml, constraints.txt and environment.yml agree, and the core stays light."""

from __future__ import annotations

import ast
import json
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml

from s2d.lab.badges import main as badges_main
from s2d.lab.badges import with_badges
from s2d.lab.dependencies import closure, notebook_code, notebook_modules

ROOT = Path(__file__).resolve().parents[1]


def canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def requirement_name(requirement: str) -> str:
    return canonical(re.match(r"[A-Za-z0-9._-]+", requirement)[0])


@pytest.fixture(scope="module")
def project() -> dict:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


@pytest.fixture(scope="module")
def pins() -> dict[str, str]:
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#")]
    return {canonical(name): version for name, version in (line.split("==") for line in lines)}


def direct_requirements(project: dict) -> list[str]:
    extras = project["optional-dependencies"]
    named = project["dependencies"] + [text for extra in extras.values() for text in extra]
    return sorted(set(named))


def test_the_core_depends_on_torch_alone(project):
    assert [requirement_name(r) for r in project["dependencies"]] == ["torch"]


def test_every_direct_requirement_is_pinned_within_its_range(project, pins):
    from packaging.requirements import Requirement

    for text in direct_requirements(project):
        requirement = Requirement(text)
        assert requirement.specifier.contains(pins[canonical(requirement.name)]), text


def test_environment_yml_is_true_to_pyproject_and_constraints(project, pins):
    environment = yaml.safe_load((ROOT / "environment.yml").read_text())
    pip = next(entry for entry in environment["dependencies"] if isinstance(entry, dict))["pip"]
    packages = dict(line.split("==") for line in pip if not line.startswith("-"))
    assert {canonical(name): version for name, version in packages.items()} == {
        requirement_name(r): pins[requirement_name(r)] for r in direct_requirements(project)
    }
    assert [line for line in pip if line.startswith("-")] == ["-c constraints.txt", "-e ."]
    python = next(e for e in environment["dependencies"] if isinstance(e, str) and e.startswith("python="))
    oldest = project["requires-python"].removeprefix(">=")
    assert python == f"python={oldest}"


def test_no_index_host_is_named():
    for name in ("pyproject.toml", "constraints.txt", "environment.yml", "Makefile", ".ci/run"):
        text = (ROOT / name).read_text()
        assert "index-url" not in text and "://" not in text, name


def test_torch_and_torchvision_fit_each_other(pins):
    from importlib.metadata import requires

    from packaging.requirements import Requirement

    needs = next(r for r in map(Requirement, requires("torchvision")) if r.name == "torch")
    assert needs.specifier.contains(pins["torch"])


@pytest.mark.parametrize("module", ["s2d", "s2d.regularizer", "s2d.ptq", "s2d.integrations"])
def test_core_imports_without_the_lab_packages(module):
    heavy = ["timm", "open_clip", "matplotlib", "seaborn", "pandas", "IPython", "papermill", "sklearn", "torchvision"]
    heavy += ["transformers", "accelerate", "lightning", "peft"]
    code = f"import sys, {module}; print([m for m in {heavy!r} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_core_never_imports_upwards():
    for path in (ROOT / "s2d").glob("*.py"):
        assert not re.search(r"(from|import) s2d\.(ptq|lab|integrations)", path.read_text()), path.name
    for path in (ROOT / "s2d" / "ptq").glob("*.py"):
        assert not re.search(r"(from|import) s2d\.(lab|integrations)", path.read_text()), path.name
    for path in (ROOT / "s2d" / "integrations").glob("*.py"):
        assert not re.search(r"(from|import) s2d\.(ptq|lab)", path.read_text()), path.name


IMPORTED_AS = {"torch": "pytorch-cpu", "sklearn": "scikit-learn", "matplotlib": "matplotlib-base", "yaml": "pyyaml"}
ON_USE = {"transformers", "open_clip", "onnx", "onnxruntime", "gguf", "snakemake"}  # refused by name where missing


def test_binder_has_what_the_notebooks_import_and_no_cuda():
    environment = yaml.safe_load((ROOT / "binder" / "environment.yml").read_text())
    has = {re.split(r"[=<>]", name)[0] for name in environment["dependencies"]}
    notebooks = sorted((ROOT / "notebooks").glob("[0-9]*.ipynb"))
    modules = {module for path in notebooks for module in notebook_modules(path)}
    texts = [*map(notebook_code, notebooks), *(path.read_text() for path in closure(modules))]
    wanted = set()
    for node in (node for text in texts for node in ast.parse(text).body):  # at the top: imported by importing
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        names += [node.module] if isinstance(node, ast.ImportFrom) and node.module else []
        wanted |= {name.split(".")[0] for name in names}
    wanted -= set(sys.stdlib_module_names) | {"s2d"} | ON_USE
    coming_along = {"IPython", "nbformat", "nbclient", "jupyter_client", "PIL", "scipy", "packaging", "jupyter_core"}
    assert {IMPORTED_AS.get(name, name) for name in wanted - coming_along} <= has
    assert not [name for name in has if "cuda" in name]


def test_badges_are_put_in_once_and_a_strange_name_is_refused(capsys):
    page = "# Title\n\nText."
    once = with_badges(page, "a/b", "notebooks/00_by_hand.ipynb")
    assert once.startswith("# Title\n\n<!-- badges -->") and once.endswith("Text.") and "mybinder.org/v2/gh/a/b" in once
    assert with_badges(once, "c/d", "notebooks/00_by_hand.ipynb").count("c/d") == 2
    assert badges_main(["not a repository"]) == 2
    assert "give OWNER/NAME" in capsys.readouterr().err


def test_a_wheel_out_of_an_sdist_works_where_the_repository_is_not(tmp_path):
    def run(*command, cwd):
        made = subprocess.run([sys.executable, *command], cwd=cwd, capture_output=True, text=True)
        assert made.returncode == 0, made.stderr
        return made.stdout

    build = "from setuptools import build_meta; build_meta.build_{kind}({folder!r})"
    run("-c", build.format(kind="sdist", folder=str(tmp_path)), cwd=ROOT)
    (archive,) = tmp_path.glob("s2d-*.tar.gz")
    shutil.unpack_archive(archive, tmp_path / "unpacked", filter="data")
    (source,) = (tmp_path / "unpacked").iterdir()
    run("-c", build.format(kind="wheel", folder=str(tmp_path)), cwd=source)
    (wheel,) = tmp_path.glob("s2d-*.whl")
    target = tmp_path / "installed"
    run("-m", "pip", "install", "--quiet", "--no-deps", "--target", str(target), str(wheel), cwd=tmp_path)
    # -I: neither this folder nor the editable installation's paths come before it.
    code = f"import sys; sys.path.insert(0, {str(target)!r}); import s2d, s2d.ptq, s2d.command; print(s2d.__file__)"
    assert run("-I", "-c", code, cwd=tmp_path).strip() == str(target / "s2d" / "__init__.py")
    packages = {path.parent.relative_to(ROOT / "s2d") for path in (ROOT / "s2d").rglob("__init__.py")}
    assert packages == {path.parent.relative_to(target / "s2d") for path in (target / "s2d").rglob("__init__.py")}


def test_what_describes_the_project_elsewhere_agrees_with_it(project):
    version = re.search(r'__version__ = "(.+)"', (ROOT / "s2d" / "__init__.py").read_text())[1]
    assert f'version: "{version}"' in (ROOT / "CITATION.cff").read_text()
    zenodo = json.loads((ROOT / ".zenodo.json").read_text())
    assert zenodo["license"] == project["license"] and zenodo["keywords"] == project["keywords"]
    container = (ROOT / "Dockerfile").read_text()
    assert (
        f"python:{project['requires-python'].removeprefix('>=')}-" in container and "make TORCH_BACKEND=" in container
    )
