"""Writes what the pipelines of this folder need: photographs from scikit-image, and two bases with random weights."""

from __future__ import annotations

import shutil
from importlib.resources import files
from pathlib import Path

from lora_engine.bases.untrained import write_untrained_base

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
    """Fills `images/` and `bases/` beside this file."""
    here = Path(__file__).resolve().parent
    (here / "images").mkdir(exist_ok=True)
    for name in PHOTOGRAPHS:
        with (files("skimage") / "data" / name).open("rb") as source, (here / "images" / name).open("wb") as target:
            shutil.copyfileobj(source, target)
    for shape in ("sd15", "sdxl"):
        write_untrained_base(here / "bases" / shape, shape)
    print(f"Wrote {len(PHOTOGRAPHS)} photographs to {here / 'images'} and two bases to {here / 'bases'}.")


if __name__ == "__main__":
    main()
