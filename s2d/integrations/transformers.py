"""Selective Spectral Decay in the Hugging Face Trainer."""

from __future__ import annotations

import uuid
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from s2d.files import write_atomically
from s2d.regularizer import SelectiveSpectralDecay

STATE_FILE = "s2d.safetensors"


class S2DCallback(TrainerCallback):
    """Train with Selective Spectral Decay: ``Trainer(..., callbacks=[S2DCallback(lam=5e-4)])``.

    The penalty enters the optimizer's step, that is after gradient accumulation, unscaling and clipping.

    What the decay knows is kept as ``s2d.safetensors`` in each ``checkpoint-N``, and ``resume_from_checkpoint``
    continues as if training had never stopped. (Where the Trainer warns of missing keys when resuming, as for ViT in
    transformers 5.23, it has lost weights itself: https://github.com/huggingface/transformers/issues/43701.)

    Metrics join each training log: the console, ``state.log_history`` and the callbacks after this one. The Trainer
    calls the loggers of ``report_to`` before the callbacks passed to it, so to have the metrics in such a logger, pass
    it yourself, after this: ``TrainingArguments(report_to="none")``, ``callbacks=[S2DCallback(), WandbCallback()]``.

    Args:
        settings: the keyword arguments of :class:`s2d.SelectiveSpectralDecay`.

    Attributes:
        decay: the :class:`s2d.SelectiveSpectralDecay` of the current or last training, None before the first.

    Raises:
        ValueError: when training begins, from :class:`s2d.SelectiveSpectralDecay` for bad settings or an unsuitable
            model, or if the checkpoint to resume from was made with S2D but its state is not found.

    Example:
        >>> callback = S2DCallback(lam=5e-4, refresh_every=100)
        >>> callback.decay is None
        True

    Paper: none.
    """

    def __init__(self, **settings: Any) -> None:
        self.settings = settings
        self.decay: SelectiveSpectralDecay | None = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Attach, once the Trainer has made (and, when resuming, loaded) the optimizer."""
        if self.decay is not None:  # an earlier training that broke off never reached on_train_end
            self.decay.detach()
        self.decay = SelectiveSpectralDecay(kwargs["model"], **self.settings)
        earlier = state.stateful_callbacks.get("s2d") if state.global_step else None
        if earlier is not None:
            self.decay.load_state_dict(_find_state(args, state, earlier))
        self.decay.attach(kwargs["optimizer"])
        # Callbacks are not told which checkpoint the Trainer resumes from, only given the trainer_state.json in it.
        # A name of this run, in there and in our file, tells which of the files we may find belongs to it.
        state.stateful_callbacks["s2d"] = {"run": uuid.uuid4().hex, "output_dir": args.output_dir}

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Write the decay's state into the checkpoint, whole or not at all."""
        tensors = {name: tensor.contiguous() for name, tensor in self.decay.state_dict().items()}
        if not args.should_save or state.is_hyper_param_search:  # a trial of a search is never resumed
            return
        path = _checkpoint(args.output_dir, state) / STATE_FILE
        metadata = {"run": state.stateful_callbacks["s2d"]["run"]}
        write_atomically(path, lambda temporary: save_file(tensors, temporary, metadata=metadata))

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        """Add the decay's metrics to a log of training (evaluation and the closing summary log without a loss)."""
        if self.decay is not None and "loss" in (logs or {}):
            metrics = self.decay.metrics()
            logs.update(metrics)
            state.log_history[-1].update(metrics)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Remove every hook; ``decay`` stays for its report."""
        self.decay.detach()


def _checkpoint(output_dir: str, state: TrainerState) -> Path:
    return Path(output_dir, f"checkpoint-{state.global_step}")


def _find_state(args: TrainingArguments, state: TrainerState, earlier: dict[str, str]) -> dict[str, Tensor]:
    """The state of the run that wrote this ``trainer_state.json``, from the places where its checkpoint may lie."""
    folders = [_checkpoint(args.output_dir, state), _checkpoint(earlier["output_dir"], state)]
    if isinstance(args.resume_from_checkpoint, str):
        folders.insert(0, Path(args.resume_from_checkpoint))
    for path in (folder / STATE_FILE for folder in folders):
        if path.is_file():
            with safe_open(path, framework="pt") as file:
                if (file.metadata() or {}).get("run") == earlier["run"]:
                    return {name: file.get_tensor(name) for name in file.keys()}
    raise ValueError(
        f"the checkpoint was made with S2D, but its {STATE_FILE} is in none of {', '.join(map(str, folders))}: if the "
        "checkpoint lies elsewhere, name its folder in TrainingArguments(resume_from_checkpoint=...) too; if the file "
        "is missing in it, saving was cut short: resume from an earlier checkpoint"
    )
