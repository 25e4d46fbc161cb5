"""Run the command: see :mod:`s2d.lab.paper_scale.command`."""

import sys

from s2d.lab.paper_scale.command import main

if __name__ == "__main__":
    sys.exit(main())
