"""Calibration and test data: what there is, without reading all of it."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from s2d.console import say
from s2d.models.weights import read_safetensors
from s2d.packages import need
from s2d.ptq.command.images import is_hidden

IMAGE_ENDINGS = {".bmp", ".gif", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp"}
TEXT_ENDINGS = {".md", ".txt"}
RANDOM = "random"


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
        classes: names of the classes whose positions are the labels, if known.
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


def open_items(text: str, option: str) -> Items | None:
    """What a data argument names.

    Args:
        text: the argument.
        option: its name.

    Returns:
        The items; None for random data, which waits for the model, and for a text, which waits for its tokenizer.

    Raises:
        ValueError: for what does not exist, or holds no data of a known kind.
        ImportError: without a package that reading it needs.

    Paper: none
    """
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
    found = (path for path in folder.iterdir() if path.suffix.lower() in IMAGE_ENDINGS and not is_hidden(path))
    return sorted(path for path in found if path.is_file())


def _image_folder(folder: Path, option: str) -> Items:
    need("PIL.Image", "a folder of images")
    flat = _images_in(folder)
    classes = [path for path in sorted(folder.iterdir()) if path.is_dir() and not is_hidden(path)]
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
    tensors = read_safetensors(path, option, "write it with safetensors.torch.save_file")
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


def _text(path: Path, option: str) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{option} {path} is not UTF-8 ({error}): convert it") from None


def lines_of_text(path: Path, tokenizer: Any, length: int, padding: int, option: str) -> Items:
    """An item a line, as the tokenizer marks its beginning and end, filled up or cut to ``length`` tokens."""
    lines = [line for line in map(str.strip, _text(path, option).splitlines()) if line]
    if not lines:
        raise ValueError(f"{option} {path} has no line of text: give a text with an item a line")
    ids = tokenizer(lines, truncation=True, max_length=length)["input_ids"]
    cut = sum(len(line) == length for line in ids)
    if cut:
        say(f"note: {option} {path}: {cut} of {len(ids)} lines fill {length} tokens or were cut to them")
    rows = torch.full((len(ids), length), padding, dtype=torch.long)
    for row, tokens in zip(rows, ids, strict=True):
        row[: len(tokens)] = torch.tensor(tokens)
    return Items(str(path), "sequences", [(path.resolve(), line) for line in lines], read=lambda chosen: rows[chosen])


def text_file(path: Path, tokenizer: Any, length: int, option: str) -> Items:
    """Items of ``length`` tokens each, one after the other; what is left over at the end is dropped."""
    text = _text(path, option)
    ids = torch.tensor(tokenizer(text, add_special_tokens=False)["input_ids"], dtype=torch.long)
    count = len(ids) // length
    if count == 0:
        raise ValueError(f"{option} {path} has {len(ids)} tokens: give a longer text, or fewer --sequence-length")
    rows = ids[: count * length].view(count, length)
    keys = [(path.resolve(), index) for index in range(count)]
    return Items(str(path), "sequences", keys, read=lambda positions: rows[positions])
