"""Reports what is odd about an ingested folder besides single files."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

from lora_engine.data.folder import Owner
from lora_engine.data.images import IMAGE_FORMATS
from lora_engine.data.manifest import ImageEntry, Quarantined
from lora_engine.data.rights import SIGNATURES
from lora_engine.data.text_files import printable
from lora_engine.errors import DataError

_log = logging.getLogger(__name__)


def warn_of_signatures(entries: Sequence[ImageEntry]) -> None:
    """Logs how many images have C2PA manifests with invalid signatures, and the first."""
    found = [entry for entry in entries if entry.rights is not None and "c2pa-invalid" in entry.rights.evidence]
    if found:
        _log.warning("%d images: %s, first %s", len(found), SIGNATURES["c2pa-invalid"], found[0].source)


def warn_of_transparency(names: Sequence[str], background: str) -> None:
    """Logs how many images are transparent in places."""
    if names:
        _log.warning(
            "%d images are transparent in places, first %s: they show the background %s",
            len(names),
            names[0],
            background,
        )


def warn_of_generated(entries: Sequence[ImageEntry]) -> None:
    """Logs how many images are generated, and the first."""
    found = [entry for entry in entries if entry.rights is not None and entry.rights.is_generated]
    if found and found[0].rights is not None:
        how = found[0].rights.describe_generation()
        _log.warning("%d images are generated, first %s: %s", len(found), found[0].source, how)


def unmatched_masks(masks: Mapping[Owner, Sequence[str]], used: Collection[str]) -> list[Quarantined]:
    """Returns the masks that belong to no used image."""
    unused = sorted(Path(name) for names in masks.values() for name in names if name not in used)
    reason = "is a mask by its name, and no used image has that name"
    return [Quarantined(source=printable(name.as_posix()), reason=reason) for name in unused]


def no_images_error(images: Path, quarantined: Sequence[Quarantined]) -> DataError:
    """Returns the error of a folder without a usable image."""
    if not quarantined:
        return DataError(
            "the folder has no images",
            where=str(images),
            allowed=", ".join(IMAGE_FORMATS),
            remedy="add images, and captions in .txt files of the same names if there are any",
        )
    first = "; ".join(f"{item.source}: {item.reason}" for item in quarantined[:3])
    kinds = len(Counter(item.reason for item in quarantined))
    return DataError(
        f"none of the {len(quarantined)} files can be used ({kinds} different reasons), first {first}",
        where=str(images),
        remedy="repair or replace the files",
    )
