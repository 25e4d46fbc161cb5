"""Word problems, the tiny language model that solves them, and a published one's way through the Trainer."""

from __future__ import annotations

import itertools
import json

import pandas as pd
import pytest
import torch

from s2d import linear_maps
from s2d.lab import language
from s2d.lab.language import answered, answers_of, encode, language_finetuning, language_pretraining, tiny_table
from s2d.lab.store import obtain_checkpoints
from s2d.lab.tiny_language_model import TinyQwen
from s2d.lab.word_problems import (
    SPLITS,
    TEMPLATES,
    WordProblems,
    problems,
    vocabulary,
)
from s2d.models.problems import final_number, read_problems


def solved(question: str) -> int:
    """An oracle of its own: the numbers of the question, added or taken away by the words between them."""
    total, sign = None, 1
    for word in question.replace("gave", "-").replace("loses", "-").replace("lost", "-").split():
        if word == "-":
            sign = -1
        elif word in ("buys", "found", "on"):
            sign = 1
        elif word.isdigit():
            total = int(word) if total is None else total + sign * int(word)
    return total


@pytest.mark.parametrize("kind", TEMPLATES)
def test_answers_are_right_and_within_the_vocabulary(kind):
    for problem in problems(kind, "train", 400, seed=[1]):
        assert problem.answer == solved(problem.question), problem.question
        assert str(problem.answer) in vocabulary()


@pytest.mark.parametrize("kind", TEMPLATES)
def test_no_two_splits_share_the_numbers_of_a_problem(kind):
    def numbers(split):
        texts = (problem.question for problem in problems(kind, split, 3000, seed=[2]))
        return {tuple(word for word in text.split() if word.isdigit()) for text in texts}

    for one, other in itertools.combinations(SPLITS, 2):
        assert not numbers(one) & numbers(other)


def test_a_batch_is_a_function_of_seed_and_step_and_padded_on_the_left():
    data = WordProblems(("two steps", "one step"))
    x, y = data.training_batch(7, seed=3, step=5)
    again, _ = data.training_batch(7, seed=3, step=5)
    other, _ = data.training_batch(7, seed=3, step=6)
    assert torch.equal(x, again) and not torch.equal(x, other) and x.shape == (7, 24) and y.shape == (7,)
    assert (x[:, -1] != 0).all() and ((x != 0).int().diff(dim=1) >= 0).all()


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: problems("three steps", "test", 1, seed=[0]), "unknown kind 'three steps'"),
        (lambda: problems("one step", "exam", 1, seed=[0]), "unknown split 'exam'"),
        (lambda: problems("one step", "test", 0, seed=[0]), "n is 0"),
        (lambda: WordProblems(tokens=5), "tokens is 5: the longest question has"),
        (lambda: final_number("none"), "no number in 'none'"),
        (lambda: language_finetuning("SGD", 2), "unknown variant 'SGD'"),
    ],
)
def test_what_is_not_there_is_named(call, says):
    with pytest.raises(ValueError, match=says):
        call()


def test_problems_in_gsm8ks_form_are_read(tmp_path):
    path = tmp_path / "gsm8k.jsonl"
    rows = [{"question": "6 eggs and 4?", "answer": "6 + 4 = <<6+4=10>>10\n#### 10"}]
    rows += [problem.row() for problem in problems("two steps", "test", 3, seed=[0])]
    path.write_text("\n".join(map(json.dumps, rows)) + "\n\n")
    found = read_problems(path)
    assert len(found) == 4 and found[0].answer == 10 and found[1].question == rows[1]["question"]
    path.write_text('{"question": "?", "answer": "many"}\n')
    with pytest.raises(ValueError, match=r"gsm8k.jsonl, line 1 is no problem \(ValueError: there is no number"):
        read_problems(path)
    with pytest.raises(FileNotFoundError, match="no problems at"):
        read_problems(tmp_path / "missing.jsonl")


def test_padding_does_not_change_an_answer():
    model = TinyQwen(width=16, depth=2).build(0).eval()
    x, _ = WordProblems().encode(problems("one step", "test", 3, seed=[0]))
    longer = torch.nn.functional.pad(x, (5, 0))
    assert torch.allclose(model(x), model(longer), atol=1e-5)
    assert len(linear_maps(model)) == 2 * 7  # the head is no part of a block


def test_a_tiny_model_is_trained_fine_tuned_and_quantized(tmp_path, monkeypatch):
    monkeypatch.setenv("S2D_STORE", str(tmp_path))
    monkeypatch.setenv("S2D_WORKERS", "1")
    recipe = language_finetuning("S2D", 2, steps=3, pretrain_steps=3, refresh_every=2)
    table = tiny_table(obtain_checkpoints({"S2D": [recipe]}), ["W8A8", "W2A2"], n=50)
    assert table.grid.tolist() == ["none", *["symmetric"] * 2, *["asymmetric"] * 2]
    error = table.set_index(["grid", "bits"]).logit_error
    assert error["none", "FP"] == 0 and (error[:, "W8A8"] < 1e-3).all() and (error[:, "W2A2"] > error[:, "W8A8"]).all()


def test_the_recipes_differ_in_the_arm_alone():
    assert language_pretraining(2).seed == 2
    adamw, printed = (language_finetuning(variant, 2) for variant in ("AdamW", language.AS_PRINTED))
    assert adamw.s2d is None and printed.s2d["lam"] == 5e-4 and printed.s2d["tau"] == 0.95
    assert adamw.start == printed.start and adamw.seed == printed.seed and adamw.optimizer == printed.optimizer


def test_perplexity_of_a_certain_and_an_even_guess():
    certain = answered(torch.tensor([[50.0, 0.0], [50.0, 0.0]]), torch.tensor([0, 0]))
    assert certain == {"exact_match": 1.0, "perplexity": 1.0}
    assert answered(torch.zeros(3, 8), torch.tensor([0, 1, 2]))["perplexity"] == 8.0


# --- a published model, as a small one with random weights of the same class ---
@pytest.fixture
def small(tmp_path):
    """A LLaMA of random weights, and a tokenizer of single characters."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    characters = ["\n", *map(chr, range(32, 127))]
    tokenizer = Tokenizer(models.WordLevel({c: i for i, c in enumerate(["?pad", *characters])}, unk_token="?pad"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("[\\s\\S]"), "isolated")
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = LlamaConfig(vocab_size=len(characters) + 1, max_position_embeddings=256, **sizes)

    def load(name):
        torch.manual_seed(0)
        return LlamaForCausalLM(config), PreTrainedTokenizerFast(tokenizer_object=tokenizer)

    return load


def test_only_the_answers_are_labels_and_whole_answers_are_right(small):
    model, tokenizer = small("small")
    some = problems("two steps", "test", 4, seed=[0])
    batch = encode(tokenizer, some, length=140)
    for row, problem in zip(batch["labels"], some, strict=True):
        assert tokenizer.decode(row[row != -100]).replace(" ", "") == str(problem.answer)
    assert answers_of(model.eval(), batch)["exact_match"] in (0.0, 0.25, 0.5, 0.75, 1.0)

    class Oracle(torch.nn.Module):
        def forward(self, input_ids, attention_mask, use_cache):
            logits = 100 * torch.nn.functional.one_hot(input_ids.roll(-1, 1), len(tokenizer)).float()
            return type("Output", (), {"logits": logits})

    assert answers_of(Oracle(), batch) == {"exact_match": 1.0, "perplexity": pytest.approx(1.0)}
    with pytest.raises(ValueError, match="there is room for 20"):
        encode(tokenizer, some, length=20)


def test_before_and_after_fine_tuning_at_table_9s_widths(small, tmp_path, monkeypatch):
    monkeypatch.setenv("S2D_OUTPUT", str(tmp_path))
    monkeypatch.setattr(encode, "__defaults__", (140,))
    table = language.run_published("small", steps=4, seed=2, n=4, load=small)
    assert table.training.drop_duplicates().tolist() == ["none", "AdamW", "S2D, paper's lam and tau"]
    assert table.bits.tolist() == ["FP", "W8A8", "W7A7", "W6A6"] * 3
    full = table[table.bits == "FP"].set_index("training").perplexity
    assert full["AdamW"] < full["none"]
    assert table.notna().all(axis=None)
    # Run again it reads what it has.
    monkeypatch.setattr(language, "finetune", None)
    pd.testing.assert_frame_equal(language.run_published("small", steps=4, seed=2, n=4, load=None), table)
