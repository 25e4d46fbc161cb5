"""A study's checkpoints where they are, its committed tables where they are not.

A clone holds the checkpoints that a reader starts from and the tables of everything. A study over hundreds of
checkpoints is measured where all of them are in the store; where some are not, and the study is the committed one
(same parameters), its tables are read instead. With other parameters, or a store of its own (``FROM=scratch``), what is
missing is trained.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pandas as pd

from s2d.lab.paths import repository_root
from s2d.lab.results import COMMITTED, MINE
from s2d.lab.store import Trained, find_file, obtain_checkpoints
from s2d.lab.training import Recipe


class Study:
    """Some checkpoints and the tables measured on them.

    Args:
        recipes: variant to one recipe a seed.
        run: output label, usually the scale.
        source: from :func:`s2d.lab.results.provenance`.
        measure: whether to measure where all checkpoints are in the store; a reader need not wait for that.

    Attributes:
        missing: how many of the checkpoints were not in the store.
        recorded: whether the tables are read, because checkpoints are missing or nobody asked to measure.

    Example:
        >>> from s2d.lab.recipes import pretraining
        >>> Study({"AdamW": [pretraining("adamw", seed=2)]}, run="laptop", source={"parameters": {}}).recorded
        False
    """

    def __init__(
        self, recipes: Mapping[Any, Sequence[Recipe]], *, run: str, source: Mapping[str, Any], measure: bool = True
    ) -> None:
        self.recipes, self.run, self.source = recipes, run, source
        every = [recipe for group in recipes.values() for recipe in group]
        self.missing = sum(find_file(recipe) is None for recipe in every)
        self.recorded = (self.missing > 0 or not measure) and not os.environ.get("S2D_STORE")
        self._checkpoints: dict[Any, list[Trained]] | None = None
        self._total = len(every)

    def __str__(self) -> str:
        if self.recorded and not self.missing:
            return "what the committed tables hold is read from them (measure = True measures it again)"
        if self.recorded:
            return (
                f"{self.missing} of {self._total} checkpoints are not here (make fetch gets them, FROM=scratch trains "
                "them): what the committed tables hold is read from them"
            )
        return f"measured on {self._total} checkpoints"

    @property
    def checkpoints(self) -> dict[Any, list[Trained]]:
        """Variant to one result a seed; what is missing is trained."""
        if self._checkpoints is None:
            self._checkpoints = obtain_checkpoints(self.recipes)
        return self._checkpoints

    def only(self, names: Mapping[Any, Any], *, seeds: Sequence[int] | None = None) -> Study:
        """A part of the study, measured or read like the whole of it.

        Args:
            names: variants to keep, to what they are called in the part.
            seeds: of the pretraining; by default all.
        """
        recipes = {
            new: [recipe for recipe in self.recipes[old] if seeds is None or recipe.origin.seed in seeds]
            for old, new in names.items()
        }
        part = Study(recipes, run=self.run, source=self.source)
        part.recorded = self.recorded  # its tables are of one study: all measured here, or all read
        return part

    def table(self, name: str, measure: Callable[..., pd.DataFrame], *args: Any, **options: Any) -> pd.DataFrame:
        """A table of this study: measured, or read where it is the committed one and checkpoints are missing.

        Args:
            name: the one it is saved under.
            measure: called with the checkpoints, ``args`` and ``options``.

        Returns:
            The table; one that was read carries its provenance, which :func:`s2d.lab.results.save_table` keeps.
        """
        if self.recorded and (committed := self._committed(name)) is not None:
            return committed
        return measure(self.checkpoints, *args, **options)

    def _committed(self, name: str) -> pd.DataFrame | None:
        """The committed table, if it was made with this study's parameters."""
        labels = (MINE, COMMITTED) if self.run == MINE else (self.run,)
        for path in (repository_root() / "data" / run / f"{name}.csv" for run in labels):
            if not path.exists():
                continue
            source = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
            if source["parameters"] == json.loads(json.dumps(self.source["parameters"])):
                table = pd.read_csv(path, keep_default_na=False, na_values=[""])
                table.attrs["provenance"] = source
                return table
        return None


def largest_difference(table: pd.DataFrame, again: pd.DataFrame, by: Sequence[str], column: str) -> float:
    """How far a few rows that were measured again are from those of a table.

    Args:
        table: has a row for every row of ``again``.
        again: rows measured now.
        by: columns that name a row.
        column: what is compared.

    Raises:
        ValueError: if the table lacks one of the rows, or has it twice.

    Example:
        >>> table = pd.DataFrame({"seed": [2, 3], "accuracy": [0.5, 0.75]})
        >>> largest_difference(table, pd.DataFrame({"seed": [3], "accuracy": [0.5]}), ["seed"], "accuracy")
        0.25
    """
    try:
        both = again.merge(table, on=list(by), how="left", validate="one_to_one", suffixes=("_again", ""))
    except pd.errors.MergeError as error:
        raise ValueError(f"the table has rows twice that {', '.join(by)} should name: {error}") from error
    if both[column].isna().any():
        lacking = both.loc[both[column].isna(), list(by)].iloc[0].to_dict()
        raise ValueError(f"the table has no row {lacking}: measure it anew (measure = True)")
    return float((both[f"{column}_again"] - both[column]).abs().max())
