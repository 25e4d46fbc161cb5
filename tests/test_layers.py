"""Which layers are watched. The oracle is the list written down by hand for each model."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from s2d.layers import linear_layers


class Block(nn.Module):
    """A transformer block as far as names go."""

    def __init__(self, width: int = 4) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.mlp = nn.ModuleDict({"fc1": nn.Linear(width, 8), "fc2": nn.Linear(8, width)})


class Vit(nn.Module):
    """Stem, blocks and head, with a Linear layer in each."""

    def __init__(self, depth: int = 2) -> None:
        super().__init__()
        self.embed = nn.Linear(6, 4)
        self.blocks = nn.Sequential(*(Block() for _ in range(depth)))
        self.head = nn.Linear(4, 3)


FFN = ["blocks.0.mlp.fc1", "blocks.0.mlp.fc2", "blocks.1.mlp.fc1", "blocks.1.mlp.fc2"]


def test_default_is_the_linears_inside_the_blocks() -> None:
    model = Vit()
    found = linear_layers(model)
    assert list(found) == FFN
    assert all(found[name] is model.get_submodule(name) for name in FFN)


def test_every_block_counts_whatever_the_depth() -> None:
    assert len(linear_layers(Vit(depth=11))) == 22
    assert "blocks.10.mlp.fc2" in linear_layers(Vit(depth=11))


@pytest.mark.parametrize("container", [nn.Sequential, lambda *blocks: nn.ModuleList(blocks)])
def test_blocks_at_the_top_of_a_container(container) -> None:
    assert list(linear_layers(container(Block(), nn.GELU(), Block()))) == [
        "0.mlp.fc1",
        "0.mlp.fc2",
        "2.mlp.fc1",
        "2.mlp.fc2",
    ]


def test_blocks_of_two_towers() -> None:
    model = nn.ModuleDict({"visual": Vit(), "text": Vit()})
    assert list(linear_layers(model)) == [f"{tower}.{name}" for tower in ("visual", "text") for name in FFN]


def test_blocks_inside_blocks_are_listed_once() -> None:
    stage = nn.Sequential(Block(), Block())
    model = nn.Sequential(nn.Sequential(stage, nn.Sequential(Block(), Block())), nn.Linear(4, 2))
    names = list(linear_layers(model))
    assert len(names) == len(set(names)) == 8
    assert "1" not in names


def test_without_blocks_every_linear_counts() -> None:
    assert list(linear_layers(nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 1)))) == ["0", "2"]


def test_a_single_block_is_no_repetition() -> None:
    assert list(linear_layers(Vit(depth=1))) == ["embed", "blocks.0.mlp.fc1", "blocks.0.mlp.fc2", "head"]


def test_a_list_of_linears_is_no_list_of_blocks() -> None:
    model = nn.ModuleDict({"vit": Vit(), "adapters": nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)])})
    assert list(linear_layers(model)) == [f"vit.{name}" for name in FFN]


def test_a_bare_linear() -> None:
    layer = nn.Linear(3, 2)
    assert linear_layers(layer) == {"": layer}


def test_subclasses_of_linear_count_and_other_layers_do_not() -> None:
    class Special(nn.Linear):
        pass

    assert list(linear_layers(nn.Sequential(Special(2, 2), nn.Conv1d(2, 2, 1), nn.Bilinear(2, 2, 2)))) == ["0"]


@pytest.mark.parametrize(
    ("include", "exclude", "expected"),
    [
        ("*.fc1", (), [FFN[0], FFN[2]]),
        (["*.fc1", "head"], (), [FFN[0], FFN[2], "head"]),
        ("*", (), ["embed", *FFN, "head"]),
        ("head", (), ["head"]),
        (None, "blocks.0.*", FFN[2:]),
        (None, ["*.fc2", "head"], [FFN[0], FFN[2]]),
        ("*", ["embed", "head"], FFN),
        ("blocks.[!0].mlp.*", (), FFN[2:]),
    ],
)
def test_include_and_exclude(include, exclude, expected: list[str]) -> None:
    assert list(linear_layers(Vit(), include=include, exclude=exclude)) == expected


def test_a_tied_weight_appears_once_under_its_first_name() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4), nn.Linear(4, 4))
    model[2].weight = model[0].weight
    assert list(linear_layers(model)) == ["0", "3"]


def test_equal_values_are_no_tie() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))
    model[2].load_state_dict(model[0].state_dict())
    assert list(linear_layers(model)) == ["0", "2"]


def test_a_layer_used_under_two_names_appears_once() -> None:
    layer = nn.Linear(4, 4)
    assert list(linear_layers(nn.Sequential(layer, nn.ReLU(), layer))) == ["0"]


def test_no_linear_layer_is_refused() -> None:
    with pytest.raises(ValueError, match="Conv2d has no nn.Linear layer"):
        linear_layers(nn.Conv2d(1, 1, 3))


@pytest.mark.parametrize("choice", [{"include": "*.fc3"}, {"exclude": "*.fc3"}, {"include": ["head", "*.fc3"]}])
def test_a_pattern_that_matches_nothing_is_named_with_what_there_is(choice: dict) -> None:
    with pytest.raises(ValueError, match=r"'\*\.fc3' matches no Linear layer.*blocks\.0\.mlp\.fc1"):
        linear_layers(Vit(), **choice)


@pytest.mark.parametrize("choice", [{"exclude": "*"}, {"include": "head", "exclude": "head"}, {"include": []}])
def test_a_choice_that_leaves_nothing_is_refused(choice: dict) -> None:
    with pytest.raises(ValueError, match="leave none of: embed"):
        linear_layers(Vit(), **choice)


def test_the_model_is_left_alone() -> None:
    model = Vit()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    linear_layers(model)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert model.training
