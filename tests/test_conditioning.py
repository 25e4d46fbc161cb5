"""Standalone conditioning: what it lowers, what it keeps, when it stops, and that it goes on where it was."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from s2d.models.conditioning import FORMS, condition, cosines, item_vectors, output_of

WIDTH = 24


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def network() -> nn.Sequential:
    """Its second layer has a component that makes a spike, on an output that the third hardly reads."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, WIDTH), nn.Tanh(), nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 8))
    with torch.no_grad():
        model[2].weight[5] += 6 * nn.functional.normalize(normal(WIDTH, seed=7), dim=0)
        model[3].weight[:, 5] *= 0.02
    return model


def _calls(model: nn.Sequential, x: Tensor) -> list[tuple[nn.Linear, Tensor]]:
    found = []
    for layer in model:
        found += [(layer, x)] * isinstance(layer, nn.Linear)
        x = layer(x)
    return found


def batch(step: int) -> Tensor:
    return normal(32, 16, seed=100 + step)


HELD = [normal(64, 16, seed=1), normal(64, 16, seed=2)]
QUICK = {"steps": 60, "look_every": 15, "lr": 1e-3, "tau": 0.6}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_lowers_the_largest_activation_and_keeps_the_outputs(form: str) -> None:
    model, original = network(), network()
    # Through the gradient Adam moves a weight by about lr a step, whatever the strength.
    through_adam = {"lam": 1.0, "lr": 5e-3, "steps": 120}
    options = {"cap": {"cap": 1.5}, "decoupled": {"lam": 20.0}}.get(form, through_adam)
    done = condition(model, batch, HELD, form=form, **QUICK | options)
    first = done.looks[0]
    assert first.step == 0 and first.fidelity == pytest.approx(1.0) and first.layer == "2"
    assert done.chosen.max_abs < 0.9 * first.max_abs and done.within_budget and done.on_target is None
    with torch.no_grad():
        found = cosines(model(HELD[0]), original(HELD[0]))
    assert found.mean() > 0.97


def test_decay_stops_at_the_target_and_the_most_faithful_look_on_it_is_kept() -> None:
    model = network()
    goal = 0.6 * condition(network(), batch, HELD, **QUICK | {"steps": 1}).looks[0].max_abs
    done = condition(model, batch, HELD, target_max=goal, lam=20.0, **QUICK | {"steps": 90})
    met = [look for look in done.looks if look.max_abs <= goal]
    assert done.on_target and done.chosen.fidelity == max(look.fidelity for look in met if look.fidelity >= 0.98)
    assert all(look.decaying == (look.max_abs > goal) for look in done.looks)
    assert done.looks[-1].max_abs > 0.3 * goal  # decay did not go on to nothing


def test_the_model_has_the_weights_of_the_chosen_look() -> None:
    model = network()
    done = condition(model, batch, HELD, lam=20.0, **QUICK)
    with torch.no_grad():
        outputs = [layer(x) - layer.bias for x in HELD for layer, x in _calls(model, x)]
    assert max(y.abs().max().item() for y in outputs) == pytest.approx(done.chosen.max_abs, rel=1e-5)


def test_a_budget_that_nothing_keeps_gives_back_the_network_and_says_so() -> None:
    model = network()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    done = condition(model, batch, HELD, form="cap", cap=0.05, least_fidelity=1.0, **QUICK)
    assert done.chosen.step == 0
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("form", ["decoupled", "printed", "cap"])
def test_a_run_that_was_cut_off_ends_where_it_would_have(tmp_path: Path, form: str) -> None:
    options = QUICK | {"form": form} | ({"cap": 1.5} if form == "cap" else {})
    whole, cut = network(), network()
    expected = condition(whole, batch, HELD, **options)

    def stop(line: str) -> None:
        if line.startswith("step 45"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        condition(cut, batch, HELD, folder=tmp_path, progress=stop, **options)
    asked = []
    again = network()
    found = condition(again, lambda step: asked.append(step) or batch(step), HELD, folder=tmp_path, **options)
    assert asked == list(range(30, 60))  # from the state of the look before
    assert found.looks == expected.looks and found.chosen == expected.chosen
    assert all(torch.equal(value, whole.state_dict()[name]) for name, value in again.state_dict().items())


def test_a_state_of_other_settings_or_another_model_is_refused(tmp_path: Path) -> None:
    condition(network(), batch, HELD, folder=tmp_path, **QUICK)
    with pytest.raises(ValueError, match="other settings"):
        condition(network(), batch, HELD, folder=tmp_path, **QUICK | {"lr": 2e-3})
    with pytest.raises(ValueError, match="another model"):
        condition(nn.Sequential(nn.Linear(16, 8), nn.Linear(8, 8)), batch, HELD, folder=tmp_path, **QUICK)
    next(tmp_path.iterdir()).write_bytes(b"nonsense")
    with pytest.raises(ValueError, match="remove it to start anew"):
        condition(network(), batch, HELD, folder=tmp_path, **QUICK)


def test_labels_are_learned_beside() -> None:
    labels = torch.arange(32) % 8

    def loss(output: Tensor, step: int) -> Tensor:
        return nn.functional.cross_entropy(output, labels)

    def after(**options) -> float:
        model = network()
        settings = {"steps": 100, "look_every": 100, "lr": 5e-3, "least_fidelity": -1.0, "lam": 1.0}
        condition(model, lambda step: batch(0), HELD, **settings, **options)
        return loss(model(batch(0)), 0).item()

    assert after(loss=loss) < 0.95 * after()


def test_dropout_is_off_and_modes_are_as_they_were() -> None:
    model = nn.Sequential(nn.Linear(16, 8), nn.Dropout(0.9), nn.Linear(8, 4))
    done = condition(model, batch, HELD, steps=5, look_every=5)
    assert done.looks[0].fidelity == pytest.approx(1.0) and model[1].training


def test_padding_counts_neither_in_the_error_nor_in_the_fidelity() -> None:
    states = normal(2, 3, 4)
    other = states.clone()
    other[:, 2] += 100
    mask = {"attention_mask": torch.tensor([[1, 1, 0], [1, 1, 0]])}
    assert cosines(item_vectors(other, mask), item_vectors(states, mask)).tolist() == pytest.approx([1.0, 1.0])
    assert item_vectors(other, {}) is other


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"form": "harsh"}, "form is 'harsh'"),
        ({"form": "cap"}, "needs a cap"),
        ({"cap": 1.0}, "not for form='decoupled'"),
        ({"steps": 0}, "steps"),
        ({"lr": 0.0}, "lr"),
        ({"lr": float("nan")}, "lr"),
        ({"lam": -1.0}, "lam"),
        ({"tau": 2.0}, "tau"),
        ({"least_fidelity": 2.0}, "least_fidelity"),
        ({"target_max": 0.0}, "target_max"),
        ({"held": []}, "held is empty"),
        ({"lr": 1e30, "steps": 30}, "lower lr"),
    ],
)
def test_bad_options_are_refused(options: dict, message: str) -> None:
    held = options.pop("held", HELD)
    with pytest.raises(ValueError, match=message):
        condition(network(), batch, held, **{"look_every": 5} | options)


def test_a_model_without_linear_layers_or_output_is_refused() -> None:
    with pytest.raises(ValueError, match="[Nn]o linear layer|no linear"):
        condition(nn.Sequential(nn.Conv2d(3, 4, 3)), batch, HELD)
    with pytest.raises(ValueError, match="no floating-point tensor"):
        output_of(Numbers(), torch.zeros(2))


class Numbers(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.long()
