"""Post-training quantization of any transformer through one call, :func:`quantize`."""

from __future__ import annotations

import re

import torch
from torch import Tensor, nn

from s2d.ptq.quantizers import check_bits
from s2d.ptq.rtn import rtn

METHODS = {"rtn": rtn}

__all__ = ["METHODS", "parse_bits", "quantize"]


def quantize(
    model: nn.Module, *, method: str = "rtn", w_bits: int, a_bits: int, calibration: Tensor, **options
) -> nn.Module:
    """A quantized copy of a model: every Linear layer's weight and input, the head included.

    LayerNorm, softmax, GELU, residual sums, embeddings, biases, the patch convolution and the attention products stay
    in floating point.

    Args:
        model: left untouched.
        method: a key of ``METHODS``.
        w_bits, a_bits: 2 to 8; 16 or 32 leaves that side in floating point.
        calibration: ``(N, ...)`` images, N >= 1, disjoint from what the result is tested on.
        **options: keyword arguments of the method.

    Returns:
        The copy, in evaluation mode.

    Raises:
        ValueError: for an unknown method, bits out of range, or a calibration set that is empty or not finite.

    Example:
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.GELU(), nn.Linear(8, 2))
        >>> quantized = quantize(model, method="rtn", w_bits=4, a_bits=4, calibration=torch.randn(32, 4))
        >>> int(quantized[0].weight_codes().max()) <= 15
        True

    Paper: Tables 6 to 11 evaluate quantized checkpoints.
    """
    if method not in METHODS:
        raise ValueError(f"unknown method {method!r}: choose one of {', '.join(METHODS)}")
    check_bits(w_bits, "w_bits")
    check_bits(a_bits, "a_bits")
    if len(calibration) == 0:
        raise ValueError("the calibration set is empty: give at least one image")
    if not torch.isfinite(calibration).all():
        raise ValueError("the calibration set holds NaN or infinity: check the images")
    return METHODS[method](model, calibration, w_bits=w_bits, a_bits=a_bits, **options)


def parse_bits(name: str) -> tuple[int, int]:
    """Weight and activation bits of a name such as ``"W4A4"``; ``"FP"`` switches both off.

    Raises:
        ValueError: for a name of another form, or bits out of range.

    Example:
        >>> parse_bits("W3A4")
        (3, 4)
    """
    if name == "FP":
        return 32, 32
    match = re.fullmatch("W([0-9]+)A([0-9]+)", name)
    if match is None:
        raise ValueError(f"bit width {name!r} is not of the form W4A4 (or FP)")
    return check_bits(int(match[1]), "w_bits"), check_bits(int(match[2]), "a_bits")
