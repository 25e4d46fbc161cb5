"""Word problems with a number as the answer: read, solved by generation, counted, also by the command."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from torch import nn

from s2d.command import main
from s2d.models import problems
from s2d.models.problems import Problem, exact_match, final_number, read_problems, solve
from s2d.ptq import quantize

WORDS = ["<pad>", "</s>", "?", *map(str, range(40))]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A random language model that says numbers, with a tokenizer, and some problems."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    monkeypatch.chdir(tmp_path)
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    names = {"unk_token": "?", "pad_token": "<pad>", "eos_token": "</s>"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names).save_pretrained(tmp_path / "model")
    torch.manual_seed(0)
    size = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    ends = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 1}
    model = LlamaForCausalLM(LlamaConfig(**size, **ends, vocab_size=len(WORDS), max_position_embeddings=256))
    with torch.no_grad():
        model.lm_head.weight.mul_(20)  # nothing near a tie
    model.save_pretrained(tmp_path / "model")
    return tmp_path


def loaded() -> tuple[nn.Module, object]:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    return AutoModelForCausalLM.from_pretrained("model").eval(), AutoTokenizer.from_pretrained("model")


def asked(count: int = 5) -> list[Problem]:
    return [Problem(" ".join(str((7 * i + j) % 40) for j in range(i + 1)), 0) for i in range(count)]


def by_hand(model: nn.Module, tokenizer, problem: Problem, tokens: int) -> str:
    """One token after the other, each from the whole text before it."""
    ids = tokenizer(problems.PROMPT.format(question=problem.question), return_tensors="pt")["input_ids"]
    start = ids.shape[1]
    for _ in range(tokens):
        with torch.no_grad():
            chosen = model(input_ids=ids, use_cache=False).logits[0, -1].argmax()
        if chosen == tokenizer.eos_token_id:
            break
        ids = torch.cat([ids, chosen.view(1, 1)], dim=1)
    return tokenizer.decode(ids[0, start:], skip_special_tokens=True)


def test_answers_are_those_of_a_loop_by_hand_whatever_the_batch(folder: Path) -> None:
    model, tokenizer = loaded()
    expected = [by_hand(model, tokenizer, problem, 4) for problem in asked()]
    assert len(set(expected)) > 1
    for batch_size in (1, 2, 5):
        assert solve(model, tokenizer, asked(), batch_size=batch_size, max_new_tokens=4) == expected
    ids = torch.randint(3, len(WORDS), (8, 12), generator=torch.Generator().manual_seed(0))
    quantized = quantize(model, w_bits=8, a_bits=8, calibration={"input_ids": ids})
    assert len(solve(quantized, tokenizer, asked(), max_new_tokens=4)) == 5
    with pytest.raises(ValueError, match="it needs {question} where"):
        solve(model, tokenizer, asked(), prompt="Go.")


def test_a_chat_template_frames_what_is_asked(folder: Path) -> None:
    model, tokenizer = loaded()
    plain = solve(model, tokenizer, asked(), max_new_tokens=4)
    tokenizer.chat_template = "{% for turn in messages %}{{ turn['content'] }} 7 7{% endfor %}"
    framed = solve(model, tokenizer, asked(), max_new_tokens=4)
    tokenizer.chat_template = None
    assert framed == solve(model, tokenizer, asked(), prompt=problems.PROMPT + " 7 7", max_new_tokens=4) != plain


def test_the_command_counts_right_answers_of_a_network_and_its_quantized_copy(folder: Path, capsys) -> None:
    model, tokenizer = loaded()
    said = [final_number(text) for text in solve(model, tokenizer, asked(6), max_new_tokens=4)]
    rows = [
        {"question": problem.question, "answer": f"so\n#### {number + i % 2}"}
        for i, (problem, number) in enumerate(zip(asked(6), said, strict=True))
    ]
    Path("test.jsonl").write_text("\n".join(map(json.dumps, rows)))
    arguments = ["eval", "model", "--questions", "test.jsonl", "--max-new-tokens", "4", "--json", "result.json"]
    assert main(arguments) == 0
    result = json.loads(Path("result.json").read_text())
    assert result["exact_match_float"] == 0.5 and result["items"] == 6 and "exact_match_quantized" not in result
    saved = ["quantize", "model", "--calibration", "random", "--sequence-length", "8", "--images", "8"]
    assert main([*saved, "--save", "saved"]) == 0
    assert main([*arguments, "--quantized", "saved", "--test-images", "4"]) == 0
    result = json.loads(Path("result.json").read_text())
    assert result["items"] == 4 and 0 <= result["exact_match_quantized"] <= 1
    assert "exact match float" in capsys.readouterr().out


def test_numbers_and_files_are_read_or_refused(tmp_path: Path) -> None:
    assert [final_number(text) for text in ("#### -3", "1,234.", "it costs $12.50", "1 or 2")] == [-3, 1234, 12.5, 2]
    assert exact_match(["12.0 eggs", "none"], [Problem("", 12), Problem("", 0)]) == 0.5
    path = tmp_path / "problems.jsonl"
    cases = {
        '{"question": "?", "answer": "many"}': r"line 1 is no problem (ValueError: there is no number in 'many')",
        '{"question": 3, "answer": "4"}': "line 1 is no problem (TypeError: question is 3)",
        '\n{"answer": "4"}': "line 2 is no problem (KeyError: 'question'): each needs question",
        "[": "line 1 is no problem (JSONDecodeError",
        "": "has no problems",
    }
    for text, message in cases.items():
        path.write_text(text)
        with pytest.raises(ValueError, match=re.escape(message)):
            read_problems(path)
    with pytest.raises(FileNotFoundError, match="no problems at"):
        read_problems(tmp_path / "missing.jsonl")


def test_an_answer_ends_where_a_turn_ends_in_the_chat_template(folder):
    """A base model's tokenizer ends a document; what the model was fine-tuned on ends a turn."""
    model, tokenizer = loaded()
    template = "{% for m in messages %}{{ m['content'] }} {% if m['role'] == 'assistant' %}END {% endif %}{% endfor %}"
    tokenizer.chat_template = template.replace("END", "</s>")
    (whole,) = solve(model, tokenizer, asked(1), max_new_tokens=6)
    words = whole.split()
    last = next(i for i, word in enumerate(words) if i > 0 and word not in words[:i])
    tokenizer.chat_template = template.replace("END", words[last])
    assert solve(model, tokenizer, asked(1), max_new_tokens=6) == [" ".join(words[: last + 1])]
