"""What a run will take. Oracles: operations and bytes counted by hand, speeds that the samples were made from."""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path

import pytest
import torch
from torch import nn

from s2d import estimate as module
from s2d import linear_maps
from s2d.command import estimate as command
from s2d.command import main
from s2d.estimate import (
    Amount,
    Sample,
    Speed,
    WatchedWeight,
    Work,
    count_work,
    fit_speed,
    load_speed,
    measure_speed,
    predict,
    speed_as_text,
)

ROOT = Path(__file__).resolve().parents[1]
SPEED = Speed("toy", "float32", False, 1e-12, 1e-10, 1e-6, 1e-9, (1e-4, 1e-9), (1e-3, 1e-12, 1e-10), 0.2)
WORK = Work(
    name="two layers",
    precision="float32",
    parameters=10**6,
    flops=Amount(1e9, 2e9),
    traffic=Amount(1e6, 1e7),
    saved=Amount(0, 5e6),
    calls=1000,
    weights=(WatchedWeight((300, 200), 30, 6), WatchedWeight((200, 300), 20, 8)),
)


# --- the prediction ---------------------------------------------------------------------------------------------------


def test_the_prediction_by_hand() -> None:
    found = predict(WORK, SPEED, steps=250, batch_size=4, accumulate=2)
    passes = 1e-12 * 9e9 + 1e-10 * 4.1e7 + 1e-6 * 1000
    step = 2 * passes + 1e-9 * 10**6
    penalty = 2 * (1e-4 + 1e-9 * 60_000)
    product = 1e-3 + 1e-12 * 60_000 * 8 + 1e-10 * 500 * 64
    added = 250 * penalty + product * (50 + 2 * 14) + 3 * 2 * passes / 3
    assert found.step_seconds == pytest.approx(step)
    assert found.penalty_seconds == pytest.approx(penalty)
    assert found.first_refresh_seconds == pytest.approx(50 * product)
    assert found.refresh_seconds == pytest.approx(14 * product)
    assert found.watch_seconds == pytest.approx(2 * passes / 3)
    assert found.hours == pytest.approx((250 * step + added) / 3600) == found.device_hours
    assert found.overhead == pytest.approx(added / (250 * step))
    assert found.items_per_second == pytest.approx(250 * 8 / (250 * step + added))
    assert found.memory["weights"] == found.memory["gradients"] == 4e6 and found.memory["optimizer"] == 8e6
    assert found.memory["activations"] == 2e7 and found.memory["s2d"] == 4 * 2 * (3 * 502 + 3)
    assert found.checkpoint_bytes == 12 * 10**6 + found.memory["s2d"] and found.margin == 0.2


def test_what_is_queued_is_not_waited_for() -> None:
    queued = SPEED._replace(overlaps=True, call=1e-4)
    assert predict(WORK, queued, steps=1, batch_size=1).step_seconds == pytest.approx(1000 * 1e-4 + 1e-3)
    fast = queued._replace(call=1e-9)
    assert predict(WORK, fast, steps=1, batch_size=1).step_seconds == pytest.approx(3e-3 + 1.1e-3 + 1e-3)


def test_more_components_more_devices_and_other_criteria() -> None:
    def of(**options) -> module.Estimate:
        return predict(WORK, SPEED, **({"steps": 1000, "batch_size": 4} | options))

    plain = of()
    assert of(k_max=10).refresh_seconds > plain.refresh_seconds and of(k_max=10).penalty_seconds > plain.penalty_seconds
    assert of(devices=2).refresh_seconds == pytest.approx(plain.refresh_seconds / 2)
    assert of(devices=8).refresh_seconds == pytest.approx(plain.refresh_seconds / 2)  # there are two layers
    assert of(devices=4).device_hours == pytest.approx(4 * of(devices=4).hours)
    assert of(criterion="all").watch_seconds == 0 < plain.watch_seconds
    assert of(refresh_every=10).overhead > plain.overhead > of(refresh_every=1000).overhead


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 0}, "steps is 0: give a whole number"),
        ({"batch_size": 1.5}, "batch_size is 1.5"),
        ({"devices": True}, "devices is True"),
        ({"criterion": "energy"}, "criterion is 'energy': choose one of"),
    ],
)
def test_a_bad_run_is_refused(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        predict(WORK, SPEED, **({"steps": 1, "batch_size": 1} | options))


def test_a_speed_of_another_precision_is_refused() -> None:
    with pytest.raises(ValueError, match="two layers was counted in float32, and toy measured in bf16"):
        predict(WORK, SPEED._replace(precision="bf16"), steps=1, batch_size=1)


# --- what a step asks for ---------------------------------------------------------------------------------------------


def test_operations_and_bytes_by_hand() -> None:
    model = nn.Sequential(nn.Linear(20, 10, bias=False), nn.ReLU(), nn.Linear(10, 5, bias=False))
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    work = count_work(model, lambda n: model(torch.ones(n, 20)).sum(), linear_maps(model), name="mlp")
    # Two products of the first layer, whose input needs no gradient, and three of the second.
    assert work.flops == Amount(0.0, 2 * (2 * 200 + 3 * 50))
    # Kept are the input and what the ReLU gives, which is the input of the second layer: one tensor.
    assert work.saved == Amount(0.0, 4 * (20 + 10))
    assert work.parameters == 250 and work.traffic.item > 4 * (20 + 10 + 10 + 5) and work.calls > 5
    # Weights are read in the forward pass, the second one in the backward pass too, and two gradients are written.
    assert work.traffic.fixed == pytest.approx(4 * (250 + 50 + 250), rel=0.02)
    assert [w.shape for w in work.weights] == [(10, 20), (5, 10)]
    assert all(bool((parameter.grad == 1).all()) for parameter in model.parameters())


def test_a_transformer_block_has_the_operations_of_the_textbook() -> None:
    width, tokens = 64, 32
    block = nn.TransformerEncoderLayer(width, 2, 4 * width, 0.0, batch_first=True)
    x = torch.randn(3, tokens, width, requires_grad=True)
    work = count_work(block, lambda n: block(x[:n]).square().mean(), {})
    textbook = 3 * (2 * 12 * width**2 * tokens + 2 * 2 * tokens**2 * width)  # the backward pass is two of the forward
    assert work.flops.item == pytest.approx(textbook, rel=0.05) and work.flops.fixed < 0.01 * textbook


def test_a_flat_spectrum_takes_more_products_than_one_with_gaps() -> None:
    generator = torch.Generator().manual_seed(0)
    layer = nn.Linear(300, 300, bias=False)
    layer.weight.data = torch.randn(300, 300, generator=generator) / 35
    flat = count_work(layer, lambda n: layer(torch.ones(n, 300)).sum(), linear_maps(layer)).weights[0]
    layer.weight.data[:3, :3] += torch.diag(torch.tensor([30.0, 20.0, 10.0]))
    gaps = count_work(layer, lambda n: layer(torch.ones(n, 300)).sum(), linear_maps(layer)).weights[0]
    assert flat.warm > gaps.warm >= 1 and flat.cold >= flat.warm


def test_what_cannot_be_counted_is_refused() -> None:
    layer = nn.Linear(4, 2)
    maps = linear_maps(layer)
    with pytest.raises(ValueError, match="return a scalar that depends on trained parameters"):
        count_work(layer, lambda n: layer(torch.ones(n, 4)), maps)
    with pytest.raises(ValueError, match="return a scalar that depends on trained parameters"):
        count_work(layer, lambda n: torch.ones(()), maps)
    with pytest.raises(ValueError, match="precision is 'int8': choose one of float32, bf16"):
        count_work(layer, lambda n: layer(torch.ones(n, 4)).sum(), maps, precision="int8")
    with pytest.raises(ValueError, match=r"k_max is 3, but layer  has shape \(2, 4\): lower it"):
        count_work(layer, lambda n: layer(torch.ones(n, 4)).sum(), maps)


# --- the speed of a device --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("overlaps", [False, True])
def test_the_fit_finds_the_speed_that_made_the_samples(overlaps: bool) -> None:
    truth = SPEED._replace(overlaps=overlaps, call=1e-5)
    steps = [(1e3, 1e3), (1e10, 1e8), (4e10, 2e8), (9e10, 1e9)]
    samples = [
        Sample(flops, traffic, 100, module._pass_seconds(truth, flops, traffic, 100)) for flops, traffic in steps
    ]
    found = fit_speed(samples, device="toy", precision="float32", overlaps=overlaps)
    assert found.flop == pytest.approx(truth.flop, rel=1e-3) and found.byte == pytest.approx(truth.byte, rel=1e-3)
    assert found.call == pytest.approx(truth.call, rel=1e-3) and found.margin == module.LEAST_MARGIN
    assert fit_speed(samples, device="", precision="float32", overlaps=overlaps, margin=0.4).margin == 0.4


def test_no_coefficient_is_negative_and_what_the_fit_leaves_is_the_margin() -> None:
    samples = [
        Sample(1e3, 1, 10, 1e-4),
        Sample(1e9, 1e9, 10, 1.0),
        Sample(2e9, 1e9, 10, 1.0),
        Sample(2e9, 3e9, 10, 1.5),
    ]
    found = fit_speed(samples, device="toy", precision="float32", overlaps=True)
    assert min(found.flop, found.byte, found.call) >= 0
    ratios = [module._pass_seconds(found, s.flops, s.traffic, s.calls) / s.seconds for s in samples[1:]]
    assert found.margin == pytest.approx(max(module.LEAST_MARGIN, *(abs(ratio - 1) for ratio in ratios)))
    with pytest.raises(ValueError, match="1 samples"):
        fit_speed(samples[:1], device="toy", precision="float32", overlaps=True)


def test_measuring_by_a_clock_of_our_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "REFRESH_WIDTHS", (160, 200, 256))
    monkeypatch.setattr(module, "CALIBRATION_WIDTHS", (64, 128))
    monkeypatch.setattr(module, "PENALTY_LAYERS", ((32, 4), (64, 2)))
    ticks, said = itertools.count(), []
    found = measure_speed(seconds=1, clock=lambda: float(next(ticks)), progress=said.append)
    coefficients = [found.flop, found.byte, found.call, found.parameter, *found.penalty, *found.product]
    assert all(math.isfinite(value) and value >= 0 for value in coefficients) and found.parameter > 0 < found.call
    assert found.device == module.device_name("cpu") and not found.overlaps and len(said) == 4
    with pytest.raises(ValueError, match="seconds is 0: give how long to measure"):
        measure_speed(seconds=0)


def test_a_speed_in_a_file(tmp_path: Path) -> None:
    path = tmp_path / "speed.json"
    path.write_text(speed_as_text(SPEED))
    assert load_speed(path) == SPEED
    good = SPEED._asdict()
    for change, message in (
        ({"flop": -1.0}, "a number in .* is -1.0"),
        ({"margin": math.nan}, "a number in .* is nan"),
        ({"penalty": [1.0]}, "penalty"),
        ({"precision": "int8"}, "precision is 'int8'"),
        ({"more": 1}, "holds no speed"),
    ):
        path.write_text(json.dumps(good | change))
        with pytest.raises(ValueError, match=message):
            load_speed(path)
    for text in ("[]", "no json", "{}"):
        path.write_text(text)
        with pytest.raises(ValueError, match="give a file that s2d estimate --save-speed has written"):
            load_speed(path)
    with pytest.raises(ValueError, match="cannot be read as a speed"):
        load_speed(tmp_path / "none.json")


@pytest.mark.parametrize("path", sorted((ROOT / "data" / "accelerator").glob("speed_*.json")), ids=lambda p: p.stem)
def test_the_committed_speeds_can_be_read(path: Path) -> None:
    assert load_speed(path).flop > 0


# --- the command ------------------------------------------------------------------------------------------------------

SHAPE = {"img_size": 16, "patch_size": 8, "embed_dim": 16, "depth": 2, "num_heads": 2, "num_classes": 3}
MODEL = ["vit_tiny_patch16_224", "--model-options", json.dumps(SHAPE)]


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    Path("speed.json").write_text(speed_as_text(SPEED))
    return tmp_path


def test_the_command_predicts_from_a_stored_speed(here: Path, capsys: pytest.CaptureFixture) -> None:
    options = ["--speed", "speed.json", "--steps", "500", "--batch-size", "4", "--json", "out.json", "--devices", "2"]
    assert main(["estimate", *MODEL, *options, "--checkpoints", "3"]) == 0
    out = capsys.readouterr().out
    assert "vit_tiny_patch16_224, float32: 8 layers watched" in out and "on toy" in out and "give or take 20 %" in out
    result = json.loads(Path("out.json").read_text())
    assert result["run"]["steps"] == 500 and result["device"] == "toy"
    again = Work(**result["work"])
    again = again._replace(
        **{name: Amount(*result["work"][name]) for name in ("flops", "traffic", "saved")},
        weights=tuple(WatchedWeight(tuple(shape), *rest) for shape, *rest in result["work"]["weights"]),
    )
    assert predict(again, SPEED, **result["run"])._asdict() == result["estimate"]
    assert result["checkpoints_bytes"] == 3 * result["estimate"]["checkpoint_bytes"]


def test_the_command_measures_and_keeps_the_speed(here: Path, capsys, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = {}

    def measured(device: str, **options) -> Speed:
        asked.update(options, device=device)
        return SPEED._replace(precision="bf16")

    monkeypatch.setattr(command, "measure_speed", measured)
    options = ["--precision", "bf16", "--seconds", "7", "--save-speed", "new.json", "--criterion", "spectral"]
    assert main(["estimate", *MODEL, *options]) == 0
    assert (asked["device"], asked["precision"], asked["seconds"]) == ("cpu", "bf16", 7.0)
    assert load_speed("new.json").precision == "bf16"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([*MODEL, "--speed", "none.json"], "none.json cannot be read as a speed"),
        ([*MODEL, "--speed", "speed.json", "--precision", "bf16"], "was measured in float32, and --precision is bf16"),
        ([*MODEL, "--precision", "int4"], "--precision is 'int4': choose one of float32, bf16"),
        ([*MODEL, "--criterion", "energy"], "--criterion is 'energy': choose one of activation, spectral, all"),
        ([*MODEL, "--seconds", "0"], "--seconds is 0: give 1 to 3600"),
        ([*MODEL, "--steps", "0"], "'0' is not a whole number of 1 or more"),
        ([*MODEL, "--json", "no/such/folder/x.json"], "--json no/such/folder/x.json cannot be written"),
        (["no_such_model"], "no_such_model"),
        ([*MODEL, "--speed", "speed.json", "--k-max", "30"], r"k_max is 30, but layer blocks.0.attn.qkv has shape"),
    ],
)
def test_the_command_refuses(arguments: list[str], message: str, here: Path, capsys: pytest.CaptureFixture) -> None:
    assert main(["estimate", *arguments]) == 2
    out, err = capsys.readouterr()
    errors = [line for line in err.splitlines() if line.startswith("error: ")]
    assert out == "" and len(errors) == 1 and message in errors[0]
