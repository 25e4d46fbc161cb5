"""``python -m s2d``: see :mod:`s2d.command`."""

import sys

from s2d.command import main

if __name__ == "__main__":
    sys.exit(main())
