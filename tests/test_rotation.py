"""Rotations against dense matrices and scipy's Hadamard; rotated models against the originals."""

from __future__ import annotations

import json
from functools import partial

import pytest
import torch
from scipy.linalg import hadamard as scipy_hadamard
from torch import Tensor, nn

from s2d.ptq import quantize
from s2d.ptq.prepare import prepare
from s2d.ptq.rotation import (
    Rotation,
    hadamard,
    hartley,
    inverse_of_dominant,
    learn_rotation,
    nearest_orthogonal,
    rotate,
    rotation_error,
    rotation_flops,
    rotation_slope,
)
from s2d.ptq.sites import mode, products, quantized_layers, set_mode
from s2d.ptq.trace import call

WIDTHS = (1, 2, 3, 12, 48, 64, 65, 96, 128, 384, 768)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def vit(width: int = 64) -> tuple[nn.Module, Tensor]:
    from timm.models.vision_transformer import VisionTransformer  # 7 s of import

    torch.manual_seed(0)
    options = {"img_size": 16, "patch_size": 4, "num_classes": 10, "embed_dim": width, "depth": 2, "num_heads": 4}
    return VisionTransformer(**options).eval(), normal(6, 3, 16, 16, seed=1)


def qwen2() -> tuple[nn.Module, dict[str, Tensor]]:
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 2, "vocab_size": 50}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 32}
    model = Qwen2ForCausalLM(Qwen2Config(**sizes, **heads, use_cache=False)).eval()
    return model, {"input_ids": torch.randint(50, (3, 7), generator=torch.Generator().manual_seed(1))}


def output(model: nn.Module, batch) -> Tensor:
    with torch.no_grad():
        result = call(model, batch)
    return result if isinstance(result, Tensor) else result.logits


def planted(rows: int = 256, width: int = 64) -> tuple[nn.Module, Tensor]:
    """A Linear layer, and inputs with one channel 10 times the others."""
    torch.manual_seed(0)
    x = normal(rows, width, seed=2)
    x[:, 5] *= 10
    layer = nn.Linear(width, 32)
    with torch.no_grad():
        layer.weight[:, 5] /= 10  # every channel counts alike in the output
    return nn.Sequential(layer).eval(), x


# --- the matrix ---


@pytest.mark.parametrize("n", [1, 2, 16, 128])
def test_hadamard_is_scipys(n: int) -> None:
    assert torch.allclose(hadamard(n) * n**0.5, torch.tensor(scipy_hadamard(n)).double(), atol=1e-12)


@pytest.mark.parametrize("n", [0, 3, 12, -4])
def test_hadamard_of_no_power_of_two(n: int) -> None:
    with pytest.raises(ValueError, match=f"n is {n}: .* power of two"):
        hadamard(n)


@pytest.mark.parametrize("n", [1, 3, 5, 43, 197])
def test_hartley_is_orthogonal_and_spreads(n: int) -> None:
    assert torch.allclose(hartley(n) @ hartley(n).T, torch.eye(n).double(), atol=1e-12)
    assert hartley(n).abs().max() <= (2 / n) ** 0.5 + 1e-12


@pytest.mark.parametrize("kind", ["hadamard", "learned"])
@pytest.mark.parametrize("width", WIDTHS)
def test_rotation_is_orthogonal(width: int, kind: str) -> None:
    r = Rotation(width, kind=kind, seed=3).dense().double()
    assert (r @ r.T - torch.eye(width)).abs().max() < 1e-6


@pytest.mark.parametrize("width", [2, 64, 128, 512, 2048])
def test_powers_of_two_are_scipys_hadamard_with_signs(width: int) -> None:
    rotation = Rotation(width, seed=1)
    x = normal(3, width).double()
    expected = (x * rotation.signs) @ torch.tensor(scipy_hadamard(width)).double() / width**0.5
    assert torch.allclose(rotation(x), expected, atol=1e-6)


@pytest.mark.parametrize(("width", "odd"), [(48, 3), (768, 3), (3072, 3), (896, 7)])
def test_other_widths_are_a_kronecker_product(width: int, odd: int) -> None:
    rotation = Rotation(width, seed=1)
    r = torch.kron(torch.tensor(scipy_hadamard(width // odd)).double() / (width // odd) ** 0.5, hartley(odd))
    x = normal(2, width).double()
    assert torch.allclose(rotation(x), (x * rotation.signs) @ r.T, atol=1e-6)


@pytest.mark.parametrize("width", [768, 1024, 3072])
def test_no_channel_keeps_more_than_a_small_share(width: int) -> None:
    assert Rotation(width).dense().abs().max() <= (2 / width) ** 0.5 + 1e-6


def test_signs_depend_on_the_seed_only() -> None:
    torch.manual_seed(1)
    first = Rotation(96, seed=4)
    torch.manual_seed(2)
    assert torch.equal(first.dense(), Rotation(96, seed=4).dense())
    assert not torch.equal(first.dense(), Rotation(96, seed=5).dense())
    assert (first.signs == 1).any() and (first.signs == -1).any()


def test_making_a_rotation_leaves_the_global_generator_alone() -> None:
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    Rotation(8)
    assert torch.equal(torch.rand(3), expected)


@pytest.mark.parametrize("kind", ["hadamard", "learned"])
@pytest.mark.parametrize("width", [16, 96])
def test_transposed_data(width: int, kind: str) -> None:
    x = normal(2, 3, width, 5)
    expected = Rotation(width, kind=kind, seed=2)(x.transpose(-1, -2)).transpose(-1, -2)
    assert torch.allclose(Rotation(width, kind=kind, seed=2, dim=-2)(x), expected, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("kind", ["hadamard", "learned"])
def test_half_precision(kind: str, dtype: torch.dtype) -> None:
    x = 1000 * normal(7, 768)
    exact = Rotation(768, kind=kind)(x)
    for rotation in (Rotation(768, kind=kind), Rotation(768, kind=kind).to(dtype)):
        rotated = rotation(x.to(dtype))
        assert rotated.dtype == dtype and torch.isfinite(rotated).all()
        assert (rotated.float() - exact).norm() < 4 * torch.finfo(dtype).eps * exact.norm()


@pytest.mark.parametrize("width", [16, 96])
def test_empty_and_single_vectors(width: int) -> None:
    assert Rotation(width)(torch.zeros(0, 3, width)).shape == (0, 3, width)
    x = normal(width)
    assert torch.allclose(Rotation(width)(x), Rotation(width)(x[None])[0], atol=1e-6)


@pytest.mark.parametrize("kind", ["hadamard", "learned"])
@pytest.mark.parametrize("width", [48, 96])
def test_rebuilt_from_configuration_and_state(width: int, kind: str) -> None:
    rotation = Rotation(width, kind=kind, seed=3, dim=-2)
    buffer = rotation.signs if kind == "hadamard" else rotation.matrix
    buffer.copy_(buffer.flip(0))  # what no seed gives
    again = Rotation(**json.loads(json.dumps(rotation.config())))
    again.load_state_dict(rotation.state_dict())
    x = normal(2, width, 3)
    assert torch.equal(again(x), rotation(x))


def test_gradients_pass_through() -> None:
    x = normal(4, 96).requires_grad_()
    Rotation(96)(x).square().sum().backward()
    assert torch.allclose(x.grad, 2 * x.detach(), atol=1e-5)


@pytest.mark.parametrize("kind", ["random", None, ""])
def test_unknown_kind(kind) -> None:
    for call_it in (lambda: Rotation(8, kind=kind), lambda: rotate(nn.Linear(2, 2), [], kind=kind)):
        with pytest.raises(ValueError, match=f"kind is {kind!r}: choose one of hadamard, learned"):
            call_it()


def test_bad_widths_and_dimensions() -> None:
    for width in (0, -3, 2.5, True):
        with pytest.raises(ValueError, match=f"width is {width!r}"):
            Rotation(width)
    with pytest.raises(ValueError, match="dim is 1: count from the end"):
        Rotation(4, dim=1)
    with pytest.raises(ValueError, match="5 channels, the rotation 4"):
        Rotation(4)(torch.zeros(2, 5))


def test_cost() -> None:
    assert rotation_flops(1) == 1
    assert rotation_flops(64) == 64 * (1 + 6)
    assert rotation_flops(768) == 768 * (1 + 8 + 5)  # signs, 256 = 2^8, 3 products and 2 sums
    assert rotation_flops(768) < rotation_flops(768, "learned") / 100
    with pytest.raises(ValueError, match="width is 0"):
        rotation_flops(0)
    with pytest.raises(ValueError, match="kind is 'fast'"):
        rotation_flops(4, "fast")


# --- models ---


@pytest.mark.parametrize("kind", ["hadamard", "learned"])
@pytest.mark.parametrize("width", [64, 48, 96])
def test_a_rotated_vit_is_the_same_function(width: int, kind: str) -> None:
    model, x = vit(width)
    rotated = prepare(model, x)
    before = {name: site.weight.clone() for name, site in quantized_layers(rotated).items()}
    rotate(rotated, [x], kind=kind, steps=3)
    for name, site in quantized_layers(rotated).items():
        linear = isinstance(site, nn.Linear)
        assert (site.input_transform is not None) == linear
        if linear:
            assert site.after is None and not torch.allclose(site.weight, before[name])
            assert torch.allclose(site.weight @ site.input_transform.dense(), before[name], atol=1e-5)
    expected = output(model, x)
    for name in ("float", "observe", "quantized"):
        set_mode(rotated, name)
        assert (output(rotated, x) - expected).abs().max() < 1e-5


@pytest.mark.parametrize("kind", ["hadamard", "learned"])
def test_a_rotated_qwen2_is_the_same_function(kind: str) -> None:
    model, batch = qwen2()
    rotated = prepare(model, batch)
    rotate(rotated, [batch], kind=kind, steps=3)
    set_mode(rotated, "observe")
    assert (output(rotated, batch) - output(model, batch)).abs().max() < 1e-5


def test_layers_that_read_one_norm_share_a_rotation() -> None:
    model, batch = qwen2()
    shared, own = prepare(model, batch), prepare(model, batch)
    rotate(shared, [batch])
    rotate(own, [batch], share=False)
    for rotated, same in ((shared, True), (own, False)):
        block = rotated.model.layers[0]
        attention = [block.self_attn.q_proj, block.self_attn.k_proj, block.self_attn.v_proj]
        for layers in (attention, [block.mlp.gate_proj, block.mlp.up_proj]):
            assert (len({id(layer.input_transform) for layer in layers}) == 1) == same
        assert block.mlp.gate_proj.input_transform is not block.self_attn.q_proj.input_transform


def test_queries_and_keys_turn_and_their_products_stay() -> None:
    model, x = vit()
    rotated = prepare(model, x)

    def inputs(prepared: nn.Module) -> list[tuple[Tensor, Tensor]]:
        seen = []

        def visit(site, factors, product):
            seen.append(factors)
            return product

        with mode(prepared, "observe", [site for site in products(prepared).values() if site.kind == "qk"], visit):
            output(prepared, x)
        return seen

    before = inputs(rotated)
    rotate(rotated, [x])
    for (q, k), (turned_q, turned_k) in zip(before, inputs(rotated), strict=True):
        assert not torch.allclose(q, turned_q, atol=1e-2)
        assert torch.allclose(q @ k, turned_q @ turned_k, atol=1e-5)
        assert torch.allclose(k.norm(dim=-2), turned_k.norm(dim=-2), atol=1e-5)
    for product in products(rotated).values():
        assert (product.left_transform is not None) == (product.kind == "qk")
        assert (product.right_transform is not None) == (product.kind == "qk")


def test_heads_can_be_left_alone() -> None:
    model, x = vit()
    rotated = prepare(model, x)
    rotate(rotated, [x], heads=False)
    assert all(p.left_transform is None and p.right_transform is None for p in products(rotated).values())


class EinsumAttention(nn.Module):
    """Attention by einsum: the keys are not transposed, or the factors are in an order of their own."""

    def __init__(self, equations: tuple[str, str], tokens_last: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.qkv, self.proj = nn.Linear(12, 36), nn.Linear(12, 12)
        self.equations, self.tokens_last = equations, tokens_last

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, 2, 6)).permute(2, 0, 3, 1, 4)
        q, k = (q.transpose(-1, -2), k.transpose(-1, -2)) if self.tokens_last else (q, k)
        mixed = torch.einsum(self.equations[1], torch.einsum(self.equations[0], q, k).softmax(-1), v)
        return self.proj(mixed.transpose(1, 2).flatten(2))


def test_keys_that_are_not_transposed() -> None:
    model, x = EinsumAttention(("bhqd,bhkd->bhqk", "bhqk,bhkd->bhqd"), False).eval(), normal(3, 5, 12)
    rotated = prepare(model, x)
    rotate(rotated, [x])
    (qk,) = (site for site in products(rotated).values() if site.kind == "qk")
    assert qk.right_transform.dim == -1
    set_mode(rotated, "observe")
    assert torch.allclose(output(rotated, x), output(model, x), atol=1e-5)


def test_queries_that_stand_otherwise_are_refused() -> None:
    model, x = EinsumAttention(("bhdq,bhdk->bhqk", "bhqk,bhkd->bhqd"), True).eval(), 3 * normal(3, 6, 12)
    with pytest.raises(ValueError, match="rotate with heads=False"):
        rotate(prepare(model, x), [x])
    rotated = prepare(model, x)
    rotate(rotated, [x], heads=False)
    assert torch.allclose(output(rotated, x), output(model, x), atol=1e-5)


@pytest.mark.parametrize("kind", ["hadamard", "learned"])
def test_determinism(kind: str) -> None:
    model, x = vit(48)
    weights = []
    for seed in (0, 0, 1):
        torch.manual_seed(len(weights))
        rotated = prepare(model, x)
        rotate(rotated, [x], kind=kind, seed=seed, steps=2, rows=20)
        weights.append(torch.cat([site.weight.flatten() for site in quantized_layers(rotated).values()]))
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


def test_every_rotation_has_signs_of_its_own() -> None:
    model, x = vit(64)
    rotated = prepare(model, x)
    rotate(rotated, [x])
    signs = [tuple(s.input_transform.signs.tolist()) for s in quantized_layers(rotated).values() if s.input_transform]
    assert len(set(signs)) == len(signs)


def test_twice_is_refused() -> None:
    model, x = planted()
    rotated = prepare(model, x)
    rotate(rotated, [x])
    with pytest.raises(ValueError, match="layer 0 has an input transform already"):
        rotate(rotated, [x])


@pytest.mark.parametrize(
    "option", [{"steps": 0}, {"rows": 0}, {"max_learned": 0}, {"bits": 16}, {"bits": 1}, {"steps": 1.5}]
)
def test_bad_options(option: dict) -> None:
    (name, value), *_ = option.items()
    model, x = planted()
    with pytest.raises(ValueError, match=f"{name} is {value!r}"):
        rotate(prepare(model, x), [x], kind="learned", **option)


def test_half_precision_model() -> None:
    model, x = vit()
    model, x = model.bfloat16(), x.bfloat16()
    rotated = prepare(model, x)
    rotate(rotated, [x], kind="learned", steps=2)
    found, expected = output(rotated, x), output(model, x)
    assert found.dtype == torch.bfloat16
    assert (found - expected).float().norm() < 0.05 * expected.float().norm()


def test_a_layer_without_bias_that_sees_zeros() -> None:
    model, x = nn.Sequential(nn.Linear(6, 3, bias=False)).eval(), torch.zeros(1, 6)
    for kind in ("hadamard", "learned"):
        rotated = prepare(model, x)
        rotate(rotated, [x], kind=kind, steps=2)
        assert torch.isfinite(rotated[0].weight).all() and (output(rotated, x) == 0).all()


def test_width_one() -> None:
    model, x = nn.Sequential(nn.Linear(1, 3)).eval(), normal(5, 1)
    for kind in ("hadamard", "learned"):
        rotated = prepare(model, x)
        rotate(rotated, [x], kind=kind)
        assert torch.allclose(output(rotated, x), output(model, x), atol=1e-6)


# --- what it is for ---


def test_an_outlier_channel_is_spread() -> None:
    model, x = planted()
    rotated = Rotation(64)(x)
    assert rotated.max() - rotated.min() < 0.35 * (x.max() - x.min())
    assert torch.allclose(rotated.norm(dim=1), x.norm(dim=1), rtol=1e-5)


def test_rotation_lowers_the_error_of_rtn_at_an_outlier() -> None:
    model, x = planted()
    expected = output(model, x)

    def error(*transforms) -> float:
        quantized = quantize(model, method="rtn", w_bits=4, a_bits=4, calibration=x, transforms=transforms)
        return ((output(quantized, x) - expected).square().sum() / expected.square().sum()).item()

    plain, turned, learned = error(), error(rotate), error(partial(rotate, kind="learned"))
    assert turned < 0.3 * plain
    assert learned < turned


# --- learning ---


def test_rotation_error_by_hand() -> None:
    x, w = normal(20, 4).double(), normal(3, 4, seed=1).double()

    def relative(rows: list[Tensor]) -> float:
        wrong = total = 0.0
        for row in rows:
            low, high = min(row.min().item(), 0), max(row.max().item(), 0)
            step = (high - low) / 7
            zero = round(-low / step)
            for value in row.flatten().tolist():
                code = min(max(round(value / step) + zero, 0), 7)
                wrong += ((code - zero) * step - value) ** 2
                total += value**2
        return wrong / total

    r = Rotation(4, seed=2).dense().double()
    expected = relative([x @ r.T]) + 0.5 * relative(list(w @ r.T))
    found = rotation_error(r, [(x, False, 1.0), (w, True, 0.5)], 3)
    assert found.item() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("part", [(0.0, 1.0), (0.25, 0.5), (0.75, 0.5)])
def test_the_slope_is_autograds(part: tuple[float, float]) -> None:
    """Of the squared step times a constant rounding residual, and the squared distance of what is clamped."""
    x, w, bits = normal(40, 6).double(), normal(9, 6, seed=1).double().abs(), 3
    matrix = Rotation(6, seed=2).dense().double().requires_grad_()
    total = 0.0
    for data, rows, weight in ((x, None, 1.0), (w, range(len(w)), 0.5)):
        rotated = data @ matrix.T
        first = int(part[0] * len(x))
        reach = torch.cat([rotated, rotated])[first : first + round(part[1] * len(x))]
        pairs = [(rotated, reach)] if rows is None else [(rotated[i], rotated[i]) for i in rows]
        for values, seen in pairs:
            low, high = seen.min().clamp(max=0), seen.max().clamp(min=0)
            inside = (values >= low) & (values <= high)
            step = (high - low) / (2**bits - 1)
            zero = (-low / step).detach().round()
            code = ((values / step).detach().round() + zero).clamp(0, 2**bits - 1) - zero
            residual = ((code * step - values) / step).detach()
            error = (residual * step).square()[inside].sum()
            error = error + (values - values.clamp(low, high))[~inside].square().sum()
            total = total + weight * error / data.square().sum()
    total.backward()
    found = rotation_slope(matrix.detach(), [(x, False, 1.0), (w, True, 0.5)], bits, part)
    assert torch.allclose(found, matrix.grad, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("size", [1, 7, 97, 250])
def test_inverse_by_blocks(size: int) -> None:
    skew = normal(size, size).double()
    matrix = torch.eye(size).double() + 3 * (skew - skew.T)
    inverse = inverse_of_dominant(matrix)
    assert torch.allclose(inverse @ matrix, torch.eye(size).double(), atol=1e-9)


def test_nearest_orthogonal_is_the_polar_factor() -> None:
    for distance in (1e-7, 1e-3):
        matrix = Rotation(20, seed=3).dense().double() + distance * normal(20, 20).double()
        left, _, right = torch.linalg.svd(matrix)
        assert torch.allclose(nearest_orthogonal(matrix), left @ right, atol=1e-9)


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_learned_is_never_worse_than_its_start(bits: int) -> None:
    for seed, width in enumerate((3, 16, 96)):
        start = Rotation(width, seed=seed)
        terms = [(normal(50, width, seed=seed), False, 1.0), (normal(9, width, seed=seed + 9), True, 1.0)]
        learned = learn_rotation(start, terms, bits=bits, steps=8, rows=16)
        errors = [rotation_error(rotation.dense(), terms, bits).item() for rotation in (learned, start)]
        assert errors[0] <= errors[1]
        r = learned.matrix.double()
        assert (r @ r.T - torch.eye(width)).abs().max() < 1e-6


@pytest.mark.parametrize(("bits", "most"), [(4, 0.9), (8, 1.01)])
def test_learning_finds_something_better_for_new_data_too(bits: int, most: float) -> None:
    start = Rotation(32, seed=1)
    spectrum = torch.linspace(0.1, 3, 32)
    x, w, new = normal(400, 32) * spectrum, normal(40, 32, seed=1), normal(400, 32, seed=2) * spectrum
    terms = [(x, False, 1.0), (w, True, 1.0)]
    learned = learn_rotation(start, terms, bits=bits, steps=100, rows=300)

    def error_of_new_data(rotation: Rotation) -> float:
        """On the grid of the old, so that what lies beyond it is clamped."""
        return rotation_error(rotation.dense(), [(torch.cat([x, new]), False, 1.0)], bits, (0.0, 0.5)).item()

    errors = [rotation_error(rotation.dense(), terms, bits).item() for rotation in (learned, start)]
    assert errors[0] <= min(most, 1) * errors[1]
    assert error_of_new_data(learned) <= most * error_of_new_data(start)


def test_range_from_a_part_of_the_rows_by_hand() -> None:
    x = torch.tensor([[1.0], [2.0], [3.0], [9.0]])
    # 2 bits over rows 4 and 1 (values 9 and 1): step 3. Over rows 1 and 2: step 2/3, so 3 and 9 are clamped to 2.
    around = (1 + 1 + 0 + 0) / 95
    clamped = ((1 - 2 / 3) ** 2 + 0 + 1 + 49) / 95
    matrix = torch.eye(1)
    assert rotation_error(matrix, [(x, False, 1.0)], 2, (0.75, 0.5)).item() == pytest.approx(around, rel=1e-5)
    assert rotation_error(matrix, [(x, False, 1.0)], 2, (0.0, 0.5)).item() == pytest.approx(clamped, rel=1e-5)


def test_the_start_stays_where_nothing_is_better() -> None:
    start = Rotation(8, seed=1)
    corners = torch.cat([torch.eye(8), -torch.eye(8)]) @ start.dense()  # rotated, they are on the grid of 7 levels
    learned = learn_rotation(start, [(3 * corners, False, 1.0)], bits=3, steps=5, rows=100)
    before, after = (rotation_error(r.dense(), [(3 * corners, False, 1.0)], 3) for r in (start, learned))
    assert after <= before


def test_wide_inputs_keep_their_hadamard_rotation() -> None:
    model, x = vit(48)
    rotated = prepare(model, x)
    rotate(rotated, [x], kind="learned", steps=2, max_learned=48)
    kinds = {s.in_features: s.input_transform.kind for s in quantized_layers(rotated).values() if s.input_transform}
    assert kinds == {48: "learned", 192: "hadamard"}


def test_progress_names_the_sites() -> None:
    model, x = planted()
    lines: list[str] = []
    rotate(prepare(model, x), [x], kind="learned", steps=1, progress=lines.append)
    assert lines == ["0 (1/1)"]
