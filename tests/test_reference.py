"""The literal transcriptions, which the efficient versions are tested against, held to closed forms themselves.

Oracles: matrices put together from chosen singular values and vectors, rational arithmetic, and Algorithm 1 worked
out by hand for diagonal weights.
"""

from __future__ import annotations

from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from s2d.reference import (
    LiteralAlgorithm1,
    activation_pcdr_literal,
    penalty_matrix_literal,
    spectral_pcdr_literal,
)

F64 = torch.float64
STRESS = settings(max_examples=60, deadline=None, derandomize=True)


def gaussian(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


def orthonormal(rows: int, columns: int, seed: int) -> Tensor:
    return torch.linalg.qr(gaussian(rows, columns, seed=seed))[0]


def diagonal(*values: float) -> Tensor:
    return torch.diag(torch.tensor(values, dtype=F64))


@st.composite
def decompositions(draw) -> tuple[Tensor, Tensor, Tensor]:
    """``U``, singular values with gaps between them, largest first, and ``V``."""
    m, n = draw(st.integers(1, 7)), draw(st.integers(1, 7))
    steps = draw(st.lists(st.integers(1, 9), min_size=min(m, n), max_size=min(m, n)))
    s = torch.tensor(steps, dtype=F64).flip(0).cumsum(0).flip(0) / 4
    seed = draw(st.integers(0, 2**16))
    return orthonormal(m, len(s), seed), s, orthonormal(n, len(s), seed + 1)


# --- the penalty matrix -----------------------------------------------------------------------------------------------


@STRESS
@given(decompositions(), st.data(), st.sampled_from([0.5, 1, 2, 2.5, 3]))
def test_the_penalty_matrix_of_chosen_components(parts, data: st.DataObject, power: float) -> None:
    u, s, v = parts
    k = data.draw(st.integers(1, len(s)))
    expected = sum(s[r] ** power * torch.outer(u[:, r], v[:, r]) for r in range(k))
    got = penalty_matrix_literal((u * s) @ v.T, k, power)
    torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-9 * float(s[0] ** power))


@pytest.mark.parametrize("power", [1, 2, 3, 2.5])
def test_the_penalty_matrix_of_a_diagonal_weight(power: float) -> None:
    weight = diagonal(2.0, -5.0, 1.0, 3.0)
    torch.testing.assert_close(penalty_matrix_literal(weight, 2, power), diagonal(0, -(5.0**power), 0, 3.0**power))


def test_the_penalty_matrix_of_degenerate_weights() -> None:
    a, b = gaussian(5), gaussian(4, seed=1)
    s = a.norm() * b.norm()
    torch.testing.assert_close(penalty_matrix_literal(torch.outer(a, b), 1, 2), s * torch.outer(a, b))
    torch.testing.assert_close(penalty_matrix_literal(torch.zeros(3, 2, dtype=F64), 2, 2), torch.zeros(3, 2, dtype=F64))
    weight = gaussian(4, 4)  # every component with power 1 is the weight itself
    torch.testing.assert_close(penalty_matrix_literal(weight, 4, 1), weight)


# --- PCDR -------------------------------------------------------------------------------------------------------------


@STRESS
@given(st.lists(st.integers(1, 50), min_size=1, max_size=6, unique=True))
def test_the_spectral_form_in_rational_arithmetic(values: list[int]) -> None:
    squares = [Fraction(value) ** 2 for value in sorted(values, reverse=True)]
    for k in range(1, len(values) + 1):
        expected = float(sum(squares[:k]) / sum(squares))
        assert spectral_pcdr_literal(diagonal(*values), k) == pytest.approx(expected, rel=1e-12)


@STRESS
@given(st.lists(st.integers(1, 50), min_size=2, max_size=2, unique=True), st.integers(-9, 9), st.integers(1, 9))
def test_the_activation_form_in_rational_arithmetic(values: list[int], a: int, b: int) -> None:
    # W = R diag(values) with the rotation R = [[3, -4], [4, 3]] / 5: neuron 0 sees 3/5 s_1 x_1 - 4/5 s_2 x_2.
    weight = torch.tensor([[3.0, -4.0], [4.0, 3.0]], dtype=F64) / 5 * torch.tensor(values, dtype=F64)
    terms = [Fraction(3 * values[0] * a, 5), Fraction(-4 * values[1] * b, 5)]
    largest = values.index(max(values))
    x = torch.tensor([a, b], dtype=F64)
    if sum(terms) != 0:
        got = activation_pcdr_literal(weight, x, 0, 1)
        assert got == pytest.approx(float(abs(terms[largest] / sum(terms))), rel=1e-9, abs=1e-12)
        assert activation_pcdr_literal(weight, x, 0, 2) == pytest.approx(1)


def test_the_activation_form_is_a_ratio_of_magnitudes() -> None:
    # The top component gives 3, the next one takes 2 away again: 3 / 1, and then 1 / 1.
    assert activation_pcdr_literal(torch.tensor([[3.0, 0.0], [0.0, 2.0]]), torch.ones(2), 0, 1) == pytest.approx(1)
    rotated = torch.tensor([[1.0, -1.0], [1.0, 1.0]]) / 2**0.5 * torch.tensor([3.0, 2.0])
    assert activation_pcdr_literal(rotated, torch.ones(2), 0, 1) == pytest.approx(3)
    assert activation_pcdr_literal(rotated, torch.ones(2), 0, 2) == pytest.approx(1)
    assert activation_pcdr_literal(rotated, torch.ones(2), 1, 1) == pytest.approx(3 / 5)


# --- Algorithm 1 ------------------------------------------------------------------------------------------------------


def test_the_literal_follows_the_lines_of_algorithm_1() -> None:
    # tau = 0.95 after k components: 100/126 and 125/126, then 400/426 and 425/426, then 1/3 and 2/3 (none).
    weight = nn.Parameter(diagonal(10.0, 5.0, 1.0))
    other = nn.Parameter(torch.eye(3, dtype=F64))  # never selected
    literal = LiteralAlgorithm1([weight, other], lam=0.1, power=2, tau=0.95, k_max=2, refresh_every=3)
    changes = {1: [20.0, 5.0, 1.0], 4: [3.0, 3.0, 3.0]}  # between refreshes, which are at t = 0, 3 and 6
    penalties = [[100.0, 25.0, 0.0]] * 3 + [[400.0, 25.0, 0.0]] * 3 + [[0.0, 0.0, 0.0]]
    for t, penalty in enumerate(penalties):
        weight.grad, other.grad = torch.full((3, 3), 7.0, dtype=F64), torch.zeros(3, 3, dtype=F64)
        literal.before_step()
        torch.testing.assert_close(weight.grad, 7.0 + 0.1 * diagonal(*penalty))
        assert torch.equal(other.grad, torch.zeros(3, 3, dtype=F64))
        assert literal.t == t + 1
        if t in changes:
            weight.data = diagonal(*changes[t])


def test_the_literal_asks_for_the_pcdr_it_was_given() -> None:
    asked = []

    def pcdr(layer: int, weight: Tensor, k: int) -> float:
        asked.append((layer, k))
        return {0: [0.1, 0.2, 0.3], 1: [0.1, 0.9, 0.2], 2: [0.8, 0.0, 0.0]}[layer][k - 1]

    weights = [nn.Parameter(diagonal(4.0, 3.0, 2.0, 1.0)) for _ in range(3)]
    literal = LiteralAlgorithm1(weights, lam=1.0, power=1, tau=0.8, k_max=3, refresh_every=2, pcdr=pcdr)
    for _ in range(2):
        for weight in weights:
            weight.grad = torch.zeros_like(weight)
        literal.before_step()
    assert asked == [(layer, k) for layer in range(3) for k in (1, 2, 3)]
    for weight, expected in zip(weights, [(0, 0), (4, 3), (4, 0)], strict=True):
        torch.testing.assert_close(weight.grad, diagonal(*expected, 0.0, 0.0))
