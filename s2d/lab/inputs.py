"""What one layer of a network reads."""

from __future__ import annotations

import torch
from torch import Tensor, nn


@torch.no_grad()
def layer_inputs(model: nn.Module, items: Tensor, name: str) -> Tensor:
    """The inputs of a layer on some items, one row a token.

    Args:
        model: any.
        items: a batch that the model takes.
        name: of the layer, as ``named_modules`` has it.

    Returns:
        ``(tokens, in_features)``.

    Raises:
        ValueError: for a name that the model does not have, or a layer that it does not call.

    Example:
        >>> model = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 1))
        >>> layer_inputs(model, torch.randn(5, 2), "2").shape
        torch.Size([5, 3])

    Paper: none.
    """
    modules = dict(model.named_modules())
    if name not in modules:
        raise ValueError(f"the model has no layer {name!r}: it has {', '.join(n for n in modules if n)}")
    seen: list[Tensor] = []
    hook = modules[name].register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].flatten(0, -2)))
    try:
        model.eval()(items)
    finally:
        hook.remove()
    if not seen:
        raise ValueError(f"the model does not call {name}: choose another layer")
    return torch.cat(seen)
