"""The configuration of the batch, from ``paper/*.yaml`` or as Snakemake hands it on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from s2d.lab.paper_scale.experiments import asked_tables, seeds_of
from s2d.lab.paths import repository_root
from s2d.packages import need


def read_configuration(text: str) -> dict[str, Any]:
    """A configuration, from a YAML file or out of JSON.

    Raises:
        ValueError: for a file that is missing or no mapping, and seeds or tables that are none.

    Example:
        >>> read_configuration('{"seeds": "0 1"}')["seeds"]
        [0, 1]
    """
    if text.startswith("{"):
        found = json.loads(text)
    else:
        path = Path(text) if Path(text).is_file() else repository_root() / text
        if not path.is_file():
            raise ValueError(f"--config {text} does not exist: give a YAML file, such as paper/paper.yaml")
        yaml = need("yaml", "a configuration")
        found = yaml.safe_load(path.read_text(encoding="utf-8"))
    if not isinstance(found, dict):
        raise ValueError(f"--config {text} holds no names and values: see paper/paper.yaml")
    found["seeds"] = seeds_of(found.get("seeds", [0]))
    asked_tables(found)
    return found
