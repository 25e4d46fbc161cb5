"""What is installed: pyproject.toml, constraints.txt and environment.yml agree, and the core stays light."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml

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
