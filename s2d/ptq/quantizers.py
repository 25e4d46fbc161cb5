r"""Quantizers on exact integer grids: every quantized value is ``scale * (code - zero_point)``.

A new quantizer (log-sqrt2, twin uniform, ...) subclasses :class:`Quantizer` and fills in four methods; everything else
in :mod:`s2d.ptq` talks to that interface only. :data:`QUANTIZERS` finds a class by name, and ``config()`` with the
state dict rebuilds an instance:

    >>> q = AffineQuantizer(4)
    >>> q.set_range(-1.0, 2.0)
    >>> copy = QUANTIZERS[type(q).__name__](**q.config())
    >>> copy.load_state_dict(q.state_dict())
    <All keys matched successfully>
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

SWITCHED_OFF = (16, 32)
Granularity = Literal["per_tensor", "per_channel", "per_token", "per_group"]
GRANULARITIES = ("per_tensor", "per_channel", "per_token", "per_group")
Calibration = Literal["minmax", "percentile", "mse"]
CALIBRATIONS = ("minmax", "percentile", "mse")
QUANTIZERS: dict[str, type[Quantizer]] = {}
"""Every quantizer class by its name; a module's classes are here once the module was imported."""

# Below this a step is subnormal: its reciprocal overflows.
SMALLEST_STEP = torch.finfo(torch.float32).tiny
# Errors that differ by no more than this part are equal: float32 sums are off by up to a tenth of it.
TIE = 1e-4
# What :class:`AffineQuantizer` with calibration="mse" multiplies the range by; first the range itself, which wins ties.
SHRINK_FACTORS = tuple(i / 100 for i in range(100, 0, -1))


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


def check_quantizer_bits(n_bits: int) -> int:
    """A number of bits that a quantizer can have, 2 to 8; ValueError for anything else."""
    if check_bits(n_bits) in SWITCHED_OFF:
        raise ValueError(f"n_bits is {n_bits}: leave the quantizer out to keep floating point")
    return n_bits


def all_finite(x: Tensor) -> bool:
    """Whether a tensor holds neither NaN nor infinity, which its extremes show many times faster than every entry.

    Example:
        >>> all_finite(torch.tensor([1.0, torch.nan])), all_finite(torch.tensor([1.0, 2.0]))
        (False, True)

    Paper: none.
    """
    if x.numel() == 0 or not x.is_floating_point():
        return bool(torch.isfinite(x).all())
    return bool(torch.isfinite(x.amin()) & torch.isfinite(x.amax()))


def check_observed(x: Tensor) -> Tensor:
    """Calibration data, detached; ValueError when it is empty or not finite."""
    x = x.detach()
    if x.numel() == 0:
        raise ValueError("calibration data is empty: give at least one image")
    if not all_finite(x):
        raise ValueError("calibration data holds NaN or infinity: check the images and the model's forward pass")
    return x


def check_step(step: Tensor | float, name: str) -> Tensor:
    """A tensor of steps in float32 or float64, none of them subnormal; ValueError unless finite and positive."""
    step = torch.as_tensor(step).detach()
    step = step.to(torch.promote_types(step.dtype, torch.float32))
    wrong = ~(torch.isfinite(step) & (step > 0))
    if step.numel() == 0 or wrong.any():
        value = step[wrong].flatten()[0].item() if step.numel() else "empty"
        raise ValueError(f"{name} is {value}: give finite values above zero")
    return step.clamp(min=SMALLEST_STEP)  # a copy, so that the caller's tensor may change


# --- the grid ---

# torch.fake_quantize_per_tensor_affine and per_channel_affine compute the same numbers (they are the oracle of
# tests/test_quantizers.py) but measured 3 to 14 times slower on CPU than the broadcasting form below, and know neither
# groups nor tokens nor a dimension of candidates.


def _grid_operands(x: Tensor, scale: Tensor, zero_point: Tensor | float) -> tuple[Tensor, Tensor, Tensor | float]:
    # At least float32: half precision holds neither the codes times the scale nor the sums of a search.
    dtype = torch.promote_types(torch.promote_types(x.dtype, scale.dtype), torch.float32)
    scale = scale.to(dtype).clamp(min=SMALLEST_STEP)
    if isinstance(zero_point, Tensor):
        zero_point = zero_point.to(dtype)
        if scale.shape != zero_point.shape:
            # Expanded (for free), so that the in-place operations below never have to grow.
            scale, zero_point = torch.broadcast_tensors(scale, zero_point)
    return x.to(dtype), scale, zero_point


def minmax_grid(low: Tensor, high: Tensor, n_bits: int) -> tuple[Tensor, Tensor]:
    """Scale and zero point of asymmetric grids over ranges, each widened to hold zero.

    Args:
        low, high: the ends, of any shape.
        n_bits: 2 to 8.

    Example:
        >>> minmax_grid(torch.tensor([-1.0, 5.0]), torch.tensor([2.0, 30.0]), 4)
        (tensor([0.2000, 2.0000]), tensor([5., 0.]))

    Paper: none.
    """
    # At least float32: in half precision the range of [-40000, 40000] overflows and small steps are subnormal.
    dtype = torch.promote_types(low.dtype, torch.float32)
    low, high, last = low.to(dtype).clamp(max=0), high.to(dtype).clamp(min=0), 2**n_bits - 1
    scale = _usable_scale(high / last - low / last)
    return scale, torch.round(low.abs() / scale)


def _usable_scale(scale: Tensor) -> Tensor:
    # An all-zero channel has no range; any scale represents it exactly.
    return torch.where(scale > 0, scale.clamp(min=SMALLEST_STEP), torch.ones_like(scale))


def round_to_grid(x: Tensor, scale: Tensor, zero_point: Tensor | float, q_min: int, q_max: int) -> Tensor:
    r"""The code of every value on an affine grid, as floating-point numbers.

    .. math::
        q = \mathrm{clamp}\big(\mathrm{round}(x \cdot \tfrac{1}{\Delta}) + z,\ q_{\min},\ q_{\max}\big)

    Rounds as ``torch.fake_quantize_*`` does: product with the reciprocal of the scale, ties to even.

    Args:
        x: any shape.
        scale, zero_point: broadcast against ``x``; a leading dimension holds candidates.
        q_min, q_max: the first and the last code.

    Returns:
        Whole numbers in float32, or float64 if ``x`` or ``scale`` is; NaN where ``x`` is NaN.

    Example:
        >>> round_to_grid(torch.tensor([-9.0, 0.3, 1.0]), torch.tensor(0.5), 4, 0, 15)
        tensor([0., 5., 6.])

    Paper: none.
    """
    x, scale, zero_point = _grid_operands(x, scale, zero_point)
    return (x * (1 / scale)).round_().add_(zero_point).clamp_(q_min, q_max)


def fake_quantize(x: Tensor, scale: Tensor, zero_point: Tensor | float, q_min: int, q_max: int) -> Tensor:
    """The nearest grid point of every value, in the dtype of ``x``; arguments as in :func:`round_to_grid`.

    Example:
        >>> steps = torch.tensor([[1.0], [0.5]])  # two candidates
        >>> fake_quantize(torch.tensor([0.6, 9.0]), steps, 0, -8, 7)
        tensor([[1.0000, 7.0000],
                [0.5000, 3.5000]])

    Paper: none.
    """
    dtype = x.dtype
    x, scale, zero_point = _grid_operands(x, scale, zero_point)
    steps = (x * (1 / scale)).round_()
    if isinstance(zero_point, Tensor) and zero_point.ndim == 0 and zero_point.device.type == "cpu":
        zero_point = zero_point.item()
    if isinstance(zero_point, Tensor):
        steps.add_(zero_point).clamp_(q_min, q_max).sub_(zero_point)
    else:  # the same in one pass instead of three
        steps.clamp_(q_min - zero_point, q_max - zero_point)
    return steps.mul_(scale).to(dtype)


def chunk_elements(device: torch.device) -> int:
    """How many elements a pass of a search works on: what stays in a core's cache, or fills an accelerator."""
    return 2**18 if device.type == "cpu" else 2**26


def squared_errors(rows: Tensor, scale: Tensor, zero_point: Tensor, q_min: int, q_max: int) -> Tensor:
    """The squared error of every candidate grid of every row, summed over the row.

    Args:
        rows: ``(G, n)``, each row with grids of its own.
        scale, zero_point: ``(P, G)``, P candidates a row.
        q_min, q_max: the first and the last code.

    Returns:
        ``(P, G)`` in float64.

    Example:
        >>> rows = torch.tensor([[0.25, 1.0]])
        >>> squared_errors(rows, torch.tensor([[1.0], [0.5]]), torch.zeros(2, 1), -2, 1)
        tensor([[0.0625],
                [0.3125]], dtype=torch.float64)

    Paper: none.
    """
    # Errors in units of the step: one pass less, and no overflow or underflow of the squares at extreme scales.
    total = torch.zeros(scale.shape, dtype=torch.float64, device=rows.device)
    budget = max(1, chunk_elements(rows.device) // len(scale))
    width = min(rows.shape[1], budget)
    height = max(1, budget // width)
    for start in range(0, len(rows), height):
        here = slice(start, start + height)
        for part in rows[here].split(width, 1):
            part, step, zero = _grid_operands(part, scale[:, here, None], zero_point[:, here, None])
            steps = part * (1 / step)
            error = steps.round().add_(zero).clamp_(q_min, q_max).sub_(zero).sub_(steps)
            total[:, here] += error.square_().sum(-1)
    return total * scale.double().square()


def first_least(errors: Tensor) -> Tensor:
    """Of several candidates, the first whose error is the least, or above it by no more than a ten-thousandth.

    The one rule of every search in this package. Candidates that are equally good in exact arithmetic (ranges that the
    same entries fill, grids that coincide) differ by what a processor makes of the sums; their order does not.

    Args:
        errors: ``(P, ...)``, P candidates.

    Returns:
        ``(...)``, the index of a candidate, int64.

    Example:
        >>> first_least(torch.tensor([[3.0, 0.0], [1.00001, 2.0], [1.0, 0.0]])).tolist()
        [1, 0]

    Paper: none.
    """
    least = errors.amin(0)
    return (errors <= least + TIE * least.abs()).to(torch.uint8).argmax(0)  # the first of the ones


def tail_quantiles(rows: Tensor, percentiles: Sequence[float]) -> tuple[Tensor, Tensor]:
    """The quantiles 1 - p and p of every row, linearly interpolated; exact for any number of entries.

    Args:
        rows: ``(G, n)``.
        percentiles: above 0.5, at most 1.

    Returns:
        Low and high, each ``(P, G)``, in at least float32.

    Raises:
        ValueError: for a percentile out of range, or none.

    Example:
        >>> low, high = tail_quantiles(torch.arange(101.0)[None], [0.99, 1.0])
        >>> low.flatten().tolist(), high.flatten().tolist()
        ([1.0, 0.0], [99.0, 100.0])

    Paper: none.
    """
    if len(percentiles) == 0:
        raise ValueError("percentiles is empty: give at least one, such as 0.999")
    for p in percentiles:
        if not 0.5 < p <= 1:
            raise ValueError(f"percentile is {p!r}: choose a number above 0.5, at most 1")
    last = rows.shape[1] - 1
    position = torch.tensor([(1 - p) * last for p in percentiles], dtype=torch.float64, device=rows.device)
    below = position.floor().long()
    above = (below + 1).clamp(max=last)
    weight = position - below
    ends = []
    for largest in (False, True):
        # topk: torch.quantile refuses more than 2^24 entries, and sorting all of 20 million takes ten times as long.
        tail = rows.topk(int(above.max()) + 1, dim=1, largest=largest, sorted=True).values
        outer, inner = tail[:, below].double(), tail[:, above].double()
        # Where they are equal nothing may be lost to rounding: a constant row must stay one.
        quantile = torch.where(outer == inner, outer, outer * (1 - weight) + inner * weight)
        ends.append(quantile.T.to(torch.promote_types(rows.dtype, torch.float32)))
    return ends[0], ends[1]


def _channel_rows(x: Tensor, axis: int) -> tuple[Tensor, tuple[int, ...]]:
    """One row per index of ``axis``, and the shape in which a number per row broadcasts against ``x``."""
    if not -x.ndim <= axis < x.ndim:
        raise ValueError(f"axis is {axis}, the data has {x.ndim} dimensions: choose an axis it has")
    moved = x.movedim(axis, 0)
    return moved.reshape(len(moved), -1), (len(moved),) + (1,) * (x.ndim - 1 - axis % x.ndim)


# --- the interface ---


class Quantizer(nn.Module, ABC):
    """The interface: ``observe`` calibration data, ``freeze``, then ``codes``, ``dequantize`` and ``forward``.

    The grid lives in buffers that are None until it is known. A state dict with tensors of any shape can be loaded into
    a fresh quantizer, so ``type(q)(**q.config())`` followed by ``load_state_dict`` gives the same quantizer.
    """

    n_bits: int

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        QUANTIZERS[cls.__name__] = cls

    @abstractmethod
    def observe(self, x: Tensor) -> None:
        """Take calibration data into account; the first call after ``freeze`` starts afresh."""

    @abstractmethod
    def freeze(self) -> None:
        """Fix the grid from what was observed; raises ValueError when nothing was."""

    @abstractmethod
    def codes(self, x: Tensor) -> Tensor:
        """The integer code of every entry, int16."""

    @abstractmethod
    def dequantize(self, codes: Tensor) -> Tensor:
        """The value each code stands for."""

    def config(self) -> dict[str, Any]:
        """The keyword arguments, fit for JSON, that build this quantizer again (without its grid)."""
        return {"n_bits": self.n_bits}

    def forward(self, x: Tensor) -> Tensor:
        """Fake quantization: to the nearest representable value and back, in the dtype of ``x``.

        The gradient is that of the straight-through estimator: 1 inside the representable range, 0 where clamped.
        """
        if not (torch.is_grad_enabled() and x.requires_grad):
            return self._fake_quantize(x).to(x.dtype)
        with torch.no_grad():
            quantized = self._fake_quantize(x.detach()).to(x.dtype)
        passed = torch.where(self._inside(x.detach()), x, 0)
        return quantized + (passed - passed.detach())  # plus exactly zero, with the gradient of what passed

    def _fake_quantize(self, x: Tensor) -> Tensor:
        return self.dequantize(self.codes(x))

    def _inside(self, x: Tensor) -> Tensor:
        """Where the gradient passes."""
        return torch.ones_like(x, dtype=torch.bool)

    def _check_frozen(self) -> None:
        if self.scale is None:
            raise ValueError("the quantizer is not calibrated: observe() data, then freeze()")

    def _apply(self, fn, recurse=True):
        # A model in half precision keeps its grids: a step rounded to eight bits would move every value off its code.
        grids = {name: tensor for name, tensor in self._buffers.items() if tensor is not None}
        super()._apply(fn, recurse)
        for name, tensor in grids.items():
            if self._buffers[name].dtype != tensor.dtype:
                self._buffers[name] = tensor.to(self._buffers[name].device)
        return self

    def _load_from_state_dict(self, state_dict, prefix, *args) -> None:
        # Torch would ignore a None buffer (strict loading calls its value unexpected) and refuse another shape.
        for name in self._buffers.keys() - self._non_persistent_buffers_set:
            if prefix + name in state_dict:
                setattr(self, name, torch.empty_like(state_dict[prefix + name]))
        for name in self._non_persistent_buffers_set:
            if self._buffers[name] is not None and self._buffers[name].is_meta:
                setattr(self, name, None)  # what was observed is of no use without its values
        super()._load_from_state_dict(state_dict, prefix, *args)


class AffineQuantizer(Quantizer):
    r"""Uniform quantizer.

    .. math::
        q = \mathrm{clamp}\big(\mathrm{round}(x / \Delta) + z,\ q_{\min},\ q_{\max}\big), \qquad
        \hat x = \Delta (q - z)

    Asymmetric: codes 0 to 2^b - 1, the range is widened to hold zero so that zero is exact. Symmetric: z = 0 and codes
    -2^(b-1) + 1 to 2^(b-1) - 1, or from -2^(b-1) without ``narrow_range``, whose scale is max abs / (2^(b-1) - 1/2).

    Args:
        n_bits: 2 to 8.
        symmetric, narrow_range: see above; ``narrow_range`` says nothing about asymmetric grids.
        granularity: one grid for all (``per_tensor``); one per index of dimension ``axis`` (``per_channel``); one per
            row and ``group_size`` consecutive entries of the last dimension, the last group may be shorter
            (``per_group``, for weights); or one per row of the last dimension, measured at run time (``per_token``, for
            activations).
        axis: the dimension of the channels; may be negative.
        group_size: entries a group.
        calibration: ``minmax``, streaming; ``percentile``, the quantiles 1 - p and p of all that was observed; or
            ``mse``, the range with the least squared error: the min-max range times 1.00, 0.99, ..., 0.01, and on
            asymmetric grids then the upper end alone and the lower end alone. The last two keep what they observe until
            ``freeze``.
        percentile: p, above 0.5.

    Attributes:
        q_min, q_max: the first and the last code.
        scale, zero_point: the grid, broadcastable to the data (``per_group``: one entry a group, in the place of the
            last dimension); the zero point is a whole number in floating point.

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

    def __init__(
        self,
        n_bits: int,
        *,
        symmetric: bool = False,
        narrow_range: bool = True,
        granularity: Granularity = "per_tensor",
        axis: int = 0,
        group_size: int | None = None,
        calibration: Calibration = "minmax",
        percentile: float = 0.9999,
    ) -> None:
        super().__init__()
        check_quantizer_bits(n_bits)
        if granularity not in GRANULARITIES:
            raise ValueError(f"granularity is {granularity!r}: choose one of {', '.join(GRANULARITIES)}")
        if calibration not in CALIBRATIONS:
            raise ValueError(f"calibration is {calibration!r}: choose one of {', '.join(CALIBRATIONS)}")
        if granularity == "per_token" and calibration != "minmax":
            raise ValueError(f"calibration is {calibration!r}: per_token grids are measured at run time by 'minmax'")
        if granularity == "per_group" and not (isinstance(group_size, int) and group_size >= 1):
            raise ValueError(f"group_size is {group_size!r}: give the entries a group, 1 or more")
        if granularity != "per_group" and group_size is not None:
            raise ValueError(f"group_size is {group_size!r} with granularity {granularity!r}: choose 'per_group'")
        if not 0.5 < percentile <= 1:
            raise ValueError(f"percentile is {percentile!r}: choose a number above 0.5, at most 1")
        self.n_bits, self.symmetric, self.narrow_range = n_bits, symmetric, narrow_range
        self.granularity, self.axis, self.group_size = granularity, axis, group_size
        self.calibration, self.percentile = calibration, percentile
        self.q_max = 2 ** (n_bits - 1) - 1 if symmetric else 2**n_bits - 1
        self.q_min = (-self.q_max if narrow_range else -self.q_max - 1) if symmetric else 0
        self._kept: list[list[Tensor]] = []  # what was observed, as rows; for calibrations other than minmax
        self._done = False  # nothing was observed since the last freeze
        self.register_buffer("low", None, persistent=False)
        self.register_buffer("high", None, persistent=False)
        for name in ("scale", "zero_point"):
            self.register_buffer(name, None, persistent=granularity != "per_token")  # those last for one call

    def config(self) -> dict[str, Any]:
        return {
            "n_bits": self.n_bits,
            "symmetric": self.symmetric,
            "narrow_range": self.narrow_range,
            "granularity": self.granularity,
            "axis": self.axis,
            "group_size": self.group_size,
            "calibration": self.calibration,
            "percentile": self.percentile,
        }

    # --- calibration ---

    def _rows(self, x: Tensor) -> tuple[list[Tensor], tuple[int, ...]]:
        """Matrices with one row per grid, and the shape of the grids; two matrices when a last group is shorter."""
        if self.granularity == "per_tensor":
            return [x.reshape(1, -1)], ()
        if self.granularity == "per_channel":
            rows, shape = _channel_rows(x, self.axis)
            return [rows], shape
        if x.ndim == 0:
            raise ValueError("the data has no dimension to divide into groups: choose 'per_tensor'")
        shape = x.shape[:-1] + (math.ceil(x.shape[-1] / self.group_size),)
        whole = x.shape[-1] // self.group_size * self.group_size
        parts = [(x[..., :whole], self.group_size), (x[..., whole:], x.shape[-1] - whole)]
        return [part.reshape(-1, size) for part, size in parts if part.numel() > 0], shape

    def _arrange(self, parts: list[Tensor], shape: tuple[int, ...]) -> Tensor:
        """Numbers per row of :meth:`_rows` in the shape of the grids."""
        if self.granularity == "per_group":
            return torch.cat([part.view(*shape[:-1], -1) for part in parts], -1)
        return parts[0].view(shape)

    def _grid(self, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
        if not self.symmetric:
            return minmax_grid(low, high, self.n_bits)
        dtype = torch.promote_types(low.dtype, torch.float32)
        largest = torch.maximum(-low.to(dtype).clamp(max=0), high.to(dtype).clamp(min=0))
        scale = _usable_scale(largest / (self.q_max if self.narrow_range else self.q_max + 0.5))
        return scale, torch.zeros_like(scale)

    def observe(self, x: Tensor) -> None:
        x = check_observed(x)
        if self.granularity == "per_token":
            self.low, self.high = x.amin(), x.amax()  # measured again for every token; only remembers that data came
            return
        if self._done:
            self.low, self.high, self._done = None, None, False
        rows, shape = self._rows(x)
        low, high = (self._arrange([pick(part, 1) for part in rows], shape) for pick in (torch.amin, torch.amax))
        if self.low is not None and self.low.shape != low.shape:
            raise ValueError(
                f"the data needs grids of shape {tuple(low.shape)}, what came before {tuple(self.low.shape)}: observe "
                "data with the same channels or groups"
            )
        self.low = low if self.low is None else torch.minimum(self.low, low)
        self.high = high if self.high is None else torch.maximum(self.high, high)
        if self.calibration != "minmax":
            self._kept.append([part.clone() for part in rows])  # what comes after may work in place

    def freeze(self) -> None:
        """Fix the grid from what was observed; once more without new observations changes nothing.

        Raises:
            ValueError: when nothing was observed.
        """
        if self.low is None:
            raise ValueError("nothing was observed: this quantizer saw no calibration data")
        if self.granularity == "per_token" or self._done:
            return
        low, high = self.low, self.high
        if self.calibration != "minmax":
            search = self._percentile_range if self.calibration == "percentile" else self._mse_range
            found = [search(torch.cat(pieces, 1)) for pieces in zip(*self._kept, strict=True)]
            low, high = (self._arrange(list(end), self.low.shape) for end in zip(*found, strict=True))
            self._kept = []
        self._done = True
        self.scale, self.zero_point = self._grid(low, high)

    def _percentile_range(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        low, high = tail_quantiles(rows, [self.percentile])
        return low[0], high[0]

    def _mse_range(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        dtype = torch.promote_types(rows.dtype, torch.float32)
        low, high = rows.amin(1).to(dtype).clamp(max=0), rows.amax(1).to(dtype).clamp(min=0)
        factors = torch.tensor(SHRINK_FACTORS, dtype=dtype, device=rows.device)[:, None]
        kept = torch.ones_like(factors)
        # Both ends together, then each alone: a short end (GELU's negative one) must not shrink with the long one.
        moves = [(factors, factors)] if self.symmetric else [(factors, factors), (kept, factors), (factors, kept)]
        for low_factors, high_factors in moves:
            low, high = self.best_range(rows, low * low_factors, high * high_factors)
        return low, high

    def best_range(self, rows: Tensor, lows: Tensor, highs: Tensor) -> tuple[Tensor, Tensor]:
        """Of the candidate ranges the one of every row with the least squared error; see :func:`first_least`.

        Args:
            rows: ``(G, n)``.
            lows, highs: ``(P, G)``, P candidates a row.

        Returns:
            Low and high, each ``(G,)``.

        Example:
            >>> rows = torch.tensor([[-1.0, 0.0, 1.0]])
            >>> AffineQuantizer(2, symmetric=True).best_range(rows, -torch.tensor([[8.0], [1.0]]), torch.ones(2, 1))
            (tensor([-1.]), tensor([1.]))

        Paper: none.
        """
        errors = squared_errors(rows, *self._grid(lows, highs), self.q_min, self.q_max)
        best = first_least(errors)[None]
        return lows.gather(0, best)[0], highs.gather(0, best)[0]

    def set_range(self, low: Tensor | float, high: Tensor | float) -> None:
        """Fix the grid from the ends of the range, which is widened to hold zero.

        Args:
            low, high: of one shape, that of ``scale`` (see Attributes).

        Raises:
            ValueError: unless finite and low <= high, or for ``per_token``.

        Example:
            >>> q = AffineQuantizer(4)
            >>> q.set_range(5.0, 30.0)
            >>> q.scale, q.zero_point
            (tensor(2.), tensor(0.))

        Paper: none.
        """
        self._check_settable()
        low, high = torch.broadcast_tensors(torch.as_tensor(low).detach(), torch.as_tensor(high).detach())
        for end, name in ((low, "low"), (high, "high")):
            if not torch.isfinite(end).all():
                raise ValueError(f"{name} is {end[~torch.isfinite(end)][0].item()}: give finite ends of the range")
        if (low > high).any():
            raise ValueError("low is above high: give the lower end of the range first")
        dtype = torch.promote_types(torch.promote_types(low.dtype, high.dtype), torch.float32)
        self.scale, self.zero_point = self._grid(low.to(dtype), high.to(dtype))

    def set_grid(self, scale: Tensor | float, zero_point: Tensor | float | None = None) -> None:
        """Fix the grid itself.

        Args:
            scale: in the shape that ``scale`` has (see Attributes).
            zero_point: whole numbers from ``q_min`` to ``q_max`` (symmetric: 0); None is 0.

        Raises:
            ValueError: unless the scale is finite and positive and the zero point as above, or for ``per_token``.

        Example:
            >>> q = AffineQuantizer(4)
            >>> q.set_grid(0.5, 8)
            >>> q(torch.tensor([-9.0, 1.1]))
            tensor([-4.,  1.])

        Paper: none.
        """
        self._check_settable()
        scale = check_step(scale, "scale")
        zero = torch.as_tensor(0 if zero_point is None else zero_point, device=scale.device).detach().to(scale.dtype)
        first, last = (0, 0) if self.symmetric else (self.q_min, self.q_max)
        wrong = ~((zero == zero.round()) & (zero >= first) & (zero <= last))
        if wrong.any():
            raise ValueError(f"zero_point is {zero[wrong][0].item()}: round and clamp it to {first} to {last}")
        scale, zero = torch.broadcast_tensors(scale, zero)
        self.scale, self.zero_point = scale.clone(), zero.clone()

    def _check_settable(self) -> None:
        if self.granularity == "per_token":
            raise ValueError("a per_token grid is measured at run time: choose another granularity to set it")

    # --- use ---

    def _grid_of(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Scale and zero point, broadcastable to ``x``."""
        if self.granularity == "per_token":
            return self._grid(x.amin(-1, keepdim=True), x.amax(-1, keepdim=True))
        self._check_frozen()
        return self._spread(self.scale, x), self._spread(self.zero_point, x)

    def _spread(self, grid: Tensor, x: Tensor) -> Tensor:
        if self.granularity != "per_group":
            return grid
        return grid.repeat_interleave(self.group_size, -1)[..., : x.shape[-1]]

    def for_heads(self, x: Tensor, *, packed: bool = False) -> AffineQuantizer:
        """This quantizer, or one that fits data whose attention heads come in another form than in calibration.

        A grid for each of H heads (``per_channel`` along axis -3) meets other shapes where keys and values are shared
        by groups of heads: a product may see them repeated or not, and a single query with its group as rows.

        Args:
            x: ``(..., heads, rows, K)``.
            packed: whether the heads of a group, where they are missing, are x's rows (of queries and probabilities).

        Returns:
            Itself where the grid fits. Else its copy with a grid for each of x's ``heads``, as wide as the widest of
            the group, or exactly the group's where they are the rows; one grid as wide as the widest where the number
            of heads does not divide H.

        Raises:
            ValueError: for asymmetric grids by head, which have no widest.

        Example:
            >>> q = AffineQuantizer(4, symmetric=True, granularity="per_channel", axis=-3)
            >>> q.set_grid(torch.tensor([1.0, 2.0, 3.0, 4.0]).view(4, 1, 1))
            >>> q.for_heads(torch.zeros(1, 2, 5, 8)).scale.flatten()  # two heads, each read by a group of two
            tensor([2., 4.])

        Paper: none.
        """
        by_head = self.granularity == "per_channel" and self.axis == -3 and self.scale is not None
        if not by_head or (x.ndim >= 3 and x.shape[-3] == len(self.scale)):
            return self
        if not self.symmetric:
            raise ValueError(
                f"the data has shape {tuple(x.shape)}, the grids are of {len(self.scale)} heads and asymmetric: "
                "give data with as many heads"
            )
        heads = x.shape[-3] if x.ndim >= 3 else 1
        group = len(self.scale) // heads
        fitted = type(self)(**self.config())
        if group * heads != len(self.scale):
            fitted.set_grid(self.scale.amax(0, keepdim=True))
        elif packed and x.shape[-2] == group:
            fitted.set_grid(self.scale.view(heads, group, 1))
        else:
            fitted.set_grid(self.scale.view(heads, group).amax(1).view(heads, 1, 1))
        return fitted

    def codes(self, x: Tensor) -> Tensor:
        x = x.detach()
        scale, zero_point = self._grid_of(x)
        if self.granularity == "per_token":
            self.scale, self.zero_point = scale, zero_point  # for dequantize
        return round_to_grid(x, scale, zero_point, self.q_min, self.q_max).to(torch.int16)

    def dequantize(self, codes: Tensor) -> Tensor:
        self._check_frozen()
        return (codes - self._spread(self.zero_point, codes)) * self._spread(self.scale, codes)

    def _fake_quantize(self, x: Tensor) -> Tensor:
        scale, zero_point = self._grid_of(x)
        return fake_quantize(x, scale, 0 if self.symmetric else zero_point, self.q_min, self.q_max)

    def _inside(self, x: Tensor) -> Tensor:
        codes = round_to_grid(x, *self._grid_of(x), self.q_min - 1, self.q_max + 1)
        return (codes >= self.q_min) & (codes <= self.q_max)

    def extra_repr(self) -> str:
        kind = "symmetric" if self.symmetric else "asymmetric"
        group = "" if self.group_size is None else f" of {self.group_size}"
        calibration = "" if self.calibration == "minmax" else f", {self.calibration}"
        return f"{self.n_bits} bits, {kind}, {self.granularity}{group}{calibration}"


def best_percentile_range(
    x: Tensor, n_bits: int, percentiles: Sequence[float], axis: int | None = None, symmetric: bool = False
) -> tuple[Tensor, Tensor]:
    """Of the quantile pairs 1 - p and p, the range with the least squared error of the quantized data.

    Args:
        x: weights or activations.
        n_bits: 2 to 8.
        percentiles: the p to choose from, above 0.5; on a tie the first wins.
        axis: one range per index of this dimension; None for one range.
        symmetric: for a symmetric grid (narrow range).

    Returns:
        Low and high for :meth:`AffineQuantizer.set_range`: zero-dimensional, or in the shape that broadcasts against
        ``x``, such as ``(C, 1)`` for axis 0 of a matrix and ``(C,)`` for axis -1.

    Raises:
        ValueError: for data that is empty or not finite, or bits, percentiles or an axis out of range.

    Example:
        >>> x = torch.cat([torch.linspace(-1, 1, 10_000), torch.tensor([1.9])])
        >>> low, high = best_percentile_range(x, 2, [0.999, 1.0])
        >>> bool(high < 1.0)
        True

    Paper: none; RepQ-ViT and ERQ calibrate with it.
    """
    x = check_observed(x)
    quantizer = AffineQuantizer(n_bits, symmetric=symmetric)
    rows, shape = (x.reshape(1, -1), ()) if axis is None else _channel_rows(x, axis)
    low, high = quantizer.best_range(rows, *tail_quantiles(rows, percentiles))
    return low.view(shape), high.view(shape)
