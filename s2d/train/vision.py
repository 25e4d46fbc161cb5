"""Fine-tuning an image classifier, with or without S2D, on one process or many: exact to the bit when resumed on a CPU.

The loop is the usual one of accelerate. What makes it resumable in the middle of an epoch is that nothing random is
carried along: the order of an epoch, the augmentation of an image and the mixing and dropout of a step are each seeded
by the run's seed and their own numbers.
"""

from __future__ import annotations

import argparse
import copy
import math
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from s2d.bound import spectral_norm_bounds
from s2d.console import say
from s2d.distributed import whole
from s2d.files import write_folder_atomically
from s2d.layers import linear_maps
from s2d.models.loading import data_config, load_model, model_source
from s2d.models.saving import save_checkpoint
from s2d.packages import need
from s2d.ptq.checkpoint import save_quantized
from s2d.ptq.qat import begin_qat, finish_qat
from s2d.regularizer import SelectiveSpectralDecay
from s2d.train.folder import RunFolder, versions
from s2d.train.images import Pictures, batches_of, open_images
from s2d.train.order import chunks_of_epoch, epoch_order, seed_everything, seed_from, shares
from s2d.train.processes import check_precision, share_of, start
from s2d.train.settings import VisionSettings, free_names
from s2d.train.state import gather, restore

SOURCES = ("timm", "timm folder", "file", "onnx")


def train_vision(
    model: str,
    data: str,
    output: Path,
    *,
    val: str | None = None,
    settings: VisionSettings | None = None,
    resume: str = "auto",
    arch: str | None = None,
    model_options: Mapping[str, Any] | None = None,
    pretrained: bool = False,
    cpu: bool = False,
) -> dict[str, Any]:
    """Fine-tune, and leave an ordinary checkpoint in ``output/model``.

    Started again with the same arguments, also on another number of processes, it goes on from its last checkpoint.

    Args:
        model, arch, model_options, pretrained: see :func:`s2d.models.load`; a model of timm.
        data: labelled images, see :func:`s2d.train.images.open_images`.
        output: folder of the run.
        val: labelled images that each epoch is measured on, of the same classes. Nothing is chosen by them.
        settings: by default :class:`s2d.train.settings.VisionSettings`.
        resume: ``"auto"`` or ``"never"``.
        cpu: whether accelerators are left alone.

    Returns:
        What ``done.json`` says: the last row of the history, and what was trained how long.

    Raises:
        ValueError: for bad input, before anything is written; for a folder with a run of other settings.
        RuntimeError: for a loss that is not finite.
        ImportError: without timm or accelerate.

    Paper: fine-tuning of the main text (second-hand).
    """
    settings = settings or VisionSettings()
    processes = start(settings, cpu=cpu)
    check_precision(settings, processes.device)
    chunk, accumulation = share_of(settings, processes.num_processes)
    # Autocast is ours: a process can have one mixed precision of accelerate only.
    accelerator = need("accelerate", "training").Accelerator(cpu=cpu, mixed_precision="no")
    accelerator.gradient_accumulation_steps = accumulation
    run = _Vision(accelerator, RunFolder(output), settings, chunk)
    run.prepare(
        argparse.Namespace(model=model, arch=arch, model_options=dict(model_options or {}), pretrained=pretrained),
        data,
        val,
        resume,
    )
    return run.to_the_end()


class _Vision:
    """A run on its way."""

    def __init__(self, accelerator: Any, folder: RunFolder, settings: VisionSettings, chunk: int) -> None:
        self.accelerator, self.folder, self.settings, self.chunk = accelerator, folder, settings, chunk
        self.epoch = self.step = 0  # the step is counted over all epochs
        self.history: list[dict[str, Any]] = []
        self.seconds = 0.0  # of the runs before this one
        self.began = time.perf_counter()
        self.loss = torch.zeros((), device=accelerator.device)  # summed over the chunks of this process in this epoch
        self.ema: Any = None
        self.decay: SelectiveSpectralDecay | None = None

    # --- before the first step

    def prepare(self, args: argparse.Namespace, data: str, val: str | None, resume: str) -> None:
        """Check everything, load everything, and go to where the last checkpoint stands."""
        timm, settings = need("timm", "s2d train vision"), self.settings
        asked = dict(vars(args))
        args.sequence_length = 1
        source = model_source(args)
        if source not in SOURCES:
            raise ValueError(
                f"MODEL {asked['model']} is none of timm's: s2d train vision takes a preset, a name or a folder of "
                "timm, or a .safetensors file with --arch"
            )
        self.images = open_images(data, "--data")
        classes = self._classes()
        if val == data:
            raise ValueError(f"--val is --data, {data}: give other images, or leave --val out")
        self.val = None if val is None else open_images(val, "--val", self.images.classes)
        if self.val is not None and max(self.val.labels) >= classes:
            raise ValueError(f"--val {val} has the label {max(self.val.labels)}, there are {classes} classes")
        self.steps_per_epoch = len(self.images) // settings.batch_size
        if self.steps_per_epoch == 0:
            raise ValueError(
                f"--data {data} has {len(self.images)} images, batch_size is {settings.batch_size}: give more images, "
                "or a smaller batch"
            )
        described = {
            "kind": "vision",
            "model": asked,
            "data": {"train": data, "items": len(self.images), "classes": classes, "val": val},
            "settings": asdict(settings),
            "versions": versions(),
            "device": str(self.accelerator.device),
            "processes": self.accelerator.num_processes,
        }
        self.folder.check(described, resume=resume, free=free_names(VisionSettings))
        self.accelerator.wait_for_everyone()
        self.finished = self.folder.done()
        if self.finished is not None:
            return
        if source in ("timm", "file"):
            more = {"drop_path_rate": settings.drop_path} if settings.drop_path else {}
            args.model_options = args.model_options | more
        seed_everything(seed_from(settings.seed, "head"))
        self.subject = load_model(args, source)
        self._fit_to_data(timm, classes)
        self._prepare_pictures(timm)
        if self.accelerator.is_main_process:
            self.folder.begin(described)
        self.plain = copy.deepcopy(self.subject.model)  # what is saved in the end: before rounding and sharding
        self._build(timm, classes)
        self._resume()

    def _classes(self) -> int:
        found = len(self.images.classes) or max(self.images.labels) + 1
        asked = self.settings.classes or found
        if max(self.images.labels) >= asked:
            raise ValueError(f"classes is {asked}, and the data has the label {max(self.images.labels)}: give more")
        if len(set(self.images.labels)) < 2:
            raise ValueError(f"--data {self.images.source} has images of one class: give at least two")
        return asked

    def _fit_to_data(self, timm: Any, classes: int) -> None:
        """A head for the classes of the data, and the image size asked for."""
        model, settings = self.subject.model, self.settings
        size = tuple(self.subject.shape[1:])
        if settings.image_size is not None and size != (settings.image_size,) * 2:
            patch = getattr(getattr(model, "patch_embed", None), "patch_size", (1, 1))[0]
            if not hasattr(model, "set_input_size") or settings.image_size % patch:
                raise ValueError(
                    f"image_size is {settings.image_size}, and {self.subject.name} is for {size[0]}, in patches of "
                    f"{patch}: give a multiple of {patch}, or leave it out"
                )
            size = (settings.image_size,) * 2
            model.set_input_size(img_size=size)
        self.subject.shape = (self.subject.shape[0], *size)
        if getattr(model, "num_classes", None) != classes or self._other_labels():
            model.reset_classifier(classes)
        self.subject.label_ids = {name: label for label, name in enumerate(self.images.classes)}

    def _prepare_pictures(self, timm: Any) -> None:
        """The images as the model takes them, augmented for training and as they are for all else."""
        settings, channels = self.settings, self.subject.shape[0]
        config = data_config(timm, self.subject.model, {"in_chans": channels}) | {"input_size": self.subject.shape}
        mode = "L" if channels == 1 else "RGB"
        quiet = timm.data.create_transform(**config, is_training=False)
        self.quiet = lambda images: Pictures(images, quiet, mode)
        try:
            augmented = timm.data.create_transform(
                **{name: value for name, value in config.items() if name not in ("crop_pct", "crop_mode")},
                is_training=True,
                scale=(settings.crop_min, 1.0),
                hflip=settings.flip,
                color_jitter=settings.color_jitter or None,
                auto_augment=settings.auto_augment,
                re_prob=settings.random_erasing,
            )
        except (AssertionError, ValueError, KeyError, IndexError) as error:  # of timm's parser
            raise ValueError(f"auto_augment is {settings.auto_augment!r}, which timm does not know ({error})") from None
        self.pictures = Pictures(self.images, augmented, mode, settings.seed)

    def _other_labels(self) -> bool:
        """Whether the head is known to be for other classes, or the same in another order."""
        names = sorted(self.subject.label_ids, key=self.subject.label_ids.get)
        return bool(names and self.images.classes) and names != self.images.classes

    def _build(self, timm: Any, classes: int) -> None:
        """Model, optimizer, schedule, data: everything that a step needs."""
        settings, accelerator = self.settings, self.accelerator
        need("timm.optim", "training"), need("timm.scheduler", "training")
        if settings.qat_w_bits is not None:
            self.subject.model = begin_qat(
                self.subject.model.eval(),
                w_bits=settings.qat_w_bits,
                a_bits=settings.qat_a_bits,
                calibration=self._calibration(),
            )
        self.net = self.subject.model.to(accelerator.device).train()  # never wrapped itself
        if settings.sharding == "fsdp2":
            _shard(self.net, accelerator.device)
        optimizer = timm.optim.create_optimizer_v2(
            self.net,
            settings.optimizer,
            lr=settings.lr,
            weight_decay=settings.weight_decay,
            layer_decay=settings.layer_decay,
            **({"betas": (settings.beta1, settings.beta2)} if settings.optimizer == "adamw" else {}),
        )
        if settings.sharding == "fsdp2":
            self.model, self.optimizer = self.net, accelerator.prepare(optimizer)
        else:
            self.model, self.optimizer = accelerator.prepare(self.net, optimizer)
        if settings.compile:
            self.model = torch.compile(self.model)
        warmup = round(settings.warmup_epochs * self.steps_per_epoch)
        self.schedule = timm.scheduler.CosineLRScheduler(
            optimizer,
            t_initial=settings.epochs * self.steps_per_epoch,
            lr_min=settings.min_lr,
            warmup_t=warmup,
            warmup_lr_init=settings.lr / max(warmup, 1),
            t_in_epochs=False,
        )
        if settings.ema_decay is not None:
            self.ema = timm.utils.ModelEmaV3(self.net, decay=settings.ema_decay, use_warmup=True)
        self.mixup = None
        if settings.mixup or settings.cutmix:
            self.mixup = timm.data.Mixup(
                settings.mixup, settings.cutmix, label_smoothing=settings.label_smoothing, num_classes=classes
            )

    def _calibration(self) -> Tensor:
        """Training images that set the ranges of the activations in quantization-aware training."""
        chosen = epoch_order(len(self.images), seed_from(self.settings.seed, "calibration"), 0)
        pictures = self.quiet(self.images)
        return torch.stack([pictures[0, index][0] for index in chosen[: self.settings.qat_items]])

    def _resume(self) -> None:
        """Take the state of the last checkpoint, if there is one, and attach the decay."""
        found = self.folder.load()
        optimizer = self.optimizer.optimizer
        if found is not None:
            tensors, notes = found
            restore(self.net, optimizer, tensors)
            if self.ema is not None:
                _part(self.ema.module, tensors, "ema.")
            self.step, self.epoch, self.history = notes["step"], notes["epoch"], notes["history"]
            self.seconds = notes["seconds"]
            if self.accelerator.is_main_process:
                self.loss += notes["loss"]
            self._say(f"goes on at step {self.step} of {self.settings.epochs * self.steps_per_epoch}")
        if self.settings.decay == "s2d":
            self.decay = SelectiveSpectralDecay(self.model, **self.settings.s2d())
            if found is not None:
                prefix = "decay."
                self.decay.load_state_dict(
                    {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}
                )
            self.decay.attach(optimizer)

    # --- training

    def to_the_end(self) -> dict[str, Any]:
        if self.finished is not None:
            self._say(f"{self.folder.path} is done")
            return self.finished
        for epoch in range(self.epoch, self.settings.epochs):
            self.epoch = epoch
            self._train_epoch()
            self._end_epoch()
        return self._finish()

    def _train_epoch(self) -> None:
        settings, accelerator, first = self.settings, self.accelerator, self.step - self.epoch * self.steps_per_epoch
        chunks = chunks_of_epoch(
            len(self.images), settings.seed, self.epoch, settings.batch_size, self.chunk,
            accelerator.process_index, accelerator.num_processes,
        )  # fmt: skip
        chunks = [chunk for chunk in chunks if chunk[0] >= first]
        keys = [[(self.epoch, index) for index in items] for _, _, items in chunks]
        batches = batches_of(self.pictures, keys, settings.workers, accelerator.device.type == "cuda")
        self.model.train()
        for (step, chunk, _), (images, labels) in zip(chunks, batches, strict=True):
            images, labels = (part.to(accelerator.device, non_blocking=True) for part in (images, labels))
            seed_everything(seed_from(settings.seed, "batch", self.epoch, step, chunk))
            with accelerator.accumulate(self.model):
                loss = self._loss(images, labels)
                accelerator.backward(loss)
                self.loss += loss.detach()
                if accelerator.sync_gradients:
                    self._step()

    def _loss(self, images: Tensor, labels: Tensor) -> Tensor:
        smoothing = self.settings.label_smoothing
        if self.mixup is not None:  # which smooths the labels itself
            images, labels = self.mixup(images, labels)
            smoothing = 0.0
        with self._autocast():
            output = self.model(images)
        return F.cross_entropy(output.float(), labels, label_smoothing=smoothing)

    def _step(self) -> None:
        """One step of the optimizer; the penalty of S2D is added in there, after the clipping."""
        settings = self.settings
        if settings.clip_grad is not None:
            nn.utils.clip_grad_norm_(self.net.parameters(), settings.clip_grad)
        self.schedule.step_update(self.step)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.step += 1
        if self.ema is not None:
            self.ema.update(self.net, step=self.step)
        done = self.step - self.epoch * self.steps_per_epoch
        if self.step % settings.log_every == 0:
            loss = self.loss.item() / (done * self._share())
            self._say(f"epoch {self.epoch + 1}  step {self.step}  loss {loss:.4f}  lr {self._rate():.3g}")
        if self.step % settings.checkpoint_every == 0 and done < self.steps_per_epoch:
            self._save(self.epoch)

    def _share(self) -> int:
        """Chunks of a step that are this process's."""
        return self.settings.batch_size // self.chunk // self.accelerator.num_processes

    def _rate(self) -> float:
        return max(group["lr"] for group in self.optimizer.param_groups)

    # --- between epochs

    def _end_epoch(self) -> None:
        chunks = self.steps_per_epoch * self.settings.batch_size // self.chunk
        row: dict[str, Any] = {"epoch": self.epoch + 1, "step": self.step, "lr": self._rate()}
        row["train_loss"] = self._total_loss() / chunks
        row |= self._validate() | self._spectrum()
        if self.decay is not None:
            metrics = self.decay.metrics()
            row |= {"s2d_layers": metrics["s2d/layers"], "s2d_components": metrics["s2d/components"]}
        row["seconds"] = round(self.seconds + time.perf_counter() - self.began, 3)
        self.history.append(row)
        self.loss.zero_()
        self._save(self.epoch + 1)
        if self.accelerator.is_main_process:
            self.folder.write_history(self.history)
        shown = "  ".join(f"{name} {value:.4g}" for name, value in row.items() if value is not None)
        self._say(shown + (f"\n{self.decay.summary()}" if self.decay is not None else ""))

    @torch.no_grad()
    def _validate(self) -> dict[str, float | None]:
        """Loss and accuracy on the validation images, and the largest output of a linear layer in the blocks there."""
        if self.val is None:
            return {"val_loss": None, "val_accuracy": None, "max_activation": None}
        accelerator = self.accelerator
        net = (self.net if self.ema is None else self.ema.module).eval()
        batches = list(shares(len(self.val), self.chunk, accelerator.process_index, accelerator.num_processes))
        keys = [[(0, index) for index in items] for items, _ in batches]
        sums = torch.zeros(2, device=accelerator.device)
        with _largest_output(net) as largest:
            pictures = batches_of(self.quiet(self.val), keys, self.settings.workers, accelerator.device.type == "cuda")
            for (_, counted), (images, labels) in zip(batches, pictures, strict=True):
                with self._autocast():
                    output = net(images.to(accelerator.device)).float()[:counted]
                labels = labels.to(accelerator.device)[:counted]
                sums[0] += F.cross_entropy(output, labels, reduction="sum")
                sums[1] += (output.argmax(-1) == labels).sum()
        self.net.train()
        loss, right = (self._total(sums) / len(self.val)).tolist()
        peak = accelerator.gather(torch.tensor([max(largest, default=0.0)], device=accelerator.device)).max().item()
        return {"val_loss": loss, "val_accuracy": right, "max_activation": peak}

    @torch.no_grad()
    def _spectrum(self) -> dict[str, float]:
        """The largest spectral norm of the linear layers in the blocks; collective with sharded weights."""
        net = self.net if self.ema is None else self.ema.module
        bounds = [
            spectral_norm_bounds(linear.matrix(whole(linear.weight)).float()) for linear in linear_maps(net).values()
        ]
        return {"sigma_1": max(upper for _, upper in bounds)}

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.accelerator.device.type, torch.bfloat16, enabled=self.settings.precision == "bf16")

    def _total(self, tensor: Tensor) -> Tensor:
        return self.accelerator.reduce(tensor.clone(), reduction="sum")

    def _total_loss(self) -> float:
        """Summed over the chunks of this epoch so far, on all processes."""
        loss = self._total(self.loss).item()
        if not math.isfinite(loss):
            raise RuntimeError(
                f"the loss is {loss} at step {self.step}: lower lr or lam, or check the data; {self.folder.path} keeps "
                "the checkpoints before it"
            )
        return loss

    # --- what is kept

    def _save(self, epoch: int) -> None:
        """A checkpoint, after whose step epoch ``epoch`` goes on."""
        loss = self._total_loss()
        tensors = gather(self.net, self.optimizer.optimizer)
        if self.ema is not None:
            tensors |= {f"ema.{name}": t.cpu().clone() for name, t in self.ema.module.state_dict().items()}
        if self.decay is not None:
            tensors |= {f"decay.{name}": t.cpu().contiguous() for name, t in self.decay.state_dict().items()}
        if self.accelerator.is_main_process:
            seconds = self.seconds + time.perf_counter() - self.began
            notes = {"step": self.step, "epoch": epoch, "history": self.history, "loss": loss, "seconds": seconds}
            self.folder.save(self.step, tensors, notes)
        self.accelerator.wait_for_everyone()

    def _finish(self) -> dict[str, Any]:
        """``model``, ``quantized`` where the training was quantization-aware, and ``done.json``."""
        state = gather(self.net, self.optimizer.optimizer)
        net = self.net if self.ema is None else self.ema.module
        result = {"epochs": self.settings.epochs, "steps": self.step, "images": len(self.images)}
        result |= {"validated_on": None if self.val is None else len(self.val)} | self.history[-1]
        if self.accelerator.is_main_process:
            if self.ema is not None:
                state = {f"model.{name}": tensor for name, tensor in net.state_dict().items()}
            names = self.plain.state_dict()
            self.plain.load_state_dict({name: state[f"model.{name}"].cpu() for name in names})
            subject = replace(self.subject, model=self.plain.eval())
            write_folder_atomically(self.folder.model, lambda folder: save_checkpoint(subject, folder), overwrite=True)
            if self.settings.qat_w_bits is not None:
                quantized = self.folder.path / "quantized"
                save_quantized(finish_qat(copy.deepcopy(net)).cpu(), quantized, overwrite=quantized.exists())
            self.folder.write_history(self.history)
            self.folder.finish(result)
        self.accelerator.wait_for_everyone()
        if self.decay is not None:
            self.decay.detach()
        return result

    def _say(self, text: str) -> None:
        if self.accelerator.is_main_process:
            say(text)


def _shard(net: nn.Module, device: torch.device) -> None:
    """FSDP2: the repeated blocks one by one, then what is left."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(device.type, (torch.distributed.get_world_size(),))
    blocks = {name.rpartition(".")[0] for name in _block_names(net)}
    for block in net.get_submodule(next(iter(blocks))) if len(blocks) == 1 else ():
        fully_shard(block, mesh=mesh)
    fully_shard(net, mesh=mesh)


def _block_names(net: nn.Module) -> Iterator[str]:
    """``blocks.0``, ``blocks.1``, ... of the layers that are watched."""
    for name in linear_maps(net):
        parts = name.split(".")
        number = next((i for i, part in enumerate(parts) if part.isdigit()), None)
        if number is not None:
            yield ".".join(parts[: number + 1])


def _part(model: nn.Module, tensors: Mapping[str, Tensor], prefix: str) -> None:
    model.load_state_dict({n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)})


@contextmanager
def _largest_output(net: nn.Module) -> Iterator[list[float]]:
    """The largest absolute outputs of the linear layers in the blocks, a number a forward pass."""
    found: list[float] = []

    def see(module: nn.Module, args: tuple, output: Tensor) -> None:
        found.append(output.abs().max().item())

    handles = [linear.module.register_forward_hook(see) for linear in linear_maps(net).values()]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()
