r"""A cap on the spectral norm: what is above it is cut off, every few steps.

.. math:: W \leftarrow U\, \mathrm{diag}(\min(\sigma_i, c))\, V^\top

Not in the paper. It was put in as a control, and on this repository's networks it does better than any form of spectral
decay (notebook 12).
"""

from __future__ import annotations

from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor

from s2d import distributed
from s2d.attachment import Attached, Attachment, along
from s2d.bound import spectral_norm_bounds
from s2d.checks import check_count, check_number, check_steps, check_tensor
from s2d.layers import LinearMap, Selector, linear_maps

MUCH = 0.05  # part of the cap that no single step is expected to add to a singular value
SAFE = 1 - 1e-5  # a certified norm under this part of the cap is one that no decomposition would put above it


@torch.no_grad()
def cap_spectral_norm_(weight: Tensor, cap: float) -> Tensor:
    """Lower every singular value above ``cap`` to it, in place.

    Args:
        weight: ``(out_features, in_features)``.
        cap: largest singular value allowed, positive.

    Returns:
        ``weight``.

    Raises:
        ValueError: for a weight that is no finite matrix, or a cap that is no positive number.

    Example:
        >>> cap_spectral_norm_(torch.diag(torch.tensor([4.0, 1.0])), 2.0)
        tensor([[2., 0.],
                [0., 1.]])

    Paper: none. Cost: a full singular value decomposition, or :func:`s2d.bound.spectral_norm_bounds` alone where that
    certifies that nothing is above the cap.
    """
    cap = _check_cap(cap)
    check_tensor("weight", weight, "give a finite matrix (out_features, in_features)")
    excess = _excess(weight, cap)
    # Only what is too much is subtracted: a weight under the cap keeps its bits.
    return weight if excess is None else _subtract_(weight, *excess)


def _check_cap(cap: Any) -> float:
    return check_number("cap", cap, lambda value: value > 0, "give a positive number")


def _excess(weight: Tensor, cap: float) -> tuple[Tensor, Tensor] | None:
    """Factors of what a matrix has above the cap, ``(m, k)`` and ``(k, n)``, or None if that is nothing."""
    if weight.ndim != 2 or not torch.isfinite(weight).all():
        raise ValueError(f"weight {tuple(weight.shape)} is no finite matrix: find the step that broke it, lower the lr")
    if weight.numel() == 0 or spectral_norm_bounds(weight).upper < cap * SAFE:
        return None
    wide = weight.to(torch.promote_types(weight.dtype, torch.float32))  # no decomposition in half precision
    u, s, vh = torch.linalg.svd(wide, full_matrices=False)
    over = s > cap
    return u[:, over] * (s[over] - cap), vh[over]


def _subtract_(weight: Tensor, left: Tensor, right: Tensor) -> Tensor:
    if weight.dtype in (torch.float32, torch.float64):
        return weight.sub_((left @ right).to(weight.dtype))
    return weight.copy_(weight.to(left.dtype) - left @ right)  # rounded once


class SpectralNormCap(Attached):
    """Keeps the spectral norm of every watched layer at or under a cap, attached to an optimizer by its step hook.

    It hooks in as :class:`s2d.SelectiveSpectralDecay` does: wrappers are unwrapped, several optimizers may be given,
    one that does not own the weights is refused, wider master copies are projected too, sharded weights (``DTensor``)
    are put together for a projection, and what fails is said in one warning and listed by :meth:`health`.

    Args:
        model: the model in training.
        cap: largest singular value allowed, positive. It has no scale-free default: look at ``svdvals`` of the trained
            weights, and choose it on validation data (2 for notebook 12's networks, whose largest are about 15).
        every: optimizer steps between two projections; in between a weight may exceed the cap a little.
        include, exclude: see :func:`s2d.layers.linear_maps`.
        process_group: the ranks that train this model together: ``"world"``, a group, or None for no exchange.

    Raises:
        ValueError: for a cap or interval out of range, or a model without linear layers.

    Example:
        >>> layer = torch.nn.Linear(8, 8)
        >>> optimizer = torch.optim.AdamW(layer.parameters())
        >>> SpectralNormCap(layer, cap=0.5, every=1).attach(optimizer)
        >>> layer(torch.randn(3, 8)).sum().backward()
        >>> optimizer.step()
        >>> bool(torch.linalg.matrix_norm(layer.weight, 2) < 0.5001)
        True

    Paper: none; the hard form of what S2D does softly. Cost: a full singular value decomposition of each layer that is
    not certified to be under the cap.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        *,
        cap: float,
        every: int = 10,
        include: Selector | None = None,
        exclude: Selector = (),
        process_group: dist.ProcessGroup | Literal["world"] | None = "world",
    ) -> None:
        self.cap, self.steps = _check_cap(cap), 0
        self.every = check_count("every", every, "give a positive number of steps")
        self.layers: dict[str, LinearMap] = linear_maps(model, include=include, exclude=exclude)
        distributed.resolve_group(process_group)
        self.process_group = process_group
        self._model = model
        self._attachment = self._new_attachment()

    def __repr__(self) -> str:
        """The settings and the watched layers."""
        return f"SpectralNormCap(cap={self.cap!r}, every={self.every}, layers={list(self.layers)})"

    def attach(self, *optimizers: torch.optim.Optimizer) -> None:
        """Hook into the step of the optimizer; from here on training needs no further call.

        Args:
            optimizers: usually one; of several, each projects its own layers, and the first one's steps are counted.

        Raises:
            ValueError: if the optimizers do not own every watched weight that is trained, or this is attached already.
        """
        self._attachment.attach(optimizers, distributed.resolve_group(self.process_group))

    def detach(self) -> None:
        """Remove the hooks."""
        self._attachment.detach()

    def _new_attachment(self) -> Attachment:
        return Attachment(type(self).__name__, self._model, self.layers, after=self._after_step, occasional=True)

    def __copy__(self) -> SpectralNormCap:
        raise ValueError("copy.copy() would act twice on the same weights: use copy.deepcopy((model, optimizer, cap))")

    def _after_step(self, optimizer: torch.optim.Optimizer) -> None:
        leads = optimizer is self._attachment.optimizers[0]
        self.steps += leads
        if self.steps and self.steps % self.every == 0:
            if leads:
                self._attachment.refresh()
            self._project([n for n, s in self._attachment.standings.items() if s.optimizer is optimizer])

    @torch.no_grad()
    def project(self) -> None:
        """Put every layer that is trained under the cap now; collective where weights are sharded."""
        self._project(list(self.layers))

    @torch.no_grad()
    def _project(self, names: list[str]) -> None:
        for name in names:
            linear = self.layers[name]
            if linear.weight.requires_grad and self._attachment.can_act(name):
                self._project_layer(name, linear)
                self._attachment.note(name)

    def _project_layer(self, name: str, linear: LinearMap) -> None:
        master = self._attachment.master_of(name)
        weight = distributed.local(linear.weight.detach())
        if master is not None and not distributed.is_dtensor(linear.weight):
            block = distributed.local_block(linear)
            part = cap_spectral_norm_(block.view(master), self.cap)
            block.store(master, part)
            weight.copy_(master)
            return
        excess = _excess(linear.matrix(distributed.whole(linear.weight).contiguous()), self.cap)
        block = distributed.local_block(linear)
        if excess is not None and not block.empty:
            left, right = excess
            part = _subtract_(block.view(weight), left[block.rows], right[:, block.columns])
            block.store(weight, part)
            self._expect(name, block, weight, left[block.rows], right[:, block.columns])

    def _expect(self, name: str, block: distributed.Block, weight: Tensor, left: Tensor, right: Tensor) -> None:
        """The next step should not bring back what was cut off (growth brings back less, where it was much)."""
        size = torch.linalg.vector_norm(left[:, :1]) if left.numel() else 0.0
        if not self._attachment.is_early(name) or size <= MUCH * self.cap:
            return
        u, v = left[:, 0] / size, right[0]
        now = along(block.view(weight), u, v)
        self._attachment.expect_change(name, now + float(size), now, lambda: along(block.view(weight), u, v))

    def health(self) -> list[dict[str, Any]]:
        """Whether each layer is projected, and why not; the columns are those of ``SelectiveSpectralDecay.health``.

        Example:
            >>> SpectralNormCap(torch.nn.Linear(2, 2), cap=1.0).health()[0]["repair"]
            'call attach(optimizer)'
        """
        return self._attachment.health(lambda name: (f"no projection yet, one is due every {self.every} steps", ""))

    def summary(self) -> str:
        """How many layers are projected, as one line."""
        return f"cap {self.cap:g} step {self.steps}: {self._attachment.acting()} of {len(self.layers)} layers act"

    def state_dict(self) -> dict[str, Tensor]:
        """What a resumed run needs: how many steps were done."""
        return {"steps": torch.tensor(self.steps)}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Continue where :meth:`state_dict` was taken.

        Raises:
            ValueError: for a state of anything else.
        """
        self.steps = check_steps(state.get("steps") if isinstance(state, dict) else None)
