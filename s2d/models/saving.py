"""A model as an ordinary checkpoint of its own library."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from s2d.models.loading import data_config
from s2d.models.subject import Subject
from s2d.packages import need

COMPANIONS = (".json", ".txt", ".model", ".md", ".jinja")  # tokenizer, preprocessing, licence


def save_checkpoint(subject: Subject, folder: Path, state: Mapping[str, Tensor] | None = None) -> None:
    """Fill an existing folder with what :func:`s2d.models.load` reads.

    A model of Hugging Face becomes a folder of ``save_pretrained`` with the files that came beside its weights; one of
    timm ``model.safetensors`` and the ``config.json`` that timm's ``local-dir:`` reads; any other its weights alone.

    Args:
        subject: its ``model`` is saved; ``folder``, ``label_ids`` and ``shape`` say the rest.
        folder: to be filled.
        state: of a model of Hugging Face, where its own tensors are shards; by default its ``state_dict()``.

    Raises:
        ImportError: without a package that writes it.

    Example:
        >>> import tempfile
        >>> from s2d.models import load
        >>> subject = load("test_vit", model_options={"num_classes": 2})
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save_checkpoint(subject, Path(folder))
        ...     load(folder).model.head.out_features
        2

    Paper: none
    """
    model = subject.model
    if subject.folder is not None:
        model.save_pretrained(folder, safe_serialization=True, state_dict=state)
        for file in subject.folder.iterdir():
            if file.is_file() and file.suffix in COMPANIONS and not (folder / file.name).exists():
                shutil.copy(file, folder / file.name)
        return
    if hasattr(model, "pretrained_cfg"):
        timm = need("timm", "saving the result")
        data = data_config(timm, model, {"in_chans": subject.shape[0]}) | {"input_size": tuple(subject.shape)}
        names = sorted(subject.label_ids, key=subject.label_ids.get)
        notes = {"label_names": names} if names else {}
        timm.models.save_for_hf(model, folder, model_config=notes, safe_serialization=True, data_config=data)
        return
    safetensors = need("safetensors.torch", "saving the result")
    state = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
    safetensors.save_file(state, folder / "model.safetensors", {"format": "pt"})
