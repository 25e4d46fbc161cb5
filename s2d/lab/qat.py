"""Quantization-aware training in the lab's own loop: a model recipe whose fresh model is a fake-quantized copy."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field

from torch import nn

from s2d.lab.models import DigitsViT
from s2d.lab.training import Recipe

CALIBRATION_IMAGES = 256


@dataclass(frozen=True)
class FakeQuantized(DigitsViT):
    """The model recipe of QAT: the result of another recipe, prepared by :func:`s2d.ptq.qat.begin_qat`.

    Attributes:
        of: the recipe whose stored result is quantized; its model's sizes are taken over.
        w_bits, a_bits: see :func:`s2d.ptq.quantize`.
    """

    of: Recipe = field(kw_only=True)
    w_bits: int = field(kw_only=True)
    a_bits: int = field(kw_only=True)

    def __hash__(self) -> int:  # a recipe holds a dictionary, which has none
        return hash(json.dumps(asdict(self), sort_keys=True))

    def build(self, seed: int) -> nn.Module:
        """The fake-quantized copy of the stored checkpoint; nothing in it is random.

        Raises:
            ValueError: if that checkpoint is not in the store.
        """
        from s2d.lab.store import find
        from s2d.ptq.qat import begin_qat

        start = find(self.of)
        if start is None:
            raise ValueError("the checkpoint to train with quantization is not in the store: obtain() it first")
        calibration, _ = self.of.data.fixed_set("calibration", CALIBRATION_IMAGES)
        return begin_qat(start.model(), w_bits=self.w_bits, a_bits=self.a_bits, calibration=calibration)
