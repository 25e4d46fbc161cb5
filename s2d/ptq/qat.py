"""Quantization-aware training: the rounding in the forward pass, the straight-through estimator in the backward."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from s2d.ptq.calibrate import split_batches
from s2d.ptq.prepare import device_of, prepare
from s2d.ptq.quantizers import SWITCHED_OFF, AffineQuantizer, check_bits
from s2d.ptq.rtn import calibrate_inputs
from s2d.ptq.sites import quantized_layers, set_mode, sites


def begin_qat(
    model: nn.Module,
    *,
    w_bits: int,
    a_bits: int,
    calibration: Any,
    symmetric: bool = False,
    exclude: Sequence[str] = (),
    batch_size: int = 32,
) -> nn.Module:
    r"""A copy to train: it computes with quantized weights and activations, its parameters stay in floating point.

    .. math:: \frac{\partial \hat x}{\partial x} := 1 \text{ inside the range of the grid, } 0 \text{ where } x
        \text{ is clamped}

    The grid of a weight (per output channel, min-max) follows the weight at every call; those of the activations (per
    tensor) have the range of least squared error on the calibration data, and stay. Train the copy with any loop and
    optimizer, then call :func:`finish_qat`.

    Weights that layers share, such as those of a head and an embedding, stay shared while training; the embedding reads
    them unrounded.

    Args:
        model: what to start from; left untouched.
        w_bits, a_bits, calibration, exclude, batch_size: see :func:`s2d.ptq.quantize`.
        symmetric: grids without a zero point.

    Returns:
        The copy, in training mode.

    Raises:
        ValueError: see :func:`s2d.ptq.quantize`; for shared weights that the copy stores in different forms.

    Example:
        >>> import torch
        >>> copy = begin_qat(nn.Linear(4, 2), w_bits=2, a_bits=8, calibration=torch.randn(8, 4))
        >>> copy(torch.randn(3, 4)).sum().backward()
        >>> bool((copy.weight.grad != 0).any()), len(finish_qat(copy).weight[0].unique()) <= 4
        (True, True)

    Paper: none (its outlook; the checkpoints it is started from are the paper's).
    """
    check_bits(w_bits, "w_bits")
    check_bits(a_bits, "a_bits")
    with torch.inference_mode(False):
        batches = split_batches(calibration, batch_size, device_of(model))
        quantized = prepare(model, batches, exclude=exclude)
        _tie(quantized, _shared_names(model))
        if a_bits not in SWITCHED_OFF:
            calibrate_inputs(quantized, batches, a_bits, symmetric=symmetric, ranges="mse")
        if w_bits not in SWITCHED_OFF:
            for site in quantized_layers(quantized).values():
                site.weight_quantizer = AffineQuantizer(w_bits, symmetric=symmetric, granularity="per_channel")
                site.weight_quantizer.observe(site.weight.detach())
                site.weight_quantizer.freeze()
    set_mode(quantized, "train")
    quantized.__dict__["s2d_quantization"] = {"method": "qat", "w_bits": w_bits, "a_bits": a_bits, "options": {}}
    return quantized.train()


def _shared_names(model: nn.Module) -> list[list[str]]:
    """The names of each parameter that has several."""
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name.replace("_orig_mod.", ""))
    return [found for found in names.values() if len(found) > 1]


def _tie(model: nn.Module, shared: list[list[str]]) -> None:
    """Let names have one parameter again, of which each site of a prepared model has its own, in place."""
    for names in shared:
        owners = [(model.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2]) for name in names]
        found = [module._parameters.get(leaf) for module, leaf in owners]
        if all(parameter is None for parameter in found):  # of an attention taken apart, which is one module
            continue
        if any(parameter is None or parameter.shape != found[0].shape for parameter in found):
            raise ValueError(
                f"{' and '.join(names)} share one weight, which the copy stores in different forms, so that training "
                "would move them apart: untie them, or leave one in floating point with exclude="
            )
        for module, leaf in owners:
            module._parameters[leaf] = found[0]


def _untie(model: nn.Module) -> None:
    """Give each site that is rounded a weight of its own, in place, so that what shares it stays in floating point."""
    owners: dict[int, set[nn.Module]] = {}
    for module in model.modules():
        for parameter in module._parameters.values():
            owners.setdefault(id(parameter), set()).add(module)
    for site in quantized_layers(model).values():
        if site.weight_quantizer is not None and len(owners[id(site.weight)]) > 1:
            site.weight = nn.Parameter(site.weight.detach().clone(), requires_grad=site.weight.requires_grad)


def finish_qat(model: nn.Module) -> nn.Module:
    """Put the trained weights on their grids for good, in place; the result is an ordinary quantized model.

    Layers that shared a weight while training each keep a rounded one, and an embedding the unrounded one.

    Raises:
        ValueError: if the model is not from :func:`begin_qat`, or a weight is not finite.

    Paper: none.
    """
    if not quantized_layers(model) or any(site.mode != "train" for site in sites(model).values()):
        raise ValueError(f"{type(model).__name__} is not in quantization-aware training: make it with begin_qat")
    _untie(model)
    for site in quantized_layers(model).values():
        if site.weight_quantizer is not None:
            site.weight_quantizer.observe(site.weight.detach())
            site.weight_quantizer.freeze()
            site.freeze_weight()
    set_mode(model, "quantized")
    return model.eval()
