"""Theorem 1, checked on a running model: no layer's output outgrows its spectral norm times its input."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn

from s2d.layers import linear_layers
from s2d.spectral import spectral_norm_bounds


class BoundCheck(NamedTuple):
    """Theorem 1 on one layer and one batch.

    Attributes:
        layer: qualified name.
        lower, upper: guaranteed enclosure of the spectral norm of the weight.
        largest_gain: the largest ``||y - b|| / ||x||`` over the tokens of the batch.
        tightness: ``largest_gain / upper``, at most 1 up to the rounding of the layer's own arithmetic.
        holds: ``||y - b|| <= upper ||x||`` for every token, rounding of the forward pass allowed for.
        tokens: how many inputs were checked.
    """

    layer: str
    lower: float
    upper: float
    largest_gain: float
    tightness: float
    holds: bool
    tokens: int


@torch.no_grad()
def check_bound(model: nn.Module, batch: Tensor, *, layers: Mapping[str, nn.Linear] | None = None) -> list[BoundCheck]:
    r"""Check Theorem 1 on the inputs and outputs that each layer really sees.

    .. math:: \|W x\|_2 \le \sigma_{\max}(W) \|x\|_2

    The bias is not part of the theorem, so ``y - b`` is compared. The right-hand side uses a guaranteed upper end
    (:func:`s2d.spectral.spectral_norm_bounds`), never an estimate from below. What the layer's own arithmetic can add
    is allowed for: inputs, weight and output rounded to the precision of the output, and n products summed in float32
    (float64 for float64), as every backend sums half precision. So a reported violation is a real one.

    Args:
        model: any module; left in the mode it is in, gradients off.
        batch: what the model is called with.
        layers: name to Linear; by default :func:`s2d.layers.linear_layers`.

    Returns:
        One row a layer that took part in the forward pass, in order of the model.

    Raises:
        ValueError: if a layer's input, output or weight is not finite, or no layer took part.

    Example:
        >>> rows = check_bound(nn.Linear(8, 4), torch.randn(16, 8))
        >>> [row.holds for row in rows]
        [True]

    Paper: Theorem 1 (A.1), equation 7.
    """
    layers = linear_layers(model) if layers is None else dict(layers)
    bounds = {name: spectral_norm_bounds(layer.weight) for name, layer in layers.items()}
    rows: dict[str, BoundCheck] = {}

    def check(name: str, layer: nn.Linear, x: Tensor, y: Tensor) -> None:
        allowance = _rounding_allowance(layer, y.dtype)
        x, y = x.reshape(-1, x.shape[-1]).double(), y.reshape(-1, y.shape[-1]).double()
        bias = 0.0 if layer.bias is None else layer.bias.double()
        x_norm, wx_norm = torch.linalg.vector_norm(x, dim=1), torch.linalg.vector_norm(y - bias, dim=1)
        if not (torch.isfinite(x_norm).all() and torch.isfinite(wx_norm).all()):
            raise ValueError(f"layer {name}: input or output holds NaN or infinity, nothing can be checked")
        lower, upper = bounds[name]
        holds = bool((wx_norm <= upper * x_norm + allowance(x_norm, wx_norm)).all())
        gain = (wx_norm / x_norm)[x_norm > 0]
        largest = gain.max().item() if len(gain) else 0.0
        before = rows.get(name)
        if before is not None:  # a layer that is called several times in one forward pass
            largest, holds = max(largest, before.largest_gain), holds and before.holds
        tokens = len(x) + (before.tokens if before else 0)
        rows[name] = BoundCheck(name, lower, upper, largest, largest / upper if upper > 0 else 0.0, holds, tokens)

    handles = [
        layer.register_forward_hook(
            lambda module, args, kwargs, output, name=name: check(
                name, module, args[0] if args else kwargs["input"], output
            ),
            with_kwargs=True,
        )
        for name, layer in layers.items()
    ]
    try:
        model(batch)
    finally:
        for handle in handles:
            handle.remove()
    if not rows:
        raise ValueError(f"none of the layers {', '.join(layers)} took part in the forward pass")
    return [rows[name] for name in layers if name in rows]


def _rounding_allowance(layer: nn.Linear, dtype: torch.dtype) -> Callable[[Tensor, Tensor], Tensor]:
    """How far rounding can lift ``||y - b||``, by ``||x||`` and ``||y - b||``, for outputs of one dtype."""
    info = torch.finfo(dtype)
    unit = info.eps / 2
    summation = unit if dtype == torch.float64 else min(unit, 2.0**-24)
    n, m = layer.in_features, layer.out_features
    frobenius = torch.linalg.matrix_norm(layer.weight.double())
    bias = 0.0 if layer.bias is None else torch.linalg.vector_norm(layer.bias.double())
    relative = (4 * unit + 2 * (n + 2) * summation) * frobenius
    # Among subnormal numbers the error is absolute.
    absolute = info.smallest_normal * info.eps * (m**0.5 * (n + 2) + frobenius * n**0.5)
    return lambda x_norm, wx_norm: relative * x_norm + 4 * unit * (wx_norm + 2 * bias) + absolute
