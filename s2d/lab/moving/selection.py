"""Which layers a threshold selects, and one outlier taken apart."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from s2d.lab.evaluate import gather_outliers
from s2d.lab.moving.picture import GOLD, GREY, RED, TEAL, Choice, Picture, Slider
from s2d.layers import linear_maps

K_MAX = 5
COLOURS = (RED, "#e0777f", GOLD, "#f3cf8c", "#b9dbe0")


def contributions(weight: Tensor, x: Tensor, neuron: int) -> Tensor:
    r"""What each singular component adds to one activation, :math:`\sigma_r U_{ir} (v_r \cdot x)`.

    Args:
        weight: ``(out_features, in_features)``.
        x: ``(in_features,)`` one input.
        neuron: the output index i.

    Returns:
        ``(min(out, in),)`` in float64, the largest singular value's first; the sum is the activation.

    Example:
        >>> contributions(torch.diag(torch.tensor([3.0, 1.0])), torch.tensor([2.0, 5.0]), 0).abs().tolist()
        [6.0, 0.0]

    Paper: PCDR (main text, second-hand).
    """
    u, s, vh = torch.linalg.svd(weight.double(), full_matrices=False)
    return s * u[neuron] * (vh @ x.double())


@torch.no_grad()
def largest_activations(model: nn.Module, items: Tensor) -> dict[str, Tensor]:
    """The :func:`contributions` to the largest activation of every watched layer.

    Args:
        model: any with layers that :func:`s2d.layers.linear_maps` finds.
        items: a batch that the model takes.
    """
    rows = gather_outliers(model.eval(), items, capacity=1)
    layers = linear_maps(model)
    return {
        name: contributions(layers[name].matrix(), found.x[0], int(found.neuron[0])) for name, found in rows.items()
    }


class Selection(Picture):
    """PCDR_k of the largest activation of every layer against a threshold, and one of these activations taken apart.

    Args:
        parts: layer to the contributions of its components (:func:`contributions`).
        names: what the layers are called on the axis; by default as they are.

    Paper: PCDR, Algorithm 1 lines 9 and 10.
    """

    size = (8.6, 3.6)

    def __init__(self, parts: Mapping[str, Tensor], names: Sequence[str] | None = None) -> None:
        super().__init__()
        self.layers = list(parts)
        self.names = list(names or self.layers)
        self.parts = {layer: part.double().numpy() for layer, part in parts.items()}
        self.ratios = np.array([self._pcdr(part) for part in self.parts.values()])
        self.controls = {
            "tau": Slider(0.05, 1.0, 0.05, 0.95, "threshold tau"),
            "k": Slider(1, K_MAX, 1, 3, "components k"),
            "layer": Choice(tuple(self.layers), self.layers[int(self.ratios[:, 0].argmax())], "layer taken apart"),
        }
        over, apart = self.figure.subplots(1, 2, width_ratios=(5, 2))
        self.bars = over.bar(range(len(self.layers)), self.ratios[:, 0], color=GREY)
        self.tau = over.axhline(1.0, color="black", linewidth=1, linestyle=":")
        over.set_xticks(range(len(self.layers)), self.names, rotation=60, ha="right")
        over.set(ylim=(0, 1.5), ylabel="PCDR$_k$ of the largest activation", title="selected (red) by $k$ and $\\tau$")
        self.stack = [apart.bar([0], [0], color=colour, width=0.6)[0] for colour in (*COLOURS, TEAL)]
        self.marks = [apart.text(0.36, 0, "", va="center", fontsize="small") for _ in self.stack]
        (self.total,) = apart.plot([-0.42, 0.34], [1, 1], color="black", linewidth=1.5)
        apart.set(xlim=(-0.5, 0.9), xticks=[], title="one activation apart", ylabel="share of the activation")
        apart.axhline(0, color=GREY, linewidth=1)
        ends = [(part[part < 0].sum() / part.sum(), part[part > 0].sum() / part.sum()) for part in self._stacks()]
        apart.set_ylim(
            max(1.1 * min(low for low, _ in ends), -2.0), min(max(1.1, 1.1 * max(high for _, high in ends)), 3.0)
        )
        self.settle(*self.bars, self.tau, *self.stack, self.total, *self.marks)

    @staticmethod
    def _pcdr(part: np.ndarray) -> np.ndarray:
        """PCDR_1 to PCDR_5; a layer of fewer components has reached all of its activation by then."""
        ratios = np.abs(part[:K_MAX].cumsum()) / max(abs(part.sum()), 1e-300)
        return np.pad(ratios, (0, K_MAX - len(ratios)), mode="edge")

    def _stacks(self) -> Iterator[np.ndarray]:
        """The contributions as they are stacked: the first few, and the rest in one; their sum is positive."""
        for part in self.parts.values():
            stack = np.array([*part[:K_MAX], part[K_MAX:].sum()])
            yield stack * np.sign(part.sum())

    def numbers(self) -> dict[str, list]:
        """The first contributions and the sum of the rest, as shares of the activation."""
        stacks = [stack / stack.sum() for stack in self._stacks()]
        return {
            "layers": self.layers,
            "names": self.names,
            "shares": [[round(float(share), 4) for share in stack] for stack in stacks],
        }

    def update(self, *, tau: float, k: int, layer: str) -> str:
        ratios = self.ratios[:, k - 1]
        chosen = ratios >= tau
        for bar, ratio, is_chosen in zip(self.bars, ratios, chosen, strict=True):
            bar.set_height(min(ratio, 1.5))
            bar.set_color(RED if is_chosen else GREY)
        self.tau.set_ydata([tau, tau])
        part = self.parts[layer] / self.parts[layer].sum()
        shares = [*part[:K_MAX], part[K_MAX:].sum()][: len(self.stack)]
        shares += [0.0] * (len(self.stack) - len(shares))
        up = down = 0.0
        for index, (bar, mark, share) in enumerate(zip(self.stack, self.marks, shares, strict=True)):
            base = up if share >= 0 else down
            bar.set_y(base)
            bar.set_height(share)
            up, down = (up + share, down) if share >= 0 else (up, down + share)
            name = f"$\\sigma_{index + 1}$" if index < K_MAX else "the rest"
            mark.set(text=f"{name} {share:.0%}" if abs(share) > 0.08 else "", y=base + share / 2)
        share, first = ratios[self.layers.index(layer)], f"{k} components make" if k > 1 else "component makes"
        return (
            f"With k = {k} and tau = {tau:g}, {int(chosen.sum())} of {len(self.layers)} layers are selected. The first "
            f"{first} {share:.0%} of the largest activation of {layer}."
        )
