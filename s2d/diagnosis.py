"""Which layers of a network have outliers, where they sit, what makes them. Data streams through; nothing stays."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from s2d.bound import spectral_norm_bounds
from s2d.checks import check_count, check_number
from s2d.layers import CONVOLUTIONS, LinearMap, Selector, check_model, linear_maps
from s2d.outliers import ActivationStatistics, OutlierRows
from s2d.pcdr import activation_pcdr, layer_pcdr, outlier_rank
from s2d.spectral import in_float64, top_singular_triplets

OUTLIER_KURTOSIS = 20.0  # from where on we speak of outliers; ours: fresh networks have about 0


class LayerDiagnosis(NamedTuple):
    """What was seen of one linear layer. Activations are outputs without bias, as Theorem 1 and PCDR mean them.

    Attributes:
        layer: qualified name.
        shape: ``(out_features, in_features)``.
        tokens: how many inputs it saw, padding left out.
        max_abs: the largest absolute activation.
        ratio: the largest over the root mean square.
        excess_kurtosis: of all activations; 0 for a normal distribution.
        channel: the output that most of the largest activations belong to.
        channel_share: the part of them that does.
        position: the place in the sequence where most of them are; None for inputs without a sequence.
        position_share: the part of them that is there.
        sigma_1: guaranteed lower and upper end of the spectral norm.
        tightness: ``|W x| / (sigma_1 |x|)`` at the largest activation, at most 1 (Theorem 1).
        pcdr: PCDR_1 to PCDR_k_max, the mean over the largest activations.
        on_u1: the part of u_1's energy that lies on ``channel``.
        input_ratio: the largest absolute input over the inputs' root mean square: what a quantizer with one grid for
            all inputs has to span.
        rank: how many components S2D would let decay; None where it would leave the layer alone.
    """

    layer: str
    shape: tuple[int, int]
    tokens: int
    max_abs: float
    ratio: float
    excess_kurtosis: float
    channel: int
    channel_share: float
    position: int | None
    position_share: float
    sigma_1: tuple[float, float]
    tightness: float
    pcdr: tuple[float, ...]
    on_u1: float
    input_ratio: float
    rank: int | None

    @property
    def has_outliers(self) -> bool:
        """Whether the excess kurtosis is that of a layer with outliers: at least 20, a threshold of ours."""
        return self.excess_kurtosis >= OUTLIER_KURTOSIS

    @property
    def finding(self) -> str:
        """``"no outliers"``, ``"spectral"`` (S2D would act) or ``"not spectral"`` (outliers that it leaves alone)."""
        if not self.has_outliers:
            return "no outliers"
        return "not spectral" if self.rank is None else "spectral"


@torch.no_grad()
def diagnose(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    k_max: int = 3,
    tau: float = 0.95,
    outliers: int = 16,
    include: Selector | None = None,
    exclude: Selector = (),
    progress: Callable[[str], None] | None = None,
) -> list[LayerDiagnosis]:
    """Look at every linear layer of a model while data passes through it.

    What is kept of the data is a few moments and the largest activations with their inputs, so memory does not grow
    with it. Convolutions, and layers whose input arises inside another module, are left out.

    Args:
        model: in any mode; it is put in evaluation mode for the time being.
        batches: each what the model is called with: a tensor, a tuple of arguments, or a mapping of keywords. Where a
            mapping has an ``attention_mask`` ``(B, T)``, padding is left out of layers that see ``(B, T, width)``.
        k_max: PCDR_1 to PCDR_k_max are given (fewer for a layer with fewer singular values).
        tau: the threshold of PCDR from which on S2D would act.
        outliers: how many of the largest activations a layer keeps.
        include, exclude: see :func:`s2d.layers.linear_maps`.
        progress: called with a line of text for each batch and layer.

    Returns:
        One row a layer that took part, in the order of the model.

    Raises:
        ValueError: for options out of range, a model without linear layers, no data, data that the model cannot take,
            and activations that are not finite (naming the first layer that makes them).

    Example:
        >>> layer = nn.Linear(3, 2, bias=False)
        >>> _ = layer.weight.data.copy_(torch.tensor([[9.0, 0.0, 0.0], [0.0, 1.0, 0.0]]))
        >>> row, = diagnose(layer, [torch.eye(3), 2 * torch.eye(3)], k_max=1, outliers=1)
        >>> row.max_abs, row.channel, row.rank, round(row.tightness, 2), round(row.on_u1, 2)
        (18.0, 0, 1, 1.0, 1.0)

    Paper: Table 7's columns, Theorem 1, PCDR and Algorithm 1 line 9, on any network.
    """
    check_model(model)
    k_max = check_count("k_max", k_max, "give a positive integer")
    check_number("tau", tau, lambda value: 0 < value <= 1, "a dominance ratio lies in (0, 1]")
    found = linear_maps(model, include=include, exclude=exclude)
    maps = {n: m for n, m in found.items() if m.argument is not None and not isinstance(m.module, CONVOLUTIONS)}
    if not maps:
        raise ValueError("the model has no linear layer whose input can be seen: nothing to diagnose")
    say = progress or (lambda line: None)
    seen = {name: _Seen(name, linear, outliers) for name, linear in maps.items()}
    mask: list[Tensor | None] = [None]
    handles = [
        part.linear.module.register_forward_hook(
            lambda module, args, kwargs, output, part=part: part.see(args, kwargs, output, mask[0]), with_kwargs=True
        )
        for part in seen.values()
    ]
    modes = {module: module.training for module in model.modules()}
    count = 0
    try:
        model.eval()
        for count, batch in enumerate(batches, start=1):
            given = batch.get("attention_mask") if isinstance(batch, Mapping) else None
            mask[0] = given if isinstance(given, Tensor) and given.ndim == 2 else None
            _call(model, batch)
            say(f"batch {count}")
    finally:
        for handle in handles:
            handle.remove()
        for module, training in modes.items():
            module.training = training
    if not count:
        raise ValueError("there is no data: give at least one batch")
    rows = []
    for name, part in seen.items():
        if part.tokens:
            say(f"spectrum of {name}")
            rows.append(part.diagnosis(k_max, tau))
    if not rows:
        raise ValueError(f"none of the {len(seen)} linear layers took part in the forward pass: check include")
    return rows


def _call(model: nn.Module, batch: Any) -> None:
    args, kwargs = (batch, {}) if isinstance(batch, tuple) else ((batch,), {})
    if isinstance(batch, Mapping):
        args, kwargs = (), dict(batch)
    try:
        model(*args, **kwargs)
    except ValueError:
        raise
    except Exception as error:  # whatever a model does with what it cannot take
        reason = (str(error).splitlines() or ["no message"])[0]
        raise ValueError(
            f"the model cannot be called with this data ({type(error).__name__}: {reason}): give what its forward() "
            "takes, in its own dtype and on its own device"
        ) from error


class _Seen:
    """What passed through one layer."""

    def __init__(self, name: str, linear: LinearMap, outliers: int) -> None:
        self.name, self.linear, self.tokens = name, linear, 0
        self.statistics, self.square = ActivationStatistics(), 0.0
        self.largest_input = self.input_square = 0.0
        self.rows = OutlierRows(outliers)  # of inputs, each with its position behind it
        self.in_sequence = False

    def see(self, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any, mask: Tensor | None) -> None:
        x = self.linear.input(args, kwargs)
        y = self._without_bias(x, output)
        self.in_sequence = x.ndim >= 3
        place = torch.arange(x.shape[-2] if x.ndim >= 2 else 1, device=x.device)
        place = (place if self.in_sequence else torch.zeros_like(place)).expand(x.shape[:-1]).reshape(-1)
        if mask is not None and mask.shape == x.shape[:-1]:
            kept = mask.reshape(-1).bool().to(x.device)
            place = place[kept]
            x, y = (tensor.reshape(-1, tensor.shape[-1])[kept] for tensor in (x, y))
        x, y = (tensor.reshape(-1, tensor.shape[-1]).float() for tensor in (x, y))
        if not y.numel():
            return
        if not torch.isfinite(y).all():
            raise ValueError(
                f"layer {self.name} puts out NaN or infinity: check the data, or run the model in a wider dtype"
            )
        self.tokens += len(y)
        self.statistics.update(y)
        self.square += y.square().sum(dtype=torch.float64).item()
        self.input_square += x.square().sum(dtype=torch.float64).item()
        self.largest_input = max(self.largest_input, x.abs().max().item())
        size, flat = self._largest(y)
        token = flat // y.shape[1]
        if self.rows.magnitude is None:
            self.rows.allocate(x.shape[1] + 1, x.dtype, x.device)
        self.rows.merge(size, flat % y.shape[1], torch.cat([x[token], place[token, None].to(x)], 1))

    def _largest(self, y: Tensor) -> tuple[Tensor, Tensor]:
        # They lie in the tokens with the largest maxima, which are quicker to find.
        _, token = y.abs().amax(1).topk(min(self.rows.capacity, len(y)))
        size, flat = y[token].abs().flatten().topk(min(self.rows.capacity, len(token) * y.shape[1]))
        return size, token[flat // y.shape[1]] * y.shape[1] + flat % y.shape[1]

    def _without_bias(self, x: Tensor, output: Any) -> Tensor:
        linear, bias = self.linear, getattr(self.linear.module, "bias", None)
        whole = linear.rows is None and linear.index is None and isinstance(output, Tensor)
        if not whole or output.shape != (*x.shape[:-1], linear.shape[0]):
            return F.linear(x, linear.matrix().to(x.dtype))
        return output if bias is None else output - bias

    def diagnosis(self, k_max: int, tau: float) -> LayerDiagnosis:
        matrix, summary = self.linear.matrix(), self.statistics.summary()
        matrix = matrix.float() if matrix.dtype in (torch.float16, torch.bfloat16) else matrix
        kept, neuron = self.rows.x, self.rows.neuron
        assert kept is not None and neuron is not None  # of a layer that saw tokens
        x, place = kept[:, :-1], kept[:, -1].long()
        k_max = min(k_max, *matrix.shape)
        triplets = top_singular_triplets(matrix, k_max)
        pcdr = layer_pcdr(activation_pcdr(matrix, x, neuron, k_max=k_max, triplets=triplets))
        channel, position = int(neuron.mode().values), int(place.mode().values)
        low, high = spectral_norm_bounds(matrix)
        first = in_float64(x[0])
        reach = high * float(first.norm())
        rms, input_rms = (
            (square / (self.tokens * width)) ** 0.5
            for square, width in zip((self.square, self.input_square), matrix.shape, strict=True)
        )
        return LayerDiagnosis(
            layer=self.name,
            shape=self.linear.shape,
            tokens=self.tokens,
            max_abs=summary.max_abs,
            ratio=summary.max_abs / rms if rms > 0 else 1.0,
            excess_kurtosis=summary.excess_kurtosis,
            channel=channel,
            channel_share=float((neuron == channel).float().mean()),
            position=position if self.in_sequence else None,
            position_share=float((place == position).float().mean()),
            sigma_1=(low, high),
            tightness=float((in_float64(matrix) @ first).norm()) / reach if reach > 0 else 0.0,
            pcdr=tuple(pcdr.tolist()),
            on_u1=float(in_float64(triplets.u)[channel, 0].square()),
            input_ratio=self.largest_input / input_rms if input_rms > 0 else 1.0,
            rank=outlier_rank(pcdr, tau),
        )
