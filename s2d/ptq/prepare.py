"""The quantized copy of a model: same function while its quantizers are off, which is checked when it is built."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator
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
        mode: ``"float"`` (quantizers off), ``"observe"`` or ``"quantized"``.
    """

    def __init__(
        self, linear: nn.Linear, weight_quantizer: Quantizer | None, input_quantizer: Quantizer | None
    ) -> None:
        super().__init__()
        self.linear, self.weight_quantizer, self.input_quantizer = linear, weight_quantizer, input_quantizer
        self.mode = "float"

    def forward(self, x: Tensor) -> Tensor:
        if self.mode == "observe" and self.input_quantizer is not None:
            self.input_quantizer.observe(x)
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

    Args:
        model: any module with Linear layers.
        weight_quantizer, input_quantizer: called once a layer, each returns a fresh quantizer or None.
        check: a batch on which copy and original are compared.

    Returns:
        The copy, in evaluation mode, quantizers off.

    Raises:
        ValueError: if there is no Linear layer, or the copy does not give exactly the original's output.
    """
    quantized = copy.deepcopy(model).eval()
    linears = [name for name, module in quantized.named_modules() if isinstance(module, nn.Linear)]
    if not linears:
        raise ValueError(f"{type(model).__name__} has no nn.Linear layer: there is nothing to quantize")
    for name in linears:
        parent_name, _, child = name.rpartition(".")
        parent = quantized.get_submodule(parent_name)
        setattr(parent, child, QuantizedLinear(getattr(parent, child), weight_quantizer(), input_quantizer()))
    was_training = model.training
    with torch.no_grad():
        same = torch.equal(model.eval()(check), quantized(check))
    model.train(was_training)
    if not same:
        raise ValueError(
            f"the quantized copy of {type(model).__name__} does not reproduce the original with its quantizers off: it "
            "uses a Linear layer in some other way than calling it (its weight directly, say)"
        )
    return quantized


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
