"""Recipes and settings of ``s2d train``: what is known, what is refused, what a recipe says, and from where."""

from __future__ import annotations

import dataclasses
import re

import pytest
import torch
import yaml

from s2d import SelectiveSpectralDecay
from s2d.train.processes import check_precision, share_of
from s2d.train.settings import RECIPES, LanguageSettings, VisionSettings, read_settings, recipe_names

PAPER = {"lam": 5e-4, "power": 2, "tau": 0.95, "k_max": 3, "refresh_every": 100}


def kind(recipe: str) -> type:
    return LanguageSettings if recipe.startswith("language") else VisionSettings


@pytest.mark.parametrize("recipe", recipe_names())
def test_a_recipe_is_read_and_each_of_its_values_says_where_it_comes_from(recipe):
    found = read_settings(kind(recipe), recipe)
    text = (RECIPES / f"{recipe}.yaml").read_text()
    for name in yaml.safe_load(text):
        line = next(line for line in text.splitlines() if line.startswith(f"{name}:"))
        assert name == "decay" or re.search(r"# \[(A|M|ours)\]", line), line
    if "s2d" in recipe or "pcdr" in recipe:
        assert {name: getattr(found, name) for name in PAPER} == PAPER
        assert found.criterion == ("all" if "pcdr" in recipe else "activation")
    else:
        assert found.decay == "none"


def test_the_arms_differ_in_the_decay_alone():
    for start in ("vision", "language"):
        adamw, s2d, no_pcdr = (
            dataclasses.asdict(read_settings(kind(start), f"{start}-{arm}")) for arm in ("adamw", "s2d", "no-pcdr")
        )
        assert {name for name in adamw if adamw[name] != s2d[name]} == {"decay"}
        assert {name for name in s2d if s2d[name] != no_pcdr[name]} == {"criterion"}


def test_the_settings_of_s2d_are_those_of_the_class():
    SelectiveSpectralDecay(torch.nn.Linear(4, 4), **VisionSettings(decay="s2d").s2d())


def test_what_is_set_wins_over_the_recipe_and_a_file_is_a_recipe_too(tmp_path):
    (tmp_path / "mine.yaml").write_text("lr: 1e-4\nk_max: null\nmixup: 0.2\n")
    found = read_settings(VisionSettings, tmp_path / "mine.yaml", ["lr=2e-4", "lr=3e-4", "auto_augment=rand-m9"])
    assert (found.lr, found.k_max, found.mixup, found.auto_augment) == (3e-4, None, 0.2, "rand-m9")


@pytest.mark.parametrize(
    ("sets", "says"),
    [
        (["learning_rate=1"], "'learning_rate' is no setting: .*There are epochs, batch_size"),
        (["weightdecay=1"], "did you mean 'weight_decay'"),
        (["lr"], "--set 'lr' is not of the form NAME=VALUE"),
        (["lr=fast"], "lr is 'fast': give a number from 0 to 10"),
        (["lr=.nan"], "lr is nan"),
        (["lr=null"], "lr is None"),
        (["epochs=1.5"], "epochs is 1.5: give a whole number of 1 or more"),
        (["epochs=true"], "epochs is True"),
        (["tau=1.2"], "tau is 1.2: give a number from 1e-09 to 1"),
        (["decay=muon"], "decay is 'muon': choose none, s2d"),
        (["compile=1"], "compile is 1: give true or false"),
        (["qat_w_bits=4"], "belong together"),
        (["qat_w_bits=9", "qat_a_bits=4"], "qat_w_bits is 9"),
        (["qat_w_bits=4", "qat_a_bits=4", "decay=s2d"], "do not go together"),
        (["ema_decay=0.9", "sharding=fsdp2"], "sharding=fsdp2 and ema_decay"),
        (["ema_decay=0.9", "qat_w_bits=4", "qat_a_bits=4"], "ema_decay and qat_w_bits"),
        (["warmup_epochs=10"], "warmup_epochs is 10 of 10 epochs"),
        (["mixup=0.2", "micro_batch_size=3"], "mixup pairs images"),
        (["max_length=5"], "'max_length' is no setting"),
    ],
)
def test_what_is_no_setting_is_refused(sets, says):
    with pytest.raises(ValueError, match=says):
        read_settings(VisionSettings, None, sets)


@pytest.mark.parametrize(("text", "says"), [("- 1", "holds no names"), ("a: [", "is no YAML"), ("tao: 1", "'tau'")])
def test_a_file_that_is_no_recipe_is_refused(text, says, tmp_path):
    (tmp_path / "mine.yaml").write_text(text)
    with pytest.raises(ValueError, match=says):
        read_settings(VisionSettings, tmp_path / "mine.yaml")


def test_processes_share_a_batch_evenly_or_not_at_all():
    assert share_of(VisionSettings(batch_size=24), 2) == (12, 1)
    assert share_of(VisionSettings(batch_size=24, micro_batch_size=4), 3) == (4, 2)
    with pytest.raises(ValueError, match="batch_size is 24, 5 processes cannot share it evenly"):
        share_of(VisionSettings(batch_size=24), 5)
    with pytest.raises(ValueError, match="no multiple of micro_batch_size 8 times 2 processes"):
        share_of(VisionSettings(batch_size=24, micro_batch_size=8), 2)


def test_bf16_is_refused_where_it_is_not_supported(monkeypatch):
    settings = VisionSettings(precision="bf16")
    check_precision(settings, torch.device("cpu"))
    with pytest.raises(ValueError, match="precision=bf16 is not supported by mps"):
        check_precision(settings, torch.device("mps"))
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: False)
    with pytest.raises(ValueError, match="precision=bf16 is not supported by cuda"):
        check_precision(settings, torch.device("cuda"))
