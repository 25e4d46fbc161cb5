"""The regularizer, and the literal Algorithm 1 beside it.

Oracles: :class:`LiteralAlgorithm1` step by step (itself held to closed forms here), autograd through ``svdvals``,
``gradcheck``, PyTorch's own weight decay, and updates written out by hand.
"""

from __future__ import annotations

import copy
import io
import math
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, nn

import s2d.regularizer as module
from s2d import SelectiveSpectralDecay, add_spectral_penalty_, spectral_penalty, top_singular_triplets
from s2d.reference import (
    LiteralAlgorithm1,
    activation_pcdr_literal,
    penalty_matrix_literal,
    spectral_pcdr_literal,
)

F64 = torch.float64


def gaussian(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


def network(*, seed: int = 0, bias: bool = True, dtype: torch.dtype = F64) -> nn.Sequential:
    """Three layers with spectra that differ: a dominant component, two, and none."""
    model = nn.Sequential(
        nn.Linear(6, 10, bias=bias), nn.Tanh(), nn.Linear(10, 8, bias=bias), nn.Tanh(), nn.Linear(8, 4, bias=bias)
    ).to(dtype)
    for index, parameter in enumerate(model.parameters()):
        parameter.data = 0.3 * gaussian(*parameter.shape, seed=100 * seed + index).to(dtype)
    with torch.no_grad():
        first, second = model[0].weight, model[2].weight
        first += 3 * torch.outer(gaussian(10, seed=7), gaussian(6, seed=8)).to(dtype) / 60**0.5
        for s in (9, 11):
            second += 2 * torch.outer(gaussian(8, seed=s), gaussian(10, seed=s + 1)).to(dtype) / 80**0.5
    return model


def linears(model: nn.Module) -> list[nn.Linear]:
    return [layer for layer in model.modules() if isinstance(layer, nn.Linear)]


def weights(model: nn.Module) -> list[nn.Parameter]:
    return [layer.weight for layer in linears(model)]


def batch(step: int, dtype: torch.dtype = F64) -> tuple[Tensor, Tensor]:
    return gaussian(16, 6, seed=2 * step + 1).to(dtype), gaussian(16, 4, seed=2 * step + 2).to(dtype)


def backward(model: nn.Module, step: int = 0) -> None:
    x, y = batch(step, next(model.parameters()).dtype)
    (model(x) - y).square().mean().backward()


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range, before_step=lambda: None) -> None:
    for step in steps:
        optimizer.zero_grad()
        backward(model, step)
        before_step()
        optimizer.step()


def sgd(model: nn.Module, lr: float = 0.1, **options) -> torch.optim.SGD:
    return torch.optim.SGD(model.parameters(), lr=lr, **options)


def attached(model: nn.Module, optimizer: torch.optim.Optimizer, **options) -> SelectiveSpectralDecay:
    decay = SelectiveSpectralDecay(model, **options)
    decay.attach(optimizer)
    return decay


def zero_gradients(model: nn.Module) -> None:
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)


def snapshot(model: nn.Module) -> list[Tensor]:
    return [parameter.detach().clone() for parameter in model.parameters()]


def same(model: nn.Module, tensors: list[Tensor]) -> bool:
    return all(torch.equal(p, t) for p, t in zip(model.parameters(), tensors, strict=True))


@pytest.fixture
def refreshed(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Tensor]]:
    """The weights that were decomposed, in order."""
    calls: list[Tensor] = []

    def counted(weight: Tensor, *args, **kwargs):
        calls.append(weight)
        return top_singular_triplets(weight, *args, **kwargs)

    monkeypatch.setattr(module, "top_singular_triplets", counted)
    yield calls


# The literal transcription in closed form


@pytest.mark.parametrize("power", [1, 2, 3, 2.5])
def test_the_penalty_matrix_of_a_diagonal_weight(power: float) -> None:
    weight = torch.diag(torch.tensor([2.0, -5.0, 1.0, 3.0], dtype=F64))
    expected = torch.diag(torch.tensor([0, -(5.0**power), 0, 3.0**power], dtype=F64))
    torch.testing.assert_close(penalty_matrix_literal(weight, 2, power), expected)


def test_the_penalty_matrix_of_a_rank_one_weight() -> None:
    a, b = gaussian(5), gaussian(4, seed=1)
    s = a.norm() * b.norm()
    torch.testing.assert_close(penalty_matrix_literal(torch.outer(a, b), 1, 2), s * torch.outer(a, b))
    torch.testing.assert_close(penalty_matrix_literal(torch.zeros(3, 2, dtype=F64), 2, 2), torch.zeros(3, 2, dtype=F64))


def test_the_literal_follows_the_lines_of_algorithm_1() -> None:
    # tau = 0.95 after k components: 100/126 and 125/126, then 400/426 and 425/426, then 1/3 and 2/3 (none).
    weight = nn.Parameter(torch.diag(torch.tensor([10.0, 5.0, 1.0], dtype=F64)))
    other = nn.Parameter(torch.eye(3, dtype=F64))  # never selected
    literal = LiteralAlgorithm1([weight, other], lam=0.1, power=2, tau=0.95, k_max=2, refresh_every=3)
    changes = {1: [20.0, 5.0, 1.0], 4: [3.0, 3.0, 3.0]}  # between refreshes, which are at t = 0, 3 and 6
    penalties = [[100.0, 25.0, 0.0]] * 3 + [[400.0, 25.0, 0.0]] * 3 + [[0.0, 0.0, 0.0]]
    for t, penalty in enumerate(penalties):
        weight.grad, other.grad = torch.full((3, 3), 7.0, dtype=F64), torch.zeros(3, 3, dtype=F64)
        literal.before_step()
        torch.testing.assert_close(weight.grad, 7.0 + 0.1 * torch.diag(torch.tensor(penalty, dtype=F64)))
        assert torch.equal(other.grad, torch.zeros(3, 3, dtype=F64))
        assert literal.t == t + 1
        if t in changes:
            weight.data = torch.diag(torch.tensor(changes[t], dtype=F64))


# (2) The gradient of the penalty


def separated(m: int, n: int, seed: int = 0) -> Tensor:
    """Distinct singular values, so that the penalty is differentiable."""
    r = min(m, n)
    u, _ = torch.linalg.qr(gaussian(m, r, seed=seed))
    v, _ = torch.linalg.qr(gaussian(n, r, seed=seed + 1))
    return (u * torch.linspace(3, 0.5, r, dtype=F64)) @ v.T


@pytest.mark.parametrize("shape", [(1, 1), (6, 4), (4, 6), (5, 5)])
@pytest.mark.parametrize("power", [1, 2, 3, 2.5, 0.5])
def test_the_gradient_is_autograds(shape: tuple[int, int], power: float) -> None:
    for k in range(1, min(shape) + 1):
        weight = separated(*shape).requires_grad_()
        loss = 0.7 / (power + 1) * (torch.linalg.svdvals(weight)[:k] ** (power + 1)).sum()
        (expected,) = torch.autograd.grad(loss, weight)
        triplets = top_singular_triplets(weight, k)
        assert spectral_penalty(triplets.s, lam=0.7, power=power).item() == pytest.approx(loss.item(), rel=1e-12)
        target = gaussian(*shape, seed=5)
        got = add_spectral_penalty_(target.clone(), triplets, triplets.s**power, scale=0.7) - target
        torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-12)
        literal = 0.7 * penalty_matrix_literal(weight.detach(), k, power)
        torch.testing.assert_close(literal, expected, rtol=1e-9, atol=1e-12)


class Penalty(torch.autograd.Function):
    """The package's value, with the package's gradient, for gradcheck."""

    @staticmethod
    def forward(ctx, weight: Tensor, k: int, power: float) -> Tensor:
        ctx.triplets, ctx.power = top_singular_triplets(weight, k), power
        return spectral_penalty(ctx.triplets.s, lam=0.3, power=power)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, None]:
        target = torch.zeros(len(ctx.triplets.u), len(ctx.triplets.v), dtype=F64)
        return grad * add_spectral_penalty_(target, ctx.triplets, ctx.triplets.s**ctx.power, scale=0.3), None, None


@pytest.mark.parametrize("power", [1, 2, 3, 2.5])
@pytest.mark.parametrize("k", [1, 2, 4])
def test_gradcheck(power: float, k: int) -> None:
    assert torch.autograd.gradcheck(Penalty.apply, (separated(5, 4).requires_grad_(), k, power))


def test_the_penalty_is_added_in_place_and_in_the_targets_dtype() -> None:
    triplets = top_singular_triplets(separated(6, 4), 2)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        target = torch.zeros(6, 4, dtype=dtype)
        assert add_spectral_penalty_(target, triplets, triplets.s**2, scale=1.0) is target
        expected = (triplets.u * triplets.s**2) @ triplets.v.T
        torch.testing.assert_close(target.double(), expected, rtol=2e-2, atol=5e-2)


@pytest.mark.parametrize("coupling", ["gradient", "decoupled"])
@pytest.mark.parametrize("coefficients", ["cached", "live"])
def test_power_1_on_every_component_is_l2_decay(coupling: str, coefficients: str) -> None:
    # PyTorch's own weight decay, on the weights alone, is the oracle: Adam's is coupled, AdamW's is decoupled.
    ours, theirs = network(bias=False), network(bias=False)
    optimizer = torch.optim.AdamW(ours.parameters(), lr=0.01, weight_decay=0)
    kind = torch.optim.Adam if coupling == "gradient" else torch.optim.AdamW
    options = {"lam": 0.3, "power": 1, "k_max": None, "refresh_every": 1, "criterion": "all"}
    attached(ours, optimizer, coupling=coupling, coefficients=coefficients, **options)
    train(ours, optimizer, range(40))
    train(theirs, kind(theirs.parameters(), lr=0.01, weight_decay=0.3), range(40))
    for got, expected in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-8, atol=1e-10)


# (1) Step by step against the literal

OPTIMIZERS: dict[str, Callable[[nn.Module], torch.optim.Optimizer]] = {
    "SGD": lambda model: torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9),
    "AdamW": lambda model: torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.01),
}
if hasattr(torch.optim, "Muon"):
    OPTIMIZERS["Muon"] = lambda model: torch.optim.Muon(model.parameters(), lr=5e-3)


class Watcher:
    """Sees every forward pass with its own hooks, and answers with PCDR by brute force and by the printed sums."""

    def __init__(self, model: nn.Module, capacity: int) -> None:
        self.capacity, self.seen = capacity, {index: [] for index, _ in enumerate(linears(model))}
        for index, layer in enumerate(linears(model)):
            layer.register_forward_hook(lambda _layer, args, _output, i=index: self.seen[i].append(args[0].detach()))

    def pcdr(self, index: int, weight: Tensor, k: int) -> float:
        x, weight = torch.cat(self.seen[index]), weight.detach()
        y = (x @ weight.T).abs()
        order = sorted(range(y.numel()), key=lambda flat: -y.flatten()[flat].item())[: self.capacity]
        ratios = [activation_pcdr_literal(weight, x[flat // y.shape[1]], flat % y.shape[1], k) for flat in order]
        return sum(min(ratio, 1.0) for ratio in ratios) / len(ratios)

    def clear(self) -> None:
        for inputs in self.seen.values():
            inputs.clear()


@pytest.mark.parametrize("criterion", ["spectral", "activation"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_it_equals_the_literal_step_by_step(name: str, criterion: str) -> None:
    ours, literals = (network(bias=name != "Muon") for _ in range(2))
    options = {
        "lam": 2e-3,
        "power": 2,
        "k_max": 3,
        "refresh_every": 25,
        "tau": {"spectral": 0.85, "activation": 0.8}[criterion],
    }
    optimizer, reference = OPTIMIZERS[name](ours), OPTIMIZERS[name](literals)
    decay = attached(ours, optimizer, criterion=criterion, outliers=6, **options)
    watcher = Watcher(literals, capacity=6)
    literal = LiteralAlgorithm1(
        weights(literals), **options, **({"pcdr": watcher.pcdr} if criterion == "activation" else {})
    )
    selected = []
    for step in range(310):
        for model in (ours, literals):
            model.zero_grad()
            backward(model, step)
        literal.before_step()
        watcher.clear()
        reference.step()
        optimizer.step()
        if step % 25 == 0:
            selected.append([bool(g.abs().max() > 0) for g in literal.g_reg])
            assert [row.rank is not None for row in decay.report()] == selected[-1]
        for got, expected in zip(ours.parameters(), literals.parameters(), strict=True):
            scale = expected.abs().max()
            torch.testing.assert_close(got / scale, expected / scale, rtol=0, atol=1e-8)
    # The selection was put to use: some layer was penalised and some was not.
    assert any(map(any, selected)) and not all(map(all, selected))
    assert decay.steps == literal.t == 310


def test_without_the_penalty_the_trajectory_is_another() -> None:
    # What makes the comparison above one that can fail.
    ours, plain = network(), network()
    optimizer = sgd(ours)
    attached(ours, optimizer, lam=2e-3, tau=0.75, criterion="spectral")
    train(ours, optimizer, range(20))
    train(plain, sgd(plain), range(20))
    assert (ours[0].weight - plain[0].weight).abs().max() > 1e-4


def test_lam_zero_is_plain_training() -> None:
    ours, plain = network(), network()
    optimizer = sgd(ours)
    attached(ours, optimizer, lam=0.0, criterion="all")
    train(ours, optimizer, range(10))
    train(plain, sgd(plain), range(10))
    assert same(plain, snapshot(ours))


def test_the_penalty_shrinks_what_it_is_aimed_at() -> None:
    model = network()
    before = [torch.linalg.svdvals(weight.detach()) for weight in weights(model)]
    optimizer = sgd(model, lr=0.01)
    attached(model, optimizer, lam=0.5, criterion="all", k_max=1, refresh_every=1)
    for _ in range(20):
        zero_gradients(model)
        optimizer.step()
    for weight, s in zip(weights(model), before, strict=True):
        after = torch.linalg.svdvals(weight.detach())
        assert after[0] < s[0]
        torch.testing.assert_close(after[2:], s[2:])


# What a refresh reports


def test_report_and_penalty_by_hand() -> None:
    model = network()
    optimizer = sgd(model, lr=0.0)
    decay = attached(model, optimizer, lam=0.2, power=3, tau=0.75, criterion="spectral", k_max=2)
    assert decay.report() == [] and decay.penalty() == 0
    zero_gradients(model)
    optimizer.step()
    total = 0.0
    for row, weight in zip(decay.report(), weights(model), strict=True):
        s = torch.linalg.svdvals(weight.detach())
        pcdr = [spectral_pcdr_literal(weight.detach(), k) for k in (1, 2)]
        rank = next((k for k in (1, 2) if pcdr[k - 1] >= 0.75), None)
        assert row.rank == rank
        assert row.s == pytest.approx(s[:2].tolist())
        assert row.pcdr == pytest.approx(pcdr)
        total += 0.2 / 4 * (s[:rank] ** 4).sum().item() if rank else 0.0
    assert decay.penalty() == pytest.approx(total) and total > 0
    assert [row.layer for row in decay.report()] == ["0", "2", "4"] == list(decay.layers)


def test_criterion_all_takes_k_max_components_of_every_layer() -> None:
    model = network()
    optimizer = sgd(model)
    decay = attached(model, optimizer, criterion="all", k_max=2)
    zero_gradients(model)
    optimizer.step()
    assert [(row.rank, len(row.s)) for row in decay.report()] == [(2, 2)] * 3
    everything = SelectiveSpectralDecay(network(), criterion="all", k_max=None)
    everything.refresh()
    assert [row.rank for row in everything.report()] == [6, 8, 4]


def test_degenerate_weights_are_left_alone() -> None:
    model = network()
    model[2].weight.data.zero_()
    optimizer = sgd(model)
    decay = attached(model, optimizer, criterion="spectral", tau=0.5, lam=1.0)
    zero_gradients(model)
    optimizer.step()
    assert decay.report()[1].rank is None
    assert torch.equal(model[2].weight, torch.zeros(8, 10, dtype=F64))


def test_a_rank_one_weight_is_selected_at_rank_one() -> None:
    model = nn.Sequential(nn.Linear(5, 7), nn.Linear(7, 3)).double()
    a, b = gaussian(7), gaussian(5, seed=1)
    model[0].weight.data = torch.outer(a, b)
    optimizer = sgd(model, lr=1.0)
    for layer in model:
        layer.bias.data.zero_()
    decay = attached(model, optimizer, lam=1e-3, k_max=2)
    model(gaussian(9, 5, seed=2)).sum().backward()
    zero_gradients(model)
    optimizer.step()
    assert decay.report()[0].rank == 1
    shrunk = torch.outer(a, b) * (1 - 1e-3 * a.norm() * b.norm())
    torch.testing.assert_close(model[0].weight.detach(), shrunk)


# (3) Live coefficients and decoupled decay


def one_step(model: nn.Module, **options) -> tuple[SelectiveSpectralDecay, torch.optim.Optimizer]:
    """Attached, refreshed, and stepped once with a zero learning rate."""
    optimizer = sgd(model, lr=0.0)
    decay = attached(model, optimizer, criterion="all", k_max=2, refresh_every=1000, **options)
    zero_gradients(model)
    optimizer.step()
    return decay, optimizer


def added_gradient(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """What one more step adds to zero gradients."""
    zero_gradients(model)
    optimizer.step()
    return [weight.grad.clone() for weight in weights(model)]


def test_live_equals_cached_right_at_the_refresh() -> None:
    cached, live = network(), network()
    one_step(cached, coefficients="cached", lam=0.3)
    one_step(live, coefficients="live", lam=0.3)
    for a, b, weight in zip(weights(cached), weights(live), weights(network()), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(a.grad, 0.3 * penalty_matrix_literal(weight.detach(), 2, 2), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("factor", [0.5, 2.0, 0.0])
def test_live_follows_the_weight_and_cached_does_not(factor: float) -> None:
    models = {name: network() for name in ("cached", "live")}
    added = {}
    for name, model in models.items():
        _, optimizer = one_step(model, coefficients=name, lam=0.3, power=3)
        for weight in weights(model):
            weight.data *= factor
        added[name] = added_gradient(model, optimizer)
    for weight, cached, live in zip(weights(network()), added["cached"], added["live"], strict=True):
        expected = 0.3 * penalty_matrix_literal(weight.detach(), 2, 3)
        torch.testing.assert_close(cached, expected, rtol=1e-9, atol=1e-10)
        torch.testing.assert_close(live, factor**3 * expected, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("coupling", ["gradient", "decoupled"])
@pytest.mark.parametrize("power", [2, 2.5, 1])
def test_live_leaves_a_component_alone_that_has_gone_through_zero(coupling: str, power: float) -> None:
    model = network()
    _, optimizer = one_step(model, coefficients="live", coupling=coupling, power=power, lam=1.0)
    for weight in weights(model):
        weight.data *= -1.0
    before = snapshot(model)
    optimizer.param_groups[0]["lr"] = 0.1
    assert all(torch.equal(grad, torch.zeros_like(grad)) for grad in added_gradient(model, optimizer))
    assert same(model, before)


def test_live_treats_each_component_for_itself() -> None:
    model = nn.Sequential(nn.Linear(3, 3, bias=False)).double()
    model[0].weight.data = torch.diag(torch.tensor([4.0, 3.0, 1.0], dtype=F64))
    _, optimizer = one_step(model, coefficients="live", lam=1.0)
    model[0].weight.data = torch.diag(torch.tensor([-4.0, 2.0, 9.0], dtype=F64))
    (added,) = added_gradient(model, optimizer)
    torch.testing.assert_close(added, torch.diag(torch.tensor([0.0, 4.0, 0.0], dtype=F64)))


@pytest.mark.parametrize("power", [1, 2, 3])
@pytest.mark.parametrize("kind", ["SGD", "momentum", "AdamW"])
def test_decoupled_decay_by_hand_at_the_rate_of_each_group(kind: str, power: float) -> None:
    model = network()
    before = [weight.detach().clone() for weight in weights(model)]
    rates = [0.1, 0.01, 0.0]
    groups = [{"params": layer.parameters(), "lr": lr} for layer, lr in zip(linears(model), rates, strict=True)]
    optimizer = {
        "SGD": lambda: torch.optim.SGD(groups),
        "momentum": lambda: torch.optim.SGD(groups, momentum=0.9),
        "AdamW": lambda: torch.optim.AdamW(groups, weight_decay=0),
    }[kind]()
    attached(model, optimizer, coupling="decoupled", lam=0.2, power=power, criterion="all", k_max=3)
    zero_gradients(model)
    optimizer.step()
    for weight, start, lr in zip(weights(model), before, rates, strict=True):
        expected = start - lr * 0.2 * penalty_matrix_literal(start, 3, power)
        torch.testing.assert_close(weight.detach(), expected, rtol=1e-10, atol=1e-12)
        assert torch.equal(weight.grad, torch.zeros_like(weight))


def test_decoupled_decay_reads_the_rate_of_the_moment() -> None:
    model = network()
    start = model[0].weight.detach().clone()
    optimizer = torch.optim.AdamW(model.parameters(), lr=torch.tensor(0.5), weight_decay=0)  # a rate may be a tensor
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.1 if step == 0 else 0.0)
    attached(model, optimizer, coupling="decoupled", lam=0.2, criterion="all", k_max=1, refresh_every=1)
    zero_gradients(model)
    optimizer.step()
    after = model[0].weight.detach().clone()
    expected = start - 0.05 * 0.2 * penalty_matrix_literal(start, 1, 2)
    torch.testing.assert_close(after, expected, rtol=1e-6, atol=1e-8)  # the rate is a float32 tensor
    scheduler.step()
    optimizer.step()
    assert torch.equal(model[0].weight, after)


# (4) The hooks


def test_clipping_happens_before_the_penalty() -> None:
    model = network()
    start = [weight.detach().clone() for weight in weights(model)]
    optimizer = sgd(model, lr=0.1)
    attached(model, optimizer, lam=0.2, criterion="all", k_max=2)
    backward(model)
    nn.utils.clip_grad_norm_(model.parameters(), 1e-3)
    clipped = [weight.grad.clone() for weight in weights(model)]
    optimizer.step()
    for weight, w, grad in zip(weights(model), start, clipped, strict=True):
        expected = w - 0.1 * (grad + 0.2 * penalty_matrix_literal(w, 2, 2))
        torch.testing.assert_close(weight.detach(), expected, rtol=1e-10, atol=1e-12)
        assert (expected - w).norm() > 10 * 0.1 * 1e-3  # clipped afterwards, it would be no larger than this


@pytest.mark.parametrize("coupling", ["gradient", "decoupled"])
@pytest.mark.parametrize("how", ["requires_grad", "no gradient"])
def test_a_frozen_layer_is_not_touched(how: str, coupling: str) -> None:
    model = network()
    frozen = model[2].weight
    frozen.requires_grad_(how != "requires_grad")
    before = frozen.detach().clone()
    optimizer = sgd(model)
    attached(model, optimizer, lam=1.0, criterion="all", coupling=coupling)
    moving = model[0].weight.detach().clone()
    for step in range(3):
        optimizer.zero_grad()
        backward(model, step)
        if how == "no gradient":
            frozen.grad = None
        optimizer.step()
        assert frozen.grad is None
    assert torch.equal(frozen, before)
    assert not torch.equal(model[0].weight, moving)


def brute_pcdr(model: nn.Module, inputs: list[Tensor], outliers: int, k_max: int) -> list[list[float]]:
    watched = copy.deepcopy(model)
    for layer in linears(watched):
        layer._forward_hooks.clear()
    watcher = Watcher(watched, outliers)
    with torch.no_grad():
        for x in inputs:
            watched(x)
    return [[watcher.pcdr(i, w, k) for k in range(1, k_max + 1)] for i, w in enumerate(weights(watched))]


def test_gradient_accumulation_sees_the_outliers_of_every_micro_batch() -> None:
    model = network()
    optimizer = sgd(model, lr=0.0)
    decay = attached(model, optimizer, outliers=5, k_max=2)
    inputs = [gaussian(8, 6, seed=1), 1.2 * gaussian(3, 6, seed=2), gaussian(8, 6, seed=3)]
    for x in inputs:
        model(x).square().mean().backward()
    optimizer.step()
    got = [list(row.pcdr) for row in decay.report()]
    expected = brute_pcdr(model, inputs, 5, 2)
    assert all(a == pytest.approx(b, rel=1e-8) for a, b in zip(got, expected, strict=True))
    for part in (inputs[:1], inputs[-1:], inputs[:2], inputs[1:]):
        assert brute_pcdr(model, part, 5, 2) != expected


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_an_evaluation_without_gradients_is_ignored(context: Callable) -> None:
    model = network()
    optimizer = sgd(model, lr=0.0)
    decay = attached(model, optimizer, outliers=5, k_max=2)
    x = gaussian(8, 6)
    with context():
        model(1000 * x + 5)
    model(x).sum().backward()
    with context():
        model(-1000 * x)
    optimizer.step()
    got = [list(row.pcdr) for row in decay.report()]
    assert all(a == pytest.approx(b, rel=1e-8) for a, b in zip(got, brute_pcdr(model, [x], 5, 2), strict=True))


def test_only_the_forward_passes_of_a_refresh_step_are_kept() -> None:
    model = network()
    optimizer = sgd(model, lr=0.0)
    decay = attached(model, optimizer, outliers=5, k_max=2, refresh_every=3)
    inputs = [gaussian(8, 6, seed=step) * (10.0 if step in (1, 2) else 1.0) for step in range(4)]
    for step, x in enumerate(inputs):
        optimizer.zero_grad()
        model(x).sum().backward()
        optimizer.step()
        used = inputs[3] if step == 3 else inputs[0]
        got = [list(row.pcdr) for row in decay.report()]
        assert all(a == pytest.approx(b, rel=1e-8) for a, b in zip(got, brute_pcdr(model, [used], 5, 2), strict=True))


def test_a_bias_is_no_part_of_an_outlier() -> None:
    model = network()
    optimizer = sgd(model, lr=0.0)
    model[0].bias.data = torch.arange(10, dtype=F64) * 100
    decay = attached(model, optimizer, outliers=5, k_max=2, include="0")
    x = gaussian(8, 6)
    model(x).sum().backward()
    optimizer.step()
    assert list(decay.report()[0].pcdr) == pytest.approx(brute_pcdr(model, [x], 5, 2)[0], rel=1e-8)


@pytest.mark.parametrize("refresh_every", [1, 3, 100])
@pytest.mark.parametrize("criterion", ["activation", "spectral", "all"])
def test_a_refresh_happens_exactly_when_due(refreshed: list[Tensor], criterion: str, refresh_every: int) -> None:
    model = network()
    optimizer = sgd(model)
    decay = attached(model, optimizer, criterion=criterion, refresh_every=refresh_every)
    for step in range(8):
        refreshed.clear()
        assert decay.steps == step
        train(model, optimizer, range(step, step + 1))
        expected = weights(model) if step % refresh_every == 0 else []
        assert len(refreshed) == len(expected)
        assert all(a is b for a, b in zip(refreshed, expected, strict=True))
    assert decay.steps == 8


def test_a_refresh_starts_from_the_triplets_before_it(monkeypatch: pytest.MonkeyPatch) -> None:
    given, found = [], []

    def recorded(*args, warm_start=None, **kwargs):
        given.append(warm_start)
        found.append(top_singular_triplets(*args, warm_start=warm_start, **kwargs))
        return found[-1]

    monkeypatch.setattr(module, "top_singular_triplets", recorded)
    model = network()
    optimizer = sgd(model)
    attached(model, optimizer, criterion="all", refresh_every=2)
    train(model, optimizer, range(4))
    assert given[:3] == [None] * 3
    assert all(a is b for a, b in zip(given[3:], found[:3], strict=True))


@pytest.mark.parametrize("coupling", ["gradient", "decoupled"])
def test_a_tied_weight_is_penalised_once(coupling: str) -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4)).double()
    model[2].weight = model[0].weight
    start = model[0].weight.detach().clone()
    optimizer = sgd(model, lr=0.1)
    decay = attached(model, optimizer, lam=0.3, criterion="all", k_max=1, coupling=coupling)
    zero_gradients(model)
    optimizer.step()
    assert list(decay.layers) == ["0", "4"]
    expected = start - 0.1 * 0.3 * penalty_matrix_literal(start, 1, 2)
    torch.testing.assert_close(model[0].weight.detach(), expected)


def test_detach_puts_everything_back() -> None:
    ours, plain = network(), network()
    optimizer = sgd(ours)
    decay = attached(ours, optimizer)
    assert len(optimizer._optimizer_step_pre_hooks) == 1
    assert all(len(layer._forward_hooks) == 1 for layer in linears(ours))
    decay.detach()
    assert len(optimizer._optimizer_step_pre_hooks) == 0
    assert all(len(layer._forward_hooks) == 0 for layer in linears(ours))
    train(ours, optimizer, range(5))
    train(plain, sgd(plain), range(5))
    assert same(plain, snapshot(ours))
    assert decay.steps == 0
    decay.detach()  # once more is no error
    decay.attach(optimizer)
    train(ours, optimizer, range(5))
    assert decay.steps == 5


@pytest.mark.parametrize("criterion", ["spectral", "all"])
def test_without_the_activation_criterion_no_forward_pass_is_watched(criterion: str) -> None:
    model = network()
    optimizer = sgd(model)
    attached(model, optimizer, criterion=criterion)
    assert all(len(layer._forward_hooks) == 0 for layer in linears(model))


def test_a_layer_that_took_no_part_is_left_alone() -> None:
    class Branches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.unused = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.used(x)

    model = Branches().double()
    optimizer = sgd(model)
    decay = attached(model, optimizer, tau=1e-6, k_max=1)
    before = model.unused.weight.detach().clone()
    model(gaussian(3, 4)).sum().backward()
    optimizer.step()
    assert [row.rank for row in decay.report()] == [1, None]
    assert torch.equal(model.unused.weight, before)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_narrow_weights_train_and_stay_finite(dtype: torch.dtype) -> None:
    for coupling in ("gradient", "decoupled"):
        for coefficients in ("cached", "live"):
            model = network(dtype=dtype)
            optimizer = sgd(model, lr=0.01)
            decay = attached(
                model, optimizer, tau=0.3, lam=0.01, refresh_every=2, coupling=coupling, coefficients=coefficients
            )
            train(model, optimizer, range(4))
            assert any(row.rank for row in decay.report())
            assert all(torch.isfinite(p).all() and p.dtype == dtype for p in model.parameters())


def test_autocast() -> None:
    model = network(dtype=torch.float32)
    optimizer = sgd(model)
    decay = attached(model, optimizer, tau=0.3)
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(gaussian(8, 6).float()).square().mean()
    loss.backward()
    optimizer.step()
    x = gaussian(8, 6)
    expected = brute_pcdr(network(), [x], 16, 3)
    assert decay.report()[0].pcdr == pytest.approx(expected[0], abs=0.05)


@pytest.mark.parametrize("unscale", [False, True])
@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("coupling", ["gradient", "decoupled"])
def test_a_gradient_scaler_does_not_scale_the_penalty(fused: bool, unscale: bool, coupling: str) -> None:
    # A fused optimizer divides by the scale inside its kernel, after the step hooks have run.
    options = {"lam": 0.5, "criterion": "all", "k_max": 2, "coupling": coupling}
    plain, scaled = network(dtype=torch.float32), network(dtype=torch.float32)
    optimizer = sgd(plain)
    attached(plain, optimizer, **options)
    backward(plain)
    optimizer.step()
    optimizer = sgd(scaled, fused=fused)
    attached(scaled, optimizer, **options)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    x, y = batch(0, torch.float32)
    scaler.scale((scaled(x) - y).square().mean()).backward()
    if unscale:
        scaler.unscale_(optimizer)
    scaler.step(optimizer)
    for got, expected in zip(scaled.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("fused", [False, True])
def test_a_step_that_the_scaler_skips_changes_no_weight(fused: bool) -> None:
    model = network(dtype=torch.float32)
    optimizer = sgd(model, fused=fused)
    attached(model, optimizer, lam=0.5, criterion="all", coupling="decoupled")
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    x, y = batch(0, torch.float32)
    scaler.scale((model(x) - y).square().mean()).backward()
    model[0].weight.grad[0, 0] = math.inf
    before = snapshot(model)
    scaler.step(optimizer)
    assert same(model, before)


@pytest.mark.parametrize("criterion", ["activation", "all"])
def test_a_closure_is_honoured_or_refused_but_never_loses_the_penalty(criterion: str) -> None:
    # optimizer.step(closure) runs the step hooks first; the closure's zero_grad and backward then replace the gradient.
    options = {"lam": 0.5, "criterion": criterion, "tau": 0.3, "k_max": 2}
    plain, closed = network(), network()
    optimizer = sgd(plain)
    attached(plain, optimizer, **options)
    train(plain, optimizer, range(3))
    optimizer = sgd(closed)
    attached(closed, optimizer, **options)
    try:
        for step in range(3):

            def closure(step: int = step) -> None:
                optimizer.zero_grad()
                backward(closed, step)

            optimizer.step(closure)
    except (ValueError, RuntimeError) as error:
        assert "closure" in str(error)
    else:
        assert all(torch.allclose(a, b) for a, b in zip(closed.parameters(), plain.parameters(), strict=True))


def test_a_layer_called_by_keyword_is_watched_too() -> None:
    class Keyword(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.linear(input=x)

    model = Keyword()
    optimizer = sgd(model)
    decay = attached(model, optimizer, k_max=1)
    model(torch.ones(2, 4)).sum().backward()
    optimizer.step()
    assert decay.report()[0].pcdr[0] > 0


# Resuming


def resumable(seed: int, **options) -> tuple[nn.Module, torch.optim.Optimizer, SelectiveSpectralDecay]:
    model = network(seed=seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    return model, optimizer, attached(model, optimizer, lam=0.1, tau=0.5, refresh_every=5, **options)


@pytest.mark.parametrize("criterion", ["activation", "spectral", "all"])
@pytest.mark.parametrize("coefficients", ["cached", "live"])
@pytest.mark.parametrize("stop", [3, 5, 7, 14])
def test_a_resumed_run_continues_bit_for_bit(criterion: str, coefficients: str, stop: int) -> None:
    whole = resumable(0, criterion=criterion, coefficients=coefficients)
    train(*whole[:2], range(stop))
    file = io.BytesIO()
    torch.save([part.state_dict() for part in whole], file)
    train(*whole[:2], range(stop, 20))

    resumed = resumable(1, criterion=criterion, coefficients=coefficients)
    file.seek(0)
    for part, state in zip(resumed, torch.load(file, weights_only=True), strict=True):
        part.load_state_dict(state)
    assert resumed[2].steps == stop
    train(*resumed[:2], range(stop, 20))
    assert same(resumed[0], snapshot(whole[0]))
    assert resumed[2].report() == whole[2].report()
    assert any(row.rank for row in whole[2].report())


def test_above_the_full_svd_threshold_a_resumed_run_continues_bit_for_bit() -> None:
    def run(state: list | None, steps: range) -> tuple[nn.Module, torch.optim.Optimizer, SelectiveSpectralDecay]:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(6, 200), nn.Tanh(), nn.Linear(200, 150), nn.Tanh(), nn.Linear(150, 4)).double()
        optimizer = sgd(model)
        parts = model, optimizer, attached(model, optimizer, lam=1e-3, criterion="all", refresh_every=2)
        for part, saved in zip(parts, state or [], strict=False):
            part.load_state_dict(saved)
        train(model, optimizer, steps)
        return parts

    half = copy.deepcopy([part.state_dict() for part in run(None, range(3))])
    assert same(run(half, range(3, 6))[0], snapshot(run(None, range(6))[0]))


def test_a_state_before_the_first_step() -> None:
    fresh = resumable(0)[2]
    state = fresh.state_dict()
    assert set(state) == {"steps"} and state["steps"].item() == 0
    resumable(1)[2].load_state_dict(state)


def test_a_state_is_a_snapshot() -> None:
    model, optimizer, decay = resumable(0)
    train(model, optimizer, range(3))
    state = decay.state_dict()
    frozen = {key: value.clone() for key, value in state.items()}
    train(model, optimizer, range(3, 8))
    other = resumable(0)[2]
    other.load_state_dict(state)
    for tensor in other.state_dict().values():
        tensor.zero_()
    assert all(torch.equal(state[key], frozen[key]) for key in frozen)
    assert other.steps == 3 and other.report()[0].s[0] > 0
    assert all(isinstance(value, Tensor) and value.is_contiguous() for value in state.values())


def test_a_state_survives_safetensors() -> None:
    safetensors = pytest.importorskip("safetensors.torch")
    model, optimizer, decay = resumable(0)
    train(model, optimizer, range(3))
    other = resumable(0)[2]
    other.load_state_dict(safetensors.load(safetensors.save(decay.state_dict())))
    assert other.report() == decay.report()


def test_the_state_of_a_model_that_is_one_layer() -> None:
    layer = nn.Linear(4, 4)
    decay = SelectiveSpectralDecay(layer, criterion="all", k_max=1)
    decay.refresh()
    other = SelectiveSpectralDecay(layer, criterion="all", k_max=1)
    other.load_state_dict(decay.state_dict())
    assert other.report() == decay.report() != []


class Named(nn.Module):
    def __init__(self, **layers: nn.Module) -> None:
        super().__init__()
        for name, layer in layers.items():
            self.add_module(name, layer)


def state_of(model: nn.Module, **options) -> dict[str, Tensor]:
    decay = SelectiveSpectralDecay(model, criterion="all", **{"k_max": 1, **options})
    decay.refresh()
    return decay.state_dict() | {"steps": torch.tensor(41)}


FOREIGN = {
    "other names": (state_of(Named(x=nn.Linear(6, 10), y=nn.Linear(10, 8))), "another model"),
    "a layer less": (state_of(network(), include=["0", "2"]), "4"),
    "a layer more": (state_of(nn.Sequential(*network(), nn.Tanh(), nn.Linear(4, 2))), "6"),
    "other shapes": (
        state_of(nn.Sequential(nn.Linear(6, 10), nn.Tanh(), nn.Linear(10, 8), nn.Tanh(), nn.Linear(8, 5))),
        r"layer 4 is \(4, 8\) here, but \(5, 8\)",
    ),
    "transposed": (
        state_of(nn.Sequential(nn.Linear(10, 6), nn.Tanh(), nn.Linear(10, 8), nn.Tanh(), nn.Linear(8, 4))),
        r"layer 0 is \(10, 6\) here, but \(6, 10\)",
    ),
    "no steps": ({key: value for key, value in state_of(network()).items() if key != "steps"}, "steps"),
    "nothing": ({}, "steps"),
    **{
        f"no {field}": ({key: value for key, value in state_of(network()).items() if key != f"4.{field}"}, "4")
        for field in ("u", "s", "v", "pcdr", "rank")
    },
}


@pytest.mark.parametrize("name", FOREIGN)
def test_a_foreign_state_is_refused_and_nothing_changes(name: str) -> None:
    state, message = FOREIGN[name]
    decay = SelectiveSpectralDecay(network(), criterion="all", k_max=2)
    decay.refresh()
    before = decay.state_dict()
    with pytest.raises(ValueError, match=message):
        decay.load_state_dict(state)
    after = decay.state_dict()
    assert set(after) == set(before) and all(torch.equal(after[key], before[key]) for key in before)


# Errors

BAD_OPTIONS = [
    ({"lam": -1e-3}, "lam is -0.001"),
    ({"lam": math.nan}, "lam is nan"),
    ({"lam": math.inf}, "lam is inf"),
    ({"power": 0}, "power is 0"),
    ({"power": -2}, "power is -2"),
    ({"power": math.nan}, "power is nan"),
    ({"tau": 0}, "tau is 0"),
    ({"tau": 1.1}, "tau is 1.1"),
    ({"tau": math.nan}, "tau is nan"),
    ({"k_max": 0}, "k_max is 0"),
    ({"k_max": 2.5}, "k_max is 2.5"),
    ({"k_max": 5}, r"k_max is 5, but layer 4 has shape \(4, 8\).*exclude='4'"),
    ({"refresh_every": 0}, "refresh_every is 0"),
    ({"refresh_every": 10.0}, "refresh_every is 10.0"),
    ({"criterion": "energy"}, "criterion is 'energy': choose one of activation, spectral, all"),
    ({"coefficients": "frozen"}, "coefficients is 'frozen': choose one of cached, live"),
    ({"coupling": "adam"}, "coupling is 'adam': choose one of gradient, decoupled"),
    ({"include": "*.fc1"}, r"'\*\.fc1' matches no Linear layer"),
    ({"exclude": "*"}, "leave none"),
    ({"outliers": 0}, "capacity is 0"),
]


@pytest.mark.parametrize(("options", "message"), BAD_OPTIONS)
def test_a_bad_option_is_one_error_that_names_the_value(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SelectiveSpectralDecay(network(), **options)


@pytest.mark.parametrize(
    "options", [{"lam": 0}, {"tau": 1}, {"tau": 1.0}, {"k_max": None}, {"k_max": 4}, {"power": 0.5}]
)
def test_the_ends_of_the_ranges_are_allowed(options: dict) -> None:
    SelectiveSpectralDecay(network(), **options)


def test_a_layer_too_small_for_k_max_can_be_left_out() -> None:
    assert list(SelectiveSpectralDecay(network(), k_max=5, exclude="4").layers) == ["0", "2"]


def test_a_model_without_linear_layers_is_refused() -> None:
    with pytest.raises(ValueError, match="Conv2d has no nn.Linear layer"):
        SelectiveSpectralDecay(nn.Conv2d(3, 3, 3))


def test_an_optimizer_of_other_parameters_is_refused_and_nothing_is_hooked() -> None:
    model = network()
    decay = SelectiveSpectralDecay(model)
    foreign = sgd(network())
    with pytest.raises(ValueError, match="does not own the weights of 3 of 3 watched layers"):
        decay.attach(foreign)
    partial = torch.optim.SGD(model[0].parameters(), lr=0.1)
    with pytest.raises(ValueError, match=r"2 of 3 watched layers \(2, 4\)"):
        decay.attach(partial)
    assert len(foreign._optimizer_step_pre_hooks) == len(partial._optimizer_step_pre_hooks) == 0
    assert all(len(layer._forward_hooks) == 0 for layer in linears(model))
    decay.attach(sgd(model))  # and the right one can still be attached


def test_attaching_twice_is_refused_and_the_first_stays() -> None:
    model = network()
    optimizer = sgd(model)
    decay = attached(model, optimizer)
    with pytest.raises(ValueError, match=r"call detach\(\) first"):
        decay.attach(optimizer)
    assert len(optimizer._optimizer_step_pre_hooks) == 1
    train(model, optimizer, range(2))
    assert decay.steps == 2


@pytest.mark.parametrize("forward", ["none", "under no_grad", "before attach"])
def test_a_step_without_a_forward_pass_to_look_at_is_refused(forward: str) -> None:
    model = network()
    optimizer = sgd(model)
    decay = SelectiveSpectralDecay(model)
    if forward == "before attach":
        backward(model)
    decay.attach(optimizer)
    if forward == "under no_grad":
        with torch.no_grad():
            model(gaussian(2, 6))
    zero_gradients(model)
    before = snapshot(model)
    with pytest.raises(RuntimeError, match=r"criterion='activation' needs the forward pass.*criterion='spectral'"):
        optimizer.step()
    assert same(model, before)
    assert decay.steps == 0
    train(model, optimizer, range(2))  # the next proper step works
    assert decay.steps == 2


@pytest.mark.parametrize("criterion", ["activation", "spectral", "all"])
def test_a_weight_that_is_not_finite_is_named(criterion: str) -> None:
    model = network()
    optimizer = sgd(model)
    attached(model, optimizer, criterion=criterion)
    backward(model)
    model[2].weight.data[0, 0] = math.nan
    with pytest.raises(ValueError, match="layer 2: weight holds 1 NaN or infinite"):
        optimizer.step()


# (5) A model of another library


@pytest.fixture(scope="module")
def clip() -> Callable[[], nn.Module]:
    open_clip = pytest.importorskip("open_clip.model")

    def build() -> nn.Module:
        torch.manual_seed(0)
        return open_clip.CLIP(
            embed_dim=16,
            vision_cfg=open_clip.CLIPVisionCfg(layers=2, width=32, head_width=16, patch_size=4, image_size=16),
            text_cfg=open_clip.CLIPTextCfg(context_length=8, vocab_size=50, width=32, heads=2, layers=2),
        )

    return build


def contrastive_step(model: nn.Module, optimizer: torch.optim.Optimizer) -> float:
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(4, 3, 16, 16, generator=generator)
    texts = torch.randint(1, 50, (4, 8), generator=generator)
    optimizer.zero_grad()
    image, text, scale = model(images, texts)
    loss = nn.functional.cross_entropy(scale * image @ text.T, torch.arange(4))
    loss.backward()
    optimizer.step()
    return loss.item()


TOWERS = ["visual.transformer", "transformer"]
CLIP_FFN = [f"{tower}.resblocks.{n}.mlp.{part}" for tower in TOWERS for n in (0, 1) for part in ("c_fc", "c_proj")]


def test_open_clip_layers_are_those_of_the_blocks(clip: Callable[[], nn.Module]) -> None:
    names = set(SelectiveSpectralDecay(clip()).layers)
    attention = {f"{tower}.resblocks.{n}.attn.out_proj" for tower in TOWERS for n in (0, 1)}
    # The output projection of nn.MultiheadAttention is a Linear that is never called; in_proj_weight is no Linear.
    assert set(CLIP_FFN) <= names <= set(CLIP_FFN) | attention


@pytest.mark.parametrize("criterion", ["activation", "all"])
def test_open_clip_trains(clip: Callable[[], nn.Module], criterion: str) -> None:
    model, plain = clip(), clip()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    decay = attached(model, optimizer, criterion=criterion, tau=0.1, refresh_every=2, include="*.mlp.*")
    losses = [contrastive_step(model, optimizer) for _ in range(6)]
    assert losses[-1] < losses[0]
    assert decay.steps == 6
    assert [row.layer for row in decay.report()] == CLIP_FFN
    assert any(row.rank for row in decay.report())
    optimizer = torch.optim.AdamW(plain.parameters(), lr=1e-3)
    for _ in range(6):
        contrastive_step(plain, optimizer)
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, plain.get_parameter(name))}
    assert {f"{row.layer}.weight" for row in decay.report() if row.rank} <= moved


def test_a_layer_in_use_is_never_reported_as_free_of_outliers(clip: Callable[[], nn.Module]) -> None:
    # A layer that the hooks cannot see must be measured otherwise or not be watched; PCDR 0 would be a false statement.
    model = clip()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    decay = attached(model, optimizer)
    contrastive_step(model, optimizer)
    assert [row.layer for row in decay.report() if not any(row.pcdr)] == []
