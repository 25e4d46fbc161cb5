"""Packages that only some functions need."""

from __future__ import annotations

import importlib
from types import ModuleType

_DISTRIBUTIONS = {"PIL": "pillow"}  # where pip knows a package by another name than Python


def need(module: str, why: str) -> ModuleType:
    """Import a module of an optional package.

    Args:
        module: its name, ``"package"`` or ``"package.module"``.
        why: what needs it.

    Returns:
        The module.

    Raises:
        ImportError: naming what needs which package, and how to install it.

    Example:
        >>> need("json.decoder", "this example").__name__
        'json.decoder'
        >>> need("no_such_package", "this example")
        Traceback (most recent call last):
        ImportError: this example needs the package no_such_package: pip install no_such_package

    Paper: none
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = module.partition(".")[0]
        package = _DISTRIBUTIONS.get(package, package)
        raise ImportError(f"{why} needs the package {package}: pip install {package}") from error
