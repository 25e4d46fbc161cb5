"""GSM8K in the paper's way (appendix F): a language model answers in words, quantized or not, without examples."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from s2d.console import say
from s2d.lab.word_problems import Problem, final_number, read_problems
from s2d.models import load
from s2d.ptq import parse_bits, quantize
from s2d.train.conversations import PLAIN

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
    for name, some in zip(SPLITS, (train, test), strict=True):
        if not some:
            raise ValueError(f"{Path(folder) / name} is empty: get it again")
    shared = {problem.question for problem in train} & {problem.question for problem in test}
    if shared:
        raise ValueError(f"{folder}: {len(shared)} questions are in both files, such as {min(shared)!r}: get it again")
    return train, test


def asked(tokenizer: Any, question: str) -> str:
    """The text that a model is to go on from, as it was fine-tuned: by its chat template, or a plain question.

    Args:
        tokenizer: of transformers.
        question: in words.
    """
    if getattr(tokenizer, "chat_template", None):
        turn = [{"role": "user", "content": question}]
        return tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True)
    return PLAIN["user"].format(question) + PLAIN["assistant"]


def ends(tokenizer: Any) -> list[int]:
    """The tokens that end an answer: the tokenizer's own, and what its chat template puts behind one.

    Args:
        tokenizer: of transformers.
    """
    found = [tokenizer.eos_token_id]
    if getattr(tokenizer, "chat_template", None):
        turns = [{"role": "user", "content": "1"}, {"role": "assistant", "content": "2"}]
        behind = tokenizer.apply_chat_template(turns, tokenize=False).rpartition("2")[2]
        found += tokenizer(behind.strip(), add_special_tokens=False)["input_ids"][:1]
    return sorted({token for token in found if token is not None})


def _batch(tokenizer: Any, texts: Sequence[str], device: torch.device) -> dict[str, Tensor]:
    """Padded on the left, so that what is generated goes on from the last token."""
    tokenizer.pad_token, tokenizer.padding_side = tokenizer.pad_token or tokenizer.eos_token, "left"
    found = tokenizer(list(texts), padding=True, return_tensors="pt", add_special_tokens=False)
    return {name: found[name].to(device) for name in ("input_ids", "attention_mask")}


def is_right(said: str, problem: Problem) -> bool:
    """Whether the last number of an answer is the right one.

    Example:
        >>> problem = Problem("3 and 4?", 7)
        >>> is_right("3 + 4 = 7, so it is 7.", problem), is_right("I do not know.", problem)
        (True, False)
    """
    try:
        return final_number(said) == problem.answer
    except ValueError:
        return False


@torch.no_grad()
def answers(
    model: nn.Module, tokenizer: Any, some: Sequence[Problem], *, new_tokens: int, rows: int
) -> Iterator[tuple[Problem, str]]:
    """What a model says, decoded greedily.

    Args:
        model: a causal language model of transformers, quantized or not.
        tokenizer: its own.
        some: problems.
        new_tokens: of an answer, at most.
        rows: problems at a time.
    """
    device = next(model.parameters()).device
    options = {"do_sample": False, "max_new_tokens": new_tokens, "use_cache": True, "eos_token_id": ends(tokenizer)}
    for start in range(0, len(some), rows):
        here = some[start : start + rows]
        batch = _batch(tokenizer, [asked(tokenizer, problem.question) for problem in here], device)
        output = model.generate(**batch, **options, pad_token_id=tokenizer.pad_token_id)
        new = output[:, batch["input_ids"].shape[1] :]
        yield from zip(here, tokenizer.batch_decode(new, skip_special_tokens=True), strict=True)
        say(f"{start + len(here)} of {len(some)} problems answered")


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
        batch = _batch(tokenizer, [asked(tokenizer, train[i].question) for i in order], torch.device(device))
        w_bits, a_bits = widths
        model = quantize(
            model, method=method, w_bits=w_bits, a_bits=a_bits, calibration=batch, batch_size=rows, **(options or {})
        )
    test = test[:items]
    right = sum(
        is_right(said, problem) for problem, said in answers(model, tokenizer, test, new_tokens=new_tokens, rows=rows)
    )
    settings = {"method": method, "bits": bits, "calibration": calibration, "new_tokens": new_tokens, "seed": seed}
    return {"model": folder, "accuracy": right / len(test), "items": len(test), "right": right} | settings
