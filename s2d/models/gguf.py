"""GGUF files (llama.cpp's): which tensors were quantized in them, and their dequantized weights as a folder."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import torch

from s2d.console import say
from s2d.files import write_folder_atomically
from s2d.models.presets import cache_folder
from s2d.packages import need


def stored_as(file: Path) -> dict[str, int]:
    """In which formats a file holds its tensors: format to how many.

    Args:
        file: a GGUF file.

    Returns:
        Such as ``{"Q4_1": 210, "F32": 61}``; whatever is not F32, F16 or BF16 was quantized already.

    Raises:
        ValueError: for a damaged file.
        ImportError: without the package gguf.

    Paper: none
    """
    return dict(Counter(tensor.tensor_type.name for tensor in _reader(file).tensors).most_common())


def _reader(file: Path) -> Any:
    gguf = need("gguf", "a GGUF file")
    try:
        return gguf.GGUFReader(file)
    except Exception as error:  # numpy's and the package's own, of a file that is cut or none at all
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(f"MODEL {file} cannot be read as GGUF ({reason}): get it again") from None


def _check_sizes(file: Path) -> None:
    """Without its sizes a network would get those of a default one, of seven billion parameters."""
    fields = _reader(file).fields
    architecture = fields.get("general.architecture")
    name = architecture.contents() if architecture is not None else "unknown"
    missing = [size for size in ("block_count", "embedding_length") if f"{name}.{size}" not in fields]
    if missing:
        raise ValueError(f"MODEL {file} (architecture {name}) lacks {', '.join(missing)}: get it again")


def as_folder(file: Path, digest: str) -> Path:
    """The dequantized weights as a folder of Hugging Face, made once and kept in the cache.

    Args:
        file: a GGUF file of a causal language model that transformers knows.
        digest: of the file, which names the folder.

    Returns:
        A folder with ``config.json``, ``model.safetensors`` (float32) and the tokenizer.

    Raises:
        ValueError: for a file that transformers cannot read.
        ImportError: without the packages gguf, transformers or safetensors.

    Paper: none
    """
    folder = cache_folder() / f"gguf-{digest[:16]}"
    if (folder / "model.safetensors").is_file():
        return folder
    _check_sizes(file)
    formats = ", ".join(f"{count} x {name}" for name, count in stored_as(file).items())
    say(f"note: {file.name} holds {formats}: what is quantized there stays as coarse as it is")
    say(f"converting {file.name}, once (about two minutes) ...")
    transformers, safetensors = need("transformers", "a GGUF file"), need("safetensors.torch", "a GGUF file")
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    options = {"gguf_file": file.name, "local_files_only": True}
    try:
        model = transformers.AutoModelForCausalLM.from_pretrained(file.parent, dtype=torch.float32, **options)
        tokenizer = transformers.AutoTokenizer.from_pretrained(file.parent, **options)
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(f"MODEL {file} cannot be converted ({reason}): give a model that transformers knows") from None

    def write(target: Path) -> None:
        config = model.config.to_dict() | {"architectures": [type(model).__name__], "torch_dtype": "float32"}
        for name in ("quantization_config", "_name_or_path"):
            config.pop(name, None)
        (target / "config.json").write_text(json.dumps(config, indent=1, default=str), encoding="utf-8")
        # One tensor of those that share memory (the embedding and the head).
        state, seen = {}, set()
        for name, tensor in model.state_dict().items():
            if tensor.data_ptr() not in seen:
                seen.add(tensor.data_ptr())
                state[name] = tensor.contiguous()
        safetensors.save_file(state, target / "model.safetensors", {"format": "pt"})
        tokenizer.save_pretrained(target)

    folder.parent.mkdir(parents=True, exist_ok=True)
    write_folder_atomically(folder, write)
    return folder
