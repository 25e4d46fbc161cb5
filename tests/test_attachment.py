"""Nothing is left alone in silence: the cases of trainers, models and optimizers that no one here wrote.

The oracle of every training is a plain loop with torch's own SGD; the loss is ``0 * output``, so only decay moves a
weight. What is not penalised has to be one warning that names layer, cause and repair, and the same in ``health()``.
"""

from __future__ import annotations

import copy
import pickle
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.utils.prune
from torch import Tensor, nn
from torch.optim import SGD, AdamW

from s2d import SelectiveSpectralDecay, SpectralNormCap, check_bound, linear_maps
from s2d.layers import bare_matrices
from s2d.rounding import round_stochastically, seeded
from s2d.stepping import find_masters, unwrap_optimizer

COUPLINGS = pytest.mark.parametrize("coupling", ["gradient", "decoupled"])
LOW = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
START, LAM, LR = 3.0, 0.02, 0.1


def network(dtype: torch.dtype = torch.float32, width: int = 16) -> nn.Sequential:
    """Three layers with a largest singular value of 3 each."""
    generator = torch.Generator().manual_seed(0)
    net = nn.Sequential(nn.Linear(8, width), nn.GELU(), nn.Linear(width, width), nn.GELU(), nn.Linear(width, 4))
    for layer in net[::2]:
        layer.weight.data = torch.randn(layer.weight.shape, generator=generator)
        layer.weight.data *= START / torch.linalg.matrix_norm(layer.weight.data, 2)
        layer.bias.data.zero_()
    return net.to(dtype)


def norms(net: nn.Module) -> list[float]:
    return [float(torch.linalg.matrix_norm(layer.weight.detach().double(), 2)) for layer in list(net)[::2]]


def gradients(net: nn.Module) -> None:
    """The gradient of ``0 * output``, by a real backward pass."""
    weight = next(net.parameters())
    (0 * net(torch.ones(2, 8, dtype=weight.dtype))).sum().backward()


def train(net: nn.Module, optimizer: Any, steps: int = 10, step: Callable[[], Any] | None = None) -> None:
    for _ in range(steps):
        optimizer.zero_grad()
        gradients(net)
        (step or optimizer.step)()


def decayed(net: nn.Module, *optimizers: Any, **options: Any) -> SelectiveSpectralDecay:
    decay = SelectiveSpectralDecay(net, **{"lam": LAM, "criterion": "all"} | options)
    decay.attach(*optimizers)
    return decay


def plain(coupling: str = "gradient", steps: int = 10) -> list[float]:
    net = network()
    optimizer = SGD(net.parameters(), lr=LR)
    decayed(net, optimizer, coupling=coupling)
    train(net, optimizer, steps)
    return norms(net)


def said(caught: list[warnings.WarningMessage]) -> list[str]:
    return [str(w.message) for w in caught if "does not act" in str(w.message) or "a second" in str(w.message)]


@pytest.fixture
def heard() -> Iterator[list[warnings.WarningMessage]]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield caught


def assert_named(decay: Any, heard: list, layers: list[str], cause: str, repair: str) -> None:
    """One warning, and the same cause in the table, for exactly these layers."""
    (message,) = said(heard)
    assert cause in message and repair in message
    for row in decay.health():
        if row["layer"] in layers:
            assert row["layer"] in message
            assert not row["acts"] and cause in row["cause"] and repair in row["repair"]
        else:
            assert cause not in row["cause"]
    watched = len(decay.layers)
    assert f"{sum(row['acts'] for row in decay.health())} of {watched} layers act" in decay.summary()


def test_an_ordinary_training_acts_and_says_nothing(heard: list) -> None:
    net = network()
    optimizer = AdamW(net.parameters(), lr=1e-3)
    decay = decayed(net, optimizer, refresh_every=4)
    assert {row["cause"] for row in decay.health()} == {"no gradient has reached it yet"}
    train(net, optimizer, 10)
    assert said(heard) == []
    assert [(r["layer"], r["acts"], r["steps"], r["gradients"], r["cause"]) for r in decay.health()] == [
        (name, True, 10, 10, "") for name in ("0", "2", "4")
    ]
    assert "3 of 3 layers act" in decay.summary()
    decay.detach()
    assert {row["cause"] for row in decay.health()} == {"not attached"} and "0 of 3 layers act" in decay.summary()


# --- optimizers inside optimizers -------------------------------------------------------------------------------------


class SAM(torch.optim.Optimizer):
    """The two-step wrapper as it is written everywhere: a base optimizer under any name."""

    def __init__(self, parameters: Any, *, name: str | None) -> None:
        super().__init__(parameters, {"lr": LR})
        base = SGD(self.param_groups, lr=LR)
        self.param_groups = base.param_groups
        if name is not None:
            setattr(self, name, base)
        self.update = lambda: base.step()

    @torch.no_grad()
    def first_step(self) -> None:
        for group in self.param_groups:
            for weight in group["params"]:
                self.state[weight]["old"] = weight.data.clone()
                weight.add_(weight.grad)
        self.zero_grad()

    @torch.no_grad()
    def second_step(self) -> None:
        for group in self.param_groups:
            for weight in group["params"]:
                weight.data = self.state[weight]["old"]
        self.update()
        self.zero_grad()

    def step(self, closure: Any = None) -> None:
        raise NotImplementedError


def train_sam(net: nn.Module, optimizer: SAM, steps: int = 10) -> None:
    for _ in range(steps):
        gradients(net)
        optimizer.first_step()
        gradients(net)
        optimizer.second_step()


@COUPLINGS
@pytest.mark.parametrize("name", ["base_optimizer", "inner", "_opt"])
def test_a_two_step_wrapper_acts_as_its_base(name: str, coupling: str, heard: list) -> None:
    net = network()
    optimizer = SAM(net.parameters(), name=name)
    decay = decayed(net, optimizer, coupling=coupling)
    train_sam(net, optimizer)
    assert norms(net) == pytest.approx(plain(coupling), rel=1e-6)
    assert decay.steps == 10 and said(heard) == []


@pytest.mark.parametrize("kind", [SelectiveSpectralDecay, SpectralNormCap])
def test_a_step_that_goes_through_another_object_is_named(kind: type, heard: list) -> None:
    net = network()
    optimizer = SAM(net.parameters(), name=None)
    owner = kind(net, criterion="all") if kind is SelectiveSpectralDecay else kind(net, cap=2.0, every=1)
    owner.attach(optimizer)
    train_sam(net, optimizer)
    assert norms(net) == pytest.approx([START] * 3)
    assert_named(owner, heard, ["0", "2", "4"], "the step() of the attached SAM does not run", "attach to the torch")
    assert "0 of 3 layers act" in owner.summary()


class ByData(torch.optim.Optimizer):
    """Steps by a method of its own, and changes weights without leaving a trace in their version."""

    def __init__(self, parameters: Any) -> None:
        super().__init__(parameters, {"lr": LR})

    def advance(self) -> None:
        for weight in self.param_groups[0]["params"]:
            weight.data.add_(weight.grad, alpha=-LR)

    def step(self, closure: Any = None) -> None:
        raise NotImplementedError


def test_a_step_of_another_name_is_named_though_no_weight_has_moved(heard: list) -> None:
    net = network()
    optimizer = ByData(net.parameters())
    decay = decayed(net, optimizer)
    train(net, optimizer, step=optimizer.advance)
    assert_named(decay, heard, ["0", "2", "4"], "the step() of the attached ByData does not run", "attach to the torch")


def test_gradient_accumulation_and_a_few_skipped_steps_are_no_such_case(heard: list) -> None:
    net = network()
    optimizer = SGD(net.parameters(), lr=LR)
    decay = decayed(net, optimizer)
    for _ in range(40):
        gradients(net)  # micro-batches
    for _ in range(4):
        optimizer.zero_grad()
        gradients(net)  # steps that a GradScaler skips
    train(net, optimizer, 2)
    assert said(heard) == [] and decay.steps == 2


class Fused(SGD):
    """Takes gradients away as they arrive, as optimizers do that are fused into the backward pass."""

    def __init__(self, parameters: Any) -> None:
        super().__init__(parameters, lr=LR)
        for weight in self.param_groups[0]["params"]:
            weight.register_post_accumulate_grad_hook(self.take)

    def take(self, weight: Tensor) -> None:
        weight.grad = None


def test_gradients_that_are_gone_when_the_step_begins_are_named(heard: list) -> None:
    net = network()
    optimizer = Fused(net.parameters())
    decay = decayed(net, optimizer)
    train(net, optimizer)
    assert_named(decay, heard, ["0", "2", "4"], "is gone when the step begins", "reads .grad in step()")


def test_wrappers_are_opened_and_strangers_are_not() -> None:
    net = network()
    inner, other = SGD(net.parameters(), lr=LR), SGD(network().parameters(), lr=LR)

    class Engine:
        def __init__(self, *optimizers: Any) -> None:
            self.parts = list(optimizers)

    outer = SGD(net.parameters(), lr=LR)
    outer.engine = Engine(other, inner)
    assert unwrap_optimizer(outer) is inner  # it steps all that the outer one does; the other does not
    outer.engine = Engine(other)
    assert unwrap_optimizer(outer) is outer
    with pytest.raises(ValueError, match="was given dict, which does not run step hooks"):
        unwrap_optimizer({})


# --- modules that are exchanged ---------------------------------------------------------------------------------------


def prune(layer: nn.Module) -> None:
    torch.nn.utils.prune.l1_unstructured(layer, "weight", 0.3)


EXCHANGES = {
    "prune": (prune, "was parametrized or pruned", "make it permanent"),
    "weight_norm": (nn.utils.parametrizations.weight_norm, "was parametrized or pruned", "make it permanent"),
    "replaced": (
        lambda layer: setattr(layer, "weight", nn.Parameter(layer.weight.detach().clone())),
        "its parameter was replaced",
        "build the optimizer from model.parameters() anew",
    ),
}


@COUPLINGS
@pytest.mark.parametrize("name", EXCHANGES)
@pytest.mark.parametrize("owner", ["decay", "cap"])
def test_a_weight_that_is_exchanged_after_attach_is_named_once(
    name: str, owner: str, coupling: str, heard: list
) -> None:
    exchange, cause, repair = EXCHANGES[name]
    net = network()
    optimizer = SGD(net.parameters(), lr=LR)
    if owner == "decay":
        watching = decayed(net, optimizer, coupling=coupling, refresh_every=4)
    else:
        watching = SpectralNormCap(net, cap=2.0, every=2)
        watching.attach(optimizer)
    train(net, optimizer, 2)
    exchange(net[2])
    train(net, optimizer, 10)
    assert_named(watching, heard, ["2"], cause, repair)
    assert norms(net)[0] < START and "2 of 3 layers act" in watching.summary()


def test_a_weight_that_is_exchanged_with_its_optimizers_entry_goes_on(heard: list) -> None:
    net = network()
    optimizer = SGD(net.parameters(), lr=LR)
    decay = decayed(net, optimizer)
    train(net, optimizer, 2)
    new = nn.Parameter(net[2].weight.detach().clone())
    optimizer.param_groups[0]["params"] = [new if p is net[2].weight else p for p in net.parameters()]
    net[2].weight = new
    train(net, optimizer, 8)
    assert norms(net) == pytest.approx(plain(), rel=1e-6) and said(heard) == []
    assert all(row["acts"] for row in decay.health())


def test_a_model_that_changes_its_precision_in_place_goes_on(heard: list) -> None:
    net = network()
    optimizer = SGD(net.parameters(), lr=LR)
    decayed(net, optimizer)
    train(net, optimizer, 2)
    net.double()
    train(net, optimizer, 8)
    assert norms(net) == pytest.approx(plain(), rel=1e-6) and said(heard) == []


@pytest.mark.parametrize("when", ["before attach", "after attach"])
def test_adapters_that_are_injected_later(when: str, heard: list) -> None:
    peft = pytest.importorskip("peft")
    net = network()
    decay = SelectiveSpectralDecay(net, criterion="all")
    if when == "after attach":
        optimizer = SGD(net.parameters(), lr=LR)
        decay.attach(optimizer)
    adapted = peft.get_peft_model(net, peft.LoraConfig(target_modules=["0", "2"]))
    if when == "before attach":
        trained = [p for p in adapted.parameters() if p.requires_grad]
        with pytest.raises(ValueError, match="layer 0 was wrapped in or replaced by a Linear .*merge_and_unload"):
            decay.attach(SGD(trained, lr=LR))
    else:
        for _ in range(3):
            (0 * adapted(torch.ones(2, 8))).sum().backward()
            optimizer.step()
        assert_named(decay, heard, ["0", "2"], "was wrapped in or replaced by a Linear", "merge_and_unload")
        assert "0 of 3 layers act" in decay.summary()


def test_a_checkpoint_wrapper_is_no_exchange(heard: list) -> None:
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

    net = network()
    optimizer = SGD(net.parameters(), lr=LR)
    decay = decayed(net, optimizer)
    net[2] = checkpoint_wrapper(net[2])
    train(net, optimizer, 10)
    assert said(heard) == [] and all(row["acts"] for row in decay.health())


# --- half precision and master copies ---------------------------------------------------------------------------------


class Masters(torch.optim.Optimizer):
    """Keeps wider copies, steps those, and writes them back; where it keeps them differs."""

    def __init__(self, parameters: Any, *, where: str, dtype: torch.dtype = torch.float32) -> None:
        super().__init__(parameters, {"lr": LR})
        weights = self.param_groups[0]["params"]
        self.pairs = [(w, w.detach().to(dtype).clone()) for w in weights] if where == "attribute" else None
        self.dtype = dtype

    def step(self, closure: Any = None) -> None:
        for position, weight in enumerate(self.param_groups[0]["params"]):
            if self.pairs is not None:
                master = self.pairs[position][1]
            else:
                master = self.state[weight].setdefault("master", weight.detach().to(self.dtype).clone())
            if weight.grad is not None:
                master.add_(weight.grad.to(self.dtype), alpha=-LR)
                weight.data.copy_(master)


@LOW
@COUPLINGS
@pytest.mark.parametrize("where", ["attribute", "state"])
def test_decay_acts_on_master_copies(where: str, coupling: str, dtype: torch.dtype, heard: list) -> None:
    net = network(dtype)
    optimizer = Masters(net.parameters(), where=where)
    decay = decayed(net, optimizer, coupling=coupling)
    train(net, optimizer)
    assert norms(net) == pytest.approx(plain(coupling), abs=0.02)
    assert said(heard) == [] and all(row["acts"] for row in decay.health())


@LOW
@pytest.mark.parametrize("where", ["attribute", "state"])
def test_the_cap_acts_on_master_copies(where: str, dtype: torch.dtype, heard: list) -> None:
    net = network(dtype)
    optimizer = Masters(net.parameters(), where=where)
    cap = SpectralNormCap(net, cap=2.0, every=4)
    cap.attach(optimizer)
    train(net, optimizer, 7)
    assert norms(net) == pytest.approx([2.0] * 3, abs=0.02)  # three steps after the projection
    assert said(heard) == [] and all(row["acts"] for row in cap.health())


@pytest.mark.parametrize("kind", [SelectiveSpectralDecay, SpectralNormCap])
def test_an_optimizer_over_master_copies_is_refused(kind: type) -> None:
    net = network(torch.bfloat16)
    masters = [p.detach().float().clone().requires_grad_() for p in net.parameters()]
    owner = kind(net) if kind is SelectiveSpectralDecay else kind(net, cap=2.0)
    with pytest.raises(ValueError, match="does not own the weights of 3 of 3 .*master copies"):
        owner.attach(SGD(masters, lr=LR))


def test_a_change_that_is_overwritten_is_named(heard: list) -> None:
    net = network()  # float32 copies of float32 weights are not looked for: the outcome tells
    optimizer = Masters(net.parameters(), where="attribute")
    decay = decayed(net, optimizer, coupling="decoupled")
    train(net, optimizer)
    assert_named(decay, heard, ["0", "2", "4"], "overwrites its weight in each step", "coupling='gradient'")


def test_a_cut_that_is_overwritten_is_named(heard: list) -> None:
    net = network()
    optimizer = Masters(net.parameters(), where="attribute")
    cap = SpectralNormCap(net, cap=2.0, every=2)
    cap.attach(optimizer)
    train(net, optimizer, 9)
    assert_named(cap, heard, ["0", "2", "4"], "overwrites its weight in each step", "give the weights themselves")


class Buffered(torch.optim.Optimizer):
    """Collects gradients as they arrive, and steps by those."""

    def __init__(self, parameters: Any) -> None:
        super().__init__(parameters, {"lr": LR})
        self.seen: dict[Tensor, Tensor] = {}
        for weight in self.param_groups[0]["params"]:
            weight.register_hook(lambda grad, weight=weight: self.seen.__setitem__(weight, grad.clone()))

    def step(self, closure: Any = None) -> None:
        for weight, grad in self.seen.items():
            weight.data.add_(grad, alpha=-LR)


def test_an_optimizer_that_does_not_read_the_gradient_is_named(heard: list) -> None:
    net = network()
    optimizer = Buffered(net.parameters())
    decay = decayed(net, optimizer)
    train(net, optimizer, 20)
    assert decay.steps == 20 and norms(net) == pytest.approx([START] * 3)
    assert_named(decay, heard, ["0", "2", "4"], "leaves its weight as it was", "coupling='decoupled'")


def test_a_weight_that_is_taken_out_of_the_optimizer_is_named(heard: list) -> None:
    net = network()
    optimizer = SGD(net.parameters(), lr=LR)
    decay = decayed(net, optimizer)
    train(net, optimizer, 2)
    optimizer.param_groups[0]["params"] = [p for p in net.parameters() if p is not net[2].weight]
    train(net, optimizer, 3)
    assert_named(decay, heard, ["2"], "is gone from the optimizer", "build the optimizer from model.parameters() anew")


def test_a_moment_of_zeros_is_no_master_copy() -> None:
    weight = torch.zeros(3, 2, dtype=torch.bfloat16, requires_grad=True)
    optimizer = SGD([weight], lr=LR)
    optimizer.state[weight]["moment"] = torch.zeros(3, 2)
    assert find_masters(optimizer, {"w": weight}) == {}


def trajectory(dtype: torch.dtype, kind: type, coupling: str, **options: Any) -> list[Tensor]:
    net = network(torch.bfloat16, width=48).to(dtype)  # both begin with the same numbers
    optimizer = kind(net.parameters(), lr=1e-4, weight_decay=0)
    decayed(net, optimizer, coupling=coupling, lam=options.pop("lam", 2.0), refresh_every=50, **options)
    seen = []
    for _ in range(10):
        train(net, optimizer, 20)
        seen.append(torch.tensor(norms(net)))
    return seen


@LOW
@pytest.mark.parametrize("coefficients", ["cached", "live"])
def test_decoupled_decay_reaches_half_precision_weights_in_the_mean(dtype: torch.dtype, coefficients: str) -> None:
    """SGD, because AdamW's own arithmetic ends in NaN in float16 for gradients of zero."""
    exact = trajectory(torch.float32, SGD, "decoupled", coefficients=coefficients)
    half = trajectory(dtype, SGD, "decoupled", coefficients=coefficients)
    for got, expected in zip(half, exact, strict=True):
        assert (got - expected).abs().max() <= 0.05 * (START - expected).min()
    assert (START - exact[-1]).min() > 0.2


def test_a_decay_far_below_the_last_place_is_not_lost() -> None:
    exact = trajectory(torch.float32, AdamW, "decoupled", lam=0.1)[-1]
    half = trajectory(torch.bfloat16, AdamW, "decoupled", lam=0.1)[-1]
    assert (half - exact).abs().max() <= 0.05 * (START - exact).min()


@pytest.mark.parametrize("kind", [SGD, AdamW])
def test_an_update_that_rounding_swallows_is_named(kind: type, heard: list) -> None:
    net = network(torch.bfloat16)
    optimizer = kind(net.parameters(), lr=1e-4, weight_decay=0)
    decay = decayed(net, optimizer)
    train(net, optimizer)
    assert_named(decay, heard, ["0", "2", "4"], "lost in the rounding of its bfloat16 weight", "coupling='decoupled'")


def test_an_update_that_arrives_is_not_named(heard: list) -> None:
    net = network(torch.bfloat16)
    optimizer = SGD(net.parameters(), lr=0.5)
    decay = decayed(net, optimizer, lam=0.2)
    train(net, optimizer)
    assert said(heard) == [] and all(row["acts"] for row in decay.health())


def test_a_penalty_far_below_its_gradient_is_not_lost_in_half_precision() -> None:
    weight = network(torch.bfloat16)[0]
    optimizer = SGD(weight.parameters(), lr=0.0)
    decayed(weight, optimizer, lam=1e-4, k_max=1)
    total = torch.zeros(weight.weight.shape, dtype=torch.float64)
    for _ in range(400):
        weight.weight.grad = torch.ones_like(weight.weight)
        optimizer.step()
        total += weight.weight.grad.double() - 1
    u, s, vh = torch.linalg.svd(weight.weight.detach().double(), full_matrices=False)
    assert float(u[:, 0] @ total @ vh[0]) / 400 == pytest.approx(1e-4 * float(s[0]) ** 2, rel=0.3)


def test_rounding_is_right_in_the_mean_and_leaves_what_fits() -> None:
    for dtype in (torch.bfloat16, torch.float16):
        x = torch.tensor([1.0003, -0.30007, 2.0**-20 * 1.3, 3e-8, 250.1], dtype=torch.float64).repeat(40_000, 1)
        rounded = round_stochastically(x, dtype, generator=seeded(x.device, 1))
        unit = (rounded.double().amax(0) - rounded.double().amin(0)).clamp(min=1e-30)
        assert ((rounded.double().mean(0) - x[0]).abs() < 0.02 * unit).all()
        assert all(len(column.unique()) == 2 for column in rounded.T)
        held = torch.tensor([1.0, -0.5, 0.0, 2.0**-10]).repeat(1000, 1)
        assert torch.equal(round_stochastically(held, dtype).float(), held)


def test_half_precision_resumes_bit_for_bit() -> None:
    def start() -> tuple[nn.Module, Any, SelectiveSpectralDecay]:
        net = network(torch.bfloat16)
        optimizer = SGD(net.parameters(), lr=1e-3)
        return net, optimizer, decayed(net, optimizer, coupling="decoupled", refresh_every=6)

    net, optimizer, decay = start()
    train(net, optimizer, 9)
    state = decay.state_dict()
    assert any(key.endswith(".owed") for key in state)
    again, other, resumed = start()
    again.load_state_dict(net.state_dict())
    resumed.load_state_dict(state)
    train(net, optimizer, 9)
    train(again, other, 9)
    assert all(torch.equal(a, b) for a, b in zip(net.parameters(), again.parameters(), strict=True))
    assert any(not torch.equal(a, b) for a, b in zip(net.parameters(), start()[0].parameters(), strict=True))


# --- refresh by need --------------------------------------------------------------------------------------------------


class Experts(nn.Module):
    """Eight experts of which a step uses some."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.experts = nn.ModuleList(nn.Linear(6, 6) for _ in range(8))

    def forward(self, x: Tensor, used: list[int]) -> Tensor:
        return sum(self.experts[i](x) for i in used)


@pytest.mark.parametrize("set_to_none", [True, False])
@pytest.mark.parametrize("criterion", ["activation", "spectral", "all"])
def test_an_expert_is_penalised_in_every_step_that_uses_it(criterion: str, set_to_none: bool) -> None:
    model = Experts()
    optimizer = SGD(model.parameters(), lr=1e-3)
    decay = SelectiveSpectralDecay(model, criterion=criterion, tau=1e-6, k_max=2, refresh_every=1000)
    decay.attach(optimizer)
    used = [0] * 8
    for step in range(12):
        chosen = [step % 8, (3 * step) % 8]
        optimizer.zero_grad(set_to_none=set_to_none)
        model(torch.ones(2, 6), chosen).square().sum().backward()
        optimizer.step()
        for expert in set(chosen):
            used[expert] += 1
    rows = decay.health()
    assert all(row["steps"] >= count for row, count in zip(rows, used, strict=True))
    if set_to_none or criterion == "activation":
        early = [row["steps"] - count for row, count in zip(rows, used, strict=True)]
        assert early == [0] * 8 or not set_to_none  # zeros count as a gradient once the expert was refreshed


def test_two_optimizers_in_turn_are_each_refreshed_in_their_own_step() -> None:
    first, second = network(), network()
    model = nn.ModuleList([first, second])
    optimizers = [SGD(part.parameters(), lr=LR) for part in model]
    decay = decayed(model, *optimizers, refresh_every=1000)
    for _ in range(5):
        for part, optimizer in zip(model, optimizers, strict=True):
            for other in optimizers:
                other.zero_grad()
            gradients(part)
            optimizer.step()
    assert [row["steps"] for row in decay.health()] == [5] * 6
    assert norms(first) == pytest.approx(norms(second), rel=1e-6)


@pytest.mark.parametrize("criterion", ["activation", "spectral", "all"])
def test_a_step_with_zero_gradients_before_training_costs_no_refresh(criterion: str, heard: list) -> None:
    """As distributed checkpointing does to make an optimizer's state."""
    net = network()
    optimizer = AdamW(net.parameters(), lr=0.0)
    decay = decayed(net, optimizer, criterion=criterion, tau=1e-6)
    for parameter in net.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    optimizer.zero_grad()
    train(net, optimizer, 3)
    assert [row["steps"] for row in decay.health()] == [3 if criterion == "activation" else 4] * 3
    assert "3 of 3 layers act" in decay.summary() and said(heard) == []


def test_what_waits_for_its_refresh_is_part_of_the_state() -> None:
    def start() -> tuple[nn.Module, Any, SelectiveSpectralDecay]:
        model = Experts()
        optimizer = SGD(model.parameters(), lr=0.1)
        decay = SelectiveSpectralDecay(model, lam=0.1, tau=1e-6, k_max=1, refresh_every=1000)
        decay.attach(optimizer)
        return model, optimizer, decay

    def go(model: nn.Module, optimizer: Any, steps: range) -> None:
        for step in steps:
            optimizer.zero_grad()
            model(torch.ones(2, 6), [step]).square().sum().backward()
            optimizer.step()

    model, optimizer, decay = start()
    go(model, optimizer, range(3))
    again, other, resumed = start()
    again.load_state_dict(model.state_dict())
    resumed.load_state_dict(decay.state_dict())
    for parts in ((model, optimizer), (again, other)):
        go(*parts, range(3, 7))
    assert [row["rank"] for row in resumed.report()] == [1] * 7
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))


class Stack(nn.Module):
    """Experts in one parameter, as in transformers' Mixtral, beside a router and a projection without a layer."""

    def __init__(self, transposed: bool = False) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.num_experts, self.is_transposed = 3, transposed
        shape = (3, 4, 6) if transposed else (3, 6, 4)
        self.up_proj = nn.Parameter(torch.randn(shape, generator=generator))

    def forward(self, x: Tensor) -> Tensor:
        up = self.up_proj.mT if self.is_transposed else self.up_proj
        return torch.einsum("ti,eoi->to", x, up)


class Fusing(nn.Module):
    def __init__(self, transposed: bool = False) -> None:
        super().__init__()
        self.inner, self.experts = nn.Linear(4, 4), Stack(transposed)
        self.proj = nn.Parameter(torch.randn(6, 5, generator=torch.Generator().manual_seed(1)))

    def forward(self, x: Tensor) -> Tensor:
        return self.experts(self.inner(x)) @ self.proj


@COUPLINGS
@pytest.mark.parametrize("coefficients", ["cached", "live"])
@pytest.mark.parametrize("transposed", [False, True])
def test_stacked_experts_are_decayed_one_by_one(transposed: bool, coefficients: str, coupling: str) -> None:
    model = Fusing(transposed)
    start = model.experts.up_proj.detach().clone()
    optimizer = SGD(model.parameters(), lr=0.1)
    decay = decayed(model, optimizer, lam=0.05, k_max=2, coupling=coupling, coefficients=coefficients)
    assert list(decay.layers) == ["inner", "experts.up_proj.0", "experts.up_proj.1", "experts.up_proj.2"]
    assert [linear.shape for linear in decay.layers.values()] == [(4, 4)] + [(6, 4)] * 3
    (0 * model(torch.ones(2, 4))).sum().backward()
    optimizer.step()
    u, s, vh = torch.linalg.svd(start, full_matrices=False)
    expected = start - 0.1 * 0.05 * (u[..., :2] * s[..., None, :2] ** 2) @ vh[:, :2]
    torch.testing.assert_close(model.experts.up_proj.detach(), expected, rtol=1e-4, atol=1e-5)


def test_experts_of_a_real_mixtral_are_found() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.MixtralConfig(
        hidden_size=8, intermediate_size=12, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
        num_local_experts=4, vocab_size=16,
    )  # fmt: skip
    model = transformers.MixtralForCausalLM(config)
    names = [name for name in linear_maps(model) if "experts" in name]
    assert len(names) == 2 * 2 * 4 and names[0] == "model.layers.0.mlp.experts.gate_up_proj.0"
    decay = SelectiveSpectralDecay(model)
    assert not any("experts" in name for name in decay.layers) and "not watched: 16 matrices of experts" in repr(decay)
    rows = {row["layer"]: row for row in decay.health()}
    assert "criterion" in rows["model.layers.1.mlp.experts.down_proj.3"]["repair"]
    assert "include=" in rows["model.layers.0.mlp.gate.weight"]["repair"]


def test_bare_matrices_are_listed_and_can_be_included() -> None:
    model = Fusing()
    assert list(bare_matrices(model)) == ["proj"]
    assert "proj" not in linear_maps(model) and "proj" not in linear_maps(model, include="*")
    decay = decayed(model, SGD(model.parameters(), lr=LR))
    (row,) = [row for row in decay.health() if row["layer"] == "proj"]
    assert not row["acts"] and "not watched" in row["cause"] and "include=" in row["repair"]
    optimizer = SGD(model.parameters(), lr=LR)
    decay = decayed(model, optimizer, include=["inner", "proj"], lam=0.1)
    before = torch.linalg.matrix_norm(model.proj.detach(), 2)
    (0 * model(torch.ones(2, 4))).sum().backward()
    optimizer.step()
    assert torch.linalg.matrix_norm(model.proj.detach(), 2) < before
    assert [row["layer"] for row in decay.health()] == ["inner", "proj"]


@pytest.mark.parametrize("include", [["inner", "proj"], ["experts.*"]])
def test_what_the_activation_criterion_cannot_see_is_refused_where_it_is_asked_for(include: list[str]) -> None:
    with pytest.raises(ValueError, match="arises inside .*use 'spectral' or 'all'"):
        SelectiveSpectralDecay(Fusing(), include=include)


# --- a second one, and copies -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [SelectiveSpectralDecay, SpectralNormCap])
def test_a_cell_that_is_run_three_times_is_warned_of_each_time(kind: type, heard: list) -> None:
    net = network()
    optimizer = SGD(net.parameters(), lr=LR)
    for run in range(3):
        (kind(net) if kind is SelectiveSpectralDecay else kind(net, cap=2.0)).attach(optimizer)
        assert len(said(heard)) == run
    message = said(heard)[0]
    assert f"a second {kind.__name__} is attached" in message and "3 layers (0, 2, 4)" in message
    assert "call detach() on the first" in message


def test_a_decay_beside_a_cap_or_after_detach_or_on_other_layers_is_no_second_one(heard: list) -> None:
    net = network()
    optimizer = SGD(net.parameters(), lr=LR)
    decay = decayed(net, optimizer, include="0")
    decayed(net, optimizer, include="2")
    SpectralNormCap(net, cap=2.0).attach(optimizer)
    decay.detach()
    decayed(net, optimizer, include="0")
    assert said(heard) == []


@pytest.mark.parametrize("criterion", ["activation", "all"])
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda three: pickle.loads(pickle.dumps(three))])
@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0)])
def test_a_copy_of_model_optimizer_and_decay_goes_on_by_itself(order: tuple, copied: Callable, criterion: str) -> None:
    net = network()
    optimizer = SGD(net.parameters(), lr=LR)
    decay = decayed(net, optimizer, criterion=criterion, tau=1e-6, refresh_every=4)
    train(net, optimizer, 3)
    parts = copied(tuple([net, optimizer, decay][i] for i in order))
    twin, other, second = (parts[order.index(i)] for i in range(3))
    before = norms(net)
    train(twin, other, 7)
    assert norms(net) == before and decay.steps == 3
    train(net, optimizer, 7)
    assert norms(twin) == pytest.approx(norms(net), rel=1e-7)
    assert second.steps == 10 and all(row["acts"] for row in second.health())
    with pytest.raises(ValueError, match="already attached"):
        second.attach(other)


@pytest.mark.parametrize("make", [lambda net: SelectiveSpectralDecay(net), lambda net: SpectralNormCap(net, cap=2.0)])
def test_copies(make: Callable) -> None:
    net = network()
    unattached = copy.deepcopy(make(net))
    assert list(unattached.layers) == ["0", "2", "4"]
    with pytest.raises(ValueError, match="act twice on the same weights"):
        copy.copy(make(net))


def test_a_copied_cap_goes_on_by_itself() -> None:
    net = network()
    optimizer = SGD(net.parameters(), lr=LR)
    cap = SpectralNormCap(net, cap=2.0, every=2)
    cap.attach(optimizer)
    twin, other, second = copy.deepcopy((net, optimizer, cap))
    train(twin, other, 2)
    assert norms(twin) == pytest.approx([2.0] * 3) and norms(net) == pytest.approx([START] * 3)
    assert (second.steps, cap.steps) == (2, 0)


# --- the rest ---------------------------------------------------------------------------------------------------------


@COUPLINGS
@pytest.mark.parametrize("coefficients", ["cached", "live"])
def test_a_kernel_turned_to_channels_last_after_attach(coefficients: str, coupling: str) -> None:
    ends = []
    for turn in (False, True):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Conv2d(3, 5, 3), nn.Conv2d(5, 4, 3, groups=1)).double()
        optimizer = SGD(net.parameters(), lr=0.01)
        decay = decayed(
            net, optimizer, include="*", lam=0.5, coupling=coupling, coefficients=coefficients, refresh_every=3
        )
        if turn:
            net.to(memory_format=torch.channels_last)
        for step in range(7):
            optimizer.zero_grad()
            x = torch.full((1, 3, 6, 6), 0.1 * step, dtype=torch.float64)
            net(x.to(memory_format=torch.channels_last) if turn else x).square().mean().backward()
            optimizer.step()
        assert turn != net[0].weight.is_contiguous() and len(decay.cached_similarity()) == 2
        ends.append([p.detach().clone() for p in net.parameters()])
    for a, b in zip(*ends, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-10)


def test_function_transforms_of_a_watched_model() -> None:
    net = network()
    free = copy.deepcopy(net)
    optimizer = SGD(net.parameters(), lr=LR)
    decay = decayed(net, optimizer, criterion="activation", tau=1e-6)
    x = torch.ones(3, 2, 8)
    for function in (
        lambda m: torch.func.grad(lambda p: torch.func.functional_call(m, p, (x,)).sum())(dict(m.named_parameters())),
        lambda m: torch.func.jvp(m, (x,), (x,)),
        lambda m: torch.func.vmap(m)(x),
        lambda m: torch.func.vjp(m, x)[0],
    ):
        for got, expected in zip(
            torch.utils._pytree.tree_leaves(function(net)), torch.utils._pytree.tree_leaves(function(free)), strict=True
        ):
            assert torch.equal(got, expected)
    train(net, optimizer, 2)
    assert all(row["acts"] for row in decay.health())


@pytest.mark.parametrize("lr", [None, "missing"])
def test_an_optimizer_without_a_rate(lr: Any) -> None:
    net = network()
    optimizer = SGD(net.parameters(), lr=LR)
    if lr is None:
        optimizer.param_groups[0]["lr"] = None
    else:
        del optimizer.param_groups[0]["lr"]
    with pytest.raises(ValueError, match="lr is None .*coupling='gradient'"):
        SelectiveSpectralDecay(net, coupling="decoupled").attach(optimizer)
    SelectiveSpectralDecay(net).attach(optimizer)


def test_weights_without_values_and_sparse_ones() -> None:
    meta = network().to("meta")
    with pytest.raises(ValueError, match="layer 0 is on the meta device"):
        SelectiveSpectralDecay(meta).attach(SGD(meta.parameters(), lr=LR))
    with pytest.raises(ValueError, match="meta device and has no values"):
        SelectiveSpectralDecay(meta, criterion="all").refresh()
    sparse = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    sparse[1].weight = nn.Parameter(torch.eye(4).to_sparse())
    for kind in (lambda net: SelectiveSpectralDecay(net), lambda net: SpectralNormCap(net, cap=1.0)):
        with pytest.raises(ValueError, match="layer 1 has a sparse weight .*make it dense"):
            kind(sparse)


def test_half_precision_weights_given_other_data() -> None:
    net = network(torch.bfloat16)
    decay = SelectiveSpectralDecay(net)
    decay.attach(SGD(net.parameters(), lr=LR))
    with pytest.raises(ValueError, match="layer 0 has torch.bfloat16 weights and is given torch.float32: cast"):
        net(torch.ones(2, 8))
    with pytest.raises(ValueError, match=r"\(torch.bfloat16\) cannot be called with this batch"):
        check_bound(network(torch.bfloat16), torch.ones(2, 8))


@pytest.fixture
def one_process(tmp_path: Any) -> Iterator[None]:
    """A process group of this process alone, on the CPU."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sharded_weights(dtype: torch.dtype, one_process: None, heard: list) -> None:
    from torch.distributed.fsdp import fully_shard

    ends = []
    for sharded in (False, True):
        net = network(dtype)
        if sharded:
            mesh = torch.distributed.init_device_mesh("cpu", (1,))
            fully_shard(net, mesh=mesh)
        optimizer = SGD(net.parameters(), lr=LR)
        decay = decayed(net, optimizer, coupling="decoupled")
        cap = SpectralNormCap(net, cap=2.8, every=5)
        cap.attach(optimizer)
        train(net, optimizer, 6)
        assert all(row["acts"] for row in decay.health() + cap.health())
        ends.append([getattr(p, "full_tensor", lambda p=p: p)().detach().clone() for p in net.parameters()])
    for whole, shards in zip(*ends, strict=True):
        torch.testing.assert_close(shards, whole, rtol=1e-6, atol=1e-6)
    assert said(heard) == []


# --- the cap shares it all --------------------------------------------------------------------------------------------


class Derived(SGD):
    """torch runs the hooks of its step and those of the step inside."""

    def step(self, closure: Callable | None = None) -> Any:
        return super().step(closure)


def test_the_cap_counts_a_step_inside_a_step_once() -> None:
    net = network()
    optimizer = Derived(net.parameters(), lr=0.0)
    cap = SpectralNormCap(net, cap=2.0, every=6)
    cap.attach(optimizer)
    train(net, optimizer, 5)
    assert cap.steps == 5 and norms(net) == pytest.approx([START] * 3)
    train(net, optimizer, 1)
    assert norms(net) == pytest.approx([2.0] * 3, rel=1e-5)


def test_the_cap_refuses_an_optimizer_of_another_model() -> None:
    with pytest.raises(ValueError, match="does not own the weights of 3 of 3 watched layers"):
        SpectralNormCap(network(), cap=2.0).attach(SGD(network().parameters(), lr=LR))


def test_the_cap_takes_several_optimizers_and_wrappers() -> None:
    net = network()

    class Wrapper:
        def __init__(self, optimizer: Any) -> None:
            self.optimizer = optimizer

    optimizers = [SGD(layer.parameters(), lr=0.0) for layer in net[::2]]
    cap = SpectralNormCap(net, cap=2.0, every=2)
    cap.attach(*map(Wrapper, optimizers))
    for _ in range(2):
        gradients(net)
        for optimizer in optimizers:
            optimizer.step()
    assert cap.steps == 2 and norms(net) == pytest.approx([2.0] * 3, rel=1e-5)


def test_the_cap_takes_numpys_numbers() -> None:
    numpy = pytest.importorskip("numpy")
    cap = SpectralNormCap(network(), cap=numpy.float32(2.0), every=numpy.int64(3))
    assert (cap.cap, cap.every) == (2.0, 3)


def test_the_cap_decomposes_only_what_is_not_certified(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    svd = torch.linalg.svd
    monkeypatch.setattr(torch.linalg, "svd", lambda *a, **k: calls.append(1) or svd(*a, **k))
    net = network()
    before = [p.clone() for p in net.parameters()]
    SpectralNormCap(net, cap=START * 1.01).project()
    assert calls == [] and all(torch.equal(a, b) for a, b in zip(net.parameters(), before, strict=True))
    SpectralNormCap(net, cap=START * 0.99, exclude=["0", "2"]).project()
    assert len(calls) == 1 and norms(net)[2] == pytest.approx(START * 0.99, rel=1e-5)
