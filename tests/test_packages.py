"""A missing optional package is named, with what needs it and how to install it."""

from __future__ import annotations

import json
import sys

import pytest

from s2d.packages import need


def test_the_module_is_returned() -> None:
    assert need("json.decoder", "a test") is json.decoder


@pytest.mark.parametrize(("module", "package"), [("PIL.Image", "pillow"), ("safetensors.torch", "safetensors")])
def test_a_missing_package_is_named_as_pip_knows_it(module: str, package: str, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, module.partition(".")[0], None)
    monkeypatch.delitem(sys.modules, module, raising=False)
    with pytest.raises(ImportError, match=f"^a test needs the package {package}: pip install {package}$"):
        need(module, "a test")
