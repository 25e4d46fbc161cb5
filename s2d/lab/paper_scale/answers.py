"""GSM8K in the paper's way (appendix F): a language model answers in words, quantized or not, without examples."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from s2d.models import load
from s2d.models.problems import Problem, asked, exact_match, read_problems, solve
from s2d.ptq import parse_bits, quantize

SPLITS = ("train.jsonl", "test.jsonl")


def read_splits(folder: str | Path) -> tuple[list[Problem], list[Problem]]:
    """Problems to calibrate on, and problems to be tested on.

    Args:
        folder: with GSM8K's own files ``train.jsonl`` and ``test.jsonl``.

    Raises:
        FileNotFoundError: for a missing file.
        ValueError: for one that is damaged or empty, or a question that is in both.
    """
    train, test = (read_problems(Path(folder) / name) for name in SPLITS)
    shared = {problem.question for problem in train} & {problem.question for problem in test}
    if shared:
        raise ValueError(f"{folder}: {len(shared)} questions are in both files, such as {min(shared)!r}: get it again")
    return train, test


def measure(
    folder: str,
    problems: str | Path,
    bits: str,
    *,
    method: str = "rtn",
    calibration: int = 64,
    items: int | None = None,
    new_tokens: int = 512,
    rows: int = 32,
    device: str = "cpu",
    seed: int = 0,
    options: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """The share of GSM8K's problems that a model solves, without examples.

    Args:
        folder: of the model, or another name that :func:`s2d.models.load` takes.
        problems: folder of :func:`read_splits`.
        bits: ``"FP"``, or such as ``"W8A8"``.
        method: of quantization.
        calibration: problems of the training split, drawn at random, that quantization is fitted to.
        items: test problems, the first ones; by default all.
        new_tokens: of an answer, at most.
        rows: problems at a time.
        device: where to run.
        seed: of the draw.
        options: of the method.

    Returns:
        ``accuracy``, ``items``, and what it was measured with.

    Raises:
        ValueError: for bad bits, problems that are missing or damaged, or a model that is no language model.

    Paper: Table 9 (the paper says 0-shot; its prompt, decoding and way of reading an answer are not given).
    """
    widths = None if bits == "FP" else parse_bits(bits)
    train, test = read_splits(problems)
    if widths is not None and not 0 < calibration <= len(train):
        raise ValueError(f"--calibration is {calibration}: there are {len(train)} training problems")
    subject = load(folder)
    if subject.kind != "sequences":
        raise ValueError(f"{folder} takes {subject.kind}: give a language model")
    model, tokenizer = subject.model.to(device), subject.tokenizer()
    if widths is not None:
        order = torch.randperm(len(train), generator=torch.Generator().manual_seed(seed))[:calibration].tolist()
        batch = asked(tokenizer, [train[i] for i in order], torch.device(device))
        w_bits, a_bits = widths
        model = quantize(
            model, method=method, w_bits=w_bits, a_bits=a_bits, calibration=batch, batch_size=rows, **(options or {})
        )
    test = test[:items]
    found = exact_match(solve(model, tokenizer, test, batch_size=rows, max_new_tokens=new_tokens), test)
    settings = {"method": method, "bits": bits, "calibration": calibration, "new_tokens": new_tokens, "seed": seed}
    return {"model": folder, "accuracy": found, "items": len(test)} | settings
