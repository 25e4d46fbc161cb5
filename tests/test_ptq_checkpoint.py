"""Saved quantized models: the same output bit for bit when loaded, and a clear refusal of everything else."""

from __future__ import annotations

import copy
import hashlib
import inspect
import json
import pickle
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from s2d.ptq import METHODS, quantize
from s2d.ptq.checkpoint import (
    DESCRIPTION,
    TENSORS,
    _digest,
    load_quantized,
    pack_codes,
    quantized_size,
    save_quantized,
    unpack_codes,
)
from s2d.ptq.prepare import prepare
from s2d.ptq.quantizers import AffineQuantizer
from s2d.ptq.rotation import rotate
from s2d.ptq.sites import products, quantized_layers, set_mode, sites


def vit(seed: int = 0, **options) -> nn.Module:
    torch.manual_seed(seed)
    known = {"img_size": 8, "patch_size": 4, "embed_dim": 16, "depth": 2, "num_heads": 2, "num_classes": 5}
    return VisionTransformer(**known | options).eval()


def images(n: int = 4, seed: int = 1) -> Tensor:
    return torch.randn(n, 3, 8, 8, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def quantized() -> nn.Module:
    return quantize(vit(), w_bits=4, a_bits=4, calibration=images())


@pytest.fixture
def folder(quantized: nn.Module, tmp_path: Path) -> Path:
    save_quantized(quantized, tmp_path / "saved")
    return tmp_path / "saved"


def assert_same(saved: nn.Module, fresh: nn.Module, folder: Path, x) -> nn.Module:
    """Loading into a model with other weights gives the saved model's output, and leaves the other model alone."""
    save_quantized(saved, folder)
    before = copy.deepcopy(fresh.state_dict())
    loaded = load_quantized(fresh, folder)
    with torch.no_grad():
        assert torch.equal(loaded(x), saved(x))
    assert all(torch.equal(tensor, before[name]) for name, tensor in fresh.state_dict().items())
    assert not sites(fresh)
    return loaded


# --- the same model comes back ---


@pytest.mark.parametrize("bits", [(4, 4), (8, 32), (32, 8), (3, 6)])
@pytest.mark.parametrize("method", sorted(METHODS))
def test_every_method_comes_back_bit_for_bit(method: str, bits: tuple[int, int], tmp_path: Path) -> None:
    w_bits, a_bits = bits
    saved = quantize(vit(), method=method, w_bits=w_bits, a_bits=a_bits, calibration=images())
    loaded = assert_same(saved, vit(seed=9), tmp_path / "saved", images(3, seed=5))
    assert loaded.s2d_quantization["method"] == method and not loaded.training
    for name, site in quantized_layers(saved).items():
        other = quantized_layers(loaded)[name]
        assert str(other.weight_quantizer) == str(site.weight_quantizer)
        if w_bits < 16:
            assert torch.equal(other.weight_codes(), site.weight_codes())


@pytest.mark.parametrize(
    "options", [{"symmetric": True}, {"activations": "per_token"}, {"symmetric": True, "activations": "per_token"}]
)
def test_options_of_round_to_nearest_come_back(options: dict, tmp_path: Path) -> None:
    saved = quantize(vit(), w_bits=8, a_bits=4, calibration=images(), **options)
    loaded = assert_same(saved, vit(seed=9), tmp_path / "saved", images(3, seed=5))
    assert loaded.s2d_quantization["options"] == options


@pytest.mark.parametrize("kind", ["hadamard", "learned"])
def test_rotations_come_back_and_stay_shared(kind: str, tmp_path: Path) -> None:
    saved = quantize(
        vit(), w_bits=4, a_bits=4, calibration=images(), transforms=[lambda m, b: rotate(m, b, kind=kind, steps=3)]
    )
    loaded = assert_same(saved, vit(seed=9), tmp_path / "saved", images(3, seed=5))
    assert any(product.right_transform is not None for product in products(loaded).values())
    shared = [len({id(site.input_transform) for site in quantized_layers(m).values()}) for m in (saved, loaded)]
    assert shared[0] == shared[1]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("w_bits", [4, 8])
def test_other_dtypes_come_back_even_into_a_float32_model(dtype: torch.dtype, w_bits: int, tmp_path: Path) -> None:
    x = images().to(dtype)
    saved = quantize(vit().to(dtype), w_bits=w_bits, a_bits=8, calibration=x)
    loaded = assert_same(saved, vit(seed=9), tmp_path / "saved", x)
    assert {parameter.dtype for parameter in loaded.parameters()} == {dtype}


class Odd(nn.Module):
    """No biases, a norm without weight, tied tensors, and a buffer that is in no state dict."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.embedding = nn.Embedding(7, 8)
        self.norm = nn.LayerNorm(8, elementwise_affine=False)
        self.fc = nn.Linear(8, 8, bias=False)
        self.again = self.fc  # one layer under two names
        self.head = nn.Linear(8, 7, bias=False)
        self.head.weight = self.embedding.weight
        self.gain = nn.Parameter(torch.randn(8))
        self.tied_gain = self.gain
        self.register_buffer("transient", torch.randn(8), persistent=False)
        self.register_buffer("count", torch.tensor(seed))

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embedding(ids) + self.transient
        return self.head(self.again(self.fc(self.norm(x))) * self.gain * self.tied_gain)


def test_added_biases_and_norm_weights_ties_and_transient_buffers(tmp_path: Path) -> None:
    ids = torch.arange(6).view(2, 3)
    saved = quantize(Odd(0), w_bits=4, a_bits=4, calibration=ids)
    assert saved.norm.weight is None and saved.fc.bias is None
    # As a method may: a norm that got its weight and bias, layers that got a bias.
    saved.norm.weight, saved.norm.bias = nn.Parameter(torch.rand(8) + 1), nn.Parameter(torch.randn(8))
    saved.fc.bias, saved.head.bias = nn.Parameter(torch.randn(8)), nn.Parameter(torch.randn(7))
    loaded = assert_same(saved, Odd(1), tmp_path / "saved", ids)
    assert loaded.gain is loaded.tied_gain and loaded.again is loaded.fc
    assert int(loaded.count) == 0 and torch.equal(loaded.transient, saved.transient)
    assert loaded.embedding.weight is not loaded.head.weight  # the embedding stays in floating point
    names = set(load_file(tmp_path / "saved" / TENSORS))
    assert "gain" in names and "tied_gain" not in names and not any(name.startswith("again") for name in names)


def test_multihead_attention_and_a_single_layer(tmp_path: Path) -> None:
    def encoder(seed: int) -> nn.Module:
        torch.manual_seed(seed)
        return nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).eval()

    x = torch.randn(2, 5, 8)
    assert_same(quantize(encoder(0), w_bits=4, a_bits=4, calibration=x), encoder(1), tmp_path / "encoder", x)
    layer = quantize(nn.Linear(8, 3), w_bits=4, a_bits=4, calibration=x)
    assert_same(layer, nn.Linear(8, 3), tmp_path / "layer", x)


def test_excluded_layers_and_other_granularities(tmp_path: Path) -> None:
    saved = quantize(vit(), w_bits=4, a_bits=4, calibration=images(), exclude=["head", "blocks.0.attn"])
    site = quantized_layers(saved)["blocks.1.mlp.fc1"]
    site.weight_quantizer = AffineQuantizer(3, granularity="per_group", group_size=5)
    site.weight_quantizer.observe(site.weight)
    site.weight_quantizer.freeze()
    site.freeze_weight()
    assert_same(saved, vit(seed=9), tmp_path / "saved", images())


# --- what is in the folder ---


@pytest.mark.parametrize("w_bits", [2, 3, 4, 8])
def test_weights_are_stored_as_codes_of_as_many_bits(w_bits: int, tmp_path: Path) -> None:
    saved = quantize(vit(), w_bits=w_bits, a_bits=8, calibration=images())
    save_quantized(saved, tmp_path / "saved")
    tensors = load_file(tmp_path / "saved" / TENSORS)
    entries = json.loads((tmp_path / "saved" / DESCRIPTION).read_text())["tensors"]
    for name, site in quantized_layers(saved).items():
        stored, entry = tensors[f"{name}.weight"], entries[f"{name}.weight"]
        assert stored.dtype == torch.uint8 and stored.numel() == -(-site.weight.numel() * w_bits // 8)
        assert (entry["stored"], entry["bits"], entry["first"]) == ("packed", w_bits, 0)
        assert torch.equal(unpack_codes(stored, w_bits, site.weight.shape), site.weight_codes())
        assert tensors[f"{name}.bias"].dtype == torch.float32
    assert sorted(path.name for path in (tmp_path / "saved").iterdir()) == sorted([TENSORS, DESCRIPTION])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["saved"]  # nothing temporary left


@pytest.mark.parametrize("bits", range(1, 10))
@pytest.mark.parametrize("shape", [(), (1,), (7, 3), (5, 0), (3, 1, 11)])
def test_codes_are_packed_one_after_the_other(bits: int, shape: tuple[int, ...]) -> None:
    codes = torch.randint(2**bits, shape, generator=torch.Generator().manual_seed(bits))
    packed = pack_codes(codes, bits)
    by_hand = sum(code << (i * bits) for i, code in enumerate(codes.flatten().tolist()))
    assert bytes(packed.tolist()) == by_hand.to_bytes(-(-codes.numel() * bits // 8), "little")
    assert torch.equal(unpack_codes(packed, bits, shape), codes.short())


def test_codes_of_several_parts_and_codes_that_do_not_fit() -> None:
    codes = torch.randint(8, (2**20 + 5,), generator=torch.Generator().manual_seed(0))
    assert torch.equal(unpack_codes(pack_codes(codes, 3), 3, codes.shape), codes.short())
    for wrong in ([0, 8], [-1, 3]):
        with pytest.raises(ValueError, match="3 bits hold 0 to 7"):
            pack_codes(torch.tensor(wrong), 3)
    with pytest.raises(ValueError, match="5 codes of 3 bits fill 2 bytes, not 3"):
        unpack_codes(torch.zeros(3, dtype=torch.uint8), 3, (5,))


def test_a_file_of_the_first_format_still_loads(quantized: nn.Module, folder: Path) -> None:
    """It had a byte for each code, in the shape of the weight."""
    description, tensors = json.loads((folder / DESCRIPTION).read_text()), load_file(folder / TENSORS)
    for name, entry in description["tensors"].items():
        if entry["stored"] == "packed":
            first, bits = entry.pop("first"), entry.pop("bits")
            tensors[name] = (unpack_codes(tensors[name], bits, entry["shape"]) + first).to(torch.uint8)
            entry["stored"] = "codes"
    save_file(tensors, folder / TENSORS)
    data = (folder / TENSORS).read_bytes()
    file = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    rewrite(folder, tensors=description["tensors"], format=1, tensors_file=file)
    with torch.no_grad():
        assert torch.equal(load_quantized(vit(9), folder)(images()), quantized(images()))


@pytest.mark.parametrize("method", ["rtn", "ptq4vit", "repq_vit"])
def test_a_model_on_meta_takes_all_values_from_the_file(method: str, tmp_path: Path) -> None:
    saved = quantize(vit(), method=method, w_bits=4, a_bits=4, calibration=images())
    save_quantized(saved, tmp_path / "saved")
    with torch.device("meta"):
        empty = vit(9)
    loaded = load_quantized(empty, tmp_path / "saved")
    assert {parameter.device.type for parameter in loaded.parameters()} == {"cpu"}
    assert all(parameter.is_meta for parameter in empty.parameters())
    with torch.no_grad():
        assert torch.equal(loaded(images()), saved(images()))


def test_a_pickled_model_is_saved_like_the_model(quantized: nn.Module, tmp_path: Path) -> None:
    assert_same(pickle.loads(pickle.dumps(quantized)), vit(seed=9), tmp_path / "saved", images())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_model_put_into_half_precision_comes_back(dtype: torch.dtype, tmp_path: Path) -> None:
    saved = quantize(vit(), w_bits=4, a_bits=8, calibration=images()).to(dtype)
    loaded = assert_same(saved, vit(seed=9), tmp_path / "saved", images().to(dtype))
    assert {parameter.dtype for parameter in loaded.parameters()} == {dtype}


def test_a_weight_off_its_grid_is_stored_as_it_is(tmp_path: Path) -> None:
    saved = quantize(vit(), w_bits=4, a_bits=4, calibration=images())
    with torch.no_grad():
        saved.head.weight[0, 0] += 0.01
    assert_same(saved, vit(seed=9), tmp_path / "saved", images())
    assert load_file(tmp_path / "saved" / TENSORS)["head.weight"].dtype == torch.float32


def test_description_says_what_it_is(folder: Path) -> None:
    description = json.loads((folder / DESCRIPTION).read_text())
    assert description["model"] == "VisionTransformer" and description["format"] == 2
    assert description["quantization"]["w_bits"] == 4
    assert description["tensors"]["head.weight"] == {
        "key": "head.weight",
        "kind": "parameter",
        "shape": [5, 16],
        "dtype": "float32",
        "stored": "packed",
        "first": 0,
        "bits": 4,
    }


def test_size_by_hand() -> None:
    model = nn.Sequential(nn.Linear(8, 16), nn.LayerNorm(16), nn.Linear(16, 4, bias=False))
    quantized = quantize(model, w_bits=3, a_bits=8, calibration=torch.randn(4, 8))
    size = quantized_size(quantized, model)
    assert size["codes"] == (8 * 16 + 16 * 4) * 3 / 8
    assert size["floats"] == 4 * (16 + 32)
    assert size["grids"] == 4 * 2 * (16 + 4 + 2)  # scale and zero point of every row, and of two inputs
    assert size["float_model"] == 4 * (8 * 16 + 16 + 32 + 64)
    assert size["quantized"] == size["codes"] + size["floats"] + size["grids"]
    assert size["ratio"] == size["float_model"] / size["quantized"]


# --- writing whole or not at all ---


def test_an_existing_folder_is_refused_then_replaced(quantized: nn.Module, folder: Path) -> None:
    with pytest.raises(ValueError, match="exists: choose another folder"):
        save_quantized(quantized, folder)
    other = quantize(vit(), w_bits=2, a_bits=8, calibration=images())
    save_quantized(other, folder, overwrite=True)
    assert torch.equal(load_quantized(vit(9), folder)(images()), other(images()))


def test_overwrite_never_takes_other_files_with_it(quantized: nn.Module, folder: Path) -> None:
    (folder / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="not overwritten"):
        save_quantized(quantized, folder, overwrite=True)
    assert (folder / "notes.txt").read_text() == "mine"


def test_a_failed_write_leaves_the_old_folder(quantized: nn.Module, folder: Path, monkeypatch) -> None:
    before = (folder / DESCRIPTION).read_bytes(), (folder / TENSORS).read_bytes()

    def fail(*_, **__):
        raise OSError("disk full")

    monkeypatch.setattr(Path, "write_text", fail)
    with pytest.raises(OSError, match="disk full"):
        save_quantized(quantized, folder, overwrite=True)
    assert before == ((folder / DESCRIPTION).read_bytes(), (folder / TENSORS).read_bytes())
    assert [path.name for path in folder.parent.iterdir()] == ["saved"]


def test_models_that_are_not_quantized_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="not quantized"):
        save_quantized(vit(), tmp_path / "a")
    with pytest.raises(ValueError, match="mode 'float'"):
        save_quantized(prepare(vit(), images()), tmp_path / "a")
    saved = quantize(vit(), w_bits=4, a_bits=4, calibration=images())
    set_mode(saved, "train")
    with pytest.raises(ValueError, match="finish_qat"):
        save_quantized(saved, tmp_path / "a")
    assert list(tmp_path.iterdir()) == []


# --- corruption ---


def rewrite(folder: Path, **changes) -> None:
    """Change entries of the description as another version would have written them, hash included."""
    description = json.loads((folder / DESCRIPTION).read_text()) | changes
    description["sha256"] = _digest(description)
    (folder / DESCRIPTION).write_text(json.dumps(description))


@pytest.mark.parametrize("name", [TENSORS, DESCRIPTION])
def test_missing_files(folder: Path, name: str) -> None:
    (folder / name).unlink()
    with pytest.raises(ValueError, match=f"{name} is missing: copy the whole folder again"):
        load_quantized(vit(), folder)


def test_missing_folder(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="nowhere is no folder"):
        load_quantized(vit(), tmp_path / "nowhere")


@pytest.mark.parametrize("kept", [0, 7, 100, -1])
def test_truncated_tensors(folder: Path, kept: int) -> None:
    data = (folder / TENSORS).read_bytes()
    (folder / TENSORS).write_bytes(data[:kept])
    with pytest.raises(ValueError, match=f"{TENSORS} has {len(data[:kept])} bytes instead of {len(data)}.*copy it"):
        load_quantized(vit(), folder)


@pytest.mark.parametrize("place", [3, 200, -5])
def test_altered_bytes(folder: Path, place: int) -> None:
    data = bytearray((folder / TENSORS).read_bytes())
    data[place] ^= 1
    (folder / TENSORS).write_bytes(data)
    with pytest.raises(ValueError, match=f"{TENSORS} was altered"):
        load_quantized(vit(), folder)


def test_altered_or_truncated_description(folder: Path) -> None:
    text = (folder / DESCRIPTION).read_text()
    (folder / DESCRIPTION).write_text(text.replace('"n_bits": 4', '"n_bits": 5', 1))
    with pytest.raises(ValueError, match=f"{DESCRIPTION} was altered"):
        load_quantized(vit(), folder)
    (folder / DESCRIPTION).write_text(text[:-20])
    with pytest.raises(ValueError, match=f"{DESCRIPTION} is not JSON"):
        load_quantized(vit(), folder)
    (folder / DESCRIPTION).write_text("[]")
    with pytest.raises(ValueError, match="format version None"):
        load_quantized(vit(), folder)
    (folder / DESCRIPTION).write_text('{"format": 1}')
    with pytest.raises(ValueError, match="was altered"):
        load_quantized(vit(), folder)


def test_unknown_format_version(folder: Path) -> None:
    rewrite(folder, format=99)
    with pytest.raises(ValueError, match=f"{DESCRIPTION} has format version 99.*install the version"):
        load_quantized(vit(), folder)


def test_unknown_quantizer_class(folder: Path) -> None:
    modules = json.loads((folder / DESCRIPTION).read_text())["modules"]
    modules[0]["class"] = "FancyQuantizer"
    rewrite(folder, modules=modules)
    with pytest.raises(ValueError, match=f"{DESCRIPTION} names the quantizer class 'FancyQuantizer'"):
        load_quantized(vit(), folder)


@pytest.mark.parametrize(
    "options", [{"embed_dim": 32}, {"depth": 1}, {"depth": 3}, {"init_values": 1.0}, {"num_classes": 6}]
)
def test_another_architecture(folder: Path, options: dict) -> None:
    with pytest.raises(ValueError, match=f"{DESCRIPTION} does not fit this VisionTransformer .*build the architecture"):
        load_quantized(vit(**options), folder)


def test_another_class_and_a_model_that_is_quantized_already(quantized: nn.Module, folder: Path) -> None:
    with pytest.raises(ValueError, match="does not fit this Linear"):
        load_quantized(nn.Linear(3, 3), folder)
    with pytest.raises(ValueError, match="quantized already"):
        load_quantized(quantized, folder)
    with pytest.raises(ValueError, match="the file is of a VisionTransformer"):
        load_quantized(Renamed(vit()), folder)


class Renamed(VisionTransformer):
    def __init__(self, model: VisionTransformer) -> None:
        nn.Module.__init__(self)
        self.__dict__.update(copy.deepcopy(model).__dict__)


def test_a_file_that_lacks_tensors(folder: Path) -> None:
    """As another program may write it, with right hashes."""
    import hashlib

    tensors = load_file(folder / TENSORS)
    del tensors["norm.weight"]
    save_file(tensors, folder / TENSORS)
    data = (folder / TENSORS).read_bytes()
    rewrite(folder, tensors_file={"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()})
    with pytest.raises(ValueError, match="lacks 'norm.weight'"):
        load_quantized(vit(), folder)


def test_nothing_is_unpickled() -> None:
    import s2d.ptq.checkpoint as module

    source = inspect.getsource(module)
    assert "pickle" not in source and "torch.load" not in source


def test_without_safetensors(quantized: nn.Module, tmp_path: Path, monkeypatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    with pytest.raises(ImportError, match="pip install safetensors"):
        save_quantized(quantized, tmp_path / "a")
    with pytest.raises(ImportError, match="pip install safetensors"):
        load_quantized(vit(), tmp_path / "a")
