"""What several processes need to act as one: one set of outliers, work shared out, one set of triplets.

Weights may be whole on every rank (DDP) or ``DTensor`` shards (FSDP2, tensor parallelism, both). They are put together
for a refresh only, one layer a rank at a time; in between each rank changes its own shard.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from s2d.layers import LinearMap
from s2d.outliers import OutlierRows

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor
    from typing_extensions import TypeIs


def resolve_group(process_group: dist.ProcessGroup | str | None) -> dist.ProcessGroup | None:
    """The group that trains one model together, or None for a process on its own.

    Args:
        process_group: a group; ``"world"`` for all processes, when ``torch.distributed`` runs; None for no exchange.

    Raises:
        ValueError: for anything else, and for a group without this process.

    Example:
        >>> resolve_group("world") is None  # torch.distributed is not initialized here
        True

    Paper: none.
    """
    if isinstance(process_group, str):
        if process_group != "world":
            raise ValueError(f"process_group is {process_group!r}: give a group, 'world' or None")
        process_group = dist.group.WORLD if dist.is_available() and dist.is_initialized() else None
    if process_group is None:
        return None
    no_member: Any = dist.GroupMember.NON_GROUP_MEMBER if dist.is_available() else None
    outside = dist.is_available() and process_group == no_member
    if not dist.is_available() or not (outside or isinstance(process_group, dist.ProcessGroup)):
        raise ValueError(f"process_group is {process_group!r}: give a group, 'world' or None")
    if dist.get_rank(process_group) < 0:
        raise ValueError(
            f"rank {dist.get_rank()} is not in process_group: give each rank the group that it trains its model with"
        )
    return None if dist.get_world_size(process_group) == 1 else process_group


def check_same_layers(maps: dict[str, LinearMap], group: dist.ProcessGroup | None) -> None:
    """Collective. Raise on every rank unless all watch the same layers, each sharded in a way that can be decayed.

    Raises:
        ValueError: if they do not; RuntimeError on a rank whose own layers are in order when another's are not.
    """
    error = None
    try:
        for linear in maps.values():
            local_block(linear)
    except ValueError as problem:
        error = problem
    raise_together(error, group, what="attach()")
    if group is None:
        return
    description = "; ".join(f"{name} {linear.shape}" for name, linear in maps.items())
    digests: list[str] = [""] * dist.get_world_size(group)
    dist.all_gather_object(digests, hashlib.sha256(description.encode()).hexdigest(), group=group)
    if len(set(digests)) > 1:
        odd = [rank for rank, digest in enumerate(digests) if digest != digests[0]]
        raise ValueError(
            f"ranks {odd[:4]} watch other layers than rank 0: all ranks of process_group must train one model "
            "(give the data-parallel group of each pipeline stage, or process_group=None for separate models)"
        )


def raise_together(error: Exception | None, group: dist.ProcessGroup | None, *, what: str = "the refresh") -> None:
    """Collective. If any rank has an error, raise on all of them, so that none waits for one that has left.

    Args:
        error: what went wrong on this rank, or None.
        group: the process group.
        what: what is said to have failed.

    Raises:
        Exception: ``error`` itself where there is one; RuntimeError, naming the first rank that has one, elsewhere.
    """
    if group is None:
        if error is not None:
            raise error
        return
    messages: list[str | None] = [None] * dist.get_world_size(group)
    message = None if error is None else f"{type(error).__name__}: {error}"
    dist.all_gather_object(messages, message, group=group)
    if error is not None:
        raise error
    failed = {rank: text for rank, text in enumerate(messages) if text is not None}
    if failed:
        rank, text = next(iter(failed.items()))
        raise RuntimeError(f"{what} failed on rank {rank}: {text}")


def any_rank(flags: Sequence[bool], device: torch.device, group: dist.ProcessGroup | None) -> list[bool]:
    """Collective. For each flag, whether it is set on any rank."""
    if group is None or not flags:
        return list(flags)
    merged = torch.tensor(flags, dtype=torch.int32, device=device)
    dist.all_reduce(merged, dist.ReduceOp.MAX, group=group)
    return [bool(flag) for flag in merged.tolist()]


def share_out(costs: Sequence[int], ranks: int) -> list[int]:
    """The rank that works on each item: the costliest first, each to the rank with the least to do.

    Example:
        >>> share_out([4, 1, 1, 2], ranks=2)
        [0, 1, 1, 1]

    Paper: none.
    """
    load, owners = [0] * ranks, [0] * len(costs)
    for item in sorted(range(len(costs)), key=lambda i: -costs[i]):
        owners[item] = min(range(ranks), key=lambda rank: (load[rank], rank))
        load[owners[item]] += costs[item]
    return owners


@torch.no_grad()
def merge_outliers(rows: Sequence[tuple[OutlierRows, int]], device: torch.device, group: dist.ProcessGroup) -> None:
    """Collective. Give every rank the largest outliers that any rank saw, in place.

    Ranks first exchange magnitudes and neurons; then each fills in the inputs it owns among the winners, and a sum puts
    them together. So the traffic does not grow with the number of ranks. Ranks that saw the same activations, as those
    of a tensor-parallel group do in layers that are not split, count once. All is float32 on the way.

    Args:
        rows: the outliers of each layer, and the layer's ``in_features``.
        device: where the collectives run.
        group: the process group.
    """
    rank, ranks = dist.get_rank(group), dist.get_world_size(group)
    capacity = max(outliers.capacity for outliers, _ in rows)
    # A magnitude of -1 says that there is no row. Neurons are exact in float32 up to 16 million.
    mine = torch.full((2, len(rows), capacity), -1.0, dtype=torch.float32, device=device)
    for index, (outliers, _) in enumerate(rows):
        for part, values in zip(mine[:, index], (outliers.magnitude, outliers.neuron), strict=True):
            if values is not None:
                part[: len(values)] = values.to(mine)
    gathered = [torch.empty_like(mine) for _ in range(ranks)]
    dist.all_gather(gathered, mine, group=group)
    everyone = torch.stack(gathered, dim=2)  # (2, layers, ranks, capacity)
    everyone[0].masked_fill_(_copies(everyone.permute(1, 2, 0, 3).flatten(2)).unsqueeze(2), -1.0)
    magnitude, neuron = everyone.flatten(2)
    # Stable, so that all ranks put equal magnitudes into the same order.
    magnitude, source = (part[:, :capacity] for part in magnitude.sort(dim=1, descending=True, stable=True))
    neuron = neuron.gather(1, source).long()
    x = torch.zeros(capacity, sum(n for _, n in rows), dtype=torch.float32, device=device)
    first = 0
    for index, (outliers, n) in enumerate(rows):
        slots = ((source[index] // capacity == rank) & (magnitude[index] >= 0)).nonzero().squeeze(1)
        if len(slots) and outliers.x is not None:
            own = source[index, slots] % capacity
            x[slots, first : first + n] = outliers.x[own.to(outliers.x.device)].to(x)
        first += n
    dist.all_reduce(x, group=group)
    first = 0
    for index, (outliers, n) in enumerate(rows):
        kept = magnitude[index] >= 0
        if kept.any():
            outliers.allocate(n, x.dtype, device)
            outliers.merge(magnitude[index, kept], neuron[index, kept], x[kept, first : first + n])
        first += n


def _copies(lists: Tensor) -> Tensor:
    """For ``(layers, ranks, numbers)``, whether a rank's list is the same as that of a rank before it."""
    generator = torch.Generator().manual_seed(0)
    weights = torch.randn(lists.shape[2], generator=generator, dtype=torch.float64).to(lists.device)
    code, order = (lists * weights).sum(dim=2).sort(dim=1, stable=True)
    same = torch.zeros_like(code, dtype=torch.bool)
    same[:, 1:] = code[:, 1:] == code[:, :-1]
    return torch.zeros_like(same).scatter(1, order, same)


@torch.no_grad()
def sum_over_ranks(tensors: list[Tensor], group: dist.ProcessGroup) -> None:
    """Collective. Sum each tensor over the ranks, in place, in one exchange for each device and dtype."""
    kinds = {(tensor.device, tensor.dtype) for tensor in tensors}
    for device, dtype in sorted(kinds, key=str):
        alike = [tensor for tensor in tensors if (tensor.device, tensor.dtype) == (device, dtype)]
        flat = torch.cat([tensor.flatten() for tensor in alike])
        dist.all_reduce(flat, group=group)
        for tensor, part in zip(alike, flat.split([tensor.numel() for tensor in alike]), strict=True):
            tensor.copy_(part.view_as(tensor))


def is_dtensor(tensor: Tensor) -> TypeIs[DTensor]:
    """Whether a tensor is a shard of a larger one."""
    if not dist.is_available():
        return False
    from torch.distributed.tensor import DTensor

    return isinstance(tensor, DTensor)


def whole(tensor: Tensor) -> Tensor:
    """The whole tensor, detached; collective over its mesh when it is a ``DTensor``."""
    tensor = tensor.detach()
    return tensor.full_tensor() if is_dtensor(tensor) else tensor


def local(tensor: Tensor) -> Tensor:
    """This rank's part of a tensor, sharing its memory."""
    return tensor.to_local() if is_dtensor(tensor) else tensor


def gradient(weight: Tensor) -> Tensor:
    """The gradient of a weight, laid out as the weight is; collective over its mesh when that has to be made so.

    The gradient of a replicated ``DTensor`` that met sharded activations is a sum that nobody has added up yet. What
    every rank added to its part of that would count once for each rank.
    """
    grad = weight.grad
    assert grad is not None  # the callers look
    if is_dtensor(grad) and is_dtensor(weight) and grad.placements != weight.placements:
        grad = weight.grad = grad.redistribute(placements=weight.placements)
    return grad


class Block(NamedTuple):
    """The part of a map's matrix that this rank holds.

    Attributes:
        rows: which rows of the matrix, as a slice of its ``u``.
        columns: which columns, as a slice of its ``v``.
        part: which rows of the local parameter belong to the map.
        transposed: whether the parameter is stored transposed.
        stacked: whether ``part`` is one matrix of a stack, ``(experts, out_features, in_features)``.
    """

    rows: slice
    columns: slice
    part: slice
    transposed: bool
    stacked: bool = False

    def view(self, tensor: Tensor) -> Tensor:
        """The block inside the local part of the parameter or its gradient, as a matrix sharing its memory.

        Where the memory layout of a kernel (channels_last) allows no view it is a copy, for :meth:`store` to put back.
        """
        part = tensor[self.part]
        if self.stacked:
            part = part.flatten(0, 1)  # of one matrix, or of none on this rank
        elif part.ndim > 2:
            part = part.reshape(part.shape[0], part.shape[1:].numel())  # -1 fails when it is empty
        return part.T if self.transposed else part

    def store(self, tensor: Tensor, matrix: Tensor) -> None:
        """Put a changed matrix of :meth:`view` where it came from, if it was a copy."""
        if matrix.untyped_storage().data_ptr() != tensor.untyped_storage().data_ptr():
            part = tensor[self.part]
            part.copy_((matrix.T if self.transposed else matrix).reshape(part.shape))

    @property
    def empty(self) -> bool:
        """Whether this rank holds nothing of the map."""
        return self.rows.start >= self.rows.stop or self.columns.start >= self.columns.stop


def local_block(linear: LinearMap) -> Block:
    """Where this rank's part of a parameter lies in the matrix of a map.

    Raises:
        ValueError: for a parameter sharded in a way that is no block of the matrix.
    """
    weight = linear.weight
    sizes: Sequence[int] = tuple(weight.shape)
    offsets: Sequence[int] = (0,) * weight.ndim
    if is_dtensor(weight):
        from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

        sizes, offsets = compute_local_shape_and_global_offset(weight.shape, weight.device_mesh, weight.placements)
        kernel = weight.ndim > 2 and linear.index is None
        if tuple(sizes) != tuple(weight.to_local().shape) or (kernel and tuple(sizes[1:]) != weight.shape[1:]):
            raise ValueError(f"layer {linear.name} is sharded as {weight.placements}: only blocks of rows and columns")
    if linear.index is not None:
        return _block_of_stack(linear, sizes, offsets)
    first, last = linear.rows or (0, weight.shape[0])
    start, stop = max(first, offsets[0]), min(last, offsets[0] + sizes[0])
    stop = max(start, stop)
    part = slice(start - offsets[0], stop - offsets[0])
    along_first = slice(start - first, stop - first)
    columns = sizes[1:] if weight.ndim == 2 else (weight.shape[1:].numel(),)
    along_second = slice(offsets[1], offsets[1] + columns[0])
    if linear.transposed:
        return Block(along_second, along_first, part, True)
    return Block(along_first, along_second, part, False)


def _block_of_stack(linear: LinearMap, sizes: Sequence[int], offsets: Sequence[int]) -> Block:
    """Where this rank's part of a stack of matrices lies in one of them."""
    assert linear.index is not None
    here = offsets[0] <= linear.index < offsets[0] + sizes[0]
    position = linear.index - offsets[0] if here else 0
    part = slice(position, position + 1 if here else position)
    rows, columns = (slice(offsets[d], offsets[d] + sizes[d] if here else offsets[d]) for d in (1, 2))
    if linear.transposed:
        return Block(columns, rows, part, True, stacked=True)
    return Block(rows, columns, part, False, stacked=True)


def sum_over_shards(parts: Sequence[tuple[Tensor, Tensor]]) -> list[Tensor]:
    """Sum small tensors over the ranks that hold the other shards of a weight.

    Args:
        parts: for each layer its weight and a tensor computed from this rank's shard of it.

    Returns:
        The sums, in order; a tensor whose weight is no ``DTensor`` comes back as it is.
    """
    sums: list[Tensor] = [part for _, part in parts]
    meshes: dict[tuple[Any, ...], list[int]] = {}
    for index, (weight, _) in enumerate(parts):
        if is_dtensor(weight):
            # Not is_shard(): it is False for the strided shards that FSDP2 makes of tensor-parallel ones.
            key = (weight.device_mesh, tuple(not placement.is_replicate() for placement in weight.placements))
            meshes.setdefault(key, []).append(index)
    if not meshes:
        return sums
    from torch.distributed.tensor import DTensor, Partial, Replicate

    for (mesh, sharded), members in meshes.items():
        flat = torch.cat([sums[index].flatten() for index in members])
        placements = [Partial() if over else Replicate() for over in sharded]
        flat = DTensor.from_local(flat, mesh, placements, run_check=False).full_tensor()
        for index, part in zip(members, flat.split([sums[index].numel() for index in members]), strict=True):
            sums[index] = part.view_as(sums[index])
    return sums


def whole_activations(name: str, linear: LinearMap, x: Tensor) -> tuple[Tensor, Tensor] | None:
    """Input and bias-free output of a tensor-parallel map, whole; collective over the mesh of its weight.

    Returns:
        ``(x, y)`` on the first rank of the mesh, None on the others, which hold the same activations.

    Raises:
        RuntimeError: when the input is not laid out for the sharded weight.
    """
    weight = linear.weight
    if not is_dtensor(x) or linear.rows is not None:
        raise RuntimeError(
            f"layer {name}: its weight is sharded where its input is seen, and the input is not; use "
            "criterion='spectral', which needs no input"
        )
    y = x @ linear.matrix().T
    assert is_dtensor(weight) and is_dtensor(y)  # as one factor is
    both = x.full_tensor(), y.full_tensor()  # collective, so on every rank
    return both if all(place == 0 for place in weight.device_mesh.get_coordinate() or ()) else None
