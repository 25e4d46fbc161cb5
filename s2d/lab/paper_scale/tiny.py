"""The data and the language model of ``paper/tiny.yaml``: the whole batch in miniature, on any cluster, in minutes.

    python -m s2d.lab.paper_scale tiny -o build/tiny

makes images of four patterns, word problems in GSM8K's form, conversations, and a Qwen2 of random weights with a
tokenizer of its own. Nothing that is measured on them means anything.
"""

from __future__ import annotations

import json
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from s2d.files import write_folder_atomically
from s2d.lab.word_problems import problems
from s2d.models.problems import Problem
from s2d.packages import need

TINTS = dict(zip(("checks", "columns", "rows", "slope"), np.vstack([np.eye(3), np.ones((1, 3))]), strict=True))
"""Class to the colour that it tends to: easy enough for a few steps, too hard to be always right."""
PIXELS = 32
IMAGES = {"train": 16, "val": 8}
"""Of each class."""
PROBLEMS = {"train": 24, "test": 6}
CONVERSATIONS = 24
USUAL = 7
SPECIAL = ("<pad>", "<unk>", "<end>")
TEMPLATE = (
    "{% for message in messages %}{{ message['role'] }} : {{ message['content'] }} <end> {% endfor %}"
    "{% if add_generation_prompt %}assistant : {% endif %}"
)


def make_tiny(folder: Path) -> None:
    """Make everything, the same each time.

    Args:
        folder: to make: ``imagenet/train``, ``imagenet/val``, ``gsm8k``, ``dolci.jsonl`` and ``qwen2``.

    Raises:
        OSError: if it is there already.
        ImportError: without pillow, tokenizers or transformers.

    Paper: none
    """
    write_folder_atomically(folder, _fill)


def _fill(folder: Path) -> None:
    _images(folder / "imagenet")
    _problems(folder / "gsm8k")
    texts = _conversations(folder / "dolci.jsonl")
    _language_model(folder / "qwen2", texts)


def _pattern(name: str, random: np.random.Generator) -> np.ndarray:
    """One image: its class's pattern and tint, moved and under noise."""
    y, x = np.mgrid[:PIXELS, :PIXELS] + random.integers(0, 8, size=(2, 1, 1))
    wave = {"checks": (x // 8 + y // 8) % 2, "columns": x // 8 % 2, "rows": y // 8 % 2, "slope": (x + y) // 8 % 2}[name]
    colour = 90 + 40 * wave[..., None] + 25 * TINTS[name] + random.normal(0, 25, size=3)
    return (colour + random.normal(0, 12, size=(PIXELS, PIXELS, 3))).clip(0, 255).astype(np.uint8)


def _images(folder: Path) -> None:
    pillow = need("PIL.Image", "images")
    for split, count in IMAGES.items():
        for label, name in enumerate(TINTS):
            random = np.random.default_rng([label, len(split)])
            (folder / split / name).mkdir(parents=True)
            for number in range(count):
                pillow.fromarray(_pattern(name, random)).save(folder / split / name / f"{number}.png")


def _drawn(split: str, count: int, seed: int) -> list[Problem]:
    """Problems half of which have one answer, so that a few steps teach something."""
    pool = problems("one step", split, 600, seed=[seed])
    usual = [problem for problem in pool if problem.answer == USUAL]
    others = [problem for problem in pool if problem.answer != USUAL]
    return list(chain(*zip(usual, others, strict=False)))[:count]


def _problems(folder: Path) -> None:
    folder.mkdir()
    for split, count in PROBLEMS.items():
        rows = [problem.row() for problem in _drawn(split, count, 0)]
        (folder / f"{split}.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")


def _conversations(file: Path) -> list[str]:
    made = _drawn("train", CONVERSATIONS, 1)
    rows = [
        {
            "messages": [
                {"role": "user", "content": problem.question},
                {"role": "assistant", "content": str(problem.answer)},
            ]
        }
        for problem in made
    ]
    file.write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")
    every = [p.question for split in PROBLEMS for p in _drawn(split, PROBLEMS[split], 0)]
    return [*every, *(problem.question for problem in made), "user : assistant : <end>", *map(str, range(41))]


def _language_model(folder: Path, texts: list[str]) -> None:
    transformers, tokenizers = need("transformers", "a language model"), need("tokenizers", "a language model")
    import torch

    words = sorted({word for text in texts for word in text.split()} - set(SPECIAL))
    inner: Any = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({word: i for i, word in enumerate([*SPECIAL, *words])}, unk_token="<unk>")
    )
    inner.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", unk_token="<unk>", eos_token="<end>"
    )
    tokenizer.chat_template = TEMPLATE
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1}
    config = transformers.Qwen2Config(
        vocab_size=len(tokenizer), **sizes, **heads, max_position_embeddings=256, eos_token_id=2, pad_token_id=0
    )
    torch.manual_seed(0)
    transformers.Qwen2ForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
