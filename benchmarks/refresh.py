"""One refresh of every block Linear of a ViT-B/16, warm, against ``torch.linalg.svd`` of the same weights.

    python benchmarks/refresh.py                    # on the accelerator, or 2 CPU threads; some minutes
    python benchmarks/refresh.py --only width --write      # keeps the table in data/accelerator
    python benchmarks/refresh.py --quick            # 1 block, narrow, nothing repeated

Both sides run in this process. Weights are random with known spectra; the warm start is the answer for the weight
before a random drift, as between two refreshes. The SVD is timed on one weight of each shape and multiplied, unless
``--full``. Targets: 25 times faster on 2 CPU cores, 100 times on a GPU; error of the three singular values at most
1e-5, of the penalty ``U diag(s^2) V^T`` at most 1e-3 (against float64, one weight of each shape).
"""

from __future__ import annotations

import argparse
import statistics

import torch
from common import SPECTRA, best_device, drifted, errors, hardware, make_weight, tensor_bytes, timed, write_table
from torch import Tensor
from tqdm import tqdm

from s2d import SelectiveSpectralDecay
from s2d.regularizer import REFRESH_TOL
from s2d.spectral import SolvedTriplets, solve_top_triplets

SHAPES = ((2304, 768), (768, 768), (3072, 768), (768, 3072))  # qkv, proj, fc1, fc2
DRIFTS = (1e-2, 1e-3)
K = 3


def refresh(groups: list[list[Tensor]], warm: list[list[SolvedTriplets]] | None) -> list[list[SolvedTriplets]]:
    """The weights of each shape side by side, as the regularizer solves them."""
    return [
        solve_top_triplets(
            weights, K, warm_starts=None if warm is None else [s.triplets for s in warm[i]], tol=REFRESH_TOL
        )
        for i, weights in enumerate(groups)
    ]


def median_refresh(groups, warm, device: str, repeats: int) -> tuple[float, list[SolvedTriplets]]:
    runs = [timed(lambda: refresh(groups, warm), device) for _ in range(repeats)]
    return statistics.median(seconds for seconds, _ in runs), [s for group in runs[0][1] for s in group]


def svd_seconds(groups: list[list[Tensor]], args: argparse.Namespace) -> float:
    total = 0.0
    for weights in groups:
        sample = weights if args.full else weights[:1]
        times = [
            timed(lambda w=w: torch.linalg.svd(w, full_matrices=False), args.device)[0] for w in sample * args.repeats
        ]
        total += statistics.median(times) * len(weights)
    return total


def vit_table(args: argparse.Namespace) -> None:
    count = 4 * args.layers
    print(f"\nrefresh of {count} weights ({args.layers} blocks), k={K}, tol={REFRESH_TOL:g}")
    print(f"{'spectrum':10s} {'drift':>6s} {'svd s':>8s} {'ours s':>8s} {'ratio':>7s} {'products':>9s} {'full svd':>9s}"
          f"{'values':>9s} {'penalty':>8s}")  # fmt: skip
    for kind in tqdm(SPECTRA, desc="spectra", leave=False):
        before = [[make_weight(kind, *shape, seed, args.device) for seed in range(args.layers)] for shape in SHAPES]
        cold_seconds, cold = median_refresh(before, None, args.device, repeats=1)
        svd = svd_seconds(before, args)
        shown = [("cold", cold_seconds, cold, before)]
        warm = [cold[i : i + args.layers] for i in range(0, count, args.layers)]
        for drift in DRIFTS:
            after = [[drifted(w, drift, seed) for seed, w in enumerate(weights)] for weights in before]
            shown.append((f"{drift:g}", *median_refresh(after, warm, args.device, args.repeats), after))
        for label, seconds, solved, groups in shown:
            wrong = [errors(weights[0], solved[i * args.layers].triplets) for i, weights in enumerate(groups)]
            products = statistics.mean(s.products for s in solved)
            values, penalty = (max(column) for column in zip(*wrong, strict=True))
            tqdm.write(f"{kind:10s} {label:>6s} {svd:8.3f} {seconds:8.4f} {svd / seconds:7.1f} {products:9.1f} "
                  f"{sum(s.full_svd for s in solved):8d} {values:8.1e} {penalty:8.1e}")  # fmt: skip
    kept = tensor_bytes(part for s in cold for part in s.triplets)
    weights = tensor_bytes(w for group in before for w in group)
    print(f"kept between refreshes: {kept / 1e6:.2f} MB of triplets, {100 * kept / weights:.2f} % of the weights")
    if args.device.startswith("cuda"):
        held = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        refresh(after, warm)
        extra = torch.cuda.max_memory_allocated() - held
        print(f"peak extra memory of a refresh: {extra / 1e6:.1f} MB, {100 * extra / weights:.1f} % of the weights")


def width_table(args: argparse.Namespace) -> list[dict]:
    """One square weight, warm: the full SVD, the triplets, and the spectral criterion with and without its bound.

    The last two sides are whole refreshes of ``SelectiveSpectralDecay(criterion="spectral")`` at its defaults, the one
    made to find the triplets as if nothing could be certified. Both have to come to the same rank.
    """
    print(f"\none square weight, warm (drift {DRIFTS[0]:g}), k={K}; criterion 'spectral' with tau=0.95")
    print(f"{'width':>6s} {'spectrum':10s} {'svd s':>8s} {'triplets s':>10s} {'products':>9s} {'svd/triplets':>12s} "
          f"{'decided by triplets s':>21s} {'by the bound s':>14s} {'ratio':>7s}")  # fmt: skip
    rows = []
    for width in tqdm(args.widths, desc="widths", leave=False):
        svd = None
        for kind in ("planted", "flat"):
            weight = make_weight(kind, width, width, 0, args.device)
            if svd is None and (args.device != "cpu" or width <= 2048 or args.full):
                svd, _ = timed(lambda w=weight: torch.linalg.svd(w, full_matrices=False), args.device)
            # Only to start from; a full SVD of the widest would take longer than all the rest.
            start = solve_top_triplets([weight], K, tol=REFRESH_TOL, max_products=10**6)
            layer = torch.nn.Linear(width, width, bias=False)
            layer.weight = torch.nn.Parameter(drifted(weight, DRIFTS[0], 1))
            del weight
            seconds, (solved,) = median_refresh([[layer.weight.data]], [start], args.device, args.repeats)
            by_triplets, slow = decided(layer, start[0], False, args)
            by_bound, fast = decided(layer, start[0], True, args)
            assert slow["rank"] == fast["rank"] and not slow["certified"], "the bound must not change a decision"
            ratio = "skipped" if svd is None else f"{svd / seconds:.1f}"
            certified = "" if fast["certified"] else " (not certified)"
            tqdm.write(f"{width:6d} {kind:10s} {'skipped' if svd is None else f'{svd:.3f}':>8s} {seconds:10.4f} "
                       f"{solved.products:8d}{'!' if solved.full_svd else ' '} {ratio:>12s} {by_triplets:21.4f} "
                       f"{by_bound:14.4f} {by_triplets / by_bound:7.1f}{certified}")  # fmt: skip
            rows.append(
                {
                    "width": width,
                    "spectrum": kind,
                    "svd_seconds": svd,
                    "triplets_seconds": seconds,
                    "products": solved.products,
                    "full_svd": solved.full_svd,
                    "spectral_by_triplets_seconds": by_triplets,
                    "spectral_by_bound_seconds": by_bound,
                    "certified": fast["certified"],
                    "rank": fast["rank"],
                }
            )
    return rows


def decided(layer: torch.nn.Linear, start: SolvedTriplets, bound: bool, args: argparse.Namespace) -> tuple[float, dict]:
    """Median seconds of a refresh by the spectral criterion, and its report."""
    decay = SelectiveSpectralDecay(layer, criterion="spectral", k_max=K)
    state = decay.state_dict() | {f".{name}": part for name, part in start.triplets._asdict().items()}
    zeros = torch.zeros(K, device=args.device)
    decay.load_state_dict(state | {".pcdr": zeros, ".info": torch.zeros(3).double(), ".spent": zeros})
    if not bound:
        decay._certificate = lambda matrix, k: None
    before = decay.state_dict()
    times = []
    for _ in range(args.repeats):
        decay.load_state_dict(before)
        times.append(timed(decay.refresh, args.device)[0])
    return statistics.median(times), decay.report()[0]


def count_table(args: argparse.Namespace) -> None:
    print(f"\nweights of 768x768 together, planted, warm (drift {DRIFTS[0]:g})")
    print(f"{'weights':>8s} {'seconds':>9s} {'ms each':>8s}")
    before = [make_weight("planted", 768, 768, seed, args.device) for seed in range(12 if args.quick else 48)]
    (cold,) = refresh([before], None)
    after = [drifted(w, DRIFTS[0], seed) for seed, w in enumerate(before)]
    for count in (c for c in (1, 4, 12, 48) if c <= len(after)):
        seconds, _ = median_refresh([after[:count]], [cold[:count]], args.device, args.repeats)
        print(f"{count:8d} {seconds:9.4f} {1000 * seconds / count:8.2f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default=best_device())
    parser.add_argument("--threads", type=int, default=2, help="CPU threads")
    parser.add_argument("--layers", type=int, default=12, help="transformer blocks")
    parser.add_argument("--quick", action="store_true", help="1 block, widths up to 1024, one run of each")
    parser.add_argument("--full", action="store_true", help="time every SVD instead of a sample")
    parser.add_argument("--only", choices=("vit", "width", "count"), help="one of the three tables")
    parser.add_argument("--widths", type=int, nargs="+", help="of the second table (default: 384 to 8192)")
    parser.add_argument("--write", action="store_true", help="keep the second table in data/accelerator")
    args = parser.parse_args()
    args.layers, args.repeats = (1, 1) if args.quick else (args.layers, 3)
    args.widths = args.widths or ((512, 1024) if args.quick else (384, 768, 1536, 2048, 4096, 8192))
    torch.set_num_threads(args.threads)
    warm_up = make_weight("flat", 768, 768, 0, args.device)
    refresh([[warm_up]], None)
    torch.linalg.svd(warm_up)
    tables = {"vit": vit_table, "width": width_table, "count": count_table}
    found = {name: table(args) for name, table in tables.items() if args.only in (None, name)}
    if args.write and "width" in found:
        write_table("refresh", found["width"], args.device)
    sampled = "every SVD timed" if args.full else "SVD timed on one weight of each shape, and multiplied"
    print(f"\n{hardware(args.device)}; {sampled}; ! = answered by the full SVD")


if __name__ == "__main__":
    main()
