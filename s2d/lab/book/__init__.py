"""The web edition: one static site, built offline from the notebooks' stored outputs, the guides and the tables.

    make book        or        python -m s2d.lab.book build/book

:mod:`~s2d.lab.book.stage` lays the sources out in one folder, :mod:`~s2d.lab.book.pages` writes the pages that are
computed (gallery, claims, API), Sphinx with ``docs/book/conf.py`` turns them into HTML.
"""

from s2d.lab.book.build import build

__all__ = ["build"]
