"""The order of the data, and all that is random: functions of the seed and of numbers, with no state to be kept."""

from __future__ import annotations

import random
from collections.abc import Iterator

import torch
from torch.utils.data import Sampler

from s2d.packages import need

STREAMS = ("order", "image", "batch", "calibration", "head")  # what randomness is for


def seed_from(seed: int, stream: str, *numbers: int) -> int:
    """A seed for one purpose, item or step, so that no state of a generator has to be kept.

    Args:
        seed: of the run.
        stream: one of ``STREAMS``.
        numbers: such as epoch and index.

    Example:
        >>> seed_from(0, "image", 1, 2) == seed_from(0, "image", 1, 2) != seed_from(0, "image", 2, 1)
        True

    Paper: none.
    """
    numpy = need("numpy", "training")
    return int(numpy.random.SeedSequence((seed, STREAMS.index(stream), *numbers)).generate_state(1)[0])


def seed_everything(seed: int) -> None:
    """Set the generators that timm's augmentations, mixup, dropout and stochastic depth draw from.

    Paper: none.
    """
    random.seed(seed)
    need("numpy", "training").random.seed(seed)
    torch.manual_seed(seed)


def epoch_order(count: int, seed: int, epoch: int) -> list[int]:
    """The items of an epoch in the order in which they are trained on.

    Example:
        >>> sorted(epoch_order(4, seed=0, epoch=1))
        [0, 1, 2, 3]

    Paper: none.
    """
    generator = torch.Generator().manual_seed(seed_from(seed, "order", epoch))
    return torch.randperm(count, generator=generator).tolist()


def chunks_of_epoch(
    count: int, seed: int, epoch: int, batch_size: int, chunk_size: int, rank: int, ranks: int
) -> list[tuple[int, int, list[int]]]:
    """What a process reads in an epoch: for each step, the chunks of its batch that are this process's.

    Chunk ``c`` of step ``s`` holds the same items whatever the number of processes. The items that fill no batch in
    the end are left out, others each epoch.

    Args:
        count: items there are.
        seed, epoch: which order.
        batch_size: items a step, of all processes.
        chunk_size: items a chunk; ``batch_size`` is a multiple of ``chunk_size * ranks``.
        rank, ranks: this process, and how many there are.

    Returns:
        Step, number of the chunk in the step, items of the chunk, for each chunk in turn.

    Example:
        >>> [(step, chunk) for step, chunk, _ in chunks_of_epoch(9, 0, 0, 4, 2, rank=1, ranks=2)]
        [(0, 1), (1, 1)]

    Paper: none.
    """
    order = epoch_order(count, seed, epoch)
    share = batch_size // chunk_size // ranks
    found = []
    for step in range(count // batch_size):
        for chunk in range(rank * share, (rank + 1) * share):
            start = step * batch_size + chunk * chunk_size
            found.append((step, chunk, order[start : start + chunk_size]))
    return found


def shares(count: int, batch_size: int, rank: int, ranks: int) -> Iterator[tuple[list[int], int]]:
    """The items that a process evaluates, and how many of a batch count; as many batches on every process.

    Example:
        >>> list(shares(5, 2, rank=1, ranks=2))
        [([1, 3], 2), ([0], 0)]

    Paper: none.
    """
    own = list(range(rank, count, ranks))
    most = -(-count // ranks)
    for start in range(0, most, batch_size):
        here = own[start : start + batch_size]
        size = min(batch_size, most - start)
        yield here + [0] * (size - len(here)), len(here)


class EpochOrder(Sampler[int]):
    """The same order for the Trainer: whole batches of an epoch, which ``set_epoch`` chooses.

    Args:
        count: items there are.
        batch_size: items a step; what fills no batch in the end is left out, others each epoch.
        seed: of the run.

    Example:
        >>> order = EpochOrder(5, batch_size=2, seed=0)
        >>> len(order), list(order) == epoch_order(5, 0, 0)[:4]
        (4, True)

    Paper: none.
    """

    def __init__(self, count: int, batch_size: int, seed: int) -> None:
        self.count, self.length, self.seed, self.epoch = count, count // batch_size * batch_size, seed, 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch of the next iteration."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        return iter(epoch_order(self.count, self.seed, self.epoch)[: self.length])

    def __len__(self) -> int:
        return self.length
