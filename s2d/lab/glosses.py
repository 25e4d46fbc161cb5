"""WordNet's glosses: 117,000 short definitions, each from one of 45 lexicographer files (noun.animal, verb.motion).

Which file a definition comes from is a real classification task on real text, with a free licence and no download from
a hub: Debian packages the files (``wordnet-base``, 6 MB).
"""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from s2d.lab.sentence_encoder import tokenizer_file

FILES = {
    "data.noun": "fea17d2f9656611334eac790e5d69e47645fa180c4aa481fb4cd9b3520754ca2",
    "data.verb": "adcf43e35b581e8036d8b5a52d63d9cd3d3b4870b2720d3c03c799df44777bc2",
    "data.adj": "c89120dfc1f046ddff4a631bf9b7e9fa1a36b5e86565a23bf82dbe14f30b88a7",
    "data.adv": "444a63bf3955080ab7524f5079cfc07ff9bc682cb98bdb1db73b0fb9829f1139",
}
"""WordNet 3.0: file to SHA-256."""
CLASSES = 45
# The split is over glosses, made once with a fixed seed, before anything else touches the data; the rest is trained on.
SPLIT_SEED = 20260222
HELD_OUT = {"validation": 4000, "calibration": 1000, "test": 4000}
SPLITS = ("train", *HELD_OUT)


def wordnet_folder() -> Path:
    """Where WordNet's files are: ``$S2D_WORDNET``, else where Debian puts them."""
    return Path(os.environ.get("S2D_WORDNET") or "/usr/share/wordnet")


@cache
def _glosses(folder: Path) -> tuple[tuple[str, ...], np.ndarray]:
    first: dict[str, int] = {}
    for name, digest in FILES.items():
        path = folder / name
        if not path.is_file():
            raise FileNotFoundError(
                f"no {path}: install Debian's package wordnet-base, or unpack it anywhere (apt-get download "
                "wordnet-base && dpkg -x wordnet-base_*.deb FOLDER) and set S2D_WORDNET=FOLDER/usr/share/wordnet"
            )
        content = path.read_bytes()
        found = hashlib.sha256(content).hexdigest()
        if found != digest:
            raise ValueError(
                f"{path} has the SHA-256 {found}, and WordNet 3.0's is {digest}: install wordnet-base anew"
            )
        for line in content.decode("latin-1").splitlines():
            if not line.startswith("  "):  # the licence
                head, _, gloss = line.partition(" | ")
                definition = gloss.partition('"')[0].strip(" ;")  # what follows are examples of use
                # The same words can define two synsets; kept twice, one could be trained on and the other tested.
                first.setdefault(definition, int(head.split()[1]))
    first.pop("", None)
    return tuple(first), np.array(list(first.values()), dtype=np.int64)


def glosses() -> tuple[tuple[str, ...], np.ndarray]:
    """Every definition once, and the number of its lexicographer file.

    Returns:
        Texts, and labels ``(n,)`` from 0 to 44.

    Raises:
        FileNotFoundError: naming the package to install.
        ValueError: if a file is not WordNet 3.0's.

    Paper: none.
    """
    return _glosses(wordnet_folder())


@cache
def _split(split: str, total: int) -> np.ndarray:
    order = np.random.default_rng(SPLIT_SEED).permutation(total)
    ends = dict(zip(HELD_OUT, np.cumsum(list(HELD_OUT.values())).tolist(), strict=True))
    if split == "train":
        return order[ends["test"] :]
    return order[ends[split] - HELD_OUT[split] : ends[split]]


def split_indices(split: str) -> np.ndarray:
    """Indices of the glosses of one split; the four are disjoint and cover everything.

    Args:
        split: ``train``, ``validation``, ``calibration`` or ``test``.

    Raises:
        ValueError: for an unknown split.

    Paper: none.
    """
    if split not in SPLITS:
        raise ValueError(f"unknown split {split!r}: choose one of {', '.join(SPLITS)}")
    return _split(split, len(glosses()[0]))


@cache
def _tokenizer(path: Path, tokens: int):
    from tokenizers import Tokenizer  # comes with transformers

    tokenizer = Tokenizer.from_file(str(path))
    tokenizer.enable_truncation(tokens)
    tokenizer.enable_padding(length=tokens)
    return tokenizer


@dataclass(frozen=True)
class Glosses:
    """The data recipe: which encoder's tokens, and how many.

    Attributes:
        encoder: whose tokenizer is used, see :class:`s2d.lab.sentence_encoder.SentenceEncoder`.
        tokens: length of every item; 32 cut one definition in a hundred.
    """

    encoder: str = "minilm"
    tokens: int = 32

    def __post_init__(self) -> None:
        if self.tokens < 3:
            raise ValueError(f"tokens is {self.tokens}: give at least 3, two of which mark beginning and end")

    @property
    def item_shape(self) -> tuple[int, ...]:
        """What one item is: token numbers."""
        return (self.tokens,)

    def _items(self, chosen: np.ndarray) -> tuple[Tensor, Tensor]:
        texts, labels = glosses()
        encoded = _tokenizer(tokenizer_file(self.encoder), self.tokens).encode_batch([texts[i] for i in chosen])
        return torch.tensor([item.ids for item in encoded]), torch.from_numpy(labels[chosen])

    def training_batch(self, batch_size: int, *, seed: int, step: int) -> tuple[Tensor, Tensor]:
        """The batch of one training step: a pure function of seed and step, so a resumed run sees the same data.

        Args:
            batch_size: number of glosses.
            seed: seed of the run.
            step: index of the step.

        Returns:
            Token numbers ``(batch_size, tokens)``, int64, and labels ``(batch_size,)``.
        """
        pool = split_indices("train")
        return self._items(pool[np.random.default_rng([seed, step]).integers(0, len(pool), size=batch_size)])

    def fixed_set(self, split: str, n: int | None = None, *, seed: int = 0) -> tuple[Tensor, Tensor]:
        """A fixed set of glosses from one split, none of them twice.

        Args:
            split: ``validation``, ``calibration`` or ``test`` (``train`` works too).
            n: number of glosses; ``None`` uses all.
            seed: which are drawn.

        Returns:
            Token numbers ``(n, tokens)``, int64, and labels ``(n,)``.

        Raises:
            ValueError: if ``n`` is not positive or more than there are, or the split is unknown.
        """
        pool = split_indices(split)
        n = len(pool) if n is None else n
        if not 1 <= n <= len(pool):
            raise ValueError(f"n is {n}: the {split} split has 1 to {len(pool)} glosses")
        return self._items(np.random.default_rng([SPLIT_SEED, SPLITS.index(split), seed]).permutation(pool)[:n])
