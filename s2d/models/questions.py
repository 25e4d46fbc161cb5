"""Questions about pictures: what a vision-language model answers, and how right that is (GQA, DocVQA)."""

from __future__ import annotations

import string
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from s2d.console import say
from s2d.models.json_lines import read_json_lines
from s2d.packages import need

PROMPT = "USER: <image>\n{question}\nAnswer the question using a single word or phrase. ASSISTANT:"
"""LLaVA-1.5's, for short answers."""
ANLS_THRESHOLD = 0.5


class Question(NamedTuple):
    """A question about a picture, and the answers that count as right."""

    image: Path
    question: str
    answers: tuple[str, ...]


def read_questions(path: str | Path) -> list[Question]:
    """Questions from a file of JSON lines, with ``image`` (relative to the file), ``question`` and ``answers``.

    GQA's and DocVQA's own files have the same facts under other names: ``answer`` for one right answer is taken too.

    Args:
        path: of the file.

    Raises:
        FileNotFoundError: for a missing file, or a picture that is not where a line says.
        ValueError: for a line that is no such question, by its number.

    Paper: vision-language rows of the main text (second-hand).
    """
    folder = Path(path).parent

    def parse(row: Any) -> Question:
        answers = row["answers"] if "answers" in row else row["answer"]
        answers = (answers,) if isinstance(answers, str) else tuple(answers)
        if not answers or not all(isinstance(answer, str) for answer in answers):
            raise ValueError(f"answers is {answers!r}: give at least one text")
        question = Question(folder / row["image"], row["question"], answers)
        if not question.image.is_file():
            raise FileNotFoundError(f"no picture at {question.image}")
        return question

    return read_json_lines(path, "question", "image, question and answers", parse)


def normalised(text: str) -> str:
    """An answer as it is compared: lower case, without articles and punctuation.

    Example:
        >>> normalised("The  red Car.")
        'red car'

    Paper: none.
    """
    words = text.lower().translate(str.maketrans("", "", string.punctuation)).split()
    return " ".join(word for word in words if word not in ("a", "an", "the"))


def exact_match(found: Sequence[str], questions: Sequence[Question]) -> float:
    """The share of answers that equal one of the right ones, normalised: GQA's accuracy.

    Example:
        >>> exact_match(["A dog."], [Question(Path("x.png"), "What is it?", ("dog",))])
        1.0

    Paper: none.
    """
    right = [any(normalised(f) == normalised(a) for a in q.answers) for f, q in zip(found, questions, strict=True)]
    return sum(right) / len(right)


def anls(found: Sequence[str], questions: Sequence[Question]) -> float:
    r"""Average normalised Levenshtein similarity: DocVQA's score.

    .. math:: s = \max_a 1 - \frac{d(f, a)}{\max(|f|, |a|)}, \text{ and 0 where that is below } 1/2

    Example:
        >>> anls(["31 May"], [Question(Path("x.png"), "When?", ("31 May", "May 31"))])
        1.0

    Paper: none.
    """
    scores = [max(_similarity(f, a) for a in q.answers) for f, q in zip(found, questions, strict=True)]
    return sum(score if score >= ANLS_THRESHOLD else 0.0 for score in scores) / len(scores)


def _similarity(one: str, other: str) -> float:
    one, other = (" ".join(text.lower().split()) for text in (one, other))
    longest = max(len(one), len(other))
    return 1.0 if longest == 0 else 1 - _distance(one, other) / longest


def _distance(one: str, other: str) -> int:
    """Levenshtein's: the fewest insertions, deletions and replacements of a letter."""
    row = list(range(len(other) + 1))
    for i, letter in enumerate(one, start=1):
        before, row[0] = row[0], i
        for j, wanted in enumerate(other, start=1):
            before, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, before + (letter != wanted))
    return row[-1]


@torch.no_grad()
def answer(
    model: nn.Module,
    processor: Any,
    questions: Sequence[Question],
    *,
    prompt: str = PROMPT,
    batch_size: int = 8,
    max_new_tokens: int = 16,
) -> list[str]:
    """What a model says to some questions, decoded greedily.

    Args:
        model: such as ``LlavaForConditionalGeneration``, quantized or not.
        processor: its own, which makes tokens and pixels of texts and pictures; it is made to pad on the left.
        questions: see :func:`read_questions`.
        prompt: with ``{question}`` in it, and the processor's mark for the picture.
        batch_size: questions at a time.
        max_new_tokens: of an answer.

    Returns:
        One text a question, without the prompt.

    Raises:
        ValueError: for a prompt without ``{question}``.
        ImportError: without pillow.

    Paper: vision-language rows of the main text (second-hand).
    """
    if "{question}" not in prompt:
        raise ValueError(f"prompt is {prompt!r}: it needs {{question}} where the question goes")
    pictures = need("PIL.Image", "questions about pictures")
    processor.tokenizer.padding_side = "left"  # what is generated goes on from the last token
    device = next(model.parameters()).device
    found: list[str] = []
    for start in range(0, len(questions), batch_size):
        here = questions[start : start + batch_size]
        texts = [prompt.format(question=question.question) for question in here]
        images = [pictures.open(question.image).convert("RGB") for question in here]
        batch = processor(images=images, text=texts, padding=True, return_tensors="pt").to(device)
        output = model.generate(**batch, max_new_tokens=max_new_tokens, do_sample=False, use_cache=True)
        new = output[:, batch["input_ids"].shape[1] :]
        found += [text.strip() for text in processor.batch_decode(new, skip_special_tokens=True)]
        say(f"{len(found)} of {len(questions)} questions answered")
    return found
