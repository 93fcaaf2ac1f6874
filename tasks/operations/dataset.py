"""Examines a folder of images before anything is trained."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import ValidationError

from lora_engine.data.spec import IngestSettings
from lora_engine.errors import SettingsError
from lora_engine.files import atomic_write


def examine_folder(
    images: Path,
    layout: str = "auto",
    heldout: float = 0.0,
    resolution: int | None = None,
    consent: Path | None = None,
    page: Path | None = None,
) -> dict[str, Any]:
    """Returns what ingest makes of a folder, and what is odd about it.

    Args:
        images: The folder.
        layout: See `IngestSettings`.
        heldout: See `IngestSettings`.
        resolution: Side of the training images in pixels; None leaves sizes unjudged.
        consent: File of consents; None means that there is none.
        page: Where to write a contact sheet; None writes none.

    Returns:
        `dataset` (a line), `images` (as in the manifest), `quarantined`, `alike` (groups of names), `generation` (what
        is known of it, by name), `flaws` (by name), `advice` and `page`.

    Raises:
        DataError: The folder cannot be read or has no usable image.
        SettingsError: A setting is out of its range.
    """
    from lora_engine.data.contact_sheet import render_contact_sheet
    from lora_engine.data.examination import examine_images

    try:
        settings = IngestSettings.model_validate({"layout": layout, "heldout": heldout})
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        raise SettingsError(f"{first['loc'][0]}: {first['msg']}, not {first['input']!r}") from None
    examination = examine_images(images, settings, consent=consent, resolution=resolution)
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
        "advice": list(examination.advice),
        "page": str(page) if page is not None else None,
    }
