"""The checks that public functions begin with: one ValueError that names the value and the repair."""

from __future__ import annotations

import math
from collections.abc import Callable
from numbers import Integral, Real
from typing import Any

import torch
from torch import Tensor


def check_number(name: str, value: Any, accept: Callable[[float], bool], repair: str) -> float:
    """A finite real number that is accepted, as a float; a bool, a string or a tensor is none.

    Args:
        name: what the caller calls it.
        value: what was given; numpy's numbers count.
        accept: which numbers are in range.
        repair: what to give instead.

    Raises:
        ValueError: for anything else.

    Example:
        >>> check_number("lam", 2, lambda value: value >= 0, "it must not be negative")
        2.0

    Paper: none.
    """
    number = isinstance(value, Real) and not isinstance(value, bool) and type(value).__name__ not in ("bool", "bool_")
    if not number or not math.isfinite(value) or not accept(value):
        raise ValueError(f"{name} is {_shown(value)}: {repair}")
    return float(value)


def check_count(name: str, value: Any, repair: str, *, least: int = 1) -> int:
    """A whole number of at least ``least``, as an int.

    Raises:
        ValueError: for anything else, a bool and a float among them.

    Example:
        >>> check_count("k_max", 3, "give a positive integer")
        3

    Paper: none.
    """
    if isinstance(value, bool) or not isinstance(value, Integral) or value < least:
        raise ValueError(f"{name} is {_shown(value)}: {repair}")
    return int(value)


def check_steps(value: Any) -> int:
    """The number of steps in the state of a run: a whole number in a tensor.

    Raises:
        ValueError: for anything else.

    Example:
        >>> check_steps(torch.tensor(41))
        41

    Paper: none.
    """
    steps = value.tolist() if isinstance(value, Tensor) else None
    if not isinstance(steps, int) or steps < 0:
        raise ValueError(f"the state holds steps {value!r}: load the state_dict() of a run, unchanged")
    return steps


def check_tensor(name: str, value: Any, repair: str, *, ndim: int | None = None, finite: bool = False) -> Tensor:
    """A dense tensor of real floating-point numbers that has values (is not on ``meta``).

    Args:
        name: what the caller calls it.
        value: what was given.
        repair: what to give instead.
        ndim: how many dimensions it must have.
        finite: whether NaN and infinity are refused.

    Raises:
        ValueError: for anything else.

    Example:
        >>> check_tensor("s", torch.ones(2), "give the singular values", ndim=1)
        tensor([1., 1.])

    Paper: none.
    """
    if not isinstance(value, Tensor) or not value.is_floating_point() or (ndim is not None and value.ndim != ndim):
        raise ValueError(f"{name} is {_shown(value)}: {repair}")
    if value.layout is not torch.strided:
        raise ValueError(f"{name} is sparse ({value.layout}): make it dense with to_dense()")
    if value.is_meta:
        raise ValueError(f"{name} is on the meta device and has no values: materialize the model and load them first")
    if finite and not torch.isfinite(value).all():
        raise ValueError(f"{name} holds NaN or infinity: find the step that broke it, and lower the learning rate")
    return value


def _shown(value: Any) -> str:
    """A value in an error message; of a tensor, what kind it is."""
    if isinstance(value, Tensor):
        return f"a {value.dtype} tensor of shape {tuple(value.shape)}"
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
