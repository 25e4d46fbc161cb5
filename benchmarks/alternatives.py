"""S2D beside what one would otherwise pick, on a stack of transformer MLPs: time a step, memory, accuracy.

    python benchmarks/alternatives.py                # CPU, some minutes
    python benchmarks/alternatives.py --device cuda --width 1024 --depth 12
    python benchmarks/alternatives.py --quick

Every side trains the same network with AdamW in this process. A step that refreshes is timed by itself, and its
surplus is spread over ``refresh_every`` steps. All but the spectral norm penalise the top 3 components of every layer:

* S2D: this package.
* literal Algorithm 1: a full SVD at a refresh, a dense penalty matrix kept for every weight (the components are given;
  its PCDR would take three more SVDs).
* svd_lowrank: ``torch.svd_lowrank`` at its defaults (2 iterations) in place of our solver, all else as in S2D.
* autograd: ``svdvals(W)[:3]**3`` added to the loss, differentiated at every step.
* spectral_norm: PyTorch's parametrization. It does another thing: it divides the weight by sigma_1 at every forward.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable, Iterable

import torch
from common import SPECTRA, drifted, errors, hardware, make_weight, tensor_bytes, timed
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm
from tqdm import tqdm

from s2d import SelectiveSpectralDecay, SingularTriplets, add_spectral_penalty_
from s2d.reference import LiteralAlgorithm1
from s2d.regularizer import REFRESH_TOL
from s2d.spectral import solve_top_triplets

K, LAM, REFRESH_EVERY = 3, 5e-4, 100


class MLP(nn.Module):
    """A residual block; its two weights begin with three components above a gaussian bulk."""

    def __init__(self, width: int, seed: int, device: str) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width, device=device)
        self.fc1 = nn.Linear(width, 4 * width, device=device)
        self.fc2 = nn.Linear(4 * width, width, device=device)
        for layer in (self.fc1, self.fc2):
            layer.weight.data = make_weight("planted", *layer.weight.shape, seed, device)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.fc2(nn.functional.gelu(self.fc1(self.norm(x))))


def svd_lowrank(weight: Tensor) -> SingularTriplets:
    u, s, v = torch.svd_lowrank(weight.detach(), q=K + 5)
    return SingularTriplets(u[:, :K].clone(), s[:K].clone(), v[:, :K].clone())


# Each side: what it does between backward() and the optimizer's step (at a refresh, or not), and what it keeps.
Side = tuple[Callable[[bool], object], Callable[[], Iterable[Tensor]]]


def alone(model: nn.Module, layers: list[nn.Linear], optimizer: torch.optim.Optimizer) -> Side:
    return lambda refresh: None, list


def s2d(model: nn.Module, layers: list[nn.Linear], optimizer: torch.optim.Optimizer) -> Side:
    decay = SelectiveSpectralDecay(model, lam=LAM, k_max=K, refresh_every=10**9, criterion="all")
    decay.attach(optimizer)
    return lambda refresh: refresh and decay.refresh(), lambda: decay.state_dict().values()


def literal(model: nn.Module, layers: list[nn.Linear], optimizer: torch.optim.Optimizer) -> Side:
    weights = [layer.weight for layer in layers]
    options = {"lam": LAM, "power": 2, "tau": 0.95, "k_max": K, "refresh_every": 10**9}
    algorithm = LiteralAlgorithm1(weights, **options, pcdr=lambda layer, weight, k: k // K)

    def penalty(refresh: bool) -> None:
        algorithm.t = 0 if refresh else 1
        algorithm.before_step()

    return penalty, lambda: algorithm.g_reg


def lowrank(model: nn.Module, layers: list[nn.Linear], optimizer: torch.optim.Optimizer) -> Side:
    found: list[SingularTriplets] = []

    @torch.no_grad()
    def penalty(refresh: bool) -> None:
        if refresh or not found:
            found[:] = [svd_lowrank(layer.weight) for layer in layers]
        for layer, triplets in zip(layers, found, strict=True):
            add_spectral_penalty_(layer.weight.grad, triplets, triplets.s**2, scale=LAM)

    return penalty, lambda: [part for triplets in found for part in triplets]


def divided(model: nn.Module, layers: list[nn.Linear], optimizer: torch.optim.Optimizer) -> Side:
    for layer in layers:
        spectral_norm(layer)
    return lambda refresh: None, model.buffers


def differentiated(model: nn.Module, layers: list[nn.Linear], optimizer: torch.optim.Optimizer) -> Side:
    def penalty(refresh: bool) -> None:
        (LAM / 3 * sum((torch.linalg.svdvals(layer.weight)[:K] ** 3).sum() for layer in layers)).backward()

    return penalty, list


SIDES = {"AdamW alone": alone, "S2D": s2d, "literal Algorithm 1": literal, "svd_lowrank": lowrank,
         "spectral_norm": divided, "autograd": differentiated}  # fmt: skip


def training(make: Callable[..., Side], args: argparse.Namespace) -> tuple[Callable[[bool], None], Callable, int]:
    """A function that trains one step, the tensors kept between steps, and the bytes of the parameters."""
    model = nn.Sequential(*(MLP(args.width, seed, args.device) for seed in range(args.depth)))
    layers = [layer for block in model for layer in (block.fc1, block.fc2)]
    parameters = tensor_bytes(model.parameters())
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    penalty, kept = make(model, layers, optimizer)
    x = torch.randn(args.tokens, args.width, device=args.device)

    def step(refresh: bool) -> None:
        model(x).square().mean().backward()
        penalty(refresh)
        optimizer.step()
        optimizer.zero_grad()

    return step, kept, parameters


def step_table(args: argparse.Namespace) -> None:
    sides = {name: training(make, args) for name, make in SIDES.items()}
    plain: dict[str, list[float]] = {name: [] for name in SIDES}
    with_refresh: dict[str, list[float]] = {name: [] for name in SIDES}
    for step, _, _ in sides.values():
        step(False)  # warm up; S2D's later refreshes are warm, as in training
    for _ in tqdm(range(args.rounds), desc="rounds", leave=False):
        for name, (step, _, _) in sides.items():  # in turn, so that a change of the machine's speed meets all
            plain[name] += [
                timed(lambda s=step: s(False), args.device)[0] for _ in range(1 if name == "autograd" else 4)
            ]
            with_refresh[name].append(timed(lambda s=step: s(True), args.device)[0])
    print(f"{'':20s} {'step ms':>9s} {'refresh':>9s} {'amortised':>10s} {'added':>9s} {'to S2D':>9s} {'kept':>9s}")
    step_ms = {name: 1e3 * statistics.median(times) for name, times in plain.items()}
    refreshing = ("S2D", "literal Algorithm 1", "svd_lowrank")
    surplus = {n: 1e3 * statistics.median(with_refresh[n]) - step_ms[n] if n in refreshing else 0.0 for n in SIDES}
    total = {name: step_ms[name] + surplus[name] / REFRESH_EVERY for name in SIDES}
    for name, (_, kept, parameters) in sides.items():
        print(f"{name:20s} {step_ms[name]:9.2f} {surplus[name]:9.2f} {total[name]:10.2f} "
              f"{100 * (total[name] / total['AdamW alone'] - 1):8.1f}% {total[name] / total['S2D']:8.2f}x "
              f"{100 * tensor_bytes(kept()) / parameters:8.2f}%")  # fmt: skip
    print(f"amortised: step + refresh / {REFRESH_EVERY}; added: to AdamW alone; kept: between steps, of the parameters")


def accuracy_table(args: argparse.Namespace) -> None:
    shape = (4 * args.width, args.width)
    print(f"\none {shape[0]}x{shape[1]} weight after a drift of 1e-2: errors of its top {K} against float64")
    for kind in tqdm(SPECTRA, desc="spectra", leave=False):
        before = make_weight(kind, *shape, 0, args.device)
        warm = [s.triplets for s in solve_top_triplets([before], K, tol=REFRESH_TOL)]
        weight = drifted(before, 1e-2, 1)

        def ours(weight=weight, warm=warm) -> SingularTriplets:
            return solve_top_triplets([weight], K, warm_starts=warm, tol=REFRESH_TOL)[0].triplets

        def full(weight=weight) -> SingularTriplets:
            u, s, vh = torch.linalg.svd(weight, full_matrices=False)
            return SingularTriplets(u[:, :K], s[:K], vh[:K].T)

        for name, solve in (("S2D, warm", ours), ("svd_lowrank", lambda w=weight: svd_lowrank(w)), ("full SVD", full)):
            runs = [timed(solve, args.device) for _ in range(3)]
            values, penalty = errors(weight, runs[-1][1])
            seconds = statistics.median(seconds for seconds, _ in runs)
            tqdm.write(f"{kind:10s} {name:12s} {1e3 * seconds:9.2f} ms   values {values:8.1e}   penalty {penalty:8.1e}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads")
    parser.add_argument("--width", type=int, default=384)
    parser.add_argument("--depth", type=int, default=4, help="MLP blocks")
    parser.add_argument("--tokens", type=int, default=512, help="inputs a step")
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--quick", action="store_true", help="2 blocks of width 256, 512 inputs, 2 rounds")
    args = parser.parse_args()
    if args.quick:
        args.width, args.depth, args.tokens, args.rounds = 256, 2, 512, 2
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    for table in (step_table, accuracy_table):
        table(args)
    print(f"\n{hardware(args.device)}; {args.depth} MLPs of width {args.width}, {args.tokens} inputs a step")


if __name__ == "__main__":
    main()
