r"""What a training run with S2D will cost: a model with a handful of coefficients, fitted to half a minute of timing.

Three things are kept apart. :class:`Work` is what one step of a network asks for (operations, bytes, calls, shapes of
the watched weights), counted, not timed. :class:`Speed` is how fast a device does such things, fitted to what
:func:`measure_speed` times there, or to timings from elsewhere. :func:`predict` puts them together, so that a laptop
can say what a run will take on an accelerator whose speed was measured once.

.. math::
    t_\text{step} &= \frac{\text{operations}}{F} + \frac{\text{bytes}}{B} + c \cdot \text{calls} + a \cdot
        \text{parameters} \\
    t_\text{penalty} &= \sum_\text{layers} p_0 + p_1 mn + \frac{2mn(k-3)}{F} \\
    t_\text{refresh} &= \sum_\text{layers} \text{products} \cdot (r_0 + r_1 mnb + r_2 (m+n) b^2), \qquad
        b = 8 \lceil (k+5)/8 \rceil

On an accelerator calls are queued while it works, so the longer of the two, ``c * calls`` and the rest, counts.

Paper: none; the paper gives the cost of one refresh on one machine (main text, second-hand).
"""

from __future__ import annotations

import itertools
import json
import math
import platform
import statistics
import time
from collections import Counter
from collections.abc import Callable, Sequence
from os import PathLike
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from s2d.checks import check_count, check_number
from s2d.layers import LinearMap
from s2d.regularizer import REFRESH_TOL, SelectiveSpectralDecay
from s2d.spectral import BATCH_ENTRIES, KRYLOV_DEPTHS, solve_top_triplets

PRECISIONS = {"float32": torch.float32, "bf16": torch.bfloat16}
LEAST_MARGIN = 0.15  # what a prediction is off by at the best; ours
MEASURED_K = 3  # components that the penalty is timed with
CALIBRATION_WIDTHS = (192, 384, 768)  # of transformer blocks
CALIBRATION_TOKENS = 197
REFRESH_WIDTHS = (256, 768, 2048)
# Width, and how many. No large powers of two: their columns fall on the same lines of a processor's cache.
PENALTY_LAYERS = ((192, 24), (384, 12), (768, 8))
DRIFT = (
    1e-3  # relative change of a weight between two refreshes; a training step moves them less at the end, more at first
)


class Amount(NamedTuple):
    """An amount that is ``fixed + item * n`` for a batch of n."""

    fixed: float
    item: float

    def of(self, items: float) -> float:
        """The amount for a batch.

        Example:
            >>> Amount(1.0, 2.0).of(3)
            7.0

        Paper: none.
        """
        return self.fixed + self.item * items


class WatchedWeight(NamedTuple):
    """The weight of a watched layer.

    Attributes:
        shape: ``(out_features, in_features)``.
        cold, warm: block products that the solver takes at the first refresh, and at a later one.
    """

    shape: tuple[int, int]
    cold: int
    warm: int


class Work(NamedTuple):
    """What one training step of a network asks of a device; counted by :func:`count_work`.

    Attributes:
        name: of the network.
        precision: ``"float32"``, or ``"bf16"`` for autocast.
        parameters: how many numbers are trained.
        flops: floating-point operations of the forward and the backward pass.
        traffic: bytes that their operators read and write.
        saved: bytes kept from the forward for the backward pass, parameters left out.
        calls: operators called.
        weights: the weights that S2D watches.
    """

    name: str
    precision: str
    parameters: int
    flops: Amount
    traffic: Amount
    saved: Amount
    calls: int
    weights: tuple[WatchedWeight, ...]


class Speed(NamedTuple):
    """How fast a device is: the coefficients of the model, in seconds for one of each.

    Attributes:
        device: its name, with the number of CPU threads where it is a processor.
        precision: as in :class:`Work`.
        overlaps: whether calls are queued while the device works.
        flop, byte, call: of the forward and the backward pass.
        parameter: of the optimizer's step (AdamW).
        penalty: for a layer, and for an entry of its weight.
        product: of a refresh, for a block product, for an entry times the block's width, and for a row or column times
            the square of that.
        margin: relative error to expect, from what the fit leaves.
    """

    device: str
    precision: str
    overlaps: bool
    flop: float
    byte: float
    call: float
    parameter: float
    penalty: tuple[float, float]
    product: tuple[float, float, float]
    margin: float


class Sample(NamedTuple):
    """A step that was timed: forward and backward pass."""

    flops: float
    traffic: float
    calls: int
    seconds: float


class Estimate(NamedTuple):
    """What a run will take, by the wall clock; data loading and the exchange between devices are not in it.

    Attributes:
        step_seconds: one step without S2D.
        penalty_seconds: what S2D adds to every step.
        refresh_seconds: one refresh, all layers, shared out over the devices.
        first_refresh_seconds: the first one, which has no triplets to start from.
        watch_seconds: what seeing the outliers adds to the forward pass before a refresh (activation criterion).
        overhead: what S2D adds, relative to a run without.
        hours: the whole run.
        device_hours: that times the number of devices.
        margin: relative error of the times to expect.
        memory: bytes on each device by what they hold.
        checkpoint_bytes: weights, the state of AdamW, and that of S2D.
        items_per_second: over all devices.
    """

    step_seconds: float
    penalty_seconds: float
    refresh_seconds: float
    first_refresh_seconds: float
    watch_seconds: float
    overhead: float
    hours: float
    device_hours: float
    margin: float
    memory: dict[str, int]
    checkpoint_bytes: int
    items_per_second: float


def predict(
    work: Work,
    speed: Speed,
    *,
    steps: int,
    batch_size: int,
    refresh_every: int = 100,
    k_max: int = 3,
    criterion: str = "activation",
    devices: int = 1,
    accumulate: int = 1,
) -> Estimate:
    """What a run will take on a device: nothing is timed here.

    Args:
        work: what a step asks for, from :func:`count_work`.
        speed: of the device, from :func:`measure_speed` or :func:`load_speed`.
        steps: optimizer steps.
        batch_size: items that pass through one device at a time.
        refresh_every, k_max, criterion: as in :class:`s2d.SelectiveSpectralDecay`, whose cached coefficients are
            meant. With ``"spectral"`` the layers are taken not to be certified, which is the dearer case.
        devices: that train together, each on its own items (data parallel), sharing out the refresh.
        accumulate: forward and backward passes to a step.

    Raises:
        ValueError: for a number out of range, or a speed of another precision than the work.

    Example:
        >>> work = Work("toy", "float32", 10**6, Amount(0, 1e9), Amount(0, 0), Amount(0, 4e6), 100, ())
        >>> speed = Speed("toy", "float32", False, 1e-12, 0, 0, 1e-9, (0, 0), (0, 0, 0), 0.2)
        >>> estimate = predict(work, speed, steps=36_000, batch_size=100)
        >>> round(estimate.step_seconds, 3), round(estimate.hours, 2)
        (0.101, 1.01)

    Paper: none.
    """
    for name, value in (
        ("steps", steps),
        ("batch_size", batch_size),
        ("refresh_every", refresh_every),
        ("k_max", k_max),
        ("devices", devices),
        ("accumulate", accumulate),
    ):
        check_count(name, value, "give a whole number of at least 1")
    if criterion not in ("activation", "spectral", "all"):
        raise ValueError(f"criterion is {criterion!r}: choose one of activation, spectral, all")
    if work.precision != speed.precision:
        raise ValueError(
            f"{work.name} was counted in {work.precision}, and {speed.device} measured in {speed.precision}: measure "
            "the one as the other"
        )
    passes = _pass_seconds(speed, work.flops.of(batch_size), work.traffic.of(batch_size), work.calls)
    step = accumulate * passes + speed.parameter * work.parameters
    penalty = sum(_penalty_seconds(speed, weight.shape, k_max) for weight in work.weights)
    busiest = math.ceil(len(work.weights) / devices) / max(1, len(work.weights))
    block = _block(k_max)
    first = busiest * sum(_refresh_seconds(speed, weight.shape, weight.cold, block) for weight in work.weights)
    refresh = busiest * sum(_refresh_seconds(speed, weight.shape, weight.warm, block) for weight in work.weights)
    # Two products of a layer's three are in the backward pass; to see outliers the forward's is done once more.
    watch = accumulate * passes / 3 if criterion == "activation" else 0.0
    later = math.ceil(steps / refresh_every) - 1
    added = steps * penalty + first + later * refresh + (later + 1) * watch
    hours = (steps * step + added) / 3600
    kept = sum(k_max * (sum(weight.shape) + 2) + 3 for weight in work.weights) * 4
    memory = {
        "weights": 4 * work.parameters,
        "gradients": 4 * work.parameters,
        "optimizer": 8 * work.parameters,
        "s2d": kept,
        "s2d refresh": _refresh_bytes(work, block, side_by_side=speed.overlaps),
        "activations": round(work.saved.of(batch_size)),
    }
    return Estimate(
        step_seconds=step,
        penalty_seconds=penalty,
        refresh_seconds=refresh,
        first_refresh_seconds=first,
        watch_seconds=watch,
        overhead=added / (steps * step) if step else 0.0,
        hours=hours,
        device_hours=hours * devices,
        margin=speed.margin,
        memory=memory,
        checkpoint_bytes=12 * work.parameters + kept,
        items_per_second=devices * batch_size * accumulate * steps / (3600 * hours) if hours else math.inf,
    )


def _pass_seconds(speed: Speed, flops: float, traffic: float, calls: int) -> float:
    device, host = speed.flop * flops + speed.byte * traffic, speed.call * calls
    return max(device, host) if speed.overlaps else device + host


def _penalty_seconds(speed: Speed, shape: tuple[int, int], k: int) -> float:
    entries = shape[0] * shape[1]
    return speed.penalty[0] + speed.penalty[1] * entries + speed.flop * 2 * entries * max(0, k - MEASURED_K)


def _block(k: int) -> int:
    return 8 * math.ceil((k + 5) / 8)


def _product_features(shape: tuple[int, int], block: int) -> tuple[float, float, float]:
    return 1.0, float(shape[0] * shape[1] * block), float(sum(shape) * block**2)


def _refresh_bytes(work: Work, block: int, *, side_by_side: bool) -> int:
    """The Krylov basis and its image, of as many weights as are solved at a time."""
    counts = Counter(weight.shape for weight in work.weights)
    most = {s: max(1, BATCH_ENTRIES // (s[0] * s[1])) if side_by_side else 1 for s in counts}
    sizes = [min(count, most[shape]) * sum(shape) for shape, count in counts.items()]
    return 4 * KRYLOV_DEPTHS[-1] * block * max(sizes, default=0)


def _refresh_seconds(speed: Speed, shape: tuple[int, int], products: int, block: int) -> float:
    features = _product_features(shape, block)
    return products * sum(c * f for c, f in zip(speed.product, features, strict=True))


# --- what a step asks for ---------------------------------------------------------------------------------------------


class _Tally(TorchDispatchMode):
    """Counts operators and the bytes that they read and write; views are free."""

    def __init__(self) -> None:
        super().__init__()
        self.calls, self.traffic = 0, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if not getattr(func, "is_view", False):
            self.calls += 1
            tensors = torch.utils._pytree.tree_leaves((args, kwargs, result))
            self.traffic += sum(tensor.nbytes for tensor in tensors if isinstance(tensor, Tensor))
        return result


def count_work(
    model: nn.Module,
    loss: Callable[[int], Tensor],
    maps: dict[str, LinearMap],
    *,
    name: str = "model",
    precision: str = "float32",
    k_max: int = 3,
    progress: Callable[[str], None] = lambda line: None,
) -> Work:
    """Count what a training step of a model asks for, from two passes over two and over three items.

    How many products a refresh will take depends on the spectrum: it is tried on one weight of each shape. Gradients
    are computed and dropped; weights, and the mode of the model, stay as they are.

    Args:
        model: in training mode, on any device.
        loss: called with a number of items, passes them through the model and returns a scalar to differentiate.
        maps: the layers that S2D will watch, from :func:`s2d.linear_maps`.
        name: to call the model by.
        precision: ``"float32"``, or ``"bf16"`` for autocast.
        k_max: components that a refresh finds.
        progress: called with a line of text.

    Raises:
        ValueError: for an unknown precision, a loss that is none, or a k_max that a layer has not.

    Example:
        >>> layer = nn.Linear(20, 10, bias=False)
        >>> work = count_work(layer, lambda n: layer(torch.ones(n, 20)).sum(), {"": LinearMap("", layer)})
        >>> work.flops.item, work.parameters, work.weights[0].shape  # the input needs no gradient: two products
        (800.0, 200, (10, 20))

    Paper: none.
    """
    _check_precision(precision)
    check_count("k_max", k_max, "give a positive integer")
    device = next(model.parameters()).device.type
    counted = []
    for items in (2, 3):
        progress(f"count the operations of {items} items")
        counted.append(_count(model, loss, items, device, precision))
    two, three = counted
    flops, traffic, saved = (_line(a, b) for a, b in zip(two[:3], three[:3], strict=True))
    products: dict[tuple[int, int], tuple[int, int]] = {}
    weights = []
    for linear in maps.values():
        if linear.shape not in products:
            if k_max > min(linear.shape):
                raise ValueError(f"k_max is {k_max}, but layer {linear.name} has shape {linear.shape}: lower it")
            progress(f"look at the spectrum of {linear.name or 'the layer'}, {linear.shape[0]}x{linear.shape[1]}")
            products[linear.shape] = _count_products(linear.matrix().detach(), k_max)
        weights.append(WatchedWeight(linear.shape, *products[linear.shape]))
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return Work(name, precision, trained, flops, traffic, saved, round(three[3]), tuple(weights))


def _line(two: float, three: float) -> Amount:
    """The amount that is this for two items, and this for three."""
    item = max(0.0, three - two)
    return Amount(max(0.0, two - 2 * item), item)


def _count(
    model: nn.Module, loss: Callable[[int], Tensor], items: int, device: str, precision: str
) -> tuple[float, float, float, float]:
    """Operations, bytes moved, bytes saved and calls of a forward and a backward pass."""
    own = {p.untyped_storage().data_ptr() for p in itertools.chain(model.parameters(), model.buffers())}
    saved: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    before = {parameter: parameter.grad for parameter in model.parameters()}
    for parameter in before:
        parameter.grad = None  # a gradient that is there would be added to
    try:
        with FlopCounterMode(display=False) as flops, _Tally() as tally:
            with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
                with torch.autocast(device, PRECISIONS[precision], enabled=precision != "float32"):
                    value = loss(items)
            if not isinstance(value, Tensor) or value.ndim or not value.requires_grad:
                raise ValueError(f"loss({items}) is {value!r}: return a scalar that depends on trained parameters")
            kept = sum(saved.values())
            value.backward()
    finally:
        for parameter, grad in before.items():
            parameter.grad = grad
    return float(flops.get_total_flops()), float(tally.traffic), float(kept), float(tally.calls)


def _count_products(weight: Tensor, k: int) -> tuple[int, int]:
    """Block products of a first refresh and of a later one; a full SVD counts as what led to it, and as many again."""
    first = solve_top_triplets([weight], k, tol=REFRESH_TOL)[0]
    matrix = weight.float()
    noise = torch.randn(matrix.shape, generator=torch.Generator().manual_seed(0)).to(matrix)
    moved = matrix + noise * (DRIFT * matrix.norm() / noise.norm())
    later = solve_top_triplets([moved], k, warm_starts=[first.triplets], tol=REFRESH_TOL)[0]
    cold, warm = (max(1, s.products) * (2 if s.full_svd else 1) for s in (first, later))
    return cold, warm


def _check_precision(precision: Any) -> None:
    if precision not in PRECISIONS:
        raise ValueError(f"precision is {precision!r}: choose one of {', '.join(PRECISIONS)}")


# --- how fast a device is ---------------------------------------------------------------------------------------------


def measure_speed(
    device: str = "cpu",
    *,
    precision: str = "float32",
    seconds: float = 30.0,
    clock: Callable[[], float] | None = None,
    progress: Callable[[str], None] = lambda line: None,
) -> Speed:
    """Time transformer blocks, AdamW, the penalty and the solver at a few sizes, and fit the model to that.

    Args:
        device: such as ``"cpu"`` or ``"cuda"``.
        precision: as in :class:`Work`.
        seconds: about how long to measure; less than 5 is too short to be of use.
        clock: seconds, of any origin; by default the wall clock, or with one CPU thread the process's own time, so that
            other processes count less.
        progress: called with a line of text.

    Raises:
        ValueError: for an unknown precision, or a time out of range.

    Paper: none.
    """
    _check_precision(precision)
    seconds = check_number("seconds", seconds, lambda value: value > 0, "give how long to measure, such as 30")
    timer = _Timer(device, clock, seconds / 24)
    samples = []
    for width in (16, *CALIBRATION_WIDTHS):
        progress(f"time a transformer block of width {width}")
        samples.append(_time_block(timer, width, device, precision))
    progress("time AdamW, the penalty and the refresh")
    parameter = _time_adamw(timer, device)
    penalty = _fit_penalty(timer, device)
    product, left = _fit_product(timer, device)
    return fit_speed(
        samples,
        device=device_name(device),
        precision=precision,
        overlaps=device != "cpu",
        parameter=parameter,
        penalty=penalty,
        product=product,
        margin=left,
    )


def fit_speed(
    samples: Sequence[Sample],
    *,
    device: str,
    precision: str,
    overlaps: bool,
    parameter: float = 0.0,
    penalty: tuple[float, float] = (0.0, 0.0),
    product: tuple[float, float, float] = (0.0, 0.0, 0.0),
    margin: float = 0.0,
) -> Speed:
    """The coefficients of a step, from some that were timed; the one with the fewest operations a call is all calls.

    Args:
        samples: at least two.
        device, precision, overlaps, parameter, penalty, product: see :class:`Speed`.
        margin: relative error known of the rest; that of this fit is put beside it, and the larger one counts.

    Raises:
        ValueError: for fewer than two samples, or one that took no time.

    Example:
        >>> samples = [Sample(1e3, 0, 100, 1e-3), Sample(1e9, 0, 100, 1e-1), Sample(2e9, 0, 100, 2e-1)]
        >>> speed = fit_speed(samples, device="toy", precision="float32", overlaps=True)
        >>> f"{1 / speed.flop:.3g} operations and {1 / speed.call:.3g} calls a second"
        '1e+10 operations and 1e+05 calls a second'

    Paper: none.
    """
    if len(samples) < 2 or not all(sample.seconds > 0 and sample.calls > 0 for sample in samples):
        raise ValueError(f"{len(samples)} samples, each with calls and of more than 0 seconds: time at least two sizes")
    smallest, *others = sorted(samples, key=lambda sample: sample.flops / sample.calls)
    call = smallest.seconds / smallest.calls
    host = 0.0 if overlaps else call
    rows = [(s.flops, s.traffic) for s in others]
    rest = [max(s.seconds - host * s.calls, 0.05 * s.seconds) for s in others]
    flop, byte = nonnegative_fit(rows, rest)
    speed = Speed(device, precision, overlaps, flop, byte, call, parameter, penalty, product, margin)
    found = [_pass_seconds(speed, s.flops, s.traffic, s.calls) / s.seconds for s in others]
    return speed._replace(margin=max(LEAST_MARGIN, margin, *(abs(ratio - 1) for ratio in found)))


def nonnegative_fit(rows: Sequence[Sequence[float]], values: Sequence[float]) -> list[float]:
    """Coefficients, none negative, with the least squared relative error: the best of all choices of which are zero.

    Args:
        rows: one for each value, a number for each coefficient.
        values: positive.

    Example:
        >>> [round(c, 6) for c in nonnegative_fit([(1.0, 0.0), (1.0, 1.0), (1.0, 2.0)], [1.0, 3.0, 5.0])]
        [1.0, 2.0]

    Paper: none.
    """
    a = torch.tensor(rows, dtype=torch.float64) / torch.tensor(values, dtype=torch.float64)[:, None]
    size = a.abs().amax(dim=0).clamp(min=1e-300)
    target = torch.ones(len(a), dtype=torch.float64)
    best, least = [0.0] * a.shape[1], math.inf
    for count in range(1, a.shape[1] + 1):
        for chosen in itertools.combinations(range(a.shape[1]), count):
            part = (a / size)[:, chosen]
            solution = torch.linalg.lstsq(part, target, driver="gelsd").solution
            error = float((part @ solution - target).square().sum())
            if bool((solution >= 0).all()) and error < least * (1 - 1e-9):
                least = error
                best = [0.0] * a.shape[1]
                for index, value in zip(chosen, solution.tolist(), strict=True):
                    best[index] = value / float(size[index])
    return best


class _Timer:
    """The median time of something, over as many runs as a share of the budget allows."""

    def __init__(self, device: str, clock: Callable[[], float] | None, share: float) -> None:
        alone = device == "cpu" and torch.get_num_threads() == 1
        self.clock = clock or (time.process_time if alone else time.perf_counter)
        self.wait = torch.cuda.synchronize if device.startswith("cuda") else lambda: None
        self.share = share

    def once(self, action: Callable[[], object]) -> float:
        self.wait()
        began = self.clock()
        action()
        self.wait()
        return self.clock() - began

    def median(self, action: Callable[[], object]) -> float:
        self.once(action)  # the first one allocates, and compiles kernels
        times = [self.once(action)]
        while len(times) < 3 or (sum(times) < self.share and len(times) < 50):
            times.append(self.once(action))
        return max(statistics.median(times), 1e-9)


def _time_block(timer: _Timer, width: int, device: str, precision: str) -> Sample:
    """Forward and backward pass of a transformer block, over as many items as fill the device."""
    torch_seed = torch.Generator().manual_seed(0)
    heads = max(1, width // 64)
    block = nn.TransformerEncoderLayer(width, heads, 4 * width, 0.0, "gelu", batch_first=True, norm_first=True)
    block.to(device)
    tokens = 8 if width < 64 else CALIBRATION_TOKENS
    x = torch.randn(2, tokens, width, generator=torch_seed).to(device)

    def loss(items: int) -> Tensor:
        given = x if items <= len(x) else torch.cat([x, x[: items - len(x)]])
        return block(given).float().square().mean()

    def step() -> None:
        with torch.autocast(device.partition(":")[0], PRECISIONS[precision], enabled=precision != "float32"):
            value = block(x).float().square().mean()
        value.backward()
        block.zero_grad()

    work = count_work(block, loss, {}, precision=precision)
    # The smallest one measures calls and stays small.
    while width >= 64 and len(x) < 4096 and timer.once(step) < timer.share / 8:
        x = torch.cat([x, x])
    return Sample(work.flops.of(len(x)), work.traffic.of(len(x)), work.calls, timer.median(step))


def _time_adamw(timer: _Timer, device: str) -> float:
    parameters = [nn.Parameter(torch.zeros(512, 1024, device=device)) for _ in range(12)]
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    optimizer = torch.optim.AdamW(parameters)
    return timer.median(optimizer.step) / sum(parameter.numel() for parameter in parameters)


def _fit_penalty(timer: _Timer, device: str) -> tuple[float, float]:
    """The step of an optimizer with S2D, less that without."""
    rows, values = [], []
    for width, count in PENALTY_LAYERS:
        layers = nn.Sequential(*(nn.Linear(width, width, bias=False) for _ in range(count))).to(device)
        optimizer = torch.optim.SGD(layers.parameters(), lr=0.0)
        for parameter in layers.parameters():
            parameter.grad = torch.zeros_like(parameter)
        without = timer.median(optimizer.step)
        decay = SelectiveSpectralDecay(layers, criterion="all", k_max=MEASURED_K, refresh_every=10**9, lam=1e-9)
        decay.attach(optimizer)
        with_ = timer.median(optimizer.step)
        rows.append((float(count), float(count * width**2)))
        values.append(max(with_ - without, 0.02 * with_))
    layer, entry = nonnegative_fit(rows, values)
    return layer, entry


def _fit_product(timer: _Timer, device: str) -> tuple[tuple[float, float, float], float]:
    """Coefficients of a refresh, and the largest relative error that they leave."""
    rows, values = [], []
    for width in REFRESH_WIDTHS:
        for gaps in (True, False):
            generator = torch.Generator().manual_seed(0)
            weight = torch.randn(width, width, generator=generator) / (2 * width**0.5)
            if gaps:
                u, v = (torch.linalg.qr(torch.randn(width, 3, generator=generator))[0] for _ in range(2))
                weight += (u * torch.tensor([3.0, 2.0, 1.5])) @ v.T
            weight = weight.to(device)
            first = solve_top_triplets([weight], MEASURED_K, tol=REFRESH_TOL)[0]
            noise = torch.randn(width, width, generator=generator).to(device)
            moved = weight + noise * (DRIFT * weight.norm() / noise.norm())
            warm = [first.triplets]
            products = solve_top_triplets([moved], MEASURED_K, warm_starts=warm, tol=REFRESH_TOL)[0].products
            taken = timer.median(
                lambda w=moved, t=warm: solve_top_triplets([w], MEASURED_K, warm_starts=t, tol=REFRESH_TOL)  # type: ignore[misc]
            )
            rows.append(_product_features((width, width), _block(MEASURED_K)))
            values.append(taken / max(1, products))
    a, b, c = nonnegative_fit(rows, values)
    found = [sum(x * y for x, y in zip((a, b, c), row, strict=True)) for row in rows]
    return (a, b, c), max(abs(f / v - 1) for f, v in zip(found, values, strict=True))


def device_name(device: str) -> str:
    """What a device is called in tables.

    Example:
        >>> "thread" in device_name("cpu")
        True

    Paper: none.
    """
    if device.startswith("cuda"):
        return torch.cuda.get_device_name(device)
    threads = torch.get_num_threads()
    return f"{_processor()}, {threads} thread{'s' if threads > 1 else ''}"


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    named = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return named[0] if named else platform.processor() or platform.machine() or "cpu"


# --- a speed as a file ------------------------------------------------------------------------------------------------


def speed_as_text(speed: Speed) -> str:
    """JSON that :func:`load_speed` reads.

    Example:
        >>> "flop" in speed_as_text(Speed("toy", "float32", False, 1.0, 0, 0, 0, (0, 0), (0, 0, 0), 0.2))
        True

    Paper: none.
    """
    return json.dumps(speed._asdict(), indent=1) + "\n"


def load_speed(path: str | PathLike[str]) -> Speed:
    """A speed from a file.

    Args:
        path: JSON, as :func:`speed_as_text` makes it.

    Raises:
        ValueError: for a file that is not there, or is none of a speed.

    Paper: none.
    """
    repair = "give a file that s2d estimate --save-speed has written"
    try:
        found = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} cannot be read as a speed ({type(error).__name__}): {repair}") from None
    if not isinstance(found, dict) or set(found) != set(Speed._fields):
        raise ValueError(f"{path} holds no speed: {repair}")
    numbers = [found[name] for name in ("flop", "byte", "call", "parameter", "margin")]
    for name, count in (("penalty", 2), ("product", 3)):
        if not isinstance(found[name], list) or len(found[name]) != count:
            raise ValueError(f"{path} has {name} {found[name]!r}: {repair}")
        numbers += found[name]
        found[name] = tuple(found[name])
    for number in numbers:
        check_number(f"a number in {path}", number, lambda value: value >= 0, repair)
    _check_precision(found["precision"])
    return Speed(**found)
