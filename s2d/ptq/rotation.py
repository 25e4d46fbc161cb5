r"""Rotations of what is quantized: outliers are spread over all channels, and the model's function stays as it is.

.. math:: y = (W R^T)(R x), \qquad q^T k = (R q)^T (R k), \qquad R^T R = I

The rotated input is made online, at every call: that is the price (:func:`rotation_flops`). Used as a transform:

    >>> from functools import partial
    >>> from s2d.ptq import quantize
    >>> model = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 2))
    >>> options = {"w_bits": 4, "a_bits": 4, "calibration": torch.randn(32, 8)}
    >>> quantized = quantize(model, transforms=[partial(rotate, kind="learned", seed=1)], **options)
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from s2d.ptq.calibrate import Seen, first_items, site_inputs, visit_sites
from s2d.ptq.products import multiply
from s2d.ptq.quantizers import SWITCHED_OFF, check_bits, fake_quantize, minmax_grid
from s2d.ptq.sites import QuantizedLinear, QuantizedProduct, Site, products, quantized_layers
from s2d.ptq.trace import call, tensors_of

KINDS = ("hadamard", "learned")
# Up to here one dense product is faster than two small ones (CPU, float32; benchmarks/online_rotation.py).
DENSE_WIDTH = 64


def _check_kind(kind: str) -> None:
    if kind not in KINDS:
        raise ValueError(f"kind is {kind!r}: choose one of {', '.join(KINDS)}")


def _check_count(value: int, name: str, least: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ValueError(f"{name} is {value!r}: give a whole number, {least} or more")


# --- the matrix ---


def hadamard(n: int) -> Tensor:
    """The orthonormal Hadamard matrix of Sylvester's construction, in float64.

    Args:
        n: a power of two.

    Returns:
        ``(n, n)``, symmetric, entries plus and minus ``n ** -0.5``.

    Raises:
        ValueError: for an n that is no power of two.

    Example:
        >>> hadamard(4)[1]
        tensor([ 0.5000, -0.5000,  0.5000, -0.5000], dtype=torch.float64)

    Paper: none.
    """
    if n < 1 or n & (n - 1):
        raise ValueError(f"n is {n}: a Hadamard matrix of this construction needs a power of two")
    matrix = torch.ones(1, 1, dtype=torch.float64)
    while len(matrix) < n:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    return matrix / math.sqrt(n)


def hartley(n: int) -> Tensor:
    r"""The orthonormal matrix of the discrete Hartley transform, in float64.

    .. math:: F_{ij} = \big(\cos(2 \pi i j / n) + \sin(2 \pi i j / n)\big) / \sqrt n

    What stands in for a Hadamard matrix at odd sizes: no entry exceeds ``sqrt(2 / n)``, so one channel is spread over
    all of them, where a random orthogonal matrix of size 3 may have an entry near 1.

    Example:
        >>> torch.allclose(hartley(3) @ hartley(3), torch.eye(3).double())
        True

    Paper: none.
    """
    i = torch.arange(n, dtype=torch.float64)
    angle = 2 * math.pi / n * (torch.outer(i, i) % n)  # reduced first: exact for any n
    return (angle.cos() + angle.sin()) / math.sqrt(n)


def _kronecker_sizes(width: int) -> tuple[int, int]:
    """Sizes of the left (a power of two) and the right factor, chosen for the least work."""
    if width <= DENSE_WIDTH:
        return 1, width
    lefts = [2**i for i in range(width.bit_length()) if width % 2**i == 0]
    left = min(lefts, key=lambda size: size + width // size)
    return left, width // left


def _small_factor(size: int) -> Tensor:
    """Hadamard of the power of two in ``size``, Kronecker Hartley of the odd rest."""
    power = size & -size
    return torch.kron(hadamard(power), hartley(size // power))


class Rotation(nn.Module):
    r"""x -> R x along one dimension, R orthogonal.

    ``"hadamard"``: R = (H Kronecker F) D. D is random signs, H a Hadamard matrix of the largest power of two in the
    width, F the Hartley matrix of the odd rest (768 = 256 x 3). It is computed as two products with matrices of about
    the root of the width, which is faster than the butterflies of a fast Walsh-Hadamard transform in torch, and as one
    dense product at small widths. ``"learned"``: R is a plain matrix; it starts as the Hadamard rotation of the seed.

    Args:
        width: size of the dimension, at least 1.
        kind: ``"hadamard"`` or ``"learned"``.
        seed: of the signs.
        dim: the dimension, counted from the end (-2 for transposed keys).

    Attributes:
        signs: ``(width,)``, of the Hadamard kind.
        matrix: ``(width, width)``, R of the learned kind.

    Raises:
        ValueError: for another kind, or a width or dimension out of range; when called, for data of another width.

    Example:
        >>> rotation = Rotation(12, seed=1)
        >>> x = torch.randn(5, 12)
        >>> torch.allclose(rotation(x).norm(dim=-1), x.norm(dim=-1))
        True
        >>> again = Rotation(**rotation.config())
        >>> again.load_state_dict(rotation.state_dict())
        <All keys matched successfully>

    Paper: appendix D (online rotations, which S2D does without).
    """

    def __init__(self, width: int, *, kind: str = "hadamard", seed: int = 0, dim: int = -1) -> None:
        super().__init__()
        _check_count(width, "width", 1)
        _check_kind(kind)
        if dim >= 0:
            raise ValueError(f"dim is {dim}: count from the end, -1 for the last")
        self.width, self.kind, self.seed, self.dim = width, kind, seed, dim
        generator = torch.Generator().manual_seed(seed)
        signs = (2 * torch.randint(2, (width,), generator=generator) - 1).to(torch.float32)
        left, right = (_small_factor(size) for size in _kronecker_sizes(width))
        if kind == "learned":
            self.register_buffer("matrix", (torch.kron(left, right) * signs).float())
            return
        self.register_buffer("signs", signs)
        self.register_buffer("left", left.float(), persistent=False)
        self.register_buffer("right", right.float(), persistent=False)

    def config(self) -> dict[str, Any]:
        """The keyword arguments, fit for JSON, that build this rotation again, but for a learned matrix."""
        return {"width": self.width, "kind": self.kind, "seed": self.seed, "dim": self.dim}

    def dense(self) -> Tensor:
        """R itself, ``(width, width)``."""
        if self.kind == "learned":
            return self.matrix
        return self._rotate(torch.eye(self.width, dtype=self.signs.dtype, device=self.signs.device)).T.contiguous()

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[self.dim] != self.width:
            raise ValueError(f"the data has {x.shape[self.dim]} channels, the rotation {self.width}")
        return self._rotate(x) if self.dim == -1 else self._rotate(x.movedim(self.dim, -1)).movedim(-1, self.dim)

    def _rotate(self, x: Tensor) -> Tensor:
        if self.kind == "learned":
            return F.linear(x, self.matrix.to(x.dtype))
        # The factors are orthonormal one by one, so nothing in between exceeds the norm of x: safe in half precision.
        x = x * self.signs.to(x.dtype)
        right = self.right.to(x.dtype)
        if len(self.left) == 1:
            return F.linear(x, right)
        blocks = F.linear(x.unflatten(-1, (len(self.left), len(right))), right)
        # Not torch.matmul: inside an attention that would count as one of its products (s2d.ptq.sites.factors).
        return torch.linalg.matmul(self.left.to(x.dtype), blocks).flatten(-2)

    def extra_repr(self) -> str:
        return f"{self.width}, {self.kind}" + (f", dim={self.dim}" if self.dim != -1 else "")


def rotation_flops(width: int, kind: str = "hadamard") -> int:
    """Additions and multiplications that rotating one token takes online.

    Of the Hadamard kind they are those of the fast transform: the signs, log2 of the power of two in the width
    additions a channel, and a dense product with the odd rest. Normalising is free: it can be part of the weight. The
    Linear layer after it takes ``2 * width * out_features``.

    Args:
        width: channels, at least 1.
        kind: ``"hadamard"`` or ``"learned"`` (a dense product).

    Raises:
        ValueError: for another kind, or a width below 1.

    Example:
        >>> rotation_flops(1024), rotation_flops(768), rotation_flops(768, "learned")
        (11264, 10752, 1178880)

    Paper: appendix D (the cost that S2D does not have).
    """
    _check_count(width, "width", 1)
    _check_kind(kind)
    if kind == "learned":
        return width * (2 * width - 1)
    power = width & -width
    odd = width // power
    return width * (1 + power.bit_length() - 1 + (2 * odd - 1 if odd > 1 else 0))


# --- the transform ---


def rotate(
    model: nn.Module,
    batches: list[Any],
    *,
    kind: str = "hadamard",
    seed: int = 0,
    heads: bool = True,
    share: bool = True,
    bits: int = 4,
    steps: int = 100,
    rows: int = 1024,
    max_learned: int = 1024,
    progress: Callable[[str], None] | None = None,
) -> None:
    r"""Rotate the input of every Linear layer, and the queries with the keys of every attention; a transform.

    .. math:: x' = R x, \quad W' = W R^T, \quad q' = R_h q, \quad k' = R_h k

    The product of probabilities and values is left alone: probabilities must stay where they are (the softmax has no
    channels to mix), and rotated values would need the inverse after the product, once more online or in the weights
    of a layer that need not be there. Convolutions keep their weights, as their inputs stay in floating point.

    Learned rotations minimise the sum of the relative squared quantization errors of the rotated input (per tensor)
    and of the rotated weight (per row; the mean over layers that share R) on asymmetric min-max grids, from the
    Hadamard rotation of the same seed. That start stays wherever learning finds nothing better, on all the data and
    on data it has not learned from.

    Args:
        model: a prepared model, changed in place; its function stays as it is.
        batches: calibration data (:func:`s2d.ptq.calibrate.split_batches`).
        kind: ``"hadamard"`` (random signs, then a fast transform) or ``"learned"`` (a dense matrix).
        seed: of the signs, and of the rows learned from.
        heads: whether queries and keys are rotated, along the channels of a head.
        share: layers that read the same norm share one rotation, so that a kernel need compute it but once (here each
            layer computes it for itself).
        bits: 2 to 8, of the grids to learn for.
        steps: of learning, at least 1.
        rows: tokens a rotation is learned from: one half those of largest norm, which set the range, the other random.
        max_learned: wider inputs keep their Hadamard rotation, as dense ones cost more than the layer itself.
        progress: called with a line of text for each rotation learned.

    Raises:
        ValueError: for an option out of range, a model that is rotated already, or one whose queries and keys do not
            stand as expected (which shows in its output).

    Example:
        >>> from s2d.ptq.prepare import prepare
        >>> model, x = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 2)).eval(), torch.randn(4, 8)
        >>> rotated = prepare(model, x)
        >>> rotate(rotated, [x])
        >>> torch.allclose(rotated(x), model(x), atol=1e-5)
        True

    Cost: online, :func:`rotation_flops` a token. Learning: ``steps`` times a solve of the width cubed and a product
    of width squared by ``rows``, for each rotation.

    Paper: appendix D (QuaRot, SpinQuant: combined with S2D and compared).
    """
    _check_kind(kind)
    _check_count(steps, "steps", 1)
    _check_count(rows, "rows", 1)
    _check_count(max_learned, "max_learned", 1)
    if check_bits(bits, "bits") in SWITCHED_OFF:
        raise ValueError(f"bits is {bits}: choose 2 to 8")
    groups = _linear_groups(model, share)
    shapes = _head_shapes(model, batches) if heads else {}
    probe = first_items(batches)
    before = _outputs(model, probe)

    chosen = _hadamard_rotations(model, groups, shapes, seed)
    if kind == "learned":
        learn = partial(learn_rotation, bits=bits, steps=steps, rows=rows)
        narrow = {site: start for site, start in chosen.items() if start.width <= max_learned}
        for seen in site_inputs(model, batches, list(narrow), progress=progress):
            chosen[seen.site] = learn(narrow[seen.site], _terms(seen, groups, shapes))
    for site, rotation in chosen.items():
        if isinstance(site, QuantizedProduct):
            _rotate_product(site, rotation, shapes[site][1])
        else:
            _rotate_layers(groups[site], rotation)
    _check_function(before, _outputs(model, probe))


Groups = dict[QuantizedLinear, list[QuantizedLinear]]
Shapes = dict[QuantizedProduct, tuple[int, int]]


def _hadamard_rotations(model: nn.Module, groups: Groups, shapes: Shapes, seed: int) -> dict[Site, Rotation]:
    """A rotation for each group and each product, all of different signs."""
    device = next(model.parameters()).device
    widths = {site: site.in_features for site in groups} | {site: width for site, (width, _) in shapes.items()}
    seeds = torch.randint(2**31, (len(widths),), generator=torch.Generator().manual_seed(seed)).tolist()
    return {site: Rotation(width, seed=s).to(device) for (site, width), s in zip(widths.items(), seeds, strict=True)}


def _linear_groups(model: nn.Module, share: bool) -> Groups:
    """The layers that get one rotation, under the first of them."""
    layers = [site for site in quantized_layers(model).values() if isinstance(site, QuantizedLinear)]
    groups: dict[str, list[QuantizedLinear]] = {}
    for site in layers:
        if site.input_transform is not None:
            raise ValueError(f"layer {site.name} has an input transform already: rotate a model once")
        key = f"norm {site.norm}" if share and site.norm is not None else site.name
        groups.setdefault(key, []).append(site)
    return {group[0]: group for group in groups.values()}


def _head_shapes(model: nn.Module, batches: list[Any]) -> Shapes:
    """Channels of a head, and the right factor's dimension that holds them, for products of queries and keys."""
    shapes: Shapes = {}

    def see(site: QuantizedProduct, inputs: tuple[Tensor, ...]) -> None:
        width, right = inputs[0].shape[-1], inputs[1].shape
        # Keys come transposed; those of an einsum need not.
        dim = next((dim for dim in (-2, -1) if right[dim] == width), None)
        if dim is not None:
            shapes[site] = (width, dim)

    visit_sites(model, batches, see, [site for site in products(model).values() if site.kind == "qk"])
    return shapes


@torch.no_grad()
def _rotate_layers(layers: list[QuantizedLinear], rotation: Rotation) -> None:
    for site in layers:
        # Rows of W R^T are R times the rows of W. At least in float32: half precision rounds once, at the end.
        site.weight.copy_(rotation(site.weight.to(torch.promote_types(site.weight.dtype, torch.float32))))
        site.input_transform = rotation
        site.after = None  # no longer a GELU's or a norm's output


def _rotate_product(site: QuantizedProduct, rotation: Rotation, right_dim: int) -> None:
    site.left_transform, site.right_transform = rotation, copy.deepcopy(rotation)
    site.right_transform.dim = right_dim


@torch.no_grad()
def _outputs(model: nn.Module, batch: Any) -> list[Tensor]:
    return [tensor for tensor in tensors_of(call(model, batch)) if tensor.is_floating_point()]


def _check_function(before: list[Tensor], after: list[Tensor]) -> None:
    for expected, found in zip(before, after, strict=True):
        tolerance = 1e-3 if torch.finfo(expected.dtype).bits >= 32 else 0.1
        expected, found = (tensor.float().nan_to_num(0.0, 0.0, 0.0) for tensor in (expected, found))  # masked entries
        if not torch.linalg.norm(found - expected) <= tolerance * torch.linalg.norm(expected) + 1e-6:
            raise ValueError(
                "rotating changed the model's output: its queries and keys are not multiplied along their last "
                "dimension; rotate with heads=False"
            )


# --- learning ---


# Times 1 / width: between widths of 16 and 256 the best rates on calibration data were in about this proportion.
LEARNING_RATE = 0.6
LOOK_EVERY = 10  # steps from one candidate to the next
LEARNED_FROM = 0.75  # of the rows
WHOLE = (0.0, 1.0)

Terms = list[tuple[Tensor, bool, float]]


def _terms(seen: Seen, groups: Groups, shapes: Shapes) -> Terms:
    """What a rotation of one site turns, for :func:`rotation_error`."""
    site = seen.site
    if isinstance(site, QuantizedProduct):
        left, right = seen.inputs
        return [(_rows(left, -1), False, 1.0), (_rows(right, shapes[site][1]), False, 1.0)]
    weights = [(layer.weight.detach().float(), True, 1 / len(groups[site])) for layer in groups[site]]
    return [(_rows(seen.inputs[0], -1), False, 1.0), *weights]


def _rows(x: Tensor, dim: int) -> Tensor:
    x = x.detach().movedim(dim, -1)
    return x.reshape(-1, x.shape[-1]).float()


@torch.no_grad()
def rotation_error(matrix: Tensor, terms: Terms, bits: int, part: tuple[float, float] = WHOLE) -> Tensor:
    """The relative squared quantization errors of data rotated by a matrix, summed.

    Args:
        matrix: R, ``(n, n)``.
        terms: ``(x, per_row, weight)``: data ``(N, n)``, whether each row has a grid of its own (else all share one),
            and the factor of its error in the sum.
        bits: of the asymmetric min-max grids.
        part: shared grids reach over this part of the rows only: a contiguous run (whole images, but for two) from the
            first fraction on, around the end, of the length of the second. What is beyond is clamped.

    Returns:
        A scalar.

    Example:
        >>> x = torch.tensor([[0.0, 1.0], [2.0, 3.0]])  # on the grid of 2 bits as it is
        >>> rotation_error(torch.eye(2), [(x, False, 1.0)], 2)
        tensor(0.)

    Paper: none.
    """
    return rotation_errors(matrix, terms, bits, [part])[0]


@torch.no_grad()
def rotation_errors(matrix: Tensor, terms: Terms, bits: int, parts: list[tuple[float, float]]) -> list[Tensor]:
    """:func:`rotation_error` for each of several parts, for which the data is rotated once.

    Example:
        >>> x = torch.tensor([[0.0, 1.0], [2.0, 3.0]])
        >>> rotation_errors(torch.eye(2), [(x, False, 1.0)], 2, [(0.0, 1.0), (0.0, 0.5)])
        [tensor(0.), tensor(0.3571)]

    Paper: none.
    """
    totals = [matrix.new_zeros(()) for _ in parts]
    for x, per_row, weight in terms:
        rotated = multiply(x, matrix.T)
        # A grid of one row alone has no part of the rows.
        errors = [Rounding.of(rotated, per_row, bits, part).error.sum() for part in (parts[:1] if per_row else parts)]
        for i in range(len(parts)):
            totals[i] = totals[i] + weight * errors[0 if per_row else i] / _size(x)
    return totals


@torch.no_grad()
def rotation_slope(matrix: Tensor, terms: Terms, bits: int, part: tuple[float, float] = WHOLE) -> Tensor:
    """The gradient of :func:`rotation_error`, ``(n, n)``; arguments as there.

    It is that of the straight-through estimator: the squared error is the squared step times a rounding residual that
    is taken as constant, or, where clamped, the squared distance to the end of the range. So it hangs on the entries at
    the ends of the ranges and beyond alone, which are few.

    Example:
        >>> x = torch.tensor([[0.0, 1.4], [2.0, 3.0]])
        >>> rotation_slope(torch.eye(2), [(x, False, 1.0)], 2)  # of 0.4 ** 2 with the step 3 / 3
        tensor([[0.0000, 0.0000],
                [0.0143, 0.0214]])

    Paper: none.
    """
    slope = torch.zeros_like(matrix)
    for x, per_row, weight in terms:
        places, slopes = Rounding.of(multiply(x, matrix.T), per_row, bits, part).slopes(bits)
        rows, channels = places // len(matrix), places % len(matrix)
        slope.index_add_(0, channels, (slopes * weight / _size(x))[:, None] * x[rows])
    return slope


def _size(x: Tensor) -> Tensor:
    return x.square().sum().clamp(min=torch.finfo(x.dtype).tiny)


@dataclass
class Rounding:
    """What min-max grids do to data ``(N, n)`` with one for each row, or one for all.

    Attributes:
        low, high: the ends of the ranges before they are widened to hold zero, ``(grids,)``.
        lowest, highest: the entries that they are from, by their place in the flattened data.
        squares: squared errors, ``(grids, entries)``.
        beyond: how far the entries are out of range, of that shape; None where all are in it.
    """

    low: Tensor
    high: Tensor
    lowest: Tensor
    highest: Tensor
    squares: Tensor
    beyond: Tensor | None

    @classmethod
    def of(cls, data: Tensor, per_row: bool, bits: int, part: tuple[float, float]) -> Rounding:
        """Round some data; ``part`` as for :func:`rotation_error`."""
        grids, first, count = data if per_row else data.reshape(1, -1), 0, data.shape[1]
        reach = grids
        if not per_row and part != WHOLE:
            first, reach = int(part[0] * len(data)) * data.shape[1], torch.cat(_run(data, *part)).reshape(1, -1)
        low, high = reach.min(1), reach.max(1)
        scale, zero_point = minmax_grid(low.values[:, None], high.values[:, None], bits)
        starts = torch.arange(len(grids), device=data.device) * count + first
        lowest, highest = ((end.indices + starts) % data.numel() for end in (low, high))
        ends = low.values.clamp(max=0)[:, None], high.values.clamp(min=0)[:, None]
        beyond = None if reach is grids else grids - grids.clamp(*ends)
        squares = fake_quantize(grids, scale, zero_point, 0, 2**bits - 1).sub_(grids).square_()
        return cls(low.values, high.values, lowest, highest, squares, beyond)

    @property
    def error(self) -> Tensor:
        """The squared error of each grid, ``(grids,)``."""
        return self.squares.sum(1)

    def slopes(self, bits: int) -> tuple[Tensor, Tensor]:
        """Where the gradient of the error is not zero, by place in the flattened data, and what it is there."""
        rounding = self.error if self.beyond is None else self.squares.where(self.beyond == 0, 0).sum(1)
        width = self.high.clamp(min=0) - self.low.clamp(max=0)
        steps = 2**bits - 1
        step = (width / steps).clamp(min=torch.finfo(width.dtype).tiny ** 0.25)
        stretched = 2 * width * rounding / (steps * step).square()  # the slope of the squared step
        high, low = stretched.where(self.high > 0, 0), -stretched.where(self.low < 0, 0)
        if self.beyond is None:
            return torch.cat([self.lowest, self.highest]), torch.cat([low, high])
        low = low - 2 * self.beyond.clamp(max=0).sum(1)
        high = high - 2 * self.beyond.clamp(min=0).sum(1)
        low, high = low.where(self.low < 0, 0), high.where(self.high > 0, 0)
        outside = self.beyond.flatten().nonzero()[:, 0]
        places = torch.cat([self.lowest, self.highest, outside])
        return places, torch.cat([low, high, 2 * self.beyond.flatten()[outside]])


def _run(rows: Tensor, start: float, length: float) -> list[Tensor]:
    """Contiguous rows, around the end: one piece or two."""
    first, count = int(start * len(rows)), math.ceil(length * len(rows))
    pieces = [rows[first : first + count], rows[: max(0, first + count - len(rows))]]
    return [piece for piece in pieces if len(piece)]


def learn_rotation(start: Rotation, terms: Terms, *, bits: int, steps: int, rows: int) -> Rotation:
    """Adam on the orthogonal matrices, from a rotation; the best matrix seen, or the start where none is better.

    The range of a shared grid hangs on its two most extreme entries. Made small on the calibration data alone it is
    too small for other data, which costs little at 4 bits and everything at 8. So every step takes the range from
    another half of the rows and the error from all; and the last quarter of the rows is only for choosing the best.

    Args:
        start: any rotation; its seed picks the random rows.
        terms, bits: see :func:`rotation_error`.
        steps: of Adam.
        rows: learned from, of each term that shares one grid; the start is compared with the result on all rows.

    Returns:
        A learned rotation.

    Paper: none (the idea of SpinQuant, on a loss that needs neither labels nor the rest of the model).
    """
    generator = torch.Generator().manual_seed(start.seed)
    fitted = [(x if per_row else _run(x, 0.0, LEARNED_FROM)[0], per_row, weight) for x, per_row, weight in terms]
    sample = [(x if per_row else _sample(x, rows, generator), per_row, weight) for x, per_row, weight in fitted]
    learned = Rotation(start.width, kind="learned", seed=start.seed).to(sample[0][0].device)
    initial = start.dense().float()
    learned.matrix.copy_(initial)
    if start.width == 1:
        return learned
    # The error of all rows with shared grids that reach over those that are learned from, or over all.
    reaches = [(0.0, LEARNED_FROM), WHOLE]
    least, most = rotation_errors(initial, terms, bits, reaches)
    for matrix in _descend(initial, sample, bits, torch.rand(steps, generator=generator).tolist()):
        unseen, all_seen = rotation_errors(matrix, terms, bits, reaches)
        if unseen < least and all_seen <= most:
            least = unseen
            learned.matrix.copy_(matrix)
    return learned


def _sample(x: Tensor, rows: int, generator: torch.Generator) -> Tensor:
    if len(x) <= rows:
        return x
    order = x.norm(dim=1).argsort(descending=True, stable=True)
    loud, rest = order[: rows // 2], order[rows // 2 :]
    picked = torch.randperm(len(rest), generator=generator)[: rows - len(loud)].to(x.device)
    return x[torch.cat([loud, rest[picked]]).sort().values]  # still by image


def _descend(initial: Tensor, sample: Terms, bits: int, starts: list[float]) -> Iterator[Tensor]:
    r"""Matrices on the way, orthogonal to the last digit; one step for each start of a half.

    With A skew-symmetric, of a lower triangle that Adam steps, the matrix is Cayley's

    .. math:: R = R_0 (I + A/2)(I - A/2)^{-1} = R_0 (K - I), \qquad K = 2 (I - A/2)^{-1}

    of which :math:`\mathrm dR = R_0 K \, \mathrm dA \, K / 4`.
    """
    identity = torch.eye(len(initial), dtype=initial.dtype, device=initial.device)
    lower = torch.zeros_like(initial)
    optimizer = torch.optim.Adam([lower], lr=LEARNING_RATE / len(initial))
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.05, len(starts))
    inverse, matrix = 2 * identity, initial
    for index, start in enumerate(starts, 1):
        slope = rotation_slope(matrix, sample, bits, (start, 0.5))
        slope = multiply(multiply((matrix + initial).T, slope), inverse.T) / 4
        lower.grad = (slope - slope.T).tril_(-1)
        optimizer.step()
        schedule.step()
        inverse = 2 * inverse_of_dominant(identity - (lower - lower.T) / 2)
        matrix = multiply(initial, inverse - identity)
        if index % LOOK_EVERY == 0 or index == len(starts):
            yield nearest_orthogonal(matrix)


INVERTED_WHOLE = 96  # up to this size LAPACK's inverse is faster than more products


def inverse_of_dominant(matrix: Tensor) -> Tensor:
    """The inverse of a matrix whose symmetric part is positive definite, such as I + A with A skew-symmetric.

    By blocks, none of which needs pivots: mostly products of matrices, which take half the time of LAPACK's inverse.

    Example:
        >>> inverse_of_dominant(torch.tensor([[1.0, -1.0], [1.0, 1.0]]))
        tensor([[ 0.5000,  0.5000],
                [-0.5000,  0.5000]])

    Paper: none.
    """
    if len(matrix) <= INVERTED_WHOLE:
        return torch.linalg.inv(matrix)
    half = len(matrix) // 2
    (a, b), (c, d) = (part.split([half, len(matrix) - half], 1) for part in matrix.split([half, len(matrix) - half]))
    first = inverse_of_dominant(a)
    left, right = multiply(c, first), multiply(first, b)
    last = inverse_of_dominant(d - multiply(left, b))
    corner = multiply(right, last)
    return torch.cat(
        [torch.cat([first + multiply(corner, left), -corner], 1), torch.cat([-multiply(last, left), last], 1)]
    )


def nearest_orthogonal(matrix: Tensor) -> Tensor:
    """The orthogonal matrix nearest to one that is orthogonal but for rounding.

    Newton's iteration for the polar factor, which squares the distance from orthogonal: from 1e-6 or so to the last
    digit in one step, a hundredth of the time of the singular value decomposition.

    Example:
        >>> torch.allclose(nearest_orthogonal(torch.eye(2) + 1e-5), torch.eye(2), atol=1e-7)
        True

    Paper: none.
    """
    found, distance = matrix.double(), 1.0
    while distance > 1e-5:
        gram = found.T @ found
        distance = (gram - torch.eye(len(gram), dtype=gram.dtype, device=gram.device)).abs().amax().item()
        found = 1.5 * found - 0.5 * found @ gram
    return found.to(matrix.dtype)
