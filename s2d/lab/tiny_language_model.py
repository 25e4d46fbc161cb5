"""A Qwen2 of a few layers, from scratch on word problems (appendix F's architecture at the size of a laptop)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from s2d.lab.word_problems import vocabulary


class Answerer(nn.Module):
    """A causal language model that is asked for one token: the answer behind the question.

    Args:
        model: a causal language model of transformers.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    @property
    def blocks(self) -> nn.ModuleList:
        """The decoder layers, whose outputs are the residual stream."""
        return self.model.model.layers

    def no_weight_decay(self) -> set[str]:
        """Embeddings, as in timm's models."""
        return {name for name, _ in self.named_parameters() if "embed" in name}

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits ``(n, vocabulary)`` of the token after questions ``(n, length)``, padded on the left with 0."""
        mask = tokens != 0
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        states = self.model.model(input_ids=tokens, attention_mask=mask.long(), position_ids=positions, use_cache=False)
        return self.model.lm_head(states.last_hidden_state[:, -1])


@dataclass(frozen=True)
class TinyQwen:
    """The model recipe: Qwen2's blocks (RMSNorm, rotary positions, grouped heads, SwiGLU), embeddings not tied.

    Attributes:
        width: of the residual stream.
        depth: decoder layers.
        tokens: length of an item.
    """

    width: int = 64
    depth: int = 4
    tokens: int = 24

    @property
    def item_shape(self) -> tuple[int, ...]:
        """What one item is: token numbers."""
        return (self.tokens,)

    def build(self, seed: int) -> nn.Module:
        """The model with random weights.

        Args:
            seed: of the weights.
        """
        from transformers import Qwen2Config, Qwen2ForCausalLM  # seconds of import

        config = Qwen2Config(
            vocab_size=len(vocabulary()),
            hidden_size=self.width,
            intermediate_size=4 * self.width,
            num_hidden_layers=self.depth,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=self.tokens,
            tie_word_embeddings=False,
            attn_implementation="eager",
        )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return Answerer(Qwen2ForCausalLM(config)).float()
