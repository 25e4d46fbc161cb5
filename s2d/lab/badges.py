"""Where the course can be opened elsewhere: links for the README and the core hour, once the repository has an address.

python -m s2d.lab.badges OWNER/NAME
"""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence

import nbformat

from s2d.files import write_text
from s2d.lab.paths import repository_root

MARK = "<!-- badges -->"
OLD = re.compile(rf"{MARK}.*?{MARK}\n\n", re.DOTALL)


def badges(repository: str, notebook: str) -> str:
    """Links to a notebook on Colab and Binder.

    Args:
        repository: ``owner/name`` on GitHub.
        notebook: its path in the repository.

    Raises:
        ValueError: if the repository is no such name.

    Example:
        >>> badges("owner/name", "notebooks/00_by_hand.ipynb").count("](https://")
        4
    """
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", repository):
        raise ValueError(f"{repository!r} is no repository: give OWNER/NAME, as on GitHub")
    colab = f"https://colab.research.google.com/github/{repository}/blob/main/{notebook}"
    binder = f"https://mybinder.org/v2/gh/{repository}/main?urlpath=lab/tree/{notebook}"
    return (
        f"{MARK}[![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)]({colab}) "
        f"[![Open in Binder](https://mybinder.org/badge_logo.svg)]({binder}){MARK}\n\n"
    )


def with_badges(text: str, repository: str, notebook: str) -> str:
    """A page with the links under its title, instead of older ones.

    Example:
        >>> once = with_badges("# Title\\n\\nText.", "owner/name", "notebooks/00_by_hand.ipynb")
        >>> once == with_badges(once, "owner/name", "notebooks/00_by_hand.ipynb")
        True
    """
    title, _, rest = OLD.sub("", text).partition("\n\n")
    return f"{title}\n\n{badges(repository, notebook)}{rest}"


def main(argv: Sequence[str]) -> int:
    """Put them into the README and the notebooks of the core hour."""
    if len(argv) != 1:
        print("usage: python -m s2d.lab.badges OWNER/NAME", file=sys.stderr)
        return 2
    root = repository_root()
    hour = sorted((root / "notebooks").glob("0[0-9]_*.ipynb"))
    try:
        readme = root / "README.md"
        write_text(readme, with_badges(readme.read_text(encoding="utf-8"), argv[0], f"notebooks/{hour[0].name}"))
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    for path in hour:
        notebook = nbformat.read(path, as_version=4)
        first = notebook.cells[0]
        first.source = with_badges(first.source, argv[0], f"notebooks/{path.name}")
        write_text(path, nbformat.writes(notebook) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
