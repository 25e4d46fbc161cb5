"""SmoothQuant's factors against loops in numpy; smoothed models against the originals."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from test_rotation import normal, output, qwen2, vit
from torch import Tensor, nn

from s2d.ptq.prepare import prepare
from s2d.ptq.rotation import rotate
from s2d.ptq.rtn import rtn
from s2d.ptq.sites import quantized_layers, set_mode
from s2d.ptq.smoothquant import smooth, smoothing_factors, smoothquant

ALPHAS = (0.0, 0.3, 0.5, 1.0)


class TwoReaders(nn.Module):
    """A norm that two Linear layers read, one of them without bias."""

    def __init__(self, width: int = 6) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.norm, self.a, self.b = nn.LayerNorm(width), nn.Linear(width, 4), nn.Linear(width, 5, bias=False)
        with torch.no_grad():
            self.norm.weight.copy_(normal(width, seed=3))
            self.norm.bias.copy_(normal(width, seed=4))
            self.norm.weight[1] *= 40  # what it takes to count like the others:
            self.a.weight[:, 1] /= 40
            self.b.weight[:, 1] /= 40

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        return torch.cat([self.a(y), self.b(y)], -1)


def factors_by_hand(x: np.ndarray, weights: list[np.ndarray], alpha: float) -> np.ndarray:
    factors = []
    for j in range(x.shape[-1]):
        x_max = max(abs(row[j]) for row in x.reshape(-1, x.shape[-1]))
        w_max = max(abs(row[j]) for weight in weights for row in weight)
        factors.append(1.0 if x_max == 0 or w_max == 0 else x_max**alpha / w_max ** (1 - alpha))
    return np.array(factors)


@pytest.mark.parametrize("alpha", ALPHAS)
def test_factors_of_a_group_by_hand(alpha: float) -> None:
    model, batches = TwoReaders().eval(), [normal(7, 3, 6), normal(2, 3, 6, seed=1)]
    smoothed = prepare(model, batches[0])
    smooth(smoothed, batches, alpha=alpha)
    x = model.norm(torch.cat(batches)).detach().numpy()
    weights = [layer.weight.detach().numpy() for layer in (model.a, model.b)]
    s = torch.tensor(factors_by_hand(x, weights, alpha), dtype=torch.float32)
    assert torch.allclose(smoothed.norm.weight, model.norm.weight / s, rtol=1e-5)
    assert torch.allclose(smoothed.norm.bias, model.norm.bias / s, rtol=1e-5)
    assert torch.allclose(smoothed.a.weight, model.a.weight * s, rtol=1e-5)
    assert torch.allclose(smoothed.b.weight, model.b.weight * s, rtol=1e-5)
    assert smoothed.b.bias is None
    assert torch.allclose(output(smoothed, batches[0]), output(model, batches[0]), atol=1e-5)


def test_alpha_one_evens_out_the_inputs_and_alpha_zero_the_weights() -> None:
    model, x = TwoReaders().eval(), normal(9, 6)
    smoothed = prepare(model, x)
    smooth(smoothed, [x], alpha=1.0)
    assert torch.allclose(smoothed.norm(x).abs().amax(0), torch.ones(6), atol=1e-5)
    smoothed = prepare(model, x)
    smooth(smoothed, [x], alpha=0.0)
    assert torch.allclose(torch.cat([smoothed.a.weight, smoothed.b.weight]).abs().amax(0), torch.ones(6), atol=1e-5)


@pytest.mark.parametrize("alpha", ALPHAS)
def test_channels_without_range_stay(alpha: float) -> None:
    model, x = TwoReaders().eval(), normal(9, 6)
    with torch.no_grad():
        model.norm.weight[2] = model.norm.bias[2] = 0
        model.a.weight[:, 4] = model.b.weight[:, 4] = 0
    smoothed = prepare(model, x)
    smooth(smoothed, [x], alpha=alpha)
    for channel in (2, 4):
        assert smoothed.norm.weight[channel] == model.norm.weight[channel]
        assert torch.equal(smoothed.a.weight[:, channel], model.a.weight[:, channel])
    assert torch.allclose(output(smoothed, x), output(model, x), atol=1e-5)


def test_extreme_ranges_give_finite_factors() -> None:
    tiny, huge = torch.tensor([1e-38, 1e38]), torch.tensor([1e38, 1e-38])
    for alpha in ALPHAS:
        factors = smoothing_factors(tiny, huge, alpha)
        assert torch.isfinite(factors).all() and (factors >= 1e-4).all() and (factors <= 1e4).all()
    assert smoothing_factors(torch.tensor([4.0]).half(), torch.tensor([1.0]).half(), 0.5).dtype == torch.float32


@pytest.mark.parametrize("alpha", [-0.1, 1.5, float("nan")])
def test_bad_alpha(alpha: float) -> None:
    x = normal(4, 3)
    for model in (nn.Sequential(nn.LayerNorm(3), nn.Linear(3, 2)), nn.Sequential(nn.Linear(3, 2))):
        with pytest.raises(ValueError, match=f"alpha is {alpha!r}: choose a number from 0 to 1"):
            smooth(prepare(model.eval(), x), [x], alpha=alpha)


@pytest.mark.parametrize("alpha", ALPHAS)
@pytest.mark.parametrize("width", [64, 48])
def test_a_smoothed_vit_is_the_same_function(width: int, alpha: float) -> None:
    model, x = vit(width)
    smoothed = prepare(model, x)
    smooth(smoothed, [x[:4], x[4:]], alpha=alpha)
    assert not torch.allclose(smoothed.blocks[0].norm1.weight, model.blocks[0].norm1.weight)
    assert (output(smoothed, x) - output(model, x)).abs().max() < 1e-5


def test_a_smoothed_qwen2_is_the_same_function() -> None:
    model, batch = qwen2()
    smoothed = prepare(model, batch)
    smooth(smoothed, [batch])
    block, original = smoothed.model.layers[0], model.model.layers[0]
    for norm in ("input_layernorm", "post_attention_layernorm"):
        assert not torch.allclose(getattr(block, norm).weight, getattr(original, norm).weight)
    assert torch.equal(block.self_attn.o_proj.weight, original.self_attn.o_proj.weight)
    assert (output(smoothed, batch) - output(model, batch)).abs().max() < 1e-5


class OnePlusNorm(nn.Module):
    """An RMSNorm that multiplies by one plus its weight, as Gemma's."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(normal(3))

    def forward(self, x: Tensor) -> Tensor:
        return x * x.square().mean(-1, keepdim=True).add(1e-6).rsqrt() * (1 + self.weight)


OnePlusNorm.__name__ = "OnePlusRMSNorm"


def test_norms_that_cannot_scale_and_rotated_layers_are_left_alone() -> None:
    x = normal(4, 3)
    model = nn.Sequential(OnePlusNorm(), nn.Linear(3, 2)).eval()
    smoothed = prepare(model, x)
    smooth(smoothed, [x])
    assert torch.equal(smoothed[1].weight, model[1].weight)
    rotated = prepare(nn.Sequential(nn.LayerNorm(3), nn.Linear(3, 2)).eval(), x)
    rotate(rotated, [x])
    before = rotated[1].weight.clone()
    smooth(rotated, [x])
    assert torch.equal(rotated[1].weight, before)


def test_a_smoothed_model_can_be_rotated() -> None:
    model, x = vit(48)
    both = prepare(model, x)
    smooth(both, [x])
    rotate(both, [x])
    assert (output(both, x) - output(model, x)).abs().max() < 1e-5


def test_half_precision_model() -> None:
    model, x = vit()
    model, x = model.bfloat16(), x.bfloat16()
    smoothed = prepare(model, x)
    smooth(smoothed, [x])
    found, expected = output(smoothed, x), output(model, x)
    assert found.dtype == torch.bfloat16
    assert (found - expected).float().norm() < 0.05 * expected.float().norm()


def relative_error(quantized: nn.Module, model: nn.Module, x: Tensor) -> float:
    set_mode(quantized, "quantized")
    expected = output(model, x)
    return ((output(quantized, x) - expected).square().sum() / expected.square().sum()).item()


def test_smoothquant_is_smoothing_and_rtn() -> None:
    model, x = TwoReaders().eval(), normal(64, 6)
    by_hand, at_once, plain = (prepare(model, x) for _ in range(3))
    options = {"w_bits": 4, "a_bits": 4, "symmetric": True, "activations": "per_token"}
    smooth(by_hand, [x], alpha=0.7)
    rtn(by_hand, [x], **options)
    smoothquant(at_once, [x], alpha=0.7, **options)
    for name, site in quantized_layers(by_hand).items():
        assert torch.equal(site.weight, quantized_layers(at_once)[name].weight)
    error = relative_error(at_once, model, x)
    assert error == relative_error(by_hand, model, x)
    rtn(plain, [x], **options)
    assert error < 0.5 * relative_error(plain, model, x)  # the norm's channel of 40 times the others is tamed
