"""Problems in words with a number as the answer (GSM8K): read, solved by a language model, and counted."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from s2d.console import say
from s2d.models.json_lines import read_json_lines

PROMPT = "Question: {question}\nAnswer:"
"""Zero-shot; what a tokenizer with a chat template is given as the user's words."""
NEXT = "\nQuestion:"
"""Where a model that was not taught to stop begins to ask itself."""


class Problem(NamedTuple):
    """A question in words, and its answer."""

    question: str
    answer: float

    def row(self) -> dict[str, str]:
        """As GSM8K has it: the number behind ``####``."""
        return {"question": self.question, "answer": f"#### {self.answer}"}


def read_problems(path: str | Path) -> list[Problem]:
    """Problems from a file of JSON lines in GSM8K's form: ``question``, and ``answer`` that ends in ``#### number``.

    Args:
        path: of the file.

    Raises:
        FileNotFoundError: for a missing file.
        ValueError: for a line that is no such problem, by its number.

    Paper: Table 9 (GSM8K).
    """

    def parse(row: Any) -> Problem:
        if not isinstance(row["question"], str):
            raise TypeError(f"question is {row['question']!r}")
        return Problem(row["question"], final_number(row["answer"]))

    return read_json_lines(path, "problem", "question, and answer with a number", parse)


def final_number(text: str) -> float:
    """The answer of a text: the number behind ``####``, or the last one; an int where it is whole.

    Raises:
        ValueError: if there is none.

    Example:
        >>> final_number("7 - 2 = 5. #### 1,005"), final_number("So it is 12."), final_number("She pays $2.50")
        (1005, 12, 2.5)

    Paper: none.
    """
    found = re.findall(r"-?\d[\d,]*(?:\.\d+)?", text.rpartition("####")[2])
    if not found:
        raise ValueError(f"there is no number in {text!r}")
    value = float(found[-1].replace(",", ""))
    return int(value) if value.is_integer() else value


def exact_match(found: Sequence[str], problems: Sequence[Problem]) -> float:
    """The share of texts whose final number is the answer; one without a number is wrong.

    Args:
        found: what a model said (:func:`solve`).
        problems: that it was asked.

    Example:
        >>> exact_match(["3 and 4 make 7.", "many"], [Problem("3 + 4?", 7), Problem("2 + 2?", 4)])
        0.5

    Paper: Table 9.
    """

    def right(text: str, problem: Problem) -> bool:
        try:
            return final_number(text) == problem.answer
        except ValueError:
            return False

    return sum(right(text, problem) for text, problem in zip(found, problems, strict=True)) / len(problems)


@torch.no_grad()
def solve(
    model: nn.Module,
    tokenizer: Any,
    problems: Sequence[Problem],
    *,
    prompt: str = PROMPT,
    batch_size: int = 8,
    max_new_tokens: int = 256,
) -> list[str]:
    """What a language model says to some problems, zero-shot and decoded greedily.

    Args:
        model: a causal language model of transformers, quantized or not.
        tokenizer: its own; where it has a chat template, the prompt is what the user says. It is made to pad on the
            left.
        problems: see :func:`read_problems`.
        prompt: with ``{question}`` in it.
        batch_size: problems at a time.
        max_new_tokens: of an answer.

    Returns:
        One text a problem, without the prompt, up to where the model asks itself another question.

    Raises:
        ValueError: for a prompt without ``{question}``.

    Paper: Table 9 (GSM8K, 0-shot; its prompt is not known).
    """
    device = next(model.parameters()).device
    options = {"max_new_tokens": max_new_tokens, "do_sample": False, "use_cache": True}
    options["eos_token_id"] = _ends(tokenizer)
    found: list[str] = []
    for start in range(0, len(problems), batch_size):
        batch = asked(tokenizer, problems[start : start + batch_size], device, prompt=prompt)
        output = model.generate(**batch, **options, pad_token_id=tokenizer.pad_token_id)
        said = tokenizer.batch_decode(output[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
        found += [text.partition(NEXT)[0].strip() for text in said]
        say(f"{len(found)} of {len(problems)} problems answered")
    return found


def asked(
    tokenizer: Any, problems: Sequence[Problem], device: torch.device, *, prompt: str = PROMPT
) -> dict[str, torch.Tensor]:
    """What a language model is called with to answer some problems, padded on the left.

    Args:
        tokenizer: its own; where it has a chat template, the prompt is what the user says.
        problems: see :func:`read_problems`.
        device: of the tensors.
        prompt: with ``{question}`` in it.

    Returns:
        ``input_ids`` and ``attention_mask``.

    Raises:
        ValueError: for a prompt without ``{question}``.

    Paper: none.
    """
    if "{question}" not in prompt:
        raise ValueError(f"prompt is {prompt!r}: it needs {{question}} where the question goes")
    tokenizer.padding_side = "left"  # what is generated goes on from the last token
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    texts = [_written(tokenizer, prompt.format(question=problem.question)) for problem in problems]
    batch = tokenizer(texts, padding=True, return_tensors="pt", add_special_tokens=not tokenizer.chat_template)
    return {name: batch[name].to(device) for name in ("input_ids", "attention_mask")}


def _written(tokenizer: Any, text: str) -> str:
    if not tokenizer.chat_template:
        return text
    turns = [{"role": "user", "content": text}]
    return tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)


def _ends(tokenizer: Any) -> list[int] | None:
    """The tokens that end an answer: the tokenizer's own, and what its chat template puts behind one.

    They may differ: a base model's tokenizer ends a document, and what it was fine-tuned on ends a turn.
    """
    found = [tokenizer.eos_token_id]
    if tokenizer.chat_template:
        turns = [{"role": "user", "content": "1"}, {"role": "assistant", "content": "2"}]
        behind = tokenizer.apply_chat_template(turns, tokenize=False).rpartition("2")[2].strip()
        found += tokenizer(behind, add_special_tokens=False)["input_ids"][:1]
    return sorted({token for token in found if token is not None}) or None
