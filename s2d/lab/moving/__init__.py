"""Pictures that move: drawn once, changed in place, and turned by controls where somebody is there to turn them.

In a notebook that somebody has open, :func:`explore` shows sliders and menus. Where nobody is (the batch, a page on
GitHub), it leaves the picture at its start, with a sentence that says what is to be seen.
"""

from s2d.lab.moving.browser import Browser
from s2d.lab.moving.decay import Decay
from s2d.lab.moving.ellipse import Ellipse
from s2d.lab.moving.picture import Choice, Picture, Slider, explore
from s2d.lab.moving.rounding import Rounding
from s2d.lab.moving.selection import Selection

__all__ = ["Browser", "Choice", "Decay", "Ellipse", "Picture", "Rounding", "Selection", "Slider", "explore"]
