"""Standalone conditioning: a network is distilled to itself, without labels, while its selected components decay."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from s2d.bound import spectral_norm_bounds
from s2d.cap import SpectralNormCap
from s2d.checks import check_count, check_number
from s2d.files import write_atomically
from s2d.layers import CONVOLUTIONS, LinearMap, Selector, linear_maps
from s2d.packages import need
from s2d.ptq.trace import call, tensors_of
from s2d.regularizer import SelectiveSpectralDecay, check_strength

FORMS = {
    "printed": {},
    "live": {"coefficients": "live"},
    "decoupled": {"coefficients": "live", "coupling": "decoupled"},
    "cap": {},
}
"""How components decay: S2D as Algorithm 1 prints it, the forms of ours, and the spectral-norm cap."""
LAM = {"printed": 5e-4, "live": 5e-4, "decoupled": 10.0}
WARMUP, FALLING = 20, 0.4  # steps until the full rate, and the part of the steps over which it falls
CAP_REACHED = 0.5  # the part of the steps after which a cap has come down
STATE = "conditioning.safetensors"


@dataclass(frozen=True)
class Look:
    """The network at one step, on data held back.

    Attributes:
        step: optimizer steps done.
        fidelity: mean cosine between its outputs and the original's.
        max_abs, layer: the largest activation (without bias) of the watched layers, and where it is.
        sigma_1: the largest spectral norm of the watched layers.
        decaying: whether components decayed up to the next look.
    """

    step: int
    fidelity: float
    max_abs: float
    layer: str
    sigma_1: float
    decaying: bool


@dataclass
class Conditioned:
    """What conditioning did.

    Attributes:
        looks: the network as it was, and at every look since.
        chosen: the look whose weights the model has now.
        on_target: whether these reach the target; None without one.
        within_budget: whether these keep the fidelity asked for.
    """

    looks: list[Look]
    chosen: Look
    on_target: bool | None
    within_budget: bool


def condition(
    model: nn.Module,
    batches: Callable[[int], Any],
    held: Sequence[Any],
    *,
    steps: int = 300,
    lr: float = 1e-4,
    form: str = "decoupled",
    lam: float | None = None,
    tau: float = 0.95,
    k_max: int = 3,
    cap: float | None = None,
    target_max: float | None = None,
    target_sigma: float | None = None,
    least_fidelity: float = 0.98,
    look_every: int = 25,
    include: Selector | None = None,
    exclude: Selector = (),
    loss: Callable[[Tensor, int], Tensor] | None = None,
    folder: Path | None = None,
    progress: Callable[[str], None] | None = None,
) -> Conditioned:
    r"""Let the components that make a network's outliers decay, and keep it to what it did.

    Trained is the relative squared error of its outputs against those of the network as it was, padding left out,

    .. math:: \lVert f(x) - f_0(x) \rVert^2 / \lVert f_0(x) \rVert^2

    (and ``loss``, where there are labels) with AdamW, without weight decay and dropout. At every look the target is
    checked on data held back: while it is met nothing decays. In the end the model has the weights of the best look:
    one within the budget of fidelity before one that is not, then one on target, then the most faithful of these;
    without a target, the last within the budget.

    Args:
        model: changed in place, in evaluation mode throughout.
        batches: ``batches(step)``, what the model is called with at that step; the same each time it is asked, so that
            a resumed run sees the same.
        held: batches for the looks, none of them trained on.
        steps, lr: of AdamW.
        form: of ``FORMS``: S2D ``"printed"``, ``"live"`` or ``"decoupled"``, or ``"cap"``.
        lam: strength; by default the paper's for the first two forms, 10 for the third.
        tau, k_max: of S2D.
        cap: where the spectral norms end with ``"cap"``, lowered towards it over half of the steps.
        target_max: stop decaying while no activation of the watched layers is larger.
        target_sigma: the same for their spectral norms.
        least_fidelity: the budget, a cosine.
        look_every: steps between looks, which are also the refreshes of S2D.
        include, exclude: the layers watched, see :func:`s2d.layers.linear_maps`; without convolutions.
        loss: ``loss(output, step)``, added to what is trained.
        folder: where the state is kept from look to look; a run that finds one there goes on from it.
        progress: called with a line of text for each look.

    Returns:
        The looks, and which one the model has now.

    Raises:
        ValueError: for options out of range, no data, a model without linear layers or floating-point output, a loss
            that is not finite, and a state in ``folder`` of other settings.
        ImportError: for ``folder`` without the package safetensors.

    Example:
        >>> _ = torch.manual_seed(0)
        >>> network = nn.Sequential(nn.Linear(8, 8), nn.GELU(), nn.Linear(8, 4))
        >>> data = torch.randn(64, 8)
        >>> done = condition(network, lambda step: data[:32], [data[32:]], steps=20, form="cap", cap=0.6, look_every=10)
        >>> done.looks[-1].sigma_1 < 0.61 < done.looks[0].sigma_1
        True

    Paper: "standalone conditioning" (main text, second-hand); the target, the budget and all forms but the printed one
    are ours.
    """
    settings = checked_settings(
        steps=steps, lr=lr, form=form, lam=lam, tau=tau, k_max=k_max, cap=cap, target_max=target_max,
        target_sigma=target_sigma, least_fidelity=least_fidelity, look_every=look_every,
    )  # fmt: skip
    if not held:
        raise ValueError("held is empty: give at least one batch that is not trained on")
    found = linear_maps(model, include=include, exclude=exclude)
    maps = {n: m for n, m in found.items() if m.argument is not None and not isinstance(m.module, CONVOLUTIONS)}
    if not maps:
        raise ValueError("the model has no linear layer whose input can be seen: nothing to condition")
    modes = {module: module.training for module in model.modules()}
    model.eval()
    original = copy.deepcopy(model).requires_grad_(False)
    run = _Run(model, original, maps, list(held), settings, loss)
    if folder is not None:
        run.resume(Path(folder) / STATE)
    try:
        run.to_the_end(batches, progress or (lambda line: None), None if folder is None else Path(folder) / STATE)
    finally:
        run.decay.detach()
        for module, training in modes.items():
            module.training = training
    return run.finish()


def checked_settings(**settings: Any) -> dict[str, Any]:
    """The settings of :func:`condition`, with the defaults of the form in place.

    Raises:
        ValueError: for one out of range.

    Paper: none
    """
    form = settings["form"]
    if form not in FORMS:
        raise ValueError(f"form is {form!r}: choose one of {', '.join(FORMS)}")
    for name in ("steps", "look_every", "k_max"):
        settings[name] = check_count(name, settings[name], "give a positive whole number")
    check_number("lr", settings["lr"], lambda value: value > 0, "give a positive rate, such as 1e-4")
    check_number("least_fidelity", settings["least_fidelity"], lambda value: -1 <= value <= 1, "give a cosine")
    check_number("tau", settings["tau"], lambda value: 0 < value <= 1, "a dominance ratio lies in (0, 1]")
    if settings["lam"] is not None:
        check_strength(settings["lam"], 2)
    for name in ("target_max", "target_sigma"):
        if settings[name] is not None:
            check_number(name, settings[name], lambda value: value > 0, "give a positive number, or None")
    if form == "cap":
        if settings["cap"] is None:
            raise ValueError("form='cap' needs a cap: give the spectral norm to come down to")
        check_number("cap", settings["cap"], lambda value: value > 0, "give a positive number")
    elif settings["cap"] is not None:
        raise ValueError(f"cap is {settings['cap']}, which is not for form={form!r}: leave it out")
    elif settings["lam"] is None:
        settings["lam"] = LAM[form]
    return settings


def output_of(model: nn.Module, batch: Any) -> Tensor:
    """What a network puts out, ``(items, ...)``: its logits, or the first of its tensors in floating point.

    Raises:
        ValueError: where there is none.

    Paper: none
    """
    output = call(model, batch)
    named = getattr(output, "logits", None)
    found = [named] if isinstance(named, Tensor) else [t for t in tensors_of(output) if t.is_floating_point()]
    if not found:
        raise ValueError(f"the model's output, a {type(output).__name__}, holds no floating-point tensor")
    return found[0]


def _mask(batch: Any, output: Tensor) -> Tensor | None:
    mask = batch.get("attention_mask") if isinstance(batch, Mapping) else None
    fits = isinstance(mask, Tensor) and output.ndim == 3 and mask.shape == output.shape[:2]
    return mask.to(output.device)[..., None].to(output.dtype) if fits else None


def relative_error(output: Tensor, wanted: Tensor, mask: Tensor | None) -> Tensor:
    """Squared error over squared size, padding left out."""
    if mask is not None:
        output, wanted = output * mask, wanted * mask
    return (output - wanted).square().sum() / wanted.square().sum().clamp(min=torch.finfo(wanted.dtype).tiny)


def item_vectors(output: Tensor, batch: Any) -> Tensor:
    """What fidelity compares, ``(items, ...)``: the outputs, or the mean over the tokens where these are padded.

    Example:
        >>> states = torch.tensor([[[1.0], [3.0], [8.0]]])
        >>> item_vectors(states, {"attention_mask": torch.tensor([[1, 1, 0]])})
        tensor([[2.]])

    Paper: none
    """
    mask = _mask(batch, output)
    return output if mask is None else (output * mask).sum(1) / mask.sum(1).clamp(min=1)


def cosines(vectors: Tensor, wanted: Tensor) -> Tensor:
    """Cosine of each item with what is wanted, ``(items,)``.

    Example:
        >>> cosines(torch.tensor([[1.0, 0.0]]), torch.tensor([[2.0, 0.0]])).tolist()
        [1.0]

    Paper: none
    """
    return F.cosine_similarity(vectors.flatten(1).double(), wanted.flatten(1).double(), dim=1)


@contextmanager
def _largest(maps: Mapping[str, LinearMap]) -> Any:
    """Watch the largest activation of each map: name to number, filled by the forward passes inside."""
    found = dict.fromkeys(maps, 0.0)

    def hook(name: str, linear: LinearMap) -> Any:
        def see(module: nn.Module, args: tuple, kwargs: dict, output: Any) -> None:
            y = F.linear(linear.input(args, kwargs), linear.matrix())
            found[name] = max(found[name], y.abs().max().item())

        return linear.module.register_forward_hook(see, with_kwargs=True)

    handles = [hook(name, linear) for name, linear in maps.items()]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


class _Run:
    """A network on its way."""

    def __init__(
        self,
        model: nn.Module,
        original: nn.Module,
        maps: dict[str, LinearMap],
        held: list[Any],
        settings: dict[str, Any],
        loss: Callable[[Tensor, int], Tensor] | None,
    ) -> None:
        self.model, self.original, self.maps, self.held = model, original, maps, held
        self.settings, self.loss = settings, loss
        self.trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.optimizer = torch.optim.AdamW(self.trained.values(), lr=settings["lr"], weight_decay=0.0)
        self.first_sigma = max(spectral_norm_bounds(linear.matrix())[1] for linear in maps.values())
        names = list(maps)
        if settings["form"] == "cap":
            start = max(self.first_sigma, settings["cap"])
            self.decay = SpectralNormCap(model, cap=start, every=5, include=names)
        else:
            options = {name: settings[name] for name in ("lam", "tau", "k_max")} | FORMS[settings["form"]]
            options["k_max"] = min(options["k_max"], *(min(linear.shape) for linear in maps.values()))
            self.decay = SelectiveSpectralDecay(model, refresh_every=settings["look_every"], include=names, **options)
        self.decay.attach(self.optimizer)
        self.step = 0
        self.looks: list[Look] = []
        self.kept: dict[str, Tensor] = {}
        self.kept_look: Look | None = None

    # --- training

    def to_the_end(self, batches: Callable[[int], Any], say: Callable[[str], None], state: Path | None) -> None:
        steps, every = self.settings["steps"], self.settings["look_every"]
        if not self.looks:
            self.look(say)
        while self.step < steps:
            self.one_step(batches(self.step))
            self.step += 1
            if self.step % every == 0 or self.step == steps:
                self.look(say)
                if state is not None:
                    self.save(state)

    def one_step(self, batch: Any) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = self.settings["lr"] * self.rate()
        if self.settings["form"] == "cap" and self.looks[-1].decaying:
            self.decay.cap = self.cap_now()
        with torch.no_grad():
            wanted = output_of(self.original, batch)
        output = output_of(self.model, batch)
        error = relative_error(output, wanted, _mask(batch, output))
        if self.loss is not None:
            error = error + self.loss(output, self.step)
        if not torch.isfinite(error):
            raise ValueError(f"the loss is {error.item()} at step {self.step}: lower lr or lam, or check the data")
        self.optimizer.zero_grad(set_to_none=True)
        error.backward()
        nn.utils.clip_grad_norm_(self.trained.values(), 1.0)
        self.optimizer.step()

    def rate(self) -> float:
        steps = self.settings["steps"]
        left = (steps - self.step) / max(1.0, FALLING * steps)
        return min(1.0, (self.step + 1) / WARMUP) * max(0.02, min(1.0, left))

    def cap_now(self) -> float:
        goal = self.settings["cap"]
        start = max(self.first_sigma, goal)
        done = min(1.0, (self.step + 1) / max(1.0, CAP_REACHED * self.settings["steps"]))
        return start * (goal / start) ** done

    # --- looks

    @torch.no_grad()
    def look(self, say: Callable[[str], None]) -> None:
        similar = []
        with _largest(self.maps) as largest:
            for batch in self.held:
                output, wanted = (item_vectors(output_of(net, batch), batch) for net in (self.model, self.original))
                similar.append(cosines(output, wanted))
        layer = max(largest, key=largest.get)
        sigma = max(spectral_norm_bounds(linear.matrix())[1] for linear in self.maps.values())
        found = Look(self.step, torch.cat(similar).mean().item(), largest[layer], layer, sigma, False)
        if not math.isfinite(found.fidelity) or not math.isfinite(found.max_abs):
            raise ValueError(f"the network puts out NaN or infinity at step {self.step}: lower lr or lam")
        decaying = self.on_target(found) is not True
        self.looks.append(Look(**asdict(found) | {"decaying": decaying}))
        if self.settings["form"] != "cap":
            self.decay.lam = self.settings["lam"] if decaying else 0.0
        if self.kept_look is None or self.rank(found) > self.rank(self.kept_look):
            self.kept_look = self.looks[-1]
            self.kept = {name: p.detach().clone() for name, p in self.trained.items()}
        say(
            f"step {self.step}: largest activation {found.max_abs:.4g} ({layer}), sigma_1 {sigma:.4g}, "
            f"cosine {found.fidelity:.4f}" + ("" if decaying else ", on target")
        )

    def on_target(self, look: Look) -> bool | None:
        wanted = ((self.settings["target_max"], look.max_abs), (self.settings["target_sigma"], look.sigma_1))
        met = [value <= target for target, value in wanted if target is not None]
        return all(met) if met else None

    def within_budget(self, look: Look) -> bool:
        return look.fidelity >= self.settings["least_fidelity"]

    def rank(self, look: Look) -> tuple[float, ...]:
        met = self.on_target(look)
        if not self.within_budget(look):
            return (0.0, 0.0, look.fidelity)
        if met is None:
            return (1.0, 0.0, look.step)
        return (1.0, float(met), look.fidelity if met else -look.max_abs)

    def finish(self) -> Conditioned:
        with torch.no_grad():
            for name, value in self.kept.items():
                self.trained[name].copy_(value)
        look = self.kept_look
        return Conditioned(self.looks, look, self.on_target(look), self.within_budget(look))

    # --- resuming

    def save(self, path: Path) -> None:
        safetensors = need("safetensors.torch", "keeping the state")
        tensors = {f"model.{name}": p.detach() for name, p in self.trained.items()}
        tensors |= {f"kept.{name}": value for name, value in self.kept.items()}
        tensors |= {f"decay.{name}": value for name, value in self.decay.state_dict().items()}
        for name, parameter in self.trained.items():
            for key, value in self.optimizer.state[parameter].items():
                tensors[f"adam.{key}.{name}"] = value
        notes = {"step": self.step, "looks": [asdict(look) for look in self.looks], "settings": self.settings}
        notes["kept"] = self.looks.index(self.kept_look)
        metadata = {"notes": json.dumps(notes)}
        contiguous = {name: tensor.contiguous().clone() for name, tensor in tensors.items()}
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, lambda temporary: safetensors.save_file(contiguous, temporary, metadata))

    def resume(self, path: Path) -> None:
        if not path.is_file():
            return
        safetensors = need("safetensors", "resuming")
        try:
            with safetensors.safe_open(path, framework="pt") as stored:
                notes = json.loads(stored.metadata()["notes"])
                tensors = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118, it is no dictionary
        except Exception as error:  # of the safetensors package, or a file of something else
            raise ValueError(f"{path} cannot be read ({error}): remove it to start anew") from None
        if notes["settings"] != json.loads(json.dumps(self.settings)):
            raise ValueError(f"{path} is of a run with other settings: give another folder, or remove it to start anew")
        expected = {f"model.{name}": p.shape for name, p in self.trained.items()}
        if any(name not in tensors or tensors[name].shape != shape for name, shape in expected.items()):
            raise ValueError(f"{path} is of another model: give another folder, or remove it to start anew")
        self.step, self.looks = notes["step"], [Look(**look) for look in notes["looks"]]
        self.kept_look = self.looks[notes["kept"]]
        with torch.no_grad():
            for name, parameter in self.trained.items():
                parameter.copy_(tensors[f"model.{name}"])
                self.kept[name] = tensors[f"kept.{name}"].to(parameter.device)
                prefix = [key for key in tensors if key.startswith("adam.") and key.endswith(f".{name}")]
                state = {key.split(".")[1]: tensors[key] for key in prefix if key.split(".", 2)[2] == name}
                self.optimizer.state[parameter] = {
                    key: value if key == "step" else value.to(parameter.device) for key, value in state.items()
                }
        decay = {name.removeprefix("decay."): t for name, t in tensors.items() if name.startswith("decay.")}
        self.decay.load_state_dict(decay)
        if self.settings["form"] != "cap":
            self.decay.lam = self.settings["lam"] if self.looks[-1].decaying else 0.0
        else:
            self.decay.cap = self.cap_now()
