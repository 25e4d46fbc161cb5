"""The log-sqrt2 quantizer: attention probabilities on a grid of powers of the square root of two."""

from __future__ import annotations

import torch
from torch import Tensor

from s2d.ptq.quantizers import (
    Quantizer,
    check_observed,
    check_quantizer_bits,
    check_step,
    chunk_elements,
    first_least,
    tail_quantiles,
)

PERCENTILES = (0.999, 0.9999, 0.99999, 1.0)


class LogSqrt2Quantizer(Quantizer):
    r"""Quantizer for values in [0, d] whose steps grow with the value.

    .. math::
        q = \mathrm{clamp}\big(\mathrm{round}(-2 \log_2(x / d)),\ 0,\ 2^k - 1\big), \qquad
        \hat x = d\, 2^{-q/2} \text{ for } q < 2^k - 1, \quad 0 \text{ for the last code}

    That makes 2^k levels, zero included. The largest of them, d, is the quantile of what was observed (of .999, .9999,
    .99999 and 1) with the least squared error. The relative error does not shrink with more bits: 3 bits reach down to
    d/8, 4 bits to d/128, and the steps stay as wide.

    Args:
        n_bits: 2 to 8.

    Attributes:
        scale: d.

    Raises:
        ValueError: for a bit width or input out of range.

    Example:
        >>> q = LogSqrt2Quantizer(3)
        >>> q.set_scale(1.0)
        >>> q(torch.tensor([1.0, 0.52, 0.13, 0.01, 0.0]))
        tensor([1.0000, 0.5000, 0.1250, 0.0000, 0.0000])

    Paper: none; RepQ-ViT quantizes the attention probabilities with it.
    """

    def __init__(self, n_bits: int) -> None:
        super().__init__()
        self.n_bits = check_quantizer_bits(n_bits)
        self.q_min, self.q_max = 0, 2**n_bits - 1
        self._kept: list[Tensor] = []
        self._done = False
        self.register_buffer("scale", None)

    def observe(self, x: Tensor) -> None:
        """Keep attention probabilities until ``freeze``.

        Raises:
            ValueError: for data that is empty, not finite or negative.
        """
        x = check_observed(x)
        if x.amin() < 0:
            raise ValueError(f"calibration data holds {x.amin().item()}: this grid is for values of zero and above")
        self._done = False
        self._kept.append(x.reshape(1, -1).clone())  # what comes after may work in place

    def freeze(self) -> None:
        """Choose d from what was observed; once more without new observations changes nothing.

        Raises:
            ValueError: when nothing was observed.
        """
        if self._done:
            return
        if not self._kept:
            raise ValueError("nothing was observed: this quantizer saw no calibration data")
        values = torch.cat(self._kept, 1)
        candidates = tail_quantiles(values, PERCENTILES)[1]  # (P, 1)
        # A quantile of mostly zeros is zero, which is no scale; the largest value is one unless all are zero.
        candidates = torch.where(candidates > 0, candidates, candidates[-1:])
        candidates = torch.where(candidates > 0, candidates, 1)
        errors = torch.zeros(len(candidates), dtype=torch.float64, device=values.device)
        for part in values.split(chunk_elements(values.device) // len(candidates), 1):
            part = part.to(candidates.dtype)
            # Relative to the largest value, so that no square underflows.
            difference = (self._values(self._steps(part, candidates), candidates) - part) / candidates[-1]
            errors += difference.square().sum(-1)
        self.set_scale(candidates[first_least(errors), 0])
        self._kept, self._done = [], True

    def set_scale(self, d: Tensor | float) -> None:
        """Fix the largest representable value.

        Raises:
            ValueError: unless it is one finite number above zero.
        """
        scale = check_step(d, "d")
        if scale.numel() != 1:
            raise ValueError(f"d has {scale.numel()} entries: give one number")
        self.scale = scale.reshape(())

    def _steps(self, x: Tensor, scale: Tensor) -> Tensor:
        # log2(0) is -infinity, which the upper bound turns into the last code.
        ratio = (x.to(torch.promote_types(x.dtype, scale.dtype)) / scale).clamp_(min=0)
        return ratio.log2_().mul_(-2).round_().clamp_(0, self.q_max)

    def _values(self, steps: Tensor, scale: Tensor) -> Tensor:
        return (steps * -0.5).exp2_().mul_(scale).masked_fill_(steps == self.q_max, 0)

    def codes(self, x: Tensor) -> Tensor:
        self._check_frozen()
        return self._steps(x.detach(), self.scale).to(torch.int16)

    def dequantize(self, codes: Tensor) -> Tensor:
        self._check_frozen()
        return self._values(codes.to(self.scale.dtype), self.scale)

    def _fake_quantize(self, x: Tensor) -> Tensor:
        self._check_frozen()
        return self._values(self._steps(x, self.scale), self.scale)

    def _inside(self, x: Tensor) -> Tensor:
        return (x >= 0) & (x <= self.scale)

    def extra_repr(self) -> str:
        return f"{self.n_bits} bits"
