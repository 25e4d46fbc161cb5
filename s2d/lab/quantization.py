"""Quantized checkpoints measured on test images, as tidy tables: one row a quantized model."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from itertools import compress
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import Tensor, nn

from s2d.lab import parallel
from s2d.lab.evaluate import CALIBRATION_IMAGES, Checkpoints, each
from s2d.lab.store import Trained
from s2d.ptq import TRANSFORMS, parse_bits, quantize_each
from s2d.ptq.calibrate import visit_sites
from s2d.ptq.int8 import Int8Session, export_int8, without_product_quantizers
from s2d.ptq.rotation import rotation_flops
from s2d.ptq.sites import CONVOLUTIONS, QuantizedProduct, Site, sites

# Each test digit is seen in four placements, which takes out much of the noise of where the clutter falls.
TEST_IMAGES = 4 * 397
# What the published methods calibrate on.
METHOD_CALIBRATION_IMAGES = 32

METHODS: dict[str, dict[str, Any]] = {
    "RTN": {"method": "rtn"},
    "PTQ4ViT": {"method": "ptq4vit"},
    "RepQ-ViT": {"method": "repq_vit"},
    "ERQ": {"method": "erq"},
}
"""Quantizers by the name they have in tables and figures."""

CONDITIONING: dict[str, tuple[Callable, ...]] = {
    "none": (),
    "SmoothQuant": (TRANSFORMS["smooth"],),
    "rotation": (TRANSFORMS["rotation"],),
    "learned rotation": (TRANSFORMS["learned_rotation"],),
}
"""What is done to a checkpoint before it is rounded, by name. As functions, which are applied as they are: what is
asked here is what each does, also where it does harm."""


@torch.inference_mode()
def logits_of(model: nn.Module, images: Tensor, batch_size: int = 128) -> Tensor:
    """Logits of every image, in evaluation mode; by default in batches whose activations stay in a core's cache."""
    model.eval()
    return torch.cat([model(batch) for batch in images.split(batch_size)])


def logit_error(logits: Tensor, full: Tensor) -> float:
    """Relative squared error ``|q - fp|^2 / |fp|^2`` over all images."""
    return ((logits - full).square().sum() / full.square().sum()).item()


def quantization_table(
    checkpoints: Checkpoints,
    bits: Sequence[str],
    *,
    split: str = "test",
    images: int = TEST_IMAGES,
    calibration_images: int = CALIBRATION_IMAGES,
    grids: Sequence[str] = ("symmetric", "asymmetric"),
) -> pd.DataFrame:
    """Accuracy and relative logit error of every checkpoint at every bit width, under round-to-nearest.

    Args:
        checkpoints: variant to one checkpoint a seed.
        bits: names such as ``"FP"`` and ``"W4A4"``.
        split: where accuracy is measured; hyper-parameters are chosen on ``validation``, results reported on ``test``.
        images: how many images of that split.
        calibration_images: how many images of the calibration split the quantizers see.
        grids: ``"symmetric"`` (no zero point), ``"asymmetric"`` (one more degree of freedom a tensor), or both.

    Returns:
        Columns variant, seed, method, grid, bits, split, images, accuracy, logit_error (``|q - fp|^2 / |fp|^2``).

    Raises:
        ValueError: for an unknown grid or bit width, before anything is computed.
    """
    widths = {name: parse_bits(name) for name in bits}
    unknown = set(grids) - {"symmetric", "asymmetric"}
    if unknown:
        raise ValueError(f"unknown grid {unknown.pop()!r}: choose symmetric or asymmetric")
    work = partial(_rtn_rows, widths=widths, split=split, images=images, calibrated=calibration_images, grids=grids)
    return over_checkpoints(work, checkpoints)


def _rtn_rows(
    variant: str, trained: Trained, *, widths: dict, split: str, images: int, calibrated: int, grids: Sequence[str]
) -> list[dict]:
    subject = Subject(variant, trained, split, images)
    calibration, _ = trained.recipe.data.fixed_set("calibration", calibrated)
    cells = [(grid, name) for grid in grids for name in widths]
    settings = [setting(widths[name], symmetric=grid == "symmetric") for grid, name in cells]
    return [
        subject.row | {"method": "rtn", "grid": grid, "bits": name} | result
        for (grid, name), result in zip(cells, subject.measured(settings, calibration), strict=True)
    ]


def setting(bits: tuple[int, int], **options: Any) -> dict[str, Any]:
    """What :func:`s2d.ptq.quantize_each` makes one copy from."""
    return {"w_bits": bits[0], "a_bits": bits[1]} | options


class Subject:
    """One checkpoint with its test images and floating-point logits."""

    def __init__(self, variant: str, trained: Trained, split: str, images: int) -> None:
        self.model = trained.model()
        self.x, self.y = trained.recipe.data.fixed_set(split, images)
        self.full = logits_of(self.model, self.x)
        self.row = {"variant": variant, "seed": trained.seed, "split": split, "images": len(self.x)}

    def measured(self, settings: Sequence[dict[str, Any]], calibration: Tensor) -> Iterator[dict[str, float]]:
        """Accuracy and logit error under each setting; of the model itself where both sides are switched off."""
        rounds = [min(setting["w_bits"], setting["a_bits"]) <= 8 for setting in settings]
        models = self.quantized(list(compress(settings, rounds)), calibration) if any(rounds) else iter(())
        for rounded in rounds:
            yield self.compared(logits_of(next(models), self.x) if rounded else self.full)

    def quantized(
        self, settings: Sequence[dict[str, Any]], calibration: Tensor, transforms: Sequence[Callable] = ()
    ) -> Iterator[nn.Module]:
        """A quantized copy for each setting."""
        # One batch: the calibration set is small, and so is the model.
        options = {"calibration": calibration, "batch_size": len(calibration), "transforms": transforms}
        return quantize_each(self.model, settings, **options)

    def compared(self, logits: Tensor) -> dict[str, float]:
        accuracy = (logits.argmax(-1) == self.y).double().mean().item()
        return {"accuracy": accuracy, "logit_error": logit_error(logits, self.full)}


def methods_table(
    checkpoints: Checkpoints,
    bits: Sequence[str],
    *,
    methods: Sequence[str] = tuple(METHODS),
    calibration_sets: int = 2,
    split: str = "test",
    images: int = TEST_IMAGES,
) -> pd.DataFrame:
    """Every checkpoint under every method and bit width, calibrated on several disjoint sets of 32 images.

    Args:
        checkpoints: variant to one checkpoint a seed.
        bits: names such as ``"W4A4"``.
        methods: keys of :data:`METHODS`.
        calibration_sets: how many; they share no image with each other, nor with training and test data.
        split, images: see :func:`quantization_table`.

    Returns:
        Columns variant, seed, split, images, method, bits, calibration_set, accuracy, logit_error. Full precision has
        the method ``"FP"``.

    Raises:
        ValueError: for an unknown method or bit width, before anything is computed.
    """
    _check_known(methods, METHODS, "method")
    widths = {name: parse_bits(name) for name in bits}
    work = partial(_method_rows, widths=widths, methods=methods, sets=calibration_sets, split=split, images=images)
    return over_checkpoints(work, checkpoints)


def _method_rows(
    variant: str, trained: Trained, *, widths: dict, methods: Sequence[str], sets: int, split: str, images: int
) -> list[dict]:
    subject = Subject(variant, trained, split, images)
    rows = [subject.row | {"method": "FP", "bits": "FP", "calibration_set": 0} | subject.compared(subject.full)]
    cells = [(method, bits) for method in methods for bits in widths]
    settings = [setting(widths[bits], **METHODS[method]) for method, bits in cells]
    for index, calibration in enumerate(_calibration_sets(trained, sets)):
        for (method, bits), result in zip(cells, subject.measured(settings, calibration), strict=True):
            rows.append(subject.row | {"method": method, "bits": bits, "calibration_set": index} | result)
    return rows


def _calibration_sets(trained: Trained, sets: int) -> list[Tensor]:
    """Disjoint sets of calibration images."""
    pool, _ = trained.recipe.data.fixed_set("calibration", sets * METHOD_CALIBRATION_IMAGES)
    return list(pool.split(METHOD_CALIBRATION_IMAGES))


def conditioning_table(
    checkpoints: Checkpoints,
    bits: Sequence[str],
    *,
    conditioning: Sequence[str] = tuple(CONDITIONING),
    calibration_sets: int = 2,
    images: int = TEST_IMAGES,
) -> pd.DataFrame:
    """S2D beside rotation and SmoothQuant, and both together: round-to-nearest on every conditioned checkpoint.

    Args:
        checkpoints, bits, calibration_sets, images: see :func:`methods_table`.
        conditioning: keys of :data:`CONDITIONING`.

    Returns:
        Columns variant, seed, conditioning, bits, calibration_set, images, accuracy, logit_error, online_operations
        (additions and multiplications that the online transforms add to those of the Linear layers and attention
        products of one image, as a fraction of theirs).

    Raises:
        ValueError: for an unknown conditioning or bit width.
    """
    _check_known(conditioning, CONDITIONING, "conditioning")
    widths = {name: parse_bits(name) for name in bits}
    work = partial(_conditioning_rows, widths=widths, names=conditioning, sets=calibration_sets, images=images)
    return over_checkpoints(work, checkpoints)


def _conditioning_rows(
    variant: str, trained: Trained, *, widths: dict, names: Sequence[str], sets: int, images: int
) -> list[dict]:
    subject = Subject(variant, trained, "test", images)
    rows = []
    settings = [setting(bits) for bits in widths.values()]
    for index, calibration in enumerate(_calibration_sets(trained, sets)):
        for name in names:
            models = subject.quantized(settings, calibration, CONDITIONING[name])
            for bits, model in zip(widths, models, strict=True):
                result = subject.compared(logits_of(model, subject.x))
                result["online_operations"] = online_operations(model, calibration[:1])
                rows.append(subject.row | {"conditioning": name, "bits": bits, "calibration_set": index} | result)
    return rows


def online_operations(model: nn.Module, image: Tensor) -> float:
    """What the rotations of a quantized model compute, as a fraction of its Linear layers and attention products.

    Args:
        model: quantized, with or without transforms.
        image: ``(1, ...)``.

    Returns:
        Additions and multiplications of the one over those of the other; 0 without rotations.
    """
    count = {"products": 0, "rotations": 0}

    def rotated(tensor: Tensor, rotation: nn.Module | None) -> None:
        if rotation is not None:
            count["rotations"] += tensor.numel() // rotation.width * rotation_flops(rotation.width, rotation.kind)

    def visit(site: Site, inputs: tuple[Tensor, ...]) -> None:
        if isinstance(site, QuantizedProduct):
            count["products"] += 2 * inputs[0].numel() * inputs[1].shape[-1]
            rotated(inputs[0], site.left_transform)
            rotated(inputs[1], site.right_transform)
        else:
            count["products"] += 2 * inputs[0].numel() * site.out_features
            rotated(inputs[0], site.input_transform)

    visit_sites(model, [image], visit, [s for s in sites(model).values() if not isinstance(s, CONVOLUTIONS)])
    return count["rotations"] / count["products"]


def qat_table(checkpoints: Checkpoints, aware: Checkpoints, bits: str, *, images: int = TEST_IMAGES) -> pd.DataFrame:
    """Round-to-nearest before and after quantization-aware training, on one set of bit widths.

    Args:
        checkpoints: variant to the checkpoints that QAT started from.
        aware: the same variants, after it (:func:`s2d.lab.recipes.quantization_aware`).
        bits: such as ``"W3A3"``.
        images: test images.

    Returns:
        Columns variant, seed, training (``"FP"``, ``"PTQ"``, ``"QAT"``), bits, images, accuracy.
    """
    parse_bits(bits)
    pairs = {variant: list(zip(checkpoints[variant], aware[variant], strict=True)) for variant in checkpoints}
    return over_checkpoints(partial(_qat_rows, bits=bits, images=images), pairs)


def _qat_rows(variant: str, pair: tuple[Trained, Trained], *, bits: str, images: int) -> list[dict]:
    before, after = pair
    subject = Subject(variant, before, "test", images)
    calibration, _ = before.recipe.data.fixed_set("calibration", CALIBRATION_IMAGES)
    (rounded,) = subject.measured([setting(parse_bits(bits))], calibration)
    results = {
        "FP": ("FP", subject.compared(subject.full)),
        "PTQ": (bits, rounded),
        "QAT": (bits, subject.compared(logits_of(after.model(), subject.x))),
    }
    return [
        subject.row | {"training": training, "bits": name, "accuracy": result["accuracy"]}
        for training, (name, result) in results.items()
    ]


def int8_table(checkpoints: Checkpoints, *, images: int = TEST_IMAGES) -> pd.DataFrame:
    """Real int8 on the CPU (ONNX Runtime) beside its simulation: round-to-nearest at W8A8, Linear layers in integers.

    Args:
        checkpoints: variant to one checkpoint a seed.
        images: test images.

    Returns:
        Columns variant, seed, images, full_precision, simulated, int8 (accuracies), agreement (share of images on which
        int8 and simulation give the same class), logit_difference (median over images of the relative difference of
        their logits: about rounding, unless a rounding flips).
    """
    rows = []
    for variant, trained in each(checkpoints):
        subject = Subject(variant, trained, "test", images)
        calibration, _ = trained.recipe.data.fixed_set("calibration", CALIBRATION_IMAGES)
        (quantized,) = subject.quantized([setting((8, 8))], calibration)
        model = without_product_quantizers(quantized)
        simulated = logits_of(model, subject.x)
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "model.onnx"
            export_int8(model, subject.x[:2], path)
            real = Int8Session(path, threads=1)(subject.x)
        difference = (real - simulated).square().sum(-1).sqrt() / simulated.square().sum(-1).sqrt()
        rows.append(
            subject.row
            | {"full_precision": subject.compared(subject.full)["accuracy"]}
            | {"simulated": subject.compared(simulated)["accuracy"], "int8": subject.compared(real)["accuracy"]}
            | {"agreement": (real.argmax(-1) == simulated.argmax(-1)).double().mean().item()}
            | {"logit_difference": float(f"{difference.median().item():.0e}")}
        )
    return pd.DataFrame(rows)


def _check_known(names: Sequence[str], known: Mapping[str, Any], what: str) -> None:
    for name in names:
        if name not in known:
            raise ValueError(f"unknown {what} {name!r}: choose among {', '.join(known)}")


# --- over all checkpoints, on every core -----------------------------------------------------------------------------


def over_checkpoints(work: Callable[[str, Any], list[dict]], checkpoints: Mapping[str, Sequence]) -> pd.DataFrame:
    """The rows of every checkpoint, in order; the worker processes of :mod:`s2d.lab.parallel` share them."""
    pairs = list(each(checkpoints))
    workers = min(parallel.worker_count(), len(pairs))
    if workers < 2:
        found = [work(*pair) for pair in pairs]
    else:
        found = parallel.run(work, pairs, names=[name for name, _ in pairs], workers=workers, unit="checkpoint")
    return pd.DataFrame([row for rows in found for row in rows])
