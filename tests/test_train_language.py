"""``s2d train language``: a tiny Qwen2 on made sums, its answers alone in the loss; killed, resumed, refused."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from training import WORKER, largest_difference, picture, run, settings, weights

from s2d.command import main
from s2d.train.conversations import IGNORED, Conversation, encode, read_conversations

WORDS = "<pad> <unk> </s> User: Assistant: <|user|> <|bot|> <|end|> what is plus ? so it ####".split()
TEMPLATE = (
    "{% for m in messages %}{{ '<|user|> ' if m.role == 'user' else '<|bot|> ' }}{{ m.content }} <|end|> {% endfor %}"
    "{% if add_generation_prompt %}<|bot|> {% endif %}"
)
SMALL = settings(
    batch_size=4, micro_batch_size=2, max_length=32, decay="s2d", tau=0.3, refresh_every=3, checkpoint_every=4,
    log_every=2, warmup_epochs=0.3,
)  # fmt: skip


def tokenizer(template: str | None = None):
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = [*WORDS, *map(str, range(20))]
    found = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    found.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(tokenizer_object=found, pad_token="<pad>", unk_token="<unk>", eos_token="</s>")
    fast.chat_template = template
    return fast


def write_sums(file: Path, count: int, first: int = 0) -> Path:
    rows = []
    for i in range(first, first + count):
        a, b = i % 7, (3 * i) % 9
        rows.append({"question": f"what is {a} plus {b} ?", "answer": f"so it is #### {a + b}"})
    file.write_text("\n".join(map(json.dumps, rows)) + "\n")
    return file


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model of random weights, and sums to train and to validate on."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    root = tmp_path_factory.mktemp("language")
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=len(WORDS) + 20, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, attention_dropout=0.1,
    )  # fmt: skip
    Qwen2ForCausalLM(config).to(torch.bfloat16).save_pretrained(root / "model")  # as hubs have them
    tokenizer().save_pretrained(root / "model")
    write_sums(root / "train.jsonl", 26)
    write_sums(root / "val.jsonl", 6, 100)
    return root


def arguments(here: Path, out: Path) -> list[str]:
    sources = ["--data", str(here / "train.jsonl"), "--val", str(here / "val.jsonl")]
    return ["language", str(here / "model"), *sources, "-o", str(out), "--cpu", *SMALL]


@pytest.fixture(scope="module")
def whole(here: Path) -> Path:
    """A run that was never interrupted."""
    assert main(["train", *arguments(here, here / "whole")]) == 0
    return here / "whole"


def history(out: Path) -> list[dict[str, str]]:
    with (out / "history.csv").open(newline="") as lines:
        return list(csv.DictReader(lines))


def fails(given: list[str], capsys: pytest.CaptureFixture, code: int = 2) -> str:
    """The one line of the error."""
    assert main(["train", *given]) == code
    out, err = capsys.readouterr()
    assert out == ""
    return next(line for line in err.splitlines() if line.startswith("error: "))


# --- what is trained on ---


def test_only_answers_and_their_end_are_in_the_loss():
    found = tokenizer(TEMPLATE)
    talk = [("user", "what is 1"), ("assistant", "so 2"), ("user", "plus 3 ?"), ("assistant", "it is 5")]
    row = encode(found, Conversation([{"role": role, "content": text} for role, text in talk]), 100)
    words = found.convert_ids_to_tokens(row["input_ids"])
    assert " ".join(words) == (
        "<|user|> what is 1 <|end|> <|bot|> so 2 <|end|> <|user|> plus 3 ? <|end|> <|bot|> it is 5 <|end|>"
    )
    kept = [word for word, label in zip(words, row["labels"], strict=True) if label != IGNORED]
    assert " ".join(kept) == "so 2 <|end|> it is 5 <|end|>"
    assert all(label in (IGNORED, token) for token, label in zip(row["input_ids"], row["labels"], strict=True))


def test_a_tokenizer_without_a_template_gets_plain_turns_that_end():
    found = tokenizer()
    turns = [{"role": "user", "content": "what is 1"}, {"role": "assistant", "content": "so 2"}]
    row = encode(found, Conversation(turns), 6)
    assert found.convert_ids_to_tokens(row["input_ids"]) == ["User:", "what", "is", "1", "Assistant:", "so"]
    assert [label != IGNORED for label in row["labels"]] == [False] * 5 + [True]


def test_a_template_that_rewrites_earlier_turns_is_refused():
    template = "{% for m in messages %}{{ loop.revindex }} {{ m.content }} {% endfor %}"
    turns = [{"role": role, "content": "what"} for role in ("user", "assistant")] * 2
    with pytest.raises(ValueError, match="rewrites earlier turns"):
        encode(tokenizer(template), Conversation(turns), 10)


def test_messages_and_a_hugging_face_table_are_read_like_questions(tmp_path):
    datasets = pytest.importorskip("datasets")
    turns = [{"role": "user", "content": "what ?"}, {"role": "assistant", "content": "it"}]
    (tmp_path / "a.jsonl").write_text(json.dumps({"messages": turns}) + "\n")
    (tmp_path / "b.jsonl").write_text(json.dumps({"question": "what ?", "answer": "it"}) + "\n")
    datasets.Dataset.from_list([{"messages": turns}]).to_parquet(tmp_path / "set" / "train.parquet")
    for source in (tmp_path / "a.jsonl", tmp_path / "b.jsonl", f"hfds/{tmp_path / 'set'}:train"):
        assert read_conversations(str(source), "--data") == [Conversation(turns)]


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("no json", "line 1 is not JSON"),
        ('{"text": "a"}', "row 1 has neither messages nor question and answer: it has text"),
        ('{"messages": [{"role": "user", "content": "a"}]}', "row 1 has no answer"),
        ('{"messages": [{"role": "robot", "content": "a"}]}', "a message needs role"),
        ('{"question": "a", "answer": 5}', "content, a text"),
        ('{"question": "a", "answer": "b", "image": "gone.png"}', "row 1: there is no picture .*gone.png"),
        ("", "holds no conversations"),
    ],
)
def test_a_row_that_is_no_conversation_is_named(line, says, tmp_path):
    (tmp_path / "a.jsonl").write_text(line + "\n")
    with pytest.raises(ValueError, match=says):
        read_conversations(str(tmp_path / "a.jsonl"), "--data")


# --- training ---


def test_a_run_leaves_a_checkpoint_that_eval_and_quantize_take(whole, here, tmp_path, capsys):
    text = tmp_path / "text.txt"
    text.write_text("what is 1 plus 2 ? so it is #### 3\n" * 20)
    options = ["--sequence-length", "16"]
    assert main(["eval", str(whole / "model"), "--test", str(text), *options]) == 0
    assert "perplexity" in capsys.readouterr().out
    assert main(["quantize", str(whole / "model"), "--calibration", str(text), "--images", "4", *options]) == 0
    assert weights(whole)["model.norm.weight"].dtype == torch.float32
    config = json.loads((whole / "model" / "config.json").read_text())
    assert config["use_cache"] and config["architectures"] == ["Qwen2ForCausalLM"]


def test_the_files_of_a_run(whole):
    rows = history(whole)
    assert [row["step"] for row in rows] == ["6", "12"]  # 26 conversations are six whole batches of 4
    assert float(rows[1]["val_loss"]) < float(rows[0]["val_loss"]) and float(rows[1]["s2d_components"]) > 0
    found = [t for name, t in weights(whole).items() if ".layers." in name and t.ndim == 2]
    exact = max(torch.linalg.matrix_norm(t.double(), 2).item() for t in found)
    assert float(rows[1]["sigma_1"]) == pytest.approx(exact, rel=2e-3)
    done = json.loads((whole / "done.json").read_text())
    assert done["steps"] == 12 and done["val_loss"] == float(rows[1]["val_loss"])


def test_killed_in_the_middle_of_a_checkpoint_and_resumed_it_ends_with_the_same_bits(whole, here):
    """The Trainer writes a checkpoint file by file: a half one must not be resumed from."""
    out = here / "killed"
    killed = run([str(WORKER), "8", "0", *arguments(here, out)])
    assert killed.returncode == -9, killed.stderr
    left = sorted(path.name for path in (out / "checkpoints").glob("checkpoint-*"))
    assert left == ["checkpoint-4", "checkpoint-8"]
    assert main(["train", *arguments(here, out)]) == 0
    assert largest_difference(out, whole) == 0
    mine, other = ([{**row, "seconds": ""} for row in history(folder)] for folder in (out, whole))
    assert mine == other


def small_llava(folder: Path) -> None:
    """A LLaVA of random weights whose pictures are 4 tokens, with its processor."""
    import transformers

    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
    words = tokenizer()
    words.add_special_tokens({"additional_special_tokens": ["<image>"]})
    torch.manual_seed(0)
    config = transformers.LlavaConfig(
        vision_config=transformers.SiglipVisionConfig(**sizes, image_size=8, patch_size=4, vision_use_head=False),
        text_config=transformers.Qwen2Config(**sizes, vocab_size=len(words), num_key_value_heads=2),
        image_token_index=words.convert_tokens_to_ids("<image>"),
        vision_feature_select_strategy="full",
        pad_token_id=0,
    )
    transformers.LlavaForConditionalGeneration(config).save_pretrained(folder)
    pixels = transformers.SiglipImageProcessor(size={"height": 8, "width": 8})
    options = {"patch_size": 4, "vision_feature_select_strategy": "full", "image_token": "<image>"}
    transformers.LlavaProcessor(pixels, words, **options).save_pretrained(folder)


def test_a_vision_language_model_is_fine_tuned_on_questions_about_pictures(here, tmp_path, capsys):
    small_llava(tmp_path / "llava")
    rows = []
    for i in range(8):
        picture(i % 3, [0, i]).save(tmp_path / f"{i}.png")
        rows.append({"image": f"{i}.png", "question": "what is it ?", "answer": f"it is {i % 3}"})
    rows.append({"question": "what is 1 plus 2 ?", "answer": "3"})  # and one without
    (tmp_path / "train.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    sources = ["--data", str(tmp_path / "train.jsonl"), "-o", str(tmp_path / "run"), "--cpu"]
    few = settings(epochs=4, batch_size=3, max_length=24, decay="s2d", tau=0.3, refresh_every=2, lr=1e-2)
    assert main(["train", "language", str(tmp_path / "llava"), *sources, *few]) == 0
    losses = [float(row["train_loss"]) for row in history(tmp_path / "run")]
    assert losses[-1] < losses[0] - 0.5
    before, after = load_file(tmp_path / "llava" / "model.safetensors"), weights(tmp_path / "run")
    tower = next(name for name in before if "vision_tower" in name and name.endswith("layers.0.mlp.fc1.weight"))
    assert before.keys() == after.keys() and not torch.equal(before[tower], after[tower])
    assert (tmp_path / "run" / "model" / "processor_config.json").exists()
    capsys.readouterr()
    told = fails(["language", str(here / "model"), *sources[:2], "-o", str(tmp_path / "x"), "--cpu", *few], capsys)
    assert "has pictures, and the model sees none" in told


@pytest.mark.parametrize(
    ("given", "says"),
    [
        (["--set", "max_len=5"], "did you mean 'max_length'?"),
        (["--set", "max_length=2"], "no conversation has an answer within max_length 2"),
        (["--set", "batch_size=64", "micro_batch_size=64"], "has 26 conversations, batch_size is 64"),
        (["--set", "qat_w_bits=4", "qat_a_bits=4", "decay=none"], "qat_w_bits is for s2d train vision"),
        (["--data", "nowhere.jsonl"], "--data nowhere.jsonl does not exist"),
        (["--arch", "vit_tiny_patch16_224"], "--arch is not for a language model"),
    ],
)
def test_what_cannot_be_trained_is_refused_before_anything_is_written(given, says, here, tmp_path, capsys):
    told = fails([*arguments(here, tmp_path / "run"), *given], capsys)
    assert says in told and not (tmp_path / "run").exists()
