r"""Selective Spectral Decay: Algorithm 1, for any training loop.

The penalty on one layer, over its selected components, and its gradient are

.. math:: L = \frac{\lambda}{n+1} \sum_{i \le \hat k} \sigma_i^{n+1}, \qquad
          \nabla_W L = \lambda\, U_{\hat k}\, \mathrm{diag}(\sigma_1^n, \dots, \sigma_{\hat k}^n)\, V_{\hat k}^\top .

The literal transcription, with dense penalty matrices and full SVDs, is :class:`s2d.reference.LiteralAlgorithm1`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from s2d.layers import linear_layers
from s2d.outliers import OutlierRows
from s2d.pcdr import activation_pcdr, layer_pcdr, outlier_rank, spectral_pcdr
from s2d.spectral import SingularTriplets, top_singular_triplets

CRITERIA = ("activation", "spectral", "all")
COEFFICIENTS = ("cached", "live")
COUPLINGS = ("gradient", "decoupled")


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
        >>> add_spectral_penalty_(torch.zeros(2, 2), t, t.s**2, scale=0.5)
        tensor([[0., 2.],
                [0., 0.]])

    Paper: Algorithm 1, lines 12 and 20. Cost: O(m n k).
    """
    return target.addmm_((triplets.u * coefficients).to(target.dtype), triplets.v.T.to(target.dtype), alpha=scale)


class LayerReport(NamedTuple):
    """What the last refresh found in one layer; ``rank`` is None where nothing is penalised."""

    layer: str
    rank: int | None
    pcdr: tuple[float, ...]
    s: tuple[float, ...]


class _WatchedLayer:
    """One layer: what the last refresh left behind, and the outliers gathered for the next."""

    def __init__(self, layer: nn.Linear, outliers: int) -> None:
        self.layer = layer
        self.rows = OutlierRows(outliers)
        self.triplets: SingularTriplets | None = None
        self.pcdr: Tensor | None = None
        self.rank: int | None = None

    def selected(self) -> SingularTriplets:
        return SingularTriplets(*(t[..., : self.rank] for t in self.triplets))


class SelectiveSpectralDecay:
    """Selective Spectral Decay as Algorithm 1 prints it, attached to an optimizer by its step hook.

    Every ``refresh_every`` optimizer steps it finds the top singular triplets of each watched layer, decides by PCDR
    how many of them make the layer's outliers, and keeps them; at every step it adds their penalty to the gradient
    (after any clipping, since that happens before ``optimizer.step()``) or, decoupled, to the weight.

    Args:
        model: the model in training.
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
            subtracted from the weight times the learning rate, as AdamW does with weight decay.
        include, exclude: see :func:`s2d.layers.linear_layers`.
        outliers: how many outlier activations a layer keeps for a refresh.

    Raises:
        ValueError: for a hyper-parameter out of range or a model without Linear layers.

    Example:
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> optimizer = torch.optim.AdamW(model.parameters())
        >>> decay = SelectiveSpectralDecay(model, lam=5e-4, power=2, tau=0.95, k_max=2, refresh_every=100)
        >>> decay.attach(optimizer)
        >>> model(torch.randn(3, 4)).sum().backward()
        >>> optimizer.step()
        >>> [row.layer for row in decay.report()]
        ['0', '2']

    Paper: Algorithm 1; defaults from Table 10, G.1 and (lam, second-hand) the main text.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        lam: float = 5e-4,
        power: float = 2,
        tau: float = 0.95,
        k_max: int | None = 3,
        refresh_every: int = 100,
        criterion: Literal["activation", "spectral", "all"] = "activation",
        coefficients: Literal["cached", "live"] = "cached",
        coupling: Literal["gradient", "decoupled"] = "gradient",
        include: str | Sequence[str] | None = None,
        exclude: str | Sequence[str] = (),
        outliers: int = 16,
    ) -> None:
        if not (math.isfinite(lam) and lam >= 0):
            raise ValueError(f"lam is {lam}: it must be finite and not negative")
        if not (math.isfinite(power) and power > 0):
            raise ValueError(
                f"power is {power}: it must be positive; 2 is the paper's, 1 is plain L2 on the components"
            )
        if not 0 < tau <= 1:
            raise ValueError(f"tau is {tau}: a dominance ratio lies in (0, 1]")
        if k_max is not None and (not isinstance(k_max, int) or k_max < 1):
            raise ValueError(f"k_max is {k_max}: give a positive integer, or None for every component")
        if not isinstance(refresh_every, int) or refresh_every < 1:
            raise ValueError(f"refresh_every is {refresh_every}: give a positive number of steps")
        for value, name, known in (
            (criterion, "criterion", CRITERIA),
            (coefficients, "coefficients", COEFFICIENTS),
            (coupling, "coupling", COUPLINGS),
        ):
            if value not in known:
                raise ValueError(f"{name} is {value!r}: choose one of {', '.join(known)}")
        layers = linear_layers(model, include=include, exclude=exclude)
        for name, layer in layers.items():
            if k_max is not None and k_max > min(layer.weight.shape):
                raise ValueError(
                    f"k_max is {k_max}, but layer {name} has shape {tuple(layer.weight.shape)}: "
                    f"lower k_max to {min(layer.weight.shape)} or leave the layer out with exclude={name!r}"
                )
        self.lam, self.power, self.tau, self.k_max = lam, power, tau, k_max
        self.refresh_every, self.criterion = refresh_every, criterion
        self.coefficients, self.coupling = coefficients, coupling
        self.steps = 0
        self._watched = {name: _WatchedLayer(layer, outliers) for name, layer in layers.items()}
        self._handles: list[Any] = []

    @property
    def layers(self) -> dict[str, nn.Linear]:
        """The watched layers by name."""
        return {name: watched.layer for name, watched in self._watched.items()}

    def attach(self, optimizer: torch.optim.Optimizer) -> None:
        """Hook into the optimizer's step; from here on training needs no further call.

        Raises:
            ValueError: if the optimizer does not own every watched weight, or this is attached already.
        """
        if self._handles:
            raise ValueError("already attached: call detach() first")
        owned = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        foreign = [name for name, layer in self.layers.items() if id(layer.weight) not in owned]
        if foreign:
            raise ValueError(
                f"the optimizer does not own the weights of {len(foreign)} of {len(self._watched)} watched layers "
                f"({', '.join(foreign[:3])}{', ...' if len(foreign) > 3 else ''}): build it from model.parameters(), "
                "or leave those layers out with exclude="
            )
        self._handles.append(optimizer.register_step_pre_hook(self._before_step))
        if self.criterion == "activation":
            self._handles += [
                watched.layer.register_forward_hook(
                    lambda module, args, kwargs, output, watched=watched: self._watch(
                        watched, args[0] if args else kwargs["input"], output
                    ),
                    with_kwargs=True,
                )
                for watched in self._watched.values()
            ]

    def detach(self) -> None:
        """Remove every hook; the model and the optimizer are then as they were."""
        while self._handles:
            self._handles.pop().remove()

    def _watch(self, watched: _WatchedLayer, x: Tensor, output: Tensor) -> None:
        """Gather outliers in the forward passes of a refresh step only; evaluation, without gradients, is ignored."""
        if torch.is_grad_enabled() and self.steps % self.refresh_every == 0:
            bias = watched.layer.bias
            watched.rows.update(x.detach(), output.detach() if bias is None else output.detach() - bias.detach())

    @torch.no_grad()
    def _before_step(self, optimizer: torch.optim.Optimizer, args: tuple, kwargs: dict) -> None:
        """Algorithm 1, lines 6 to 20, between ``backward()`` and the optimizer's own update."""
        if len(args) > 1 or kwargs.get("closure") is not None:
            raise ValueError(
                "optimizer.step(closure) computes the gradient anew after the penalty is added, and would lose it: "
                "call closure() yourself, then step() without it"
            )
        # GradScaler leaves these two on a fused optimizer, which unscales inside its own step.
        if getattr(optimizer, "found_inf", None) is not None and float(optimizer.found_inf):
            return  # the optimizer will skip this step, and so do we
        scale = getattr(optimizer, "grad_scale", None)
        scale = 1.0 if scale is None else float(scale)
        if self.steps % self.refresh_every == 0:
            self.refresh()
        rates = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
        for watched in self._watched.values():
            weight = watched.layer.weight
            if watched.rank is None or weight.grad is None:  # a frozen or unused layer stays as it is
                continue
            selected = watched.selected()
            coefficients = (
                self.live_singular_values(watched) if self.coefficients == "live" else selected.s
            ) ** self.power
            if self.coupling == "gradient":
                add_spectral_penalty_(weight.grad, selected, coefficients, scale=self.lam * scale)
            else:
                rate = float(rates[id(weight)])
                add_spectral_penalty_(weight, selected, coefficients, scale=-rate * self.lam)
        self.steps += 1

    @staticmethod
    def live_singular_values(watched: _WatchedLayer) -> Tensor:
        """``u_r^T W v_r`` along the cached vectors; a component that has gone through zero is left alone."""
        selected = watched.selected()
        image = watched.layer.weight.detach().to(selected.v.dtype) @ selected.v
        return (selected.u * image).sum(dim=0).clamp(min=0)

    @torch.no_grad()
    def refresh(self) -> None:
        """Find the triplets and the outlier rank of every layer anew (Algorithm 1, lines 7 to 16).

        Raises:
            ValueError: if a weight is not finite.
            RuntimeError: if the activation criterion has seen no forward pass to look at.
        """
        if self.criterion == "activation" and not any(len(watched.rows) for watched in self._watched.values()):
            raise RuntimeError(
                "criterion='activation' needs the forward pass of this training step, and saw none with gradients "
                "enabled: call attach() before the forward pass, or use criterion='spectral'"
            )
        for name, watched in self._watched.items():
            try:
                self._refresh_layer(watched)
            except ValueError as error:
                raise ValueError(f"layer {name}: {error}") from error
            watched.rows.clear()

    def _refresh_layer(self, watched: _WatchedLayer) -> None:
        weight = watched.layer.weight
        k = min(weight.shape) if self.k_max is None else self.k_max
        watched.triplets = top_singular_triplets(weight, k, warm_start=watched.triplets)
        if self.criterion == "all":
            watched.pcdr, watched.rank = watched.triplets.s.new_ones(k), k
            return
        if self.criterion == "spectral":
            watched.pcdr = spectral_pcdr(weight, k_max=k, triplets=watched.triplets)
        elif len(watched.rows):
            rows = watched.rows
            watched.pcdr = layer_pcdr(activation_pcdr(weight, rows.x, rows.neuron, k_max=k, triplets=watched.triplets))
        else:  # a layer that took no part in this step's forward passes shows no outlier
            watched.pcdr = watched.triplets.s.new_zeros(k)
        watched.rank = outlier_rank(watched.pcdr, self.tau)

    def penalty(self) -> float:
        """The value of the penalty over all layers, at the singular values of the last refresh."""
        selected = [w.selected().s for w in self._watched.values() if w.rank is not None]
        return sum(float(spectral_penalty(s, lam=self.lam, power=self.power)) for s in selected)

    def report(self) -> list[LayerReport]:
        """One row a watched layer: outlier rank, PCDR and singular values of the last refresh."""
        return [
            LayerReport(name, w.rank, tuple(w.pcdr.tolist()), tuple(w.triplets.s.tolist()))
            for name, w in self._watched.items()
            if w.triplets is not None
        ]

    def state_dict(self) -> dict[str, Tensor]:
        """Everything a resumed run needs, as plain tensors (safetensors can store them)."""
        state = {"steps": torch.tensor(self.steps)}
        for name, w in self._watched.items():
            if w.triplets is not None:
                # Clones: a state that shared memory with the run would change under the reader's hands.
                state |= {f"{name}.{field}": getattr(w.triplets, field).clone() for field in ("u", "s", "v")}
                state |= {f"{name}.pcdr": w.pcdr.clone(), f"{name}.rank": torch.tensor(w.rank or 0)}
        return state

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Continue where :meth:`state_dict` was taken.

        Raises:
            ValueError: if the state is of other layers or other shapes; nothing is changed then.
        """
        names = {key.rpartition(".")[0] for key in state if key != "steps"}
        missing = names ^ set(self._watched) if names else set()
        if "steps" not in state or missing:
            raise ValueError(
                "the state is of another model or another choice of layers: "
                f"{', '.join(sorted(missing)[:3]) or 'no steps'}"
            )
        lacking = [f"{n}.{f}" for n in names for f in ("u", "s", "v", "pcdr", "rank") if f"{n}.{f}" not in state]
        if lacking:
            raise ValueError(f"the state lacks {', '.join(lacking[:3])}: it was cut short")
        for name in names:
            shape = (state[f"{name}.u"].shape[0], state[f"{name}.v"].shape[0])
            if shape != tuple(self._watched[name].layer.weight.shape):
                raise ValueError(
                    f"layer {name} is {tuple(self._watched[name].layer.weight.shape)} here, but {shape} in the state"
                )
        self.steps = int(state["steps"])
        for name in names:
            w = self._watched[name]
            device = w.layer.weight.device
            w.triplets = SingularTriplets(*(state[f"{name}.{field}"].clone().to(device) for field in ("u", "s", "v")))
            w.pcdr, w.rank = state[f"{name}.pcdr"].clone().to(device), int(state[f"{name}.rank"]) or None
