"""A vision transformer's weights out of an ONNX export, in which the matrices have lost their names."""

from __future__ import annotations

import re
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from s2d.packages import need

# Hugging Face's names of a DINOv2, as regular expressions, and timm's.
NAMES = (
    (r"embeddings\.patch_embeddings\.projection", "patch_embed.proj"),
    (r"encoder\.layer\.(\d+)\.attention\.output\.dense", r"blocks.\1.attn.proj"),
    (r"encoder\.layer\.(\d+)\.layer_scale(\d)\.lambda1", r"blocks.\1.ls\2.gamma"),
    (r"encoder\.layer\.(\d+)\.(norm\d|mlp\.fc\d)", r"blocks.\1.\2"),
    (r"^layernorm", "norm"),
)
PARTS = ("query", "key", "value")
SIZES = {384: "small", 768: "base", 1024: "large"}


def named_tensors(file: Path, prefix: str = "backbone.") -> dict[str, Tensor]:
    """The initial tensors of an export by their names; a matrix is named after the bias that is added to its product.

    Args:
        file: an ONNX file.
        prefix: of the names wanted; it is taken off.

    Returns:
        Name to tensor; matrices as ``nn.Linear`` stores them, ``(out_features, in_features)``. Of what has no name,
        the position grid ``(1, n, width)`` and the class token's place ``(1, 1, width)`` are ``position`` and
        ``class_position``.

    Raises:
        ValueError: for a file that cannot be read.
        ImportError: without the package onnx.

    Paper: none
    """
    onnx = need("onnx", "an ONNX file")
    try:
        graph = onnx.load(str(file)).graph
    except Exception as error:  # of protobuf, which raises its own
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(f"MODEL {file} cannot be read as ONNX ({reason}): get it again") from None
    stored = {entry.name: torch.from_numpy(onnx.numpy_helper.to_array(entry).copy()) for entry in graph.initializer}
    product = {node.output[0]: node.input[1] for node in graph.node if node.op_type == "MatMul"}
    found = {name.removeprefix(prefix): tensor for name, tensor in stored.items() if name.startswith(prefix)}
    for node in graph.node:
        if node.op_type != "Add":
            continue
        bias = next((name for name in node.input if name.startswith(prefix) and name.endswith(".bias")), None)
        matrix = next((product[name] for name in node.input if product.get(name) in stored), None)
        if bias is not None and matrix is not None:
            found[bias.removeprefix(prefix).removesuffix("bias") + "weight"] = stored[matrix].T.contiguous()
    for name, tensor in stored.items():
        if not name.startswith((prefix, "onnx::MatMul")) and tensor.ndim == 3 and tensor.is_floating_point():
            found["position" if tensor.shape[1] > 1 else "class_position"] = tensor
    return found


def dinov2(file: Path) -> nn.Module:
    """A DINOv2 of timm for 224 pixels with the weights of an ONNX export.

    Args:
        file: an export of Hugging Face's Dinov2Model, with anything behind it.

    Returns:
        ``vit_small_patch14_dinov2`` or its larger kin, in evaluation mode, without a head.

    Raises:
        ValueError: for a file that holds no such network.
        ImportError: without the packages onnx or timm.

    Paper: none; a stand-in for appendix E's backbone.
    """
    timm, tensors = need("timm", "a vision transformer"), named_tensors(file)
    width = tensors["layernorm.weight"].numel() if "layernorm.weight" in tensors else 0
    if width not in SIZES or not {"position", "class_position"} <= tensors.keys():
        raise ValueError(f"MODEL {file} holds no DINOv2 that is known here: give an export of Dinov2Model")
    model = timm.create_model(f"vit_{SIZES[width]}_patch14_dinov2", img_size=224, num_classes=0).eval()
    side, wanted = round(tensors["position"].shape[1] ** 0.5), model.patch_embed.grid_size
    grid = tensors["position"].view(1, side, side, width).permute(0, 3, 1, 2)
    grid = F.interpolate(grid, size=wanted, mode="bicubic", align_corners=False, antialias=False)
    state = {"cls_token": tensors["embeddings.cls_token"]}
    state["pos_embed"] = torch.cat([tensors["class_position"], grid.flatten(2).mT], 1)
    for name, tensor in tensors.items():
        for pattern, replacement in NAMES:
            renamed, count = re.subn(pattern, replacement, name)
            if count:
                state[renamed] = tensor
    for block in range(len(model.blocks)):
        for kind in ("weight", "bias"):
            parts = [tensors.get(f"encoder.layer.{block}.attention.attention.{part}.{kind}") for part in PARTS]
            if any(part is None for part in parts):
                raise ValueError(f"MODEL {file} lacks block {block}'s {' or '.join(PARTS)}: get it again")
            state[f"blocks.{block}.attn.qkv.{kind}"] = torch.cat(parts)
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        raise ValueError(
            f"MODEL {file} is another network than expected ({str(error).splitlines()[-1].strip()})"
        ) from None
    return model
