"""Looks for a false claim of Theorem 1's code: an enclosure without the norm in it, or a violation that is none.

    python tests/stress_bound.py --seconds 600 --seed 1 [--device cuda]

The test-suite runs a short version. Every case is drawn from its own number, which is printed when it fails:
``python tests/stress_bound.py --only NUMBER`` repeats it.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import math
import time
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn

from s2d.bound import check_bound, spectral_norm_bounds
from s2d.layers import linear_maps

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
ORACLE = 1e-13  # the rounding of LAPACK's own float64 answer, relative


class Draw:
    """Everything a case is made of, from one seed."""

    def __init__(self, seed: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)

    def whole(self, low: int, high: int) -> int:
        return int(torch.randint(low, high + 1, (), generator=self.generator))

    def pick(self, *choices):
        return choices[self.whole(0, len(choices) - 1)]

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self.generator, dtype=torch.float64)

    def matrix(self, m: int, n: int) -> Tensor:
        """One of the spectra that a method could stumble over, scaled to a norm near 1."""
        kind, r = self.whole(0, 6), min(m, n)
        if kind == 0:
            return self.normal(m, n) / (m**0.5 + n**0.5)
        if kind == 1:  # entries of very different size
            return self.normal(m, n) * 10.0 ** (4 * self.normal(m, n)).clamp(-12, 0)
        index = torch.arange(r, dtype=torch.float64)
        s = {
            2: torch.ones(r, dtype=torch.float64),
            3: 1 - index / (2 * r),
            4: (index < self.whole(1, r)).double(),
            5: 1 - 1e-9 * index,
            6: 10.0 ** -index.clamp(max=150),
        }[kind]
        u, _ = torch.linalg.qr(self.normal(m, r))
        v, _ = torch.linalg.qr(self.normal(n, r))
        return (u * s) @ v.T

    def scale(self, dtype: torch.dtype) -> float:
        """From among the subnormal numbers of a dtype to the square root of its largest."""
        info = torch.finfo(dtype)
        low, high = math.log10(info.smallest_normal * info.eps), math.log10(info.max) / 2
        return 10.0 ** (low + (high - low) * torch.rand((), generator=self.generator).item() ** 0.5)


def false_enclosure(draw: Draw, device: str) -> str | None:
    """An enclosure that leaves the norm out, or is wider than asked for where it need not be."""
    m, n = (draw.pick(draw.whole(1, 12), draw.whole(1, 150)) for _ in range(2))
    dtype, rtol = draw.pick(*DTYPES), draw.pick(1e-3, 1e-3, 1e-6, 0.1)
    weight = (draw.matrix(m, n) * draw.scale(dtype)).to(dtype)
    truth = torch.linalg.svdvals(weight.double())[0].item()
    lower, upper = spectral_norm_bounds(weight.to(device), rtol=rtol)
    # Norms among the subnormal numbers of float64 cannot be tight.
    wide = truth > 1e-300 and upper > lower * (1 + rtol)
    if wide or not lower <= truth * (1 + ORACLE) or not truth * (1 - ORACLE) <= upper:
        return f"{m}x{n} {dtype} rtol {rtol}: {lower} <= {truth} <= {upper}"
    return None


def false_violation(draw: Draw, device: str) -> str | None:
    """A layer that computes what it should, and is said to break the theorem."""
    dtype = draw.pick(*DTYPES)
    autocast = draw.pick(None, None, torch.bfloat16, torch.float16) if dtype == torch.float32 else None
    model, args = draw.pick(linear, linear, convolution, convolution, attention)(draw)
    narrow = autocast or dtype
    scale, bias_scale, x_scale = draw.scale(narrow), draw.pick(0.0, 1.0, draw.scale(narrow)), draw.scale(narrow)
    for name, parameter in model.named_parameters():
        parameter.data = parameter.double() * (bias_scale if "bias" in name else scale)
    model = model.to(device, dtype).eval()
    args = tuple((x * x_scale).to(device, dtype) for x in args)
    context = torch.autocast(device, autocast) if autocast else contextlib.nullcontext()
    try:
        with context:
            rows = check_bound(model, args, layers=linear_maps(model, include="*"))
    except ValueError as error:
        if "NaN or infin" in str(error):  # the scales overflow in this dtype
            return None
        raise
    wrong = [row for row in rows if not row.holds]
    return f"{model} {dtype} {autocast} scales {scale} {bias_scale} {x_scale}: {wrong}" if wrong else None


def inputs(draw: Draw, matrix: Tensor, count: int) -> Tensor:
    """Inputs that reach the bound, and others."""
    top = torch.linalg.svd(matrix)[2][0]
    x = draw.normal(count, matrix.shape[1])
    x[::2] = top * draw.normal(len(x[::2]), 1)
    x[draw.whole(0, count - 1)] = 0.0
    return x


def linear(draw: Draw) -> tuple[nn.Module, tuple[Tensor, ...]]:
    m, n = draw.whole(1, 100), draw.whole(1, 100)
    layer = nn.Linear(n, m, bias=draw.pick(True, False)).double()
    layer.weight.data = draw.matrix(m, n)
    return layer, (inputs(draw, layer.weight.data, draw.whole(1, 9)),)


def convolution(draw: Draw) -> tuple[nn.Module, tuple[Tensor, ...]]:
    axes = draw.whole(1, 3)
    groups, per_group, out = draw.pick(1, 1, 2, 3), draw.whole(1, 8), draw.whole(1, 8)
    size = [draw.whole(1, 3) for _ in range(axes)]
    conv = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[axes - 1](
        groups * per_group,
        groups * out,
        size,
        stride=draw.whole(1, 3),
        padding=draw.whole(0, 2),
        dilation=draw.whole(1, 2),
        groups=groups,
        bias=draw.pick(True, False),
        padding_mode=draw.pick("zeros", "zeros", "circular", "replicate"),
    ).double()
    matrix = torch.cat([draw.matrix(out, conv.weight[0].numel()) for _ in range(groups)])
    conv.weight.data = matrix.reshape(conv.weight.shape)
    x = 0.01 * draw.pick(0.0, 1.0) * draw.normal(3, conv.in_channels, *[9] * axes)
    x[1] += draw.normal(*x[1].shape)
    # Every group's best patch, at the first position of the output that lies clear of the padding.
    window = [slice(None), slice(None)]
    for k, stride, padding, dilation in zip(conv.kernel_size, conv.stride, conv.padding, conv.dilation, strict=True):
        start = -padding % stride
        window.append(slice(start, start + dilation * (k - 1) + 1, dilation))
    top = torch.cat([torch.linalg.svd(part)[2][0] for part in matrix.split(out)])
    x[tuple(window)] = top.reshape(1, conv.in_channels, *size).expand(3, -1, *[-1] * axes)
    return conv, (x,)


def attention(draw: Draw) -> tuple[nn.Module, tuple[Tensor, ...]]:
    heads, width = draw.whole(1, 3), draw.whole(1, 12)
    width *= heads
    kdim, vdim = draw.pick((width, width), (draw.whole(1, 20), draw.whole(1, 20)))
    layer = nn.MultiheadAttention(width, heads, kdim=kdim, vdim=vdim, batch_first=True).double()
    tokens = []
    for linear_map in linear_maps(layer).values():
        linear_map.matrix().data.copy_(draw.matrix(*linear_map.shape))
        tokens.append(inputs(draw, linear_map.matrix().data, 5)[None])
    return layer, tuple(tokens)


KINDS = (false_enclosure, false_violation)


def stress(numbers: Iterable[int], device: str = "cpu") -> Iterator[str]:
    """The failures among the cases of these numbers."""
    for number in numbers:
        failure = KINDS[number % 2](Draw(number), device)
        if failure is not None:
            yield f"case {number}: {failure}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=600)
    parser.add_argument("--seed", type=int, default=1, help="millions of cases apart")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--only", type=int, help="the number of one case")
    options = parser.parse_args()
    if options.only is not None:
        raise SystemExit("\n".join(stress([options.only], options.device)))
    end, first = time.monotonic() + options.seconds, 1_000_000 * options.seed
    failures = done = 0
    for number in itertools.takewhile(lambda _: time.monotonic() < end, itertools.count(first)):
        for failure in stress([number], options.device):
            failures += 1
            print(failure, flush=True)
        done += 1
    print(f"{done} cases on {options.device}, {failures} false claims")
    raise SystemExit(failures > 0)


if __name__ == "__main__":
    main()
