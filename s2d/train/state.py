"""Where training stands, as plain tensors: whole on the main process, whatever the sharding."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from s2d.distributed import is_dtensor, whole


@torch.no_grad()
def gather(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Collective with sharded weights. Weights, buffers, and what the optimizer knows of each parameter, on the CPU.

    Args:
        model: not wrapped.
        optimizer: whose state is all kept by parameter, as that of AdamW and SGD is.

    Returns:
        ``model.<name>`` and ``optimizer.<name>.<key>``.

    Paper: none.
    """
    found = {f"model.{name}": _whole_copy(tensor) for name, tensor in model.state_dict().items()}
    for name, parameter in model.named_parameters():
        for key, value in optimizer.state.get(parameter, {}).items():
            if isinstance(value, Tensor):
                found[f"optimizer.{name}.{key}"] = _whole_copy(value)
    return found


@torch.no_grad()
def restore(model: nn.Module, optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor]) -> None:
    """Put back what :func:`gather` took, in place, on however many processes.

    Raises:
        ValueError: for tensors of another model.

    Paper: none.
    """
    state = model.state_dict()
    expected = {f"model.{name}": tensor.shape for name, tensor in state.items()}
    strange = [name for name, shape in expected.items() if name not in tensors or tensors[name].shape != shape]
    if strange:
        raise ValueError(f"the checkpoint does not fit the model at {strange[0]}: remove it to start anew")
    for name, tensor in state.items():
        tensor.copy_(_like(tensors[f"model.{name}"], tensor))
    for name, parameter in model.named_parameters():
        prefix = f"optimizer.{name}."
        own = {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}
        for key, value in own.items():
            placed = value.clone() if value.ndim == 0 else _like(value, parameter)  # a scalar counts steps
            optimizer.state[parameter][key] = placed


def _whole_copy(tensor: Tensor) -> Tensor:
    return whole(tensor.detach()).cpu().clone().contiguous()


def _like(tensor: Tensor, like: Tensor) -> Tensor:
    """On the device, and sharded in the way, of another."""
    if is_dtensor(like):
        from torch.distributed.tensor import distribute_tensor

        return distribute_tensor(tensor.to(like.device), like.device_mesh, like.placements)
    return tensor.to(like.device)
