"""Selective Spectral Decay in the Lightning Trainer."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from s2d.regularizer import SelectiveSpectralDecay


class S2DCallback(Callback):
    """Train with Selective Spectral Decay: ``Trainer(..., callbacks=[S2DCallback(lam=5e-4)])``.

    The penalty enters the optimizer's step, that is after gradient accumulation, unscaling and clipping, in automatic
    and in manual optimization. What the decay knows is part of Lightning's checkpoints, and ``fit(ckpt_path=...)``
    continues as if training had never stopped (from the middle of an epoch Lightning itself does so only with a data
    loader that has a state). Its metrics go where ``self.log`` goes, every ``log_every_n_steps``.

    Args:
        settings: the keyword arguments of :class:`s2d.SelectiveSpectralDecay`. Layers are named as in the
            LightningModule (``"net.blocks.*"`` if it holds the network as ``self.net``).

    Attributes:
        decay: the :class:`s2d.SelectiveSpectralDecay` of the current or last training, None before the first.

    Raises:
        ValueError: when training begins, from :class:`s2d.SelectiveSpectralDecay` for bad settings or an unsuitable
            model.

    Example:
        >>> callback = S2DCallback(lam=5e-4, refresh_every=100)
        >>> callback.decay is None
        True

    Paper: none.
    """

    def __init__(self, **settings: Any) -> None:
        self.settings = settings
        self.decay: SelectiveSpectralDecay | None = None
        self._loaded: dict[str, Tensor] = {}

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Forget what an earlier ``validate(ckpt_path=...)`` loaded: this comes before each loading."""
        self._loaded = {}

    def load_state_dict(self, state_dict: dict[str, Tensor]) -> None:
        """Keep the state until there is an optimizer to attach to."""
        self._loaded = state_dict

    def state_dict(self) -> dict[str, Tensor]:
        """The state of the decay, for Lightning's checkpoint."""
        return {} if self.decay is None else self.decay.state_dict()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Attach, once Lightning has made and loaded everything, before the first training batch."""
        self.decay = SelectiveSpectralDecay(pl_module, **self.settings)
        if self._loaded:
            self.decay.load_state_dict(self._loaded)
        self.decay.attach(*trainer.optimizers)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Log the metrics whenever Lightning is about to pass on what was logged (they wait for the device)."""
        if trainer.log_every_n_steps and trainer.global_step % trainer.log_every_n_steps == 0:
            pl_module.log_dict(self.decay.metrics())

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Remove every hook; ``decay`` stays for its report."""
        self.decay.detach()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Remove every hook also from a training that broke off."""
        if self.decay is not None:
            self.decay.detach()
