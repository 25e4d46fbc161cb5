"""Training spread over processes, against the same training in one.

The processes are real, started by torchrun with gloo on the CPU: once with 2 and once with 4, for all scenarios of
:mod:`distributed_worker`. The oracle trains on the joint batch in this process. All is float64; what the processes add
up in another order may differ by rounding, which AdamW magnifies where a gradient is nothing but rounding (the key bias
of attention). ``TOLERANCE`` stands far above what that makes (5e-11 seen) and far below the effect of the penalty.
Outlier activations travel as float32, hence ``SINGLE``.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import os
import re
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import distributed_worker as worker
import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from torch.testing._internal.distributed.fake_pg import FakeStore

from s2d import LinearMap, OutlierRows, SelectiveSpectralDecay
from s2d.distributed import (
    _copies,
    local_block,
    merge_outliers,
    raise_together,
    resolve_group,
    share_out,
    sum_over_shards,
)

TOLERANCE = 1e-9
SINGLE = 2e-6
LIMIT = worker.HANG + 60  # seconds; the processes end themselves before
PROMPT = 10.0  # seconds within which an error has to arrive; a hang lasts 20, the timeout of the group

TRAINED = [(size, name) for name, (sizes, _, _) in worker.TRAININGS.items() for size in sizes]
RUNS = {name: run for name, (_, _, run) in worker.TRAININGS.items()}
REFRESHES = len(range(0, worker.STEPS, worker.REFRESH_EVERY))
each_training = pytest.mark.parametrize(("size", "name"), TRAINED, ids=lambda value: str(value))
each_size = pytest.mark.parametrize("size", [2, 4])

Results = Callable[[int, str], list[dict[str, Any]]]


def launch(size: int, folder: Path) -> str:
    """Run the worker in ``size`` processes; returns what they printed."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={size}"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    process = subprocess.Popen(
        [*command, worker.__file__, str(folder)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=environment,
    )
    try:
        return process.communicate(timeout=LIMIT)[0]
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)  # torchrun passes it on to its workers
            process.wait(30)


@pytest.fixture(scope="session")
def results(tmp_path_factory: pytest.TempPathFactory) -> Results:
    """What each rank found in a scenario, in order of ranks."""
    started: dict[int, tuple[Path, str]] = {}

    @functools.cache
    def look_up(size: int, name: str) -> list[dict[str, Any]]:
        if size not in started:
            folder = tmp_path_factory.mktemp(f"ranks{size}")
            started[size] = folder, launch(size, folder)
        folder, output = started[size]
        files = [folder / f"{name}.{rank}.pt" for rank in range(size)]
        missing = [file.name for file in files if not file.exists()]
        assert not missing, f"{missing} were not written; the end of the output:\n{output[-4000:]}"
        found = [torch.load(file) for file in files]
        for rank, result in enumerate(found):
            assert "traceback" not in result, f"rank {rank}:\n{result['traceback']}"
        return found

    return look_up


@functools.cache
def _alone(key: str) -> dict[str, Any]:
    return RUNS[key].alone()


def alone(name: str) -> dict[str, Any]:
    """The oracle of a training; those that differ only in how they are spread share it."""
    first = next(other for other, run in RUNS.items() if run == RUNS[name])
    return _alone(first)


def differences(a: dict[str, Tensor], b: dict[str, Tensor]) -> dict[str, float]:
    assert a.keys() == b.keys()
    return {name: float((a[name] - b[name]).abs().max()) for name in a}


# --- a training is the same however it is spread ----------------------------------------------------------------------


@each_training
def test_weights_are_those_of_one_process(results: Results, size: int, name: str) -> None:
    for found in results(size, name):
        assert max(differences(found["weights"], alone(name)["weights"]).values()) < TOLERANCE


@each_training
def test_every_rank_selects_what_one_process_selects(results: Results, size: int, name: str) -> None:
    expected = alone(name)
    for found in results(size, name):
        for row, reference in zip(found["report"], expected["report"], strict=True):
            assert (row["layer"], row["rank"]) == (reference["layer"], reference["rank"])
            assert row["sigma_1"] == pytest.approx(reference["sigma_1"], rel=TOLERANCE)
            assert row["pcdr_1"] == pytest.approx(reference["pcdr_1"], rel=SINGLE)
        assert found["similarity"] == pytest.approx(expected["similarity"], abs=TOLERANCE)


@each_training
def test_all_ranks_hold_equal_bits(results: Results, size: int, name: str) -> None:
    first, *others = results(size, name)
    assert sum(key.endswith(".u") for key in first["state"]) == len(first["report"])
    for other in others:
        assert first["state"].keys() == other["state"].keys()
        assert all(torch.equal(first["state"][key], other["state"][key]) for key in first["state"])
        assert all(torch.equal(first["weights"][key], other["weights"][key]) for key in first["weights"])


@each_training
def test_outliers_are_the_largest_of_the_joint_batch(results: Results, size: int, name: str) -> None:
    expected = alone(name)["outliers"]
    assert len(expected) == (REFRESHES if RUNS[name].options.get("criterion", "activation") == "activation" else 0)
    for found in results(size, name):
        assert len(found["outliers"]) == len(expected)
        for merged, joint in zip(found["outliers"], expected, strict=True):
            assert merged.keys() == joint.keys()
            for layer in joint:
                (magnitude, neuron, x), reference = merged[layer], joint[layer]
                assert len(magnitude) == 16
                torch.testing.assert_close(magnitude.double(), reference[0], rtol=SINGLE, atol=0)
                assert torch.equal(neuron, reference[1])
                torch.testing.assert_close(x.double(), reference[2], rtol=SINGLE, atol=SINGLE)


@each_training
def test_every_layer_is_solved_once_and_the_work_is_shared(results: Results, size: int, name: str) -> None:
    found = results(size, name)
    layers = [row["layer"] for row in found[0]["report"]]
    assert [len(rank["solved"]) for rank in found] == [REFRESHES] * size
    for refresh in range(REFRESHES):
        parts = [rank["solved"][refresh] for rank in found]
        assert sorted(itertools.chain(*parts)) == sorted(layers)
        assert sum(map(bool, parts)) == min(size, len(layers))
        if RUNS[name].model in ("mlp", "even", "wide"):  # whose layers all cost the same
            assert max(map(len, parts)) - min(map(len, parts)) <= 1


@each_training
def test_no_weight_is_gathered_between_refreshes(results: Results, size: int, name: str) -> None:
    live = RUNS[name].options.get("coefficients") == "live"
    for found in results(size, name):
        sharded = len(found["sharded"])
        for step, (refresh, collectives, gathered) in enumerate(found["traffic"]):
            assert refresh == (step % worker.REFRESH_EVERY == 0)
            values = gathered[sharded:] if refresh else gathered  # what is no weight
            assert sum(values) <= 2 * len(found["report"]) if live else not values
            if refresh:
                assert collectives > 0 and len(gathered) >= sharded  # each layer once
            elif live and sharded:  # one exchange of one number for each component, over each dimension of the mesh
                assert collectives <= (2 if name.startswith("fsdp2 and tp") else 1) and len(values) == 1
            elif name != "replicated DTensor":  # whose gradients are summed in any case, for the optimizer
                assert collectives == 0
        if live and sharded:
            assert sum(values) == sum(row["rank"] for row in found["report"])


@pytest.mark.parametrize("name", sorted({next(n for n, r in RUNS.items() if r == run) for run in RUNS.values()}))
def test_the_tolerance_is_far_below_what_the_penalty_does(name: str) -> None:
    run = RUNS[name]
    without = replace(run, options=run.options | {"lam": 0.0}).alone()
    effect = differences(alone(name)["weights"], without["weights"])
    selected = [row["rank"] for row in alone(name)["report"]]
    assert max(effect.values()) > 1e-3
    assert any(selected)
    assert run.options.get("criterion") in ("spectral", "all") or 0 in selected


@each_size
@pytest.mark.parametrize("name", worker.RESUMED)
def test_a_resumed_run_equals_one_that_never_stopped(results: Results, size: int, name: str) -> None:
    for resumed, straight in zip(results(size, f"{name}, resumed"), results(size, name), strict=True):
        for part in ("weights", "state"):
            # Not to the bit: DDP changes its buckets after the first step, and with them the order of its sums.
            assert max(differences(resumed[part], straight[part]).values()) < 1e-12
        assert [rows["rank"] for rows in resumed["report"]] == [rows["rank"] for rows in straight["report"]]


@pytest.mark.parametrize("example", worker.EXAMPLES, ids=lambda path: path.stem)
def test_example_runs_and_the_decay_bites(results: Results, example: Path) -> None:
    first, second = (result["printed"] for result in results(2, example.stem))
    sigmas = [float(number) for number in re.findall(r"largest sigma ([\d.]+)", first)]
    assert sigmas[0] == pytest.approx(8.0, abs=0.1) and sigmas[-1] < 4
    assert second == ""
    assert len(example.read_text().splitlines()) < 60


# --- groups -----------------------------------------------------------------------------------------------------------


def test_without_process_group_every_rank_trains_its_own_model(results: Results) -> None:
    for rank, found in enumerate(results(2, "no_process_group")):
        expected = worker.Run(seed=rank).alone()
        assert set(differences(found["weights"], expected["weights"]).values()) == {0.0}
        assert all(collectives == 0 for _, collectives, _ in found["traffic"])


def test_ranks_of_a_group_train_one_model(results: Results) -> None:
    for rank, found in enumerate(results(4, "two_groups_of_two")):
        expected = worker.Run(seed=rank // 2).alone()
        assert max(differences(found["weights"], expected["weights"]).values()) < TOLERANCE
        assert found["other"]["type"] == "ValueError"
        assert f"rank {rank} is not in process_group" in found["other"]["message"]


# --- what goes wrong on one rank goes wrong on all, at once -----------------------------------------------------------


@pytest.mark.parametrize(
    ("size", "name", "kind", "text"),
    [
        (2, "solver_fails_on_rank_1", "RuntimeError", "simulated lack of memory"),
        (4, "solver_fails_on_rank_1", "RuntimeError", "simulated lack of memory"),
        (2, "solver_fails_on_rank_1_fsdp2", "RuntimeError", "simulated lack of memory"),
        (2, "solver_fails_on_rank_1_in_another_way", "KeyError", "simulated bug"),
        (2, "nan_on_rank_1", "ValueError", "NaN or infinite entries"),
        (4, "nan_on_rank_1", "ValueError", "NaN or infinite entries"),
        (2, "nan_in_the_shard_of_rank_1", "ValueError", "blocks.1.fc2: weight holds 126 NaN"),
        (4, "nan_in_the_shard_of_rank_1", "ValueError", "blocks.1.fc2: weight holds 63 NaN"),
        (2, "attach_fails_on_rank_1", "ValueError", "the optimizer does not own"),
    ],
)
def test_a_failure_on_one_rank_is_raised_on_all(results: Results, size: int, name: str, kind: str, text: str) -> None:
    found = results(size, name)
    (failed,) = [rank for rank, result in enumerate(found) if "failed on rank" not in result["message"]]
    assert failed == 1 or name == "nan_in_the_shard_of_rank_1"  # there it fails where the layer is solved
    for rank, result in enumerate(found):
        assert result["seconds"] < PROMPT
        assert text in result["message"]
        assert result["usable"], "the group no longer works"
        if rank == failed:
            assert result["type"] == kind
        else:
            assert result["type"] == "RuntimeError"
            assert f"failed on rank {failed}: {kind}: " in result["message"]


@pytest.mark.parametrize(
    ("size", "name"),
    [
        (2, "solver_fails_on_rank_1"),
        (4, "solver_fails_on_rank_1"),
        (2, "solver_fails_on_rank_1_fsdp2"),
        (2, "solver_fails_on_rank_1_in_another_way"),
    ],
)
def test_a_step_that_failed_can_be_repeated(results: Results, size: int, name: str) -> None:
    found = results(size, name)
    assert all(result["again"]["type"] == "NoneType" for result in found)
    assert any(found[0]["ranks"]) and all(result["ranks"] == found[0]["ranks"] for result in found)


@each_size
@pytest.mark.parametrize(
    ("name", "kind", "text"),
    [
        ("ranks_watch_different_layers", "ValueError", r"ranks \[1\] watch other layers than rank 0"),
        ("no_forward_pass", "RuntimeError", "needs the forward pass of this training step, and saw none"),
    ],
)
def test_all_ranks_refuse_together(results: Results, size: int, name: str, kind: str, text: str) -> None:
    for result in results(size, name):
        assert result["type"] == kind and re.search(text, result["message"])
        assert result["seconds"] < PROMPT and result["usable"]


def test_nan_activations_on_one_rank_make_no_rank_wait(results: Results) -> None:
    first, second = results(2, "nan_activations_on_rank_0_only")
    assert first["type"] == second["type"] and first["ranks"] == second["ranks"]
    assert max(first["seconds"], second["seconds"]) < PROMPT and first["usable"] and second["usable"]


@each_size
def test_a_forward_pass_on_one_rank_is_enough(results: Results, size: int) -> None:
    model = worker.build()
    optimizer = worker.optimizer_for("adamw", model)
    decay = worker.CACHED.decay(model, optimizer)
    worker.backward(model)
    for parameter in model.parameters():
        parameter.grad.zero_()
    optimizer.step()
    for found in results(size, "forward_pass_on_rank_1_only"):
        assert found["type"] == "NoneType"
        assert [row["rank"] for row in found["report"]] == [row["rank"] for row in decay.report()]
        weights = {name: parameter.detach() for name, parameter in model.named_parameters()}
        assert max(differences(found["weights"], weights).values()) < TOLERANCE


def test_a_layer_used_on_one_rank_only_is_refreshed_on_all(results: Results) -> None:
    first, second = results(2, "gradient_on_rank_1_only")
    used = ["blocks.0.fc1", "blocks.0.fc2", "blocks.1.fc1", "blocks.2.fc1"]
    assert first["layers"] == second["layers"] == used
    assert all(torch.equal(first["state"][key], second["state"][key]) for key in first["state"])


def test_a_step_skipped_by_the_grad_scaler_is_skipped_on_all_ranks(results: Results) -> None:
    for found in results(2, "scaler_finds_infinity_in_the_shard_of_rank_1"):
        assert found["steps"] == {False: [1, 1, 2], True: [1, 1, 2]}


def test_fsdp1_is_refused_on_all_ranks(results: Results) -> None:
    for found in results(2, "fsdp1"):
        for result, where in ((found, "the model"), (found["inside"], "0")):
            assert result["type"] == "ValueError"
            assert result["message"].startswith(f"{where} is wrapped in FSDP1") and "fully_shard" in result["message"]


# --- the parts, in this process ---------------------------------------------------------------------------------------


@contextlib.contextmanager
def as_rank(rank: int, size: int) -> Iterator[None]:
    """Be one rank of a group whose collectives do nothing."""
    dist.init_process_group("fake", rank=rank, world_size=size, store=FakeStore())
    try:
        yield
    finally:
        dist.destroy_process_group()


def test_share_out_balances() -> None:
    assert share_out([], ranks=3) == []
    assert share_out([5], ranks=4) == [0]
    assert share_out([4, 1, 1, 2], ranks=2) == [0, 1, 1, 1]
    assert share_out([7, 7, 7], ranks=1) == [0, 0, 0]
    assert Counter(share_out([3] * 12, ranks=4)) == {0: 3, 1: 3, 2: 3, 3: 3}


@pytest.mark.parametrize("ranks", [2, 3, 8])
def test_share_out_leaves_no_rank_behind_by_more_than_one_item(ranks: int) -> None:
    costs = torch.randint(1, 100, (25,), generator=torch.Generator().manual_seed(ranks)).tolist()
    owners = share_out(costs, ranks)
    loads = [sum(cost for cost, owner in zip(costs, owners, strict=True) if owner == rank) for rank in range(ranks)]
    assert sum(loads) == sum(costs)
    # Graham's bound for this rule: 4/3 of the best possible, which is at least the mean and the largest item.
    assert max(loads) <= 4 / 3 * max(sum(costs) / ranks, max(costs)) + max(costs) / 3


def test_raise_together_without_group_raises_the_error_itself() -> None:
    raise_together(None, None)
    error = KeyError("this")
    with pytest.raises(KeyError) as caught:
        raise_together(error, None)
    assert caught.value is error


def test_resolve_group_refuses_what_is_no_group() -> None:
    assert resolve_group("world") is None and resolve_group(None) is None
    with pytest.raises(ValueError, match="process_group is 'all': give a group, 'world' or None"):
        resolve_group("all")
    with pytest.raises(ValueError, match="process_group is 'dp'"):
        SelectiveSpectralDecay(nn.Linear(2, 2), process_group="dp", k_max=1)
    with as_rank(0, 1):
        assert resolve_group("world") is None
    with as_rank(0, 2):
        assert resolve_group("world") is dist.group.WORLD
        with pytest.raises(ValueError, match="rank 0 is not in process_group"):
            resolve_group(dist.new_group([1]))


MAPS: dict[str, tuple[tuple[int, ...], list[dict[str, Any]]]] = {
    "matrix": ((10, 7), [{}]),
    "few rows": ((3, 7), [{}]),
    "packed": ((9, 7), [{"rows": (0, 3)}, {"rows": (3, 6)}, {"rows": (6, 9)}]),
    "transposed": ((7, 10), [{"transposed": True}]),
    "kernel": ((6, 2, 3, 2), [{}]),
    "groups": ((6, 2, 3, 2), [{"rows": (0, 3)}, {"rows": (3, 6)}]),
}
LAYOUTS: dict[str, tuple[tuple[int, ...], tuple[Any, ...]]] = {
    "rows": ((4,), (Shard(0),)),
    "columns": ((4,), (Shard(1),)),
    "replicated": ((4,), (Replicate(),)),
    "replicated rows": ((2, 2), (Replicate(), Shard(0))),
    "rows, columns": ((2, 2), (Shard(0), Shard(1))),
    "columns, rows": ((2, 2), (Shard(1), Shard(0))),
    "rows of rows": ((2, 2), (Shard(0), Shard(0))),
}


@pytest.mark.parametrize(
    ("kind", "layout"),
    # a kernel sharded by columns is refused, as the next test shows
    [(k, p) for k in MAPS for p in LAYOUTS if len(MAPS[k][0]) == 2 or Shard(1) not in LAYOUTS[p][1]],
)
def test_local_block_finds_the_entries_that_a_rank_holds(kind: str, layout: str) -> None:
    """Each entry of the weight tells its own position."""
    (shape, maps), (mesh_shape, placements) = MAPS[kind], LAYOUTS[layout]
    weight = torch.arange(1.0, 1.0 + torch.Size(shape).numel()).view(shape)
    seen: Counter = Counter()
    for rank in range(4):
        with as_rank(rank, 4):
            mesh, module = init_device_mesh("cpu", mesh_shape), nn.Module()
            # No nn.Parameter: torch would give it the mesh that it knows from the rank before.
            module.weight = distribute_tensor(weight.clone(), mesh, placements, src_data_rank=None)
            for options in maps:
                linear = LinearMap("it", module, **options)
                block = local_block(linear)
                held = block.view(module.weight.to_local())
                assert torch.equal(held, linear.matrix(weight)[block.rows, block.columns])
                assert block.empty == (held.numel() == 0)
                held.neg_()  # a view: what is added to it is added to the weight
                assert block.empty or bool((module.weight.to_local() < 0).any())
                seen.update((-held).flatten().tolist())
    copies = 4 // torch.Size(n for n, p in zip(mesh_shape, placements, strict=True) if p.is_shard()).numel()
    assert seen == dict.fromkeys(weight.flatten().tolist(), copies)


def test_a_kernel_that_is_no_block_of_rows_is_refused() -> None:
    with as_rank(0, 2):
        module = nn.Conv2d(4, 4, 3)
        weight = distribute_tensor(module.weight, init_device_mesh("cpu", (2,)), [Shard(1)], src_data_rank=None)
        module.weight = nn.Parameter(weight)
        message = r"layer .* is sharded as .*: only blocks of rows and columns"
        with pytest.raises(ValueError, match=message):
            local_block(LinearMap("conv", module))
        decay = SelectiveSpectralDecay(module, include="*", criterion="spectral", process_group=None)
        with pytest.raises(ValueError, match=message):  # at once, not where the layer is first selected
            decay.attach(torch.optim.SGD(module.parameters(), lr=0.1))


def test_sums_over_no_shards_are_the_parts_themselves() -> None:
    weight, part = torch.ones(2, 2), torch.ones(3)
    assert sum_over_shards([]) == []
    assert sum_over_shards([(weight, part)])[0] is part


def test_ranks_that_saw_the_same_count_once() -> None:
    lists = torch.tensor(
        [[[1.0, 2.0], [1.0, 2.0], [3.0, 4.0], [1.0, 2.0]], [[0.0, 1.0], [1.0, 0.0], [0.0, 1.0], [2, 2]]]
    )
    assert _copies(lists).tolist() == [[False, True, False, True], [False, False, True, False]]


def test_a_merge_of_nothing_leaves_nothing() -> None:
    with as_rank(0, 2):
        rows = OutlierRows(4)
        merge_outliers([(rows, 3)], torch.device("cpu"), dist.group.WORLD)
        assert len(rows) == 0
