"""``python -m s2d.lab.notebook``: see :mod:`s2d.lab.notebook`."""

import sys

from s2d.lab.notebook.cli import main

if __name__ == "__main__":
    sys.exit(main())
