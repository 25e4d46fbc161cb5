"""Pictures that stay: a matrix, an activation and a grid small enough to check by eye (notebooks 00 and 02)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure
from torch import Tensor

from s2d.lab.figures.style import COLOURS

SHADES = ("#d1495b", "#edae49", "#00798c", "#8d6cab", "#6a994e", "#7a7a7a", "#2e4057", "#f4a6b0")


def rank_one_sums(picture: Tensor, sums: Mapping[int, Tensor]) -> Figure:
    """A matrix as a picture, beside the sums of its first rank-one pieces.

    Args:
        picture: ``(m, n)``.
        sums: number of pieces to their sum.
    """
    figure, axes = plt.subplots(1, 1 + len(sums), figsize=(8.5, 2.2))
    shown = {"the matrix": picture} | {f"{k} piece{'s' * (k > 1)}": part for k, part in sums.items()}
    for axis, (title, values) in zip(axes, shown.items(), strict=True):
        axis.imshow(values.numpy(), cmap="gray_r", vmin=0, vmax=float(picture.max()))
        axis.set(title=title, xticks=[], yticks=[])
    return figure


def stacked_contributions(parts: Mapping[str, Sequence[float]]) -> Figure:
    """Some activations, each as the sum of the shares that its singular components add; the line is the whole.

    Args:
        parts: what the activation is to the contributions, the first component's first.
    """
    figure, axis = plt.subplots(figsize=(8, 0.9 + 0.6 * len(parts)))
    for row, values in enumerate(parts.values()):
        right = left = 0.0
        for index, value in enumerate(share / sum(values) for share in values):
            start = right if value >= 0 else left
            axis.barh(row, value, left=start, height=0.6, color=SHADES[index % len(SHADES)])
            right, left = (right + value, left) if value >= 0 else (right, left + value)
        axis.plot([1, 1], [row - 0.42, row + 0.42], color="black", linewidth=2)
    axis.axvline(0, color="black", linewidth=0.8)
    axis.set_yticks(range(len(parts)), parts)
    axis.set(xlabel="share of the activation", title="what each component adds (red: the first; below 0: against it)")
    axis.invert_yaxis()
    return figure


def forces(powers: Sequence[int], largest: float) -> Figure:
    """The force of the penalty on a singular value, relative to that on the largest."""
    figure, axis = plt.subplots(figsize=(6, 3.2))
    sigma = np.linspace(0, largest, 101)
    for power, colour, at in zip(powers, SHADES, (0.4, 0.55, 0.67, 0.82), strict=False):
        axis.plot(sigma, (sigma / largest) ** power, color=colour)
        axis.text(at * largest, at**power - 0.02, f" n = {power}", color=colour, ha="left", va="top")
    axis.set(xlabel=r"$\sigma$", ylabel=r"force, relative to that on $\sigma_1$")
    axis.set_title("the larger the power, the more the penalty picks the largest")
    return figure


def by_hand_against_library(history: Mapping[str, Sequence[float]], library: Sequence[float]) -> Figure:
    """sigma_1 over the steps: without a penalty, by hand, and with the library, which should lie on it."""
    figure, axis = plt.subplots(figsize=(6, 3.2))
    colours = {"no penalty": COLOURS["SGD"], "by hand": COLOURS["S2D"]}
    for name, values in history.items():
        axis.plot(values, color=colours[name])
        axis.text(len(values) - 1, values[-1], f" {name}", color=colours[name], va="center")
    axis.plot(library, color="black", linestyle="none", marker=".", markevery=2)
    axis.set(xlabel="step", ylabel=r"$\sigma_1$ of the layer with the outlier", xlim=(0, 1.25 * len(library)))
    axis.set_ylim(bottom=0)
    axis.set_title("fifteen lines (line) and the library (dots)")
    return figure


def grids(values: Tensor, points: Mapping[str, Tensor]) -> Figure:
    """A histogram of activations, and below it the points of some grids.

    Args:
        values: any shape.
        points: name of a grid to its points.
    """
    figure, (top, bottom) = plt.subplots(2, 1, figsize=(8, 3.4), sharex=True, height_ratios=(3, 1 + len(points)))
    counts, edges = np.histogram(values.numpy(), bins=100)
    top.stairs(counts, edges, fill=True, color="#7a7a7a", alpha=0.6)
    top.set(yscale="log", ylabel="how many", title="activations, and where each grid has its points")
    for row, (places, colour) in enumerate(zip(points.values(), SHADES, strict=False)):
        bottom.plot(places.numpy(), [row] * len(places), color=colour, linestyle="none", marker="|", markersize=14)
    bottom.set_yticks(range(len(points)), points)
    bottom.set(ylim=(len(points) - 0.5, -0.5), xlabel="activation")
    return figure


def before_and_after(pairs: Mapping[str, tuple[Tensor, Tensor]]) -> Figure:
    """Channels before (grey) and after (teal) something was done to them, a panel each.

    Args:
        pairs: title of a panel to the two series, as long as each other.
    """
    figure, axes = plt.subplots(1, len(pairs), figsize=(8.5, 2.8), squeeze=False)
    for axis, (title, (before, after)) in zip(axes[0], pairs.items(), strict=True):
        axis.stairs(before.numpy(), fill=True, color="#7a7a7a", alpha=0.5)
        axis.stairs(after.numpy(), color=COLOURS["S2D"], linewidth=1.8, baseline=None)
        axis.set(title=title, xlabel="channel")
    return figure


def error_by_clip(clips: Sequence[float], errors: Mapping[int, Sequence[float]]) -> Figure:
    """Relative error over the share of the range that the grid keeps, a curve a bit width, its least marked."""
    figure, axis = plt.subplots(figsize=(6, 3.2))
    for (bits, values), colour in zip(errors.items(), SHADES, strict=False):
        axis.plot(clips, values, color=colour)
        least = int(np.argmin(values))
        axis.plot(clips[least], values[least], color=colour, marker="o")
        axis.text(clips[-1], values[-1], f" {bits} bits", color=colour, va="center")
    axis.set(yscale="log", xlim=(None, 1.15 * max(clips)), xlabel="share of the range kept", ylabel="relative error")
    axis.set_title("clipping pays where points are few (dots: the least error)")
    return figure
