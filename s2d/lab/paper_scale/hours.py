"""What the batch takes on an accelerator, computed from what was timed on one: an estimate, and from what."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import pandas as pd

from s2d.lab.paper_scale.experiments import Training, asked_tables, cells, trainings
from s2d.lab.paths import repository_root
from s2d.train.settings import VisionSettings, read_settings

TIMED = "data/accelerator/step_overhead_h200.csv"
HARDWARE = "one NVIDIA H200, bf16"
IMAGES = 1_281_167
"""Training images of ImageNet-1k."""
TOKENS = 1e9
"""Of the language model: the paper says fewer (appendix F), so this is an upper end."""
BATCH = 256
"""Images a step, as timed."""


@dataclass(frozen=True)
class Transformer:
    """What a step of a plain transformer costs is counted from this.

    Attributes:
        width, depth: of the blocks, whose MLPs are four times as wide.
        tokens: a sequence.
    """

    width: int
    depth: int
    tokens: int

    def forward_flops(self) -> float:
        r"""Floating-point operations of one forward pass: :math:`L\,(24 N d^2 + 4 N^2 d)`.

        Example:
            >>> round(Transformer(768, 12, 197).forward_flops() / 1e9, 1)
            34.9
        """
        n, d = self.tokens, self.width
        return self.depth * (24 * n * d**2 + 4 * n**2 * d)


REFERENCE = Transformer(768, 12, 197)
"""``vit_base_patch16_224``, which was timed."""
IMAGE_MODELS = {
    "SigLIP2-B/16-384": Transformer(768, 12, 576),
    "DINOv3-B": Transformer(768, 12, 261),  # 256 pixels, a class token and four registers
}
PARAMETERS = {"Qwen2.5-0.5B": 494e6}


@cache
def timed() -> tuple[float, float]:
    """Seconds of one step of ``REFERENCE`` at batch 256, and of one refresh, from ``data/accelerator``.

    Example:
        >>> [round(seconds, 3) for seconds in timed()]
        [0.096, 0.766]
    """
    table = pd.read_csv(repository_root() / TIMED)
    here = table[(table["batch"] == BATCH) & (table["precision"] == "bf16")].set_index("side")
    step, with_s2d = (float(here.loc[side, "ms_a_step"]) / 1000 for side in ("AdamW", "AdamW + S2D"))
    return step, (with_s2d - step) * int(here.loc["AdamW + S2D", "refresh_every"])


def training_hours(training: Training, config: Mapping[str, Any]) -> float:
    """Hours of one training on :data:`HARDWARE`, by the epochs and the batch of its recipe.

    The forward and backward pass scales with the floating-point operations of the forward pass; a refresh is that of
    the timed network, whose 48 weights have the same shapes. The data is taken to come fast enough. Quantization-aware
    training counts like any other: its rounding was not timed.

    Args:
        training: of :func:`~s2d.lab.paper_scale.experiments.trainings`.
        config: of ``paper/*.yaml``.

    Example:
        >>> config = {"networks": {"DINOv3-B": {"recipe": "vision-adamw"}}}
        >>> round(training_hours(Training("DINOv3-B", "adamw", 0, (("decay", "none"),)), config), 1)
        1.8
    """
    step, refresh = timed()
    if training.network in PARAMETERS:
        rate = 3 * REFERENCE.forward_flops() * BATCH / step  # operations a second that the timed step reached
        return 6 * PARAMETERS[training.network] * TOKENS / rate / 3600
    settings = read_settings(
        VisionSettings,
        config["networks"][training.network]["recipe"],
        [f"{name}={value}" for name, value in training.settings],
    )
    images = IMAGES * settings.epochs
    seconds = images / BATCH * step * IMAGE_MODELS[training.network].forward_flops() / REFERENCE.forward_flops()
    if settings.decay == "s2d":
        seconds += images / settings.batch_size / settings.refresh_every * refresh
    return seconds / 3600


def table(config: Mapping[str, Any]) -> pd.DataFrame:
    """Trainings, measurements and hours of training, a row a table, for one seed; the last row shares what is common.

    Args:
        config: of ``paper/*.yaml``.

    Returns:
        Columns table, trainings, measurements, hours. Measurements are not in the hours: none was timed.
    """
    one = {**config, "seeds": [0]}
    asked = [name for name in asked_tables(config) if name != "sweep"]
    rows = [(name, {**one, "tables": [name]}) for name in asked] + [("all, shared", {**one, "tables": asked})]
    found = [
        (
            name,
            len(trainings(part)),
            len(cells(part)),
            round(sum(training_hours(training, config) for training in trainings(part)), 1),
        )
        for name, part in rows
    ]
    return pd.DataFrame(found, columns=["table", "trainings", "measurements", "hours"])
