"""Quantizers against brute force over all their codes, torch's own fake quantization and numpy's quantiles."""

from __future__ import annotations

import copy
import json
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from grids import grid_by_hand
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from s2d.ptq import parse_bits
from s2d.ptq.log_sqrt2 import LogSqrt2Quantizer
from s2d.ptq.quantizers import (
    QUANTIZERS,
    AffineQuantizer,
    Quantizer,
    best_percentile_range,
    check_bits,
    fake_quantize,
    first_least,
    round_to_grid,
)
from s2d.ptq.twin_uniform import GELU_MINIMUM, SPLITS, TwinUniformGELU, TwinUniformSoftmax, twin_gelu, twin_softmax

BITS = (2, 3, 4, 5, 6, 7, 8)
GRANULARITIES = ("per_tensor", "per_channel", "per_token")


def data(*shape: int, seed: int = 0, offset: float = 0.0, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(*shape, generator=generator, dtype=torch.float64) + offset).to(dtype)


def first_of_the_least(errors: list[float]) -> int:
    """The rule of every search: the first candidate that is no worse than the best by a ten-thousandth."""
    return next(i for i, error in enumerate(errors) if error <= min(errors) + 1e-4 * abs(min(errors)))


def calibrated(x: Tensor, n_bits: int, **options) -> AffineQuantizer:
    quantizer = AffineQuantizer(n_bits, **options)
    quantizer.observe(x)
    quantizer.freeze()
    return quantizer


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
    scale, zero_point, q_min, q_max = grid_by_hand(x.double().numpy(), n_bits, symmetric, granularity)

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
    q = calibrated(calibration, n_bits, symmetric=symmetric)
    ties = (torch.arange(-300, 300) + 0.5) * q.scale
    x = torch.cat([calibration, 3 * data(500, seed=2), ties])  # half of it outside the calibrated range
    expected = torch.fake_quantize_per_tensor_affine(x, q.scale, q.zero_point.int(), q.q_min, q.q_max)
    assert torch.equal(q(x), expected)


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("n_bits", BITS)
@pytest.mark.parametrize("shape", [(7, 60), (7, 5, 4, 3)])
def test_agrees_with_torch_per_channel(n_bits: int, symmetric: bool, shape: tuple[int, ...]) -> None:
    x = data(*shape, seed=3) * torch.arange(1.0, 8).view(-1, *(1,) * (len(shape) - 1))
    q = calibrated(x, n_bits, symmetric=symmetric, granularity="per_channel")
    expected = torch.fake_quantize_per_channel_affine(
        x, q.scale.flatten(), q.zero_point.flatten().int(), 0, q.q_min, q.q_max
    )
    assert torch.equal(q(x), expected)
    ties = (torch.arange(-300, 300) + 0.5) * q.scale.view(7, 1)
    expected = torch.fake_quantize_per_channel_affine(
        ties, q.scale.flatten(), q.zero_point.flatten().int(), 0, q.q_min, q.q_max
    )
    assert torch.equal(fake_quantize(ties, q.scale.view(7, 1), q.zero_point.view(7, 1), q.q_min, q.q_max), expected)


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


# --- the pure functions ---


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_the_grid_functions_agree_with_torch(dtype: torch.dtype) -> None:
    x = torch.cat([data(999, seed=1) * 3, torch.tensor([0.0, 1e4, -1e4])]).to(dtype)
    for scale in (0.037, 0.5, 3.3):
        step = torch.tensor(scale)
        expected = torch.fake_quantize_per_tensor_affine(x.float(), step, torch.tensor(3, dtype=torch.int32), -8, 7)
        assert torch.equal(fake_quantize(x, step, 3, -8, 7), expected.to(dtype))
        codes = round_to_grid(x, step, torch.tensor(3), -8, 7)
        assert codes.dtype == torch.float32
        assert torch.equal(((codes - 3) * step).to(dtype), expected.to(dtype))


def test_a_leading_dimension_holds_candidates() -> None:
    x, steps = data(4, 5, 6), torch.linspace(0.1, 1.0, 7)
    zeros = torch.arange(7.0)
    together = fake_quantize(x, steps.view(-1, 1, 1, 1), zeros.view(-1, 1, 1, 1), 0, 15)
    # One scale with many zero points, too.
    shifted = round_to_grid(x, steps[0], zeros.view(-1, 1, 1, 1), 0, 15)
    for i in range(7):
        assert torch.equal(together[i], fake_quantize(x, steps[i], zeros[i], 0, 15))
        assert torch.equal(shifted[i], round_to_grid(x, steps[0], zeros[i], 0, 15))
    assert torch.equal(x, data(4, 5, 6))  # the argument is left alone


def test_float64_is_computed_in_float64() -> None:
    x = data(1000, dtype=torch.float64)
    q = calibrated(x, 8)
    assert q.scale.dtype == q(x).dtype == torch.float64
    codes = np.clip(np.round(x.numpy() / q.scale.item()) + q.zero_point.item(), 0, 255)
    np.testing.assert_allclose(q(x).numpy(), (codes - q.zero_point.item()) * q.scale.item(), rtol=1e-15)


def test_subnormal_scales_do_not_overflow() -> None:
    x = torch.tensor([0.0, 1e-40, -1e-40, 1.0])
    got = fake_quantize(x, torch.tensor(1e-42), 0, -8, 7)
    assert torch.isfinite(got).all() and got[0] == 0
    assert torch.isfinite(calibrated(x[:3], 8)(x)).all()


def test_nan_stays_nan() -> None:
    x = torch.tensor([torch.nan, 0.5])
    for q in every_quantizer(4):
        assert q(x).isnan().tolist() == [True, False], q


# --- every quantizer ---


def every_quantizer(n_bits: int) -> list[Quantizer]:
    """One of each kind, calibrated on probabilities, which all of them take."""
    x = probabilities(6, 40)
    quantizers = [AffineQuantizer(n_bits, calibration=c) for c in ("minmax", "percentile", "mse")]
    quantizers += [AffineQuantizer(n_bits, symmetric=True, narrow_range=False), LogSqrt2Quantizer(n_bits)]
    quantizers += [TwinUniformGELU(n_bits), TwinUniformSoftmax(n_bits)]
    for quantizer in quantizers:
        quantizer.observe(x)
        quantizer.freeze()
    return quantizers


def probabilities(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return (3 * data(*shape, seed=seed, dtype=torch.float64)).softmax(-1).to(dtype)


def with_shapes(n_bits: int) -> list[tuple[Quantizer, Tensor]]:
    x = data(5, 4, 21, seed=3)
    options = [{"granularity": "per_channel", "axis": a} for a in (0, 1, -1)]
    options += [{"granularity": "per_group", "group_size": g, "symmetric": True} for g in (1, 8, 21, 99)]
    options += [{"granularity": "per_token"}, {"calibration": "percentile", "percentile": 0.99}]
    return [(q, probabilities(6, 40)) for q in every_quantizer(n_bits)] + [
        (calibrated(x, n_bits, **each), x) for each in options
    ]


@pytest.mark.parametrize("n_bits", [2, 4, 8])
def test_config_and_state_dict_rebuild_every_quantizer(n_bits: int) -> None:
    for q, x in with_shapes(n_bits):
        rebuilt = QUANTIZERS[type(q).__name__](**json.loads(json.dumps(q.config())))
        rebuilt.load_state_dict(q.state_dict())
        assert rebuilt.config() == q.config() and repr(rebuilt) == repr(q)
        assert rebuilt.state_dict().keys() == q.state_dict().keys()
        assert all(torch.equal(a, q.state_dict()[k]) for k, a in rebuilt.state_dict().items())
        assert torch.equal(rebuilt(x), q(x)) and torch.equal(rebuilt.codes(x), q.codes(x))
        assert not {"low", "high", "errors"} & q.state_dict().keys()
        # Nested, over a grid of another shape, in one step with others.
        holder = torch.nn.ModuleList([AffineQuantizer(4), type(q)(**q.config())])
        source = torch.nn.ModuleList([calibrated(data(3, 4), 4), q])
        holder.load_state_dict(source.state_dict())
        assert torch.equal(holder[1](x), q(x)) and torch.equal(holder[0].scale, source[0].scale)


def test_a_state_dict_does_not_alias_and_keeps_float64() -> None:
    source = calibrated(data(3, 4, dtype=torch.float64), 4, granularity="per_channel")
    target = calibrated(data(7), 4)  # a grid of another shape and dtype is replaced
    target.load_state_dict(source.state_dict())
    assert target.scale.dtype == torch.float64 and target.scale.data_ptr() != source.scale.data_ptr()
    assert torch.equal(target.scale, source.scale)
    with pytest.raises(RuntimeError, match="Missing key"):
        target.load_state_dict(AffineQuantizer(4).state_dict())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("n_bits", BITS)
def test_every_quantizer_is_idempotent_and_consistent(n_bits: int, dtype: torch.dtype) -> None:
    for q in every_quantizer(n_bits):
        x = torch.cat([probabilities(7, 40, seed=1), torch.tensor([[0.0, 1.0]]).repeat(1, 20)])
        x = torch.where(x < 1e-3, 0, x).to(dtype)  # float16 is exact enough from there on
        if not isinstance(q, (LogSqrt2Quantizer, TwinUniformSoftmax)):
            x = x - 0.2
        once = q(x)
        assert once.dtype == dtype and q.codes(x).dtype == torch.int16
        assert torch.equal(q(once), once), q
        codes = q.codes(x)
        assert codes.max() - codes.min() < 2**n_bits
        torch.testing.assert_close(q.dequantize(codes).to(dtype), once, rtol=1e-6, atol=0)
        if dtype == torch.float32:
            assert torch.equal(q.dequantize(codes), once), q


def test_every_quantizer_refuses_what_it_cannot_use() -> None:
    makers = [AffineQuantizer, LogSqrt2Quantizer, TwinUniformGELU, TwinUniformSoftmax]
    makers += [lambda b, c=c: AffineQuantizer(b, calibration=c) for c in ("percentile", "mse")]
    for make in makers:
        for bad in (torch.nan, torch.inf, -torch.inf):
            with pytest.raises(ValueError, match="holds NaN or infinity"):
                make(4).observe(torch.tensor([0.5, bad]))
        with pytest.raises(ValueError, match="is empty"):
            make(4).observe(torch.empty(0, 3))
        with pytest.raises(ValueError, match="saw no calibration data"):
            make(4).freeze()
        with pytest.raises(ValueError, match="not calibrated"):
            make(4)(torch.ones(2))
        with pytest.raises(ValueError, match="not calibrated"):
            make(4).dequantize(torch.ones(2, dtype=torch.int16))
        for n_bits in (1, 9, True, "4", 16, 32):
            with pytest.raises(ValueError, match="n_bits is"):
                make(n_bits)


@pytest.mark.parametrize("value", [0.0, 1e-30, 0.3, 1.0])
def test_no_quantizer_gives_nan_on_constant_data(value: float) -> None:
    x = torch.full((3, 8), value)
    for q in every_quantizer(3):
        q.observe(x)  # starts afresh
        q.freeze()
        assert torch.isfinite(q(x)).all() and torch.isfinite(q(torch.tensor([0.0, 1e-40, 1.0]))).all(), q
        assert q(torch.zeros(1)) == 0
        if not isinstance(q, TwinUniformSoftmax) and getattr(q, "narrow_range", True):
            torch.testing.assert_close(q(x), x, rtol=1e-5, atol=0)


def test_calibrating_again_forgets_and_freezing_again_does_not() -> None:
    for q in every_quantizer(4):
        before = copy.deepcopy(q.state_dict())
        q.freeze()
        assert all(torch.equal(v, before[k]) for k, v in q.state_dict().items())
        q.observe(torch.full((4, 4), 1e-3))
        q.freeze()
        fresh = type(q)(**q.config())
        fresh.observe(torch.full((4, 4), 1e-3))
        fresh.freeze()
        assert all(torch.equal(v, fresh.state_dict()[k]) for k, v in q.state_dict().items())


def test_what_was_observed_may_change_afterwards() -> None:
    for make in (lambda: AffineQuantizer(4, calibration="mse"), lambda: LogSqrt2Quantizer(4)):
        x, q, expected = probabilities(4, 9), make(), make()
        q.observe(x)
        expected.observe(x.clone())
        x.zero_()
        q.freeze(), expected.freeze()
        assert torch.equal(q.scale, expected.scale)


# --- gradients ---


@pytest.mark.parametrize("symmetric", [False, True])
def test_the_gradient_is_that_of_torch(symmetric: bool) -> None:
    q = calibrated(data(500, seed=1), 3, symmetric=symmetric)
    ours = (3 * data(900, seed=2)).requires_grad_()
    theirs = ours.detach().clone().requires_grad_()
    weight = data(900, seed=3)
    out = q(ours)
    (out * weight).sum().backward()
    zero = q.zero_point.int()
    (torch.fake_quantize_per_tensor_affine(theirs, q.scale, zero, q.q_min, q.q_max) * weight).sum().backward()
    assert torch.equal(ours.grad, theirs.grad)
    assert 0 < (ours.grad == 0).sum() < 900
    assert torch.equal(out.detach(), q(ours.detach()))
    assert out.requires_grad and not q(ours.detach()).requires_grad
    with torch.no_grad():
        assert not q(ours).requires_grad


def test_the_gradient_of_other_granularities_and_quantizers() -> None:
    for q, x in with_shapes(4):
        x = x.clone().requires_grad_()
        out = q(x)
        assert torch.equal(out.detach(), q(x.detach()))
        out.sum().backward()
        assert ((x.grad == 0) | (x.grad == 1)).all() and x.grad.mean() > 0.8
    outside = torch.tensor([-5.0, 5.0, torch.inf], requires_grad=True)
    for q in every_quantizer(4):
        (gradient,) = torch.autograd.grad(q(outside).sum(), outside)
        assert gradient.tolist() == [0, 0, 0], q
    half = torch.tensor([0.1, 9.0], dtype=torch.bfloat16, requires_grad=True)
    q(half).sum().backward()
    assert half.grad.tolist() == [1, 0] and half.grad.dtype == torch.bfloat16


# --- granularities and calibrations of AffineQuantizer ---


@pytest.mark.parametrize("axis", [0, 1, 2, -1, -2])
def test_channels_along_any_axis(axis: int) -> None:
    x = data(3, 4, 5) * torch.arange(1.0, 61).view(3, 4, 5)
    q = calibrated(x, 4, granularity="per_channel", axis=axis)
    assert q.scale.numel() == x.shape[axis]
    for index in range(x.shape[axis]):
        part = x.select(axis, index)
        assert torch.equal(q(x).select(axis, index), calibrated(part, 4)(part))


def test_a_negative_axis_takes_any_number_of_leading_dimensions() -> None:
    x = data(3, 4, 5)
    q = calibrated(x, 4, granularity="per_channel", axis=-1)
    assert torch.equal(q(x.flatten(0, 1)), q(x).flatten(0, 1))
    with pytest.raises(ValueError, match="axis is 3, the data has 3 dimensions"):
        AffineQuantizer(4, granularity="per_channel", axis=3).observe(x)
    with pytest.raises(ValueError, match="observe data with the same channels"):
        q2 = AffineQuantizer(4, granularity="per_channel", axis=-1)
        q2.observe(x)
        q2.observe(x[..., :2])


@pytest.mark.parametrize("calibration", ["minmax", "percentile", "mse"])
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("group_size", [1, 4, 5, 10, 16])
def test_groups_are_tensors_of_their_own(group_size: int, symmetric: bool, calibration: str) -> None:
    x = data(2, 3, 10, seed=4) * torch.logspace(-1, 1, 60).view(2, 3, 10)
    options = {"symmetric": symmetric, "calibration": calibration, "percentile": 0.9}
    q = calibrated(x, 4, granularity="per_group", group_size=group_size, **options)
    assert q.scale.shape == (2, 3, -(-10 // group_size))
    got = q(x)
    assert torch.equal(q.dequantize(q.codes(x)), got)
    for row in np.ndindex(2, 3):
        for start in range(0, 10, group_size):
            part = x[row][start : start + group_size]
            expected = calibrated(part, 4, **options)(part)
            torch.testing.assert_close(got[row][start : start + group_size], expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"granularity": "per_group"}, "group_size is None"),
        ({"granularity": "per_group", "group_size": 0}, "group_size is 0"),
        ({"group_size": 4}, "group_size is 4 with granularity 'per_tensor'"),
        ({"calibration": "entropy"}, "calibration is 'entropy': choose one of minmax, percentile, mse"),
        ({"calibration": "mse", "granularity": "per_token"}, "calibration is 'mse': per_token"),
        ({"percentile": 0.5}, "percentile is 0.5"),
        ({"percentile": 1.01}, "percentile is 1.01"),
    ],
)
def test_options_that_make_no_sense(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        AffineQuantizer(4, **options)


@pytest.mark.parametrize("n_bits", BITS)
def test_the_wide_symmetric_grid(n_bits: int) -> None:
    levels = 2 ** (n_bits - 1)
    q = calibrated(torch.tensor([-3.0, 1.0]), n_bits, symmetric=True, narrow_range=False)
    assert (q.q_min, q.q_max) == (-levels, levels - 1)
    assert q.scale.item() == pytest.approx(3 / (levels - 0.5))
    assert q.codes(torch.tensor([-9.0, 0.0, 9.0])).tolist() == [-levels, 0, levels - 1]
    assert torch.equal(q(q(data(50))), q(data(50)))


@pytest.mark.parametrize("p", [0.51, 0.9, 0.999, 1.0])
@pytest.mark.parametrize("granularity", ["per_tensor", "per_channel"])
def test_percentiles_agree_with_numpy(granularity: str, p: float) -> None:
    parts = [data(4, 333, seed=s, dtype=torch.float64) for s in range(3)]
    q = AffineQuantizer(4, granularity=granularity, calibration="percentile", percentile=p)
    for part in parts:
        q.observe(part)
    q.freeze()
    axis = None if granularity == "per_tensor" else 1
    low, high = np.quantile(torch.cat(parts, 1).numpy(), [1 - p, p], axis=axis)
    expected = AffineQuantizer(4)
    expected.set_range(torch.tensor(low), torch.tensor(high))
    np.testing.assert_allclose(q.scale.flatten(), expected.scale.flatten(), rtol=1e-12)
    assert torch.equal(q.zero_point.flatten(), expected.zero_point.flatten())


def error_by_hand(x: np.ndarray, low: float, high: float, n_bits: int, symmetric: bool) -> float:
    """Squared error over the nearest of all grid points."""
    low, high = min(low, 0), max(high, 0)
    if symmetric:
        q_max = 2 ** (n_bits - 1) - 1
        scale = max(-low, high) / q_max
        grid = scale * np.arange(-q_max, q_max + 1)
    else:
        scale = (high - low) / (2**n_bits - 1)
        grid = scale * (np.arange(2**n_bits) - np.round(-low / scale))
    return (np.abs(x[:, None] - grid).min(1) ** 2).sum()


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("n_bits", [2, 4])
def test_mse_is_as_good_as_trying_every_range(n_bits: int, symmetric: bool) -> None:
    x = F.gelu(2 * data(3, 80, seed=5, dtype=torch.float64)) if not symmetric else data(3, 80, seed=5).double() ** 3
    q = calibrated(x, n_bits, symmetric=symmetric, granularity="per_channel", calibration="mse")
    factors = np.arange(1, 101) / 100
    for row, got in zip(x.numpy(), q(x).numpy(), strict=True):
        found, low, high = ((got - row) ** 2).sum(), row.min(), row.max()
        joint = min(error_by_hand(row, f * low, f * high, n_bits, symmetric) for f in factors)
        assert found <= joint * (1 + 1e-9)
        if symmetric:
            assert found == pytest.approx(joint, rel=1e-9)
        else:
            # One end after the other finds nearly what all pairs of factors do.
            pairs = min(error_by_hand(row, a * low, b * high, n_bits, False) for a in factors[::4] for b in factors)
            assert found <= 1.1 * pairs
        assert found < error_by_hand(row, low, high, n_bits, symmetric)  # than without searching


@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
def test_mse_at_extreme_scales(scale: float) -> None:
    # The squares of these are beyond float32.
    x = data(400, seed=6) ** 3
    plain, q = calibrated(x, 3, calibration="mse"), calibrated(x * scale, 3, calibration="mse")
    torch.testing.assert_close(q.scale / scale, plain.scale, rtol=1e-5, atol=0)


def test_set_range_and_set_grid() -> None:
    q = AffineQuantizer(4, granularity="per_channel")
    q.set_range(torch.tensor([[-1.0], [0.0], [2.0]]), torch.tensor([[2.0], [0.0], [2.0]]))
    torch.testing.assert_close(q.scale, torch.tensor([[3 / 15], [1.0], [2 / 15]]), rtol=1e-6, atol=0)
    assert torch.equal(q.zero_point, torch.tensor([[5.0], [0.0], [0.0]]))
    scale = torch.tensor([[0.5], [1.0]])
    q.set_grid(scale, torch.tensor([[3], [0]]))
    scale.zero_()
    assert torch.equal(q(torch.tensor([[-9.0], [2.4]])), torch.tensor([[-1.5], [2.0]]))
    for wrong in (0.0, -1.0, torch.nan, torch.inf):
        with pytest.raises(ValueError, match="scale is"):
            q.set_grid(torch.tensor([1.0, wrong]))
    for wrong in (0.5, -1, 16, torch.nan):
        with pytest.raises(ValueError, match="zero_point is"):
            q.set_grid(1.0, wrong)
    with pytest.raises(ValueError, match="zero_point is 1.0: round and clamp it to 0 to 0"):
        AffineQuantizer(4, symmetric=True).set_grid(1.0, 1)
    for low, high in ((torch.nan, 1.0), (0.0, torch.inf), (2.0, 1.0)):
        with pytest.raises(ValueError, match="low is|high is"):
            q.set_range(low, high)
    for use in (lambda q: q.set_grid(1.0), lambda q: q.set_range(0.0, 1.0)):
        with pytest.raises(ValueError, match="measured at run time"):
            use(AffineQuantizer(4, granularity="per_token"))


# --- ties ---


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_first_of_the_least_wins_whatever_rounding_makes_of_a_tie(dtype: torch.dtype) -> None:
    for seed in range(50):
        errors = data(30, 4, seed=seed, dtype=torch.float64) + (3 if seed % 2 else 0)  # ERQ's may be negative
        errors[20] = errors[11] = errors[7] = errors.amin(0) - 0.1  # a tie
        rounded = (errors * (1 + 1e-6 * data(30, 4, seed=seed + 1, dtype=torch.float64))).to(dtype)
        assert first_least(rounded).tolist() == [7] * 4
        untied = data(30, 4, seed=seed + 2, dtype=dtype)
        assert first_least(untied).tolist() == [first_of_the_least(column) for column in untied.T.tolist()]
    for errors, expected in (([0.0, 0.0], 0), ([math.inf, 1.0], 1), ([math.inf, math.inf], 0), ([1.0, 0.0, 0.0], 1)):
        assert int(first_least(torch.tensor(errors, dtype=dtype))) == expected


# --- best_percentile_range ---

PERCENTILES = (0.97, 0.99, 0.999, 1.0)


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("axis", [None, 0, 1, -1])
def test_the_best_percentiles_are_those_of_brute_force(axis: int | None, symmetric: bool) -> None:
    x = data(5, 6, 70, seed=7, dtype=torch.float64) ** 3 + 0.2
    low, high = best_percentile_range(x, 3, PERCENTILES, axis=axis, symmetric=symmetric)
    rows = x.reshape(1, -1) if axis is None else x.movedim(axis, 0).flatten(1)
    chosen = set()
    for row, got_low, got_high in zip(rows.numpy(), low.flatten(), high.flatten(), strict=True):
        pairs = [np.quantile(row, [1 - p, p]) for p in PERCENTILES]
        best = first_of_the_least([error_by_hand(row, *pair, 3, symmetric) for pair in pairs])
        chosen.add(best)
        np.testing.assert_allclose([got_low, got_high], pairs[best], rtol=1e-12)
    assert axis is None or len(chosen) > 1
    torch.broadcast_tensors(x, low, high)
    granularity = {"granularity": "per_tensor"} if axis is None else {"granularity": "per_channel", "axis": axis}
    q = AffineQuantizer(3, symmetric=symmetric, **granularity)
    q.observe(x)
    assert q.low.shape == low.shape
    q.set_range(low, high)
    assert torch.isfinite(q(x)).all()


def test_the_best_percentiles_of_degenerate_rows() -> None:
    x = data(5, 40).half()
    x[0], x[1], x[2] = 0, 0.3, -7
    x[3, 1:] = 0  # one entry alone is not zero
    low, high = best_percentile_range(x, 4, PERCENTILES, axis=0)
    assert low.dtype == torch.float32 and torch.isfinite(torch.cat([low, high])).all()
    q = AffineQuantizer(4, granularity="per_channel")
    q.set_range(low, high)
    torch.testing.assert_close(q(x)[:3], x[:3], rtol=1e-3, atol=0)
    for value in (torch.zeros(3), torch.full((3, 2), 0.7), torch.tensor([-2.0])):
        q = AffineQuantizer(4)
        q.set_range(*best_percentile_range(value, 4, PERCENTILES))
        torch.testing.assert_close(q(value), value)
    for bad, message in ((torch.empty(0), "is empty"), (torch.tensor([torch.nan]), "NaN or infinity")):
        with pytest.raises(ValueError, match=message):
            best_percentile_range(bad, 4, PERCENTILES)
    for percentiles, message in (((), "percentiles is empty"), ((0.3,), "percentile is 0.3")):
        with pytest.raises(ValueError, match=message):
            best_percentile_range(torch.ones(3), 4, percentiles)


def test_more_entries_than_a_chunk_and_than_torch_quantile_takes() -> None:
    x = torch.linspace(-1, 2, 2**24 + 1)
    low, high = best_percentile_range(x, 8, [0.9])
    torch.testing.assert_close(torch.stack([low, high]), torch.tensor([-0.7, 1.7]), rtol=1e-5, atol=0)
    rows = data(700, 900, seed=8)  # more than a chunk of rows and candidates
    low, high = best_percentile_range(rows, 3, PERCENTILES, axis=0)
    for index in (0, 350, 699):
        alone = best_percentile_range(rows[index], 3, PERCENTILES)
        assert torch.equal(torch.stack(alone), torch.stack([low[index, 0], high[index, 0]]))


# --- LogSqrt2Quantizer ---


@pytest.mark.parametrize("n_bits", BITS)
def test_log_sqrt2_takes_the_level_nearest_in_the_logarithm(n_bits: int) -> None:
    q = LogSqrt2Quantizer(n_bits)
    q.set_scale(0.8)
    last = 2**n_bits - 1
    exponents = -130 * torch.rand(4000, generator=torch.Generator().manual_seed(0)).square()
    x = torch.cat([0.8 * 2**exponents, torch.tensor([0.8, 5.0, 0.0, 1e-45, -1.0])])
    codes = q.codes(x)
    distance = np.abs(
        -2 * np.log2(np.maximum(x.double().numpy(), 1e-300) / q.scale.item())[:, None] - np.arange(last + 1)
    )
    taken = np.take_along_axis(distance, codes.long().numpy()[:, None], 1)[:, 0]
    settled = x.numpy() > 0
    assert (taken <= distance.min(1) + 1e-4)[settled].all()
    assert codes[-5:].tolist() == [0, 0, last, last, last]
    levels = np.append(0.8 * 2.0 ** (-np.arange(last) / 2), 0)
    np.testing.assert_allclose(q(x).numpy(), levels[codes.long().numpy()], rtol=1e-5)
    assert len(q.dequantize(torch.arange(last + 1)).unique()) == 2**n_bits


def test_log_sqrt2_calibration_is_the_best_quantile() -> None:
    chosen = set()
    for seed in range(4):
        parts = [data(30, 700, seed=10 * seed + s).abs() ** (1 + 2 * seed) for s in range(2)]
        q = LogSqrt2Quantizer(4)
        for part in parts:
            q.observe(part)
        q.freeze()
        values = torch.cat(parts).flatten().double()
        candidates = np.quantile(values.numpy(), [0.999, 0.9999, 0.99999, 1.0])
        errors = []
        for d in candidates:
            other = LogSqrt2Quantizer(4)
            other.set_scale(torch.tensor(d))
            errors.append((other(values) - values).square().sum().item())
        best = first_of_the_least(errors)
        chosen.add(best)
        assert q.scale.item() == pytest.approx(candidates[best], rel=1e-6)
    assert len(chosen) > 1


def test_log_sqrt2_of_sparse_and_of_negative_data() -> None:
    x = torch.zeros(5000)
    x[7] = 0.25
    q = LogSqrt2Quantizer(4)
    q.observe(x)
    q.freeze()
    assert torch.equal(q(x), x)
    with pytest.raises(ValueError, match="calibration data holds -1.0"):
        q.observe(torch.tensor([-1.0, 1.0]))
    for wrong in (0.0, torch.nan, -2.0, torch.inf, torch.ones(2)):
        with pytest.raises(ValueError, match="^d "):
            q.set_scale(wrong)


@pytest.mark.parametrize("d", [0.5, 0.7071, 0.8898, 1.0])
def test_log_sqrt2_among_the_subnormals_of_float16(d: float) -> None:
    q = LogSqrt2Quantizer(8)
    q.set_scale(d)
    x = torch.cat([torch.arange(2000) * 2.0**-24, torch.linspace(0, 1, 2000)]).half()
    assert torch.equal(q(q(x)), q(x))


# --- twin uniform quantizers ---


@pytest.mark.parametrize("n_bits", BITS)
def test_twin_gelu_takes_the_nearest_value_of_both_sides(n_bits: int) -> None:
    x = F.gelu(3 * data(800, seed=n_bits))
    q = TwinUniformGELU(n_bits)
    q.observe(x[:400])
    q.observe(x[400:])
    q.freeze()
    levels = 2 ** (n_bits - 1)
    assert q.scale.item() == pytest.approx(x.max().item() / (levels - 1))
    negative = np.arange(-levels, 1) * GELU_MINIMUM / levels
    grid = np.concatenate([negative, np.arange(1, levels) * q.scale.item()])
    assert len(grid) == 2**n_bits
    distance = np.abs(x.double().numpy()[:, None] - grid)
    np.testing.assert_allclose(np.abs(x.numpy() - q(x).numpy()), distance.min(1), atol=1e-6)
    np.testing.assert_allclose(q(x).numpy(), grid[q.codes(x).numpy() + levels], rtol=1e-6, atol=1e-7)
    steps = torch.tensor([0.05, 0.1, 0.7])
    for step, got in zip(steps, twin_gelu(x, steps[:, None], n_bits), strict=True):
        q.set_scale(step)
        assert torch.equal(q(x), got)


def test_twin_gelu_without_positive_values_and_with_wrong_steps() -> None:
    q = TwinUniformGELU(4)
    q.observe(torch.tensor([-0.1, -0.05]))
    q.freeze()
    assert q.scale == 1 and torch.isfinite(q(torch.tensor([-0.1, 3.0]))).all()
    for wrong in (0.0, torch.nan, torch.ones(2)):
        with pytest.raises(ValueError, match="^step "):
            q.set_scale(wrong)


@pytest.mark.parametrize("n_bits", BITS)
@pytest.mark.parametrize("split", [SPLITS[i] for i in (0, 1, 2, 5, 19)] + [0.3])
def test_twin_softmax_takes_the_nearest_value_of_both_ranges(n_bits: int, split: float) -> None:
    last = 2 ** (n_bits - 1) - 1
    x = torch.cat([probabilities(40, 30).flatten(), split * torch.linspace(0, 3, 200), torch.tensor([0.0, 1.0, 2.0])])
    q = TwinUniformSoftmax(n_bits)
    q.set_split(split)
    grid = np.concatenate([np.arange(last + 1) * split / last, np.arange(last + 1) / last])
    distance = np.abs(x.double().numpy()[:, None] - grid).min(1)
    np.testing.assert_allclose(np.abs(x.double().numpy() - q(x).double().numpy()), distance, rtol=1e-5, atol=1e-7)
    codes = q.codes(x)
    assert 0 <= codes.min() and codes.max() <= 2 * last + 1
    np.testing.assert_allclose(q(x).numpy(), grid[codes.numpy()], rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize("n_bits", BITS)
def test_twin_softmax_calibration_is_the_best_split(n_bits: int) -> None:
    chosen = set()
    for width in (3, 50, 2000):
        parts = [probabilities(60, width, seed=s) for s in range(2)]
        q = TwinUniformSoftmax(n_bits)
        for part in parts:
            q.observe(part)
        q.freeze()
        x, other, errors = torch.cat(parts), TwinUniformSoftmax(n_bits), []
        candidates = twin_softmax(x, torch.tensor(SPLITS).view(-1, 1, 1), n_bits)
        for split, candidate in zip(SPLITS, candidates, strict=True):
            other.set_split(split)
            assert torch.equal(other(x), candidate)
            errors.append((candidate - x).double().square().sum().item())
        chosen.add(q.split.item())
        assert errors[SPLITS.index(q.split.item())] == pytest.approx(min(errors), rel=1e-5)
    assert len(chosen) > 1


def test_twin_softmax_refuses_other_data_and_splits() -> None:
    q = TwinUniformSoftmax(4)
    for wrong in (-0.2, 1.5):
        with pytest.raises(ValueError, match="this grid is for probabilities"):
            q.observe(torch.tensor([0.5, wrong]))
    for wrong in (0.0, 1.5, torch.nan, torch.ones(2)):
        with pytest.raises(ValueError, match="^s "):
            q.set_split(wrong)


def test_the_registry_knows_the_classes() -> None:
    for kind in (AffineQuantizer, LogSqrt2Quantizer, TwinUniformGELU, TwinUniformSoftmax):
        assert QUANTIZERS[kind.__name__] is kind
