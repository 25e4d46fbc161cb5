"""Which linear maps are watched, and where their matrices are.

The oracles: names written down by hand for each model, the output of the modules themselves for what a matrix does,
explicit loops over patches for convolutions, attention written out from its definition.
"""

from __future__ import annotations

import itertools
import pickle
import re
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.nn.utils import parametrizations, parametrize, prune

from s2d.layers import LinearMap, linear_maps, modules_sharing, plain_name


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="module")
def one_process(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A process group of this process alone."""
    if dist.is_initialized():
        yield
        return
    store = tmp_path_factory.mktemp("group") / "store"
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


class Block(nn.Module):
    """A transformer block as far as names go."""

    def __init__(self, width: int = 4) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.mlp = nn.ModuleDict({"fc1": nn.Linear(width, 8), "fc2": nn.Linear(8, width)})

    def forward(self, x: Tensor) -> Tensor:
        return x + self.mlp["fc2"](self.mlp["fc1"](self.norm(x)))


class Vit(nn.Module):
    """Stem, blocks and head, with a Linear layer in each."""

    def __init__(self, depth: int = 2) -> None:
        super().__init__()
        self.embed = nn.Linear(6, 4)
        self.blocks = nn.Sequential(*(Block() for _ in range(depth)))
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(self.embed(x)))


FFN = ["blocks.0.mlp.fc1", "blocks.0.mlp.fc2", "blocks.1.mlp.fc1", "blocks.1.mlp.fc2"]


def mlp(*widths: int) -> nn.Sequential:
    """Linear layers at 0, 1, 2, ... without anything between."""
    return nn.Sequential(*(nn.Linear(n, m) for n, m in itertools.pairwise(widths)))


def names_in(template: str, layers: str, depth: int = 2) -> list[str]:
    return [f"{template.format(index)}.{layer}" for index in range(depth) for layer in layers.split()]


# --- what a map computes ------------------------------------------------------------------------------------------


def conv1d_of_gpt2(out_features: int, in_features: int) -> nn.Module:
    layer = pytest.importorskip("transformers.pytorch_utils").Conv1D(out_features, in_features)
    nn.init.normal_(layer.bias)
    return layer


@pytest.mark.parametrize("make", [lambda: nn.Linear(5, 3), lambda: conv1d_of_gpt2(3, 5)], ids=["Linear", "Conv1D"])
@pytest.mark.parametrize("by_keyword", [False, True])
def test_a_dense_layer_is_its_matrix_and_bias(make: Callable[[], nn.Module], by_keyword: bool) -> None:
    layer, x = make(), torch.randn(2, 4, 5)
    (linear,) = linear_maps(layer).values()
    calls = []
    layer.register_forward_pre_hook(lambda _, args, kwargs: calls.append((args, kwargs)), with_kwargs=True)
    y = layer(**{linear.keyword: x}) if by_keyword else layer(x)
    assert linear.shape == tuple(linear.matrix().shape) == (3, 5)
    assert linear.input(*calls[0]) is x
    torch.testing.assert_close(x @ linear.matrix().T + layer.bias, y)


def attention_by_hand(mha: nn.MultiheadAttention, maps: dict[str, LinearMap], inputs: dict[str, Tensor]) -> Tensor:
    """Softmax attention from its definition, on batch-first inputs; the matrices come from the maps."""
    heads = {}
    for position, part in enumerate("qkv"):
        y = inputs[part] @ maps[part].matrix().T
        if mha.in_proj_bias is not None:
            y = y + mha.in_proj_bias[position * mha.embed_dim : (position + 1) * mha.embed_dim]
        heads[part] = y.unflatten(-1, (mha.num_heads, mha.head_dim)).transpose(1, 2)
    scores = torch.softmax(heads["q"] @ heads["k"].transpose(-1, -2) / mha.head_dim**0.5, dim=-1)
    return mha.out_proj((scores @ heads["v"]).transpose(1, 2).flatten(2))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("widths", [{}, {"kdim": 5, "vdim": 3}, {"vdim": 3}], ids=["packed", "unpacked", "vdim"])
@pytest.mark.parametrize("call", ["positions", "keywords", "mixed"])
def test_attention_projections(bias: bool, widths: dict[str, int], call: str) -> None:
    mha = nn.MultiheadAttention(8, 2, bias=bias, batch_first=True, **widths)
    if bias:
        nn.init.normal_(mha.in_proj_bias)
    maps = linear_maps(mha)
    assert [(name, linear.shape[0]) for name, linear in maps.items()] == [("q", 8), ("k", 8), ("v", 8)]
    assert [linear.shape[1] for linear in maps.values()] == [8, widths.get("kdim", 8), widths.get("vdim", 8)]
    x = {"q": torch.randn(2, 3, 8), "k": torch.randn(2, 4, mha.kdim), "v": torch.randn(2, 4, mha.vdim)}
    seen = {}

    def record(_: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        seen.update({name: linear.input(args, kwargs) for name, linear in maps.items()})

    mha.register_forward_pre_hook(record, with_kwargs=True)
    if call == "positions":
        y, _ = mha(x["q"], x["k"], x["v"])
    elif call == "keywords":
        y, _ = mha(value=x["v"], key=x["k"], query=x["q"])
    else:
        y, _ = mha(x["q"], value=x["v"], key=x["k"])
    assert all(seen[part] is x[part] for part in "qkv")
    torch.testing.assert_close(attention_by_hand(mha, maps, x), y)


def test_self_attention_shares_one_input() -> None:
    mha, x = nn.MultiheadAttention(4, 2, batch_first=True), torch.randn(1, 3, 4)
    torch.testing.assert_close(attention_by_hand(mha, linear_maps(mha), dict.fromkeys("qkv", x)), mha(x, x, x)[0])


def convolve_by_hand(conv: nn.Module, maps: list[LinearMap], x: Tensor) -> Tensor:
    """Each patch of the padded input, flattened, times the matrix of its group; without bias."""
    x = nn.functional.pad(x, [side for padding in reversed(conv.padding) for side in (padding, padding)])
    reach = [d * (k - 1) + 1 for d, k in zip(conv.dilation, conv.kernel_size, strict=True)]
    starts = [range(0, n - r + 1, s) for n, r, s in zip(x.shape[2:], reach, conv.stride, strict=True)]
    width = conv.in_channels // conv.groups
    outputs = []
    for start in itertools.product(*starts):
        window = tuple(slice(b, b + r, d) for b, r, d in zip(start, reach, conv.dilation, strict=True))
        patch = x[(slice(None), slice(None), *window)]
        groups = [patch[:, g * width : (g + 1) * width].flatten(1) for g in range(conv.groups)]
        outputs.append(torch.cat([p @ linear.matrix().T for p, linear in zip(groups, maps, strict=True)], dim=1))
    return torch.stack(outputs, dim=-1).unflatten(-1, [len(positions) for positions in starts])


@pytest.mark.parametrize("make", [nn.Conv1d, nn.Conv2d, nn.Conv3d])
@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("options", [{}, {"stride": 2, "padding": 1}, {"dilation": 2, "bias": False}])
def test_convolutions_act_on_patches(make: type[nn.Module], groups: int, options: dict[str, Any]) -> None:
    conv = make(4, 8, 2, groups=groups, **options)
    x = torch.randn(2, 4, *(5, 4, 3)[: conv.weight.ndim - 2])
    maps = linear_maps(nn.ModuleDict({"conv": conv}), include="*")
    labels = ["conv"] if groups == 1 else [f"conv.group{g}" for g in range(groups)]
    assert list(maps) == labels
    assert all(linear.shape == tuple(linear.matrix().shape) for linear in maps.values())
    bias = 0 if conv.bias is None else conv.bias.view(-1, *[1] * (conv.weight.ndim - 2))
    torch.testing.assert_close(convolve_by_hand(conv, list(maps.values()), x) + bias, conv(x))


def test_the_patches_of_a_convolution_are_those_of_unfold() -> None:
    conv, x = nn.Conv2d(3, 5, (2, 3), bias=False), torch.randn(2, 3, 4, 6)
    (linear,) = linear_maps(conv, include="*").values()
    patches = nn.functional.unfold(x, conv.kernel_size)
    torch.testing.assert_close((linear.matrix() @ patches).unflatten(-1, (3, 4)), conv(x))


HOLDERS = {
    "Linear": lambda: nn.Linear(5, 3),
    "Conv1D of GPT-2": lambda: conv1d_of_gpt2(3, 5),
    "packed attention": lambda: nn.MultiheadAttention(4, 2),
    "unpacked attention": lambda: nn.MultiheadAttention(4, 2, kdim=3, vdim=5),
    "Conv2d": lambda: nn.Conv2d(4, 6, 3),
    "grouped Conv1d": lambda: nn.Conv1d(4, 6, 3, groups=2),
    "depthwise Conv3d": lambda: nn.Conv3d(4, 4, 2, groups=4),
}


@pytest.mark.parametrize("make", HOLDERS.values(), ids=HOLDERS)
@pytest.mark.parametrize("where", ["weight", "gradient"])
def test_maps_change_every_entry_of_their_parameters_once(make: Callable[[], nn.Module], where: str) -> None:
    maps = linear_maps(make(), include="*").values()
    parameters = {id(linear.weight): linear.weight for linear in maps}.values()
    for parameter in parameters:
        nn.init.ones_(parameter)
        parameter.grad = torch.ones_like(parameter)
    with torch.no_grad():
        for linear in maps:
            linear.matrix(linear.weight.grad if where == "gradient" else None).add_(1)
    changed, kept = (2, 1) if where == "weight" else (1, 2)
    assert all(torch.equal(p, torch.full_like(p, changed)) for p in parameters)
    assert all(torch.equal(p.grad, torch.full_like(p, kept)) for p in parameters)


def test_gradients_flow_through_the_matrix() -> None:
    mha = nn.MultiheadAttention(4, 2)
    linear_maps(mha)["k"].matrix().sum().backward()
    assert torch.equal(mha.in_proj_weight.grad.sum(1), torch.tensor([0.0] * 4 + [4.0] * 4 + [0.0] * 4))


def test_a_replaced_weight_is_read_anew() -> None:
    layer = nn.Linear(3, 2)
    (linear,) = linear_maps(layer).values()
    layer.weight = nn.Parameter(torch.full((2, 3), 7.0))
    assert linear.weight is layer.weight and torch.equal(linear.matrix(), torch.full((2, 3), 7.0))


def test_a_map_survives_pickling() -> None:
    linear = linear_maps(nn.MultiheadAttention(4, 2))["v"]
    copy = pickle.loads(pickle.dumps(linear))
    assert copy.name == "v" and torch.equal(copy.matrix(), linear.matrix())


class TestChannelsLast:
    def test_a_kernel_that_is_no_matrix_is_refused_with_a_repair_that_works(self) -> None:
        model = nn.Sequential(nn.Conv2d(3, 4, 2), nn.Conv2d(4, 2, 2)).to(memory_format=torch.channels_last)
        with pytest.raises(ValueError, match=r"layer 0 .*channels_last: call model\.to\(memory_format="):
            linear_maps(model, include="*")
        model.to(memory_format=torch.contiguous_format)
        assert list(linear_maps(model, include="*")) == ["0", "1"]

    def test_a_model_converted_later_is_refused_when_the_matrix_is_asked_for(self) -> None:
        conv = nn.Conv2d(3, 4, 2, groups=1)
        (linear,) = linear_maps(conv, include="*").values()
        conv.to(memory_format=torch.channels_last)
        with pytest.raises(ValueError, match="layer Conv2d .*channels_last"):
            linear.matrix()

    @pytest.mark.parametrize(
        "make", [lambda: nn.Conv2d(3, 4, 1), lambda: nn.Conv2d(4, 4, 3, groups=4)], ids=["one pixel", "depthwise"]
    )
    def test_kernels_that_still_are_matrices_are_views(self, make: Callable[[], nn.Module]) -> None:
        conv = make()
        before = conv.weight.detach().clone()
        conv.to(memory_format=torch.channels_last)
        maps = linear_maps(conv, include="*").values()
        assert torch.equal(torch.cat([linear.matrix() for linear in maps]), before.flatten(1))
        with torch.no_grad():
            for linear in maps:
                linear.matrix().zero_()
        assert not conv.weight.any()

    def test_linear_layers_do_not_care(self) -> None:
        model = nn.ModuleDict({"stem": nn.Conv2d(3, 4, 2), "vit": Vit()}).to(memory_format=torch.channels_last)
        assert list(linear_maps(model)) == [f"vit.{name}" for name in FFN]


# --- the default choice ---------------------------------------------------------------------------------------------


def test_default_is_the_linears_inside_the_blocks() -> None:
    model = Vit()
    found = linear_maps(model)
    assert list(found) == FFN
    for name, linear in found.items():
        assert linear.name == name and linear.module is model.get_submodule(name)
        assert linear.weight is linear.module.weight and linear.shape == tuple(linear.module.weight.shape)


def test_every_block_counts_in_model_order_whatever_the_depth() -> None:
    assert list(linear_maps(Vit(depth=11))) == names_in("blocks.{}.mlp", "fc1 fc2", depth=11)


@pytest.mark.parametrize("container", [nn.Sequential, lambda *blocks: nn.ModuleList(blocks)])
def test_blocks_at_the_top_of_a_container(container: Callable[..., nn.Module]) -> None:
    found = linear_maps(container(Block(), nn.GELU(), Block(), nn.Linear(4, 2)))
    assert list(found) == ["0.mlp.fc1", "0.mlp.fc2", "2.mlp.fc1", "2.mlp.fc2"]


def test_block_1_is_not_the_beginning_of_layer_10() -> None:
    model = nn.Sequential(Block(), Block(), *[nn.GELU() for _ in range(8)], nn.Linear(4, 2))
    assert list(linear_maps(model)) == names_in("{}.mlp", "fc1 fc2")


def test_blocks_of_two_towers() -> None:
    model = nn.ModuleDict({"visual": Vit(), "text": Vit()})
    assert list(linear_maps(model)) == [f"{tower}.{name}" for tower in ("visual", "text") for name in FFN]


def test_blocks_inside_blocks_are_listed_once() -> None:
    stages = nn.Sequential(nn.Sequential(Block(), Block()), nn.Sequential(Block(), Block()))
    expected = [f"0.{stage}.{block}.mlp.{fc}" for stage in (0, 1) for block in (0, 1) for fc in ("fc1", "fc2")]
    assert list(linear_maps(nn.Sequential(stages, nn.Linear(4, 2)))) == expected


def test_blocks_of_blocks_with_a_layer_between() -> None:
    class Stage(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.reduce = nn.Linear(4, 4)
            self.blocks = nn.ModuleList([Block(), Block()])

    found = linear_maps(nn.ModuleDict({"stages": nn.ModuleList([Stage(), Stage()]), "head": nn.Linear(4, 2)}))
    assert list(found) == names_in("stages.{}", "reduce " + " ".join(FFN))


def test_experts_and_their_router_belong_to_the_block() -> None:
    class Mixture(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.router = nn.Linear(4, 3)
            self.experts = nn.ModuleList([Block() for _ in range(3)])

    model = nn.ModuleDict({"layers": nn.ModuleList([Mixture(), Mixture()]), "lm_head": nn.Linear(4, 9)})
    inside = "router " + " ".join(names_in("experts.{}.mlp", "fc1 fc2", depth=3))
    assert list(linear_maps(model)) == names_in("layers.{}", inside)
    assert list(linear_maps(Mixture())) == names_in("experts.{}.mlp", "fc1 fc2", depth=3)


def test_blocks_that_share_all_weights_are_still_blocks() -> None:
    block = Block()
    model = nn.ModuleDict({"embed": nn.Linear(6, 4), "blocks": nn.ModuleList([block] * 6), "head": nn.Linear(4, 2)})
    assert list(linear_maps(model)) == ["blocks.0.mlp.fc1", "blocks.0.mlp.fc2"]


def test_convolutions_in_a_block_wait_to_be_named() -> None:
    block = lambda: nn.ModuleDict({"conv": nn.Conv2d(2, 2, 3, groups=2), "fc": nn.Linear(2, 2)})  # noqa: E731
    model = nn.Sequential(block(), block())
    assert list(linear_maps(model)) == ["0.fc", "1.fc"]
    assert list(linear_maps(model, include="*conv*")) == names_in("{}.conv", "group0 group1")


def test_attention_layers_make_blocks_of_their_own() -> None:
    model = nn.ModuleDict({"stem": nn.Linear(4, 4), "mix": nn.ModuleList([nn.MultiheadAttention(4, 2)] * 2)})
    assert list(linear_maps(model)) == ["mix.0.q", "mix.0.k", "mix.0.v"]


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        (lambda: nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 1)), ["0", "2"]),
        (lambda: nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2)]), ["0", "1"]),
        (lambda: nn.Linear(3, 2), [""]),
        (lambda: Vit(depth=1), ["embed", "blocks.0.mlp.fc1", "blocks.0.mlp.fc2", "head"]),
        (lambda: nn.Sequential(nn.Conv2d(1, 2, 3), nn.Conv2d(2, 2, 3), nn.Flatten(), nn.Linear(8, 2)), ["3"]),
        (lambda: nn.Sequential(type("Special", (nn.Linear,), {})(2, 2), nn.Bilinear(2, 2, 2)), ["0"]),
        (lambda: nn.ModuleDict({"lists": nn.ModuleList([nn.Linear(2, 2)] * 2), "vit": Vit()}), None),
    ],
    ids=["plain MLP", "list of Linears", "bare Linear", "single block", "CNN", "subclass", "blocks beside a list"],
)
def test_without_blocks_every_layer_counts(model: Callable[[], nn.Module], expected: list[str] | None) -> None:
    assert list(linear_maps(model())) == (expected or [f"vit.{name}" for name in FFN])


def test_out_proj_of_attention_cannot_be_watched_whatever_its_class() -> None:
    mha = nn.MultiheadAttention(4, 2)
    assert list(linear_maps(mha, include="*")) == ["q", "k", "v"]
    mha.out_proj = nn.Linear(4, 4)
    calls = []
    mha.out_proj.register_forward_hook(lambda *_: calls.append(1))
    mha(*[torch.randn(3, 4)] * 3)
    assert not calls  # this is why
    assert list(linear_maps(mha, include="*")) == ["q", "k", "v"]


# --- the default choice on models people use ------------------------------------------------------------------------

IMAGE = lambda size: (torch.randn(1, 3, size, size),)  # noqa: E731
TOKENS = {"input_ids": torch.tensor([[1, 2, 3, 4]])}
WIDTHS = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
QWEN = {"vocab_size": 30, "num_key_value_heads": 1, **WIDTHS}


def from_timm(name: str, **options: Any) -> Callable[[], nn.Module]:
    options = {"depth": 2, "embed_dim": 16, "num_heads": 2, "num_classes": 3, "img_size": 32} | options
    options = {key: value for key, value in options.items() if value is not None}
    return lambda: pytest.importorskip("timm").create_model(name, **options)


def from_transformers(model: str, config: str, **options: Any) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        transformers = pytest.importorskip("transformers")
        return getattr(transformers, model)(getattr(transformers, config)(**options))

    return build


def open_clip_model(**vision: Any) -> nn.Module:
    pytest.importorskip("open_clip")
    from open_clip.model import CLIP, CLIPTextCfg, CLIPVisionCfg

    image = CLIPVisionCfg(layers=2, width=16, head_width=8, image_size=32, patch_size=16, **vision)
    return CLIP(8, image, CLIPTextCfg(layers=2, width=16, heads=2, vocab_size=50, context_length=4))


def gpt2(**options: Any) -> nn.Module:
    sizes = {"vocab_size": 30, "n_positions": 16, "n_embd": 16, "n_layer": 2, "n_head": 2}
    tokens = {"bos_token_id": 0, "eos_token_id": 1}
    return from_transformers("GPT2LMHeadModel", "GPT2Config", **sizes, **tokens, **options)()


def llava() -> nn.Module:
    transformers = pytest.importorskip("transformers")
    config = transformers.LlavaConfig(
        vision_config=transformers.CLIPVisionConfig(image_size=32, patch_size=16, **WIDTHS),
        text_config=transformers.Qwen2Config(**QWEN),
        image_token_index=29,
    )
    return transformers.LlavaForConditionalGeneration(config)


TIMM_BLOCK = names_in("blocks.{}", "attn.qkv attn.proj mlp.fc1 mlp.fc2")
CLIP_BLOCKS = names_in("transformer.resblocks.{}", "attn.q attn.k attn.v mlp.c_fc mlp.c_proj")
LLAMA_BLOCK = "self_attn.q_proj self_attn.k_proj self_attn.v_proj self_attn.o_proj "
LLAMA_BLOCK += "mlp.gate_proj mlp.up_proj mlp.down_proj"
TORCH_BLOCK = "self_attn.q self_attn.k self_attn.v linear1 linear2"
BERT_BLOCK = "attention.self.query attention.self.key attention.self.value attention.output.dense "
BERT_BLOCK += "intermediate.dense output.dense"
SWIN_BLOCKS = " ".join(TIMM_BLOCK)
# name: how to build it, what to call it with, and the layers by hand
ZOO: dict[str, tuple[Callable[[], nn.Module], tuple | dict, list[str]]] = {
    "timm ViT": (from_timm("vit_tiny_patch16_224"), IMAGE(32), TIMM_BLOCK),
    "timm SigLIP": (from_timm("vit_base_patch16_siglip_224", num_classes=None), IMAGE(32), TIMM_BLOCK),
    "timm DINOv3": (from_timm("vit_small_patch16_dinov3"), IMAGE(32), TIMM_BLOCK),
    "timm DINOv3 SwiGLU": (
        from_timm("vit_small_plus_patch16_dinov3"),
        IMAGE(32),
        names_in("blocks.{}", "attn.qkv attn.proj mlp.fc1_g mlp.fc1_x mlp.fc2"),
    ),
    "timm EVA02 SwiGLU": (
        from_timm("eva02_base_patch14_224", img_size=28),
        IMAGE(28),
        names_in("blocks.{}", "attn.q_proj attn.k_proj attn.v_proj attn.proj mlp.fc1_g mlp.fc1_x mlp.fc2"),
    ),
    "timm Swin": (
        from_timm("swin_tiny_patch4_window7_224", depth=None, depths=(2, 2), num_heads=(2, 2), window_size=4),
        IMAGE(32),
        [
            *names_in("layers.{}", SWIN_BLOCKS, depth=1),
            "layers.1.downsample.reduction",
            *(f"layers.1.{name}" for name in TIMM_BLOCK),
        ],
    ),
    "open_clip": (
        open_clip_model,
        (torch.randn(1, 3, 32, 32), torch.tensor([[1, 2, 3, 49]])),
        [*(f"visual.{name}" for name in CLIP_BLOCKS), *CLIP_BLOCKS],
    ),
    "torch TransformerEncoder": (
        lambda: nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 2),
        (torch.randn(1, 3, 8),),
        names_in("layers.{}", TORCH_BLOCK),
    ),
    "torch TransformerDecoder": (
        lambda: nn.TransformerDecoder(nn.TransformerDecoderLayer(8, 2, 16), 2),
        (torch.randn(3, 1, 8), torch.randn(2, 1, 8)),
        names_in("layers.{}", TORCH_BLOCK.replace("linear1", "{0}.q {0}.k {0}.v linear1").format("multihead_attn")),
    ),
    "transformers BERT": (
        from_transformers("BertModel", "BertConfig", vocab_size=30, max_position_embeddings=16, **WIDTHS),
        TOKENS,
        names_in("encoder.layer.{}", BERT_BLOCK),
    ),
    "transformers ViT": (
        from_transformers("ViTForImageClassification", "ViTConfig", image_size=32, **WIDTHS),
        IMAGE(32),
        names_in(
            "vit.layers.{}",
            "attention.q_proj attention.k_proj attention.v_proj attention.o_proj mlp.fc1 mlp.fc2",
        ),
    ),
    "transformers Qwen2": (
        from_transformers("Qwen2ForCausalLM", "Qwen2Config", **QWEN),
        TOKENS,
        names_in("model.layers.{}", LLAMA_BLOCK),
    ),
    "transformers GPT-2": (
        gpt2,
        TOKENS,
        names_in("transformer.h.{}", "attn.c_attn attn.c_proj mlp.c_fc mlp.c_proj"),
    ),
    "transformers Llava": (
        llava,
        {"input_ids": torch.tensor([[29] * 4 + [1, 2]]), "pixel_values": torch.randn(1, 3, 32, 32)},
        [
            *names_in(
                "model.vision_tower.encoder.layers.{}",
                "self_attn.k_proj self_attn.v_proj self_attn.q_proj self_attn.out_proj mlp.fc1 mlp.fc2",
            ),
            *names_in("model.language_model.layers.{}", LLAMA_BLOCK),
        ],
    ),
}


@pytest.mark.parametrize(("build", "batch", "expected"), ZOO.values(), ids=ZOO)
def test_models_people_use(build: Callable[[], nn.Module], batch: tuple | dict, expected: list[str]) -> None:
    """The names, and that each layer is called and computes ``x W^T + b`` with the matrix of its map."""
    model = build()
    maps = linear_maps(model)
    assert list(maps) == expected
    calls = {}

    def record(linear: LinearMap) -> None:
        def hook(module: nn.Module, args: tuple, kwargs: dict, output: Any) -> None:
            calls[linear.name] = linear.input(args, kwargs), output

        linear.module.register_forward_hook(hook, with_kwargs=True)

    for linear in maps.values():
        record(linear)
    model(**batch) if isinstance(batch, dict) else model(*batch)
    assert sorted(calls) == sorted(expected)
    for name, (x, y) in calls.items():
        linear = maps[name]
        assert x.shape[-1] == linear.shape[1] == linear.matrix().shape[1]
        if not isinstance(linear.module, nn.MultiheadAttention):
            bias = 0 if linear.module.bias is None else linear.module.bias
            torch.testing.assert_close(x @ linear.matrix().T + bias, y)


# --- wrappers -------------------------------------------------------------------------------------------------------


def compile_blocks(model: Vit) -> Vit:
    for key, block in model.blocks.named_children():
        model.blocks[int(key)] = torch.compile(block)
    return model


def checkpoint_first_block(model: Vit) -> Vit:
    model.blocks[0] = checkpoint_wrapper(model.blocks[0])
    return model


def compile_checkpointed_block(model: Vit) -> Vit:
    model.blocks[1] = torch.compile(checkpoint_wrapper(model.blocks[1]))
    return model


def compile_in_place(model: Vit) -> Vit:
    model.compile()
    return model


WRAPPERS = {
    "DataParallel": nn.DataParallel,
    "DDP": lambda model: nn.parallel.DistributedDataParallel(model),
    "compile": torch.compile,
    "compile in place": compile_in_place,
    "compiled DDP": lambda model: torch.compile(nn.parallel.DistributedDataParallel(model)),
    "DDP of compiled": lambda model: nn.parallel.DistributedDataParallel(torch.compile(model)),
    "compiled blocks": compile_blocks,
    "DDP of compiled blocks": lambda model: nn.parallel.DistributedDataParallel(compile_blocks(model)),
    "checkpointed block": checkpoint_first_block,
    "compiled and checkpointed block": compile_checkpointed_block,
    "average": torch.optim.swa_utils.AveragedModel,
}


@pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS)
@pytest.mark.parametrize("choice", [{}, {"include": "*"}, {"exclude": "blocks.0.*"}])
def test_wrappers_change_neither_names_nor_choice(
    wrap: Callable[[nn.Module], nn.Module], choice: dict[str, str], one_process: None
) -> None:
    model = Vit()
    expected = {name: linear.weight.detach().clone() for name, linear in linear_maps(model, **choice).items()}
    wrapped = wrap(model)
    found = linear_maps(wrapped, **choice)
    assert list(found) == list(expected)
    owned = {id(parameter) for parameter in wrapped.parameters()}
    for name, linear in found.items():
        assert torch.equal(linear.matrix(), expected[name]) and id(linear.weight) in owned
        assert modules_sharing(wrapped, linear) == [linear]


def test_a_model_with_a_child_called_module_is_no_wrapper() -> None:
    model = nn.ModuleDict({"module": Vit(), "head": nn.Linear(3, 2)})
    assert list(linear_maps(model)) == [f"module.{name}" for name in FFN]
    everything = linear_maps(nn.DataParallel(model), include="*")
    assert list(everything) == ["module.embed", *(f"module.{name}" for name in FFN), "module.head", "head"]


def test_a_bare_layer_keeps_its_empty_name_in_a_wrapper() -> None:
    layer = nn.Linear(2, 2)
    assert linear_maps(nn.DataParallel(torch.compile(layer))) == {"": LinearMap("", layer)}


@pytest.mark.parametrize(
    ("name", "plain"),
    [
        ("blocks.0.fc", "blocks.0.fc"),
        ("module.blocks.0.fc", "blocks.0.fc"),
        ("_orig_mod.module.blocks.0.fc", "blocks.0.fc"),
        ("blocks.0._orig_mod._checkpoint_wrapped_module.fc.weight", "blocks.0.fc.weight"),
        ("blocks.module.fc", "blocks.module.fc"),
        ("modules.0", "modules.0"),
        ("module", ""),
        ("", ""),
    ],
)
def test_plain_names(name: str, plain: str) -> None:
    assert plain_name(name) == plain


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_fsdp1_is_refused(one_process: None) -> None:
    from torch.distributed.fsdp import FullyShardedDataParallel

    wrapped = FullyShardedDataParallel(mlp(2, 3, 4), device_id=torch.device("cpu"))
    for model, where in [(wrapped, "the model"), (nn.ModuleDict({"inner": wrapped, "fc": nn.Linear(2, 2)}), "inner")]:
        with pytest.raises(ValueError, match=f"{where} is wrapped in FSDP1.*fully_shard"):
            linear_maps(model)


def test_subclasses_of_fsdp1_are_refused_too() -> None:
    base = type("FullyShardedDataParallel", (nn.Sequential,), {})
    with pytest.raises(ValueError, match="the model is wrapped in FSDP1"):
        linear_maps(type("Xla", (base,), {})(nn.Linear(2, 2)))


def test_fsdp2_changes_neither_names_nor_choice(one_process: None) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (1,))
    model = Vit()
    fully_shard(model.blocks[1], mesh=mesh)  # one of two blocks: their classes now have different names
    fully_shard(model, mesh=mesh)
    assert list(linear_maps(model)) == FFN
    model = gpt2()
    expected = list(linear_maps(model))
    fully_shard(model.transformer.h[0].mlp.c_fc, mesh=mesh)
    assert list(linear_maps(model)) == expected


# --- include and exclude --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("include", "exclude", "expected"),
    [
        ("*.fc1", (), [FFN[0], FFN[2]]),
        (["head", "*.fc1"], (), [FFN[0], FFN[2], "head"]),
        ("*", (), ["embed", *FFN, "head"]),
        ("head", (), ["head"]),
        (None, "blocks.0.*", FFN[2:]),
        (None, ["*.fc2", "head"], [FFN[0], FFN[2]]),
        ("*", ("embed", "head"), FFN),
        ("blocks.[!0].mlp.*", (), FFN[2:]),
        (lambda name, module: module.out_features == 8, (), [FFN[0], FFN[2]]),
        (lambda name, module: "blocks" not in name, "embed", ["head"]),
        (None, lambda name, module: name.startswith("blocks.1"), FFN[:2]),
        (None, lambda name, module: False, FFN),
    ],
)
def test_include_and_exclude(include: Any, exclude: Any, expected: list[str]) -> None:
    assert list(linear_maps(Vit(), include=include, exclude=exclude)) == expected


def test_parts_of_attention_are_chosen_by_name() -> None:
    encoder = ZOO["torch TransformerEncoder"][0]()
    assert list(linear_maps(encoder, include="*.self_attn.[qk]")) == names_in("layers.{}.self_attn", "q k")
    assert list(linear_maps(encoder, exclude=["*.q", "*.k"])) == names_in("layers.{}", "self_attn.v linear1 linear2")


def test_patterns_are_case_sensitive() -> None:
    with pytest.raises(ValueError, match="'HEAD' matches no linear layer"):
        linear_maps(Vit(), include="HEAD")
    assert list(linear_maps(nn.ModuleDict({"fc": nn.Linear(2, 2), "FC": nn.Linear(2, 2)}), include="FC")) == ["FC"]


@pytest.mark.parametrize("choice", [{"include": "*.fc3"}, {"exclude": "*.fc3"}, {"include": ["head", "*.fc3"]}])
def test_a_pattern_that_matches_nothing_is_named_with_what_there_is(choice: dict) -> None:
    with pytest.raises(ValueError, match=r"'\*\.fc3' matches no linear layer; there are: embed, blocks\.0\.mlp\.fc1"):
        linear_maps(Vit(), **choice)


@pytest.mark.parametrize(
    "choice",
    [
        {"exclude": "*"},
        {"include": "head", "exclude": "head"},
        {"include": []},
        {"include": lambda name, module: False},
    ],
)
def test_a_choice_that_leaves_nothing_is_refused(choice: dict) -> None:
    with pytest.raises(ValueError, match="leave none of: embed, "):
        linear_maps(Vit(), **choice)


@pytest.mark.parametrize("model", [nn.BatchNorm2d(1), nn.Sequential(), nn.DataParallel(nn.BatchNorm2d(1))])
def test_no_linear_layer_is_refused(model: nn.Module) -> None:
    with pytest.raises(ValueError, match="(BatchNorm2d|Sequential) has no linear layer, and S2D acts on those"):
        linear_maps(model)


@pytest.mark.parametrize(("groups", "names"), [(1, "0, 2"), (2, "0, 2.group0, 2.group1")])
def test_nothing_but_convolutions_is_refused_with_their_names(groups: int, names: str) -> None:
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(), nn.Conv2d(2, 2, 3, groups=groups))
    with pytest.raises(ValueError, match=f"Sequential has no linear layers but convolutions.*include=.*: {names}$"):
        linear_maps(model)


def test_an_empty_name_is_visible_in_messages() -> None:
    with pytest.raises(ValueError, match="leave none of: ''$"):
        linear_maps(nn.Linear(2, 2), exclude="")


def test_long_lists_of_names_are_cut() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Conv1d(512, 512, 1, groups=512))
    with pytest.raises(ValueError, match=r": 0, 1\.group0, .*, 1\.group98, and 413 more$"):
        linear_maps(model, include="2")


# --- tied weights ---------------------------------------------------------------------------------------------------


def tied_mlp() -> nn.Sequential:
    model = mlp(4, 4, 4, 4)
    model[1].weight = model[0].weight
    return model


def test_a_tied_weight_appears_once_under_its_first_name() -> None:
    model = tied_mlp()
    maps = linear_maps(model)
    assert list(maps) == ["0", "2"]
    assert [(twin.name, twin.module) for twin in modules_sharing(model, maps["0"])] == [
        ("0", model[0]),
        ("1", model[1]),
    ]
    assert [twin.name for twin in modules_sharing(model, maps["2"])] == ["2"]


@pytest.mark.parametrize("name", ["0", "1"])
def test_a_tied_weight_is_excluded_under_any_of_its_names(name: str) -> None:
    assert list(linear_maps(tied_mlp(), exclude=name)) == ["2"]
    assert list(linear_maps(tied_mlp(), include=["0", "2"], exclude=name)) == ["2"]


def test_a_tied_weight_may_be_included_under_its_second_name() -> None:
    assert list(linear_maps(tied_mlp(), include="[12]")) == ["1", "2"]


def test_equal_values_are_no_tie() -> None:
    model = mlp(4, 4, 4)
    model[1].load_state_dict(model[0].state_dict())
    assert list(linear_maps(model)) == ["0", "1"]


def test_a_layer_used_under_two_names_appears_once() -> None:
    layer = nn.Linear(4, 4)
    model = nn.Sequential(layer, nn.ReLU(), layer)
    assert list(linear_maps(model)) == ["0"]
    assert [twin.name for twin in modules_sharing(model, LinearMap("2", layer))] == ["0", "2"]
    with pytest.raises(ValueError, match="leave none of: 0, 2"):
        linear_maps(model, exclude="2")


def tied_attention() -> nn.ModuleDict:
    model = nn.ModuleDict({"a": nn.MultiheadAttention(4, 2), "b": nn.MultiheadAttention(4, 2), "fc": nn.Linear(4, 4)})
    model.b.in_proj_weight = model.a.in_proj_weight
    return model


def test_tied_attention_appears_once_part_by_part() -> None:
    model = tied_attention()
    maps = linear_maps(model)
    assert list(maps) == ["a.q", "a.k", "a.v", "fc"]
    assert [twin.name for twin in modules_sharing(model, maps["a.k"])] == ["a.k", "b.k"]
    assert list(linear_maps(model, exclude="b.k")) == ["a.q", "a.v", "fc"]


def test_a_head_tied_to_an_embedding_is_a_layer_that_must_be_asked_for() -> None:
    model = from_transformers("Qwen2ForCausalLM", "Qwen2Config", tie_word_embeddings=True, **QWEN)()
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert "lm_head" not in linear_maps(model)
    assert list(linear_maps(model, include="lm_head")) == ["lm_head"]


# --- what is refused ------------------------------------------------------------------------------------------------


def refusal(model: nn.Module, **choice: Any) -> str:
    with pytest.raises(ValueError) as error:
        linear_maps(model, **choice)
    return str(error.value)


class TestAdapters:
    @pytest.fixture
    def peft(self):
        return pytest.importorskip("peft")

    def test_lora_is_refused_and_leaves_the_rest_usable(self, peft) -> None:
        model = peft.get_peft_model(gpt2(), peft.LoraConfig(task_type="CAUSAL_LM", fan_in_fan_out=True))
        prefix = "base_model.model.transformer.h"
        message = refusal(model)
        assert message.startswith(f"layer {prefix}.0.attn.c_attn.base_layer belongs to a PEFT adapter")
        assert "W + BA" in message and "merge_and_unload()" in message and "exclude=" in message
        rest = names_in(prefix + ".{}", "attn.c_proj mlp.c_fc mlp.c_proj")
        assert list(linear_maps(model, exclude="*.c_attn.*")) == rest
        assert list(linear_maps(nn.DataParallel(model), include=rest)) == rest
        assert "base_layer" in refusal(nn.DataParallel(model))
        assert list(linear_maps(model.merge_and_unload())) == ZOO["transformers GPT-2"][2]

    @pytest.mark.parametrize("part", ["base_layer", "lora_A.default", "lora_B.default"])
    def test_each_part_of_an_adapter_is_refused(self, peft, part: str) -> None:
        model = peft.get_peft_model(Vit(), peft.LoraConfig(target_modules=["fc1"]))
        name = f"base_model.model.blocks.0.mlp.fc1.{part}"
        assert f"layer {name} belongs to a PEFT adapter" in refusal(model, include=name)

    def test_an_adapted_layer_alone_is_refused(self, peft) -> None:
        model = peft.get_peft_model(Vit(), peft.LoraConfig(target_modules=["head"]))
        assert "layer base_layer belongs to a PEFT adapter" in refusal(model.base_model.model.head)

    def test_adapted_attention_is_refused(self, peft) -> None:
        model = nn.Sequential(nn.ModuleDict({"attn": nn.MultiheadAttention(4, 2), "fc": nn.Linear(4, 4)}))
        adapted = peft.get_peft_model(model, peft.LoraConfig(target_modules=["attn"]))
        assert ".attn.base_layer.q belongs to a PEFT adapter" in refusal(adapted)
        assert list(linear_maps(adapted, exclude="*.attn.*")) == ["base_model.model.0.fc"]

    @pytest.mark.parametrize("kind", ["IA3Config", "VeraConfig", "LoHaConfig"])
    def test_other_adapters_are_refused(self, peft, kind: str) -> None:
        options = {"feedforward_modules": []} if kind == "IA3Config" else {"r": 2}
        model = peft.get_peft_model(Vit(), getattr(peft, kind)(target_modules=["fc1"], **options))
        assert "mlp.fc1.base_layer belongs to a PEFT adapter" in refusal(model)
        assert list(linear_maps(model, include="*.fc2")) == names_in("base_model.model.blocks.{}.mlp", "fc2")

    def test_prompts_adapt_no_layer(self, peft) -> None:
        config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
        found = linear_maps(peft.get_peft_model(gpt2(), config))
        assert list(found) == [f"base_model.{name}" for name in ZOO["transformers GPT-2"][2]]

    @pytest.mark.parametrize("style", ["parameters", "modules"])
    def test_low_rank_factors_of_other_libraries(self, style: str) -> None:
        class Adapted(nn.Linear):
            def __init__(self) -> None:
                super().__init__(4, 4)
                if style == "parameters":  # as in loralib
                    self.lora_A, self.lora_B = nn.Parameter(torch.ones(2, 4)), nn.Parameter(torch.ones(4, 2))
                else:  # as in torchtune
                    self.lora_a, self.lora_b = nn.Linear(4, 2), nn.Linear(2, 4)

        model = nn.ModuleDict({"adapted": Adapted(), "adapted_not": nn.Linear(4, 4)})
        assert "layer adapted belongs to a PEFT adapter" in refusal(model)
        assert list(linear_maps(model, include="adapted_not")) == ["adapted_not"]


def with_weight(weight: Tensor, kind: type[nn.Parameter] = nn.Parameter) -> nn.ModuleDict:
    layer = nn.Linear(4, 4)
    layer.weight = kind(weight, requires_grad=False)
    return nn.ModuleDict({"q": layer, "fc": nn.Linear(4, 4)})


class Params4bit(nn.Parameter):
    """As in bitsandbytes: a parameter class for packed codes."""


class Packed(torch.Tensor):
    """As in torchao: says that it is float32, and holds something else."""

    @staticmethod
    def __new__(cls, inside: Tensor) -> Packed:
        return torch.Tensor._make_wrapper_subclass(cls, inside.shape, dtype=torch.float32)

    def __init__(self, inside: Tensor) -> None:
        self.inside = inside
        self.scale = torch.ones(1)

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return ["inside", "scale"], None

    @classmethod
    def __torch_dispatch__(cls, function: Any, types: Any, args: tuple = (), kwargs: Any = None) -> Any:
        assert function is torch.ops.aten.detach.default
        return Packed(args[0].inside)


QUANTIZED = {
    "int8": (lambda: with_weight(torch.ones(4, 4, dtype=torch.int8)), "torch.int8"),
    "packed 4 bits": (lambda: with_weight(torch.ones(8, 1, dtype=torch.uint8), Params4bit), "Params4bit"),
    "float8": (lambda: with_weight(torch.ones(4, 4).to(torch.float8_e4m3fn)), "torch.float8_e4m3fn"),
    "complex": (lambda: with_weight(torch.ones(4, 4, dtype=torch.complex64)), "torch.complex64"),
    "subclass": (lambda: with_weight(Packed(torch.ones(4, 4, dtype=torch.int8))), "Packed"),
    "nested": (lambda: with_weight(Packed(Packed(torch.ones(4, 4, dtype=torch.int8)))), "Packed"),
}


@pytest.mark.parametrize(("build", "kind"), QUANTIZED.values(), ids=QUANTIZED)
def test_quantized_weights_are_refused(build: Callable[[], nn.Module], kind: str) -> None:
    model = build()
    assert re.fullmatch(
        f"layer q holds {kind} codes: .*train before quantizing, or leave it out with exclude='q'", refusal(model)
    )
    assert list(linear_maps(model, exclude="q")) == ["fc"]


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("wrap", [lambda tensor: tensor, Packed], ids=["plain", "subclass"])
def test_real_weights_are_accepted(dtype: torch.dtype, wrap: Callable[[Tensor], Tensor]) -> None:
    assert list(linear_maps(with_weight(wrap(torch.ones(4, 4, dtype=dtype))))) == ["q", "fc"]


@pytest.mark.parametrize("shape", [(16,), (0,)], ids=["FSDP1", "ZeRO-3"])
def test_flattened_weights_are_refused(shape: tuple[int, ...]) -> None:
    message = refusal(with_weight(torch.ones(shape)))
    assert message.startswith(f"layer q has a weight of shape {shape}: expected a matrix")


@pytest.mark.parametrize(
    ("layer", "x"),
    [(nn.LazyLinear, torch.randn(2, 5)), (lambda out: nn.LazyConv1d(out, 1), torch.randn(2, 5, 3))],
    ids=["LazyLinear", "LazyConv1d"],
)
def test_lazy_layers_are_refused_until_they_have_a_shape(layer: Callable[[int], nn.Module], x: Tensor) -> None:
    model = nn.ModuleDict({"lazy": layer(4), "fc": nn.Linear(4, 4)})
    assert "layer lazy has no shape yet: pass one batch through the model" in refusal(model, include="*")
    assert list(linear_maps(model, exclude="lazy")) == ["fc"]
    model["lazy"](x)
    assert linear_maps(model, include="lazy")["lazy"].shape == (4, 5)


def pruned(layer: nn.Module, name: str = "weight") -> nn.Module:
    return prune.l1_unstructured(layer, name, amount=1)


class Doubled(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * x


PARAMETRIZED = {
    "weight_norm": parametrizations.weight_norm,
    "spectral_norm": parametrizations.spectral_norm,
    "orthogonal": parametrizations.orthogonal,
    "weight_norm of old": nn.utils.weight_norm,
    "spectral_norm of old": nn.utils.spectral_norm,
    "pruning": pruned,
}


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("wrap", PARAMETRIZED.values(), ids=PARAMETRIZED)
class TestParametrizedWeights:
    def test_they_are_refused_and_leave_the_rest_usable(self, wrap: Callable[[nn.Module], nn.Module]) -> None:
        model = mlp(4, 4, 4, 4)
        wrap(model[1])
        assert re.match(
            "layer 1 has a parametrized weight: .*decay acts on the tensor the optimizer owns; .*"
            r"remove_parametrizations\), or leave it out with exclude='1'$",
            refusal(model),
        )
        assert list(linear_maps(model, exclude="1")) == ["0", "2"]

    def test_they_are_not_taken_for_each_other(self, wrap: Callable[[nn.Module], nn.Module]) -> None:
        # Computed weights die at once and the next may get the same address: no tie.
        model = mlp(*[4] * 9)
        for layer in model[:-1]:
            wrap(layer)
        assert refusal(model, exclude="0").startswith("layer 1 has a parametrized weight")
        assert list(linear_maps(model, exclude="[0-6]")) == ["7"]
        assert [twin.name for twin in modules_sharing(model, LinearMap("3", model[3]))] == ["3"]

    def test_attention(self, wrap: Callable[[nn.Module, str], nn.Module]) -> None:
        model = nn.ModuleDict({"attn": nn.MultiheadAttention(4, 2, kdim=4, vdim=3), "fc": nn.Linear(4, 4)})
        wrap(model.attn, "k_proj_weight")
        assert refusal(model).startswith("layer attn.k has a parametrized weight")
        assert list(linear_maps(model, exclude="attn.k")) == ["attn.q", "attn.v", "fc"]
        wrap(model.attn, "v_proj_weight")
        assert refusal(model, exclude="attn.k").startswith("layer attn.v has a parametrized weight")

    def test_looking_does_not_run_them(self, wrap: Callable[[nn.Module, str], nn.Module]) -> None:
        # spectral_norm takes a step of power iteration whenever its weight is computed in training mode.
        model = nn.ModuleDict({"attn": nn.MultiheadAttention(4, 2), "fc": nn.Linear(4, 4), "last": nn.Linear(4, 4)})
        wrap(model.attn, "in_proj_weight")
        wrap(model.fc, "weight")
        before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        assert list(linear_maps(model, exclude=["attn.*", "fc"])) == ["last"]
        assert "parametrized" in refusal(model)
        assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_a_parametrized_bias_is_nobodys_business() -> None:
    model = mlp(4, 4, 4)
    parametrize.register_parametrization(model[0], "bias", Doubled())
    assert list(linear_maps(model)) == ["0", "1"]


def test_a_parametrized_conv1d_of_gpt2_is_seen() -> None:
    layer = conv1d_of_gpt2(3, 4)
    parametrize.register_parametrization(layer, "weight", Doubled())
    assert "layer ParametrizedConv1D has a parametrized weight" in refusal(layer)


def test_removing_the_parametrization_helps() -> None:
    model = mlp(4, 4, 4)
    parametrizations.weight_norm(model[0])
    parametrize.remove_parametrizations(model[0], "weight")
    assert list(linear_maps(model)) == ["0", "1"]


# --- what is left alone ---------------------------------------------------------------------------------------------


def test_frozen_layers_are_listed() -> None:
    model = Vit()
    model.blocks[0].requires_grad_(False)
    assert list(linear_maps(model)) == FFN


def test_a_model_on_the_meta_device_is_listed() -> None:
    with torch.device("meta"):
        assert list(linear_maps(Vit())) == FFN


def test_the_model_is_left_alone() -> None:
    model = nn.ModuleDict({"vit": Vit(), "attn": nn.MultiheadAttention(4, 2), "conv": nn.Conv2d(2, 2, 2, groups=2)})
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    attributes = {name: set(vars(module)) for name, module in model.named_modules()}
    linear_maps(model, include="*")
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert model.training and {name: set(vars(module)) for name, module in model.named_modules()} == attributes
    assert all(parameter.grad is None for parameter in model.parameters())
