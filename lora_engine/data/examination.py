"""Examines a folder of images as ingest reads it: what is used, and what is odd about it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType

from PIL import Image

from lora_engine.data.class_images import ClassImage, is_blank
from lora_engine.data.duplicates import Print, find_groups
from lora_engine.data.images import open_image
from lora_engine.data.ingest import ingest
from lora_engine.data.manifest import ImageEntry, Manifest
from lora_engine.data.masks import is_black, overlay
from lora_engine.data.preparation import Preparation
from lora_engine.data.preprocess import preprocess
from lora_engine.data.quality import find_flaws
from lora_engine.data.spec import IngestSettings, PreprocessSettings
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
        review: The prepared image, or the image, with red over what its mask leaves out; None without mask and
            preparation.
        preparation: See `ImageEntry`; None unless the image was prepared.
    """

    entry: ImageEntry
    flaws: tuple[str, ...]
    thumbnail: Image.Image
    print: Print
    review: Image.Image | None = None
    preparation: Preparation | None = None


@dataclass(frozen=True)
class Examination:
    """A folder of images.

    Attributes:
        manifest: The dataset that ingest makes of it.
        prepared: The dataset that preprocess makes of that; None without its settings.
        images: Its images, in the order of the manifest.
        groups: Groups of two and more images that show nearly the same, as positions.
        duplicates: Which image of each group to keep.
        advice: What to improve, most important first.
        ratings: Image -> its aesthetic score; empty without a predictor.
    """

    manifest: Manifest
    prepared: Manifest | None
    images: tuple[Examined, ...]
    groups: tuple[tuple[int, ...], ...]
    duplicates: tuple[Duplicates, ...]
    advice: tuple[str, ...]
    ratings: Mapping[str, float] = field(default_factory=dict)

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
    preparation: PreprocessSettings | None = None,
    labels: Mapping[str, str] = MappingProxyType({}),
    work: Path,
    c2pa_roots: Path | None = None,
) -> Examination:
    """Ingests a folder into an empty one, prepares the images if settings are given, and examines the result.

    Args:
        folder: The user's folder.
        settings: See `IngestSettings`.
        consent: A table for `read_consent`.
        resolution: Side of the training images in pixels; None leaves sizes unjudged.
        preparation: Settings of preprocess; None prepares no image.
        labels: See `preprocess`.
        work: The empty folder, which gets the images of the manifest, and `prepared`.
        c2pa_roots: See `ingest`.

    Raises:
        DataError: As of `ingest` and `preprocess`.
        SettingsError: A model cannot be loaded.
    """
    prints: dict[str, Print] = {}
    manifest = ingest(folder, work, settings, consent=consent, prints=prints, c2pa_roots=c2pa_roots)
    target = work / "prepared"
    prepared = preprocess(work, target, preparation, labels=labels) if preparation is not None else None
    results = {entry.file: entry for entry in prepared.pictures} if prepared is not None else {}
    images = []
    for entry in manifest.pictures:
        image = open_image(work / entry.file)
        flaws = (*find_flaws(image, resolution), *_find_flaws_of_mask(work, entry))
        image.thumbnail((THUMBNAIL, THUMBNAIL), Image.Resampling.LANCZOS)
        result = results.get(entry.file)
        if prepared is None:
            review = _review(work, entry) if entry.mask is not None else None
        else:
            review = _review(target, result) if result is not None else None
        made = result.preparation if result is not None else None
        images.append(Examined(entry, flaws, image, prints[entry.file], review, made))
    groups = tuple(tuple(group) for group in find_groups([image.print for image in images]) if len(group) > 1)
    duplicates = choose_of_duplicates(manifest.pictures, groups)
    return Examination(manifest, prepared, tuple(images), groups, duplicates, tuple(_advice(images, duplicates)))


def _find_flaws_of_mask(dataset: Path, entry: ImageEntry) -> Iterator[str]:
    if entry.mask is not None and is_black(open_image(dataset / entry.mask).convert("L")):
        yield "its mask is black: nothing of it counts"


def _review(dataset: Path, entry: ImageEntry) -> Image.Image:
    """Returns a thumbnail of an image with its mask."""
    image = open_image(dataset / entry.file)
    image.thumbnail((THUMBNAIL, THUMBNAIL), Image.Resampling.LANCZOS)
    return image if entry.mask is None else overlay(image, open_image(dataset / entry.mask).convert("L"))


def class_images_of(examination: Examination) -> tuple[ClassImage, ...]:
    """Returns the class images, for `find_odd`."""
    return tuple(
        ClassImage(image.entry.source, is_blank(image.flaws), image.print)
        for image in examination.images
        if image.entry.split == "class"
    )


def _advice(images: Sequence[Examined], duplicates: Sequence[Duplicates]) -> list[str]:
    concept = [image.entry for image in images if image.entry.split != "class"]
    advice = []
    if len(concept) < _FEW:
        advice.append(f"{len(concept)} images are few: a concept needs about 10 to 30 different ones")
    if missing := sum(not entry.caption for entry in concept):
        advice.append(f"{missing} of {len(concept)} images have no caption: the template of the caption step is used")
    advice += describe_duplicates(duplicates)
    advice += describe_flaws({image.entry.source: image.flaws for image in images})
    return advice
