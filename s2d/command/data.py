"""Data of a command as a stream of batches, so that memory does not grow with it."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from s2d.console import say
from s2d.models.subject import Subject
from s2d.ptq.command.items import RANDOM, Items, open_items
from s2d.ptq.command.ready import ready


def open_data(text: str, option: str, subject: Subject, args: argparse.Namespace) -> Items:
    """The items that a data argument names, for a model.

    Args:
        text, option: the argument, and its name.
        subject: the model.
        args: with ``seed``, ``sequence_length`` and ``images``, the number of random items.

    Raises:
        ValueError: for data that does not exist, or is not what the model takes.
        ImportError: without a package that reading it needs.

    Paper: none
    """
    if text == RANDOM:
        say(f"warning: {option} random: what is measured says nothing about the model on real data")
    return ready(open_items(text, option), text, option, subject, args)


class Stream:
    """Items, a batch at a time; files that cannot be read are named and counted.

    Args:
        items, positions: what to read, in this order.
        subject: the model, for what it is called with.
        args: with ``batch_size``, ``device`` and ``strict``, whether an unreadable file is an error.

    Attributes:
        unreadable: the files passed over.
    """

    def __init__(self, items: Items, positions: list[int], subject: Subject, args: argparse.Namespace) -> None:
        self.items, self.positions, self.subject, self.args = items, positions, subject, args
        self.unreadable: list[Path] = []

    def __iter__(self) -> Iterator[Any]:
        size = self.args.batch_size
        for start in range(0, len(self.positions), size):
            read = [self._read(position) for position in self.positions[start : start + size]]
            read = [item for item in read if item is not None]
            if read:
                yield self.subject.batch(torch.cat(read).to(self.args.device))

    def _read(self, position: int) -> Tensor | None:
        try:
            return self.items.read([position])
        except ValueError as error:
            if self.args.strict or not self.items.files:
                raise
            file = self.items.files[position]
            if file not in self.unreadable:
                self.unreadable.append(file)
                say(f"warning: passed over: {error}")
            return None
