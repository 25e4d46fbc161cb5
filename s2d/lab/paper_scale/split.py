"""Training images put aside, so that settings are never chosen on the test set."""

from __future__ import annotations

import random
from pathlib import Path

from s2d.files import write_folder_atomically


def put_aside(source: Path, folder: Path, *, share: float, seed: int) -> dict[str, int]:
    """Two folders of links, ``train`` and ``val``, that share the images of one: the same part of every class.

    Args:
        source: with a folder of images for each class.
        folder: to make.
        share: of each class that goes to ``val``, at least one image and never all.
        seed: of the draw.

    Returns:
        How many images each has.

    Raises:
        ValueError: for a folder without classes, a class of fewer than two images, or a share outside (0, 1).
        OSError: if the folder is there already.

    Paper: none
    """
    if not 0 < share < 1:
        raise ValueError(f"--share is {share}: give a part of each class, such as 0.02")
    classes = sorted(path for path in source.iterdir() if path.is_dir()) if source.is_dir() else []
    if not classes:
        raise ValueError(f"{source} holds no folders of images: give one with a folder for each class")
    counts = {"train": 0, "val": 0}

    def fill(new: Path) -> None:
        for inner in classes:
            files = sorted(path for path in inner.iterdir() if path.is_file() and not path.name.startswith("."))
            if len(files) < 2:
                raise ValueError(f"{inner} holds {len(files)} images: two are needed to put one aside")
            random.Random(f"{seed} {inner.name}").shuffle(files)
            held = min(max(1, round(share * len(files))), len(files) - 1)
            for part, some in (("val", files[:held]), ("train", files[held:])):
                (new / part / inner.name).mkdir(parents=True)
                for file in some:
                    (new / part / inner.name / file.name).symlink_to(file.resolve())
                counts[part] += len(some)

    write_folder_atomically(folder, fill)
    return counts
