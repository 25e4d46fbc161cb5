"""RepQ-ViT against the definition: what reparameterization keeps, and the ranges and grids it ends with."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from s2d.ptq import quantize
from s2d.ptq.log_sqrt2 import LogSqrt2Quantizer
from s2d.ptq.prepare import prepare
from s2d.ptq.quantizers import AffineQuantizer
from s2d.ptq.reparameterize import norm_groups
from s2d.ptq.repq_vit import PERCENTILES, calibrate_activations, reparameterize, repq_vit, row_quantizer
from s2d.ptq.sites import products, quantized_layers, set_mode


class Attention(nn.Module):
    """Separate queries, keys and values behind one norm."""

    def __init__(self, norm: nn.Module, width: int = 8, bias: bool = True) -> None:
        super().__init__()
        self.norm = norm
        self.q, self.k, self.v = (nn.Linear(width, width, bias=bias) for _ in range(3))
        self.proj = nn.Linear(width, width, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        q, k, v = (layer(y).unflatten(-1, (2, -1)).transpose(-2, -3) for layer in (self.q, self.k, self.v))
        mixed = (q @ k.transpose(-2, -1) / 2).softmax(-1) @ v
        return x + self.proj(mixed.transpose(-2, -3).flatten(-2))


def inputs(images: int = 12, tokens: int = 6, width: int = 8, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(images, tokens, width, generator=generator)


def attention(kind: str = "affine", bias: bool = True) -> nn.Module:
    torch.manual_seed(0)
    norms = {"affine": nn.LayerNorm(8), "plain": nn.LayerNorm(8, elementwise_affine=False), "rms": nn.RMSNorm(8)}
    norm = norms[kind]
    if norm.weight is not None:  # channels of very different size and place, as in trained models
        norm.weight.data = torch.logspace(-1, 1, 8)
    if getattr(norm, "bias", None) is not None:
        norm.bias.data = torch.linspace(-5, 20, 8)
    return Attention(norm, bias=bias).eval()


def images_error(model: nn.Module, x: Tensor, expected: Tensor) -> float:
    with torch.no_grad():
        return ((model(x) - expected).square().sum() / expected.square().sum()).item()


# --- reparameterization ---


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("kind", ["affine", "plain", "rms"])
def test_reparameterized_model_has_the_same_function(kind: str, bias: bool) -> None:
    model, x = attention(kind, bias), inputs() * torch.logspace(-1, 1, 8)
    expected = model(x)
    prepared = prepare(model, x)
    assert norm_groups(prepared).keys() == {"norm"}
    before = prepared.q.weight.clone()
    calibrate_activations(prepared, [x], 4)
    set_mode(prepared, "float")
    assert torch.allclose(prepared(x), expected, atol=1e-5 * expected.abs().max().item(), rtol=0)
    assert not torch.equal(prepared.q.weight, before)
    grids = {(layer.input_quantizer.scale.item(), layer.input_quantizer.zero_point.item()) for layer in (
        prepared.q, prepared.k, prepared.v)}  # fmt: skip
    assert len(grids) == 1


@pytest.mark.parametrize("kind", ["affine", "rms"])
def test_one_grid_after_reparameterization_is_a_grid_per_channel_before(kind: str) -> None:
    model, x = attention(kind), inputs(40)
    prepared = prepare(model, x)
    y = model.norm(x).detach().flatten(0, -2)
    step, zero = reparameterize(prepared, "norm", [prepared.q, prepared.k, prepared.v], y, 6)
    assert zero == zero.round() and 0 <= zero <= 63
    quantizer = AffineQuantizer(6)
    quantizer.set_grid(step, zero)
    new = prepared.norm(x).detach().flatten(0, -2)
    # Undo the change of every channel, found from the data alone.
    slope = ((y - y.mean(0)) * (new - new.mean(0))).sum(0) / (new - new.mean(0)).square().sum(0)
    per_channel = (quantizer(new) - new.mean(0)) * slope + y.mean(0)
    spread = y.amax(0) - y.amin(0)
    assert ((per_channel - y).abs().amax(0) <= 0.06 * spread).all()
    one = AffineQuantizer(6)
    one.observe(y)
    one.freeze()
    small = y.std(0).argmin()
    assert (one(y) - y)[:, small].square().mean() > 20 * (per_channel - y)[:, small].square().mean()


def test_constant_and_dead_channels_neither_blow_up_nor_give_nan() -> None:
    model, x = attention("affine"), inputs(20)
    model.norm.weight.data[:3] = torch.tensor([0.0, 1e-12, 1e-4])
    expected = model(x).detach()
    prepared = prepare(model, x)
    calibrate_activations(prepared, [x], 8)
    set_mode(prepared, "float")
    assert torch.allclose(prepared(x), expected, atol=2e-5 * expected.abs().max().item(), rtol=0)
    scales = prepared.q.weight.abs().amax(0) / model.q.weight.abs().amax(0)
    assert scales.min() > 1e-3
    assert images_error(quantize(model, method="repq_vit", w_bits=8, a_bits=8, calibration=x), x, expected) < 1e-3


@pytest.mark.parametrize("kind", ["affine", "rms"])
def test_a_norm_whose_channels_are_all_constant_is_left_alone(kind: str) -> None:
    model, x = attention(kind), inputs()
    model.norm.weight.data.zero_()
    quantized = quantize(model, method="repq_vit", w_bits=8, a_bits=8, calibration=x)
    assert torch.isfinite(quantized(x)).all()
    assert torch.isfinite(quantized.q.weight).all()


def test_a_norm_that_cannot_scale_gets_one_grid() -> None:
    class OnePlus(nn.RMSNorm):
        def forward(self, x: Tensor) -> Tensor:
            return nn.functional.rms_norm(x, self.normalized_shape) * (1 + self.weight)

    model, x = Attention(OnePlus(8)).eval(), inputs()
    prepared = prepare(model, x)
    repq_vit(prepared, [x], w_bits=32, a_bits=8)
    assert torch.equal(prepared.norm.weight, model.norm.weight)
    assert prepared.q.input_quantizer.scale.ndim == 0


def test_ranges_of_few_rows_are_widened() -> None:
    model, x, fresh = attention("affine"), inputs(4, seed=1), inputs(200, seed=2)
    quantized = quantize(model, method="repq_vit", w_bits=32, a_bits=8, calibration=x)
    new = quantized.norm(fresh)
    quantizer = quantized.q.input_quantizer
    low, high = (-quantizer.zero_point * quantizer.scale, (255 - quantizer.zero_point) * quantizer.scale)
    assert ((new < low) | (new > high)).float().mean() < 0.02  # the range of 24 rows itself misses 8 %
    y = model.norm(x).flatten(0, -2)
    z = model.norm(fresh).flatten(0, -2)
    assert ((z < y.amin(0)) | (z > y.amax(0))).float().mean() > 0.05


# --- the method ---


def test_weights_are_on_grids_per_row_and_stay_there() -> None:
    model, x = attention(), inputs()
    quantized = quantize(model, method="repq_vit", w_bits=3, a_bits=8, calibration=x)
    for layer in quantized_layers(quantized).values():
        assert layer.weight_codes().unique().numel() <= 8
        assert layer.weight_quantizer.scale.shape == (8, 1)
        assert torch.equal(layer.weight_quantizer(layer.weight), layer.weight)


def test_row_ranges_are_the_quantiles_with_the_least_squared_error() -> None:
    weight = torch.randn(5, 4000, generator=torch.Generator().manual_seed(3)) ** 3
    quantizer = row_quantizer(weight, 4, PERCENTILES)
    for row, found in zip(weight, quantizer(weight), strict=True):
        errors = []
        for p in PERCENTILES:
            low, high = torch.quantile(row.double(), torch.tensor([1 - p, p], dtype=torch.float64))
            scale = (high - low) / 15
            zero = (-low / scale).round()
            codes = (row.double() / scale).round().add(zero).clamp(0, 15)
            errors.append((((codes - zero) * scale - row.double()) ** 2).sum())
        assert torch.isclose((found.double() - row.double()).square().sum(), min(errors), rtol=1e-4)


@pytest.mark.parametrize("bits", [2, 3, 4, 6, 8])
def test_auto_softmax_is_the_better_of_both(bits: int) -> None:
    model, x = attention(), inputs()
    model.q.weight.data *= 4  # attention that looks at few tokens
    product = {}
    for choice in ("log_sqrt2", "uniform", "auto"):
        prepared = prepare(model, x)
        repq_vit(prepared, [x], w_bits=32, a_bits=bits, softmax=choice)
        (product[choice],) = [p for p in products(prepared).values() if p.kind == "pv"]
    y = model.norm(x)
    q, k, v = (layer(y).unflatten(-1, (2, -1)).transpose(-2, -3) for layer in (model.q, model.k, model.v))
    p = (q @ k.transpose(-2, -1) / 2).softmax(-1).detach()
    errors = {c: ((s.left_quantizer(p) - p) @ v).square().sum().item() for c, s in product.items()}
    assert errors["auto"] == pytest.approx(min(errors.values()), rel=1e-3)
    assert isinstance(product["log_sqrt2"].left_quantizer, LogSqrt2Quantizer)
    if bits == 8:
        assert isinstance(product["auto"].left_quantizer, AffineQuantizer)


def test_error_falls_with_bits_and_beats_one_grid_per_tensor() -> None:
    model, x = attention(), inputs(32)
    fresh = inputs(32, seed=9)
    expected = model(fresh).detach()
    errors = [
        images_error(quantize(model, method="repq_vit", w_bits=b, a_bits=b, calibration=x), fresh, expected)
        for b in (8, 6, 4)
    ]
    assert errors == sorted(errors) and errors[0] < 1e-3
    plain = images_error(quantize(model, method="rtn", w_bits=4, a_bits=4, calibration=x), fresh, expected)
    assert errors[-1] < plain


@pytest.mark.parametrize("kind", ["affine", "rms"])
def test_one_image_of_one_token_is_enough(kind: str) -> None:
    model, x = attention(kind), inputs(1, 1)
    quantized = quantize(model, method="repq_vit", w_bits=4, a_bits=4, calibration=x)
    assert torch.isfinite(quantized(inputs())).all()


def test_sides_switched_off_stay_in_floating_point() -> None:
    model, x = attention(), inputs()
    weights_only = quantize(model, method="repq_vit", w_bits=4, a_bits=32, calibration=x)
    assert all(layer.input_quantizer is None for layer in quantized_layers(weights_only).values())
    assert torch.equal(weights_only.norm.weight, model.norm.weight)
    inputs_only = quantize(model, method="repq_vit", w_bits=16, a_bits=4, calibration=x)
    assert all(layer.weight_quantizer is None for layer in quantized_layers(inputs_only).values())


def test_convolutions_get_weights_on_a_grid_and_inputs_in_floating_point() -> None:
    model = nn.Sequential(nn.Conv2d(1, 4, 2, 2), nn.Flatten(2), nn.LayerNorm(9), nn.Linear(9, 3)).eval()
    quantized = quantize(model, method="repq_vit", w_bits=2, a_bits=8, calibration=torch.randn(20, 1, 6, 6))
    assert quantized[0].input_quantizer is None
    assert all(len(row.unique()) <= 4 for row in quantized[0].weight)


def test_half_precision_and_the_argument_left_alone() -> None:
    model, x = attention().to(torch.bfloat16), inputs().to(torch.bfloat16)
    before = copy.deepcopy(model.state_dict())
    quantized = quantize(model, method="repq_vit", w_bits=8, a_bits=8, calibration=x)
    assert torch.isfinite(quantized(x)).all()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_an_unknown_softmax_is_refused() -> None:
    model, x = attention(), inputs()
    with pytest.raises(ValueError, match="softmax is 'log2': choose one of auto, log_sqrt2, uniform"):
        quantize(model, method="repq_vit", w_bits=4, a_bits=4, calibration=x, softmax="log2")
