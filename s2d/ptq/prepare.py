"""The quantized copy of a model: same function while its quantizers are off, which is checked when it is built."""

from __future__ import annotations

import fnmatch
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.prune import BasePruningMethod
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from s2d.layers import is_conv1d_of_gpt2
from s2d.ptq.attention import SplitAttention
from s2d.ptq.calibrate import first_items
from s2d.ptq.copies import independent_copy
from s2d.ptq.judge import held_back
from s2d.ptq.sites import (
    QuantizedConv1d,
    QuantizedConv2d,
    QuantizedConv3d,
    QuantizedLinear,
    Site,
    attach_products,
    sites,
)
from s2d.ptq.trace import Trace, call, is_layer, regular_attention, tensors_of, trace

_SITES = {nn.Conv1d: QuantizedConv1d, nn.Conv2d: QuantizedConv2d, nn.Conv3d: QuantizedConv3d}
# Packed projections, by the names that timm, open_clip and transformers give them; others count as one part.
_PACKED = {"qkv": 3, "in_proj": 3, "qkv_proj": 3, "c_attn": 3, "query_key_value": 3, "kv": 2, "kv_proj": 2}
_HOOKS = (
    "_forward_hooks", "_forward_hooks_with_kwargs", "_forward_hooks_always_called", "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
)  # fmt: skip
# Hooks that compute a weight before each call (pruning, the older norms of weights): the site has that weight itself.
_WEIGHT_HOOKS = (BasePruningMethod, SpectralNorm, WeightNorm)
# Names of one attention's products: a second pair (self- and cross-attention in one module) is numbered.
_PRODUCT = "{kind}_product{number}"


@dataclass
class Layout:
    """Where the sites of a model are: all that is needed to build the copy again, as plain data.

    Attributes:
        layers: Linear layer or convolution to what is known of it (``after``, ``norm``, ``parts``).
        attentions: attention to the attribute names of its products, in the order of one call; None stays as it is.
        direct: module to its Linear layers whose weight it uses without calling them.
        split: ``nn.MultiheadAttention`` to how it is called.
        left_out: pieces that stay in floating point, one line each.
    """

    layers: dict[str, dict] = field(default_factory=dict)
    attentions: dict[str, list[str | None]] = field(default_factory=dict)
    direct: dict[str, list[str]] = field(default_factory=dict)
    split: dict[str, str] = field(default_factory=dict)
    left_out: list[str] = field(default_factory=list)

    def as_dict(self) -> dict:
        """JSON-able form."""
        return asdict(self)


def prepare(model: nn.Module, batches: Any, *, exclude: str | Sequence[str] = ()) -> nn.Module:
    """Copy a model and put a site at every Linear layer, convolution and attention product, all in floating point.

    Layers that share a weight each get their own. What the copy cannot reach (a bare parameter that is multiplied, a
    layer with a forward of its own) stays in floating point and is named in a warning and in :func:`coverage`.

    Args:
        model: any transformer; left untouched.
        batches: what the model is called with, or a list of such batches. The first two items show what the model is
            made of, and the copy is compared with the original on them; where they miss a layer (an expert), the rest
            is looked at as well.
        exclude: name patterns (``"head"``, ``"blocks.0.*"``) of layers and attentions to leave alone.

    Returns:
        The copy, in evaluation mode, of the same class.

    Raises:
        ValueError: if there is nothing to quantize, a pattern matches nothing, a layer is quantized already, the data
            misses a layer, or the copy does not give exactly the original's output.

    Example:
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.GELU(), nn.Linear(8, 2)).eval()
        >>> list(sites(prepare(model, torch.randn(3, 4))))
        ['0', '2']

    Paper: none.
    """
    batches = batches if isinstance(batches, list) else [batches]
    exclude = [exclude] if isinstance(exclude, str) else exclude
    quantized = nn.Module()
    empty = next((name for name, tensor in model.named_parameters() if tensor.is_meta), None)
    if empty is not None:
        raise ValueError(f"{empty} is on the meta device, without values: load the model's weights first")
    quantized.model = independent_copy(model).eval()  # in a box, so that the model itself may be a layer
    inner = quantized.model
    if any(isinstance(module, Site) for module in inner.modules()):
        raise ValueError("the model is quantized already: quantize the original model instead")
    sample = first_items(batches)
    found, expected = _trace(inner, sample, batches)
    layout = _layout(inner, found, exclude)
    if not layout.layers and not layout.split:
        reason = "; ".join(layout.left_out) or "it has no Linear layer"
        raise ValueError(f"{type(model).__name__} has nothing to quantize: {reason}")
    if layout.split:
        for name, kind in layout.split.items():
            _replace(quantized, name, SplitAttention(inner.get_submodule(name), kind))
        inner = quantized.model
        found, outputs = _trace(inner, sample, batches)
        _compare(expected, outputs, type(model).__name__)
        layout = _layout(inner, found, exclude, split=layout.split)
    result = build(inner, layout, split=False)
    with torch.no_grad(), regular_attention():
        _compare(expected, tensors_of(call(result, sample)), type(model).__name__)
    if layout.left_out:
        warnings.warn("left in floating point: " + "; ".join(layout.left_out), stacklevel=3)
    values = [tensor for tensor in expected if tensor.is_floating_point()]
    if values and not any(tensor.any() for tensor in values):
        warnings.warn(
            f"{type(model).__name__} gives nothing but zeros (timm starts some heads at zero): an error relative to "
            "its output has no meaning, load or initialise its last layer",
            stacklevel=3,
        )
    return result


def device_of(model: nn.Module) -> torch.device | None:
    """Where a model's first parameter is; None for a model without parameters."""
    return next((parameter.device for parameter in model.parameters()), None)


def _trace(model: nn.Module, sample, batches: list) -> tuple[Trace, list[Tensor]]:
    found, output = trace(model, [sample])
    if found.uncalled:
        found, output = trace(model, [sample, *batches])
    return found, output


def _compare(expected: list[Tensor], found: list[Tensor], name: str) -> None:
    same = len(expected) == len(found) > 0 and all(
        torch.allclose(a, b, rtol=0, atol=0, equal_nan=True) for a, b in zip(expected, found, strict=True)
    )
    if not same:
        raise ValueError(
            f"the quantized copy of {name} does not reproduce the original with its quantizers off: the model uses a "
            "layer in some way that could not be followed, is not deterministic in evaluation mode, or gives no tensor"
        )


def _layout(model: nn.Module, found: Trace, exclude: Sequence[str], split: dict[str, str] | None = None) -> Layout:
    matched = {pattern: False for pattern in exclude}

    def excluded(name: str) -> bool:
        hits = [pattern for pattern in exclude if fnmatch.fnmatchcase(name, pattern) or name.startswith(f"{pattern}.")]
        matched.update(dict.fromkeys(hits, True))
        return bool(hits)

    layout = Layout(split=split or {name: kind for name, kind in found.kinds.items() if not excluded(name)})
    layout.left_out += found.left_out
    for name, problem in found.problems.items():
        if not excluded(name):
            raise ValueError(f"{name or 'the model'} {problem}: leave it in floating point with exclude=")
    layout.left_out += [f"{name} (excluded)" for name in found.kinds if excluded(name)]
    kernels = getattr(getattr(model, "config", None), "_attn_implementation", None)
    if kernels not in (None, "eager", "sdpa"):
        layout.left_out.append(f"attention products ({kernels}: load the model with attn_implementation='sdpa')")
    for name in found.layers:
        if excluded(name):
            layout.left_out.append(f"{name} (excluded)")
            continue
        module = model.get_submodule(name)
        # All layers that read one norm must be sites, or the norm cannot be changed for them.
        siblings = [other for other, norm in found.norm.items() if norm == found.norm.get(name)]
        norm = found.norm.get(name) if not any(excluded(other) for other in siblings) else None
        if norm is not None and _near(norm, found.uncalled):
            norm = None  # a layer that was never called may read it too
        linear = not isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d))
        parts = _PACKED.get(name.rpartition(".")[2], 1) if linear else 1
        parts = parts if _rows(module) % parts == 0 else 1
        layout.layers[name] = {"after": found.after.get(name), "norm": norm if linear else None, "parts": parts}
    for name, plan in found.plans.items():
        if excluded(name):
            layout.left_out.append(f"the products of {name} (excluded)")
            continue
        counts = {"qk": 0, "pv": 0}
        attributes: list[str | None] = []
        for kind in plan:
            if kind is None:
                attributes.append(None)
                continue
            counts[kind] += 1
            attributes.append(_PRODUCT.format(kind=kind, number=counts[kind] if counts[kind] > 1 else ""))
        layout.attentions[name] = attributes
    for name, children in found.direct.items():
        kept = [child for child in children if f"{name}.{child}".lstrip(".") in layout.layers]
        if kept:
            layout.direct[name] = kept
    layout.left_out += [f"{name} (excluded)" for name in found.uncalled if excluded(name)]
    missed = [name for name in found.uncalled if not excluded(name)]
    unmatched = [pattern for pattern, hit in matched.items() if not hit]
    if unmatched:
        raise ValueError(
            f"exclude={unmatched[0]!r} matches no layer or attention: see the names in model.named_modules()"
        )
    if missed:
        raise ValueError(
            f"the calibration data never reached {', '.join(missed[:5])}{' and others' if len(missed) > 5 else ''}: "
            "give data that does, or leave such layers in floating point with exclude="
        )
    return layout


def _near(norm: str, names: list[str]) -> bool:
    """Whether one of the named layers is in the module that holds a norm."""
    owner = norm.rpartition(".")[0]
    return any(not owner or name.startswith(f"{owner}.") for name in names)


def _rows(module: nn.Module) -> int:
    return module.weight.shape[1] if is_conv1d_of_gpt2(module) else module.weight.shape[0]


def build(model: nn.Module, layout: Layout, *, split: bool = True) -> nn.Module:
    """Put the sites of a layout into a model, in place; returns it (or the site, if the model is one layer).

    Args:
        model: the floating-point model, in evaluation mode.
        layout: from :func:`layout_of`, or read from a file.
        split: whether each ``nn.MultiheadAttention`` is still to be taken apart.

    Raises:
        ValueError: if the layout is of another model.

    Paper: none.
    """
    box = nn.Module()
    box.model = model
    try:
        for name, kind in layout.split.items() if split else ():
            _replace(box, name, SplitAttention(box.model.get_submodule(name), kind))
        made: dict[nn.Module, nn.Module] = {}
        for name, known in layout.layers.items():
            layer = box.model.get_submodule(name) if name else box.model
            if not is_layer(layer):
                raise AttributeError(f"{name} is no Linear layer or convolution")
            made[layer] = _site(layer, name, known)
        for name in (*layout.attentions, *layout.direct):
            box.model.get_submodule(name)
    except AttributeError as error:
        raise ValueError(f"the layout is of another model than {type(model).__name__}: {error}") from None
    for parent in list(box.modules()):  # a layer held under several names stays one layer
        for child, module in parent._modules.items():
            if module in made:
                setattr(parent, child, made[module])
    for name in dict.fromkeys((*layout.attentions, *layout.direct)):
        plan, direct = layout.attentions.get(name, []), layout.direct.get(name, [])
        attach_products(box.model.get_submodule(name), plan, name, direct)
    result = box.model.eval()
    result.__dict__["s2d_layout"] = layout
    return result


def _site(layer: nn.Module, name: str, known: dict) -> Site:
    kind = next((site for plain, site in _SITES.items() if isinstance(layer, plain)), QuantizedLinear)
    if is_conv1d_of_gpt2(layer):
        transposed = nn.Module()
        transposed.weight, transposed.bias = nn.Parameter(layer.weight.detach().t()), layer.bias
        transposed.weight.requires_grad_(layer.weight.requires_grad)
        layer = transposed
    site = kind(layer, name, **known)
    for hooks in _HOOKS:
        kept = {key: hook for key, hook in getattr(layer, hooks, {}).items() if not isinstance(hook, _WEIGHT_HOOKS)}
        getattr(site, hooks).update(kept)
    return site


def _replace(box: nn.Module, name: str, new: nn.Module) -> None:
    """Put a module in the place of the named one, under every name that it has."""
    old = box.get_submodule(f"model.{name}" if name else "model")
    for parent in list(box.modules()):
        for child, module in list(parent._modules.items()):
            if module is old:
                setattr(parent, child, new)


def layout_of(model: nn.Module) -> Layout:
    """The layout of a prepared model.

    Raises:
        ValueError: if it is not one.
    """
    layout = model.__dict__.get("s2d_layout")
    if layout is None:
        raise ValueError(f"{type(model).__name__} is not a prepared model: call s2d.ptq.quantize or prepare first")
    return layout


def coverage(model: nn.Module) -> list[dict]:
    """What is quantized and what is not, one row a piece.

    Returns:
        Rows with site, kind (``linear``, ``conv``, ``qk``, ``pv``, ``left out``), weight, input, other_input: the
        quantizers as text, ``"float"`` where there is none; and held_back: which share of what the method would have
        changed was left out, as it did not help on calibration items kept back for that (``"aqer 40 %"``).

    Example:
        >>> from s2d.ptq import quantize
        >>> quantized = quantize(nn.Linear(4, 2), w_bits=8, a_bits=4, calibration=torch.randn(8, 4))
        >>> coverage(quantized)[0]["kind"]
        'linear'

    Paper: none.
    """
    rows = []
    for name, site in sites(model).items():
        inputs = [str(quantizer) if quantizer is not None else "float" for quantizer in site.input_quantizers()]
        weighted = hasattr(site, "weight_quantizer")
        kind = site.kind if not weighted else "linear" if isinstance(site, nn.Linear) else "conv"
        weight = "" if not weighted else str(site.weight_quantizer or "float")
        other = inputs[1] if len(inputs) > 1 else ""
        row = {"site": name, "kind": kind, "weight": weight, "input": inputs[0], "other_input": other}
        rows.append(row | {"held_back": held_back(model, name)})
    empty = {"weight": "float", "input": "float", "other_input": "", "held_back": ""}
    return rows + [{"site": line, "kind": "left out"} | empty for line in layout_of(model).left_out]
