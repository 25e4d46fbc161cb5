"""PTQ4ViT against plain loops over the same candidates, with gradients from a forward pass written out by hand."""

from __future__ import annotations

import sys
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from s2d.ptq.calibrate import split_batches
from s2d.ptq.prepare import prepare
from s2d.ptq.ptq4vit import FACTORS, base_ptq, label_loss, per_head, ptq4vit, race
from s2d.ptq.quantizers import AffineQuantizer
from s2d.ptq.sites import products, quantized_layers, set_mode, sites
from s2d.ptq.twin_uniform import (
    TwinUniformGELU,
    TwinUniformSoftmax,
    gelu_parts,
    has_long_tail,
    tail_parts,
    tail_steps,
    twin_gelu,
    twin_tail,
)

WIDTH, HEADS, TOKENS, CLASSES = 8, 2, 5, 3
GELU_LOW = 0.16997124254703522
NEAREST_TO_1 = 0.9977  # of the factors: what the search starts with


def data(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


class Transformer(nn.Module):
    """One attention, one MLP and a head: everything that a method meets, small enough to loop over."""

    def __init__(self, *, bias: bool = True) -> None:
        super().__init__()
        self.patches = nn.Conv1d(4, WIDTH, 3, stride=2, groups=2, bias=bias)
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH, bias=bias)
        self.proj = nn.Linear(WIDTH, WIDTH, bias=bias)
        self.fc1, self.fc2 = nn.Linear(WIDTH, 2 * WIDTH, bias=bias), nn.Linear(2 * WIDTH, WIDTH, bias=bias)
        self.act, self.norm, self.head = nn.GELU(), nn.LayerNorm(WIDTH), nn.Linear(WIDTH, CLASSES, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).transpose(1, 2)
        q, k, v = self.qkv(self.norm(x)).unflatten(-1, (3, HEADS, -1)).movedim(2, 0).transpose(-2, -3)
        x = x + self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return self.head((x + self.fc2(self.act(self.fc1(self.norm(x))))).mean(1))


def transformer(seed: int = 0, *, bias: bool = True) -> Transformer:
    torch.manual_seed(seed)
    model = Transformer(bias=bias).double().eval()
    with torch.no_grad():  # scales that differ by part and by head
        model.qkv.weight.mul_(torch.tensor([1.0, 4.0, 0.1]).repeat_interleave(WIDTH)[:, None].double())
        model.qkv.weight[:4].mul_(5)
        model.qkv.weight[-4:].mul_(9)
    return model


IMAGES = data(6, 4, 2 * TOKENS + 1, seed=5)


def by_hand(model: Transformer, images: Tensor) -> dict[str, list[Tensor]]:
    """For each site ``[input or left, right, gradient]``, without any of the package's own machinery."""
    kept: dict[str, list[Tensor]] = {}

    def note(name: str, left: Tensor, right: Tensor, output: Tensor) -> Tensor:
        output.retain_grad()
        kept[name] = [left.detach(), right.detach(), output]
        return output

    def linear(name: str, x: Tensor) -> Tensor:
        layer = getattr(model, name)
        return note(name, x, layer.weight.mT, F.linear(x, layer.weight, layer.bias))

    x = note("patches", images, model.patches.weight, model.patches(images)).transpose(1, 2)
    q, k, v = linear("qkv", model.norm(x)).split(WIDTH, -1)
    q, k, v = (t.unflatten(-1, (HEADS, -1)).transpose(1, 2) for t in (q, k, v))
    q = q / (WIDTH // HEADS) ** 0.5  # before the product, as torch does it
    scores = note("qk_product", q, k.mT, q @ k.mT)
    probabilities = scores.softmax(-1)
    x = x + linear("proj", note("pv_product", probabilities, v, probabilities @ v).transpose(1, 2).flatten(2))
    x = x + linear("fc2", F.gelu(linear("fc1", model.norm(x))))
    output = linear("head", x.mean(1))
    noise = torch.randn(output.shape, generator=torch.Generator().manual_seed(0))
    (output * noise).sum().backward()
    return {name: [left, right, output.grad] for name, (left, right, output) in kept.items()}


def rounded(x: Tensor, scale: Tensor | float, bits: int) -> Tensor:
    return torch.clamp(torch.round(x / scale), -(2 ** (bits - 1)), 2 ** (bits - 1) - 1) * scale


def rounded_gelu(x: Tensor, scale: Tensor | float, bits: int) -> Tensor:
    levels = 2 ** (bits - 1)
    low = torch.clamp(torch.round(x / (GELU_LOW / levels)), -levels, 0) * (GELU_LOW / levels)
    return low + torch.clamp(torch.round(x / scale), 0, levels - 1) * scale


def rounded_softmax(x: Tensor, split: float, bits: int) -> Tensor:
    last = 2 ** (bits - 1) - 1
    grid = torch.cat([torch.arange(last + 1) * split / last, torch.arange(last + 1) / last]).double()
    return grid[(x[..., None] - grid).abs().argmin(-1)]


def start(x: Tensor, bits: int) -> float:
    return float(x.abs().max()) / (2 ** (bits - 1) - 0.5)


def first_of_the_least(errors: list[float]) -> int:
    return next(i for i, error in enumerate(errors) if error <= min(errors) * 1.0001)


def winner(error) -> int:
    return first_of_the_least([float(error(c)) for c in FACTORS])


def best_scale(x: Tensor, first: float, other: Tensor, y: Tensor, g: Tensor, bits: int, quantize=rounded) -> float:
    """Of ``c * first``, the scale of x with which its product with ``other`` is nearest to y."""
    return FACTORS[winner(lambda c: ((y - quantize(x, c * first, bits) @ other) * g).square().sum())] * first


def search_linear(x: Tensor, w: Tensor, g: Tensor, bits: int, parts: int, quantize=rounded) -> tuple[list, float]:
    """Scales of the parts of the weight ``(K, out)``, and of the input."""
    blocks, g_blocks = w.chunk(parts, 1), g.chunk(parts, -1)
    positive = x.clamp(min=0) if quantize is rounded_gelu else x
    w_start, x_start = [start(block, bits) for block in blocks], start(positive, bits)
    w_scale, x_scale = [], NEAREST_TO_1 * x_start
    for _ in range(3):
        xq = quantize(x, x_scale, bits)
        w_scale = [
            best_scale(block.mT, first, xq.mT, (x @ block).mT, weight.mT, bits)
            for block, first, weight in zip(blocks, w_start, g_blocks, strict=True)
        ]
        wq = torch.cat([rounded(block, s, bits) for block, s in zip(blocks, w_scale, strict=True)], 1)
        x_scale = best_scale(x, x_start, wq, x @ w, g, bits, quantize)
    return w_scale, x_scale


def search_product(left: Tensor, right: Tensor, g: Tensor, bits: int) -> tuple[list, list]:
    """Scales of every head of both factors."""
    a_scales, b_scales = [], []
    for h in range(left.shape[1]):
        a, b, y, weight = left[:, h], right[:, h], left[:, h] @ right[:, h], g[:, h]
        a_start, b_start = start(a, bits), start(b, bits)
        b_scale = NEAREST_TO_1 * b_start
        for _ in range(3):
            a_scale = best_scale(a, a_start, rounded(b, b_scale, bits), y, weight, bits)
            b_scale = best_scale(b.mT, b_start, rounded(a, a_scale, bits).mT, y.mT, weight.mT, bits)
        a_scales.append(a_scale)
        b_scales.append(b_scale)
    return a_scales, b_scales


def best_split(p: Tensor, other: Tensor, y: Tensor, g: Tensor, bits: int) -> float:
    splits = [2.0**-i for i in range(20)]
    return splits[
        first_of_the_least([float(((y - rounded_softmax(p, s, bits) @ other) * g).square().sum()) for s in splits])
    ]


def search_mix(p: Tensor, v: Tensor, g: Tensor, bits: int) -> tuple[float, list]:
    """The split of the probabilities, and the scale of every head of the values."""
    starts = [start(v[:, h], bits) for h in range(HEADS)]
    scales, split, y = [NEAREST_TO_1 * first for first in starts], 1.0, p @ v
    for _ in range(3):
        vq = torch.stack([rounded(v[:, h], scales[h], bits) for h in range(HEADS)], 1)
        split = best_split(p, vq, y, g, bits)
        pq = rounded_softmax(p, split, bits)
        scales = [best_scale(v[:, h].mT, starts[h], pq[:, h].mT, y[:, h].mT, g[:, h].mT, bits) for h in range(HEADS)]
    return split, scales


def quantized(model: nn.Module, images, method=ptq4vit, bits: int = 4, a_bits: int | None = None, batch: int = 32, **o):
    batches = split_batches(images, batch)
    result = prepare(model, batches)
    method(result, batches, w_bits=bits, a_bits=bits if a_bits is None else a_bits, **o)
    return result


def scale_of(quantizer) -> list[float]:
    return quantizer.scale.flatten().tolist()


# --- the search against loops ---


@pytest.mark.parametrize(("bits", "bias"), [(3, True), (4, False), (8, True)])
def test_every_scale_is_the_winner_of_plain_loops(bits: int, bias: bool) -> None:
    model = transformer(bits, bias=bias)
    found, seen = quantized(model, IMAGES, bits=bits, rows=None), by_hand(model, IMAGES)
    for name, parts in (("qkv", 3), ("proj", 1), ("fc1", 1), ("fc2", 1), ("head", 1)):
        site = getattr(found, name)
        w_scale, x_scale = search_linear(*seen[name], bits, parts, rounded_gelu if name == "fc2" else rounded)
        assert scale_of(site.input_quantizer) == pytest.approx([x_scale]), name
        per_row = [scale for scale in w_scale for _ in range(len(site.weight) // parts)]
        assert scale_of(site.weight_quantizer) == pytest.approx(per_row), name
    a_scales, b_scales = search_product(*seen["qk_product"], bits)
    assert scale_of(found.qk_product.left_quantizer) == pytest.approx(a_scales)
    assert scale_of(found.qk_product.right_quantizer) == pytest.approx(b_scales)
    split, scales = search_mix(*seen["pv_product"], bits)
    assert float(found.pv_product.left_quantizer.split) == split
    assert scale_of(found.pv_product.right_quantizer) == pytest.approx(scales)


@pytest.mark.parametrize("bits", [3, 6])
def test_base_ptq_is_plain_loops_with_plain_errors_and_uniform_grids(bits: int) -> None:
    model = transformer(bits)
    found, seen = quantized(model, IMAGES, base_ptq, bits, rows=None), by_hand(model, IMAGES)
    for name, parts in (("qkv", 3), ("fc2", 1)):
        x, w, g = seen[name]
        w_scale, x_scale = search_linear(x, w, torch.ones_like(g), bits, parts)
        assert scale_of(getattr(found, name).input_quantizer) == pytest.approx([x_scale])
        per_row = [scale for scale in w_scale for _ in range(w.shape[1] // parts)]
        assert scale_of(getattr(found, name).weight_quantizer) == pytest.approx(per_row)
    for name in ("qk_product", "pv_product"):
        left, right, g = seen[name]
        a_scales, b_scales = search_product(left, right, torch.ones_like(g), bits)
        assert scale_of(getattr(found, name).left_quantizer) == pytest.approx(a_scales)
        assert scale_of(getattr(found, name).right_quantizer) == pytest.approx(b_scales)


@pytest.mark.parametrize(("method", "bits", "bias"), [(ptq4vit, 4, False), (base_ptq, 3, True)])
def test_rounding_decides_nothing(method, bits: int, bias: bool) -> None:
    """A change of the images by rounding, as another kernel makes it in every sum, changes no scale by more."""
    model = transformer(bits, bias=bias)
    plain = quantized(model, IMAGES, method, bits, rows=None).state_dict()
    for seed in range(8):
        noise = 1 + 1e-15 * data(*IMAGES.shape, seed=seed)
        moved = quantized(model, IMAGES * noise, method, bits, rows=None).state_dict()
        for name, expected in plain.items():
            torch.testing.assert_close(moved[name], expected, rtol=1e-9, atol=1e-12, msg=name)


@pytest.mark.parametrize("method", [ptq4vit, base_ptq])
def test_a_grouped_convolution_has_the_best_scale_of_every_channel(method) -> None:
    model = transformer(1)
    found, (images, w, g) = quantized(model, IMAGES, method, rows=None), by_hand(model, IMAGES)["patches"]
    g = g if method is ptq4vit else torch.ones_like(g)
    site = found.patches
    expected = []
    for channel in range(WIDTH):
        group = slice(0, 2) if channel < WIDTH // 2 else slice(2, 4)
        first = start(w[channel], 4)

        def error(c: float, channel=channel, group=group, first=first) -> Tensor:
            wrong = w[channel] - rounded(w[channel], c * first, 4)
            return (F.conv1d(images[:, group], wrong[None], stride=2)[:, 0] * g[:, channel]).square().sum()

        expected.append(FACTORS[winner(error)] * first)
    assert scale_of(site.weight_quantizer) == pytest.approx(expected)
    assert site.weight_quantizer.scale.shape == (WIDTH, 1, 1)
    assert site.input_quantizer is None


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (nn.Conv2d(2, 3, 2, padding=1, dilation=2, padding_mode="reflect"), (2, 2, 5, 5)),
        (nn.Conv3d(1, 2, 2, bias=False), (2, 1, 3, 3, 3)),
    ],
)
def test_convolutions_of_other_kinds(layer: nn.Module, shape: tuple[int, ...]) -> None:
    model, images = layer.double(), data(*shape)
    found, w = quantized(model, images, base_ptq, bits=3), layer.weight.detach()
    first = w.flatten(1).abs().amax(1) / 3.5

    def error(c: float, channel: int) -> Tensor:
        wrong = torch.zeros_like(w)
        wrong[channel] = w[channel] - rounded(w[channel], c * first[channel], 3)
        return layer._conv_forward(images, wrong, None).square().sum()

    expected = [FACTORS[winner(partial(error, channel=i))] * float(first[i]) for i in range(len(w))]
    assert scale_of(found.weight_quantizer) == pytest.approx(expected)


def test_weights_per_channel() -> None:
    model = transformer(2)
    x, w, g = by_hand(model, IMAGES)["fc1"]
    site = quantized(model, IMAGES, rows=None, weights="per_channel").fc1
    w_scale, x_scale = search_linear(x, w, g, 4, w.shape[1])
    assert scale_of(site.weight_quantizer) == pytest.approx(w_scale)
    assert scale_of(site.input_quantizer) == pytest.approx([x_scale])


def test_the_race_has_the_winner_of_the_full_sums() -> None:
    for seed in range(50):
        errors = data(12, 100, 3, seed=seed).exp() * data(12, 1, 1, seed=seed + 99).exp()
        if seed % 5 == 0:
            errors[:, 40:60] = 0  # ties: the first wins
        factor = per_head(data(2, 3, 2, 2), 4)
        blocks = [slice(0, 1), slice(1, 3), slice(3, 12)]
        asked = []

        def look_up(candidates: Tensor, block: slice, errors=errors, asked=asked) -> Tensor:
            asked.append(len(candidates) * len(errors[block]))
            return errors[block][:, candidates].sum(0)

        expected = [first_of_the_least(column) for column in errors.sum(0).T.tolist()]
        assert race(factor, look_up, blocks).tolist() == expected
        assert seed % 5 or sum(asked) < 1200  # not all of them to the end


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("tail", [False, True])
def test_products_of_codes_choose_what_products_of_floats_do(
    bits: int, tail: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    module, model, x = sys.modules["s2d.ptq.ptq4vit"], transformer(bits), IMAGES
    if tail:
        model, x = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 3)).double().eval(), data(600, 8)
        x[0] *= 100
        assert has_long_tail(model[:2](x))
    found = [quantized(model, x, bits=bits).state_dict()]
    monkeypatch.setattr(module, "KEPT_BYTES", 0)
    found.append(quantized(model, x, bits=bits).state_dict())
    monkeypatch.setattr(module, "multiplies_codes", lambda device: False)
    found.append(quantized(model, x, bits=bits).state_dict())
    for other in found[:2]:
        for name, expected in found[2].items():
            assert torch.equal(other[name], expected), name


@pytest.mark.parametrize("bits", range(2, 9))
def test_codes_times_steps_are_the_twin_grids(bits: int) -> None:
    x = F.gelu(4 * data(500, seed=bits))
    split, largest = torch.tensor([[1.0], [2.0]]).double(), x.amax()
    pairs = [(gelu_parts(x, split / 9, bits), twin_gelu(x, split / 9, bits))]
    if bits < 8:
        steps = tail_steps(split, largest, bits)
        pairs.append((tail_parts(x, *steps, bits), twin_tail(x, *steps, bits)))
    for parts, expected in pairs:
        assert all(codes.dtype == torch.int8 for codes, _ in parts)
        assert torch.allclose(sum(codes * steps for codes, steps in parts), expected, atol=1e-12)


# --- what is quantized how ---


def test_twin_quantizers_stand_after_gelu_and_after_softmax_only() -> None:
    found = quantized(transformer(), IMAGES, bits=5)
    assert isinstance(found.fc2.input_quantizer, TwinUniformGELU)
    assert isinstance(found.pv_product.left_quantizer, TwinUniformSoftmax)
    for name, site in sites(found).items():
        others = [q for q in site.quantizers().values() if not isinstance(q, (TwinUniformGELU, TwinUniformSoftmax))]
        assert len(others) == {"fc2": 1, "pv_product": 1, "patches": 1}.get(name, 2)
        assert all(type(q) is AffineQuantizer and (q.q_min, q.q_max) == (-16, 15) for q in others)
    base = quantized(transformer(), IMAGES, base_ptq)
    assert all(type(q) is AffineQuantizer for site in sites(base).values() for q in site.quantizers().values())


def test_an_input_transform_stands_between_gelu_and_the_layer() -> None:
    model = prepare(transformer(), IMAGES)
    with torch.no_grad():
        model.fc2.input_transform = lambda x: x.flip(-1)
        model.fc2.weight.copy_(model.fc2.weight.flip(-1))
    ptq4vit(model, [IMAGES], w_bits=4, a_bits=4)
    assert type(model.fc2.input_quantizer) is AffineQuantizer


def test_one_side_alone() -> None:
    model = transformer()
    weights = quantized(model, IMAGES, bits=3, a_bits=16)
    assert all(list(site.quantizers()) == ["weight_quantizer"] for site in quantized_layers(weights).values())
    assert not any(site.quantizers() for site in products(weights).values())
    x, w, g = by_hand(model, IMAGES)["proj"]
    first = start(w, 3)
    best = winner(lambda c: (x @ (w - rounded(w, c * first, 3)) * g).square().sum())
    assert scale_of(weights.proj.weight_quantizer) == pytest.approx([FACTORS[best] * first] * WIDTH)

    inputs = quantized(model, IMAGES, bits=32, a_bits=3)
    assert not any("weight_quantizer" in site.quantizers() for site in quantized_layers(inputs).values())
    assert torch.equal(inputs.proj.weight, model.proj.weight)
    first = start(x, 3)
    best = winner(lambda c: ((x - rounded(x, c * first, 3)) @ w * g).square().sum())
    assert scale_of(inputs.proj.input_quantizer) == pytest.approx([FACTORS[best] * first])

    neither = quantized(model, IMAGES, bits=16, a_bits=32)
    assert not any(site.quantizers() for site in sites(neither).values())


@pytest.mark.parametrize("method", [ptq4vit, base_ptq])
@pytest.mark.parametrize("weights", ["per_tensor", "per_channel"])
def test_weights_are_fixed_points_and_more_bits_are_better(method, weights: str) -> None:
    model, errors = transformer(3), []
    with torch.no_grad():
        expected = model(IMAGES)
        for bits in (3, 5, 8):
            found = quantized(model, IMAGES, method, bits, weights=weights)
            for site in quantized_layers(found).values():
                assert torch.equal(site.weight_quantizer(site.weight), site.weight)
            set_mode(found, "quantized")
            errors.append(float((found(IMAGES) - expected).square().mean()))
    assert errors[0] > 3 * errors[1] > 30 * errors[2]


def test_batches_make_no_difference() -> None:
    whole, cut = quantized(transformer(), IMAGES, base_ptq), quantized(transformer(), IMAGES, base_ptq, batch=2)
    assert torch.equal(whole(IMAGES), cut(IMAGES))


def test_half_precision_is_searched_in_float32() -> None:
    model, images = transformer().to(torch.bfloat16), IMAGES.to(torch.bfloat16)
    found = quantized(model, images)
    assert found.qkv.weight.dtype == torch.bfloat16 and found.qkv.weight_quantizer.scale.dtype == torch.float32
    set_mode(found, "quantized")
    with torch.no_grad():
        assert torch.isfinite(found(images)).all()


# --- rows ---


def test_rows_bounds_what_the_search_looks_at() -> None:
    model, n = transformer(), len(IMAGES) * TOKENS
    everything = [quantized(model, IMAGES, rows=rows).state_dict() for rows in (None, n, 10 * n)]
    few = [quantized(model, IMAGES, rows=rows).state_dict() for rows in (7, 7, 1)]
    for name, expected in everything[0].items():
        assert all(torch.equal(other[name], expected) for other in everything[1:])
        assert torch.equal(few[0][name], few[1][name])
    assert any(not torch.equal(few[0][name], everything[0][name]) for name in few[0])


def test_rows_without_a_gradient_are_not_chosen() -> None:
    class First(nn.Module):  # only the first token of each image counts
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(WIDTH, 4).double()

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(x)[:, 0]

    model, x = First(), data(8, 2, WIDTH)
    few, everything = (quantized(model, x, rows=rows).fc for rows in (8, None))
    assert torch.equal(few.weight, everything.weight)
    assert torch.equal(few.input_quantizer.scale, everything.input_quantizer.scale)


# --- nothing to go by ---


class Muted(nn.Module):
    """Its outputs are multiplied by factors that may be 0, or have an infinite slope."""

    def __init__(self, factors: Tensor, *, root: bool = False) -> None:
        super().__init__()
        self.qkv, self.factors, self.root = nn.Linear(4, 6).double(), factors.double(), root

    def forward(self, x: Tensor) -> Tensor:
        y = self.qkv(x)
        return ((y - y.detach()).abs().sqrt() if self.root else y) * self.factors


@pytest.mark.parametrize(("factor", "root"), [(0.0, False), (1.0, True)])
def test_without_a_usable_gradient_plain_errors_decide(factor: float, root: bool) -> None:
    torch.manual_seed(0)
    model, x = Muted(torch.full((6,), factor), root=root), data(20, 4)
    found, base = quantized(model, x).qkv, quantized(model, x, base_ptq).qkv
    assert torch.equal(found.weight, base.weight)
    assert torch.equal(found.input_quantizer.scale, base.input_quantizer.scale)
    assert found.weight_quantizer.scale.min() > 0.3 * model.qkv.weight.abs().max() / 7.5


@pytest.mark.parametrize("likelihood", ["gaussian", "categorical"])
def test_an_output_without_a_graph(likelihood: str) -> None:
    class Detached(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(4, 3).double()

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(x).detach()

    model, x = Detached(), data(20, 4)
    found, base = quantized(model, x, likelihood=likelihood), quantized(model, x, base_ptq)
    assert torch.equal(found.fc.weight, base.fc.weight)


def test_a_part_without_a_gradient_is_judged_by_plain_errors() -> None:
    torch.manual_seed(0)
    model, x = Muted(torch.tensor([0, 0, 1.0, 1e-200, 1, 1])), data(20, 4)
    layer = quantized(model, x, a_bits=32).qkv
    w = model.qkv.weight.detach().mT
    for part, muted in ((0, True), (1, False)):
        block = w[:, 2 * part : 2 * part + 2]
        g = torch.randn(20, 6, generator=torch.Generator().manual_seed(0)).double() * model.factors
        g = torch.ones(20, 2).double() if muted else g[:, 2 * part : 2 * part + 2]
        expected = best_scale(block.mT, start(block, 4), x.mT, (x @ block).mT, g.mT, 4)
        assert scale_of(layer.weight_quantizer)[2 * part] == pytest.approx(expected)


def test_a_head_without_a_gradient_is_not_collapsed() -> None:
    model = transformer()
    with torch.no_grad():
        model.proj.weight[:, : WIDTH // HEADS] = 0  # nobody reads the first head
    found = quantized(model, IMAGES, bits=8)
    for product in products(found).values():
        assert min(scale_of(product.right_quantizer)) > 0.3 * product.right_quantizer.scale.max() / 30
        assert (product.right_quantizer.scale > 0.0005).all()


def test_tiny_gradients_do_not_vanish() -> None:
    torch.manual_seed(0)
    normal, x = Muted(torch.ones(6)), data(20, 4)
    tiny = Muted(torch.full((6,), 1e-30))
    tiny.load_state_dict(normal.state_dict())
    expected, found = (quantized(model.float(), x.float()).qkv for model in (normal, tiny))
    assert torch.equal(found.weight, expected.weight)


@pytest.mark.parametrize("method", [ptq4vit, base_ptq])
@pytest.mark.parametrize("images", [IMAGES[:1], torch.zeros_like(IMAGES), torch.ones_like(IMAGES)])
def test_one_image_or_a_constant_one(method, images: Tensor) -> None:
    model = transformer(bias=False)
    for bits in (2, 8):
        found = quantized(model, images, method, bits)
        set_mode(found, "quantized")
        with torch.no_grad():
            assert torch.isfinite(found(IMAGES)).all()


@pytest.mark.parametrize("method", [ptq4vit, base_ptq])
def test_one_row_and_zero_weights(method) -> None:
    model = nn.Sequential(nn.Linear(3, 4, bias=False), nn.GELU(), nn.Linear(4, 2))
    nn.init.zeros_(model[0].weight)
    found = quantized(model, torch.tensor([[1.0, -2.0, 0.0]]), method)
    set_mode(found, "quantized")
    with torch.no_grad():
        assert torch.equal(found(torch.ones(1, 3)), model(torch.ones(1, 3)))


@pytest.mark.parametrize("method", [ptq4vit, base_ptq])
def test_sites_that_the_data_misses_are_named(method) -> None:
    class Branches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.plus, self.minus = nn.Linear(2, 2), nn.Linear(2, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.plus(x) if x.sum() > 0 else self.minus(x)

    model = prepare(Branches(), [torch.ones(2, 2), -torch.ones(2, 2)])
    with pytest.raises(ValueError, match="never reached minus: give data that does"):
        method(model, [torch.ones(4, 2)], w_bits=4, a_bits=4)


# --- products of other kinds ---


class Mixer(nn.Module):
    """An attention by einsum, heads last; weights that need not be probabilities."""

    def __init__(self, *, softmax: bool) -> None:
        super().__init__()
        self.qkv, self.softmax = nn.Linear(WIDTH, 3 * WIDTH).double(), softmax

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, HEADS, -1)).unbind(2)
        scores = torch.einsum("bihd,bjhd->bhij", q, k)
        weights = scores.softmax(-1) if self.softmax else scores.softmax(-1) - 0.01
        return torch.einsum("bhij,bjhd->bihd", weights, v).flatten(2).mean(1)


def test_products_that_are_no_matrix_products_are_judged_by_their_factors() -> None:
    found = quantized(Mixer(softmax=True), data(6, 5, WIDTH), bits=5)
    assert len(products(found)) == 2
    for product in products(found).values():
        assert product.right_quantizer.scale.ndim == 0
    set_mode(found, "quantized")
    with torch.no_grad():
        assert torch.isfinite(found(data(2, 9, WIDTH))).all()  # of another length


def test_own_errors_choose_the_scale_when_the_product_is_unknown() -> None:
    model, x = Mixer(softmax=True), data(6, 5, WIDTH)
    found = quantized(model, x, bits=4)
    with torch.no_grad():
        keys = model.qkv(x)[..., WIDTH : 2 * WIDTH]
    first = start(keys, 4)
    best = winner(lambda c: (keys - rounded(keys, c * first, 4)).square().sum())
    qk = next(site for site in products(found).values() if site.kind == "qk")
    assert scale_of(qk.right_quantizer) == pytest.approx([FACTORS[best] * first])


def test_weights_of_values_outside_of_0_to_1_get_a_uniform_grid() -> None:
    model = prepare(transformer(), IMAGES)
    model.pv_product.kind, model.qk_product.kind = "qk", "pv"  # queries are no probabilities
    ptq4vit(model, [IMAGES], w_bits=4, a_bits=4)
    assert type(model.qk_product.left_quantizer) is AffineQuantizer


# --- the likelihood ---


def test_label_loss_has_the_gradient_of_a_sampled_label() -> None:
    logits = data(4000, 3, dtype=torch.float32)
    logits[:] = torch.tensor([2.0, 0.0, 1.0])
    logits.requires_grad_()
    (gradient,) = torch.autograd.grad(label_loss(logits, torch.Generator().manual_seed(0)), logits)
    labels = (logits.softmax(-1) - gradient).detach()
    assert torch.allclose(labels.sort().values, torch.tensor([0.0, 0.0, 1.0]).expand(4000, 3), atol=1e-5)
    assert torch.allclose(labels.mean(0), logits[0].softmax(-1), atol=0.03)  # as often as the model says


def test_label_loss_of_mappings_sequences_and_features() -> None:
    logits = data(2, 5, 3).requires_grad_()
    seed = lambda: torch.Generator().manual_seed(1)  # noqa: E731
    expected = label_loss(logits.flatten(0, 1), seed())
    assert torch.equal(label_loss(logits, seed()), expected)
    assert torch.equal(label_loss({"logits": logits, "loss": None}, seed()), expected)
    noise = torch.randn(2, 5, 3, generator=seed())
    gaussian = (logits * noise).sum()
    assert torch.allclose(label_loss((logits, torch.ones(3), torch.tensor(3)), seed()), gaussian)
    assert torch.allclose(label_loss({"features": logits}, seed()), gaussian)
    single = logits.flatten()[:, None]
    assert label_loss(single, seed()) != 0  # one logit has no labels to choose from


def test_categorical_likelihood_and_seed() -> None:
    model = transformer()
    with torch.no_grad():
        model.head.weight.mul_(10)
    runs = [{}, {"likelihood": "categorical"}, {"likelihood": "categorical"}, {"likelihood": "categorical", "seed": 1}]
    gaussian, first, again, other = (quantized(model, IMAGES, **options).state_dict() for options in runs)

    def same(a: dict, b: dict) -> bool:
        return all(torch.equal(a[name], b[name]) for name in a)

    assert same(first, again) and not same(first, gaussian) and not same(first, other)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"weights": "per_row"}, "weights is 'per_row': choose one of per_tensor, per_channel"),
        ({"rows": 0}, "rows is 0: give a whole number of at least 1"),
        ({"rows": 2.5}, "rows is 2.5: give a whole number"),
        ({"likelihood": "fisher"}, "likelihood is 'fisher': choose one of gaussian, categorical"),
    ],
)
def test_options_out_of_range(options: dict, message: str) -> None:
    for method in (ptq4vit, base_ptq) if "likelihood" not in options else (ptq4vit,):
        with pytest.raises(ValueError, match=message):
            quantized(transformer(), IMAGES, method, **options)


def test_progress_names_every_site() -> None:
    lines: list[str] = []
    found = quantized(transformer(), IMAGES, progress=lines.append)
    assert [line.split()[0] for line in lines] == list(sites(found))
    assert len(lines) == 8
