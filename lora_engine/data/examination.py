"""Examines a folder of images as ingest reads it: what is used, and what is odd about it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from PIL import Image

from lora_engine.data.class_images import ClassImage, is_blank
from lora_engine.data.duplicates import Print, find_groups
from lora_engine.data.images import open_image
from lora_engine.data.ingest import ingest
from lora_engine.data.manifest import ImageEntry, Manifest
from lora_engine.data.quality import find_flaws
from lora_engine.data.spec import IngestSettings
from lora_engine.data.suggestions import Duplicates, choose_of_duplicates, describe_duplicates, describe_flaws

THUMBNAIL = 256
_FEW = 10


@dataclass(frozen=True)
class Examined:
    """An image of the folder.

    Attributes:
        entry: What ingest says about it; width and height are those of the file.
        flaws: What is noticeable about its pixels; see `find_flaws`.
        thumbnail: Of at most `THUMBNAIL` pixels per side.
        print: See `take_print`.
    """

    entry: ImageEntry
    flaws: tuple[str, ...]
    thumbnail: Image.Image
    print: Print


@dataclass(frozen=True)
class Examination:
    """A folder of images.

    Attributes:
        manifest: The dataset that ingest makes of it.
        images: Its images, in the order of the manifest.
        groups: Groups of two and more images that show nearly the same, as positions.
        duplicates: Which image of each group to keep.
        advice: What to improve, most important first.
        ratings: Image -> its aesthetic score; empty without a predictor.
    """

    manifest: Manifest
    images: tuple[Examined, ...]
    groups: tuple[tuple[int, ...], ...]
    duplicates: tuple[Duplicates, ...]
    advice: tuple[str, ...]
    ratings: Mapping[str, float] = field(default_factory=dict)


def examine_images(
    folder: Path,
    settings: IngestSettings,
    *,
    consent: Path | None = None,
    resolution: int | None = None,
    work: Path,
) -> Examination:
    """Ingests a folder into an empty one and examines the result.

    Args:
        folder: The user's folder.
        settings: See `IngestSettings`.
        consent: A table for `read_consent`.
        resolution: Side of the training images in pixels; None leaves sizes unjudged.
        work: The empty folder, which gets the images of the manifest.

    Raises:
        DataError: As of `ingest`.
    """
    prints: dict[str, Print] = {}
    manifest = ingest(folder, work, settings, consent=consent, prints=prints)
    images = []
    for entry in manifest.pictures:
        image = open_image(work / entry.file)
        flaws = tuple(find_flaws(image, resolution))
        image.thumbnail((THUMBNAIL, THUMBNAIL), Image.Resampling.LANCZOS)
        images.append(Examined(entry, flaws, image, prints[entry.file]))
    groups = tuple(tuple(group) for group in find_groups([image.print for image in images]) if len(group) > 1)
    duplicates = choose_of_duplicates(manifest.pictures, groups)
    return Examination(manifest, tuple(images), groups, duplicates, tuple(_advice(images, duplicates)))


def class_images_of(examination: Examination) -> tuple[ClassImage, ...]:
    """Returns the class images, for `find_odd`."""
    return tuple(
        ClassImage(image.entry.source, is_blank(image.flaws), image.print)
        for image in examination.images
        if image.entry.split == "class"
    )


def _advice(images: Sequence[Examined], duplicates: Sequence[Duplicates]) -> list[str]:
    concept = [image.entry for image in images if image.entry.split != "class"]
    captions = Counter(entry.caption for entry in concept)
    advice = []
    if len(concept) < _FEW:
        advice.append(f"{len(concept)} images are few: a concept needs about 10 to 30 different ones")
    if missing := captions[""]:
        advice.append(f"{missing} of {len(concept)} images have no caption: the template of the caption step is used")
    text, count = max(captions.items(), key=lambda item: (item[0] != "", item[1]))
    if text and count > 1 and 2 * count > len(concept):
        advice.append(f"{count} images have the caption {text!r}: what varies should be in the captions")
    advice += describe_duplicates(duplicates)
    advice += describe_flaws({image.entry.source: image.flaws for image in images})
    return advice
