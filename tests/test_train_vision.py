"""``s2d train vision``: from made images to a checkpoint that the other commands take; killed, resumed, refused."""

from __future__ import annotations

import csv
import io
import json
import shutil
import tarfile
from pathlib import Path

import pytest
import timm
import torch
from training import COLOURS, VIT, WORKER, image_folder, largest_difference, picture, run, settings, weights

from s2d.command import main
from s2d.models import load
from s2d.train.folder import RunFolder
from s2d.train.images import open_images
from s2d.train.order import chunks_of_epoch, epoch_order
from s2d.train.vision import train_vision

EVERYTHING = settings(
    micro_batch_size=6,
    decay="s2d",
    tau=0.3,
    refresh_every=3,
    mixup=0.4,
    cutmix=0.5,
    random_erasing=0.3,
    auto_augment="rand-m5-mstd0.5",
    drop_path=0.1,
    layer_decay=0.8,
    ema_decay=0.9,
    clip_grad=1.0,
)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("images")
    image_folder(root / "train", 12, 0)
    image_folder(root / "val", 4, 1)
    return root


def sources(data: Path) -> list[str]:
    return ["--data", str(data / "train"), "--val", str(data / "val")]


@pytest.fixture(scope="module")
def whole(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with everything switched on, never interrupted."""
    out = tmp_path_factory.mktemp("runs") / "whole"
    assert main(["train", *VIT, *sources(data), "-o", str(out), *EVERYTHING]) == 0
    return out


def history(out: Path) -> list[dict[str, str]]:
    with (out / "history.csv").open(newline="") as lines:
        return list(csv.DictReader(lines))


def fails(arguments: list[str], capsys: pytest.CaptureFixture, code: int = 2) -> str:
    """The one line of the error."""
    assert main(["train", *arguments]) == code
    out, err = capsys.readouterr()
    assert out == ""
    return next(line for line in err.splitlines() if line.startswith("error: "))


# --- the result ---


def test_a_run_leaves_a_checkpoint_that_quantize_and_eval_take(whole, data, tmp_path, capsys):
    test = ["--test", str(data / "val")]
    assert main(["eval", str(whole / "model"), *test, "--json", str(tmp_path / "eval.json")]) == 0
    done = json.loads((whole / "done.json").read_text())
    assert json.loads((tmp_path / "eval.json").read_text())["accuracy_float"] == done["val_accuracy"]
    bits = ["--w-bits", "4", "--a-bits", "4", "--calibration", str(data / "train"), "--images", "8"]
    assert main(["quantize", str(whole / "model"), *bits, *test]) == 0
    assert "vit_tiny_patch16_224" in capsys.readouterr().out
    assert load(str(whole / "model")).label_ids == {name: label for label, name in enumerate(COLOURS)}


def test_the_files_of_a_run(whole, data):
    rows = history(whole)
    assert [row["epoch"] for row in rows] == ["1", "2"] and [row["step"] for row in rows] == ["3", "6"]
    assert all(float(row["sigma_1"]) > 0 and float(row["max_activation"]) > 0 for row in rows)
    assert int(float(rows[-1]["s2d_components"])) > 0
    assert sorted(path.name for path in (whole / "checkpoints").iterdir()) == ["step-4", "step-6"]
    stored = json.loads((whole / "settings.json").read_text())
    assert stored["settings"]["ema_decay"] == 0.9 and stored["versions"]["torch"] == torch.__version__
    assert stored["data"] == {"train": str(data / "train"), "items": 36, "classes": 3, "val": str(data / "val")}


def test_sigma_1_of_the_history_is_that_of_the_weights(whole):
    found = weights(whole)
    blocks = [t for name, t in found.items() if name.startswith("blocks.") and t.ndim == 2 and "norm" not in name]
    exact = max(torch.linalg.matrix_norm(t.double(), 2).item() for t in blocks)
    assert float(history(whole)[-1]["sigma_1"]) == pytest.approx(exact, rel=2e-3)


def test_it_learns(data, tmp_path):
    arguments = [*VIT, *sources(data), "-o", str(tmp_path / "run"), *settings(epochs=8, lr=2e-3)]
    assert main(["train", *arguments]) == 0
    assert float(history(tmp_path / "run")[-1]["val_accuracy"]) > 0.9


# --- interruptions ---


def test_killed_while_a_checkpoint_is_written_and_resumed_it_ends_with_the_same_bits(whole, data, tmp_path):
    arguments = [*VIT, *sources(data), "-o", str(tmp_path / "run"), *EVERYTHING]
    killed = run([str(WORKER), "6", "0", *arguments])
    assert killed.returncode == -9, killed.stderr
    left = sorted(path.name for path in (tmp_path / "run" / "checkpoints").glob("step-*"))
    assert left == ["step-3", "step-4"]  # step 3 ends the first epoch, 4 is in the middle of the second
    assert not (tmp_path / "run" / "model").exists()
    assert main(["train", *arguments]) == 0
    assert largest_difference(tmp_path / "run", whole) == 0
    mine, other = ([{**row, "seconds": ""} for row in history(out)] for out in (tmp_path / "run", whole))
    assert mine == other
    assert not [path for path in (tmp_path / "run").rglob(".*")]


def test_a_damaged_checkpoint_is_passed_over(whole, tmp_path, capsys):
    folder = RunFolder(tmp_path / "run")
    shutil.copytree(whole / "checkpoints", folder.checkpoints)
    (folder.checkpoints / "step-6" / "state.safetensors").write_bytes(b"cut short")
    tensors, notes = folder.load()
    assert notes["step"] == 4 and "step-6 cannot be read" in capsys.readouterr().err
    assert any(name.startswith("decay.") for name in tensors)
    (folder.checkpoints / "step-4" / "notes.json").unlink()
    with pytest.raises(ValueError, match="no checkpoint in .* can be read"):
        folder.load()


def test_a_run_that_is_done_is_left_alone_and_another_is_refused(whole, data, tmp_path, capsys):
    arguments = [*VIT, *sources(data), "-o", str(whole)]
    before = (whole / "done.json").stat().st_mtime_ns
    assert main(["train", *arguments, *EVERYTHING, "--set", "workers=1", "--json", str(tmp_path / "again.json")]) == 0
    assert (whole / "done.json").stat().st_mtime_ns == before and "is done" in capsys.readouterr().err
    assert (tmp_path / "again.json").read_text() == (whole / "done.json").read_text()
    told = fails([*arguments, *EVERYTHING, "--set", "lr=0.01"], capsys)
    assert "holds a run with settings: lr=0.001, asked is 0.01" in told
    assert "--resume auto" in fails([*arguments, *EVERYTHING, "--resume", "never"], capsys)


# --- what is trained on ---


def shards(folder: Path, root: Path) -> str:
    """The images of a folder as two WebDataset shards, in another order."""
    folder.mkdir()
    files = sorted(root.rglob("*.png"), key=lambda path: (path.name, path.parent.name))
    for number in range(2):
        with tarfile.open(folder / f"train-{number:02}.tar", "w") as tar:
            for file in files[number::2]:
                key = f"{file.parent.name}_{file.stem}"
                for ending, content in (
                    (".png", file.read_bytes()),
                    (".cls", b"%d" % COLOURS.index(key.split("_")[0])),
                ):
                    member = tarfile.TarInfo(f"./{key}{ending}")
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))
    return f"wds/{folder}/train-{{00..01}}.tar"


def test_shards_hold_the_images_of_the_folder(data, tmp_path):
    source = shards(tmp_path / "shards", data / "val")
    found, plain = open_images(source, "--data"), open_images(str(data / "val"), "--data")
    contents = {plain.reader[i][0].read(): plain.reader[i][1] for i in range(len(plain))}
    assert len(found) == len(plain) == 12
    assert {found.reader[i][0].read(): found.reader[i][1] for i in range(len(found))} == contents
    assert open_images(f"wds/{tmp_path / 'shards'}", "--data").labels == found.labels


def test_training_on_shards_and_on_a_hugging_face_set(data, tmp_path):
    datasets = pytest.importorskip("datasets")
    images = [(picture(label, [0, label, i]), label) for label in range(3) for i in range(12)]
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=list(COLOURS))})
    columns = {"image": [image for image, _ in images], "label": [label for _, label in images]}
    (tmp_path / "set").mkdir()
    datasets.Dataset.from_dict(columns, features=features).to_parquet(tmp_path / "set" / "train-00000.parquet")
    found = open_images(f"hfds/{tmp_path / 'set'}:train", "--data")
    assert found.classes == list(COLOURS) and found.labels == columns["label"]
    once = settings(epochs=1, warmup_epochs=0)
    for number, source in enumerate([f"hfds/{tmp_path / 'set'}", shards(tmp_path / "shards", data / "train")]):
        out = tmp_path / f"run{number}"
        assert main(["train", *VIT, "--data", source, "-o", str(out), *once]) == 0
        assert history(out)[0]["val_accuracy"] == "" and len(weights(out)["head.bias"]) == 3


def test_the_order_is_a_function_of_seed_and_epoch_and_the_chunks_of_the_ranks_make_it_up():
    count, batch, chunk = 50, 12, 3
    one = chunks_of_epoch(count, 1, 2, batch, chunk, 0, 1)
    assert one == chunks_of_epoch(count, 1, 2, batch, chunk, 0, 1) != chunks_of_epoch(count, 1, 3, batch, chunk, 0, 1)
    for ranks in (2, 4):
        merged = [c for rank in range(ranks) for c in chunks_of_epoch(count, 1, 2, batch, chunk, rank, ranks)]
        assert sorted(merged) == sorted(one)
    assert [i for *_, items in one for i in items] == epoch_order(count, 1, 2)[:48]


# --- other ways to train ---


def test_quantization_aware_training_leaves_both_networks(whole, data, tmp_path):
    out = tmp_path / "qat"
    arguments = ["vision", str(whole / "model"), "--cpu", *sources(data), "-o", str(out)]
    arguments += settings(epochs=1, warmup_epochs=0, qat_w_bits=4, qat_a_bits=4, qat_items=16)
    assert main(["train", *arguments]) == 0
    assert (weights(out)["blocks.0.mlp.fc1.weight"] != weights(whole)["blocks.0.mlp.fc1.weight"]).any()
    test = ["--test", str(data / "val"), "--quantized", str(out / "quantized"), "--json", str(tmp_path / "eval.json")]
    assert main(["eval", str(out / "model"), *test]) == 0
    measured = json.loads((tmp_path / "eval.json").read_text())
    assert measured["accuracy_quantized"] == float(history(out)[-1]["val_accuracy"])  # that of the rounded network
    assert measured["logit_error"] > 0


def test_a_head_is_kept_for_the_same_classes_and_made_anew_for_others(whole, data, tmp_path):
    once = settings(epochs=1, lr=1e-12, warmup_epochs=0)
    for name, folder in (("same", data / "train"), ("other", image_folder(tmp_path / "more", 8, 5, ("a", "b", "c")))):
        arguments = ["vision", str(whole / "model"), "--cpu", "--data", str(folder), "-o", str(tmp_path / name)]
        assert main(["train", *arguments, *once]) == 0
    torch.testing.assert_close(weights(tmp_path / "same")["head.weight"], weights(whole)["head.weight"])
    assert not torch.allclose(weights(tmp_path / "other")["head.weight"], weights(whole)["head.weight"], atol=1e-3)


def test_bf16_another_image_size_and_sgd(data, tmp_path):
    out = tmp_path / "run"
    more = settings(epochs=1, warmup_epochs=0, precision="bf16", image_size=40, optimizer="sgd")
    assert main(["train", *VIT, *sources(data), "-o", str(out), *more]) == 0
    assert load(str(out / "model")).shape == (3, 40, 40)
    assert weights(out)["blocks.0.mlp.fc1.weight"].dtype == torch.float32


def test_a_loss_that_is_not_finite_stops_the_run(data, tmp_path, capsys):
    told = fails([*VIT, *sources(data), "-o", str(tmp_path / "run"), *settings(lr=10, optimizer="sgd")], capsys, 1)
    assert "the loss is nan at step" in told and not (tmp_path / "run" / "model").exists()


# --- refusals, before any work ---


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--set", "learning_rate=1"], "'learning_rate' is no setting"),
        (["--set", "batch_size=7", "micro_batch_size=2"], "no multiple of micro_batch_size 2"),
        (["--set", "batch_size=500"], "has 36 images, batch_size is 500"),
        (["--set", "sharding=fsdp2"], "needs several processes"),
        (["--set", "classes=2"], "classes is 2, and the data has the label 2"),
        (["--set", "image_size=30"], "in patches of 8: give a multiple of 8"),
        (["--set", "auto_augment=nonsense-m9"], "auto_augment is 'nonsense-m9', which timm does not know"),
        (["--val", "{root}/train"], "--val is --data"),
        (["--val", "nowhere"], "--val nowhere does not exist"),
        (["--data", "nowhere"], "--data nowhere does not exist"),
        (["--data", "{root}"], "holds train, val: give one of these folders"),
        (["--data", "{root}/train/red"], "give a folder with one for each class"),
        (["--data", "wds/nothing-{0..3}.tar"], "there is no nothing-0.tar"),
        (["--data", "hfds/{root}/nothing"], "cannot be read"),
        (["--recipe", "nothing.yaml"], "--recipe nothing.yaml does not exist: give a YAML file, or one of"),
    ],
)
def test_what_cannot_be_trained_is_refused_before_anything_is_written(arguments, says, data, tmp_path, capsys):
    given = [text.replace("{root}", str(data)) for text in arguments]
    told = fails([*VIT, *sources(data), "-o", str(tmp_path / "run"), *settings(), *given], capsys)
    assert says in told and not (tmp_path / "run").exists()


def test_classes_of_validation_that_are_not_trained_on_are_named(data, tmp_path, capsys):
    strange = image_folder(tmp_path / "val", 1, 0, ("blue", "pink"))
    told = fails([*VIT, "--data", str(data / "train"), "--val", str(strange), "-o", str(tmp_path / "run")], capsys)
    assert "classes that the training data lacks: pink" in told


def test_a_folder_with_other_things_and_a_model_of_another_library_are_refused(data, tmp_path, capsys):
    told = fails([*VIT, *sources(data), "-o", str(data), *settings()], capsys)
    assert "holds something else than a run" in told
    (tmp_path / "file").touch()
    for out in (tmp_path / "file", tmp_path / "file" / "run"):
        assert "cannot be written" in fails([*VIT, *sources(data), "-o", str(out), *settings()], capsys)
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text('{"model_type": "vit"}')
    (tmp_path / "model" / "model.safetensors").touch()
    told = fails(["vision", str(tmp_path / "model"), *sources(data), "-o", str(tmp_path / "run")], capsys)
    assert "is none of timm's" in told


def test_a_shard_without_labels_and_a_damaged_image_are_named(data, tmp_path, capsys):
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        tar.add(data / "train" / "red" / "0.png", "0.png")
    assert "image 0 has no .cls" in fails([*VIT, "--data", f"wds/{tmp_path}/a.tar", "-o", str(tmp_path / "r")], capsys)
    root = image_folder(tmp_path / "broken", 6, 0)
    for file in (root / "red").iterdir():
        file.write_bytes(b"no image")
    for workers in (0, 1):
        told = fails([*VIT, "--data", str(root), "-o", str(tmp_path / "run"), *settings(workers=workers)], capsys)
        assert "red" in told and "cannot be read as an image" in told and "Traceback" not in told


def test_from_python(data, tmp_path):
    from s2d.train.settings import VisionSettings

    model = timm.create_model("vit_tiny_patch16_224", img_size=32, patch_size=8, embed_dim=32, depth=1, num_heads=2)
    timm.models.save_for_hf(model, tmp_path / "start", safe_serialization=True)
    chosen = VisionSettings(epochs=1, batch_size=12, warmup_epochs=0, workers=0)
    done = train_vision(str(tmp_path / "start"), str(data / "train"), tmp_path / "run", settings=chosen, cpu=True)
    assert done["steps"] == 3 and done["val_accuracy"] is None
