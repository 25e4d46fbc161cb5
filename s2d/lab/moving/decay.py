"""A spectrum under the penalty, step by step."""

from __future__ import annotations

import numpy as np
from torch import Tensor

from s2d.lab.moving.picture import GREY, RED, TEAL, Picture, Slider

STEPS = 300
LR = 0.1


class Decay(Picture):
    r"""What ``steps`` gradient steps of the penalty alone do to a spectrum.

    With the vectors fixed every singular value goes its own way, :math:`\sigma \leftarrow \sigma - \eta \lambda
    \sigma^n`, never past zero; :math:`\eta` is 0.1.

    Args:
        s: ``(r,)`` the singular values, descending.

    Paper: Algorithm 1 (the force of one step is lam sigma^n), G.1.
    """

    controls = {
        "power": Slider(1, 4, 1, 2, "power n"),
        "lam": Slider(0.0, 0.1, 0.002, 0.01, "strength lam"),
        "steps": Slider(0, STEPS, 2, 100, "steps", plays=True),
    }

    def __init__(self, s: Tensor) -> None:
        super().__init__()
        self.s = s.double().numpy()
        bars, curves = self.figure.subplots(1, 2, sharey=True, width_ratios=(3, 2))
        places = np.arange(1, len(self.s) + 1)
        bars.bar(places, self.s, color="none", edgecolor=GREY, linewidth=1)
        self.bars = bars.bar(places, self.s, color=TEAL)
        self.bars[0].set_color(RED)
        bars.set(xlabel="$r$", ylabel=r"$\sigma_r$", title="the spectrum, before (outlines) and now")
        followed = sorted({0, len(self.s) // 3, len(self.s) - 1})
        self.followed = followed
        self.curves = [curves.plot([], [], color=RED if r == 0 else TEAL)[0] for r in followed]
        self.now = curves.axvline(0, color=GREY, linewidth=1, linestyle=":")
        names = ", ".join(str(r + 1) for r in followed)
        curves.set(xlabel="steps", xlim=(0, STEPS), title=rf"$\sigma_r$ for $r$ = {names}")
        bars.set_ylim(0, 1.05 * self.s.max())
        self.settle(*self.bars, *self.curves, self.now)

    def numbers(self) -> dict[str, list[float]]:
        return {"s": self.s.round(4).tolist()}

    def update(self, *, power: int, lam: float, steps: int) -> str:
        path = np.empty((STEPS + 1, len(self.s)))
        path[0] = self.s
        for step in range(STEPS):
            path[step + 1] = np.maximum(path[step] - LR * lam * path[step] ** power, 0.0)
        for bar, height in zip(self.bars, path[steps], strict=True):
            bar.set_height(height)
        for curve, r in zip(self.curves, self.followed, strict=True):
            curve.set_data(range(STEPS + 1), path[:, r])
        self.now.set_xdata([steps, steps])
        first, last = path[steps, 0], path[steps, -1]
        return (
            f"After {steps} steps of lam {lam:g} and power {power}, sigma_1 went from {self.s[0]:.2f} to {first:.2f} "
            f"and the smallest from {self.s[-1]:.2f} to {last:.2f}."
        )
