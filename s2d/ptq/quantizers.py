"""Quantizers on exact integer grids: every quantized value is ``scale * (code - zero_point)``.

A new quantizer (log-sqrt2, twin uniform, ...) subclasses :class:`Quantizer` and fills in four methods; everything else
in :mod:`s2d.ptq` talks to that interface only.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Literal

import torch
from torch import Tensor, nn

SWITCHED_OFF = (16, 32)
Granularity = Literal["per_tensor", "per_channel", "per_token"]
GRANULARITIES = ("per_tensor", "per_channel", "per_token")


def check_bits(n_bits: int, name: str = "n_bits") -> int:
    """A number of bits that can be quantized to (2 to 8) or that switches quantization off (16, 32).

    Raises:
        ValueError: for anything else.

    Example:
        >>> check_bits(4)
        4

    Paper: none.
    """
    if not isinstance(n_bits, int) or not (2 <= n_bits <= 8 or n_bits in SWITCHED_OFF):
        raise ValueError(f"{name} is {n_bits!r}: choose 2 to 8, or 16 or 32 to leave that side in floating point")
    return n_bits


class Quantizer(nn.Module, ABC):
    """The interface: ``observe`` calibration data, ``freeze``, then ``codes``, ``dequantize`` and ``forward``."""

    n_bits: int

    @abstractmethod
    def observe(self, x: Tensor) -> None:
        """Take calibration data into account."""

    @abstractmethod
    def freeze(self) -> None:
        """Fix the grid from what was observed; raises ValueError when nothing was."""

    @abstractmethod
    def codes(self, x: Tensor) -> Tensor:
        """The integer code of every entry."""

    @abstractmethod
    def dequantize(self, codes: Tensor) -> Tensor:
        """The value each code stands for."""

    def forward(self, x: Tensor) -> Tensor:
        """Fake quantization: to the nearest representable value and back."""
        return self.dequantize(self.codes(x)).to(x.dtype)


class AffineQuantizer(Quantizer):
    r"""Uniform quantizer with min-max calibration.

    .. math::
        q = \mathrm{clamp}\big(\mathrm{round}(x / \Delta) + z,\ q_{\min},\ q_{\max}\big), \qquad
        \hat x = \Delta (q - z)

    Asymmetric: codes 0 to 2^b - 1, the range is widened to hold zero so that zero is exact. Symmetric: codes
    -2^(b-1) + 1 to 2^(b-1) - 1, z = 0.

    Args:
        n_bits: 2 to 8.
        symmetric: see above.
        granularity: one scale for all (``per_tensor``), one per index of the first dimension (``per_channel``, for
            weights), or one per row of the last dimension measured at run time (``per_token``, for activations).

    Raises:
        ValueError: for a bit width, granularity or input out of range.

    Example:
        >>> q = AffineQuantizer(2)
        >>> q.observe(torch.tensor([0.0, 3.0]))
        >>> q.freeze()
        >>> q(torch.tensor([0.4, 1.6, 9.0]))
        tensor([0., 2., 3.])

    Paper: RTN of Table 9.
    """

    def __init__(self, n_bits: int, *, symmetric: bool = False, granularity: Granularity = "per_tensor") -> None:
        super().__init__()
        if check_bits(n_bits) in SWITCHED_OFF:
            raise ValueError(f"n_bits is {n_bits}: leave the quantizer out to keep floating point")
        if granularity not in GRANULARITIES:
            raise ValueError(f"granularity is {granularity!r}: choose one of {', '.join(GRANULARITIES)}")
        self.n_bits, self.symmetric, self.granularity = n_bits, symmetric, granularity
        self.q_max = 2 ** (n_bits - 1) - 1 if symmetric else 2**n_bits - 1
        self.q_min = -self.q_max if symmetric else 0
        self.register_buffer("low", None)
        self.register_buffer("high", None)
        self.register_buffer("scale", None)
        self.register_buffer("zero_point", None)

    def _range(self, x: Tensor) -> tuple[Tensor, Tensor]:
        if self.granularity == "per_tensor":
            return x.amin(), x.amax()
        if self.granularity == "per_channel":
            flat, shape = x.flatten(1), (-1,) + (1,) * (x.ndim - 1)
            return flat.amin(1).view(shape), flat.amax(1).view(shape)
        return x.amin(-1, keepdim=True), x.amax(-1, keepdim=True)

    def _grid(self, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
        # At least float32: in half precision the range of [-40000, 40000] overflows and small steps are subnormal.
        dtype = torch.promote_types(low.dtype, torch.float32)
        low, high = low.to(dtype).clamp(max=0), high.to(dtype).clamp(min=0)
        if self.symmetric:
            scale, zero_point = torch.maximum(-low, high) / self.q_max, torch.zeros_like(low)
        else:
            scale = high / self.q_max - low / self.q_max
            zero_point = torch.round(-low / torch.where(scale > 0, scale, 1))
        # An all-zero channel has no range; any scale represents it exactly.
        return torch.where(scale > 0, scale, torch.ones_like(scale)), zero_point

    def observe(self, x: Tensor) -> None:
        x = x.detach()
        if x.numel() == 0:
            raise ValueError("calibration data is empty: give at least one image")
        if not torch.isfinite(x).all():
            raise ValueError("calibration data holds NaN or infinity: check the images and the model's forward pass")
        if self.granularity == "per_token":
            self.low, self.high = x.amin(), x.amax()  # measured again for every token; only remembers that data came
            return
        low, high = self._range(x)
        self.low = low if self.low is None else torch.minimum(self.low, low)
        self.high = high if self.high is None else torch.maximum(self.high, high)

    def freeze(self) -> None:
        if self.low is None:
            raise ValueError("nothing was observed: this quantizer saw no calibration data")
        if self.granularity != "per_token":
            self.scale, self.zero_point = self._grid(self.low, self.high)

    def codes(self, x: Tensor) -> Tensor:
        if self.granularity == "per_token":
            self.scale, self.zero_point = self._grid(*self._range(x))
        self._check_frozen()
        steps = torch.round(x.to(self.scale.dtype) / self.scale)
        return steps.add_(self.zero_point).clamp_(self.q_min, self.q_max).to(torch.int16)

    def _check_frozen(self) -> None:
        if self.scale is None:
            raise ValueError("the quantizer is not calibrated: observe() data, then freeze()")

    def dequantize(self, codes: Tensor) -> Tensor:
        self._check_frozen()
        return (codes - self.zero_point) * self.scale

    def extra_repr(self) -> str:
        kind = "symmetric" if self.symmetric else "asymmetric"
        return f"{self.n_bits} bits, {kind}, {self.granularity}"
