r"""A cap on the spectral norm: what is above it is cut off, every few steps.

.. math:: W \leftarrow U\, \mathrm{diag}(\min(\sigma_i, c))\, V^\top

Not in the paper. It was put in as a control, and on this repository's networks it does better than any form of spectral
decay (notebook 07).
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from s2d.distributed import is_dtensor
from s2d.layers import LinearMap, Selector, linear_maps


@torch.no_grad()
def cap_spectral_norm_(weight: Tensor, cap: float) -> Tensor:
    """Lower every singular value above ``cap`` to it, in place.

    Args:
        weight: ``(out_features, in_features)``.
        cap: largest singular value allowed, positive.

    Returns:
        ``weight``.

    Raises:
        ValueError: for a weight that is no finite matrix.

    Example:
        >>> cap_spectral_norm_(torch.diag(torch.tensor([4.0, 1.0])), 2.0)
        tensor([[2., 0.],
                [0., 1.]])

    Paper: none. Cost: a full singular value decomposition.
    """
    if weight.ndim != 2 or not torch.isfinite(weight).all():
        raise ValueError(f"weight {tuple(weight.shape)} is no finite matrix: find the step that broke it, lower the lr")
    wide = weight.to(torch.promote_types(weight.dtype, torch.float32))  # no decomposition in half precision
    u, s, vh = torch.linalg.svd(wide, full_matrices=False)
    over = s > cap
    # Only what is too much is subtracted: a weight under the cap keeps its bits.
    return weight.sub_(((u[:, over] * (s[over] - cap)) @ vh[over]).to(weight.dtype))


class SpectralNormCap:
    """Keeps the spectral norm of every watched layer at or under a cap, attached to an optimizer by its step hook.

    Args:
        model: the model in training; weights that are sharded (``DTensor``) are refused.
        cap: largest singular value allowed, positive. It has no scale-free default: look at ``svdvals`` of the trained
            weights, and choose it on validation data (2 for notebook 07's networks, whose largest are about 15).
        every: optimizer steps between two projections; in between a weight may exceed the cap a little.
        include, exclude: see :func:`s2d.layers.linear_maps`.

    Raises:
        ValueError: for a cap or interval out of range, a model without linear layers, or sharded weights.

    Example:
        >>> layer = torch.nn.Linear(8, 8)
        >>> optimizer = torch.optim.AdamW(layer.parameters())
        >>> SpectralNormCap(layer, cap=0.5, every=1).attach(optimizer)
        >>> layer(torch.randn(3, 8)).sum().backward()
        >>> optimizer.step()
        >>> bool(torch.linalg.matrix_norm(layer.weight, 2) < 0.5001)
        True

    Paper: none; the hard form of what S2D does softly. Cost: a full singular value decomposition a layer each time.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        *,
        cap: float,
        every: int = 10,
        include: Selector | None = None,
        exclude: Selector = (),
    ) -> None:
        if isinstance(cap, bool) or not isinstance(cap, (int, float)) or not (math.isfinite(cap) and cap > 0):
            raise ValueError(f"cap is {cap!r}: give a positive number")
        if isinstance(every, bool) or not isinstance(every, int) or every < 1:
            raise ValueError(f"every is {every!r}: give a positive number of steps")
        self.cap, self.every, self.steps = float(cap), every, 0
        self.layers: dict[str, LinearMap] = linear_maps(model, include=include, exclude=exclude)
        sharded = [name for name, linear in self.layers.items() if is_dtensor(linear.weight)]
        if sharded:
            raise ValueError(f"layer {sharded[0]} is sharded: the cap needs whole weights, use SelectiveSpectralDecay")
        self._handle: Any = None

    def attach(self, optimizer: torch.optim.Optimizer) -> None:
        """Hook into the step of the optimizer; from here on training needs no further call.

        Raises:
            ValueError: if this is attached already.
        """
        if self._handle is not None:
            raise ValueError("already attached: call detach() first")
        self._handle = optimizer.register_step_post_hook(self._after_step)

    def detach(self) -> None:
        """Remove the hook."""
        if self._handle is not None:
            self._handle.remove()
            self._handle = None

    def _after_step(self, _optimizer: torch.optim.Optimizer, _args: tuple, _kwargs: dict) -> None:
        self.steps += 1
        if self.steps % self.every == 0:
            self.project()

    def project(self) -> None:
        """Put every layer that is trained under the cap now."""
        for linear in self.layers.values():
            if linear.weight.requires_grad:
                cap_spectral_norm_(linear.matrix(linear.weight.detach()), self.cap)

    def state_dict(self) -> dict[str, Tensor]:
        """What a resumed run needs: how many steps were done."""
        return {"steps": torch.tensor(self.steps)}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Continue where :meth:`state_dict` was taken."""
        self.steps = int(state["steps"])
