"""Change what a norm puts out, and undo it in the layers that read it: the model's function stays as it is."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from s2d.ptq.sites import QuantizedLinear, sites


def norm_groups(model: nn.Module) -> dict[str, list[QuantizedLinear]]:
    """Norms whose output goes to Linear layers only, by name, with those layers.

    Layers with an input transform (a rotation) are left out with their norm: the transform stands in between.
    """
    groups: dict[str, list[QuantizedLinear]] = {}
    blocked = set()
    for site in sites(model).values():
        norm = getattr(site, "norm", None)
        if norm is not None:
            groups.setdefault(norm, []).append(site)
            if site.input_transform is not None:
                blocked.add(norm)
    return {norm: layers for norm, layers in groups.items() if norm not in blocked}


def scalable_groups(model: nn.Module) -> dict[str, list[QuantizedLinear]]:
    """Those of :func:`norm_groups` whose norm :func:`can_scale`."""
    return {norm: layers for norm, layers in norm_groups(model).items() if can_scale(model.get_submodule(norm))}


def can_shift(norm: nn.Module) -> bool:
    """Whether a norm can add something to its output: a LayerNorm can, an RMSNorm cannot."""
    return isinstance(norm, nn.LayerNorm) or isinstance(getattr(norm, "bias", None), nn.Parameter)


def can_scale(norm: nn.Module) -> bool:
    """Whether a norm multiplies its output by its weight as it stands (not by one plus it, as Gemma's does)."""
    if isinstance(norm, nn.LayerNorm):
        return True
    weight = getattr(norm, "weight", None)
    if not isinstance(weight, nn.Parameter):
        return False
    with torch.no_grad():  # a weight of zero must give an output of zero
        kept = weight.clone()
        weight.zero_()
        ramp = torch.arange(1, len(weight) + 1, device=weight.device, dtype=weight.dtype)
        output = norm(ramp[None])
        weight.copy_(kept)
    bias = getattr(norm, "bias", None)
    return bool((output == (0 if bias is None else bias)).all())


@torch.no_grad()
def rescale_norm(model: nn.Module, norm_name: str, layers: list[QuantizedLinear], r: Tensor, shift: Tensor) -> None:
    r"""Make a norm put out :math:`x' = x / r - s`, and let its layers read that, in place.

    .. math:: \gamma' = \gamma / r, \quad \beta' = \beta / r - s, \quad W'_{:, c} = r_c W_{:, c}, \quad
        b' = b + W' s

    Args:
        model: a prepared model.
        norm_name: a key of :func:`norm_groups`.
        layers: its value.
        r: ``(channels,)``, positive.
        shift: ``(channels,)``, the s above; zeros for a norm that cannot shift.

    Raises:
        ValueError: for factors that are not positive and finite, or a shift that the norm cannot make.

    Paper: none (RepQ-ViT's scale reparameterization, SmoothQuant's migration).
    """
    norm = model.get_submodule(norm_name)
    if not (torch.isfinite(r).all() and (r > 0).all() and torch.isfinite(shift).all()):
        raise ValueError(f"norm {norm_name}: the factors must be positive and finite")
    moves = bool((shift != 0).any())
    if moves and not can_shift(norm):
        raise ValueError(f"norm {norm_name} ({type(norm).__name__}) has no bias: it can be scaled, not shifted")
    if norm.weight is None:
        norm.weight = nn.Parameter(torch.ones_like(r, dtype=layers[0].weight.dtype))
    if moves and norm.bias is None:
        norm.bias = nn.Parameter(torch.zeros_like(norm.weight))
    norm.weight.div_(r)
    if getattr(norm, "bias", None) is not None:  # transformers' RMSNorms have no such attribute
        norm.bias.copy_(norm.bias / r - shift)
    for layer in layers:
        layer.weight.mul_(r)
        if moves:
            layer.bias = (
                layer.bias if layer.bias is not None else nn.Parameter(layer.weight.new_zeros(len(layer.weight)))
            )
            layer.bias.add_(layer.weight @ shift.to(layer.weight.dtype))
