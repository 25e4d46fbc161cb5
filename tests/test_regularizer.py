"""The regularizer, and the literal Algorithm 1 beside it.

Oracles: :class:`LiteralAlgorithm1` step by step (itself held to closed forms in ``test_reference.py``), the same with
live coefficients and decoupled decay written out here, autograd through ``svdvals``, ``gradcheck``, PyTorch's own
weight decay, and updates written out by hand.
"""

from __future__ import annotations

import copy
import math
import pickle
import re
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from networks import Block
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import s2d.regularizer as module
from s2d import (
    SelectiveSpectralDecay,
    SingularTriplets,
    add_spectral_penalty_,
    penalty_cosine,
    spectral_penalty,
    top_singular_triplets,
)
from s2d.reference import (
    LiteralAlgorithm1,
    activation_pcdr_literal,
    penalty_matrix_literal,
    spectral_pcdr_literal,
)

F64 = torch.float64
STRESS = settings(max_examples=60, deadline=None, derandomize=True)
COUPLINGS = pytest.mark.parametrize("coupling", ["gradient", "decoupled"])
COEFFICIENTS = pytest.mark.parametrize("coefficients", ["cached", "live"])
CRITERIA = pytest.mark.parametrize("criterion", ["activation", "spectral", "all"])


def gaussian(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


def diagonal(*values: float) -> Tensor:
    return torch.diag(torch.tensor(values, dtype=F64))


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


def one_layer(weight: Tensor) -> nn.Linear:
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False, dtype=weight.dtype)
    layer.weight.data = weight.clone()
    return layer


def linears(model: nn.Module) -> list[nn.Linear]:
    return [layer for layer in model.modules() if isinstance(layer, nn.Linear)]


def weights(model: nn.Module) -> list[nn.Parameter]:
    return [layer.weight for layer in linears(model)]


def batch(step: int, dtype: torch.dtype = F64) -> tuple[Tensor, Tensor]:
    return gaussian(16, 6, seed=2 * step + 1).to(dtype), gaussian(16, 4, seed=2 * step + 2).to(dtype)


def loss_of(model: nn.Module, step: int = 0) -> Tensor:
    x, y = batch(step, next(model.parameters()).dtype)
    return (model(x) - y).square().mean()


def backward(model: nn.Module, step: int = 0) -> None:
    loss_of(model, step).backward()


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: Iterable[int], before_step=lambda: None) -> None:
    for step in steps:
        optimizer.zero_grad()
        backward(model, step)
        before_step()
        optimizer.step()


def sgd(model: nn.Module, lr: float = 0.1, **options) -> torch.optim.SGD:
    return torch.optim.SGD(model.parameters(), lr=lr, **options)


def attached(model: nn.Module, *optimizers: Any, **options) -> SelectiveSpectralDecay:
    decay = SelectiveSpectralDecay(model, **options)
    decay.attach(*optimizers)
    return decay


def zero_gradients(model: nn.Module) -> None:
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)


def snapshot(model: nn.Module) -> list[Tensor]:
    return [parameter.detach().clone() for parameter in model.parameters()]


def same(model: nn.Module, tensors: Iterable[Tensor]) -> bool:
    return all(torch.equal(p, t) for p, t in zip(model.parameters(), tensors, strict=True))


def assert_close(model: nn.Module, other: nn.Module, tolerance: float = 1e-9) -> None:
    for got, expected in zip(model.parameters(), other.parameters(), strict=True):
        scale = expected.abs().max().clamp(min=1e-30)
        torch.testing.assert_close(got / scale, expected / scale, rtol=0, atol=tolerance)


def same_state(decay: SelectiveSpectralDecay, state: dict[str, Tensor]) -> bool:
    now = decay.state_dict()
    return now.keys() == state.keys() and all(torch.equal(now[key], state[key]) for key in state)


def ranks(decay: SelectiveSpectralDecay) -> list[int]:
    return [row["rank"] for row in decay.report()]


def pcdrs(decay: SelectiveSpectralDecay) -> list[list[float]]:
    return [[value for key, value in row.items() if key.startswith("pcdr_")] for row in decay.report()]


def hooks(model: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


class Seen:
    """Keeps what modules are given, with hooks of its own, and answers with PCDR by brute force and the printed sums.

    Args:
        modules: the modules, in the order of the layers.
        capacity: how many activations count as outliers.
        argument: which argument of each module is the input.
    """

    def __init__(self, modules: list[nn.Module], capacity: int, argument: list[int] | None = None) -> None:
        self.capacity, self.seen = capacity, [[] for _ in modules]
        self.handles = []
        for layer, keep, position in zip(modules, self.seen, argument or [0] * len(modules), strict=True):
            hook = lambda _layer, args, _output, keep=keep, position=position: keep.append(args[position].detach())  # noqa: E731
            self.handles.append(layer.register_forward_hook(hook))

    def pcdr(self, index: int, weight: Tensor, k: int) -> float:
        x, weight = torch.cat([x.flatten(0, -2) for x in self.seen[index]]), weight.detach()
        y = (x @ weight.T).abs()
        order = sorted(range(y.numel()), key=lambda flat: -y.flatten()[flat].item())[: self.capacity]
        ratios = [activation_pcdr_literal(weight, x[flat // y.shape[1]], flat % y.shape[1], k) for flat in order]
        return sum(min(ratio, 1.0) for ratio in ratios) / len(ratios)

    def clear(self) -> None:
        for inputs in self.seen:
            inputs.clear()


def brute_pcdr(model: nn.Module, inputs: list[Tensor], outliers: int, k_max: int) -> list[list[float]]:
    """PCDR_1 to PCDR_k_max of every linear layer, from all these inputs of the model."""
    seen = Seen(linears(model), outliers)
    with torch.no_grad():
        for x in inputs:
            model(x)
    for handle in seen.handles:
        handle.remove()
    return [[seen.pcdr(i, w, k) for k in range(1, k_max + 1)] for i, w in enumerate(weights(model))]


def assert_pcdr(decay: SelectiveSpectralDecay, expected: list[list[float]], rel: float = 1e-8) -> None:
    assert all(a == pytest.approx(b, rel=rel) for a, b in zip(pcdrs(decay), expected, strict=True))


# --- the pure functions -----------------------------------------------------------------------------------------------

POWERS = st.sampled_from([0.5, 1, 2, 2.5, 3])
SIZES = st.integers(1, 7)
SEEDS = st.integers(0, 2**16)


@STRESS
@given(st.lists(st.floats(0, 1e3), max_size=6), st.floats(0, 10), POWERS)
def test_the_value_of_the_penalty(s: list[float], lam: float, power: float) -> None:
    expected = math.fsum(lam / (power + 1) * value ** (power + 1) for value in s)
    got = spectral_penalty(torch.tensor(s, dtype=F64), lam=lam, power=power)
    assert got.item() == pytest.approx(expected, rel=1e-12, abs=1e-300)


@STRESS
@given(SIZES, SIZES, st.integers(1, 4), SEEDS, st.floats(-3, 3), st.sampled_from(["plain", "transposed", "packed"]))
def test_what_is_added(m: int, n: int, k: int, seed: int, scale: float, layout: str) -> None:
    u, c, v = gaussian(m, k, seed=seed), gaussian(k, seed=seed + 1), gaussian(n, k, seed=seed + 2)
    whole = gaussian(m + 5, n, seed=seed + 3) if layout == "packed" else gaussian(m, n, seed=seed + 3)
    whole = whole.T.contiguous().T if layout == "transposed" else whole
    target = whole[2 : m + 2] if layout == "packed" else whole
    expected, rest = target.numpy() + scale * (u.numpy() * c.numpy()) @ v.numpy().T, whole.clone()
    assert add_spectral_penalty_(target, SingularTriplets(u, torch.ones(k), v), c, scale=scale) is target
    torch.testing.assert_close(target, torch.from_numpy(expected), rtol=1e-12, atol=1e-12)
    if layout == "packed":
        assert torch.equal(whole[:2], rest[:2]) and torch.equal(whole[m + 2 :], rest[m + 2 :])


@STRESS
@given(SIZES, SIZES, SEEDS, POWERS, st.data())
def test_the_cosine_of_two_penalties(m: int, n: int, seed: int, power: float, data: st.DataObject) -> None:
    k = data.draw(st.integers(1, min(m, n)))
    rank = data.draw(st.none() | st.integers(1, k))
    near = data.draw(st.sampled_from([0.0, 1e-3, 1.0]))
    first = gaussian(m, n, seed=seed)
    second = data.draw(st.sampled_from([-2.0, 1.0, 1e-3])) * (first + near * gaussian(m, n, seed=seed + 1))
    dense = [penalty_matrix_literal(weight, rank or k, power).flatten() for weight in (first, second)]
    expected = torch.nn.functional.cosine_similarity(*dense, dim=0, eps=1e-300).item()
    a, b = (top_singular_triplets(weight, k) for weight in (first, second))
    got = penalty_cosine(a, b, power=power, rank=rank)
    assert got == pytest.approx(expected, abs=1e-9)
    assert penalty_cosine(b, a, power=power, rank=rank) == pytest.approx(got, abs=1e-12)
    assert abs(got) <= 1
    assert isinstance(got, float)


def test_the_cosine_of_a_penalty_that_is_zero() -> None:
    some = top_singular_triplets(gaussian(4, 3), 2)
    none = some._replace(s=torch.zeros(2, dtype=F64))
    assert penalty_cosine(none, none) == 1.0
    assert penalty_cosine(none, some) == penalty_cosine(some, none) == 0.0


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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_penalty_is_added_in_place_and_in_the_targets_dtype(dtype: torch.dtype) -> None:
    triplets = top_singular_triplets(separated(6, 4), 2)
    target = torch.zeros(6, 4, dtype=dtype)
    assert add_spectral_penalty_(target, triplets, triplets.s**2, scale=1.0) is target
    expected = (triplets.u * triplets.s**2) @ triplets.v.T
    torch.testing.assert_close(target.double(), expected, rtol=2e-2, atol=5e-2)


def test_a_coefficient_beyond_half_precision() -> None:
    # s^2 = 90000 is no float16, but what is added, 45, is.
    triplets = top_singular_triplets(diagonal(300.0, 1.0), 1)
    target = add_spectral_penalty_(torch.zeros(2, 2, dtype=torch.float16), triplets, triplets.s**2, scale=5e-4)
    torch.testing.assert_close(target.double(), diagonal(45.0, 0.0), rtol=2e-3, atol=0)


# --- step by step against the literal ---------------------------------------------------------------------------------

OPTIMIZERS: dict[str, Callable[[nn.Module], torch.optim.Optimizer]] = {
    "SGD": lambda model: torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9),
    "AdamW": lambda model: torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.01),
}
if hasattr(torch.optim, "Muon"):
    OPTIMIZERS["Muon"] = lambda model: torch.optim.Muon(model.parameters(), lr=5e-3)


class LiteralVariant(LiteralAlgorithm1):
    """The two remedies that are ours and not the paper's, as literally: one dense direction a component.

    Args:
        live: whether ``s_r`` is read along ``u_r v_r^T`` anew before each step.
        optimizer: whose learning rate decoupled decay takes; None for an addition to the gradient.
    """

    def __init__(self, weights: Any, *, live: bool, optimizer: torch.optim.Optimizer | None, **options) -> None:
        super().__init__(weights, **options)
        self.live, self.optimizer = live, optimizer
        self.parts: list[list[tuple[Tensor, float]]] = [[] for _ in self.weights]

    @torch.no_grad()
    def before_step(self) -> None:
        if self.t % self.refresh_every == 0:
            for index, weight in enumerate(self.weights):
                u, s, vh = torch.linalg.svd(weight)
                good = [k for k in range(1, self.k_max + 1) if self.pcdr(index, weight, k) >= self.tau]
                chosen = range(min(good)) if good else ()
                self.parts[index] = [(torch.outer(u[:, r], vh[r]), float(s[r])) for r in chosen]
                self.g_reg[index] = torch.full_like(weight, float(bool(good)))  # what the test looks at
        for weight, parts in zip(self.weights, self.parts, strict=True):
            change = torch.zeros_like(weight)
            for direction, s in parts:
                s = max(float((direction * weight).sum()), 0.0) if self.live else s
                change += self.lam * s**self.power * direction
            if self.optimizer is None:
                weight.grad += change
            else:
                weight -= self.optimizer.param_groups[0]["lr"] * change
        self.t += 1


@pytest.mark.parametrize(
    ("criterion", "coefficients", "coupling", "lam", "tau", "k_max"),
    [
        ("spectral", "cached", "gradient", 2e-3, 0.85, 3),
        ("activation", "cached", "gradient", 2e-3, 0.8, 3),
        ("spectral", "live", "gradient", 2e-3, 0.85, 3),
        ("spectral", "cached", "decoupled", 2e-2, 0.58, 1),  # components that stay away from zero
        ("activation", "live", "decoupled", 2e-2, 0.8, 3),
    ],
)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_it_equals_the_literal_step_by_step(
    name: str, criterion: str, coefficients: str, coupling: str, lam: float, tau: float, k_max: int
) -> None:
    ours, literals = (network(bias=name != "Muon") for _ in range(2))
    options: dict[str, Any] = {"lam": lam, "power": 2, "k_max": k_max, "refresh_every": 25, "tau": tau}
    optimizer, reference = OPTIMIZERS[name](ours), OPTIMIZERS[name](literals)
    decay = attached(
        ours, optimizer, criterion=criterion, coefficients=coefficients, coupling=coupling, outliers=6, **options
    )
    seen = Seen(linears(literals), capacity=6)
    if criterion == "activation":
        options["pcdr"] = seen.pcdr
    if (coefficients, coupling) == ("cached", "gradient"):
        literal = LiteralAlgorithm1(weights(literals), **options)
    else:
        decoupled = reference if coupling == "decoupled" else None
        literal = LiteralVariant(weights(literals), live=coefficients == "live", optimizer=decoupled, **options)
    selected = []
    for step in range(310):
        for model in (ours, literals):
            model.zero_grad()
            backward(model, step)
        literal.before_step()
        seen.clear()
        reference.step()
        optimizer.step()
        if step % 25 == 0:
            selected.append([bool(g.abs().max() > 0) for g in literal.g_reg])
            assert [rank > 0 for rank in ranks(decay)] == selected[-1]
        assert_close(ours, literals, 1e-8)
    # The selection was put to use: some layer was penalised and some was not.
    assert any(map(any, selected)) and not all(map(all, selected))
    assert decay.steps == literal.t == 310


@pytest.mark.parametrize(
    "change", [{}, {"lam": 2.1e-3}, {"power": 2.1}, {"refresh_every": 24}, {"coefficients": "live"}, {"k_max": 1}]
)
def test_the_comparison_above_can_fail(change: dict) -> None:
    options = {"lam": 2e-3, "tau": 0.75, "criterion": "spectral", "refresh_every": 25}
    ours, other = network(), network()
    optimizer = sgd(ours)
    attached(ours, optimizer, **options)
    train(ours, optimizer, range(30))
    optimizer = sgd(other)
    if change:
        attached(other, optimizer, **(options | change))
    train(other, optimizer, range(30))
    assert max((a - b).abs().max() for a, b in zip(weights(ours), weights(other), strict=True)) > 1e-6


@COUPLINGS
@COEFFICIENTS
def test_power_1_on_every_component_is_l2_decay(coupling: str, coefficients: str) -> None:
    # PyTorch's own weight decay, on the weights alone, is the oracle: Adam's is coupled, AdamW's is decoupled.
    ours, theirs = network(bias=False), network(bias=False)
    optimizer = torch.optim.AdamW(ours.parameters(), lr=0.01, weight_decay=0)
    kind = torch.optim.Adam if coupling == "gradient" else torch.optim.AdamW
    options = {"lam": 0.3, "power": 1, "k_max": None, "refresh_every": 1, "criterion": "all"}
    attached(ours, optimizer, coupling=coupling, coefficients=coefficients, **options)
    train(ours, optimizer, range(40))
    train(theirs, kind(theirs.parameters(), lr=0.01, weight_decay=0.3), range(40))
    assert_close(ours, theirs, 1e-9)


@CRITERIA
@COUPLINGS
@COEFFICIENTS
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_lam_zero_changes_nothing(name: str, coefficients: str, coupling: str, criterion: str) -> None:
    ours, plain = network(bias=name != "Muon"), network(bias=name != "Muon")
    optimizer = OPTIMIZERS[name](ours)
    options = {"coefficients": coefficients, "coupling": coupling, "criterion": criterion}
    decay = attached(ours, optimizer, lam=0.0, tau=0.3, refresh_every=3, **options)
    train(ours, optimizer, range(8))
    train(plain, OPTIMIZERS[name](plain), range(8))
    assert same(plain, snapshot(ours))
    assert any(ranks(decay))


def test_the_random_numbers_of_the_training_are_left_alone() -> None:
    # The layers are large enough for the iteration that starts from random vectors.
    def run(watch: bool) -> tuple[list[Tensor], Tensor]:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(6, 130), nn.Dropout(0.5), nn.Linear(130, 140), nn.Dropout(0.5))
        optimizer = sgd(model)
        if watch:
            decay = attached(model, optimizer, lam=0.0, tau=1e-6, refresh_every=2)
        for step in range(4):
            optimizer.zero_grad()
            model(gaussian(5, 6, seed=step).float()).square().mean().backward()
            optimizer.step()
        assert not watch or decay.report()[1]["error"] > 0
        return snapshot(model), torch.random.get_rng_state()

    (with_it, state), (without, other) = run(True), run(False)
    assert all(map(torch.equal, with_it, without)) and torch.equal(state, other)


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


def test_above_the_full_svd_threshold_the_penalty_is_right_to_a_thousandth() -> None:
    u, v = torch.linalg.qr(gaussian(200, 150))[0], torch.linalg.qr(gaussian(150, 150, seed=1))[0]
    for dtype in (torch.float32, F64):
        layer = one_layer(((u * 0.97 ** torch.arange(150)) @ v.T).to(dtype))
        optimizer = sgd(layer, lr=0.0)
        decay = attached(layer, optimizer, lam=1.0, criterion="all", refresh_every=1)
        for step in range(3):
            layer.weight.data += 1e-3 * gaussian(200, 150, seed=step).to(dtype)
            layer.weight.grad = torch.zeros_like(layer.weight)
            optimizer.step()
            expected = penalty_matrix_literal(layer.weight.detach().double(), 3, 2)
            assert (layer.weight.grad.double() - expected).norm() < 1e-3 * expected.norm()
            (row,) = decay.report()
            exact = torch.linalg.svdvals(layer.weight.detach().double())[:3]
            got = torch.tensor([row["sigma_1"], row["sigma_2"], row["sigma_3"]], dtype=F64)
            assert (got - exact).abs().max() <= row["error"] + 1e-6 * exact[0] and not row["full_svd"]
            assert 0 < row["error"] < 1e-3


# --- what a refresh finds ---------------------------------------------------------------------------------------------


@STRESS
@given(
    SIZES,
    SIZES,
    st.sampled_from(["gaussian", "rank one", "zero", "diagonal"]),
    st.sampled_from([1e-8, 1.0, 1e8]),
    SEEDS,
    POWERS,
    st.floats(0.01, 1),
    st.sampled_from(["spectral", "all"]),
    st.data(),
)
def test_the_report_by_hand(m, n, kind, scale, seed, power, tau, criterion, data) -> None:
    k_max = data.draw(st.none() | st.integers(1, min(m, n)))
    weight = scale * {
        "gaussian": gaussian(m, n, seed=seed),
        "rank one": torch.outer(gaussian(m, seed=seed), gaussian(n, seed=seed + 1)),
        "zero": torch.zeros(m, n, dtype=F64),
        "diagonal": torch.eye(m, n, dtype=F64),
    }[kind].to(F64)
    layer = one_layer(weight)
    decay = SelectiveSpectralDecay(layer, lam=0.2, power=power, tau=tau, k_max=k_max, criterion=criterion)
    assert decay.report() == [] and decay.penalty() == 0
    decay.refresh()
    (row,) = decay.report()
    s, k = torch.linalg.svdvals(weight), k_max or min(m, n)
    shares = [spectral_pcdr_literal(weight, j) if kind != "zero" else 0.0 for j in range(1, k + 1)]
    if criterion == "all":
        shares, rank = [1.0] * k, k
    else:
        assume(all(abs(share - tau) > 1e-3 * tau for share in shares))  # outlier_rank forgives rounding
        rank = next((j for j, share in enumerate(shares, 1) if share >= tau), 0)
    columns = [f"{name}_{j}" for name in ("pcdr", "sigma") for j in range(1, k + 1)]
    assert list(row) == [
        *("layer", "rank", *columns),
        *("penalty", "penalty_norm", "error", "full_svd", "certified", "refresh_seconds"),
    ]
    assert row["layer"] == "" and row["rank"] == rank
    assert [row[c] for c in columns[:k]] == pytest.approx(shares, abs=1e-9)
    assert [row[c] for c in columns[k:]] == pytest.approx(s[:k].tolist(), abs=1e-9 * float(s[0]))
    value = 0.2 / (power + 1) * float((s[:rank] ** (power + 1)).sum())
    norm = 0.2 * float(penalty_matrix_literal(weight, rank, power).norm()) if rank else 0.0
    assert row["penalty"] == pytest.approx(value, rel=1e-8, abs=1e-200) == decay.penalty()
    assert row["penalty_norm"] == pytest.approx(norm, rel=1e-6, abs=1e-60)
    assert row["error"] == 0 and row["full_svd"] is row["certified"] is False and row["refresh_seconds"] > 0


# --- what a refresh need not find -------------------------------------------------------------------------------------


def with_share(m: int, n: int, share: float, k: int, seed: int, dtype: torch.dtype) -> Tensor:
    """A weight whose k top components, all equal, hold this share of the squared mass."""
    r = min(m, n)
    squares = torch.cat([torch.full((k,), share / k), torch.full((r - k,), (1 - share) / (r - k))]).double()
    u, v = torch.linalg.qr(gaussian(m, r, seed=seed))[0], torch.linalg.qr(gaussian(n, r, seed=seed + 1))[0]
    return ((u * squares.sqrt()) @ v.T).to(dtype)


def decided(weights: list[Tensor], certify: bool, monkeypatch: pytest.MonkeyPatch, **options) -> SelectiveSpectralDecay:
    model = nn.ModuleList(one_layer(weight) for weight in weights)
    decay = SelectiveSpectralDecay(model, criterion="spectral", include="*", **options)
    with monkeypatch.context() as patch:
        if not certify:
            patch.setattr(decay, "_certificate", lambda matrix, k: None)
        decay.refresh()
    return decay


@pytest.mark.parametrize("dtype", [torch.float32, F64, torch.bfloat16])
@pytest.mark.parametrize(("tau", "k_max"), [(0.95, 3), (0.5, 1), (0.2, 3), (0.06, 3), (0.95, 10), (1e-6, 1)])
def test_a_certified_decision_is_that_of_the_triplets(tau, k_max, dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    shares = [tau * (1 + off) for off in (-0.5, -0.2, -1e-2, -1e-3, -6e-4, -5e-4, -4e-4, 0, 1e-6, 1e-2)]
    tied = [
        with_share(150 + 20 * (i % 2), 140, min(share, 1.0), k_max, i, dtype)
        for i, share in enumerate(shares)
        if share * (min(150, 140) - k_max) >= k_max * (1 - share)  # the top ones are the top
    ]
    u = torch.linalg.qr(gaussian(300, 5))[0]
    others = [
        gaussian(300, 200),
        gaussian(300, 200, seed=1) * 2.0**-100,
        gaussian(300, 200, seed=2) * 2.0**100,
        u @ gaussian(5, 200),  # of rank five
        torch.outer(gaussian(300), gaussian(200)),
        torch.zeros(300, 200, dtype=F64),
        torch.ones(300, 1, dtype=F64) * gaussian(1, 200),
        gaussian(300, 200) * torch.exp(3 * gaussian(300, 1)),
        gaussian(20, 30),  # too small to be worth it
    ]
    weights = tied + [weight.to(dtype) for weight in others]
    fast, slow = (decided(weights, on, monkeypatch, tau=tau, k_max=k_max) for on in (True, False))
    assert ranks(fast) == ranks(slow)
    certified = [row["certified"] for row in fast.report()]
    assert not any(row["certified"] for row in slow.report())
    assert not any(on and rank for on, rank in zip(certified, ranks(fast), strict=True))
    if tau == 0.95:
        assert certified[len(tied)] and certified[0] and not certified[-1]
    if tau < 0.01:
        assert not any(certified)
    for name, watched in slow._watched.items():  # what was not certified is found to the same bits
        if not fast.report()[int(name.split(".")[0])]["certified"]:
            assert all(map(torch.equal, watched.triplets, fast._watched[name].triplets))


def test_a_certified_layer_is_reported_and_kept_as_such() -> None:
    layer = one_layer(gaussian(200, 150))
    optimizer = sgd(layer)
    decay = attached(layer, optimizer, criterion="spectral", lam=1.0, refresh_every=1)
    layer.weight.grad = torch.zeros_like(layer.weight)
    before = snapshot(layer)
    optimizer.step()
    assert same(layer, before)
    (row,) = decay.report()
    truth = torch.linalg.svdvals(layer.weight.detach()).square()
    assert row["certified"] and row["rank"] == 0 and math.isnan(row["sigma_1"]) and math.isnan(row["error"])
    assert [row["pcdr_1"], row["pcdr_3"]] >= [truth[0] / truth.sum(), truth[:3].sum() / truth.sum()]
    assert row["pcdr_3"] < 0.95
    assert decay.metrics()["s2d/certified"] == 1 and math.isnan(decay.metrics()["s2d/sigma_1_max"])
    assert "largest sigma not looked at" in decay.summary() and "1 layers certified" in decay.summary()
    state = through_safetensors(decay.state_dict())
    other = SelectiveSpectralDecay(one_layer(layer.weight.detach()), criterion="spectral", lam=1.0, refresh_every=1)
    other.load_state_dict(state)
    assert same_state(other, state) and other.report()[0]["certified"]
    # Once a component stands out it is found, from a fresh start and from the last triplets.
    for _ in range(2):
        layer.weight.data += 30 * torch.outer(gaussian(200, seed=5), gaussian(150, seed=6))
        layer.weight.grad = torch.zeros_like(layer.weight)
        expected = penalty_matrix_literal(layer.weight.detach(), 1, 2)
        optimizer.step()
        torch.testing.assert_close(layer.weight.grad, expected, rtol=0, atol=1e-4 * float(expected.abs().max()))
        assert decay.report()[0]["rank"] == 1 and not decay.report()[0]["certified"]
        layer.weight.data.copy_(gaussian(200, 150))
        optimizer.step()
        assert decay.report()[0]["certified"] and decay._watched[""].triplets.s.any()


def test_every_component_is_beyond_any_bound() -> None:
    layer = one_layer(gaussian(200, 150))
    decay = SelectiveSpectralDecay(layer, criterion="spectral", k_max=None)
    decay.refresh()
    (row,) = decay.report()
    assert row["rank"] > 100 and not row["certified"]


@STRESS
@given(SIZES, SIZES, SEEDS, POWERS, st.floats(0, 3), st.floats(0.05, 0.9), st.data())
def test_the_gradient_of_one_step(m, n, seed, power, lam, tau, data) -> None:
    k_max = data.draw(st.integers(1, min(m, n)))
    layer, start = one_layer(gaussian(m, n, seed=seed)), gaussian(m, n, seed=seed + 1)
    optimizer = sgd(layer, lr=0.5)
    options = {"lam": lam, "power": power, "tau": tau, "k_max": k_max}
    attached(layer, optimizer, criterion="spectral", **options)
    twin = nn.Parameter(layer.weight.detach().clone())
    twin.grad, layer.weight.grad = start.clone(), start.clone()
    optimizer.step()
    LiteralAlgorithm1([twin], **options, refresh_every=1).before_step()
    torch.testing.assert_close(layer.weight.grad, twin.grad, rtol=1e-8, atol=1e-9)
    torch.testing.assert_close(layer.weight.detach(), twin.detach() - 0.5 * twin.grad, rtol=1e-8, atol=1e-9)


def test_metrics_summary_and_repr() -> None:
    model = network()
    model[4].weight.requires_grad_(False)
    optimizer = sgd(model)
    decay = attached(model, optimizer, lam=0.2, power=3, tau=0.7, criterion="spectral", k_max=2)
    assert set(decay.metrics().values()) == {0.0}
    train(model, optimizer, range(2))
    rows, metrics = decay.report(), decay.metrics()
    assert [row["layer"] for row in rows] == ["0", "2"] and list(decay.layers) == ["0", "2", "4"]
    start = network()
    matrices = [
        penalty_matrix_literal(w.detach(), row["rank"], 3) for w, row in zip(weights(start), rows, strict=False)
    ]
    expected = {
        "s2d/layers": sum(row["rank"] > 0 for row in rows),
        "s2d/components": sum(ranks(decay)),
        "s2d/penalty": decay.penalty(),
        "s2d/penalty_norm": 0.2 * torch.cat([g.flatten() for g in matrices]).norm().item(),
        "s2d/sigma_1_max": max(float(torch.linalg.matrix_norm(w.detach(), 2)) for w in weights(start)[:2]),
        "s2d/full_svds": 0,
        "s2d/certified": 0,
    }
    assert metrics.keys() - expected.keys() == {"s2d/refresh_seconds"}
    assert all(isinstance(value, float) for value in metrics.values())
    assert {key: metrics[key] for key in expected} == pytest.approx(expected)
    assert decay.penalty() == pytest.approx(sum(row["penalty"] for row in rows)) and decay.penalty() > 0
    for part in ("step 2", f"{sum(ranks(decay))} components in", "of 3 layers", f"penalty {decay.penalty():.3g}"):
        assert part in decay.summary()
    lines = repr(decay).splitlines()
    assert lines[1:] == ["  0: Linear (10, 6)", "  2: Linear (8, 10)", "  4: Linear (4, 8), frozen"]
    for setting in ("lam=0.2", "power=3", "tau=0.7", "k_max=2", "refresh_every=100", "criterion='spectral'"):
        assert setting in lines[0]
    assert "(model): Linear (10, 6)" in repr(SelectiveSpectralDecay(start[0]))


def test_the_similarity_of_the_cached_penalty() -> None:
    model = network()
    decay = SelectiveSpectralDecay(model, criterion="spectral", tau=0.8, k_max=2, power=3)
    assert decay.cached_similarity() == {}
    decay.refresh()
    penalised = [row["layer"] for row in decay.report() if row["rank"]]
    assert 0 < len(penalised) < 3
    assert decay.cached_similarity() == pytest.approx(dict.fromkeys(penalised, 1.0))
    state = decay.state_dict()
    old = {name: linear.matrix().detach().clone() for name, linear in decay.layers.items()}
    for index, weight in enumerate(weights(model)):
        weight.data += 0.5 * gaussian(*weight.shape, seed=50 + index)
    got = decay.cached_similarity()
    for row in decay.report():
        if row["rank"]:
            new = decay.layers[row["layer"]].matrix().detach()
            dense = [penalty_matrix_literal(w, row["rank"], 3).flatten() for w in (old[row["layer"]], new)]
            assert got.pop(row["layer"]) == pytest.approx(torch.cosine_similarity(*dense, dim=0).item(), abs=1e-9)
            assert torch.cosine_similarity(*dense, dim=0) < 0.99
    assert got == {} and same_state(decay, state)


def test_criterion_all_takes_k_max_components_of_every_layer() -> None:
    for k_max, expected in ((2, [2, 2, 2]), (None, [6, 8, 4])):
        decay = SelectiveSpectralDecay(network(), criterion="all", k_max=k_max)
        decay.refresh()
        assert ranks(decay) == expected


def test_degenerate_weights_are_left_alone() -> None:
    model = network()
    model[2].weight.data.zero_()
    optimizer = sgd(model)
    decay = attached(model, optimizer, criterion="spectral", tau=0.5, lam=1.0)
    zero_gradients(model)
    optimizer.step()
    assert ranks(decay)[1] == 0
    assert torch.equal(model[2].weight, torch.zeros(8, 10, dtype=F64))


def test_a_rank_one_weight_is_selected_at_rank_one() -> None:
    model = nn.Sequential(nn.Linear(5, 7), nn.Linear(7, 3)).double()
    a, b = gaussian(7), gaussian(5, seed=1)
    model[0].weight.data = torch.outer(a, b)
    optimizer = sgd(model, lr=1.0)
    decay = attached(model, optimizer, lam=1e-3, k_max=2)
    model(gaussian(9, 5, seed=2)).sum().backward()
    zero_gradients(model)
    optimizer.step()
    assert ranks(decay)[0] == 1
    torch.testing.assert_close(model[0].weight.detach(), torch.outer(a, b) * (1 - 1e-3 * a.norm() * b.norm()))


# --- live coefficients and decoupled decay ----------------------------------------------------------------------------


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


@COUPLINGS
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
    model = nn.Sequential(one_layer(diagonal(4.0, 3.0, 1.0)))
    _, optimizer = one_step(model, coefficients="live", lam=1.0)
    model[0].weight.data = diagonal(-4.0, 2.0, 9.0)
    (added,) = added_gradient(model, optimizer)
    torch.testing.assert_close(added, diagonal(0.0, 4.0, 0.0))


@COEFFICIENTS
@pytest.mark.parametrize("power", [1, 3])
@pytest.mark.parametrize("strength", [0.3, 0.7, 5.0])
def test_decoupled_decay_never_takes_a_component_past_zero(coefficients: str, power: float, strength: float) -> None:
    # The first step would take this fraction of the largest component; without a cap the later ones take as much.
    weight = gaussian(5, 4)
    u, s, vh = torch.linalg.svd(weight, full_matrices=False)
    layer = one_layer(weight)
    optimizer = sgd(layer, lr=0.1)
    lam = strength / (0.1 * float(s[0]) ** (power - 1))
    options = {"coupling": "decoupled", "coefficients": coefficients, "criterion": "all", "k_max": 2}
    attached(layer, optimizer, lam=lam, power=power, **options)
    last = s
    for step in range(6):
        layer.weight.grad = torch.zeros_like(weight)
        optimizer.step()
        now = ((u.T @ layer.weight.detach()) * vh).sum(1)
        assert (now >= -1e-12).all() and (now <= last + 1e-12).all()
        torch.testing.assert_close(now[2:], s[2:])  # and what is not penalised stays
        if step == 0:
            torch.testing.assert_close(now[:2], (s[:2] - 0.1 * lam * s[:2] ** power).clamp(min=0), atol=1e-12, rtol=0)
        last = now


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


@COUPLINGS
@COEFFICIENTS
@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW])
def test_an_optimizer_that_maximizes_shrinks_the_weights_as_its_own_weight_decay_does(kind, coefficients, coupling):
    """To maximize f is to minimize -f: both runs must end with the same weights."""
    ends = []
    for maximize in (False, True):
        model = network()
        optimizer = kind(model.parameters(), lr=0.05, maximize=maximize)
        attached(model, optimizer, lam=0.3, criterion="all", coefficients=coefficients, coupling=coupling)
        for step in range(5):
            optimizer.zero_grad()
            (-loss_of(model, step) if maximize else loss_of(model, step)).backward()
            optimizer.step()
        ends.append(snapshot(model))
    for minimized, maximized in zip(*ends, strict=True):
        torch.testing.assert_close(maximized, minimized, rtol=1e-9, atol=1e-12)


def test_maximize_is_read_in_each_group() -> None:
    model = network()
    before = [weight.detach().clone() for weight in weights(model)]
    groups = [{"params": layer.parameters(), "maximize": i == 1} for i, layer in enumerate(linears(model))]
    optimizer = torch.optim.SGD(groups, lr=0.1)
    attached(model, optimizer, lam=0.2, criterion="all", k_max=3)
    zero_gradients(model)
    optimizer.step()
    for weight, start in zip(weights(model), before, strict=True):
        expected = start - 0.1 * 0.2 * penalty_matrix_literal(start, 3, 2)
        torch.testing.assert_close(weight.detach(), expected, rtol=1e-10, atol=1e-12)


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


# --- when a refresh happens, and what it sees -------------------------------------------------------------------------


@CRITERIA
@pytest.mark.parametrize("refresh_every", [1, 3, 100])
def test_a_refresh_happens_exactly_when_due(criterion: str, refresh_every: int) -> None:
    # In step t the weights are t + 1 times what they were, and with power 1 so is the penalty of a refresh.
    model = network()
    optimizer = sgd(model, lr=0.0)
    options = {"lam": 1.0, "power": 1, "k_max": 2, "tau": 1e-6}
    decay = attached(model, optimizer, criterion=criterion, refresh_every=refresh_every, **options)
    start = [weight.detach().clone() for weight in weights(model)]
    for step in range(8):
        for weight, first in zip(weights(model), start, strict=True):
            weight.data = (step + 1) * first
        assert decay.steps == step
        optimizer.zero_grad()
        backward(model, step)
        for parameter in model.parameters():
            parameter.grad.zero_()
        optimizer.step()
        last = 1 + step - step % refresh_every
        for weight, first in zip(weights(model), start, strict=True):
            expected = last * penalty_matrix_literal(first, 2 if criterion == "all" else 1, 1)
            torch.testing.assert_close(weight.grad, expected, rtol=1e-9, atol=1e-9)
    assert decay.steps == 8


def test_a_refresh_starts_from_the_triplets_before_it(monkeypatch: pytest.MonkeyPatch) -> None:
    given_starts, found = [], []
    solve = module.solve_top_triplets

    def recorded(*args, warm_starts, **kwargs):
        given_starts.extend(warm_starts)
        solved = solve(*args, warm_starts=warm_starts, **kwargs)
        found.extend(solution.triplets for solution in solved)
        return solved

    monkeypatch.setattr(module, "solve_top_triplets", recorded)
    model = network()
    optimizer = sgd(model)
    attached(model, optimizer, criterion="all", refresh_every=2)
    train(model, optimizer, range(4))
    assert given_starts[:3] == [None] * 3
    for a, b in zip(given_starts[3:], found[:3], strict=True):
        assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def test_a_refresh_by_hand() -> None:
    model = network()
    decay, optimizer = one_step(model, lam=0.3)
    for weight in weights(model):
        weight.data *= 2
    decay.refresh()
    for grad, weight in zip(added_gradient(model, optimizer), weights(model), strict=True):
        torch.testing.assert_close(grad, 0.3 * penalty_matrix_literal(weight.detach(), 2, 2), rtol=1e-9, atol=1e-10)
    assert decay.steps == 2


@pytest.mark.parametrize("reason", ["no forward pass", "not finite"])
def test_a_refresh_by_hand_that_fails_leaves_the_penalty_as_it_was(reason: str) -> None:
    model = network()
    optimizer = sgd(model)
    decay = attached(model, optimizer, tau=0.3, criterion="activation" if reason == "no forward pass" else "spectral")
    train(model, optimizer, range(2))
    state, rows = decay.state_dict(), decay.report()
    assert any(ranks(decay))
    if reason == "not finite":
        model[2].weight.data[0, 0] = math.nan
    with pytest.raises((RuntimeError, ValueError)):
        decay.refresh()
    assert same_state(decay, state) and decay.report() == rows


def test_gradient_accumulation_sees_the_outliers_of_every_micro_batch() -> None:
    model = network()
    optimizer = sgd(model, lr=0.0)
    decay = attached(model, optimizer, outliers=5, k_max=2)
    inputs = [gaussian(8, 6, seed=1), 1.2 * gaussian(3, 6, seed=2), gaussian(8, 6, seed=3)]
    for x in inputs:
        model(x).square().mean().backward()
    optimizer.step()
    expected = brute_pcdr(model, inputs, 5, 2)
    assert_pcdr(decay, expected)
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
    assert_pcdr(decay, brute_pcdr(model, [x], 5, 2))


def test_only_the_forward_passes_of_a_refresh_step_are_kept() -> None:
    model = network()
    optimizer = sgd(model, lr=0.0)
    decay = attached(model, optimizer, outliers=5, k_max=2, refresh_every=3)
    inputs = [gaussian(8, 6, seed=step) * (10.0 if step in (1, 2) else 1.0) for step in range(4)]
    for step, x in enumerate(inputs):
        assert decay._watch.active == (step % 3 == 0)  # in between, watching would cost time
        optimizer.zero_grad()
        model(x).sum().backward()
        optimizer.step()
        assert_pcdr(decay, brute_pcdr(model, [inputs[3] if step == 3 else inputs[0]], 5, 2))


def test_a_bias_is_no_part_of_an_outlier() -> None:
    model = network()
    optimizer = sgd(model, lr=0.0)
    model[0].bias.data = torch.arange(10, dtype=F64) * 100
    decay = attached(model, optimizer, outliers=5, k_max=2, include="0")
    x = gaussian(8, 6)
    model(x).sum().backward()
    optimizer.step()
    assert pcdrs(decay)[0] == pytest.approx(brute_pcdr(model, [x], 5, 2)[0], rel=1e-8)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("first", [True, False])
def test_activations_that_are_not_finite_hide_nothing(bad: float, first: bool) -> None:
    model = network()
    optimizer = sgd(model, lr=0.0)
    decay = attached(model, optimizer, outliers=5, k_max=2)
    x, broken = gaussian(8, 6), torch.full((8, 6), bad, dtype=F64)
    for inputs in (broken, x) if first else (x, broken):
        model(inputs)
    zero_gradients(model)
    optimizer.step()
    assert_pcdr(decay, brute_pcdr(model, [x], 5, 2))


@CRITERIA
def test_without_the_activation_criterion_no_forward_pass_is_watched(criterion: str) -> None:
    model = network()
    attached(model, sgd(model), criterion=criterion)
    assert hooks(model) == (3 if criterion == "activation" else 0)


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
    assert {row["layer"]: row["rank"] for row in decay.report() if row["rank"]} == {"used": 1}
    assert torch.equal(model.unused.weight, before)


def test_a_layer_whose_weight_another_module_reads_is_named_once(recwarn: pytest.WarningsRecorder) -> None:
    class Reading(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.called, self.read = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return nn.functional.linear(self.called(x), self.read.weight)

    model = Reading().double()
    optimizer = sgd(model)
    decay = attached(model, optimizer, tau=1e-6, k_max=1, refresh_every=1)
    for step in range(3):
        optimizer.zero_grad()
        model(gaussian(3, 4, seed=step)).sum().backward()
        grad = model.read.weight.grad.clone()
        optimizer.step()
        assert torch.equal(model.read.weight.grad, grad)
    assert {row["layer"]: row["rank"] for row in decay.report()} == {"called": 1, "read": 0}
    (message,) = [str(warning.message) for warning in recwarn if "never called" in str(warning.message)]
    assert "1 of 2 layers" in message and "(read)" in message


# --- life in a training loop ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scaled", [False, True])
def test_unscaling_accumulation_and_clipping_come_before_the_penalty(scaled: bool) -> None:
    model = network(dtype=torch.float32)
    start = [weight.detach().clone() for weight in weights(model)]
    optimizer = sgd(model, lr=0.1)
    attached(model, optimizer, lam=0.2, criterion="all", k_max=2)
    scaler = torch.amp.GradScaler("cpu", init_scale=256.0, enabled=scaled)
    for step in range(3):
        scaler.scale(loss_of(model, step) / 3).backward()
    scaler.unscale_(optimizer)
    nn.utils.clip_grad_norm_(model.parameters(), 1e-3)
    clipped = [weight.grad.clone() for weight in weights(model)]
    scaler.step(optimizer)
    for weight, w, grad in zip(weights(model), start, clipped, strict=True):
        expected = w - 0.1 * (grad + 0.2 * penalty_matrix_literal(w.double(), 2, 2).float())
        torch.testing.assert_close(weight.detach(), expected, rtol=1e-5, atol=1e-6)
        assert (expected - w).norm() > 10 * 0.1 * 1e-3  # clipped afterwards, it would be no larger than this


@COUPLINGS
@COEFFICIENTS
@pytest.mark.parametrize("unscale", [False, True])
@pytest.mark.parametrize("kind", ["SGD", "fused SGD", "fused AdamW"])
def test_a_gradient_scaler_does_not_scale_the_penalty(kind: str, unscale: bool, coupling: str, coefficients) -> None:
    # A fused optimizer divides by the scale inside its kernel, after the step hooks have run. A power of two is exact.
    options = {"lam": 0.5, "criterion": "all", "k_max": 2, "coupling": coupling, "coefficients": coefficients}
    build = torch.optim.AdamW if kind.endswith("AdamW") else torch.optim.SGD
    plain, scaled = network(dtype=torch.float32), network(dtype=torch.float32)
    optimizer = build(plain.parameters(), lr=0.05, fused=kind.startswith("fused"))
    attached(plain, optimizer, refresh_every=2, **options)
    train(plain, optimizer, range(4))
    optimizer = build(scaled.parameters(), lr=0.05, fused=kind.startswith("fused"))
    attached(scaled, optimizer, refresh_every=2, **options)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    for step in range(4):
        optimizer.zero_grad()
        scaler.scale(loss_of(scaled, step)).backward()
        if unscale:
            scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()
    assert_close(scaled, plain, 1e-5)


@pytest.mark.parametrize("fused", [False, True])
def test_a_step_that_the_scaler_skips_is_no_step(fused: bool) -> None:
    model = network(dtype=torch.float32)
    optimizer = sgd(model, fused=fused)
    decay = attached(model, optimizer, lam=0.5, tau=0.3, k_max=2, coupling="decoupled", outliers=5)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    scaler.scale(model(torch.full((4, 6), math.inf)).square().mean()).backward()
    before = snapshot(model)
    scaler.step(optimizer)
    scaler.update()
    assert same(model, before) and decay.steps == 0 and decay.report() == []
    optimizer.zero_grad()
    x, y = batch(0, torch.float32)
    expected = brute_pcdr(copy.deepcopy(model).double(), [x.double()], 5, 2)
    scaler.scale((model(x) - y).square().mean()).backward()
    scaler.step(optimizer)
    assert decay.steps == 1
    assert_pcdr(decay, expected, rel=1e-4)


def test_autocast() -> None:
    model = network(dtype=torch.float32)
    optimizer = sgd(model)
    decay = attached(model, optimizer, tau=0.3)
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(gaussian(8, 6).float()).square().mean()
    loss.backward()
    optimizer.step()
    assert pcdrs(decay)[0] == pytest.approx(brute_pcdr(network(), [gaussian(8, 6)], 16, 3)[0], abs=0.05)


@pytest.mark.parametrize(("criterion", "coupling"), [("activation", "gradient"), ("spectral", "decoupled")])
def test_a_step_taken_under_autocast_is_as_precise(criterion: str, coupling: str) -> None:
    options = {"lam": 0.1, "tau": 0.3, "coefficients": "live", "refresh_every": 3}
    inside, outside = network(dtype=torch.float32), network(dtype=torch.float32)
    decays = []
    for model, enabled in ((inside, True), (outside, False)):
        optimizer = sgd(model)
        decays.append(attached(model, optimizer, criterion=criterion, coupling=coupling, **options))
        for step in range(5):
            optimizer.zero_grad()
            backward(model, step)
            with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
                optimizer.step()
    assert_close(inside, outside, 1e-6)
    assert_pcdr(decays[0], pcdrs(decays[1]), rel=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@COUPLINGS
@COEFFICIENTS
def test_weights_of_every_precision(dtype: torch.dtype, coupling: str, coefficients: str) -> None:
    model = network(dtype=dtype)
    start = [weight.detach().double() for weight in weights(model)]
    optimizer = sgd(model, lr=1.0)
    options = {"coupling": coupling, "coefficients": coefficients, "criterion": "all", "k_max": 2}
    attached(model, optimizer, lam=0.05, refresh_every=2, **options)
    zero_gradients(model)
    optimizer.step()
    eps = torch.finfo(dtype).eps
    for weight, w in zip(weights(model), start, strict=True):
        assert weight.dtype == dtype
        expected = w - 0.05 * penalty_matrix_literal(w, 2, 2)
        torch.testing.assert_close(weight.detach().double(), expected, rtol=0, atol=4 * eps * float(w.abs().max()))
    train(model, optimizer, range(1, 3))
    assert all(torch.isfinite(p).all() for p in model.parameters())


def test_parameter_groups_change_nothing() -> None:
    ours, literals = network(), network()
    groups = [
        [{"params": [*model[0].parameters(), model[4].weight]}, {"params": [*model[2].parameters()], "lr": 0.01}]
        for model in (ours, literals)
    ]
    optimizer = torch.optim.SGD([*groups[0], {"params": [ours[4].bias], "lr": 0.0}], lr=0.1, momentum=0.5)
    reference = torch.optim.SGD([*groups[1], {"params": [literals[4].bias], "lr": 0.0}], lr=0.1, momentum=0.5)
    options = {"lam": 0.01, "power": 2, "tau": 0.5, "k_max": 2, "refresh_every": 4}
    attached(ours, optimizer, criterion="spectral", **options)
    literal = LiteralAlgorithm1(weights(literals), **options)
    train(ours, optimizer, range(12))
    train(literals, reference, range(12), literal.before_step)
    assert_close(ours, literals)


@COUPLINGS
@pytest.mark.parametrize("how", ["requires_grad", "not owned", "no gradient"])
@pytest.mark.parametrize("criterion", ["activation", "all"])
def test_a_frozen_layer_is_not_touched(how: str, coupling: str, criterion: str) -> None:
    model = network()
    frozen = model[2].weight
    frozen.requires_grad_(how == "no gradient")
    before = frozen.detach().clone()
    optimizer = torch.optim.SGD([p for p in model.parameters() if how != "not owned" or p is not frozen], lr=0.1)
    decay = attached(model, optimizer, lam=1.0, tau=0.3, criterion=criterion, coupling=coupling)
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
    assert "2" not in [row["layer"] for row in decay.report()]  # nor was it decomposed


@COUPLINGS
@pytest.mark.parametrize(
    "frozen", [range(4), range(4, 5), range(6, 8), range(2, 7), range(0, 18), ()], ids=lambda steps: str(list(steps))
)
def test_a_layer_frozen_for_a_while(frozen: Iterable[int], coupling: str) -> None:
    # Refreshes are at 0, 3, 6, ...; a layer that is frozen at one is refreshed in the next step that trains it.
    model, twin = network(), network()
    optimizer, reference = sgd(model), sgd(twin)
    decay = attached(model, optimizer, lam=0.1, criterion="all", k_max=1, refresh_every=3, coupling=coupling)
    penalty: list[Tensor | None] = [None] * 3
    for step in range(18):
        for net, opt in ((model, optimizer), (twin, reference)):
            net[2].requires_grad_(step not in frozen)
            opt.zero_grad()
            backward(net, step)
        for index, weight in enumerate(weights(twin)):
            if step % 3 == 0:
                penalty[index] = None
            if penalty[index] is None and weight.grad is not None:
                penalty[index] = 0.1 * penalty_matrix_literal(weight.detach(), 1, 2)
            if weight.grad is not None and coupling == "gradient":
                weight.grad += penalty[index]
            elif weight.grad is not None:
                weight.data -= 0.1 * penalty[index]
        optimizer.step()
        reference.step()
        assert_close(model, twin)
    assert decay.steps == 18


def test_a_layer_that_the_optimizer_gets_later_is_penalised_if_it_is_said_to_be() -> None:
    model = network()
    model[2].requires_grad_(False)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    decay = attached(model, optimizer, lam=0.5, criterion="all", k_max=1, refresh_every=2)
    train(model, optimizer, range(2))
    model[2].requires_grad_(True)
    optimizer.add_param_group({"params": list(model[2].parameters())})
    optimizer.zero_grad()
    backward(model, 2)
    before, start = model[2].weight.grad.clone(), model[2].weight.detach().clone()
    optimizer.step()
    (row,) = [row for row in decay.report() if row["layer"] == "2"]
    expected = 0.5 * penalty_matrix_literal(start, row["rank"], 2) if row["rank"] else torch.zeros_like(start)
    torch.testing.assert_close(model[2].weight.grad - before, expected)


@COUPLINGS
def test_a_tied_weight_is_penalised_once(coupling: str) -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4)).double()
    model[2].weight = model[0].weight
    start = model[0].weight.detach().clone()
    optimizer = sgd(model, lr=0.1)
    decay = attached(model, optimizer, lam=0.3, criterion="all", k_max=1, coupling=coupling)
    zero_gradients(model)
    optimizer.step()
    assert list(decay.layers) == ["0", "4"]
    torch.testing.assert_close(
        model[0].weight.detach(), start - 0.1 * 0.3 * penalty_matrix_literal(start, 1, 2), rtol=1e-9, atol=1e-12
    )


def test_the_outliers_of_a_tied_weight_are_those_of_both_modules() -> None:
    model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Tanh(), nn.Linear(4, 4, bias=False)).double()
    model[2].weight = model[0].weight
    optimizer = sgd(model, lr=0.0)
    decay = attached(model, optimizer, k_max=2, outliers=30)
    x = 0.5 * gaussian(6, 4)
    model(x).sum().backward()
    optimizer.step()
    inputs = [x, torch.tanh(x @ model[0].weight.detach().T)]
    alone = nn.Sequential(one_layer(model[0].weight.detach()))
    assert_pcdr(decay, brute_pcdr(alone, inputs, 30, 2))
    assert all(brute_pcdr(alone, [part], 30, 2) != brute_pcdr(alone, inputs, 30, 2) for part in inputs)


class Checkpointed(nn.Module):
    """The layers of a network, recomputed in ``backward()`` one by one."""

    def __init__(self, layers: nn.Sequential, reentrant: bool) -> None:
        super().__init__()
        self.layers, self.reentrant = layers, reentrant

    def forward(self, x: Tensor) -> Tensor:
        x = x.requires_grad_()
        for layer in self.layers:
            x = checkpoint(layer, x, use_reentrant=self.reentrant)
        return x


@pytest.mark.parametrize("reentrant", [False, True])
@COEFFICIENTS
def test_activation_checkpointing_changes_nothing(reentrant: bool, coefficients: str) -> None:
    plain = network()
    options = {"lam": 0.05, "tau": 0.6, "k_max": 2, "refresh_every": 3, "outliers": 5, "coefficients": coefficients}
    recomputed = Checkpointed(network(), reentrant)
    decays = []
    for model in (plain, recomputed):
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
        decays.append(attached(model, optimizer, **options))
        for step in range(8):
            optimizer.zero_grad()
            for part in range(2):
                backward(model, 2 * step + part)
            optimizer.step()
    assert_pcdr(decays[1], pcdrs(decays[0]))
    assert_close(recomputed, plain)
    assert 0 < sum(ranks(decays[0])) < 6


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_of_the_model_is_inert(copied: Callable[[nn.Module], nn.Module]) -> None:
    model, plain = network(), network()
    optimizer = sgd(model)
    options = {"lam": 0.05, "tau": 0.6, "k_max": 2, "refresh_every": 2, "outliers": 5}
    decay = attached(model, optimizer, **options)
    twin = copied(model)
    own = sgd(twin)
    for step in range(5):
        train(twin, own, [100 + step])
        twin(1000 * gaussian(8, 6)).sum().backward()
        train(model, optimizer, [step])
    alone = sgd(plain)
    attached(plain, alone, **options)
    train(plain, alone, range(5))
    assert same(model, snapshot(plain)) and decay.steps == 5
    free = network()  # and the copy was trained without any penalty
    optimizer = sgd(free)
    for step in range(5):
        train(free, optimizer, [100 + step])
        free(1000 * gaussian(8, 6)).sum().backward()
    assert same(twin, snapshot(free))


@pytest.mark.parametrize("when", ["before", "after"])
def test_an_exponential_moving_average(when: str) -> None:
    model, plain = network(), network()
    options = {"lam": 0.05, "tau": 0.6, "k_max": 2, "refresh_every": 2, "outliers": 5}

    def averaged() -> torch.optim.swa_utils.AveragedModel:
        return torch.optim.swa_utils.AveragedModel(
            model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.5), use_buffers=False
        )

    optimizer, other = sgd(model), sgd(plain)
    ema = averaged() if when == "before" else None
    attached(model, optimizer, **options)
    ema = ema or averaged()
    attached(plain, other, **options)
    expected = None
    for step in range(5):
        train(model, optimizer, [step])
        train(plain, other, [step])
        ema.update_parameters(model)
        ema(1000 * gaussian(8, 6)).sum().backward()  # its forward passes are not the training's
        now = snapshot(plain)
        expected = now if expected is None else [0.5 * a + 0.5 * b for a, b in zip(expected, now, strict=True)]
    assert same(model, snapshot(plain))
    for got, want in zip(ema.module.parameters(), expected, strict=True):
        torch.testing.assert_close(got.detach(), want)


# --- closures and several optimizers ----------------------------------------------------------------------------------


@pytest.mark.parametrize("criterion", ["activation", "spectral"])
@pytest.mark.parametrize("keyword", [False, True])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_closure_equals_the_plain_loop(name: str, keyword: bool, criterion: str) -> None:
    options = {"lam": 0.05, "criterion": criterion, "tau": 0.6, "k_max": 2, "refresh_every": 3}
    plain, closed = network(bias=name != "Muon"), network(bias=name != "Muon")
    optimizer = OPTIMIZERS[name](plain)
    attached(plain, optimizer, **options)
    train(plain, optimizer, range(7))
    optimizer = OPTIMIZERS[name](closed)
    decay = attached(closed, optimizer, **options)
    for step in range(7):

        def closure(step: int = step) -> Tensor:
            optimizer.zero_grad()
            loss = loss_of(closed, step)
            loss.backward()
            return loss

        expected = loss_of(copy.deepcopy(closed), step)
        loss = optimizer.step(closure=closure) if keyword else optimizer.step(closure)
        assert loss.item() == expected.item()
    assert same(closed, snapshot(plain)) and decay.steps == 7


def test_lbfgs_equals_the_literal_inside_its_closure() -> None:
    ours, literals = network(), network()
    options = {"lam": 1e-3, "power": 2, "tau": 0.8, "k_max": 2}
    optimizer, reference = (torch.optim.LBFGS(model.parameters(), lr=0.1, max_iter=4) for model in (ours, literals))
    decay = attached(ours, optimizer, criterion="spectral", refresh_every=2, **options)
    literal = LiteralAlgorithm1(weights(literals), refresh_every=2, **options)
    calls = 0
    for step in range(6):
        first = True

        def our_closure(step: int = step) -> Tensor:
            nonlocal calls
            calls += 1
            optimizer.zero_grad()
            loss = loss_of(ours, step)
            loss.backward()
            return loss

        def literal_closure(step: int = step) -> Tensor:
            nonlocal first
            reference.zero_grad()
            loss = loss_of(literals, step)
            loss.backward()
            literal.t = step if first else 1  # refreshed once a step, in the first call of a step that is due
            literal.before_step()
            first = False
            return loss

        optimizer.step(our_closure)
        reference.step(literal_closure)
        assert_close(ours, literals, 1e-7)
    assert decay.steps == 6 < calls
    assert any(ranks(decay))


class Twice(torch.optim.Optimizer):
    """Evaluates its closure twice a step, as a line search does, and then stays where it is."""

    def __init__(self, parameters: Iterable[nn.Parameter]) -> None:
        super().__init__(parameters, {"lr": 0.0})

    def step(self, closure: Callable) -> None:
        closure()
        closure()


def test_a_closure_that_runs_twice() -> None:
    model = network()
    optimizer = Twice(model.parameters())
    decay = attached(model, optimizer, lam=0.3, tau=0.3, k_max=2, outliers=5, refresh_every=1)
    grads: list[list[Tensor]] = []
    for step in range(3):
        calls = 0

        def closure(step: int = step) -> None:
            nonlocal calls
            optimizer.zero_grad()
            x, y = batch(step)
            (model(x if calls == 0 else 100 * x) - y).square().mean().backward()
            calls += 1
            grads.append([weight.grad.clone() for weight in weights(model)])

        optimizer.step(closure)
        assert calls == 2 and decay.steps == step + 1
        # The penalty follows the second call too, once; and what that call saw is not of the first of the next step.
        for weight, grad, rank in zip(weights(model), grads[-1], ranks(decay), strict=True):
            expected = 0.3 * penalty_matrix_literal(weight.detach(), rank, 2) if rank else torch.zeros_like(grad)
            torch.testing.assert_close(weight.grad - grad, expected, rtol=1e-7, atol=1e-9)
        assert_pcdr(decay, brute_pcdr(model, [batch(step)[0]], 5, 2))


class Derived(torch.optim.SGD):
    """A user's own optimizer; torch runs the hooks of its step and those of the step inside."""

    def step(self, closure: Callable | None = None) -> Any:
        return super().step(closure)


@pytest.mark.parametrize("with_closure", [False, True])
def test_an_optimizer_that_calls_the_step_of_its_base_class(with_closure: bool) -> None:
    ours, plain = network(), network()
    options = {"lam": 0.1, "criterion": "all", "k_max": 1, "refresh_every": 2}
    optimizer = sgd(plain)
    attached(plain, optimizer, **options)
    train(plain, optimizer, range(4))
    optimizer = Derived(ours.parameters(), lr=0.1)
    decay = attached(ours, optimizer, **options)
    for step in range(4):
        optimizer.zero_grad()
        if with_closure:
            optimizer.step(lambda step=step: backward(ours, step))
        else:
            backward(ours, step)
            optimizer.step()
    assert decay.steps == 4
    assert_close(ours, plain)


@pytest.mark.parametrize("what", ["closure", "second closure", "optimizer", "refresh"])
@pytest.mark.parametrize("attach_again", [False, True])
def test_training_goes_on_after_a_step_that_raised(what: str, attach_again: bool) -> None:
    # As when someone interrupts a notebook, repairs something, and runs the loop again.
    model = network()
    start = [weight.detach().clone() for weight in weights(model)]
    optimizer = Twice(model.parameters()) if what == "second closure" else sgd(model, lr=0.0)
    decay = attached(model, optimizer, lam=0.3, tau=0.3, k_max=2, refresh_every=1, outliers=5)
    calls = 0

    def closure() -> None:
        nonlocal calls
        calls += 1
        optimizer.zero_grad()
        backward(model)
        for parameter in model.parameters():
            parameter.grad.zero_()
        if what == "closure" or (what == "second closure" and calls == 2):
            raise KeyboardInterrupt

    def interrupt(*_args) -> None:
        raise KeyboardInterrupt

    handle = optimizer.register_step_pre_hook(interrupt) if what == "optimizer" else None
    if what == "refresh":
        model[0].weight.data[0, 0] = math.nan
    with pytest.raises((KeyboardInterrupt, ValueError, RuntimeError)):
        optimizer.step(closure)
    if handle is not None:
        handle.remove()
    if attach_again:
        decay.detach()
        decay.attach(optimizer)
    what = "nothing"
    model[0].weight.data = start[0].clone()
    for _ in range(2):
        steps = decay.steps
        optimizer.step(closure)
        assert decay.steps == steps + 1
        for weight, first, rank in zip(weights(model), start, ranks(decay), strict=True):
            assert rank > 0
            torch.testing.assert_close(weight.grad, 0.3 * penalty_matrix_literal(first, rank, 2), rtol=1e-7, atol=1e-9)


@pytest.mark.skipif("Muon" not in OPTIMIZERS, reason="this torch has no Muon")
@pytest.mark.parametrize("muon_first", [True, False])
@pytest.mark.parametrize("criterion", ["activation", "spectral"])
def test_muon_for_some_layers_and_adamw_for_the_rest(criterion: str, muon_first: bool) -> None:
    def pair(model: nn.Module) -> list[torch.optim.Optimizer]:
        matrices = [model[0].weight, model[2].weight]
        rest = [p for p in model.parameters() if all(p is not m for m in matrices)]
        both = [torch.optim.Muon(matrices, lr=5e-3), torch.optim.AdamW(rest, lr=3e-3)]
        return both if muon_first else both[::-1]

    ours, literals = network(), network()
    options: dict[str, Any] = {"lam": 0.01, "power": 2, "tau": 0.6, "k_max": 2, "refresh_every": 7}
    optimizers, references = pair(ours), pair(literals)
    decay = attached(ours, *optimizers, criterion=criterion, outliers=5, **options)
    seen = Seen(linears(literals), 5)
    literal = LiteralAlgorithm1(
        weights(literals), **options, **({"pcdr": seen.pcdr} if criterion == "activation" else {})
    )
    selected = set()
    for step in range(60):
        for model in (ours, literals):
            model.zero_grad()
            backward(model, step)
        literal.before_step()
        seen.clear()
        for optimizer in [*references, *optimizers]:
            optimizer.step()
        selected |= {row["layer"] for row in decay.report() if row["rank"]}
        assert_close(ours, literals, 1e-8)
    assert decay.steps == 60
    assert selected >= {"0", "2"}


class Wrapper:
    """As accelerate's and Lightning's."""

    def __init__(self, optimizer: Any) -> None:
        self.optimizer = optimizer

    def step(self) -> None:
        self.optimizer.step()


class WrappingOptimizer(torch.optim.Optimizer):
    """As accelerate's: an optimizer itself, without parameters of its own that count."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.optimizer = optimizer

    @property
    def param_groups(self) -> list:
        return self.optimizer.param_groups

    def step(self) -> None:
        self.optimizer.step()


@pytest.mark.parametrize("wrap", [Wrapper, WrappingOptimizer, lambda o: Wrapper(WrappingOptimizer(o))])
def test_a_wrapped_optimizer_is_unwrapped(wrap: Callable) -> None:
    ours, plain = network(), network()
    options = {"lam": 0.1, "criterion": "all", "k_max": 1, "coupling": "decoupled"}
    optimizer = sgd(ours)
    wrapped = wrap(optimizer)
    decay = attached(ours, wrapped, **options)
    for step in range(3):
        optimizer.zero_grad()
        backward(ours, step)
        wrapped.step()
    optimizer = sgd(plain)
    attached(plain, optimizer, **options)
    train(plain, optimizer, range(3))
    assert same(ours, snapshot(plain)) and decay.steps == 3


class Hookless(torch.optim.Optimizer):
    """As bitsandbytes' and others that skip the constructor of torch's class: its step runs no hooks."""

    def __init__(self, parameters: Any) -> None:
        self.param_groups = [{"params": list(parameters), "lr": 0.1}]


@pytest.mark.parametrize("optimizer", [None, Wrapper(None), "SGD", Hookless([])])
def test_what_is_no_optimizer_is_refused(optimizer: Any) -> None:
    with pytest.raises(ValueError, match=f"was given {type(optimizer).__name__}, .*give the torch optimizer"):
        SelectiveSpectralDecay(network()).attach(optimizer)


def test_detach_puts_everything_back() -> None:
    ours, plain = network(), network()
    optimizer = sgd(ours)
    decay = attached(ours, optimizer)
    assert len(optimizer._optimizer_step_pre_hooks) == 1 and hooks(ours) == 3
    decay.detach()
    assert len(optimizer._optimizer_step_pre_hooks) == hooks(ours) == 0
    train(ours, optimizer, range(5))
    train(plain, sgd(plain), range(5))
    assert same(plain, snapshot(ours))
    assert decay.steps == 0
    decay.detach()  # once more is no error
    decay.attach(optimizer)
    train(ours, optimizer, range(5))
    assert decay.steps == 5


# --- torch.compile ----------------------------------------------------------------------------------------------------


class Residual(nn.Module):
    """Two blocks and a head, from 6 to 4 channels."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks, self.head = nn.ModuleList([Block(6), Block(6)]), nn.Linear(6, 4)
        self.double()
        for index, parameter in enumerate(self.parameters()):
            parameter.data = 0.5 * gaussian(*parameter.shape, seed=index)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return self.head(x)


class Counting:
    """A backend that runs graphs as they are, counting those that were compiled and those that were run."""

    def __init__(self) -> None:
        self.compiled = self.ran = 0

    def __call__(self, graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable:
        self.compiled += 1

        def run(*args: Tensor) -> Any:
            self.ran += 1
            return graph.forward(*args)

        return run


def compile_whole(model: nn.Module, backend: Any) -> nn.Module:
    return torch.compile(model, backend=backend)


def compile_in_place(model: nn.Module, backend: Any) -> nn.Module:
    model.compile(backend=backend)
    return model


def compile_blocks(model: nn.Module, backend: Any) -> nn.Module:
    for block in model.blocks:
        block.compile(backend=backend)
    return model


@pytest.mark.parametrize(
    ("how", "backend"),
    [(compile_whole, "aot_eager"), (compile_in_place, "eager"), (compile_blocks, "aot_eager")],
)
def test_a_compiled_model_gives_the_same_result(how: Callable, backend: str) -> None:
    torch._dynamo.reset()
    options = {"lam": 0.05, "tau": 0.8, "k_max": 2, "refresh_every": 4, "outliers": 5}
    plain, compiled = Residual(), how(Residual(), backend)
    decays = []
    for model in (plain, compiled):
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
        decays.append(attached(model, optimizer, **options))
        train(model, optimizer, range(10))
    assert list(decays[0].layers) == list(decays[1].layers) == [f"blocks.{i}.fc{j}" for i in (0, 1) for j in (1, 2)]
    assert_pcdr(decays[1], pcdrs(decays[0]), rel=1e-6)
    assert_close(compiled, plain, 1e-8)
    assert 0 < sum(ranks(decays[0])) < 8


@pytest.mark.parametrize("build", [network, Residual])
@pytest.mark.parametrize("criterion", ["activation", "spectral"])
def test_a_compiled_model_is_compiled_at_most_twice(build: Callable[[], nn.Module], criterion: str) -> None:
    torch._dynamo.reset()
    backend = Counting()
    model = torch.compile(build(), backend=backend)
    optimizer = sgd(model, lr=1e-3)
    attached(model, optimizer, tau=0.6, refresh_every=4, k_max=2, criterion=criterion)
    compiled, ran = [], []
    for step in range(17):
        backend.ran = 0
        train(model, optimizer, [step])
        compiled.append(backend.compiled)
        ran.append(backend.ran)
    assert compiled[1] == compiled[-1]  # both variants were there after the first step that is not watched
    assert {count for step, count in enumerate(ran) if step % 4} == {1}  # and that is the whole model in one graph


# --- other kinds of layers --------------------------------------------------------------------------------------------


class Part:
    """Some rows of a parameter, transposed or not, as a matrix of its own for the literal."""

    def __init__(self, parameter: nn.Parameter, rows: slice = slice(None), transposed: bool = False) -> None:
        self.parameter, self.rows, self.transposed = parameter, rows, transposed

    def matrix(self, tensor: Tensor) -> Tensor:
        part = tensor[self.rows].flatten(1)
        return part.T if self.transposed else part


class LiteralOnParts:
    """The literal Algorithm 1 on parts of parameters, by views that share their memory."""

    def __init__(self, parts: list[Part], **options) -> None:
        self.parts = parts
        self.literal = LiteralAlgorithm1([part.matrix(part.parameter.detach()) for part in parts], **options)

    def before_step(self) -> None:
        for part, weight in zip(self.parts, self.literal.weights, strict=True):
            weight.grad = part.matrix(part.parameter.grad)
        self.literal.before_step()


class Attending(nn.Module):
    """Cross-attention with a query, a key and a value that differ."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(6, 2)
        self.double()
        for index, parameter in enumerate(self.parameters()):
            parameter.data = 0.5 * gaussian(*parameter.shape, seed=index)
        self.attention.in_proj_weight.data[6:12] += 2 * torch.outer(gaussian(6, seed=7), gaussian(6, seed=8)) / 6

    def forward(self, step: int) -> Tensor:
        query, key, value = (gaussian(n, 2, 6, seed=3 * step + i) for i, n in enumerate((3, 5, 5)))
        return self.attention(query, key, value * torch.arange(6.0, dtype=F64))[0]


@pytest.mark.parametrize("criterion", ["activation", "spectral"])
def test_packed_attention_against_the_literal_on_plain_matrices(criterion: str) -> None:
    ours, literals = Attending(), Attending()
    optimizer, reference = (torch.optim.AdamW(model.parameters(), lr=3e-3) for model in (ours, literals))
    tau = {"activation": 0.75, "spectral": 0.75}[criterion]
    options: dict[str, Any] = {"lam": 0.01, "power": 2, "tau": tau, "k_max": 2, "refresh_every": 5}
    decay = attached(ours, optimizer, criterion=criterion, outliers=5, **options)
    seen = Seen([literals.attention] * 3, 5, argument=[0, 1, 2])
    if criterion == "activation":
        options["pcdr"] = seen.pcdr
    packed = literals.attention.in_proj_weight
    literal = LiteralOnParts([Part(packed, slice(6 * i, 6 * i + 6)) for i in range(3)], **options)
    selected = set()
    for step in range(40):
        for model in (ours, literals):
            model.zero_grad()
            model(step).square().mean().backward()
        literal.before_step()
        seen.clear()
        reference.step()
        optimizer.step()
        assert_close(ours, literals, 1e-8)
        selected |= {(row["layer"], row["rank"] > 0) for row in decay.report()}
    assert list(decay.layers) == ["attention.q", "attention.k", "attention.v"]
    assert {chosen for _, chosen in selected} == {True, False}


@COUPLINGS
@COEFFICIENTS
@pytest.mark.parametrize("part", ["q", "k", "v"])
def test_only_the_selected_part_of_a_packed_weight_changes(part: str, coupling: str, coefficients: str) -> None:
    model = Attending()
    start = model.attention.in_proj_weight.detach().clone()
    optimizer = sgd(model, lr=0.1)
    options = {"coupling": coupling, "coefficients": coefficients, "include": f"*.{part}"}
    attached(model, optimizer, lam=0.2, criterion="all", k_max=2, **options)
    zero_gradients(model)
    optimizer.step()
    for name, new, old in zip("qkv", model.attention.in_proj_weight.detach().split(6), start.split(6), strict=True):
        if name == part:
            torch.testing.assert_close(new, old - 0.1 * 0.2 * penalty_matrix_literal(old, 2, 2), rtol=1e-9, atol=1e-12)
        else:
            assert torch.equal(new, old)


@pytest.fixture(scope="module")
def gpt2() -> Callable[[], nn.Module]:
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(
        n_layer=2, n_embd=8, n_head=2, n_positions=8, vocab_size=13, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0
    )

    def build() -> nn.Module:
        torch.manual_seed(0)
        model = transformers.GPT2LMHeadModel(config).double()
        for block in model.transformer.h:
            block.mlp.c_fc.weight.data *= 20
        return model

    return build


@COUPLINGS
def test_gpt2_against_the_literal_on_transposed_matrices(gpt2: Callable[[], nn.Module], coupling: str) -> None:
    ours, literals = gpt2(), gpt2()
    optimizer, reference = (torch.optim.AdamW(model.parameters(), lr=3e-3) for model in (ours, literals))
    options: dict[str, Any] = {"lam": 0.01, "power": 2, "tau": 0.7, "k_max": 2, "refresh_every": 5}
    decay = attached(ours, optimizer, outliers=5, coupling=coupling, **options)
    names = [f"transformer.h.{i}.{p}" for i in (0, 1) for p in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")]
    assert list(decay.layers) == names
    modules = [literals.get_submodule(name) for name in names]
    seen = Seen(modules, 5)
    if coupling == "gradient":
        literal = LiteralOnParts([Part(m.weight, transposed=True) for m in modules], **options, pcdr=seen.pcdr)
    else:
        views = [module.weight.detach().T for module in modules]
        literal = LiteralVariant(views, live=False, optimizer=reference, **options, pcdr=seen.pcdr)
    selected = set()
    for step in range(12):
        tokens = torch.randint(13, (3, 8), generator=torch.Generator().manual_seed(step))
        for model in (ours, literals):
            model.zero_grad()
            model(tokens, labels=tokens).loss.backward()
        literal.before_step()
        seen.clear()
        reference.step()
        optimizer.step()
        assert_close(ours, literals, 1e-8)
        selected |= {row["rank"] > 0 for row in decay.report()}
    assert selected == {True, False}


@COUPLINGS
@COEFFICIENTS
@pytest.mark.parametrize("criterion", ["spectral", "all"])
def test_convolutions_against_the_literal_on_patch_matrices(criterion: str, coupling: str, coefficients: str) -> None:
    def build() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.Conv2d(3, 6, 3), nn.Tanh(), nn.Conv2d(6, 4, 2, groups=2), nn.Flatten()).double()

    ours, literals = build(), build()
    optimizer, reference = sgd(ours), sgd(literals)
    tau = 1e-9 if criterion == "all" else 0.5
    options = {"lam": 0.1, "power": 2, "tau": tau, "k_max": 1, "refresh_every": 3}
    how = {"coupling": coupling, "coefficients": coefficients, "criterion": criterion}
    decay = attached(ours, optimizer, include="*", **options, **how)
    assert list(decay.layers) == ["0", "2.group0", "2.group1"]
    parts = [Part(literals[0].weight), Part(literals[2].weight, slice(0, 2)), Part(literals[2].weight, slice(2, 4))]
    views = [part.matrix(part.parameter.detach()) for part in parts]
    decoupled = reference if coupling == "decoupled" else None
    literal = LiteralVariant(views, live=coefficients == "live", optimizer=decoupled, **options)
    for step in range(8):
        for model in (ours, literals):
            model.zero_grad()
            model(gaussian(2, 3, 6, 6, seed=step)).square().mean().backward()
        for part, view in zip(parts, views, strict=True):
            view.grad = part.matrix(part.parameter.grad)
        literal.before_step()
        reference.step()
        optimizer.step()
        assert_close(ours, literals, 1e-9)
    assert ranks(decay) == [1, 1, 1] if criterion == "all" else 0 < sum(ranks(decay)) < 3


def test_convolutions_are_refused_by_the_activation_criterion() -> None:
    with pytest.raises(ValueError, match="layer 0 is a convolution.*'spectral' or 'all'.*exclude='0'"):
        SelectiveSpectralDecay(nn.Sequential(nn.Conv2d(3, 6, 3), nn.Linear(6, 6)), include="*")


def test_low_rank_adapters_are_refused() -> None:
    # tests/test_layers.py has those of PEFT itself.
    class Adapted(nn.Linear):
        def __init__(self) -> None:
            super().__init__(4, 4)
            self.lora_A, self.lora_B = nn.Linear(4, 2), nn.Linear(2, 4)

    with pytest.raises(ValueError, match="adapter.*merge_and_unload"):
        SelectiveSpectralDecay(nn.Sequential(Adapted(), nn.Linear(4, 4)), k_max=1)


# --- resuming ---------------------------------------------------------------------------------------------------------


def resumable(seed: int, kind: str = "AdamW", **options) -> tuple[nn.Module, Any, SelectiveSpectralDecay]:
    model = network(seed=seed, bias=kind != "Muon")
    optimizer = OPTIMIZERS[kind](model)
    return model, optimizer, attached(model, optimizer, **({"lam": 0.1, "tau": 0.5, "refresh_every": 5} | options))


def through_safetensors(state: dict) -> dict:
    safetensors = pytest.importorskip("safetensors.torch")
    return safetensors.load(safetensors.save(state))


@CRITERIA
@COEFFICIENTS
@COUPLINGS
@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_a_resumed_run_continues_bit_for_bit(kind: str, coupling: str, coefficients: str, criterion: str) -> None:
    how = {"coupling": coupling, "coefficients": coefficients, "criterion": criterion, "refresh_every": 4}
    stored = {}
    whole = resumable(0, kind, **how)
    for step in range(11):
        stored[step] = [copy.deepcopy(part.state_dict()) for part in whole[:2]]
        stored[step].append(through_safetensors(whole[2].state_dict()))
        train(*whole[:2], [step])
    assert any(ranks(whole[2]))
    for stop in range(5, 10):  # every point of an interval, right before and right after a refresh among them
        resumed = resumable(1, kind, **how)
        for part, state in zip(resumed, stored[stop], strict=True):
            part.load_state_dict(state)
        assert resumed[2].steps == stop
        train(*resumed[:2], range(stop, 11))  # not to a refresh, so that all of the state is still in use
        assert same(resumed[0], snapshot(whole[0]))
        assert same_state(resumed[2], whole[2].state_dict())


def test_above_the_full_svd_threshold_a_resumed_run_continues_bit_for_bit() -> None:
    def run(state: list | None, steps: range) -> tuple[nn.Module, torch.optim.Optimizer, SelectiveSpectralDecay]:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(6, 200), nn.Tanh(), nn.Linear(200, 150), nn.Tanh(), nn.Linear(150, 4)).double()
        optimizer = sgd(model)
        parts = model, optimizer, attached(model, optimizer, lam=1e-3, criterion="all", refresh_every=2)
        for part, saved in zip(parts, state or [], strict=False):
            part.load_state_dict(saved)
        train(model, optimizer, steps)
        assert parts[2].report()[1]["error"] > 0
        return parts

    half = copy.deepcopy([part.state_dict() for part in run(None, range(3))])
    assert same(run(half, range(3, 6))[0], snapshot(run(None, range(6))[0]))


def test_a_resumed_run_reports_what_the_run_would_have() -> None:
    torch.manual_seed(0)
    layer = nn.Linear(150, 200)
    decay, other = (SelectiveSpectralDecay(layer, criterion="all", k_max=2) for _ in range(2))
    decay.refresh()
    other.load_state_dict(decay.state_dict())
    (row,), (again,) = decay.report(), other.report()
    assert row["error"] > 0
    timeless = {key: value for key, value in row.items() if key != "refresh_seconds"}
    assert {key: value for key, value in again.items() if key != "refresh_seconds"} == timeless


def test_a_state_before_the_first_step() -> None:
    fresh = resumable(0)[2]
    state = fresh.state_dict()
    assert set(state) == {"steps", "0.rank", "2.rank", "4.rank"} and not any(map(bool, state.values()))
    used = resumable(1)
    train(*used[:2], range(3))
    used[2].load_state_dict(state)
    assert same_state(used[2], state) and used[2].report() == [] and used[2].steps == 0


def test_a_state_with_a_layer_that_was_frozen_so_far() -> None:
    def run(steps: range, state: dict | None = None) -> tuple[nn.Module, SelectiveSpectralDecay]:
        model = network()
        model[2].requires_grad_(False)
        optimizer = sgd(model, lr=0.0)
        decay = attached(model, optimizer, lam=0.1, criterion="all", k_max=1, refresh_every=2)
        if state:
            decay.load_state_dict(state)
        train(model, optimizer, steps)
        return model, decay

    state = run(range(3))[1].state_dict()
    assert "2.rank" in state and "2.u" not in state and "0.u" in state
    model, decay = run(range(3, 5), state)
    assert [row["layer"] for row in decay.report()] == ["0", "4"]
    assert same_state(decay, run(range(5))[1].state_dict())


def test_loading_a_state_forgets_what_was_seen_before() -> None:
    # A run that went astray is set back in the same process: the forward passes of the lost steps do not count.
    model = network()
    optimizer = sgd(model, lr=0.0)
    decay = attached(model, optimizer, outliers=5, k_max=2)
    state = decay.state_dict()
    model(1000 * gaussian(8, 6, seed=1)).sum().backward()
    decay.load_state_dict(state)
    x = gaussian(8, 6)
    model(x).sum().backward()
    optimizer.step()
    assert_pcdr(decay, brute_pcdr(model, [x], 5, 2))


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
    for tensor in state.values():
        tensor.zero_()
    assert same_state(other, frozen)
    assert all(isinstance(value, Tensor) and value.is_contiguous() for value in state.values())


def test_the_state_of_a_model_that_is_one_layer() -> None:
    layer = nn.Linear(4, 4)
    decay, other = (SelectiveSpectralDecay(layer, criterion="all", k_max=1) for _ in range(2))
    decay.refresh()
    other.load_state_dict(decay.state_dict())
    assert same_state(other, decay.state_dict()) and ranks(other) == [1]


class Named(nn.Module):
    def __init__(self, **layers: nn.Module) -> None:
        super().__init__()
        for name, layer in layers.items():
            self.add_module(name, layer)


def chain(*widths: int) -> nn.Sequential:
    """Linear layers named 0, 2, 4, ... of these widths."""
    layers: list[nn.Module] = []
    for before, after in zip(widths, widths[1:], strict=False):
        layers += [nn.Linear(before, after), nn.Tanh()]
    return nn.Sequential(*layers)


def state_of(model: nn.Module, **options) -> dict[str, Tensor]:
    decay = SelectiveSpectralDecay(model, criterion="all", **{"k_max": 2, **options})
    decay.refresh()
    return decay.state_dict() | {"steps": torch.tensor(41)}


def without(state: dict[str, Tensor], *keys: str) -> dict[str, Tensor]:
    return {key: value for key, value in state.items() if key not in keys}


STATE = state_of(network())
FOREIGN = {
    "other names": (state_of(Named(x=nn.Linear(6, 10), y=nn.Linear(10, 8))), "another model"),
    "a layer less": (state_of(network(), include=["0", "2"]), "4"),
    "a layer more": (state_of(chain(6, 10, 8, 4, 2)), "6"),
    "other shapes": (state_of(chain(6, 10, 8, 5)), r"layer 4 is \(4, 8\)"),
    "transposed": (state_of(nn.Sequential(nn.Linear(10, 6), *chain(6, 10, 8, 4)[1:])), r"layer 0 is \(10, 6\)"),
    "another k_max": (state_of(network(), k_max=1), "k_max=2 here"),
    "no steps": (without(STATE, "steps"), "steps"),
    "nothing": ({}, "another model"),
    **{
        f"no {field}": (without(STATE, f"4.{field}"), "layer 4")
        for field in ("u", "s", "v", "pcdr", "info", "spent", "rank")
    },
    "triplets without rank": (without(STATE, "0.rank", "4.rank"), "layer [04]"),
    **{
        f"rank {rank}": (
            STATE | {"2.rank": torch.tensor(rank)},
            rf"layer 2 has rank {re.escape(str(rank))} .*only 0 to 2 are possible: load the state_dict\(\)",
        )
        for rank in (99, 3, -1, 1.5, [1, 1])
    },
    "a rank without triplets": (
        without(STATE, *(f"0.{field}" for field in ("u", "s", "v", "pcdr", "info", "spent"))),
        "layer 0 has rank 2 .*only 0 to 0",
    ),
}


@pytest.mark.parametrize("name", FOREIGN)
def test_a_foreign_state_is_refused_and_nothing_changes(name: str) -> None:
    state, message = FOREIGN[name]
    decay = SelectiveSpectralDecay(network(), criterion="all", k_max=2)
    decay.refresh()
    before = decay.state_dict()
    with pytest.raises(ValueError, match=message):
        decay.load_state_dict(state)
    assert same_state(decay, before)


def test_the_state_that_the_foreign_ones_differ_from_is_accepted() -> None:
    decay = SelectiveSpectralDecay(network(), criterion="all", k_max=2)
    decay.load_state_dict(STATE)
    assert same_state(decay, STATE) and decay.steps == 41


# --- errors -----------------------------------------------------------------------------------------------------------

BAD_OPTIONS = [
    ({"lam": -1e-3}, "lam is -0.001"),
    ({"lam": math.nan}, "lam is nan"),
    ({"lam": math.inf}, "lam is inf"),
    ({"lam": "0.1"}, "lam is '0.1'"),
    ({"lam": True}, "lam is True"),
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
    ({"refresh_every": None}, "refresh_every is None"),
    ({"criterion": "energy"}, "criterion is 'energy': choose one of activation, spectral, all"),
    ({"coefficients": "frozen"}, "coefficients is 'frozen': choose one of cached, live"),
    ({"coupling": "adam"}, "coupling is 'adam': choose one of gradient, decoupled"),
    ({"include": "*.fc1"}, r"'\*\.fc1' matches no linear layer"),
    ({"exclude": "*"}, "leave none"),
    ({"outliers": 0}, "outliers is 0"),
    ({"process_group": "all"}, "process_group is 'all': give a group, 'world' or None"),
]


@pytest.mark.parametrize(("options", "message"), BAD_OPTIONS)
def test_a_bad_option_is_one_error_that_names_the_value(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SelectiveSpectralDecay(network(), **options)


@pytest.mark.parametrize(
    "options", [{"lam": 0}, {"tau": 1}, {"tau": 1.0}, {"k_max": None}, {"k_max": 4}, {"power": 0.5}]
)
def test_the_ends_of_the_ranges_are_allowed(options: dict) -> None:
    decay = SelectiveSpectralDecay(network(), **options)
    assert list(decay.layers) == ["0", "2", "4"]


def test_the_group_of_a_process_on_its_own() -> None:
    models = [network() for _ in range(2)]
    for model, group in zip(models, ("world", None), strict=True):
        optimizer = sgd(model)
        attached(model, optimizer, lam=0.1, tau=0.5, refresh_every=2, process_group=group)
        train(model, optimizer, range(4))
    assert same(models[0], snapshot(models[1]))


def test_a_layer_too_small_for_k_max_can_be_left_out() -> None:
    layers = SelectiveSpectralDecay(network(), k_max=5, exclude="4").layers
    assert {name: linear.shape for name, linear in layers.items()} == {"0": (10, 6), "2": (8, 10)}


def test_a_model_without_linear_layers_is_refused() -> None:
    with pytest.raises(ValueError, match="Tanh has no linear layer"):
        SelectiveSpectralDecay(nn.Tanh())


def test_an_optimizer_of_other_parameters_is_refused_and_nothing_is_hooked() -> None:
    model = network()
    decay = SelectiveSpectralDecay(model)
    foreign = sgd(network())
    with pytest.raises(ValueError, match="does not own the weights of 3 of 3 watched layers"):
        decay.attach(foreign)
    first, last = (torch.optim.SGD(model[i].parameters(), lr=0.1) for i in (0, 4))
    with pytest.raises(ValueError, match=r"2 of 3 watched layers \(2, 4\)"):
        decay.attach(first)
    with pytest.raises(ValueError, match=r"1 of 3 watched layers \(2\)"):
        decay.attach(first, last)
    with pytest.raises(ValueError, match="3 of 3"):
        decay.attach()
    assert all(len(optimizer._optimizer_step_pre_hooks) == 0 for optimizer in (foreign, first, last))
    assert hooks(model) == 0
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
    for parameter in model.parameters():  # with zeros it would be a step that only makes the optimizer's state
        parameter.grad = torch.ones_like(parameter)
    before = snapshot(model)
    with pytest.raises(RuntimeError, match=r"criterion='activation' needs the forward pass.*criterion='spectral'"):
        optimizer.step()
    assert same(model, before)
    assert decay.steps == 0
    train(model, optimizer, range(2))  # the next proper step works
    assert decay.steps == 2


@CRITERIA
@pytest.mark.parametrize("when", ["before the forward pass", "after it"])
def test_a_weight_that_is_not_finite_is_named(criterion: str, when: str) -> None:
    model = network()
    optimizer = sgd(model)
    attached(model, optimizer, criterion=criterion)
    if when == "before the forward pass":
        model[0].weight.data.fill_(math.nan)
        backward(model)
    else:
        backward(model)
        model[0].weight.data.fill_(math.nan)
    with pytest.raises(ValueError, match="layers? 0: weight holds 60 NaN or infinite"):
        optimizer.step()


# --- a model of another library ---------------------------------------------------------------------------------------


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


def clip_layers(*parts: str) -> list[str]:
    towers = ["visual.transformer", "transformer"]
    return [f"{tower}.resblocks.{n}.{part}" for tower in towers for n in (0, 1) for part in parts]


CLIP_FFN = clip_layers("mlp.c_fc", "mlp.c_proj")


@pytest.mark.parametrize("criterion", ["activation", "all"])
def test_open_clip_trains(clip: Callable[[], nn.Module], criterion: str) -> None:
    model, plain = clip(), clip()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    decay = attached(model, optimizer, criterion=criterion, tau=0.1, refresh_every=2, include="*.mlp.*")
    losses = [contrastive_step(model, optimizer) for _ in range(6)]
    assert losses[-1] < losses[0]
    assert decay.steps == 6
    assert [row["layer"] for row in decay.report()] == CLIP_FFN
    assert any(ranks(decay))
    optimizer = torch.optim.AdamW(plain.parameters(), lr=1e-3)
    for _ in range(6):
        contrastive_step(plain, optimizer)
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, plain.get_parameter(name))}
    assert {f"{row['layer']}.weight" for row in decay.report() if row["rank"]} <= moved


def test_every_layer_of_open_clip_is_watched_and_seen(clip: Callable[[], nn.Module]) -> None:
    # The output projection of nn.MultiheadAttention is read without being called, so it is not among them.
    model = clip()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    decay = attached(model, optimizer)
    assert set(decay.layers) == set(clip_layers("attn.q", "attn.k", "attn.v", "mlp.c_fc", "mlp.c_proj"))
    contrastive_step(model, optimizer)
    # A layer in use is never reported as free of outliers: PCDR 0 would be a false statement.
    assert [row["layer"] for row in decay.report()] == list(decay.layers)
    assert all(min(values) > 0 for values in pcdrs(decay))
