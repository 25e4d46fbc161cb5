"""The study of a self-supervised backbone, on a made one: its images, its model, a search that goes on where it was."""

from __future__ import annotations

import gzip
import hashlib
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import torch
from sklearn.linear_model import LogisticRegression

from s2d.lab import fashion, self_supervised, vision_backbone
from s2d.lab.fashion import FashionMNIST
from s2d.lab.figures import self_supervised as draw
from s2d.lab.figures.style import use_style
from s2d.lab.recipes import TUNING_SEEDS
from s2d.lab.results import load_table
from s2d.lab.self_supervised import BEFORE, Subject, backbone_finetuning, network_key
from s2d.lab.vision_backbone import VisionBackbone

TINY = "vit_tiny_patch16_224"
RATE = {"lr": 1e-3}


@pytest.fixture
def clothes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Files in the format of Fashion-MNIST: 400 and 60 images of noise on which a bright row says the class."""
    folder, rng = tmp_path / "clothes", np.random.default_rng(0)
    folder.mkdir()
    for part, count in (("train", 400), ("t10k", 60)):
        labels = (np.arange(count) % 10).astype(np.uint8)
        images = rng.integers(0, 100, size=(count, 28, 28), dtype=np.uint8)
        images[np.arange(count), 2 * labels + 3] = 255
        images[:, 0, :2] = np.arange(count)[:, None] % 250  # no two are the same
        for kind, header, values in (("images-idx3", 16, images), ("labels-idx1", 8, labels)):
            file = folder / f"{part}-{kind}-ubyte.gz"
            file.write_bytes(gzip.compress(bytes(header) + values.tobytes()))
            monkeypatch.setitem(fashion.FILES, file.name, hashlib.sha256(file.read_bytes()).hexdigest())
    monkeypatch.setenv("S2D_FASHION_MNIST", str(folder))
    monkeypatch.setattr(fashion, "HELD_OUT", {"validation": 60, "calibration": 40})
    return folder


# --- data ---


def test_images_are_scaled_and_splits_are_disjoint(clothes: Path) -> None:
    parts = {split: fashion.photographs(split) for split in fashion.SPLITS}
    assert [len(labels) for _, labels in parts.values()] == [300, 60, 40, 60]
    train = [images.tobytes() for split in ("train", "validation", "calibration") for images in parts[split][0]]
    assert len(set(train)) == 400
    x, y = FashionMNIST(28).fixed_set("test", 60)
    assert x.shape == (60, 3, 28, 28) and sorted(y.tolist()) == sorted(parts["test"][1].tolist())
    grey = x * torch.tensor(fashion.STD).view(3, 1, 1) + torch.tensor(fashion.MEAN).view(3, 1, 1)
    assert torch.allclose(grey[:, 0], grey[:, 2], atol=1e-6) and grey.min() > -1e-6
    assert torch.allclose(grey[torch.arange(60), 0, 2 * y + 3], torch.ones(60, 28), atol=1e-6)  # the right label
    assert FashionMNIST(42).fixed_set("validation", 2)[0].shape == (2, 3, 42, 42)
    data = FashionMNIST(28)
    first, again, other = (data.training_batch(8, seed=1, step=step) for step in (3, 3, 4))
    assert torch.equal(first[0], again[0]) and not torch.equal(first[0], other[0])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: FashionMNIST(0), "image_size is 0: give a positive number"),
        (lambda: FashionMNIST().fixed_set("test", 61), "n is 61: the test split has 1 to 60 images"),
        (lambda: fashion.photographs("dev"), "unknown split 'dev': choose one of train, validation"),
        (lambda: VisionBackbone(TINY, 40).build(0), "image_size is 40: vit_tiny_patch16_224 takes multiples of 16"),
        (lambda: VisionBackbone("resnet18", 32).build(0), "'resnet18' is no vision transformer of timm"),
        (lambda: backbone_finetuning("SGD", 2, RATE), "unknown variant 'SGD': choose one of AdamW"),
        (lambda: backbone_finetuning("S2D", 2, {"tau": 0.5}), "S2D needs lam, lr: run python -m s2d.lab.self_sup"),
    ],
)
def test_bad_input_is_refused(call, message: str, clothes: Path) -> None:
    with pytest.raises(ValueError, match=message):
        call()


def test_missing_and_damaged_files_are_named(clothes: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.setenv("S2D_FASHION_MNIST", str(clothes / "none"))
    with pytest.raises(FileNotFoundError, match="install Debian's package dataset-fashion-mnist"):
        fashion.photographs("test")
    with pytest.raises(SystemExit) as stopped:
        self_supervised.main(["evidence"])
    assert stopped.value.code == 2 and "dataset-fashion-mnist" in capsys.readouterr().err
    other = clothes.parent / "other"
    other.mkdir()
    for file in clothes.iterdir():
        (other / file.name).write_bytes(file.read_bytes() + b" ")
    monkeypatch.setenv("S2D_FASHION_MNIST", str(other))
    with pytest.raises(ValueError, match="train-images-idx3-ubyte.gz has the SHA-256 .*: install it anew"):
        fashion.photographs("test")


# --- model ---


def test_the_model_is_the_published_one_under_a_linear_probe(clothes: Path, monkeypatch) -> None:
    monkeypatch.setattr(vision_backbone, "PROBE_IMAGES", 200)
    vision_backbone.linear_probe.cache_clear()
    model = VisionBackbone(TINY, 32).build(0).eval()
    published = vision_backbone.published_backbone(TINY)
    assert torch.equal(model.blocks[3].mlp.fc1.weight, published.blocks[3].mlp.fc1.weight)
    assert model.blocks[3].mlp.fc1.weight.data_ptr() != published.blocks[3].mlp.fc1.weight.data_ptr()
    x, y = FashionMNIST(32).fixed_set("train", 200)
    with torch.inference_mode():
        features, logits = model.forward_head(model.forward_features(x), pre_logits=True).double(), model(x)
    scaled = ((features - features.mean(0)) / features.std(0)).numpy()
    oracle = LogisticRegression(C=0.01, max_iter=1000).fit(scaled, y.numpy())
    expected = torch.from_numpy(oracle.decision_function(scaled))
    assert torch.allclose(logits.double(), expected, atol=1e-2 * expected.abs().max().item())
    vision_backbone.linear_probe.cache_clear()


# --- the study ---


def test_every_variant_is_tuned_alike_and_never_on_evidence_seeds() -> None:
    assert len({len(settings) for settings in self_supervised.GRID.values()}) == 1
    assert set(self_supervised.STAGE_SEEDS["tuning"]) <= set(TUNING_SEEDS)
    assert not set(self_supervised.SEEDS) & set(TUNING_SEEDS)
    here, there = (backbone_finetuning("AdamW", 2, RATE, device=device) for device in ("cpu", "cuda"))
    assert network_key(here) == network_key(there)


@pytest.fixture
def small(clothes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The study at its smallest: three steps, few images and quantizers, in this process, without other tables."""
    monkeypatch.setenv("S2D_OUTPUT", str(tmp_path))
    monkeypatch.setenv("S2D_STORE", str(tmp_path / "store"))
    monkeypatch.setattr(self_supervised, "repository_root", lambda: tmp_path)
    monkeypatch.setattr(self_supervised.parallel, "run", lambda work, jobs, **options: [work(*job) for job in jobs])
    monkeypatch.setattr(self_supervised, "BATCH_SIZE", 4)
    monkeypatch.setattr(self_supervised, "LAYER_IMAGES", 16)
    monkeypatch.setattr(backbone_finetuning, "__kwdefaults__", backbone_finetuning.__kwdefaults__ | {"steps": 3})
    monkeypatch.setattr(self_supervised, "SPLIT", {"tuning": ("validation", 30), "evidence": ("test", 40)})
    cells = {"tuning": (("RTN", "W5A5"),), "evidence": (("RTN", "W8A8"), ("RTN", "W5A5"))}
    monkeypatch.setattr(self_supervised, "CELLS", cells)
    monkeypatch.setattr(self_supervised, "STAGE_SEEDS", {"tuning": (0,), "evidence": (2, 3)})
    monkeypatch.setattr(vision_backbone, "PROBE_IMAGES", 100)
    for name in ("VALIDATION_IMAGES", "MEASURE_IMAGES"):
        monkeypatch.setattr(f"s2d.lab.training.{name}", 20)
    vision_backbone.linear_probe.cache_clear()
    yield tmp_path / "data" / f"self_supervised_{TINY}"
    vision_backbone.linear_probe.cache_clear()


OPTIONS = ["--backbone", TINY, "--image-size", "32"]


def test_the_study_is_measured_resumed_and_read(small: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    with pytest.raises(SystemExit):
        self_supervised.main(["evidence", *OPTIONS])
    assert "needs lr: run python -m s2d.lab.self_supervised tune" in capsys.readouterr().err
    self_supervised.main(["tune", *OPTIONS])
    tuning = pd.read_csv(small / "tuning.csv")
    assert tuning.groupby("variant", sort=False).size().to_dict() == {"AdamW": 4, "S2D": 4}
    best = self_supervised.best_settings(Subject(TINY, 32))
    assert set(best) == set(self_supervised.VARIANTS) and len({own["lr"] for own in best.values()}) == 1
    self_supervised.main(["evidence", "--seeds", "2", "--methods", "PTQ4ViT", *OPTIONS])  # of which there is none
    assert set(pd.read_csv(small / "evidence.csv").method) == {"FP"}
    self_supervised.main(["evidence", *OPTIONS])
    evidence, layers = (pd.read_csv(small / f"{name}.csv") for name in ("evidence", "layers"))
    assert list(dict.fromkeys(evidence.variant)) == list(self_supervised.VARIANTS)
    assert evidence.groupby(["variant", "seed"]).bits.apply(list).map(tuple).unique().tolist() == [
        ("FP", "W8A8", "W5A5")
    ]
    assert set(evidence.split) == {"test"} and set(evidence["items"]) == {40} and set(evidence.hardware) == {"CPU"}
    errors = evidence.set_index("bits").logit_error
    assert (errors["FP"] == 0).all() and errors["W5A5"].min() > errors["W8A8"].max() > 0
    assert layers.variant.iloc[0] == BEFORE and layers.seed[layers.variant == BEFORE].isna().all()
    assert layers.groupby(["variant", "seed"]).layer.nunique().eq(48).all()
    assert (layers.sigma_1 >= layers.sigma_2).all() and (layers.input_ratio > 1).all()
    name = "blocks.3.mlp.fc1"
    u, s, vh = torch.linalg.svd(vision_backbone.published_backbone(TINY).get_submodule(name).weight.double())
    row = layers[(layers.variant == BEFORE) & (layers.layer == name)].iloc[0]
    assert row.sigma_1 == pytest.approx(s[0].item(), rel=1e-4)
    assert row.l1_product == pytest.approx((u[:, 0].abs().sum() * vh[0].abs().sum()).item(), rel=1e-2)
    for path in (tmp_path / "build" / small.name).iterdir():
        path.unlink()  # as on another machine, which has the committed tables alone
    monkeypatch.setattr(self_supervised, "measure", None)  # nothing is left to do
    monkeypatch.setattr(self_supervised, "measure_before", None)
    self_supervised.main(["evidence", *OPTIONS])
    pd.testing.assert_frame_equal(pd.read_csv(small / "evidence.csv"), evidence)
    pd.testing.assert_frame_equal(pd.read_csv(small / "layers.csv"), layers)


def test_a_key_of_digits_alone_stays_a_key(small: Path) -> None:
    subject = Subject(TINY, 32)
    for key in ("0733815309136331", "57381530e9136331"):
        rows = pd.DataFrame([{"method": "FP", "bits": "FP", "accuracy": 0.5, "key": key}])
        self_supervised._write("tuning", rows, subject)
    assert set(self_supervised.known_rows("tuning", subject).key) == {"0733815309136331", "57381530e9136331"}


def test_adams_reach_is_the_sum_of_its_steps(monkeypatch) -> None:
    """Three steps up, then down: a matrix of which every entry moves by the rate moves sigma_1 by the product."""
    rows = [
        {"variant": variant, "lr": lr, "layer": "blocks.0.mlp.fc1", "pcdr_1": 0.5, "sigma_1": sigma, "l1_product": 8.0}
        for variant, lr, sigma in ((BEFORE, None, 4.0), ("AdamW", 1e-2, 4.5), ("S2D", 1e-2, 3.0), ("S2D", 1e-2, 3.5))
    ]
    monkeypatch.setattr(backbone_finetuning, "__kwdefaults__", backbone_finetuning.__kwdefaults__ | {"steps": 4})
    monkeypatch.setattr(self_supervised, "WARMUP", 2)
    found = self_supervised.adams_reach(pd.DataFrame(rows)).iloc[0]
    assert found.reach == pytest.approx(8.0 * 1e-2 * (0.5 + 1 + 1 + 0.5))
    assert found.AdamW == pytest.approx(0.5) and found.S2D == pytest.approx(-0.75)
    entries = torch.sign(torch.randn(4, 1)) @ torch.sign(torch.randn(1, 16))  # ones: u and v have l1 norms 2 and 4
    change = torch.linalg.matrix_norm(entries * 1.01, ord=2) - torch.linalg.matrix_norm(entries, ord=2)
    assert change.item() == pytest.approx(8.0 * 0.01, rel=1e-4)


# --- what is committed ---


def test_the_committed_tables_are_whole() -> None:
    evidence, layers = (load_table(name, run=self_supervised.RUN) for name in ("evidence", "layers"))
    cells = [("FP", "FP"), *self_supervised.CELLS["evidence"]]
    cells = [cell for cell in cells if cell[0] in set(evidence.method)]
    for (variant, seed), own in evidence.groupby(["variant", "seed"]):
        assert list(zip(own.method, own.bits, strict=True)) == cells, (variant, seed)
    assert {"FP", "RTN"} <= set(evidence.method) and {"AdamW", "S2D"} <= set(evidence.variant)
    seeds = evidence.groupby("variant").seed.agg(set)
    assert all(own == seeds["AdamW"] for own in seeds) and seeds["AdamW"] <= set(self_supervised.SEEDS)
    assert set(evidence["items"]) == {self_supervised.SPLIT["evidence"][1]}
    best = self_supervised.best_settings(Subject())
    for variant, own in evidence.groupby("variant"):
        found = own.iloc[0][list(best[variant])].astype(float).to_dict()
        assert found == pytest.approx(best[variant])
    assert set(layers.variant) == {BEFORE, *evidence.variant}


def test_figures_are_drawn_from_the_committed_tables() -> None:
    use_style()
    evidence, layers = (load_table(name, run=self_supervised.RUN) for name in ("evidence", "layers"))
    for figure, panels in (
        (draw.self_supervised_table8(evidence), len(self_supervised.BITS)),
        (draw.self_supervised_quantizers(evidence), evidence.method.nunique() - 1),
    ):
        assert len(figure.axes) == panels
        plt.close(figure)
    figure = draw.self_supervised_layers(layers)
    points = figure.axes[2].collections[0].get_offsets().data
    assert len(points) == 24
    plt.close(figure)
    assert set(draw.against_adamw(evidence).second) == {"AdamW"}
