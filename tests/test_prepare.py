"""The quantized copy on the models people use: what is found, that it is the same function, and what is refused."""

from __future__ import annotations

import copy
import dataclasses
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from s2d.ptq import METHODS, coverage, quantize
from s2d.ptq.attention import SplitAttention
from s2d.ptq.calibrate import site_inputs, split_batches, visit_sites
from s2d.ptq.prepare import Layout, build, layout_of, prepare
from s2d.ptq.reparameterize import can_scale, can_shift, norm_groups, rescale_norm
from s2d.ptq.sites import QuantizedProduct, mode, products, quantized_layers, set_mode, sites
from s2d.ptq.trace import call, regular_attention, tensors_of, trace

SMALL = {"embed_dim": 32, "depth": 2, "num_heads": 4}
TEXT = {"vocab_size": 50, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
VISION = {key: value for key, value in TEXT.items() if key != "vocab_size"} | {"image_size": 16, "patch_size": 4}


def images(size: int = 32, channels: int = 3, count: int = 3, seed: int = 1) -> Tensor:
    return torch.randn(count, channels, size, size, generator=torch.Generator().manual_seed(seed))


def tokens(count: int = 3, length: int = 7, seed: int = 1, high: int = 49) -> Tensor:
    return torch.randint(1, high, (count, length), generator=torch.Generator().manual_seed(seed))


def timm_model(name: str, **options) -> nn.Module:
    import timm

    return timm.create_model(name, num_classes=5, **options)


def hugging_face(model: str, config: str, **options) -> nn.Module:
    import transformers

    return getattr(transformers, model)(getattr(transformers, config)(**options))


def llava() -> nn.Module:
    import transformers

    vision = transformers.SiglipVisionConfig(**VISION, vision_use_head=False)
    text = transformers.Qwen2Config(**TEXT, num_key_value_heads=2)
    return transformers.LlavaForConditionalGeneration(
        transformers.LlavaConfig(
            vision_config=vision, text_config=text, image_token_index=49, vision_feature_select_strategy="full"
        )
    )


def clip(**vision) -> nn.Module:
    import open_clip

    towers = {"width": 32, "layers": 2}
    vision = {"image_size": 16, "patch_size": 4, "head_width": 8} | towers | vision
    return open_clip.CLIP(8, vision, {"context_length": 7, "vocab_size": 50, "heads": 4} | towers)


def siglip2_of_open_clip() -> nn.Module:
    from open_clip.model import CustomTextCLIP

    trunk = {"timm_model_name": "vit_tiny_patch16_224", "timm_pool": "map", "timm_proj": "none", "image_size": 224}
    text = {"context_length": 7, "vocab_size": 50, "width": 32, "heads": 4, "layers": 2, "no_causal_mask": True}
    return CustomTextCLIP(8, trunk, text | {"proj_bias": True, "pool_type": "last"})


PADDED = {"input_ids": tokens(), "attention_mask": torch.tensor([[1] * 7, [1] * 5 + [0] * 2, [1] * 6 + [0]])}
PICTURE_IN_TEXT = {"input_ids": torch.cat([torch.full((3, 16), 49), tokens(length=4)], 1), "pixel_values": images(16)}

# name: (how to build it, a batch, Linear layers and convolutions, products, after GELU, fed by a norm of their own)
MODELS = {
    "timm ViT": (lambda: timm_model("vit_tiny_patch16_224", img_size=32, **SMALL), images(), 10, 4, 2, 5),
    "timm DeiT": (lambda: timm_model("deit_tiny_distilled_patch16_224", img_size=32, **SMALL), images(), 11, 4, 2, 4),
    "timm SigLIP": (lambda: timm_model("vit_base_patch16_siglip_224", img_size=32, **SMALL), images(), 15, 6, 3, 6),
    "timm DINOv3": (lambda: timm_model("vit_small_patch16_dinov3", img_size=32, **SMALL), images(), 10, 4, 2, 4),
    "timm Swin": (
        lambda: timm_model(
            "swin_tiny_patch4_window7_224", img_size=64, embed_dim=16, depths=(2, 2), num_heads=(2, 4), window_size=4
        ),
        images(64), 19, 8, 4, 9,
    ),
    "timm BEiT": (lambda: timm_model("beit_base_patch16_224", img_size=32, **SMALL), images(), 10, 4, 2, 5),
    "timm SwinV2": (
        lambda: timm_model(
            "swinv2_tiny_window8_256", img_size=64, embed_dim=16, depths=(2, 2), num_heads=(2, 4), window_size=4
        ),
        images(64), 27, 8, 4, 0,
    ),
    "BERT": (lambda: hugging_face("BertModel", "BertConfig", **TEXT), PADDED, 13, 4, 2, 0),
    "BERT, eager": (
        lambda: hugging_face("BertModel", "BertConfig", **TEXT, attn_implementation="eager"), PADDED, 13, 4, 2, 0,
    ),
    "ViT of transformers": (
        lambda: hugging_face("ViTForImageClassification", "ViTConfig", **VISION), images(16), 14, 4, 2, 9,
    ),
    "Qwen2": (
        lambda: hugging_face("Qwen2ForCausalLM", "Qwen2Config", **TEXT, num_key_value_heads=2),
        {"input_ids": tokens()}, 15, 4, 0, 11,
    ),
    "Qwen2, eager": (
        lambda: hugging_face(
            "Qwen2ForCausalLM", "Qwen2Config", **TEXT, num_key_value_heads=2, attn_implementation="eager"
        ),
        {"input_ids": tokens()}, 15, 4, 0, 11,
    ),
    "GPT-2": (
        lambda: hugging_face(
            "GPT2LMHeadModel", "GPT2Config", vocab_size=50, n_embd=32, n_layer=2, n_head=4,
            bos_token_id=1, eos_token_id=1,
        ),
        {"input_ids": tokens()}, 9, 4, 0, 5,
    ),
    "SigLIP of transformers": (
        lambda: hugging_face("SiglipVisionModel", "SiglipVisionConfig", **VISION), images(16), 18, 6, 3, 9,
    ),
    "LLaVA": (llava, PICTURE_IN_TEXT, 30, 8, 3, 19),
    "open_clip CLIP": (clip, (images(16), tokens()), 17, 8, 4, 8),
    "open_clip with attention pooling": (
        lambda: clip(attentional_pool=True, attn_pooler_queries=4, attn_pooler_heads=4),
        (images(16), tokens()), 21, 10, 4, 11,
    ),
    "open_clip SigLIP2": (siglip2_of_open_clip, (images(224, count=2), tokens(count=2)), 63, 30, 15, 31),
    "torch encoder": (
        lambda: nn.TransformerEncoder(nn.TransformerEncoderLayer(32, 4, 64, batch_first=True), 2),
        torch.randn(3, 5, 32), 8, 4, 0, 0,
    ),
}  # fmt: skip


def built(name: str) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return MODELS[name][0]().eval()


def outputs(model: nn.Module, batch) -> list[Tensor]:
    with torch.no_grad(), regular_attention():
        return tensors_of(call(model, batch))


def relative_error(found: list[Tensor], expected: list[Tensor]) -> float:
    pairs = [(a, b) for a, b in zip(found, expected, strict=True) if b.is_floating_point() and b.ndim > 1]
    return max(((a - b).square().sum() / b.square().sum()).item() for a, b in pairs)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.filterwarnings("ignore:left in floating point")
def test_the_copy_of_a_known_model(name: str) -> None:
    """Every layer and product is found; off it is the original bit for bit; at eight bits it is close."""
    _, batch, layers, pairs, gelus, normed = MODELS[name]
    model = built(name)
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    prepared = prepare(model, batch)
    expected = outputs(model, batch)
    assert all(torch.equal(a, b) for a, b in zip(outputs(prepared, batch), expected, strict=True))
    assert len(quantized_layers(prepared)) == layers and len(products(prepared)) == pairs
    found = quantized_layers(prepared).values()
    assert sum(site.after == "gelu" for site in found) == gelus
    assert sum(site.norm is not None for site in found) == normed
    assert type(prepared) is type(model) or isinstance(prepared, type(model))

    quantized = quantize(model, w_bits=8, a_bits=8, calibration=batch)
    assert 0 < relative_error(outputs(quantized, batch), expected) < 2e-2
    set_mode(quantized, "float")  # weights stay quantized
    weights_only = relative_error(outputs(quantized, batch), expected)
    set_mode(quantized, "quantized")
    assert 0 < weights_only < relative_error(outputs(quantized, batch), expected)
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())
    copied = copy.deepcopy(quantized)
    assert all(torch.equal(a, b) for a, b in zip(outputs(copied, batch), outputs(quantized, batch), strict=True))


@pytest.mark.parametrize("name", ["timm Swin", "Qwen2", "open_clip CLIP", "BERT"])
@pytest.mark.filterwarnings("ignore:left in floating point")
def test_product_by_product_attention_is_the_fused_one(name: str) -> None:
    """In observe mode attention runs as two products: same numbers as torch's fused function, masks and all."""
    model, batch = built(name), MODELS[name][1]
    prepared = prepare(model, batch)
    with mode(prepared, "observe"):
        observed = outputs(prepared, batch)
    for found, expected in zip(observed, outputs(model, batch), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_other_entry_points_are_quantized_too() -> None:
    model = built("open_clip CLIP")
    pictures, text = MODELS["open_clip CLIP"][1]
    with pytest.warns(UserWarning, match="left in floating point: matmul with visual.proj"):
        quantized = quantize(model, w_bits=4, a_bits=4, calibration=(pictures, text))
    with torch.no_grad():
        both = quantized(pictures, text)
        direct = F.normalize(quantized.encode_image(pictures), dim=-1)
    torch.testing.assert_close(direct, both[0])
    lines = [row["site"] for row in coverage(quantized) if row["kind"] == "left out"]
    assert any("text_projection" in line for line in lines)


def test_generation_runs_on_a_quantized_language_model() -> None:
    model = built("Qwen2")
    quantized = quantize(model, w_bits=8, a_bits=8, calibration={"input_ids": tokens()})
    prompt = tokens(count=1)
    made = quantized.generate(prompt, max_new_tokens=4, do_sample=False, pad_token_id=0, eos_token_id=None)
    assert made.shape == (1, 11)


def test_products_of_an_input_transform_are_none_of_the_attentions() -> None:
    class Turn(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x @ torch.eye(32)

    model, batch = built("timm ViT"), MODELS["timm ViT"][1]
    prepared = prepare(model, batch)
    prepared.blocks[0].attn.qkv.input_transform = Turn()
    with mode(prepared, "observe"):
        torch.testing.assert_close(prepared(batch), model(batch), rtol=1e-4, atol=1e-5)


# --- nn.MultiheadAttention -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("weights", [False, True])
@pytest.mark.parametrize("kind", ["self", "cross", "separate"])
def test_split_attention_is_multihead_attention(kind: str, weights: bool, bias: bool, batch_first: bool) -> None:
    torch.manual_seed(0)
    widths = {"kdim": 5, "vdim": 6} if kind == "separate" else {}
    attention = nn.MultiheadAttention(8, 2, bias=bias, batch_first=batch_first, **widths).eval()
    query = torch.randn(3, 4, 8) if batch_first else torch.randn(4, 3, 8)
    key = query if kind == "self" else torch.randn(3, 7, 8) if batch_first else torch.randn(7, 3, 8)
    value = key
    if kind == "separate":
        key, value = key[..., :5].contiguous(), key[..., :6].contiguous()
    lengths = (4, 4 if kind == "self" else 7)
    padding = torch.zeros(3, lengths[1], dtype=torch.bool)
    padding[1, -2:] = True
    mask = torch.zeros(lengths).masked_fill(torch.ones(lengths, dtype=torch.bool).triu(1), -torch.inf)
    split = SplitAttention(attention, kind)
    additive = torch.zeros(padding.shape).masked_fill(padding, -torch.inf)  # torch warns of masks of two kinds
    both = {"attn_mask": mask, "key_padding_mask": padding}
    for names in ((), ("attn_mask",), ("key_padding_mask",), tuple(both)):
        options = {name: both[name] for name in names}
        float_padding = {name: (both | {"key_padding_mask": additive})[name] for name in names}
        with torch.no_grad(), regular_attention():
            expected = attention(query, key, value, need_weights=weights, **float_padding)
            found = split(query, key, value, need_weights=weights, **options)
        torch.testing.assert_close(found[0], expected[0], rtol=0, atol=0)
        assert (found[1] is None) == (expected[1] is None)
        if weights:
            torch.testing.assert_close(found[1], expected[1], rtol=0, atol=0)


def test_split_attention_refuses_what_it_does_not_cover() -> None:
    with pytest.raises(ValueError, match="add_bias_kv"):
        SplitAttention(nn.MultiheadAttention(8, 2, add_bias_kv=True), "self")
    with pytest.raises(ValueError, match="kind is 'both'"):
        SplitAttention(nn.MultiheadAttention(8, 2), "both")
    split, x = SplitAttention(nn.MultiheadAttention(8, 2), "self"), torch.randn(4, 3, 8)
    with pytest.raises(ValueError, match="same tensor"):
        split(x, x.clone(), x)
    with pytest.raises(ValueError, match="3 dimensions"):
        split(x[0], x[0], x[0])


# --- what feeds what -------------------------------------------------------------------------------------------------


class Residual(nn.Module):
    """A norm whose output two layers and nothing else read; one whose output the residual sum reads as well."""

    def __init__(self) -> None:
        super().__init__()
        self.own, self.shared = nn.LayerNorm(6), nn.LayerNorm(6)
        self.a, self.b, self.c = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        y = self.own(x)
        x = self.shared(x + self.a(y) + self.b(F.dropout(y, 0.5, False).reshape(-1, 6)).view_as(x))
        return x + self.c(x)


def test_a_norm_is_only_taken_where_nothing_else_reads_it() -> None:
    found, _ = trace(Residual().eval(), [torch.randn(2, 3, 6)])
    assert found.norm == {"a": "own", "b": "own"}
    assert found.after == {"a": "norm", "b": "norm", "c": "norm"}
    prepared = prepare(Residual(), torch.randn(2, 3, 6))
    assert {name: [site.name for site in layers] for name, layers in norm_groups(prepared).items()} == {
        "own": ["a", "b"]
    }
    with pytest.warns(UserWarning, match=r"b \(excluded\)"):  # a layer left alone reads the norm too
        assert norm_groups(prepare(Residual(), torch.randn(2, 3, 6), exclude=["b"])) == {}


def test_a_norm_that_the_caller_reads_is_not_taken() -> None:
    class Returns(Residual):
        def forward(self, x: Tensor) -> tuple:
            y = self.own(x)
            return self.a(y), {"hidden": y}

    model = Returns()
    model.b = model.c = nn.Identity()
    assert trace(model.eval(), [torch.randn(2, 6)])[0].norm == {}


CHANGES = {
    "in place": lambda y: y.mul_(2),
    "after a sum": lambda y: y + 1,
    "transposed": lambda y: y.transpose(-1, -2),
    "transposed by a property": lambda y: y.mT,
    "channels turned round": lambda y: y.flip(-1),
    "channels rolled": lambda y: y.roll(1, -1),
    "channels permuted": lambda y: y[..., torch.tensor([2, 0, 3, 1])],
    "tokens for channels": lambda y: y[:, :, 0],
}


@pytest.mark.parametrize("change", CHANGES)
def test_marks_do_not_survive_a_change(change: str) -> None:
    class Changed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.fc = nn.LayerNorm(4), nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(CHANGES[change](self.norm(x)))

    found, _ = trace(Changed().eval(), [torch.randn(2, 4, 4)])
    assert found.norm == {} and found.after == {}


def test_marks_survive_what_only_moves_tokens() -> None:
    class Moved(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.fc = nn.LayerNorm(4), nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            y = self.norm(x)
            assert y.size() == torch.zeros_like(y).shape  # asks for shapes only
            return self.fc(y.flip(1).roll(1, 1).transpose(0, 1)[:, 0].contiguous())

    assert trace(Moved().eval(), [torch.randn(2, 4, 4)])[0].norm == {"fc": "norm"}


class Twice(nn.Module):
    """One layer called on two inputs: of two norms, of a norm and the raw input, of a GELU and the raw input."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind, self.a, self.b, self.fc = kind, nn.LayerNorm(6), nn.LayerNorm(6), nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        first = {"two norms": self.a, "norm, then raw": self.a, "GELU, then raw": F.gelu}[self.kind](x)
        return self.fc(first).tanh() + self.fc(self.b(x**3) if self.kind == "two norms" else x)


@pytest.mark.parametrize("kind", ["two norms", "norm, then raw", "GELU, then raw"])
@pytest.mark.parametrize("method", METHODS)
def test_a_layer_with_two_inputs_belongs_to_neither(method: str, kind: str) -> None:
    torch.manual_seed(0)
    model, x = Twice(kind).eval(), torch.randn(32, 6) * torch.tensor([1, 1, 1, 1, 1, 5.0])
    found, _ = trace(model, [x])
    assert found.norm == {} and found.after.get("fc") in (None, "norm")
    quantized = quantize(model, method=method, w_bits=8, a_bits=8, calibration=x)
    assert relative_error([quantized(x).detach()], [model(x).detach()]) < 2e-3


@pytest.mark.parametrize("method", METHODS)
def test_readers_of_one_norm_may_read_different_tokens(method: str) -> None:
    """The first reader sees the class token alone: ranges must come from the one that sees all."""

    class ClassToken(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.q, self.kv, self.out = nn.LayerNorm(8), nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 4)

        def forward(self, x: Tensor) -> Tensor:
            y = self.norm(x)
            return self.out((self.q(y[:, :1]).softmax(-1) * self.kv(y)).sum(1))

    torch.manual_seed(0)
    model, x = ClassToken().eval(), torch.randn(32, 5, 8)
    x[:, 0] *= torch.linspace(0.1, 1, 8)
    quantized = quantize(model, method=method, w_bits=8, a_bits=8, calibration=x)
    assert relative_error([quantized(x).detach()], [model(x).detach()]) < 2e-3


@pytest.mark.parametrize("method", METHODS)
def test_inputs_changed_in_place_afterwards_are_seen_as_they_were(method: str) -> None:
    class InPlace(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(6, 6), nn.Linear(6, 6)

        def forward(self, x: Tensor) -> Tensor:
            x = x.clone()
            x += 100 * self.b(F.gelu(self.a(x)))
            return x

    torch.manual_seed(0)
    model, x = InPlace().eval(), torch.randn(32, 6)
    quantized = quantize(model, method=method, w_bits=8, a_bits=8, calibration=x)
    assert relative_error([quantized(x).detach()], [model(x).detach()]) < 2e-3


def test_factors_given_by_name_are_found() -> None:
    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            y = self.fc(x)
            scores = torch.baddbmm(torch.zeros(1), batch1=y, batch2=y.mT, beta=0.0)
            return torch.matmul(input=scores.softmax(-1), other=y)

    prepared = prepare(Named(), torch.randn(2, 5, 4))
    assert [site.kind for site in products(prepared).values()] == ["qk", "pv"]


def test_the_product_that_made_the_scores_is_found_among_others() -> None:
    class RelativePosition(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(4, 4)
            self.register_buffer("positions", torch.randn(4, 3))

        def forward(self, x: Tensor) -> Tensor:
            y = self.fc(x)
            return ((y @ y.mT) + (y @ self.positions).sum(-1, keepdim=True)).softmax(-1) @ y

    with pytest.warns(UserWarning, match="a product of two activations that is no attention"):
        prepared = prepare(RelativePosition(), torch.randn(2, 5, 4))
    assert prepared.__dict__["product_plan"] == ["qk_product", None, "pv_product"]


@pytest.mark.parametrize("name", ["timm Swin", "BERT, eager", "timm ViT"])
def test_half_precision_models_keep_their_products(name: str) -> None:
    model, batch = built(name).bfloat16(), MODELS[name][1]
    batch = batch if isinstance(batch, dict) else batch.bfloat16()
    assert len(products(prepare(model, batch))) == MODELS[name][3]


def test_attention_in_float16_does_not_overflow_before_its_scale() -> None:
    class Large(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(64, 64)

        def forward(self, x: Tensor) -> Tensor:
            y = self.fc(x) * 60
            return F.scaled_dot_product_attention(y, y, y)

    torch.manual_seed(0)
    model, x = Large().half().eval(), torch.randn(2, 4, 64).half() * 2
    assert torch.isfinite(model(x)).all()
    assert torch.isfinite(quantize(model, w_bits=8, a_bits=8, calibration=x)(x)).all()


def test_excluded_attentions_keep_their_direct_layers() -> None:
    model, batch = built("timm BEiT"), MODELS["timm BEiT"][1]
    with pytest.warns(UserWarning, match="the products of blocks.0.attn"):
        quantized = quantize(model, w_bits=8, a_bits=8, calibration=batch, exclude=["*.attn"])
    assert not products(quantized) and "blocks.0.attn.qkv" in quantized_layers(quantized)
    assert relative_error(outputs(quantized, batch), outputs(model, batch)) < 2e-2


def test_a_norm_near_a_layer_that_was_never_called_is_left_alone() -> None:
    class Experts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.a, self.b = nn.LayerNorm(6), nn.Linear(6, 6), nn.Linear(6, 6)

        def forward(self, x: Tensor) -> Tensor:
            y = self.norm(x)
            return self.a(y) if x.max() < 100 else self.b(y)

    model, x = Experts().eval(), torch.randn(16, 6)
    with pytest.warns(UserWarning, match="b .excluded"):
        quantized = quantize(model, method="smoothquant", w_bits=8, a_bits=8, calibration=x, exclude=["b"])
    assert torch.equal(quantized(x + 200), model(x + 200))


@pytest.mark.parametrize("method", ["ptq4vit", "erq"])
def test_callers_may_be_in_inference_mode(method: str) -> None:
    model, batch = built("timm ViT"), MODELS["timm ViT"][1]
    with torch.inference_mode():
        quantized = quantize(model, method=method, w_bits=8, a_bits=8, calibration=batch)
    assert relative_error(outputs(quantized, batch), outputs(model, batch)) < 2e-2


def test_outputs_in_a_dataclass_are_compared_too() -> None:
    @dataclasses.dataclass
    class Output:
        hidden: Tensor

    class Returns(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.fc = nn.LayerNorm(4), nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Output:
            y = self.norm(x)
            return Output(y + 0 * self.fc(y))

    assert [tuple(t.shape) for t in trace(Returns().eval(), [torch.randn(2, 4)])[1]] == [(2, 4)]

    class Silent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> str:
            return str(self.fc(x))

    with pytest.raises(ValueError, match="gives no tensor"):
        prepare(Silent(), torch.randn(2, 4))


def test_hooks_of_a_layer_stay_with_it() -> None:
    model, calls = nn.Sequential(nn.Linear(4, 4)), []
    model[0].register_forward_hook(lambda layer, inputs, output: calls.append(type(layer).__name__))
    prepared = prepare(model, torch.randn(2, 4))
    calls.clear()
    prepared(torch.randn(2, 4))
    assert calls == ["QuantizedLinear"]


def test_problems_of_an_excluded_module_do_not_matter() -> None:
    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention, self.fc = nn.MultiheadAttention(4, 2, batch_first=True), nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            x = self.fc(x)
            return self.attention(x, x, x)[0] + self.attention(x, x + 1, x)[0]

    with pytest.raises(ValueError, match="attention is called with .* leave it in floating point with exclude="):
        prepare(Both(), torch.randn(2, 3, 4))
    with pytest.warns(UserWarning, match="left in floating point"):
        assert list(sites(prepare(Both(), torch.randn(2, 3, 4), exclude=["attention"]))) == ["fc"]


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_rescaling_a_norm_keeps_the_function(affine: bool, bias: bool) -> None:
    torch.manual_seed(0)
    model = Residual().double().eval()
    model.own = nn.LayerNorm(6, elementwise_affine=affine, bias=affine and bias, dtype=torch.float64)
    model.b = nn.Linear(6, 6, bias=bias, dtype=torch.float64)
    x = torch.randn(2, 3, 6, dtype=torch.float64)
    prepared = prepare(model, x)
    r, shift = torch.rand(6, dtype=torch.float64) + 0.5, torch.randn(6, dtype=torch.float64)
    ((norm, layers),) = norm_groups(prepared).items()
    rescale_norm(prepared, norm, layers, r, shift)
    torch.testing.assert_close(prepared(x), model(x))
    torch.testing.assert_close(prepared.own(x), model.own(x) / r - shift)
    with pytest.raises(ValueError, match="positive and finite"):
        rescale_norm(prepared, norm, layers, r * 0, shift)


def test_which_norms_can_be_scaled_and_shifted() -> None:
    class PlusOne(nn.RMSNorm):
        def forward(self, x: Tensor) -> Tensor:
            return F.rms_norm(x, self.normalized_shape, 1 + self.weight)

    assert can_scale(nn.LayerNorm(4)) and can_shift(nn.LayerNorm(4))
    assert can_scale(nn.RMSNorm(4)) and not can_shift(nn.RMSNorm(4))
    assert not can_scale(PlusOne(4)) and not can_scale(nn.RMSNorm(4, elementwise_affine=False))
    prepared = prepare(nn.Sequential(nn.RMSNorm(4), nn.Linear(4, 2)), torch.randn(3, 4))
    ((norm, layers),) = norm_groups(prepared).items()
    with pytest.raises(ValueError, match="can be scaled, not shifted"):
        rescale_norm(prepared, norm, layers, torch.ones(4), torch.ones(4))


# --- what is left out or refused -------------------------------------------------------------------------------------


def test_what_cannot_be_reached_is_named() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc, self.other = nn.Linear(6, 6), nn.Linear(6, 6)
            self.bare = nn.Parameter(torch.randn(6, 6))

        def forward(self, x: Tensor) -> Tensor:
            x = self.fc(x) @ self.bare
            return torch.einsum("bi,ij->bj", x, self.bare) + F.linear(x, self.bare) + self.other(x) @ (x.T @ x)

    with pytest.warns(UserWarning) as caught:
        prepared = prepare(Odd(), torch.randn(4, 6))
    text = str(caught[0].message)
    assert text.count("bare, called directly by the model (Odd)") == 3
    assert "a product of two activations that is no attention, in the model (Odd)" in text
    assert list(sites(prepared)) == ["fc", "other"]


def test_a_layer_with_a_forward_of_its_own_is_left_out() -> None:
    class Doubling(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    with pytest.raises(ValueError, match=r"nothing to quantize: .*0 \(Doubling\) has a forward of its own"):
        prepare(nn.Sequential(Doubling(6, 3)), torch.randn(4, 6))
    with pytest.warns(UserWarning, match=r"0 \(Doubling\)"):
        assert list(sites(prepare(nn.Sequential(Doubling(6, 3), nn.Linear(3, 2)), torch.randn(4, 6)))) == ["1"]


def test_nothing_to_quantize() -> None:
    with pytest.raises(ValueError, match="Sequential has nothing to quantize: it has no Linear layer"):
        prepare(nn.Sequential(nn.Flatten(), nn.ReLU()), torch.randn(4, 6))


def test_a_model_that_is_not_deterministic_is_refused() -> None:
    class Noisy(nn.Linear):
        pass

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(x + torch.randn_like(x))

    with pytest.raises(ValueError, match="does not reproduce the original"):
        prepare(Model(), torch.randn(4, 4))


def test_patterns_must_match_something() -> None:
    with pytest.raises(ValueError, match="exclude='heads' matches no layer"):
        prepare(nn.Sequential(nn.Linear(4, 4)), torch.randn(2, 4), exclude=["heads"])


def test_exclude_leaves_layers_and_attentions_alone() -> None:
    model, batch = built("timm ViT"), MODELS["timm ViT"][1]
    with pytest.warns(UserWarning, match="the products of blocks.0.attn"):
        quantized = quantize(model, w_bits=4, a_bits=4, calibration=batch, exclude=["blocks.0", "head"])
    assert all(name.startswith(("blocks.1.", "patch_embed")) for name in sites(quantized))
    assert torch.equal(quantized.blocks[0].attn.qkv.weight, model.blocks[0].attn.qkv.weight)


def test_a_layout_builds_the_same_copy_and_refuses_another_model() -> None:
    model, batch = built("open_clip CLIP"), MODELS["open_clip CLIP"][1]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        prepared = prepare(model, batch)
    again = build(copy.deepcopy(model), Layout(**layout_of(prepared).as_dict()))
    assert list(sites(again)) == list(sites(prepared))
    assert list(again.state_dict()) == list(prepared.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(outputs(again, batch), outputs(prepared, batch), strict=True))
    with pytest.raises(ValueError, match="the layout is of another model than Sequential"):
        build(nn.Sequential(nn.Linear(2, 2)), layout_of(prepared))
    with pytest.raises(ValueError, match="Sequential is not a prepared model"):
        layout_of(nn.Sequential())


def test_a_path_with_more_products_than_prepared_is_refused() -> None:
    class Varies(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            y = self.fc(x)
            for _ in range(1 if len(x) < 4 else 2):
                y = F.scaled_dot_product_attention(y, y, y)
            return y

    prepared = prepare(Varies(), torch.randn(2, 3, 4))
    with pytest.raises(ValueError, match="makes more products than when it was prepared"):
        prepared(torch.randn(4, 3, 4))


# --- what the sites see ----------------------------------------------------------------------------------------------


def test_site_inputs_are_what_hooks_see_whatever_the_memory() -> None:
    model, batch = built("timm ViT"), images(count=5)
    prepared = prepare(model, batch)
    seen: dict[str, list[Tensor]] = {}
    handles = [
        model.get_submodule(name).register_forward_hook(
            lambda _m, args, _o, name=name: seen.setdefault(name, []).append(args[0].detach())
        )
        for name in quantized_layers(prepared)
    ]
    model(batch)
    for handle in handles:
        handle.remove()
    lines: list[str] = []
    for memory, size in ((1e12, 5), (1.0, 2), (2e5, 3)):
        order = []
        for found in site_inputs(prepared, split_batches(batch, size), memory=memory, progress=lines.append):
            order.append(found.site.name)
            if isinstance(found.site, QuantizedProduct):
                left, right = found.inputs
                assert left.shape[:2] == right.shape[:2] == (5, 4) and left.shape[-1] == right.shape[-2]
                if found.site.kind == "pv":
                    torch.testing.assert_close(left.sum(-1), torch.ones(left.shape[:-1]))
            else:
                torch.testing.assert_close(found.inputs[0], torch.cat(seen[found.site.name]), rtol=1e-4, atol=1e-5)
        assert order == list(sites(prepared))
    assert lines[0].endswith(f"(1/{len(order)})") and {site.mode for site in sites(prepared).values()} == {"float"}


def test_gradients_at_the_outputs_are_autograds() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.GELU(), nn.Linear(6, 3)).double().requires_grad_(False).eval()
    x = torch.randn(7, 4, dtype=torch.float64)
    prepared = prepare(model, x)
    with torch.inference_mode(False):
        hidden = model[0](x).requires_grad_(True)
        out = model[2](model[1](hidden))
        expected = torch.autograd.grad(out.square().sum(), [hidden, out])
    with torch.no_grad():  # as callers often are
        found = list(site_inputs(prepared, split_batches(x, 3), loss=lambda output, index: output.square().sum()))
    assert [seen.site.name for seen in found] == ["0", "2"]
    for seen, gradient, output in zip(found, expected, (hidden, out), strict=True):
        torch.testing.assert_close(seen.gradient, gradient)
        torch.testing.assert_close(seen.output, output.detach())
    assert not any(parameter.requires_grad for parameter in prepared.parameters())


@pytest.mark.parametrize(
    ("calibration", "message"),
    [
        (torch.empty(0, 4), "calibration set is empty"),
        ([], "calibration set is empty"),
        (torch.full((2, 4), torch.nan), "NaN or infinity"),
        ({"a": torch.zeros(2, 3), "b": torch.full((2, 3), torch.inf)}, "NaN or infinity"),
        ((torch.zeros(2, 3), torch.zeros(3, 3)), r"differ in length: \[2, 3\]"),
        ("images", "calibration data is a str"),
    ],
)
def test_calibration_data_of_the_wrong_kind(calibration, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        split_batches(calibration, 2)


def test_calibration_data_is_cut_into_batches() -> None:
    mapping = {"ids": torch.arange(5), "scale": 2.0, "flag": torch.tensor(1)}
    cut = split_batches(mapping, 2)
    assert [batch["ids"].tolist() for batch in cut] == [[0, 1], [2, 3], [4]]
    assert all(batch["scale"] == 2.0 and batch["flag"] == 1 for batch in cut)
    pairs = split_batches((torch.arange(3), torch.arange(3) * 10), 2)
    assert [[t.tolist() for t in batch] for batch in pairs] == [[[0, 1], [0, 10]], [[2], [20]]]
    given = [torch.zeros(3, 2), torch.zeros(1, 2)]
    assert [len(batch) for batch in split_batches(given, 2)] == [3, 1]
    with pytest.raises(ValueError, match="batch_size is 0"):
        split_batches(torch.zeros(3, 2), 0)


def test_visits_name_a_site_that_is_never_reached() -> None:
    prepared = prepare(Residual(), torch.randn(2, 3, 6))
    seen = []
    visit_sites(prepared, [torch.randn(2, 3, 6)], lambda site, inputs: seen.append(site.name), [sites(prepared)["c"]])
    assert seen == ["c"]
    with pytest.raises(ValueError, match="never reached c"):
        visit_sites(prepared, [], lambda site, inputs: None, [sites(prepared)["c"]])
    with pytest.raises(ValueError, match="mode is 'on'"):
        set_mode(prepared, "on")
