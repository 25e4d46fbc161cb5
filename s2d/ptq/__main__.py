"""``python -m s2d.ptq``: see :mod:`s2d.ptq.command`."""

import sys

from s2d.ptq.command import main

if __name__ == "__main__":
    sys.exit(main())
