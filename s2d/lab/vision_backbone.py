"""A pretrained vision backbone with a new classification head: the model of the study of appendix E."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor, nn

from s2d.lab.fashion import FashionMNIST
from s2d.models import load

PROBE_IMAGES = 2000


@cache
def published_backbone(name: str) -> nn.Module:
    """A backbone as it was published, loaded once; to be copied, not changed.

    Args:
        name: whatever :func:`s2d.models.load` takes, of timm's vision transformers.

    Raises:
        FileNotFoundError, RuntimeError: for one that is neither here nor can be fetched, with the command that gets it.
        ValueError: for an unknown name, or a network that cannot take another image size.

    Paper: none.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)  # of an architecture without weights; the published ones are what they are
        model = load(name).model
    if not all(hasattr(model, part) for part in ("set_input_size", "reset_classifier", "blocks")):
        raise ValueError(f"{name!r} is no vision transformer of timm: give one, such as dinov2-s or dinov3-b16")
    return model.float()


@cache
def linear_probe(name: str, image_size: int) -> tuple[Tensor, Tensor]:
    """The head of a backbone whose features stay as they are: logistic regression on some training images.

    Args:
        name, image_size: see :class:`VisionBackbone`.

    Returns:
        Weight ``(10, width)`` and bias ``(10,)``.

    Raises:
        FileNotFoundError, RuntimeError, ValueError: see :func:`published_backbone` and
            :func:`s2d.lab.fashion.photographs`.

    Paper: none; a head that begins at random would pull the features out of shape before it is of use.
    """
    from sklearn.linear_model import LogisticRegression

    model = _resized(name, image_size)
    model.reset_classifier(0)
    x, y = FashionMNIST(image_size).fixed_set("train", PROBE_IMAGES)
    with torch.inference_mode():
        features = torch.cat([model(batch) for batch in x.split(128)]).double()
    mean, std = features.mean(0), features.std(0).clamp(min=1e-6)
    fitted = LogisticRegression(C=0.01, max_iter=1000).fit(((features - mean) / std).numpy(), y.numpy())
    weight = torch.from_numpy(fitted.coef_) / std
    return weight.float(), (torch.from_numpy(fitted.intercept_) - weight @ mean).float()


def _resized(name: str, image_size: int) -> nn.Module:
    model = copy.deepcopy(published_backbone(name)).eval()
    patch = model.patch_embed.patch_size[0]
    if image_size < patch or image_size % patch:
        raise ValueError(f"image_size is {image_size}: {name} takes multiples of {patch} pixels")
    model.set_input_size(img_size=image_size)
    return model


@dataclass(frozen=True)
class VisionBackbone:
    """The model recipe: published weights, and on what the backbone pools (DINOv2: the class token) a linear probe.

    Attributes:
        backbone: whatever :func:`s2d.models.load` takes, of timm's vision transformers.
        image_size: side of the square image, in pixels; the position grid is interpolated to it.
    """

    backbone: str = "dinov2-s"
    image_size: int = 28

    @property
    def item_shape(self) -> tuple[int, ...]:
        """What one item is: an image ``(3, image_size, image_size)``."""
        return (3, self.image_size, self.image_size)

    def build(self, seed: int) -> nn.Module:
        """The backbone with the published weights and the head of :func:`linear_probe`.

        Args:
            seed: of no account, since nothing is initialised at random.

        Raises:
            FileNotFoundError, RuntimeError, ValueError: see :func:`linear_probe`.
        """
        weight, bias = linear_probe(self.backbone, self.image_size)
        model = _resized(self.backbone, self.image_size)
        model.reset_classifier(len(bias))
        with torch.no_grad():
            model.head.weight.copy_(weight)
            model.head.bias.copy_(bias)
        return model
