"""A model, and how to feed it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from s2d.layers import linear_maps
from s2d.packages import need
from s2d.ptq.trace import call, tensors_of


@dataclass
class Subject:
    """A model, and how to feed it.

    Attributes:
        model: in evaluation mode.
        name: for the table.
        argument: name of the argument that takes the data; None for the first.
        shape: of an item.
        vocabulary: number of tokens; None for images.
        folder: of a Hugging Face model.
        padding: the token that fills up items, of a model that does not predict the next token; its items are lines.
        preprocess: PIL image to tensor.
        label_ids: class name to label, of a Hugging Face model.
    """

    model: nn.Module
    name: str
    argument: str | None
    shape: tuple[int, ...]
    vocabulary: int | None = None
    folder: Path | None = None
    padding: int | None = None
    preprocess: Callable[[Any], Tensor] | None = None
    label_ids: dict[str, int] = field(default_factory=dict)

    @property
    def kind(self) -> str:
        return "images" if self.vocabulary is None else "sequences"

    def batch(self, data: Tensor) -> Any:
        """What the model is called with."""
        if self.argument is None:
            return data
        mask = {} if self.padding is None else {"attention_mask": (data != self.padding).long()}
        return {self.argument: data} | mask

    def watch(self) -> tuple[str, ...]:
        """Names of the linear layers inside the repeated blocks: all but embeddings and heads."""
        return tuple(name for name in linear_maps(self.model) if any(part.isdigit() for part in name.split(".")))

    def tokenizer(self) -> Any:
        """The tokenizer in the model's folder.

        Raises:
            ValueError: where there is none.
            ImportError: without the package transformers.
        """
        names = ("tokenizer.json", "tokenizer_config.json")
        if self.folder is None or not any((self.folder / name).exists() for name in names):
            raise ValueError(f"{self.folder or self.name} has no tokenizer: add it, or give input_ids")
        return need("transformers", "a text").AutoTokenizer.from_pretrained(self.folder, local_files_only=True)

    def sentences(self, texts: Sequence[str]) -> dict[str, Tensor]:
        """What the model is called with for some sentences, marked, padded to the longest and cut to the item's length.

        Raises:
            ValueError: for a model without a tokenizer.
            ImportError: without the package transformers.
        """
        tokenizer = self.tokenizer()
        tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token  # a language model may have none; it is masked
        options = {"padding": True, "truncation": True, "max_length": self.shape[0], "return_tensors": "pt"}
        found = tokenizer(list(texts), **options)
        return {name: found[name] for name in ("input_ids", "attention_mask")}

    def random(self, count: int, seed: int) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        if self.vocabulary is not None:
            return torch.randint(self.vocabulary, (count, *self.shape), generator=generator)
        return torch.randn(count, *self.shape, generator=generator)


def logits(output: Any) -> Tensor:
    """The logits among a model's outputs, or the first of its tensors that is in floating point."""
    found = getattr(output, "logits", None)
    if isinstance(found, Tensor):
        return found
    return next(tensor for tensor in tensors_of(output) if tensor.is_floating_point())


def probe(subject: Subject, data: Tensor, option: str) -> Tensor:
    """The logits of one item; ValueError if the model cannot take it."""
    try:
        with torch.no_grad():
            return logits(call(subject.model, subject.batch(data)))
    except Exception as error:  # whatever a model does with data of the wrong shape
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(
            f"{option}: the model cannot take an item of shape {tuple(data.shape[1:])} ({reason}): give data of the "
            "size it was built for, or build it for this size (--model-options)"
        ) from None
