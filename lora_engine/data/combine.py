"""Combines datasets into one, with settings of their own. Torch-free."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

from lora_engine.data.manifest import ImageEntry, Manifest
from lora_engine.data.part import DatasetPart
from lora_engine.files import atomic_write, sha256_bytes

_log = logging.getLogger(__name__)
_MAX_REPEATS = 10_000


class PartSettings(DatasetPart):
    """Settings of one dataset among several.

    Attributes:
        repeats: Factor on the number of times that its images occur per epoch.
    """

    repeats: int = Field(default=1, ge=1, le=_MAX_REPEATS)


class CombineSettings(BaseModel):
    """The settings of combine.

    Attributes:
        parts: Settings of each dataset, in their order.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    parts: Annotated[tuple[PartSettings, ...], Field(max_length=100)] = ()


def combine_datasets(folders: Sequence[Path], out: Path, settings: CombineSettings) -> Manifest:
    """Writes a dataset with the images of all; the trigger and the class word are kept where all agree.

    Raises:
        DataError: A dataset is incomplete.
    """
    manifests = [Manifest.load(folder) for folder in folders]
    parts = settings.parts or (PartSettings(),) * len(folders)
    entries: list[ImageEntry] = []
    names: set[str] = set()
    for number, (folder, manifest, part) in enumerate(zip(folders, manifests, parts, strict=True)):
        for image in manifest.pictures:
            copy = _distinct(image, number, names)
            for source, target in zip(image.files, copy.files, strict=True):
                atomic_write(out / target, (folder / source).read_bytes())
            repeats = min(_MAX_REPEATS, image.repeats * part.repeats)
            entries.append(copy.model_copy(update={"repeats": repeats, "part": number}))
    combined = Manifest(
        pictures=tuple(entries),
        quarantined=tuple(entry for manifest in manifests for entry in manifest.quarantined),
        trigger=_agreed("trigger", [manifest.trigger for manifest in manifests]),
        class_word=_agreed("class_word", [manifest.class_word for manifest in manifests]),
        parts=tuple(DatasetPart(**part.model_dump(exclude={"repeats"})) for part in parts),
    )
    combined.save(out)
    return combined


def _distinct(image: ImageEntry, number: int, names: set[str]) -> ImageEntry:
    """Returns the entry with a file name that no other has: the same image may be in several datasets."""
    if image.file not in names:
        names.add(image.file)
        return image
    stem = sha256_bytes(f"{number} {image.file}".encode())[:16]
    names.add(f"pictures/{stem}.png")
    mask = None if image.mask is None else f"masks/{stem}.png"
    return image.model_copy(update={"file": f"pictures/{stem}.png", "mask": mask})


def _agreed(name: str, values: Sequence[str | None]) -> str | None:
    distinct = list(dict.fromkeys(values))
    if len(distinct) > 1:
        _log.warning("the datasets have different values of %s (%s); the combined one has none", name,
                     ", ".join(map(repr, distinct)))  # fmt: skip
        return None
    return distinct[0]
