"""Resizes and crops images, and their masks, to the sizes for training."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from lora_engine.data.buckets import Fit, Sides, bucket_sizes, choose_bucket, fit_into
from lora_engine.data.images import MAX_PIXELS, open_image, write_image, write_mask
from lora_engine.data.manifest import ImageEntry, Manifest, Quarantined
from lora_engine.data.spec import Buckets, PreprocessSettings
from lora_engine.errors import DataError
from lora_engine.framing import Framing
from lora_engine.parallel import Workers
from lora_engine.progress import Progress, no_progress
from lora_engine.registries import Registry

Box = tuple[int, int, int, int]
CROPS: Registry[Callable[[Image.Image, Sides], Box]] = Registry("crop")


def preprocess(dataset: Path, out: Path, settings: PreprocessSettings, progress: Progress = no_progress) -> Manifest:
    """Writes a copy of the dataset with every image in its training size, one image per core in memory at a time.

    Resizes an image to the least size that covers the target (Lanczos to shrink, bicubic to enlarge) and crops the
    rest. The file name, which contains the original's digest, stays. A mask is resized (mean to shrink, linear to
    enlarge: neither leaves the range) and cropped with its image.

    Raises:
        DataError: The dataset is incomplete, or all of its images are too small for a bucket, or too elongated.
    """
    manifest = Manifest.load(dataset)
    entries: list[ImageEntry] = []
    quarantined = list(manifest.quarantined)
    write = partial(_write_resized, dataset, out, settings, _chooser(settings))
    with Workers() as workers:
        fits = workers.map(write, manifest.pictures)
        for done, (entry, (fit, box)) in enumerate(zip(manifest.pictures, fits, strict=True), start=1):
            if fit is None or box is None:
                reason = _too_small(entry, settings) if fit is None else _too_long(entry, fit)
                quarantined.append(Quarantined(source=entry.source, reason=reason))
            else:
                framing = _frame(entry, fit, box) if settings.original_sizes else None
                changes = {"width": fit.size[0], "height": fit.size[1], "framing": framing}
                entries.append(entry.model_copy(update=changes))
            progress(done, len(manifest.pictures), {})
    if not entries:
        raise DataError(
            f"none of the {len(manifest.pictures)} images has a usable size, last {quarantined[-1].source}: "
            f"{quarantined[-1].reason}",
            where=str(dataset),
            remedy="lower resolution or buckets.min_side, raise buckets.enlarge, or crop the images",
        )
    result = manifest.model_copy(update={"pictures": tuple(entries), "quarantined": tuple(quarantined)})
    result.save(out)
    return result


def _write_resized(
    dataset: Path,
    out: Path,
    settings: PreprocessSettings,
    choose: Callable[[Sides], Fit | None],
    entry: ImageEntry,
) -> tuple[Fit | None, Box | None]:
    """Writes an image and its mask in their training size; returns no box if it is unusable, no fit if too small."""
    image = open_image(dataset / entry.file, root=dataset)
    fit = choose(image.size)
    if fit is None or _is_too_long(fit):
        return fit, None
    keep = settings.crop if settings.crop != "bucket" else (settings.buckets or Buckets()).keep
    resized = _resize(image, fit)
    box = CROPS[keep](resized, fit.size)
    write_image(out / entry.file, resized.crop(box))
    if entry.mask is not None:
        mask = open_image(dataset / entry.mask, root=dataset).convert("L")
        write_mask(out / entry.mask, _resize_mask(mask, fit).crop(box))
    return fit, box


def _frame(entry: ImageEntry, fit: Fit, box: Box) -> Framing:
    """Returns the part of the original image that the crop of a preprocessed image shows."""
    (width, height), (resized_width, resized_height), (left, top, *_) = fit.size, fit.resized, box
    before = entry.framing or Framing.whole((entry.height, entry.width))
    return before.then((resized_height, resized_width), top, left, (height, width))


def to_square(image: Image.Image, size: int, crop: str) -> Image.Image:
    """Returns the image resized and cropped to size x size pixels."""
    resized = _resize(image, fit_into(image.size, (size, size)))
    return resized.crop(CROPS[crop](resized, (size, size)))


def center_box(image: Image.Image, size: Sides) -> Box:
    """Returns the window of (width, height) in the center."""
    left, top = (image.width - size[0]) // 2, (image.height - size[1]) // 2
    return left, top, left + size[0], top + size[1]


def salient_box(image: Image.Image, size: Sides) -> Box:
    """Returns the window of (width, height) with the highest gradient energy; ties go to the one nearest the center."""
    width, height = size
    energy = _gradient_energy(image)
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
        return lambda image: fit_into(image, square)
    buckets = settings.buckets or Buckets()
    sizes = bucket_sizes(settings.resolution, buckets)
    return lambda image: choose_bucket(image, sizes, buckets, settings.resolution)


def _too_small(entry: ImageEntry, settings: PreprocessSettings) -> str:
    buckets = settings.buckets or Buckets()
    return (
        f"{entry.width} x {entry.height} pixels are too small for a bucket with sides of "
        f"{buckets.sides(settings.resolution)[0]} and more, enlarged at most {buckets.enlarge:g} times"
    )


def _is_too_long(fit: Fit) -> bool:
    return fit.resized[0] * fit.resized[1] > MAX_PIXELS


def _too_long(entry: ImageEntry, fit: Fit) -> str:
    width, height = fit.resized
    return (
        f"{entry.width} x {entry.height} pixels are too elongated: they would be resized to {width} x {height} pixels "
        f"before the crop, more than {MAX_PIXELS:,}"
    )


def _resize(image: Image.Image, fit: Fit) -> Image.Image:
    if fit.resized == image.size:
        return image
    return image.resize(fit.resized, Image.Resampling.LANCZOS if fit.scale < 1 else Image.Resampling.BICUBIC)


def _resize_mask(mask: Image.Image, fit: Fit) -> Image.Image:
    if fit.resized == mask.size:
        return mask
    return mask.resize(fit.resized, Image.Resampling.BOX if fit.scale < 1 else Image.Resampling.BILINEAR)


def _gradient_energy(image: Image.Image) -> NDArray[np.int64]:
    # Integers give the same sums, and the same window, on every machine.
    gray = np.asarray(image.convert("L"), dtype=np.int64)
    energy = np.zeros_like(gray)
    energy[:, 1:] += np.diff(gray, axis=1) ** 2
    energy[1:, :] += np.diff(gray, axis=0) ** 2
    return energy


CROPS.add("center", center_box)
CROPS.add("salient", salient_box)
