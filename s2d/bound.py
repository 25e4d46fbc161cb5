"""Theorem 1: a guaranteed enclosure of the spectral norm, and the check that no layer's output outgrows it."""

from __future__ import annotations

import contextlib
import math
import sys
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize

from s2d.checks import check_number
from s2d.layers import CONVOLUTIONS, LinearMap, check_model, linear_maps, modules_sharing
from s2d.spectral import as_matrix, in_float64, times_power_of_two

# Twice the unit roundoff of float64: the proof then holds for every rounding mode, not only for round to nearest.
UNIT = 2.0**-52
UP = 1.0 + 2.0**-40  # more than the scalar roundings of any expression below, and than all underflow (see the proof)
# How the first eigenvector of a Gram matrix is found fastest, by its size (the calls from Python count for small ones):
# a full decomposition, the power method on its 8th power, or Lanczos iteration.
POWER_FROM, LANCZOS_FROM = 25, 80
POWER_STEPS, LANCZOS_STEPS = 20, 128
# LAPACK's Cholesky factorisation is slow between a hundred and some hundreds of columns; matrix products are not.
WHOLE_UP_TO, PANEL = 64, 48
# Unit roundoffs of what torch may make of float32 factors before it multiplies them, by the name of the setting.
FLOAT32_FACTORS = {"none": 2.0**-24, "ieee": 2.0**-24, "highest": 2.0**-24, "tf32": 2.0**-10, "high": 2.0**-10}
BFLOAT16_FACTORS = 2.0**-8
HALF_PRECISION_SUMS = (
    "allow_fp16_reduced_precision_reduction",
    "allow_bf16_reduced_precision_reduction",
    "allow_fp16_accumulation",
)


class SpectralNormBounds(NamedTuple):
    """``lower <= s_1 <= upper``, as Python floats."""

    lower: float
    upper: float


def spectral_norm_bounds(weight: Tensor, *, rtol: float = 1e-3) -> SpectralNormBounds:
    r"""A guaranteed enclosure of the spectral norm, floating-point rounding included.

    Power iteration alone bounds :math:`s_1` from below, and a check of Theorem 1 against such a value can report
    violations that are not there. Here both ends are proved, each from a computed quantity whose rounding is bounded.

    **Lower.** For any vector, :math:`s_1 \ge \|Av\| / \|v\|`, and a computed product is off by at most
    :math:`\gamma_n \|A\|_F \|v\|` with :math:`\gamma_k = ku/(1-ku)` (Higham 2002, section 3.5). Here v comes from
    Lanczos iteration on the Gram matrix; from the power method or a full decomposition if that is small.

    **Upper.** For any number c and any matrix L,

    .. math:: s_1^2 = \lambda_{\max}(A^T A) \le c + \|R\|_2, \qquad R = cI - A^T A - L L^T,

    because :math:`\|Ax\|^2 = c - \|L^T x\|^2 - x^T R x` for every unit vector x. So L needs no guarantee at all: it is
    the Cholesky factor of :math:`cI - A^T A`, however LAPACK or a GPU computes it, and if c is too small there is
    none, and a better v gives another c. What has to be bounded is R, computed in two products as :math:`\hat R`:

    * :math:`\hat G = \mathrm{fl}(A^T A)`: each entry is off by at most :math:`\gamma_m (|A|^T |A|)_{ij}`, in whatever
      order and with or without fused multiply-adds it is summed, so the matrix by at most :math:`\gamma_m \|A\|_F^2`;
    * :math:`\hat R = \mathrm{fl}(cI - \hat G - L L^T)`: a term of an entry is rounded at most n + 3 times (once on the
      diagonal, and in two sums, those over the earlier columns of L and over its own panel's), so it is off by at most
      :math:`\gamma_{n+3} (|cI - \hat G| + |L||L|^T)`, where :math:`|cI - \hat G| \le |R| + |L||L|^T`.

    Together :math:`s_1^2 \le c + (\|\hat R\|_F + 3\gamma_{n+3}\|L\|_F^2)/(1-\gamma_{n+3}) + \gamma_m\|A\|_F^2`. Only
    the lower triangles of G and R are used, which stand for symmetric matrices, so the entries of R count twice. Taking
    :math:`c = (1 + 1.9\,\text{rtol})\,\text{lower}^2` makes the enclosure ``rtol`` wide. Where c would reach
    :math:`\|A\|_F^2`, that is the bound and needs no factor.

    All is computed in float64 on the weight scaled by a power of two to a largest entry in [1/2, 1). Nothing can then
    overflow, and what underflows is below :math:`2^{-1021}` an operation against :math:`s_1 \ge 1/2`. Assumed are IEEE
    arithmetic in any rounding mode, and matrix products that are sums of products (not Strassen's, and no emulation of
    float64); ``torch.set_flush_denormal`` must be off if the weight itself holds subnormal numbers.

    Args:
        weight: ``(out_features, in_features)``, any floating dtype. For a layer of a model,
            ``linear_maps(model)[name].matrix()``; for a convolution that is the map from a patch to a position.
        rtol: wanted relative width ``upper / lower - 1``, ``1e-6 <= rtol < 1``. The enclosure is valid whether or not
            it is reached; it is not where the norm itself is subnormal or past the largest float64.

    Returns:
        ``(lower, upper)``; ``(0.0, 0.0)`` for a zero matrix.

    Raises:
        TypeError, ValueError: see :func:`s2d.spectral.as_matrix`; ValueError unless ``1e-6 <= rtol < 1``.

    Example:
        >>> lower, upper = spectral_norm_bounds(torch.diag(torch.tensor([3.0, 4.0])))
        >>> lower <= 4.0 <= upper < 4.01
        True

    Paper: Theorem 1 (A.1). Cost: one Gram matrix of the smaller side, one Cholesky factorisation and its check, in
    float64. From a smaller side of 256 on this takes 0.2 to 0.7 of the time of ``torch.linalg.matrix_norm(weight, 2)``,
    at 128 about the same; below about 100, tens of microseconds more, the calls from Python (``benchmarks/bound.py``).
    """
    check_number("rtol", rtol, lambda value: 1e-6 <= value < 1, "choose between 1e-6 and 1")
    matrix = as_matrix(weight)
    exponent = _exponent(matrix)
    if exponent is None:
        return SpectralNormBounds(0.0, 0.0)
    half = -exponent // 2  # in two steps, because 2**-exponent alone may be out of range
    a = in_float64(matrix, copy=True).mul_(math.ldexp(1.0, half)).mul_(math.ldexp(1.0, -exponent - half))
    lower, upper = _scaled_bounds(a if a.shape[0] >= a.shape[1] else a.T, rtol)
    return SpectralNormBounds(_scale(lower, exponent, down=True), _scale(upper, exponent, down=False))


def _exponent(tensor: Tensor) -> int | None:
    """e such that the largest entry lies in ``[2**(e-1), 2**e)``, or None for zeros."""
    smallest, largest = torch.aminmax(tensor)
    magnitude = max(largest.item(), -smallest.item())
    return math.frexp(magnitude)[1] if magnitude > 0 else None


def _gamma(k: int) -> float:
    """Higham's gamma_k for float64, with room for the rounding of this very expression."""
    return 1.01 * k * UNIT / (1.0 - 1.01 * k * UNIT)


def _scaled_bounds(a: Tensor, rtol: float) -> tuple[float, float]:
    """The enclosure for a float64 matrix with m >= n and a largest entry in [1/2, 1)."""
    m, n = a.shape
    gram = a.T @ a
    frobenius_sq = gram.trace().item() * (1 + _gamma(m + n)) * UP
    lower = 0.0
    for vector in _top_vectors(gram, rtol):
        image = torch.linalg.vector_norm(a @ vector).item() * (1 - _gamma(m))
        length = torch.linalg.vector_norm(vector).item() * (1 + _gamma(n))
        if not 0 < length < math.inf:  # a power that underflowed says nothing; the next candidate will
            continue
        lower = max(lower, (image / length - _gamma(n) * math.sqrt(frobenius_sq)) / UP)
        c = (1 + 1.9 * rtol) * lower**2
        if c >= frobenius_sq:
            break
        slack = _certificate(gram, c)
        if slack is not None:
            return lower, math.sqrt(min(c + slack + _gamma(m) * frobenius_sq, frobenius_sq) * UP) * UP
    return lower, math.sqrt(frobenius_sq) * UP


def _certificate(gram: Tensor, c: float) -> float | None:
    """A bound of ``lambda_max(gram) - c``, rounding included, or None if c is too small."""
    n = len(gram)
    rest = -gram
    rest.diagonal().add_(c)
    residual_sq = factor_sq = 0.0
    width = WHOLE_UP_TO if n <= WHOLE_UP_TO else PANEL
    for start in range(0, n, width):
        # One panel of columns, from the diagonal down: less what the earlier columns of L make of it, it is factored,
        # and what the new columns do not make of it is the residual. The earlier columns lie to the left, in place.
        panel = rest[start:, start : start + width]
        if start > 0:
            left = rest[start:, :start]
            panel.addmm_(left, left[: panel.shape[1]].T, alpha=-1)
        corner, failed = torch.linalg.cholesky_ex(panel[: panel.shape[1]])
        if failed.item():
            return None
        whole = len(panel) == len(corner)
        factor = corner if whole else torch.linalg.solve_triangular(corner, panel.T, upper=False).T
        residual = torch.addmm(panel, factor, factor[: len(corner)].T, alpha=-1)
        residual_sq += torch.linalg.vector_norm(residual).item() ** 2
        factor_sq += torch.linalg.vector_norm(factor).item() ** 2
        panel.copy_(factor)
    rounding = _gamma(n + 3)
    slack = (math.sqrt(2 * residual_sq) + 3 * rounding * factor_sq) * (1 + _gamma(n * n)) / (1 - rounding) * UP
    return slack if math.isfinite(slack) else None


def _top_vectors(gram: Tensor, rtol: float) -> Iterator[Tensor]:
    """Better and better approximations of the first eigenvector, each meant to be good enough for ``rtol``."""
    if len(gram) >= LANCZOS_FROM:
        yield from _lanczos(gram, rtol)
    elif len(gram) >= POWER_FROM:
        yield from _powers(gram)
    yield torch.linalg.eigh(gram)[1][:, -1]


def _random_vector(like: Tensor) -> Tensor:
    return torch.randn(len(like), generator=torch.Generator().manual_seed(0), dtype=like.dtype).to(like.device)


def _powers(gram: Tensor) -> Iterator[Tensor]:
    """Powers of the Gram matrix times a random vector: in float32, since nothing is claimed of it.

    The first eigenvalue of a matrix this small is at least a ninth of the Frobenius norm: float32 does not underflow.
    """
    power = torch.linalg.matrix_power((gram / torch.linalg.vector_norm(gram)).float(), 8)
    power /= torch.linalg.vector_norm(power)
    vector = _random_vector(power)
    for _ in range(3):
        for _ in range(POWER_STEPS):
            vector = power @ vector
        yield vector.double()
        vector = vector / vector.abs().max()


def _lanczos(gram: Tensor, rtol: float) -> Iterator[Tensor]:
    """First Ritz vectors: no reorthogonalisation, because a loss of orthogonality only repeats converged ones."""
    q = _random_vector(gram)
    q /= torch.linalg.vector_norm(q)
    basis = [q]
    diagonal: list[float] = []
    off_diagonal: list[float] = []
    last = min(len(gram), LANCZOS_STEPS)
    next_look = 12
    for step in range(1, last + 1):
        w = gram @ q
        diagonal.append(torch.dot(w, q).item())
        w.sub_(q, alpha=diagonal[-1])
        if off_diagonal:
            w.sub_(basis[-2], alpha=off_diagonal[-1])
        remainder = torch.linalg.vector_norm(w).item()
        ended = step == last or remainder == 0.0
        if step >= next_look or ended:
            next_look = step + 6
            # eigh reads the lower triangle only.
            tridiagonal = torch.tensor(diagonal, dtype=torch.float64).diag()
            if off_diagonal:
                tridiagonal.diagonal(-1).copy_(torch.tensor(off_diagonal, dtype=torch.float64))
            values, vectors = torch.linalg.eigh(tridiagonal)
            residual = remainder * abs(vectors[-1, -1].item())
            gap = (values[-1] - values[-2]).item() if step > 1 else 0.0
            error = min(residual, residual**2 / gap) if gap > 0 else residual
            if ended or error <= rtol * values[-1].item():
                yield torch.stack(basis, dim=1) @ vectors[:, -1].to(gram.device)
                next_look = step + step // 2  # it did not do: look again when there is more to see
        if ended:
            return
        off_diagonal.append(remainder)
        q = w / remainder
        basis.append(q)


def _scale(value: float, exponent: int, *, down: bool) -> float:
    """``value * 2**exponent``, rounded outwards where it leaves the range of normal numbers."""
    try:
        scaled = math.ldexp(value, exponent)
    except OverflowError:
        return math.nextafter(math.inf, 0.0) if down else math.inf
    if math.ldexp(scaled, -exponent) == value:
        return scaled
    return max(0.0, math.nextafter(scaled, -math.inf)) if down else math.nextafter(scaled, math.inf)


class BoundCheck(NamedTuple):
    """Theorem 1 on one linear map and one batch.

    Attributes:
        layer: qualified name.
        map: what was checked: ``"linear"`` (y = W x + b as the layer computed it), ``"projection"`` (W x of one of the
            projections inside ``nn.MultiheadAttention``, computed by the check) or ``"patch"`` (a convolution, from
            each patch of the input to its position of the output).
        lower, upper: guaranteed enclosure of the spectral norm of the matrix.
        width: ``upper / lower - 1``, relative; 0 for a zero matrix.
        largest_gain: the largest ``||y - b|| / ||x||`` over the tokens of the batch.
        tightness: ``largest_gain / upper``, at most 1 up to the rounding of the layer's own arithmetic.
        holds: ``||y - b|| <= upper ||x||`` for every token, rounding of the forward pass allowed for.
        tokens: how many inputs were checked; for a convolution, patches.
    """

    layer: str
    map: str
    lower: float
    upper: float
    width: float
    largest_gain: float
    tightness: float
    holds: bool
    tokens: int


@torch.no_grad()
def check_bound(model: nn.Module, batch: Any, *, layers: Mapping[str, LinearMap] | None = None) -> list[BoundCheck]:
    r"""Check Theorem 1 on the inputs and outputs that each layer really sees.

    .. math:: \|W x\|_2 \le \sigma_{\max}(W) \|x\|_2

    The bias is not part of the theorem, so ``y - b`` is compared. The right-hand side uses a guaranteed upper end
    (:func:`spectral_norm_bounds`), never an estimate from below, for the weight that the call used. What the layer's
    own arithmetic can add is allowed for: factors and output rounded to the coarsest dtype that takes part (TF32 and
    bfloat16 products of float32 where the settings allow them), and the products summed in float32 (float64 for
    float64). For the duration of the call, sums in half precision and compiled code are switched off. So a reported
    violation is a real one.

    Which linear map is bounded:

    * ``nn.Linear`` and transformers' ``Conv1D``: y = W x, each token an input.
    * ``nn.MultiheadAttention``: the projections q, k and v, one row each. Their outputs cannot be observed, so W x is
      computed here, in the layer's own dtype, from the query, key and value that it was given.
    * Convolutions, one row a group: y_pos = W patch_pos, where W is the kernel flattened to
      ``(out_channels, in_channels * kernel entries)`` and the patch is what the kernel covers, padding included.
      Stride, dilation and padding choose the patches. With zero padding the norm of the whole convolution is at most
      :math:`s_1 \sqrt{\prod_d \lceil k_d / t_d \rceil}` for kernel sizes :math:`k_d` and strides :math:`t_d`:
      :math:`\sum_{pos} \|W\,patch_{pos}\|^2 \le s_1^2 \sum_{pos} \|patch_{pos}\|^2`, and no entry of the input lies in
      more patches than the product. (With dilation, :math:`t_d` is the stride over its common divisor with it.)

    Args:
        model: any module; left in the mode it is in, gradients off.
        batch: what the model is called with: a tuple holds positional arguments, a mapping keyword arguments, and
            anything else, such as a tensor, is the only argument.
        layers: name to :class:`s2d.layers.LinearMap`; by default ``linear_maps(model)``, and for every layer
            ``linear_maps(model, include="*")``.

    Returns:
        One row a map that took part in the forward pass, in the order of ``layers``; all calls of a layer, and of the
        layers tied to it, count in one row. ``pandas.DataFrame(rows)`` is a table of them.

    Raises:
        TypeError: if ``layers`` holds anything but linear maps.
        ValueError: if the model cannot be called with the batch, a layer's input arises inside its module (experts) or
            is not finite, nor its output or weight, its output is no tensor with a vector for each of the input, or no
            layer took part.

    Example:
        >>> rows = check_bound(nn.Linear(8, 4), torch.randn(16, 8))
        >>> [row.holds for row in rows]
        [True]
        >>> model = nn.Sequential(nn.Conv2d(3, 5, kernel_size=3), nn.ReLU(), nn.Flatten(), nn.Linear(180, 2))
        >>> rows = check_bound(model, torch.randn(2, 3, 8, 8), layers=linear_maps(model, include="*"))
        >>> [(row.layer, row.map, row.tokens) for row in rows]
        [('0', 'patch', 72), ('3', 'linear', 2)]

    Paper: Theorem 1 (A.1), equation 7. Cost: a forward pass, and :func:`spectral_norm_bounds` of each matrix.
    """
    check_model(model)
    if layers is None:
        layers = {name: linear for name, linear in linear_maps(model).items() if linear.argument is not None}
    if not isinstance(layers, Mapping):
        raise TypeError(f"layers is a {type(layers).__name__}: expected a dictionary as linear_maps(model) is")
    layers = dict(layers)
    for name, linear in layers.items():
        if not isinstance(linear, LinearMap):
            raise TypeError(f"layers[{name!r}] is a {type(linear).__name__}: expected values as linear_maps(model) has")
        if linear.argument is None:
            raise ValueError(
                f"layer {name} gets its input inside {type(linear.module).__name__}, where it is not seen: leave it out"
            )
    rows: dict[str, BoundCheck] = {}

    def watch(name: str, linear: LinearMap) -> torch.utils.hooks.RemovableHandle:
        def check(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            try:
                rows[name] = _check_call(name, linear, linear.input(args, kwargs), output, rows.get(name))
            except ValueError as error:
                raise ValueError(f"layer {name}: {error}") from error

        return linear.module.register_forward_hook(check, with_kwargs=True)

    holders = Counter(id(weight) for module in model.modules() for weight in module.parameters(recurse=False))
    handles = []
    try:
        for name, linear in layers.items():
            tied = modules_sharing(model, linear) if holders[id(linear.weight)] > 1 else [linear]
            handles += [watch(name, twin) for twin in {id(twin.module): twin for twin in tied}.values()]
        with _plain_arithmetic():
            _call(model, batch)
    finally:
        for handle in handles:
            handle.remove()
    if not rows:
        raise ValueError(f"none of the layers {', '.join(layers)} took part in the forward pass")
    return [rows[name] for name in layers if name in rows]


def _call(model: nn.Module, batch: Any) -> None:
    args: tuple[Any, ...] = batch if isinstance(batch, tuple) else (batch,)
    kwargs: Mapping[str, Any] = {}
    if isinstance(batch, Mapping):
        args, kwargs = (), batch
    try:
        model(*args, **kwargs)
    except ValueError:
        raise
    except Exception as error:
        dtypes = {str(weight.dtype) for weight in model.parameters()}
        raise ValueError(
            f"the model ({', '.join(sorted(dtypes))}) cannot be called with this batch: {type(error).__name__}: "
            f"{str(error).splitlines()[0] if str(error) else 'no message'}; give it what its forward() takes, in its "
            "own dtype and on its own device"
        ) from error


@contextlib.contextmanager
def _plain_arithmetic() -> Iterator[None]:
    """No sums in half precision, no compiled code (which skips hooks), one value for each parametrized weight."""
    settings = torch.backends.cuda.matmul
    before = {}
    for name in HALF_PRECISION_SUMS:
        if hasattr(settings, name):
            before[name] = getattr(settings, name)
            if hasattr(settings, f"{name}_split_k"):
                before[name] = (before[name], getattr(settings, f"{name}_split_k"))
    # Without torch._dynamo, which takes seconds to import, nothing can have been compiled.
    compiled = "torch._dynamo" in sys.modules
    eager = torch.compiler.set_stance("force_eager") if compiled else contextlib.nullcontext()
    try:
        for name in before:
            setattr(settings, name, False)
        with eager, parametrize.cached():
            yield
    finally:
        for name, value in before.items():
            setattr(settings, name, value)


def _check_call(name: str, linear: LinearMap, x: Tensor, output: Any, before: BoundCheck | None) -> BoundCheck:
    """The row of a map after one more call."""
    if before is None:
        lower, upper = spectral_norm_bounds(_matrix(linear))
        if upper > 1e300:
            raise ValueError(f"its weight has a norm of {upper:.3g}, too near the end of float64 for a check")
        width = upper / lower - 1 if lower > 0 else (math.inf if upper > 0 else 0.0)
        before = BoundCheck(name, _kind(linear), lower, upper, width, 0.0, 0.0, True, 0)
    x_norm, wx_norm, allowance = _norms_of_call(linear, x, output)
    holds = bool((wx_norm <= before.upper * x_norm + allowance).all())
    gain = (wx_norm / x_norm)[x_norm > 0]
    largest = max(before.largest_gain, gain.max().item() if len(gain) else 0.0)
    return before._replace(
        largest_gain=largest,
        tightness=largest / before.upper if before.upper > 0 else 0.0,
        holds=holds and before.holds,
        tokens=before.tokens + len(x_norm),
    )


def _matrix(linear: LinearMap) -> Tensor:
    """The matrix of a map; a copy where the memory format (channels_last) allows no view."""
    return linear.matrix(linear.weight.contiguous())


def _kind(linear: LinearMap) -> str:
    if isinstance(linear.module, CONVOLUTIONS):
        return "patch"
    return "projection" if isinstance(linear.module, nn.MultiheadAttention) else "linear"


def _norms_of_call(linear: LinearMap, x: Tensor, output: Any) -> tuple[Tensor, Tensor, Tensor]:
    """``||x||``, ``||y - b||`` and how far rounding can lift the latter, in float64, one entry a token."""
    kind, bias, module = _kind(linear), None, cast(Any, linear.module)
    y = F.linear(x, _matrix(linear)) if kind == "projection" else output
    if not isinstance(y, Tensor):
        raise ValueError(f"its output is a {type(y).__name__}, and a tensor is needed")
    vectors = y
    if kind == "patch":
        x_norm, near, far = _patch_norms(linear, x)
        channels = slice(*linear.rows) if linear.rows else slice(None)
        vectors = y.movedim(-1 - len(module.kernel_size), -1)[..., channels]
        bias = module.bias[channels] if module.bias is not None else None
    else:
        x_norm = near = far = _norms(in_float64(x.reshape(-1, x.shape[-1])))
        bias = module.bias if kind == "linear" else None
    vectors = in_float64(vectors.reshape(-1, vectors.shape[-1]))
    if vectors.shape != (len(x_norm), linear.shape[0]):
        raise ValueError(
            f"its output has shape {tuple(y.shape)}, and a vector of {linear.shape[0]} entries is needed for each of "
            f"{len(x_norm)} inputs"
        )
    if bias is not None:
        bias = in_float64(bias)
        vectors = vectors - bias
    wx_norm = _norms(vectors)
    return x_norm, wx_norm, _allowance(linear, x, y, bias, wx_norm, near, far)


def _norms(vectors: Tensor) -> Tensor:
    """The norm of every row, scaled so that no square overflows."""
    exponent = _checked_exponent(vectors)
    return times_power_of_two(torch.linalg.vector_norm(times_power_of_two(vectors, -exponent), dim=1), exponent).cpu()


def _checked_exponent(tensor: Tensor) -> int:
    if not torch.isfinite(tensor).all():
        raise ValueError("input or output holds NaN or infinity, nothing can be checked")
    return (_exponent(tensor) if tensor.numel() else None) or 0


def _patch_norms(linear: LinearMap, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The norm of every patch, of the largest patch of its sample, and of the whole sample."""
    conv = cast(nn.Conv2d, linear.module)  # or of one or three dimensions
    channels = conv.in_channels // conv.groups
    group = linear.rows[0] // linear.shape[0] if linear.rows else 0
    x = in_float64(x if x.ndim == len(conv.kernel_size) + 2 else x[None]).narrow(1, group * channels, channels)
    exponent = _checked_exponent(x)
    energy = times_power_of_two(x, -exponent).square().sum(1, keepdim=True)
    mode = "constant" if conv.padding_mode == "zeros" else conv.padding_mode
    energy = F.pad(energy, conv._reversed_padding_repeated_twice, mode=mode)
    sample = energy.flatten(1).sum(1, keepdim=True)
    for axis, (size, stride, dilation) in enumerate(
        zip(conv.kernel_size, conv.stride, conv.dilation, strict=True), start=2
    ):
        # A view of the windows along one axis at a time: sums of positive numbers, with no convolution's rounding.
        energy = energy.unfold(axis, dilation * (size - 1) + 1, stride)[..., ::dilation].sum(-1)
    patch = energy.flatten(1)
    norms = (patch, patch.amax(1, keepdim=True).expand_as(patch), sample.expand_as(patch))
    one, largest, all_of_it = (times_power_of_two(square.sqrt(), exponent).flatten().cpu() for square in norms)
    return one, largest, all_of_it


def _allowance(
    linear: LinearMap, x: Tensor, y: Tensor, bias: Tensor | None, wx_norm: Tensor, near: Tensor, far: Tensor
) -> Tensor:
    """How far rounding can lift ``||y - b||``, norms of this module included.

    Where a kernel computes many positions of a convolution at once (Winograd, FFT), the rounding of one depends on the
    inputs of the others: ``near`` is then the largest patch, and ``far`` the whole sample.
    """
    convolution = isinstance(linear.module, CONVOLUTIONS)
    m, n = linear.shape
    coarsest = max({x.dtype, y.dtype, linear.weight.dtype}, key=lambda dtype: torch.finfo(dtype).eps)
    unit, tiny = torch.finfo(coarsest).eps / 2, torch.finfo(coarsest).smallest_normal
    if coarsest == torch.float16:
        tiny *= torch.finfo(coarsest).eps  # only float16 has subnormal numbers on every processor
    if coarsest == torch.float32:
        unit = _float32_factors(y.device.type, convolution)
    wide = torch.float64 if coarsest == torch.float64 else torch.float32
    # Tensor cores align their addends to the largest and cut off: four times the unit roundoff of float32.
    sums = (m + n + (100 if convolution else 2)) * (2.0**-52 if wide == torch.float64 else 2.0**-22)
    b = 0.0 if bias is None else torch.linalg.vector_norm(bias).item()
    frobenius = _norms(in_float64(_matrix(linear).reshape(1, -1))).item()
    # Both factors of a product are rounded; among subnormal numbers that error is absolute.
    factors = (6 * unit * frobenius + 4 * math.sqrt(m * n) * tiny) * near
    factors += 2 * tiny * (math.sqrt(n) * frobenius + math.sqrt(m))
    # So are the bias and the output, and the sums in between.
    output = 4 * unit * (wx_norm + 2 * b)
    addition = sums * (frobenius * far + b + math.sqrt(m) * torch.finfo(wide).smallest_normal / torch.finfo(wide).eps)
    # Squares below 2**-1022 of the largest underflow: the norm of a small input may be lost beside a large one.
    lost = 2.0**-480 * frobenius * far.max() if len(far) else 0.0
    return factors + output + addition + lost


def _float32_factors(device: str, convolution: bool) -> float:
    """The unit roundoff of float32 factors in a product: that of TF32 or bfloat16 where a setting allows it."""
    backends: Any = torch.backends  # whose switches came with torch 2.9
    try:
        if device == "cpu":
            settings = [backends.mkldnn.matmul.fp32_precision, backends.mkldnn.conv.fp32_precision]
        elif device == "cuda":
            settings = [backends.cuda.matmul.fp32_precision, backends.cudnn.conv.fp32_precision]
        else:
            return BFLOAT16_FACTORS
    except AttributeError:  # torch before 2.9
        settings = [torch.get_float32_matmul_precision(), "tf32" if device == "cuda" else "ieee"]
    # A convolution may also be computed as a matrix product.
    return max(FLOAT32_FACTORS.get(setting, BFLOAT16_FACTORS) for setting in settings[: 2 if convolution else 1])
