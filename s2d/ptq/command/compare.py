"""Both models on the test items: what quantization cost."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from s2d.models.subject import Subject, logits
from s2d.ptq.command.items import Items
from s2d.ptq.trace import call


@torch.no_grad()
def compare(
    subject: Subject, quantized: nn.Module, items: Items, positions: list[int], batch_size: int, device: torch.device
) -> dict[str, float]:
    """Both models on the test items, batch by batch.

    Returns:
        ``logit_error`` (relative, squared), ``agreement`` (of the largest logit); ``accuracy_float`` and
        ``accuracy_quantized`` with labels; ``perplexity_float`` and ``perplexity_quantized`` of a text.
    """
    sums: dict[str, float] = {}

    def add(name: str, value: Tensor) -> None:
        sums[name] = sums.get(name, 0.0) + value.double().sum().item()

    for start in range(0, len(positions), batch_size):
        here = positions[start : start + batch_size]
        data = items.read(here).to(device)
        plain, found = (logits(call(model, subject.batch(data))).float() for model in (subject.model, quantized))
        add("error", (found - plain).double().square())
        add("energy", plain.double().square())
        add("same", found.argmax(-1) == plain.argmax(-1))
        add("predictions", torch.tensor(plain.shape[:-1].numel()))
        for name, output in (("float", plain), ("quantized", found)):
            if items.labels is not None:
                right = torch.tensor([items.labels[i] for i in here], device=device)
                add(f"right_{name}", output.argmax(-1) == right)
            elif subject.kind == "sequences" and output.ndim == 3 and output.shape[-1] >= subject.vocabulary:
                add(
                    f"loss_{name}",
                    F.cross_entropy(output[:, :-1].flatten(0, 1), data[:, 1:].flatten(), reduction="sum"),
                )
    count = len(positions)
    result = {
        "logit_error": sums["error"] / max(sums["energy"], 1e-300),
        "agreement": sums["same"] / sums["predictions"],
    }
    for name in ("float", "quantized"):
        if f"right_{name}" in sums:
            result[f"accuracy_{name}"] = sums[f"right_{name}"] / count
        if f"loss_{name}" in sums:
            tokens = sums["predictions"] - count  # the first token of an item is not predicted
            result[f"perplexity_{name}"] = math.exp(min(sums[f"loss_{name}"] / tokens, 700.0))
    return result
