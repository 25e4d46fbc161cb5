"""Products of matrices by the kernels that suit the processor: where the searches of this package spend their time."""

from __future__ import annotations

import torch
from torch import Tensor

SMALLEST = 2**21  # multiplications from which on another kernel is worth its call


def multiply(a: Tensor, b: Tensor) -> Tensor:
    """The product of two matrices, without gradient; in float32 on a CPU by oneDNN where torch has it.

    Torch itself takes MKL for these, which runs at half the speed on processors that are not Intel's; on those that
    are, both are equally fast. The sums come in another order, so results differ by rounding.

    Args:
        a, b: ``(m, k)`` and ``(k, n)``.

    Example:
        >>> multiply(torch.ones(2, 3), torch.eye(3))
        tensor([[1., 1., 1.],
                [1., 1., 1.]])

    Paper: none.
    """
    small = a.ndim != 2 or b.ndim != 2 or len(a) * b.numel() < SMALLEST
    plain = a.dtype == b.dtype == torch.float32 and a.device.type == b.device.type == "cpu"
    if small or not plain or not _has_onednn():
        return a @ b
    return torch.ops.mkldnn._linear_pointwise(_dense(a), _dense(b.mT), None, "none", [], "")


def _dense(matrix: Tensor) -> Tensor:
    """The same without gaps between rows (or columns), for which oneDNN has slow kernels only."""
    matrix = matrix.detach()
    return matrix if matrix.is_contiguous() or matrix.mT.is_contiguous() else matrix.contiguous()


def multiplies_codes(device: torch.device) -> bool:
    """Whether :func:`multiply_codes` works there, and fast: a CPU with instructions for products of eight bits.

    Paper: none.
    """
    vnni = getattr(torch.cpu, "_is_vnni_supported", bool)
    return device.type == "cpu" and vnni() and torch.backends.mkldnn.is_available() and hasattr(torch, "_int_mm")


def multiply_codes(a: Tensor, b: Tensor) -> Tensor:
    """The product of two matrices of whole numbers, exact and several times as fast as that of the same as floats.

    Args:
        a, b: int8, ``(m, k)`` and ``(k, n)``.

    Returns:
        int32.

    Example:
        >>> codes = torch.tensor([[100, -100]], dtype=torch.int8)
        >>> int(multiply_codes(codes, codes.T)) if multiplies_codes(codes.device) else 20000
        20000

    Paper: none.
    """
    return torch._int_mm(a, b)


def _has_onednn() -> bool:
    return torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")
