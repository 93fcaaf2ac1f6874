"""Examines a folder of images before anything is trained."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from lora_engine.data.spec import IngestSettings, PreprocessSettings
from lora_engine.errors import SettingsError
from lora_engine.files import atomic_write

_Settings = TypeVar("_Settings", bound=BaseModel)


def examine_folder(
    images: Path,
    layout: str = "auto",
    heldout: float = 0.0,
    resolution: int | None = None,
    consent: Path | None = None,
    page: Path | None = None,
    preparation: Mapping[str, Any] = MappingProxyType({}),
) -> dict[str, Any]:
    """Returns what ingest makes of a folder, and what is odd about it.

    Args:
        images: The folder.
        layout: See `IngestSettings`.
        heldout: See `IngestSettings`.
        resolution: Side of the training images in pixels; None leaves sizes unjudged.
        consent: File of consents; None means that there is none.
        page: Where to write a contact sheet; None writes none.
        preparation: Settings of preprocess besides the resolution, such as `crop` and `mask`; empty prepares no image.

    Returns:
        `dataset` and `prepared` (a line each), `images` (as in the manifest), `quarantined`, `alike` (groups of names),
        `flaws` (by name), `advice` and `page`.

    Raises:
        DataError: The folder cannot be read or has no usable image.
        SettingsError: A setting is out of its range.
    """
    from lora_engine.data.contact_sheet import render_contact_sheet
    from lora_engine.data.examination import examine_images

    settings = _validate(IngestSettings, {"layout": layout, "heldout": heldout})
    if preparation and resolution is None:
        raise SettingsError(f"{', '.join(preparation)} needs a resolution", remedy="set --resolution")
    wanted = _validate(PreprocessSettings, {"resolution": resolution, **preparation}) if preparation else None
    examination = examine_images(images, settings, consent=consent, resolution=resolution, preparation=wanted)
    if page is not None:
        atomic_write(page, render_contact_sheet(images.resolve().name, examination).encode())
    manifest, prepared = examination.manifest, examination.prepared
    names = [image.entry.source for image in examination.images]
    return {
        "dataset": manifest.describe(),
        "prepared": prepared.describe_preparation() if prepared is not None else None,
        "images": [entry.model_dump(mode="json", exclude={"file"}) for entry in manifest.pictures],
        "quarantined": [item.model_dump() for item in (prepared or manifest).quarantined],
        "alike": [[names[index] for index in group] for group in examination.groups],
        "flaws": {image.entry.source: list(image.flaws) for image in examination.images if image.flaws},
        "advice": list(examination.advice),
        "page": str(page) if page is not None else None,
    }


def _validate(model: type[_Settings], values: Mapping[str, Any]) -> _Settings:
    try:
        return model.model_validate(values)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        place = ".".join(map(str, first["loc"])) or "the settings"
        raise SettingsError(f"{place}: {first['msg']}, not {first['input']!r}") from None
