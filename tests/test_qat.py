"""Quantization-aware training: the forward is the quantized one, the backward the straight-through estimator's."""

from __future__ import annotations

import copy
import dataclasses

import pytest
import torch
from torch import nn

from s2d.lab.identity import code_files, recipe_key
from s2d.lab.recipes import finetuning, quantization_aware
from s2d.lab.store import Trained, obtain
from s2d.ptq import quantize
from s2d.ptq.qat import begin_qat, finish_qat
from s2d.ptq.sites import quantized_layers


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 16), nn.GELU(), nn.Linear(16, 3))


def test_it_computes_with_rounded_weights_and_inputs_and_keeps_its_parameters() -> None:
    model, x = network(), torch.randn(40, 6)
    aware = begin_qat(model, w_bits=3, a_bits=4, calibration=x)
    rounded = quantize(model, w_bits=3, a_bits=32, calibration=x)  # the same grids for the weights
    hidden = nn.functional.gelu(nn.functional.linear(aware[0].input_quantizer(x), rounded[0].weight, model[0].bias))
    expected = nn.functional.linear(aware[2].input_quantizer(hidden), rounded[2].weight, model[2].bias)
    assert aware.training
    torch.testing.assert_close(aware(x), expected, rtol=0, atol=0)
    assert torch.equal(aware[0].weight, model[0].weight)
    finished = finish_qat(copy.deepcopy(aware))
    assert torch.equal(finished(x), expected) and not finished.training


def test_an_outlier_does_not_set_the_range_of_the_inputs() -> None:
    x = torch.randn(500, 4)
    x[0, 0] = 100.0
    aware = begin_qat(nn.Linear(4, 2), w_bits=8, a_bits=4, calibration=x)
    least_squares = (aware.input_quantizer(x) - x).square().mean()
    min_max = quantize(nn.Linear(4, 2), w_bits=8, a_bits=4, calibration=x).input_quantizer
    assert least_squares <= (min_max(x) - x).square().mean()


def test_the_gradient_is_that_of_the_rounded_layer_by_hand() -> None:
    """With W^ and x^ in the forward, dL/dW = g x^^T and dL/dx = W^^T g: the rounding itself counts as identity."""
    torch.manual_seed(0)
    layer, x = nn.Linear(5, 4).double(), torch.randn(7, 5, dtype=torch.float64)
    aware = begin_qat(layer, w_bits=3, a_bits=3, calibration=x)
    inputs = x.clone().requires_grad_(True)
    out = aware(inputs)
    g = torch.randn_like(out)
    out.backward(g)
    rounded_x, rounded_w = aware.input_quantizer(x), aware.weight_quantizer(aware.weight.detach())
    torch.testing.assert_close(aware.weight.grad, g.T @ rounded_x)
    inside = (x - rounded_x).abs() <= aware.input_quantizer.scale / 2 + 1e-9  # clamped entries are further away
    torch.testing.assert_close(inputs.grad, (g @ rounded_w) * inside)
    assert 0 < (~inside).sum() < 10
    torch.testing.assert_close(aware.bias.grad, g.sum(0))


def test_inputs_outside_the_calibrated_range_get_no_gradient() -> None:
    aware = begin_qat(nn.Linear(2, 1), w_bits=8, a_bits=4, calibration=torch.tensor([[-1.0, 1.0]]))
    assert aware.input_quantizer.scale * 15 < 2.2
    x = torch.tensor([[0.5, 5.0]], requires_grad=True)
    aware(x).sum().backward()
    assert x.grad[0, 0] != 0 and x.grad[0, 1] == 0


def test_training_with_quantization_beats_rounding_afterwards() -> None:
    torch.manual_seed(0)
    x = torch.randn(512, 6)
    y = (x @ torch.randn(6, 3)).argmax(-1)
    model = network()

    def fit(model: nn.Module, steps: int) -> float:
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
        for _ in range(steps):
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(model(x), y)
            loss.backward()
            optimizer.step()
        return loss.item()

    def loss_of(model: nn.Module) -> float:
        with torch.no_grad():
            return nn.functional.cross_entropy(model(x), y).item()

    fit(model, 200)
    rounded = loss_of(quantize(model, w_bits=2, a_bits=3, calibration=x))
    aware = begin_qat(model, w_bits=2, a_bits=3, calibration=x)
    fit(aware, 100)
    finished = finish_qat(aware)
    assert loss_of(finished) < 0.7 * rounded
    for site in quantized_layers(finished).values():
        assert torch.equal(site.weight_quantizer(site.weight), site.weight)
        assert all(len(row.unique()) <= 4 for row in site.weight)


def test_one_side_may_stay_in_floating_point() -> None:
    x = torch.randn(8, 6)
    aware = begin_qat(network(), w_bits=32, a_bits=4, calibration=x)
    assert aware[0].weight_quantizer is None and aware[0].input_quantizer is not None
    aware = begin_qat(network(), w_bits=4, a_bits=16, calibration=x)
    assert aware[0].weight_quantizer is not None and aware[0].input_quantizer is None
    assert torch.isfinite(finish_qat(aware)(x)).all()


class Language(nn.Module):
    """Token ids in, logits out through a head that is the embedding's weight."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.hidden, self.head = nn.Embedding(9, 6), nn.Linear(6, 6), nn.Linear(6, 9, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.head(self.hidden(self.embed(ids)).tanh())


def test_tied_weights_stay_tied_until_they_are_rounded() -> None:
    model, ids = Language(), torch.randint(9, (8, 5), generator=torch.Generator().manual_seed(1))
    aware = begin_qat(model, w_bits=4, a_bits=8, calibration=ids)
    assert aware.head.weight is aware.embed.weight is not model.embed.weight
    assert len(list(aware.parameters())) == len(list(model.parameters()))
    optimizer = torch.optim.SGD(aware.parameters(), lr=0.5)
    aware(ids).square().mean().backward()
    optimizer.step()
    assert aware.head.weight is aware.embed.weight
    assert not torch.equal(aware.embed.weight, model.embed.weight)
    with torch.no_grad():
        trained, logits = aware.embed.weight.clone(), aware(ids)
        finished = finish_qat(aware)
        torch.testing.assert_close(finished(ids), logits)
    assert torch.equal(finished.embed.weight, trained)  # as the training read it
    assert all(len(row.unique()) <= 16 for row in finished.head.weight)


def test_ties_that_the_copy_cannot_keep_are_refused() -> None:
    class Conv1D(nn.Module):
        """As in transformers: stored the other way round."""

        def __init__(self, weight: nn.Parameter) -> None:
            super().__init__()
            self.nf, self.weight, self.bias = weight.shape[1], weight, nn.Parameter(torch.zeros(weight.shape[1]))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x @ self.weight + self.bias

    first = nn.Linear(4, 6, bias=False)
    model = nn.Sequential(first, Conv1D(first.weight))
    with pytest.raises(ValueError, match="0.weight and 1.weight share one weight.* exclude="):
        begin_qat(model, w_bits=4, a_bits=4, calibration=torch.randn(8, 4))


def test_bad_input_is_refused() -> None:
    with pytest.raises(ValueError, match="w_bits is 1"):
        begin_qat(network(), w_bits=1, a_bits=4, calibration=torch.randn(8, 6))
    aware = begin_qat(network(), w_bits=4, a_bits=4, calibration=torch.randn(8, 6))
    with torch.no_grad():
        aware[0].weight[0, 0] = torch.nan
    with pytest.raises(ValueError, match="NaN"):
        finish_qat(aware)


# --- in the lab's training loop --------------------------------------------------------------------------------------


def tiny(variant: str = "AdamW", bits: str = "W3A3"):
    start = finetuning(variant, 0, steps=3, pretrain_steps=3, width=16, depth=1)
    return quantization_aware(start, bits, steps=3)


def test_the_lab_trains_it_from_a_stored_checkpoint(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("S2D_STORE", str(tmp_path))
    recipe = tiny()
    (trained,) = obtain([recipe], workers=1)
    assert [path.name.split("-")[0] for path in sorted(tmp_path.iterdir())] == ["finetune", "pretrain", "qat"]
    assert trained.seed == 0 and trained.recipe == recipe
    model = trained.model()
    x, _ = recipe.data.fixed_set("test", 8)
    finished = finish_qat(copy.deepcopy(model))
    torch.testing.assert_close(finished(x), model(x))
    assert all(len(row.unique()) <= 8 for site in quantized_layers(finished).values() for row in site.weight.flatten(1))


def test_the_key_holds_the_bits_and_the_start() -> None:
    variants = [tiny(), tiny("S2D"), tiny(bits="W4A4"), tiny().start, dataclasses.replace(tiny(), steps=4)]
    assert len({recipe_key(recipe) for recipe in variants}) == len(variants)
    assert Trained(tiny("S2D"), {}, []).seed == 0


def test_only_training_with_quantization_depends_on_the_quantizers() -> None:
    def code(recipe) -> set[str]:
        return {"/".join(path.parts[-2:]) for path in code_files(recipe)}

    quantizers = {"ptq/qat.py", "ptq/quantizers.py", "s2d/layers.py"}  # layers: what can be quantized
    assert quantizers <= code(tiny())
    assert not quantizers & code(tiny().start)
    assert not any(name.startswith("ptq") for name in code(tiny("S2D").start))


def test_only_a_model_in_training_is_finished() -> None:
    x = torch.randn(8, 6)
    for model in (network(), quantize(network(), w_bits=4, a_bits=4, calibration=x)):
        with pytest.raises(ValueError, match="make it with begin_qat"):
            finish_qat(model)
