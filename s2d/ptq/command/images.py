"""Images as they come in folders, turned into what a model's preprocessing takes: 8 bits a channel, upright, opaque."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch

from s2d.packages import need

WHITE = 255


def is_hidden(path: Path) -> bool:
    """Whether a file or folder is none of the user's: macOS leaves ``._`` files and ``__MACOSX`` folders in archives.

    Example:
        >>> is_hidden(Path("train/._cat.png")), is_hidden(Path("train/cat.png"))
        (True, False)

    Paper: none
    """
    return path.name.startswith(".") or path.name == "__MACOSX"


def read_image(file: Path, mode: str) -> Any:
    """An image file in the mode that a model takes.

    It is turned as its EXIF orientation says. 16 bits are scaled to 8, as are floating-point numbers from 0 to 1; what
    is transparent lets a white page through; CMYK and palettes become their colours.

    Args:
        file: of a kind that Pillow reads; of several frames, the first is taken.
        mode: ``"RGB"`` or ``"L"``.

    Returns:
        A PIL image, loaded.

    Raises:
        ValueError: naming the file, for one that is damaged, too large to be decoded safely, or holds numbers whose
            range is not known.
        ImportError: without the package Pillow.

    Paper: none
    """
    image_module, ops = need("PIL.Image", "an image"), need("PIL.ImageOps", "an image")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", image_module.DecompressionBombWarning)  # an error, below
            image = image_module.open(file)
        with image:
            width, height = image.size
            limit = image_module.MAX_IMAGE_PIXELS
            if limit is not None and width * height > limit:
                raise ValueError(f"it has {width} x {height} pixels, over {limit}: make it smaller")
            return _flat(image_module, _eight_bits(ops.exif_transpose(image))).convert(mode)
    except Exception as error:  # Pillow's decoders fail in as many ways as there are formats
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(f"{file} cannot be read as an image ({reason}): repair or remove it") from None


def _eight_bits(image: Any) -> Any:
    """Numbers of 16 bits or in floating point scaled to 0 to 255; other images as they are."""
    if not image.mode.startswith(("I", "F")):
        return image
    numbers = image if image.mode == "F" else image.convert("I")  # of either byte order
    low, high = numbers.getextrema()
    top = 1 if image.mode == "F" else 65535
    if image.mode == "F" and not torch.frombuffer(bytearray(image.tobytes()), dtype=torch.float32).isfinite().all():
        raise ValueError("it holds NaN or infinity")
    if not 0 <= low <= high <= top:
        raise ValueError(f"it holds numbers from {low} to {high} instead of 0 to {top}: scale it to 8 bits")
    # Pillow cuts off the fraction.
    scaled = numbers.convert("F").point(lambda value: value * (255 / top) + 0.5).convert("L")
    scaled.info.pop("transparency", None)  # a grey value of 16 bits, which is none of these
    return scaled


def _flat(image_module: Any, image: Any) -> Any:
    """Without transparency, on white."""
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        image = image.convert("RGBA")
        page = image_module.new("RGBA", image.size, (WHITE,) * 4)
        return image_module.alpha_composite(page, image)
    return image
