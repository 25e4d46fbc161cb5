"""A vision-language model through the same interfaces: diagnosis, decay, quantization, questions about pictures."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import nn

from s2d import SelectiveSpectralDecay
from s2d.diagnosis import diagnose
from s2d.models.questions import Question, anls, answer, exact_match, read_questions
from s2d.ptq import coverage, quantize

WORDS = [f"word{i}" for i in range(40)]
SPECIAL = ["<pad>", "<s>", "</s>", "<unk>", "<image>"]
SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}


def llava() -> nn.Module:
    import transformers

    torch.manual_seed(0)
    vision = transformers.SiglipVisionConfig(**SIZES, image_size=16, patch_size=4, vision_use_head=False)
    options = {"vocab_size": 50, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "num_key_value_heads": 2}
    config = transformers.LlavaConfig(
        vision_config=vision,
        text_config=transformers.Qwen2Config(**SIZES, **options),
        image_token_index=4,
        vision_feature_select_strategy="full",
        pad_token_id=0,
    )
    return transformers.LlavaForConditionalGeneration(config).eval()


@pytest.fixture
def processor():
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlavaProcessor, PreTrainedTokenizerFast, SiglipImageProcessor

    vocabulary = {word: i for i, word in enumerate([*SPECIAL, *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    names = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names, additional_special_tokens=["<image>"])
    pixels = SiglipImageProcessor(size={"height": 16, "width": 16})
    return LlavaProcessor(pixels, fast, patch_size=4, vision_feature_select_strategy="full", image_token="<image>")


@pytest.fixture
def asked(tmp_path: Path) -> list[Question]:
    lines = []
    for i in range(5):
        Image.new("RGB", (20, 16), (50 * i, 20, 200 - 30 * i)).save(tmp_path / f"{i}.png")
        text = " ".join(WORDS[i : 2 * i + 1])
        lines.append(json.dumps({"image": f"{i}.png", "question": text, "answers": [WORDS[i], "word39 word38"]}))
    (tmp_path / "questions.jsonl").write_text("\n".join(lines) + "\n\n")
    return read_questions(tmp_path / "questions.jsonl")


PROMPT = "<image> {question} word3"


def batch() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(5, 45, (3, 4), generator=generator)
    pixels = torch.randn(3, 3, 16, 16, generator=generator)
    return {"input_ids": torch.cat([torch.full((3, 16), 4), tokens], 1), "pixel_values": pixels}


def test_layers_that_get_no_gradient_are_told_and_the_others_decay() -> None:
    """With vision_feature_layer = -2 the last block of the vision tower feeds nothing."""
    model, x = llava().train(), batch()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    decay = SelectiveSpectralDecay(model, lam=0.1, tau=0.3, refresh_every=2)
    decay.attach(optimizer)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        for _ in range(4):
            model(**x, labels=x["input_ids"]).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    health = {row["layer"]: row for row in decay.health()}
    unused = {name for name in health if "vision_tower.encoder.layers.1" in name}
    assert len(unused) == 6 and all("no gradient" in health[name]["cause"] for name in unused)
    acting = [name for name, row in health.items() if row["acts"]]
    assert any("vision_tower" in name for name in acting) and any("language_model" in name for name in acting)


def test_both_towers_are_diagnosed_and_quantized() -> None:
    model, x = llava(), batch()
    rows = diagnose(model, [x])
    assert {"vision_tower", "language_model"} <= {part for row in rows for part in row.layer.split(".")}
    quantized = quantize(model, method="repq_vit", w_bits=8, a_bits=8, calibration=x)
    assert any("vision_tower" in row["site"] for row in coverage(quantized))
    with torch.no_grad():
        plain, found = model(**x).logits, quantized(**x).logits
    assert 0 < (found - plain).norm() / plain.norm() < 0.1


def test_answers_do_not_depend_on_the_batch_and_survive_eight_bits(asked, processor) -> None:
    model = llava()
    together = answer(model, processor, asked, prompt=PROMPT, batch_size=5, max_new_tokens=3)
    alone = answer(model, processor, asked, prompt=PROMPT, batch_size=1, max_new_tokens=3)
    assert together == alone and all(len(text.split()) <= 3 for text in together) and any(together)
    quantized = quantize(model, w_bits=8, a_bits=8, calibration=batch())
    assert len(answer(quantized, processor, asked, prompt=PROMPT, max_new_tokens=3)) == 5
    with pytest.raises(ValueError, match="it needs {question} where"):
        answer(model, processor, asked, prompt="<image>")


def test_questions_are_read_or_refused_by_their_line(asked, tmp_path: Path) -> None:
    assert asked[2].question == "word2 word3 word4" and asked[2].answers == ("word2", "word39 word38")
    path = tmp_path / "questions.jsonl"
    cases = {
        '{"image": "0.png", "question": "q"}': "line 1 is no question .KeyError",
        "{": "line 1 is no question .JSONDecodeError",
        '{"image": "0.png", "question": "q", "answers": []}': "line 1 .*ValueError: answers is ..: give at least one",
        "": "has no questions",
    }
    for text, message in cases.items():
        path.write_text(text)
        with pytest.raises(ValueError, match=message):
            read_questions(path)
    path.write_text('{"image": "9.png", "question": "q", "answer": "a"}')
    with pytest.raises(FileNotFoundError, match="line 1: no picture at .*9.png"):
        read_questions(path)
    with pytest.raises(FileNotFoundError, match="no questions at"):
        read_questions(tmp_path / "none.jsonl")


def test_scores_are_those_of_gqa_and_docvqa() -> None:
    def question(*answers: str) -> Question:
        return Question(Path("x"), "q", answers)

    assert exact_match(["The Dog.", "cat"], [question("dog"), question("dogs")]) == 0.5
    assert anls(["abd"], [question("abc")]) == pytest.approx(2 / 3)
    assert anls(["axx"], [question("abc")]) == 0.0  # less than half is wrong
    assert anls(["kitten"], [question("sitting", "kitte")]) == pytest.approx(5 / 6)
    assert anls([" 31  MAY"], [question("31 may")]) == 1.0
