"""Models and calls as users bring them: every multiplication quantized or named, in any thread, shape and form."""

from __future__ import annotations

import copy
import functools
import io
import pickle
import threading
import types
import warnings
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune

from s2d.ptq import METHODS, coverage, quantize
from s2d.ptq.copies import independent_copy
from s2d.ptq.prepare import prepare
from s2d.ptq.quantizers import AffineQuantizer, Quantizer
from s2d.ptq.sites import products, quantized_layers, sites
from s2d.ptq.trace import regular_attention


def data(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


class Attention(nn.Module):
    """One packed projection, both products by hand, one output layer; heads are optional."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def scores(self, q: Tensor, k: Tensor) -> Tensor:
        return q @ k.mT / q.shape[-1] ** 0.5

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        q, k, v = self.qkv(x).chunk(3, -1)
        scores = self.scores(q, k)
        return self.out((scores if mask is None else scores + mask).softmax(-1) @ v)


def error(found: Tensor, expected: Tensor) -> float:
    return ((found - expected).square().sum() / expected.square().sum()).item()


def left_out(model: nn.Module) -> list[str]:
    return [row["site"] for row in coverage(model) if row["kind"] == "left out"]


# --- threads -----------------------------------------------------------------------------------------------------


def test_calls_from_several_threads_give_what_one_thread_gives() -> None:
    torch.manual_seed(0)
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 32, batch_first=True), 4).eval()
    quantized = quantize(model, w_bits=8, a_bits=4, calibration=data(8, 5, 16))
    inputs = [data(2, 3 + i % 4, 16, seed=i) for i in range(60)]
    ready = threading.Barrier(4)
    with torch.no_grad():
        expected = [quantized(x) for x in inputs]

    def work(part: int) -> list[Tensor]:
        ready.wait()
        with torch.no_grad():
            return [quantized(x) for x in inputs[part::4]]

    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(work, range(4)))
    for part, outputs in enumerate(found):
        assert all(torch.equal(a, b) for a, b in zip(outputs, expected[part::4], strict=True))


def test_a_call_in_the_middle_of_another_is_not_mixed_up_with_it() -> None:
    """What threads do by chance, on purpose: while one is inside the attention, another runs it through."""

    class Waits(Attention):
        inside, done = threading.Event(), threading.Event()

        def scores(self, q: Tensor, k: Tensor) -> Tensor:
            if len(q) == 1:
                self.inside.set()
                assert self.done.wait(60)
            return super().scores(q, k)

    model = Waits().eval()
    quantized = quantize(model, w_bits=32, a_bits=3, calibration=data(4, 6, 16))
    x = data(1, 6, 16, seed=3)
    plain = quantize(Attention().eval(), w_bits=32, a_bits=3, calibration=data(4, 6, 16))

    def run(x: Tensor) -> Tensor:
        with torch.no_grad():
            return quantized(x)

    with ThreadPoolExecutor(1) as pool, torch.no_grad():
        first = pool.submit(run, x)
        assert Waits.inside.wait(60)
        second = run(data(2, 6, 16, seed=4))
        Waits.done.set()
        assert torch.equal(first.result(), plain(x))
        assert torch.equal(second, plain(data(2, 6, 16, seed=4)))


def test_the_fused_path_comes_back_when_the_last_one_leaves() -> None:
    assert torch.backends.mha.get_fastpath_enabled()
    with regular_attention():
        with regular_attention():
            assert not torch.backends.mha.get_fastpath_enabled()
        assert not torch.backends.mha.get_fastpath_enabled()
    assert torch.backends.mha.get_fastpath_enabled()


# --- shapes --------------------------------------------------------------------------------------------------------


class Grouped(nn.Module):
    """Four query heads over a number of key heads, as decoders call it: fused, repeated, or packed for one query."""

    def __init__(self, key_heads: int) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.key_heads, self.q, self.out = key_heads, nn.Linear(16, 16), nn.Linear(16, 16)
            self.kv = nn.Linear(16, 8 * key_heads)

    def forward(self, x: Tensor, past: Tensor | None = None) -> Tensor:
        q = self.q(x).unflatten(-1, (4, 4)).transpose(1, 2)
        everything = x if past is None else torch.cat([past, x], 1)
        k, v = self.kv(everything).unflatten(-1, (2 * self.key_heads, 4)).transpose(1, 2).chunk(2, 1)
        group = 4 // self.key_heads
        if q.shape[2] == 1:  # a group's queries become the rows of its one head
            mixed = F.scaled_dot_product_attention(q.reshape(len(q), self.key_heads, group, 4), k, v)
            mixed = mixed.reshape(len(q), 4, 1, 4)
        else:
            k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
            mixed = F.scaled_dot_product_attention(q, k, v, is_causal=past is None)
        return self.out(mixed.transpose(1, 2).flatten(2))


@pytest.mark.parametrize("key_heads", [1, 2, 4])
@pytest.mark.parametrize("method", METHODS)
def test_one_query_over_what_came_before_is_the_last_row_of_all_at_once(method: str, key_heads: int) -> None:
    model = Grouped(key_heads).eval()
    quantized = quantize(model, method=method, w_bits=8, a_bits=8, calibration=data(4, 7, 16))
    for count, length in ((2, 7), (1, 3), (5, 11)):
        x = data(count, length, 16, seed=length)
        with torch.no_grad():
            assert error(quantized(x), model(x)) < 5e-3
            step = quantized(x[:, -1:], x[:, :-1])
            assert step.shape == (count, 1, 16)
            assert error(step, model(x)[:, -1:]) < 5e-3


def test_grids_by_head_follow_the_form_in_which_heads_come() -> None:
    quantizer = AffineQuantizer(4, symmetric=True, granularity="per_channel", axis=-3)
    quantizer.set_grid(torch.tensor([1.0, 3.0, 2.0, 4.0]).view(4, 1, 1))
    assert quantizer.for_heads(torch.zeros(9, 4, 5, 8)) is quantizer
    assert quantizer.for_heads(torch.zeros(9, 2, 5, 8)).scale.flatten().tolist() == [3, 4]
    assert quantizer.for_heads(torch.zeros(9, 2, 2, 8)).scale.flatten().tolist() == [3, 4]
    packed = quantizer.for_heads(torch.zeros(9, 2, 2, 8), packed=True).scale
    assert packed.tolist() == [[[1], [3]], [[2], [4]]]
    for other in (torch.zeros(9, 3, 5, 8), torch.zeros(9, 1, 5, 8), torch.zeros(5, 8), torch.zeros(8, 5, 8)):
        assert quantizer.for_heads(other).scale.flatten().tolist() == [4]
    tensor = AffineQuantizer(4)
    assert tensor.for_heads(torch.zeros(3, 2, 5, 8)) is tensor
    asymmetric = AffineQuantizer(4, granularity="per_channel", axis=-3)
    asymmetric.set_grid(torch.ones(4, 1, 1), torch.arange(4.0).view(4, 1, 1))
    with pytest.raises(ValueError, match="4 heads and asymmetric"):
        asymmetric.for_heads(torch.zeros(9, 2, 5, 8))


@pytest.mark.parametrize("method", METHODS)
def test_calibration_batches_may_differ_in_length_and_size(method: str) -> None:
    model = Attention().eval()
    batches = [data(8, 3, 16), data(4, 6, 16, seed=3), data(2, 9, 16, seed=1), data(1, 1, 16, seed=2)]
    quantized = quantize(model, method=method, w_bits=8, a_bits=8, calibration=batches)
    for x in (data(3, 4, 16, seed=5), data(1, 12, 16, seed=6)):
        with torch.no_grad():
            assert error(quantized(x), model(x)) < 2e-2


@pytest.mark.parametrize("name", ["Llama", "Gemma3"])
@pytest.mark.parametrize("method", ["ptq4vit", "repq_vit"])
def test_generation_with_left_padding_grouped_heads_and_windows(name: str, method: str) -> None:
    transformers = pytest.importorskip("transformers")
    shape = {"vocab_size": 50, "hidden_size": 32, "num_hidden_layers": 1, "intermediate_size": 32}
    shape |= {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64}
    torch.manual_seed(0)
    if name == "Llama":
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**shape))
    else:
        model = transformers.Gemma3ForCausalLM(transformers.Gemma3TextConfig(**shape, sliding_window=4))
    ids = torch.randint(1, 49, (4, 7), generator=torch.Generator().manual_seed(1))
    quantized = quantize(model.eval(), method=method, w_bits=8, a_bits=8, calibration={"input_ids": ids})
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
    options = {"max_new_tokens": 3, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    options |= {"return_dict_in_generate": True, "output_scores": True}
    made = quantized.generate(input_ids=ids[:2, :5], attention_mask=mask, **options)
    assert made.sequences.shape == (2, 8)
    # The last step, with its cache, is the float model's on the same tokens.
    full = torch.cat([mask, torch.ones(2, 3, dtype=torch.long)], 1)[:, :-1]
    with torch.no_grad():
        expected = model(input_ids=made.sequences[:, :-1], attention_mask=full).logits[:, -1]
    assert error(made.scores[-1], expected) < 0.05


# --- found or named ------------------------------------------------------------------------------------------------


class Twice(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, w: Tensor) -> Tensor:
        return 2 * (x @ w)


class Box(nn.Module):
    """A Linear layer, and beside it weights that no layer calls."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind, self.fc = kind, nn.Linear(8, 8)
        self.w, self.v = nn.Parameter(torch.randn(8, 8)), nn.Parameter(torch.randn(8, 8))
        self.register_buffer("table", torch.randn(8, 8))
        made = {"lstm": nn.LSTM, "gru": nn.GRU, "rnn": nn.RNN, "cell": nn.LSTMCell, "transposed": nn.ConvTranspose1d}
        if kind in made:
            self.inner = made[kind](8, 8, *([1] if kind == "transposed" else []))
        if kind == "scripted":
            self.inner = torch.jit.trace(nn.Linear(8, 8), torch.zeros(2, 5, 8), check_trace=False)

    def forward(self, x: Tensor) -> Tensor:
        y = self.fc(x)
        other = NAMED[self.kind][0](self, y)
        return y + (other[0] if isinstance(other, tuple) else other).flatten()[0]


# What is called with the output of the layer, and what names it.
NAMED = {
    "einsum of a list": (lambda s, x: torch.einsum("bqd,bkd->bqk", [x, x]), "a product of two activations"),
    "einsum of three": (lambda s, x: torch.einsum("bqd,de,bke->bqk", x, s.w, x), "einsum with w"),
    "lstm": (lambda s, x: s.inner(x), "lstm with inner.weight_ih_l0"),
    "gru": (lambda s, x: s.inner(x), "inner.weight_ih_l0"),
    "rnn": (lambda s, x: s.inner(x), "inner.weight_hh_l0"),
    "cell": (lambda s, x: s.inner(x[0]), "inner.bias_ih, inner.weight_ih"),
    "transposed": (lambda s, x: s.inner(x.mT), "inner.weight"),
    "scripted": (lambda s, x: s.inner(x), "inner.weight"),
    "normalized": (lambda s, x: F.linear(x, F.normalize(s.w)), "linear with w"),
    "masked": (lambda s, x: F.linear(x, s.w * (s.w > 0)), "linear with w"),
    "low rank": (lambda s, x: F.linear(x, s.w + s.v @ s.v), "linear with v, w"),
    "stacked": (lambda s, x: torch.bmm(x[:2], torch.stack([s.w, s.v])), "bmm with v, w"),
    "picked": (lambda s, x: x @ s.w[torch.arange(8)], "matmul with w"),
    "another dtype": (lambda s, x: x.double() @ s.w.double(), "matmul with w"),
    "tensordot": (lambda s, x: torch.tensordot(x, s.w, 1), "tensordot with w"),
    "inner": (lambda s, x: torch.inner(x, s.w), "inner with w"),
    "inner of two": (lambda s, x: torch.inner(x, x), "inner of two activations"),
    "sum of products": (lambda s, x: (x[..., None] * s.w).sum(-2), "multiply and sum with w"),
    "mean of products": (lambda s, x: torch.mean(s.w * x.unsqueeze(-2), -1), "multiply and sum with w"),
    "in place": (lambda s, x: (x[..., None].repeat(1, 1, 1, 8).mul_(s.w)).sum(2), "multiply and sum with w"),
    "vecdot": (lambda s, x: torch.linalg.vecdot(x, x.flip(0)), "multiply and sum of two activations"),
    "chain": (lambda s, x: torch.linalg.multi_dot([x[0], s.w, s.v]), "multi_dot with w"),
    "vector": (lambda s, x: torch.mv(s.w, x[0, 0]), "mv with w"),
    "distances": (lambda s, x: torch.cdist(x, s.w), "cdist with w"),
    "convolution": (lambda s, x: F.conv1d(x.mT, 2 * s.w[..., None]), "conv1d with w"),
    "buffer": (lambda s, x: F.linear(x, s.table), "linear with table"),
    "operator": (lambda s, x: torch.ops.aten.mm(x[0], s.w), "mm with w"),
    "own function": (lambda s, x: Twice.apply(x, s.w), "matmul with w"),
    "vmap": (lambda s, x: torch.vmap(lambda row: row @ s.w)(x), "with w"),
}


@pytest.mark.parametrize("kind", NAMED)
def test_what_multiplies_is_named(kind: str) -> None:
    with pytest.warns(UserWarning, match="left in floating point") as caught:
        quantized = quantize(Box(kind).eval(), w_bits=8, a_bits=8, calibration=data(2, 5, 8))
    assert any(NAMED[kind][1] in line for line in left_out(quantized)), left_out(quantized)
    assert any(NAMED[kind][1] in str(warning.message) for warning in caught)


QUIET = {
    "root mean square": lambda s, x: s.table[0] * x * (x * x).mean(-1, keepdim=True).rsqrt(),
    "layer norm by hand": lambda s, x: (x - x.mean(-1, keepdim=True)) / (x - 1).pow(2).mean(-1, keepdim=True).sqrt(),
    "mean over a mask": lambda s, x: (x * (torch.arange(5) < 3).float()[:, None]).sum(1),
    "scaled channels, mean over tokens": lambda s, x: (x * s.table[0]).mean(1),
    "gate of a channel, mean over tokens": lambda s, x: (x * x.mean(1, keepdim=True).sigmoid()).mean(1),
    "softmax by hand": lambda s, x: x.exp() / x.exp().sum(-1, keepdim=True),
    "normalized": lambda s, x: F.normalize(x, dim=-1),
    "outer product of positions": lambda s, x: (s.table[0][:, None] @ torch.arange(4.0)[None]).cos(),
}


@pytest.mark.parametrize("kind", QUIET)
def test_what_only_scales_or_normalizes_is_not_named(kind: str, monkeypatch) -> None:
    monkeypatch.setitem(NAMED, kind, (QUIET[kind], ""))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert left_out(quantize(Box(kind).eval(), w_bits=8, a_bits=8, calibration=data(2, 5, 8))) == []


def test_an_einsum_of_a_list_in_an_attention_is_quantized() -> None:
    class Listed(Attention):
        def scores(self, q: Tensor, k: Tensor) -> Tensor:
            return torch.einsum("bqd,bkd->bqk", [q, k]) / 4

    model, x = Listed().eval(), data(4, 6, 16)
    quantized = quantize(model, w_bits=32, a_bits=4, calibration=x)
    assert [site.kind for site in products(quantized).values()] == ["qk", "pv"] and left_out(quantized) == []
    by_hand = quantize(Attention().eval(), w_bits=32, a_bits=4, calibration=x)
    torch.testing.assert_close(quantized(x), by_hand(x))


def test_products_of_modules_inside_an_attention_are_not_its_own() -> None:
    class Positions(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("table", data(6, 16))

        def forward(self, q: Tensor, long: bool) -> Tensor:
            bias = q @ self.table.T
            return bias @ torch.eye(6) if long else bias  # one product more than in calibration

    class Relative(Attention):
        def __init__(self) -> None:
            super().__init__()
            self.positions = Positions()

        def forward(self, x: Tensor) -> Tensor:
            q, k, v = self.qkv(x).chunk(3, -1)
            return self.out((self.scores(q, k) + self.positions(q, len(x) == 1)).softmax(-1) @ v)

    model, x = Relative().eval(), data(4, 6, 16)
    with pytest.warns(UserWarning, match=r"no attention, in positions \(Positions\)"):
        quantized = quantize(model, w_bits=8, a_bits=8, calibration=x)
    assert [site.kind for site in products(quantized).values()] == ["qk", "pv"]
    for test in (x, x[:1]):
        with torch.no_grad():
            assert 0 < error(quantized(test), model(test)) < 1e-2


def scaled_forward(self: Attention, x: Tensor) -> Tensor:
    return 2 * Attention.forward(self, x)


def wrapped(module: nn.Module) -> None:
    old = module.forward

    def forward(*args):
        return 2 * old(*args)

    module.forward = forward


def partially(module: nn.Module) -> None:
    module._old_forward = module.forward
    module.forward = functools.partial(lambda m, *args: 2 * m._old_forward(*args), module)


PATCHES = {
    "method": lambda m: setattr(m, "forward", types.MethodType(scaled_forward, m)),
    "function around it": wrapped,
    "partial": partially,
}


@pytest.mark.parametrize("patch", PATCHES)
def test_a_forward_of_an_instance_is_followed(patch: str) -> None:
    model, x = nn.Sequential(Attention()).eval(), data(4, 6, 16)
    PATCHES[patch](model[0])
    quantized = quantize(model, w_bits=8, a_bits=8, calibration=x)
    assert [site.kind for site in products(quantized).values()] == ["qk", "pv"]
    again = copy.deepcopy(quantized)
    with torch.no_grad():
        expected, rounded = model(x), quantized(x)
        assert 0 < error(rounded, expected) < 1e-2
        for parameter in quantized.parameters():
            parameter.zero_()
        # Each runs its own weights.
        assert torch.equal(model(x), expected) and torch.equal(again(x), rounded) and not quantized(x).any()


def test_a_layer_with_a_forward_of_its_instance_is_named() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)).eval()
    wrapped(model[0])
    model[1].forward = types.MethodType(nn.Linear.forward, model[1])  # the class's own is none of its own
    with pytest.warns(UserWarning, match=r"0 \(Linear\) has a forward of its own"):
        quantized = quantize(model, w_bits=8, a_bits=8, calibration=data(4, 8))
    assert list(quantized_layers(quantized)) == ["1"]


def test_hooks_of_accelerate_that_only_move_tensors_do_not_hide_layers() -> None:
    hooks = pytest.importorskip("accelerate.hooks")
    model, x = nn.Sequential(Attention()).eval(), data(4, 6, 16)
    expected = quantize(model, w_bits=8, a_bits=8, calibration=x)
    for module in (model[0], model[0].qkv, model[0].out):
        hooks.add_hook_to_module(module, hooks.AlignDevicesHook(execution_device="cpu"))
    quantized = quantize(model, w_bits=8, a_bits=8, calibration=x)
    assert list(sites(quantized)) == list(sites(expected)) and torch.equal(quantized(x), expected(x))
    assert "_hf_hook" in model[0].__dict__  # the argument keeps its own


class TakesMapping(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(6, 3)

    def forward(self, batch: dict) -> Tensor:
        return self.fc(batch["x"]) * batch.get("scale", 1.0)


@pytest.mark.parametrize("listed", [True, False])
def test_a_model_may_take_a_mapping(listed: bool) -> None:
    model, x = TakesMapping().eval(), data(40, 6)
    batch = ({"x": x, "scale": 2.0},)
    quantized = quantize(model, w_bits=8, a_bits=8, calibration=[batch] if listed else batch)
    assert 0 < error(quantized(*batch), model(*batch)) < 1e-3
    with pytest.raises(ValueError, match="calibration set is empty"):
        quantize(model, w_bits=8, a_bits=8, calibration=[({"scale": 2.0},)])
    with pytest.raises(ValueError, match="NaN or infinity"):
        quantize(model, w_bits=8, a_bits=8, calibration=[({"x": x * torch.nan},)])


@pytest.mark.parametrize("count", [4, 6])  # six items of six tokens: the mask is no set of items
def test_a_mask_may_hide_by_minus_infinity(count: int) -> None:
    model, x = Attention().eval(), data(count, 6, 16)
    mask = nn.Transformer.generate_square_subsequent_mask(6)
    quantized = quantize(model, w_bits=8, a_bits=8, calibration=[(x, mask)])
    with torch.no_grad():
        assert 0 < error(quantized(x, mask), model(x, mask)) < 1e-2
    wrong = x.clone()
    wrong[0, 0, 0] = -torch.inf
    with pytest.raises(ValueError, match="calibration set holds NaN or infinity"):
        quantize(model, w_bits=8, a_bits=8, calibration=[(wrong, mask)])


def test_pruned_layers_keep_their_zeros() -> None:
    model, x = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4)).eval(), data(40, 8)
    for name, layer in (("l1", model[0]), ("random", model[2])):
        getattr(prune, f"{name}_unstructured")(layer, "weight", amount=0.5)
    quantized = quantize(model, w_bits=8, a_bits=8, calibration=x)
    assert list(quantized_layers(quantized)) == ["0", "2"]
    assert error(quantized(x), model(x)) < 1e-3
    for i in (0, 2):
        assert torch.equal(quantized[i].weight == 0, model[i].weight == 0)
    assert (model[0].weight == 0).sum() == 32 and hasattr(model[0], "weight_orig")


@pytest.mark.parametrize("make", [parametrizations.spectral_norm, parametrizations.orthogonal, nn.utils.spectral_norm])
def test_a_computed_weight_is_quantized_as_it_is(make) -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(make(nn.Linear(8, 8))).eval(), data(40, 8)
    expected = model(x)
    quantized = quantize(model, w_bits=8, a_bits=8, calibration=x)
    assert left_out(quantized) == [] and 0 < error(quantized(x), expected) < 1e-3


@pytest.mark.parametrize("where", ["whole", "part", "in place"])
def test_a_compiled_model_is_quantized_as_what_it_was_compiled_from(where: str) -> None:
    model, x = nn.Sequential(nn.Linear(6, 8), nn.Sequential(nn.GELU(), nn.Linear(8, 3))).eval(), data(40, 6)
    expected = quantize(model, w_bits=8, a_bits=8, calibration=x)
    if where == "whole":
        given = torch.compile(model)
    elif where == "part":
        given = nn.Sequential(model[0], torch.compile(model[1]))
    else:
        given = copy.deepcopy(model)
        given.compile()
    quantized = quantize(given, w_bits=8, a_bits=8, calibration=x)
    assert list(sites(quantized)) == list(sites(expected)) and torch.equal(quantized(x), expected(x))


def test_tensors_that_a_computation_left_behind_are_copied_by_value() -> None:
    model, x = Attention().eval(), data(4, 6, 16)
    model.last = model(x)
    model.kept = {"scores": [2 * model.last, model.last]}
    assert not model.last.is_leaf
    quantized = quantize(model, w_bits=8, a_bits=8, calibration=x)
    assert torch.equal(quantized.last, model.last) and quantized.last.is_leaf
    assert quantized.kept["scores"][1] is quantized.last and quantized.last is not model.last


def test_one_attention_of_torch_under_two_names_is_quantized_in_both() -> None:
    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.MultiheadAttention(16, 2, batch_first=True)
            self.b = self.a

        def forward(self, x: Tensor) -> Tensor:
            return self.b(x, x, x)[0] + self.a(x, x, x)[0]

    quantized = quantize(Both().eval(), w_bits=8, a_bits=8, calibration=data(4, 6, 16))
    assert quantized.a is quantized.b and {"a.in_proj", "a.out_proj"} < set(sites(quantized))


def test_an_output_of_nothing_but_zeros_is_named() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 2))
    nn.init.zeros_(model[1].weight), nn.init.zeros_(model[1].bias)
    with pytest.warns(UserWarning, match="Sequential gives nothing but zeros .* load or initialise its last layer"):
        quantize(model, w_bits=8, a_bits=8, calibration=data(4, 8))


def test_a_hierarchical_vision_transformer_is_close() -> None:
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    model = timm.create_model("hieradet_small", num_classes=5, embed_dim=16, stages=(1, 1, 1, 1)).eval()
    nn.init.normal_(model.head.fc.weight)  # timm starts it at zero
    x = data(2, 3, 128, 128)
    quantized = quantize(model, w_bits=8, a_bits=8, calibration=x)
    with torch.no_grad():
        assert 0 < error(quantized(x), model(x)) < 2e-2
    assert left_out(quantized) == [] and len(products(quantized)) == 8


def test_a_model_without_values_is_refused() -> None:
    with torch.device("meta"):
        model = Attention()
    with pytest.raises(ValueError, match="qkv.weight is on the meta device, without values: load"):
        quantize(model, w_bits=8, a_bits=8, calibration=data(2, 6, 16))


# --- pickle and copies ---------------------------------------------------------------------------------------------


def quantized_attention(**options) -> tuple[nn.Module, Tensor]:
    x = data(4, 6, 16)
    model = nn.Sequential(Attention(), nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)).eval()
    PATCHES["method"](model[0])
    return quantize(model, w_bits=4, a_bits=4, calibration=x, **options), x


def saved_and_loaded(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("through", [lambda m: pickle.loads(pickle.dumps(m)), copy.deepcopy, saved_and_loaded])
def test_a_quantized_model_survives_pickle_and_copy(through, method: str) -> None:
    quantized, x = quantized_attention(method=method)
    again = through(quantized)
    assert type(again[0]) is type(quantized[0]) and isinstance(again[0], Attention)
    with torch.no_grad():
        expected = quantized(x)
        assert torch.equal(again(x), expected)
        for parameter in quantized.parameters():
            parameter.zero_()
        assert torch.equal(again(x), expected)  # nothing is shared


def run_in_another_process(model: nn.Module, x: Tensor, results) -> None:
    with torch.no_grad():
        results.put(model(x).tolist())


def test_a_quantized_model_goes_to_another_process() -> None:
    quantized, x = quantized_attention()
    context = torch.multiprocessing.get_context("spawn")
    results = context.Queue()
    worker = context.Process(target=run_in_another_process, args=(quantized, x, results))
    worker.start()
    found = results.get(timeout=600)
    worker.join()
    with torch.no_grad():
        torch.testing.assert_close(torch.tensor(found), quantized(x))


# --- half precision and meta ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("method", METHODS)
def test_half_precision_before_and_after(method: str, dtype: torch.dtype) -> None:
    model, x = Attention().eval(), data(8, 6, 16)
    with torch.no_grad():
        expected = model(x)
        before = quantize(copy.deepcopy(model).to(dtype), method=method, w_bits=8, a_bits=8, calibration=x.to(dtype))
        after = quantize(model, method=method, w_bits=8, a_bits=8, calibration=x).to(dtype)
        for found in (before(x.to(dtype)), after(x.to(dtype))):
            assert found.dtype == dtype and error(found.float(), expected) < 5e-3
    for quantizer in (module for module in after.modules() if isinstance(module, Quantizer)):
        assert all(grid.dtype == torch.float32 for grid in quantizer.state_dict().values())


def test_small_steps_survive_half_precision() -> None:
    x = data(40, 4) * 1e-6
    quantized = quantize(nn.Linear(4, 2), w_bits=8, a_bits=8, calibration=x).half()
    assert 0 < quantized.input_quantizer.scale < 1e-7
    assert torch.isfinite(quantized(x.half())).all()


def test_a_state_dict_is_assigned_to_a_copy_on_meta() -> None:
    quantized, x = quantized_attention(method="ptq4vit")
    empty = copy.deepcopy(quantized).to("meta")
    empty.load_state_dict(quantized.state_dict(), assign=True)
    with torch.no_grad():
        assert torch.equal(empty.to("cpu")(x), quantized(x))


def test_copies_share_nothing_and_leave_the_original_alone() -> None:
    model = nn.Sequential(torch.compile(nn.Linear(4, 4)), nn.Linear(4, 4))
    model[1].weight = model[0]._orig_mod.weight
    copied = independent_copy(model)
    assert type(copied[0]) is nn.Linear and copied[0].weight is copied[1].weight
    assert copied[0].weight is not model[1].weight and type(model[0]) is not nn.Linear


def test_prepare_leaves_no_hook_on_the_original() -> None:
    model = Attention().eval()
    prepare(model, data(2, 6, 16))
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
