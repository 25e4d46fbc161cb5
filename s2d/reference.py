"""Literal transcriptions of the paper: slow, dense, and what every efficient version is tested against."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from s2d.pcdr import outlier_rank


def activation_pcdr_literal(weight: Tensor, x: Tensor, neuron: int, k: int) -> float:
    """PCDR_k(i, j) by its printed sums over a full SVD in float64.

    Args:
        weight: ``(out_features, in_features)``.
        x: ``(in_features,)`` one input x_j.
        neuron: the output index i.
        k: how many components the numerator sums.

    Example:
        >>> activation_pcdr_literal(torch.diag(torch.tensor([3.0, 1.0])), torch.ones(2), neuron=0, k=1)
        1.0

    Paper: main text (second-hand).
    """
    u, s, vh = torch.linalg.svd(weight.double(), full_matrices=False)
    terms = [s[r] * u[neuron, r] * torch.dot(vh[r], x.double()) for r in range(len(s))]
    return float(abs(sum(terms[:k])) / abs(sum(terms)))


def spectral_pcdr_literal(weight: Tensor, k: int) -> float:
    """PCDR(Sigma, k) by its printed sums over a full SVD in float64.

    Example:
        >>> spectral_pcdr_literal(torch.eye(4), 1)
        0.25

    Paper: Algorithm 1, line 9.
    """
    s = torch.linalg.svdvals(weight.double())
    return float((s[:k] ** 2).sum() / (s**2).sum())


def penalty_matrix_literal(weight: Tensor, k: int, power: float) -> Tensor:
    """``G_reg = U[:, :k] diag(s[:k] ** power) V[:, :k]^T``, dense, from a full SVD.

    Paper: Algorithm 1, lines 8, 11 and 12.
    """
    u, s, vh = torch.linalg.svd(weight, full_matrices=False)
    return u[:, :k] @ torch.diag(s[:k] ** power) @ vh[:k]


class LiteralAlgorithm1:
    """Algorithm 1, line by line, on a list of weights that an outer loop trains with any optimizer.

    Args:
        weights: the W^(l).
        lam, power, tau, k_max, refresh_every: as in :class:`s2d.SelectiveSpectralDecay`.
        pcdr: ``pcdr(l, weight, k) -> float``, the PCDR of layer l; the spectral form by default.

    Example:
        >>> weight = torch.nn.Parameter(torch.diag(torch.tensor([10.0, 1.0])))
        >>> weight.grad = torch.zeros(2, 2)
        >>> LiteralAlgorithm1([weight], lam=0.1, power=2, tau=0.95, k_max=1, refresh_every=100).before_step()
        >>> weight.grad
        tensor([[10.,  0.],
                [ 0.,  0.]])

    Paper: Algorithm 1.
    """

    def __init__(
        self,
        weights: Sequence[Tensor],
        *,
        lam: float,
        power: float,
        tau: float,
        k_max: int,
        refresh_every: int,
        pcdr: Callable[[int, Tensor, int], float] = lambda _layer, weight, k: spectral_pcdr_literal(weight, k),
    ) -> None:
        self.weights, self.lam, self.power, self.tau = list(weights), lam, power, tau
        self.k_max, self.refresh_every, self.pcdr = k_max, refresh_every, pcdr
        self.t = 0  # line 3
        self.g_reg = [torch.zeros_like(weight) for weight in self.weights]  # line 4

    @torch.no_grad()
    def before_step(self) -> None:
        """Lines 6 to 20 up to the update itself: call between ``backward()`` and ``optimizer.step()``."""
        if self.t % self.refresh_every == 0:  # line 6
            for index, weight in enumerate(self.weights):  # line 7
                values = torch.tensor([self.pcdr(index, weight, k) for k in range(1, self.k_max + 1)])
                k_hat = outlier_rank(values.nan_to_num(0.0), self.tau)  # line 9
                self.g_reg[index] = (  # lines 10 to 15
                    penalty_matrix_literal(weight, k_hat, self.power) if k_hat is not None else torch.zeros_like(weight)
                )
        for weight, g_reg in zip(self.weights, self.g_reg, strict=True):  # lines 19 and 20
            assert weight.grad is not None  # of backward()
            weight.grad += self.lam * g_reg
        self.t += 1  # line 22
