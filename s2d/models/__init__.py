"""Networks that somebody else trained: found, checked, and loaded with what feeds them."""

from s2d.models.conditioning import Conditioned, Look, condition
from s2d.models.loading import load
from s2d.models.presets import PRESETS, Preset, locate
from s2d.models.subject import Subject

__all__ = ["PRESETS", "Conditioned", "Look", "Preset", "Subject", "condition", "load", "locate"]
