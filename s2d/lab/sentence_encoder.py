"""A real pretrained sentence encoder with a new classification head: the model of the companion's main evidence."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from s2d.models import locate

ENCODERS = ("minilm",)
"""Presets (:data:`s2d.models.PRESETS`) that are sentence encoders."""
PADDING = 0  # token number, of BERT's vocabulary


def encoder_folder(name: str) -> Path:
    """Where an encoder's weights, configuration and tokenizer are, checked: ``$S2D_<NAME>``, else the package's folder.

    Args:
        name: one of ``ENCODERS``.

    Raises:
        FileNotFoundError: naming the command that installs it.
        ValueError: for an unknown name, or weights that are not the published ones.

    Paper: none.
    """
    if name not in ENCODERS:
        raise ValueError(f"unknown encoder {name!r}: choose among {', '.join(ENCODERS)}")
    return locate(name)


def tokenizer_file(name: str) -> Path:
    """The tokenizer of an encoder."""
    return encoder_folder(name) / "tokenizer.json"


class SentenceClassifier(nn.Module):
    """An encoder, the mean of its states over the tokens that are not padding, and a linear head.

    Args:
        encoder: BERT of transformers, without pooler.
        classes: how many the head has.
    """

    def __init__(self, encoder: nn.Module, classes: int) -> None:
        super().__init__()
        self.encoder = encoder
        self.head = nn.Linear(encoder.config.hidden_size, classes)

    @property
    def blocks(self) -> nn.ModuleList:
        """The layers, whose outputs are the residual stream (behind a norm here)."""
        return self.encoder.encoder.layer

    def no_weight_decay(self) -> set[str]:
        """Embeddings, as in timm's models."""
        return {name for name, _ in self.named_parameters() if "embeddings" in name}

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits ``(n, classes)`` of token numbers ``(n, length)``."""
        mask = tokens != PADDING
        states = self.encoder(input_ids=tokens, attention_mask=mask.long()).last_hidden_state
        weights = mask[..., None].to(states.dtype)
        return self.head((states * weights).sum(1) / weights.sum(1))


@dataclass(frozen=True)
class SentenceEncoder:
    """The model recipe: published weights and a new head, without dropout, so that a resumed run draws the same.

    Attributes:
        encoder: a key of ``ENCODERS``.
        classes: of the head.
        tokens: length of an item.
    """

    encoder: str = "minilm"
    classes: int = 45
    tokens: int = 32

    @property
    def item_shape(self) -> tuple[int, ...]:
        """What one item is: token numbers."""
        return (self.tokens,)

    def build(self, seed: int) -> nn.Module:
        """The encoder with the published weights and a freshly initialised head.

        Args:
            seed: seed of the head's weights.

        Raises:
            FileNotFoundError, ValueError: see :func:`encoder_folder`.
        """
        from safetensors.torch import load_file
        from transformers import BertConfig, BertModel  # seconds of import

        folder = encoder_folder(self.encoder)
        options = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
        config = BertConfig.from_pretrained(folder, **options)
        weights = load_file(folder / "model.safetensors")
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = SentenceClassifier(BertModel(config, add_pooling_layer=False), self.classes)
        # What the file has beside these: the pooler, and position numbers, which are no longer saved.
        model.encoder.load_state_dict({name: weights[name] for name in model.encoder.state_dict()})
        return model.float()
