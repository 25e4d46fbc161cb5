"""What every moving picture is, and how it is shown."""

from __future__ import annotations

import base64
import io
import os
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar, NamedTuple

import numpy as np
from matplotlib.artist import Artist
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image

from s2d.lab.notebook.complete import MARKER_VARIABLE

RED, TEAL, GOLD, GREY = "#d1495b", "#00798c", "#edae49", "#7a7a7a"
DPI = 80
MOVING = "application/vnd.s2d.moving+json"
"""What the web edition draws a moving picture from (``docs/book/static/moving.js``), beside the still one."""


class Slider(NamedTuple):
    """A number that somebody may turn; ``plays`` gives it a button that moves it by itself."""

    low: float
    high: float
    step: float
    start: float
    says: str
    plays: bool = False

    def check(self, name: str, value: Any) -> None:
        """ValueError unless ``value`` is a number on the slider."""
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not self.low <= value <= self.high:
            raise ValueError(f"{name} is {value!r}: give a number from {self.low:g} to {self.high:g}")


class Choice(NamedTuple):
    """One of several words."""

    options: tuple[str, ...]
    start: str
    says: str

    def check(self, name: str, value: Any) -> None:
        """ValueError unless ``value`` is one of them."""
        if value not in self.options:
            raise ValueError(f"{name} is {value!r}: choose among {', '.join(self.options)}")


class Picture(ABC):
    """A figure of which only what moves is drawn again.

    Attributes:
        controls: argument of :meth:`update` to its control.
        figure: of matplotlib, belonging to no window.
    """

    controls: Mapping[str, Slider | Choice]
    size: ClassVar[tuple[float, float]] = (8.0, 3.4)

    def __init__(self) -> None:
        self.figure = Figure(figsize=self.size, dpi=DPI, layout="constrained")
        FigureCanvasAgg(self.figure)

    def settle(self, *moving: Artist) -> None:
        """Lay the figure out and draw, once, all that stays: axes and words take most of the time.

        Args:
            *moving: what :meth:`update` changes, in the order in which it is drawn over the rest.
        """
        for artist in moving:
            artist.set_animated(True)
        self.moving = moving
        self.figure.canvas.draw()
        self.figure.set_layout_engine("none")
        self._rest = self.figure.canvas.copy_from_bbox(self.figure.bbox)

    @abstractmethod
    def update(self, **values: Any) -> str:
        """Change the figure.

        Returns:
            What is to be seen, in a sentence: the picture's text alternative.
        """

    def start(self) -> dict[str, Any]:
        """The values of the controls before anybody turns them."""
        return {name: control.start for name, control in self.controls.items()}

    def show(self, **values: Any) -> str:
        """:meth:`update` with some values, and the start's for the others.

        Raises:
            ValueError: for a name that is not a control, or a value that is not on it.
        """
        for name, value in values.items():
            if name not in self.controls:
                raise ValueError(f"there is no control {name!r}: there are {', '.join(self.controls)}")
            self.controls[name].check(name, value)
        return self.update(**self.start() | values)

    def numbers(self) -> dict[str, Any]:
        """What the picture is drawn from, for the web edition to draw it without Python; few enough to be stored."""
        return {}

    def png(self) -> bytes:
        """The picture as it is now; the same bytes for the same values."""
        canvas, stream = self.figure.canvas, io.BytesIO()
        canvas.restore_region(self._rest)
        for artist in self.moving:
            self.figure.draw_artist(artist)
        Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB").save(stream, "PNG", compress_level=1)
        return stream.getvalue()


def explore(picture: Picture, **values: Any) -> None:
    """Show a picture, with its controls where somebody has the notebook open.

    Args:
        picture: what is shown.
        **values: of its controls at the start.

    Raises:
        ValueError: see :meth:`Picture.show`.

    Example:
        >>> import torch
        >>> from s2d.lab.moving import Decay, explore
        >>> explore(Decay(torch.tensor([8.0, 2.0, 1.0])), power=3)
        After 100 steps of lam 0.01 and power 3, sigma_1 went from 8.00 to 2.13 and the smallest from 1.00 to 0.91.

    Paper: none.
    """
    from IPython.display import display

    sentence = picture.show(**values)
    if not _in_a_kernel():
        print(sentence)
    elif os.environ.get(MARKER_VARIABLE):
        still = base64.b64encode(picture.png()).decode()
        display({"image/png": still, "text/plain": sentence, MOVING: moving(picture, **values)}, raw=True)
    else:
        display(controls(picture, **values))


def moving(picture: Picture, **values: Any) -> dict[str, Any]:
    """A picture as numbers: its kind, its controls where they stand, and what it is drawn from."""
    return {
        "picture": type(picture).__name__,
        "controls": {
            name: control._asdict() | {"start": values.get(name, control.start)}
            for name, control in picture.controls.items()
        },
        "numbers": picture.numbers(),
    }


def _in_a_kernel() -> bool:
    from IPython import get_ipython

    return getattr(get_ipython(), "kernel", None) is not None


def controls(picture: Picture, **values: Any) -> Any:
    """The picture with a widget for each control, which redraw it.

    Args:
        picture: what is shown.
        **values: of its controls at the start.

    Returns:
        A box of ipywidgets: the controls, the image, the sentence.
    """
    import ipywidgets

    image, caption = ipywidgets.Image(format="png"), ipywidgets.HTML()
    widgets = {
        name: _widget(control, values.get(name, control.start), ipywidgets)
        for name, control in picture.controls.items()
    }

    def moved(_: Any) -> None:
        sentence = picture.show(**{name: widget.value for name, widget in widgets.items()})
        image.value, caption.value = picture.png(), sentence

    for widget in widgets.values():
        widget.observe(moved, "value")
    moved(None)
    rows = [_with_play(picture.controls[name], widget, ipywidgets) for name, widget in widgets.items()]
    return ipywidgets.VBox([*rows, image, caption])


def _widget(control: Slider | Choice, value: Any, ipywidgets: Any) -> Any:
    look = {"description": control.says, "style": {"description_width": "12em"}, "layout": {"width": "32em"}}
    if isinstance(control, Choice):
        return ipywidgets.Dropdown(options=control.options, value=value, **look)
    kind = ipywidgets.IntSlider if isinstance(control.step, int) else ipywidgets.FloatSlider
    return kind(value=value, min=control.low, max=control.high, step=control.step, **look)


def _with_play(control: Slider | Choice, widget: Any, ipywidgets: Any) -> Any:
    if not getattr(control, "plays", False):
        return widget
    # A redraw takes a few hundredths of a second; ten a second leave time for the browser.
    play = ipywidgets.Play(min=control.low, max=control.high, step=control.step, interval=100)
    ipywidgets.jslink((play, "value"), (widget, "value"))
    return ipywidgets.HBox([widget, play])
