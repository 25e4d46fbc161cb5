"""Activation outliers: streaming kurtosis and extremes, and the outlier activations themselves.

Appendix C of the paper argues from the kurtosis of activations; appendix E (Table 7) reports their largest magnitude.
PCDR (:mod:`s2d.pcdr`) is evaluated at the outlier activations that :class:`OutlierRows` keeps.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor, nn

from s2d.checks import check_count, check_tensor


class ActivationSummary(NamedTuple):
    """What :class:`ActivationStatistics` knows after its last update; all dimensionless but ``max_abs``.

    Attributes:
        count: number of entries seen.
        mean: mean of the entries.
        std: standard deviation of the entries (population).
        excess_kurtosis: entry-wise excess kurtosis, 0 for a normal distribution.
        neuron_kurtosis: ``E_j[s_j^4] / E_j[s_j^2]^2`` over channels, from 1 (all alike) to the width (one channel).
        max_abs: largest magnitude, in the units of the activation.
    """

    count: int  # type: ignore[assignment]  # a tuple's own count() is of no use here
    mean: float
    std: float
    excess_kurtosis: float
    neuron_kurtosis: float
    max_abs: float


def excess_kurtosis(x: Tensor) -> float:
    r"""Entry-wise excess kurtosis of a tensor, in float64.

    .. math:: \frac{E[(x - \mu)^4]}{E[(x - \mu)^2]^2} - 3

    Args:
        x: any shape, at least one entry.

    Returns:
        0 for normal data, -1.2 for uniform, 0 by convention for a constant tensor.

    Raises:
        ValueError: for an empty or non-finite tensor.

    Example:
        >>> round(excess_kurtosis(torch.tensor([1.0, -1.0])), 6)
        -2.0

    Paper: appendix C.
    """
    return _summary_of(x).excess_kurtosis


def neuron_kurtosis(x: Tensor) -> float:
    r"""How unevenly the magnitude is spread over channels.

    .. math:: \frac{E_j[s_j^4]}{E_j[s_j^2]^2}, \qquad s_j^2 = E_\text{tokens}[x_j^2]

    Args:
        x: ``(..., width)``; the last dimension holds the channels.

    Returns:
        From 1 (every channel alike) to ``width`` (a single channel carries everything); 1 for a zero tensor.

    Raises:
        ValueError: for an empty or non-finite tensor.

    Example:
        >>> neuron_kurtosis(torch.eye(4)[:1])
        4.0

    Paper: appendix C (reference [6] there).
    """
    return _summary_of(x).neuron_kurtosis


def _summary_of(x: Tensor) -> ActivationSummary:
    statistics = ActivationStatistics()
    statistics.update(x)
    return statistics.summary()


class ActivationStatistics:
    """Moments of activations, merged over batches without storing them.

    Central moments are merged pairwise (Pebay 2008) in float64, so a large mean does not swallow the spread.

    Example:
        >>> statistics = ActivationStatistics()
        >>> for batch in torch.arange(12.0).reshape(3, 2, 2):
        ...     statistics.update(batch)
        >>> statistics.summary().max_abs
        11.0

    Paper: appendix C and Table 7.
    """

    def __init__(self) -> None:
        self.count = 0
        self._mean = self._m2 = self._m3 = self._m4 = 0.0
        self._max_abs = 0.0
        self._square_sum: Tensor | None = None

    def update(self, x: Tensor) -> None:
        """Add one batch ``(..., width)``; raises ValueError if it is empty, non-finite or of another width."""
        if not isinstance(x, Tensor):
            raise ValueError(f"activations are a {type(x).__name__}: expected one tensor (..., width)")
        if not (x.is_floating_point() or x.is_complex() or x.dtype == torch.bool):
            x = x.to(torch.float32 if x.device.type == "mps" else torch.float64)  # integers are activations too
        x = check_tensor("activations", x, "give a tensor of real numbers (..., width)").detach()
        if x.numel() == 0 or x.ndim == 0:
            raise ValueError(f"activations of shape {tuple(x.shape)}: expected (..., width) with at least one entry")
        # MPS has no float64; everything else computes the moments where the data is.
        x = x.cpu().double() if x.device.type == "mps" else x.double()
        max_abs = x.abs().max().item()
        if not max_abs < float("inf"):
            raise ValueError("activations hold NaN or infinity: find the first layer that makes them before measuring")
        square_sum = x.square().reshape(-1, x.shape[-1]).sum(0).cpu()
        if self._square_sum is not None and self._square_sum.shape != square_sum.shape:
            raise ValueError(f"activations have width {x.shape[-1]}, earlier batches had {len(self._square_sum)}")
        self._square_sum = square_sum if self._square_sum is None else self._square_sum + square_sum
        self._max_abs = max(self._max_abs, max_abs)

        n_a, n_b = self.count, x.numel()
        mean_b = x.mean().item()
        centred = x - mean_b
        squared = centred.square()
        m2_b, m3_b, m4_b = squared.sum().item(), (squared * centred).sum().item(), squared.square().sum().item()
        n = n_a + n_b
        d = mean_b - self._mean
        m2_a, m3_a, m4_a = self._m2, self._m3, self._m4
        self._m4 = (
            m4_a
            + m4_b
            + d**4 * n_a * n_b * (n_a**2 - n_a * n_b + n_b**2) / n**3
            + 6 * d**2 * (n_a**2 * m2_b + n_b**2 * m2_a) / n**2
            + 4 * d * (n_a * m3_b - n_b * m3_a) / n
        )
        self._m3 = m3_a + m3_b + d**3 * n_a * n_b * (n_a - n_b) / n**2 + 3 * d * (n_a * m2_b - n_b * m2_a) / n
        self._m2 = m2_a + m2_b + d**2 * n_a * n_b / n
        self._mean += d * n_b / n
        self.count = n

    def summary(self) -> ActivationSummary:
        """The statistics so far; raises ValueError before the first update."""
        if self.count == 0 or self._square_sum is None:
            raise ValueError("no activations seen yet: call update() first")
        variance = self._m2 / self.count
        # A constant leaves rounding noise for a variance, and noise has a kurtosis of its own.
        constant = variance <= (2.0**-48 * self._max_abs) ** 2
        kurtosis = 0.0 if constant else self._m4 / self.count / variance**2 - 3.0
        energy = self._square_sum / self._square_sum.sum() if self._square_sum.sum() > 0 else None
        # With p_j = s_j^2 / sum s^2 the ratio is width * sum p^2, which neither over- nor underflows.
        spread = float(len(energy) * energy.square().sum()) if energy is not None else 1.0
        return ActivationSummary(self.count, self._mean, variance**0.5, kurtosis, spread, self._max_abs)


@contextmanager
def watch_activations(modules: Mapping[str, nn.Module]) -> Iterator[dict[str, ActivationStatistics]]:
    """Collect :class:`ActivationStatistics` of the outputs of some modules while the context is open.

    Args:
        modules: name to module; each must return one tensor.

    Yields:
        Name to statistics, filled by every forward pass inside the context.

    Raises:
        ValueError: for anything but names and modules.

    Example:
        >>> layer = nn.Linear(2, 3)
        >>> with watch_activations({"layer": layer}) as statistics:
        ...     _ = layer(torch.ones(4, 2))
        >>> statistics["layer"].count
        12

    Paper: appendix C.
    """
    if not isinstance(modules, Mapping) or not all(isinstance(module, nn.Module) for module in modules.values()):
        raise ValueError(f"modules is a {type(modules).__name__}: give a dictionary of name to torch.nn.Module")
    statistics = {name: ActivationStatistics() for name in modules}
    handles = [
        module.register_forward_hook(lambda _module, _inputs, output, name=name: statistics[name].update(output))
        for name, module in modules.items()
    ]
    try:
        yield statistics
    finally:
        for handle in handles:
            handle.remove()


class OutlierRows:
    """The outlier activations of one linear layer: the largest ``|y_ij|`` seen, with the inputs that made them.

    Only ``capacity`` rows are kept, so a layer costs ``capacity * in_features`` numbers however many tokens pass. They
    live in buffers of fixed size that an update changes in place, so that ``torch.compile`` can trace it.

    Args:
        capacity: how many activations to keep.

    Example:
        >>> rows = OutlierRows(capacity=2)
        >>> rows.update(torch.eye(2), torch.tensor([[1.0, -5.0], [3.0, 0.0]]))
        >>> rows.magnitude, rows.neuron
        (tensor([5., 3.]), tensor([1, 0]))

    Paper: main text, PCDR ("outlier activations"; second-hand).
    """

    def __init__(self, capacity: int = 16) -> None:
        self.capacity = check_count("capacity", capacity, "keep at least one outlier")
        self._magnitude: Tensor | None = None  # -1 where nothing is kept yet
        self._neuron: Tensor | None = None
        self._x: Tensor | None = None

    def __len__(self) -> int:
        return 0 if self._magnitude is None else int((self._magnitude >= 0).sum())

    @property
    def magnitude(self) -> Tensor | None:
        """``(r,)`` the ``|y_ij|``, largest first, ``r <= capacity``; None when nothing was seen."""
        return self._kept(self._magnitude)

    @property
    def neuron(self) -> Tensor | None:
        """``(r,)`` the output index i of each."""
        return self._kept(self._neuron)

    @property
    def x(self) -> Tensor | None:
        """``(r, in_features)`` the input x_j of each."""
        return self._kept(self._x)

    def _kept(self, buffer: Tensor | None) -> Tensor | None:
        return buffer[: len(self)] if buffer is not None and len(self) else None

    def allocate(self, in_features: int, dtype: torch.dtype, device: torch.device) -> None:
        """Make the buffers, empty; the first update does it otherwise.

        Raises:
            ValueError: for a width that is no positive integer, or what is no dtype or device.
        """
        check_count("in_features", in_features, "give the width of the input")
        if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
            raise ValueError(f"dtype is {dtype!r}: give a floating dtype such as torch.float32")
        if not isinstance(device, torch.device):
            raise ValueError(f"device is {device!r}: give a torch.device")
        dtype = torch.promote_types(dtype, torch.float32)
        self._magnitude = torch.full((self.capacity,), -1.0, dtype=dtype, device=device)
        self._neuron = torch.zeros(self.capacity, dtype=torch.int64, device=device)
        self._x = torch.zeros(self.capacity, in_features, dtype=dtype, device=device)

    @torch.no_grad()
    def update(self, x: Tensor, y: Tensor) -> None:
        """Merge one forward pass. A token whose output is not finite is passed over.

        Args:
            x: layer input ``(..., in_features)``.
            y: layer output without its bias ``(..., out_features)``, same leading shape.

        Raises:
            ValueError: for tensors that do not fit each other, or another width than before.
        """
        self._check(x, y)
        x, y = x.reshape(-1, x.shape[-1]), y.reshape(-1, y.shape[-1])
        if y.numel() == 0:
            return
        if self._magnitude is None:
            self.allocate(x.shape[1], torch.promote_types(x.dtype, y.dtype), x.device)
        # The largest entries lie in the tokens with the largest maxima, and those are quicker to find.
        peak = y.abs().amax(dim=1)
        peak, token = torch.where(torch.isfinite(peak), peak, -1.0).topk(min(self.capacity, len(y)))
        size = torch.where(peak[:, None] >= 0, y[token].abs(), -1.0).flatten()
        size, flat = size.topk(min(self.capacity, len(size)))
        self.merge(size, flat % y.shape[1], x[token[flat // y.shape[1]]])

    @torch.no_grad()
    def merge(self, magnitude: Tensor, neuron: Tensor, x: Tensor) -> None:
        """Merge activations, in any order, into buffers that exist.

        Args:
            magnitude: ``(r,)``.
            neuron: ``(r,)`` integer.
            x: ``(r, in_features)``.

        Raises:
            ValueError: before :meth:`allocate` or :meth:`update`, and for shapes that do not fit.
        """
        if self._x is None or self._magnitude is None or self._neuron is None:
            raise ValueError("there are no buffers yet: call allocate() or update() first")
        tensors = all(isinstance(part, Tensor) for part in (magnitude, neuron, x))
        if (
            not tensors
            or (x.ndim, magnitude.ndim, neuron.ndim) != (2, 1, 1)
            or x.shape[1] != self._x.shape[1]
            or not (len(x) == len(magnitude) == len(neuron))
        ):
            shapes = [tuple(p.shape) if isinstance(p, Tensor) else type(p).__name__ for p in (magnitude, neuron, x)]
            raise ValueError(
                f"magnitude, neuron and x are {shapes}: give tensors (r,), (r,) and (r, {self._x.shape[1]})"
            )
        magnitude = torch.cat([self._magnitude, magnitude.to(self._magnitude)])
        magnitude, keep = magnitude.topk(self.capacity)
        self._magnitude.copy_(magnitude)
        self._neuron.copy_(torch.cat([self._neuron, neuron.to(self._neuron)])[keep])
        self._x.copy_(torch.cat([self._x, x.to(self._x)])[keep])

    def _check(self, x: Tensor, y: Tensor) -> None:
        for name, part in (("x", x), ("y", y)):
            check_tensor(name, part, "give what the layer was called with, and what it returned without its bias")
        if not x.ndim or not y.ndim or x.shape[:-1] != y.shape[:-1]:
            raise ValueError(
                f"x {tuple(x.shape)} and y {tuple(y.shape)} do not fit: give one layer's input and output, with the "
                "same leading shape"
            )
        if self._x is not None and self._x.shape[1] != x.shape[-1]:
            raise ValueError(f"x has width {x.shape[-1]}, earlier inputs had {self._x.shape[1]}: keep layers apart")

    def clear(self) -> None:
        """Forget everything and free the buffers."""
        self._magnitude = self._neuron = self._x = None
