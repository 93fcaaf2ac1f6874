"""Examines a folder of images before anything is trained."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from lora_engine.data.spec import IngestSettings
from lora_engine.errors import SettingsError
from lora_engine.files import atomic_write

if TYPE_CHECKING:
    from lora_engine.data.class_images import Likeness
    from lora_engine.data.examination import Examination


def examine_folder(
    images: Path,
    layout: str = "auto",
    heldout: float = 0.0,
    resolution: int | None = None,
    consent: Path | None = None,
    page: Path | None = None,
    *,
    clip: Path | None = None,
    aesthetic: Path | None = None,
) -> dict[str, Any]:
    """Returns what ingest makes of a folder, and what is odd about it.

    Args:
        images: The folder.
        layout: See `IngestSettings`.
        heldout: See `IngestSettings`.
        resolution: Side of the training images in pixels; None leaves sizes unjudged.
        consent: File of consents; None means that there is none.
        page: Where to write a contact sheet; None writes none.
        clip: Folder of a CLIP that compares class images with their captions; None does not.
        aesthetic: File or folder of a head on that CLIP that rates the images; None rates none.

    Returns:
        `dataset` (a line), `images` (as in the manifest), `quarantined`, `alike` (groups of names), `generation` (what
        is known of it, by name), `duplicates` (which image to keep of each group), `flaws` and `ratings` (by name),
        `advice` and `page`.

    Raises:
        DataError: The folder cannot be read or has no usable image.
        SettingsError: A setting is out of its range.
    """
    from lora_engine.data.class_images import GIVEN, find_odd
    from lora_engine.data.contact_sheet import render_contact_sheet
    from lora_engine.data.examination import class_images_of, examine_images

    try:
        settings = IngestSettings.model_validate({"layout": layout, "heldout": heldout})
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        raise SettingsError(f"{first['loc'][0]}: {first['msg']}, not {first['input']!r}") from None
    with tempfile.TemporaryDirectory(prefix="loraline-") as work:
        examination = examine_images(images, settings, consent=consent, resolution=resolution, work=Path(work))
        likeness, ratings = _compare(examination, Path(work), clip, aesthetic)
    odd = find_odd(class_images_of(examination), GIVEN, likeness)
    examination = replace(examination, advice=(*examination.advice, *odd), ratings=ratings)
    if page is not None:
        atomic_write(page, render_contact_sheet(images.resolve().name, examination).encode())
    manifest = examination.manifest
    names = [image.entry.source for image in examination.images]
    return {
        "dataset": manifest.describe(),
        "images": [entry.model_dump(mode="json", exclude={"file"}) for entry in manifest.pictures],
        "quarantined": [item.model_dump() for item in manifest.quarantined],
        "alike": [[names[index] for index in group] for group in examination.groups],
        "generation": {
            entry.source: text
            for entry in manifest.pictures
            if entry.rights is not None and (text := entry.rights.describe_generation())
        },
        "flaws": {image.entry.source: list(image.flaws) for image in examination.images if image.flaws},
        "duplicates": [asdict(group) for group in examination.duplicates],
        "ratings": dict(ratings),
        "advice": list(examination.advice),
        "page": str(page) if page is not None else None,
    }


def _compare(
    examination: Examination, work: Path, clip: Path | None, aesthetic: Path | None
) -> tuple[Likeness | None, Mapping[str, float]]:
    """Returns how alike the class images and their captions are, and the rating of each image by its name."""
    if clip is None:
        if aesthetic is not None:
            raise SettingsError("--aesthetic rates the vectors of a CLIP", remedy="give its folder as --clip")
        return None, {}
    from lora_engine.evaluation.aesthetic import load_rating_head, rate_images
    from lora_engine.evaluation.class_likeness import measure_likeness
    from lora_engine.evaluation.embedder import load_embedder

    embedder, entries = load_embedder(clip), examination.manifest.pictures
    classes = [entry for entry in entries if entry.split == "class"]
    likeness = None
    if classes and all(entry.caption for entry in classes):
        files = [work / entry.file for entry in classes]
        likeness = measure_likeness(embedder, files, [entry.caption for entry in classes])
    if aesthetic is None:
        return likeness, {}
    head = load_rating_head(aesthetic, embedder.embed_texts([""]).shape[1])
    ratings = rate_images(embedder, head, [work / entry.file for entry in entries])
    return likeness, dict(zip((entry.source for entry in entries), ratings, strict=True))
