"""From a name to the model: a preset, one of timm, open_clip or a hub, a file of weights, or a folder."""

from __future__ import annotations

import argparse
import difflib
import hashlib
import json
import re
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from s2d.console import say
from s2d.models.gguf import as_folder
from s2d.models.onnx_vit import dinov2
from s2d.models.presets import PRESETS, locate
from s2d.models.subject import Subject
from s2d.models.weights import read_safetensors
from s2d.packages import need
from s2d.ptq.checkpoint import DESCRIPTION


def load(
    name: str,
    *,
    arch: str | None = None,
    model_options: dict[str, Any] | None = None,
    pretrained: bool = False,
    sequence_length: int = 128,
) -> Subject:
    """A network and what feeds it, in evaluation mode, on the CPU.

    Args:
        name: a preset (:data:`s2d.models.PRESETS`), a timm model, ``open_clip:MODEL/WEIGHTS`` (its image tower),
            ``owner/name`` on the hub, a folder of Hugging Face, or a file: ``.safetensors`` (with ``arch``), ``.gguf``,
            or ``.onnx`` (of a DINOv2).
        arch: the timm model that a ``.safetensors`` file is of.
        model_options: for timm, such as ``{"img_size": 32}``.
        pretrained: timm's weights; needs a network, as a hub does.
        sequence_length: tokens an item, of a model that takes text.

    Returns:
        See :class:`Subject`; ``subject.watch()`` has the layers worth watching.

    Raises:
        ValueError: for an unknown name, files that are damaged or do not fit, and weights that are not the published.
        FileNotFoundError, RuntimeError: for what is neither here nor can be fetched, with the command that gets it.
        ImportError: without the package that the model is of.

    Example:
        >>> load("test_vit", model_options={"num_classes": 10}).shape
        (3, 160, 160)

    Paper: none
    """
    args = argparse.Namespace(model=name, arch=arch, model_options=model_options or {}, pretrained=pretrained)
    args.sequence_length = sequence_length
    return load_model(args, model_source(args))


def model_source(args: argparse.Namespace) -> str:
    """What MODEL names, found out before anything is loaded.

    Args:
        args: from :func:`s2d.ptq.command.arguments.read_arguments`; the name of a preset is replaced by what it is.

    Returns:
        ``"timm"``, ``"timm folder"``, ``"open_clip"``, ``"hub"``, ``"file"``, ``"folder"``, ``"gguf"`` or ``"onnx"``.

    Raises:
        ValueError: for what is none of them, or options that are not for it.
        FileNotFoundError: for a preset that is not installed, with the command that installs it.
        ImportError: without the package timm, where it is needed.

    Paper: none
    """
    if args.model in PRESETS and not Path(args.model).exists():
        _use_preset(args)
    path = Path(args.model)
    if args.model.startswith(OPEN_CLIP):
        _refuse_options(args, "open_clip", "arch", "model_options", "pretrained")
        _check_open_clip_name(args.model)
        return "open_clip"
    if path.suffix in (".gguf", ".onnx"):
        if not path.is_file():
            raise ValueError(f"MODEL {path} does not exist: give a file that does")
        _refuse_options(args, f"a {path.suffix} file", "arch", "model_options", "pretrained")
        return path.suffix[1:]
    if path.is_dir():
        if (path / DESCRIPTION).exists():
            raise ValueError(f"MODEL {path} is quantized already: give the model in floating point")
        config = _read_config(path)
        if not list(path.glob("*.safetensors")):
            raise ValueError(f"MODEL {path} has no .safetensors file: save the model with save_pretrained()")
        if "architecture" in config and "model_type" not in config:
            _refuse_options(args, "a folder of timm", "arch", "model_options", "pretrained")
            _check_timm_name(config["architecture"], f"{path / 'config.json'}: architecture")
            return "timm folder"
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
    if HUB_NAME.fullmatch(args.model):
        _refuse_options(args, "a model of the hub", "arch", "model_options", "pretrained")
        return "hub"
    _refuse_options(args, "a timm model", "arch")
    _check_timm_name(args.model, "MODEL")
    return "timm"


def load_model(args: argparse.Namespace, source: str) -> Subject:
    """Load the model, in evaluation mode, on the CPU.

    Args:
        args: from :func:`s2d.ptq.command.arguments.read_arguments`.
        source: from :func:`model_source`.

    Returns:
        The model and how to feed it.

    Raises:
        ValueError: for a model that cannot be made as asked, or files that do not fit it.
        RuntimeError: if pretrained weights cannot be fetched.
        ImportError: without the package that the model is of.

    Paper: none
    """
    if source == "onnx":
        return _onnx_model(Path(args.model))
    if source == "open_clip":
        return _open_clip_model(args.model)
    if source in ("folder", "hub", "gguf"):
        return _folder_model(args, _folder_of(args.model, source))
    if source == "timm folder":
        return _timm_folder_model(Path(args.model))
    return _timm_model(args, source)


def _use_preset(args: argparse.Namespace) -> None:
    preset = PRESETS[args.model]
    _refuse_options(args, f"the preset {args.model}", "arch", "model_options")
    if preset.note:
        say(f"note: {args.model}: {preset.note}")
    args.pretrained = preset.source == "timm"
    args.model = preset.identifier if preset.module is None else str(locate(args.model))


def _folder_of(name: str, source: str) -> Path:
    """The folder of Hugging Face that a name stands for, fetched or converted if need be."""
    if source == "folder":
        return Path(name)
    if source == "gguf":
        with Path(name).open("rb") as stream:
            return as_folder(Path(name), hashlib.file_digest(stream, "sha256").hexdigest())
    hub = need("huggingface_hub", "a model of the hub")
    try:
        return Path(hub.snapshot_download(name, allow_patterns=["*.json", "*.safetensors", "*.txt", "*.model"]))
    except Exception as error:  # of the network, the hub, or its cache, each of its own class
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise RuntimeError(
            f"{name} is not here and cannot be fetched ({reason}): where there is a network, hf download {name}; then "
            "give the folder"
        ) from None


def _onnx_model(file: Path) -> Subject:
    timm, model = need("timm", "the model"), dinov2(file)
    config = data_config(timm, model, {})
    preprocess = _timm_preprocessing(timm, config)
    return Subject(model, f"{file} (DINOv2 of timm)", None, config["input_size"], preprocess=preprocess)


OPEN_CLIP = "open_clip:"
HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")


def _check_open_clip_name(text: str) -> None:
    open_clip = need("open_clip", "the model")
    name, _, weights = text.removeprefix(OPEN_CLIP).partition("/")
    known = open_clip.list_models()
    if name not in known:
        close = difflib.get_close_matches(name, known, n=1)
        raise ValueError(
            f"MODEL {text!r} names no model of open_clip: "
            + (f"did you mean {close[0]!r}?" if close else "see its list")
        )
    tags = open_clip.list_pretrained_tags_by_model(name)
    if weights and weights not in tags:
        raise ValueError(f"MODEL {text!r}: {name} has no weights {weights!r}: choose among {', '.join(tags) or 'none'}")


def _open_clip_model(text: str) -> Subject:
    open_clip = need("open_clip", "the model")
    name, _, weights = text.removeprefix(OPEN_CLIP).partition("/")
    # With the activation that the weights were trained with, whatever the name of the architecture says.
    quick = bool(weights) and bool((open_clip.get_pretrained_cfg(name, weights) or {}).get("quick_gelu"))
    try:
        model, _, preprocess = open_clip.create_model_and_transforms(
            name, pretrained=weights or None, force_quick_gelu=quick
        )
    except Exception as error:  # of the network or the hub
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise RuntimeError(f"{text} could not be fetched ({reason}): its weights need a network") from None
    if not weights:
        say(f"warning: random weights: accuracy means nothing; add weights, such as {text}/openai")
    size = open_clip.get_model_preprocess_cfg(model)["size"]
    size = tuple(size) if isinstance(size, (list, tuple)) else (size, size)
    return Subject(model.visual.eval(), f"{text} (image tower)", None, (3, *size), preprocess=preprocess)


def _refuse_options(args: argparse.Namespace, what: str, *names: str) -> None:
    for name in names:
        if getattr(args, name):
            raise ValueError(f"--{name.replace('_', '-')} is not for {what}: leave it out")


def _check_timm_name(name: str, option: str) -> None:
    timm = need("timm", "the model")
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
    timm = need("timm", "the model")
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
        say("warning: random weights: accuracy means nothing; add --pretrained, or give a file with --arch")
    config = data_config(timm, model, args.model_options)
    return Subject(model.eval(), name, None, config["input_size"], preprocess=_timm_preprocessing(timm, config))


def _timm_folder_model(folder: Path) -> Subject:
    timm, config = need("timm", "the model"), _read_config(folder)
    try:
        model = timm.create_model(f"local-dir:{folder}", pretrained=True)
    except Exception as error:  # of timm, torch or the safetensors package
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(f"MODEL {folder} cannot be loaded by timm ({reason}): save it again") from None
    data = data_config(timm, model, {})
    subject = Subject(model.eval(), f"{folder} ({config['architecture']})", None, data["input_size"])
    subject.preprocess = _timm_preprocessing(timm, data)
    names = config.get("label_names") or (model.pretrained_cfg or {}).get("label_names") or []
    subject.label_ids = {name: label for label, name in enumerate(names)}
    return subject


def _load_weights(model: nn.Module, file: Path, arch: str) -> None:
    state = read_safetensors(file, "MODEL", "copy or save it again")
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


def data_config(timm: Any, model: nn.Module, options: dict[str, Any]) -> dict[str, Any]:
    """What timm's preprocessing of a model needs: its size, mean, standard deviation, crop and interpolation.

    Args:
        timm: the module.
        model: of timm.
        options: that it was made with, of which ``in_chans`` counts.

    Paper: none
    """
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


def _folder_model(args: argparse.Namespace, folder: Path) -> Subject:
    transformers = need("transformers", "a Hugging Face folder")
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    architecture = next(iter(_read_config(folder).get("architectures") or ["AutoModel"]))
    kinds = {"ForCausalLM": "AutoModelForCausalLM", "LMHeadModel": "AutoModelForCausalLM"}
    kinds["ForImageClassification"] = "AutoModelForImageClassification"
    kinds["ForConditionalGeneration"] = "AutoModelForImageTextToText"
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
        say(f"warning: {folder} has no {', '.join(missing[:3])} ({len(missing)} missing in all): these are random")
    config = model.config
    if hasattr(config, "use_cache"):
        config.use_cache = False  # nothing is generated
    argument = model.main_input_name
    if argument == "input_ids":
        limit = getattr(config, "max_position_embeddings", None) or args.sequence_length
        if args.sequence_length > limit:
            raise ValueError(f"--sequence-length is {args.sequence_length}, the model takes {limit}: give at most that")
        subject = Subject(model.eval(), f"{folder} ({architecture})", argument, (args.sequence_length,))
        subject.vocabulary, subject.folder = config.get_text_config().vocab_size, folder
        subject.padding = getattr(config, "pad_token_id", None) if kind == "AutoModel" else None
        return subject
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

    @cache  # said once, and only where there are images to preprocess
    def note() -> None:
        say(f"note: {folder} has no preprocessor_config.json: images are resized, cropped, normalised with 0.5, 0.5")

    def preprocess(image: Any) -> Tensor:
        note()
        image = image.convert(mode)
        factor = max(size[1] / image.width, size[0] / image.height)
        image = image.resize((max(round(image.width * factor), size[1]), max(round(image.height * factor), size[0])))
        left, top = (image.width - size[1]) // 2, (image.height - size[0]) // 2
        image = image.crop((left, top, left + size[1], top + size[0]))
        data = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8).view(*size, channels)
        return data.permute(2, 0, 1).float() / 127.5 - 1

    return preprocess
