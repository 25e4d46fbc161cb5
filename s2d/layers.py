"""Which layers are meant: by default, the Linear layers inside the transformer blocks."""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatchcase

from torch import nn


def linear_layers(
    model: nn.Module,
    *,
    include: str | Sequence[str] | None = None,
    exclude: str | Sequence[str] = (),
) -> dict[str, nn.Linear]:
    """The Linear layers to watch, by qualified name, in the order of the model.

    Without ``include``, a layer counts when it lies inside a *block*: an entry of a list of at least two modules of the
    same class, such as timm's ``blocks.N``. A model without blocks gives all its Linear layers. A weight shared by
    several layers appears once, under its first name. ``nn.MultiheadAttention`` reads the weight of its ``out_proj``
    without calling the layer, so nothing can be watched there and it does not count.

    Args:
        model: any module.
        include: glob patterns of names (``"blocks.*.mlp.fc*"``) that replace the default choice.
        exclude: glob patterns of names to leave out.

    Returns:
        Name to layer, never empty.

    Raises:
        ValueError: when no layer is left, or a pattern matches no Linear layer.

    Example:
        >>> list(linear_layers(nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 1))))
        ['0', '2']

    Paper: "for layer l = 1 to L" in Algorithm 1; the paper's tables report FFN layers.
    """
    linears = {name: module for name, module in model.named_modules() if _is_called(module)}
    if not linears:
        raise ValueError(f"{type(model).__name__} has no nn.Linear layer, and S2D acts on those")
    if include is None:
        blocks = _block_prefixes(model)
        chosen = {name: layer for name, layer in linears.items() if name.startswith(blocks)} or linears
    else:
        chosen = {name: layer for name, layer in linears.items() if _matches(name, include, linears)}
    chosen = {name: layer for name, layer in chosen.items() if not _matches(name, exclude, linears)}
    if not chosen:
        raise ValueError(f"include={include!r} and exclude={exclude!r} leave none of: {', '.join(linears)}")
    seen: set[int] = set()
    # set.add returns None, so this keeps the first layer that holds each weight.
    return {n: m for n, m in chosen.items() if id(m.weight) not in seen and not seen.add(id(m.weight))}


def _is_called(module: nn.Module) -> bool:
    """Whether a module is a Linear layer whose inputs a hook can see (MultiheadAttention's ``out_proj`` is not)."""
    return isinstance(module, nn.Linear) and not isinstance(module, nn.modules.linear.NonDynamicallyQuantizableLinear)


def _block_prefixes(model: nn.Module) -> tuple[str, ...]:
    """Name prefixes of the entries of repeated-block containers; Linear entries are layers, not blocks."""
    prefixes = []
    for name, module in model.named_modules():
        if not isinstance(module, (nn.ModuleList, nn.Sequential)):
            continue
        classes = [type(child) for child in module.children()]
        repeated = {c for c in classes if classes.count(c) > 1 and _holds_linear(module, c)}
        prefixes += [
            f"{name}.{key}." if name else f"{key}." for key, child in module.named_children() if type(child) in repeated
        ]
    return tuple(prefixes)


def _holds_linear(container: nn.Module, block_class: type) -> bool:
    """Whether a child of that class holds a Linear layer (a Linear itself is a layer, not a block)."""
    children = [child for child in container.children() if type(child) is block_class]
    return any(isinstance(inner, nn.Linear) and inner is not child for child in children for inner in child.modules())


def _matches(name: str, patterns: str | Sequence[str], names: dict[str, nn.Linear]) -> bool:
    patterns = [patterns] if isinstance(patterns, str) else list(patterns)
    for pattern in patterns:
        if not any(fnmatchcase(other, pattern) for other in names):
            raise ValueError(f"pattern {pattern!r} matches no Linear layer; there are: {', '.join(names)}")
    return any(fnmatchcase(name, pattern) for pattern in patterns)
