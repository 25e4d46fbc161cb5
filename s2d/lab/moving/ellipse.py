"""A matrix turns the unit circle into an ellipse."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from s2d.lab.moving.picture import GOLD, GREY, RED, TEAL, Picture, Slider

FIRST = 30.0  # degrees of v_1


def turned(degrees: float) -> Tensor:
    """The rotation by an angle, ``(2, 2)``.

    Example:
        >>> turned(90.0).round().int().tolist()
        [[0, -1], [1, 0]]
    """
    c, s = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    return torch.tensor([[c, -s], [s, c]])


class Ellipse(Picture):
    """The unit circle and what the matrix ``turned(turn) diag(stretch, 1) turned(30)^T`` makes of it.

    Controls: ``stretch`` is its sigma_1, ``turn`` the direction of u_1, ``angle`` that of one input.

    Paper: Theorem 1 (A.1).
    """

    controls = {
        "stretch": Slider(1.0, 4.0, 0.1, 3.0, "stretch (sigma_1)"),
        "turn": Slider(0, 180, 5, 80, "turn (angle of u_1)"),
        "angle": Slider(0, 360, 5, 65, "angle of the input x"),
    }
    size = (7.2, 3.6)

    def __init__(self) -> None:
        super().__init__()
        around = torch.linspace(0, 2 * math.pi, 181)
        self.circle = torch.stack([around.cos(), around.sin()])
        before, after = self.figure.subplots(1, 2)
        for axis, title, end in ((before, "inputs of length 1", 1.7), (after, "what W makes of them", 4.6)):
            axis.set(xlim=(-end, end), ylim=(-end, end), aspect="equal", title=title, xticks=[], yticks=[])
            axis.spines[:].set_visible(False)
            axis.axhline(0, color="0.9", linewidth=1)
            axis.axvline(0, color="0.9", linewidth=1)
        before.plot(*self.circle, color=GREY, linewidth=1)
        v = turned(FIRST)
        self._arrow(before, v[:, 0], RED, "$v_1$")
        self._arrow(before, v[:, 1], TEAL, "$v_2$")
        self.x = self._arrow(before, v[:, 0], GOLD, "$x$")
        (self.bound,) = after.plot([], [], color=GREY, linewidth=1, linestyle=":")
        (self.ellipse,) = after.plot([], [], color=GREY, linewidth=1)
        self.u1 = self._arrow(after, v[:, 0], RED, r"$\sigma_1 u_1$")
        self.u2 = self._arrow(after, v[:, 1], TEAL, r"$\sigma_2 u_2$")
        self.y = self._arrow(after, v[:, 0], GOLD, "$Wx$")
        self.settle(self.bound, self.ellipse, *self.x, *self.u1, *self.u2, *self.y)

    @staticmethod
    def _arrow(axis, end: Tensor, colour: str, name: str):
        (line,) = axis.plot([0, end[0]], [0, end[1]], color=colour, linewidth=2.5, marker="o", markevery=[1])
        text = axis.text(0, 0, name, color=colour, ha="center", va="center", fontsize="large")
        Ellipse._point((line, text), end)
        return line, text

    @staticmethod
    def _point(arrow, end: Tensor) -> None:
        line, text = arrow
        x, y = end.tolist()
        line.set_data([0, x], [0, y])
        beyond = 1 + 0.1 * line.axes.get_xlim()[1] / max(math.hypot(x, y), 1e-9)
        text.set_position((beyond * x, beyond * y))

    def update(self, *, stretch: float, turn: float, angle: float) -> str:
        u = turned(turn)
        weight = u @ torch.diag(torch.tensor([float(stretch), 1.0])) @ turned(FIRST).T
        x = turned(angle)[:, 0]
        y = weight @ x
        self.ellipse.set_data(*(weight @ self.circle))
        self.bound.set_data(*(stretch * self.circle))
        for arrow, end in ((self.x, x), (self.y, y), (self.u1, stretch * u[:, 0]), (self.u2, u[:, 1])):
            self._point(arrow, end)
        gain = y.norm().item()
        return (
            f"The input at {angle:g} degrees becomes {gain:.2f} times as long; no input does better than sigma_1 = "
            f"{stretch:.2f} (dotted), which v_1 at {FIRST:g} degrees reaches and turns to {turn:g}."
        )
