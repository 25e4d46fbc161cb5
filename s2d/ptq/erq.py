"""ERQ: let ridge regression take up what quantizing the inputs, then the weights, does to a layer's output."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial, reduce
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from s2d.ptq.calibrate import Shared, item_count, site_inputs
from s2d.ptq.judge import (
    FEW_ITEMS,
    clearly_above,
    fitted_rows,
    inputs_as_run,
    item_errors,
    kept_back,
    nearest,
    note,
    outputs,
    replaced,
)
from s2d.ptq.products import multiply
from s2d.ptq.quantizers import (
    SWITCHED_OFF,
    Quantizer,
    all_finite,
    check_quantizer_bits,
    chunk_elements,
    fake_quantize,
    first_least,
    round_to_grid,
    tail_quantiles,
)
from s2d.ptq.repq_vit import PERCENTILES, calibrate_activations, row_quantizer
from s2d.ptq.sites import CONVOLUTIONS, QuantizedLinear, quantized_layers

WEIGHT_PERCENTILES = (0.97, 0.98, 0.99, 0.995, 0.9995, 0.9997, 0.9999, 0.99995, 0.99999, 1.0)
STEPS = 100
KEPT_ROWS = 0.75  # while that part of the rows is still being refined, the others stay among them
# Of Aqer's ridge: its multiples to choose from, in how many parts the rows are cut for that, how many outputs judge.
RIDGE_FACTORS = (1.0, 10.0, 100.0)
FOLDS = 4
FEW_OUTPUTS = 128
COSTLY = 300  # inputs of a layer from which on two parts judge: a solve takes longer than they would gain


@torch.no_grad()
def erq(
    model: nn.Module,
    batches: list[Any],
    *,
    w_bits: int,
    a_bits: int,
    progress: Callable[[str], None] | None = None,
    shared: Shared | None = None,
    softmax: str = "auto",
    gelu: str = "auto",
    activations: str = "per_tensor",
    ridge: float = 0.1,
    aqer: bool = True,
    wqer: bool = True,
    refine: bool = True,
    column_groups: bool = True,
) -> None:
    r"""Quantize with ERQ: RepQ-ViT's activation grids, and for each Linear layer two reductions of the output's error.

    Activation error (Aqer): with the layer's floating-point inputs X and :math:`A = [Q(X), 1]`, weight and bias move to
    the ridge solution of :math:`A [W', b']^T \approx X W^T + b`. Weight error (Wqer): the columns are rounded half by
    half, and each time the columns still in floating point, bias last, move to the ridge solution that makes up for it;
    which way to round is refined before (:func:`refine_rounding`).

    Where this differs from what was published: the ridge is relative to the inputs' mean square, so that neither the
    number of images nor the scale of the inputs matters, and leaves the bias alone. Aqer's is chosen for each layer by
    cross-validation (:func:`best_ridge`): 32 images are few for d x d unknowns, and without that most layers
    of a small ViT end with more error on other images than they had, and ERQ behind RepQ-ViT. Rounding is refined
    against the error that the remaining columns cannot make up for. A row for which all this ends above plain rounding
    in the layer's own squared error takes plain rounding.

    And each reduction is judged on a quarter of the calibration items, behind layers that are quantized
    (:mod:`s2d.ptq.judge`): of Aqer's correction, fitted to the other items for this and then to all, as large a part is
    taken as lowers the error there (a line search from none to all); a layer whose Wqer ends above plain rounding there
    takes plain rounding; and all of it gives way to RepQ-ViT's rounding where the model's output is clearly worse.
    Fitted to floating-point inputs and not judged, Aqer made a sentence encoder worse than no method at all: with
    inputs whose largest value is 90 times the root mean square it relies on what no quantized network passes on.

    Args:
        model: a prepared model, changed in place.
        batches: calibration data (:func:`s2d.ptq.calibrate.split_batches`).
        w_bits, a_bits: see :func:`s2d.ptq.quantize`. With inputs in floating point there is no activation error; with
            weights in floating point, Aqer alone is left.
        progress: called with a line of text for each site.
        shared: keeps what the sites see for other copies of the model.
        softmax, gelu, activations: as in :func:`s2d.ptq.repq_vit.repq_vit`.
        ridge: lambda over the mean square of the inputs, above zero; for Aqer, the least of those tried.
        aqer, wqer, refine: whether to reduce the activation error and the weight error, and to refine the rounding.
        column_groups: in layers behind a norm, a grid of its own for the twentieth of the columns with most outliers
            (:class:`ColumnGroupQuantizer`).

    Raises:
        ValueError: for a ridge that is not positive and finite, another choice of ``softmax``, ``gelu`` or
            ``activations``, or calibration data that is not finite or misses a site.

    Cost: for a layer of d inputs and m outputs, a Cholesky factor of d x d in float64 and about m d^2 operations more;
    memory: one layer's activations, about seven d x d matrices in float64, and the new weights. With 6304 rows on one
    core: 1.2 s for 768 inputs and 3072 outputs, 7 s for 3072 inputs and 768 outputs.

    Paper: Tables 6 and 8 (ERQ).
    """
    if not 0 < ridge < math.inf:
        raise ValueError(f"ridge is {ridge!r}: give a number above zero, such as 0.1")
    options = {"w_bits": w_bits, "softmax": softmax, "gelu": gelu, "activations": activations}
    calibrate_activations(model, batches, a_bits, **options, progress=progress, shared=shared)
    layers = quantized_layers(model).values()
    linear = [site for site in layers if not isinstance(site, CONVOLUTIONS)]
    with replaced(model, nearest(model, w_bits)):
        as_run = inputs_as_run(model, kept_back(batches), linear)
    solved: dict[str, tuple[Tensor, Tensor]] = {}  # set at the end, as the model runs in floating point until then
    for seen in site_inputs(model, batches, linear, progress=progress):
        site, x = seen.site, seen.inputs[0].reshape(-1, seen.inputs[0].shape[-1])
        group = outlier_columns(site.weight.detach()) if column_groups and site.after == "norm" else None
        fit = partial(_fit, n_bits=w_bits, group=group) if w_bits not in SWITCHED_OFF else None
        kept: dict[str, float] = {}
        judge = {"fitted": fitted_rows(len(x), batches), "held": as_run.pop(site.name, None), "kept": kept}
        new = solve_layer(site, x, fit, **judge, ridge=ridge, aqer=aqer, wqer=wqer, refine=refine)
        for what, share in kept.items():
            note(model, site, what, share)
        solved[site.name] = tuple(part.to(site.weight.dtype) for part in new)
    if w_bits not in SWITCHED_OFF and not _helps(model, kept_back(batches), solved, w_bits):
        for site in linear:
            site.weight_quantizer = row_quantizer(site.weight, w_bits, PERCENTILES)
            solved[site.name] = site.weight_quantizer(site.weight.detach()), site.weight.new_zeros(len(site.weight))
            if site.bias is not None:
                solved[site.name] = solved[site.name][0], site.bias.detach().clone()
            note(model, site, "erq", 0.0)
    for site in linear:
        weight, bias = solved[site.name]
        site.weight.copy_(weight)
        if site.bias is not None:
            site.bias.copy_(bias)
        elif bias.any():
            site.bias = nn.Parameter(bias)
        site.freeze_weight()
    for site in layers:
        if isinstance(site, CONVOLUTIONS) and w_bits not in SWITCHED_OFF:
            site.weight_quantizer = row_quantizer(site.weight, w_bits, PERCENTILES)
            site.freeze_weight()


def _helps(model: nn.Module, held: list[Any], solved: dict[str, tuple[Tensor, Tensor]], w_bits: int) -> bool:
    """Whether the model puts out no more error with the new weights than with RepQ-ViT's, where that can be told."""
    if sum(map(item_count, held)) < FEW_ITEMS:
        return True
    layers = quantized_layers(model)
    expected = outputs(model, held, "float")
    plain = {name: row_quantizer(layers[name].weight, w_bits, PERCENTILES)(layers[name].weight) for name in solved}
    errors = []
    for weights in ({name: weight for name, (weight, _) in solved.items()}, plain):
        biases = {name: bias for name, (_, bias) in solved.items()} if weights is not plain else {}
        with replaced(model, weights, biases):
            errors.append(item_errors(outputs(model, held, "quantized"), expected))
    return not clearly_above(*errors)


# --- grids -----------------------------------------------------------------------------------------------------------


class ColumnGroupQuantizer(Quantizer):
    """Two asymmetric grids for each row of a weight: one for the columns with outliers, one for the others.

    Args:
        n_bits: 2 to 8.

    Attributes:
        scale, zero_point: ``(rows, 2)``; the zero point is a whole number.
        group: ``(columns,)``, 0 or 1, which of the two a column has.

    Raises:
        ValueError: for a bit width out of range.

    Example:
        >>> quantizer = ColumnGroupQuantizer(2)
        >>> weight = torch.tensor([[0.0, 1.0, 3.0, 30.0]])
        >>> quantizer.fit(weight, torch.tensor([0, 0, 0, 1]), [1.0])
        >>> quantizer(weight)
        tensor([[ 0.,  1.,  3., 30.]])

    Paper: none; ERQ's weights behind a norm.
    """

    def __init__(self, n_bits: int) -> None:
        super().__init__()
        self.n_bits = check_quantizer_bits(n_bits)
        self.q_min, self.q_max = 0, 2**n_bits - 1
        self._seen: Tensor | None = None
        for name in ("scale", "zero_point", "group"):
            self.register_buffer(name, None)

    def observe(self, x: Tensor) -> None:
        """Take a weight; the last one counts."""
        self._seen = x.detach()

    def freeze(self) -> None:
        """Fit both grids, and which columns have which, to the weight."""
        if self._seen is not None:
            self.fit(self._seen, outlier_columns(self._seen))
            self._seen = None
        self._check_frozen()

    def fit(self, weight: Tensor, group: Tensor, percentiles: Sequence[float] = WEIGHT_PERCENTILES) -> None:
        """Fit both grids to a weight, with the groups given.

        Args:
            weight: ``(rows, columns)``.
            group: ``(columns,)``, 0 or 1.
            percentiles: the p to choose from.
        """
        parts = [weight[:, group == number] for number in (0, 1)]
        parts = [part if part.shape[1] else torch.zeros_like(weight[:, :1]) for part in parts]
        grids = [row_quantizer(part, self.n_bits, percentiles) for part in parts]
        self.group = group.clone()
        self.scale, self.zero_point = (torch.cat([getattr(q, n) for q in grids], 1) for n in ("scale", "zero_point"))

    def codes(self, x: Tensor) -> Tensor:
        self._check_frozen()
        return round_to_grid(x.detach(), *full_grid(self), self.q_min, self.q_max).to(torch.int16)

    def dequantize(self, codes: Tensor) -> Tensor:
        self._check_frozen()
        scale, zero_point = full_grid(self)
        return (codes - zero_point) * scale

    def _fake_quantize(self, x: Tensor) -> Tensor:
        self._check_frozen()
        return fake_quantize(x, *full_grid(self), self.q_min, self.q_max)

    def _inside(self, x: Tensor) -> Tensor:
        codes = round_to_grid(x, *full_grid(self), self.q_min - 1, self.q_max + 1)
        return (codes >= self.q_min) & (codes <= self.q_max)

    def extra_repr(self) -> str:
        return f"{self.n_bits} bits, asymmetric, two column groups a row"


def outlier_columns(weight: Tensor) -> Tensor:
    """1 for the columns that most often lie outside of their rows' 1st and 99th percentile, 0 for the others.

    Args:
        weight: ``(rows, columns)``; a twentieth of the number of rows is marked, at most half of the columns.

    Returns:
        ``(columns,)``, int64.

    Example:
        >>> weight = torch.linspace(-1, 1, 6).repeat(20, 1)
        >>> weight[:, 2] = 9.0
        >>> outlier_columns(weight).tolist()
        [0, 0, 1, 0, 0, 0]

    Paper: none; ERQ.
    """
    rows, columns = weight.shape
    low, high = (end[0, :, None] for end in tail_quantiles(weight, [0.99]))
    often = ((weight < low) | (weight > high)).sum(0)
    group = torch.zeros(columns, dtype=torch.int64, device=weight.device)
    group[often.topk(min(rows // 20, columns // 2)).indices] = 1
    return group


def full_grid(quantizer: Quantizer) -> tuple[Tensor, Tensor]:
    """Scale and zero point of a row-wise weight quantizer, broadcastable to the weight."""
    if isinstance(quantizer, ColumnGroupQuantizer):
        return quantizer.scale[:, quantizer.group], quantizer.zero_point[:, quantizer.group]
    return quantizer.scale, quantizer.zero_point


def _fit(weight: Tensor, n_bits: int, group: Tensor | None) -> Quantizer:
    if group is None:
        return row_quantizer(weight, n_bits, WEIGHT_PERCENTILES)
    quantizer = ColumnGroupQuantizer(n_bits)
    quantizer.fit(weight, group)
    return quantizer


# --- one layer -------------------------------------------------------------------------------------------------------


@dataclass
class Moments:
    """What n calibration rows of a layer amount to, with A = [Q(X), 1] and the error E = (X - Q(X)) W^T.

    Attributes:
        gram: A^T A, ``(d + 1, d + 1)``.
        cross: A^T E, ``(d + 1, outputs)``.
        rows: n.
    """

    gram: Tensor
    cross: Tensor
    rows: int

    def __add__(self, other: Moments) -> Moments:
        return Moments(self.gram + other.gram, self.cross + other.cross, self.rows + other.rows)

    def __sub__(self, other: Moments) -> Moments:
        return Moments(self.gram - other.gram, self.cross - other.cross, self.rows - other.rows)

    def single(self) -> Moments:
        """In float32: twice as fast, and exact enough to say which of two errors is less."""
        return Moments(self.gram.float(), self.cross.float(), self.rows)


def solver_dtype(device: torch.device) -> torch.dtype:
    """The dtype to solve linear systems in: float64 where there is one."""
    return torch.float32 if device.type == "mps" else torch.float64


def input_moments(x: Tensor, weight: Tensor, quantizer: Quantizer | None, chunk: int | None = None) -> Moments:
    """Stream a layer's inputs into their moments; products in float32, sums over the chunks in float64.

    Args:
        x: ``(n, d)``.
        weight: ``(outputs, d)``, of the layer.
        quantizer: of the inputs; None leaves them as they are.
        chunk: rows a product.

    Example:
        >>> moments = input_moments(torch.tensor([[1.0], [3.0]]), torch.eye(1), None)
        >>> moments.gram.tolist(), moments.cross.tolist(), moments.rows
        ([[10.0, 4.0], [4.0, 2.0]], [[0.0], [0.0]], 2)

    Paper: none; ERQ.
    """
    d, outputs = x.shape[1], len(weight)
    few = min(outputs, len(x) / 4) < d  # then the error's outputs are cheaper to multiply with than its inputs
    dtype = solver_dtype(x.device)
    gram = torch.zeros(d + 1, d + 1, dtype=dtype, device=x.device)
    cross = torch.zeros(d + 1, outputs if few else d, dtype=dtype, device=x.device)
    for part in x.split(chunk or max(1024, chunk_elements(x.device) // d)):
        part = part.to(torch.promote_types(part.dtype, torch.float32))
        quantized = part if quantizer is None else quantizer(part)
        inputs = F.pad(quantized, (0, 1), value=1.0)
        gram += multiply(inputs.T, inputs)
        if quantizer is not None:
            error = part - quantized
            cross += multiply(inputs.T, multiply(error, weight.T.to(part.dtype)) if few else error)
    return Moments(gram, cross if few else cross @ weight.T.to(dtype), len(x))


def solve_layer(
    site: QuantizedLinear,
    x: Tensor,
    fit: Callable[[Tensor], Quantizer] | None,
    *,
    ridge: float,
    fitted: Tensor | None = None,
    held: Tensor | None = None,
    kept: dict[str, float] | None = None,
    aqer: bool = True,
    wqer: bool = True,
    refine: bool = True,
) -> tuple[Tensor, Tensor]:
    """New weight and bias of one layer, and its weight quantizer (set here); options as in :func:`erq`.

    Args:
        site: the layer, in floating point.
        x: ``(n, d)``, its inputs.
        fit: gives a frozen quantizer for a weight, its scales in the same shape each time; None leaves the weight in
            floating point.
        fitted: ``(n,)``, which of the inputs Aqer is fitted to before it is judged; in the end it is fitted to all.
        held: ``(m, d)``, what it reads in the quantized network of data kept back; None for no such judge.
        kept: takes, by name (``"aqer"``, ``"wqer"``), which share of each reduction the judge kept.

    Returns:
        Weight and bias in float64, the weight on the quantizer's grid.

    Paper: none; ERQ.
    """
    measure = partial(input_moments, weight=site.weight, quantizer=site.input_quantizer)
    part, rest = (x, x[:0]) if held is None or fitted is None else (x[fitted], x[~fitted])
    folds = [measure(rows) for rows in _folds(part) if len(rows)]
    moments = reduce(operator.add, folds)
    judge = None if held is None else measure(held).single()
    weight = site.weight.detach().to(moments.gram.dtype)
    bias = weight.new_zeros(len(weight)) if site.bias is None else site.bias.detach().to(weight.dtype)
    original = torch.cat([weight, bias[:, None]], 1)
    goal, kept = original, {} if kept is None else kept
    if aqer and site.input_quantizer is not None:
        multiple = best_ridge(folds, moments, ridge)
        if judge is not None and multiple is not None:
            kept["aqer"] = share_that_helps(ridge_solution(moments, multiple).float(), judge)
        elif judge is not None:
            kept["aqer"] = 0.0
    if len(rest):
        moments = moments + measure(rest)
    if aqer and site.input_quantizer is not None and multiple is not None and kept.get("aqer", 1.0) > 0:
        goal = original + kept.get("aqer", 1.0) * ridge_solution(moments, multiple)
    if fit is None:
        return goal[:, :-1], goal[:, -1]
    site.weight_quantizer = quantizer = fit(goal[:, :-1].float())
    best = _rounded(goal, quantizer)
    if wqer:
        best = round_half_by_half(goal, quantizer, upper_factor(moments.gram, ridge), refine=refine)
    # The error is a sum over rows, so each may fall back on its own.
    plain_quantizer = fit(weight.float())
    plain = _rounded(original, plain_quantizer)
    changes = [(weights - original).float() for weights in (best, plain)]
    single = moments.single()
    worse = (excess_error(changes[0], single) > excess_error(changes[1], single))[:, None]
    if judge is not None:
        changes[0] = torch.where(worse, changes[1], changes[0])
        errors = [excess_error(change, judge).sum() for change in changes]
        kept["wqer"] = float(errors[0] <= errors[1])
        worse |= kept["wqer"] == 0
    best = torch.where(worse, plain, best)
    quantizer.scale = torch.where(worse, plain_quantizer.scale, quantizer.scale)
    quantizer.zero_point = torch.where(worse, plain_quantizer.zero_point, quantizer.zero_point)
    return best[:, :-1], best[:, -1]


def _folds(rows: Tensor) -> list[Tensor]:
    """Parts of the rows for :func:`best_ridge`; those that will not judge as one."""
    parts = list(rows.tensor_split(FOLDS))
    judging = _judging(rows.shape[1])
    return parts[:judging] + ([rows[sum(map(len, parts[:judging])) :]] if judging < FOLDS else [])


def _judging(inputs: int) -> int:
    """How many of the parts judge for a layer with so many inputs."""
    return FOLDS if inputs + 1 < COSTLY else 2


def share_that_helps(change: Tensor, judge: Moments) -> float:
    r"""As large a part of a change of [W, b] as lowers the error on other rows the most, from 0 (none) to 1 (all).

    .. math:: t = \operatorname{clamp}\left(\frac{\langle D, C^T \rangle}{\langle D G, D \rangle}, 0, 1\right)

    Args:
        change: D, ``(outputs, d + 1)``.
        judge: G and C of rows that it was not fitted to.

    Example:
        >>> judge = input_moments(torch.tensor([[0.4], [1.6]]), torch.eye(1), torch.round)  # read as 0 and 2
        >>> round(share_that_helps(torch.tensor([[-0.4, 0.0]]).double(), judge), 3)  # reads 2 where it was 1.6
        0.5

    Paper: none.
    """
    straight = (change * judge.cross.T).sum()
    square = (multiply(change, judge.gram) * change).sum()
    return float((straight / square).clamp(0, 1)) if straight > 0 else 0.0


def _rounded(augmented: Tensor, quantizer: Quantizer) -> Tensor:
    return torch.cat([quantizer(augmented[:, :-1].float()).to(augmented.dtype), augmented[:, -1:]], 1)


def excess_error(change: Tensor, moments: Moments) -> Tensor:
    r"""Squared error of each output, summed over the rows, less what it is with weight and bias as they were.

    .. math:: \operatorname{diag}(D G D^T - 2 D C)

    Args:
        change: D, ``(outputs, d + 1)``, what was added to [W, b].
        moments: G and C.

    Returns:
        ``(outputs,)``.

    Paper: none; ERQ's objective.
    """
    return multiply(change, moments.gram).sub_(moments.cross.T, alpha=2).mul_(change).sum(1)


def ridge_solution(moments: Moments, ridge: float) -> Tensor:
    r"""What to add to [W, b] for quantized inputs: the solution :math:`(A^T A + \lambda I)^{-1} A^T E`, transposed.

    Args:
        moments: of the rows to fit.
        ridge: lambda over the inputs' mean square.

    Returns:
        ``(outputs, d + 1)``.

    Paper: none; ERQ's activation quantization error reduction.
    """
    return torch.cholesky_solve(moments.cross, damped_cholesky(moments.gram, ridge)).T


def best_ridge(folds: list[Moments], total: Moments, ridge: float) -> float | None:
    """The ridge for :func:`ridge_solution`.

    With few rows the solution follows their noise, more than the layer's error shrinks. So it is the multiple of
    ``ridge`` (of ``RIDGE_FACTORS``) that is best in cross-validation over the folds.

    Args:
        folds: moments of parts of the rows.
        total: their sum.
        ridge: the least.

    Returns:
        None where nothing lowers the error of the rows left out.

    Paper: none.
    """
    some = slice(None, None, -(-total.cross.shape[1] // FEW_OUTPUTS))
    errors = torch.zeros(len(RIDGE_FACTORS), device=total.gram.device)
    judges = folds[: _judging(len(total.gram) - 1)] if len(folds) > 1 else []
    for fold in judges:
        rest, test = (Moments(m.gram.float(), m.cross[:, some].float(), m.rows) for m in (total - fold, fold))
        for i, factor in enumerate(RIDGE_FACTORS):
            errors[i] += excess_error(ridge_solution(rest, ridge * factor), test).sum()
    best = int(first_least(errors))
    return ridge * RIDGE_FACTORS[best] if errors[best] < 0 else None


def upper_factor(gram: Tensor, ridge: float) -> Tensor:
    """Upper triangular U with U U^T = gram + lambda I, lambda the ridge times the inputs' mean square, bias left alone.

    Every trailing block of U is the factor of that block of the matrix, so one factor serves all steps of
    :func:`round_half_by_half`. A matrix too close to singular for that gets ten times the ridge until it works.

    Args:
        gram: ``(d + 1, d + 1)``, the bias last.
        ridge: above zero.

    Raises:
        ValueError: for a matrix that is not finite.

    Example:
        >>> gram = torch.tensor([[5.0, 2.0], [2.0, 1.0]])
        >>> U = upper_factor(gram, 0.2)
        >>> torch.allclose(U @ U.T, torch.tensor([[6.0, 2.0], [2.0, 1.0]]))
        True

    Paper: none.
    """
    return damped_cholesky(gram, ridge, last_first=True).flip(0, 1)


def damped_cholesky(gram: Tensor, ridge: float, *, last_first: bool = False) -> Tensor:
    """Lower triangular L with L L^T = gram + lambda I; arguments and errors as for :func:`upper_factor`.

    Args:
        last_first: factor the matrix with its rows and columns in reverse order.
    """
    if not all_finite(gram):
        raise ValueError("the squares of a layer's inputs overflow: check the images and the model's forward pass")
    mean = gram.diagonal()[:-1].mean()
    unit = torch.where(mean > 0, mean, 1)  # inputs that are all zero leave nothing to solve; any lambda does
    while True:
        damped = gram.clone()
        damped.diagonal()[:-1] += ridge * unit
        lower, failed = torch.linalg.cholesky_ex(damped.flip(0, 1) if last_first else damped)
        if not failed:
            return lower
        ridge *= 10


# --- weight error ----------------------------------------------------------------------------------------------------


def round_half_by_half(goal: Tensor, quantizer: Quantizer, factor: Tensor, *, refine: bool = True) -> Tensor:
    """Round all columns but the last; at each step half of those that are left, the others making up for it.

    Args:
        goal: ``(rows, d + 1)``, weight and bias.
        quantizer: of the weight, frozen.
        factor: :func:`upper_factor` of the inputs' Gram matrix.
        refine: whether to refine the rounding.

    Returns:
        ``(rows, d + 1)``; the weight on the grid, the bias in floating point.

    Paper: none; ERQ's weight quantization error reduction.
    """
    columns = goal.clone()
    scale, zero_point = (grid.expand(-1, goal.shape[1] - 1) for grid in full_grid(quantizer))
    start, end = 0, goal.shape[1]
    while end - start > 1:
        half = slice(start, start + (end - start) // 2)
        rest = slice(half.stop, end)
        wanted = columns[:, half].clone()
        grid = (scale[:, half], zero_point[:, half], quantizer.q_min, quantizer.q_max)
        codes = round_to_grid(wanted.float(), *grid)
        if refine:
            block = factor[half, half]
            codes = refine_rounding(wanted.float(), codes, *grid, (block @ block.T).float())
        columns[:, half] = (codes - grid[1]) * grid[0]
        error = (columns[:, half] - wanted) @ factor[half, rest]
        columns[:, rest] -= torch.linalg.solve_triangular(factor[rest, rest].T, error.T, upper=False).T
        start = half.stop
    return columns


def refine_rounding(
    wanted: Tensor,
    codes: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    q_min: int,
    q_max: int,
    gram: Tensor,
    steps: int = STEPS,
) -> Tensor:
    r"""Round some entries of each row the other way, one a step, to lower :math:`\delta^T P \delta`.

    Each step takes the entry whose change from floor to ceiling, or back, lowers the row's error the most; a row
    without one is done.

    Args:
        wanted: ``(rows, columns)``.
        codes: the nearest codes, as floating-point numbers.
        scale, zero_point, q_min, q_max: the grid, each ``(rows, columns)``.
        gram: P, ``(columns, columns)``.
        steps: at most that many changes a row.

    Returns:
        The codes, whose error is never above that of the nearest ones.

    Paper: none; ERQ's rounding refinement.
    """
    codes = codes.clone()
    delta = (codes - zero_point) * scale - wanted
    slope = 2 * delta @ gram
    # The other neighbour: above if the code lies below, and the other way round; none where it is off the grid.
    flip = torch.where(delta > 0, -1.0, 1.0)
    flip[(codes + flip < q_min) | (codes + flip > q_max)] = 0
    change = flip * scale
    square = change.square() * gram.diagonal()
    going = torch.arange(len(codes), device=codes.device)  # the rows that are not done
    for _ in range(steps):
        least, at = torch.addcmul(square, change, slope).min(1, keepdim=True)
        better = least < 0
        left = int(better.sum())
        if left == 0:
            break
        if left < KEPT_ROWS * len(going):  # a row that is done stays so: left out now and then, as that takes copies
            rows = better[:, 0]
            going, slope, flip, change, square = (t[rows] for t in (going, slope, flip, change, square))
            at, better = at[rows], better[rows]
        slope.addcmul_(gram[at[:, 0]], change.gather(1, at) * better, value=2)
        codes[going, at[:, 0]] += (flip.gather(1, at) * better)[:, 0]
        for turned in (flip, change):
            taken = turned.gather(1, at)
            turned.scatter_(1, at, torch.where(better, -taken, taken))
    return codes
