"""``python -m s2d.lab.book [FOLDER]``: build the site."""

import sys

from s2d.lab.book.build import main

sys.exit(main())
