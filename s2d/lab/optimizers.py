"""Optimizers beside AdamW and SGD: the interventions of appendix C's references, and a cap on the spectral norm.

Each is an :class:`~s2d.lab.training.Optimizer` recipe, so the training loop takes it as it is. This file is part of the
identity of the checkpoints that use it (see :mod:`s2d.lab.store`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from s2d.cap import cap_spectral_norm_
from s2d.lab.training import Optimizer

ROTATION_SEED = 20260223


def _decayed_groups(recipe: Optimizer, model: nn.Module) -> list[dict[str, Any]]:
    """Parameter groups as of :meth:`Optimizer.build`: biases, norms and embeddings are not decayed."""
    from timm.optim import param_groups_weight_decay

    return param_groups_weight_decay(model, recipe.weight_decay, no_weight_decay_list=model.no_weight_decay())


def random_rotation(n: int, generator: torch.Generator) -> Tensor:
    """An ``(n, n)`` orthogonal matrix, uniform over all of them.

    Example:
        >>> q = random_rotation(3, torch.Generator().manual_seed(0))
        >>> torch.allclose(q @ q.T, torch.eye(3), atol=1e-6)
        True
    """
    q, r = torch.linalg.qr(torch.randn(n, n, generator=generator, dtype=torch.float64))
    return (q * r.diagonal().sign()).float()  # without the signs QR's choice of them would not be uniform


class RotatedAdamW(torch.optim.AdamW):
    """AdamW that sees every parameter in a randomly rotated basis: gradient and parameter are rotated, stepped, and
    rotated back.

    A rotation changes neither loss nor gradient flow; only an optimizer that treats coordinates apart, as Adam does,
    can tell the difference. A weight is rotated on both sides, everything else along its last dimension.

    Args:
        params: as for ``torch.optim.AdamW``.
        rotation_seed: seed of the rotations, which stay the same over training.
        **options: of ``torch.optim.AdamW``.

    Paper: appendix C, reference [6].
    """

    def __init__(self, params: Iterable, *, rotation_seed: int = ROTATION_SEED, **options: Any) -> None:
        super().__init__(params, **options)
        generator = torch.Generator().manual_seed(rotation_seed)
        self._rotations: dict[Tensor, tuple[Tensor | None, Tensor]] = {}
        for group in self.param_groups:
            for p in group["params"]:
                last = p.flatten(1).shape[1] if p.ndim == 4 else p.shape[-1]  # a convolution is a matrix of patches
                left = random_rotation(p.shape[0], generator).to(p.device) if p.ndim in (2, 4) else None
                self._rotations[p] = left, random_rotation(last, generator).to(p.device)

    @staticmethod
    def _turn(tensor: Tensor, left: Tensor | None, right: Tensor) -> None:
        matrix = tensor.reshape(-1, right.shape[0])
        matrix = matrix @ right if left is None else left @ matrix @ right
        tensor.copy_(matrix.reshape(tensor.shape))

    @torch.no_grad()
    def step(self, closure: Callable | None = None) -> Any:
        """One step of AdamW between two changes of basis; a closure is called before, in the usual basis."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        moved = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
        for p in moved:
            left, right = self._rotations[p]
            self._turn(p, left, right)
            self._turn(p.grad, left, right)
        super().step()
        for p in moved:
            left, right = self._rotations[p]
            self._turn(p, None if left is None else left.T, right.T)
        return loss


class MuonAndAdamW:
    """``torch.optim.Muon`` for the matrices of the blocks, AdamW for the rest, as one optimizer.

    Args:
        muon: optimizer of the matrices.
        adamw: optimizer of everything else.

    Paper: none (the optimizer whose updates are orthogonal, so that no singular direction is privileged).
    """

    def __init__(self, muon: torch.optim.Optimizer, adamw: torch.optim.Optimizer) -> None:
        self.parts = (muon, adamw)

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The groups of both."""
        return [group for part in self.parts for group in part.param_groups]

    def step(self) -> None:
        """One step of each."""
        for part in self.parts:
            part.step()

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget the gradients of both."""
        for part in self.parts:
            part.zero_grad(set_to_none=set_to_none)

    def state_dict(self) -> dict[str, Any]:
        """State of both under running indices."""
        state, groups, offset = {}, [], 0
        for part in self.parts:
            own = part.state_dict()
            state |= {offset + index: value for index, value in own["state"].items()}
            groups += own["param_groups"]
            offset += sum(len(group["params"]) for group in own["param_groups"])
        return {"state": state, "param_groups": groups}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue where :meth:`state_dict` was taken."""
        offset, first = 0, 0
        for part in self.parts:
            count = sum(len(group["params"]) for group in part.param_groups)
            state = {i - offset: value for i, value in state_dict["state"].items() if offset <= i < offset + count}
            groups = state_dict["param_groups"][first : first + len(part.param_groups)]
            part.load_state_dict({"state": state, "param_groups": groups})
            offset, first = offset + count, first + len(part.param_groups)


# --- recipes ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class LessAdaptive(Optimizer):
    """AdamW with another ``eps``: where it exceeds the root of the second moment, the step is that of momentum SGD.

    Paper: appendix C, reference [7].
    """

    eps: float = 1e-8

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.eps > 0:
            raise ValueError(f"eps is {self.eps}: it must be positive; 1e-8 is torch's own")

    def build(self, model: nn.Module) -> torch.optim.Optimizer:
        """The torch optimizer over the model's parameters."""
        return torch.optim.AdamW(_decayed_groups(self, model), lr=self.lr, betas=self.betas, eps=self.eps)


@dataclass(frozen=True)
class RotatedBasis(Optimizer):
    """AdamW in a randomly rotated basis: :class:`RotatedAdamW`."""

    rotation_seed: int = ROTATION_SEED

    def build(self, model: nn.Module) -> torch.optim.Optimizer:
        """The optimizer over the model's parameters."""
        groups = _decayed_groups(self, model)
        return RotatedAdamW(groups, rotation_seed=self.rotation_seed, lr=self.lr, betas=self.betas)


@dataclass(frozen=True)
class Orthogonal(Optimizer):
    """Muon for the matrices of the blocks, AdamW for patches, embeddings, head and biases: :class:`MuonAndAdamW`.

    ``lr`` is AdamW's; Muon's steps are scaled to the size of AdamW's (``adjust_lr_fn="match_rms_adamw"``).
    """

    muon_momentum: float = 0.95

    def build(self, model: nn.Module) -> MuonAndAdamW:
        """Both optimizers over the model's parameters."""
        matrices = {id(p) for p in model.blocks.parameters() if p.ndim == 2}
        rest = []
        for group in _decayed_groups(self, model):
            rest.append(group | {"params": [p for p in group["params"] if id(p) not in matrices]})
        muon = torch.optim.Muon(
            [p for p in model.blocks.parameters() if p.ndim == 2],
            lr=self.lr,
            weight_decay=self.weight_decay,
            momentum=self.muon_momentum,
            adjust_lr_fn="match_rms_adamw",
        )
        return MuonAndAdamW(muon, torch.optim.AdamW(rest, lr=self.lr, betas=self.betas))


@dataclass(frozen=True)
class Capped(Optimizer):
    """AdamW whose watched weights are put back under a spectral norm every ``cap_every`` steps.

    Attributes:
        cap: largest singular value of the matrices of the blocks.
        cap_every: optimizer steps between two projections.
    """

    cap: float = 4.0
    cap_every: int = 10

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.cap > 0 or self.cap_every < 1:
            raise ValueError(f"cap={self.cap} must be positive and cap_every={self.cap_every} at least 1")

    def build(self, model: nn.Module) -> torch.optim.Optimizer:
        """The torch optimizer over the model's parameters, with the projection as its step's hook."""
        optimizer = super().build(model)
        matrices = [p for p in model.blocks.parameters() if p.ndim == 2]

        @torch.no_grad()
        def project(optimizer: torch.optim.Optimizer, _args: tuple, _kwargs: dict) -> None:
            # torch counts the steps of each parameter in its state, which a resumed run gets back.
            if int(optimizer.state[matrices[0]]["step"]) % self.cap_every == 0:
                for weight in matrices:
                    cap_spectral_norm_(weight, self.cap)

        optimizer.register_step_post_hook(project)
        return optimizer
