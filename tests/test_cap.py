"""The cap on the spectral norm, against closed forms, torch.linalg, and the lab's own control."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from s2d import SpectralNormCap, cap_spectral_norm_
from s2d.lab.models import DigitsViT
from s2d.lab.optimizers import Capped


@pytest.mark.parametrize("shape", [(6, 4), (4, 6), (5, 5), (1, 3)])
def test_only_what_is_above_the_cap_changes(shape):
    torch.manual_seed(0)
    weight = torch.randn(shape, dtype=torch.float64)
    u, s, vh = torch.linalg.svd(weight, full_matrices=False)
    cap = float(s.median())
    expected = u @ torch.diag(s.clamp(max=cap)) @ vh
    assert torch.allclose(cap_spectral_norm_(weight, cap), expected, atol=1e-12)


@pytest.mark.parametrize("weight", [torch.zeros(3, 2), torch.eye(3), 2 * torch.ones(2, 2) / 4])
def test_a_weight_under_the_cap_keeps_its_bits(weight):
    before = weight.clone()
    assert torch.equal(cap_spectral_norm_(weight, 1.5), before)


def test_rank_one_and_half_precision():
    weight = torch.ones(4, 4)  # its only singular value is 4
    assert torch.allclose(cap_spectral_norm_(weight, 1.0), torch.full((4, 4), 0.25), atol=1e-6)
    half = torch.ones(4, 4, dtype=torch.bfloat16)
    assert torch.allclose(cap_spectral_norm_(half, 1.0).float(), torch.full((4, 4), 0.25), atol=1e-2)


def model() -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(4, 8), nn.GELU(), nn.Linear(8, 2))


def step(net: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    net(torch.randn(5, 4)).square().sum().backward()
    optimizer.step()
    optimizer.zero_grad()


def norms(net: nn.Module) -> list[float]:
    return [torch.linalg.matrix_norm(layer.weight, 2).item() for layer in (net[0], net[2])]


def test_it_projects_every_few_steps_and_not_between():
    net = model()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.0)
    cap = SpectralNormCap(net, cap=0.3, every=3)
    cap.attach(optimizer)
    for done in range(1, 4):
        step(net, optimizer)
        assert (max(norms(net)) <= 0.3001) == (done == 3)
    cap.detach()
    net[0].weight.data.mul_(2)
    for _ in range(3):
        step(net, optimizer)
    assert norms(net)[0] > 0.5


def test_frozen_and_excluded_layers_stay():
    net = model()
    net[0].requires_grad_(False)
    before = net[0].weight.clone()
    SpectralNormCap(net, cap=0.1).project()
    assert torch.equal(net[0].weight, before) and norms(net)[1] < 0.1001
    net = model()
    before = net[2].weight.clone()
    SpectralNormCap(net, cap=0.1, exclude="2").project()
    assert torch.equal(net[2].weight, before) and norms(net)[0] < 0.1001


def test_it_is_the_control_of_notebook_07():
    """The lab's recipe caps whole packed matrices, as stored, with the same projection."""
    nets = [DigitsViT(width=16, depth=2, heads=2).build(0) for _ in range(2)]
    theirs = Capped("adamw", lr=1e-2, cap=0.5, cap_every=2).build(nets[0])
    groups = Capped("adamw", lr=1e-2, cap=0.5, cap_every=2)
    ours = super(Capped, groups).build(nets[1])  # the same AdamW without the hook
    SpectralNormCap(nets[1], cap=0.5, every=2).attach(ours)
    for _ in range(4):
        images = torch.randn(8, 1, 16, 16)
        for net, optimizer in zip(nets, (theirs, ours), strict=True):
            net(images).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
    for first, second in zip(nets[0].parameters(), nets[1].parameters(), strict=True):
        assert torch.allclose(first, second, atol=1e-6)


def test_a_resumed_run_keeps_the_rhythm():
    net = model()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.0)
    first = SpectralNormCap(net, cap=0.3, every=3)
    first.attach(optimizer)
    step(net, optimizer)
    step(net, optimizer)
    first.detach()
    second = SpectralNormCap(net, cap=0.3, every=3)
    second.load_state_dict(first.state_dict())
    second.attach(optimizer)
    step(net, optimizer)
    assert max(norms(net)) <= 0.3001


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"cap": 0}, "cap is 0: give a positive number"),
        ({"cap": float("nan")}, "cap is nan"),
        ({"cap": True}, "cap is True"),
        ({"cap": 1.0, "every": 0}, "every is 0: give a positive number of steps"),
        ({"cap": 1.0, "include": "nothing"}, "pattern 'nothing' matches no linear layer"),
    ],
)
def test_bad_settings(options, message):
    with pytest.raises(ValueError, match=message):
        SpectralNormCap(model(), **options)


def test_bad_weights_and_a_second_attach():
    with pytest.raises(ValueError, match="no finite matrix"):
        cap_spectral_norm_(torch.tensor([[float("nan")]]), 1.0)
    with pytest.raises(ValueError, match="no finite matrix"):
        cap_spectral_norm_(torch.ones(3), 1.0)
    net = model()
    cap = SpectralNormCap(net, cap=1.0)
    cap.attach(torch.optim.SGD(net.parameters(), lr=0.1))
    with pytest.raises(ValueError, match="already attached"):
        cap.attach(torch.optim.SGD(net.parameters(), lr=0.1))
