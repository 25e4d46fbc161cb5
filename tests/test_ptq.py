"""``quantize`` and round-to-nearest: against formulas by hand, on every kind of model, with every kind of bad input."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from grids import grid_by_hand
from torch import Tensor, nn

from s2d.ptq import METHODS, coverage, quantize, quantize_each
from s2d.ptq.calibrate import Shared, site_inputs
from s2d.ptq.prepare import prepare
from s2d.ptq.sites import QuantizedLinear, mode, products, quantized_layers

BITS = (2, 3, 4, 5, 6, 7, 8)


def data(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)


# --- quantized copies ---


class Mlp(nn.Module):
    """Two layers, the second without bias, with a norm and dropout between."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.first = nn.Linear(6, 16)
            self.norm = nn.LayerNorm(16)
            self.drop = nn.Dropout(0.5)
            self.second = nn.Linear(16, 3, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.drop(F.gelu(self.norm(self.first(x)))))


def tiny_vit(**options) -> nn.Module:
    from timm.models.vision_transformer import VisionTransformer

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return VisionTransformer(
            **{"img_size": 16, "patch_size": 4, "in_chans": 1, "embed_dim": 32, "depth": 2, "num_heads": 2}
            | {"num_classes": 10}
            | options
        )


VIT_LAYERS = [
    *(f"blocks.{i}.{name}" for i in (0, 1) for name in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")),
    "head",
]


def snapshot(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_same_state(model: nn.Module, before: dict[str, Tensor]) -> None:
    assert list(model.state_dict()) == list(before)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def relative_error(model: nn.Module, reference: nn.Module, x: Tensor) -> float:
    with torch.no_grad():
        got, expected = model(x), reference(x)
    return ((got - expected).square().sum() / expected.square().sum()).item()


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("activations", ["per_tensor", "per_token"])
@pytest.mark.parametrize(("w_bits", "a_bits"), [(4, 4), (3, 8), (4, 32), (16, 4)])
def test_rtn_is_the_formula(w_bits: int, a_bits: int, activations: str, symmetric: bool) -> None:
    model, x, test = Mlp().eval(), data(40, 6, seed=1), data(30, 6, seed=2)
    quantized = quantize(
        model, w_bits=w_bits, a_bits=a_bits, calibration=x, symmetric=symmetric, activations=activations
    )

    def rounded(values: np.ndarray, calibration: np.ndarray, n_bits: int, granularity: str) -> np.ndarray:
        if n_bits > 8:
            return values
        scale, zero_point, q_min, q_max = grid_by_hand(calibration, n_bits, symmetric, granularity)
        return scale * (np.clip(np.round(values / scale) + zero_point, q_min, q_max) - zero_point)

    def layer(values: np.ndarray, calibration: np.ndarray, linear: nn.Linear) -> np.ndarray:
        weight = linear.weight.detach().double().numpy()
        seen = calibration if activations == "per_tensor" else values
        out = rounded(values, seen, a_bits, activations) @ rounded(weight, weight, w_bits, "per_channel").T
        return out if linear.bias is None else out + linear.bias.detach().double().numpy()

    def between(values: np.ndarray) -> np.ndarray:
        return F.gelu(F.layer_norm(torch.from_numpy(values), (16,))).numpy()

    with torch.no_grad():  # what the second layer sees in the floating-point model
        hidden = copy.deepcopy(model).double().norm(copy.deepcopy(model).double().first(x.double()))
        hidden = F.gelu(hidden).numpy()
        got = quantized(test).double().numpy()
    expected = layer(between(layer(test.double().numpy(), x.double().numpy(), model.first)), hidden, model.second)
    # In float32 a rare value falls on the other side of a rounding boundary, so a few outputs differ by a step.
    close = np.isclose(got, expected, rtol=1e-4, atol=1e-5)
    assert close.mean() > 0.9
    np.testing.assert_allclose(got, expected, atol=0.2 * np.abs(expected).max())


@pytest.mark.parametrize("training", [False, True])
def test_the_argument_is_left_untouched(training: bool) -> None:
    model = Mlp().train(training)
    model.norm.train(not training)  # one part frozen by its owner
    before, flags = snapshot(model), [m.training for m in model.modules()]
    classes = [type(m) for m in model.modules()]
    quantized = quantize(model, w_bits=3, a_bits=3, calibration=data(8, 6))
    assert_same_state(model, before)
    assert [m.training for m in model.modules()] == flags
    assert [type(m) for m in model.modules()] == classes
    assert not any(m.training for m in quantized.modules())
    # Nothing is shared: writing to the copy does not reach the argument.
    with torch.no_grad():
        for tensor in [*quantized.parameters(), *quantized.buffers()]:
            tensor.fill_(9)
    assert_same_state(model, before)


def test_the_argument_is_left_untouched_by_a_failure() -> None:
    class Refusing(Mlp):
        def forward(self, x: Tensor) -> Tensor:
            raise RuntimeError("no")

    model = Refusing().train()
    with pytest.raises(RuntimeError, match="no"):
        quantize(model, w_bits=4, a_bits=4, calibration=data(8, 6))
    assert all(m.training for m in model.modules())


@pytest.mark.parametrize("make", [Mlp, tiny_vit])
def test_with_quantizers_off_the_copy_is_the_original(make) -> None:
    model = make().eval()
    x = data(8, 1, 16, 16) if make is tiny_vit else data(8, 6)
    off = quantize(model, w_bits=32, a_bits=32, calibration=x)
    assert torch.equal(off(x), model(x))
    assert torch.equal(quantize(model, w_bits=16, a_bits=16, calibration=x)(x), model(x))
    # Activation quantizers only: switching the mode switches them off and on.
    quantized = quantize(model, w_bits=32, a_bits=3, calibration=x)
    before = quantized(x)
    with mode(quantized, "float"):
        assert torch.equal(quantized(x), model(x))
    assert torch.equal(quantized(x), before) and not torch.equal(before, model(x))


def test_the_mode_comes_back_after_an_error() -> None:
    quantized = quantize(Mlp(), w_bits=4, a_bits=4, calibration=data(8, 6))
    with pytest.raises(RuntimeError), mode(quantized, "float"):
        raise RuntimeError
    assert {layer.mode for layer in quantized_layers(quantized).values()} == {"quantized"}


@pytest.mark.parametrize("options", [{}, {"symmetric": True}, {"activations": "per_token"}])
def test_a_vision_transformer_gets_closer_with_bits(options: dict) -> None:
    model, calibration, x = tiny_vit().eval(), data(32, 1, 16, 16, seed=1), data(32, 1, 16, 16, seed=2)
    error = {
        b: relative_error(quantize(model, w_bits=b, a_bits=b, calibration=calibration, **options), model, x)
        for b in (3, 4, 6, 8)
    }
    assert error[8] < 1e-3
    assert error[8] < error[6] < error[4] < error[3] < 10


def test_other_vision_transformers() -> None:
    """Attention pooling, q/k norm and no class token: all of it Linear layers that are called."""
    model = tiny_vit(global_pool="map", class_token=False, qk_norm=True).eval()
    x = data(8, 1, 16, 16)
    quantized = quantize(model, w_bits=8, a_bits=8, calibration=x)
    assert {"attn_pool.q", "attn_pool.kv", "attn_pool.proj", "attn_pool.mlp.fc1"} < set(quantized_layers(quantized))
    assert 0 < relative_error(quantized, model, x) < 1e-2


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("w_bits", BITS)
def test_final_weights_are_on_their_grid(w_bits: int, symmetric: bool) -> None:
    model = tiny_vit()
    quantized = quantize(model, w_bits=w_bits, a_bits=32, calibration=data(2, 1, 16, 16), symmetric=symmetric)
    for name, layer in quantized_layers(quantized).items():
        weight, quantizer = layer.weight, layer.weight_quantizer
        assert torch.equal(quantizer(weight), weight)
        assert torch.equal(quantizer.dequantize(layer.weight_codes()), weight)
        assert all(len(row.unique()) <= 2**w_bits for row in weight)
        original = model.get_submodule(name).weight
        assert (weight - original).abs().flatten(1).amax(1).le(quantizer.scale.flatten() * 0.5001).all()


def test_codes_of_a_floating_point_weight() -> None:
    quantized = quantize(Mlp(), w_bits=32, a_bits=4, calibration=data(8, 6))
    with pytest.raises(ValueError, match="no codes"):
        quantized.first.weight_codes()


def test_one_row_of_calibration() -> None:
    x = data(1, 6)
    got = quantize(Mlp(), w_bits=8, a_bits=8, calibration=x)(x)
    torch.testing.assert_close(got, Mlp().eval()(x), rtol=0.1, atol=0.05)


@pytest.mark.parametrize("a_bits", [4, 32])
def test_empty_calibration(a_bits: int) -> None:
    with pytest.raises(ValueError, match="calibration set is empty"):
        quantize(Mlp(), w_bits=4, a_bits=a_bits, calibration=torch.empty(0, 6))


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_calibration_with_nan(bad: float) -> None:
    x = data(8, 6)
    x[3, 2] = bad
    with pytest.raises(ValueError, match="calibration set holds NaN"):
        quantize(Mlp(), w_bits=4, a_bits=4, calibration=x)


def test_a_model_that_makes_nan_is_named_by_layer() -> None:
    model = Mlp()
    with torch.no_grad():
        model.first.bias[0] = torch.nan
    with pytest.raises(ValueError, match="^second: its inputs hold NaN or infinity"):
        quantize(model, w_bits=4, a_bits=4, calibration=data(8, 6))


def test_unknown_method() -> None:
    with pytest.raises(ValueError, match="unknown method 'gptq': choose one of " + ", ".join(METHODS)):
        quantize(Mlp(), method="gptq", w_bits=4, a_bits=4, calibration=data(8, 6))


@pytest.mark.parametrize("activations", ["per_channel", "per_row"])
@pytest.mark.parametrize("a_bits", [4, 32])
def test_unknown_granularity_of_activations(activations: str, a_bits: int) -> None:
    with pytest.raises(ValueError, match=f"activations is '{activations}': choose one of per_tensor, per_token"):
        quantize(Mlp(), w_bits=4, a_bits=a_bits, calibration=data(8, 6), activations=activations)


@pytest.mark.parametrize("bits", [1, 9, True, "4", 4.0])
@pytest.mark.parametrize("side", ["w_bits", "a_bits"])
def test_bits_out_of_range(side: str, bits) -> None:
    with pytest.raises(ValueError, match=f"^{side} is {bits!r}"):
        quantize(Mlp(), **{"w_bits": 4, "a_bits": 4} | {side: bits}, calibration=data(8, 6))


def test_a_layer_without_bias_stays_without() -> None:
    quantized = quantize(Mlp(), w_bits=4, a_bits=4, calibration=data(8, 6))
    assert quantized.second.bias is None
    assert torch.equal(quantized.first.bias, Mlp().first.bias)


def test_the_model_may_be_one_linear_layer() -> None:
    model, x = nn.Linear(6, 3), data(8, 6)
    quantized = quantize(model, w_bits=2, a_bits=2, calibration=x)
    assert isinstance(quantized, QuantizedLinear) and quantized.weight_codes().max() == 3
    assert not torch.equal(quantized(x), model(x))


def test_integer_inputs_and_nested_outputs() -> None:
    """As language models have them: token ids in, a mapping of tensors out, head tied to the embedding."""

    class Language(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(11, 8)
            self.hidden = nn.Linear(8, 8)
            self.head = nn.Linear(8, 11, bias=False)
            self.head.weight = self.embed.weight

        def forward(self, ids: Tensor) -> dict:
            hidden = self.hidden(self.embed(ids))
            return {"logits": self.head(hidden), "states": (hidden, None)}

    model, ids = Language(), torch.arange(10).view(2, 5)
    quantized = quantize(model, w_bits=4, a_bits=4, calibration=ids)
    # The embedding stays in floating point although it shares its weight with the head.
    assert torch.equal(quantized.embed.weight, model.embed.weight)
    assert torch.equal(quantized.head.weight_quantizer(quantized.head.weight), quantized.head.weight)
    assert not torch.equal(quantized.head.weight, model.head.weight)
    assert model.head.weight is model.embed.weight
    off = quantize(model, w_bits=32, a_bits=32, calibration=ids)(ids)
    assert torch.equal(off["logits"], model(ids)["logits"])


@pytest.mark.parametrize("nested", [False, True])
def test_one_layer_under_two_names(nested: bool) -> None:
    layer = nn.Linear(6, 6)
    if nested:
        block = nn.Sequential(layer, nn.ReLU())
        model = nn.Sequential(block, nn.LayerNorm(6), block)
        places = ("0.0", "2.0")
    else:
        model = nn.Sequential(layer, nn.LayerNorm(6), layer)
        places = ("0", "2")
    x = data(50, 6) * 5
    quantized = quantize(model, w_bits=4, a_bits=4, calibration=x)
    first, second = (quantized.get_submodule(place) for place in places)
    assert isinstance(first, QuantizedLinear) and first is second
    assert list(quantized_layers(quantized)) == [places[0]]
    # Its input quantizer has seen both places: the raw input is by far the wider one.
    assert first.input_quantizer.high == x.max()
    seen = []
    first.input_quantizer.register_forward_hook(lambda _m, _a, out: seen.append(len(out.unique())))
    quantized(x)
    assert len(seen) == 2 and max(seen) <= 16


def test_tied_weights_are_both_quantized() -> None:
    model = nn.Sequential(nn.Linear(6, 6), nn.LayerNorm(6), nn.Linear(6, 6))
    model[2].weight = model[0].weight
    quantized = quantize(model, w_bits=3, a_bits=4, calibration=data(20, 6))
    assert torch.equal(quantized[0].weight, quantized[2].weight)
    for layer in quantized_layers(quantized).values():
        assert torch.equal(layer.weight_quantizer.dequantize(layer.weight_codes()), layer.weight)
        assert (layer.weight - model[0].weight).abs().max() <= layer.weight_quantizer.scale.max() * 0.5001
    assert torch.equal(quantized[2].bias, model[2].bias)


def test_a_parametrized_weight_is_quantized() -> None:
    model = Mlp()
    torch.nn.utils.parametrizations.weight_norm(model.first)
    before, x = snapshot(model), data(20, 6)
    quantized = quantize(model, w_bits=3, a_bits=8, calibration=x)
    assert all(len(row.unique()) <= 8 for row in quantized.first.weight)
    quantized.eval()(x)
    assert all(len(row.unique()) <= 8 for row in quantized.first.weight)
    assert_same_state(model, before)
    model(x)  # still parametrized, still works


def test_quantizing_a_quantized_model_is_refused() -> None:
    quantized = quantize(Mlp(), w_bits=4, a_bits=4, calibration=data(8, 6))
    with pytest.raises(ValueError, match="quantized already"):
        quantize(quantized, w_bits=4, a_bits=4, calibration=data(8, 6))


def test_calibration_sees_the_floating_point_model() -> None:
    """The second layer's range is that of the unquantized network, not of one with the first layer quantized."""
    model, x = Mlp().eval(), data(32, 6)
    quantized = quantize(model, w_bits=2, a_bits=2, calibration=x)
    with torch.no_grad():
        seen = F.gelu(model.norm(model.first(x)))
    assert quantized.second.input_quantizer.low == seen.min()
    assert quantized.second.input_quantizer.high == seen.max()


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_precisions(dtype: torch.dtype) -> None:
    model, x = Mlp().to(dtype).eval(), data(16, 6, dtype=dtype)
    quantized = quantize(model, w_bits=8, a_bits=8, calibration=x)
    assert quantized(x).dtype == dtype
    torch.testing.assert_close(quantized(x), model(x), rtol=0.1, atol=0.05)
    for layer in quantized_layers(quantized).values():
        assert torch.equal(layer.weight_quantizer(layer.weight), layer.weight)


def test_a_quantized_model_can_be_copied() -> None:
    x = data(8, 6)
    quantized = quantize(Mlp(), w_bits=4, a_bits=4, calibration=x)
    assert torch.equal(copy.deepcopy(quantized)(x), quantized(x))


def test_what_changes_and_what_does_not() -> None:
    model = tiny_vit()
    quantized = quantize(model, w_bits=4, a_bits=4, calibration=data(8, 1, 16, 16))
    assert list(quantized_layers(quantized)) == ["patch_embed.proj", *VIT_LAYERS]
    changed = {f"{name}.weight" for name in quantized_layers(quantized)}
    after = quantized.state_dict()
    for name, tensor in model.state_dict().items():
        assert torch.equal(after[name], tensor) == (name not in changed), name
    rows = {row["site"]: row for row in coverage(quantized)}
    assert rows["patch_embed.proj"]["input"] == "float"  # the image itself
    assert {row["kind"] for row in rows.values()} == {"linear", "conv", "qk", "pv"}
    assert "float" not in {rows[name][side] for name in VIT_LAYERS for side in ("weight", "input")}
    for name in products(quantized):
        assert "float" not in (rows[name]["input"], rows[name]["other_input"])


def test_calibration_order_and_batch_size_do_not_matter() -> None:
    model, x = tiny_vit(), data(33, 1, 16, 16)

    def ranges(images: Tensor, batch_size: int) -> Tensor:
        quantized = quantize(model, calibration=images, w_bits=4, a_bits=4, batch_size=batch_size)
        layers = [layer for name, layer in quantized_layers(quantized).items() if name != "patch_embed.proj"]
        return torch.stack([torch.stack([q.low, q.high]) for layer in layers for q in layer.input_quantizers()])

    expected = ranges(x, 64)
    for images, batch_size in ((x.flip(0), 64), (x, 1), (x, 7), (x.flip(0), 32)):
        # Matrix products of other sizes round differently, hence not exactly.
        torch.testing.assert_close(ranges(images, batch_size), expected, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(ranges(x[:5], 64), expected, rtol=1e-4, atol=1e-5)


def test_every_calibration_image_counts() -> None:
    x = data(9, 6)
    x[-1] *= 100  # the last row of the last, incomplete batch
    quantized = quantize(Mlp(), calibration=x, w_bits=4, a_bits=4, batch_size=4)
    assert quantized.first.input_quantizer.low == x.min() and quantized.first.input_quantizer.high == x.max()


def test_symmetric_grids_leave_probabilities_unsigned() -> None:
    quantized = quantize(tiny_vit(), w_bits=4, a_bits=4, calibration=data(8, 1, 16, 16), symmetric=True)
    for product in products(quantized).values():
        assert product.left_quantizer.symmetric == (product.kind == "qk")
        assert product.left_quantizer.zero_point == 0 and product.right_quantizer.zero_point == 0


def test_unknown_options_and_transforms_are_named() -> None:
    with pytest.raises(ValueError, match="method 'rtn' has no option 'symetric': it has symmetric, activations"):
        quantize(Mlp(), w_bits=4, a_bits=4, calibration=data(8, 6), symetric=True)
    with pytest.raises(ValueError, match="unknown transform 'rotat'"):
        quantize(Mlp(), w_bits=4, a_bits=4, calibration=data(8, 6), transforms=["rotat"])


@pytest.mark.parametrize("method", METHODS)
def test_every_method_on_a_vision_transformer(method: str) -> None:
    """Each gets closer with bits, leaves its argument alone, and its weights are fixed points of their quantizers."""
    model, calibration, x = tiny_vit().eval(), data(32, 1, 16, 16, seed=1), data(32, 1, 16, 16, seed=2)
    before = snapshot(model)
    errors = {}
    for bits in (3, 8):
        quantized = quantize(model, method=method, w_bits=bits, a_bits=bits, calibration=calibration)
        errors[bits] = relative_error(quantized, model, x)
        for layer in quantized_layers(quantized).values():
            assert torch.equal(layer.weight_quantizer(layer.weight), layer.weight), layer.name
            codes = layer.weight_codes()
            assert codes.dtype == torch.int16 and len(codes.unique()) <= 2**bits
    assert_same_state(model, before)
    assert 0 < errors[8] < 2e-3 and errors[8] < errors[3] < 2


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("sides", [(32, 4), (4, 16), (32, 32)])
def test_every_method_with_a_side_switched_off(method: str, sides: tuple[int, int]) -> None:
    model, x = tiny_vit().eval(), data(8, 1, 16, 16)
    quantized = quantize(model, method=method, w_bits=sides[0], a_bits=sides[1], calibration=x)
    for layer in quantized_layers(quantized).values():
        assert (layer.weight_quantizer is None) == (sides[0] > 8)
        assert layer.input_quantizer is None or sides[1] <= 8
    for product in products(quantized).values():
        assert (product.left_quantizer is None) == (product.right_quantizer is None) == (sides[1] > 8)
    assert torch.isfinite(quantized(x)).all()
    if sides == (32, 32):
        torch.testing.assert_close(quantized(x), model(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("method", METHODS)
def test_every_method_takes_degenerate_models_and_one_row(method: str) -> None:
    """A layer of zeros, one without bias, a constant channel, one row of calibration: finite, and no warning."""
    model = Mlp().eval()
    with torch.no_grad():
        model.first.weight[3] = 0
        model.first.weight[4] = 0.5
        model.second.weight.zero_()
    x = data(1, 6)
    out = quantize(model, method=method, w_bits=4, a_bits=4, calibration=x)(x)
    assert torch.isfinite(out).all()
    assert torch.isfinite(quantize(model, method=method, w_bits=4, a_bits=4, calibration=torch.zeros(3, 6))(x)).all()


@pytest.mark.parametrize("method", METHODS)
def test_every_method_names_a_branch_that_calibration_misses(method: str) -> None:
    class Experts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.expert = nn.ModuleList([nn.Linear(6, 6), nn.Linear(6, 6)])

        def forward(self, x: Tensor) -> Tensor:
            if x[:, 0].max() > 0:
                x = torch.where(x[:, :1] > 0, self.expert[0](x), x)
            return torch.where(x[:, :1] < -1e3, self.expert[1](x), x) if x.min() < -1e3 else x

    model, x = Experts().eval(), data(40, 6)
    with pytest.raises(ValueError, match="calibration data never reached expert.1.*exclude="):
        quantize(model, method=method, w_bits=4, a_bits=4, calibration=x)
    with pytest.warns(UserWarning, match=r"expert.1 \(excluded\)"):
        quantized = quantize(model, method=method, w_bits=4, a_bits=4, calibration=x, exclude=["expert.1"])
    assert list(quantized_layers(quantized)) == ["expert.0"]
    x[30, 0] = -1e4  # now a later batch reaches it
    assert len(quantized_layers(quantize(model, method=method, w_bits=4, a_bits=4, calibration=x, batch_size=8))) == 2


# --- several settings in one go ---


def assert_same_model(found: nn.Module, expected: nn.Module, x: Tensor) -> None:
    assert_same_state(found, snapshot(expected))
    assert coverage(found) == coverage(expected)
    assert found.__dict__["s2d_quantization"] == expected.__dict__["s2d_quantization"]
    assert torch.equal(found(x), expected(x))


@pytest.mark.parametrize("method", METHODS)
def test_several_bit_widths_give_what_separate_calls_give(method: str) -> None:
    model, images, x = tiny_vit().eval(), data(9, 1, 16, 16, seed=1), data(5, 1, 16, 16, seed=2)
    settings = [{"method": method, "w_bits": w, "a_bits": a} for w, a in ((8, 8), (4, 4), (3, 16), (3, 3))]
    copies = quantize_each(model, settings, calibration=images, batch_size=4)
    for setting, quantized in zip(settings, copies, strict=True):
        assert_same_model(quantized, quantize(model, calibration=images, batch_size=4, **setting), x)


def test_several_methods_and_options_do_not_reach_each_other() -> None:
    """Nothing that one setting has made or observed ends up in another, whatever their order."""
    model, images, x = tiny_vit().eval(), data(8, 1, 16, 16, seed=1) * 3, data(5, 1, 16, 16, seed=2)
    settings = [
        {"w_bits": 4, "a_bits": 4},
        {"method": "smoothquant", "alpha": 0.7},
        {"symmetric": True},
        {"method": "smoothquant", "alpha": 0.3},
        {"activations": "per_token"},
        {"method": "repq_vit", "softmax": "uniform"},
        {"method": "erq"},
        {"method": "base_ptq"},
        {"method": "ptq4vit"},
        {"method": "ptq4vit", "seed": 1},
        {"method": "ptq4vit", "likelihood": "categorical"},
        {"method": "repq_vit"},
    ]
    settings = [{"w_bits": 4, "a_bits": 4} | setting for setting in settings]
    for order in (settings, settings[::-1]):
        for setting, quantized in zip(order, quantize_each(model, order, calibration=images), strict=True):
            assert_same_model(quantized, quantize(model, calibration=images, **setting), x)
            with torch.no_grad():
                for tensor in [*quantized.parameters(), *quantized.buffers()]:
                    tensor.fill_(9)


def test_several_settings_share_transforms() -> None:
    model, images, x = tiny_vit().eval(), data(8, 1, 16, 16, seed=1), data(5, 1, 16, 16, seed=2)
    options = {"calibration": images, "transforms": ("smooth", "rotation"), "exclude": "head"}
    settings = [{"w_bits": bits, "a_bits": bits} for bits in (8, 3)]
    with pytest.warns(UserWarning, match="head"):
        for setting, quantized in zip(settings, quantize_each(model, settings, **options), strict=True):
            assert_same_model(quantized, quantize(model, **setting, **options), x)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"w_bits": 9, "a_bits": 4}, "^w_bits is 9"),
        ({"w_bits": 4}, "^a_bits is None"),
        ({"w_bits": 4, "a_bits": 4, "method": "gptq"}, "unknown method 'gptq'"),
        ({"w_bits": 4, "a_bits": 4, "method": "erq", "alpha": 1}, "'erq' has no option 'alpha'"),
    ],
)
def test_a_bad_setting_stops_all_before_any_work(setting: dict, message: str) -> None:
    def forward(_x: Tensor) -> Tensor:
        raise AssertionError("the model was run")

    model = Mlp()
    model.forward = forward
    with pytest.raises(ValueError, match=message):
        quantize_each(model, [{"w_bits": 4, "a_bits": 4}, setting], calibration=data(8, 6))


@pytest.mark.parametrize(("memory", "passes"), [(1e9, 0), (0.0, 2)])
def test_only_what_one_pass_collects_is_kept(memory: float, passes: int) -> None:
    """Inputs that take several passes may change between them, and are more than should be held."""
    x = data(8, 6)
    first, second = prepare(Mlp().eval(), x), prepare(Mlp().eval(), x)
    shared, calls = Shared(), []
    expected = list(site_inputs(first, [x], memory=memory, shared=shared))
    second.register_forward_hook(lambda *_: calls.append(1))
    found = list(site_inputs(second, [x], memory=memory, shared=shared))
    assert len(calls) == passes
    for a, b in zip(found, expected, strict=True):
        assert a.site is second.get_submodule(a.site.name) and torch.equal(a.inputs[0], b.inputs[0])
