"""How something hooks into the steps of optimizers, and how it notices that this leads to nothing.

:class:`s2d.SelectiveSpectralDecay` and :class:`s2d.SpectralNormCap` act on weights inside ``optimizer.step()``. Between
them and a weight stand wrappers, several optimizers, copies of weights and modules that other libraries exchange. An
:class:`Attachment` finds the optimizer that really steps, and then keeps an eye on every layer.
"""

from __future__ import annotations

import sys
import warnings
import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from s2d import distributed
from s2d.layers import LinearMap, bare_matrices, places
from s2d.rounding import is_low_precision
from s2d.stepping import check_rate, find_masters, unwrap_optimizer

EARLY = 3  # acts on a layer after attaching that are looked at closely
CHANGES = 3  # changes of a weight in a row, without a step that we saw, before they are held against the optimizer
FRESH = 8  # gradients begun anew in a row before any step, likewise; a GradScaler may skip some steps at first
WITHOUT = 3  # steps in a row whose gradient arrived and was gone when the step began
SURVIVED = 0.02  # less than this part of a change left after the step means that it was overwritten
LOST = 0.5  # entries that did not move at first move this much more rarely later if rounding eats their update
SAMPLE = 2**14  # entries of a weight that are looked at, about

# Who is attached to an optimizer, so that a second one of a kind over the same weights is noticed.
_attached: weakref.WeakKeyDictionary[torch.optim.Optimizer, weakref.WeakSet[Any]] = weakref.WeakKeyDictionary()


class Standing:
    """What is known of one watched layer since it was attached.

    Attributes:
        linear: the layer.
        weight: the tensor that holds its matrix, as last seen in its module.
        optimizer: who steps it, or None.
        gradients: how many backward passes reached it.
        acted: in how many steps it was acted on.
        current: whether it was in the last step of its optimizer, or the last in which the owner acts.
        noted: whether it was in this step.
        missing: steps in a row whose gradient was gone when they began.
        cause, repair: why it is not acted on and what to do, or empty.
        lasting: cause and repair of what shows only after some steps, until it is seen to be gone.
    """

    def __init__(self, linear: LinearMap) -> None:
        self.linear = linear
        self.weight: Tensor = linear.weight
        self.optimizer: torch.optim.Optimizer | None = None
        self.gradients = self.acted = self.missing = 0
        self.current = self.noted = False
        self.cause = self.repair = ""
        self.lasting: tuple[str, str] | None = None
        self.arrived = 0  # gradients when the last step began
        self.overwritten = 0  # early acts in a row of which the step left nothing
        self.looks = 0  # acts since the last refresh
        self.moved = 1.0  # share of the entries of a half-precision weight that moved in the first of them
        self.stuck: Tensor | None = None  # those that did not move so far

    def problem(self, cause: str, repair: str) -> None:
        """Note why the layer is not acted on."""
        self.cause, self.repair = cause, repair


class _Probe:
    """One weight of an optimizer, by which steps are noticed that its hooks do not see."""

    def __init__(self, standing: Standing) -> None:
        self.standing = standing
        self.mark: tuple[int, int] | None = None
        self.gradient: tuple[int, int] | None = None
        self.changes = self.fresh = 0


class Attachment:
    """The hooks of one object in the steps of the optimizers that own the weights of its layers.

    Args:
        owner: the object's class, for messages.
        model: the model in training.
        layers: name to linear map.
        before: called with the optimizer, and whether this is the first gradient of its step, when a step has its
            gradient and before it changes a weight.
        after: called with the optimizer when its step is done.
        around_closure: called before a closure runs, with whether that is the first time in its step; returns what is
            called when it is done.
        occasional: whether the owner acts in some steps only.

    Attributes:
        optimizers: those attached to, unwrapped.
        standings: name to what is known of a layer.

    Example:
        >>> layer = nn.Linear(2, 2)
        >>> linear = LinearMap("", layer)
        >>> seen = []
        >>> attachment = Attachment("Example", layer, {"": linear}, before=lambda optimizer, first: seen.append(first))
        >>> attachment.attach([torch.optim.SGD(layer.parameters(), lr=0.1)], group=None)
        >>> layer(torch.ones(1, 2)).sum().backward()
        >>> attachment.optimizers[0].step()
        >>> seen, attachment.standings[""].gradients
        ([True], 1)

    Paper: none.
    """

    def __init__(
        self,
        owner: str,
        model: nn.Module,
        layers: Mapping[str, LinearMap],
        *,
        before: Callable[[torch.optim.Optimizer, bool], None] | None = None,
        after: Callable[[torch.optim.Optimizer], None] | None = None,
        around_closure: Callable[[bool], Callable[[], None]] | None = None,
        occasional: bool = False,
    ) -> None:
        self.owner, self.model, self._occasional = owner, model, occasional
        self.standings = {name: Standing(linear) for name, linear in layers.items()}
        self.optimizers: list[torch.optim.Optimizer] = []
        self._before, self._after, self._around_closure = before, after, around_closure
        self._places = places(model)
        self._handles: list[Any] = []
        self._counters: dict[int, Any] = {}  # handles of gradient hooks, by weight
        self._stepping: dict[int, FrameType] = {}  # the call of step() that is under way, by optimizer
        self._probes: dict[int, _Probe] = {}
        self._groups: dict[int, dict[str, Any]] = {}
        self._masters: dict[str, Tensor] = {}
        self._rounded: dict[str, Tensor] = {}  # low-precision weights as they were when the step began
        self._changed: dict[str, tuple[float, float, Callable[[], float]]] = {}
        self._by_weight: dict[int, list[Standing]] = {}
        self._said: set[tuple[str, str]] = set()
        self._answered: set[int] = set()  # optimizers whose step ran since attaching

    # --- hooks ------------------------------------------------------------------------------------------------------

    @property
    def attached(self) -> bool:
        """Whether the hooks are in place."""
        return bool(self._handles)

    def attach(
        self,
        optimizers: Iterable[Any],
        group: dist.ProcessGroup | None,
        *,
        needs_rate: bool = False,
        together: bool = True,
    ) -> None:
        """Hook into the steps.

        Args:
            optimizers: those that own the weights, in the order in which they step.
            group: the ranks that train the model together.
            needs_rate: whether every group has to have a learning rate.
            together: whether ranks compare what they watch (collective).

        Raises:
            ValueError: if this is attached already, or the optimizers do not own every weight that is trained.
        """
        if self._handles:
            raise ValueError("already attached: call detach() first")
        error = None
        try:
            self.optimizers = [unwrap_optimizer(optimizer) for optimizer in optimizers]
            self._refuse(needs_rate)
        except ValueError as problem:
            error = problem
            self.optimizers = []
        if together:
            distributed.raise_together(error, group, what="attach()")
            distributed.check_same_layers({n: s.linear for n, s in self.standings.items()}, group)
        elif error is not None:
            raise error
        for optimizer in self.optimizers:
            self._handles.append(optimizer.register_step_pre_hook(self._before_step))
            self._handles.append(optimizer.register_step_post_hook(self._after_step))
            self._warn_of_a_second(optimizer)
        self._answered.clear()
        self._count_gradients()

    def detach(self) -> None:
        """Remove every hook; the model and the optimizer are then as they were."""
        while self._handles:
            self._handles.pop().remove()
        while self._counters:
            self._counters.popitem()[1].remove()
        for optimizer in self.optimizers:
            _attached.get(optimizer, weakref.WeakSet()).discard(self)
        for transient in (self._probes, self._rounded, self._changed, self._masters):
            transient.clear()

    def _refuse(self, needs_rate: bool) -> None:
        if len({id(optimizer) for optimizer in self.optimizers}) < len(self.optimizers):
            raise ValueError("attach() was given one optimizer twice: give each once")
        foreign = self.find_owners()
        if foreign or not self.optimizers:
            raise ValueError(self._not_owned(foreign))
        for name, standing in self.standings.items():
            exchanged = self._exchanged(standing)
            if exchanged:
                raise ValueError(f"layer {_label(name)} {exchanged[0]} after {self.owner} was built: {exchanged[1]}")
            if standing.weight.is_meta:
                raise ValueError(
                    f"layer {_label(name)} is on the meta device and has no values: materialize the model, load its "
                    "weights, and build the optimizer and this anew"
                )
            if needs_rate and standing.optimizer is not None:
                check_rate(self.group_of(standing))

    def _not_owned(self, foreign: list[str]) -> str:
        copies = ""
        weights = {name: self.standings[name].weight for name in foreign}
        if any(find_masters(optimizer, weights) for optimizer in self.optimizers):
            copies = " (it steps wider master copies of them, which would overwrite what is done to the weights)"
        return (
            f"the optimizer does not own the weights of {len(foreign)} of {len(self.standings)} watched layers "
            f"({_names(foreign)}){copies}: build it from model.parameters() after wrapping the model, freeze those "
            "layers with requires_grad_(False), or leave them out with exclude="
        )

    def _warn_of_a_second(self, optimizer: torch.optim.Optimizer) -> None:
        others = _attached.setdefault(optimizer, weakref.WeakSet())
        same = [other for other in others if other is not self and other.attached and other.owner == self.owner]
        theirs = {id(standing.weight) for other in same for standing in other.standings.values()}
        shared = [name for name, standing in self.standings.items() if id(standing.weight) in theirs]
        if shared:
            warnings.warn(
                f"a second {self.owner} is attached to the same optimizer for {len(shared)} layers ({_names(shared)}), "
                "so that both act on them: call detach() on the first, or build the optimizer anew where a notebook "
                "cell is run again",
                stacklevel=4,
            )
        others.add(self)

    def find_owners(self) -> list[str]:
        """Note which optimizer owns which weight; the names of trained weights that none owns."""
        owner = {
            id(parameter): (optimizer, group)
            for optimizer in self.optimizers
            for group in optimizer.param_groups
            for parameter in group["params"]
        }
        for standing in self.standings.values():
            standing.weight = standing.linear.weight
            standing.optimizer, group = owner.get(id(standing.weight), (None, None))
            if group is not None:
                self._groups[id(standing.weight)] = group
        return [n for n, s in self.standings.items() if s.optimizer is None and s.weight.requires_grad]

    def group_of(self, standing: Standing) -> dict[str, Any]:
        """The parameter group of a layer."""
        return self._groups[id(standing.weight)]

    def master_of(self, name: str) -> Tensor | None:
        """The wider copy of a low-precision weight that its optimizer keeps, this rank's part of it."""
        return self._masters.get(name)

    # --- steps ------------------------------------------------------------------------------------------------------

    def _before_step(
        self, optimizer: torch.optim.Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        if self._is_nested(optimizer):  # a step that calls its base class's step runs the hooks again
            return None
        self._stepping[id(optimizer)] = sys._getframe(1)
        closure = args[1] if len(args) > 1 else kwargs.get("closure")
        if closure is None:
            self._begin(optimizer, first=True)
            return None
        calls = 0

        def closure_with_us() -> Any:
            nonlocal calls
            undo = self._around_closure(calls == 0) if self._around_closure else None
            try:
                loss = closure()  # computes the gradient anew, so whatever is done to it has to follow
            finally:
                if undo is not None:
                    undo()
            self._begin(optimizer, first=calls == 0)
            calls += 1
            return loss

        return args[:1], {**kwargs, "closure": closure_with_us}

    def _after_step(self, optimizer: torch.optim.Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self._stepping.get(id(optimizer)) is not sys._getframe(1) and self._is_nested(optimizer):
            return  # the end of a step inside the step
        self._stepping.pop(id(optimizer), None)
        if _is_skipped(optimizer):
            return
        self._look_back()
        self._look_for_masters(optimizer)  # what a step has just made, and not yet made differ from the weight
        if self._after is not None:
            self._after(optimizer)

    def _is_nested(self, optimizer: torch.optim.Optimizer) -> bool:
        """Whether a step of this optimizer is under way that we know of; one that raised is no longer on the stack."""
        outer = self._stepping.get(id(optimizer))
        frame: FrameType | None = sys._getframe()
        while outer is not None and frame is not None:
            if frame is outer:
                return True
            frame = frame.f_back
        return False

    @torch.no_grad()
    def _begin(self, optimizer: torch.optim.Optimizer, *, first: bool) -> None:
        """A step has its gradient: look whether all is in place, then let the owner act."""
        if _is_skipped(optimizer):  # the optimizer will skip this step, and so do we
            return
        self._answered.add(id(optimizer))
        probe = self._probes.get(id(optimizer))
        if probe is not None:
            probe.changes = probe.fresh = 0
        self._inspect(optimizer, first)
        if self._before is not None:
            self._before(optimizer, first)

    # --- does it lead to anything? ----------------------------------------------------------------------------------

    def refresh(self) -> None:
        """Look anew at what changes rarely: who owns which weight, whose gradients are counted, what rounding does."""
        for standing in self.standings.values():
            standing.looks = 0
        self._count_gradients()
        strangers = [name for name in self.find_owners() if self._is_used(name) and not self.standings[name].cause]
        for name in strangers:
            self.standings[name].problem(
                "gets a gradient, but none of the attached optimizers steps it",
                "attach to its optimizer too, or leave it out with exclude=",
            )
        self._warn_of_problems(strangers)

    def _is_used(self, name: str) -> bool:
        weight = self.standings[name].weight
        return weight.is_leaf and weight.grad is not None

    def _count_gradients(self) -> None:
        """A hook on every trained weight that has none yet; those of weights that were replaced are removed."""
        for standing in self.standings.values():
            standing.weight = standing.linear.weight
        current = {id(s.weight): s for s in self.standings.values() if _is_leaf(s.weight)}
        for key in self._counters.keys() - current.keys():
            self._counters.pop(key).remove()
        for key, standing in current.items():
            if key not in self._counters:
                hook = _Arrival(weakref.ref(self), key)
                self._counters[key] = standing.weight.register_post_accumulate_grad_hook(hook)
        self._by_weight = {}
        for standing in self.standings.values():
            self._by_weight.setdefault(id(standing.weight), []).append(standing)

    def arrive(self, key: int) -> None:
        """A gradient has been added up in a weight (called by its hook, in the backward pass)."""
        members = self._by_weight.get(key, ())
        for standing in members:
            standing.gradients += 1
        if not members or members[0].optimizer is None:
            return
        optimizer = members[0].optimizer
        probe = self._probes.get(id(optimizer))
        if probe is None:
            probe = self._probes[id(optimizer)] = _Probe(members[0])
        if probe.standing is members[0]:
            self._listen(probe)

    @torch.no_grad()
    def _listen(self, probe: _Probe) -> None:
        """Notice steps that our hook does not see: the weight changes, or its gradient begins anew, again and again.

        A wrapper may perturb a weight once or twice on the way to a step (SAM), and gradients may be computed for other
        ends; so only several in a row count, and beginning gradients only as long as there never was a step.
        """
        weight = distributed.local(probe.standing.weight)
        mark = (weight._version, weight.data_ptr())
        probe.changes += probe.mark is not None and mark != probe.mark
        probe.mark = mark
        grad = probe.standing.weight.grad
        if grad is not None:
            grad = distributed.local(grad)
            begun = (grad.data_ptr(), grad._version)
            before = probe.gradient
            probe.fresh += before is not None and (begun[0] != before[0] or begun[1] != before[1] + 1)
            probe.gradient = begun
        optimizer = probe.standing.optimizer
        unanswered = probe.changes >= CHANGES or (id(optimizer) not in self._answered and probe.fresh >= FRESH)
        if unanswered and optimizer is not None:
            self._unanswered(optimizer)

    def _unanswered(self, optimizer: torch.optim.Optimizer) -> None:
        names = [name for name, standing in self.standings.items() if standing.optimizer is optimizer]
        for name in names:
            self.standings[name].current = False
            self.standings[name].problem(
                f"gradients arrive, but the step() of the attached {type(optimizer).__name__} does not run: another "
                "object steps the weights",
                "attach to the torch optimizer whose step() does it (the one inside the wrapper)",
            )
        self._warn_of_problems(names)

    def _inspect(self, optimizer: torch.optim.Optimizer, first: bool) -> None:
        """At the beginning of a step: is every layer of this optimizer still what it was?"""
        groups = {id(parameter): group for group in optimizer.param_groups for parameter in group["params"]}
        troubled = []
        for name, standing in self.standings.items():
            if standing.optimizer is not optimizer:
                continue
            trouble = self._trouble(standing, groups)
            standing.problem(*(trouble or standing.lasting or ("", "")))
            standing.noted = standing.noted and not first
            standing.current = standing.current and trouble is None and (self._occasional or standing.noted)
            if trouble:
                troubled.append(name)
            else:
                self._groups[id(standing.weight)] = groups[id(standing.weight)]
            standing.arrived = standing.gradients
        self._warn_of_problems(troubled)
        self._look_for_masters(optimizer)

    def _trouble(self, standing: Standing, groups: dict[int, dict[str, Any]]) -> tuple[str, str] | None:
        exchanged = self._exchanged(standing)
        if exchanged is not None:
            return exchanged
        weight = standing.linear.weight
        if id(weight) not in groups:
            how = "was replaced" if weight is not standing.weight else "is gone from the optimizer"
            return (
                f"its parameter {how}: the optimizer steps another tensor than the one in the module",
                "build the optimizer from model.parameters() anew, and attach to that",
            )
        standing.weight = weight
        gone = weight.grad is None and standing.gradients > standing.arrived
        standing.missing = standing.missing + 1 if gone else 0
        if standing.missing >= WITHOUT:
            return (
                "its gradient arrives, but is gone when the step begins (something takes it away during backward)",
                "attach to an optimizer that reads .grad in step(), or turn that fusion off",
            )
        return None

    def _exchanged(self, standing: Standing) -> tuple[str, str] | None:
        """What was done to a layer's module that puts its weight out of use."""
        linear = standing.linear
        if linear.parameter not in linear.module._parameters:
            return (
                "was parametrized or pruned",
                "do that before building this (a parametrized weight is refused then), or make it permanent with "
                "torch.nn.utils.prune.remove or parametrize.remove_parametrizations",
            )
        place = self._places.get(id(linear.module))
        if place is None or place.parent._modules.get(place.key) is linear.module:
            return None
        if place.occupant() is not linear.module:
            now = type(place.occupant()).__name__
            return (
                f"was wrapped in or replaced by a {now}",
                "merge what was injected (merge_and_unload for PEFT) or inject it first, then build this anew",
            )
        return None

    def _look_for_masters(self, optimizer: torch.optim.Optimizer) -> None:
        """In the first steps, since some optimizers make their copies in the first one."""
        weights = {
            name: s.weight for name, s in self.standings.items() if s.optimizer is optimizer and s.looks <= EARLY
        }
        self._masters |= find_masters(optimizer, weights)

    # --- what the owner tells, and what became of it ----------------------------------------------------------------

    def can_act(self, name: str) -> bool:
        """Whether a layer is in place, so that acting on its weight means something."""
        standing = self.standings[name]
        return not standing.cause or standing.lasting is not None

    def note(self, name: str) -> None:
        """The owner acts on a layer in this step."""
        standing = self.standings[name]
        if not standing.noted:  # a closure may run several times in one step
            standing.acted += 1
            standing.looks += 1
        standing.noted = standing.current = True

    def is_early(self, name: str) -> bool:
        """Whether this is one of the first acts on a layer, whose outcome is looked at."""
        return self.standings[name].acted <= EARLY

    def expect_update(self, name: str) -> None:
        """The step should move this weight by its gradient: look, in the first acts, whether it does."""
        standing = self.standings[name]
        # At each refresh only where rounding may begin to matter; others may rest because training has converged.
        acts = standing.looks if is_low_precision(standing.weight) else standing.acted
        if acts > EARLY or name in self._masters or self.group_of(standing).get("lr") == 0:
            return
        # A step with a closure may move the weight between its gradients, and not after the last one.
        grad = standing.weight.grad
        if name not in self._rounded and grad is not None and _sample(grad).any():
            self._rounded[name] = _sample(standing.weight).clone()

    def expect_change(self, name: str, before: float, now: float, read: Callable[[], float]) -> None:
        """What was done to a weight should still be there when the step is done.

        Args:
            name: the layer.
            before, now: some measure of the weight before it was changed, and after.
            read: reads the measure again.
        """
        if before != now:
            self._changed[name] = (before, now, read)

    @torch.no_grad()
    def _look_back(self) -> None:
        """After a step: is the change still there, and did the update reach the weight?"""
        found = self._overwritten() + self._lost_in_rounding()
        for name in found:
            self.standings[name].problem(*(self.standings[name].lasting or ("", "")))
        self._warn_of_problems(found)

    def _overwritten(self) -> list[str]:
        """Layers whose change the step has undone.

        A step may do so by chance, or because training is in equilibrium; hence several times in a row, for every layer
        that was changed, and soon after attaching only.
        """
        for name, (before, now, read) in self._changed.items():
            gone = abs(read() - before) < SURVIVED * abs(now - before)
            self.standings[name].overwritten = self.standings[name].overwritten + 1 if gone else 0
        every = all(self.standings[name].overwritten >= EARLY for name in self._changed)
        found = list(self._changed) if every else []
        self._changed.clear()
        for name in found:
            self.standings[name].lasting = (
                "the optimizer overwrites its weight in each step, from a copy of its own",
                "give the weights themselves to the optimizer, or act through the gradient (coupling='gradient')",
            )
        return found

    def _lost_in_rounding(self) -> list[str]:
        """Layers whose entries the optimizer's updates do not reach, for the most part.

        Rounding to the nearest never lets an entry move whose update is too small, while random rounding and updates
        that vary move other entries each time.
        """
        found = []
        for name, old in self._rounded.items():
            standing = self.standings[name]
            moved = _sample(standing.weight) != old
            if standing.looks == 1 or standing.stuck is None:
                standing.moved, standing.stuck = float(moved.float().mean()), ~moved
            elif standing.looks < EARLY:
                standing.stuck &= ~moved
            else:
                late = float(moved[standing.stuck].float().mean()) if standing.stuck.any() else 1.0
                standing.stuck = None
                if is_low_precision(standing.weight):
                    lost = standing.moved < LOST and late <= LOST * standing.moved
                else:  # a gradient may be zero in nearly every entry, and those rest
                    lost = standing.moved == late == 0
                standing.lasting = self._lost(standing) if lost else None
                found += [name] if lost else []
        self._rounded.clear()
        return found

    @staticmethod
    def _lost(standing: Standing) -> tuple[str, str]:
        if not is_low_precision(standing.weight):
            return (
                f"the step of the attached {type(standing.optimizer).__name__} leaves its weight as it was, though its "
                ".grad is not zero",
                "attach to the optimizer that steps by .grad, or use coupling='decoupled'",
            )
        dtype = str(standing.weight.dtype).removeprefix("torch.")
        return (
            f"the optimizer's update is lost in the rounding of its {dtype} weight, and the penalty with it",
            "use coupling='decoupled' (whose rounding loses nothing in the mean), or an optimizer with float32 master "
            "copies or stochastic rounding",
        )

    # --- looking at it ----------------------------------------------------------------------------------------------

    def acting(self) -> int:
        """How many layers were acted on in the last step, with effect."""
        return sum(s.current and not s.cause for s in self.standings.values()) if self.attached else 0

    def health(self, why_not: Callable[[str], tuple[str, str]]) -> list[dict[str, Any]]:
        """One row a layer, and one for each parameter that may be a projection and is not watched.

        Args:
            why_not: name to cause and repair, for a layer that is in place but was not acted on.

        Returns:
            Rows with layer, acts (whether it was acted on in the last step, with effect), steps (in how many it was),
            gradients (how many backward passes reached it), cause and repair (why not, and what to do).
        """
        rows = []
        for name, s in self.standings.items():
            acts = self.attached and s.current and not s.cause
            cause, repair = s.cause, s.repair
            if not acts and not cause:
                cause, repair = why_not(name) if self.attached else ("not attached", "call attach(optimizer)")
            rows.append(_row(name, acts, s.acted, s.gradients, cause, repair))
        watched = {id(s.linear.weight) for s in self.standings.values()}
        for name, linear in bare_matrices(self.model).items():
            if id(linear.weight) not in watched:
                cause = f"not watched: a parameter of {type(linear.module).__name__}, a projection or a table"
                repair = (
                    f"if it multiplies activations, give its name {name!r} in include= beside those of the other "
                    "layers, and criterion='spectral' or 'all'"
                )
                rows.append(_row(name, False, 0, 0, cause, repair))
        return rows

    def _warn_of_problems(self, names: Iterable[str]) -> None:
        """One warning for each cause, about the layers of which it was not said yet."""
        causes: dict[tuple[str, str], list[str]] = {}
        for name in names:
            standing = self.standings[name]
            if (name, standing.cause) not in self._said:
                self._said.add((name, standing.cause))
                causes.setdefault((standing.cause, standing.repair), []).append(name)
        for (cause, repair), members in causes.items():
            some = f"layer {_names(members)}" if len(members) == 1 else f"{len(members)} layers ({_names(members)})"
            warnings.warn(f"{self.owner} does not act on {some}: {cause}; {repair}", stacklevel=2)


class Attached(ABC):
    """What acts through an :class:`Attachment`, which belongs to these very objects: how it is copied and pickled.

    Attributes:
        _attachment: the hooks.
    """

    _attachment: Attachment

    @abstractmethod
    def _new_attachment(self) -> Attachment:
        """Hooks for this object, not yet in place."""

    def _reattached(self) -> None:
        """Called when a copy has its hooks in place."""
        return

    def __getstate__(self) -> dict[str, Any]:
        """What a copy or a pickle holds: everything but the hooks."""
        state = {name: value for name, value in vars(self).items() if name != "_attachment"}
        return state | {"_copied": self._attachment.optimizers if self._attachment.attached else []}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """A copy made together with its optimizer acts on that copy, as the original does on the original."""
        optimizers = state.pop("_copied")
        vars(self).update(state)
        self._attachment = self._new_attachment()
        if optimizers:
            self._attachment.attach(optimizers, None, together=False)
            self._reattached()


class _Arrival:
    """The gradient hook of one weight; it keeps nothing alive, and a copy of it does nothing."""

    def __init__(self, attachment: weakref.ref[Attachment] | None, key: int) -> None:
        self.attachment, self.key = attachment, key

    def __call__(self, weight: Tensor) -> None:
        attachment = self.attachment() if self.attachment is not None else None
        if attachment is not None:
            attachment.arrive(self.key)

    def __reduce__(self) -> tuple[Any, ...]:
        return _Arrival, (None, 0)


def _is_skipped(optimizer: torch.optim.Optimizer) -> bool:
    """Whether the optimizer will skip this step: GradScaler tells those of infinity that unscale by themselves."""
    found = getattr(optimizer, "found_inf", None)
    return found is not None and bool(float(found))


def _is_leaf(weight: Tensor) -> bool:
    """Whether gradients are added up in this tensor."""
    return weight.requires_grad and weight.is_leaf


def along(matrix: Tensor, u: Tensor, v: Tensor) -> float:
    """``u^T W v`` in float64: a measure of what is done to one component.

    Example:
        >>> along(torch.eye(2), torch.tensor([1.0, 0.0]), torch.tensor([2.0, 0.0]))
        2.0

    Paper: none.
    """
    return float(u.double() @ (matrix.detach().double() @ v.double()))


def _sample(tensor: Tensor) -> Tensor:
    """The first rows of this rank's part of a tensor."""
    part = distributed.local(tensor.detach())
    rows = max(1, SAMPLE // max(1, part[:1].numel()))
    return part[:rows]


def _row(layer: str, acts: bool, steps: int, gradients: int, cause: str, repair: str) -> dict[str, Any]:
    return {
        "layer": layer,
        "acts": acts,
        "steps": steps,
        "gradients": gradients,
        "cause": cause,
        "repair": repair,
    }


def _label(name: str) -> str:
    return name or "(model)"


def _names(names: list[str], most: int = 3) -> str:
    return ", ".join(map(_label, names[:most])) + (", ..." if len(names) > most else "")
