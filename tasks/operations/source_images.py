"""Prepares the image and the mask that a user painted over it, as files that a request may name."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from lora_engine.files import sha256_file

_LIMIT = 4096 * 4096
"""Pixels of an image to start from."""


def prepare_source(image: Path, layers: Sequence[Path], folder: Path) -> tuple[Path, Path | None]:
    """Writes an image as plain PNG, and the mask of what was painted over it.

    Args:
        image: The image.
        layers: Images of the same size that are transparent where nothing was painted.
        folder: The folder for both files.

    Returns:
        The image, and the mask, which is light where anything was painted; None if nothing was.

    Raises:
        DataError: A file is no image that can be used, or is too large.
    """
    from PIL import Image, ImageChops

    from lora_engine.data.images import open_image, open_with_alpha, write_image, write_mask

    source = open_image(image, _LIMIT)
    painted = Image.new("L", source.size)
    for layer in layers:
        _, rgb, opacity = open_with_alpha(layer, _LIMIT)
        # A layer without transparent pixels was painted everywhere.
        cover = Image.new("L", rgb.size, 255) if opacity is None else opacity.point(lambda value: 255 * (value > 0))
        painted = ImageChops.lighter(painted, cover.resize(source.size, Image.Resampling.NEAREST))
    name = sha256_file(image)[:16]
    path = folder / f"{name}-image.png"
    write_image(path, source)
    if painted.getbbox() is None:
        return path, None
    mask = folder / f"{name}-mask.png"
    write_mask(mask, painted)
    return path, mask
