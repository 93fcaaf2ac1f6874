"""Crops and resizes images, and their masks, to the sizes for training."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING

from PIL import Image

from lora_engine.data.buckets import Fit, Sides, bucket_sizes, choose_bucket, fit_into
from lora_engine.data.crops import CROPS, Box, find_window
from lora_engine.data.images import MAX_PIXELS, open_image, write_image, write_mask
from lora_engine.data.manifest import ImageEntry, Manifest, Quarantined
from lora_engine.data.masks import Masker, finish_mask, is_black, load_masker
from lora_engine.data.preparation import Preparation
from lora_engine.data.preparation_spec import MadeMask, NoMask
from lora_engine.data.spec import Buckets, PreprocessSettings
from lora_engine.errors import DataError
from lora_engine.framing import Framing
from lora_engine.parallel import Workers
from lora_engine.progress import Progress, no_progress

if TYPE_CHECKING:
    from lora_engine.data.upscaling import Upscaler

_log = logging.getLogger(__name__)
_NAMED = 8


def preprocess(
    dataset: Path,
    out: Path,
    settings: PreprocessSettings,
    progress: Progress = no_progress,
    *,
    labels: Mapping[str, str] = MappingProxyType({}),
) -> Manifest:
    """Writes a copy of the dataset with every image in its training size, one image per core in memory at a time.

    Resizes an image to the least size that covers the target (Lanczos to shrink, `upscale` to enlarge) and crops the
    rest; crops first if the resized image would be too large, and around faces, subjects and at random. The file name,
    which contains the original's digest, stays. A mask is resized (mean to shrink, linear to enlarge: neither leaves
    the range) and cropped with its image.

    Args:
        dataset: Folder of the dataset.
        out: Folder of the copy.
        settings: The settings; models are folders.
        progress: Called after each image.
        labels: Names of the models of `mask` and `upscale` for records; the default is the name of the folder.

    Raises:
        DataError: The dataset is incomplete, or none of its images can be used.
        SettingsError: A model cannot be loaded.
    """
    manifest = Manifest.load(dataset)
    entries: list[ImageEntry] = []
    scales: dict[str, float] = {}
    quarantined = list(manifest.quarantined)
    names = {role: labels.get(role, Path(folder).name) for role, folder in settings.models().items()}
    masker, upscaler = load_masker(settings.mask, names.get("mask", "")), _upscaler(settings, names.get("upscale", ""))
    prepare = _Preparer(dataset, out, settings, _chooser(settings), masker, upscaler)
    with Workers() as workers:
        results = workers.map(prepare, manifest.pictures)
        for done, (entry, result) in enumerate(zip(manifest.pictures, results, strict=True), start=1):
            if isinstance(result, DataError):
                quarantined.append(Quarantined(source=entry.source, reason=result.reason))
            else:
                entries.append(result[0])
                scales[entry.source] = result[1]
            progress(done, len(manifest.pictures), {})
    if not entries:
        raise DataError(
            f"none of the {len(manifest.pictures)} images can be used, last {quarantined[-1].source}: "
            f"{quarantined[-1].reason}",
            where=str(dataset),
            remedy="lower resolution or buckets.min_side, raise enlarge, or choose another crop or mask",
        )
    _report_enlarged(scales)
    prepared = manifest.model_copy(update={"pictures": tuple(entries), "quarantined": tuple(quarantined)})
    prepared.save(out)
    return prepared


@dataclass(frozen=True)
class _Preparer:
    """Prepares one image at a time."""

    dataset: Path
    out: Path
    settings: PreprocessSettings
    choose: Callable[[Sides], Fit]
    masker: Masker | None
    upscaler: Upscaler | None

    def __call__(self, entry: ImageEntry) -> tuple[ImageEntry, float] | DataError:
        """Writes an image and its mask; returns its entry and the factor of the resize, or why it cannot be used."""
        image = open_image(self.dataset / entry.file, root=self.dataset)
        keeps_mask = entry.mask is not None and not isinstance(self.settings.mask, NoMask)
        mask = open_image(self.dataset / str(entry.mask), root=self.dataset).convert("L") if keeps_mask else None
        try:
            return self._prepare(entry, image, mask)
        except DataError as error:
            return error

    def _prepare(self, entry: ImageEntry, image: Image.Image, mask: Image.Image | None) -> tuple[ImageEntry, float]:
        crop, options, made = self.settings.crop, self.settings.mask, None
        framing = None
        if self.settings.original_sizes:
            framing = entry.framing or Framing.whole((entry.height, entry.width))
        if self.masker is not None and (mask is None or (isinstance(options, MadeMask) and options.replace)):
            mask, made = self.masker(image), self.masker.label
        preparation = entry.preparation or Preparation()
        if made is not None or mask is None:
            preparation = preparation.model_copy(update={"mask": made})
        if not isinstance(crop, str):
            least = math.ceil(self.settings.resolution / self.settings.largest_scale)
            window = find_window(crop, image, mask, least, entry.sha256)
            framing = _cut(framing, image.size, window.box)
            image, mask = window.cut(image), window.cut(mask) if mask is not None else None
            preparation = window.record(preparation)
        fit = self.choose(image.size)
        image, mask, framing = self._resize(image, mask, framing, fit, self.settings.kept_part)
        if mask is not None:
            mask = finish_mask(mask, options)
            # The masks of class images weight nothing.
            if made is not None and entry.split != "class" and is_black(mask):
                raise DataError(f"its mask of {made} marks nothing", allowed="a `minimum` above 0, or a mask file")
        entry = entry.model_copy(update={"framing": framing, "preparation": self._record(preparation, fit)})
        return self._write(entry, image, mask), fit.scale

    def _resize(
        self, image: Image.Image, mask: Image.Image | None, framing: Framing | None, fit: Fit, keep: str
    ) -> tuple[Image.Image, Image.Image | None, Framing | None]:
        # Cropping first in general would save a tenth of decoding and resizing, and change one pixel in ten thousand of
        # all released results (benchmarks/README.md).
        if _is_too_long(fit):
            window = CROPS[keep](image, _window(fit))
            framing = _cut(framing, image.size, window)
            image, mask = image.crop(window), mask.crop(window) if mask is not None else None
            fit = fit_into(image.size, fit.size)
        resized = self._enlarge(image, fit) if fit.scale > 1 else _resize_image(image, fit)
        box = CROPS[keep](resized, fit.size)
        mask = _resize_mask(mask, fit).crop(box) if mask is not None else None
        return resized.crop(box), mask, _cut(framing, resized.size, box)

    def _enlarge(self, image: Image.Image, fit: Fit) -> Image.Image:
        if self.upscaler is not None:
            while image.width < fit.resized[0] or image.height < fit.resized[1]:
                image = self.upscaler(image)
        elif self.settings.upscale == "bicubic":
            return _resize_image(image, fit)
        return image.resize(fit.resized, Image.Resampling.LANCZOS)

    def _record(self, preparation: Preparation, fit: Fit) -> Preparation | None:
        # Results of earlier releases keep their bytes: they record no enlargement, which the run reports.
        if fit.scale > 1 and self.settings.upscale != "bicubic":
            upscaler = self.upscaler.label if self.upscaler is not None else str(self.settings.upscale)
            preparation = preparation.model_copy(
                update={"scale": max(1.001, round(fit.scale, 3)), "upscaler": upscaler}
            )
        return preparation if preparation != Preparation() else None

    def _write(self, entry: ImageEntry, image: Image.Image, mask: Image.Image | None) -> ImageEntry:
        write_image(self.out / entry.file, image)
        name = f"masks/{Path(entry.file).name}" if mask is not None else None
        if name is not None and mask is not None:
            write_mask(self.out / name, mask)
        size = {"width": image.width, "height": image.height}
        return entry.model_copy(update={**size, "mask": name})


def _cut(framing: Framing | None, resized: Sides, box: Box) -> Framing | None:
    """Returns the framing after a resize to (width, height) and a crop; a turned crop counts as one that is not."""
    left, top, right, bottom = box
    return framing and framing.then((resized[1], resized[0]), top, left, (bottom - top, right - left))


def _chooser(settings: PreprocessSettings) -> Callable[[Sides], Fit]:
    """Returns a function that chooses the fit of a size; it raises `DataError` for a size that cannot be used."""
    square, buckets = (settings.resolution, settings.resolution), settings.buckets or Buckets()
    sizes = bucket_sizes(settings.resolution, buckets) if settings.crop == "bucket" else ()

    def choose(image: Sides) -> Fit:
        if settings.crop != "bucket":
            fit = fit_into(image, square)
            if fit.scale > settings.largest_scale:
                raise DataError(_too_small(image, f"{square[0]} x {square[1]}", settings.largest_scale))
            return fit
        chosen = choose_bucket(image, sizes, buckets, settings.resolution)
        if chosen is None:
            size = f"a bucket with sides of {buckets.sides(settings.resolution)[0]} and more"
            raise DataError(_too_small(image, size, buckets.enlarge))
        # Cropping it first would change the bytes of released results with buckets.
        if _is_too_long(chosen):
            raise DataError(_too_long(image, chosen))
        return chosen

    return choose


def _too_small(image: Sides, size: str, enlarge: float) -> str:
    return f"{image[0]} x {image[1]} pixels are too small for {size}, enlarged at most {enlarge:g} times"


def _too_long(image: Sides, fit: Fit) -> str:
    width, height = fit.resized
    return (
        f"{image[0]} x {image[1]} pixels are too elongated: they would be resized to {width} x {height} pixels "
        f"before the crop, more than {MAX_PIXELS:,}"
    )


def _is_too_long(fit: Fit) -> bool:
    return fit.resized[0] * fit.resized[1] > MAX_PIXELS


def _window(fit: Fit) -> Sides:
    """Returns (width, height) of the part of the original image that fills the target."""
    return max(1, round(fit.size[0] / fit.scale)), max(1, round(fit.size[1] / fit.scale))


def _upscaler(settings: PreprocessSettings, label: str) -> Upscaler | None:
    if isinstance(settings.upscale, str):
        return None
    from lora_engine.data.upscaling import Upscaler

    return Upscaler(settings.upscale, label)


def _report_enlarged(scales: Mapping[str, float]) -> None:
    enlarged = sorted((item for item in scales.items() if item[1] > 1), key=lambda item: (-item[1], item[0]))
    if enlarged:
        names = ", ".join(f"{source} {scale:.2f} times" for source, scale in enlarged[:_NAMED])
        more = f" and {len(enlarged) - _NAMED} more" if len(enlarged) > _NAMED else ""
        _log.warning("%d of %d images were enlarged: %s%s", len(enlarged), len(scales), names, more)


def to_square(image: Image.Image, size: int, crop: str) -> Image.Image:
    """Returns the image resized and cropped to size x size pixels."""
    resized = _resize_image(image, fit_into(image.size, (size, size)))
    return resized.crop(CROPS[crop](resized, (size, size)))


def _resize_image(image: Image.Image, fit: Fit) -> Image.Image:
    """Returns the image in the size before the crop."""
    if fit.resized == image.size:
        return image
    return image.resize(fit.resized, Image.Resampling.LANCZOS if fit.scale < 1 else Image.Resampling.BICUBIC)


def _resize_mask(mask: Image.Image, fit: Fit) -> Image.Image:
    if fit.resized == mask.size:
        return mask
    return mask.resize(fit.resized, Image.Resampling.BOX if fit.scale < 1 else Image.Resampling.BILINEAR)
