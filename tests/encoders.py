"""Made networks that quantize badly: a post-norm encoder as BERT's, with what trained ones have in them."""

from __future__ import annotations

import torch
from torch import Tensor, nn

WIDTH, HIDDEN, TOKENS = 48, 192, 12


class Layer(nn.Module):
    """A post-norm layer: each norm stands behind a residual sum, and the next sum reads it too."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.proj, self.norm1 = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH), nn.LayerNorm(WIDTH)
        self.fc1, self.act, self.fc2 = nn.Linear(WIDTH, HIDDEN), nn.GELU(), nn.Linear(HIDDEN, WIDTH)
        self.norm2 = nn.LayerNorm(WIDTH)

    def attend(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, 4, -1)).permute(2, 0, 3, 1, 4)
        mixed = nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        return self.norm1(x + self.proj(mixed))

    def forward(self, x: Tensor) -> Tensor:
        x = self.attend(x)
        return self.norm2(x + self.fc2(self.act(self.fc1(x))))


class Encoder(nn.Module):
    """Post-norm layers whose GELU has outputs of ninety times the root mean square, at the first token."""

    def __init__(self, depth: int = 3, spike: float = 60.0) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(*(Layer() for _ in range(depth)))
        self.first = nn.Parameter(3 * torch.randn(WIDTH))
        with torch.no_grad():
            for layer in self.layers:
                for linear in (layer.qkv, layer.proj, layer.fc1, layer.fc2):
                    linear.weight.mul_(2)
                layer.norm2.weight[5] = 4.0  # an outlier channel behind each norm
            x = self._tokens(sentences(32, seed=5))
            for layer in self.layers:  # one unit answers the first token, and writes to the outlier channel
                seen = layer.attend(x)[:, 0].mean(0)
                layer.fc1.weight[0] = 2 * spike * seen / seen.square().sum()
                layer.fc1.bias[0] = -spike
                layer.fc2.weight[5, 0] = 0.2
                x = layer(x)

    def _tokens(self, x: Tensor) -> Tensor:
        return torch.cat([self.first.expand(len(x), 1, -1), x], 1)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.normalize(self.layers(self._tokens(x)).mean(1), dim=-1)


def sentences(count: int, seed: int = 0) -> Tensor:
    """Tokens of a small vocabulary, each with some noise: ``(count, TOKENS - 1, WIDTH)``."""
    words = torch.randn(64, WIDTH, generator=torch.Generator().manual_seed(99))
    generator = torch.Generator().manual_seed(seed)
    picked = torch.randint(64, (count, TOKENS - 1), generator=generator)
    return words[picked] + 0.1 * torch.randn(count, TOKENS - 1, WIDTH, generator=generator)


def relative_error(quantized: nn.Module, model: nn.Module, x: Tensor) -> float:
    """Of the normalised outputs."""
    with torch.no_grad():
        expected = model(x)
        return float((quantized(x) - expected).norm() / expected.norm())
