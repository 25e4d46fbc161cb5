"""Theorem 1 on running models: it always holds, and a lie is always found.

Oracles: the spectral norm by ``torch.linalg`` in float64, norms computed by hand from hooks of the test's own, and
planted violations of known size.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from s2d.bound import BoundCheck, check_bound
from s2d.layers import linear_layers

ALIGNED = 0.999 / (1 + 1e-3)  # an aligned input reaches the upper end but for the enclosure's own width


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def mlp(seed: int, *, bias: bool = True, dtype: torch.dtype = torch.float32) -> nn.Sequential:
    """A random MLP of random widths and a random scale."""
    widths = torch.randint(1, 70, (4,), generator=generator(seed)).tolist()
    layers: list[nn.Module] = []
    for m, n in zip(widths[1:], widths[:-1], strict=True):
        layers += [nn.Linear(n, m, bias=bias), nn.GELU()]
    model = nn.Sequential(*layers)
    for index, parameter in enumerate(model.parameters()):
        parameter.data = 10.0 ** (seed % 3 - 2) * torch.randn(parameter.shape, generator=generator(100 * seed + index))
    return model.to(dtype)


def one_layer(weight: Tensor, bias: Tensor | None = None) -> nn.Linear:
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None).to(weight.dtype)
    layer.weight.data = weight.clone()
    if bias is not None:
        layer.bias.data = bias.clone()
    return layer


def top_input(weight: Tensor) -> Tensor:
    return torch.linalg.svd(weight.double())[2][:1].to(weight.dtype)


def hooks_of(model: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


@pytest.fixture(scope="module")
def vit() -> nn.Module:
    from timm.models.vision_transformer import VisionTransformer

    torch.manual_seed(0)
    return VisionTransformer(
        img_size=16, patch_size=4, in_chans=1, embed_dim=32, depth=2, num_heads=2, num_classes=10, class_token=True
    ).eval()


# It never reports a violation that is not there


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("seed", range(10))
def test_no_violation_on_random_mlps(seed: int, dtype: torch.dtype) -> None:
    model = mlp(seed, dtype=dtype)
    batch = (0.1 * torch.randn(32, model[0].in_features, generator=generator(seed))).to(dtype)
    for row in check_bound(model, batch):
        assert row.holds, row
        assert row.tokens == 32
        assert row.tightness <= 1 + 4 * torch.finfo(dtype).eps * 70


@pytest.mark.parametrize("seed", range(6))
def test_no_violation_under_autocast(seed: int) -> None:
    model = mlp(seed)
    with torch.autocast("cpu", torch.bfloat16):
        rows = check_bound(model, torch.randn(32, model[0].in_features, generator=generator(seed)))
    assert all(row.holds for row in rows)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, "autocast"])
def test_no_violation_on_a_vision_transformer(vit: nn.Module, dtype) -> None:
    images = torch.randn(3, 1, 16, 16, generator=generator(0))
    if dtype == "autocast":
        with torch.autocast("cpu", torch.bfloat16):
            rows = check_bound(vit, images)
    else:
        rows = check_bound(vit.to(dtype), images.to(dtype))
        vit.float()
    names = [f"blocks.{n}.{part}" for n in (0, 1) for part in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")]
    assert [row.layer for row in rows] == names
    assert all(row.holds and 0 < row.tightness < 1 and row.tokens == 3 * 17 for row in rows)


def test_no_violation_when_every_input_is_aligned_in_every_dtype() -> None:
    for seed in range(20):
        shape = torch.randint(1, 90, (2,), generator=generator(seed)).tolist()
        weight = torch.randn(shape, generator=generator(seed), dtype=torch.float64)
        for dtype in (torch.float64, torch.float32, torch.float16, torch.bfloat16):
            w = weight.to(dtype)
            scales = torch.logspace(-2, 2, 9, dtype=torch.float64)[:, None]
            (row,) = check_bound(one_layer(w), (top_input(w).double() * scales).to(dtype))
            assert row.holds, (shape, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_no_violation_among_subnormal_numbers(dtype: torch.dtype) -> None:
    # 0.6 times the smallest number rounds up to the smallest number: a gain of 1 that is rounding alone.
    smallest = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
    layer = one_layer(torch.full((1, 1), 0.6, dtype=dtype))
    x = torch.full((1, 1), smallest, dtype=dtype)
    assert layer(x).item() == x.item() > 0
    (row,) = check_bound(layer, x)
    assert row.holds


# What is reported is right


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(1, 1), (5, 3), (3, 5), (64, 48), (150, 200)])
def test_an_aligned_input_is_tight(shape: tuple[int, int], dtype: torch.dtype) -> None:
    weight = torch.randn(shape, generator=generator(1), dtype=torch.float64).to(dtype)
    (row,) = check_bound(one_layer(weight), 7 * top_input(weight))
    truth = torch.linalg.svdvals(weight.double())[0].item()
    assert row.holds
    assert ALIGNED < row.tightness <= 1 + 1e-6
    assert row.lower <= truth * (1 + 1e-13) and truth * (1 - 1e-13) <= row.upper <= 1.001 * row.lower
    assert row.largest_gain == pytest.approx(truth, rel=1e-5)


def test_a_diagonal_layer_in_closed_form() -> None:
    layer = one_layer(torch.diag(torch.tensor([3.0, 4.0])))
    (row,) = check_bound(layer, torch.tensor([[1.0, 0.0], [0.0, 2.0], [1.0, 1.0]]))
    assert row.largest_gain == pytest.approx(4.0, rel=1e-12)
    assert row.tokens == 3
    (row,) = check_bound(layer, torch.tensor([[5.0, 0.0]]))
    assert row.largest_gain == pytest.approx(3.0, rel=1e-12)
    assert row.tightness == pytest.approx(0.75, rel=2e-3)


def test_the_gain_of_an_orthogonal_layer_is_its_scale_for_every_token() -> None:
    q, _ = torch.linalg.qr(torch.randn(20, 20, generator=generator(0), dtype=torch.float64))
    (row,) = check_bound(one_layer(2.5 * q), torch.randn(50, 20, generator=generator(1), dtype=torch.float64))
    assert row.largest_gain == pytest.approx(2.5, rel=1e-12)
    assert ALIGNED < row.tightness <= 1


def test_gains_by_hand_over_batch_and_token_dimensions() -> None:
    model = nn.Sequential(nn.Linear(5, 9), nn.Tanh(), nn.Linear(9, 2), nn.Tanh()).double()
    batch = torch.randn(2, 3, 4, 5, generator=generator(0), dtype=torch.float64)
    rows = check_bound(model, batch)
    x = batch
    for row, (linear, activation) in zip(rows, zip(model[::2], model[1::2], strict=True), strict=True):
        gain = ((x @ linear.weight.T).norm(dim=-1) / x.norm(dim=-1)).max().item()
        assert row.largest_gain == pytest.approx(gain, rel=1e-10)
        assert row.tightness == pytest.approx(gain / row.upper, rel=1e-10)
        assert row.tokens == 24
        x = activation(linear(x))


def test_the_bias_is_no_part_of_the_theorem() -> None:
    weight = torch.randn(6, 5, generator=generator(0), dtype=torch.float64)
    x = torch.randn(9, 5, generator=generator(1), dtype=torch.float64)
    (without,) = check_bound(one_layer(weight), x)
    (with_bias,) = check_bound(one_layer(weight, torch.full((6,), 1e6, dtype=torch.float64)), x)
    assert with_bias.holds
    assert with_bias.largest_gain == pytest.approx(without.largest_gain, rel=1e-7)
    # With the bias left in, the gain would be near 1e6.
    assert with_bias.largest_gain < 10


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_bias_so_large_that_the_output_drowns_in_it_is_no_violation(dtype: torch.dtype) -> None:
    layer = one_layer(torch.randn(16, 16, generator=generator(0)).to(dtype), torch.full((16,), 1e4).to(dtype))
    (row,) = check_bound(layer, 0.01 * torch.randn(8, 16, generator=generator(1)).to(dtype))
    assert row.holds


@pytest.mark.parametrize("bias", [False, True])
def test_zero_inputs(bias: bool) -> None:
    (row,) = check_bound(nn.Linear(4, 3, bias=bias), torch.zeros(5, 4))
    assert (row.holds, row.largest_gain, row.tightness, row.tokens) == (True, 0.0, 0.0, 5)


@pytest.mark.parametrize("bias", [None, torch.tensor([1e3, -2.0])])
def test_a_zero_weight(bias: Tensor | None) -> None:
    (row,) = check_bound(one_layer(torch.zeros(2, 4), bias), torch.randn(5, 4, generator=generator(0)))
    assert row == BoundCheck("", 0.0, 0.0, 0.0, 0.0, True, 5)


def test_rank_one() -> None:
    weight = torch.outer(torch.tensor([3.0, 4.0]), torch.tensor([1.0, 2.0, 2.0]))
    (row,) = check_bound(one_layer(weight), torch.tensor([[1.0, 2.0, 2.0], [2.0, -1.0, 0.0]]))
    assert row.holds
    assert row.largest_gain == pytest.approx(15.0, rel=1e-6)


def test_an_empty_batch() -> None:
    (row,) = check_bound(nn.Linear(4, 3), torch.zeros(0, 4))
    assert (row.holds, row.largest_gain, row.tokens) == (True, 0.0, 0)


# A lie is found


def lie_by_hook(layer: nn.Linear, factor: float) -> None:
    layer.register_forward_hook(lambda _module, _args, output: output * factor)


def lie_by_weight(layer: nn.Linear, factor: float) -> None:
    """The weight grows between the bound and the forward pass."""

    def grow(module: nn.Module, _args: tuple) -> None:
        module.weight.data = module.weight.data * factor

    layer.register_forward_pre_hook(grow)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("lie", [lie_by_hook, lie_by_weight])
@pytest.mark.parametrize("factor", [1.01, 2.0, -3.0])
def test_a_planted_violation_is_found(lie: Callable, factor: float, dtype: torch.dtype) -> None:
    weight = torch.randn(48, 64, generator=generator(0), dtype=torch.float64).to(dtype)
    layer = one_layer(weight)
    lie(layer, factor)
    (row,) = check_bound(layer, top_input(weight))
    assert not row.holds
    assert row.tightness == pytest.approx(abs(factor), rel=2e-3)


def test_one_lying_token_among_many_is_found_and_only_in_its_layer() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8))

    def lie(_module: nn.Module, _args: tuple, output: Tensor) -> Tensor:
        output = output.clone()
        output[17] *= 100
        return output

    model[2].register_forward_hook(lie)
    rows = check_bound(model, torch.randn(40, 8, generator=generator(0)))
    assert [row.holds for row in rows] == [True, False, True]


@pytest.mark.parametrize("how", ["autocast", "bfloat16", "float16"])
def test_half_precision_does_not_hide_a_threefold_violation(how: str) -> None:
    # The allowance for rounding must stay far below the bound: half precision multiplies in half, but adds in float32.
    weight = nn.Linear(768, 768, bias=False).weight.detach()
    dtype = torch.float32 if how == "autocast" else getattr(torch, how)
    layer = one_layer(weight.to(dtype))
    lie_by_hook(layer, 3.0)
    with torch.autocast("cpu", torch.bfloat16, enabled=how == "autocast"):
        (row,) = check_bound(layer, top_input(weight).to(dtype))
    assert row.tightness > 2.9
    assert not row.holds


def test_a_bias_that_is_not_the_layers_own_is_a_violation() -> None:
    layer = one_layer(torch.eye(4), torch.zeros(4))
    layer.register_forward_hook(lambda _module, _args, output: output + 5.0)
    (row,) = check_bound(layer, torch.ones(2, 4))
    assert not row.holds


# What cannot be checked is said


class TwoLayers(nn.Module):
    """``second`` takes part only when asked to; ``first`` is called as often as asked to."""

    def __init__(self, calls: int = 1, both: bool = True, keyword: bool = False) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)
        self.calls, self.both, self.keyword = calls, both, keyword

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(self.calls):
            x = self.first(input=x) if self.keyword else self.first(x)
        return self.second(x) if self.both else x


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_activations_that_are_not_finite_are_refused_by_name_and_hooks_go(bad: float) -> None:
    model = TwoLayers()
    model.first.register_forward_hook(lambda _module, _args, output: output * bad)
    before = hooks_of(model)
    with pytest.raises(ValueError, match="layer first: input or output holds NaN"):
        check_bound(model, torch.ones(2, 4))
    assert hooks_of(model) == before == 1
    with pytest.raises(ValueError, match="layer second: input"):
        check_bound(model, torch.ones(2, 4), layers={"second": model.second})
    assert hooks_of(model) == before


def test_a_weight_that_is_not_finite_is_refused() -> None:
    model = TwoLayers()
    model.second.weight.data[0, 0] = math.nan
    with pytest.raises(ValueError, match="NaN or infinite entries"):
        check_bound(model, torch.ones(2, 4))
    assert hooks_of(model) == 0


def test_hooks_go_after_success_and_after_an_error_of_the_model() -> None:
    model = TwoLayers()
    check_bound(model, torch.ones(2, 4))
    assert hooks_of(model) == 0
    with pytest.raises(RuntimeError):
        check_bound(model, torch.ones(2, 5))
    assert hooks_of(model) == 0


def test_a_layer_called_several_times_is_one_row_over_all_calls() -> None:
    model = TwoLayers(calls=3)
    model.first.bias.data.zero_()
    model.first.weight.data = torch.zeros(4, 4)
    for axis, gain in enumerate([0.5, 2.0, 0.25]):  # each call turns axis into axis + 1
        model.first.weight.data[axis + 1, axis] = gain
    first, second = check_bound(model, torch.eye(4)[[0, 0]])
    assert (first.tokens, second.tokens) == (6, 2)
    assert first.holds and first.largest_gain == pytest.approx(2.0)


@pytest.mark.parametrize("lying_call", [0, 1, 2])
def test_a_violation_in_any_call_stays(lying_call: int) -> None:
    model, calls = TwoLayers(calls=3), []

    def lie(_module: nn.Module, _args: tuple, output: Tensor) -> Tensor:
        calls.append(1)
        return output * 50 if len(calls) == lying_call + 1 else output

    model.first.register_forward_hook(lie)
    first, _ = check_bound(model, torch.ones(2, 4))
    assert not first.holds


def test_a_layer_that_takes_no_part_has_no_row() -> None:
    assert [row.layer for row in check_bound(TwoLayers(both=False), torch.ones(2, 4))] == ["first"]


def test_no_layer_taking_part_is_refused() -> None:
    model = TwoLayers(both=False)
    with pytest.raises(ValueError, match="none of the layers second took part"):
        check_bound(model, torch.ones(2, 4), layers={"second": model.second})
    assert hooks_of(model) == 0


def test_a_layer_called_by_keyword_is_checked_too() -> None:
    rows = check_bound(TwoLayers(keyword=True), torch.ones(2, 4))
    assert [row.layer for row in rows] == ["first", "second"]
    assert all(row.holds for row in rows)


def test_the_choice_of_layers_and_their_order_is_the_callers() -> None:
    model = mlp(0)
    chosen = dict(reversed(linear_layers(model).items()))
    batch = torch.randn(3, model[0].in_features, generator=generator(0))
    assert [row.layer for row in check_bound(model, batch, layers=chosen)] == list(chosen)


def test_the_model_is_left_as_it_was() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5), nn.Linear(4, 4))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    check_bound(model, torch.ones(2, 4))
    assert model.training and model[1].training
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    assert torch.is_grad_enabled()
