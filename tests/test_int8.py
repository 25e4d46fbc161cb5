"""ONNX Runtime's integer kernels against the simulation in floating point, and against integers by hand."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from s2d.ptq import quantize
from s2d.ptq.prepare import prepare
from s2d.ptq.quantizers import AffineQuantizer
from s2d.ptq.rotation import rotate
from s2d.ptq.sites import quantized_layers, set_mode
from s2d.ptq.twin_uniform import TwinUniformGELU

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

from s2d.ptq import int8  # noqa: E402
from s2d.ptq.int8 import Int8Session, export_int8, saturates, without_product_quantizers  # noqa: E402


def data(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def vit() -> nn.Module:
    torch.manual_seed(0)
    model = VisionTransformer(img_size=8, patch_size=2, embed_dim=32, depth=2, num_heads=4, num_classes=10)
    nn.init.normal_(model.head.weight, std=32**-0.5)  # timm's start says the same of every image
    return model.eval()


def quantized_layer(w_bits: int = 8, a_bits: int = 8, bias: bool = True, **options) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(1)
    calibration = data(64, 24) + 0.5
    layer = nn.Sequential(nn.Linear(24, 7, bias=bias))
    return quantize(layer, w_bits=w_bits, a_bits=a_bits, calibration=calibration, **options), calibration


def by_hand(model: nn.Module, x: Tensor) -> Tensor:
    """The integers of one layer, multiplied as integers, in float64."""
    site = model[0]
    inputs, weight = site.input_quantizer, site.weight_quantizer
    codes = torch.round(x.double() / inputs.scale.double()) + inputs.zero_point.double()
    codes = codes.clamp(inputs.q_min, inputs.q_max) - inputs.zero_point.double()
    sums = codes.long() @ (site.weight_codes().long() - weight.zero_point.long()).T
    output = sums.double() * inputs.scale.double() * weight.scale.double().flatten()
    return output if site.bias is None else output + site.bias.double()


# Weights as int8 overflow on processors without VNNI, where a session therefore takes the others by itself.
EXACT = (True,) if saturates() else (False, True)


def session(model: nn.Module, example: Tensor, folder: Path, **options) -> Int8Session:
    export_int8(model, example, folder / "model.onnx")
    return Int8Session(folder / "model.onnx", 1, **options)


# --- one layer ---


@pytest.mark.parametrize(
    "options",
    [{}, {"symmetric": True, "bias": False}, {"w_bits": 4, "a_bits": 4}, {"w_bits": 3, "a_bits": 6, "symmetric": True}],
)
def test_a_layer_agrees_with_integers_by_hand_and_with_the_simulation(options: dict, tmp_path: Path) -> None:
    model, calibration = quantized_layer(**options)
    x = 2 * data(50, 24, seed=5)  # beyond the calibrated range too
    expected = by_hand(model, x)
    export_int8(model, calibration, tmp_path / "model.onnx")
    for uint8_weights in EXACT:
        found = Int8Session(tmp_path / "model.onnx", 1, uint8_weights=uint8_weights)(x)
        assert (found - expected).abs().max() < 1e-6 * expected.abs().max()
        assert torch.allclose(found, model(x), rtol=1e-5, atol=2e-6 * expected.abs().max().item())


def test_one_grid_for_the_whole_weight(tmp_path: Path) -> None:
    model, calibration = quantized_layer()
    site = model[0]
    site.weight_quantizer = AffineQuantizer(8, symmetric=True, narrow_range=False)
    site.weight_quantizer.observe(site.weight)
    site.weight_quantizer.freeze()
    site.freeze_weight()
    assert torch.allclose(
        session(model, calibration, tmp_path)(calibration), by_hand(model, calibration).float(), atol=1e-5
    )


def test_largest_codes_do_not_saturate(tmp_path: Path) -> None:
    """The case in which kernels without VNNI overflow: pairs of 255 * 127."""
    layer = nn.Sequential(nn.Linear(64, 8, bias=False))
    nn.init.ones_(layer[0].weight)
    model = quantize(layer, w_bits=8, a_bits=8, symmetric=False, calibration=torch.ones(2, 64))
    export_int8(model, torch.ones(2, 64), tmp_path / "model.onnx")
    for uint8_weights in (None, True):
        found = Int8Session(tmp_path / "model.onnx", 1, uint8_weights=uint8_weights)(torch.ones(3, 64))
        assert torch.allclose(found, torch.full((3, 8), 64.0), rtol=1e-5)


def test_saturation_chooses_the_weights(tmp_path: Path, monkeypatch) -> None:
    assert saturates() in (False, True)
    model, calibration = quantized_layer()
    export_int8(model, calibration, tmp_path / "model.onnx")
    calls = []
    real = int8._with_uint8_weights
    monkeypatch.setattr(int8, "_with_uint8_weights", lambda path: calls.append(path) or real(path))
    monkeypatch.setattr(int8, "saturates", lambda: True)
    Int8Session(tmp_path / "model.onnx")
    assert len(calls) == 1
    monkeypatch.setattr(int8, "saturates", lambda: False)
    Int8Session(tmp_path / "model.onnx")
    assert len(calls) == 1


# --- whole models ---


@pytest.fixture(scope="module")
def exported(tmp_path_factory) -> tuple[nn.Module, Path]:
    model = quantize(vit(), w_bits=8, a_bits=8, calibration=data(32, 3, 8, 8))
    path = tmp_path_factory.mktemp("int8") / "vit.onnx"
    export_int8(model, data(1, 3, 8, 8), path)
    return model, path


@pytest.mark.parametrize("uint8_weights", EXACT)
def test_a_vit_agrees_with_its_simulation(exported: tuple[nn.Module, Path], uint8_weights: bool) -> None:
    model, path = exported
    x = data(256, 3, 8, 8, seed=3)
    with torch.no_grad():
        simulated, plain = without_product_quantizers(model)(x), vit()(x)
    found = Int8Session(path, 1, uint8_weights=uint8_weights)(x)
    relative = (found - simulated).norm(dim=1) / simulated.norm(dim=1)
    # One input in some thousands lies on a rounding border, where sums in another order take the other code.
    assert relative.median() < 1e-3 and relative.max() < 0.05
    assert relative.median() < 0.2 * ((simulated - plain).norm(dim=1) / plain.norm(dim=1)).median()
    assert (found.argmax(1) == simulated.argmax(1)).float().mean() >= 0.99


def test_every_linear_layer_is_an_integer_kernel(exported: tuple[nn.Module, Path]) -> None:
    model, path = exported
    graph = onnx.load(path).graph
    count = Counter(node.op_type for node in graph.node)
    linears = sum(isinstance(site, nn.Linear) for site in quantized_layers(model).values())
    assert count["MatMulIntegerToFloat"] == count["QuantizeLinear"] == linears == 9
    assert count["Gemm"] == 0 and count["MatMul"] == 2 * 2  # two products in each of the two attentions
    weights = [
        tensor for tensor in graph.initializer if tensor.data_type == onnx.TensorProto.INT8 and len(tensor.dims) == 2
    ]
    assert len(weights) == linears
    assert sum(tensor.nbytes for tensor in map(onnx.numpy_helper.to_array, weights)) == sum(
        site.weight.numel() for site in quantized_layers(model).values() if isinstance(site, nn.Linear)
    )
    assert b"/site-packages/" not in path.read_bytes()  # nothing of this machine in the file


def test_batches_of_any_size(exported: tuple[nn.Module, Path]) -> None:
    _, path = exported
    run = Int8Session(path, 1)
    x = data(5, 3, 8, 8, seed=4)
    whole = run(x)
    assert whole.shape == (5, 10)
    assert torch.allclose(torch.cat([run(x[:1]), run(x[1:2]), run(x[2:])]), whole, rtol=1e-4, atol=1e-5)


def test_the_model_is_left_untouched_and_half_precision_works(tmp_path: Path) -> None:
    x = data(8, 3, 8, 8)
    model = quantize(vit().half(), w_bits=8, a_bits=8, calibration=x.half())
    before = model(x.half())
    found = session(model, x.half(), tmp_path)(x)
    assert torch.equal(model(x.half()), before)
    assert (found - before.float()).norm() < 0.1 * before.float().norm()


class Direct(nn.Module):
    """An attention that uses its projection by its weight, with a bias of its own, and asks for its dtype (as BEiT)."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.proj = nn.Linear(8, 24, bias=False), nn.Linear(8, 8)
        self.qkv_bias = nn.Parameter(torch.randn(24))

    def forward(self, x: Tensor) -> Tensor:
        x = x.to(self.proj.weight.dtype)
        q, k, v = nn.functional.linear(x, self.qkv.weight, self.qkv_bias).chunk(3, -1)
        return self.proj((q @ k.transpose(-2, -1) * 8**-0.5).softmax(-1) @ v)


def test_layers_used_by_their_weight_and_shared_ones(tmp_path: Path) -> None:
    torch.manual_seed(0)
    block = nn.Linear(8, 8)
    x = data(16, 5, 8)
    model = quantize(nn.Sequential(Direct(), block, nn.Tanh(), block), w_bits=8, a_bits=8, calibration=x)
    export_int8(model, x, tmp_path / "model.onnx")
    for uint8_weights in EXACT:
        found = Int8Session(tmp_path / "model.onnx", 1, uint8_weights=uint8_weights)(x)
        assert (found - without_product_quantizers(model)(x)).norm() < 2e-3 * found.norm()
    count = Counter(node.op_type for node in onnx.load(tmp_path / "model.onnx").graph.node)
    assert count["MatMulIntegerToFloat"] == 4 and count["Gemm"] == 0 and count["MatMul"] == 2


def test_a_model_that_is_one_layer_and_excluded_layers(tmp_path: Path) -> None:
    x = data(16, 8)
    single = quantize(nn.Linear(8, 3), w_bits=8, a_bits=8, calibration=x)
    assert torch.allclose(session(single, x, tmp_path)(x), single(x), atol=1e-5)
    with pytest.warns(UserWarning, match="excluded"):
        model = quantize(
            nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 3)), w_bits=8, a_bits=8, calibration=x, exclude=["1"]
        )
    assert torch.allclose(session(model, x, tmp_path)(x), model(x), atol=1e-5)


@pytest.mark.parametrize("options", [{"method": "repq_vit"}, {"method": "erq", "column_groups": False}])
def test_other_methods_whose_layers_have_uniform_grids(options: dict, tmp_path: Path) -> None:
    model = quantize(vit(), w_bits=8, a_bits=8, calibration=data(32, 3, 8, 8), **options)
    x = data(64, 3, 8, 8, seed=3)
    with torch.no_grad():
        simulated = without_product_quantizers(model)(x)
    relative = (session(model, x, tmp_path)(x) - simulated).norm(dim=1) / simulated.norm(dim=1)
    assert relative.min() < 1e-6 and relative.max() < 0.05  # without and with inputs on a rounding border


# --- refusals ---


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"w_bits": 32}, "layer 0: its weight is in floating point.*at most 8"),
        ({"a_bits": 32}, "layer 0: its input is in floating point.*at most 8"),
        ({"activations": "per_token"}, r"layer 0: its input has AffineQuantizer \(per_token\).*use rtn, smoothquant"),
        ({"transforms": [rotate]}, r"layer 0 has an input transform \(Rotation\): quantize without transforms="),
    ],
)
def test_layers_without_an_integer_kernel_are_refused_by_name(options: dict, message: str, tmp_path: Path) -> None:
    model, calibration = quantized_layer(**options)
    with pytest.raises(ValueError, match=message):
        export_int8(model, calibration, tmp_path / "model.onnx")
    assert list(tmp_path.iterdir()) == []


def test_other_quantizers_are_refused_by_name(tmp_path: Path) -> None:
    model, calibration = quantized_layer()
    kept = model[0].input_quantizer
    model[0].input_quantizer = TwinUniformGELU(8)
    with pytest.raises(
        ValueError, match="layer 0: its input has TwinUniformGELU, integer kernels take AffineQuantizer"
    ):
        export_int8(model, calibration, tmp_path / "model.onnx")
    model[0].input_quantizer = kept
    model[0].weight_quantizer = AffineQuantizer(8, granularity="per_group", group_size=8)
    with pytest.raises(ValueError, match=r"layer 0: its weight has AffineQuantizer \(per_group\)"):
        export_int8(model, calibration, tmp_path / "model.onnx")
    model[0].weight_quantizer = AffineQuantizer(8, granularity="per_channel", axis=1)
    model[0].weight_quantizer.set_grid(torch.ones(24))
    with pytest.raises(ValueError, match="layer 0: its weight has grids per input channel"):
        export_int8(model, calibration, tmp_path / "model.onnx")


class Mapping(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"logits": self.inner(x)}


def test_models_that_are_not_fit_for_export(tmp_path: Path) -> None:
    path, x = tmp_path / "model.onnx", data(4, 3, 8, 8)
    with pytest.raises(ValueError, match="VisionTransformer is not quantized: call s2d.ptq.quantize"):
        export_int8(vit(), x, path)
    with pytest.raises(ValueError, match="mode 'float'"):
        export_int8(prepare(vit(), x), x, path)
    model, calibration = quantized_layer()
    with pytest.raises(ValueError, match="example has shape"):
        export_int8(model, calibration[:0], path)
    with pytest.raises(ValueError, match="puts out a dict: wrap"):
        export_int8(Mapping(model), calibration, path)
    set_mode(model, "train")
    with pytest.raises(ValueError, match="mode 'train'"):
        export_int8(model, calibration, path)


def test_bad_calls_of_a_session(exported: tuple[nn.Module, Path], tmp_path: Path) -> None:
    _, path = exported
    with pytest.raises(ValueError, match="nothing.onnx does not exist: write it with export_int8"):
        Int8Session(tmp_path / "nothing.onnx")
    with pytest.raises(ValueError, match="threads is 0"):
        Int8Session(path, 0)
    run = Int8Session(path, 1)
    with pytest.raises(
        ValueError, match=r"images have shape \(2, 3, 9, 9\): the file was exported for \(batch, 3, 8, 8\)"
    ):
        run(torch.zeros(2, 3, 9, 9))
    with pytest.raises(ValueError, match="NaN or infinity"):
        run(torch.full((1, 3, 8, 8), torch.nan))


@pytest.mark.parametrize(("package", "name"), [("onnxscript", "export_int8"), ("onnxruntime", "Int8Session")])
def test_missing_packages_are_named(package: str, name: str, tmp_path: Path, monkeypatch) -> None:
    model, calibration = quantized_layer()
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ImportError, match=rf"{name} needs .*pip install 's2d\[int8\]'"):
        export_int8(model, calibration, tmp_path / "a") if name == "export_int8" else Int8Session(tmp_path / "a")


def test_importing_the_package_imports_no_optional_one() -> None:
    optional = ("onnx", "timm", "transformers", "safetensors", "PIL")
    code = f"import s2d.ptq.int8, s2d.ptq.command, sys; sys.exit(any(n.startswith({optional}) for n in sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
