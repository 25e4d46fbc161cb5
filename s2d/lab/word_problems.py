"""Word problems that a tiny language model can solve, made from templates, in words."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
from torch import Tensor

from s2d.models.problems import Problem

LARGEST = 20
"""Of the numbers in a question; answers go up to twice as far."""
NAMES = "Ada Ben Cleo Dan Eve Finn Gwen Hugo Ida Jon Kim Leo".split()
THINGS = "apples books coins cups eggs keys nuts pens pins shells stones tickets".split()
TEMPLATES = {
    "one step": (
        ("{name} has {a} {thing} and buys {b} more . How many {thing} does {name} have now ?", (1, 1)),
        ("There are {a} {thing} in a box and {b} on the table . How many {thing} are there ?", (1, 1)),
        ("{name} had {a} {thing} and gave {b} away . How many {thing} are left ?", (1, -1)),
        ("Of {a} {thing} {name} lost {b} . How many {thing} does {name} have ?", (1, -1)),
    ),
    "two steps": (
        ("{name} has {a} {thing} , buys {b} more and loses {c} . How many {thing} does {name} have now ?", (1, 1, -1)),
        ("{name} had {a} {thing} , gave {b} away and found {c} . How many {thing} are there now ?", (1, -1, 1)),
    ),
}
SPLITS = ("train", "validation", "calibration", "test")
SHARES = {"validation": 0.1, "calibration": 0.05, "test": 0.15}
SPLIT_SEED = 20260214
PADDING = "<pad>"


@cache
def vocabulary() -> tuple[str, ...]:
    """Padding, the numbers, and every word of the templates."""
    texts = [text for kind in TEMPLATES.values() for text, _ in kind]
    words = sorted({word for text in texts for word in text.split() if not word.startswith("{")})
    return (PADDING, *map(str, range(2 * LARGEST + 1)), *words, *NAMES, *THINGS)


@cache
def _of_split(signs: tuple[int, ...], split: str) -> np.ndarray:
    """The numbers of one split whose running total never leaves 0 to ``2 LARGEST``.

    Numbers are shared out before signs are looked at: no two splits share any, whatever the words around them.
    """
    if split not in SPLITS:
        raise ValueError(f"unknown split {split!r}: choose one of {', '.join(SPLITS)}")
    every = np.array(list(itertools.product(range(1, LARGEST + 1), repeat=len(signs))))
    every = every[np.random.default_rng(SPLIT_SEED).permutation(len(every))]
    ends = (np.cumsum(list(SHARES.values())) * len(every)).astype(int)
    bounds = dict(zip(SHARES, itertools.pairwise((0, *ends)), strict=True)) | {"train": (ends[-1], len(every))}
    own = every[slice(*bounds[split])]
    totals = (own * np.array(signs)).cumsum(axis=1)
    return own[((totals >= 0) & (totals <= 2 * LARGEST)).all(axis=1)]


def problems(kind: str, split: str, n: int, *, seed: Sequence[int]) -> list[Problem]:
    """Some problems of one kind and split.

    Args:
        kind: a key of ``TEMPLATES``.
        split: ``train``, ``validation``, ``calibration`` or ``test``; no two share the numbers of a problem.
        n: how many.
        seed: which are drawn.

    Raises:
        ValueError: for an unknown kind or split, or n below 1.

    Example:
        >>> (problem,) = problems("one step", "test", 1, seed=[0])
        >>> problem.row()["answer"].startswith("#### ")
        True

    Paper: none (Table 9 uses GSM8K).
    """
    if kind not in TEMPLATES:
        raise ValueError(f"unknown kind {kind!r}: choose one of {', '.join(TEMPLATES)}")
    if n < 1:
        raise ValueError(f"n is {n}: ask for at least one problem")
    random = np.random.default_rng(list(seed))
    made = []
    for _ in range(n):
        text, signs = TEMPLATES[kind][random.integers(len(TEMPLATES[kind]))]
        pool = _of_split(signs, split)
        numbers = pool[random.integers(len(pool))]
        words = {"name": NAMES[random.integers(len(NAMES))], "thing": THINGS[random.integers(len(THINGS))]}
        question = text.format(**words, **dict(zip("abc", numbers.tolist(), strict=False)))
        made.append(Problem(question, int((numbers * np.array(signs)).sum())))
    return made


@dataclass(frozen=True)
class WordProblems:
    """The data recipe: an item is a question, padded on the left; its label is the token of the answer.

    Attributes:
        kinds: keys of ``TEMPLATES`` that are mixed.
        tokens: length of every item.
    """

    kinds: tuple[str, ...] = ("one step",)
    tokens: int = 24

    def __post_init__(self) -> None:
        longest = max(len(text.split()) for kind in self.kinds for text, _ in TEMPLATES[kind])
        if self.tokens < longest:
            raise ValueError(f"tokens is {self.tokens}: the longest question has {longest}")

    @property
    def item_shape(self) -> tuple[int, ...]:
        """What one item is: token numbers."""
        return (self.tokens,)

    def encode(self, some: Sequence[Problem]) -> tuple[Tensor, Tensor]:
        """Token numbers ``(n, tokens)`` and the answers' ``(n,)``."""
        number = {word: index for index, word in enumerate(vocabulary())}
        rows = [[number[word] for word in problem.question.split()] for problem in some]
        items = torch.tensor([[0] * (self.tokens - len(row)) + row for row in rows])
        return items, torch.tensor([number[str(problem.answer)] for problem in some])

    def _drawn(self, split: str, n: int, seed: Sequence[int]) -> tuple[Tensor, Tensor]:
        shares = [n // len(self.kinds) + (i < n % len(self.kinds)) for i in range(len(self.kinds))]
        some = [
            p
            for k, share in zip(self.kinds, shares, strict=True)
            if share
            for p in problems(k, split, share, seed=seed)
        ]
        return self.encode(some)

    def training_batch(self, batch_size: int, *, seed: int, step: int) -> tuple[Tensor, Tensor]:
        """The batch of one training step: a pure function of seed and step, so a resumed run sees the same data."""
        return self._drawn("train", batch_size, [seed, step])

    def fixed_set(self, split: str, n: int | None = None, *, seed: int = 0) -> tuple[Tensor, Tensor]:
        """A fixed set of problems from one split, 1,000 unless ``n`` says otherwise."""
        return self._drawn(split, 1000 if n is None else n, [SPLIT_SEED, SPLITS.index(split), seed])
