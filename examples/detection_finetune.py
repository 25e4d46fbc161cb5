"""Detection and segmentation on COCO with a conditioned backbone: torchvision's Mask R-CNN on a ViT of timm.

    python examples/detection_finetune.py runs/siglip2-s2d/model \
        --train coco/train2017 coco/annotations/instances_train2017.json \
        --val coco/val2017 coco/annotations/instances_val2017.json --bits W5A5 --method erq -o runs/coco-s2d.json

MODEL is what ``s2d.models.load`` takes: run it once with the checkpoint of ``vision-adamw`` and once with that of
``vision-s2d``, and compare. The pyramid is that of ViTDet: the last map of the backbone, scaled up and down. AP is
COCO's own (pycocotools), in floating point and with the backbone quantized. Needs ``pip install '.[train]'``.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from pycocotools.cocoeval import COCOeval
from pycocotools.mask import encode
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torchvision.datasets import CocoDetection
from torchvision.models.detection import MaskRCNN
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.ops import MultiScaleRoIAlign
from torchvision.transforms.functional import to_tensor

from s2d import SelectiveSpectralDecay
from s2d.files import write_text
from s2d.models import load
from s2d.ptq import parse_bits, quantize


class Body(nn.Module):
    """The last feature map of a ViT, ``(N, channels, H / patch, W / patch)``: what is quantized."""

    def __init__(self, vit: nn.Module) -> None:
        super().__init__()
        self.vit = vit

    def forward(self, x: Tensor) -> Tensor:
        return self.vit.forward_intermediates(x, indices=1, norm=True, intermediates_only=True)[0]


class Pyramid(nn.Module):
    """A body and three maps made of its one, at twice, once and half its resolution."""

    def __init__(self, body: Body, channels: int, out_channels: int = 256) -> None:
        super().__init__()
        self.body, self.out_channels = body, out_channels
        up, down = nn.ConvTranspose2d(channels, channels, 2, stride=2), nn.MaxPool2d(2)
        self.scales = nn.ModuleList(
            nn.Sequential(scale, nn.Conv2d(channels, out_channels, 1)) for scale in (up, nn.Identity(), down)
        )

    def forward(self, x: Tensor) -> OrderedDict[str, Tensor]:
        found = self.body(x)
        return OrderedDict((str(i), scale(found)) for i, scale in enumerate(self.scales))


def detector(vit: nn.Module, classes: int, args: argparse.Namespace) -> MaskRCNN:
    """Mask R-CNN with the preprocessing of the backbone; ``classes`` with the background."""
    vit.reset_classifier(0, "")
    vit.set_input_size(img_size=(args.size, args.size))
    anchors = AnchorGenerator(sizes=((32, 64), (96, 128), (256, 384)), aspect_ratios=((0.5, 1.0, 2.0),) * 3)
    names = ["0", "1", "2"]
    return MaskRCNN(
        Pyramid(Body(vit), vit.num_features),
        classes,
        rpn_anchor_generator=anchors,
        box_roi_pool=MultiScaleRoIAlign(names, output_size=7, sampling_ratio=2),
        mask_roi_pool=MultiScaleRoIAlign(names, output_size=14, sampling_ratio=2),
        image_mean=vit.pretrained_cfg["mean"],
        image_std=vit.pretrained_cfg["std"],
        fixed_size=(args.size, args.size),
        box_batch_size_per_image=args.regions,
        box_detections_per_img=args.detections,
    )


class Objects(Dataset):
    """The images of a COCO file that have objects, with boxes, masks, and labels from 1 on."""

    def __init__(self, images: str, annotations: str) -> None:
        self.data = CocoDetection(images, annotations)
        self.categories = sorted(self.data.coco.getCatIds())  # of COCO's numbers some are missing
        self.labels = {category: label for label, category in enumerate(self.categories, start=1)}
        self.kept = [i for i, image in enumerate(self.data.ids) if self.data.coco.getAnnIds(image, iscrowd=False)]

    def __len__(self) -> int:
        return len(self.kept)

    def __getitem__(self, index: int) -> tuple[Tensor, dict[str, Tensor]]:
        image, found = self.data[self.kept[index]]
        found = [one for one in found if not one.get("iscrowd") and min(one["bbox"][2:]) > 0]
        boxes = torch.tensor([one["bbox"] for one in found], dtype=torch.float32).reshape(-1, 4)
        boxes[:, 2:] += boxes[:, :2]
        masks = [torch.as_tensor(self.data.coco.annToMask(one)) for one in found]
        labels = torch.tensor([self.labels[one["category_id"]] for one in found], dtype=torch.long)
        image = to_tensor(image)
        empty = torch.zeros(0, *image.shape[1:], dtype=torch.uint8)
        return image, {"boxes": boxes, "labels": labels, "masks": torch.stack(masks) if masks else empty}


def loader(data: Dataset, batch_size: int, *, shuffle: bool = False, workers: int = 0) -> DataLoader:
    return DataLoader(data, batch_size, shuffle, collate_fn=columns, num_workers=workers)


def columns(rows: list[tuple]) -> tuple:
    """Images, and their targets; a function of its own, so that workers can be started anywhere."""
    return tuple(zip(*rows, strict=True))


def train(model: MaskRCNN, data: Objects, args: argparse.Namespace) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, weight_decay=0.05)
    decay = SelectiveSpectralDecay(model.backbone.body, lam=5e-4) if args.s2d else None
    if decay is not None:
        decay.attach(optimizer)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, args.lr, total_steps=args.epochs * -(-len(data) // args.batch_size)
    )
    for epoch in range(args.epochs):
        model.train()
        for images, targets in loader(data, args.batch_size, shuffle=True, workers=args.workers):
            images = [image.to(args.device) for image in images]
            targets = [{name: value.to(args.device) for name, value in target.items()} for target in targets]
            loss = sum(model(images, targets).values())
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
        print(f"epoch {epoch + 1}  loss {loss.item():.4f}  {'' if decay is None else decay.summary()}", flush=True)


@torch.no_grad()
def average_precision(model: MaskRCNN, data: Objects, args: argparse.Namespace) -> dict[str, float]:
    """COCO's AP and AP50 of boxes and masks, in per cent."""
    model.eval()
    results = []
    for index, (images, _) in enumerate(loader(data, 1, workers=args.workers)):
        found = model([images[0].to(args.device)])[0]
        each = (found[name].cpu() for name in ("boxes", "scores", "labels", "masks"))
        for box, score, label, mask in zip(*each, strict=True):
            box[2:] -= box[:2].clone()
            code = encode(np.asfortranarray((mask[0] > 0.5).numpy().astype(np.uint8)))
            category, image = data.categories[int(label) - 1], data.data.ids[data.kept[index]]
            row = {"image_id": image, "category_id": category, "bbox": box.tolist(), "score": score.item()}
            results.append(row | {"segmentation": code})
    measured = {}
    for kind, name in (("bbox", "box"), ("segm", "mask")):
        if not results:
            measured |= {f"{name}_ap": 0.0, f"{name}_ap50": 0.0}
            continue
        evaluation = COCOeval(data.data.coco, data.data.coco.loadRes(results), kind)
        evaluation.params.imgIds = [data.data.ids[i] for i in data.kept]
        with contextlib.redirect_stdout(io.StringIO()):
            evaluation.evaluate(), evaluation.accumulate(), evaluation.summarize()
        whole, half = (100 * float(value) for value in evaluation.stats[:2])
        measured |= {f"{name}_ap": whole, f"{name}_ap50": half}
    return measured


def main(argv: Sequence[str] | None = None) -> dict[str, dict[str, float]]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--train", nargs=2, required=True, metavar=("IMAGES", "ANNOTATIONS"))
    parser.add_argument("--val", nargs=2, required=True, metavar=("IMAGES", "ANNOTATIONS"))
    parser.add_argument("--size", type=int, default=512, help="pixels a side")
    parser.add_argument("--regions", type=int, default=512, help="that an image trains the heads with")
    parser.add_argument("--detections", type=int, default=100, help="of an image")
    parser.add_argument("--epochs", type=int, default=12)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--lr", type=float, default=1e-4)
    parser.add_argument("--s2d", action="store_true", help="let components decay in this fine-tuning too")
    parser.add_argument("--bits", default="W5A5")
    parser.add_argument("--method", default="erq")
    parser.add_argument("--calibration", type=int, default=32, help="training images that set the grids")
    parser.add_argument("--workers", type=int, default=4)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("-o", "--output", type=Path, required=True)
    args = parser.parse_args(argv)

    torch.manual_seed(0)
    vit = load(args.model).model
    data, val = Objects(*args.train), Objects(*args.val)
    model = detector(vit, len(data.categories) + 1, args).to(args.device)
    train(model, data, args)

    found = {"FP": average_precision(model, val, args)}
    w_bits, a_bits = parse_bits(args.bits)
    images = [data[i][0].to(args.device) for i in range(min(args.calibration, len(data)))]
    calibration = model.transform(images)[0].tensors
    body = quantize(model.backbone.body, method=args.method, w_bits=w_bits, a_bits=a_bits, calibration=calibration)
    model.backbone.body = body
    found[args.bits] = average_precision(model, val, args)
    print(json.dumps(found, indent=1))
    write_text(args.output, json.dumps(found, indent=1) + "\n")
    return found


if __name__ == "__main__":
    main()
