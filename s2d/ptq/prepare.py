"""The quantized copy of a model: same function while its quantizers are off, which is checked when it is built."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from s2d.ptq.quantizers import Quantizer


class QuantizedLinear(nn.Module):
    """A Linear layer whose weight and input pass through quantizers; either may be None (floating point).

    Attributes:
        linear: the layer, whose weight the method replaces by its quantized values.
        weight_quantizer, input_quantizer: see :class:`s2d.ptq.quantizers.Quantizer`.
        name: where the layer is in the model, for messages.
        mode: ``"float"`` (quantizers off), ``"observe"`` or ``"quantized"``.
    """

    def __init__(
        self, linear: nn.Linear, weight_quantizer: Quantizer | None, input_quantizer: Quantizer | None, name: str = ""
    ) -> None:
        super().__init__()
        self.linear, self.weight_quantizer, self.input_quantizer = linear, weight_quantizer, input_quantizer
        self.name = name
        self.mode = "float"

    def forward(self, x: Tensor) -> Tensor:
        if self.mode == "observe" and self.input_quantizer is not None:
            try:
                self.input_quantizer.observe(x)
            except ValueError as error:
                raise ValueError(f"layer {self.name}: {error}") from error
        if self.mode == "quantized" and self.input_quantizer is not None:
            x = self.input_quantizer(x)
        return F.linear(x, self.linear.weight, self.linear.bias)

    def weight_codes(self) -> Tensor:
        """The integer codes of the weight; raises ValueError when the weight is in floating point."""
        if self.weight_quantizer is None:
            raise ValueError("this layer's weight is in floating point: it has no codes")
        return self.weight_quantizer.codes(self.linear.weight)


def quantized_layers(model: nn.Module) -> dict[str, QuantizedLinear]:
    """The quantized layers of a prepared model, by the name the Linear layer had."""
    return {name: module for name, module in model.named_modules() if isinstance(module, QuantizedLinear)}


def prepare(
    model: nn.Module,
    weight_quantizer,
    input_quantizer,
    check: Tensor,
) -> nn.Module:
    """Copy a model and put every Linear layer, head included, behind quantizers; the argument is left untouched.

    A layer that the model holds under several names stays one layer. Layers that share a weight each get their own, so
    quantizing one leaves the other (a tied embedding, say) alone.

    Args:
        model: any module with Linear layers.
        weight_quantizer, input_quantizer: called once a layer, each returns a fresh quantizer or None.
        check: a batch on which copy and original are compared; outputs may be tensors, tuples or mappings of them.

    Returns:
        The copy, in evaluation mode, quantizers off.

    Raises:
        ValueError: if there is no Linear layer, one that cannot be reached, or the copy does not give exactly the
            original's output.
    """
    quantized = copy.deepcopy(model).eval()
    linears = {module: name for name, module in quantized.named_modules() if isinstance(module, nn.Linear)}
    if not linears:
        raise ValueError(f"{type(model).__name__} has no nn.Linear layer: there is nothing to quantize")
    for name, module in quantized.named_modules():
        if isinstance(module, QuantizedLinear):
            raise ValueError(f"layer {name} is quantized already: quantize the original model instead")
        if isinstance(module, nn.MultiheadAttention):
            raise ValueError(
                f"layer {name} is an nn.MultiheadAttention, which never calls its projections as Linear layers: they "
                "would stay in floating point; use a model whose attention calls Linear layers (timm's, say)"
            )
    with torch.no_grad():
        expected = _tensors(quantized(check))
    wrapped = {}
    for linear, name in linears.items():
        wrapped[linear] = QuantizedLinear(_own(linear), weight_quantizer(), input_quantizer(), name)
    for parent in list(quantized.modules()):
        for child, module in parent._modules.items():
            if module in wrapped:
                setattr(parent, child, wrapped[module])
    quantized = wrapped.get(quantized, quantized).eval()
    advice = "it uses a Linear layer in some other way than calling it (its weight directly, say)"
    try:
        with torch.no_grad():
            found = _tensors(quantized(check))
    except AttributeError as error:
        raise ValueError(f"{type(model).__name__} cannot be quantized: {advice} ({error})") from error
    if not all(torch.allclose(a, b, rtol=0, atol=0, equal_nan=True) for a, b in zip(expected, found, strict=True)):
        raise ValueError(
            f"the quantized copy of {type(model).__name__} does not reproduce the original with its quantizers off: "
            f"{advice}"
        )
    return quantized


def _own(linear: nn.Linear) -> nn.Linear:
    """A plain Linear layer of the same function with parameters of its own, neither tied nor parametrized."""
    own = nn.Linear(linear.in_features, linear.out_features, bias=False, device="meta")
    own.weight = nn.Parameter(linear.weight.detach().clone(), requires_grad=linear.weight.requires_grad)
    if linear.bias is not None:
        own.bias = nn.Parameter(linear.bias.detach().clone(), requires_grad=linear.bias.requires_grad)
    return own


def _tensors(output) -> list[Tensor]:
    """The tensors of a model's output, which may be nested in tuples and mappings."""
    if isinstance(output, Tensor):
        return [output]
    parts = output.values() if isinstance(output, Mapping) else output
    return [tensor for part in parts for tensor in _tensors(part)] if isinstance(output, (Mapping, tuple, list)) else []


@contextmanager
def mode(model: nn.Module, name: str) -> Iterator[None]:
    """Put every quantized layer into one mode while the context is open."""
    layers = quantized_layers(model).values()
    before = [layer.mode for layer in layers]
    for layer in layers:
        layer.mode = name
    try:
        yield
    finally:
        for layer, previous in zip(layers, before, strict=True):
            layer.mode = previous


@torch.no_grad()
def calibrate_inputs(model: nn.Module, batches: Iterable[Tensor]) -> None:
    """Show every input quantizer what its layer sees in the floating-point model, then freeze it.

    Raises:
        ValueError: naming the layer, if its inputs are not finite or the calibration data never reached it.
    """
    with mode(model, "observe"):
        for batch in batches:
            model(batch)
    for name, layer in quantized_layers(model).items():
        if layer.input_quantizer is not None:
            try:
                layer.input_quantizer.freeze()
            except ValueError as error:
                raise ValueError(f"layer {name}: {error}") from error
