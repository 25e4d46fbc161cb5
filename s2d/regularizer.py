r"""Selective Spectral Decay: Algorithm 1, for any training loop, on one process or many.

The penalty on one layer, over its selected components, and its gradient are

.. math:: L = \frac{\lambda}{n+1} \sum_{i \le \hat k} \sigma_i^{n+1}, \qquad
          \nabla_W L = \lambda\, U_{\hat k}\, \mathrm{diag}(\sigma_1^n, \dots, \sigma_{\hat k}^n)\, V_{\hat k}^\top .

The literal transcription, with dense penalty matrices and full SVDs, is :class:`s2d.reference.LiteralAlgorithm1`.
"""

from __future__ import annotations

import math
import sys
import time
import warnings
from collections.abc import Callable, Iterable
from numbers import Real
from types import FrameType
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor

from s2d import distributed
from s2d.layers import CONVOLUTIONS, LinearMap, Selector, linear_maps, modules_sharing
from s2d.pcdr import activation_pcdr, layer_pcdr, outlier_rank, spectral_pcdr
from s2d.spectral import SingularTriplets, SolvedTriplets, solve_top_triplets
from s2d.watch import OutlierWatch

CRITERIA = ("activation", "spectral", "all")
COEFFICIENTS = ("cached", "live")
COUPLINGS = ("gradient", "decoupled")
FIELDS = ("u", "s", "v", "pcdr", "info")  # what a layer keeps between refreshes, beside its rank
REFRESH_TOL = 5e-5  # residual of the triplets relative to s_1; the penalty is then right to about 1e-4


def spectral_penalty(s: Tensor, *, lam: float, power: float = 2) -> Tensor:
    r"""The value of the penalty for given singular values.

    .. math:: L = \frac{\lambda}{n+1} \sum_i \sigma_i^{n+1}

    Args:
        s: ``(k,)`` the selected singular values.
        lam: strength, dimensionless.
        power: the exponent n.

    Example:
        >>> spectral_penalty(torch.tensor([3.0]), lam=1.0, power=2)
        tensor(9.)

    Paper: Algorithm 1 and G.1 ("yielding a sigma^3 penalty").
    """
    return lam / (power + 1) * (s ** (power + 1)).sum()


def add_spectral_penalty_(target: Tensor, triplets: SingularTriplets, coefficients: Tensor, *, scale: float) -> Tensor:
    r"""Add ``scale * U diag(coefficients) V^T`` to a gradient or a weight, in place, without forming it.

    Args:
        target: ``(out_features, in_features)``.
        triplets: whose ``u`` and ``v`` are used.
        coefficients: ``(k,)``, for the gradient of the penalty ``s ** power``.
        scale: ``lam`` for a gradient, ``-lr * lam`` for a weight.

    Returns:
        ``target``.

    Example:
        >>> t = SingularTriplets(torch.tensor([[1.0], [0.0]]), torch.tensor([2.0]), torch.tensor([[0.0], [1.0]]))
        >>> add_spectral_penalty_(torch.zeros(2, 2), t, t.s**2, scale=0.25)
        tensor([[0., 1.],
                [0., 0.]])

    Paper: Algorithm 1, lines 12 and 20. Cost: O(m n k).
    """
    # Both factors take the root of the strength: in float16 all of it in one of them could overflow.
    strength = coefficients * scale
    root = strength.abs().sqrt()
    return target.addmm_(
        (triplets.u * (root * strength.sign())).to(target.dtype), (triplets.v * root).T.to(target.dtype)
    )


def penalty_cosine(a: SingularTriplets, b: SingularTriplets, *, power: float = 2, rank: int | None = None) -> float:
    r"""Cosine similarity of two penalty matrices, from their factors.

    .. math:: \frac{\langle U_a S_a^n V_a^\top,\; U_b S_b^n V_b^\top \rangle_F}{\|S_a^n\|\,\|S_b^n\|}

    Args:
        a, b: triplets of two weights of one shape.
        power: the exponent n.
        rank: how many components of each; by default all.

    Returns:
        From -1 to 1; 1 when both penalties are zero, 0 when one of them is.

    Example:
        >>> t = SingularTriplets(torch.eye(2), torch.tensor([2.0, 1.0]), torch.eye(2))
        >>> penalty_cosine(t, t)
        1.0

    Paper: appendix G.2.
    """
    u_a, s_a, v_a = (part[..., :rank].double() for part in a)
    u_b, s_b, v_b = (part[..., :rank].double() for part in b)
    c_a, c_b = s_a**power, s_b**power
    norm_a, norm_b = torch.linalg.vector_norm(c_a), torch.linalg.vector_norm(c_b)
    if norm_a == 0 or norm_b == 0:
        return float(norm_a == norm_b)
    overlap = (u_a.T @ u_b) * (v_a.T @ v_b)
    return max(-1.0, min(1.0, float((c_a / norm_a) @ overlap @ (c_b / norm_b))))


class _WatchedLayer:
    """One layer: what the last refresh left behind."""

    def __init__(self, linear: LinearMap) -> None:
        self.linear = linear
        self.optimizer: torch.optim.Optimizer | None = None
        self.triplets: SingularTriplets | None = None
        self.pcdr: Tensor | None = None
        self.rank = 0  # how many components are penalised
        self.spent: Tensor | None = None  # how much decoupled decay has taken off each component since
        self.info: Tensor | None = None  # error, whether the full SVD answered, seconds
        self._factors: tuple[distributed.Block, Tensor, Tensor] | None = None

    def selected(self) -> SingularTriplets:
        """The penalised triplets."""
        return SingularTriplets(*(part[..., : self.rank] for part in self.triplets))

    def local_factors(self) -> tuple[distributed.Block, Tensor, Tensor]:
        """This rank's block of the matrix, and the rows of the selected U and V that meet it."""
        if self._factors is None:
            block, selected = distributed.local_block(self.linear), self.selected()
            self._factors = block, selected.u[block.rows], selected.v[block.columns]
        return self._factors

    def set(self, triplets: SingularTriplets, pcdr: Tensor, info: Tensor, rank: int) -> None:
        """What a refresh found."""
        self.triplets, self.pcdr, self.info, self.rank = triplets, pcdr, info, rank
        self.spent, self._factors = torch.zeros_like(pcdr), None


class SelectiveSpectralDecay:
    """Selective Spectral Decay as Algorithm 1 prints it, attached to an optimizer by its step hook.

    Every ``refresh_every`` optimizer steps it finds the top singular triplets of each watched layer, decides by PCDR
    how many of them make the layer's outliers, and keeps them; at every step it adds their penalty to the gradient or,
    decoupled, to the weight. No matrix of a weight's size is stored: the triplets take about half a per cent of the
    parameters.

    **Where the penalty falls.** It is added inside ``optimizer.step()``, after everything a training loop does to
    gradients before that: unscaling by a ``GradScaler``, accumulation over micro-batches, averaging over ranks, and
    clipping. A clipped gradient would otherwise lend the penalty its limit, and the strength of the decay would depend
    on the size of the task gradient, which Algorithm 1 (line 20) does not intend. A step that a ``GradScaler`` skips
    is skipped here too. ``optimizer.step(closure)`` works: the penalty is added each time the closure has run.

    **Under Adam.** The paper adds the penalty to the gradient, so Adam rescales it entry by entry, and its cached form
    goes on pushing along a component that is already gone. With ``criterion="all", k_max=None, coefficients="live",
    coupling="decoupled"`` (decoupled spectral decay, not in the paper) a component shrinks by ``lr * lam *
    sigma**power`` a step whatever Adam does; notebook 07 compares the two. It needs every triplet: a smaller ``k_max``
    bounds the memory. Choose ``lam`` anew (0.1 there), and leave the optimizer some weight decay for the rest. There a
    plain cap (:class:`s2d.cap.SpectralNormCap`) does better still.

    **Many processes.** With ``torch.distributed`` every rank builds and attaches this in the same way. Outliers are
    merged over ranks, the layers of a refresh are shared out over them, and all ranks apply the same penalty, each to
    its own shard of weights that are ``DTensor`` (FSDP2, tensor parallelism).

    Args:
        model: the model in training, before or after wrapping by DDP, ``torch.compile`` or ``fully_shard``.
        lam: strength (the paper's lambda), dimensionless.
        power: exponent n; 2 gives a sigma^3 penalty.
        tau: PCDR threshold in (0, 1].
        k_max: how many top components are considered; None means every component.
        refresh_every: optimizer steps between refreshes.
        criterion: ``"activation"`` (PCDR at the outlier activations of the training forward passes themselves),
            ``"spectral"`` (share of squared spectral mass) or ``"all"`` (no selection: k_max components of every
            layer).
        coefficients: ``"cached"`` singular values of the last refresh, as in the paper, or ``"live"``: re-read each
            step along the cached vectors, ``max(u^T W v, 0)``, so a component that is gone is no longer pushed.
        coupling: ``"gradient"`` as in the paper, so AdamW normalises the penalty with the gradient, or ``"decoupled"``:
            subtracted from the weight times the learning rate, as AdamW does with weight decay, but never past zero.
        include, exclude: see :func:`s2d.layers.linear_maps`.
        outliers: how many outlier activations a layer keeps for a refresh.
        process_group: the ranks that train this model together: ``"world"`` (all, when there are several), a group, or
            None for no exchange.

    Raises:
        ValueError: for a hyper-parameter out of range or a model without linear layers.

    Example:
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
        >>> optimizer = torch.optim.AdamW(model.parameters())
        >>> decay = SelectiveSpectralDecay(model, lam=5e-4, power=2, tau=0.95, k_max=2, refresh_every=100)
        >>> decay.attach(optimizer)
        >>> model(torch.randn(3, 4)).sum().backward()
        >>> optimizer.step()
        >>> [row["layer"] for row in decay.report()]
        ['0', '2']

    Paper: Algorithm 1; defaults from Table 10, G.1 and (lam, second-hand) the main text.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        *,
        lam: float = 5e-4,
        power: float = 2,
        tau: float = 0.95,
        k_max: int | None = 3,
        refresh_every: int = 100,
        criterion: Literal["activation", "spectral", "all"] = "activation",
        coefficients: Literal["cached", "live"] = "cached",
        coupling: Literal["gradient", "decoupled"] = "gradient",
        include: Selector | None = None,
        exclude: Selector = (),
        outliers: int = 16,
        process_group: dist.ProcessGroup | Literal["world"] | None = "world",
    ) -> None:
        _check_number("lam", lam, lambda value: value >= 0, "it must be finite and not negative")
        _check_number("power", power, lambda value: value > 0, "it must be positive; 2 is the paper's, 1 is plain L2")
        _check_number("tau", tau, lambda value: 0 < value <= 1, "a dominance ratio lies in (0, 1]")
        _check_count("k_max", k_max, "give a positive integer, or None for every component", optional=True)
        _check_count("refresh_every", refresh_every, "give a positive number of steps")
        _check_count("outliers", outliers, "keep at least one")
        for value, name, known in (
            (criterion, "criterion", CRITERIA),
            (coefficients, "coefficients", COEFFICIENTS),
            (coupling, "coupling", COUPLINGS),
        ):
            if value not in known:
                raise ValueError(f"{name} is {value!r}: choose one of {', '.join(known)}")
        maps = linear_maps(model, include=include, exclude=exclude)
        for name, linear in maps.items():
            if k_max is not None and k_max > min(linear.shape):
                raise ValueError(
                    f"k_max is {k_max}, but layer {name} has shape {linear.shape}: "
                    f"lower k_max to {min(linear.shape)} or leave the layer out with exclude={name!r}"
                )
            if criterion == "activation" and isinstance(linear.module, CONVOLUTIONS):
                raise ValueError(
                    f"layer {name} is a convolution, for which criterion='activation' is not defined: use 'spectral' "
                    f"or 'all', or leave it out with exclude={name!r}"
                )
        distributed.resolve_group(process_group)
        self.lam, self.power, self.tau, self.k_max = lam, power, tau, k_max
        self.refresh_every, self.criterion = refresh_every, criterion
        self.coefficients, self.coupling = coefficients, coupling
        self.process_group = process_group
        self.steps = 0
        self.refresh_seconds = 0.0
        self._watched = {name: _WatchedLayer(linear) for name, linear in maps.items()}
        self._watch = OutlierWatch({name: modules_sharing(model, linear) for name, linear in maps.items()}, outliers)
        self._warned = False
        self._stepping: dict[int, FrameType] = {}  # the call of step() that is under way, by optimizer
        self._optimizers: list[torch.optim.Optimizer] = []
        self._handles: list[Any] = []

    @property
    def layers(self) -> dict[str, LinearMap]:
        """The watched linear maps by name."""
        return {name: watched.linear for name, watched in self._watched.items()}

    def __repr__(self) -> str:
        """The settings and the watched layers, one a line."""
        settings = ("lam", "power", "tau", "k_max", "refresh_every", "criterion", "coefficients", "coupling")
        lines = [f"SelectiveSpectralDecay({', '.join(f'{name}={getattr(self, name)!r}' for name in settings)})"]
        for name, watched in self._watched.items():
            linear = watched.linear
            frozen = "" if linear.weight.requires_grad else ", frozen"
            lines.append(f"  {name or '(model)'}: {type(linear.module).__name__} {linear.shape}{frozen}")
        return "\n".join(lines)

    # --- life in a training loop ------------------------------------------------------------------------------------

    def attach(self, *optimizers: torch.optim.Optimizer) -> None:
        """Hook into the step of the optimizer; from here on training needs no further call.

        Args:
            optimizers: usually one. Several (Muon for matrices, AdamW for the rest) in the order in which they step:
                the first one's step is what ``refresh_every`` counts.

        Raises:
            ValueError: if the optimizers do not own every watched weight that is trained, or this is attached already;
                on all ranks, if they watch different layers.
        """
        if self._handles:
            raise ValueError("already attached: call detach() first")
        self._optimizers = [_unwrap(optimizer) for optimizer in optimizers]
        foreign = self._find_owners()
        error = None
        if foreign or not optimizers:
            error = ValueError(
                f"the optimizer does not own the weights of {len(foreign)} of {len(self._watched)} watched layers "
                f"({', '.join(foreign[:3])}{', ...' if len(foreign) > 3 else ''}): build it from model.parameters() "
                "after wrapping the model, freeze those layers with requires_grad_(False), or leave them out with "
                "exclude="
            )
        distributed.raise_together(error, self._group(), what="attach()")
        distributed.check_same_layers(self.layers, self._group())
        for optimizer in self._optimizers:
            self._handles.append(optimizer.register_step_pre_hook(self._before_step))
            self._handles.append(optimizer.register_step_post_hook(self._after_step))
        if self.criterion == "activation":
            self._watch.attach()
        self._set_steps(self.steps)

    def detach(self) -> None:
        """Remove every hook; the model and the optimizer are then as they were."""
        while self._handles:
            self._handles.pop().remove()
        self._watch.detach()
        self._watch.clear()

    def _find_owners(self) -> list[str]:
        """Note which optimizer owns which weight; the names of trained weights that none owns."""
        owner = {
            id(parameter): optimizer
            for optimizer in self._optimizers
            for group in optimizer.param_groups
            for parameter in group["params"]
        }
        for watched in self._watched.values():
            watched.optimizer = owner.get(id(watched.linear.weight))
        return [n for n, w in self._watched.items() if w.optimizer is None and w.linear.weight.requires_grad]

    def _set_steps(self, steps: int) -> None:
        """Count, and watch the forward passes of the steps that refresh."""
        self.steps = steps
        if self._handles and self.criterion == "activation" and steps % self.refresh_every == 0:
            self._watch.start()
        else:
            self._watch.active = False

    def _group(self) -> dist.ProcessGroup | None:
        return distributed.resolve_group(self.process_group)

    def _before_step(self, optimizer: torch.optim.Optimizer, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        """The optimizer's hook: Algorithm 1, lines 6 to 20, between ``backward()`` and the update."""
        if self._is_nested(optimizer):  # a step that calls its base class's step runs the hooks again
            return None
        self._stepping[id(optimizer)] = sys._getframe(1)
        closure = args[1] if len(args) > 1 else kwargs.get("closure")
        if closure is None:
            self._step(optimizer, first=True)
            return None
        calls = 0

        def closure_with_penalty():
            nonlocal calls
            watching = self._watch.active
            self._watch.active = watching and calls == 0  # later calls are no forward pass of the next step
            try:
                loss = closure()  # computes the gradient anew, so the penalty has to follow it
            finally:
                self._watch.active = watching
            self._step(optimizer, first=calls == 0)
            calls += 1
            return loss

        return args[:1], {**kwargs, "closure": closure_with_penalty}

    def _after_step(self, optimizer: torch.optim.Optimizer, args: tuple, kwargs: dict) -> None:
        self._stepping.pop(id(optimizer), None)

    def _is_nested(self, optimizer: torch.optim.Optimizer) -> bool:
        """Whether a step of this optimizer is under way that we know of; one that raised is no longer on the stack."""
        outer, frame = self._stepping.get(id(optimizer)), sys._getframe()
        while outer is not None and frame is not None:
            if frame is outer:
                return True
            frame = frame.f_back
        return False

    @torch.no_grad()
    def _step(self, optimizer: torch.optim.Optimizer, *, first: bool) -> None:
        # GradScaler leaves these two on a fused optimizer, which unscales inside its own step.
        if getattr(optimizer, "found_inf", None) is not None and float(optimizer.found_inf):
            return  # the optimizer will skip this step, and so do we
        scale = getattr(optimizer, "grad_scale", None)
        leads = optimizer is self._optimizers[0] and first
        with torch.autocast(self._device().type, enabled=False):
            if leads and self.steps % self.refresh_every == 0:
                self._find_owners()
                self._refresh([watched.linear.weight.grad is not None for watched in self._watched.values()])
            self._apply(optimizer, 1.0 if scale is None else float(scale))
        if leads:
            self._set_steps(self.steps + 1)

    # --- the penalty ------------------------------------------------------------------------------------------------

    def _apply(self, optimizer: torch.optim.Optimizer, grad_scale: float) -> None:
        """Add the penalty to this rank's part of every selected weight that this optimizer owns."""
        chosen = [
            watched
            for watched in self._watched.values()
            # a frozen or unused layer, without gradient, stays as it is
            if watched.rank and watched.optimizer is optimizer and watched.linear.weight.grad is not None
        ]
        values = self._live_values(chosen) if self.coefficients == "live" else [w.selected().s for w in chosen]
        groups = {id(p): group for group in optimizer.param_groups for p in group["params"]}
        for watched, s in zip(chosen, values, strict=True):
            weight = watched.linear.weight
            group = groups[id(weight)]
            if self.coupling == "gradient":
                # It may have to be summed over ranks first, in which those with an empty block take part.
                target = distributed.gradient(weight)
                # An optimizer that maximizes turns the gradient around, the penalty in it too, which has to shrink.
                sign = -1.0 if group.get("maximize", False) else 1.0
                coefficients, scale = s**self.power, sign * self.lam * grad_scale
            else:
                # More than the whole component would turn its sign and start it growing again.
                left = s if self.coefficients == "live" else s - watched.spent[: watched.rank]
                coefficients = (float(group["lr"]) * self.lam * s**self.power).minimum(left)
                watched.spent[: watched.rank] += coefficients
                target, scale = weight, -1.0
            block, u, v = watched.local_factors()
            if not block.empty:
                part = block.view(distributed.local(target))
                add_spectral_penalty_(part, SingularTriplets(u, s, v), coefficients, scale=scale)

    @staticmethod
    def _live_values(chosen: list[_WatchedLayer]) -> list[Tensor]:
        """``u_r^T W v_r`` along the cached vectors; a component that has gone through zero is left alone."""
        parts = []
        for watched in chosen:
            weight = watched.linear.weight
            block, u, v = watched.local_factors()
            image = block.view(distributed.local(weight.detach())).to(v.dtype) @ v
            parts.append((weight, (u * image).sum(dim=0)))
        return [value.clamp(min=0) for value in distributed.sum_over_shards(parts)]

    # --- the refresh ------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def refresh(self) -> None:
        """Find the triplets and the outlier rank of every layer anew (Algorithm 1, lines 7 to 16).

        Called by itself every ``refresh_every`` steps. With several ranks it is collective, and an error on one rank
        is raised on all.

        Raises:
            ValueError: if a weight is not finite.
            RuntimeError: if the activation criterion has seen no forward pass to look at, or another rank failed.
        """
        self._refresh([True] * len(self._watched))

    def _refresh(self, active: list[bool]) -> None:
        """Refresh the layers that are active on any rank; the others are not penalised until the next refresh."""
        began = time.perf_counter()
        group = self._group()
        active = distributed.any_rank(active, self._device(), group)
        chosen = {name: w for (name, w), on in zip(self._watched.items(), active, strict=True) if on}
        try:
            if chosen and self.criterion == "activation":
                self._gather_outliers(chosen, group)
            found, error = self._solve(chosen, group)
            distributed.raise_together(error, group)
            if self.criterion == "activation":
                self._check_seen(chosen)
            self._share(chosen, found, group)
            for name in self._watched.keys() - chosen.keys():
                self._watched[name].rank = 0
        finally:  # after a failure too: merged once, the rows would count once for each rank the next time
            self._watch.clear()
        self.refresh_seconds = time.perf_counter() - began

    def _device(self) -> torch.device:
        return distributed.local(next(iter(self._watched.values())).linear.weight).device

    def _gather_outliers(self, chosen: dict[str, _WatchedLayer], group: dist.ProcessGroup | None) -> None:
        rows = [(self._watch.rows[name], watched.linear.shape[1]) for name, watched in chosen.items()]
        if group is not None:
            distributed.merge_outliers(rows, self._device(), group)

    def _check_seen(self, chosen: dict[str, _WatchedLayer]) -> None:
        """Whether the activation criterion had something to look at, in all layers or at least in one."""
        unseen = [name for name in chosen if not len(self._watch.rows[name])]
        if unseen and len(unseen) == len(chosen):
            raise RuntimeError(
                "criterion='activation' needs the forward pass of this training step, and saw none with gradients "
                "enabled and finite activations: call attach() before the forward pass, or use criterion='spectral'"
            )
        if unseen and not self._warned:
            self._warned = True
            warnings.warn(
                f"{len(unseen)} of {len(chosen)} layers have a gradient but were never called "
                f"({', '.join(unseen[:3])}{', ...' if len(unseen) > 3 else ''}): another module reads their weight, so "
                "criterion='activation' leaves them alone; use criterion='spectral' or exclude= them",
                stacklevel=2,
            )

    def _solve(
        self, chosen: dict[str, _WatchedLayer], group: dist.ProcessGroup | None
    ) -> tuple[dict[str, tuple[SolvedTriplets, Tensor, float]], Exception | None]:
        """Triplets, PCDR and seconds of the layers that fall to this rank, and what went wrong with them."""
        ranks = 1 if group is None else dist.get_world_size(group)
        rank = 0 if group is None else dist.get_rank(group)
        owners = distributed.share_out([math.prod(watched.linear.shape) for watched in chosen.values()], ranks)
        found: dict[str, tuple[SolvedTriplets, Tensor, float]] = {}
        error: Exception | None = None
        for members in self._rounds(list(chosen), owners, ranks):
            own: dict[str, Tensor] = {}
            for name in members:
                weight = distributed.whole(chosen[name].linear.weight)  # collective if sharded, so on every rank
                if owners[list(chosen).index(name)] == rank:
                    own[name] = chosen[name].linear.matrix(weight)
            if error is None:
                try:
                    found |= self._solve_own(own)
                except Exception as problem:  # whatever it is, the other ranks must not wait for this one
                    error = problem
        return found, error

    def _rounds(self, names: list[str], owners: list[int], ranks: int) -> Iterable[list[str]]:
        """Layers to put together at a time: of sharded ones, one for each rank, which bounds the memory."""
        if not any(distributed.is_dtensor(self._watched[name].linear.weight) for name in names):
            yield names
            return
        queues = [[name for name, owner in zip(names, owners, strict=True) if owner == rank] for rank in range(ranks)]
        for turn in range(max(map(len, queues), default=0)):
            yield [queue[turn] for queue in queues if turn < len(queue)]

    def _solve_own(self, own: dict[str, Tensor]) -> dict[str, tuple[SolvedTriplets, Tensor, float]]:
        kinds: dict[tuple, list[str]] = {}
        for name, matrix in own.items():
            kinds.setdefault((tuple(matrix.shape), matrix.dtype, matrix.device), []).append(name)
        found = {}
        for (shape, _, _), names in kinds.items():
            began = time.perf_counter()
            k = min(shape) if self.k_max is None else self.k_max
            warm = [self._watched[name].triplets for name in names]
            try:
                solved = solve_top_triplets([own[n] for n in names], k, warm_starts=warm, tol=REFRESH_TOL)
                pcdr = [self._pcdr(n, own[n], s.triplets, k) for n, s in zip(names, solved, strict=True)]
            except ValueError as error:
                raise ValueError(f"among the layers {', '.join(names)}: {error}") from error
            seconds = (time.perf_counter() - began) / len(names)
            found |= {name: (s, p, seconds) for name, s, p in zip(names, solved, pcdr, strict=True)}
        return found

    def _pcdr(self, name: str, matrix: Tensor, triplets: SingularTriplets, k: int) -> Tensor:
        if self.criterion == "all":
            return triplets.s.new_ones(k)
        if self.criterion == "spectral":
            return spectral_pcdr(matrix, k_max=k, triplets=triplets)
        rows = self._watch.rows[name]
        if not len(rows):  # a layer that took no part in this step's forward passes shows no outlier
            return triplets.s.new_zeros(k)
        return layer_pcdr(activation_pcdr(matrix, rows.x, rows.neuron, k_max=k, triplets=triplets))

    def _share(
        self,
        chosen: dict[str, _WatchedLayer],
        found: dict[str, tuple[SolvedTriplets, Tensor, float]],
        group: dist.ProcessGroup | None,
    ) -> None:
        """Give every rank what each found. Zeros elsewhere and a sum: x + 0 is exact, so all ranks hold equal bits."""
        results = {}
        for name, watched in chosen.items():
            if name in found:
                (triplets, error, _, full_svd), pcdr, seconds = found[name]
                info = torch.tensor([error, float(full_svd), seconds], dtype=torch.float64, device=pcdr.device)
                results[name] = (*triplets, pcdr, info)
            else:
                results[name] = self._empty_result(watched)
        if group is not None:
            distributed.sum_over_ranks([tensor for result in results.values() for tensor in result], group)
        for name, (u, s, v, pcdr, info) in results.items():
            rank = len(s) if self.criterion == "all" else outlier_rank(pcdr, self.tau) or 0
            chosen[name].set(SingularTriplets(u, s, v), pcdr, info, rank)

    def _empty_result(self, watched: _WatchedLayer) -> tuple[Tensor, ...]:
        m, n = watched.linear.shape
        k = min(m, n) if self.k_max is None else self.k_max
        like = distributed.local(watched.linear.weight.detach())
        dtype = torch.float64 if like.dtype == torch.float64 else torch.float32
        parts = [torch.zeros(size, dtype=dtype, device=like.device) for size in ((m, k), (k,), (n, k), (k,))]
        return *parts, torch.zeros(3, dtype=torch.float64, device=like.device)

    # --- looking at it ----------------------------------------------------------------------------------------------

    def penalty(self) -> float:
        """The value of the penalty over all layers, at the singular values of the last refresh."""
        selected = [w.selected().s for w in self._watched.values() if w.rank]
        return sum(float(spectral_penalty(s, lam=self.lam, power=self.power)) for s in selected)

    def report(self) -> list[dict[str, Any]]:
        """What the last refresh found, one row a layer: ``pandas.DataFrame(decay.report())`` is a tidy table.

        Returns:
            Rows with layer, rank (0 where nothing is penalised), pcdr_1.., sigma_1.., penalty (the value),
            penalty_norm (Frobenius norm of what is added to the gradient), error (guaranteed bound on the error of the
            singular values), full_svd (whether the iteration gave up), refresh_seconds.
        """
        rows = []
        for name, w in self._watched.items():
            if w.triplets is None:
                continue
            s = w.selected().s
            row: dict[str, Any] = {"layer": name, "rank": w.rank}
            row |= {f"pcdr_{k}": value for k, value in enumerate(w.pcdr.tolist(), start=1)}
            row |= {f"sigma_{k}": value for k, value in enumerate(w.triplets.s.tolist(), start=1)}
            row["penalty"] = float(spectral_penalty(s, lam=self.lam, power=self.power))
            row["penalty_norm"] = self.lam * float(torch.linalg.vector_norm(s**self.power))
            error, full_svd, seconds = w.info.tolist()
            row |= {"error": error, "full_svd": bool(full_svd), "refresh_seconds": seconds}
            rows.append(row)
        return rows

    def metrics(self) -> dict[str, float]:
        """A few numbers for a logger, from the last refresh.

        Example:
            >>> decay = SelectiveSpectralDecay(torch.nn.Linear(2, 2), criterion="all", k_max=1)
            >>> decay.refresh()
            >>> decay.metrics()["s2d/layers"]
            1.0
        """
        rows = self.report()
        return {
            "s2d/layers": float(sum(row["rank"] > 0 for row in rows)),
            "s2d/components": float(sum(row["rank"] for row in rows)),
            "s2d/penalty": sum(row["penalty"] for row in rows),
            "s2d/penalty_norm": math.sqrt(sum(row["penalty_norm"] ** 2 for row in rows)),
            "s2d/sigma_1_max": max((row["sigma_1"] for row in rows), default=0.0),
            "s2d/refresh_seconds": self.refresh_seconds,
            "s2d/full_svds": float(sum(row["full_svd"] for row in rows)),
        }

    def summary(self) -> str:
        """The metrics as one line."""
        m = self.metrics()
        return (
            f"S2D step {self.steps}: {m['s2d/components']:.0f} components in {m['s2d/layers']:.0f} of "
            f"{len(self._watched)} layers, penalty {m['s2d/penalty']:.3g}, largest sigma {m['s2d/sigma_1_max']:.3g}, "
            f"refresh {m['s2d/refresh_seconds']:.2f} s ({m['s2d/full_svds']:.0f} full SVDs)"
        )

    @torch.no_grad()
    def cached_similarity(self) -> dict[str, float]:
        """G.2's diagnostic: cosine similarity of the cached penalty and one computed now, by penalised layer.

        The components are those the last refresh selected. With sharded weights it is collective.

        Example:
            >>> decay = SelectiveSpectralDecay(torch.nn.Linear(2, 2), criterion="all", k_max=1)
            >>> decay.refresh()
            >>> round(decay.cached_similarity()[""], 4)
            1.0

        Paper: appendix G.2 ("above 0.99" over an interval of 100 steps).
        """
        similarity = {}
        for name, w in self._watched.items():
            if w.rank:
                matrix = w.linear.matrix(distributed.whole(w.linear.weight))
                fresh = solve_top_triplets([matrix], w.rank, warm_starts=[w.selected()], tol=REFRESH_TOL)[0].triplets
                similarity[name] = penalty_cosine(w.selected(), fresh, power=self.power)
        return similarity

    # --- state ------------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Tensor]:
        """Everything a resumed run needs, as plain tensors (safetensors can store them); the same on every rank."""
        state = {"steps": torch.tensor(self.steps)}
        for name, w in self._watched.items():
            state[f"{name}.rank"] = torch.tensor(w.rank)
            if w.triplets is not None:  # a layer that was frozen so far has none
                # Clones: a state that shared memory with the run would change under the reader's hands.
                state |= {f"{name}.{field}": getattr(w.triplets, field).clone() for field in ("u", "s", "v")}
                state |= {f"{name}.{field}": getattr(w, field).clone() for field in ("pcdr", "info", "spent")}
                state[f"{name}.info"][2] = 0  # the time it took is no part of where the run stands
        return state

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Continue where :meth:`state_dict` was taken.

        Raises:
            ValueError: if the state is of other layers, other shapes or another k_max, or holds a rank that a layer
                cannot have; nothing is changed then.
        """
        names = {key.rpartition(".")[0] for key in state if key != "steps"}
        if "steps" not in state or names != set(self._watched):
            strange = sorted(names ^ set(self._watched))[:3]
            raise ValueError(
                f"the state is of another model or another choice of layers: {', '.join(strange) or 'no steps'}"
            )
        for name in names:
            given = [state[f"{name}.{field}"].shape for field in FIELDS if f"{name}.{field}" in state]
            given = given if not given or f"{name}.spent" in state else given[:-1]
            expected = [tensor.shape for tensor in self._empty_result(self._watched[name])]
            if f"{name}.rank" not in state or len(given) not in (0, len(FIELDS)):
                raise ValueError(f"the state of layer {name} was cut short: it lacks one of rank, {', '.join(FIELDS)}")
            if given and given != expected:
                raise ValueError(
                    f"layer {name} is {self._watched[name].linear.shape} with k_max={self.k_max} here, but the state "
                    f"has u {tuple(given[0])} and v {tuple(given[2])}"
                )
            rank, most = state[f"{name}.rank"].tolist(), len(state[f"{name}.s"]) if given else 0
            if rank not in range(most + 1):
                raise ValueError(
                    f"layer {name} has rank {rank} in the state, which holds {most} triplets of it, so that only 0 to "
                    f"{most} are possible: load the state_dict() of a run, unchanged"
                )
        self._set_steps(int(state["steps"]))
        for name, w in self._watched.items():
            w.triplets, w.rank = None, 0
            if f"{name}.u" in state:
                like = self._empty_result(w)
                u, s, v, pcdr, info = (
                    state[f"{name}.{field}"].clone().to(tensor) for field, tensor in zip(FIELDS, like, strict=True)
                )
                w.set(SingularTriplets(u, s, v), pcdr, info, int(state[f"{name}.rank"]))
                w.spent = state[f"{name}.spent"].clone().to(pcdr)


def _unwrap(optimizer: Any) -> torch.optim.Optimizer:
    """The torch optimizer inside the wrappers of accelerate, Lightning and timm, whose step calls its step."""
    for attribute in ("optimizer", "_base_optimizer"):
        inner = getattr(optimizer, attribute, None)
        if isinstance(inner, torch.optim.Optimizer):
            return _unwrap(inner)
    # torch marks the step methods whose hooks it runs; a class that skips Optimizer.__init__ would never call ours.
    if not isinstance(optimizer, torch.optim.Optimizer) or not getattr(type(optimizer).step, "hooked", False):
        raise ValueError(
            f"attach() was given {type(optimizer).__name__}, which does not run step hooks: give the torch optimizer "
            "inside it"
        )
    return optimizer


def _check_number(name: str, value: Any, accept: Callable[[float], bool], repair: str) -> None:
    if isinstance(value, bool) or not isinstance(value, Real) or not math.isfinite(value) or not accept(value):
        raise ValueError(f"{name} is {value!r}: {repair}")


def _check_count(name: str, value: Any, repair: str, *, optional: bool = False) -> None:
    if optional and value is None:
        return
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{name} is {value!r}: {repair}")
