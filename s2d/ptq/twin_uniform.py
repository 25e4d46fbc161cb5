"""Twin uniform quantizers: two uniform grids for two parts of what comes out of GELU and of softmax."""

from __future__ import annotations

import torch
from torch import Tensor

from s2d.ptq.quantizers import (
    SMALLEST_STEP,
    Quantizer,
    check_observed,
    check_quantizer_bits,
    check_step,
    chunk_elements,
    fake_quantize,
    first_least,
    round_to_grid,
)

GELU_MINIMUM = 0.16997124254703522
"""How far below zero GELU goes."""
SPLITS = tuple(2.0**-i for i in range(20))
"""The values that the split of :class:`TwinUniformSoftmax` is chosen from."""


def _working(x: Tensor, step: Tensor) -> tuple[Tensor, Tensor]:
    dtype = torch.promote_types(torch.promote_types(x.dtype, step.dtype), torch.float32)
    return x.to(dtype), step.to(dtype)


def _one_number(value: Tensor, name: str) -> Tensor:
    if value.numel() != 1:
        raise ValueError(f"{name} has {value.numel()} entries: give one number")
    return value.reshape(())


# --- GELU ---


def _gelu_codes(x: Tensor, step: Tensor, n_bits: int) -> Tensor:
    levels = 2 ** (n_bits - 1)
    negative = torch.full_like(step, GELU_MINIMUM / levels)
    # Each clamps the other's side to zero: the sum is the code of the side that x is on.
    return round_to_grid(x, negative, 0, -levels, 0).add(round_to_grid(x, step, 0, 0, levels - 1))


def _gelu_values(codes: Tensor, step: Tensor, n_bits: int) -> Tensor:
    return codes * torch.where(codes < 0, GELU_MINIMUM / 2 ** (n_bits - 1), step)


def twin_gelu(x: Tensor, step: Tensor, n_bits: int) -> Tensor:
    r"""Fake quantization of GELU's output, a grid for each sign.

    .. math::
        \hat x = \Delta^\pm \, \mathrm{clamp}\big(\mathrm{round}(x / \Delta^\pm)\big), \qquad
        \Delta^- = 0.16997 / Q, \quad Q = 2^{k-1}

    with codes -Q to 0 on the negative side and 0 to Q - 1 on the positive one.

    Args:
        x: any shape.
        step: the positive side's, broadcast against ``x``; a leading dimension holds candidates.
        n_bits: 2 to 8.

    Returns:
        In the dtype of ``x``.

    Example:
        >>> twin_gelu(torch.tensor([-0.1, 0.4, 2.0]), torch.tensor([[1.0], [0.5]]), 2)
        tensor([[-0.0850,  0.0000,  1.0000],
                [-0.0850,  0.5000,  0.5000]])

    Paper: none; PTQ4ViT quantizes the input of fc2 with it.
    """
    values, step = _working(x, step)
    levels = 2 ** (n_bits - 1)
    negative = torch.full_like(step, GELU_MINIMUM / levels).flatten()[0]  # the same for every candidate
    # Each clamps the other's side to zero: the sum is the value of the side that x is on.
    below = fake_quantize(values, negative, 0, -levels, 0)
    return fake_quantize(values, step, 0, 0, levels - 1).add_(below).to(x.dtype)


def gelu_parts(x: Tensor, step: Tensor, n_bits: int) -> list[tuple[Tensor, Tensor]]:
    """:func:`twin_gelu` as a sum of two products of codes (int8) and steps; arguments as there.

    Example:
        >>> x, step = torch.tensor([-0.1, 0.4, 2.0]), torch.tensor([0.5])
        >>> sum(codes * steps for codes, steps in gelu_parts(x, step, 2))
        tensor([-0.0850,  0.5000,  0.5000])

    Paper: none.
    """
    levels = 2 ** (n_bits - 1)
    sides = (torch.full_like(step, GELU_MINIMUM / levels), -levels, 0), (step, 0, levels - 1)
    return [(round_to_grid(x, scale, 0, *ends).to(torch.int8), scale) for scale, *ends in sides]


class TwinUniformGELU(Quantizer):
    """Quantizer for GELU's output, see :func:`twin_gelu`; min-max calibration of the positive side.

    Args:
        n_bits: 2 to 8.

    Attributes:
        scale: the step of the positive side.

    Raises:
        ValueError: for a bit width or input out of range.

    Example:
        >>> q = TwinUniformGELU(3)
        >>> q.observe(torch.tensor([-0.17, 6.0]))
        >>> q.freeze()
        >>> q.codes(torch.tensor([-0.16997, -0.05, 1.2, 6.0, 9.0])).tolist()
        [-4, -1, 1, 3, 3]

    Paper: none; PTQ4ViT quantizes the input of fc2 with it.
    """

    def __init__(self, n_bits: int) -> None:
        super().__init__()
        self.n_bits = check_quantizer_bits(n_bits)
        self.q_max = 2 ** (n_bits - 1) - 1
        self.q_min = -self.q_max - 1
        self._done = False
        self.register_buffer("high", None, persistent=False)
        self.register_buffer("scale", None)

    def observe(self, x: Tensor) -> None:
        high = check_observed(x).amax()
        self.high = high if self.high is None or self._done else torch.maximum(self.high, high)
        self._done = False

    def freeze(self) -> None:
        """Fix the positive step, largest value / (Q - 1); once more without new observations changes nothing.

        Raises:
            ValueError: when nothing was observed.
        """
        if self.high is None:
            raise ValueError("nothing was observed: this quantizer saw no calibration data")
        if self._done:
            return
        step = _working(self.high, self.high)[0] / self.q_max
        self.set_scale(torch.where(step > 0, step, 1))  # without positive values any step will do
        self._done = True

    def set_scale(self, step: Tensor | float) -> None:
        """Fix the step of the positive side.

        Raises:
            ValueError: unless it is one finite number above zero.
        """
        self.scale = _one_number(check_step(step, "step"), "step")

    def codes(self, x: Tensor) -> Tensor:
        self._check_frozen()
        return _gelu_codes(*_working(x.detach(), self.scale), self.n_bits).to(torch.int16)

    def dequantize(self, codes: Tensor) -> Tensor:
        self._check_frozen()
        return _gelu_values(codes, self.scale, self.n_bits)

    def _fake_quantize(self, x: Tensor) -> Tensor:
        self._check_frozen()
        return twin_gelu(x, self.scale, self.n_bits)

    def _inside(self, x: Tensor) -> Tensor:
        return (x >= -GELU_MINIMUM) & (x <= self.q_max * self.scale)

    def extra_repr(self) -> str:
        return f"{self.n_bits} bits"


# --- GELU with a long tail ---


# What the largest value is multiplied by to give the end of the fine grid, one after the other.
TAIL_SPLITS = tuple(2.0 ** (-i / 2) for i in range(2, 16))


# Largest value over root mean square from which on the tail is long. It is 5 to 15 in most networks, where a uniform
# grid does (and has kernels), and 18 to 92 in a sentence encoder: there a step of 8 bits is a third of that mean.
LONG = 16


def has_long_tail(x: Tensor) -> bool:
    """Whether a few values are so large that a uniform grid has hardly any codes for the others.

    Example:
        >>> x = torch.ones(10_000)
        >>> has_long_tail(x), has_long_tail(torch.cat([x, torch.tensor([40.0])]))
        (False, True)

    Paper: none.
    """
    return bool(x.abs().amax() > LONG * x.float().square().mean().sqrt())


def tail_steps(split: Tensor, largest: Tensor, n_bits: int) -> tuple[Tensor, Tensor]:
    """The steps of the fine grid up to a split and of the coarse one from there to the largest value."""
    levels = 2 ** (n_bits - 1)
    fine = ((split + GELU_MINIMUM) / (levels - 1)).clamp(min=SMALLEST_STEP)
    return fine, ((largest - _fine_grid(fine, n_bits)[1]) / levels).clamp(min=SMALLEST_STEP)


def _fine_grid(fine: Tensor, n_bits: int) -> tuple[Tensor, Tensor]:
    """Zero point and end of the fine grid."""
    last = 2 ** (n_bits - 1) - 1
    zero = (GELU_MINIMUM / fine).round().clamp(0, last)
    return zero, (last - zero) * fine


def twin_tail(x: Tensor, fine: Tensor, coarse: Tensor, n_bits: int) -> Tensor:
    """Fake quantization with the two grids of :class:`TwinUniformTail`.

    Args:
        x: any shape.
        fine, coarse: the steps, broadcast against ``x``; a leading dimension holds candidates.
        n_bits: 2 to 8.

    Returns:
        In the dtype of ``x``.

    Example:
        >>> twin_tail(torch.tensor([-0.1, 0.4, 9.0]), torch.tensor(0.1), torch.tensor(2.0), 3)
        tensor([-0.1000,  0.1000,  8.1000])

    Paper: none.
    """
    values, fine = _working(x, fine)
    levels = 2 ** (n_bits - 1)
    zero, end = _fine_grid(fine, n_bits)
    inner = fake_quantize(values, fine, zero, 0, levels - 1)
    steps = round_to_grid(values - end, coarse, 0, 0, levels)
    return torch.where(steps > 0, steps * coarse + end, inner).to(x.dtype)


def tail_parts(x: Tensor, fine: Tensor, coarse: Tensor, n_bits: int) -> list[tuple[Tensor, Tensor]]:
    """:func:`twin_tail` as a sum of two products of codes (int8) and steps; arguments as there, up to 7 bits.

    Example:
        >>> x = torch.tensor([-0.1, 0.4, 9.0])
        >>> sum(codes * steps for codes, steps in tail_parts(x, torch.tensor([0.1]), torch.tensor([2.0]), 3))
        tensor([-0.1000,  0.1000,  8.1000])

    Paper: none.
    """
    levels = 2 ** (n_bits - 1)
    zero, end = _fine_grid(fine, n_bits)
    inner = round_to_grid(x, fine, zero, 0, levels - 1).sub_(zero)  # the end of the fine grid where x is beyond
    beyond = round_to_grid(x - end, coarse, 0, 0, levels)
    return [(inner.to(torch.int8), fine), (beyond.to(torch.int8), coarse)]


class TwinUniformTail(Quantizer):
    r"""Quantizer for GELU's output with a long tail: a fine grid for most values, a coarse one from its end on.

    Where a few values are ninety times the root mean square, a uniform grid has the others round to nothing. Here half
    of the codes, :math:`d (q - z)`, reach from GELU's minimum to a split s, the other half, :math:`s + D k`, from there
    to the largest value; the highest bit of the code says which. Calibration takes the split with the least squared
    error, of the largest value times :math:`2^{-1}, 2^{-1.5}, \dots, 2^{-7.5}`.

    Args:
        n_bits: 2 to 8.

    Attributes:
        fine, coarse: the steps d and D.

    Raises:
        ValueError: for a bit width or input out of range.

    Example:
        >>> q = TwinUniformTail(4)
        >>> q.observe(torch.cat([torch.linspace(-0.17, 1, 500), torch.tensor([40.0])]))
        >>> q.freeze()
        >>> q(torch.tensor([-0.2, 0.1, 0.9, 37.0, 99.0]))
        tensor([-0.1506,  0.1506,  0.9033, 35.1129, 40.0000])

    Paper: none.
    """

    def __init__(self, n_bits: int) -> None:
        super().__init__()
        self.n_bits = check_quantizer_bits(n_bits)
        self.q_min, self.q_max = 0, 2**n_bits - 1
        self._kept: list[Tensor] = []
        self._done = False
        for name in ("fine", "coarse"):
            self.register_buffer(name, None)

    def observe(self, x: Tensor) -> None:
        """Keep data until ``freeze``."""
        self._done = False
        self._kept.append(check_observed(x).flatten().clone())  # what comes after may work in place

    def freeze(self) -> None:
        """Choose the split; once more without new observations changes nothing.

        Raises:
            ValueError: when nothing was observed.
        """
        if self._done:
            return
        if not self._kept:
            raise ValueError("nothing was observed: this quantizer saw no calibration data")
        x = torch.cat(self._kept)
        x = x.to(torch.promote_types(x.dtype, torch.float32))
        largest = torch.where(x.amax() > 0, x.amax(), 1)  # without positive values any will do
        steps = [tail_steps(largest * split, largest, self.n_bits) for split in TAIL_SPLITS]
        errors = torch.zeros(len(steps), dtype=torch.float64, device=x.device)
        for part in x.split(chunk_elements(x.device)):
            for i, grid in enumerate(steps):
                errors[i] += (twin_tail(part, *grid, self.n_bits) - part).double().square().sum()
        self.set_steps(*steps[int(first_least(errors))])
        self._kept, self._done = [], True

    def set_steps(self, fine: Tensor | float, coarse: Tensor | float) -> None:
        """Fix the steps.

        Raises:
            ValueError: unless each is one finite number above zero.
        """
        self.fine, self.coarse = (
            _one_number(check_step(step, name), name) for step, name in ((fine, "fine"), (coarse, "coarse"))
        )

    def _check_frozen(self) -> None:
        if self.fine is None:
            raise ValueError("the quantizer is not calibrated: observe() data, then freeze()")

    def codes(self, x: Tensor) -> Tensor:
        self._check_frozen()
        x, fine = _working(x.detach(), self.fine)
        zero, end = _fine_grid(self.fine, self.n_bits)
        levels = 2 ** (self.n_bits - 1)
        inner = round_to_grid(x, fine, zero, 0, levels - 1)
        steps = round_to_grid(x - end, self.coarse, 0, 0, levels)
        return torch.where(steps > 0, levels - 1 + steps, inner).to(torch.int16)

    def dequantize(self, codes: Tensor) -> Tensor:
        self._check_frozen()
        zero, end = _fine_grid(self.fine, self.n_bits)
        steps = codes - (2 ** (self.n_bits - 1) - 1)
        return torch.where(steps > 0, steps * self.coarse + end, (codes - zero) * self.fine)

    def _fake_quantize(self, x: Tensor) -> Tensor:
        self._check_frozen()
        return twin_tail(x, self.fine, self.coarse, self.n_bits)

    def _inside(self, x: Tensor) -> Tensor:
        zero, end = _fine_grid(self.fine, self.n_bits)
        return (x >= -zero * self.fine) & (x <= end + 2 ** (self.n_bits - 1) * self.coarse)

    def extra_repr(self) -> str:
        return f"{self.n_bits} bits, a grid for the tail"


# --- softmax ---


def _softmax_ranges(x: Tensor, split: Tensor, n_bits: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Codes and steps of the small and of the large range."""
    last = 2 ** (n_bits - 1) - 1
    steps = _softmax_steps(split, last)
    return *(round_to_grid(x, step, 0, 0, last) for step in steps), *steps


def _softmax_steps(split: Tensor, last: int) -> tuple[Tensor, Tensor]:
    return (split / last).clamp(min=SMALLEST_STEP), torch.full_like(split, 1 / last).flatten()[0]


def twin_softmax(x: Tensor, split: Tensor, n_bits: int) -> Tensor:
    r"""Fake quantization of attention probabilities: the nearest value of two grids on [0, s] and [0, 1].

    .. math::
        \{0, 1, \dots, Q-1\} \cdot \tfrac{s}{Q-1}\ \cup\ \{0, 1, \dots, Q-1\} \cdot \tfrac{1}{Q-1}, \qquad Q = 2^{k-1}

    One bit of the code says which of the two; their values are not added.

    Args:
        x: any shape.
        split: s, broadcast against ``x``; a leading dimension holds candidates.
        n_bits: 2 to 8.

    Returns:
        In the dtype of ``x``.

    Example:
        >>> twin_softmax(torch.tensor([0.04, 0.30, 0.9]), torch.tensor([[1.0], [0.125]]), 3)
        tensor([[0.0000, 0.3333, 1.0000],
                [0.0417, 0.3333, 1.0000]])

    Paper: none; PTQ4ViT quantizes the attention probabilities with it.
    """
    values, split = _working(x, split)
    last = 2 ** (n_bits - 1) - 1
    small, large = (fake_quantize(values, step, 0, 0, last) for step in _softmax_steps(split, last))
    return torch.where((values - small).abs_() <= (values - large).abs_(), small, large).to(x.dtype)


class TwinUniformSoftmax(Quantizer):
    """Quantizer for attention probabilities, see :func:`twin_softmax`.

    Calibration chooses the split of 2^0, 2^-1, ..., 2^-19 with the least squared error; of what was observed only the
    twenty errors are kept. Codes 0 to Q - 1 are the small range, Q to 2Q - 1 the large one.

    Args:
        n_bits: 2 to 8.

    Attributes:
        split: s.

    Raises:
        ValueError: for a bit width or input out of range.

    Example:
        >>> q = TwinUniformSoftmax(3)
        >>> q.set_split(0.125)
        >>> q.codes(torch.tensor([0.0, 0.04, 0.125, 0.3, 1.0])).tolist()
        [0, 1, 3, 5, 7]

    Paper: none; PTQ4ViT quantizes the attention probabilities with it.
    """

    def __init__(self, n_bits: int) -> None:
        super().__init__()
        self.n_bits = check_quantizer_bits(n_bits)
        self.q_min, self.q_max = 0, 2**n_bits - 1
        self._done = False
        self.register_buffer("errors", None, persistent=False)
        self.register_buffer("split", None)

    def observe(self, x: Tensor) -> None:
        """Add up every split's squared error.

        Raises:
            ValueError: for data that is empty, not finite or, give or take rounding, outside of 0 to 1.
        """
        x = check_observed(x)
        for extreme in (x.amin(), x.amax()):
            if not 0 <= extreme <= 1.01:
                raise ValueError(f"calibration data holds {extreme.item()}: this grid is for probabilities, 0 to 1")
        if self.errors is None or self._done:
            self.errors, self._done = torch.zeros(len(SPLITS), dtype=torch.float64, device=x.device), False
        dtype = torch.promote_types(x.dtype, torch.float32)
        splits = torch.tensor(SPLITS, dtype=dtype, device=x.device)[:, None]
        for part in x.reshape(-1).split(chunk_elements(x.device) // len(SPLITS)):
            part = part.to(dtype)
            self.errors += (twin_softmax(part, splits, self.n_bits) - part).square().sum(-1)

    def freeze(self) -> None:
        """Choose the split; once more without new observations changes nothing.

        Raises:
            ValueError: when nothing was observed.
        """
        if self.errors is None:
            raise ValueError("nothing was observed: this quantizer saw no calibration data")
        if not self._done:
            self.set_split(torch.tensor(SPLITS, device=self.errors.device)[first_least(self.errors)])
            self._done = True

    def set_split(self, s: Tensor | float) -> None:
        """Fix the split.

        Raises:
            ValueError: unless it is one number above zero and at most one.
        """
        split = _one_number(check_step(s, "s"), "s")
        if split > 1:
            raise ValueError(f"s is {split.item()}: give a split of at most 1")
        self.split = split

    def _check_frozen(self) -> None:
        if self.split is None:
            raise ValueError("the quantizer is not calibrated: observe() data, then freeze()")

    def codes(self, x: Tensor) -> Tensor:
        self._check_frozen()
        x, split = _working(x.detach(), self.split)
        small, large, small_step, large_step = _softmax_ranges(x, split, self.n_bits)
        nearer_small = (x - small * small_step).abs() <= (x - large * large_step).abs()
        return torch.where(nearer_small, small, large + 2 ** (self.n_bits - 1)).to(torch.int16)

    def dequantize(self, codes: Tensor) -> Tensor:
        self._check_frozen()
        levels = 2 ** (self.n_bits - 1)
        steps = self.split / (levels - 1), torch.full_like(self.split, 1 / (levels - 1))
        return torch.where(codes < levels, codes * steps[0], (codes - levels) * steps[1])

    def _fake_quantize(self, x: Tensor) -> Tensor:
        self._check_frozen()
        return twin_softmax(x, self.split, self.n_bits)

    def _inside(self, x: Tensor) -> Tensor:
        return (x >= 0) & (x <= 1)

    def extra_repr(self) -> str:
        return f"{self.n_bits} bits"
