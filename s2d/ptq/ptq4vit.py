r"""PTQ4ViT: scales found by trying a hundred of them, and two uniform grids after GELU and after softmax.

Every site is a product of two factors: an input and a weight, or two activations. Their scales are searched in turn;
all other sites stay in floating point meanwhile. What a pair of scales costs is

.. math:: \mathrm{mean}\big(g \, (y - \hat y)\big)^2

over the calibration data, with y the output of the site and g the gradient of the model's loss at y (``ptq4vit``) or 1
(``base_ptq``). A product in which both factors trade places is the transposed product, so one search serves both.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial, reduce
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from s2d.ptq.calibrate import Seen, Shared, item_count, site_inputs
from s2d.ptq.judge import FEW_ITEMS, clearly_above, item_errors, kept_back, note, outputs, replaced
from s2d.ptq.products import multiplies_codes, multiply, multiply_codes
from s2d.ptq.quantizers import (
    SWITCHED_OFF,
    TIE,
    AffineQuantizer,
    Quantizer,
    fake_quantize,
    first_least,
    round_to_grid,
)
from s2d.ptq.rtn import check_activations
from s2d.ptq.sites import CONVOLUTIONS, QuantizedProduct, Site, quantized_layers, sites
from s2d.ptq.trace import tensors_of
from s2d.ptq.twin_uniform import (
    SPLITS,
    TAIL_SPLITS,
    TwinUniformGELU,
    TwinUniformSoftmax,
    TwinUniformTail,
    gelu_parts,
    has_long_tail,
    tail_parts,
    tail_steps,
    twin_gelu,
    twin_softmax,
    twin_tail,
)

FACTORS = tuple(0.01 + i * (1.2 - 0.01) / 100 for i in range(100))
"""What the initial scale is multiplied by, one after the other."""
START = min(range(len(FACTORS)), key=lambda i: abs(FACTORS[i] - 1))
ROUNDS = 3
WEIGHTS = ("per_tensor", "per_channel")
# Rows after which the candidates that cannot win any more are dropped, as parts of all rows.
HURDLES = (1 / 32, 1 / 16, 1 / 8, 3 / 16, 1 / 4, 3 / 8, 1 / 2, 5 / 8, 3 / 4, 7 / 8, 1)
# Elements of one temporary, of which a few are held: about a core's cache, or filling an accelerator.
CPU_ELEMENTS, GPU_ELEMENTS = 2**18, 2**24
KEPT_BYTES = 2**28  # of a factor's codes on all its candidates: below that, it is rounded only once


def ptq4vit(
    model: nn.Module,
    batches: list[Any],
    *,
    w_bits: int,
    a_bits: int,
    progress: Callable[[str], None] | None = None,
    shared: Shared | None = None,
    weights: str = "per_tensor",
    activations: str = "per_tensor",
    likelihood: str = "gaussian",
    rows: int | None = 2048,
    seed: int = 0,
) -> None:
    r"""Quantize with PTQ4ViT: twin uniform quantizers, and scales searched with a Hessian-guided score.

    Grids are symmetric with codes -Q to Q - 1, Q = 2^(k-1); the scales tried are c D0 for the c in ``FACTORS``, with
    D0 = max abs / (Q - 1/2), and on a tie the first wins (:func:`s2d.ptq.quantizers.first_least`). A factor that was
    not searched yet has the one nearest to D0: with D0 itself the largest value would lie half-way between two codes,
    where rounding decides. After GELU, only the positive side's step is searched; for attention probabilities, the
    split between the small and the large range. Three rounds: the weight given the input, the input given the weight
    (for a product of activations, the left factor first). The score weighs output errors by the squared gradient of

    .. math:: -\log p(\tilde y \mid x), \qquad \tilde y \sim p(\cdot \mid x),

    something sampled from the model: the diagonal of the Fisher information. Taken for a classifier
    (``likelihood="categorical"``), a confident model has hardly any gradient but on a few images, and what it makes of
    the others goes unseen; with 32 images that costs up to eight times the logit error at W8A8. So by default the
    logits are the mean of a normal distribution, whose Fisher information measures the squared error of the logits
    themselves, on every image alike. A site without any gradient is judged by its plain squared error.

    A twin grid spends its codes by sign. Where GELU's output has a long tail
    (:func:`s2d.ptq.twin_uniform.has_long_tail`) the positive half is too coarse for all but a few values, and the codes
    are spent by size instead (:class:`s2d.ptq.twin_uniform.TwinUniformTail`, whose split is searched). And while the
    search sees every site alone in a floating-point model, the outcome is judged in the quantized one: the grids of all
    weights, of all inputs and of all attention products each go back to those the search began with, if that lowers the
    error of the model's output on calibration items kept back (:mod:`s2d.ptq.judge`).

    The public implementation differs on three points, where it does not do what its paper says: it uses the gradient of
    a divergence between the model and itself (zero but for rounding), collapses to the smallest scale where that is
    exactly zero, and adds the two ranges of its softmax quantizer.

    Args:
        model: a prepared model, changed in place.
        batches: calibration data (:func:`s2d.ptq.calibrate.split_batches`); 32 images as published.
        w_bits, a_bits: see :func:`s2d.ptq.quantize`.
        progress: called with a line of text for each site.
        shared: keeps what the sites see for other copies of the model.
        weights: ``"per_tensor"`` as published (one scale each for q, k and v of a packed projection, and one for each
            output channel of a convolution), or ``"per_channel"``.
        activations: ``"per_tensor"``, or ``"per_token"`` for inputs of Linear layers measured at run time.
        likelihood: ``"gaussian"``, or ``"categorical"`` for labels sampled from logits (see :func:`label_loss`).
        rows: how many rows of a site's inputs (tokens) the search looks at, evenly spaced among those with a gradient;
            of an attention product or a convolution, as many whole images as have that many. None for all.
        seed: for what is sampled.

    Raises:
        ValueError: for options out of range, inputs that are not finite, or a site that the data misses.

    Paper: none; one of the quantizers that the trained models meet.
    """
    _check_search(weights, rows)
    check_activations(activations)
    if likelihood not in LIKELIHOODS:
        raise ValueError(f"likelihood is {likelihood!r}: choose one of {', '.join(LIKELIHOODS)}")
    search = Search(w_bits, a_bits, weights, activations, rows, twin=True)
    loss, name = _sampled(likelihood, seed), ("inputs", likelihood, seed)
    _search_all(model, batches, search, progress, shared=shared, loss=loss, name=name)


def base_ptq(
    model: nn.Module,
    batches: list[Any],
    *,
    w_bits: int,
    a_bits: int,
    progress: Callable[[str], None] | None = None,
    shared: Shared | None = None,
    weights: str = "per_tensor",
    activations: str = "per_tensor",
    rows: int | None = 2048,
) -> None:
    """Quantize with what PTQ4ViT starts from: the same search, one uniform grid everywhere, and plain squared errors.

    The score is the mean squared error of the site's output (the public implementation offers the cosine as well).

    Args:
        model, batches, w_bits, a_bits, progress, shared, weights, activations, rows: see :func:`ptq4vit`.

    Raises:
        ValueError: as :func:`ptq4vit`.

    Paper: none; the ablation of PTQ4ViT.
    """
    _check_search(weights, rows)
    check_activations(activations)
    _search_all(model, batches, Search(w_bits, a_bits, weights, activations, rows, twin=False), progress, shared=shared)


def _check_search(weights: str, rows: int | None) -> None:
    if weights not in WEIGHTS:
        raise ValueError(f"weights is {weights!r}: choose one of {', '.join(WEIGHTS)}")
    if rows is not None and (not isinstance(rows, int) or rows < 1):
        raise ValueError(f"rows is {rows!r}: give a whole number of at least 1, or None for all rows")


# --- the loss whose gradient guides the search -----------------------------------------------------------------------


def gaussian_loss(output: Any, generator: torch.Generator) -> Tensor:
    """The output's inner product with standard normal noise.

    Up to a constant it is the negative log-likelihood of a draw from a normal distribution around the output, and its
    squared gradient is the expected squared change of the output.

    Args:
        output: a tensor, or tensors nested in tuples and mappings; those that do not depend on the sites count zero.
        generator: on the CPU.
    """
    found = [tensor for tensor in tensors_of(output) if tensor.is_floating_point() and tensor.requires_grad]
    noise = [torch.randn(tensor.shape, generator=generator).to(tensor.device) for tensor in found]
    return sum((_working(tensor) * n).sum() for tensor, n in zip(found, noise, strict=True))


def label_loss(output: Any, generator: torch.Generator) -> Tensor:
    """The negative log-likelihood of labels sampled from the model, summed over all it labels.

    Args:
        output: logits ``(B, V)`` or ``(B, T, V)``, alone or under ``"logits"`` in a mapping; for anything else it is
            :func:`gaussian_loss`.
        generator: on the CPU.

    Example:
        >>> float(label_loss(torch.tensor([[0.0, 50.0]]), torch.Generator()))
        0.0

    Paper: none.
    """
    logits = output.get("logits") if isinstance(output, Mapping) else output
    # A single logit is certain of its only class: nothing to sample.
    if not (isinstance(logits, Tensor) and logits.ndim in (2, 3) and logits.shape[-1] > 1):
        return gaussian_loss(output, generator)
    logits = _working(logits.flatten(0, -2))
    labels = torch.multinomial(logits.detach().double().softmax(-1).cpu(), 1, generator=generator)
    return F.cross_entropy(logits, labels[:, 0].to(logits.device), reduction="sum")


LIKELIHOODS = {"gaussian": gaussian_loss, "categorical": label_loss}


def _sampled(likelihood: str, seed: int) -> Callable[[Any, int], Tensor]:
    """The loss of a batch, the same at every pass over it."""

    def loss(output: Any, index: int) -> Tensor:
        # An output without any graph (of a model that detaches it) has a gradient all the same: none.
        connected = torch.zeros((), requires_grad=True)
        return connected + LIKELIHOODS[likelihood](output, torch.Generator().manual_seed(seed + index))

    return loss


# --- one factor of a product -----------------------------------------------------------------------------------------


Whole = list[tuple[Tensor, Tensor]]
"""A quantized tensor as the sum of codes (int8) times steps."""


@dataclass
class Factor:
    """One factor of a product, written as the left one: the right one is the left one of the transposed product.

    Attributes:
        values: ``(..., rows, K)``.
        quantize: ``quantize(values, grid)``, broadcasting.
        grids: the candidates along dimension -3, else in a shape that broadcasts against the values; None for a factor
            that stays in floating point.
        chosen: the grid in use.
        groups: sums squared errors ``(..., candidates, rows)`` to ``(candidates, groups)``, a group being what has a
            grid of its own.
        spread: a number per group, ``(groups,)``, to the shape of ``chosen``.
        kind: the class of the quantizer.
        best: the candidate in use, per group.
        fixed: the quantizer of a factor whose grid is not searched (measured at run time); None for floating point.
        largest: where the grids end, for a :class:`s2d.ptq.twin_uniform.TwinUniformTail`.
        whole: ``whole(values, grid)``, the same as ``quantize`` as a sum of whole numbers times steps; None where they
            exceed eight bits.
        kept: ``whole`` of all candidates.
    """

    values: Tensor
    quantize: Callable[[Tensor, Tensor], Tensor]
    grids: Tensor | None
    chosen: Tensor | None
    groups: Callable[[Tensor], Tensor]
    spread: Callable[[Tensor], Tensor]
    kind: type[Quantizer] = AffineQuantizer
    best: Tensor | None = None
    fixed: Quantizer | None = None
    largest: Tensor | None = None
    whole: Callable[[Tensor, Tensor], Whole] | None = None
    kept: Whole | None = None

    def quantized(self) -> Tensor:
        """The values on the grid in use."""
        if self.grids is None:
            return self.values if self.fixed is None else self.fixed(self.values)
        return self.quantize(self.values, self.chosen.squeeze(-3))

    def codes(self, candidates: Tensor, block: slice) -> Whole:
        """Some rows of a matrix on some of the candidate grids."""
        if len(self.grids) * self.values.numel() > KEPT_BYTES:
            return self.whole(self.values[block], self.grids[candidates])
        if self.kept is None:
            at_once = _at_once(self.values.numel(), self.values.device)
            parts = [self.whole(self.values, grids) for grids in self.grids.split(at_once)]
            self.kept = [tuple(map(torch.cat, zip(*part, strict=True))) for part in zip(*parts, strict=True)]
        picked = candidates.tolist()  # stacked, which copies whole rows where indexing picks single codes
        return [(torch.stack([codes[c, block] for c in picked]), steps[candidates]) for codes, steps in self.kept]

    def choose(self, best: Tensor) -> bool:
        """Take a candidate per group into use; whether that changes anything."""
        changed = self.best is None or not torch.equal(best, self.best)
        self.best, self.chosen = best, self.grids.take_along_dim(self.spread(best), -3)
        return changed


def _together(errors: Tensor) -> Tensor:
    return errors.movedim(-2, 0).flatten(1).sum(1, keepdim=True)


def _by_head(errors: Tensor) -> Tensor:
    return errors.sum((0, -1)).T


def _by_part(errors: Tensor, parts: int) -> Tensor:
    errors = errors.reshape(-1, *errors.shape[-2:]).sum(0)
    return errors.unflatten(-1, (parts, -1)).sum(-1)


def _to_all(number: Tensor) -> Tensor:
    return number.view(1, 1, 1)


def _to_heads(numbers: Tensor) -> Tensor:
    return numbers.view(-1, 1, 1, 1)


def _to_rows(numbers: Tensor, rows: int) -> Tensor:
    return numbers.repeat_interleave(rows // len(numbers)).view(1, -1, 1)


def in_floating_point(values: Tensor) -> Factor:
    """A factor that is not quantized."""
    return Factor(values, fake_quantize, None, None, _together, _to_all)


def per_tensor(values: Tensor, n_bits: int) -> Factor:
    """A factor with one symmetric uniform grid."""
    return _uniform(values, n_bits, values.abs().amax(), _together, _to_all)


def per_head(values: Tensor, n_bits: int) -> Factor:
    """A factor ``(images, heads, rows, K)`` with a symmetric uniform grid for each head."""
    return _uniform(values, n_bits, values.abs().amax((0, 2, 3)), _by_head, _to_heads)


def per_part(values: Tensor, n_bits: int, parts: int) -> Factor:
    """A matrix with a symmetric uniform grid for each of a number of equal row blocks."""
    largest = values.unflatten(0, (parts, -1)).abs().amax((1, 2))
    return _uniform(values, n_bits, largest, partial(_by_part, parts=parts), partial(_to_rows, rows=len(values)))


def after_gelu(values: Tensor, n_bits: int) -> Factor:
    """A factor on the twin grid for GELU's output, the step of whose positive side is searched."""
    grids = _candidates(_to_all(_initial_scale(values.amax(), n_bits)))
    quantize, whole = partial(_twin_gelu, n_bits=n_bits), partial(gelu_parts, n_bits=n_bits)
    return Factor(values, quantize, grids, _first(grids), _together, _to_all, TwinUniformGELU, whole=whole)


def after_gelu_with_long_tail(values: Tensor, n_bits: int) -> Factor:
    """A factor on a fine and a coarse grid, the split between which is searched."""
    largest = values.amax()
    grids = (largest * torch.tensor(TAIL_SPLITS, dtype=values.dtype, device=values.device)).view(-1, 1, 1)
    quantize = partial(_twin_tail, largest=largest, n_bits=n_bits)
    whole = None if n_bits == 8 else partial(_tail_parts, largest=largest, n_bits=n_bits)
    return Factor(values, quantize, grids, grids[:1], _together, _to_all, TwinUniformTail, largest=largest, whole=whole)


def per_token(values: Tensor, n_bits: int) -> Factor:
    """A factor whose grid is measured for each row: nothing to search."""
    fixed = AffineQuantizer(n_bits, granularity="per_token")
    return replace(in_floating_point(values), fixed=fixed)


def after_softmax(values: Tensor, n_bits: int) -> Factor:
    """A factor on the twin grid for probabilities, whose split is searched."""
    splits = torch.tensor(SPLITS, dtype=values.dtype, device=values.device).view(-1, 1, 1)
    quantize = partial(_twin_softmax, n_bits=n_bits)
    return Factor(values, quantize, splits, splits[:1], _together, _to_all, TwinUniformSoftmax)


def _uniform(values: Tensor, n_bits: int, largest: Tensor, groups: Callable, spread: Callable) -> Factor:
    grids = _candidates(spread(_initial_scale(largest, n_bits)))
    quantize, whole = (partial(function, n_bits=n_bits) for function in (_full_range, _full_range_codes))
    return Factor(values, quantize, grids, _first(grids), groups, spread, whole=whole)


def _initial_scale(largest: Tensor, n_bits: int) -> Tensor:
    # Where there is nothing but zeros, any scale will do.
    return torch.where(largest > 0, largest, 1) / (2 ** (n_bits - 1) - 0.5)


def _candidates(initial: Tensor) -> Tensor:
    return initial * torch.tensor(FACTORS, dtype=initial.dtype, device=initial.device).view(-1, 1, 1)


def _first(grids: Tensor) -> Tensor:
    """The grid in use before any search."""
    return grids[..., START : START + 1, :, :]


def _full_range(x: Tensor, scale: Tensor, n_bits: int) -> Tensor:
    return fake_quantize(x, scale, 0, -(2 ** (n_bits - 1)), 2 ** (n_bits - 1) - 1)


def _full_range_codes(x: Tensor, scale: Tensor, n_bits: int) -> Whole:
    return [(round_to_grid(x, scale, 0, -(2 ** (n_bits - 1)), 2 ** (n_bits - 1) - 1).to(torch.int8), scale)]


def _twin_gelu(x: Tensor, step: Tensor, n_bits: int) -> Tensor:
    return twin_gelu(x, step, n_bits)


def _twin_tail(x: Tensor, split: Tensor, largest: Tensor, n_bits: int) -> Tensor:
    return twin_tail(x, *tail_steps(split, largest, n_bits), n_bits)


def _tail_parts(x: Tensor, split: Tensor, largest: Tensor, n_bits: int) -> Whole:
    return tail_parts(x, *tail_steps(split, largest, n_bits), n_bits)


def _twin_softmax(x: Tensor, split: Tensor, n_bits: int) -> Tensor:
    return twin_softmax(x, split, n_bits)


# --- the search ------------------------------------------------------------------------------------------------------


@dataclass
class Contest:
    """The candidates of one factor, and what they are judged by.

    Attributes:
        factor: the left factor.
        other: the right factor, itself written as a left one; None to judge the first by its own error.
        target: the product in floating point, ``(..., rows, columns)``.
        weight: what errors are multiplied by, in the shape of the target; None for 1.
        cuts: dimension along which factor, other and target can be cut into blocks; None for what is always needed.
        blocks: the cuts.
    """

    factor: Factor
    other: Factor | None
    target: Tensor
    weight: Tensor | None
    cuts: tuple[int | None, int | None, int]
    blocks: list[slice]

    def run(self) -> bool:
        """Put the best candidate of each group into use; whether that changes anything."""
        width = 4  # bytes of an entry on a candidate grid
        if self.other is None:
            products = self._values
        elif _multiplies_codes(self.factor, self.other):
            width = 1
            products = partial(self._code_products, other=self.other.whole(self.other.values, self.other.chosen[0]))
        else:
            products = partial(self._products, other=self.other.quantized().mT)
        return self.factor.choose(race(self.factor, partial(self._errors, products, width), self.blocks))

    def _errors(
        self, products: Callable[[Tensor, slice], Tensor], width: int, candidates: Tensor, block: slice
    ) -> Tensor:
        """Squared errors with some candidate grids of the left factor, ``(candidates, groups)`` in float64."""
        target, weight = (_cut(tensor, block, self.cuts[2]) for tensor in (self.target, self.weight))
        size = max(_cut(self.factor.values, block, self.cuts[0]).numel() * width // 4, target.numel())
        parts = candidates.split(_at_once(size, candidates.device))
        return torch.cat([self.factor.groups(_row_errors(products(part, block), target, weight)) for part in parts])

    def _values(self, candidates: Tensor, block: slice) -> Tensor:
        """The factor itself on candidate grids, ``(..., candidates, rows, columns)``."""
        x = _cut(self.factor.values, block, self.cuts[0])
        return self.factor.quantize(x.unsqueeze(-3), self.factor.grids[..., candidates, :, :])

    def _products(self, candidates: Tensor, block: slice, other: Tensor) -> Tensor:
        """Its products with the other factor."""
        values = self._values(candidates, block)
        # One product for all: more candidates are more rows.
        product = multiply(values.flatten(-3, -2), _cut(other, block, self.cuts[1]))
        return product.unflatten(-2, values.shape[-3:-1])

    def _code_products(self, candidates: Tensor, block: slice, other: Whole) -> Tensor:
        """The same by products of whole numbers, which are exact and many times faster."""
        rows, columns = (slice(None) if cut is None else block for cut in self.cuts[:2])
        products = []
        for codes, steps in self.factor.codes(candidates, rows):
            for others, units in other:
                product = multiply_codes(codes.flatten(0, 1), others[columns].mT).unflatten(0, codes.shape[:2])
                products.append(product.to(steps.dtype).mul_(steps * units.mT))
        return reduce(Tensor.add_, products)


def _cut(tensor: Tensor | None, block: slice, dimension: int | None) -> Tensor | None:
    if tensor is None or dimension is None:
        return tensor
    return tensor[block] if dimension == 0 else tensor[..., block]


def _multiplies_codes(left: Factor, right: Factor) -> bool:
    """Whether the product of two matrices may be one of codes: where the processor multiplies eight bits exactly."""
    both = left.whole is not None and right.whole is not None and left.values.ndim == right.values.ndim == 2
    return both and multiplies_codes(left.values.device)


def _row_errors(product: Tensor, target: Tensor, weight: Tensor | None) -> Tensor:
    """Weighted squared errors of each row and candidate in float64; the product's memory is used up."""
    error = product.sub_(target.unsqueeze(-3))
    if weight is not None:
        error.mul_(weight.unsqueeze(-3))
    return torch.linalg.vector_norm(error, dim=-1).double().square_()  # squares and sums in one pass


def _squares(product: Tensor, target: Tensor, weight: Tensor | None, candidates: int) -> Tensor:
    """Weighted squared errors in the memory of ``product``, which has one more dimension than the target."""
    error = product.sub_(target.unsqueeze(candidates))
    if weight is not None:
        error.mul_(weight.unsqueeze(candidates))
    return error.square_()


def _at_once(elements: int, device: torch.device) -> int:
    """How many candidates to try at once, each taking that many elements."""
    return max(1, (CPU_ELEMENTS if device.type == "cpu" else GPU_ELEMENTS) // max(elements, 1))


def race(factor: Factor, errors: Callable[[Tensor, slice], Tensor], blocks: list[slice]) -> Tensor:
    """The candidate with the least total error (:func:`s2d.ptq.quantizers.first_least`), for each group.

    Errors only grow from block to block, so a candidate that has passed the total of another, and what ties with it, is
    out of the race: the winner is that of the full sums, at a fraction of their cost.

    Args:
        factor: whose candidates they are.
        errors: ``errors(candidates, block)``: ``(candidates, groups)``, not negative.
        blocks: what to sum over, the heaviest first.

    Returns:
        ``(groups,)``.
    """
    running = torch.arange(factor.grids.shape[-3], device=factor.grids.device)
    first, *others = blocks
    total = errors(running, first)
    leaders = total.argmin(0).unique()
    bound = (total[leaders] + sum(errors(leaders, block) for block in others)).amin(0)
    bound = bound * (1 + TIE) * (1 + 1e-5)  # the sums are rounded
    for block in others:
        ahead = (total <= bound).any(1)
        running, total = running[ahead], total[ahead]
        total += errors(running, block)
    return running[first_least(total)]


def _blocks(target: Tensor) -> list[slice]:
    """Cuts along the first dimension, first small ones, none of more than 64 MB."""
    length = len(target)
    longest = max(1, 2**24 // max(target[0].numel(), 1))
    stops = {math.ceil(length * hurdle) for hurdle in HURDLES} | set(range(longest, length, longest))
    stops = sorted(stops)
    return [slice(start, stop) for start, stop in zip([0, *stops], stops, strict=False)]


def _take_turns(contests: list[Contest]) -> None:
    """Each contest given the others' winners, three times in all, or until nothing changes any more."""
    for turn in range(ROUNDS * len(contests) if len(contests) > 1 else 1):
        changed = contests[turn % len(contests)].run()
        if turn > 0 and not changed:
            return


def _balanced(gradient: Tensor | None, factor: Factor) -> Tensor | None:
    """The gradient in units of its mean size in each group; 1 where a group has none, to judge it by plain errors."""
    if gradient is None:
        return None
    size = factor.groups(gradient.abs().double().sum(-1).unsqueeze(-2))[0]
    given = size > 0
    unit = factor.spread(torch.where(given, size * len(size) / gradient.numel(), 1)).squeeze(-3)
    return torch.where(factor.spread(given).squeeze(-3), gradient / unit, 1).to(gradient.dtype)


# --- the sites -------------------------------------------------------------------------------------------------------


@dataclass
class Search:
    """What to search, and how; see :func:`ptq4vit`.

    Attributes:
        twin: whether to use the twin quantizers.
        begun: the quantizers that the search of each site began with, by site and attribute.
    """

    w_bits: int
    a_bits: int
    weights: str
    activations: str
    rows: int | None
    twin: bool
    begun: dict[str, dict[str, Quantizer | None]] = field(default_factory=dict)

    def concerns(self, site: Site) -> bool:
        """Whether the site has anything to search."""
        weighted = not isinstance(site, QuantizedProduct)
        reads = not isinstance(site, CONVOLUTIONS)
        return (weighted and self.w_bits not in SWITCHED_OFF) or (reads and self.a_bits not in SWITCHED_OFF)

    @torch.no_grad()
    def __call__(self, seen: Seen) -> None:
        """Set the quantizers of a site."""
        if isinstance(seen.site, QuantizedProduct):
            self._product(seen)
        elif isinstance(seen.site, CONVOLUTIONS):
            self._convolution(seen)
        else:
            self._linear(seen)

    # Linear layers

    def _linear(self, seen: Seen) -> None:
        site, x = seen.site, _rows(_working(seen.inputs[0]))
        gradient = _usable(seen.gradient, _rows)
        weight, reads = self._weight(site, site.weight), self._input(site, x)
        taken, gradient = self._select(gradient, len(x), self.rows)
        reads = replace(reads, values=x[taken])
        target = multiply(reads.values, weight.values.T)
        blocks = _blocks(target)
        contests = []
        if weight.grids is not None:
            judged = _balanced(_transposed(gradient), weight)
            contests.append(Contest(weight, reads, _transposed(target), judged, (None, -1, -1), blocks))
        if reads.grids is not None:
            contests.append(Contest(reads, weight, target, _balanced(gradient, reads), (0, None, 0), blocks))
        set_both = partial(self._set, site, weight_quantizer=weight, input_quantizer=reads)
        set_both(begin=True)
        _take_turns(contests)
        set_both()

    def _set(self, site: Site, *, begin: bool = False, **factors: Factor) -> None:
        """Put the grids in use into quantizers of the site, to begin with or at the end."""
        made = {
            name: _weight_quantizer(factor, self.w_bits, site.weight.ndim)
            if name == "weight_quantizer"
            else _input_quantizer(factor, self.a_bits)
            for name, factor in factors.items()
        }
        if begin:
            self.begun[site.name] = made
            return
        for name, quantizer in made.items():
            setattr(site, name, quantizer)

    def _weight(self, site: Site, weight: Tensor) -> Factor:
        weight = _working(weight.detach()).flatten(1)
        if self.w_bits in SWITCHED_OFF:
            return in_floating_point(weight)
        by_channel = self.weights == "per_channel" or isinstance(site, CONVOLUTIONS)
        return per_part(weight, self.w_bits, len(weight) if by_channel else site.parts)

    def _input(self, site: Site, x: Tensor) -> Factor:
        if self.a_bits in SWITCHED_OFF:
            return in_floating_point(x)
        if self.activations == "per_token":
            return per_token(x, self.a_bits)
        if self.twin and site.after == "gelu" and site.input_transform is None:
            return (after_gelu_with_long_tail if has_long_tail(x) else after_gelu)(x, self.a_bits)
        return per_tensor(x, self.a_bits)

    def _select(self, gradient: Tensor | None, length: int, wanted: int | None) -> tuple[Tensor, Tensor | None]:
        """Which entries of the first dimension to look at, those with the largest gradients first; and the gradient."""
        device = None if gradient is None else gradient.device
        taken = torch.arange(length, device=device)
        if gradient is not None:
            size = gradient.double().flatten(1).square().sum(1)
            taken = gradient.flatten(1).any(1).nonzero()[:, 0]  # the others add nothing to the score
        if wanted is not None and len(taken) > wanted:
            taken = taken[torch.linspace(0, len(taken) - 1, wanted, device=device).round().long()]
        if gradient is None:
            return taken, None
        taken = taken[size[taken].argsort(descending=True, stable=True)]
        return taken, gradient[taken]

    # convolutions

    def _convolution(self, seen: Seen) -> None:
        site, images, weight = seen.site, _working(seen.inputs[0]), self._weight(seen.site, seen.site.weight)
        self._set(site, begin=True, weight_quantizer=weight)
        if images.ndim == site.weight.ndim:
            self._convolution_by_outputs(site, images, seen.gradient, weight)
        else:  # images of several sizes, or without a batch dimension
            _by_own_error(weight)
        self._set(site, weight_quantizer=weight)

    def _convolution_by_outputs(self, site: Site, images: Tensor, gradient: Tensor | None, weight: Factor) -> None:
        original = weight.values.unsqueeze(0)
        positions = _convolved(site, images[:1], original).shape[-1]
        gradient = _usable(gradient, lambda g: g.flatten(2))
        taken, gradient = self._select(gradient, len(images), self._images(positions))
        images = images[taken]
        target, judged = _convolved(site, images, original).squeeze(1), _balanced(gradient, weight)

        def errors(candidates: Tensor, block: slice) -> Tensor:
            weighting = None if judged is None else judged[block]
            found = []
            for part in weight.grids[candidates].split(_at_once(target[block].numel(), images.device)):
                output = _convolved(site, images[block], weight.quantize(original, part))
                found.append(weight.groups(_squares(output, target[block], weighting, 1).sum(-1).double()))
            return torch.cat(found)

        weight.choose(race(weight, errors, _blocks(target)))

    def _images(self, rows: int) -> int | None:
        """How many images have the wanted number of rows."""
        return None if self.rows is None else math.ceil(self.rows / rows)

    # products

    def _product(self, seen: Seen) -> None:
        site, (x, y) = seen.site, (_working(tensor) for tensor in seen.inputs)
        together = _is_matrix_product(x, y, seen.output)
        left, right = self._left(site, x, together), self._activation(y.mT.contiguous(), together)
        set_both = partial(self._set, site, left_quantizer=left, right_quantizer=right)
        set_both(begin=True)
        if together:
            self._product_by_outputs(seen, left, right)
        else:
            _by_own_error(left)
            _by_own_error(right)
        set_both()

    def _product_by_outputs(self, seen: Seen, left: Factor, right: Factor) -> None:
        gradient = _usable(seen.gradient, lambda g: g)
        taken, gradient = self._select(gradient, len(left.values), self._images(left.values.shape[-2]))
        left.values, right.values = left.values[taken], right.values[taken]
        target = left.values @ right.values.mT
        blocks, cuts = _blocks(target), (0, 0, 0)
        turned = _transposed(gradient)
        _take_turns(
            [
                Contest(left, right, target, _balanced(gradient, left), cuts, blocks),
                Contest(right, left, _transposed(target), _balanced(turned, right), cuts, blocks),
            ]
        )

    def _left(self, site: QuantizedProduct, x: Tensor, together: bool) -> Factor:
        # Some attentions normalize with something else than softmax.
        probabilities = site.kind == "pv" and bool((x >= 0).all() and (x <= 1.01).all())
        return after_softmax(x, self.a_bits) if self.twin and probabilities else self._activation(x, together)

    def _activation(self, x: Tensor, together: bool) -> Factor:
        # Heads are known to be where a plain product of four-dimensional tensors has them.
        heads = together and x.ndim == 4 and x.shape[1] > 1
        return per_head(x, self.a_bits) if heads else per_tensor(x, self.a_bits)


def _search_all(
    model: nn.Module,
    batches: list[Any],
    search: Search,
    progress: Callable[[str], None] | None,
    **collecting: Any,
) -> None:
    """Search every site; ``collecting`` says how :func:`s2d.ptq.calibrate.site_inputs` sees them."""
    concerned = [site for site in sites(model).values() if search.concerns(site)]
    for seen in site_inputs(model, batches, concerned, progress=progress, **collecting):
        search(seen)
    _keep_what_helps(model, kept_back(batches), search.begun)
    for site in quantized_layers(model).values():  # only now: the search needs the floating-point model
        site.freeze_weight()


KINDS = {
    "inputs": ("input_quantizer",),
    "weights": ("weight_quantizer",),
    "products": ("left_quantizer", "right_quantizer"),
}
"""What goes back to where the search began, together: all quantizers under these attributes."""


def _keep_what_helps(model: nn.Module, held: list[Any], begun: dict[str, dict[str, Quantizer | None]]) -> None:
    """Put the grids of a kind back to those the search began with, where the model's output clearly has less error."""
    if sum(map(item_count, held)) < FEW_ITEMS:
        return
    expected = outputs(model, held, "float")

    def errors() -> Tensor:
        weights = {
            name: site.weight.detach() if site.weight_quantizer is None else site.weight_quantizer(site.weight.detach())
            for name, site in quantized_layers(model).items()
        }
        with replaced(model, weights):
            return item_errors(outputs(model, held, "quantized"), expected)

    found, least = sites(model), errors()
    for kind, attributes in KINDS.items():
        before: dict[tuple[str, str], Quantizer | None] = {}
        for name, made in begun.items():
            for attribute in attributes:
                if made.get(attribute) is not None:
                    before[name, attribute] = getattr(found[name], attribute)
                    setattr(found[name], attribute, made[attribute])
        if not before:
            continue
        now = errors()
        worse = clearly_above(least, now)
        if worse:
            least = now
        else:
            for (name, attribute), quantizer in before.items():
                setattr(found[name], attribute, quantizer)
        for name in dict.fromkeys(name for name, _ in before):
            note(model, name, f"search of {kind}", not worse)


def _working(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def _rows(tensor: Tensor) -> Tensor:
    return tensor.reshape(-1, tensor.shape[-1])


def _usable(gradient: Tensor | None, shape: Callable[[Tensor], Tensor]) -> Tensor | None:
    """The gradient in another shape, or None if it says nothing."""
    if gradient is None or not torch.isfinite(gradient).all() or not gradient.any():
        return None
    return shape(_working(gradient))


def _transposed(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.mT.contiguous()


def _by_own_error(factor: Factor) -> None:
    """Choose by the squared error of the values themselves."""
    whole = slice(None)
    Contest(factor, None, factor.values, None, (None, None, 0), [whole]).run()


def _is_matrix_product(left: Tensor, right: Tensor, output: Tensor | None) -> bool:
    """Whether the product is that of the two factors' matrices (an einsum need not be), image by image."""
    if not (left.ndim == right.ndim > 2 and left.shape[-1] == right.shape[-2] and len(left) == len(right)):
        return False
    if output is None:
        return True
    product = left @ right
    return product.shape == output.shape and torch.allclose(
        product, _working(output), 1e-2, 1e-2 * float(output.abs().max())
    )


def _convolved(site: Site, images: Tensor, weights: Tensor) -> Tensor:
    """Outputs without bias for several weights ``(candidates, out, K)``: ``(images, candidates, out, positions)``."""
    count, grouped = len(weights), weights.unflatten(1, (site.groups, -1)).transpose(0, 1)
    # One convolution for all: more candidates are more output channels, of each group.
    stacked = grouped.reshape(-1, *site.weight.shape[1:])
    output = site.product(images, stacked, None).flatten(2)
    return output.unflatten(1, (site.groups, count, -1)).transpose(1, 2).flatten(2, 3)


def _weight_quantizer(factor: Factor, n_bits: int, dimensions: int) -> AffineQuantizer | None:
    if factor.grids is None:
        return None
    quantizer = AffineQuantizer(n_bits, symmetric=True, narrow_range=False, granularity="per_channel")
    quantizer.set_grid(factor.chosen.view(-1, *[1] * (dimensions - 1)))
    return quantizer


def _input_quantizer(factor: Factor, n_bits: int) -> Quantizer | None:
    if factor.grids is None:
        return factor.fixed
    if factor.kind is TwinUniformGELU:
        quantizer = TwinUniformGELU(n_bits)
        quantizer.set_scale(factor.chosen)
    elif factor.kind is TwinUniformTail:
        quantizer = TwinUniformTail(n_bits)
        quantizer.set_steps(*tail_steps(factor.chosen, factor.largest, n_bits))
    elif factor.kind is TwinUniformSoftmax:
        quantizer = TwinUniformSoftmax(n_bits)
        quantizer.set_split(factor.chosen)
    elif factor.chosen.ndim == 4:
        quantizer = AffineQuantizer(n_bits, symmetric=True, narrow_range=False, granularity="per_channel", axis=-3)
        quantizer.set_grid(factor.chosen.squeeze(-3))
    else:
        quantizer = AffineQuantizer(n_bits, symmetric=True, narrow_range=False)
        quantizer.set_grid(factor.chosen.view(()))
    return quantizer
