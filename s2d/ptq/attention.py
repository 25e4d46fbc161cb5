"""``nn.MultiheadAttention`` taken apart, so that its projections and products can be quantized."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# What one call projects together, as torch does: all three if they are the same tensor, keys with values if those are.
KINDS = {"self": ("in_proj",), "cross": ("q_proj", "kv_proj"), "separate": ("q_proj", "k_proj", "v_proj")}


class SplitAttention(nn.Module):
    """The function of an ``nn.MultiheadAttention``, bit for bit, from Linear layers and two products.

    ``nn.MultiheadAttention`` never calls its projections as layers, and packs their weights into bare parameters.
    This one does what torch's regular (not the fused inference) path does, in the same order.

    Args:
        attention: left untouched; its parameters are shared, not copied.
        kind: ``"self"`` where query, key and value are the same tensor, ``"cross"`` where key and value are, else
            ``"separate"``.

    Raises:
        ValueError: for a kind that is none of these, or options this does not cover (``add_bias_kv``,
            ``add_zero_attn``).

    Example:
        >>> attention = nn.MultiheadAttention(8, 2, batch_first=True).eval()
        >>> x = torch.randn(3, 5, 8)
        >>> expected, _ = attention(x, x, x, need_weights=True)
        >>> torch.equal(SplitAttention(attention, "self")(x, x, x)[0], expected)
        True

    Paper: none.
    """

    def __init__(self, attention: nn.MultiheadAttention, kind: str) -> None:
        super().__init__()
        if kind not in KINDS:
            raise ValueError(f"kind is {kind!r}: choose one of {', '.join(KINDS)}")
        if attention.bias_k is not None or attention.add_zero_attn:
            raise ValueError("nn.MultiheadAttention with add_bias_kv or add_zero_attn cannot be taken apart")
        self.kind = kind
        self.embed_dim, self.num_heads, self.head_dim = attention.embed_dim, attention.num_heads, attention.head_dim
        self.batch_first = attention.batch_first
        # Read by nn.TransformerEncoderLayer: these values keep it off its fused path, which knows no quantizers.
        self.in_proj_bias, self._qkv_same_embed_dim = None, False
        weights, biases = _projections(attention)
        for name, parts in zip(KINDS[kind], _groups(kind), strict=True):
            weight = torch.cat([weights[i] for i in parts]) if len(parts) > 1 else weights[parts[0]]
            bias = None if biases is None else torch.cat([biases[i] for i in parts])
            self.add_module(name, _linear(weight, bias))
        self.out_proj = _linear(attention.out_proj.weight, attention.out_proj.bias)

    def _project(self, query: Tensor, key: Tensor, value: Tensor) -> list[Tensor]:
        if self.kind == "self":
            if not (query is key and key is value):
                raise ValueError("this attention was prepared for query, key and value being the same tensor")
            packed = self.in_proj(query)
            return [t.contiguous() for t in packed.unflatten(-1, (3, self.embed_dim)).unbind(-2)]
        if self.kind == "cross":
            if key is not value:
                raise ValueError("this attention was prepared for key and value being the same tensor")
            packed = self.kv_proj(key)
            return [self.q_proj(query), *(t.contiguous() for t in packed.unflatten(-1, (2, self.embed_dim)).unbind(-2))]
        return [self.q_proj(query), self.k_proj(key), self.v_proj(value)]

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """As ``nn.MultiheadAttention``'s, for batched inputs."""
        if query.ndim != 3:
            raise ValueError(f"query has shape {tuple(query.shape)}: give a batch, 3 dimensions")
        if is_causal and attn_mask is None:
            raise ValueError("is_causal is a hint that needs the mask itself: give attn_mask")
        if self.batch_first:  # the same object stays the same object
            flipped = {id(t): t.transpose(0, 1) for t in (query, key, value)}
            query, key, value = (flipped[id(t)] for t in (query, key, value))
        length, batch, _ = query.shape
        heads = [self._heads(t) for t in self._project(query, key, value)]
        mask = self._mask(attn_mask, key_padding_mask, batch, len(key), query.dtype)
        if need_weights:
            mixed, probabilities = self._with_weights(*heads, mask)
        else:
            mixed, probabilities = F.scaled_dot_product_attention(*heads, attn_mask=mask), None
        mixed = mixed.permute(2, 0, 1, 3).reshape(length * batch, self.embed_dim)
        output = self.out_proj(mixed).view(length, batch, -1)
        if probabilities is not None and average_attn_weights:
            probabilities = probabilities.mean(dim=1)
        return output.transpose(0, 1) if self.batch_first else output, probabilities

    def _heads(self, projected: Tensor) -> Tensor:
        """``(length, batch, width)`` to ``(batch, heads, length, head width)``."""
        length, batch, _ = projected.shape
        split = projected.reshape(length, batch * self.num_heads, self.head_dim).transpose(0, 1)
        return split.view(batch, self.num_heads, length, self.head_dim)

    def _with_weights(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        logits = torch.matmul(q * math.sqrt(1.0 / self.head_dim), k.transpose(-2, -1))
        probabilities = (logits if mask is None else mask + logits).softmax(dim=-1)
        return torch.matmul(probabilities, v), probabilities

    def _mask(
        self, mask: Tensor | None, padding: Tensor | None, batch: int, length: int, dtype: torch.dtype
    ) -> Tensor | None:
        """One additive mask that broadcasts to ``(batch, heads, queries, keys)``."""
        if mask is not None:
            mask = _additive(mask, dtype)
            mask = mask.view(batch, self.num_heads, *mask.shape[1:]) if mask.ndim == 3 else mask
        if padding is not None:
            padding = _additive(padding, dtype).view(batch, 1, 1, length)
            mask = padding if mask is None else mask + padding
        return mask


def _additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    if mask.dtype != torch.bool:
        return mask.to(dtype)
    return torch.zeros_like(mask, dtype=dtype).masked_fill_(mask, -math.inf)


def _linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    layer.weight = weight if isinstance(weight, nn.Parameter) else nn.Parameter(weight.detach())
    layer.bias = bias if bias is None or isinstance(bias, nn.Parameter) else nn.Parameter(bias.detach())
    return layer


def _projections(attention: nn.MultiheadAttention) -> tuple[list[Tensor], list[Tensor] | None]:
    """Weights and biases of q, k and v."""
    if attention.in_proj_weight is None:
        weights = [attention.q_proj_weight, attention.k_proj_weight, attention.v_proj_weight]
    else:
        weights = list(attention.in_proj_weight.chunk(3))
    return weights, None if attention.in_proj_bias is None else list(attention.in_proj_bias.chunk(3))


def _groups(kind: str) -> tuple[tuple[int, ...], ...]:
    return {"self": ((0, 1, 2),), "cross": ((0,), (1, 2)), "separate": ((0,), (1,), (2,))}[kind]


def call_kind(attention: nn.MultiheadAttention, query: Tensor, key: Tensor, value: Tensor) -> str:
    """Which of ``KINDS`` a call is."""
    if key is not value or attention.in_proj_weight is None:
        return "separate"
    return "self" if query is key else "cross"
