"""``python -m s2d.ptq``: what it measures against the library by hand, what it refuses, and what it leaves behind."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from s2d import ptq
from s2d.ptq.checkpoint import load_quantized
from s2d.ptq.command import main, run
from s2d.ptq.command.images import read_image

ROOT = Path(__file__).resolve().parents[1]
ARCH = "vit_tiny_patch16_224"
SHAPE = {"img_size": 16, "patch_size": 8, "embed_dim": 16, "depth": 1, "num_heads": 2, "num_classes": 3}
OPTIONS = ["--model-options", json.dumps(SHAPE)]
RANDOM = [*OPTIONS, "--calibration", "random", "--images", "4"]


def network(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    model = timm.create_model(ARCH, **SHAPE)
    nn.init.normal_(model.head.weight)
    return model.eval()


@pytest.fixture
def folder(tmp_path: Path, monkeypatch) -> Path:
    """A working directory with a checkpoint and data to calibrate and test on."""
    monkeypatch.chdir(tmp_path)
    save_file(network().state_dict(), "model.safetensors")
    for name, seed, count in (("train", 1, 8), ("test", 2, 20)):
        images = torch.randn(count, 3, 16, 16, generator=torch.Generator().manual_seed(seed))
        with torch.no_grad():
            labels = network()(images).argmax(1)
        labels[0] = (labels[0] + 1) % 3  # one is wrong
        save_file({"images": images, "labels": labels}, f"{name}.safetensors")
    return tmp_path


FILE = ["model.safetensors", "--arch", ARCH, *OPTIONS, "--calibration", "train.safetensors", "--images", "8"]


def write_images(folder: Path, count: int, classes: int = 0) -> None:
    for i in range(count):
        place = folder / f"class{i % classes}" if classes else folder
        place.mkdir(parents=True, exist_ok=True)
        colour = tuple(int(value) for value in torch.randint(256, (3,), generator=torch.Generator().manual_seed(i)))
        Image.new("RGB", (20 + i, 24), colour).save(place / f"{i}.png")


def fails(arguments: list[str], capsys, *, code: int = 2) -> str:
    """The one line of the error."""
    assert main(arguments) == code
    out, err = capsys.readouterr()
    assert out == ""
    errors = [line for line in err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and err.splitlines()[-1] == errors[0], err
    return errors[0]


# --- what it measures ---


@pytest.mark.parametrize("method", sorted(ptq.METHODS))
def test_numbers_are_those_of_the_library(method: str, folder: Path, capsys) -> None:
    extra = ["--method", method, "--w-bits", "4", "--a-bits", "6", "--test", "test.safetensors", "--batch-size", "6"]
    assert main([*FILE, *extra, "--json", "result.json", "--save", "saved"]) == 0
    out, err = capsys.readouterr()
    result = json.loads((folder / "result.json").read_text())

    data = load_file("test.safetensors")
    quantized = load_quantized(network(seed=5), "saved")
    with torch.no_grad():
        plain, found = network()(data["images"]), quantized(data["images"])
    test = result["test"]
    error = (found - plain).double().square().sum() / plain.double().square().sum()
    assert test["logit_error"] == pytest.approx(error.item(), rel=1e-4)
    assert test["agreement"] == (found.argmax(1) == plain.argmax(1)).double().mean().item()
    assert test["accuracy_float"] == 19 / 20 and test["items"] == 20
    assert test["accuracy_quantized"] == (found.argmax(1) == data["labels"]).double().mean().item()
    assert result["coverage"]["quantized"] == 8 and result["coverage"]["left_out"] == []
    assert result["method"] == method and result["versions"]["torch"] == torch.__version__ and not result["smoke_run"]
    assert result["size"]["float_model"] == sum(p.nbytes for p in network().parameters())
    assert "accuracy, floating point  95.00%" in out and "quantize: " in err and method in out
    assert "warning" not in err
    assert sorted(path.name for path in folder.iterdir()) == [
        "model.safetensors", "result.json", "saved", "test.safetensors", "train.safetensors",
    ]  # fmt: skip


def test_the_same_seed_gives_the_same_numbers(folder: Path, capsys) -> None:
    results = []
    for seed in (3, 3, 4):
        arguments = [ARCH, *RANDOM, "--test", "random", "--seed", str(seed), "--json", f"{len(results)}.json"]
        assert main(arguments) == 0
        results.append(json.loads((folder / f"{len(results)}.json").read_text())["test"])
    assert results[0] == results[1] != results[2]


def test_a_smoke_run_says_so(capsys) -> None:
    assert main([ARCH, *RANDOM, "--test", "random"]) == 0
    out, err = capsys.readouterr()
    assert "warning: random data" in err and "warning: random weights" in err and "mean nothing" in out
    assert "accuracy," not in out and "relative logit error" in out


def test_options_exclusions_and_transforms_reach_the_method(folder: Path, capsys, monkeypatch) -> None:
    done = []
    monkeypatch.setitem(ptq.TRANSFORMS, "note", lambda model, batches: done.append(len(batches)))
    more = [
        "--option",
        "symmetric=True",
        "--option",
        "activations=per_token",
        "--exclude",
        "head",
        "--transforms",
        "note",
    ]
    assert main([*FILE, *more, "--batch-size", "3", "--json", "result.json"]) == 0
    out, err = capsys.readouterr()
    result = json.loads((folder / "result.json").read_text())
    assert result["options"] == {"symmetric": True, "activations": "per_token"} and done == [3]
    assert result["coverage"]["left_out"] == ["head (excluded)"] and "test" not in result
    assert "note, then rtn, symmetric=True, activations=per_token" in out and "head (excluded)" in err


# --- images as they come ---


def grey_ramp(high: int) -> Tensor:
    return torch.linspace(0, high, 16 * 12).round().view(12, 16)


def as_seen(file: Path, mode: str = "RGB") -> Tensor:
    """The pixels that a model's preprocessing gets, ``(H, W)`` or ``(H, W, 3)``."""
    image = read_image(file, mode)
    assert image.mode == mode
    data = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
    return data.view(image.height, image.width, -1).squeeze(-1).float()


@pytest.mark.parametrize("ending", ["png", "tiff", "pgm"])
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_sixteen_bits_are_scaled(ending: str, mode: str, tmp_path: Path) -> None:
    ramp = grey_ramp(65535)
    Image.fromarray(ramp.to(torch.int32).numpy().astype("uint16")).save(tmp_path / f"a.{ending}")
    seen = as_seen(tmp_path / f"a.{ending}", mode)
    expected = (ramp / 257).round()
    assert (seen - (expected if mode == "L" else expected[..., None])).abs().max() <= 1
    assert seen.min() == 0 and seen.max() == 255 and len(seen.unique()) > 150


def test_floating_point_from_zero_to_one_is_scaled(tmp_path: Path) -> None:
    ramp = grey_ramp(191) / 191
    Image.fromarray(ramp.numpy()).save(tmp_path / "a.tiff")
    assert torch.equal(as_seen(tmp_path / "a.tiff", "L"), (ramp * 255 + 0.5).floor())


@pytest.mark.parametrize("value", [255.0, -0.5, float("nan"), float("inf"), 1.01])
def test_floating_point_of_another_range_is_refused(value: float, tmp_path: Path) -> None:
    ramp = grey_ramp(191) / 191
    ramp[3, 3] = value
    Image.fromarray(ramp.numpy()).save(tmp_path / "odd.tiff")
    with pytest.raises(ValueError, match="odd.tiff cannot be read as an image .it holds"):
        read_image(tmp_path / "odd.tiff", "RGB")


def test_whole_numbers_beyond_sixteen_bits_are_refused(tmp_path: Path) -> None:
    Image.fromarray((grey_ramp(65535) * 2).to(torch.int32).numpy()).save(tmp_path / "wide.tiff")
    with pytest.raises(ValueError, match="wide.tiff .*numbers from 0 to 131070 instead of 0 to 65535"):
        read_image(tmp_path / "wide.tiff", "RGB")


def test_colours_of_other_kinds_are_those_that_one_sees(tmp_path: Path) -> None:
    Image.new("CMYK", (4, 4), (255, 0, 255, 0)).save(tmp_path / "ink.tiff")  # cyan and yellow
    assert (as_seen(tmp_path / "ink.tiff") == torch.tensor([0.0, 255, 0])).all()
    palette = Image.new("P", (4, 4), 1)
    palette.putpalette([10, 20, 30, 200, 100, 50])
    palette.putpixel((0, 0), 0)
    palette.save(tmp_path / "plain.png")
    palette.save(tmp_path / "clear.png", transparency=bytes([0, 255]))
    plain, clear = as_seen(tmp_path / "plain.png"), as_seen(tmp_path / "clear.png")
    assert plain[0, 0].tolist() == [10, 20, 30] and clear[0, 0].tolist() == [255, 255, 255]
    assert torch.equal(plain[1:], clear[1:]) and plain[1, 1].tolist() == [200, 100, 50]
    Image.new("RGBA", (4, 4), (0, 0, 0, 51)).save(tmp_path / "faint.png")
    assert (as_seen(tmp_path / "faint.png") == 204).all()
    Image.new("1", (4, 4), 1).save(tmp_path / "bit.png")
    assert (as_seen(tmp_path / "bit.png", "L") == 255).all()


@pytest.mark.parametrize("orientation", range(1, 9))
def test_images_are_turned_upright(orientation: int, tmp_path: Path) -> None:
    upright = Image.new("L", (8, 4))
    upright.paste(255, (0, 0, 4, 2))  # the upper left is white
    undo = {2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}  # the transpose that the tag says was done
    stored = upright if orientation == 1 else upright.transpose(Image.Transpose(undo[orientation]))
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored.save(tmp_path / "a.png", exif=exif)
    expected = torch.zeros(4, 8)
    expected[:2, :4] = 255
    assert torch.equal(as_seen(tmp_path / "a.png", "L"), expected)


def test_bombs_and_files_that_are_none_are_named(tmp_path: Path, monkeypatch, recwarn) -> None:
    Image.new("L", (40, 40)).save(tmp_path / "big.png")
    (tmp_path / "empty.jpg").touch()
    (tmp_path / "text.png").write_text("no image")
    Image.effect_noise((40, 40), 50).save(tmp_path / "whole.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "whole.png").read_bytes()[:600])
    for pixels in (1500, 100):  # Pillow warns of the first and refuses the second
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", pixels)
        with pytest.raises(ValueError, match="big.png cannot be read as an image .*repair or remove it"):
            read_image(tmp_path / "big.png", "RGB")
    monkeypatch.undo()
    for name in ("empty.jpg", "text.png", "cut.png"):
        with pytest.raises(ValueError, match=f"{name} cannot be read as an image"):
            read_image(tmp_path / name, "RGB")
    assert not recwarn.list


def test_a_folder_of_mixed_images(folder: Path, capsys) -> None:
    (folder / "mixed" / "__MACOSX").mkdir(parents=True)
    for hidden in ("._a.png", "__MACOSX/._b.png", ".c.jpg"):
        (folder / "mixed" / hidden).write_bytes(b"\0\5\26\7")
    Image.fromarray(grey_ramp(65535).to(torch.int32).numpy().astype("uint16")).save(folder / "mixed" / "deep.png")
    Image.fromarray((grey_ramp(191) / 191).numpy()).save(folder / "mixed" / "float.tiff")
    Image.new("CMYK", (20, 20), (9, 9, 9, 9)).save(folder / "mixed" / "ink.jpg")
    Image.new("LA", (20, 20), (9, 100)).save(folder / "mixed" / "clear.png")
    base = ["model.safetensors", "--arch", ARCH, *OPTIONS, "--calibration", "mixed", "--images", "4"]
    assert main(base) == 0
    assert "warning" not in capsys.readouterr().err
    Image.fromarray(grey_ramp(191).numpy()).save(folder / "mixed" / "odd.tiff")
    assert "mixed/odd.tiff cannot be read as an image (it holds numbers" in fails([*base[:-1], "5"], capsys)


# --- data ---


def test_the_same_data_is_split(folder: Path, capsys) -> None:
    arguments = [*FILE[:-1], "5", "--test", "./train.safetensors", "--json", "result.json"]
    assert main(arguments) == 0
    assert "holds 5 of the calibration items: it is tested on 3 others" in capsys.readouterr().err
    assert json.loads((folder / "result.json").read_text())["test"]["items"] == 3


def test_images_in_class_folders_flat_folders_and_links(folder: Path, capsys) -> None:
    write_images(folder / "train", 9, classes=3)
    (folder / "flat").mkdir()
    for i in range(9):  # the same images under other names, and three more
        (folder / "flat" / f"link{i}.png").symlink_to(folder / "train" / f"class{i % 3}" / f"{i}.png")
    write_images(folder / "flat", 3)
    base = ["model.safetensors", "--arch", ARCH, *OPTIONS, "--calibration", "train", "--images", "6"]
    assert main([*base, "--test", "train", "--json", "result.json"]) == 0
    test = json.loads((folder / "result.json").read_text())["test"]
    assert test["items"] == 3 and "accuracy_float" in test
    assert main([*base, "--test", "flat", "--json", "result.json"]) == 0
    test = json.loads((folder / "result.json").read_text())["test"]
    assert test["items"] == 6 and "accuracy_float" not in test
    assert main([*base, "--test", "flat", "--test-images", "2", "--json", "result.json"]) == 0
    assert json.loads((folder / "result.json").read_text())["test"]["items"] == 2


def test_images_are_preprocessed_as_timm_would(folder: Path, monkeypatch) -> None:
    write_images(folder / "train", 2)
    seen = []
    real = ptq.quantize
    monkeypatch.setattr(ptq, "quantize", lambda model, **kw: seen.append(kw["calibration"]) or real(model, **kw))
    base = ["model.safetensors", "--arch", ARCH, *OPTIONS, "--calibration", "train", "--images", "2"]
    assert main(base) == 0
    config = timm.data.resolve_data_config({}, model=network()) | {"input_size": (3, 16, 16)}
    transform = timm.data.create_transform(**config)
    expected = {transform(Image.open(path)).sum().item() for path in (folder / "train").iterdir()}
    assert {image.sum().item() for image in seen[0]} == expected and seen[0].shape == (2, 3, 16, 16)


@pytest.mark.parametrize(
    ("contents", "message"),
    [
        (
            {"images": torch.zeros(4, 3, 16, 16, dtype=torch.uint8)},
            "images is uint8 of shape .*store normalised floating",
        ),
        ({"images": torch.zeros(4, 16, 16)}, "shape \\(4, 16, 16\\): store normalised"),
        ({"pictures": torch.zeros(4, 3, 16, 16)}, "has pictures: store 'images'"),
        ({"images": torch.zeros(4, 3, 16, 16), "labels": torch.zeros(3).long()}, "labels has shape \\(3,\\): store 4"),
        ({"input_ids": torch.zeros(4, 5).long()}, "holds sequences, the model takes images"),
        ({"images": torch.zeros(8, 3, 9, 9)}, "cannot take an item of shape \\(3, 9, 9\\)"),
        ({"images": torch.full((8, 3, 16, 16), torch.nan)}, "NaN or infinity"),
    ],
)
def test_bad_tensors(contents: dict[str, Tensor], message: str, folder: Path, capsys) -> None:
    save_file(contents, "train.safetensors")
    assert re.search(message, fails([*FILE[:-1], "4"], capsys))


def test_bad_test_data(folder: Path, capsys) -> None:
    def save(**tensors: Tensor) -> None:
        save_file(tensors, "bad.safetensors")

    save(images=torch.zeros(2, 3, 16, 16), labels=torch.tensor([0, 3]))
    assert "labels up to 3, the model's output has shape (N, 3)" in fails([*FILE, "--test", "bad.safetensors"], capsys)
    (folder / "bad.safetensors").write_bytes(b"1234")
    assert "bad.safetensors cannot be read" in fails([*FILE, "--test", "bad.safetensors"], capsys)
    assert "all its 8 items are calibration items" in fails([*FILE, "--test", "train.safetensors"], capsys)
    (folder / "empty").mkdir()
    assert "empty holds no images" in fails([*FILE, "--test", "empty"], capsys)
    write_images(folder / "mixed", 2)
    write_images(folder / "mixed", 2, classes=1)
    assert "holds images and folders of images" in fails([*FILE, "--test", "mixed"], capsys)
    (folder / "broken").mkdir()
    (folder / "broken" / "a.png").write_bytes(b"no image")
    assert "a.png cannot be read as an image" in fails([*FILE, "--test", "broken"], capsys)
    (folder / "data.csv").write_text("")
    assert "--test data.csv is of no known kind" in fails([*FILE, "--test", "data.csv"], capsys)
    (folder / "data.txt").write_text("words")
    assert "data.txt is a text, the model takes images" in fails([*FILE, "--test", "data.txt"], capsys)


# --- bad input, before any work ---


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "the following arguments are required: MODEL, --calibration"),
        ([ARCH], "required: --calibration"),
        (
            ["vit_tinny_patch16_224", "--calibration", "random"],
            "MODEL 'vit_tinny_patch16_224' is no timm model: did you mean",
        ),
        (["nothing.safetensors", "--calibration", "random"], "nothing.safetensors does not exist"),
        (["model.safetensors", "--calibration", "random"], "add --arch with the name of a timm model"),
        (["model.safetensors", "--arch", "vit", "--calibration", "random"], "--arch 'vit' is no timm model"),
        ([ARCH, "--arch", ARCH, "--calibration", "random"], "--arch is not for a timm model"),
        ([*FILE, "--pretrained"], "--pretrained is not for a file"),
        ([ARCH, *RANDOM, "--method", "eqr"], "--method 'eqr' is unknown"),
        ([ARCH, *RANDOM, "--method", "rtm"], "--method 'rtm' is unknown: did you mean 'rtn'?"),
        ([ARCH, *RANDOM, "--transforms", "flip"], "--transforms 'flip' is unknown"),
        ([ARCH, *RANDOM, "--w-bits", "9"], "--w-bits is 9: choose 2 to 8"),
        ([ARCH, *RANDOM, "--a-bits", "four"], "argument --a-bits: invalid int value: 'four'"),
        ([ARCH, *RANDOM, "--images", "0"], "'0' is not a whole number of 1 or more"),
        ([ARCH, *RANDOM, "--option", "symmetric"], "--option 'symmetric' is not of the form NAME=VALUE"),
        ([ARCH, *RANDOM, "--option", "symmetric=True", "--option", "symmetric=False"], "symmetric is given twice"),
        ([ARCH, *RANDOM, "--exclude", "nothing"], "exclude='nothing' matches no layer"),
        ([ARCH, *RANDOM, "--device", "gpu"], "--device 'gpu' cannot be used"),
        ([ARCH, *RANDOM, "--save", "there"], "there exists: choose another folder"),
        ([ARCH, *RANDOM, "--json", "nowhere/a.json"], "--json nowhere/a.json cannot be written"),
        ([ARCH, *RANDOM, "--json", "/proc/result.json"], "--json /proc/result.json cannot be written"),
        ([ARCH, *RANDOM, "--save", "nowhere/model"], "--save nowhere/model cannot be written"),
        ([ARCH, *RANDOM, "--typo"], "unrecognized arguments: --typo"),
        ([ARCH, "--model-options", "{", "--calibration", "random"], "--model-options '{' is not JSON"),
        ([ARCH, "--model-options", "3", "--calibration", "random"], "--model-options '3' is no JSON object"),
        (
            [ARCH, "--model-options", '{"colour": 1}', "--calibration", "random"],
            "timm cannot make vit_tiny_patch16_224",
        ),
        ([ARCH, "--calibration", "nowhere"], "--calibration nowhere does not exist"),
        (FILE[:-1] + ["9"], "--images is 9, train.safetensors has 8"),
        (["there", "--calibration", "random"], "there has no config.json"),
    ],
)
def test_bad_arguments(arguments: list[str], message: str, folder: Path, capsys) -> None:
    (folder / "there").mkdir()
    assert message in fails(arguments, capsys)
    assert not (folder / "result.json").exists()


@pytest.mark.parametrize(
    ("method", "option", "message"),
    [
        ("rtn", "size=3", "method 'rtn' has no option 'size'"),
        ("rtn", "w_bits=3", "--option w_bits is no option of a method: see"),
        ("rtn", "activations=odd", "activations is 'odd': choose one of"),
        ("smoothquant", "alpha=2", "alpha is 2: choose a number from 0 to 1"),
        ("repq_vit", "percentiles=(7,)", "percentile is 7: choose a number above 0.5"),
        ("erq", "ridge=abc", "is a value of --option of the right type?"),
        ("ptq4vit", "rows=0", "rows is 0: give a whole number of at least 1"),
        ("ptq4vit", "seed=1.5", "is a value of --option of the right type?"),
    ],
)
def test_the_methods_options_are_checked_before_the_model_is_loaded(
    method: str, option: str, message: str, capsys, monkeypatch
) -> None:
    monkeypatch.setattr(run, "load_model", lambda *_: pytest.fail("the model was loaded"))
    assert message in fails([ARCH, *RANDOM, "--method", method, "--option", option], capsys)


def test_fewer_class_folders_than_outputs_are_no_labels(folder: Path, capsys) -> None:
    write_images(folder / "val", 4, classes=2)
    line = fails([*FILE[: FILE.index("--calibration")], "--calibration", "random", "--test", "val"], capsys)
    assert "val has 2 class folders, the model 3 outputs" in line


def test_an_earlier_model_is_replaced_when_asked(folder: Path, capsys) -> None:
    assert main([*FILE, "--save", "saved"]) == 0
    capsys.readouterr()
    before = (folder / "saved" / "model.safetensors").read_bytes()
    assert "saved exists" in fails([*FILE, "--save", "saved"], capsys)
    assert main([*FILE, "--w-bits", "3", "--save", "saved", "--overwrite"]) == 0
    assert (folder / "saved" / "model.safetensors").read_bytes() != before


def test_bad_checkpoints(folder: Path, capsys) -> None:
    state = network().state_dict()
    rest = ["--arch", ARCH, *OPTIONS, *FILE[5:]]
    save_file({name: tensor for name, tensor in state.items() if name != "norm.bias"}, "less.safetensors")
    assert "less.safetensors lacks norm.bias" in fails(["less.safetensors", *rest], capsys)
    save_file(state | {"more": torch.zeros(1)}, "more.safetensors")
    assert "has, beyond the model, more" in fails(["more.safetensors", *rest], capsys)
    save_file(state | {"head.bias": torch.zeros(7)}, "other.safetensors")
    assert "head.bias has shape (7,), in vit_tiny_patch16_224 (3,)" in fails(["other.safetensors", *rest], capsys)
    Path("cut.safetensors").write_bytes(Path("model.safetensors").read_bytes()[:-9])
    assert "cut.safetensors cannot be read" in fails(["cut.safetensors", *rest], capsys)
    Path("model.pt").write_bytes(b"x")
    assert "model.pt is no .safetensors file: convert it" in fails(["model.pt", *rest], capsys)
    assert main([*FILE, "--save", "saved"]) == 0
    capsys.readouterr()
    assert "saved is quantized already" in fails(["saved", "--calibration", "random"], capsys)


def test_pretrained_weights_that_cannot_be_fetched(capsys, monkeypatch) -> None:
    def fail(*_, **__):
        raise OSError("no route to host")

    monkeypatch.setattr(timm, "create_model", fail)
    line = fails([ARCH, "--pretrained", "--calibration", "random"], capsys, code=1)
    assert "no route to host" in line and "--pretrained needs a network" in line


# --- Hugging Face folders ---


def causal_model(folder: Path) -> nn.Module:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1,
        vocab_size=30, max_position_embeddings=32,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config).eval()
    model.save_pretrained(folder)
    return model


def test_a_language_model_on_a_text(folder: Path, capsys) -> None:
    model = causal_model(folder / "llama")
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.WordLevel({f"w{i}": i for i in range(30)} | {"?": 0}, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="?").save_pretrained(folder / "llama")
    ids = torch.randint(30, (8 * 6,), generator=torch.Generator().manual_seed(0))
    Path("text.txt").write_text(" ".join(f"w{i}" for i in ids.tolist()))

    arguments = ["llama", "--calibration", "text.txt", "--test", "text.txt", "--images", "4", "--sequence-length", "8"]
    assert main([*arguments, "--w-bits", "8", "--json", "result.json", "--save", "saved"]) == 0
    result = json.loads((folder / "result.json").read_text())
    assert result["kind"] == "sequences" and result["test"]["items"] == 2
    order = torch.randperm(6, generator=torch.Generator().manual_seed(0))[4:]
    with torch.no_grad():
        expected = model(input_ids=ids.view(6, 8)[order], labels=ids.view(6, 8)[order]).loss.exp().item()
    assert result["test"]["perplexity_float"] == pytest.approx(expected, rel=1e-4)
    assert "perplexity, quantized" in capsys.readouterr().out
    save_file({"input_ids": ids.view(6, 8)}, "ids.safetensors")
    assert main(["llama", "--calibration", "ids.safetensors", "--images", "2", "--sequence-length", "8"]) == 0
    capsys.readouterr()
    assert "the model takes 32: give at most that" in fails(["llama", *arguments[1:-1], "64"], capsys)
    save_file({"images": torch.zeros(2, 3, 4, 4)}, "images.safetensors")
    line = fails(["llama", "--calibration", "images.safetensors", "--sequence-length", "8"], capsys)
    assert "holds images, the model takes sequences" in line
    (folder / "llama" / "tokenizer.json").unlink()
    (folder / "llama" / "tokenizer_config.json").unlink()
    assert "llama has no tokenizer" in fails(arguments, capsys)


def test_an_image_classifier_with_its_own_label_names(folder: Path, capsys) -> None:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.ViTConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, image_size=16, patch_size=8,
        label2id={"class1": 0, "class0": 1}, id2label={0: "class1", 1: "class0"},
    )  # fmt: skip
    transformers.ViTForImageClassification(config).save_pretrained(folder / "vit")
    write_images(folder / "train", 6, classes=2)
    arguments = ["vit", "--calibration", "train", "--images", "3", "--test", "train", "--json", "result.json"]
    assert main(arguments) == 0
    _, err = capsys.readouterr()
    assert "vit has no preprocessor_config.json: images are resized, cropped" in err
    by_fallback = json.loads((folder / "result.json").read_text())["test"]
    assert by_fallback["items"] == 3 and "accuracy_float" in by_fallback
    size = {"height": 16, "width": 16}
    transformers.ViTImageProcessor(size=size).save_pretrained(folder / "vit")
    assert main(arguments) == 0
    err = capsys.readouterr().err
    assert "preprocessor_config.json" not in err and "these are random" not in err
    state = load_file("vit/model.safetensors")
    save_file({k: v for k, v in state.items() if "classifier" not in k}, "vit/model.safetensors", {"format": "pt"})
    assert main(arguments) == 0
    assert (
        "vit has no classifier.bias, classifier.weight (2 missing in all): these are random" in capsys.readouterr().err
    )


def test_code_in_a_folder_is_never_run(folder: Path, capsys) -> None:
    pytest.importorskip("transformers")
    causal_model(folder / "llama")
    config = json.loads((folder / "llama" / "config.json").read_text())
    config |= {"model_type": "mine", "auto_map": {"AutoConfig": "code.C", "AutoModelForCausalLM": "code.M"}}
    (folder / "llama" / "config.json").write_text(json.dumps(config))
    (folder / "llama" / "code.py").write_text("raise SystemExit('executed')")
    assert "MODEL llama cannot be loaded" in fails(["llama", "--calibration", "random"], capsys)
    for file in (folder / "llama").glob("*.safetensors"):
        file.rename(file.with_name("pytorch_model.bin"))
    assert "llama has no .safetensors file" in fails(["llama", "--calibration", "random"], capsys)


# --- the process ---


# The command, but what is named stops half-way, says so, and waits for ever.
STOPPING = """
import sys, time
from pathlib import Path
import safetensors.torch
from s2d import ptq
from s2d.ptq import command

def stop():
    print("half-way", file=sys.stderr, flush=True)
    while True:
        time.sleep(1)

def quantize(*args, **options):
    stop()

def write(tensors, path, *args, **options):
    Path(path).write_bytes(b"half")
    stop()

place = sys.argv.pop(1)
if place == "quantize":
    ptq.METHODS["rtn"] = quantize
else:
    safetensors.torch.save_file = write
sys.exit(command.main(sys.argv[1:]))
"""


@pytest.mark.parametrize("place", ["quantize", "save"])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_process_ends_with_130_and_leaves_nothing(folder: Path, place: str, number: int) -> None:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    before = sorted(folder.iterdir())
    arguments = [sys.executable, "-c", STOPPING, place, *FILE, "--method", "rtn", "--save", "saved"]
    with subprocess.Popen(arguments, env=environment, stderr=subprocess.PIPE, text=True) as process:
        assert any(line == "half-way\n" for line in process.stderr), "it ended before it got there"
        process.send_signal(number)
        assert process.stderr.read().splitlines()[-1] == "interrupted"
        assert process.wait(600) == 130
    assert sorted(folder.iterdir()) == before


def test_failures_that_are_not_the_callers(folder: Path, capsys, monkeypatch) -> None:
    def fail(*_, **__):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(run, "save_quantized", fail)
    assert "out of memory" in fails([*FILE, "--save", "saved"], capsys, code=1)


def test_help(capsys) -> None:
    with pytest.raises(SystemExit) as exit:
        main(["--help"])
    out = capsys.readouterr().out
    assert exit.value.code == 0 and "--calibration DATA" in out and "Exit codes: 0" in out
    assert all(method in out for method in ptq.METHODS)


def test_the_command_does_not_import_the_laboratory() -> None:
    sources = [path.read_text() for path in (ROOT / "s2d" / "ptq" / "command").glob("*.py")]
    assert len(sources) > 5 and not any("s2d.lab" in source for source in sources)
