"""The photographs of scikit-image."""

from __future__ import annotations

from importlib.resources import files

from PIL import Image


def photograph(name: str) -> Image.Image:
    """Returns a photograph as RGB."""
    with (files("skimage") / "data" / name).open("rb") as file:
        return Image.open(file).convert("RGB")
