"""Preprocess: pictures of any size get the sizes that they are trained in; which part is kept is decided here.

A mask goes the very same way as its picture.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from lora_engine.data.buckets import Fit, Sides, bucket_sizes, choose_bucket, fit_into
from lora_engine.data.images import open_image, write_image, write_mask
from lora_engine.data.manifest import ImageEntry, Manifest, Quarantined
from lora_engine.data.spec import Buckets, PreprocessSettings
from lora_engine.errors import DataError
from lora_engine.registries import Registry

Box = tuple[int, int, int, int]
CROPS: Registry[Callable[[Image.Image, Sides], Box]] = Registry("crop")


def preprocess(dataset: Path, out: Path, settings: PreprocessSettings) -> Manifest:
    """Writes the dataset again with every picture in its size, one picture in memory at a time.

    A picture is brought to the least size that covers the wanted one (Lanczos to shrink, bicubic to enlarge), and what
    stands over is cropped. It keeps its file name: it stays tied to the original's digest. Its mask is resized (mean to
    shrink, linear to enlarge: neither leaves the range) and cropped with it.

    Raises:
        DataError: The dataset is not whole, or all of its pictures are too small for a bucket.
    """
    manifest = Manifest.load(dataset)
    keep = settings.crop if settings.crop != "bucket" else (settings.buckets or Buckets()).keep
    choose = _chooser(settings)
    done: list[ImageEntry] = []
    quarantined = list(manifest.quarantined)
    for picture in manifest.pictures:
        pixels = open_image(dataset / picture.file, root=dataset)
        fit = choose(pixels.size)
        if fit is None:
            quarantined.append(Quarantined(source=picture.source, reason=_too_small(picture, settings)))
            continue
        resized = _resize(pixels, fit)
        box = CROPS[keep](resized, fit.size)
        write_image(out / picture.file, resized.crop(box))
        if picture.mask is not None:
            mask = open_image(dataset / picture.mask, root=dataset).convert("L")
            write_mask(out / picture.mask, _resize_mask(mask, fit).crop(box))
        done.append(picture.model_copy(update={"width": fit.size[0], "height": fit.size[1]}))
    if not done:
        raise DataError(
            f"all {len(manifest.pictures)} pictures are too small, first {quarantined[-1].source}: "
            f"{quarantined[-1].reason}",
            where=str(dataset),
            remedy="lower resolution or buckets.min_side, or raise buckets.enlarge",
        )
    result = manifest.model_copy(update={"pictures": tuple(done), "quarantined": tuple(quarantined)})
    result.save(out)
    return result


def to_square(picture: Image.Image, size: int, crop: str) -> Image.Image:
    """The picture resized and cropped to size x size pixels."""
    resized = _resize(picture, fit_into(picture.size, (size, size)))
    return resized.crop(CROPS[crop](resized, (size, size)))


def center_box(picture: Image.Image, size: Sides) -> Box:
    """The window of (width, height) in the middle."""
    left, top = (picture.width - size[0]) // 2, (picture.height - size[1]) // 2
    return left, top, left + size[0], top + size[1]


def salient_box(picture: Image.Image, size: Sides) -> Box:
    """The window of (width, height) with the highest gradient energy; among equals the one nearest to the middle."""
    width, height = size
    energy = _gradient_energy(picture)
    table = np.zeros((energy.shape[0] + 1, energy.shape[1] + 1), dtype=np.int64)
    table[1:, 1:] = energy.cumsum(axis=0).cumsum(axis=1)
    sums = table[height:, width:] - table[:-height, width:] - table[height:, :-width] + table[:-height, :-width]
    tops, lefts = np.nonzero(sums == sums.max())
    middle = (sums.shape[0] - 1) / 2, (sums.shape[1] - 1) / 2
    nearest = int(np.argmin(np.abs(tops - middle[0]) + np.abs(lefts - middle[1])))
    left, top = int(lefts[nearest]), int(tops[nearest])
    return left, top, left + width, top + height


def _chooser(settings: PreprocessSettings) -> Callable[[Sides], Fit | None]:
    if settings.crop != "bucket":
        square = (settings.resolution, settings.resolution)
        return lambda picture: fit_into(picture, square)
    buckets = settings.buckets or Buckets()
    sizes = bucket_sizes(settings.resolution, buckets)
    return lambda picture: choose_bucket(picture, sizes, buckets, settings.resolution)


def _too_small(picture: ImageEntry, settings: PreprocessSettings) -> str:
    buckets = settings.buckets or Buckets()
    return (
        f"{picture.width} x {picture.height} pixels are too small for a bucket with sides of "
        f"{buckets.sides(settings.resolution)[0]} and more, enlarged at most {buckets.enlarge:g} times"
    )


def _resize(picture: Image.Image, fit: Fit) -> Image.Image:
    if fit.resized == picture.size:
        return picture
    return picture.resize(fit.resized, Image.Resampling.LANCZOS if fit.scale < 1 else Image.Resampling.BICUBIC)


def _resize_mask(mask: Image.Image, fit: Fit) -> Image.Image:
    if fit.resized == mask.size:
        return mask
    return mask.resize(fit.resized, Image.Resampling.BOX if fit.scale < 1 else Image.Resampling.BILINEAR)


def _gradient_energy(picture: Image.Image) -> NDArray[np.int64]:
    # Integers: the sums, and so the window, are the same on every machine.
    grey = np.asarray(picture.convert("L"), dtype=np.int64)
    energy = np.zeros_like(grey)
    energy[:, 1:] += np.diff(grey, axis=1) ** 2
    energy[1:, :] += np.diff(grey, axis=0) ** 2
    return energy


CROPS.add("center", center_box)
CROPS.add("salient", salient_box)
