"""Post-training quantization of any transformer through one call, :func:`quantize`."""

from __future__ import annotations

import copy
import inspect
import re
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn

from s2d.ptq.calibrate import Shared, split_batches
from s2d.ptq.erq import erq
from s2d.ptq.judge import note, transforms_help
from s2d.ptq.prepare import coverage, device_of, prepare
from s2d.ptq.ptq4vit import base_ptq, ptq4vit
from s2d.ptq.quantizers import check_bits
from s2d.ptq.repq_vit import repq_vit
from s2d.ptq.rotation import rotate
from s2d.ptq.rtn import rtn
from s2d.ptq.sites import quantized_layers, set_mode
from s2d.ptq.smoothquant import smooth, smoothquant

METHODS: dict[str, Callable] = {
    "rtn": rtn,
    "smoothquant": smoothquant,
    "base_ptq": base_ptq,
    "ptq4vit": ptq4vit,
    "repq_vit": repq_vit,
    "erq": erq,
}
"""Each ``method(model, batches, *, w_bits, a_bits, progress, shared, **options)`` quantizes a prepared model in place;
``shared`` (a :class:`s2d.ptq.calibrate.Shared`) keeps for other copies of it what does not depend on the bits."""

TRANSFORMS: dict[str, Callable] = {
    "smooth": smooth,
    "rotation": rotate,
    "learned_rotation": partial(rotate, kind="learned"),
}
"""Each ``transform(model, batches, **options)`` changes a prepared model in place, its function not at all."""

__all__ = ["METHODS", "TRANSFORMS", "coverage", "parse_bits", "quantize", "quantize_each"]


def quantize(
    model: nn.Module,
    *,
    method: str = "rtn",
    w_bits: int,
    a_bits: int,
    calibration: Any,
    transforms: str | Sequence[str | Callable] = (),
    exclude: str | Sequence[str] = (),
    batch_size: int = 32,
    progress: Callable[[str], None] | None = None,
    **options,
) -> nn.Module:
    """A quantized copy of a model: its convolutions, Linear layers (head included) and attention products.

    Quantized are the weights of convolutions and Linear layers, the inputs of Linear layers, and both factors of both
    products of every attention. LayerNorm, softmax, GELU, residual sums, embeddings, biases and the image itself stay
    in floating point. What cannot be reached is named in a warning and by :func:`coverage`. Several methods move scales
    from a norm into the layers that read it, so features taken from in between (timm's ``forward_features``) may be
    scaled; outputs are not.

    Args:
        model: any timm, open_clip or transformers model, or one of your own; left untouched.
        method: a key of ``METHODS``.
        w_bits, a_bits: 2 to 8; 16 or 32 leaves that side in floating point.
        calibration: ``(N, ...)`` images, N >= 1, disjoint from what the result is tested on; or a tuple or mapping of
            tensors, as the model is called; or a list of such batches.
        transforms: keys of ``TRANSFORMS``, or functions of a prepared model and the batches, applied first. Named ones
            are left out, with a warning, where they make round-to-nearest clearly worse at these bit widths on
            calibration items kept back for that; functions are applied as they are.
        exclude: name patterns of layers and attentions that stay in floating point.
        batch_size: calibration items a forward pass.
        progress: called with a line of text now and then; None for silence.
        **options: keyword arguments of the method.

    Returns:
        The copy, in evaluation mode.

    Raises:
        ValueError: for an unknown method, transform or option, bits out of range, a calibration set that is empty or
            not finite, or a model that cannot be followed.

    Example:
        >>> import torch
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.GELU(), nn.Linear(8, 2))
        >>> quantized = quantize(model, method="rtn", w_bits=4, a_bits=4, calibration=torch.randn(32, 4))
        >>> int(quantized[0].weight_codes().max()) <= 15
        True

    Paper: Tables 6 to 11 evaluate quantized checkpoints.
    """
    setting = {"method": method, "w_bits": w_bits, "a_bits": a_bits} | options
    (quantized,) = quantize_each(
        model,
        [setting],
        calibration=calibration,
        transforms=transforms,
        exclude=exclude,
        batch_size=batch_size,
        progress=progress,
    )
    return quantized


def quantize_each(
    model: nn.Module,
    settings: Sequence[Mapping[str, Any]],
    *,
    calibration: Any,
    transforms: str | Sequence[str | Callable] = (),
    exclude: str | Sequence[str] = (),
    batch_size: int = 32,
    progress: Callable[[str], None] | None = None,
) -> Iterator[nn.Module]:
    """One quantized copy for each of several settings, the same as from :func:`quantize` one by one, at a lower cost.

    The model is taken apart once, transforms are applied once, and what does not depend on the bit width (ranges, the
    inputs and gradients of every site) is observed once.

    Args:
        model, calibration, transforms, exclude, batch_size, progress: see :func:`quantize`.
        settings: ``method`` (by default ``"rtn"``), ``w_bits``, ``a_bits`` and the method's options, one mapping a
            copy.

    Returns:
        The copies in order, each made when it is asked for.

    Raises:
        ValueError: see :func:`quantize`; for unknown methods, options and bits, before anything is computed.

    Example:
        >>> import torch
        >>> model, x = nn.Linear(4, 2), torch.randn(32, 4)
        >>> settings = [{"w_bits": bits, "a_bits": bits} for bits in (8, 2)]
        >>> [int(copy.weight_codes().max()) <= 3 for copy in quantize_each(model, settings, calibration=x)]
        [False, True]

    Paper: Tables 6 to 11 evaluate one checkpoint at several bit widths.
    """
    described = [_described(**setting) for setting in settings]
    transforms = [transforms] if isinstance(transforms, str) else transforms
    applied = [_transform(transform) for transform in transforms]
    # Callers are often in inference mode, where nothing made has a gradient later.
    with torch.inference_mode(False), torch.no_grad():
        batches = split_batches(calibration, batch_size, device_of(model))
        prepared = prepare(model, batches, exclude=exclude)
        judged = bool(transforms) and all(isinstance(transform, str) for transform in transforms)
        plain = copy.deepcopy(prepared) if judged else None
        for transform in applied:
            transform(prepared, batches)
    names = [
        transform if isinstance(transform, str) else getattr(transform, "__name__", str(transform))
        for transform in transforms
    ]
    return _copies(prepared, plain, batches, [setting | {"transforms": names} for setting in described], progress)


def _copies(
    prepared: nn.Module,
    plain: nn.Module | None,
    batches: list[Any],
    settings: list[dict],
    progress: Callable[[str], None] | None,
) -> Iterator[nn.Module]:
    """``plain`` is the model without its transforms, where these have to show that they help."""
    # A single copy need not keep anything; what is kept is of one of the two models.
    shared = {with_transforms: Shared() if len(settings) > 1 else None for with_transforms in (True, False)}
    for left, setting in zip(reversed(range(len(settings))), settings, strict=True):
        with torch.inference_mode(False), torch.no_grad():
            bits = {name: setting[name] for name in ("w_bits", "a_bits")}
            helps = plain is None or transforms_help(prepared, plain, batches, **bits)
            chosen = prepared if helps else plain
            quantized = copy.deepcopy(chosen) if left else chosen
            if plain is not None:
                _note_transforms(quantized, setting, helps)
            setting = setting if helps else setting | {"transforms": []}
            common = {"progress": progress, "shared": shared[helps]}
            METHODS[setting["method"]](quantized, batches, **bits, **common, **setting["options"])
        set_mode(quantized, "quantized")
        quantized.__dict__["s2d_quantization"] = setting
        yield quantized.eval()


def _note_transforms(quantized: nn.Module, setting: Mapping[str, Any], helps: bool) -> None:
    for name in quantized_layers(quantized):
        for transform in setting["transforms"]:
            note(quantized, name, transform, helps)
    if not helps:
        warnings.warn(
            f"{' and '.join(setting['transforms'])} left out at W{setting['w_bits']}A{setting['a_bits']}: on "
            "calibration items kept back, rounding to nearest has clearly more error with than without (give the "
            "function instead of its name to have it all the same)",
            stacklevel=3,
        )


def _described(
    *, method: str = "rtn", w_bits: int | None = None, a_bits: int | None = None, **options
) -> dict[str, Any]:
    """A setting that was checked, with the method's options apart."""
    if method not in METHODS:
        raise ValueError(f"unknown method {method!r}: choose one of {', '.join(METHODS)}")
    check_bits(w_bits, "w_bits")
    check_bits(a_bits, "a_bits")
    check_options(method, options)
    return {"method": method, "w_bits": w_bits, "a_bits": a_bits, "options": options}


def check_options(method: str, options: Mapping[str, Any]) -> None:
    """Whether a method has these options.

    Args:
        method: a key of ``METHODS``.
        options: by name.

    Raises:
        ValueError: for an option that it does not have.

    Example:
        >>> check_options("erq", {"ridge": 0.2})

    Paper: none.
    """
    known = [name for name, p in inspect.signature(METHODS[method]).parameters.items() if p.kind is p.KEYWORD_ONLY]
    known = [name for name in known if name not in ("w_bits", "a_bits", "progress", "shared")]
    for name in options:
        if name not in known:
            raise ValueError(f"method {method!r} has no option {name!r}: it has {', '.join(known) or 'none'}")


def _transform(transform: str | Callable) -> Callable:
    if callable(transform):
        return transform
    if transform not in TRANSFORMS:
        raise ValueError(f"unknown transform {transform!r}: choose one of {', '.join(TRANSFORMS)}")
    return TRANSFORMS[transform]


def parse_bits(name: str) -> tuple[int, int]:
    """Weight and activation bits of a name such as ``"W4A4"``; ``"FP"`` switches both off.

    Raises:
        ValueError: for a name of another form, or bits out of range.

    Example:
        >>> parse_bits("W3A4")
        (3, 4)
    """
    if name == "FP":
        return 32, 32
    match = re.fullmatch("W([0-9]+)A([0-9]+)", name)
    if match is None:
        raise ValueError(f"bit width {name!r} is not of the form W4A4 (or FP)")
    return check_bits(int(match[1]), "w_bits"), check_bits(int(match[2]), "a_bits")
