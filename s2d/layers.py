"""Which linear maps are meant: by default, those of the transformer blocks, whatever module holds their weight."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

Selector = str | Sequence[str] | Callable[[str, nn.Module], bool]
CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
# Wrappers put their own name before the model's; a layer keeps its name with and without them.
OUTER_WRAPPERS = ("module", "_orig_mod")
# torch.compile and activation checkpointing also wrap single modules, deep inside a name.
INNER_WRAPPERS = ("_orig_mod", "_checkpoint_wrapped_module")
# How low-rank adapters without PEFT (loralib, torchtune, diffusers) call their factors.
LORA_FACTORS = {"lora_A", "lora_B", "lora_a", "lora_b", "lora_down", "lora_up"}
# Modules whose two-dimensional parameters are tables to look up, or are computed from others.
LAZY: type = nn.parameter.UninitializedTensorMixin  # type: ignore[attr-defined]  # torch's stubs leave it out
TABLES = (nn.Embedding, nn.EmbeddingBag, nn.utils.parametrize.ParametrizationList)


@dataclass(frozen=True)
class LinearMap:
    """A linear map ``y = W x`` inside a model, and where its matrix W is found.

    Attributes:
        name: qualified name; a packed or grouped parameter gives one map a part (``attn.q``, ``conv.group0``).
        module: the module whose call applies the map.
        parameter: attribute of ``module`` that holds the matrix.
        rows: the part of the parameter's first dimension that belongs to this map, or None for all of it.
        transposed: whether the parameter is stored ``(in_features, out_features)``.
        argument: position of the input among the module's arguments, or None where the input arises inside the module.
        keyword: name of the input when it is passed by keyword.
        index: which matrix of a stack ``(experts, out_features, in_features)``, or None where there is one only.

    Example:
        >>> LinearMap("fc", nn.Linear(3, 2)).shape
        (2, 3)

    Paper: none.
    """

    name: str
    module: nn.Module
    parameter: str = "weight"
    rows: tuple[int, int] | None = None
    transposed: bool = False
    argument: int | None = 0
    keyword: str = "input"
    index: int | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not isinstance(self.module, nn.Module):
            raise ValueError(
                f"LinearMap was given {self.name!r} and a {type(self.module).__name__}: give a name and the module "
                "that holds the matrix, as linear_maps(model) does"
            )
        # Not hasattr(), which would compute a parametrized weight.
        names = self.module._parameters.keys() | vars(self.module).keys()
        if not isinstance(self.parameter, str) or not (
            self.parameter in names or hasattr(type(self.module), self.parameter)
        ):
            raise ValueError(
                f"parameter is {self.parameter!r}, which {type(self.module).__name__} does not have: name the "
                "attribute that holds the matrix"
            )
        numbers = [self.argument, self.index] + list(self.rows if isinstance(self.rows, tuple) else ())
        whole = all(n is None or (isinstance(n, int) and not isinstance(n, bool) and n >= 0) for n in numbers)
        rows = self.rows is None or (
            isinstance(self.rows, tuple) and len(self.rows) == 2 and self.rows[0] < self.rows[1]
        )
        if not whole or not rows or not isinstance(self.transposed, bool) or not isinstance(self.keyword, str):
            raise ValueError(
                f"LinearMap {self.name!r} has rows {self.rows!r}, transposed {self.transposed!r}, argument "
                f"{self.argument!r}, keyword {self.keyword!r} and index {self.index!r}: give rows (first, last), a "
                "bool, a position, a name and a position, as linear_maps(model) does"
            )

    @property
    def weight(self) -> nn.Parameter:
        """The parameter that holds the matrix, read anew each time because wrappers replace it."""
        return getattr(self.module, self.parameter)

    @property
    def shape(self) -> tuple[int, int]:
        """``(out_features, in_features)`` of the matrix."""
        size = self.weight.shape if self.index is None else self.weight.shape[1:]
        first = size[0] if self.rows is None else self.rows[1] - self.rows[0]
        second = size[1:].numel()
        return (second, first) if self.transposed else (first, second)

    def matrix(self, tensor: Tensor | None = None) -> Tensor:
        """The part of a tensor shaped like the parameter (by default itself) that is this map's, as a matrix.

        For a convolution this is the matrix that acts on one flattened patch of the input. The result shares memory
        with the tensor, so that a gradient can be changed in place; only of a ``DTensor`` it may be a copy.

        Raises:
            ValueError: for a kernel whose memory layout (channels_last) does not allow a view.
        """
        tensor = self.weight if tensor is None else tensor
        if not isinstance(tensor, Tensor) or tensor.shape != self.weight.shape:
            given = tuple(tensor.shape) if isinstance(tensor, Tensor) else type(tensor).__name__
            raise ValueError(
                f"layer {_label(self)} takes its matrix from {given}: give a tensor of the parameter's shape "
                f"{tuple(self.weight.shape)}"
            )
        tensor = tensor if self.index is None else tensor[self.index]
        part = tensor if self.rows is None else tensor[self.rows[0] : self.rows[1]]
        if part.ndim > 2:
            try:
                part = part.view(part.shape[0], -1)
            except RuntimeError as error:
                raise ValueError(
                    f"the kernel of layer {_label(self)} is no matrix in memory, its layout is channels_last: call "
                    f"model.to(memory_format=torch.contiguous_format), or leave it out with exclude={self.name!r}"
                ) from error
        return part.T if self.transposed else part

    def input(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        """The input x among the arguments of a call of ``module``.

        Raises:
            ValueError: where the input arises inside the module, or no tensor is among the arguments.
        """
        if self.argument is None:
            raise ValueError(f"the input of layer {_label(self)} arises inside {type(self.module).__name__}, unseen")
        if len(args) > self.argument:
            return args[self.argument]
        if self.keyword in kwargs:
            return kwargs[self.keyword]
        # A subclass may have named its argument otherwise.
        named = [value for value in kwargs.values() if isinstance(value, Tensor)]
        if not named:
            raise ValueError(f"layer {_label(self)} was called without a tensor: give its input as {self.keyword!r}")
        return named[0]


def linear_maps(
    model: nn.Module,
    *,
    include: Selector | None = None,
    exclude: Selector = (),
) -> dict[str, LinearMap]:
    """The linear maps of a model to watch, by qualified name, in the order of the model.

    Found are ``nn.Linear``, the ``Conv1D`` of transformers' GPT-2, the query, key and value projections packed inside
    ``nn.MultiheadAttention``, and convolutions, one map a group. Without ``include``, a map counts when it lies inside
    a *block*, an entry of a list of at least two modules of the same class such as timm's ``blocks.N``, and is no
    convolution. A model without blocks gives all its maps but convolutions. ``nn.MultiheadAttention`` reads the weight
    of its ``out_proj`` without calling the layer, so its input cannot be watched and it does not count. Experts stacked
    in one three-dimensional parameter, as in transformers' Mixtral, give one map an expert (``experts.down_proj.3``).
    Two-dimensional parameters of other modules may be projections or tables, which nothing tells: they are found only
    where ``include`` gives their exact name, and :func:`bare_matrices` lists them.

    A weight that several modules share appears once, under its first name, and not at all when ``exclude`` names any
    of them. What DataParallel wrappers, ``torch.compile`` and activation checkpointing add to a name is left out.

    Args:
        model: any module.
        include: glob patterns of names (``"blocks.*.mlp.fc*"``), or a function of name and module, that replace the
            default choice.
        exclude: the same, to leave out.

    Returns:
        Name to map, never empty.

    Raises:
        ValueError: when no map is left, a pattern matches nothing, or a chosen layer cannot be decayed (an adapter of
            PEFT, a quantized, parametrized or sparse weight, one without a shape yet, a flat parameter of FSDP1), and
            for a model or a selector that is none.

    Example:
        >>> list(linear_maps(nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 1))))
        ['0', '2']
        >>> list(linear_maps(nn.MultiheadAttention(4, 2)))
        ['q', 'k', 'v']

    Paper: "for layer l = 1 to L" in Algorithm 1; the paper's tables report FFN layers.
    """
    check_model(model)
    _check_selector("include", include, optional=True)
    _check_selector("exclude", exclude)
    _refuse_fsdp1(model)
    model = _unwrap(model)
    found = {linear.name: linear for linear in _find(model)}
    include, named = _named_exactly(include, bare_matrices(model))
    if not found and not named:
        raise ValueError(f"{type(model).__name__} has no linear layer, and S2D acts on those")
    if include is None:
        dense = {name: linear for name, linear in found.items() if not isinstance(linear.module, CONVOLUTIONS)}
        if not dense:
            raise ValueError(
                f"{type(model).__name__} has no linear layers but convolutions, which are watched only where include= "
                f"names them; there are: {_listing(found)}"
            )
        blocks = _block_prefixes(model)
        chosen = {name: linear for name, linear in dense.items() if name.startswith(blocks)} or dense
    else:
        chosen = _select(found, include) | named
    left_out = {_identity(linear) for linear in _select(found, exclude).values()}
    chosen = {name: linear for name, linear in chosen.items() if _identity(linear) not in left_out}
    if not chosen:
        raise ValueError(f"include={include!r} and exclude={exclude!r} leave none of: {_listing(found)}")
    adapters = _adapter_names(model)
    for linear in chosen.values():
        _refuse(linear, adapters)
    first: dict[tuple[Any, ...], LinearMap] = {}
    for linear in chosen.values():
        first.setdefault(_identity(linear), linear)
    return {linear.name: linear for linear in first.values()}


def modules_sharing(model: nn.Module, linear: LinearMap) -> list[LinearMap]:
    """Every map of the model with the same weight: itself, and those of the modules tied to it.

    Example:
        >>> tied = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
        >>> tied[1].weight = tied[0].weight
        >>> [twin.name for twin in modules_sharing(tied, linear_maps(tied)["0"])]
        ['0', '1']

    Paper: none.
    """
    maps = itertools.chain(_find(_unwrap(model)), bare_matrices(model).values())
    return [other for other in maps if _identity(other) == _identity(linear)]


def bare_matrices(model: nn.Module) -> dict[str, LinearMap]:
    """Two-dimensional parameters that belong to no known kind of layer: projections perhaps, or tables.

    Returns:
        Name of the parameter to map. Its input is not known, nor which way round it multiplies, which the singular
        values do not depend on.

    Example:
        >>> model = nn.ParameterDict({"proj": nn.Parameter(torch.ones(3, 2))})
        >>> list(bare_matrices(model))
        ['proj']
        >>> list(linear_maps(model, include="proj"))
        ['proj']

    Paper: none.
    """
    model = _unwrap(model)
    adapters = _adapter_names(model)
    found = {}
    for name, module in _named_modules(model):
        known = isinstance(module, (nn.Linear, nn.MultiheadAttention, *CONVOLUTIONS, *TABLES))
        if known or is_conv1d_of_gpt2(module) or _inside(name, adapters):
            continue
        for parameter, tensor in module._parameters.items():
            lazy = isinstance(tensor, LAZY)
            if tensor is not None and not lazy and tensor.ndim == 2 and min(tensor.shape) > 1:
                label = _join(name, parameter)
                found[label] = LinearMap(label, module, parameter, argument=None)
    return found


class Place(NamedTuple):
    """Where a module hangs in its model.

    Attributes:
        parent: the module that holds it.
        key: the name under which it does.
    """

    parent: nn.Module
    key: str

    def occupant(self) -> nn.Module | None:
        """The module there now, inside the wrappers of ``torch.compile`` and activation checkpointing.

        Example:
            >>> model = nn.Sequential(nn.Linear(2, 2))
            >>> Place(model, "0").occupant() is model[0]
            True

        Paper: none.
        """
        module = self.parent._modules.get(self.key)
        while module is not None:
            inside = [module._modules[wrapper] for wrapper in INNER_WRAPPERS if wrapper in module._modules]
            if not inside:
                break
            module = inside[0]
        return module


def places(model: nn.Module) -> dict[int, Place]:
    """The first place of every module, by the module's id.

    Example:
        >>> model = nn.Sequential(nn.Linear(2, 2))
        >>> places(model)[id(model[0])].key
        '0'

    Paper: none.
    """
    found: dict[int, Place] = {}
    for parent in model.modules():
        for key, child in parent._modules.items():
            if child is not None:
                found.setdefault(id(child), Place(parent, key))
    return found


def check_model(model: Any) -> None:
    """Raise ValueError unless this is a module.

    Example:
        >>> check_model(nn.Linear(2, 2))

    Paper: none.
    """
    if not isinstance(model, nn.Module):
        raise ValueError(f"model is a {type(model).__name__}: give the torch.nn.Module in training")


def _check_selector(name: str, selector: Any, *, optional: bool = False) -> None:
    if (optional and selector is None) or isinstance(selector, str):
        return
    if callable(selector) and not isinstance(selector, type):
        return
    if isinstance(selector, (list, tuple, set, frozenset)) and all(isinstance(pattern, str) for pattern in selector):
        return
    raise ValueError(f"{name} is {selector!r}: give name patterns such as 'blocks.*', or a function of name and module")


def _named_exactly(
    include: Selector | None, bare: dict[str, LinearMap]
) -> tuple[Selector | None, dict[str, LinearMap]]:
    """``include`` without the exact names of bare parameters, and the maps of those."""
    if include is None or callable(include):
        return include, {}
    patterns = [include] if isinstance(include, str) else list(include)
    named = {pattern: bare[pattern] for pattern in patterns if pattern in bare}
    return [pattern for pattern in patterns if pattern not in named], named


def is_conv1d_of_gpt2(module: nn.Module) -> bool:
    """Whether this is transformers' ``Conv1D``, or a class made from it, found without importing transformers.

    Its weight is stored ``(in_features, out_features)``.

    Example:
        >>> is_conv1d_of_gpt2(nn.Linear(2, 2))
        False

    Paper: none.
    """
    return hasattr(module, "nf") and any(base.__name__ == "Conv1D" for base in type(module).__mro__)


def _identity(linear: LinearMap) -> tuple[Any, ...]:
    """What tells maps of one weight from others; a parametrized weight is another tensor each time one looks."""
    owned = linear.module._parameters.get(linear.parameter)
    if owned is None:
        return (id(linear.module), linear.parameter, linear.rows, linear.index)
    return (id(owned), linear.rows, linear.index)


def _find(model: nn.Module) -> Iterator[LinearMap]:
    """Every linear map of an unwrapped model, tied weights included."""
    uncalled = set()
    for name, module in _named_modules(model):
        if id(module) in uncalled:
            continue
        if is_conv1d_of_gpt2(module):
            yield LinearMap(name, module, transposed=True, keyword="x")
        elif isinstance(module, nn.Linear):
            yield LinearMap(name, module)
        elif isinstance(module, nn.MultiheadAttention):
            uncalled.add(id(module.out_proj))
            yield from _attention_maps(name, module)
        elif isinstance(module, CONVOLUTIONS):
            size = module.out_channels // module.groups
            for group in range(module.groups):
                label = name if module.groups == 1 else _join(name, f"group{group}")
                rows = None if module.groups == 1 else (group * size, (group + 1) * size)
                yield LinearMap(label, module, rows=rows)
        else:
            yield from _expert_maps(name, module)


def _expert_maps(name: str, module: nn.Module) -> Iterator[LinearMap]:
    """One map for each matrix of a stack of experts, ``(experts, out, in)`` or, if it says so, transposed."""
    experts = getattr(module, "num_experts", None)
    for parameter, tensor in module._parameters.items():
        if tensor is None or isinstance(tensor, LAZY) or tensor.ndim != 3:
            continue
        if len(tensor) == experts or "expert" in type(module).__name__.lower():
            transposed = bool(getattr(module, "is_transposed", False))
            for index in range(len(tensor)):
                label = _join(name, f"{parameter}.{index}")
                yield LinearMap(label, module, parameter, transposed=transposed, argument=None, index=index)


def _attention_maps(name: str, module: nn.MultiheadAttention) -> Iterator[LinearMap]:
    width = module.embed_dim
    for position, (part, keyword) in enumerate(zip("qkv", ("query", "key", "value"), strict=True)):
        where: dict[str, Any] = {"argument": position, "keyword": keyword}
        if module._qkv_same_embed_dim:  # asking for in_proj_weight would compute it, if it is parametrized
            rows = (position * width, (position + 1) * width)
            yield LinearMap(_join(name, part), module, "in_proj_weight", rows, **where)
        else:
            yield LinearMap(_join(name, part), module, f"{part}_proj_weight", **where)


def _join(name: str, part: str) -> str:
    return f"{name}.{part}" if name else part


def plain_name(name: str) -> str:
    """A qualified name without what DataParallel wrappers, ``torch.compile`` and checkpointing put into it.

    Example:
        >>> plain_name("module._orig_mod.blocks.0.mlp")
        'blocks.0.mlp'

    Paper: none.
    """
    parts = name.split(".")
    while parts and parts[0] in OUTER_WRAPPERS:
        parts = parts[1:]
    return ".".join(part for part in parts if part not in INNER_WRAPPERS)


def _unwrap(model: nn.Module) -> nn.Module:
    """The model inside its wrappers; a ``module`` beside other children is the model's own."""
    while len(model._modules) == 1 and not model._modules.keys().isdisjoint(OUTER_WRAPPERS):
        (inside,) = model._modules.values()
        if inside is None:
            break
        model = inside
    return model


def _named_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Plain name and module, a shared module under each of its names, for an unwrapped model."""
    for name, module in model.named_modules(remove_duplicate=False):
        yield ".".join(part for part in name.split(".") if part not in INNER_WRAPPERS), module


def _block_prefixes(model: nn.Module) -> tuple[str, ...]:
    """What the names inside the entries of repeated-block containers begin with; an entry that is a Linear has none."""
    prefixes = []
    for name, container in _named_modules(model):
        if not isinstance(container, (nn.ModuleList, nn.Sequential)):
            continue
        # Not named_children(), for which a block that is repeated with the same weights is one.
        kinds = {key: _kind(entry) for key, entry in container._modules.items() if entry is not None}
        counts = Counter(kinds.values())
        prefixes += [f"{_join(name, key)}." for key, kind in kinds.items() if counts[kind] > 1]
    return tuple(prefixes)


def _kind(entry: nn.Module) -> str:
    """The class of a block inside its wrappers; FSDP2 gives each module that it shards a class of its own."""
    while inside := [m for wrapper in INNER_WRAPPERS if (m := entry._modules.get(wrapper)) is not None]:
        entry = inside[0]
    return type(entry).__name__.removeprefix("FSDP")


def _select(found: dict[str, LinearMap], selector: Selector) -> dict[str, LinearMap]:
    if callable(selector):
        return {name: linear for name, linear in found.items() if selector(name, linear.module)}
    patterns = [selector] if isinstance(selector, str) else list(selector)
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in found):
            raise ValueError(f"pattern {pattern!r} matches no linear layer; there are: {_listing(found)}")
    return {name: linear for name, linear in found.items() if any(fnmatchcase(name, p) for p in patterns)}


def _listing(found: dict[str, LinearMap], most: int = 100) -> str:
    """Names for an error message; a convolution can have a thousand groups."""
    names = [name or "''" for name in itertools.islice(found, most)]
    return ", ".join(names) + (f", and {len(found) - most} more" if len(found) > most else "")


def _label(linear: LinearMap) -> str:
    """A map's name for an error message; a model that is one layer has none."""
    return linear.name or type(linear.module).__name__


def _inside(name: str, modules: tuple[str, ...]) -> bool:
    """Whether a name is one of these modules, or lies in one."""
    return any(name == module or name.startswith(_join(module, "")) for module in modules)


def _adapter_names(model: nn.Module) -> tuple[str, ...]:
    """Names of the modules that PEFT, or a library like it, puts in place of a layer."""
    return tuple(
        name
        for name, module in _named_modules(model)
        if (hasattr(module, "base_layer") and hasattr(module, "adapter_layer_names"))
        or not LORA_FACTORS.isdisjoint(module._modules.keys() | module._parameters.keys())
    )


def _refuse_fsdp1(model: nn.Module) -> None:
    for name, module in model.named_modules():
        if any(base.__name__ == "FullyShardedDataParallel" for base in type(module).__mro__):
            raise ValueError(
                f"{name or 'the model'} is wrapped in FSDP1, which flattens its weights so that no matrix is left: "
                "use torch.distributed.fsdp.fully_shard (FSDP2) or DistributedDataParallel"
            )


def _refuse(linear: LinearMap, adapters: tuple[str, ...]) -> None:
    layer, leave_out = f"layer {_label(linear)}", f"leave it out with exclude={linear.name!r}"
    if _inside(linear.name, adapters):
        raise ValueError(
            f"{layer} belongs to a PEFT adapter, whose merged weight (W + BA for LoRA) is what the activations see; "
            "decaying W, A or B alone means something else: train after model.merge_and_unload(), or leave the "
            "adapters out with exclude="
        )
    if linear.parameter not in linear.module._parameters:
        raise ValueError(
            f"{layer} has a parametrized weight: it is computed anew from other tensors, and decay acts on the tensor "
            "the optimizer owns; remove the parametrization (torch.nn.utils.parametrize.remove_parametrizations), or "
            f"{leave_out}"
        )
    weight = linear.weight
    if isinstance(weight, LAZY):
        raise ValueError(f"{layer} has no shape yet: pass one batch through the model first, or {leave_out}")
    if weight.layout is not torch.strided:
        raise ValueError(f"{layer} has a sparse weight ({weight.layout}): make it dense first, or {leave_out}")
    if not _holds_real_numbers(weight):
        kind = weight.dtype if type(weight) is nn.Parameter else type(weight).__name__
        raise ValueError(
            f"{layer} holds {kind} codes: S2D needs the real weight, so train before quantizing, or {leave_out}"
        )
    if weight.ndim < 2:
        raise ValueError(
            f"{layer} has a weight of shape {tuple(weight.shape)}: expected a matrix (FSDP1 and ZeRO-3 flatten "
            "weights; use torch.distributed.fsdp.fully_shard)"
        )
    if weight.ndim > 2:  # raises for channels_last, now rather than in the first step
        linear.matrix(torch.empty_strided(weight.shape, weight.stride(), device="meta"))


def _holds_real_numbers(tensor: Tensor) -> bool:
    """Whether all that is stored are floating-point numbers of 16 bits or more, also inside a tensor subclass."""
    if hasattr(tensor, "__tensor_flatten__"):  # torchao's; also DTensor
        parts = [getattr(tensor, name) for name in tensor.__tensor_flatten__()[0]]
        return all(_holds_real_numbers(part) for part in parts if isinstance(part, Tensor))  # DTensor has a mesh too
    return tensor.is_floating_point() and tensor.dtype.itemsize > 1
