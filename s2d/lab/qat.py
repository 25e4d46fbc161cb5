"""Quantization-aware training in the lab's own loop: the preparation that makes a model compute with rounding."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from s2d.lab.data import ClutteredDigits
from s2d.lab.training import Preparation
from s2d.ptq.qat import begin_qat


@dataclass(frozen=True)
class FakeQuantization(Preparation):
    """Train a copy prepared by :func:`s2d.ptq.qat.begin_qat`.

    Attributes:
        w_bits, a_bits: see :func:`s2d.ptq.quantize`.
        calibration_images: how many images of the calibration split set the ranges of the activations.
    """

    w_bits: int
    a_bits: int
    calibration_images: int = 256
    stage: ClassVar[str] = "qat"

    def apply(self, model: nn.Module, data: ClutteredDigits) -> nn.Module:
        """The fake-quantized copy; nothing in it is random."""
        calibration, _ = data.fixed_set("calibration", self.calibration_images)
        return begin_qat(model.eval(), w_bits=self.w_bits, a_bits=self.a_bits, calibration=calibration)
