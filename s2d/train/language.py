"""Supervised fine-tuning of a language model with the Hugging Face Trainer, with S2D by its callback or without."""

from __future__ import annotations

import argparse
import csv
import json
import math
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import nn

from s2d.bound import spectral_norm_bounds
from s2d.console import say
from s2d.distributed import is_dtensor, whole
from s2d.files import write_folder_atomically, write_text
from s2d.layers import linear_maps
from s2d.models.loading import load_model, model_source
from s2d.models.saving import save_checkpoint
from s2d.models.subject import Subject
from s2d.packages import need
from s2d.ptq.command.images import read_image
from s2d.train.conversations import IGNORED, Conversation, encode, read_conversations
from s2d.train.folder import KEPT, RunFolder, versions
from s2d.train.order import EpochOrder
from s2d.train.processes import check_precision, share_of, start
from s2d.train.settings import LanguageSettings, free_names

WHOLE = "whole.json"  # written into a checkpoint of the Trainer when all else of it is


def train_language(
    model: str,
    data: str,
    output: Path,
    *,
    val: str | None = None,
    settings: LanguageSettings | None = None,
    resume: str = "auto",
    cpu: bool = False,
) -> dict[str, Any]:
    """Fine-tune on the answers of conversations, and leave an ordinary checkpoint in ``output/model``.

    Started again with the same arguments it goes on from its last checkpoint.

    Args:
        model: see :func:`s2d.models.load`; a causal language model with its tokenizer.
        data: conversations, see :func:`s2d.train.conversations.read_conversations`.
        output: folder of the run.
        val: conversations that each epoch is measured on. Nothing is chosen by them.
        settings: by default :class:`s2d.train.settings.LanguageSettings`.
        resume: ``"auto"`` or ``"never"``.
        cpu: whether accelerators are left alone.

    Returns:
        What ``done.json`` says: the last row of the history, and what was trained how long.

    Raises:
        ValueError: for bad input, before anything is written; for a folder with a run of other settings.
        ImportError: without transformers or accelerate.

    Paper: appendix F.
    """
    transformers = need("transformers", "s2d train language")
    settings = settings or LanguageSettings()
    processes = start(settings, cpu=cpu)
    check_precision(settings, processes.device)
    if settings.sharding == "fsdp2" and processes.device.type == "cpu":
        raise ValueError("sharding=fsdp2 of a language model needs an accelerator, as the Trainer has none on a CPU")
    micro, accumulation = share_of(settings, processes.num_processes)
    args = argparse.Namespace(model=model, arch=None, model_options={}, pretrained=False, sequence_length=1)
    source = model_source(args)
    if val == data:
        raise ValueError(f"--val is --data, {data}: give other conversations, or leave --val out")
    rows = read_conversations(data, "--data")
    val_rows = read_conversations(val, "--val") if val else []
    _check_count(len(rows), data, settings)
    folder = RunFolder(output)
    described = {
        "kind": "language",
        "model": {"model": model},
        "data": {"train": data, "items": len(rows), "val": val},
        "settings": asdict(settings),
        "versions": versions(),
        "device": str(processes.device),
        "processes": processes.num_processes,
    }
    folder.check(described, resume=resume, free=free_names(LanguageSettings))
    processes.wait_for_everyone()
    if (done := folder.done()) is not None:
        if processes.is_main_process:
            say(f"{output} is done")
        return done
    transformers.set_seed(settings.seed)
    subject = load_model(args, source)
    subject.model.float()  # what is loaded in half precision would swallow the steps
    texts = _Texts(transformers, subject, settings.max_length)
    train_set = texts.encoded(rows, "--data")
    val_set = texts.encoded(val_rows, "--val") if val else None
    steps_per_epoch = _check_count(len(train_set), data, settings)
    if processes.is_main_process:
        folder.begin(described)
        _drop_broken(folder.checkpoints)
    processes.wait_for_everyone()
    history = _History(folder, subject.model, steps_per_epoch)
    callbacks: list[Any] = [history.callback(transformers), _marker(transformers)]
    if settings.decay == "s2d":
        from s2d.integrations.transformers import S2DCallback

        callbacks.insert(0, S2DCallback(**settings.s2d()))
    trainer = _trainer_class(transformers, settings)(
        model=subject.model,
        args=_arguments(transformers, settings, folder, micro, accumulation, steps_per_epoch, cpu, bool(val)),
        train_dataset=train_set,
        eval_dataset=val_set,
        data_collator=texts.batch,
        callbacks=callbacks,
    )
    trainer.remove_callback(transformers.PrinterCallback)
    trainer.train(resume_from_checkpoint=_newest(folder.checkpoints))
    return _finish(processes, trainer, folder, subject, settings, history, len(rows))


def _check_count(count: int, data: str, settings: LanguageSettings) -> int:
    """Steps an epoch; ValueError for none."""
    if count < settings.batch_size:
        raise ValueError(
            f"--data {data} has {count} conversations, batch_size is {settings.batch_size}: give more, or a smaller "
            "batch"
        )
    return count // settings.batch_size


def _trainer_class(transformers: Any, settings: LanguageSettings) -> type:
    """The Trainer, with whole batches in an order that depends on seed and epoch only."""

    class Ordered(transformers.Trainer):
        def _get_train_sampler(self, train_dataset: Any = None) -> EpochOrder:
            return EpochOrder(len(self.train_dataset), settings.batch_size, settings.seed)

    return Ordered


class _Texts:
    """Conversations as what a model takes, with pictures where it sees."""

    def __init__(self, transformers: Any, subject: Subject, max_length: int) -> None:
        self.max_length, self.tokenizer = max_length, subject.tokenizer()
        self.tokenizer.pad_token = self.tokenizer.pad_token or self.tokenizer.eos_token
        self.pad = transformers.DataCollatorForSeq2Seq(self.tokenizer, label_pad_token_id=IGNORED)
        self.processor = None
        if hasattr(subject.model.config, "vision_config"):
            self.processor = transformers.AutoProcessor.from_pretrained(subject.folder, local_files_only=True)

    def encoded(self, rows: Sequence[Conversation], option: str) -> list[dict[str, Any]]:
        """Those with an answer, and a whole picture, within ``max_length``."""
        if self.processor is None and any(row.image is not None for row in rows):
            raise ValueError(f"{option} has pictures, and the model sees none: give a vision-language model")
        found = [self.encoded_one(row) for row in rows]
        kept = [row for row in found if row is not None]
        if not kept:
            raise ValueError(f"{option}: no conversation has an answer within max_length {self.max_length}: give more")
        if len(kept) < len(found):
            left = len(found) - len(kept)
            say(f"note: {option}: {left} conversations have no answer within max_length {self.max_length}: left out")
        return kept

    def encoded_one(self, row: Conversation) -> dict[str, Any] | None:
        if row.image is None:
            found = encode(self.tokenizer, row, self.max_length)
            whole_picture = True
        else:
            token = self.processor.image_token
            number = self.tokenizer.convert_tokens_to_ids(token)
            shown = self.processor(images=[_picture(row.image)], text=[token])["input_ids"][0]
            size = list(shown).count(number)
            writer = self.processor if self.processor.chat_template else self.tokenizer
            found = encode(writer, row, self.max_length, image_token=token, image_size=size)
            whole_picture = found["input_ids"].count(number) == size
        answered = any(label != IGNORED for label in found["labels"])
        return found | {"image": row.image} if answered and whole_picture else None

    def batch(self, rows: Sequence[Mapping[str, Any]]) -> Any:
        """What the model is called with: tokens filled up on the right, and pixels of the pictures."""
        found = self.pad([{name: row[name] for name in ("input_ids", "labels")} for row in rows])
        pictures = [_picture(row["image"]) for row in rows if row["image"] is not None]
        if pictures:
            found["pixel_values"] = self.processor.image_processor(pictures, return_tensors="pt")["pixel_values"]
        return found


def _picture(image: Any) -> Any:
    return read_image(image, "RGB") if isinstance(image, Path) else image.convert("RGB")


def _arguments(
    transformers: Any,
    settings: LanguageSettings,
    folder: RunFolder,
    micro: int,
    accumulation: int,
    steps_per_epoch: int,
    cpu: bool,
    validated: bool,
) -> Any:
    # A log window that ends at each checkpoint, so that a resumed run reports the same losses.
    window = math.gcd(min(settings.log_every, steps_per_epoch), settings.checkpoint_every)
    more: dict[str, Any] = {"gradient_checkpointing": True} if settings.gradient_checkpointing else {}
    if settings.sharding == "fsdp2":
        more |= {"fsdp": "full_shard auto_wrap", "fsdp_config": {"fsdp_version": 2}}
    return transformers.TrainingArguments(
        output_dir=str(folder.checkpoints),
        num_train_epochs=settings.epochs,
        per_device_train_batch_size=micro,
        per_device_eval_batch_size=micro,
        gradient_accumulation_steps=accumulation,
        learning_rate=settings.lr,
        lr_scheduler_type="cosine_with_min_lr",
        lr_scheduler_kwargs={"min_lr": settings.min_lr},
        warmup_steps=round(settings.warmup_epochs * steps_per_epoch),
        weight_decay=settings.weight_decay,
        adam_beta1=settings.beta1,
        adam_beta2=settings.beta2,
        max_grad_norm=settings.clip_grad or 0.0,
        bf16=settings.precision == "bf16",
        torch_compile=settings.compile,
        seed=settings.seed,
        data_seed=settings.seed,
        dataloader_drop_last=True,
        dataloader_num_workers=settings.workers,
        remove_unused_columns=False,
        logging_steps=window,
        logging_nan_inf_filter=False,
        save_steps=settings.checkpoint_every,
        save_total_limit=KEPT,
        eval_strategy="epoch" if validated else "no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=cpu,
        **more,
    )


# --- checkpoints of the Trainer, which writes them file by file -------------------------------------------------------


def _marker(transformers: Any) -> Any:
    """A callback, the last, that marks a checkpoint as whole."""

    class Marker(transformers.TrainerCallback):
        def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if args.should_save:
                write_text(Path(args.output_dir, f"checkpoint-{state.global_step}", WHOLE), "{}\n")

    return Marker()


def _checkpoints(folder: Path) -> list[Path]:
    """The newest first."""
    found = [path for path in folder.glob("checkpoint-*") if path.is_dir()]
    return sorted(found, key=lambda path: int(path.name.rpartition("-")[2]), reverse=True)


def _drop_broken(folder: Path) -> None:
    """Remove what an interruption left half-written, or half-removed: all but the newest two that are whole."""
    kept = [path for path in _checkpoints(folder) if (path / WHOLE).exists()][:KEPT]
    for path in _checkpoints(folder):
        if path not in kept:
            shutil.rmtree(path)


def _newest(folder: Path) -> str | None:
    return next((str(path) for path in _checkpoints(folder) if (path / WHOLE).exists()), None)


# --- history ----------------------------------------------------------------------------------------------------------


class _History:
    """``history.csv``, a row an epoch, also over interruptions."""

    def __init__(self, folder: RunFolder, model: nn.Module, steps_per_epoch: int) -> None:
        self.folder, self.model, self.steps_per_epoch = folder, model, steps_per_epoch
        self.rows: list[dict[str, Any]] = []
        self.began, self.seconds = time.perf_counter(), 0.0

    def recover(self, step: int) -> None:
        """The rows of the epochs that are done at a step."""
        file = self.folder.path / "history.csv"
        if step and file.exists():
            with file.open(encoding="utf-8", newline="") as lines:
                rows = [{n: float(v) if v else None for n, v in row.items()} for row in csv.DictReader(lines)]
            self.rows = [row | {n: int(row[n]) for n in ("epoch", "step")} for row in rows if row["step"] <= step]
            self.seconds = self.rows[-1]["seconds"] if self.rows else 0.0

    def add(self, state: Any, rate: float) -> None:
        """A row for the epoch that ends at this step; collective with sharded weights."""
        step = state.global_step
        before = self.rows[-1]["step"] if self.rows else 0
        logs = [entry for entry in state.log_history if "loss" in entry and before < entry["step"] <= step]
        bounds = [
            spectral_norm_bounds(linear.matrix(whole(linear.weight)).float())
            for linear in linear_maps(self.model).values()
        ]
        row = {"epoch": len(self.rows) + 1, "step": step, "lr": rate}
        row["train_loss"] = sum(entry["loss"] for entry in logs) / len(logs) if logs else None
        row |= {"val_loss": None, "sigma_1": max(upper for _, upper in bounds)}
        if logs and "s2d/layers" in logs[-1]:
            row |= {"s2d_layers": logs[-1]["s2d/layers"], "s2d_components": logs[-1]["s2d/components"]}
        row["seconds"] = round(self.seconds + time.perf_counter() - self.began, 3)
        self.rows.append(row)

    def callback(self, transformers: Any) -> Any:
        history = self

        class Callback(transformers.TrainerCallback):
            def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
                history.recover(state.global_step)

            def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
                if state.is_world_process_zero and "loss" in (logs or {}):
                    if not math.isfinite(logs["loss"]):
                        raise RuntimeError(
                            f"the loss is {logs['loss']} at step {state.global_step}: lower lr or lam, or check the "
                            "data"
                        )
                    say(f"step {state.global_step}  loss {logs['loss']:.4f}  lr {logs['learning_rate']:.3g}")

            def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
                if state.global_step > (history.rows[-1]["step"] if history.rows else 0):
                    history.add(state, kwargs["optimizer"].param_groups[0]["lr"])
                    self.write(state)

            def on_evaluate(self, args: Any, state: Any, control: Any, metrics: Any = None, **kwargs: Any) -> None:
                history.rows[-1]["val_loss"] = metrics["eval_loss"]
                self.write(state)

            def write(self, state: Any) -> None:
                if state.is_world_process_zero:
                    history.folder.write_history(history.rows)

        return Callback()


def _finish(
    processes: Any,
    trainer: Any,
    folder: RunFolder,
    subject: Subject,
    settings: LanguageSettings,
    history: _History,
    count: int,
) -> dict[str, Any]:
    """``model`` and ``done.json``."""
    result = {"epochs": settings.epochs, "steps": trainer.state.global_step, "conversations": count}
    result |= history.rows[-1]
    net = trainer.accelerator.unwrap_model(trainer.model)
    state = None
    if any(is_dtensor(parameter) for parameter in net.parameters()):
        state = {name: whole(tensor).cpu() for name, tensor in net.state_dict().items()}
    if processes.is_main_process:
        net.config.use_cache = json.loads((subject.folder / "config.json").read_text()).get("use_cache", True)

        def fill(new: Path) -> None:
            subject.model = net
            save_checkpoint(subject, new, state)

        write_folder_atomically(folder.model, fill, overwrite=True)
        folder.finish(result)
    processes.wait_for_everyone()
    return result
