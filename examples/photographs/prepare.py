"""Writes the inputs of the pipelines in this folder: photographs from scikit-image."""

from __future__ import annotations

import shutil
from importlib.resources import files
from pathlib import Path

PHOTOGRAPHS = (
    "astronaut.png",
    "brick.png",
    "camera.png",
    "chelsea.png",
    "coffee.png",
    "coins.png",
    "grass.png",
    "gravel.png",
    "hubble_deep_field.jpg",
    "motorcycle_left.png",
    "retina.jpg",
    "rocket.jpg",
)


def main() -> None:
    """Writes `images/` beside this file."""
    folder = Path(__file__).resolve().parent
    (folder / "images").mkdir(exist_ok=True)
    for name in PHOTOGRAPHS:
        with (files("skimage") / "data" / name).open("rb") as source, (folder / "images" / name).open("wb") as target:
            shutil.copyfileobj(source, target)
    print(f"Wrote {len(PHOTOGRAPHS)} photographs to {folder / 'images'}.")


if __name__ == "__main__":
    main()
