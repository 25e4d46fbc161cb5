"""S2D on language models (appendix F, Table 9 in shape): a tiny Qwen2 that solves its problems, and SmolLM2.

    python -m s2d.lab.language tiny                 pretrained, fine-tuned on harder problems with every arm, quantized
    python -m s2d.lab.language smollm2 --steps 40   a published model before and after fine-tuning (--model for another)

write ``tiny.csv`` (with ``tiny_outliers.csv``) and ``smollm2.csv`` in ``data/language``. What is in the store is not
trained again, and a run that was interrupted goes on.

The paper says that S2D carries over to a language model with the hyper-parameters of vision, and reports
round-to-nearest. So nothing is tuned here: the paper's own strength and threshold, and those that this companion's
vision study chose.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from s2d.files import write_text
from s2d.lab.evaluate import Checkpoints, each, outlier_table
from s2d.lab.paths import output_root
from s2d.lab.quantization import logit_error, logits_of, setting
from s2d.lab.recipes import AS_PRINTED, EVIDENCE_SEEDS, SETTINGS, arm
from s2d.lab.results import provenance, save_table
from s2d.lab.store import obtain_checkpoints
from s2d.lab.tiny_language_model import TinyQwen
from s2d.lab.training import Optimizer, Recipe
from s2d.lab.word_problems import WordProblems, problems
from s2d.models.problems import Problem
from s2d.ptq import parse_bits, quantize_each

RUN = "language"
SEEDS = EVIDENCE_SEEDS[:5]
VARIANTS = ("AdamW", "No PCDR", AS_PRINTED, "S2D", "S2D, live")
BITS = ("W8A8", "W7A7", "W6A6", "W5A5", "W4A4")
"""Table 9 has the first three."""
PRETRAIN_STEPS, FINETUNE_STEPS = 1500, 600
PRETRAIN_LR, FINETUNE_LR = 3e-3, 1e-3
BETAS = (0.9, 0.99)
PROBLEMS = 2000
CALIBRATION = 256


def language_pretraining(seed: int, *, steps: int = PRETRAIN_STEPS, device: str = "cpu") -> Recipe:
    """A tiny Qwen2 from scratch, on problems of one step.

    Args:
        seed: of the weights and of the stream of problems.
        steps: optimizer steps.
        device: where to train.

    Example:
        >>> language_pretraining(2).model.depth
        4
    """
    return Recipe(
        seed=seed,
        steps=steps,
        warmup=min(100, steps),
        optimizer=Optimizer("adamw", lr=PRETRAIN_LR, weight_decay=0.1, betas=BETAS, clip=1.0),
        batch_size=64,
        data=WordProblems(("one step",)),
        model=TinyQwen(),
        measure_every=max(1, steps // 5),
        device=device,
    )


def language_finetuning(
    variant: str,
    seed: int,
    *,
    steps: int = FINETUNE_STEPS,
    pretrain_steps: int = PRETRAIN_STEPS,
    refresh_every: int = 100,
    device: str = "cpu",
) -> Recipe:
    """Supervised fine-tuning on problems of two steps (and some of one, so that these are not forgotten).

    Args:
        variant: one of ``VARIANTS``, with the settings of the vision study.
        seed: of the pretraining; fine-tuning has a stream of its own.
        steps, pretrain_steps: optimizer steps.
        refresh_every: of S2D.
        device: where to train.

    Raises:
        ValueError: for an unknown variant.

    Example:
        >>> language_finetuning("S2D", 2).s2d["tau"]
        0.6

    Paper: appendix F, Table 9 in shape.
    """
    if variant not in VARIANTS:
        raise ValueError(f"unknown variant {variant!r}: choose one of {', '.join(VARIANTS)}")
    settings = {"lr": FINETUNE_LR, "weight_decay": 0.01} | SETTINGS[variant]
    optimizer, s2d = arm(variant, settings, betas=BETAS, refresh_every=refresh_every)
    start = language_pretraining(seed, steps=pretrain_steps, device=device)
    return Recipe(
        seed=1000 + seed,
        steps=steps,
        warmup=min(50, steps),
        optimizer=optimizer,
        batch_size=32,
        data=WordProblems(("two steps", "one step")),
        model=start.model,
        start=start,
        s2d=s2d,
        measure_every=max(1, steps // 3),
        device=device,
    )


def answered(logits: Tensor, answers: Tensor) -> dict[str, float]:
    """How right a model is about some answers of one token each.

    Args:
        logits: ``(n, vocabulary)``.
        answers: ``(n,)`` token numbers.

    Returns:
        exact_match (share), and perplexity of the answers.

    Example:
        >>> answered(torch.zeros(2, 4), torch.tensor([0, 1]))
        {'exact_match': 0.5, 'perplexity': 4.0}
    """
    right = (logits.argmax(-1) == answers).double().mean().item()
    return {"exact_match": right, "perplexity": round(math.exp(F.cross_entropy(logits.float(), answers).item()), 6)}


def tiny_table(checkpoints: Checkpoints, bits: Sequence[str] = BITS, *, n: int = PROBLEMS) -> pd.DataFrame:
    """Exact match and perplexity on held-out problems, in full precision and under round-to-nearest.

    Args:
        checkpoints: variant to one result a seed.
        bits: widths of weights and activations; symmetric and asymmetric grids, one a tensor.
        n: test problems.

    Returns:
        Columns variant, seed, grid, bits, problems, exact_match, perplexity, logit_error.

    Paper: Table 9 in shape.
    """
    rows = []
    cells = [(grid, width) for grid in ("symmetric", "asymmetric") for width in bits]
    for variant, trained in each(checkpoints):
        model, data = trained.model(), trained.recipe.data
        x, y = data.fixed_set("test", n)
        full = logits_of(model, x)
        settings = [setting(parse_bits(width), symmetric=grid == "symmetric") for grid, width in cells]
        calibration = data.fixed_set("calibration", CALIBRATION)[0]
        found = [logits_of(quantized, x) for quantized in quantize_each(model, settings, calibration=calibration)]
        for (grid, width), logits in zip((("none", "FP"), *cells), (full, *found), strict=True):
            row = {"variant": variant, "seed": trained.seed, "grid": grid, "bits": width, "problems": n}
            rows.append(row | answered(logits, y) | {"logit_error": logit_error(logits, full)})
    return pd.DataFrame(rows)


def run_tiny(seeds: Sequence[int] = SEEDS, variants: Sequence[str] = VARIANTS) -> pd.DataFrame:
    """Train what is missing, measure, write the tables.

    Args:
        seeds: of the pretraining.
        variants: ways of fine-tuning.

    Returns:
        The table ``tiny``.
    """
    recipes: dict[str, list[Recipe]] = {"pretrained": [language_pretraining(seed) for seed in seeds]}
    recipes |= {variant: [language_finetuning(variant, seed) for seed in seeds] for variant in variants}
    checkpoints = obtain_checkpoints(recipes)
    fixed = {"seeds": list(seeds), "pretrain_steps": PRETRAIN_STEPS, "finetune_steps": FINETUNE_STEPS}
    source = provenance("s2d.lab.language", fixed | {"problems": PROBLEMS, "calibration": CALIBRATION})
    table = tiny_table({name: found for name, found in checkpoints.items() if name != "pretrained"})
    save_table(table, "tiny", run=RUN, source=source)
    save_table(outlier_table(checkpoints), "tiny_outliers", run=RUN, source=source)
    return table


# --- a published model ------------------------------------------------------------------------------------------------

PUBLISHED_S2D = "S2D, paper's lam and tau"
PROMPT = "Question: {question}\nAnswer:"
LENGTH = 48


def _texts(some: Sequence[Problem]) -> list[tuple[str, str]]:
    """Prompt and answer, in the words of the problem without the spaces that its tiny reader needs."""
    plain = [problem.question.replace(" .", ".").replace(" ,", ",").replace(" ?", "?") for problem in some]
    return [(PROMPT.format(question=text), f" {p.answer}") for text, p in zip(plain, some, strict=True)]


def encode(tokenizer: Any, some: Sequence[Problem], length: int = LENGTH) -> dict[str, Tensor]:
    """Prompts with their answers, padded on the right; labels are -100 but on the answer.

    Args:
        tokenizer: of transformers.
        some: problems.
        length: of a row, in tokens.

    Returns:
        input_ids, attention_mask, labels, each ``(n, length)``.

    Raises:
        ValueError: for a problem that is longer.
    """
    rows: dict[str, list[list[int]]] = {"input_ids": [], "attention_mask": [], "labels": []}
    for prompt, answer in _texts(some):
        asked, said = (tokenizer(text, add_special_tokens=False)["input_ids"] for text in (prompt, answer))
        rest = length - len(asked) - len(said)
        if rest < 0:
            raise ValueError(f"{prompt!r} has {length - rest} tokens, and there is room for {length}: raise length")
        rows["input_ids"].append([*asked, *said, *[0] * rest])
        rows["attention_mask"].append([1] * (length - rest) + [0] * rest)
        rows["labels"].append([-100] * len(asked) + list(said) + [-100] * rest)
    return {name: torch.tensor(values) for name, values in rows.items()}


@torch.no_grad()
def answers_of(model: nn.Module, batch: Mapping[str, Tensor], rows: int = 8) -> dict[str, float]:
    """Exact match of whole answers (every token the most likely one), and perplexity per token of the answers.

    Args:
        model: a causal language model of transformers.
        batch: of :func:`encode`.
        rows: problems at once.
    """
    right, loss, count = 0, 0.0, 0
    for ids, mask, labels in zip(
        *(batch[name].split(rows) for name in ("input_ids", "attention_mask", "labels")), strict=True
    ):
        logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits[:, :-1].float()
        wanted = labels[:, 1:]
        asked = wanted != -100
        right += int(((logits.argmax(-1) == wanted) | ~asked).all(-1).sum())
        loss += F.cross_entropy(logits[asked], wanted[asked], reduction="sum").item()
        count += int(asked.sum())
    return {"exact_match": right / len(batch["labels"]), "perplexity": math.exp(loss / count)}


def finetune(
    model: nn.Module, tokenizer: Any, folder: Path, *, steps: int, lr: float, seed: int, lam: float | None
) -> None:
    """Supervised fine-tuning of a published model with transformers' Trainer, and S2D by its callback.

    Args:
        model: changed in place.
        tokenizer: its own.
        folder: of the Trainer's files.
        steps: optimizer steps of 8 problems.
        lr: largest learning rate.
        seed: of the problems.
        lam: strength of S2D as printed, or None without it.
    """
    from transformers import Trainer, TrainingArguments

    from s2d.integrations.transformers import S2DCallback

    batch = encode(tokenizer, problems("two steps", "train", 8 * steps, seed=[seed]))
    data = [{name: values[row] for name, values in batch.items()} for row in range(8 * steps)]
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=steps,
        per_device_train_batch_size=8,
        learning_rate=lr,
        warmup_steps=max(1, steps // 10),
        save_strategy="no",
        report_to=[],
        logging_steps=max(1, steps // 4),
        seed=seed,
        disable_tqdm=False,
    )
    callbacks = [] if lam is None else [S2DCallback(lam=lam, refresh_every=max(1, steps // 4))]
    Trainer(model=model, args=arguments, train_dataset=data, callbacks=callbacks).train()


def run_published(
    name: str, *, steps: int, seed: int, n: int, load: Callable[[str], tuple[nn.Module, Any]]
) -> pd.DataFrame:
    """A published model before and after fine-tuning, in full precision and under round-to-nearest at Table 9's widths.

    Args:
        name: of the model, for ``load``.
        steps: of fine-tuning.
        seed: of the problems.
        n: test problems.
        load: gives a fresh model and its tokenizer.

    Returns:
        Columns model, training, bits, problems, seed, exact_match, perplexity.
    """
    folder = output_root() / "build" / "language"
    parts = []
    for training, lam in (("none", None), ("AdamW", None), (PUBLISHED_S2D, 5e-4)):
        # What an interrupted run has measured is there; the name says what it depends on.
        file = folder / f"{quote(name, safe='')}-{quote(training, safe='')}-{steps}-{seed}-{n}.csv"
        if not file.is_file():
            model, tokenizer = load(name)
            if training != "none":
                finetune(model.train(), tokenizer, folder / "trainer", steps=steps, lr=1e-4, seed=seed, lam=lam)
            same = {"model": name, "training": training, "problems": n, "seed": seed}
            write_text(
                file, pd.DataFrame([same | row for row in _under_each(model.eval(), tokenizer, n)]).to_csv(index=False)
            )
        parts.append(pd.read_csv(file, keep_default_na=False))
    return pd.concat(parts, ignore_index=True)


def _under_each(model: nn.Module, tokenizer: Any, n: int) -> Iterator[dict[str, Any]]:
    """Full precision and Table 9's widths, said as they come."""
    test = encode(tokenizer, problems("two steps", "test", n, seed=[0]))
    calibration = encode(tokenizer, problems("two steps", "calibration", 32, seed=[0]))
    calibration = {key: calibration[key] for key in ("input_ids", "attention_mask")}
    settings = [setting(parse_bits(width)) for width in BITS[:3]]
    for width, found in zip(
        ("FP", *BITS[:3]), chain([model], quantize_each(model, settings, calibration=calibration)), strict=True
    ):
        row = {"bits": width} | answers_of(found, test)
        print(row, file=sys.stderr)
        yield row


def _load(name: str) -> tuple[nn.Module, Any]:
    from s2d.models import load

    subject = load(name)
    return subject.model.float(), subject.tokenizer()


def main(argv: Sequence[str] | None = None) -> None:
    """Run a study and print what it says."""
    parser = argparse.ArgumentParser(prog="python -m s2d.lab.language", description="S2D on language models; quantize.")
    commands = parser.add_subparsers(dest="study", required=True)
    tiny = commands.add_parser("tiny", help="a tiny Qwen2 from scratch, every arm")
    tiny.add_argument("--seeds", nargs="+", type=int, default=list(SEEDS), metavar="SEED")
    published = commands.add_parser("smollm2", help="a published model before and after fine-tuning")
    published.add_argument("--model", default="smollm2", help="whatever s2d.models.load takes (default: smollm2)")
    published.add_argument("--steps", type=int, default=40)
    published.add_argument("--seed", type=int, default=2)
    published.add_argument("--problems", type=int, default=200)
    arguments = parser.parse_args(argv)
    try:
        if arguments.study == "tiny":
            table = run_tiny(arguments.seeds)
            by = ["variant", "grid", "bits"]
            print((100 * table.groupby(by, sort=False).exact_match.mean().unstack("bits")).round(1).to_string())
            return
        options = {"steps": arguments.steps, "seed": arguments.seed, "n": arguments.problems}
        table = run_published(arguments.model, load=_load, **options)
        source = provenance("s2d.lab.language", options | {"model": arguments.model})
        save_table(table, "smollm2" if arguments.model == "smollm2" else "published", run=RUN, source=source)
        print(table.to_string(index=False))
    except (FileNotFoundError, ValueError) as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
