"""Examines a folder of images before anything is trained."""

from __future__ import annotations

import logging
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, replace
from importlib.util import find_spec
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from lora_engine.data.spec import CaptionSettings, IngestSettings, PreprocessSettings
from lora_engine.errors import SettingsError
from lora_engine.files import atomic_write
from tasks.operations.captions import captions_to_check, check_settings, find_caption_problems
from tasks.operations.preparation import find_preparation_models, with_folders

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
    trigger: str | None = None,
    class_word: str | None = None,
    base: str | None = None,
    clip: str | None = None,
    aesthetic: Path | None = None,
    preparation: Mapping[str, Any] = MappingProxyType({}),
    several_captions: str = "auto",
    c2pa_roots: Path | None = None,
) -> dict[str, Any]:
    """Returns what ingest makes of a folder, and what is odd about it.

    Args:
        images: The folder or archive.
        layout: See `IngestSettings`.
        heldout: See `IngestSettings`.
        resolution: Side of the training images in pixels; None leaves sizes unjudged.
        consent: File of consents; None means that there is none.
        page: Where to write a contact sheet; None writes none.
        trigger: The word for the concept, which is checked against the base.
        class_word: The class of the concept.
        base: The base whose tokenizers read trigger and captions; None checks neither.
        clip: Folder of a CLIP that compares captions and class images with their texts; None does not.
        aesthetic: File or folder of a head on that CLIP that rates the images; None rates none.
        preparation: Settings of preprocess besides the resolution, such as `crop` and `mask`; empty prepares no image.
        several_captions: See `IngestSettings`.
        c2pa_roots: Root certificates that signatures are trusted by; None trusts none. Signatures are verified if the
            extra `c2pa` is installed.

    Returns:
        `dataset` and `prepared` (a line each), `images` (as in the manifest), `quarantined`, `skipped` (reason ->
        number of images), `notes` (warnings of captions, masks and layout), `alike` (groups of names), `generation`
        (what is known of it, by name), `duplicates` (which image to keep of each group), `flaws` and `ratings` (by
        name), `advice` and `page`.

    Raises:
        DataError: The folder cannot be read or has no usable image.
        SettingsError: A setting is out of its range.
        BaseModelError: There is no such base.
    """
    from lora_engine.data.class_images import GIVEN, find_odd
    from lora_engine.data.contact_sheet import render_contact_sheet
    from lora_engine.data.examination import class_images_of, examine_images

    verifies = c2pa_roots is not None or find_spec("c2pa") is not None
    settings = check_settings(
        IngestSettings,
        {
            "layout": layout,
            "heldout": heldout,
            "several_captions": several_captions,
            "c2pa": "verify" if verifies else "recognize",
        },
    )
    captioned = check_settings(
        CaptionSettings, {"trigger": trigger, "class_word": class_word, "check": {"base": base, "clip": clip}}
    )
    if preparation and resolution is None:
        raise SettingsError(f"{', '.join(preparation)} needs a resolution", remedy="set --resolution")
    wanted = check_settings(PreprocessSettings, {"resolution": resolution, **preparation}) if preparation else None
    models = find_preparation_models(wanted, Path()) if wanted is not None else {}
    with tempfile.TemporaryDirectory(prefix="loraline-") as work, _noting() as notes:
        examination = examine_images(
            images,
            settings,
            consent=consent,
            resolution=resolution,
            preparation=wanted and with_folders(wanted, models),
            labels={role: model.label for role, model in models.items()},
            work=Path(work),
            c2pa_roots=c2pa_roots,
        )
        captions, files = captions_to_check((entry for entry in examination.concept if entry.caption), Path(work))
        findings, _ = find_caption_problems(captions, files, captioned)
        likeness, ratings = _compare(examination, Path(work), clip, aesthetic)
    odd = find_odd(class_images_of(examination), GIVEN, likeness)
    examination = replace(examination, advice=(*examination.advice, *map(str, findings), *odd), ratings=ratings)
    if page is not None:
        atomic_write(page, render_contact_sheet(images.resolve().name, examination).encode())
    return {**_describe(examination), "notes": notes, "page": str(page) if page is not None else None}


def _describe(examination: Examination) -> dict[str, Any]:
    """Returns what was found as JSON values; see `examine_folder`."""
    manifest, prepared = examination.manifest, examination.prepared
    names = [image.entry.source for image in examination.images]
    return {
        "dataset": manifest.describe(),
        "prepared": prepared.describe_preparation() if prepared is not None else None,
        "images": [entry.model_dump(mode="json", exclude={"file"}) for entry in manifest.pictures],
        "quarantined": [item.model_dump() for item in (prepared or manifest).quarantined],
        "skipped": dict(Counter(item.reason for item in manifest.skipped or ())),
        "alike": [[names[index] for index in group] for group in examination.groups],
        "generation": {
            entry.source: text
            for entry in manifest.pictures
            if entry.rights is not None and (text := entry.rights.describe_generation())
        },
        "flaws": {image.entry.source: list(image.flaws) for image in examination.images if image.flaws},
        "duplicates": [asdict(group) for group in examination.duplicates],
        "ratings": dict(examination.ratings),
        "advice": list(examination.advice),
    }


@contextmanager
def _noting() -> Iterator[list[str]]:
    """Yields the distinct warnings of the engine until the block ends, but for those that the manifest lists.

    They are part of the result, so they are not shown on standard error too.
    """
    notes: list[str] = []

    class Notes(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            text = record.getMessage()
            if not getattr(record, "in_artifact", False) and text not in notes:
                notes.append(text)

    handler, logger = Notes(logging.WARNING), logging.getLogger("lora_engine")
    logger.addHandler(handler)
    try:
        yield notes
    finally:
        logger.removeHandler(handler)


def _compare(
    examination: Examination, work: Path, clip: str | None, aesthetic: Path | None
) -> tuple[Likeness | None, Mapping[str, float]]:
    """Returns how alike the class images and their captions are, and the rating of each image by its name."""
    if clip is None:
        if aesthetic is not None:
            raise SettingsError("--aesthetic rates the vectors of a CLIP", remedy="give its folder as --clip")
        return None, {}
    from lora_engine.embedding.class_likeness import measure_likeness
    from lora_engine.embedding.embedder import load_embedder
    from lora_engine.evaluation.aesthetic import load_rating_head, rate_images

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
