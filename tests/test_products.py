"""Products by other kernels are the same products."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from s2d.ptq import products
from s2d.ptq.products import multiplies_codes, multiply, multiply_codes


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def views(matrix: Tensor) -> dict[str, Tensor]:
    """The same matrix as it lies in memory in several ways."""
    wide = torch.zeros(len(matrix) + 3, matrix.shape[1] + 5)
    wide[1:-2, 2:-3] = matrix
    return {"rows": matrix, "columns": matrix.T.contiguous().T, "block": wide[1:-2, 2:-3]}


@pytest.mark.parametrize("shape", [(3, 4, 5), (1, 300, 1), (130, 150, 170), (256, 64, 200)])
def test_products_of_matrices_however_they_lie(shape: tuple[int, int, int]) -> None:
    m, k, n = shape
    a, b = normal(m, k), normal(k, n, seed=1)
    expected = a.double() @ b.double()
    for left in views(a).values():
        for right in views(b).values():
            assert torch.allclose(multiply(left, right).double(), expected, rtol=0, atol=1e-5 * k**0.5)


def test_what_only_torch_multiplies(monkeypatch: pytest.MonkeyPatch) -> None:
    a, b = normal(200, 200), normal(200, 200, seed=1)
    assert torch.equal(multiply(a.double(), b.double()), a.double() @ b.double())
    assert torch.equal(multiply(normal(2, 200, 200), b), normal(2, 200, 200) @ b)
    monkeypatch.setattr(products, "_has_onednn", bool)
    assert torch.equal(multiply(a, b), a @ b)


def test_codes_of_eight_bits_multiply_exactly() -> None:
    if not multiplies_codes(torch.device("cpu")):
        pytest.skip("no instructions for products of eight bits")
    a = torch.full((5, 4096), -128, dtype=torch.int8)  # beyond what 16 bits would hold, pair by pair
    b = torch.randint(-128, 128, (4096, 7), generator=torch.Generator().manual_seed(0)).to(torch.int8)
    assert torch.equal(multiply_codes(a, b).long(), a.long() @ b.long())
    assert not multiplies_codes(torch.device("meta"))
