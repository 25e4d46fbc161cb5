"""``s2d estimate`` against the clock: fitted on a few transformer blocks, checked on networks that it has not seen.

    python benchmarks/estimate.py                     # on the accelerator, or 1 CPU thread; some minutes
    python benchmarks/estimate.py --write             # keeps the table and the speed in data/accelerator
    python benchmarks/estimate.py --tables h200       # the speed of a device of which only older tables are here

The speed of the device is measured as the command does it. Then each network is trained for some steps, and beside each
prediction (a step, what S2D adds to it, a refresh, the activations kept) stands what was measured. The step is the
forward and backward pass and AdamW; a refresh begins from the triplets of the one before.
"""

from __future__ import annotations

import argparse
import csv
import statistics

import torch
from common import TABLES, best_device, hardware, slug, timed, write_table
from torch import nn
from tqdm import tqdm

from s2d import SelectiveSpectralDecay, linear_maps
from s2d.estimate import (
    DRIFT,
    Amount,
    Sample,
    Speed,
    WatchedWeight,
    Work,
    count_work,
    fit_speed,
    measure_speed,
    nonnegative_fit,
    predict,
    speed_as_text,
)
from s2d.files import write_text
from s2d.regularizer import REFRESH_TOL
from s2d.spectral import solve_top_triplets

# Model of timm and images a step, by whether there is an accelerator.
TINY, SMALL, BASE, LARGE = (f"vit_{size}_patch16_224" for size in ("tiny", "small", "base", "large"))
HELD_OUT = {
    "cpu": ((TINY, 2), (SMALL, 4), (BASE, 1)),
    "cuda": ((SMALL, 64), (SMALL, 256), (BASE, 64), (BASE, 256), (LARGE, 64)),
}
WIDTHS = (1024, 1536, 4096)  # of single weights whose refresh is timed
REPEATS = 3


def build(name: str, device: str) -> nn.Module:
    import timm  # 7 s of import, not needed for --help

    torch.manual_seed(0)
    return timm.create_model(name).to(device).train()


def counted(model: nn.Module, name: str, precision: str, device: str) -> Work:
    size = model.default_cfg["input_size"]

    def loss(items: int) -> torch.Tensor:
        return model(torch.randn(items, *size, device=device)).float().square().mean()

    return count_work(model, loss, linear_maps(model), name=name, precision=precision)


def network(name: str, batch: int, speed: Speed, args: argparse.Namespace) -> list[dict]:
    """What was predicted of a network and what was measured."""
    model = build(name, args.device)
    work = counted(model, name, args.precision, args.device)
    predicted = predict(work, speed, steps=100, batch_size=batch)
    x = torch.randn(batch, *model.default_cfg["input_size"], device=args.device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)

    def step() -> None:
        with torch.autocast(args.device, torch.bfloat16, enabled=args.precision == "bf16"):
            value = model(x).float().square().mean()
        value.backward()
        optimizer.step()
        optimizer.zero_grad()

    def median(action) -> float:
        action()
        return statistics.median(timed(action, args.device)[0] for _ in range(REPEATS))

    seconds = median(step)
    peak = None
    if args.device != "cpu":
        held = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        step()
        peak = torch.cuda.max_memory_allocated() - held
    # Its own difference, since a step scatters by more than what S2D adds to it.
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    still = torch.optim.SGD(model.parameters(), lr=0.0)
    without = median(still.step)
    decay = SelectiveSpectralDecay(model, criterion="all", refresh_every=10**9, lam=1e-9)
    decay.attach(still)
    penalty = median(still.step) - without
    refresh = median(decay.refresh)
    rows = [
        ("a step", predicted.step_seconds, seconds),
        ("S2D in a step", predicted.penalty_seconds, penalty),
        ("a refresh", predicted.refresh_seconds, refresh),
    ]
    if peak is not None:
        own = predicted.memory["activations"] + predicted.memory["gradients"]
        rows.append(("bytes: activations, gradients", own, peak))
    return [row(f"{name}, batch {batch}", *found, args) for found in rows]


def row(what: str, quantity: str, predicted: float, measured: float, args: argparse.Namespace) -> dict:
    tqdm.write(f"{what:34s} {quantity:30s} {predicted:12.4g} {measured:12.4g} {predicted / measured:8.2f}")
    found = {"network": what, "precision": args.precision, "quantity": quantity}
    return found | {"predicted": float(predicted), "measured": float(measured), "ratio": predicted / measured}


def single_weights(speed: Speed, args: argparse.Namespace) -> list[dict]:
    """The refresh of one flat weight of widths between and beyond those that were fitted."""
    rows = []
    for width in WIDTHS:
        generator = torch.Generator().manual_seed(1)
        weight = (torch.randn(width, width, generator=generator) / (2 * width**0.5)).to(args.device)
        start = solve_top_triplets([weight], 3, tol=REFRESH_TOL, max_products=10**6)[0]
        noise = torch.randn(width, width, generator=generator).to(args.device)
        moved = weight + noise * (DRIFT * weight.norm() / noise.norm())
        warm = [start.triplets]

        def refresh(weight: torch.Tensor = moved, warm: list = warm) -> list:
            return solve_top_triplets([weight], 3, warm_starts=warm, tol=REFRESH_TOL)

        runs = [timed(refresh, args.device) for _ in range(REPEATS)]
        (solved,) = runs[0][1]
        nothing, itself = Amount(0.0, 0.0), WatchedWeight((width, width), 0, solved.products)
        work = Work("one weight", args.precision, 0, nothing, nothing, nothing, 0, (itself,))
        predicted = predict(work, speed, steps=1, batch_size=1).refresh_seconds
        seconds = statistics.median(seconds for seconds, _ in runs)
        what = f"one flat {width}x{width} weight"
        rows.append(row(what, f"a refresh, {solved.products} products", predicted, seconds, args))
    return rows


def from_tables(suffix: str) -> None:
    """A speed from earlier tables: steps of a ViT-B at two batch sizes, refreshes, one overhead."""
    work = counted(build("vit_base_patch16_224", "cpu"), "vit_base_patch16_224", "bf16", "cpu")
    with (TABLES / f"step_overhead_{suffix}.csv").open() as file:
        steps = list(csv.DictReader(file))
    with (TABLES / f"refresh_{suffix}.csv").open() as file:
        refreshes = list(csv.DictReader(file))
    plain = {int(r["batch"]): float(r["ms_a_step"]) / 1000 for r in steps if r["side"] == "AdamW"}
    # The smaller batch waits for the host. Neither AdamW nor the traffic can be told apart in these, so the operations
    # stand for all, as in the network that was timed.
    smallest, largest = min(plain), max(plain)
    calls = Sample(1.0, 0.0, work.calls, plain[smallest])
    device = Sample(work.flops.of(largest), 0.0, work.calls, plain[largest])
    products = []
    for r in refreshes:
        if r["state"].startswith("drift") and int(r["full_svds"]) == 0:
            square = r["weights"].startswith("one")
            width = int(r["weights"].split()[1]) if square else None
            shapes = [(width, width)] if square else [weight.shape for weight in work.weights]
            products.append((shapes, float(r["products"]), float(r["ours_seconds"])))
    per_product = [
        (1.0, sum(m * n for m, n in shapes) / len(shapes) * 8, sum(m + n for m, n in shapes) / len(shapes) * 64)
        for shapes, _, _ in products
    ]
    seconds = [taken / count / len(shapes) for shapes, count, taken in products]
    coefficients = nonnegative_fit(per_product, seconds)
    fitted = [sum(c * f for c, f in zip(coefficients, features, strict=True)) for features in per_product]
    margin = max(abs(f / s - 1) for f, s in zip(fitted, seconds, strict=True))
    added = {int(r["batch"]): float(r["ms_a_step"]) / 1000 for r in steps if "S2D" in r["side"]}[largest] - plain[
        largest
    ]
    flat = next(taken for shapes, count, taken in products if len(shapes) > 1 and count > 20)
    layer = max(added - flat / 100, 0.0) / len(work.weights)
    name = {"h200": "NVIDIA H200"}.get(suffix, suffix)
    speed = fit_speed([calls, device], device=name, precision="bf16", overlaps=True, penalty=(layer, 0.0),
                      product=tuple(coefficients), margin=margin)  # fmt: skip
    path = TABLES / f"speed_{suffix}.json"
    write_text(path, speed_as_text(speed))
    print(f"{speed}\nwritten: {path}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default=best_device())
    parser.add_argument("--precision", choices=("bf16", "float32"), help="float32 on cpu and bf16 autocast on cuda")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads")
    parser.add_argument("--seconds", type=float, default=30.0, help="of measuring the device")
    parser.add_argument("--quick", action="store_true", help="the first network alone")
    parser.add_argument("--write", action="store_true", help="keep the table and the speed in data/accelerator")
    parser.add_argument("--tables", metavar="SUFFIX", help="make data/accelerator/speed_SUFFIX.json of its tables")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.tables:
        from_tables(args.tables)
        return
    args.precision = args.precision or ("float32" if args.device == "cpu" else "bf16")
    speed = measure_speed(args.device, precision=args.precision, seconds=args.seconds, progress=tqdm.write)
    print(f"{speed}\n\n{'held out':34s} {'':30s} {'predicted':>12s} {'measured':>12s} {'ratio':>8s}")
    rows = []
    for name, batch in HELD_OUT["cpu" if args.device == "cpu" else "cuda"][: 1 if args.quick else None]:
        rows += network(name, batch, speed, args)
    rows += [] if args.quick else single_weights(speed, args)
    worst = max(rows, key=lambda found: abs(found["ratio"] - 1))
    inside = sum(abs(found["ratio"] - 1) <= speed.margin for found in rows)
    print(f"\n{inside} of {len(rows)} within the margin that it gives, {100 * speed.margin:.0f} %; worst: "
          f"{worst['network']}, {worst['quantity']}, {worst['ratio']:.2f}")  # fmt: skip
    print(hardware(args.device))
    if args.write:
        write_table("estimate", rows, args.device)
        write_text(TABLES / f"speed_{slug(args.device)}.json", speed_as_text(speed))


if __name__ == "__main__":
    main()
