r"""Quantize a model from the command line, and say what it cost in accuracy::

    python -m s2d.ptq vit_tiny_patch16_224 --pretrained --method erq --w-bits 4 --a-bits 4 \
        --calibration imagenet/train --test imagenet/val --save vit_tiny_w4a4 --json vit_tiny_w4a4.json
    python -m s2d.ptq mine.safetensors --arch vit_tiny_patch16_224 --model-options '{"num_classes": 10}' ...
    python -m s2d.ptq folder_of_a_hugging_face_model --w-bits 4 --a-bits 8 --calibration train.txt --test test.txt
    python -m s2d.ptq vit_tiny_patch16_224 --calibration random --test random

MODEL is the name of a timm model, a safetensors file with ``--arch``, or a Hugging Face folder (config.json and
safetensors; nothing is downloaded, and no code of the folder is run). Calibration and test data are each

* a folder of images, or one with a folder of images for each class (then accuracy is measured), preprocessed as the
  model asks;
* a safetensors file with ``images`` (N, C, H, W), taken as they are, and perhaps ``labels`` (N,); or ``input_ids``
  (N, T) for a language model;
* a text file, for a language model;
* ``random``, for a smoke run: its numbers say nothing about the model.

Which items are used is drawn at random with ``--seed``. Items used for calibration are never tested on. Progress goes
to stderr, the result to stdout.

Exit codes: 0 all well; 1 failed; 2 bad input, found before anything was quantized; 130 interrupted.

Paper: none
"""

from __future__ import annotations

import argparse
import ast
import difflib
import importlib
import inspect
import json
import math
import os
import platform
import signal
import sys
import threading
import time
import warnings
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import s2d
from s2d import ptq
from s2d.files import can_write, write_text
from s2d.ptq.checkpoint import DESCRIPTION, check_folder, quantized_size, save_quantized
from s2d.ptq.quantizers import check_bits
from s2d.ptq.sites import sites
from s2d.ptq.trace import call, tensors_of

IMAGE_ENDINGS = {".bmp", ".gif", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp"}
TEXT_ENDINGS = {".md", ".txt"}
RANDOM = "random"
RANDOM_TEST_ITEMS = 64


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


@contextmanager
def _stage(name: str, seconds: dict[str, float]) -> Iterator[None]:
    """Announce a stage, and keep how long it took."""
    _say(f"{name} ...")
    start = time.perf_counter()
    yield
    seconds[name] = time.perf_counter() - start
    _say(f"{name}: {seconds[name]:.1f} s")


def _need(module: str, why: str) -> Any:
    """An optional package, or ImportError that says what it is for."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = module.partition(".")[0]
        package = {"PIL": "pillow"}.get(package, package)
        raise ImportError(f"{why} needs the package {package}: pip install {package}") from error


# --- data ------------------------------------------------------------------------------------------------------------


@dataclass
class Items:
    """Calibration or test data: what there is, without reading all of it.

    Attributes:
        source: as it was given.
        kind: ``"images"`` or ``"sequences"``.
        keys: one for each item; equal keys are the same item.
        read: ``read(positions)``, the items as one tensor; for files of images it is known once the model is.
        labels: class of each item, if known.
        files: images that are yet to be preprocessed.
        classes: names of the classes, if known.
    """

    source: str
    kind: str
    keys: list[Hashable]
    read: Callable[[list[int]], Tensor] | None = None
    labels: list[int] | None = None
    files: list[Path] = field(default_factory=list)
    classes: list[str] = field(default_factory=list)

    def draw(self, count: int | None, seed: int, besides: set[Hashable]) -> list[int]:
        """Positions of up to ``count`` items at random, none of whose keys is in ``besides``."""
        order = torch.randperm(len(self.keys), generator=torch.Generator().manual_seed(seed)).tolist()
        return [position for position in order if self.keys[position] not in besides][:count]


def _open_items(text: str, option: str) -> Items | None:
    """What a data argument names; None for random data, or text that waits for its tokenizer."""
    if text == RANDOM:
        return None
    path = Path(text)
    if path.is_dir():
        return _image_folder(path, option)
    if not path.is_file():
        raise ValueError(f"{option} {text} does not exist: give a folder of images, a file, or 'random'")
    if path.suffix == ".safetensors":
        return _tensor_file(path, option)
    if path.suffix in TEXT_ENDINGS:
        return None
    raise ValueError(
        f"{option} {text} is of no known kind: give a folder of images, a .safetensors file, a text file "
        f"({', '.join(sorted(TEXT_ENDINGS))}), or 'random'"
    )


def _images_in(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.suffix.lower() in IMAGE_ENDINGS and path.is_file())


def _image_folder(folder: Path, option: str) -> Items:
    _need("PIL.Image", "a folder of images")
    flat = _images_in(folder)
    classes = [path for path in sorted(folder.iterdir()) if path.is_dir() and not path.name.startswith(".")]
    found = [(file, label) for label, inner in enumerate(classes) for file in _images_in(inner)]
    if flat and found:
        raise ValueError(f"{option} {folder} holds images and folders of images: give one or the other")
    if not flat and not found:
        raise ValueError(
            f"{option} {folder} holds no images ({', '.join(sorted(IMAGE_ENDINGS))}), nor do the folders in it: give "
            "a folder of images, or one with a folder for each class"
        )
    files = flat or [file for file, _ in found]
    items = Items(str(folder), "images", [file.resolve() for file in files], files=files)
    if found:
        items.labels, items.classes = [label for _, label in found], [path.name for path in classes]
    return items


def _tensor_file(path: Path, option: str) -> Items:
    safetensors = _need("safetensors.torch", "a .safetensors file")
    try:
        tensors = safetensors.load_file(path)
    except Exception as error:  # of the safetensors package
        raise ValueError(
            f"{option} {path} cannot be read ({error}): write it with safetensors.torch.save_file"
        ) from None
    key = next((name for name in ("images", "input_ids") if name in tensors), None)
    if key is None:
        raise ValueError(f"{option} {path} has {', '.join(tensors) or 'nothing'}: store 'images' or 'input_ids' in it")
    data, labels = tensors[key], tensors.get("labels")
    dimensions = {"images": 4, "input_ids": 2}[key]
    if data.ndim != dimensions or len(data) == 0 or data.is_floating_point() != (key == "images"):
        raise ValueError(
            f"{option} {path}: {key} is {str(data.dtype).removeprefix('torch.')} of shape {tuple(data.shape)}: store "
            + ("normalised floating-point images (N, C, H, W)" if key == "images" else "whole numbers (N, T)")
        )
    if labels is not None and (labels.shape != data.shape[:1] or labels.is_floating_point()):
        raise ValueError(f"{option} {path}: labels has shape {tuple(labels.shape)}: store {len(data)} whole numbers")
    source = path.resolve()
    return Items(
        str(path),
        "images" if key == "images" else "sequences",
        [(source, index) for index in range(len(data))],
        read=lambda positions: data[positions],
        labels=None if labels is None or key == "input_ids" else labels.tolist(),
    )


def _text_file(path: Path, tokenizer: Any, length: int, option: str) -> Items:
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{option} {path} is not UTF-8 ({error}): convert it") from None
    ids = torch.tensor(tokenizer(text, add_special_tokens=False)["input_ids"], dtype=torch.long)
    count = len(ids) // length
    if count == 0:
        raise ValueError(f"{option} {path} has {len(ids)} tokens: give a longer text, or fewer --sequence-length")
    rows = ids[: count * length].view(count, length)
    keys = [(path.resolve(), index) for index in range(count)]
    return Items(str(path), "sequences", keys, read=lambda positions: rows[positions])


# --- models ----------------------------------------------------------------------------------------------------------


@dataclass
class Subject:
    """The model to quantize, and how to feed it.

    Attributes:
        model: in evaluation mode.
        name: for the table.
        argument: name of the argument that takes the data; None for the first.
        shape: of an item.
        vocabulary: number of tokens; None for images.
        folder: of a Hugging Face model.
        preprocess: PIL image to tensor.
        label_ids: class name to label, of a Hugging Face model.
    """

    model: nn.Module
    name: str
    argument: str | None
    shape: tuple[int, ...]
    vocabulary: int | None = None
    folder: Path | None = None
    preprocess: Callable[[Any], Tensor] | None = None
    label_ids: dict[str, int] = field(default_factory=dict)

    @property
    def kind(self) -> str:
        return "images" if self.vocabulary is None else "sequences"

    def batch(self, data: Tensor) -> Any:
        """What the model is called with."""
        return data if self.argument is None else {self.argument: data}

    def random(self, count: int, seed: int) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        if self.vocabulary is not None:
            return torch.randint(self.vocabulary, (count, *self.shape), generator=generator)
        return torch.randn(count, *self.shape, generator=generator)


def logits(output: Any) -> Tensor:
    """The logits among a model's outputs, or the first of its tensors that is in floating point."""
    found = getattr(output, "logits", None)
    if isinstance(found, Tensor):
        return found
    return next(tensor for tensor in tensors_of(output) if tensor.is_floating_point())


def _model_source(args: argparse.Namespace) -> str:
    """``"timm"``, ``"file"`` or ``"folder"``; ValueError for what is none of them."""
    path = Path(args.model)
    if path.is_dir():
        if (path / DESCRIPTION).exists():
            raise ValueError(f"MODEL {path} is quantized already: give the model in floating point")
        config = _read_config(path)
        if "architecture" in config and "model_type" not in config:
            raise ValueError(
                f"MODEL {path} is a folder of timm: give its model.safetensors with --arch {config['architecture']}"
            )
        if not list(path.glob("*.safetensors")):
            raise ValueError(f"MODEL {path} has no .safetensors file: save the model with save_pretrained()")
        _refuse_options(args, "a Hugging Face folder", "arch", "model_options", "pretrained")
        return "folder"
    if path.suffix == ".safetensors" or path.is_file():
        if not path.is_file():
            raise ValueError(f"MODEL {path} does not exist: give a safetensors file, a folder, or a timm model")
        if path.suffix != ".safetensors":
            raise ValueError(f"MODEL {path} is no .safetensors file: convert it with safetensors.torch.save_file")
        if args.arch is None:
            raise ValueError(f"MODEL {path} has no architecture: add --arch with the name of a timm model")
        _refuse_options(args, "a file", "pretrained")
        _check_timm_name(args.arch, "--arch")
        return "file"
    _refuse_options(args, "a timm model", "arch")
    _check_timm_name(args.model, "MODEL")
    return "timm"


def _refuse_options(args: argparse.Namespace, what: str, *names: str) -> None:
    for name in names:
        if getattr(args, name):
            raise ValueError(f"--{name.replace('_', '-')} is not for {what}: leave it out")


def _check_timm_name(name: str, option: str) -> None:
    timm = _need("timm", "the model")
    if not timm.is_model(name):
        close = difflib.get_close_matches(name, timm.list_models(), n=1)
        hint = (
            f"did you mean {close[0]!r}?" if close else "see timm.list_models(), or give a file or folder that exists"
        )
        raise ValueError(f"{option} {name!r} is no timm model: {hint}")


def _read_config(folder: Path) -> dict[str, Any]:
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"MODEL {folder} has no config.json: give the folder of a Hugging Face model") from None
    except ValueError as error:
        raise ValueError(f"MODEL {folder / 'config.json'} is not JSON ({error}): save the model again") from None
    return config if isinstance(config, dict) else {}


def _timm_model(args: argparse.Namespace, source: str) -> Subject:
    timm = _need("timm", "the model")
    arch = args.arch if source == "file" else args.model
    try:
        model = timm.create_model(arch, pretrained=args.pretrained, **args.model_options)
    except Exception as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        if not args.pretrained or isinstance(error, (TypeError, AssertionError)):
            raise ValueError(
                f"timm cannot make {arch} with --model-options {json.dumps(args.model_options)} ({reason})"
            ) from None
        raise RuntimeError(
            f"the weights of {arch} could not be fetched ({reason}): --pretrained needs a network; without one, give "
            "a safetensors file with --arch"
        ) from error
    name = f"{arch} ({'pretrained' if args.pretrained else 'random weights'})"
    if source == "file":
        _load_weights(model, Path(args.model), arch)
        name = f"{args.model} ({arch})"
    elif not args.pretrained:
        _say("warning: random weights: accuracy means nothing; add --pretrained, or give a file with --arch")
    config = _data_config(timm, model, args.model_options)
    return Subject(model.eval(), name, None, config["input_size"], preprocess=_timm_preprocessing(timm, config))


def _load_weights(model: nn.Module, file: Path, arch: str) -> None:
    safetensors = _need("safetensors.torch", "a .safetensors file")
    try:
        state = safetensors.load_file(file)
    except Exception as error:  # of the safetensors package
        raise ValueError(f"MODEL {file} cannot be read ({error}): copy or save it again") from None
    expected = model.state_dict()
    for name in [*(expected.keys() - state.keys()), *(state.keys() - expected.keys())]:
        which = "lacks" if name in expected else "has, beyond the model,"
        raise ValueError(
            f"MODEL {file} {which} {name}: give the right --arch and --model-options (not {arch} as it is)"
        )
    for name, tensor in expected.items():
        if tensor.shape != state[name].shape:
            raise ValueError(
                f"MODEL {file}: {name} has shape {tuple(state[name].shape)}, in {arch} {tuple(tensor.shape)}: give the "
                "right --arch and --model-options"
            )
    model.load_state_dict(state)


def _data_config(timm: Any, model: nn.Module, options: dict[str, Any]) -> dict[str, Any]:
    config = timm.data.resolve_data_config({}, model=model)
    channels, height, width = config["input_size"]
    # The model's own image size, which may have been changed, as timm's configuration does not know.
    height, width = getattr(getattr(model, "patch_embed", None), "img_size", None) or (height, width)
    channels = options.get("in_chans", channels)
    config["input_size"] = (channels, height, width)
    if len(config["mean"]) != channels:
        config["mean"] = config["std"] = (0.5,) * channels
    return config


def _timm_preprocessing(timm: Any, config: dict[str, Any]) -> Callable[[Any], Tensor]:
    transform = timm.data.create_transform(**config, is_training=False)
    mode = "L" if config["input_size"][0] == 1 else "RGB"
    return lambda image: transform(image.convert(mode))


def _folder_model(args: argparse.Namespace) -> Subject:
    transformers = _need("transformers", "a Hugging Face folder")
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    folder = Path(args.model)
    architecture = next(iter(_read_config(folder).get("architectures") or ["AutoModel"]))
    kinds = {"ForCausalLM": "AutoModelForCausalLM", "LMHeadModel": "AutoModelForCausalLM"}
    kinds["ForImageClassification"] = "AutoModelForImageClassification"
    kind = next((auto for ending, auto in kinds.items() if architecture.endswith(ending)), "AutoModel")
    try:
        model, found = getattr(transformers, kind).from_pretrained(
            folder, local_files_only=True, use_safetensors=True, trust_remote_code=False, output_loading_info=True
        )
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"MODEL {folder} cannot be loaded ({reason}): save it with save_pretrained()") from None
    missing = sorted(found["missing_keys"])
    if missing:
        _say(f"warning: {folder} has no {', '.join(missing[:3])} ({len(missing)} missing in all): these are random")
    config = model.config
    if hasattr(config, "use_cache"):
        config.use_cache = False  # nothing is generated
    argument = model.main_input_name
    if argument == "input_ids":
        limit = getattr(config, "max_position_embeddings", None) or args.sequence_length
        if args.sequence_length > limit:
            raise ValueError(f"--sequence-length is {args.sequence_length}, the model takes {limit}: give at most that")
        return Subject(
            model.eval(), f"{folder} ({architecture})", argument, (args.sequence_length,), config.vocab_size, folder
        )
    size = getattr(config, "image_size", None) or 224
    size = tuple(size) if isinstance(size, (list, tuple)) else (size, size)
    channels = getattr(config, "num_channels", 3)
    label_ids = dict(getattr(config, "label2id", None) or {})
    subject = Subject(model.eval(), f"{folder} ({architecture})", argument, (channels, *size), label_ids=label_ids)
    subject.folder = folder
    subject.preprocess = _folder_preprocessing(transformers, folder, channels, size)
    return subject


def _folder_preprocessing(
    transformers: Any, folder: Path, channels: int, size: tuple[int, int]
) -> Callable[[Any], Tensor]:
    mode = "L" if channels == 1 else "RGB"
    if (folder / "preprocessor_config.json").exists():
        processor = transformers.AutoImageProcessor.from_pretrained(folder, local_files_only=True)
        return lambda image: processor(images=image.convert(mode), return_tensors="pt")["pixel_values"][0]

    def preprocess(image: Any) -> Tensor:
        _note_once(
            f"{folder} has no preprocessor_config.json: images are resized, cropped and normalised with 0.5, 0.5"
        )
        image = image.convert(mode)
        factor = max(size[1] / image.width, size[0] / image.height)
        image = image.resize((max(round(image.width * factor), size[1]), max(round(image.height * factor), size[0])))
        left, top = (image.width - size[1]) // 2, (image.height - size[0]) // 2
        image = image.crop((left, top, left + size[1], top + size[0]))
        data = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8).view(*size, channels)
        return data.permute(2, 0, 1).float() / 127.5 - 1

    return preprocess


_noted: set[str] = set()


def _note_once(line: str) -> None:
    if line not in _noted:
        _noted.add(line)
        _say(f"note: {line}")


# --- what to run on --------------------------------------------------------------------------------------------------


def _ready(items: Items | None, text: str, option: str, subject: Subject, args: argparse.Namespace) -> Items:
    """Items that can be read, now that the model is known; random ones are made here."""
    if items is None and text == RANDOM:
        count = args.images if option == "--calibration" else RANDOM_TEST_ITEMS
        data = subject.random(count, args.seed + (option == "--test"))
        return Items(RANDOM, subject.kind, [(option, i) for i in range(count)], read=lambda positions: data[positions])
    if items is None:
        if subject.kind != "sequences":
            raise ValueError(f"{option} {text} is a text, the model takes images: give images")
        if not any((subject.folder / name).exists() for name in ("tokenizer.json", "tokenizer_config.json")):
            raise ValueError(f"{option} {text}: {subject.folder} has no tokenizer: add it, or give input_ids")
        transformers = _need("transformers", "a text")
        tokenizer = transformers.AutoTokenizer.from_pretrained(subject.folder, local_files_only=True)
        return _text_file(Path(text), tokenizer, args.sequence_length, option)
    if items.kind != subject.kind:
        raise ValueError(f"{option} {text} holds {items.kind}, the model takes {subject.kind}: give {subject.kind}")
    if items.files:
        image = _need("PIL.Image", "a folder of images")
        items.read = lambda positions: torch.stack([_read_image(image, items.files[i], subject) for i in positions])
    if items.classes and all(name in subject.label_ids for name in items.classes):
        items.labels = [subject.label_ids[items.classes[label]] for label in items.labels]
    return items


def _read_image(module: Any, file: Path, subject: Subject) -> Tensor:
    try:
        with module.open(file) as image:
            return subject.preprocess(image)
    except (OSError, SyntaxError) as error:
        raise ValueError(f"{file} cannot be read as an image ({error}): repair or remove it") from None


def _probe(subject: Subject, data: Tensor, option: str) -> Tensor:
    """The logits of one item; ValueError if the model cannot take it."""
    try:
        with torch.no_grad():
            return logits(call(subject.model, subject.batch(data)))
    except Exception as error:  # whatever a model does with data of the wrong shape
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(
            f"{option}: the model cannot take an item of shape {tuple(data.shape[1:])} ({reason}): give data of the "
            "size it was built for, or build it for this size (--model-options)"
        ) from None


def _check_labels(items: Items, found: Tensor, option: str, label_ids: dict[str, int]) -> None:
    if items.labels is None:
        return
    if found.ndim != 2 or max(items.labels) >= found.shape[1] or min(items.labels) < 0:
        raise ValueError(
            f"{option} {items.source} has labels up to {max(items.labels)}, the model's output has shape "
            f"(N, {', '.join(map(str, found.shape[1:]))}): give data of the model's classes, or without labels"
        )
    named = items.classes and all(name in label_ids for name in items.classes)
    if items.classes and not named and len(items.classes) != found.shape[1]:
        raise ValueError(
            f"{option} {items.source} has {len(items.classes)} class folders, the model {found.shape[1]} outputs: "
            "folders in alphabetical order are taken for classes 0, 1, ...; give one folder for each class"
        )


# --- evaluation ------------------------------------------------------------------------------------------------------


@torch.no_grad()
def compare(
    subject: Subject, quantized: nn.Module, items: Items, positions: list[int], batch_size: int, device: torch.device
) -> dict[str, float]:
    """Both models on the test items, batch by batch.

    Returns:
        ``logit_error`` (relative, squared), ``agreement`` (of the largest logit); ``accuracy_float`` and
        ``accuracy_quantized`` with labels; ``perplexity_float`` and ``perplexity_quantized`` of a text.
    """
    sums: dict[str, float] = {}

    def add(name: str, value: Tensor) -> None:
        sums[name] = sums.get(name, 0.0) + value.double().sum().item()

    for start in range(0, len(positions), batch_size):
        here = positions[start : start + batch_size]
        data = items.read(here).to(device)
        plain, found = (logits(call(model, subject.batch(data))).float() for model in (subject.model, quantized))
        add("error", (found - plain).double().square())
        add("energy", plain.double().square())
        add("same", found.argmax(-1) == plain.argmax(-1))
        add("predictions", torch.tensor(plain.shape[:-1].numel()))
        for name, output in (("float", plain), ("quantized", found)):
            if items.labels is not None:
                right = torch.tensor([items.labels[i] for i in here], device=device)
                add(f"right_{name}", output.argmax(-1) == right)
            elif subject.kind == "sequences" and output.ndim == 3 and output.shape[-1] >= subject.vocabulary:
                add(
                    f"loss_{name}",
                    F.cross_entropy(output[:, :-1].flatten(0, 1), data[:, 1:].flatten(), reduction="sum"),
                )
    count = len(positions)
    result = {
        "logit_error": sums["error"] / max(sums["energy"], 1e-300),
        "agreement": sums["same"] / sums["predictions"],
    }
    for name in ("float", "quantized"):
        if f"right_{name}" in sums:
            result[f"accuracy_{name}"] = sums[f"right_{name}"] / count
        if f"loss_{name}" in sums:
            tokens = sums["predictions"] - count  # the first token of an item is not predicted
            result[f"perplexity_{name}"] = math.exp(min(sums[f"loss_{name}"] / tokens, 700.0))
    return result


# --- the command -----------------------------------------------------------------------------------------------------


class _Parser(argparse.ArgumentParser):
    """Bad arguments as ValueError, so that all bad input is told in the same way."""

    def error(self, message: str) -> None:
        raise ValueError(f"{message} (see python -m s2d.ptq --help)")


def _whole(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of 1 or more")
    return int(text)


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="python -m s2d.ptq",
        description=__doc__.partition("Paper:")[0],
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("model", metavar="MODEL", help="timm model, .safetensors file (--arch), Hugging Face folder")
    parser.add_argument("--arch", metavar="NAME", help="timm model that a .safetensors file is of")
    parser.add_argument("--model-options", default="{}", metavar="JSON", help="for timm, such as '{\"img_size\": 32}'")
    parser.add_argument("--pretrained", action="store_true", help="timm's weights; needs a network")

    parser.add_argument("--method", default="rtn", metavar="NAME", help=f"{', '.join(ptq.METHODS)} (default: rtn)")
    parser.add_argument("--w-bits", type=int, default=8, metavar="N", help="2 to 8; 16 or 32 for none (default: 8)")
    parser.add_argument("--a-bits", type=int, default=8, metavar="N", help="2 to 8; 16 or 32 for none (default: 8)")
    parser.add_argument(
        "--transforms",
        action="append",
        default=[],
        metavar="NAME",
        help=f"before the method, repeatable: {', '.join(ptq.TRANSFORMS) or 'none'}",
    )
    parser.add_argument("--exclude", action="append", default=[], metavar="PATTERN", help="layers to leave, repeatable")
    parser.add_argument("--option", action="append", default=[], metavar="NAME=VALUE", help="of the method, repeatable")

    parser.add_argument("--calibration", required=True, metavar="DATA", help="images, text or 'random' (see above)")
    parser.add_argument("--images", type=_whole, default=32, metavar="N", help="calibration items (default: 32)")
    parser.add_argument("--test", metavar="DATA", help="the same kinds; without it nothing is measured")
    parser.add_argument("--test-images", type=_whole, metavar="N", help="test items (default: all)")
    parser.add_argument("--sequence-length", type=_whole, default=128, metavar="N", help="tokens a text item")

    parser.add_argument("--device", default="cpu", help="such as cuda (default: cpu)")
    parser.add_argument("--seed", type=int, default=0, help="of random weights, draws and the method (default: 0)")
    parser.add_argument("--batch-size", type=_whole, default=32, metavar="N", help="items a forward pass (default: 32)")
    parser.add_argument("--save", type=Path, metavar="FOLDER", help="where to write the quantized model")
    parser.add_argument("--overwrite", action="store_true", help="replace an earlier model in that folder")
    parser.add_argument("--json", type=Path, metavar="FILE", help="where to write the result")
    return parser


def _check_arguments(args: argparse.Namespace) -> None:
    """Find what is wrong with the arguments themselves, and read those that are written as text, in place."""
    if args.method not in ptq.METHODS:
        close = difflib.get_close_matches(args.method, ptq.METHODS, n=1)
        hint = f"did you mean {close[0]!r}?" if close else f"choose one of {', '.join(ptq.METHODS)}"
        raise ValueError(f"--method {args.method!r} is unknown: {hint}")
    for name in args.transforms:
        if name not in ptq.TRANSFORMS:
            raise ValueError(f"--transforms {name!r} is unknown: choose one of {', '.join(ptq.TRANSFORMS) or 'none'}")
    check_bits(args.w_bits, "--w-bits")
    check_bits(args.a_bits, "--a-bits")
    args.option = _method_options(args)
    args.model_options = _json_object(args.model_options)
    args.device = _device(args.device)
    if args.save is not None:
        _need("safetensors.torch", "--save")
        check_folder(args.save, overwrite=args.overwrite)
    for option, path in (("--json", args.json), ("--save", args.save)):
        if path is not None and not can_write(path, folder=option == "--save"):
            raise ValueError(f"{option} {path} cannot be written: give one in a folder that exists and takes files")


def _method_options(args: argparse.Namespace) -> dict[str, Any]:
    options: dict[str, Any] = {}
    for text in args.option:
        name, equals, value = text.partition("=")
        if not equals or not name.isidentifier():
            raise ValueError(f"--option {text!r} is not of the form NAME=VALUE")
        if name in options:
            raise ValueError(f"--option {name} is given twice: give it once")
        try:
            options[name] = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            options[name] = value  # a word needs no quotes
    ptq.check_options(args.method, options)
    if "seed" in inspect.signature(ptq.METHODS[args.method]).parameters:
        options.setdefault("seed", args.seed)
    return options


def _json_object(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except ValueError as error:
        raise ValueError(
            f"--model-options {text!r} is not JSON ({error}): write such as '{{\"img_size\": 32}}'"
        ) from None
    if not isinstance(value, dict):
        raise ValueError(f"--model-options {text!r} is no JSON object: write such as '{{\"img_size\": 32}}'")
    return value


def _device(text: str) -> torch.device:
    try:
        device = torch.device(text)
        torch.empty(1, device=device).add_(1)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = (str(error).splitlines() or [""])[0]
        raise ValueError(
            f"--device {text!r} cannot be used ({reason}): choose cpu, or a device that is there"
        ) from None
    return device


def _run(args: argparse.Namespace) -> dict[str, Any]:
    """Everything, from the arguments to the result."""
    _check_arguments(args)
    source = _model_source(args)
    calibration = _open_items(args.calibration, "--calibration")
    test = None if args.test is None else _open_items(args.test, "--test")
    seconds: dict[str, float] = {}
    torch.manual_seed(args.seed)

    with _stage("load model", seconds):
        subject = _folder_model(args) if source == "folder" else _timm_model(args, source)
        subject.model.to(args.device)
    with _stage("read calibration data", seconds):
        calibration = _ready(calibration, args.calibration, "--calibration", subject, args)
        chosen = calibration.draw(args.images, args.seed, set())
        if len(chosen) < args.images:
            raise ValueError(
                f"--images is {args.images}, {args.calibration} has {len(chosen)}: give fewer --images, or more data"
            )
        data = calibration.read(chosen).to(args.device)
        _probe(subject, data[:1], f"--calibration {args.calibration}")
        tested: list[int] = []
        if args.test is not None:
            test = _ready(test, args.test, "--test", subject, args)
            tested = _draw_tests(test, {calibration.keys[i] for i in chosen}, args)
            found = _probe(subject, test.read(tested[:1]).to(args.device), f"--test {args.test}")
            _check_labels(test, found, "--test", subject.label_ids)
    if RANDOM in (args.calibration, args.test):
        _say("warning: random data: this is a smoke run, its accuracy and errors mean nothing")

    quantized = _quantize(subject, data, args, seconds)
    result = _describe(args, subject, quantized, seconds)
    if test is not None:
        with _stage("test", seconds):
            measured = compare(subject, quantized, test, tested, args.batch_size, args.device)
        result |= {"test": {"data": args.test, "items": len(tested)} | measured}
    if args.save is not None:
        with _stage("save", seconds):
            save_quantized(quantized, args.save, overwrite=args.overwrite)
    return result


def _draw_tests(test: Items, used: set[Hashable], args: argparse.Namespace) -> list[int]:
    tested = test.draw(args.test_images, args.seed, used)
    shared = sum(key in used for key in test.keys)
    if not tested:
        raise ValueError(
            f"--test {args.test}: all its {len(test.keys)} items are calibration items: give fewer --images or other "
            "data"
        )
    if shared:
        _say(f"note: --test {args.test} holds {shared} of the calibration items: it is tested on {len(tested)} others")
    return tested


def _quantize(subject: Subject, data: Tensor, args: argparse.Namespace, seconds: dict[str, float]) -> nn.Module:
    with _stage("quantize", seconds), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        quantized = ptq.quantize(
            subject.model,
            method=args.method,
            w_bits=args.w_bits,
            a_bits=args.a_bits,
            calibration=subject.batch(data),
            transforms=args.transforms,
            exclude=args.exclude,
            batch_size=args.batch_size,
            progress=lambda line: _say(f"  {line}"),
            **args.option,
        )
    for warning in caught:
        if issubclass(warning.category, UserWarning):
            _say(f"warning: {warning.message}")
    return quantized


def _describe(
    args: argparse.Namespace, subject: Subject, quantized: nn.Module, seconds: dict[str, float]
) -> dict[str, Any]:
    left_out = [row["site"] for row in ptq.coverage(quantized) if row["kind"] == "left out"]
    packages = [name for name in ("timm", "transformers") if name in sys.modules]
    return {
        "model": subject.name,
        "kind": subject.kind,
        "method": args.method,
        "options": args.option,
        "transforms": args.transforms,
        "w_bits": args.w_bits,
        "a_bits": args.a_bits,
        "calibration": {"data": args.calibration, "items": args.images},
        "smoke_run": RANDOM in (args.calibration, args.test) or "random weights" in subject.name,
        "size": quantized_size(quantized, subject.model),
        "coverage": {"quantized": len(sites(quantized)), "left_out": left_out},
        "seconds": seconds,
        "seed": args.seed,
        "versions": {"python": platform.python_version(), "s2d": s2d.__version__, "torch": torch.__version__}
        | {name: sys.modules[name].__version__ for name in packages},
        "hardware": _hardware(args.device),
    }


def _hardware(device: torch.device) -> str:
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or "cpu"
    return f"{name} ({platform.machine()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads)"


def table(result: dict[str, Any]) -> str:
    """The result for people, one line a fact."""
    unit = result["kind"]
    rows = [("model", result["model"])]
    options = "".join(f", {name}={value}" for name, value in result["options"].items())
    before = "".join(f"{name}, then " for name in result["transforms"])
    rows.append(("method", f"{before}{result['method']}{options}"))
    rows.append(("bits", f"W{result['w_bits']}A{result['a_bits']}"))
    rows.append(("calibration", f"{result['calibration']['items']} {unit} of {result['calibration']['data']}"))
    test = result.get("test")
    if test is not None:
        rows.append(("test", f"{test['items']} {unit} of {test['data']}"))
        for name, text in (("accuracy", "{:.2%}"), ("perplexity", "{:.3f}")):
            if f"{name}_float" in test:
                values = [text.format(test[f"{name}_{side}"]) for side in ("float", "quantized")]
                rows.append((f"{name}, floating point", values[0]))
                rows.append((f"{name}, quantized", values[1]))
        rows.append(("relative logit error", f"{test['logit_error']:.2e}"))
        rows.append(("top-1 agreement", f"{test['agreement']:.2%}"))
    size, coverage = result["size"], result["coverage"]
    megabytes = [f"{size[name] / 1e6:.2f} MB" for name in ("quantized", "float_model")]
    rows.append(("size, codes packed", f"{megabytes[0]}, in floating point {megabytes[1]} ({size['ratio']:.1f} times)"))
    rows.append(("sites", f"{coverage['quantized']} quantized, {len(coverage['left_out'])} left in floating point"))
    rows.append(("seconds", ", ".join(f"{name} {value:.1f}" for name, value in result["seconds"].items())))
    if result["smoke_run"]:
        rows.append(("note", "random weights or data: accuracy and errors mean nothing"))
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{name:{width}}  {value}" for name, value in rows)


@contextmanager
def _interruptible() -> Iterator[None]:
    """SIGTERM as KeyboardInterrupt, like SIGINT, so that nothing half-written stays."""
    if threading.current_thread() is not threading.main_thread():
        yield  # only the main thread may set handlers
        return

    def interrupt(number: int, frame: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        argv: the arguments; None for those of the process.

    Returns:
        The exit code: 0 all well, 1 failed, 2 bad input, 130 interrupted.

    Paper: none
    """
    _noted.clear()
    try:
        with _interruptible():
            args = _parser().parse_args(argv)
            result = _run(args)
            print(table(result))
            if args.json is not None:
                write_text(args.json, json.dumps(result, indent=1, default=repr) + "\n")
            return 0
    except ValueError as error:
        _say(f"error: {error}")
        return 2
    except TypeError as error:
        _say(f"error: {error}: is a value of --option of the right type?")
        return 2
    except (ImportError, OSError, RuntimeError) as error:
        _say(f"error: {error}")
        return 1
    except KeyboardInterrupt:
        _say("interrupted")
        return 130
