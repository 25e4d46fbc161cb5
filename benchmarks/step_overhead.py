"""What S2D adds to a training step: AdamW with and without it, both sides in this process.

    python benchmarks/step_overhead.py                        # the laptop model; target: at most 5 % on 1 CPU thread
    python benchmarks/step_overhead.py --model vit_small_patch16_224 --batch 4 --interval 20 --blocks 3 --write
    python benchmarks/step_overhead.py --model vit_base_patch16_224 --device cuda --batch 64             # at most 2 %
    python benchmarks/step_overhead.py --model vit_base_patch16_224 --device cuda --batch 64 --precision float32

The laptop model is fine-tuned by its own recipe; any other name is a timm model with S2D at its defaults. Blocks of
steps alternate between the two sides, and take turns at going first, so that a change of the machine's speed meets
both. A block is one whole refresh interval, so the refresh is paid for in full.
"""

from __future__ import annotations

import argparse
import statistics

import torch
import torch.nn.functional as F
from common import best_device, hardware, tensor_bytes, timed, write_table
from torch import Tensor, nn
from tqdm import trange

from s2d import SelectiveSpectralDecay
from s2d.lab.recipes import finetuning

REFRESH_EVERY = 100


class Side:
    """One model in training, with S2D or without."""

    def __init__(self, args: argparse.Namespace, with_s2d: bool) -> None:
        self.args = args
        self.model, self.optimizer, self.batch, options = (laptop if args.model == "laptop" else from_timm)(args)
        self.decay = SelectiveSpectralDecay(self.model, **options) if with_s2d else None
        if self.decay:
            self.decay.attach(self.optimizer)
        self.peak = 0

    def train(self) -> None:
        images, labels = self.batch
        for _ in range(self.args.interval):
            with torch.autocast(self.args.device, torch.bfloat16, enabled=self.args.precision == "bf16"):
                loss = F.cross_entropy(self.model(images), labels)
            loss.backward()
            self.optimizer.step()
            self.optimizer.zero_grad()

    def block(self) -> float:
        """Milliseconds a step, over one refresh interval."""
        if self.args.device != "cpu":
            held = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
        seconds, _ = timed(self.train, self.args.device)
        if self.args.device != "cpu":
            self.peak = torch.cuda.max_memory_allocated() - held
        return 1000 * seconds / self.args.interval


Setting = tuple[nn.Module, torch.optim.Optimizer, tuple[Tensor, Tensor], dict]


def laptop(args: argparse.Namespace) -> Setting:
    recipe = finetuning("S2D", seed=0, refresh_every=args.interval)
    model = recipe.model.build(0).to(args.device).train()
    images, labels = recipe.data.training_batch(recipe.batch_size, seed=0, step=0)
    return model, recipe.optimizer.build(model), (images.to(args.device), labels.to(args.device)), recipe.s2d


def from_timm(args: argparse.Namespace) -> Setting:
    import timm  # 7 s of import, of no use to the laptop model

    torch.manual_seed(0)
    model = timm.create_model(args.model).to(args.device).train()
    images = torch.randn(args.batch, *model.default_cfg["input_size"], device=args.device)
    labels = torch.randint(model.num_classes, (args.batch,), device=args.device)
    return model, torch.optim.AdamW(model.parameters(), lr=1e-4), (images, labels), {"refresh_every": args.interval}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="laptop", help="laptop, or a name of timm's")
    parser.add_argument("--device", default=best_device())
    parser.add_argument("--batch", type=int, default=64, help="images a step of a timm model")
    parser.add_argument("--precision", choices=("bf16", "float32"), help="float32 on cpu and bf16 autocast on cuda")
    parser.add_argument("--blocks", type=int, default=7)
    parser.add_argument("--interval", type=int, default=REFRESH_EVERY, help="steps of a block, and between refreshes")
    parser.add_argument("--write", action="store_true", help="keep the table in data/accelerator")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads")
    args = parser.parse_args()
    args.precision = args.precision or ("float32" if args.device == "cpu" else "bf16")
    torch.set_num_threads(args.threads)
    sides = {"AdamW": Side(args, False), "AdamW + S2D": Side(args, True)}
    times: dict[str, list[float]] = {name: [] for name in sides}
    for side in sides.values():
        side.block()  # warm up
    for index in trange(args.blocks, desc="blocks", leave=False):
        for name in list(sides)[:: 1 if index % 2 else -1]:
            times[name].append(sides[name].block())
    for name, values in times.items():
        print(f"{name:12s} {statistics.median(values):8.2f} ms a step (median of {args.blocks} blocks of "
              f"{args.interval}, {min(values):.2f} to {max(values):.2f})")  # fmt: skip
    # Neighbouring blocks share the machine's mood, so each pair is compared by itself.
    added = [100 * (with_ / without - 1) for without, with_ in zip(*times.values(), strict=True)]
    low, middle, high = statistics.quantiles(added, n=4)
    print(f"added time   {middle:8.2f} % (quartiles of the pairs {low:.2f} to {high:.2f})")
    print_memory(*sides.values())
    print(f"{hardware(args.device)}; {args.model}, {args.precision}, a refresh each {args.interval} steps")
    if args.write:
        write_table(
            f"step_overhead_{args.model}_{args.batch}_{args.precision}", table(sides, times, added, args), args.device
        )


def table(
    sides: dict[str, Side], times: dict[str, list[float]], added: list[float], args: argparse.Namespace
) -> list[dict]:
    """A row a side."""
    rows = []
    decay = sides["AdamW + S2D"].decay
    for name, values in times.items():
        row = {"model": args.model, "batch": args.batch, "precision": args.precision, "refresh_every": args.interval}
        row |= {"side": name, "ms_a_step": statistics.median(values), "low": min(values), "high": max(values)}
        row |= {"blocks": args.blocks, "added_percent": statistics.median(added) if "S2D" in name else 0.0}
        row |= {"refresh_seconds": decay.refresh_seconds if "S2D" in name else 0.0, "peak_bytes": sides[name].peak}
        rows.append(row)
    return rows


def print_memory(without: Side, with_: Side) -> None:
    parameters = tensor_bytes(with_.model.parameters())
    state = tensor_bytes(with_.decay.state_dict().values())
    print(
        f"added memory {100 * state / parameters:8.2f} % of the parameters, kept between steps ({state / 1e6:.2f} MB)"
    )
    if with_.peak:
        extra = with_.peak - without.peak
        print(f"             {100 * extra / parameters:8.2f} % on the peak inside a step ({extra / 1e6:.2f} MB)")
    report = with_.decay.report()
    print(f"refresh      {1000 * with_.decay.refresh_seconds:8.2f} ms for {len(report)} layers")


if __name__ == "__main__":
    main()
