r"""Selective Spectral Decay: Algorithm 1, for any training loop, on one process or many.

The penalty on one layer, over its selected components, and its gradient are

.. math:: L = \frac{\lambda}{n+1} \sum_{i \le \hat k} \sigma_i^{n+1}, \qquad
          \nabla_W L = \lambda\, U_{\hat k}\, \mathrm{diag}(\sigma_1^n, \dots, \sigma_{\hat k}^n)\, V_{\hat k}^\top .

The literal transcription, with dense penalty matrices and full SVDs, is :class:`s2d.reference.LiteralAlgorithm1`.
"""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from s2d import distributed
from s2d.attachment import Attached, Attachment, along
from s2d.checks import check_count, check_number, check_steps, check_tensor
from s2d.layers import CONVOLUTIONS, LinearMap, Selector, linear_maps, modules_sharing
from s2d.pcdr import TOLERANCE, activation_pcdr, layer_pcdr, outlier_rank, spectral_pcdr
from s2d.rounding import is_low_precision, round_stochastically, seeded
from s2d.spectral import FULL_SVD_BELOW, SingularTriplets, check_triplets, solve_top_triplets, top_mass_bound
from s2d.stepping import check_rate
from s2d.watch import OutlierWatch

CRITERIA = ("activation", "spectral", "all")
COEFFICIENTS = ("cached", "live")
COUPLINGS = ("gradient", "decoupled")
FIELDS = ("u", "s", "v", "pcdr", "info")  # what a layer keeps between refreshes, beside its rank
REFRESH_TOL = 5e-5  # residual of the triplets relative to s_1; the penalty is then right to about 1e-4
ITERATED, FULL_SVD, CERTIFIED = 0.0, 1.0, 2.0  # how a layer was decided, as its info has it
# Rows of a block from which a bound certifies that a layer is left alone: at least, and at most.
CERTIFYING_ROWS = (16, 128)
CERTAIN = 1e-4  # for each component; more than the rounding of the singular values makes of a PCDR


def spectral_penalty(s: Tensor, *, lam: float, power: float = 2) -> Tensor:
    r"""The value of the penalty for given singular values.

    .. math:: L = \frac{\lambda}{n+1} \sum_i \sigma_i^{n+1}

    Args:
        s: ``(k,)`` the selected singular values.
        lam: strength, dimensionless.
        power: the exponent n.

    Raises:
        ValueError: for anything but a vector, or a number out of range.

    Example:
        >>> spectral_penalty(torch.tensor([3.0]), lam=1.0, power=2)
        tensor(9.)

    Paper: Algorithm 1 and G.1 ("yielding a sigma^3 penalty").
    """
    check_tensor("s", s, "give the selected singular values, a floating-point tensor (k,)", ndim=1, finite=True)
    check_strength(lam, power)
    return lam / (power + 1) * (s ** (power + 1)).sum()


def check_strength(lam: Any, power: Any) -> None:
    """Raise ValueError unless these are a strength and an exponent of the penalty.

    Example:
        >>> check_strength(5e-4, 2)

    Paper: none.
    """
    check_number("lam", lam, lambda value: value >= 0, "it must be finite and not negative")
    check_number("power", power, lambda value: value > 0, "it must be positive; 2 is the paper's, 1 is plain L2")


@torch.no_grad()
def add_spectral_penalty_(target: Tensor, triplets: SingularTriplets, coefficients: Tensor, *, scale: float) -> Tensor:
    r"""Add ``scale * U diag(coefficients) V^T`` to a gradient or a weight, in place, without forming it.

    Args:
        target: ``(out_features, in_features)``.
        triplets: whose ``u`` and ``v`` are used.
        coefficients: ``(k,)``, for the gradient of the penalty ``s ** power``.
        scale: ``lam`` for a gradient, ``-lr * lam`` for a weight.

    Returns:
        ``target``.

    Raises:
        ValueError: for a target, triplets or coefficients whose shapes do not fit, and a scale that is no number.

    Example:
        >>> t = SingularTriplets(torch.tensor([[1.0], [0.0]]), torch.tensor([2.0]), torch.tensor([[0.0], [1.0]]))
        >>> add_spectral_penalty_(torch.zeros(2, 2), t, t.s**2, scale=0.25)
        tensor([[0., 1.],
                [0., 0.]])

    Paper: Algorithm 1, lines 12 and 20. Cost: O(m n k).
    """
    check_tensor("target", target, "give a floating-point matrix (out_features, in_features)", ndim=2)
    check_triplets(triplets, target.shape)
    check_tensor("coefficients", coefficients, "give one number for each triplet, a tensor (k,)", ndim=1, finite=True)
    if len(coefficients) != len(triplets.s):
        raise ValueError(
            f"coefficients holds {len(coefficients)} numbers for {len(triplets.s)} triplets: give one each"
        )
    scale = check_number("scale", scale, lambda value: True, "give a finite number")
    return _add_low_rank_(target, triplets, coefficients, scale)


def _add_low_rank_(target: Tensor, triplets: SingularTriplets, coefficients: Tensor, scale: float) -> Tensor:
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

    Raises:
        ValueError: for triplets of weights of two shapes, or a number out of range.

    Example:
        >>> t = SingularTriplets(torch.eye(2), torch.tensor([2.0, 1.0]), torch.eye(2))
        >>> penalty_cosine(t, t)
        1.0

    Paper: appendix G.2.
    """
    check_triplets(a, name="a")
    check_triplets(b, (len(a.u), len(a.v)), name="b")
    check_strength(0, power)
    if rank is not None:
        rank = check_count("rank", rank, "give a positive integer, or None for every component")
        if rank > min(len(a.s), len(b.s)):
            raise ValueError(
                f"rank is {rank}, but there are {len(a.s)} and {len(b.s)} triplets: give no more than both"
            )
    u_a, s_a, v_a = (part[..., :rank].double() for part in a)
    u_b, s_b, v_b = (part[..., :rank].double() for part in b)
    c_a, c_b = s_a**power, s_b**power
    norm_a, norm_b = torch.linalg.vector_norm(c_a), torch.linalg.vector_norm(c_b)
    if norm_a == 0 or norm_b == 0:
        return float(norm_a == norm_b)
    overlap = (u_a.T @ u_b) * (v_a.T @ v_b)
    return max(-1.0, min(1.0, float((c_a / norm_a) @ overlap @ (c_b / norm_b))))


class _Found(NamedTuple):
    """What a refresh found out about one layer."""

    triplets: SingularTriplets
    pcdr: Tensor
    error: float
    how: float  # ITERATED, FULL_SVD or CERTIFIED
    seconds: float


class _WatchedLayer:
    """One layer: what the last refresh left behind."""

    def __init__(self, linear: LinearMap) -> None:
        self.linear = linear
        self.triplets: SingularTriplets | None = None
        self.pcdr: Tensor | None = None
        self.rank = 0  # how many components are penalised
        self.spent: Tensor | None = None  # how much decoupled decay has taken off each component since
        self.owed: Tensor | None = None  # what rounding kept back of the decay of a half-precision weight, likewise
        self.info: Tensor | None = None  # error, how it was decided, seconds
        self._factors: tuple[distributed.Block, Tensor, Tensor] | None = None

    def selected(self) -> SingularTriplets:
        """The penalised triplets."""
        assert self.triplets is not None  # there was a refresh
        return SingularTriplets(*(part[..., : self.rank] for part in self.triplets))

    def local_factors(self) -> tuple[distributed.Block, Tensor, Tensor]:
        """This rank's block of the matrix, and the rows of the selected U and V that meet it."""
        if self._factors is None:
            block, selected = distributed.local_block(self.linear), self.selected()
            self._factors = block, selected.u[block.rows], selected.v[block.columns]
        return self._factors

    def set(self, triplets: SingularTriplets, pcdr: Tensor, info: Tensor, rank: int) -> None:
        """What a refresh found."""
        old = self.triplets
        if self.owed is not None and old is not None:  # along the new components
            self.owed = ((triplets.u.T @ old.u) * (triplets.v.T @ old.v)) @ self.owed
        self.triplets, self.pcdr, self.info, self.rank = triplets, pcdr, info, rank
        self.spent, self._factors = torch.zeros_like(pcdr), None


class SelectiveSpectralDecay(Attached):
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
    sigma**power`` a step whatever Adam does; notebook 12 compares the two. It needs every triplet: a smaller ``k_max``
    bounds the memory. Choose ``lam`` anew (0.1 there), and leave the optimizer some weight decay for the rest. There a
    plain cap (:class:`s2d.cap.SpectralNormCap`) does better still.

    **Half precision.** A bfloat16 or float16 weight swallows a change of less than half a unit in its last place, and
    so all of a usual decay. Decoupled decay therefore rounds at random, right in the mean, and carries over from step
    to step what was rounded too much or too little of each component. Where the optimizer keeps wider copies of the
    weights, it acts on those. Through the gradient, the penalty shares the fate of the optimizer's own update; where
    rounding swallows that, a warning says so.

    **Whether it acts.** At its first steps, in each step as far as that is cheap, and at each refresh it looks whether
    every weight is the tensor that the optimizer steps, whether the step that it is attached to runs as gradients
    arrive, whether modules were exchanged, and whether its changes survive. What fails is said once, in a warning with
    layer, cause and repair; :meth:`health` has the same as a table, and :meth:`summary` counts the layers that act.

    **What a refresh need not find.** With ``criterion="spectral"`` one pass over a large weight proves of most that no
    PCDR can reach tau (:func:`s2d.spectral.top_mass_bound`); these are left alone without a singular vector, with the
    decision that their triplets would have given. The activation criterion has no such bound: a ratio at single
    activations says nothing before the vectors are known.

    **Refresh by need.** A layer without a gradient (or, for the activation criterion, a forward pass) at a refresh,
    such as an expert that no token chose, is refreshed in the next step in which it has one.

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
        check_strength(lam, power)
        check_number("tau", tau, lambda value: 0 < value <= 1, "a dominance ratio lies in (0, 1]")
        if k_max is not None:
            k_max = check_count("k_max", k_max, "give a positive integer, or None for every component")
        refresh_every = check_count("refresh_every", refresh_every, "give a positive number of steps")
        outliers = check_count("outliers", outliers, "keep at least one")
        for value, name, known in (
            (criterion, "criterion", CRITERIA),
            (coefficients, "coefficients", COEFFICIENTS),
            (coupling, "coupling", COUPLINGS),
        ):
            if not isinstance(value, str) or value not in known:
                raise ValueError(f"{name} is {value!r}: choose one of {', '.join(known)}")
        maps = linear_maps(model, include=include, exclude=exclude)
        self.unwatched: list[str] = []
        if criterion == "activation" and include is None:
            maps, self.unwatched = _without_unseen(maps)
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
            if criterion == "activation" and linear.argument is None:
                raise ValueError(
                    f"the input of layer {name} arises inside {type(linear.module).__name__}, where "
                    "criterion='activation' does not see it: use 'spectral' or 'all', or leave it out with "
                    f"exclude={name!r}"
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
        self._due: set[str] = set()  # layers that had no gradient at the refresh, and are refreshed when they have
        self._model = model
        self._attachment = self._new_attachment()

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
        if self.unwatched:
            lines.append(
                f"  not watched: {len(self.unwatched)} matrices of experts, whose input criterion='activation' does "
                "not see (use 'spectral' or 'all')"
            )
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
        self._attachment.attach(optimizers, self._group(), needs_rate=self.coupling == "decoupled")
        self._reattached()

    def _reattached(self) -> None:
        if self.criterion == "activation":
            self._watch.attach()
        self._set_steps(self.steps)

    def detach(self) -> None:
        """Remove every hook; the model and the optimizer are then as they were."""
        self._attachment.detach()
        self._watch.detach()
        self._watch.clear()

    def _new_attachment(self) -> Attachment:
        return Attachment(
            type(self).__name__,
            self._model,
            self.layers,
            before=lambda optimizer, first: self._step(optimizer, first=first),
            around_closure=self._around_closure,
        )

    def __copy__(self) -> SelectiveSpectralDecay:
        raise ValueError(
            "copy.copy() would act twice on the same weights: use copy.deepcopy((model, optimizer, decay)), or build "
            "another SelectiveSpectralDecay and load_state_dict()"
        )

    def _set_steps(self, steps: int) -> None:
        """Count, and watch the forward passes of the steps that refresh."""
        self.steps = steps
        self._watch.active = False
        if self._attachment.attached and self.criterion == "activation":
            if steps % self.refresh_every == 0:
                self._watch.start()
            elif self._waiting():
                self._watch.start(self._waiting())

    def _waiting(self) -> list[str]:
        """Layers that are trained and wait for a gradient to be refreshed."""
        return [name for name in self._due and self._watched if name in self._due and self._is_trained(name)]

    def _is_trained(self, name: str) -> bool:
        return self._watched[name].linear.weight.requires_grad

    def _group(self) -> dist.ProcessGroup | None:
        return distributed.resolve_group(self.process_group)

    def _around_closure(self, first: bool) -> Callable[[], None]:
        """Forward passes of a later call of a closure are none of the next step; returns what ends that."""
        watching = self._watch.active
        self._watch.active = watching and first

        def end() -> None:
            self._watch.active = watching

        return end

    @torch.no_grad()
    def _step(self, optimizer: torch.optim.Optimizer, *, first: bool) -> None:
        """Algorithm 1, lines 6 to 20, between ``backward()`` and the update."""
        scale = getattr(optimizer, "grad_scale", None)  # GradScaler's, for optimizers that unscale in their own step
        leads = optimizer is self._attachment.optimizers[0] and first
        with torch.autocast(self._device().type, enabled=False):
            if leads and self.steps % self.refresh_every == 0:
                self._attachment.refresh()
                self._due = set(self._watched)
                self._refresh([self._has_gradient(name) for name in self._watched])
            elif self._waiting():
                waiting = self._waiting()
                self._refresh(
                    [n in waiting and self._owner(n) is optimizer and self._has_gradient(n) for n in self._watched]
                )
            self._apply(optimizer, 1.0 if scale is None else float(scale))
        if leads:
            self._set_steps(self.steps + 1)

    def _owner(self, name: str) -> torch.optim.Optimizer | None:
        return self._attachment.standings[name].optimizer

    def _has_gradient(self, name: str) -> bool:
        """Whether a layer's weight is in place and has a gradient."""
        weight = self._watched[name].linear.weight
        return weight.is_leaf and weight.grad is not None

    # --- the penalty ------------------------------------------------------------------------------------------------

    def _apply(self, optimizer: torch.optim.Optimizer, grad_scale: float) -> None:
        """Add the penalty to this rank's part of every selected weight that this optimizer owns."""
        chosen = {
            name: watched
            for name, watched in self._watched.items()
            # a frozen or unused layer, without gradient, stays as it is
            if watched.rank
            and self._owner(name) is optimizer
            and self._attachment.can_act(name)
            and watched.linear.weight.grad is not None
        }
        if self.coefficients == "live":
            values = self._live_values(list(chosen.values()))
        else:
            values = [watched.selected().s for watched in chosen.values()]
        applied: dict[str, tuple[Tensor, Tensor]] = {}  # of half-precision weights: what was asked for, and was done
        for (name, watched), s in zip(chosen.items(), values, strict=True):
            self._attachment.note(name)
            if self.coupling == "gradient":
                self._add_to_gradient(name, watched, s, grad_scale)
            else:
                self._take_off(name, watched, s, applied)
        self._carry_over(applied)

    def _add_to_gradient(self, name: str, watched: _WatchedLayer, s: Tensor, grad_scale: float) -> None:
        # It may have to be summed over ranks first, in which those with an empty block take part.
        target = distributed.local(distributed.gradient(watched.linear.weight))
        # An optimizer that maximizes turns the gradient around, the penalty in it too, which has to shrink.
        group = self._attachment.group_of(self._attachment.standings[name])
        scale = (-1.0 if group.get("maximize", False) else 1.0) * self.lam * grad_scale
        block, u, v = watched.local_factors()
        if block.empty:
            return
        factors, coefficients = SingularTriplets(u, s, v), s**self.power
        part = block.view(target)
        if is_low_precision(part):
            wide = _add_low_rank_(part.float(), factors, coefficients, scale)
            part.copy_(round_stochastically(wide, part.dtype, generator=self._random(name, block, part.device)))
        else:
            _add_low_rank_(part, factors, coefficients, scale)
        block.store(target, part)
        self._attachment.expect_update(name)

    def _take_off(
        self, name: str, watched: _WatchedLayer, s: Tensor, applied: dict[str, tuple[Tensor, Tensor]]
    ) -> None:
        """Decoupled decay of one weight."""
        rate = check_rate(self._attachment.group_of(self._attachment.standings[name]))
        # More than the whole component would turn its sign and start it growing again.
        assert watched.spent is not None  # as it was selected
        left = s if self.coefficients == "live" else s - watched.spent[: watched.rank]
        coefficients = (rate * self.lam * s**self.power).minimum(left)
        watched.spent[: watched.rank] += coefficients
        block, u, v = watched.local_factors()
        master = self._attachment.master_of(name)
        weight = distributed.local(watched.linear.weight)
        target = weight if master is None else master
        factors = SingularTriplets(u, s, v)
        if is_low_precision(target):
            self._take_off_rounding(name, watched, coefficients, applied)
        elif not block.empty:
            part = block.view(target)
            early = self._attachment.is_early(name)
            before = along(part, u[:, 0], v[:, 0]) if early else 0.0
            _add_low_rank_(part, factors, coefficients, -1.0)
            block.store(target, part)
            if early:
                now = along(block.view(target), u[:, 0], v[:, 0])
                self._attachment.expect_change(name, before, now, lambda: along(block.view(target), u[:, 0], v[:, 0]))

    def _take_off_rounding(
        self, name: str, watched: _WatchedLayer, coefficients: Tensor, applied: dict[str, tuple[Tensor, Tensor]]
    ) -> None:
        """Decoupled decay of a half-precision weight without a master copy: right in the mean, errors carried over.

        Rounded at random, each component shrinks by what it should, give or take; what this step took too little or too
        much is asked for again in the next.
        """
        weight = distributed.local(watched.linear.weight)
        block, u, v = watched.local_factors()
        asked = coefficients if watched.owed is None else coefficients + watched.owed[: watched.rank]
        done = torch.zeros_like(asked)
        if not block.empty:
            part = block.view(weight)
            old = part.float()
            wide = _add_low_rank_(old.clone(), SingularTriplets(u, asked, v), asked, -1.0)
            part.copy_(round_stochastically(wide, part.dtype, generator=self._random(name, block, part.device)))
            block.store(weight, part)
            done = (u * ((old - part.float()) @ v)).sum(dim=0)
        applied[name] = (asked, done)

    def _carry_over(self, applied: dict[str, tuple[Tensor, Tensor]]) -> None:
        """Note what rounding has kept back, over all shards of each weight."""
        parts = [(self._watched[name].linear.weight, done) for name, (_, done) in applied.items()]
        for (name, (asked, _)), done in zip(applied.items(), distributed.sum_over_shards(parts), strict=True):
            watched = self._watched[name]
            assert watched.spent is not None
            watched.owed = torch.zeros_like(watched.spent)
            watched.owed[: watched.rank] = asked - done

    def _random(self, name: str, block: distributed.Block, device: torch.device) -> torch.Generator:
        """Random numbers for a layer in this step, the same in a resumed run; not the training's."""
        return seeded(device, self.steps, list(self._watched).index(name), block.rows.start, block.columns.start)

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
            ValueError: if a weight is not finite, or was parametrized or pruned since.
            RuntimeError: if the activation criterion has seen no forward pass to look at, or another rank failed.
        """
        self._refresh([True] * len(self._watched), by_hand=True)

    def _refresh(self, active: list[bool], *, by_hand: bool = False) -> None:
        """Refresh the due layers that are active on any rank; the others are not penalised until they are."""
        began = time.perf_counter()
        group, everything = self._group(), by_hand or len(self._due) == len(self._watched)
        active = distributed.any_rank(active, self._device(), group)
        chosen = {name: w for (name, w), on in zip(self._watched.items(), active, strict=True) if on}
        for name in self._due - chosen.keys():
            self._watched[name].rank = 0
        if not chosen:
            return
        try:
            if self.criterion == "activation":
                self._gather_outliers(chosen, group)
                chosen = chosen if by_hand else self._without_idle(chosen, group)
            found, error = self._solve(chosen, group)
            distributed.raise_together(error, group)
            if self.criterion == "activation":
                self._check_seen(chosen, everything)
            self._share(chosen, found, group)
            self._due -= chosen.keys()
        finally:  # after a failure too: merged once, the rows would count once for each rank the next time
            self._watch.clear()
        self.refresh_seconds = time.perf_counter() - began

    def _without_idle(
        self, chosen: dict[str, _WatchedLayer], group: dist.ProcessGroup | None
    ) -> dict[str, _WatchedLayer]:
        """All but the layers that no forward pass came to and whose gradient is zero: they wait for their next use.

        Experts that no token chose are such, and whole models in the step that distributed checkpointing takes to make
        an optimizer's state.
        """
        unseen = [name for name in chosen if not len(self._watch.rows[name])]
        grads = [self._watched[name].linear.weight.grad for name in unseen]
        moved = [grad is not None and bool(distributed.local(grad).any()) for grad in grads]
        here = [self._watch.was_called(name) or on for name, on in zip(unseen, moved, strict=True)]
        used = dict(zip(unseen, distributed.any_rank(here, self._device(), group), strict=True))
        for name, on in used.items():
            self._watched[name].rank *= on
        return {name: watched for name, watched in chosen.items() if used.get(name, True)}

    def _device(self) -> torch.device:
        return distributed.local(next(iter(self._watched.values())).linear.weight).device

    def _gather_outliers(self, chosen: dict[str, _WatchedLayer], group: dist.ProcessGroup | None) -> None:
        rows = [(self._watch.rows[name], watched.linear.shape[1]) for name, watched in chosen.items()]
        if group is not None:
            distributed.merge_outliers(rows, self._device(), group)

    def _check_seen(self, chosen: dict[str, _WatchedLayer], everything: bool) -> None:
        """Whether the activation criterion had something to look at, in all layers or at least in one."""
        unseen = [name for name in chosen if not len(self._watch.rows[name])]
        if unseen and everything and len(unseen) == len(chosen):
            raise RuntimeError(
                "criterion='activation' needs the forward pass of this training step, and saw none with gradients "
                "enabled and finite activations (those inside torch.func transforms are not seen): call attach() "
                "before the forward pass, or use criterion='spectral'"
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
    ) -> tuple[dict[str, _Found], Exception | None]:
        """Triplets, PCDR and seconds of the layers that fall to this rank, and what went wrong with them."""
        ranks = 1 if group is None else dist.get_world_size(group)
        rank = 0 if group is None else dist.get_rank(group)
        owners = distributed.share_out([math.prod(watched.linear.shape) for watched in chosen.values()], ranks)
        found: dict[str, _Found] = {}
        error: Exception | None = None
        for members in self._rounds(list(chosen), owners, ranks):
            own: dict[str, Tensor] = {}
            for name in members:
                weight = distributed.whole(chosen[name].linear.weight)  # collective if sharded, so on every rank
                if owners[list(chosen).index(name)] == rank:
                    # Of a kernel that was turned to channels_last, a copy.
                    own[name] = chosen[name].linear.matrix(weight.contiguous() if weight.ndim > 3 else weight)
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

    def _solve_own(self, own: dict[str, Tensor]) -> dict[str, _Found]:
        kinds: dict[tuple[Any, ...], list[str]] = {}
        for name, matrix in own.items():
            kinds.setdefault((tuple(matrix.shape), matrix.dtype, matrix.device), []).append(name)
        found: dict[str, _Found] = {}
        for (shape, _, _), names in kinds.items():
            began = time.perf_counter()
            k = min(shape) if self.k_max is None else self.k_max
            try:
                bounds = {name: self._certificate(own[name], k) for name in names}
                rest = [name for name in names if bounds[name] is None]
                warm = [self._last_triplets(name) for name in rest]
                solved = solve_top_triplets([own[n] for n in rest], k, warm_starts=warm, tol=REFRESH_TOL)
                pcdr = [self._pcdr(n, own[n], s.triplets, k) for n, s in zip(rest, solved, strict=True)]
            except ValueError as error:
                raise ValueError(f"among the layers {', '.join(names)}: {error}") from error
            seconds = (time.perf_counter() - began) / len(names)
            for name, bound in bounds.items():
                if bound is not None:
                    # The next refresh starts from the last triplets that were found, if there are any.
                    triplets = self._last_triplets(name) or SingularTriplets(*self._empty_result(name)[:3])
                    found[name] = _Found(triplets, bound.to(triplets.s), 0.0, CERTIFIED, seconds)
            for name, solution, values in zip(rest, solved, pcdr, strict=True):
                how = FULL_SVD if solution.full_svd else ITERATED
                found[name] = _Found(solution.triplets, values, solution.error, how, seconds)
        return found

    def _certificate(self, matrix: Tensor, k: int) -> Tensor | None:
        """Upper bounds of the spectral PCDR_1 to PCDR_k, if they prove that no k reaches tau; else None.

        What the triplets would show could be above the truth by the rounding of the singular values; where it might
        matter they are found as ever, so every decision is the one that they give. Nor is it tried where a full SVD
        takes milliseconds.
        """
        least, most = CERTIFYING_ROWS
        if self.criterion != "spectral" or min(matrix.shape) < FULL_SVD_BELOW:
            return None
        # A flat spectrum has a bound of about k / rows, which has to be well below tau.
        rows = max(least, 2 ** math.ceil(math.log2(2 * k / self.tau)))
        if rows > most:
            return None
        bound = top_mass_bound(matrix, k, rows=rows)
        return bound if float(bound[-1]) + k * CERTAIN < self.tau * (1 - TOLERANCE) else None

    def _last_triplets(self, name: str) -> SingularTriplets | None:
        """Those that a refresh found last; none before that, or if all were certified."""
        triplets = self._watched[name].triplets
        info = self._watched[name].info
        certified = info is not None and float(info[1]) == CERTIFIED
        return None if triplets is None or (certified and not triplets.s.any()) else triplets

    def _pcdr(self, name: str, matrix: Tensor, triplets: SingularTriplets, k: int) -> Tensor:
        if self.criterion == "all":
            return triplets.s.new_ones(k)
        if self.criterion == "spectral":
            return spectral_pcdr(matrix, k_max=k, triplets=triplets)
        x, neuron = self._watch.rows[name].x, self._watch.rows[name].neuron
        if x is None or neuron is None:  # a layer that took no part in this step's forward passes shows no outlier
            return triplets.s.new_zeros(k)
        return layer_pcdr(activation_pcdr(matrix, x, neuron, k_max=k, triplets=triplets))

    def _share(
        self,
        chosen: dict[str, _WatchedLayer],
        found: dict[str, _Found],
        group: dist.ProcessGroup | None,
    ) -> None:
        """Give every rank what each found. Zeros elsewhere and a sum: x + 0 is exact, so all ranks hold equal bits."""
        results = {}
        for name in chosen:
            if name in found:
                triplets, pcdr, *about = found[name]
                results[name] = (*triplets, pcdr, torch.tensor(about, dtype=torch.float64, device=pcdr.device))
            else:
                results[name] = self._empty_result(name)
        if group is not None:
            distributed.sum_over_ranks([tensor for result in results.values() for tensor in result], group)
        for name, (u, s, v, pcdr, info) in results.items():
            rank = len(s) if self.criterion == "all" else outlier_rank(pcdr, self.tau) or 0
            chosen[name].set(SingularTriplets(u, s, v), pcdr, info, rank)

    def _empty_result(self, name: str) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Zeros in the place of a result: u, s, v, PCDR and info."""
        watched = self._watched[name]
        m, n = watched.linear.shape
        k = min(m, n) if self.k_max is None else self.k_max
        like = distributed.local(watched.linear.weight.detach())
        dtype = torch.float64 if like.dtype == torch.float64 else torch.float32
        u, s, v, pcdr = (torch.zeros(size, dtype=dtype, device=like.device) for size in ((m, k), (k,), (n, k), (k,)))
        return u, s, v, pcdr, torch.zeros(3, dtype=torch.float64, device=like.device)

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
            singular values), full_svd (whether the iteration gave up), certified, refresh_seconds. Of a certified layer
            (``criterion="spectral"`` alone) a bound has proved that no PCDR reaches tau: its pcdr are the bounds, and
            no singular value was computed (NaN).
        """
        rows = []
        for name, w in self._watched.items():
            if w.triplets is None or w.pcdr is None or w.info is None:
                continue
            s = w.selected().s
            row: dict[str, Any] = {"layer": name, "rank": w.rank}
            row |= {f"pcdr_{k}": value for k, value in enumerate(w.pcdr.tolist(), start=1)}
            error, how, seconds = w.info.tolist()
            certified = how == CERTIFIED
            sigma = [math.nan] * len(w.triplets.s) if certified else w.triplets.s.tolist()
            row |= {f"sigma_{k}": value for k, value in enumerate(sigma, start=1)}
            row["penalty"] = float(spectral_penalty(s, lam=self.lam, power=self.power))
            row["penalty_norm"] = self.lam * float(torch.linalg.vector_norm(s**self.power))
            row |= {"error": math.nan if certified else error, "full_svd": how == FULL_SVD, "certified": certified}
            row["refresh_seconds"] = seconds
            rows.append(row)
        return rows

    def metrics(self) -> dict[str, float]:
        """A few numbers for a logger, from the last refresh.

        The largest singular value is that of the layers whose spectrum was looked at (see :meth:`report`); NaN if none
        was.

        Example:
            >>> decay = SelectiveSpectralDecay(torch.nn.Linear(2, 2), criterion="all", k_max=1)
            >>> decay.refresh()
            >>> decay.metrics()["s2d/layers"]
            1.0
        """
        rows = self.report()
        sigma = [row["sigma_1"] for row in rows if not row["certified"]]
        return {
            "s2d/layers": float(sum(row["rank"] > 0 for row in rows)),
            "s2d/components": float(sum(row["rank"] for row in rows)),
            "s2d/penalty": sum(row["penalty"] for row in rows),
            "s2d/penalty_norm": math.sqrt(sum(row["penalty_norm"] ** 2 for row in rows)),
            "s2d/sigma_1_max": max(sigma, default=math.nan if rows else 0.0),
            "s2d/refresh_seconds": self.refresh_seconds,
            "s2d/full_svds": float(sum(row["full_svd"] for row in rows)),
            "s2d/certified": float(sum(row["certified"] for row in rows)),
        }

    def health(self) -> list[dict[str, Any]]:
        """Whether each layer was acted on in the last step, and why not: ``pandas.DataFrame(decay.health())``.

        Returns:
            Rows with layer, acts (whether it was penalised in the last step of its optimizer, with effect), steps (in
            how many it was), gradients (how many backward passes reached it), cause and repair (why it was not, and
            what to do). Parameters that may be projections and are not watched follow, each a row.

        Example:
            >>> layer = torch.nn.Linear(2, 2)
            >>> decay = SelectiveSpectralDecay(layer, criterion="all", k_max=1)
            >>> decay.health()[0]["cause"]
            'not attached'
            >>> optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
            >>> decay.attach(optimizer)
            >>> layer(torch.ones(1, 2)).sum().backward()
            >>> optimizer.step()
            >>> decay.health()[0]["acts"]
            True
        """
        rows = self._attachment.health(self._why_not)
        unseen = {
            "cause": "not watched: its input arises inside its module, where criterion='activation' does not see it",
            "repair": "use criterion='spectral' or 'all'",
        }
        return rows + [{"layer": n, "acts": False, "steps": 0, "gradients": 0} | unseen for n in self.unwatched]

    def _why_not(self, name: str) -> tuple[str, str]:
        """Why a layer that is in place was not penalised in the last step."""
        watched, standing = self._watched[name], self._attachment.standings[name]
        if not watched.linear.weight.requires_grad:
            return "frozen", "none is needed, unless it should be trained: requires_grad_(True)"
        if not standing.gradients and not watched.rank:
            return "no gradient has reached it yet", "none is needed, if it is used later"
        if name in self._due:
            return "it had no gradient or forward pass at the refresh", "none is needed: its next use refreshes it"
        if not watched.rank:
            least = f"PCDR reaches tau={self.tau} for no k up to {self.k_max}"
            return f"not selected: {least}", "none is needed; to penalise it, lower tau or raise k_max"
        return "no gradient in the last step", "none is needed, if it was not used there"

    def summary(self) -> str:
        """How many layers act, and the metrics, as one line."""
        m = self.metrics()
        sigma = "not looked at" if math.isnan(m["s2d/sigma_1_max"]) else f"{m['s2d/sigma_1_max']:.3g}"
        certified = f", {m['s2d/certified']:.0f} layers certified" if m["s2d/certified"] else ""
        return (
            f"S2D step {self.steps}: {self._attachment.acting()} of {len(self._watched)} layers act, "
            f"{m['s2d/components']:.0f} components in {m['s2d/layers']:.0f} of "
            f"{len(self._watched)} layers, penalty {m['s2d/penalty']:.3g}, largest sigma {sigma}, "
            f"refresh {m['s2d/refresh_seconds']:.2f} s ({m['s2d/full_svds']:.0f} full SVDs{certified})"
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
                matrix = w.linear.matrix(distributed.whole(w.linear.weight).contiguous())
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
                if w.owed is not None:
                    state[f"{name}.owed"] = w.owed.clone()
            if name in self._due:
                state[f"{name}.due"] = torch.tensor(1)
        return state

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Continue where :meth:`state_dict` was taken.

        Raises:
            ValueError: if the state is of other layers, other shapes or another k_max, or holds a rank that a layer
                cannot have; nothing is changed then.
        """
        if not isinstance(state, Mapping) or not all(isinstance(k, str) for k in state):
            raise ValueError(f"the state is a {type(state).__name__}: load the state_dict() of a run, unchanged")
        for key, value in state.items():
            if not isinstance(value, Tensor) or not torch.isfinite(value).all():
                raise ValueError(
                    f"the state holds no finite tensor as {key!r}: load the state_dict() of a run, unchanged"
                )
        names = {key.rpartition(".")[0] for key in state if key != "steps"}
        if "steps" not in state or names != set(self._watched):
            strange = sorted(names ^ set(self._watched))[:3]
            raise ValueError(
                f"the state is of another model or another choice of layers: {', '.join(strange) or 'no steps'}"
            )
        steps = check_steps(state["steps"])
        for name in names:
            given = [state[f"{name}.{field}"].shape for field in FIELDS if f"{name}.{field}" in state]
            given = given if not given or f"{name}.spent" in state else given[:-1]
            expected = [tensor.shape for tensor in self._empty_result(name)]
            if f"{name}.rank" not in state or len(given) not in (0, len(FIELDS)):
                raise ValueError(f"the state of layer {name} was cut short: it lacks one of rank, {', '.join(FIELDS)}")
            if given and given != expected:
                raise ValueError(
                    f"layer {name} is {self._watched[name].linear.shape} with k_max={self.k_max} here, but the state "
                    f"has u {tuple(given[0])} and v {tuple(given[2])}"
                )
            for field in ("spent", "owed"):
                if f"{name}.{field}" in state and (not given or state[f"{name}.{field}"].shape != expected[3]):
                    raise ValueError(
                        f"the state of layer {name} has {field} {tuple(state[f'{name}.{field}'].shape)} for "
                        f"{tuple(expected[3])} triplets: load the state_dict() of a run, unchanged"
                    )
            rank: Any = state[f"{name}.rank"].tolist()
            most = len(state[f"{name}.s"]) if given else 0
            if rank not in range(most + 1):
                raise ValueError(
                    f"layer {name} has rank {rank} in the state, which holds {most} triplets of it, so that only 0 to "
                    f"{most} are possible: load the state_dict() of a run, unchanged"
                )
        self._due = {name for name in names if f"{name}.due" in state}
        for name, w in self._watched.items():
            w.triplets, w.owed, w.rank = None, None, 0
            if f"{name}.u" in state:
                like = self._empty_result(name)
                u, s, v, pcdr, info = (
                    state[f"{name}.{field}"].clone().to(tensor) for field, tensor in zip(FIELDS, like, strict=True)
                )
                w.set(SingularTriplets(u, s, v), pcdr, info, int(state[f"{name}.rank"]))
                w.spent = state[f"{name}.spent"].clone().to(pcdr)
                if f"{name}.owed" in state:
                    w.owed = state[f"{name}.owed"].clone().to(pcdr)
        self._set_steps(steps)


def _without_unseen(maps: dict[str, LinearMap]) -> tuple[dict[str, LinearMap], list[str]]:
    """The maps whose input is an argument of their module, and the names of the others, unless that is all there is."""
    seen = {name: linear for name, linear in maps.items() if linear.argument is not None}
    return (seen, [name for name in maps if name not in seen]) if seen else (maps, [])
