"""Quantizers against brute force and torch's own fake quantization; quantized copies against formulas by hand."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from s2d.ptq import METHODS, parse_bits, quantize
from s2d.ptq.prepare import QuantizedLinear, calibrate_inputs, mode, prepare, quantized_layers
from s2d.ptq.quantizers import AffineQuantizer, Quantizer, check_bits
from s2d.ptq.rtn import rtn

BITS = (2, 3, 4, 5, 6, 7, 8)
GRANULARITIES = ("per_tensor", "per_channel", "per_token")


def data(*shape: int, seed: int = 0, offset: float = 0.0, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(*shape, generator=generator, dtype=torch.float64) + offset).to(dtype)


def calibrated(x: Tensor, n_bits: int, **options) -> AffineQuantizer:
    quantizer = AffineQuantizer(n_bits, **options)
    quantizer.observe(x)
    quantizer.freeze()
    return quantizer


def grid_by_hand(x: Tensor, n_bits: int, symmetric: bool, granularity: str) -> tuple[np.ndarray, np.ndarray, int, int]:
    """Scale and zero point (broadcastable to ``x``) and the code range, from the definition, in float64."""
    values = x.double().numpy()
    axes = {"per_tensor": None, "per_channel": tuple(range(1, values.ndim)), "per_token": -1}[granularity]
    low = np.minimum(values.min(axis=axes, keepdims=True), 0)
    high = np.maximum(values.max(axis=axes, keepdims=True), 0)
    if symmetric:
        q_max = 2 ** (n_bits - 1) - 1
        return np.maximum(-low, high) / q_max, np.zeros_like(low), -q_max, q_max
    q_max = 2**n_bits - 1
    scale = (high - low) / q_max
    return scale, np.round(-low / scale), 0, q_max


# --- bits ---


@pytest.mark.parametrize("n_bits", [2, 3, 8, 16, 32])
def test_check_bits_gives_the_number_back(n_bits: int) -> None:
    assert check_bits(n_bits) == n_bits


@pytest.mark.parametrize("n_bits", [0, 1, 9, 15, 17, 33, -4, True, False, 4.0, "4", None])
def test_check_bits_names_the_argument_and_the_value(n_bits) -> None:
    with pytest.raises(ValueError, match=rf"^a_bits is {n_bits!r}: choose 2 to 8"):
        check_bits(n_bits, "a_bits")


@pytest.mark.parametrize("n_bits", [1, 9, True, "4", 16, 32])
def test_a_quantizer_takes_2_to_8_bits(n_bits) -> None:
    with pytest.raises(ValueError, match="n_bits is"):
        AffineQuantizer(n_bits)


def test_unknown_granularity() -> None:
    with pytest.raises(ValueError, match="granularity is 'per_row': choose one of per_tensor, per_channel, per_token"):
        AffineQuantizer(4, granularity="per_row")


@pytest.mark.parametrize(
    ("name", "expected"),
    [("W4A4", (4, 4)), ("W2A8", (2, 8)), ("W8A16", (8, 16)), ("W32A32", (32, 32)), ("FP", (32, 32))],
)
def test_parse_bits(name: str, expected: tuple[int, int]) -> None:
    assert parse_bits(name) == expected


@pytest.mark.parametrize(
    "name", ["", "W", "W4", "A4", "4A4", "W4A", "WA4", "w4a4", "W4A4 ", " W4A4", "WW4A4", "W4A4A4", "W-4A4", "W4.0A4"]
    + ["fp", "FP16", "W\N{SUPERSCRIPT TWO}A4", "W\N{ARABIC-INDIC DIGIT FOUR}A4", "W4A4\n"]
)  # fmt: skip
def test_parse_bits_refuses_other_forms(name: str) -> None:
    with pytest.raises(ValueError, match="is not of the form W4A4"):
        parse_bits(name)


@pytest.mark.parametrize(("name", "side"), [("W1A4", "w_bits is 1"), ("W4A9", "a_bits is 9"), ("W0A0", "w_bits is 0")])
def test_parse_bits_refuses_other_numbers(name: str, side: str) -> None:
    with pytest.raises(ValueError, match=side):
        parse_bits(name)


# --- AffineQuantizer ---


def test_the_interface_is_abstract() -> None:
    with pytest.raises(TypeError, match="abstract"):
        Quantizer()

    class Unfinished(Quantizer):
        def codes(self, x: Tensor) -> Tensor:
            return x

    with pytest.raises(TypeError, match="dequantize, freeze, observe|dequantize.*freeze.*observe"):
        Unfinished()


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("n_bits", BITS)
def test_every_value_goes_to_the_nearest_grid_point(n_bits: int, symmetric: bool, granularity: str) -> None:
    # Offset and spread differ by row, so that a scale of the wrong row would show.
    x = data(6, 41, seed=n_bits) * torch.tensor([1.0, 3.0, 0.01, 50.0, 1.0, 2.0])[:, None]
    x = x + torch.tensor([0.0, 5.0, 0.0, -40.0, -9.0, 0.3])[:, None]
    quantizer = calibrated(x, n_bits, symmetric=symmetric, granularity=granularity)
    codes, quantized = quantizer.codes(x), quantizer(x)
    scale, zero_point, q_min, q_max = grid_by_hand(x, n_bits, symmetric, granularity)

    assert not codes.is_floating_point()
    assert q_min <= codes.min() and codes.max() <= q_max
    np.testing.assert_allclose(quantizer.scale.double().numpy().reshape(scale.shape), scale, rtol=1e-6)
    np.testing.assert_array_equal(quantizer.zero_point.numpy().reshape(scale.shape), zero_point)
    # Exactly scale * (code - zero_point), whatever the scale.
    assert torch.equal(quantized, quantizer.scale * (codes.float() - quantizer.zero_point))
    assert torch.equal(quantized, quantizer.dequantize(codes))

    grid = scale[..., None] * (np.arange(q_min, q_max + 1) - zero_point[..., None])
    distance = np.abs(x.double().numpy()[..., None] - grid)
    taken = np.abs(x.double().numpy() - quantized.double().numpy())
    tolerance = 1e-5 * np.broadcast_to(scale, taken.shape) * q_max
    assert (taken <= distance.min(-1) + tolerance).all()
    assert (taken <= scale / 2 + tolerance).all()
    assert taken.max() > 0.2 * scale.min()  # and it does round


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("n_bits", BITS)
def test_agrees_with_torch_per_tensor(n_bits: int, symmetric: bool) -> None:
    calibration = data(500, seed=1, offset=0.4)
    x = torch.cat([calibration, 3 * data(500, seed=2)])  # half of it outside the calibrated range
    q = calibrated(calibration, n_bits, symmetric=symmetric)
    expected = torch.fake_quantize_per_tensor_affine(x, q.scale, q.zero_point.int(), q.q_min, q.q_max)
    # torch multiplies by 1 / scale, which can fall on the other side of a tie.
    settled = ((x / q.scale).frac().abs() - 0.5).abs() > 1e-3
    assert settled.float().mean() > 0.98
    assert torch.equal(q(x)[settled], expected[settled])


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("n_bits", BITS)
@pytest.mark.parametrize("shape", [(7, 60), (7, 5, 4, 3)])
def test_agrees_with_torch_per_channel(n_bits: int, symmetric: bool, shape: tuple[int, ...]) -> None:
    x = data(*shape, seed=3) * torch.arange(1.0, 8).view(-1, *(1,) * (len(shape) - 1))
    q = calibrated(x, n_bits, symmetric=symmetric, granularity="per_channel")
    expected = torch.fake_quantize_per_channel_affine(
        x, q.scale.flatten(), q.zero_point.flatten().int(), 0, q.q_min, q.q_max
    )
    settled = ((x / q.scale).frac().abs() - 0.5).abs() > 1e-3
    assert settled.float().mean() > 0.98
    assert torch.equal(q(x)[settled], expected[settled])


@pytest.mark.parametrize("symmetric", [False, True])
def test_per_token_is_every_row_on_its_own(symmetric: bool) -> None:
    x = data(2, 3, 5, 16, seed=4) * 10.0 ** data(2, 3, 5, 1, seed=5)
    q = AffineQuantizer(4, symmetric=symmetric, granularity="per_token")
    got = q(x)
    for index in np.ndindex(2, 3, 5):
        assert torch.equal(got[index], calibrated(x[index], 4, symmetric=symmetric)(x[index]))
    # Rows that came before leave no trace.
    assert torch.equal(q(x[:1]), got[:1])


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("n_bits", BITS)
@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_zero_is_exact(granularity: str, n_bits: int, symmetric: bool) -> None:
    x = data(4, 33, seed=6, offset=0.7)
    x[:, 0] = 0
    assert torch.equal(calibrated(x, n_bits, symmetric=symmetric, granularity=granularity)(x)[:, 0], torch.zeros(4))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("n_bits", BITS)
@pytest.mark.parametrize("granularity", ["per_tensor", "per_channel"])
def test_quantizing_twice_changes_nothing(granularity: str, n_bits: int, symmetric: bool, dtype: torch.dtype) -> None:
    x = data(8, 200, seed=7, offset=-0.3, dtype=dtype)
    q = calibrated(x, n_bits, symmetric=symmetric, granularity=granularity)
    once = q(x)
    assert once.dtype == dtype
    assert torch.equal(q(once), once)
    assert torch.equal(q.codes(once), q.codes(x))


def test_quantizing_twice_per_token() -> None:
    x = data(50, 64, seed=8)
    q = AffineQuantizer(4, granularity="per_token")
    once = q(x)
    # The grid is measured again on the rounded row; its ends are grid points, so it is the same up to rounding.
    torch.testing.assert_close(q(once), once, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_more_bits_are_closer(granularity: str, symmetric: bool) -> None:
    x = data(16, 512, seed=9)
    errors = [(calibrated(x, b, symmetric=symmetric, granularity=granularity)(x) - x).square().mean() for b in BITS]
    assert all(3 < coarse / fine < 12 for coarse, fine in zip(errors, errors[1:], strict=False))  # about 4 a bit


def test_finer_granularity_is_closer() -> None:
    x = data(16, 64, seed=10) * torch.logspace(-2, 2, 16)[:, None]
    error = {
        g: ((calibrated(x, 4, granularity=g)(x) - x) / x.std(1, keepdim=True)).square().mean() for g in GRANULARITIES
    }
    assert error["per_channel"] < 0.1 * error["per_tensor"]
    assert torch.equal(error["per_channel"], error["per_token"])  # the same rows of a matrix


# Float32 from 1e-30 to 1e30 in magnitude, and zero.
floats = st.floats(-(2.0**100), 2.0**100, width=32).map(lambda v: 0.0 if abs(v) < 2.0**-100 else v)


@settings(deadline=None, max_examples=150, derandomize=True)
@given(values=st.lists(floats, min_size=1, max_size=12), n_bits=st.sampled_from(BITS), symmetric=st.booleans())
def test_any_floats(values: list[float], n_bits: int, symmetric: bool) -> None:
    x = torch.tensor(values)
    q = calibrated(x, n_bits, symmetric=symmetric)
    got = q(x)
    assert torch.isfinite(got).all() and q.scale > 0
    assert q.q_min <= q.zero_point <= q.q_max and q.zero_point == q.zero_point.round()
    assert ((got.double() - x.double()).abs() <= q.scale.double() * (0.5 + 1e-4)).all()
    assert torch.equal(q(got), got)
    assert torch.equal(q(torch.zeros(1)), torch.zeros(1))


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("value", [0.0, 1e-30, 0.3, -0.3, 7.0, -1e30])
def test_a_constant_is_reproduced(value: float, granularity: str, symmetric: bool) -> None:
    x = torch.full((3, 5), value)
    got = calibrated(x, 4, symmetric=symmetric, granularity=granularity)(x)
    torch.testing.assert_close(got, x, rtol=1e-6, atol=0)


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("granularity", ["per_channel", "per_token"])
def test_a_zero_row_does_not_disturb_the_others(granularity: str, symmetric: bool) -> None:
    x = data(3, 20, seed=11)
    x[1] = 0
    got = calibrated(x, 3, symmetric=symmetric, granularity=granularity)(x)
    assert torch.equal(got[1], torch.zeros(20))
    others = calibrated(x[[0, 2]], 3, symmetric=symmetric, granularity=granularity)(x[[0, 2]])
    assert torch.equal(got[[0, 2]], others)


@pytest.mark.parametrize("symmetric", [False, True])
def test_channels_of_a_single_element(symmetric: bool) -> None:
    x = torch.tensor([[1.5], [-2.5], [0.0], [1e-20]])
    torch.testing.assert_close(
        calibrated(x, 2, symmetric=symmetric, granularity="per_channel")(x), x, rtol=1e-6, atol=0
    )


@pytest.mark.parametrize("sign", [1, -1])
def test_one_sided_data_uses_every_code(sign: int) -> None:
    x = sign * torch.linspace(0.0, 15.0, 16)
    q = calibrated(x, 4)
    assert q.codes(x).unique().tolist() == list(range(16))
    assert torch.equal(q(x), x)
    assert q.zero_point == (0 if sign > 0 else 15)


@pytest.mark.parametrize("sign", [1, -1])
def test_data_away_from_zero_widens_the_range_to_zero(sign: int) -> None:
    q = calibrated(sign * torch.tensor([10.0, 15.0]), 4)
    assert q.scale == 1
    assert torch.equal(q(sign * torch.tensor([-3.0, 0.0, 3.3, 99.0])), sign * torch.tensor([0.0, 0.0, 3.0, 15.0]))


def test_symmetric_codes_leave_the_lowest_out() -> None:
    q = calibrated(torch.tensor([-3.0, 1.0]), 3, symmetric=True)
    assert q.codes(torch.tensor([-9.0, -3.0, -1.2, 0.4, 9.0])).tolist() == [-3, -3, -1, 0, 3]


def test_outside_the_calibrated_range_values_are_clamped() -> None:
    q = calibrated(torch.tensor([-1.0, 2.0]), 2)
    assert torch.equal(q(torch.tensor([-1e9, 1e9, torch.inf, -torch.inf])), torch.tensor([-1.0, 2.0, 2.0, -1.0]))


def test_observations_accumulate_in_any_order() -> None:
    parts = [data(4, 10, seed=s) * (s + 1) for s in range(3)]
    for granularity, joined in (("per_tensor", torch.cat(parts)), ("per_channel", torch.cat(parts, 1))):
        expected = calibrated(joined, 4, granularity=granularity)
        for order in ((0, 1, 2), (2, 0, 1)):
            q = AffineQuantizer(4, granularity=granularity)
            for index in order:
                q.observe(parts[index])
            q.freeze()
            assert torch.equal(q.scale, expected.scale) and torch.equal(q.zero_point, expected.zero_point)


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_calibration_data_must_be_finite(bad: float, granularity: str) -> None:
    x = data(3, 4)
    x[1, 2] = bad
    with pytest.raises(ValueError, match="holds NaN or infinity"):
        AffineQuantizer(4, granularity=granularity).observe(x)


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_calibration_data_must_not_be_empty(granularity: str) -> None:
    with pytest.raises(ValueError, match="is empty"):
        AffineQuantizer(4, granularity=granularity).observe(torch.empty(0, 4))
    with pytest.raises(ValueError, match="saw no calibration data"):
        AffineQuantizer(4, granularity=granularity).freeze()


@pytest.mark.parametrize("granularity", ["per_tensor", "per_channel"])
def test_use_before_freeze(granularity: str) -> None:
    q = AffineQuantizer(4, granularity=granularity)
    for _ in range(2):
        with pytest.raises(ValueError, match="not calibrated"):
            q(torch.ones(2, 2))
        with pytest.raises(ValueError, match="not calibrated"):
            q.dequantize(torch.ones(2, 2, dtype=torch.int16))
        q.observe(torch.ones(2, 2))  # observing is not enough


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("symmetric", [False, True])
def test_half_precision_does_not_overflow(symmetric: bool, granularity: str) -> None:
    # The width of this range, 8e4, is beyond float16; massive activations do reach such values.
    x = torch.tensor([[-4e4, -1e4, 0.0, 1e4, 4e4]], dtype=torch.float16)
    got = calibrated(x, 8, symmetric=symmetric, granularity=granularity)(x)
    assert got.dtype == torch.float16
    assert ((got.double() - x.double()).abs() <= 8e4 / 254 / 2 + 16).all()


def test_half_precision_does_not_underflow() -> None:
    # One step of this grid, 4e-6, is subnormal in float16, which holds it to 1 percent only: 2 steps at code 255.
    x = torch.linspace(0, 1e-3, 256).half()
    q = calibrated(x, 8)
    assert q.scale.item() == pytest.approx(x.max().item() / 255, rel=1e-6)
    assert ((q(x).double() - x.double()).abs() <= 0.51 * q.scale).all()


def test_the_extremes_of_float32_do_not_overflow() -> None:
    x = torch.tensor([-3e38, 0.0, 3e38])
    assert torch.isfinite(calibrated(x, 8).scale)
    torch.testing.assert_close(calibrated(x, 8)(x), x, rtol=0.01, atol=0)


def test_extra_repr_says_what_it_is() -> None:
    assert repr(AffineQuantizer(3, symmetric=True, granularity="per_channel")) == (
        "AffineQuantizer(3 bits, symmetric, per_channel)"
    )


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
        scale, zero_point, q_min, q_max = grid_by_hand(torch.from_numpy(calibration), n_bits, symmetric, granularity)
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


def test_only_the_linear_weights_change() -> None:
    model = tiny_vit()
    quantized = quantize(model, w_bits=4, a_bits=4, calibration=data(8, 1, 16, 16))
    assert list(quantized_layers(quantized)) == VIT_LAYERS
    changed = {f"{name}.weight" for name in VIT_LAYERS}
    after = {name.replace(".linear.", "."): tensor for name, tensor in quantized.state_dict().items()}
    for name, tensor in model.state_dict().items():
        assert torch.equal(after[name], tensor) == (name not in changed), name


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
        weight, quantizer = layer.linear.weight, layer.weight_quantizer
        assert torch.equal(quantizer(weight), weight)
        assert torch.equal(quantizer.dequantize(layer.weight_codes()), weight)
        assert all(len(row.unique()) <= 2**w_bits for row in weight)
        original = model.get_submodule(name).weight
        assert (weight - original).abs().amax(1).le(quantizer.scale.flatten() * 0.5001).all()


def test_codes_of_a_floating_point_weight() -> None:
    quantized = quantize(Mlp(), w_bits=32, a_bits=4, calibration=data(8, 6))
    with pytest.raises(ValueError, match="no codes"):
        quantized.first.weight_codes()


def test_calibration_order_and_batch_size_do_not_matter() -> None:
    model, x = tiny_vit(), data(33, 1, 16, 16)

    def ranges(images: Tensor, batch_size: int) -> list[Tensor]:
        quantized = rtn(model, images, w_bits=4, a_bits=4, batch_size=batch_size)
        layers = quantized_layers(quantized).values()
        return [torch.stack([layer.input_quantizer.low, layer.input_quantizer.high]) for layer in layers]

    expected = ranges(x, 64)
    for images, batch_size in ((x.flip(0), 64), (x, 1), (x, 7), (x.flip(0), 32)):
        # Matrix products of other sizes round differently, hence not exactly.
        torch.testing.assert_close(ranges(images, batch_size), expected, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(torch.stack(ranges(x[:5], 64)), torch.stack(expected), rtol=1e-4, atol=1e-5)


def test_every_calibration_image_counts() -> None:
    x = data(9, 6)
    x[-1] *= 100  # the last row of the last, incomplete batch
    quantized = rtn(Mlp(), x, w_bits=4, a_bits=4, batch_size=4)
    assert quantized.first.input_quantizer.low == x.min() and quantized.first.input_quantizer.high == x.max()


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
    with pytest.raises(ValueError, match="layer second: .*NaN or infinity"):
        quantize(model, w_bits=4, a_bits=4, calibration=data(8, 6))


def test_unknown_method() -> None:
    with pytest.raises(ValueError, match="unknown method 'gptq': choose one of " + ", ".join(METHODS)):
        quantize(Mlp(), method="gptq", w_bits=4, a_bits=4, calibration=data(8, 6))


@pytest.mark.parametrize("activations", ["per_channel", "per_row"])
@pytest.mark.parametrize("a_bits", [4, 32])
def test_unknown_granularity_of_activations(activations: str, a_bits: int) -> None:
    with pytest.raises(ValueError, match=f"activations is '{activations}': choose 'per_tensor' or 'per_token'"):
        quantize(Mlp(), w_bits=4, a_bits=a_bits, calibration=data(8, 6), activations=activations)


@pytest.mark.parametrize("bits", [1, 9, True, "4", 4.0])
@pytest.mark.parametrize("side", ["w_bits", "a_bits"])
def test_bits_out_of_range(side: str, bits) -> None:
    with pytest.raises(ValueError, match=f"^{side} is {bits!r}"):
        quantize(Mlp(), **{"w_bits": 4, "a_bits": 4} | {side: bits}, calibration=data(8, 6))


def test_a_model_without_linear_layers() -> None:
    with pytest.raises(ValueError, match="Sequential has no nn.Linear layer"):
        quantize(nn.Sequential(nn.Flatten(), nn.ReLU()), w_bits=4, a_bits=4, calibration=data(8, 6))


class WithUnused(Mlp):
    def __init__(self) -> None:
        super().__init__()
        self.spare = nn.Linear(4, 4)


def test_a_layer_that_calibration_never_reaches_is_named() -> None:
    with pytest.raises(ValueError, match="layer spare: .*no calibration data"):
        quantize(WithUnused(), w_bits=4, a_bits=4, calibration=data(8, 6))
    # A weight needs no activations to be rounded.
    assert quantize(WithUnused(), w_bits=4, a_bits=32, calibration=data(8, 6)).spare.weight_codes().max() == 15


def test_a_layer_without_bias_stays_without() -> None:
    quantized = quantize(Mlp(), w_bits=4, a_bits=4, calibration=data(8, 6))
    assert quantized.second.linear.bias is None
    assert torch.equal(quantized.first.linear.bias, Mlp().first.bias)


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
    assert torch.equal(quantized.head.weight_quantizer(quantized.head.linear.weight), quantized.head.linear.weight)
    assert not torch.equal(quantized.head.linear.weight, model.head.weight)
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
    assert torch.equal(quantized[0].linear.weight, quantized[2].linear.weight)
    for layer in quantized_layers(quantized).values():
        assert torch.equal(layer.weight_quantizer.dequantize(layer.weight_codes()), layer.linear.weight)
        assert (layer.linear.weight - model[0].weight).abs().max() <= layer.weight_quantizer.scale.max() * 0.5001
    assert torch.equal(quantized[2].linear.bias, model[2].bias)


def test_a_parametrized_weight_is_quantized() -> None:
    model = Mlp()
    torch.nn.utils.parametrizations.weight_norm(model.first)
    before, x = snapshot(model), data(20, 6)
    quantized = quantize(model, w_bits=3, a_bits=8, calibration=x)
    assert all(len(row.unique()) <= 8 for row in quantized.first.linear.weight)
    quantized.eval()(x)
    assert all(len(row.unique()) <= 8 for row in quantized.first.linear.weight)
    assert_same_state(model, before)
    model(x)  # still parametrized, still works


@pytest.mark.parametrize("batch_first", [False, True])
def test_multihead_attention_is_refused_by_name(batch_first: bool) -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = nn.MultiheadAttention(8, 2, batch_first=batch_first)
            self.out = nn.Linear(8, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.out(self.attention(x, x, x)[0])

    for model in (Block(), nn.Sequential(nn.Linear(8, 8), Block())):
        with pytest.raises(ValueError, match=r"layer (1\.)?attention is an nn.MultiheadAttention"):
            quantize(model, w_bits=4, a_bits=4, calibration=data(4, 5, 8))


def test_open_clip_towers() -> None:
    from open_clip.timm_model import TimmModel
    from open_clip.transformer import VisionTransformer

    own = VisionTransformer(image_size=16, patch_size=4, width=32, layers=2, heads=2, mlp_ratio=2.0, output_dim=8)
    with pytest.raises(ValueError, match="resblocks.0.attn is an nn.MultiheadAttention"):
        quantize(own, w_bits=8, a_bits=8, calibration=data(4, 3, 16, 16))
    trunk = TimmModel("test_vit", embed_dim=8, image_size=160, pool="", proj="linear").eval()
    x = data(2, 3, 160, 160)
    quantized = quantize(trunk, w_bits=8, a_bits=8, calibration=x)
    assert "trunk.blocks.0.mlp.fc1" in quantized_layers(quantized) and "head.proj" in quantized_layers(quantized)
    assert 0 < relative_error(quantized, trunk, x) < 1e-2


def test_a_weight_that_is_read_without_calling_the_layer_is_refused() -> None:
    class Reads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(6, 6)

        def forward(self, x: Tensor) -> Tensor:
            return F.linear(x, self.fc.weight)

    with pytest.raises(ValueError, match="Reads cannot be quantized: .*its weight directly"):
        quantize(Reads(), w_bits=4, a_bits=4, calibration=data(4, 6))


def test_a_layer_that_does_more_than_its_product_is_refused() -> None:
    class Doubling(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    with pytest.raises(ValueError, match="does not reproduce the original"):
        quantize(nn.Sequential(Doubling(6, 3)), w_bits=4, a_bits=4, calibration=data(4, 6))


def test_quantizing_a_quantized_model_is_refused() -> None:
    quantized = quantize(Mlp(), w_bits=4, a_bits=4, calibration=data(8, 6))
    with pytest.raises(ValueError, match="layer first is quantized already"):
        quantize(quantized, w_bits=4, a_bits=4, calibration=data(8, 6))


def test_calibration_sees_the_floating_point_model() -> None:
    """The second layer's range is that of the unquantized network, not of one with the first layer quantized."""
    model, x = Mlp().eval(), data(32, 6)
    quantized = quantize(model, w_bits=2, a_bits=2, calibration=x)
    with torch.no_grad():
        seen = F.gelu(model.norm(model.first(x)))
    assert quantized.second.input_quantizer.low == seen.min()
    assert quantized.second.input_quantizer.high == seen.max()


def test_preparing_leaves_the_quantizers_to_the_method() -> None:
    x = data(8, 6)
    prepared = prepare(Mlp(), lambda: None, lambda: AffineQuantizer(4), x)
    assert {layer.mode for layer in quantized_layers(prepared).values()} == {"float"}
    calibrate_inputs(prepared, [x])
    assert {layer.mode for layer in quantized_layers(prepared).values()} == {"float"}
    torch.testing.assert_close(prepared.first.input_quantizer.scale, (x.max() - x.min()) / 15)
    assert torch.equal(prepared(x), Mlp().eval()(x))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_precisions(dtype: torch.dtype) -> None:
    model, x = Mlp().to(dtype).eval(), data(16, 6, dtype=dtype)
    quantized = quantize(model, w_bits=8, a_bits=8, calibration=x)
    assert quantized(x).dtype == dtype
    torch.testing.assert_close(quantized(x), model(x), rtol=0.1, atol=0.05)
    for layer in quantized_layers(quantized).values():
        assert torch.equal(layer.weight_quantizer(layer.linear.weight), layer.linear.weight)


def test_a_quantized_model_can_be_copied() -> None:
    x = data(8, 6)
    quantized = quantize(Mlp(), w_bits=4, a_bits=4, calibration=x)
    assert torch.equal(copy.deepcopy(quantized)(x), quantized(x))
