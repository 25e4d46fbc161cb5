"""Quantize a model from the command line: see :mod:`s2d.ptq.command.arguments`.

Paper: none
"""

from s2d.ptq.command.run import main

__all__ = ["main"]
