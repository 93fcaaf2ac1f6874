"""Preprocess: pictures of any size become squares of one size; which part is kept is decided here."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from lora_engine.data.images import open_picture, write_picture
from lora_engine.data.manifest import Manifest
from lora_engine.data.spec import PreprocessSettings
from lora_engine.registries import Registry

Box = tuple[int, int, int, int]
CROPS: Registry[Callable[[Image.Image, int], Box]] = Registry("crop")


def preprocess(dataset: Path, out: Path, settings: PreprocessSettings) -> Manifest:
    """Writes the dataset again with every picture `resolution` x `resolution`, one picture in memory at a time.

    The shorter side is brought to the resolution (Lanczos to shrink, bicubic to enlarge), the longer one is cropped.
    A picture keeps its file name: it stays tied to the original's digest.

    Raises:
        DataError: The dataset is not whole.
    """
    manifest = Manifest.load(dataset)
    size = settings.resolution
    for picture in manifest.pictures:
        square = to_square(open_picture(dataset / picture.file, root=dataset), size, settings.crop)
        write_picture(out / picture.file, square)
    done = tuple(picture.model_copy(update={"width": size, "height": size}) for picture in manifest.pictures)
    result = manifest.model_copy(update={"pictures": done})
    result.save(out)
    return result


def to_square(picture: Image.Image, size: int, crop: str) -> Image.Image:
    """The picture resized and cropped to size x size pixels."""
    scale = size / min(picture.size)
    wanted = (max(size, round(picture.width * scale)), max(size, round(picture.height * scale)))
    if wanted != picture.size:
        method = Image.Resampling.LANCZOS if scale < 1 else Image.Resampling.BICUBIC
        picture = picture.resize(wanted, method)
    return picture.crop(CROPS[crop](picture, size))


def center_box(picture: Image.Image, size: int) -> Box:
    """The square in the middle."""
    left, top = (picture.width - size) // 2, (picture.height - size) // 2
    return left, top, left + size, top + size


def salient_box(picture: Image.Image, size: int) -> Box:
    """The square with the highest gradient energy; among equal ones the one nearest to the middle."""
    energy = _gradient_energy(picture)
    table = np.zeros((energy.shape[0] + 1, energy.shape[1] + 1), dtype=np.int64)
    table[1:, 1:] = energy.cumsum(axis=0).cumsum(axis=1)
    sums = table[size:, size:] - table[:-size, size:] - table[size:, :-size] + table[:-size, :-size]
    tops, lefts = np.nonzero(sums == sums.max())
    middle = (sums.shape[0] - 1) / 2, (sums.shape[1] - 1) / 2
    nearest = int(np.argmin(np.abs(tops - middle[0]) + np.abs(lefts - middle[1])))
    left, top = int(lefts[nearest]), int(tops[nearest])
    return left, top, left + size, top + size


def _gradient_energy(picture: Image.Image) -> NDArray[np.int64]:
    # Integers: the sums, and so the window, are the same on every machine.
    grey = np.asarray(picture.convert("L"), dtype=np.int64)
    energy = np.zeros_like(grey)
    energy[:, 1:] += np.diff(grey, axis=1) ** 2
    energy[1:, :] += np.diff(grey, axis=0) ** 2
    return energy


CROPS.add("center", center_box)
CROPS.add("salient", salient_box)
