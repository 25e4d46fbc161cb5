"""Random bad calls of everything public: each is one error of ours that names what was wrong, and none is accepted.

A call is a good call of which one argument was exchanged for nonsense. Everything in ``s2d.__all__`` must be called,
but for the records that functions return.
"""

from __future__ import annotations

import math
import random
import traceback
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import s2d
from s2d.regularizer import SelectiveSpectralDecay

CALLS = 1500
# What functions return; nothing is computed from what one puts into them.
RECORDS = {"ActivationSummary", "BoundCheck", "SolvedTriplets", "SpectralNormBounds", "SingularTriplets"}

MATRIX = torch.arange(12.0).reshape(4, 3).cos()
TRIPLETS = s2d.top_singular_triplets(MATRIX, 2)

NO_NUMBERS = ["0.5", math.nan, math.inf, -math.inf, True, None, [1], {}, torch.ones(2), 1j, object(), -1, int]
NO_COUNTS = [0, -3, 2.5, "2", math.nan, True, [2], {}, torch.ones(1), object()]
NO_TENSORS = [None, "x", 1.0, [1.0], [[1.0]], {}, object(), torch.ones(2, 2, dtype=torch.int64), torch.ones(2) > 0]
NO_TENSORS += [
    torch.ones(2, 2, dtype=torch.complex64),
    torch.empty(2, 2, device="meta"),
    torch.eye(3).to_sparse(),
    nn.Linear,
]
NO_ACTIVATIONS = [value for value in NO_TENSORS if getattr(value, "dtype", None) != torch.int64]
NO_MATRICES = [*NO_TENSORS, torch.ones(3), torch.ones(()), torch.ones(2, 2, 2), torch.full((4, 3), math.nan)]
NO_VECTORS = [*NO_TENSORS, torch.ones(()), torch.ones(2, 2), torch.tensor([math.nan, 1.0]), torch.ones(7)]
NO_TRIPLETS = [
    5, "x", torch.ones(4, 2), (1, 2, 3), tuple(TRIPLETS), TRIPLETS._replace(u=None), TRIPLETS._replace(s=torch.ones(3)),
    TRIPLETS._replace(v=torch.ones(5, 2)), TRIPLETS._replace(u=torch.ones(2)), s2d.SingularTriplets("u", "s", "v"), {},
]  # fmt: skip
NO_MODELS = [None, "model", 5, [nn.Linear(2, 2)], {}, nn.Linear, torch.ones(2), nn.ReLU(), lambda x: x]
NO_SELECTORS = [5, 0.5, b"x", [1], [nn.Linear(2, 2)], "nothing", ["0", "nothing"], {}, nn.Linear, True, [None]]
NO_NAMES = [None, 5, "other", b"all", [], {}, True]
NO_BATCHES = [None, "x", 5, torch.ones(2, 9), torch.ones(2, 3, dtype=torch.int64), (), {"z": 1}, [torch.ones(2, 3)]]
NO_BATCHES += [torch.full((2, 3), math.nan), torch.ones(2, 3, dtype=torch.float16), torch.ones(2, 3, device="meta")]


def model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.GELU(), nn.Linear(4, 3))


def watch(modules: Any) -> None:
    with s2d.watch_activations(modules):
        net = modules["a"]
        net(torch.ones(2, 3))


def attach(owner: Any, *optimizers: Any) -> None:
    owner.attach(*optimizers)


def update(x: Any, y: Any) -> None:
    rows = s2d.OutlierRows(2)
    rows.update(torch.ones(2, 3), torch.ones(2, 4))
    rows.update(x, y)


def merge(magnitude: Any, neuron: Any, x: Any) -> None:
    rows = s2d.OutlierRows(2)
    rows.allocate(3, torch.float32, torch.device("cpu"))
    rows.merge(magnitude, neuron, x)


def state_of(make: Callable[[nn.Module], Any]) -> dict:
    owner = make(model())
    if isinstance(owner, SelectiveSpectralDecay):
        owner.refresh()
    return owner.state_dict()


def load(make: Callable[[nn.Module], Any], key: str) -> Callable[[Any], None]:
    return lambda value: make(model()).load_state_dict(state_of(make) | {key: value})


def decay(net: nn.Module) -> SelectiveSpectralDecay:
    return SelectiveSpectralDecay(net, criterion="all", k_max=2)


def cap(net: nn.Module) -> s2d.SpectralNormCap:
    return s2d.SpectralNormCap(net, cap=1.0)


def no(bad: list, *also_bad: Any, allowed: tuple = ()) -> list:
    """What is bad, without the values that this argument allows."""
    return [value for value in [*bad, *also_bad] if not any(value is good or value is True is good for good in allowed)]


NO_OPTIMIZERS = [None, 5, "SGD", {}, [], torch.optim.SGD, model(), object()]
NO_OPTIMIZERS += [torch.optim.SGD(model().parameters(), lr=0.1)]  # of another model

Case = tuple[str, Callable, dict[str, Any], dict[str, list]]
# Name in s2d.__all__, what is called, a good call, and for each argument what is bad.
CASES: list[Case] = [
    ("as_matrix", s2d.as_matrix, {"weight": MATRIX}, {"weight": NO_MATRICES}),
    (
        "top_singular_triplets",
        s2d.top_singular_triplets,
        {"weight": MATRIX, "k": 2, "warm_start": TRIPLETS, "tol": 1e-4, "max_products": 9, "oversample": 2},
        {
            "weight": NO_MATRICES,
            "k": [*NO_COUNTS, 4, None],
            "warm_start": NO_TRIPLETS[:3] + NO_TRIPLETS[5:],
            "tol": NO_NUMBERS,
            "max_products": NO_COUNTS,
            "oversample": NO_COUNTS,
        },
    ),
    (
        "solve_top_triplets",
        lambda weight, **rest: s2d.solve_top_triplets([weight, MATRIX], **rest),
        {"weight": MATRIX, "k": 2, "warm_starts": [None, TRIPLETS]},
        {
            "weight": NO_MATRICES,
            "k": [*NO_COUNTS, 4],
            "warm_starts": [5, [None], [5, 5], MATRIX, "ab", TRIPLETS, object()],
        },
    ),
    (
        "solve_top_triplets",
        s2d.solve_top_triplets,
        {"weights": [MATRIX], "k": 1},
        {"weights": [5, MATRIX, "x", {}, [5]]},
    ),
    (
        "spectral_norm_bounds",
        s2d.spectral_norm_bounds,
        {"weight": MATRIX, "rtol": 1e-3},
        {"weight": NO_MATRICES, "rtol": [*NO_NUMBERS, 1, 0]},
    ),
    (
        "cap_spectral_norm_",
        s2d.cap_spectral_norm_,
        {"weight": MATRIX.clone(), "cap": 9.0},
        {"weight": NO_MATRICES, "cap": [*NO_NUMBERS, 0]},
    ),
    (
        "spectral_penalty",
        s2d.spectral_penalty,
        {"s": torch.ones(2), "lam": 1.0, "power": 2},
        {"s": NO_VECTORS[:-1], "lam": NO_NUMBERS, "power": [*NO_NUMBERS, 0]},
    ),
    (
        "add_spectral_penalty_",
        s2d.add_spectral_penalty_,
        {"target": MATRIX.clone(), "triplets": TRIPLETS, "coefficients": torch.ones(2), "scale": 0.5},
        {
            "target": [*NO_MATRICES[:-1], torch.ones(3, 4)],
            "triplets": NO_TRIPLETS[:4] + NO_TRIPLETS[5:],
            "coefficients": NO_VECTORS,
            "scale": NO_NUMBERS[:-2],
        },
    ),
    (
        "penalty_cosine",
        s2d.penalty_cosine,
        {"a": TRIPLETS, "b": TRIPLETS, "power": 2, "rank": 1},
        {
            "a": NO_TRIPLETS[:4] + NO_TRIPLETS[5:],
            "b": NO_TRIPLETS[:4] + NO_TRIPLETS[5:],
            "power": [*NO_NUMBERS, 0],
            "rank": [*NO_COUNTS, 3],
        },
    ),
    (
        "activation_pcdr",
        s2d.activation_pcdr,
        {"weight": MATRIX, "x": torch.ones(2, 3), "neuron": torch.tensor([0, 3]), "k_max": 2, "triplets": TRIPLETS},
        {
            "weight": NO_MATRICES,
            "x": [*NO_TENSORS, torch.ones(2, 4), torch.ones(1, 3), torch.full((2, 3), math.nan)],
            "neuron": [
                None,
                "x",
                5,
                [0, 1],
                torch.ones(2),
                torch.tensor([0, 4]),
                torch.tensor([-1, 0]),
                torch.tensor([True, False]),
                torch.tensor(1),
            ],
            "k_max": [*NO_COUNTS, 3],
            "triplets": NO_TRIPLETS[:4] + NO_TRIPLETS[5:],
        },
    ),
    (
        "spectral_pcdr",
        s2d.spectral_pcdr,
        {"weight": MATRIX, "k_max": 2},
        {"weight": NO_MATRICES, "k_max": [*NO_COUNTS, 4], "triplets": NO_TRIPLETS[:4] + NO_TRIPLETS[5:]},
    ),
    (
        "layer_pcdr",
        s2d.layer_pcdr,
        {"ratios": torch.ones(3, 2)},
        {"ratios": [*NO_TENSORS[:-2], torch.ones(2), torch.ones(()), -torch.ones(2, 2)]},
    ),
    (
        "outlier_rank",
        s2d.outlier_rank,
        {"pcdr": torch.ones(2), "tau": 0.9},
        {"pcdr": NO_VECTORS[:-1], "tau": [*NO_NUMBERS, 0, 1.5]},
    ),
    (
        "excess_kurtosis",
        s2d.excess_kurtosis,
        {"x": MATRIX},
        {"x": [*NO_ACTIVATIONS[:-2], torch.ones(0), torch.ones(()), torch.tensor([math.nan])]},
    ),
    (
        "neuron_kurtosis",
        s2d.neuron_kurtosis,
        {"x": MATRIX},
        {"x": [*NO_ACTIVATIONS[:-2], torch.ones(0), torch.ones(()), torch.tensor([math.inf])]},
    ),
    (
        "ActivationStatistics",
        lambda x: s2d.ActivationStatistics().update(x),
        {"x": MATRIX},
        {"x": [*NO_ACTIVATIONS[:-2], torch.ones(()), (MATRIX, 1)]},
    ),
    (
        "watch_activations",
        watch,
        {"modules": {"a": model()}},
        {"modules": [None, 5, "x", [model()], {"a": 5}, {"a": None}, model(), {"a": nn.Linear}, {"a": nn.LSTM(3, 2)}]},
    ),
    ("OutlierRows", s2d.OutlierRows, {"capacity": 2}, {"capacity": [*NO_COUNTS, None]}),
    (
        "OutlierRows",
        update,
        {"x": torch.ones(2, 3), "y": torch.ones(2, 4)},
        {
            "x": [*NO_TENSORS, torch.ones(5, 3), torch.ones(2, 9), torch.ones(())],
            "y": [*NO_TENSORS[:-2], torch.ones(5, 3), torch.ones(())],
        },
    ),
    (
        "OutlierRows",
        merge,
        {"magnitude": torch.ones(2), "neuron": torch.tensor([0, 1]), "x": torch.ones(2, 3)},
        {
            "magnitude": [None, 5, "x", torch.ones(3), torch.ones(())],
            "neuron": [None, [0, 1], torch.ones(()), torch.tensor([1])],
            "x": [None, 5, torch.ones(2), torch.ones(2, 4), torch.ones(3, 3)],
        },
    ),
    (
        "OutlierRows",
        lambda **rest: s2d.OutlierRows(2).allocate(**rest),
        {"in_features": 3, "dtype": torch.float32, "device": torch.device("cpu")},
        {"in_features": [*NO_COUNTS, None], "dtype": [None, "float", torch.int64, 5], "device": [None, 5, "nowhere"]},
    ),
    (
        "linear_maps",
        s2d.linear_maps,
        {"model": model(), "include": "*", "exclude": "0"},
        {"model": NO_MODELS, "include": NO_SELECTORS, "exclude": [*NO_SELECTORS, None]},
    ),
    (
        "LinearMap",
        s2d.LinearMap,
        {
            "name": "fc",
            "module": nn.Linear(2, 2),
            "parameter": "weight",
            "rows": (0, 1),
            "transposed": False,
            "argument": 0,
            "keyword": "input",
            "index": None,
        },
        {
            "name": [None, 5, b"x", []],
            "module": [*NO_MODELS[:-2], 5],
            "parameter": [None, 5, "nothing", []],
            "rows": [5, "01", (1, 0), (0.5, 1), (0,), (-1, 1), (None, None), [0, 1]],
            "transposed": [None, 1, "x", 0.5],
            "argument": [-1, 0.5, "0", True],
            "keyword": [None, 5],
            "index": [-1, 0.5, "0", True],
        },
    ),
    (
        "check_bound",
        s2d.check_bound,
        {"model": model(), "batch": torch.ones(2, 3)},
        {"model": NO_MODELS, "batch": NO_BATCHES, "layers": [5, "x", [1], {"a": 5}, {"a": nn.Linear(2, 2)}, model()]},
    ),
    (
        "SelectiveSpectralDecay",
        s2d.SelectiveSpectralDecay,
        {
            "model": model(),
            "lam": 0.1,
            "power": 2,
            "tau": 0.9,
            "k_max": 2,
            "refresh_every": 5,
            "criterion": "all",
            "coefficients": "live",
            "coupling": "gradient",
            "outliers": 4,
        },
        {
            "model": NO_MODELS,
            "lam": NO_NUMBERS,
            "power": [*NO_NUMBERS, 0],
            "tau": [*NO_NUMBERS, 0, 2],
            "k_max": [*NO_COUNTS, 9],
            "refresh_every": [*NO_COUNTS, None],
            "criterion": NO_NAMES,
            "coefficients": NO_NAMES,
            "coupling": NO_NAMES,
            "outliers": [*NO_COUNTS, None],
            "include": NO_SELECTORS,
            "exclude": [*NO_SELECTORS, None],
            "process_group": [5, "all", [], {}],
        },
    ),
    (
        "SpectralNormCap",
        s2d.SpectralNormCap,
        {"model": model(), "cap": 1.0, "every": 2},
        {
            "model": NO_MODELS,
            "cap": [*NO_NUMBERS, 0],
            "every": [*NO_COUNTS, None],
            "include": NO_SELECTORS,
            "exclude": [*NO_SELECTORS, None],
        },
    ),
    (
        "SelectiveSpectralDecay",
        lambda optimizer: decay(NET).attach(optimizer),
        {},
        {"optimizer": NO_OPTIMIZERS},
    ),
    (
        "SpectralNormCap",
        lambda optimizer: cap(NET).attach(optimizer),
        {},
        {"optimizer": NO_OPTIMIZERS},
    ),
    (
        "SelectiveSpectralDecay",
        lambda state: decay(NET).load_state_dict(state),
        {},
        {"state": [None, 5, "x", [], {}, {"steps": 1}, {"steps": torch.tensor(1)}, {1: 2}]},
    ),
    (
        "SpectralNormCap",
        lambda state: cap(NET).load_state_dict(state),
        {},
        {
            "state": [
                None,
                5,
                "x",
                [],
                {},
                {"steps": 1},
                {"steps": torch.tensor(-1)},
                {"steps": torch.tensor(0.5)},
                {"steps": torch.ones(2)},
            ]
        },
    ),
    *[
        (
            "SelectiveSpectralDecay",
            load(decay, key),
            {},
            {"value": [None, 5, "x", torch.tensor(math.nan), torch.tensor(-1), torch.ones(7)]},
        )
        for key in ("steps", "0.rank", "2.rank")
    ],
    *[
        (
            "SelectiveSpectralDecay",
            load(decay, key),
            {},
            {"value": [None, 5, "x", torch.full((4, 2), math.nan), torch.ones(7), torch.ones(2, 9)]},
        )
        for key in ("0.u", "2.s", "0.v", "0.pcdr", "2.spent", "0.info")
    ],
]
NET = model()


def bad_calls() -> list[tuple[str, str, Callable, dict[str, Any]]]:
    """Seeded: name, argument, what to call, and the arguments with one of them bad."""
    every = [
        (name, argument, call, good | {argument: value})
        for name, call, good, bad in CASES
        for argument, values in bad.items()
        for value in values
    ]
    random.Random(0).shuffle(every)
    return every[:CALLS]


def outcome(call: Callable, arguments: dict[str, Any]) -> str:
    try:
        call(**arguments)
    except (ValueError, TypeError) as error:
        inside = traceback.extract_tb(error.__traceback__)[-1].filename
        ours = "s2d" in inside and "site-packages" not in inside
        return "" if ours and str(error) else f"{type(error).__name__} from {inside}: {error}"
    except Exception as error:  # the very thing that is looked for
        return f"{type(error).__name__}: {error}"
    return "accepted"


def test_each_good_call_is_accepted() -> None:
    for name, call, good, _ in CASES:
        if good:
            assert outcome(call, good) == "accepted", name


def test_every_public_name_is_called() -> None:
    assert {name for name, *_ in CASES} == set(s2d.__all__) - RECORDS


def test_random_bad_calls_are_refused_in_our_own_words() -> None:
    calls = bad_calls()
    assert len(calls) >= 300 and {name for name, *_ in calls} == set(s2d.__all__) - RECORDS
    wrong = []
    for name, argument, call, arguments in calls:
        found = outcome(call, arguments)
        if found:
            wrong.append(f"{name}({argument}={str(arguments[argument])[:60]!r}): {found[:160]}")
    assert wrong == []


def test_what_the_calls_look_for_is_seen() -> None:
    def torchs(x: Any) -> None:
        torch.ones(2) @ torch.ones(x)

    assert outcome(torchs, {"x": 3}).startswith("RuntimeError")
    assert outcome(lambda x: x.nothing, {"x": 3}).startswith("AttributeError")
    assert outcome(lambda x: None, {"x": 3}) == "accepted"
    assert outcome(lambda x: int(x), {"x": "a"}).startswith("ValueError from")
    with pytest.raises(ValueError, match="tau is 2"):
        s2d.outlier_rank(torch.ones(2), 2)
