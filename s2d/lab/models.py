"""The small vision transformer of the laptop scale: timm's own, with another size."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn


@dataclass(frozen=True)
class DigitsViT:
    """The model recipe: a ``timm.models.vision_transformer.VisionTransformer``, pre-norm, with a class token.

    The gains and shifts of its LayerNorms stay at 1 and 0, as in OLMo. A network this small otherwise learns a small
    gain for every outlier channel within minutes, and so hides from its Linear layers what large ones do not hide.

    Attributes:
        image_size: side of the square image, in pixels.
        patch_size: side of one patch, in pixels.
        width: embedding width.
        depth: number of transformer blocks.
        heads: attention heads a block.
    """

    image_size: int = 16
    patch_size: int = 4
    width: int = 64
    depth: int = 4
    heads: int = 4

    @property
    def item_shape(self) -> tuple[int, ...]:
        """What one item is: an image ``(1, image_size, image_size)``."""
        return (1, self.image_size, self.image_size)

    def build(self, seed: int) -> nn.Module:
        """A freshly initialised model; the caller's random state is left as it was.

        Args:
            seed: seed of the initial weights.
        """
        from timm.models.vision_transformer import VisionTransformer  # 7 s of import: only where a model is built

        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = VisionTransformer(
                img_size=self.image_size,
                patch_size=self.patch_size,
                in_chans=1,
                num_classes=10,
                embed_dim=self.width,
                depth=self.depth,
                num_heads=self.heads,
            )
        for module in model.modules():
            if isinstance(module, nn.LayerNorm):
                module.requires_grad_(False)
        return model
