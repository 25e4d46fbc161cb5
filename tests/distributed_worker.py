"""What the processes of test_distributed.py run, under torchrun; the test itself imports the single-process oracle.

    torchrun --standalone --nproc-per-node 2 tests/distributed_worker.py FOLDER

Every scenario of that number of processes runs in the same processes, because starting them takes most of the time.
Each rank stores what it saw in ``FOLDER/<scenario>.<rank>.pt``. All is float64 on the CPU, so that a wrong sum stands
out of the rounding by many orders of magnitude.
"""

from __future__ import annotations

import contextlib
import faulthandler
import io
import runpy
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from datetime import timedelta
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_module, distribute_tensor
from torch.distributed.tensor.debug import CommDebugMode
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    PrepareModuleInput,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)

import s2d.distributed
import s2d.regularizer
from s2d import SelectiveSpectralDecay
from s2d.layers import plain_name

WIDTH, HIDDEN, TOKENS, CLASSES, BATCH = 12, 21, 4, 5, 16  # 21 and 5 divide neither by 2 nor by 4
STEPS, REFRESH_EVERY, STOP = 8, 3, 4  # refreshes at 0, 3 and 6; a run that resumes stops after 4
EXAMPLES = sorted((Path(__file__).parents[1] / "examples").glob("*_torchrun.py"))
HANG = 240.0  # seconds after which a process gives up, far more than all scenarios take


# --- models and data, the same on every rank ------------------------------------------------------------------------


class Block(nn.Module):
    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.fc1, self.fc2 = nn.Linear(WIDTH, hidden), nn.Linear(hidden, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.fc2(nn.functional.gelu(self.fc1(self.norm(x))))


class AttentionBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attn = nn.MultiheadAttention(WIDTH, 2, batch_first=True)
        self.fc = nn.Linear(WIDTH, WIDTH, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.fc(self.attn(x, x, x, need_weights=False)[0])


class Network(nn.Module):
    def __init__(self, blocks: list[nn.Module]) -> None:
        super().__init__()
        self.blocks, self.head = nn.ModuleList(blocks), nn.Linear(WIDTH, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return self.head(x).mean(dim=1)


class Small(nn.Module):
    """A layer of 3 rows, of which the last of 4 ranks holds none."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([nn.Linear(WIDTH, HIDDEN), nn.Linear(HIDDEN, 3)])
        self.head = nn.Linear(3, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.blocks:
            x = layer(x).tanh()
        return self.head(x).mean(dim=1)


class Conv1D(nn.Module):
    """Like the one of transformers: the weight is stored (in_features, out_features)."""

    def __init__(self, nf: int, nx: int) -> None:
        super().__init__()
        self.nf = nf
        self.weight, self.bias = nn.Parameter(torch.empty(nx, nf)), nn.Parameter(torch.zeros(nf))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight + self.bias


class Layouts(nn.Module):
    """Every way in which a matrix can lie in a parameter: groups of a convolution, and transposed."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.transposed = nn.Conv2d(4, 10, (3, 4), groups=2), Conv1D(7, 10)
        self.head = nn.Linear(7, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.transposed(self.conv(x.reshape(len(x), 4, 3, 4)).flatten(1).tanh()).tanh())


MODELS: dict[str, Callable[[], nn.Module]] = {
    "mlp": lambda: Network([Block(HIDDEN) for _ in range(3)]),
    "even": lambda: Network([Block(22) for _ in range(3)]),  # torch's own tensor parallelism refuses 21 on 2 ranks
    "wide": lambda: Network([Block(259) for _ in range(2)]),
    "attention": lambda: Network([AttentionBlock() for _ in range(2)]),
    "small": Small,
    "layouts": Layouts,
}


def build(name: str = "mlp", seed: int = 0) -> nn.Module:
    """Weights with a component of its own strength in each, so that PCDR selects some layers and leaves others."""
    model = MODELS[name]().double()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for index, (key, parameter) in enumerate(model.named_parameters()):
            parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype))
            if "norm" in key:
                parameter.add_(1.0 if key.endswith("weight") else 0.0)
            elif parameter.ndim >= 2:
                matrix = parameter.view(parameter.shape[0], -1)
                left, right = (torch.randn(n, generator=generator, dtype=matrix.dtype) for n in matrix.shape)
                matrix.add_(torch.outer(left / left.norm(), right / right.norm()), alpha=(0.5, 2.0, 4.0)[index % 3])
    return model


def batch(step: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1000 * seed + step)
    x = torch.randn(BATCH, TOKENS, WIDTH, generator=generator, dtype=torch.float64)
    return x, torch.randint(CLASSES, (BATCH,), generator=generator)


def optimizer_for(name: str, model: nn.Module) -> torch.optim.Optimizer:
    if name == "sgd":
        return torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    if name == "zero":
        return ZeroRedundancyOptimizer(model.parameters(), torch.optim.AdamW, lr=1e-2)
    return torch.optim.AdamW(model.parameters(), lr=1e-2)


# --- one run --------------------------------------------------------------------------------------------------------


class Recording(SelectiveSpectralDecay):
    """Notes what a run does beside what it computes; the computation is the parent's."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.solved: list[list[str]] = []  # of each refresh, the layers that this rank solved
        self.outliers: list[dict[str, tuple[Tensor, ...]]] = []  # of each refresh, the merged rows
        self.traffic: list[tuple[bool, int, list[int]]] = []  # of each step: refresh?, collectives, sizes made whole

    def _step(self, *args: Any, **options: Any) -> None:
        sizes: list[int] = []
        original = DTensor.full_tensor

        def counting(tensor: DTensor, **keywords: Any) -> Tensor:
            sizes.append(tensor.numel())
            return original(tensor, **keywords)

        refresh = self.steps % self.refresh_every == 0
        DTensor.full_tensor = counting
        try:
            with CommDebugMode() as communication:
                super()._step(*args, **options)
        finally:
            DTensor.full_tensor = original
        self.traffic.append((refresh, communication.get_total_counts(), sizes))

    def _refresh(self, active: list[bool], **options: Any) -> None:
        if any(active):  # without, only layers that wait for a gradient were looked for
            self.solved.append([])
        super()._refresh(active, **options)

    def _solve_own(self, own: dict[str, Tensor]) -> Any:
        self.solved[-1] += list(own)
        return super()._solve_own(own)

    def _gather_outliers(self, chosen: Any, group: Any) -> None:
        super()._gather_outliers(chosen, group)
        rows = {name: self._watch.rows[name] for name in chosen if len(self._watch.rows[name])}
        self.outliers.append({n: (r.magnitude.clone(), r.neuron.clone(), r.x.clone()) for n, r in rows.items()})


@dataclass(frozen=True)
class Run:
    """A training run; how it is spread over processes must not change what comes out."""

    model: str = "mlp"
    optimizer: str = "adamw"
    accumulate: int = 1
    seed: int = 0
    options: dict[str, Any] = field(default_factory=dict)

    def decay(self, model: nn.Module, optimizer: torch.optim.Optimizer, **options: Any) -> Recording:
        settings = dict(lam=0.05, tau=0.6, k_max=2, refresh_every=REFRESH_EVERY) | self.options | options
        decay = Recording(model, **settings)
        decay.attach(optimizer)
        return decay

    def steps(
        self, model: nn.Module, optimizer: torch.optim.Optimizer, steps: range, rank: int = 0, ranks: int = 1
    ) -> None:
        """Steps of data-parallel rank ``rank`` of ``ranks``."""
        for step in steps:
            x, target = (part.chunk(ranks)[rank] for part in batch(step, self.seed))
            micro = list(zip(x.chunk(self.accumulate), target.chunk(self.accumulate), strict=True))
            for index, (inputs, labels) in enumerate(micro):
                last = index == len(micro) - 1
                if isinstance(model, nn.parallel.DistributedDataParallel):
                    quiet = contextlib.nullcontext() if last else model.no_sync()
                else:
                    quiet = contextlib.nullcontext()
                    if hasattr(model, "set_requires_gradient_sync"):
                        model.set_requires_gradient_sync(last)
                with quiet:
                    (nn.functional.cross_entropy(model(inputs), labels) / self.accumulate).backward()
            optimizer.step()
            optimizer.zero_grad()

    def alone(self, **options: Any) -> dict[str, Any]:
        """The oracle: the joint batch in one process."""
        model = build(self.model, self.seed)
        optimizer = optimizer_for("adamw" if self.optimizer == "zero" else self.optimizer, model)
        decay = self.decay(model, optimizer, **options)
        self.steps(model, optimizer, range(STEPS))
        return findings(model, decay)


def whole(tensor: Tensor) -> Tensor:
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()


def findings(model: nn.Module, decay: Recording) -> dict[str, Any]:
    return {
        "weights": {plain_name(name): whole(parameter) for name, parameter in model.named_parameters()},
        "state": decay.state_dict(),
        "report": [{key: row[key] for key in ("layer", "rank", "sigma_1", "pcdr_1")} for row in decay.report()],
        "similarity": decay.cached_similarity(),
        "sharded": [name for name, linear in decay.layers.items() if isinstance(linear.weight, DTensor)],
        "solved": decay.solved,
        "outliers": decay.outliers,
        "traffic": decay.traffic,
    }


# --- ways to spread it over processes -------------------------------------------------------------------------------


def ddp(model: nn.Module) -> tuple[nn.Module, int, int]:
    return nn.parallel.DistributedDataParallel(model), dist.get_rank(), dist.get_world_size()


def ddp_bucket_views(model: nn.Module) -> tuple[nn.Module, int, int]:
    wrapped = nn.parallel.DistributedDataParallel(model, gradient_as_bucket_view=True)
    return wrapped, dist.get_rank(), dist.get_world_size()


def _fully_shard(model: nn.Module, **options: Any) -> None:
    for block in getattr(model, "blocks", []):
        fully_shard(block, **options)
    fully_shard(model, **options)


def fsdp(model: nn.Module) -> tuple[nn.Module, int, int]:
    _fully_shard(model, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
    return model, dist.get_rank(), dist.get_world_size()


def fsdp_columns(model: nn.Module) -> tuple[nn.Module, int, int]:
    """Sharded by columns where they divide evenly (which FSDP2 asks for), by rows elsewhere."""
    size = dist.get_world_size()

    def placement(parameter: nn.Parameter) -> Shard:
        return Shard(1 if parameter.ndim == 2 and parameter.shape[1] % size == 0 else 0)

    _fully_shard(model, mesh=init_device_mesh("cpu", (size,)), shard_placement_fn=placement)
    return model, dist.get_rank(), size


def hsdp(model: nn.Module) -> tuple[nn.Module, int, int]:
    _fully_shard(model, mesh=init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard")))
    return model, dist.get_rank(), dist.get_world_size()


def _feed_forward(block: nn.Module, mesh: Any) -> None:
    parallelize_module(block, mesh, {"fc1": ColwiseParallel(), "fc2": RowwiseParallel()})


def tp(model: nn.Module) -> tuple[nn.Module, int, int]:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for block in model.blocks:
        _feed_forward(block, mesh)
    return model, 0, 1


def tp_of_one_block(model: nn.Module) -> tuple[nn.Module, int, int]:
    """All ranks see the same activations of the other blocks, which count once."""
    _feed_forward(model.blocks[1], init_device_mesh("cpu", (dist.get_world_size(),)))
    return model, 0, 1


def tp_sequence(model: nn.Module) -> tuple[nn.Module, int, int]:
    """Between the linear layers, each rank has some of the tokens."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    plan: dict[str, Any] = {
        "blocks.0": PrepareModuleInput(
            input_layouts=(Replicate(),), desired_input_layouts=(Shard(1),), use_local_output=True
        ),
        "head": PrepareModuleInput(
            input_layouts=(Shard(1),), desired_input_layouts=(Replicate(),), use_local_output=True
        ),
    }
    for index in range(len(model.blocks)):
        plan[f"blocks.{index}.norm"] = SequenceParallel()
        plan[f"blocks.{index}.fc1"] = ColwiseParallel(input_layouts=Shard(1))
        plan[f"blocks.{index}.fc2"] = RowwiseParallel(output_layouts=Shard(1))
    parallelize_module(model, mesh, plan)
    return model, 0, 1


class Distributed(nn.Module):
    """Takes and gives plain tensors; inside are ``DTensor``, the activations sharded over samples."""

    def __init__(self, inner: nn.Module, mesh: Any) -> None:
        super().__init__()
        self.module, self.mesh = distribute_module(inner, mesh), mesh

    def forward(self, x: Tensor) -> Tensor:
        return self.module(distribute_tensor(x, self.mesh, [Shard(0)])).full_tensor()


def replicated(model: nn.Module) -> tuple[nn.Module, int, int]:
    """Replicated weights, whose gradients are sums that are not added up before the optimizer step."""
    return Distributed(model, init_device_mesh("cpu", (dist.get_world_size(),))), 0, 1


def fsdp_tp(model: nn.Module) -> tuple[nn.Module, int, int]:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    for block in model.blocks:
        _feed_forward(block, mesh["tp"])
    _fully_shard(model, mesh=mesh["dp"])
    return model, mesh["dp"].get_local_rank(), 2


CACHED = Run()
LIVE = Run(optimizer="sgd", options=dict(coefficients="live", coupling="decoupled"))
LIVE_GRADIENT = Run(options=dict(criterion="spectral", coefficients="live"))
CACHED_SPECTRAL = Run(optimizer="sgd", options=dict(criterion="spectral"))
SPECTRAL_LIVE_DECOUPLED = replace(LIVE, options=LIVE.options | dict(criterion="spectral"))
EVERYTHING = Run(optimizer="sgd", options=dict(criterion="all", k_max=None))
ACCUMULATED = Run(optimizer="sgd", accumulate=2)
ATTENTION = Run(model="attention")
ATTENTION_LIVE = Run(model="attention", optimizer="sgd", options=dict(coefficients="live", coupling="decoupled"))
SMALL = Run(model="small", options=dict(coefficients="live", tau=0.4))
LAYOUTS = Run(
    model="layouts", options=dict(criterion="spectral", tau=0.4, include="*", coefficients="live", coupling="decoupled")
)
WIDE = Run(model="wide", options=dict(criterion="spectral", tau=0.1))
ZERO = Run(optimizer="zero", options=dict(coupling="decoupled"))

EVEN, EVEN_LIVE, EVEN_LIVE_GRADIENT, EVEN_EVERYTHING = (
    replace(run, model="even") for run in (CACHED, LIVE, LIVE_GRADIENT, EVERYTHING)
)

Wrap = Callable[[nn.Module], tuple[nn.Module, int, int]]
TRAININGS: dict[str, tuple[tuple[int, ...], Wrap, Run]] = {
    "ddp": ((2, 4), ddp, CACHED),
    "ddp, live, decoupled": ((2,), ddp_bucket_views, LIVE),
    "ddp, spectral, live": ((4,), ddp, LIVE_GRADIENT),
    "ddp, all": ((2,), ddp, EVERYTHING),
    "ddp, accumulation with no_sync": ((2, 4), ddp, ACCUMULATED),
    "ddp, layouts": ((2,), ddp, LAYOUTS),
    "ddp, ZeroRedundancyOptimizer": ((2,), ddp, ZERO),
    "fsdp2": ((2, 4), fsdp, CACHED),
    "fsdp2, live, decoupled": ((2, 4), fsdp, LIVE),
    "fsdp2, all": ((4,), fsdp, EVERYTHING),
    "fsdp2, accumulation": ((2,), fsdp, ACCUMULATED),
    "fsdp2, columns": ((4,), fsdp_columns, LIVE),
    "fsdp2, attention": ((2, 4), fsdp, ATTENTION),
    "fsdp2, attention, live, decoupled": ((4,), fsdp, ATTENTION_LIVE),
    "fsdp2, small": ((4,), fsdp, SMALL),
    "fsdp2, layouts": ((4,), fsdp, LAYOUTS),
    "fsdp2, iterated triplets": ((2,), fsdp, WIDE),
    "hsdp, live, decoupled": ((4,), hsdp, LIVE),
    "tp": ((2,), tp, EVEN),
    "tp, live, decoupled": ((2,), tp, EVEN_LIVE),
    "tp, spectral, live": ((2,), tp, EVEN_LIVE_GRADIENT),
    "tp of one block": ((2,), tp_of_one_block, EVEN),
    "tp, sequence parallel": ((2,), tp_sequence, EVEN),
    "replicated DTensor": ((2,), replicated, CACHED_SPECTRAL),
    "replicated DTensor, live, decoupled": ((2,), replicated, SPECTRAL_LIVE_DECOUPLED),
    "fsdp2 and tp": ((4,), fsdp_tp, EVEN),
    "fsdp2 and tp, live, decoupled": ((4,), fsdp_tp, EVEN_LIVE),
    "fsdp2 and tp, all": ((4,), fsdp_tp, EVEN_EVERYTHING),
}
RESUMED = ("ddp", "fsdp2")


def train(wrap: Wrap, run: Run) -> dict[str, Any]:
    model, rank, ranks = wrap(build(run.model, run.seed))
    optimizer = optimizer_for(run.optimizer, model)
    decay = run.decay(model, optimizer)
    run.steps(model, optimizer, range(STEPS), rank, ranks)
    return findings(model, decay)


def resume(wrap: Wrap, run: Run) -> dict[str, Any]:
    """Stop, and go on with a new model, optimizer and regularizer."""
    model, rank, ranks = wrap(build(run.model, run.seed))
    optimizer = optimizer_for(run.optimizer, model)
    decay = run.decay(model, optimizer)
    run.steps(model, optimizer, range(STOP), rank, ranks)
    stored = model.state_dict(), optimizer.state_dict(), decay.state_dict()
    model, rank, ranks = wrap(build(run.model, run.seed + 1))
    optimizer = optimizer_for(run.optimizer, model)
    decay = run.decay(model, optimizer)
    for part, state in zip((model, optimizer, decay), stored, strict=True):
        part.load_state_dict(state)
    run.steps(model, optimizer, range(STOP, STEPS), rank, ranks)
    return findings(model, decay)


# --- what goes wrong on one rank ------------------------------------------------------------------------------------

SCENARIOS: dict[str, tuple[tuple[int, ...], Callable[[], dict[str, Any]]]] = {}


def scenario(*sizes: int) -> Callable:
    def register(function: Callable[[], dict[str, Any]]) -> Callable[[], dict[str, Any]]:
        SCENARIOS[function.__name__] = sizes, function
        return function

    return register


def outcome(call: Callable[[], Any]) -> dict[str, Any]:
    """What a call raised, and after how long."""
    began, error = time.perf_counter(), None
    try:
        call()
    except Exception as raised:
        error = raised
    seconds = time.perf_counter() - began
    return {"type": type(error).__name__, "message": str(error), "seconds": seconds}


def group_for_failures() -> dist.ProcessGroup:
    """A group of its own, so that a test which fails by a hang leaves the others their group."""
    return dist.new_group(timeout=timedelta(seconds=20))


def still_usable(group: dist.ProcessGroup) -> bool:
    total = torch.ones(1)
    dist.all_reduce(total, group=group)
    return int(total) == dist.get_world_size(group)


def replica(run: Run, group: Any, model: nn.Module | None = None) -> tuple[nn.Module, torch.optim.Optimizer, Recording]:
    """The same model on every rank, with the same gradients: all that the regularizer asks of DDP."""
    model = build(run.model, run.seed) if model is None else model
    optimizer = optimizer_for(run.optimizer, model)
    return model, optimizer, run.decay(model, optimizer, process_group=group)


def backward(model: nn.Module) -> None:
    x, target = batch(0)
    nn.functional.cross_entropy(model(x), target).backward()


def failing(wrap: Wrap | None, problem: Exception) -> dict[str, Any]:
    group = group_for_failures()
    model = build() if wrap is None else wrap(build())[0]
    model, optimizer, decay = replica(CACHED, group, model)
    backward(model)
    solve = s2d.regularizer.solve_top_triplets

    def fail(*args: Any, **options: Any) -> None:
        raise problem

    try:
        if dist.get_rank() == 1:
            s2d.regularizer.solve_top_triplets = fail
        result = outcome(optimizer.step)
    finally:
        s2d.regularizer.solve_top_triplets = solve
    result["usable"] = still_usable(group)
    backward(model)
    result["again"] = outcome(optimizer.step)  # the step that failed can be repeated
    result["ranks"] = [row["rank"] for row in decay.report()]
    return result


@scenario(2, 4)
def solver_fails_on_rank_1() -> dict[str, Any]:
    return failing(None, RuntimeError("simulated lack of memory"))


@scenario(2)
def solver_fails_on_rank_1_fsdp2() -> dict[str, Any]:
    return failing(fsdp, RuntimeError("simulated lack of memory"))


@scenario(2)
def solver_fails_on_rank_1_in_another_way() -> dict[str, Any]:
    return failing(None, KeyError("simulated bug"))


@scenario(2, 4)
def nan_on_rank_1() -> dict[str, Any]:
    group = group_for_failures()
    model, optimizer, decay = replica(LIVE_GRADIENT, group)
    backward(model)
    if dist.get_rank() == 1:
        with torch.no_grad():
            for linear in decay.layers.values():
                linear.weight.fill_(float("nan"))
    return outcome(optimizer.step) | {"usable": still_usable(group)}


@scenario(2, 4)
def nan_in_the_shard_of_rank_1() -> dict[str, Any]:
    group = group_for_failures()
    model, optimizer, decay = replica(LIVE_GRADIENT, group, fsdp(build())[0])
    backward(model)
    if dist.get_rank() == 1:
        with torch.no_grad():
            decay.layers["blocks.1.fc2"].weight.to_local().fill_(float("nan"))
    return outcome(optimizer.step) | {"usable": still_usable(group)}


@scenario(2, 4)
def ranks_watch_different_layers() -> dict[str, Any]:
    group = group_for_failures()
    model = build()
    include = "blocks.*.fc1" if dist.get_rank() == 1 else "blocks.*.fc2"
    decay = SelectiveSpectralDecay(model, include=include, process_group=group)
    result = outcome(lambda: decay.attach(optimizer_for("sgd", model)))
    return result | {"usable": still_usable(group)}


@scenario(2, 4)
def no_forward_pass() -> dict[str, Any]:
    group = group_for_failures()
    model, optimizer, _ = replica(CACHED, group)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    return outcome(optimizer.step) | {"usable": still_usable(group)}


@scenario(2, 4)
def forward_pass_on_rank_1_only() -> dict[str, Any]:
    group = group_for_failures()
    model, optimizer, decay = replica(CACHED, group)
    if dist.get_rank() == 1:
        backward(model)
        optimizer.zero_grad()
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    result = outcome(optimizer.step)
    return result | findings(model, decay)


@scenario(2)
def nan_activations_on_rank_0_only() -> dict[str, Any]:
    """NaN outliers must not make one rank raise and the other wait."""
    group = group_for_failures()
    model, optimizer, decay = replica(CACHED, group)
    if dist.get_rank() == 0:
        model(torch.full((2, TOKENS, WIDTH), float("nan"), dtype=torch.float64))
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    result = outcome(optimizer.step)
    return result | {"usable": still_usable(group), "ranks": [row["rank"] for row in decay.report()]}


@scenario(2)
def gradient_on_rank_1_only() -> dict[str, Any]:
    """A layer that one rank did not use in this step is refreshed all the same."""
    group = group_for_failures()
    model, optimizer, decay = replica(CACHED, group)
    backward(model)
    if dist.get_rank() == 0:
        model.blocks[0].fc1.weight.grad = None
    for block in model.blocks[1:]:
        block.fc2.weight.grad = None
    result = outcome(optimizer.step)
    return result | {"layers": [row["layer"] for row in decay.report()], "state": decay.state_dict()}


@scenario(2)
def no_process_group() -> dict[str, Any]:
    """Each rank trains a model of its own, and exchanges nothing."""
    run = Run(seed=dist.get_rank())
    model = build(run.model, run.seed)
    optimizer = optimizer_for(run.optimizer, model)
    decay = run.decay(model, optimizer, process_group=None)
    run.steps(model, optimizer, range(STEPS))
    return findings(model, decay)


@scenario(4)
def two_groups_of_two() -> dict[str, Any]:
    """Ranks 0 and 1 train one model, 2 and 3 another."""
    rank = dist.get_rank()
    groups = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    run = Run(seed=rank // 2)
    model = nn.parallel.DistributedDataParallel(build(run.model, run.seed), process_group=groups[rank // 2])
    optimizer = optimizer_for(run.optimizer, model)
    decay = run.decay(model, optimizer, process_group=groups[rank // 2])
    run.steps(model, optimizer, range(STEPS), rank % 2, 2)
    other = groups[1 - rank // 2]
    return findings(model, decay) | {"other": outcome(lambda: SelectiveSpectralDecay(build(), process_group=other))}


@scenario(2)
def attach_fails_on_rank_1() -> dict[str, Any]:
    group = group_for_failures()
    model = build()
    foreign = build() if dist.get_rank() == 1 else model
    decay = SelectiveSpectralDecay(model, process_group=group)
    result = outcome(lambda: decay.attach(optimizer_for("sgd", foreign)))
    return result | {"usable": still_usable(group)}


@scenario(2)
def scaler_finds_infinity_in_the_shard_of_rank_1() -> dict[str, Any]:
    """A step that the scaler skips, because of one rank, is skipped on all."""
    steps = {}
    for fused in (False, True):
        model = fsdp(build().float())[0]
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, fused=fused)
        decay = LIVE_GRADIENT.decay(model, optimizer)
        scaler = torch.amp.GradScaler("cpu", init_scale=16.0)
        steps[fused] = []
        for step in range(3):
            x, target = batch(step)
            scaler.scale(nn.functional.cross_entropy(model(x.float()), target)).backward()
            if step == 1 and dist.get_rank() == 1:
                model.blocks[0].fc1.weight.grad.to_local()[0, 0] = float("inf")
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
            steps[fused].append(decay.steps)
    return {"steps": steps}


@scenario(2)
def fsdp1() -> dict[str, Any]:
    def refused(model: nn.Module) -> dict[str, Any]:
        return outcome(lambda: SelectiveSpectralDecay(model))

    wrapped, part = (FullyShardedDataParallel(build(), device_id=torch.device("cpu")) for _ in range(2))
    return refused(wrapped) | {"inside": refused(nn.Sequential(part, nn.Linear(CLASSES, 2)))}


def printed(example: Path) -> dict[str, str]:
    """What an example prints, run in the process group that is there already."""
    group = mock.patch.multiple(dist, init_process_group=mock.DEFAULT, destroy_process_group=mock.DEFAULT)
    with group, contextlib.redirect_stdout(io.StringIO()) as output:
        runpy.run_path(str(example), run_name="__main__")
    return {"printed": output.getvalue()}


def main(folder: Path) -> None:
    faulthandler.dump_traceback_later(HANG, exit=True)  # so that a deadlock shows where, and leaves no process behind
    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=timedelta(seconds=40))
    rank, size = dist.get_rank(), dist.get_world_size()
    work = {name: lambda w=wrap, r=run: train(w, r) for name, (sizes, wrap, run) in TRAININGS.items() if size in sizes}
    for name in RESUMED:
        work[f"{name}, resumed"] = lambda t=TRAININGS[name]: resume(*t[1:])
    if size == 2:
        work |= {example.stem: lambda e=example: printed(e) for example in EXAMPLES}
    work |= {name: function for name, (sizes, function) in SCENARIOS.items() if size in sizes}
    for name, function in work.items():
        try:
            result = function()
        except Exception:
            result = {"traceback": traceback.format_exc()}
        torch.save(result, folder / f"{name}.{rank}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
