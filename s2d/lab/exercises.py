"""Answers to the notebooks' exercises: right, or a hint that does not give them away."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

RIGHT = "right"


def check(
    question: str, answer: Any, truth: Any, *, within: float = 0.01, hints: Mapping[Any, str] | str = ""
) -> bool | None:
    """Compare an answer with the truth and say how they stand; nothing is raised, so that the notebook goes on.

    Args:
        question: in a few words.
        answer: a number, a word or a list; None is not answered yet.
        truth: what it should be.
        within: how far off a number may be, relative to the truth.
        hints: what to say to a wrong answer: one text, or texts by wrong answer, with ``"low"``, ``"high"`` and
            ``"other"`` for the rest.

    Returns:
        Whether the answer is right; None where there is none.

    Example:
        >>> check("the gain along v_1", 2.0, 3.0, hints={"low": "which input is stretched most?"})
        the gain along v_1: 2.0 is too low; hint: which input is stretched most?
        False

    Paper: none.
    """
    if answer is None:
        print(f"{question}: not answered yet")
        return None
    if _agree(answer, truth, within):
        print(f"{question}: {answer} is {RIGHT}")
        return True
    side = _side(answer, truth)
    told = f"{question}: {answer} is {f'too {side}' if side else 'not it'}"
    texts = {"other": hints} if isinstance(hints, str) else dict(hints)
    known = answer in texts if isinstance(answer, (str, int, float)) else False
    hint = texts[answer] if known else texts.get(side or "other") or texts.get("other", "")
    print(told + (f"; hint: {hint}" if hint else ""))
    return False


def _agree(answer: Any, truth: Any, within: float) -> bool:
    if isinstance(truth, Sequence) and not isinstance(truth, str):
        same = isinstance(answer, Sequence) and len(answer) == len(truth)
        return same and all(_agree(a, t, within) for a, t in zip(answer, truth, strict=True))
    if _is_number(answer) and _is_number(truth):
        return math.isclose(answer, truth, rel_tol=within, abs_tol=within * 1e-3)
    return answer == truth


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _side(answer: Any, truth: Any) -> str | None:
    if not (_is_number(answer) and _is_number(truth)):
        return None
    return "low" if answer < truth else "high"
