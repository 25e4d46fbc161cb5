"""Checkpoints and layers chosen from menus."""

from __future__ import annotations

import numpy as np
import pandas as pd

from s2d.lab.moving.picture import GREY, RED, TEAL, Choice, Picture


class Browser(Picture):
    """The spectrum of one layer after one kind of training, the others behind it, and its largest activation.

    Args:
        spectra: columns variant, seed, layer, index, sigma (:func:`s2d.lab.evaluate.spectra_table`).
        layers: columns variant, seed, layer, max_abs (:func:`s2d.lab.evaluate.layer_table`).

    Paper: Table 7 in shape.
    """

    size = (8.6, 3.4)

    def __init__(self, spectra: pd.DataFrame, layers: pd.DataFrame) -> None:
        super().__init__()
        self.variants, self.layers = list(dict.fromkeys(spectra.variant)), list(dict.fromkeys(spectra.layer))
        sigma = spectra.groupby(["variant", "layer", "index"], sort=False).sigma.mean()
        self.spectra = {key: group.to_numpy() for key, group in sigma.groupby(level=["variant", "layer"], sort=False)}
        self.largest = layers.groupby(["variant", "layer"], sort=False).max_abs.mean()
        self.controls = {
            "variant": Choice(tuple(self.variants), self.variants[0], "trained with"),
            "layer": Choice(tuple(self.layers), self.layers[-1], "layer"),
        }
        spectrum, outlier = self.figure.subplots(1, 2, width_ratios=(3, 2))
        self.others = [spectrum.plot([], [], color="0.8", linewidth=1)[0] for _ in self.variants]
        (self.own,) = spectrum.plot([], [], color=RED, linewidth=2)
        longest = max(len(values) for values in self.spectra.values())
        spectrum.set(
            xlabel="$r$", ylabel=r"$\sigma_r$ over the largest $\sigma_1$", title="the spectrum (grey: the others)"
        )
        spectrum.set(xlim=(0, longest + 1), ylim=(0, 1.05))
        self.bars = outlier.barh(self.variants, [1] * len(self.variants), color=GREY)
        outlier.invert_yaxis()
        outlier.set(xlabel="largest activation of this layer", xlim=(0, 1.05 * self.largest.max()))
        self.settle(*self.others, self.own, *self.bars)

    def numbers(self) -> dict[str, list[dict]]:
        return {
            "found": [
                {
                    "variant": variant,
                    "layer": layer,
                    "sigma": np.round(self.spectra[variant, layer], 3).tolist(),
                    "largest": round(float(self.largest[variant, layer]), 2),
                }
                for variant in self.variants
                for layer in self.layers
            ]
        }

    def update(self, *, variant: str, layer: str) -> str:
        own = self.spectra[variant, layer]
        top = max(self.spectra[name, layer][0] for name in self.variants)
        for line, name in zip(self.others, self.variants, strict=True):
            other = self.spectra[name, layer]
            line.set_data(np.arange(1, len(other) + 1), other / top)
        self.own.set_data(np.arange(1, len(own) + 1), own / top)
        for bar, name in zip(self.bars, self.variants, strict=True):
            bar.set_width(self.largest[name, layer])
            bar.set_color(TEAL if name == variant else GREY)
        return (
            f"{layer} after {variant}: sigma_1 {own[0]:.2f}, the median singular value {np.median(own):.2f}, the "
            f"largest activation {self.largest[variant, layer]:.1f} (means over seeds)."
        )
