"""Rounding to half precision that is right in the mean, for changes far below its last place."""

from __future__ import annotations

import torch
from torch import Tensor

from s2d.checks import check_tensor

PRIMES = (1_000_003, 7_368_787)  # spread the places that make a seed


def is_low_precision(tensor: Tensor) -> bool:
    """Whether a change of a thousandth of a number may be lost in it: bfloat16 and float16.

    Example:
        >>> is_low_precision(torch.ones(1)), is_low_precision(torch.ones(1, dtype=torch.bfloat16))
        (False, True)

    Paper: none.
    """
    return tensor.dtype in (torch.bfloat16, torch.float16)


def round_stochastically(x: Tensor, dtype: torch.dtype, *, generator: torch.Generator | None = None) -> Tensor:
    """Round each entry up or down at random, so that its mean is the entry.

    To the nearest, a change of less than half a unit in the last place is lost, however often it is made.

    Args:
        x: any shape, float32 or wider.
        dtype: a narrower floating dtype.
        generator: where the random numbers come from, on the device of x; by default torch's own.

    Returns:
        The shape of x. A number that the dtype holds stays as it is.

    Raises:
        ValueError: for anything but a floating-point tensor.

    Example:
        >>> x = torch.full((100_000,), 1 + 2.0**-10)  # bfloat16 holds 1 and 1 + 2**-7
        >>> rounded = round_stochastically(x, torch.bfloat16, generator=torch.Generator().manual_seed(0))
        >>> abs(rounded.double().mean().item() - 1 - 2.0**-10) < 1e-4
        True

    Paper: none. Method: stochastic rounding.
    """
    check_tensor("x", x, "give a floating-point tensor")
    info = torch.finfo(dtype)
    _, exponent = torch.frexp(x)
    least = torch.frexp(torch.tensor(info.smallest_normal)).exponent  # below it the units stay the same
    # The distance of neighbours in this binade; between a power of two and the next both ends fit.
    unit = torch.ldexp(torch.full_like(x, info.eps), exponent.clamp(min=least.item()) - 1)
    below = (x / unit).floor()  # exact, as unit is a power of two
    chance = torch.rand(x.shape, generator=generator, dtype=x.dtype, device=x.device)
    return ((below + (chance < x / unit - below)) * unit).to(dtype)


def seeded(device: torch.device, *places: int) -> torch.Generator:
    """A generator that depends on these numbers alone, so that a resumed run repeats it.

    Example:
        >>> seeded(torch.device("cpu"), 3, 1).initial_seed() == seeded(torch.device("cpu"), 3, 1).initial_seed()
        True

    Paper: none.
    """
    seed = 0
    for place in places:
        seed = (seed * PRIMES[0] + place + PRIMES[1]) % 2**62
    return torch.Generator(device=device).manual_seed(seed)
