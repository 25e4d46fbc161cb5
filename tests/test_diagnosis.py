"""The diagnosis of a network: what it finds, that data may come in any pieces, and what it refuses."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from s2d import activation_pcdr, excess_kurtosis, linear_maps, top_singular_triplets
from s2d.diagnosis import diagnose


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


class Block(nn.Module):
    """Two linear layers on sequences; the second has one strong component on channel 3."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.fc1, self.fc2 = nn.Linear(width, 32), nn.Linear(32, width)
        with torch.no_grad():
            self.fc2.weight[3] += 4.0 * nn.functional.normalize(normal(32, seed=9), dim=0)

    def forward(self, x: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        return self.fc2(torch.tanh(self.fc1(x)))


def sequences(items: int, seed: int = 1) -> Tensor:
    """Token 2 of every item drives the strong component, and the other tokens are small."""
    x = 0.02 * normal(items, 5, 16, seed=seed)
    layer = Block()
    x[:, 2] += 2.0 * (layer.fc2.weight[3] @ layer.fc1.weight).detach()
    return x


def test_it_finds_the_layer_the_channel_the_token_and_the_component() -> None:
    first, second = diagnose(Block(), [sequences(40)], outliers=8)
    assert (first.layer, second.layer) == ("fc1", "fc2")
    assert (second.channel, second.channel_share, second.position, second.position_share) == (3, 1.0, 2, 1.0)
    assert second.finding == "spectral" and second.rank == 1
    assert second.on_u1 > 0.9 and 0.4 < second.tightness <= 1 and second.sigma_1[0] <= second.sigma_1[1]


def test_the_numbers_are_those_of_the_parts_it_is_made_of() -> None:
    model, x = Block(), sequences(30)
    row = diagnose(model, [x], k_max=2, outliers=1)[1]
    hidden = torch.tanh(model.fc1(x)).detach().reshape(-1, 32)
    y = (model.fc2(hidden) - model.fc2.bias).detach()
    assert row.max_abs == pytest.approx(y.abs().max().item(), rel=1e-5)
    assert row.excess_kurtosis == pytest.approx(excess_kurtosis(y), rel=1e-4)
    assert row.ratio == pytest.approx((y.abs().max() / y.square().mean().sqrt()).item(), rel=1e-4)
    token, neuron = divmod(int(y.abs().argmax()), y.shape[1])
    expected = activation_pcdr(model.fc2.weight, hidden[token : token + 1], torch.tensor([neuron]), k_max=2)
    assert row.pcdr == pytest.approx(expected[0].clamp(max=1).tolist(), rel=1e-4)
    sigma = float(top_singular_triplets(model.fc2.weight, 1).s)
    assert row.tightness == pytest.approx((y[token].norm() / sigma / hidden[token].norm()).item(), rel=1e-3)


@pytest.mark.parametrize("size", [1, 7, 40])
def test_data_may_come_in_any_pieces(size: int) -> None:
    x, model = sequences(40), Block()
    measured = ("excess_kurtosis", "ratio", "max_abs", "pcdr", "tightness", "input_ratio")
    for one, other in zip(diagnose(model, [x]), diagnose(model, x.split(size)), strict=True):
        assert one._replace(**dict.fromkeys(measured)) == other._replace(**dict.fromkeys(measured))
        for name in measured:
            assert getattr(one, name) == pytest.approx(getattr(other, name), rel=1e-4)


def test_padding_is_left_out() -> None:
    model, x = Block(), sequences(10)
    mask = torch.ones(10, 5, dtype=torch.long)
    mask[:, 2] = 0  # where the outliers are
    without = diagnose(model, [{"x": x, "attention_mask": mask}])
    assert [row.tokens for row in without] == [40, 40]
    assert without[1].position != 2 and without[1].max_abs < 0.5 * diagnose(model, [x])[1].max_abs


def test_a_mask_of_ones_leaves_nothing_out() -> None:
    model, x = Block(), sequences(10)
    assert diagnose(model, [{"x": x, "attention_mask": torch.ones(10, 5)}]) == diagnose(model, [x])


def test_outliers_that_no_component_makes_are_said_to_be_none_of_s2ds() -> None:
    """A flat spectrum: every component has the same part in whatever is large."""
    model = nn.Sequential(nn.Linear(64, 64, bias=False))
    with torch.no_grad():
        model[0].weight.copy_(torch.linalg.qr(normal(64, 64))[0])
    x = 0.01 * normal(200, 64, seed=3)
    x[0] = 50 * model[0].weight[7].detach()  # all components of it along one row
    (row,) = diagnose(model, [x], outliers=1)
    assert row.channel == 7 and row.finding == "not spectral" and row.rank is None and row.position is None


def test_no_outliers_in_a_fresh_network() -> None:
    rows = diagnose(nn.Sequential(nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 8)), [normal(200, 32)])
    assert [row.finding for row in rows] == ["no outliers"] * 2


def test_modes_hooks_and_weights_are_as_they_were() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.5), nn.Linear(8, 4))
    model[1].eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    first, second = diagnose(model, [normal(20, 8)]), diagnose(model, [normal(20, 8)])
    assert first == second  # no dropout
    assert [module.training for module in model] == [True, False, True]
    assert not any(module._forward_hooks for module in model.modules())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_measured_in_float32(dtype: torch.dtype) -> None:
    x = sequences(20)
    wide, narrow = diagnose(Block(), [x])[1], diagnose(Block().to(dtype), [x.to(dtype)])[1]
    assert narrow.channel == wide.channel and narrow.max_abs == pytest.approx(wide.max_abs, rel=0.05)


def test_packed_attention_is_seen_and_convolutions_are_left_out() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.attention = nn.Conv2d(3, 16, 4, 4), nn.MultiheadAttention(16, 2, batch_first=True)

        def forward(self, x: Tensor) -> Tensor:
            tokens = self.stem(x).flatten(2).mT
            return self.attention(tokens, tokens, tokens, need_weights=False)[0]

    found = {row.layer for row in diagnose(Net(), [normal(2, 3, 16, 16)])}
    seen = {name for name, linear in linear_maps(Net()).items() if linear.argument is not None and name != "stem"}
    assert found == seen and len(found) >= 3


def test_an_item_that_makes_nan_names_the_first_layer() -> None:
    x = normal(3, 8)
    x[1, 2] = float("nan")
    with pytest.raises(ValueError, match="layer 0 puts out NaN"):
        diagnose(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 4)), [x])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((nn.Sequential(nn.Conv2d(3, 4, 3)), [normal(1, 3, 8, 8)]), "no linear layer"),
        ((nn.Linear(8, 4), []), "no data"),
        ((nn.Linear(8, 4), [normal(2, 7)]), "cannot be called with this data"),
        ((nn.Linear(8, 4), [torch.tensor([[1, 2]])]), "cannot be called with this data"),
    ],
)
def test_what_cannot_be_diagnosed_is_refused(arguments: tuple, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        diagnose(*arguments)


@pytest.mark.parametrize(("option", "value"), [("k_max", 0), ("tau", 1.5), ("tau", float("nan")), ("outliers", 0)])
def test_options_out_of_range_are_refused(option: str, value: float) -> None:
    with pytest.raises(ValueError, match=option.replace("outliers", "capacity")):
        diagnose(nn.Linear(8, 4), [normal(2, 8)], **{option: value})
