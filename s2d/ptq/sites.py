"""Where a quantized model quantizes: Linear layers, convolutions, and the two products of every attention.

A site is a module of the quantized copy. It stands where the original layer stood (a Linear layer stays a Linear layer,
an attention keeps its class), so attributes, state-dict keys and every way of calling the model stay as they were.
"""

from __future__ import annotations

import contextlib
import copyreg
import math
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import cache
from types import MethodType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from s2d.ptq.copies import copied_function
from s2d.ptq.quantizers import AffineQuantizer, Quantizer

MODES = ("float", "observe", "quantized", "train")
CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


class Site(nn.Module):
    """What all sites have in common.

    Attributes:
        name: where the site is in the model.
        mode: ``"float"``: quantizers off. ``"observe"``: floating point, and ``visit`` sees every call.
            ``"quantized"``: inputs are quantized; the weight already is. ``"train"``: the weight is quantized at every
            call as well, on a grid fitted to it anew, with the straight-through estimator (QAT).
        visit: ``visit(site, inputs, output) -> output``, called in observe mode. ``inputs`` is ``(x,)`` for a layer,
            ``(left, right)`` for a product.
    """

    name: str
    mode: str
    visit: Callable | None

    def _begin(self, name: str) -> None:
        self.name, self.mode, self.visit = name, "float", None

    def quantizers(self) -> dict[str, Quantizer]:
        """The quantizers in use, by the name of their attribute."""
        return {name: module for name, module in self._modules.items() if isinstance(module, Quantizer)}

    def input_quantizers(self) -> tuple[Quantizer | None, ...]:
        """One entry for each of the inputs that ``visit`` sees."""
        raise NotImplementedError

    def _observed(self, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        return output if self.visit is None else self.visit(self, inputs, output)


class _WeightedSite(Site):
    """A site with a weight: the layer's own parameters, one quantizer for the weight and one for the input.

    Attributes:
        weight_quantizer, input_quantizer: None for floating point.
        input_transform: applied to every input first (a rotation, say); None for none. The weight is for its outputs.
        after: ``"gelu"`` or ``"norm"`` where the input comes straight from one, else None.
        norm: name of the norm whose output goes to Linear layers only, this one among them, else None.
        parts: number of equal row blocks of the weight with a function of their own (3 for a packed q, k, v).
    """

    def _begin_weighted(self, layer: nn.Module, name: str, after: str | None, norm: str | None, parts: int) -> None:
        self._begin(name)
        self.after, self.norm, self.parts = after, norm, parts
        self.weight_quantizer = self.input_quantizer = self.input_transform = None
        self._own(layer)

    def _own(self, layer: nn.Module) -> None:
        # Parameters of its own, so that quantizing this layer leaves one that shares its weight (an embedding) alone.
        self.weight = nn.Parameter(layer.weight.detach().clone(), requires_grad=layer.weight.requires_grad)
        self.bias = None
        if layer.bias is not None:
            self.bias = nn.Parameter(layer.bias.detach().clone(), requires_grad=layer.bias.requires_grad)

    def forward(self, x: Tensor, extra_bias: Tensor | None = None) -> Tensor:
        """The layer; a caller that holds the bias itself (BEiT's attention) gives it as ``extra_bias``."""
        if self.input_transform is not None:
            with _Interception.paused():  # its products are none of the attention's around it
                x = self.input_transform(x)
        bias = self.bias if extra_bias is None else extra_bias if self.bias is None else self.bias + extra_bias
        if self.mode == "observe":
            return self._observed((x,), self.product(x, self.weight, bias))
        weight = self.weight
        if self.mode in ("quantized", "train") and self.input_quantizer is not None:
            x = self.input_quantizer(x)
        if self.mode == "train" and self.weight_quantizer is not None:
            self.weight_quantizer.observe(weight.detach())  # the grid follows the weight
            self.weight_quantizer.freeze()
            weight = self.weight_quantizer(weight)
        return self.product(x, weight, bias)

    def product(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """The layer's own operation with another weight and bias."""
        raise NotImplementedError

    def input_quantizers(self) -> tuple[Quantizer | None, ...]:
        return (self.input_quantizer,)

    @torch.no_grad()
    def freeze_weight(self) -> None:
        """Replace the weight by its quantized values, after which quantizing it again changes nothing."""
        if self.weight_quantizer is not None:
            self.weight.copy_(self.weight_quantizer(self.weight))

    def weight_codes(self) -> Tensor:
        """The integer codes of the weight; raises ValueError when the weight is in floating point."""
        if self.weight_quantizer is None:
            raise ValueError(f"layer {self.name}: the weight is in floating point, it has no codes")
        return self.weight_quantizer.codes(self.weight.detach())


class QuantizedLinear(_WeightedSite, nn.Linear):
    """A Linear layer with quantizers; see :class:`_WeightedSite` for its attributes.

    Paper: none.
    """

    def __init__(
        self, linear: nn.Module, name: str = "", *, after: str | None = None, norm: str | None = None, parts: int = 1
    ) -> None:
        nn.Linear.__init__(self, linear.weight.shape[1], linear.weight.shape[0], bias=False, device="meta")
        self._begin_weighted(linear, name, after, norm, parts)

    def product(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return F.linear(x, weight, bias)


class _QuantizedConvolution(_WeightedSite):
    def __init__(
        self, layer: nn.Module, name: str = "", *, after: str | None = None, norm: str | None = None, parts: int = 1
    ) -> None:
        names = ("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups")
        options = {key: getattr(layer, key) for key in (*names, "padding_mode")}
        super(Site, self).__init__(**options, bias=False, device="meta")
        self._begin_weighted(layer, name, after, norm, parts)

    def product(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return self._conv_forward(x, weight, bias)


class QuantizedConv1d(_QuantizedConvolution, nn.Conv1d):
    """A convolution with quantizers; by default its input (the image) stays in floating point."""


class QuantizedConv2d(_QuantizedConvolution, nn.Conv2d):
    """A convolution with quantizers; by default its input (the image) stays in floating point."""


class QuantizedConv3d(_QuantizedConvolution, nn.Conv3d):
    """A convolution with quantizers; by default its input (the image) stays in floating point."""


class QuantizedProduct(Site):
    """A product of two activations, each behind a quantizer of its own.

    Attributes:
        kind: ``"qk"`` (queries times keys) or ``"pv"`` (probabilities times values).
        left_quantizer, right_quantizer: None for floating point.
        left_transform, right_transform: applied to every factor first (rotations that cancel); None for none.
    """

    def __init__(self, name: str, kind: str) -> None:
        super().__init__()
        self._begin(name)
        self.kind = kind
        self.left_quantizer = self.right_quantizer = None
        self.left_transform = self.right_transform = None

    def forward(self, left: Tensor, right: Tensor, product: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        left = left if self.left_transform is None else self.left_transform(left)
        right = right if self.right_transform is None else self.right_transform(right)
        if self.mode == "observe":
            return self._observed((left, right), product(left, right))
        if self.mode in ("quantized", "train"):
            left = _quantized(self.left_quantizer, left, packed=True)
            right = _quantized(self.right_quantizer, right, packed=False)
        return product(left, right)

    def input_quantizers(self) -> tuple[Quantizer | None, ...]:
        return self.left_quantizer, self.right_quantizer

    def quantizes(self) -> bool:
        """Whether a call would differ from the plain product."""
        transformed = self.left_transform is not None or self.right_transform is not None
        used = self.left_quantizer is not None or self.right_quantizer is not None
        return transformed or self.mode == "observe" or (self.mode != "float" and used)


def _quantized(quantizer: Quantizer | None, x: Tensor, packed: bool) -> Tensor:
    if isinstance(quantizer, AffineQuantizer):
        quantizer = quantizer.for_heads(x, packed=packed)
    return x if quantizer is None else quantizer(x)


# --- attention -------------------------------------------------------------------------------------------------------

# Where the two factors are among the positional arguments.
_FACTORS = {
    torch.matmul: (0, 1),
    Tensor.matmul: (0, 1),
    Tensor.__matmul__: (0, 1),
    torch.bmm: (0, 1),
    Tensor.bmm: (0, 1),
}
_FACTORS |= {torch.baddbmm: (1, 2), Tensor.baddbmm: (1, 2), torch.mm: (0, 1), Tensor.mm: (0, 1), torch.addmm: (1, 2)}
_ATTENTION = F.scaled_dot_product_attention
_FOLLOWED = {*_FACTORS, torch.einsum, F.linear, _ATTENTION}
_ATTENTION_ARGUMENTS = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")


# What they are called where they are given by name.
_NAMES = {torch.matmul: ("input", "other"), Tensor.matmul: ("self", "other"), torch.bmm: ("input", "mat2")}
_NAMES |= {Tensor.bmm: ("self", "mat2"), torch.mm: ("input", "mat2"), Tensor.mm: ("self", "mat2")}
_NAMES |= {torch.baddbmm: ("input", "batch1", "batch2"), Tensor.baddbmm: ("self", "batch1", "batch2")}
_NAMES |= {torch.addmm: ("input", "mat1", "mat2")}


def positional(function: Callable, args: tuple, kwargs: dict | None) -> tuple[tuple, dict]:
    """The arguments with the factors of a product in their places, however the caller named them or listed them."""
    args, kwargs = list(args), dict(kwargs or {})
    if function is torch.einsum and len(args) == 2 and isinstance(args[1], (list, tuple)):
        args = [args[0], *args[1]]
    for name in _NAMES.get(function, ())[len(args) :]:
        if name not in kwargs:
            break
        args.append(kwargs.pop(name))
    return tuple(args), kwargs


def factors(function: Callable, args: tuple) -> tuple[int, int] | None:
    """Positions of the two factors of a product of activations among its arguments; None for any other function.

    A product over a single entry (an outer product, as in rotary embeddings) is none: nothing is summed.
    """
    places = _FACTORS.get(function)
    if function is torch.einsum and len(args) == 3:
        places = (1, 2)
    if places is None or len(args) <= max(places) or not all(isinstance(args[place], Tensor) for place in places):
        return None
    left, right = (args[place] for place in places)
    if isinstance(left, nn.Parameter) or isinstance(right, nn.Parameter):
        return None
    return None if function is not torch.einsum and left.shape[-1] == 1 else places


class _Running(threading.local):
    """The interceptions of the calls that this thread is in, the innermost last; torch's modes are a thread's too."""

    def __init__(self) -> None:
        self.stack: list[_Interception | None] = []


_RUNNING = _Running()


def _step_out(module: nn.Module, args: tuple) -> None:
    """Hook before a module inside an attention: its products are its own, none of the attention's."""
    if _RUNNING.stack and _RUNNING.stack[-1] is not None:
        _RUNNING.stack[-1].outside += 1


def _step_back(module: nn.Module, args: tuple, output: Any) -> None:
    """Hook after it, also after an exception."""
    if _RUNNING.stack and _RUNNING.stack[-1] is not None:
        _RUNNING.stack[-1].outside -= 1


class _Interception(TorchFunctionMode):
    """Sends the products of one call of an attention through its sites, in the order in which they come."""

    def __init__(self, attention: nn.Module, plan: list[str | None]) -> None:
        super().__init__()
        self.attention, self.plan, self.position = attention, plan, 0
        self.outside = 0  # how many modules inside the attention are being called

    @staticmethod
    @contextmanager
    def paused() -> Iterator[None]:
        _RUNNING.stack.append(None)
        try:
            yield
        finally:
            _RUNNING.stack.pop()

    def __enter__(self):
        _RUNNING.stack.append(self)
        return super().__enter__()

    def __exit__(self, *exception):
        _RUNNING.stack.pop()
        return super().__exit__(*exception)

    def _next(self) -> QuantizedProduct | None:
        if not self.plan:  # only its layers are followed
            return None
        if self.position >= len(self.plan):
            raise ValueError(
                f"{type(self.attention).__name__} makes more products than when it was prepared ({len(self.plan)}): "
                "prepare the model with a batch that takes the same path"
            )
        name = self.plan[self.position]
        self.position += 1
        return None if name is None else getattr(self.attention, name)

    def _linear(self, args: tuple, kwargs: dict) -> Tensor:
        """Calls the layer whose weight the attention uses without calling it."""
        named = dict(zip(("input", "weight", "bias"), args, strict=False)) | kwargs
        for child in self.attention.__dict__["direct_layers"]:
            layer = getattr(self.attention, child)
            if layer.weight is named["weight"]:
                bias = named.get("bias")
                return layer(named["input"], None if bias is layer.bias else bias)
        return F.linear(*args, **kwargs)

    def __torch_function__(self, function, types, args=(), kwargs=None):
        # An attention inside this one has its own; and any other module's products are not this one's.
        if function not in _FOLLOWED or _RUNNING.stack[-1] is not self or self.outside:
            return function(*args, **(kwargs or {}))
        args, kwargs = positional(function, args, kwargs)
        if function is F.linear:
            return self._linear(args, kwargs)
        if function is _ATTENTION:
            first, second = self._next(), self._next()
            if first is not None and first.quantizes() or second is not None and second.quantizes():
                named = dict(zip(_ATTENTION_ARGUMENTS, args, strict=False)) | kwargs
                return attention_by_products(first, second, **named)
            return function(*args, **kwargs)
        places = factors(function, args)
        if places is None:
            return function(*args, **kwargs)
        site = self._next()
        if site is None or not site.quantizes():
            return function(*args, **kwargs)

        def product(left: Tensor, right: Tensor) -> Tensor:
            new = list(args)
            new[places[0]], new[places[1]] = left, right
            return function(*new, **kwargs)

        return site(args[places[0]], args[places[1]], product)


def attention_by_products(
    scores: QuantizedProduct,
    mix: QuantizedProduct,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """``F.scaled_dot_product_attention`` with its two products sent through their sites."""
    if enable_gqa:
        groups = query.shape[-3] // key.shape[-3]
        key, value = key.repeat_interleave(groups, -3), value.repeat_interleave(groups, -3)
    scale = 1 / math.sqrt(query.shape[-1]) if scale is None else scale
    # Scaled before the product, as torch does it: half precision would overflow.
    logits = scores(query * scale, key.transpose(-2, -1), torch.matmul)
    if is_causal:
        allowed = torch.ones(logits.shape[-2:], dtype=torch.bool, device=logits.device).tril()
        logits = logits.masked_fill(~allowed, -math.inf)
    if attn_mask is not None:
        hidden = attn_mask.dtype == torch.bool
        logits = logits.masked_fill(~attn_mask, -math.inf) if hidden else logits + attn_mask
    probabilities = logits.softmax(-1)
    if attn_mask is not None:
        probabilities = probabilities.nan_to_num(0.0)  # a row that may look at nothing, as torch does it
    return mix(F.dropout(probabilities, dropout_p) if dropout_p else probabilities, value, torch.matmul)


class _Attention:
    """Mixed into the class of an attention module: its forward runs with its products intercepted."""

    def forward(self, *args, **kwargs):
        with _Interception(self, self.__dict__["product_plan"]):
            own = self.__dict__["own_forward"]
            return super().forward(*args, **kwargs) if own is None else own(self, *args, **kwargs)

    def __reduce_ex__(self, protocol):
        # The class was made at run time, so pickle and copy are told what it was made from.
        make, args, *rest = super().__reduce_ex__(protocol)
        if make is copyreg.__newobj__ and args[0] is type(self):
            make, args = _new_attention, (type(self).__mro__[2], *args[1:])
        return make, args, *rest


@cache
def _attention_class(original: type[nn.Module]) -> type[nn.Module]:
    return type(f"Quantized{original.__name__}", (_Attention, original), {"__module__": __name__})


def _new_attention(original: type[nn.Module], *args: Any) -> nn.Module:
    """An attention still without its state, when it is read from a pickle or copied."""
    made = _attention_class(original)
    return made.__new__(made, *args)


class _Bound:
    """An instance's forward that is no plain method, called as one."""

    def __init__(self, function: Callable) -> None:
        self.function = function

    def __call__(self, module: nn.Module, *args, **kwargs):
        return self.function(*args, **kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> _Bound:
        return _Bound(copied_function(self.function, memo))


def _own_forward(attention: nn.Module) -> Callable | None:
    """Takes away a forward that was set on the instance, as a function of the module and the inputs."""
    forward = attention.__dict__.pop("forward", None)
    if isinstance(forward, MethodType) and forward.__self__ is attention:
        return forward.__func__
    return None if forward is None else _Bound(forward)


def attach_products(
    attention: nn.Module, plan: list[str | None], name: str = "", direct_layers: Iterable[str] = ()
) -> None:
    """Give an attention module its product sites, in place.

    Args:
        attention: the module whose forward makes the products; one set on the instance is kept.
        plan: in the order of the products of one call, the attribute that holds each site (``"qk_product"``,
            ``"pv_product"``), or None for a product that stays in floating point. Products of modules inside the
            attention (relative positions, say) do not count.
        name: of the attention in the model.
        direct_layers: its Linear layers whose weight its forward uses without calling them.
    """
    for attribute in dict.fromkeys(filter(None, plan)):
        site = QuantizedProduct(f"{name}.{attribute}".lstrip("."), attribute[:2])
        attention.add_module(attribute, site)
    attention.__dict__["product_plan"], attention.__dict__["direct_layers"] = list(plan), list(direct_layers)
    attention.__dict__["own_forward"] = _own_forward(attention)
    attention.__class__ = _attention_class(type(attention))
    for module in attention.modules():
        ours = isinstance(module, (Site, _Attention, Quantizer))
        # Torch's own modules make no product that is followed, unless someone changed them.
        plain = type(module).__module__.startswith("torch.nn.") and "forward" not in module.__dict__
        plain |= isinstance(module, torch.jit.ScriptModule)  # in which nothing is followed
        if not ours and not plain and _step_out not in module._forward_pre_hooks.values():
            module.register_forward_pre_hook(_step_out, prepend=True)
            module.register_forward_hook(_step_back, always_call=True)


# --- all sites of a model --------------------------------------------------------------------------------------------


def sites(model: nn.Module) -> dict[str, Site]:
    """The sites of a prepared model by name, in the order in which the model holds them."""
    return {module.name: module for module in model.modules() if isinstance(module, Site)}


def quantized_layers(model: nn.Module) -> dict[str, _WeightedSite]:
    """The sites with a weight, by name."""
    return {name: site for name, site in sites(model).items() if isinstance(site, _WeightedSite)}


def products(model: nn.Module) -> dict[str, QuantizedProduct]:
    """The products of the attentions, by name."""
    return {name: site for name, site in sites(model).items() if isinstance(site, QuantizedProduct)}


def set_mode(model: nn.Module, mode: str) -> None:
    """Put every site into one mode for good.

    Raises:
        ValueError: for an unknown mode.
    """
    if mode not in MODES:
        raise ValueError(f"mode is {mode!r}: choose one of {', '.join(MODES)}")
    for site in sites(model).values():
        site.mode = mode


@contextmanager
def mode(model: nn.Module, name: str, only: Iterable[Site] | None = None, visit: Callable | None = None) -> Iterator:
    """Put sites (all, or only some) into one mode while the context is open, the others into floating point."""
    if name not in MODES:
        raise ValueError(f"mode is {name!r}: choose one of {', '.join(MODES)}")
    everything = list(sites(model).values())
    chosen = {id(site) for site in (everything if only is None else only)}
    with contextlib.ExitStack() as stack:
        for site in everything:
            stack.callback(setattr, site, "mode", site.mode)
            stack.callback(setattr, site, "visit", site.visit)
            site.mode, site.visit = (name, visit) if id(site) in chosen else ("float", None)
        yield
