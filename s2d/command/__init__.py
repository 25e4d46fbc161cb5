"""``s2d``: diagnose a network, condition it, quantize it, evaluate it. See ``s2d --help``.

Paper: none
"""

from s2d.command.main import main

__all__ = ["main"]
