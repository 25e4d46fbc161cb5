"""The outlier activations that are seen in training forward passes.

Oracle: hooks of the test's own (or inputs written down by hand), every ``|W x|`` computed in float64, and a full sort.
"""

from __future__ import annotations

import copy
import io
import math
import pickle
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from s2d.layers import LinearMap, linear_maps, modules_sharing
from s2d.watch import OutlierWatch

F64 = torch.float64
STRESS = settings(max_examples=60, deadline=None, derandomize=True)


def gaussian(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


def seeded(model: nn.Module, seed: int = 0) -> nn.Module:
    """The model in float64, with weights that depend on the seed alone."""
    model = model.double()
    for index, parameter in enumerate(model.parameters()):
        parameter.data = 0.5 * gaussian(*parameter.shape, seed=100 * seed + index)
    return model


def watching(model: nn.Module, capacity: int = 4, **choice) -> OutlierWatch:
    """A watch on the linear maps of a model, attached and started."""
    maps = linear_maps(model, **choice)
    watch = OutlierWatch({name: modules_sharing(model, linear) for name, linear in maps.items()}, capacity)
    watch.attach()
    watch.start()
    return watch


def check(watch: OutlierWatch, name: str, weight: Tensor, inputs: list[Tensor], capacity: int = 4) -> None:
    """That the rows are the largest activations of all these inputs, each with the input that made it."""
    rows, weight = watch.rows[name], weight.detach().double()
    y = torch.cat([x.detach().double().reshape(-1, weight.shape[1]) for x in inputs]) @ weight.T
    expected = torch.tensor(sorted(y.abs().flatten().tolist(), reverse=True)[:capacity], dtype=F64)
    assert len(rows) == len(expected)
    if not len(expected):
        assert rows.magnitude is rows.neuron is rows.x is None
        return
    torch.testing.assert_close(rows.magnitude.double(), expected)
    made = torch.stack([weight[i] @ x for i, x in zip(rows.neuron.tolist(), rows.x.double(), strict=True)])
    torch.testing.assert_close(made.abs(), expected)


def same_state(model: nn.Module, other: nn.Module) -> bool:
    return all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))


def untouched(watch: OutlierWatch) -> bool:
    return all(len(rows) == 0 for rows in watch.rows.values())


# --- what is seen -----------------------------------------------------------------------------------------------------


@STRESS
@given(
    st.integers(1, 5),
    st.integers(1, 5),
    st.lists(st.lists(st.integers(1, 4), max_size=2), min_size=1, max_size=4),
    st.integers(1, 9),
    st.integers(0, 2**16),
)
def test_the_largest_of_all_passes_are_kept(n: int, m: int, batches: list[list[int]], capacity: int, seed: int) -> None:
    layer = seeded(nn.Linear(n, m), seed)
    watch = watching(layer, capacity)
    inputs = [gaussian(*shape, n, seed=seed + 7 * index) for index, shape in enumerate(batches)]
    for x in inputs:
        layer(x)
    check(watch, "", layer.weight, inputs, capacity)


def test_the_bias_is_no_part_of_an_activation() -> None:
    layer = seeded(nn.Linear(3, 5))
    layer.bias.data = 1000 * torch.arange(5.0, dtype=F64)
    watch, x = watching(layer), gaussian(6, 3, seed=1)
    layer(x)
    check(watch, "", layer.weight, [x])


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_passes_without_gradients_do_not_count(context: Callable) -> None:
    layer = seeded(nn.Linear(3, 5))
    watch, x = watching(layer), gaussian(6, 3, seed=1)
    with context():
        layer(1000 * x)
    assert untouched(watch)
    layer(x)
    with context():
        layer(1000 * x)
    check(watch, "", layer.weight, [x])


def test_passes_count_from_the_start_to_the_end() -> None:
    layer = seeded(nn.Linear(3, 5))
    maps = {"": [LinearMap("", layer)]}
    watch, x = OutlierWatch(maps, 4), gaussian(6, 3, seed=1)
    watch.attach()
    layer(1000 * x)
    assert watch.active is False and untouched(watch)
    for scale in (100, 1):  # a second start forgets what the first one saw
        watch.start()
        assert watch.active is True and untouched(watch)
        layer(scale * x)
        layer(scale * gaussian(2, 3))
        watch.active = False
        layer(1000 * x)
        check(watch, "", layer.weight, [scale * x, scale * gaussian(2, 3)])
    watch.clear()
    assert untouched(watch)


def test_detaching_takes_every_hook_away() -> None:
    layer = seeded(nn.Linear(3, 5))
    watch, x = watching(layer), gaussian(6, 3, seed=1)
    layer(x)
    watch.detach()
    assert not layer._forward_pre_hooks and not layer._forward_hooks and not watch.active
    layer(1000 * x)
    check(watch, "", layer.weight, [x])
    watch.detach()  # once more is no error
    watch.attach()
    watch.start()
    layer(2 * x)
    check(watch, "", layer.weight, [2 * x])


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_outside_of_training_every_pass_can_count(context: Callable) -> None:
    layer = seeded(nn.Linear(3, 5))
    watch, x = OutlierWatch({"": [LinearMap("", layer)]}, 4, training_only=False), gaussian(6, 3, seed=1)
    watch.attach()
    watch.start()
    with context():
        layer(x)
    check(watch, "", layer.weight, [x])


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("order", ["before", "after", "within"])
def test_activations_that_are_not_finite_take_nobodys_place(bad: float, order: str) -> None:
    # A forward pass that overflows belongs to a step that a GradScaler skips; what it leaves must not hide the rest.
    layer = seeded(nn.Linear(3, 5))
    watch, x = watching(layer), gaussian(6, 3, seed=1)
    broken = torch.full((6, 3), bad, dtype=F64)
    for batch in {"before": [broken, x], "after": [x, broken], "within": [torch.cat([x, broken])]}[order]:
        layer(batch)
    check(watch, "", layer.weight, [x])


def test_a_watch_that_saw_nothing_finite_is_empty() -> None:
    layer = seeded(nn.Linear(3, 5))
    watch = watching(layer)
    layer(torch.full((6, 3), math.nan, dtype=F64))
    assert untouched(watch)


def test_rows_are_copies() -> None:
    layer = seeded(nn.Linear(3, 5))
    watch, x = watching(layer, capacity=100), gaussian(4, 3, seed=1)
    given_x = x.clone()
    layer(given_x)
    given_x.fill_(-7)
    check(watch, "", layer.weight, [x], 100)
    assert not watch.rows[""].x.requires_grad and not watch.rows[""].magnitude.requires_grad


def test_watching_changes_neither_output_nor_random_numbers() -> None:
    watched, plain = (seeded(nn.Sequential(nn.Linear(3, 8), nn.Dropout(0.5), nn.Linear(8, 2))) for _ in range(2))
    watching(watched)
    results = []
    for model in (watched, plain):
        torch.manual_seed(3)
        y = model(gaussian(5, 3))
        y.square().sum().backward()
        results.append([y, *(p.grad for p in model.parameters()), torch.random.get_rng_state()])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_under_autocast_the_magnitudes_are_those_of_the_layer(dtype: torch.dtype) -> None:
    layer = seeded(nn.Linear(16, 12, bias=False)).to(dtype)
    watch, x = watching(layer), gaussian(9, 16, seed=1).float()
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
    expected = y.abs().flatten().float().topk(4).values
    torch.testing.assert_close(watch.rows[""].magnitude.float(), expected, rtol=1e-2, atol=0)
    rows = watch.rows[""]
    made = (layer.weight.double()[rows.neuron] * rows.x.double()).sum(1).abs()
    torch.testing.assert_close(made, expected.double(), rtol=2e-2, atol=0)


# --- which module it is -----------------------------------------------------------------------------------------------


class Keyword(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(input=x)


def test_an_input_given_by_keyword() -> None:
    model = seeded(Keyword())
    watch, x = watching(model), gaussian(6, 3, seed=1)
    model(x)
    check(watch, "linear", model.linear.weight, [x])


class Renamed(nn.Linear):
    """What a user's own subclass may look like."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)


def test_an_input_given_by_a_keyword_of_a_subclass() -> None:
    layer = seeded(Renamed(3, 5))
    watch, x = watching(layer), gaussian(6, 3, seed=1)
    layer(x=x)
    check(watch, "", layer.weight, [x])


class Conv1D(nn.Module):
    """As transformers' GPT-2 has it: the weight is stored transposed."""

    def __init__(self, nf: int, nx: int) -> None:
        super().__init__()
        self.nf = nf
        self.weight, self.bias = nn.Parameter(torch.zeros(nx, nf)), nn.Parameter(torch.zeros(nf))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight + self.bias


def test_a_transposed_weight() -> None:
    layer = seeded(Conv1D(5, 3))
    watch, x = watching(layer), gaussian(2, 6, 3, seed=1)
    layer(x=x)
    check(watch, "", layer.weight.T, [x])


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("by_keyword", [True, False])
def test_the_three_inputs_of_attention(packed: bool, by_keyword: bool) -> None:
    attention = seeded(nn.MultiheadAttention(4, 2, kdim=None if packed else 6, vdim=None if packed else 5))
    watch = watching(attention)
    query, key, value = gaussian(3, 2, 4), gaussian(7, 2, 4 if packed else 6, seed=1), gaussian(7, 2, 4 + (not packed))
    if by_keyword:
        attention(query=query, value=value, key=key)
    else:
        attention(query, key, value)
    parts = [attention.q_proj_weight, attention.k_proj_weight, attention.v_proj_weight]
    plain = list(attention.in_proj_weight.split(4)) if packed else parts
    assert list(watch.rows) == ["q", "k", "v"]
    for name, weight, x in zip("qkv", plain, (query, key, value), strict=True):
        check(watch, name, weight, [x])


class Tied(nn.Module):
    """Two modules with one weight, the second on ten times larger inputs, inside a checkpoint if there is one."""

    def __init__(self, reentrant: bool | None = None) -> None:
        super().__init__()
        self.first, self.second, self.reentrant = nn.Linear(4, 4), nn.Linear(4, 4), reentrant
        self.second.weight = self.first.weight
        self.inputs: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)
        self.inputs += [x, 10 * torch.tanh(h)]
        if self.reentrant is None:
            return self.second(10 * torch.tanh(h))
        return checkpoint(lambda h: self.second(10 * torch.tanh(h)), h, use_reentrant=self.reentrant)


@pytest.mark.parametrize("reentrant", [None, False, True])
@pytest.mark.parametrize("capacity", [1, 4, 60])
def test_a_tied_weight_sees_the_inputs_of_both_modules(reentrant: bool | None, capacity: int) -> None:
    model = seeded(Tied(reentrant))
    watch = watching(model, capacity)
    model(gaussian(5, 4)).sum().backward()
    assert list(watch.rows) == ["first"]
    check(watch, "first", model.first.weight, model.inputs, capacity)


def test_a_module_that_is_called_twice_is_seen_twice() -> None:
    layer = seeded(nn.Linear(4, 4))
    watch, x = watching(layer, 20), gaussian(5, 4)
    h = layer(x)
    layer(h)
    check(watch, "", layer.weight, [x, h], 20)


# --- activation checkpointing -----------------------------------------------------------------------------------------


class Deep(nn.Module):
    """Blocks that are recomputed in ``backward()``."""

    def __init__(self, reentrant: bool | None) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(4, 4), nn.Tanh()) for _ in range(3))
        self.reentrant = reentrant

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x) if self.reentrant is None else checkpoint(block, x, use_reentrant=self.reentrant)
        return x


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("passes", [1, 3])
def test_checkpointing_changes_nothing(reentrant: bool, passes: int) -> None:
    # With more room than activations, one that was counted twice would show.
    seen = []
    for mode in (None, reentrant):
        model = seeded(Deep(mode))
        watch = watching(model, capacity=1000)
        for index in range(passes):
            model(gaussian(5, 4, seed=index).requires_grad_()).sum().backward()
        seen.append(watch.rows)
        assert all(len(rows) == passes * 5 * 4 for rows in watch.rows.values())
    for name, rows in seen[0].items():
        torch.testing.assert_close(rows.magnitude, seen[1][name].magnitude)
        torch.testing.assert_close(rows.x, seen[1][name].x)


def test_a_start_forgets_which_modules_were_not_recomputed() -> None:
    model = seeded(Deep(None))
    watch = watching(model, capacity=1000)
    model(gaussian(5, 4)).sum().backward()
    model.reentrant = True
    watch.start()
    model(gaussian(5, 4, seed=1).requires_grad_()).sum().backward()
    check(watch, "blocks.0.0", model.blocks[0][0].weight, [gaussian(5, 4, seed=1)], 20)


def test_checkpointing_after_the_rows_were_cleared() -> None:
    model = seeded(Deep(False))
    watch = watching(model, capacity=1000)
    for seed in (1, 2):
        watch.start()
        model(gaussian(5, 4, seed=seed)).sum().backward()
    assert all(len(rows) == 20 for rows in watch.rows.values())
    check(watch, "blocks.0.0", model.blocks[0][0].weight, [gaussian(5, 4, seed=2)], 20)


# --- copies -----------------------------------------------------------------------------------------------------------


def saved_and_loaded(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


COPIES: dict[str, Callable[[nn.Module], nn.Module]] = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
    "torch.save": saved_and_loaded,
    "AveragedModel": lambda model: torch.optim.swa_utils.AveragedModel(model).module,
}


@pytest.mark.parametrize("how", COPIES)
def test_a_copy_of_the_model_is_inert(how: str) -> None:
    model = seeded(nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 2)))
    watch, x = watching(model), gaussian(6, 3, seed=1)
    twin = COPIES[how](model)
    assert same_state(twin, model)
    twin(1000 * x).sum().backward()
    COPIES[how](twin)(1000 * x)
    assert untouched(watch)
    model(x)
    check(watch, "0", model[0].weight, [x])
    own = watching(twin)  # a copy can be watched for itself
    twin(x)
    check(own, "0", twin[0].weight, [x])
    model(2 * x)
    twin(3 * x)
    check(watch, "0", model[0].weight, [x, 2 * x])
    check(own, "0", twin[0].weight, [x, 3 * x])


def test_a_pickle_holds_nothing_of_the_watch() -> None:
    layer = seeded(nn.Linear(3, 5))
    watching(layer)
    text = pickle.dumps(layer)
    assert b"OutlierWatch" not in text and b"OutlierRows" not in text and b"LinearMap" not in text


# --- torch.compile ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("part", "reentrant"), [("model", None), ("model", False), ("blocks", None)])
def test_a_compiled_model_is_watched_exactly_while_active(part: str, reentrant: bool | None) -> None:
    # With more room than activations, one that was counted twice would show.
    torch._dynamo.reset()
    model = seeded(Deep(reentrant))
    watch = watching(model, capacity=1000)
    for module in [model] if part == "model" else model.blocks:
        module.compile(backend="aot_eager")
    for seed, active in enumerate([True, False, True, False]):
        watch.clear()
        watch.active = False
        if active:
            watch.start()
        x = gaussian(5, 4, seed=seed)
        model(x).sum().backward()
        if active:
            watch.active = False
            check(watch, "blocks.0.0", model.blocks[0][0].weight, [x], 1000)
            check(watch, "blocks.1.0", model.blocks[1][0].weight, [model.blocks[0](x)], 1000)
        else:
            assert untouched(watch)


def test_a_model_that_was_compiled_and_called_before() -> None:
    # A warm-up, or a second training in the same process: compiled code must not go on without the new hooks.
    torch._dynamo.reset()
    model = seeded(nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4)))
    compiled = torch.compile(model, backend="eager")
    compiled(gaussian(5, 4)).sum().backward()
    for seed in (1, 2):
        watch, x = watching(model), gaussian(5, 4, seed=seed)
        compiled(x).sum().backward()
        check(watch, "0", model[0].weight, [x])
        watch.detach()


def test_maps_can_be_given_by_hand() -> None:
    layer = seeded(nn.Linear(3, 5))
    watch = OutlierWatch({"top": [LinearMap("top", layer, rows=(1, 3))]}, capacity=2)
    watch.attach()
    watch.start()
    x = gaussian(6, 3)
    layer(x)
    check(watch, "top", layer.weight[1:3], [x], 2)
