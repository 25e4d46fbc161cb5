"""The detection example on made images: bright squares are found by Mask R-CNN on a tiny ViT, which is quantized."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image

EXAMPLE = Path(__file__).parents[1] / "examples" / "detection_finetune.py"


def coco(root: Path, count: int, seed: int) -> list[str]:
    """Images with a square each, red (category 3) or green (7), and COCO's description of them."""
    root.mkdir()
    random = np.random.default_rng(seed)
    images, found = [], []
    for i in range(count):
        kind, side, (x, y) = i % 2, 28, random.integers(0, 35, 2).tolist()
        pixels = random.integers(0, 60, (64, 64, 3)).astype(np.uint8)
        pixels[y : y + side, x : x + side, kind] = 240
        Image.fromarray(pixels).save(root / f"{i}.png")
        images.append({"id": 10 + i, "file_name": f"{i}.png", "width": 64, "height": 64})
        corners = [x, y, x + side, y, x + side, y + side, x, y + side]
        row = {"id": i + 1, "image_id": 10 + i, "category_id": (3, 7)[kind], "iscrowd": 0, "area": side * side}
        found.append(row | {"bbox": [x, y, side, side], "segmentation": [corners]})
    categories = [{"id": 3, "name": "red"}, {"id": 7, "name": "green"}]
    described = {"images": images, "annotations": found, "categories": categories}
    (root / "instances.json").write_text(json.dumps(described))
    return [str(root), str(root / "instances.json")]


def test_squares_are_found_and_the_backbone_is_quantized(tmp_path):
    pytest.importorskip("pycocotools")
    spec = importlib.util.spec_from_file_location("detection_finetune", EXAMPLE)
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, patch_size=8, embed_dim=48, depth=2, num_heads=2)
    (tmp_path / "model").mkdir()
    timm.models.save_for_hf(model, tmp_path / "model", safe_serialization=True)
    data = ["--train", *coco(tmp_path / "train", 16, 0), "--val", *coco(tmp_path / "val", 6, 1), "--workers", "0"]
    few = ["--size", "64", "--epochs", "4", "--batch-size", "4", "--lr", "2e-3", "--regions", "16"]
    few += ["--detections", "3", "--bits", "W2A2", "--method", "rtn"]
    out = tmp_path / "ap.json"
    found = example.main([str(tmp_path / "model"), *data, *few, "--s2d", "--device", "cpu", "-o", str(out)])
    assert json.loads(out.read_text()) == found and list(found) == ["FP", "W2A2"]
    assert found["FP"]["box_ap50"] > 30 and found["FP"]["mask_ap50"] > 30
    assert found["W2A2"] != found["FP"]  # better or worse on six images; at two bits it is another network
