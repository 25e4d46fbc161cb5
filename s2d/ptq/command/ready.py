"""Items and a model brought together: what is calibrated on, and what is tested on."""

from __future__ import annotations

import argparse
from collections.abc import Hashable
from pathlib import Path

import torch
from torch import Tensor

from s2d.console import say
from s2d.models.subject import Subject
from s2d.ptq.command.images import read_image
from s2d.ptq.command.items import RANDOM, Items, lines_of_text, text_file

RANDOM_TEST_ITEMS = 64


def ready(items: Items | None, text: str, option: str, subject: Subject, args: argparse.Namespace) -> Items:
    """Items that can be read, now that the model is known.

    Args:
        items: from :func:`s2d.ptq.command.items.open_items`.
        text, option: the argument they come from, and its name.
        subject: the model.
        args: for the number of random items, the seed and the length of sequences.

    Returns:
        The items, changed in place where there were some; random ones and those of a text are made here.

    Raises:
        ValueError: for items that are not what the model takes.
        ImportError: without a package that reading them needs.

    Paper: none
    """
    if items is None:
        return _random_items(option, subject, args) if text == RANDOM else _text_items(text, option, subject, args)
    if items.kind != subject.kind:
        raise ValueError(f"{option} {text} holds {items.kind}, the model takes {subject.kind}: give {subject.kind}")
    if items.files:
        mode = "L" if subject.shape[0] == 1 else "RGB"
        items.read = lambda positions: torch.stack(
            [subject.preprocess(read_image(items.files[i], mode)) for i in positions]
        )
    if items.classes and all(name in subject.label_ids for name in items.classes):
        items.labels = [subject.label_ids[items.classes[label]] for label in items.labels]
        items.classes = []  # the model knows them by name: their number and order mean nothing
    return items


def _random_items(option: str, subject: Subject, args: argparse.Namespace) -> Items:
    is_test = option == "--test"
    count = RANDOM_TEST_ITEMS if is_test else args.images
    data = subject.random(count, args.seed + is_test)
    return Items(RANDOM, subject.kind, [(option, i) for i in range(count)], read=lambda positions: data[positions])


def _text_items(text: str, option: str, subject: Subject, args: argparse.Namespace) -> Items:
    if subject.kind != "sequences":
        raise ValueError(f"{option} {text} is a text, the model takes images: give images")
    try:
        tokenizer = subject.tokenizer()
    except ValueError as error:
        raise ValueError(f"{option} {text}: {error}") from None
    if subject.padding is not None:
        return lines_of_text(Path(text), tokenizer, args.sequence_length, subject.padding, option)
    return text_file(Path(text), tokenizer, args.sequence_length, option)


def draw_calibration(items: Items, args: argparse.Namespace) -> list[int]:
    """Positions of the calibration items; ValueError if there are too few."""
    chosen = items.draw(args.images, args.seed, set())
    if len(chosen) < args.images:
        raise ValueError(
            f"--images is {args.images}, {args.calibration} has {len(chosen)}: give fewer --images, or more data"
        )
    return chosen


def draw_tests(items: Items, used: set[Hashable], args: argparse.Namespace) -> list[int]:
    """Positions of the test items, without those whose keys are used; ValueError if none are left."""
    tested = items.draw(args.test_images, args.seed, used)
    shared = sum(key in used for key in items.keys)
    if not tested:
        raise ValueError(
            f"--test {args.test}: all its {len(items.keys)} items are calibration items: give fewer --images or other "
            "data"
        )
    if shared:
        say(f"note: --test {args.test} holds {shared} of the calibration items: it is tested on {len(tested)} others")
    return tested


def check_labels(items: Items, found: Tensor, option: str) -> None:
    """ValueError unless the labels, if there are any, are classes of a model whose logits are given."""
    if items.labels is None:
        return
    if found.ndim != 2 or max(items.labels) >= found.shape[1] or min(items.labels) < 0:
        raise ValueError(
            f"{option} {items.source} has labels up to {max(items.labels)}, the model's output has shape "
            f"(N, {', '.join(map(str, found.shape[1:]))}): give data of the model's classes, or without labels"
        )
    if items.classes and len(items.classes) != found.shape[1]:
        raise ValueError(
            f"{option} {items.source} has {len(items.classes)} class folders, the model {found.shape[1]} outputs: "
            "folders in alphabetical order are taken for classes 0, 1, ...; give one folder for each class"
        )
