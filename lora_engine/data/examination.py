"""Examines a folder of images as ingest reads it: what is used, and what is odd about it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from lora_engine.data.duplicates import find_groups, take_print
from lora_engine.data.images import open_image
from lora_engine.data.ingest import ingest
from lora_engine.data.manifest import ImageEntry, Manifest
from lora_engine.data.quality import find_flaws
from lora_engine.data.spec import IngestSettings

THUMBNAIL = 256
_FEW = 10


@dataclass(frozen=True)
class Examined:
    """An image of the folder.

    Attributes:
        entry: What ingest says about it; width and height are those of the file.
        flaws: What is noticeable about its pixels; see `find_flaws`.
        thumbnail: Of at most `THUMBNAIL` pixels per side.
    """

    entry: ImageEntry
    flaws: tuple[str, ...]
    thumbnail: Image.Image


@dataclass(frozen=True)
class Examination:
    """A folder of images.

    Attributes:
        manifest: The dataset that ingest makes of it.
        images: Its images, in the order of the manifest.
        groups: Groups of two and more images that show nearly the same, as positions.
        advice: What to improve, most important first.
    """

    manifest: Manifest
    images: tuple[Examined, ...]
    groups: tuple[tuple[int, ...], ...]
    advice: tuple[str, ...]

    @property
    def concept(self) -> tuple[ImageEntry, ...]:
        """The images that show the concept, not the class."""
        return tuple(image.entry for image in self.images if image.entry.split != "class")


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
    manifest = ingest(folder, work, settings, consent=consent)
    images, prints = [], []
    for entry in manifest.pictures:
        image = open_image(work / entry.file)
        flaws = tuple(find_flaws(image, resolution))
        prints.append(take_print(image))
        image.thumbnail((THUMBNAIL, THUMBNAIL), Image.Resampling.LANCZOS)
        images.append(Examined(entry, flaws, image))
    groups = tuple(tuple(group) for group in find_groups(prints) if len(group) > 1)
    return Examination(manifest, tuple(images), groups, tuple(_advice(images, groups)))


def _advice(images: Sequence[Examined], groups: Sequence[Sequence[int]]) -> list[str]:
    concept = [image.entry for image in images if image.entry.split != "class"]
    advice = []
    if len(concept) < _FEW:
        advice.append(f"{len(concept)} images are few: a concept needs about 10 to 30 different ones")
    if missing := sum(not entry.caption for entry in concept):
        advice.append(f"{missing} of {len(concept)} images have no caption: the template of the caption step is used")
    if groups:
        repeated = sum(map(len, groups)) - len(groups)
        advice.append(f"{repeated} images show nearly the same as another: they count more than the others")
    flaws = Counter(flaw for image in images for flaw in image.flaws)
    advice += [f"{count} images: {flaw}" for flaw, count in flaws.most_common()]
    return advice
