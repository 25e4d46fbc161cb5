"""Labelled images: folders, WebDataset shards and Hugging Face sets, each image to be asked for by its number."""

from __future__ import annotations

import io
import re
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from glob import glob
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from s2d.packages import need
from s2d.ptq.command.images import is_hidden, read_image
from s2d.ptq.command.items import IMAGE_ENDINGS
from s2d.train.order import seed_everything, seed_from

WDS, HFDS = "wds/", "hfds/"
SPLITS = {"train", "training", "val", "validation", "test"}


@dataclass
class Labelled:
    """Images and their classes, without reading the images.

    Attributes:
        source: as it was given.
        reader: ``reader[i]`` is an open stream and a label, as timm's readers have it.
        labels: class of each image.
        classes: their names, in the order of the labels; empty where there are none.
    """

    source: str
    reader: Any
    labels: list[int]
    classes: list[str]

    def __len__(self) -> int:
        return len(self.labels)


def open_images(source: str, option: str, classes: Sequence[str] = ()) -> Labelled:
    """What a data argument names.

    Args:
        source: a folder with a folder for each class; ``wds/`` and a pattern of tar files; or ``hfds/`` and a name of
            the hub or a folder, with ``:SPLIT`` behind it (default: train).
        option: the argument's name.
        classes: of the training data, whose labels these must have.

    Raises:
        ValueError: for what does not exist, holds no labelled images, or other classes.
        ImportError: without a package that reading it needs.

    Paper: none.
    """
    if source.startswith(WDS):
        found = _shards(source, option)
    elif source.startswith(HFDS):
        found = _hugging_face(source, option)
    else:
        found = _folder(source, option, classes)
    if not found.labels:
        raise ValueError(f"{option} {source} holds no images: give data that does")
    if min(found.labels) < 0:
        raise ValueError(f"{option} {source} has the label {min(found.labels)}: classes are 0, 1, ...")
    if classes and found.classes and found.classes != list(classes):
        raise ValueError(f"{option} {source} names other classes than the training data, or in another order")
    return found


def _folder(source: str, option: str, classes: Sequence[str]) -> Labelled:
    timm, path = need("timm.data", "images"), Path(source)
    if not path.is_dir():
        raise ValueError(f"{option} {source} does not exist: give a folder of images, wds/PATTERN or hfds/NAME")
    names = sorted(child.name for child in path.iterdir() if child.is_dir() and not is_hidden(child))
    if names and set(names) <= SPLITS:
        raise ValueError(f"{option} {source} holds {', '.join(names)}: give one of these folders")
    if len(names) < 2 and not classes:
        raise ValueError(f"{option} {source} holds {len(names)} folders: give a folder with one for each class")
    strange = [name for name in names if classes and name not in classes]
    if strange:
        raise ValueError(f"{option} {source} has classes that the training data lacks: {', '.join(strange[:3])}")
    ids = {name: label for label, name in enumerate(classes or names)}
    try:
        reader = timm.create_dataset("", root=source, search_split=False, class_map=ids).reader
    except RuntimeError as error:
        raise ValueError(f"{option} {source}: {str(error).splitlines()[0]}") from None
    reader.samples = [(file, label) for file, label in reader.samples if not is_hidden(Path(file))]
    return Labelled(source, reader, [label for _, label in reader.samples], list(ids))


def _hugging_face(source: str, option: str) -> Labelled:
    timm, datasets = need("timm.data", "images"), need("datasets", f"{option} {source}")
    name, _, split = source.removeprefix(HFDS).partition(":")
    datasets.utils.disable_progress_bars()
    try:
        reader = timm.create_dataset(f"{HFDS}{name}", root=None, split=split or "train").reader
        labels = list(reader.iter_targets())
    except Exception as error:  # of the hub, the network, or a table of another form, each of its own class
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(
            f"{option} {source} cannot be read ({reason}): give a name of the hub, or a folder that "
            "datasets.load_dataset reads, with columns image and label"
        ) from None
    if not all(isinstance(label, int) for label in labels):
        raise ValueError(f"{option} {source} has labels that are no whole numbers: give it a ClassLabel column")
    return Labelled(source, reader, labels, sorted(reader.class_to_idx, key=reader.class_to_idx.get))


def _shards(source: str, option: str) -> Labelled:
    pattern = source.removeprefix(WDS)
    patterns = [f"{pattern}/*.tar"] if Path(pattern).is_dir() else _braces(pattern)
    files = sorted({file for one in patterns for file in glob(one)})
    missing = [one for one in patterns if not glob(one)]
    if missing:
        raise ValueError(
            f"{option} {source}: there is no {missing[0]}: give tar files on a disk, such as wds/train-{{000..099}}.tar"
        )
    reader = ShardReader(files, option)
    return Labelled(source, reader, [label for *_, label in reader.samples], [])


def _braces(pattern: str) -> list[str]:
    """The names that a pattern such as ``a-{00..11}.tar`` stands for."""
    found = re.search(r"\{(\d+)\.\.(\d+)\}", pattern)
    if found is None:
        return [pattern]
    first, last = found.groups()
    numbers = [f"{number:0{len(first)}}" for number in range(int(first), int(last) + 1)]
    return [name for number in numbers for name in _braces(pattern[: found.start()] + number + pattern[found.end() :])]


class ShardReader:
    """The images of WebDataset shards by their number, as timm's readers give them.

    A WebDataset is made to be streamed, in an order that depends on the number of workers. Here the headers of the tar
    files are read once, so that any order can be taken, and a run resumed in its middle.

    Args:
        files: tar files on a disk, whose samples have an image and a ``.cls`` with the number of its class.
        option: the argument they come from, for messages.

    Attributes:
        samples: file, offset, size and label of each image.

    Raises:
        ValueError: for a damaged file, and an image without a class.

    Paper: none.
    """

    def __init__(self, files: Sequence[str], option: str) -> None:
        self.samples: list[tuple[str, int, int, int]] = []
        for file in files:
            images: dict[str, tarfile.TarInfo] = {}
            labels: dict[str, int] = {}
            try:
                with tarfile.open(file, "r:") as shard:
                    for member in shard:
                        folder, slash, name = member.name.rpartition("/")
                        stem, _, ending = name.partition(".")
                        if not member.isfile() or is_hidden(Path(name)):
                            continue
                        if f".{ending.lower()}" in IMAGE_ENDINGS:
                            images[folder + slash + stem] = member
                        elif ending == "cls":
                            labels[folder + slash + stem] = int(shard.extractfile(member).read())
            except (tarfile.TarError, OSError, ValueError) as error:
                raise ValueError(f"{option}: {file} is no shard of labelled images ({error}): repair it") from None
            lacking = [key for key in images if key not in labels]
            if lacking:
                raise ValueError(f"{option}: {file}: image {lacking[0]} has no .cls with the number of its class")
            self.samples += [(file, m.offset_data, m.size, labels[key]) for key, m in images.items()]

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[io.BytesIO, int]:
        file, offset, size, label = self.samples[index]
        with open(file, "rb") as shard:
            shard.seek(offset)
            return io.BytesIO(shard.read(size)), label


class Pictures(Dataset):
    """Images as tensors. An item is asked for by epoch and index, and its augmentation depends on these alone.

    Args:
        images: from :func:`open_images`.
        transform: of timm, from a PIL image to a tensor.
        mode: of the PIL image, ``"RGB"`` or ``"L"``.
        seed: of the run; None for a transform without randomness.

    Paper: none.
    """

    def __init__(self, images: Labelled, transform: Any, mode: str, seed: int | None = None) -> None:
        self.images, self.transform, self.mode, self.seed = images, transform, mode, seed

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, key: tuple[int, int]) -> tuple[Tensor, int]:
        epoch, index = key
        stream, label = self.images.reader[index]
        try:
            with stream:
                image = read_image(stream, self.mode)
        except ValueError as error:
            name = getattr(stream, "name", f"image {index} of {self.images.source}")
            raise ValueError(f"{name}: {error}") from None
        if self.seed is not None:
            seed_everything(seed_from(self.seed, "image", epoch, index))
        return self.transform(image), label


def batches_of(
    pictures: Pictures, keys: Sequence[Sequence[tuple[int, int]]], workers: int, pin: bool
) -> Iterator[tuple[Tensor, Tensor]]:
    """Images and labels of the given keys, batch by batch in their order.

    Args:
        pictures: what is read.
        keys: epoch and index of each image of each batch.
        workers: processes that read.
        pin: whether batches are put where a GPU copies from quickly.

    Raises:
        ValueError: for an image that cannot be read.

    Paper: none.
    """
    try:
        yield from DataLoader(pictures, batch_sampler=keys, num_workers=workers, pin_memory=pin)
    except ValueError as error:  # a worker's is a whole traceback, whose last line says what it was
        raise ValueError(str(error).splitlines()[-1].removeprefix("ValueError: ")) from None
