"""Round to nearest: every value goes to the closest point of a min-max grid."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn

from s2d.ptq.prepare import calibrate_inputs, prepare, quantized_layers
from s2d.ptq.quantizers import SWITCHED_OFF, AffineQuantizer


@torch.no_grad()
def rtn(
    model: nn.Module,
    calibration: Tensor,
    *,
    w_bits: int,
    a_bits: int,
    symmetric: bool = False,
    activations: str = "per_tensor",
    batch_size: int = 64,
) -> nn.Module:
    """Quantize with round-to-nearest: weights per output channel, activations min-max over the calibration set.

    Args:
        model: left untouched.
        calibration: ``(N, ...)`` what the model is called with.
        w_bits, a_bits: see :func:`s2d.ptq.quantize`.
        symmetric: symmetric grids on both sides.
        activations: ``"per_tensor"`` (static) or ``"per_token"`` (measured at run time).
        batch_size: calibration images a forward pass.

    Returns:
        The quantized copy.

    Raises:
        ValueError: for another choice of ``activations``, or see :func:`s2d.ptq.prepare.prepare` and
            :func:`s2d.ptq.prepare.calibrate_inputs`.

    Paper: Table 9 (RTN).
    """
    if activations not in ("per_tensor", "per_token"):
        raise ValueError(f"activations is {activations!r}: choose 'per_tensor' or 'per_token'")
    off = w_bits in SWITCHED_OFF, a_bits in SWITCHED_OFF
    make_weight = partial(AffineQuantizer, w_bits, symmetric=symmetric, granularity="per_channel")
    make_input = partial(AffineQuantizer, a_bits, symmetric=symmetric, granularity=activations)
    quantized = prepare(
        model, (lambda: None) if off[0] else make_weight, (lambda: None) if off[1] else make_input, calibration[:2]
    )
    calibrate_inputs(quantized, calibration.split(batch_size))
    for layer in quantized_layers(quantized).values():
        if layer.weight_quantizer is not None:
            layer.weight_quantizer.observe(layer.linear.weight)
            layer.weight_quantizer.freeze()
            layer.linear.weight.copy_(layer.weight_quantizer(layer.linear.weight))
        layer.mode = "quantized"
    return quantized
