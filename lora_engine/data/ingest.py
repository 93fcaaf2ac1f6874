"""Ingest: a folder of a person's files becomes a manifest and clean PNG pictures, one picture in memory at a time."""

from __future__ import annotations

import logging
from collections import Counter
from pathlib import Path

from lora_engine.data.folder import candidates, printable, read_caption, read_consent, require_folder
from lora_engine.data.images import FORMATS, open_with_digest, write_picture
from lora_engine.data.manifest import Manifest, Picture, Quarantined
from lora_engine.data.spec import IngestSettings
from lora_engine.errors import DataError

_log = logging.getLogger(__name__)


def ingest(images: Path, out: Path, settings: IngestSettings, *, consent: Path | None = None) -> Manifest:
    """Reads the folder and writes a dataset: `manifest.json` and `pictures/`, without the files' metadata.

    A file that cannot be used is quarantined with its reason and the rest goes on. Files with the same bytes are used
    once. The result depends on the files' bytes and names alone.

    Args:
        images: The folder; subfolders belong to it.
        out: Where the dataset is written.
        settings: See `IngestSettings`.
        consent: A CSV with the columns file,consent; the names are relative to the folder.

    Returns:
        The manifest that was written.

    Raises:
        DataError: The folder is missing or holds nothing that can be used, or the consent file is not valid.
    """
    require_folder(images)
    covered = read_consent(consent) if consent is not None else {}
    pictures: list[Picture] = []
    quarantined: list[Quarantined] = []
    sources: dict[str, Picture] = {}
    names: set[str] = set()
    for path in candidates(images):
        name = path.relative_to(images).as_posix()
        names.add(name)
        try:
            picture = _take(
                path, images, out, max_pixels=settings.max_pixels, sources=sources, consent=covered.get(name)
            )
        except DataError as error:
            quarantined.append(Quarantined(source=printable(name), reason=printable(_reason(error))))
            _log.warning("%s is left out: %s", printable(name), quarantined[-1].reason)
            continue
        sources[picture.file] = picture
        pictures.append(picture)
    if not pictures:
        raise _nothing(images, quarantined)
    if unknown := sorted(set(covered) - names):
        _log.warning("%d rows of %s name no file of the folder, first %r", len(unknown), consent, unknown[0])
    manifest = Manifest(pictures=_split(pictures, settings.heldout), quarantined=tuple(quarantined))
    manifest.save(out)
    return manifest


def _take(
    path: Path, images: Path, out: Path, *, max_pixels: int, sources: dict[str, Picture], consent: str | None
) -> Picture:
    sha256, pixels = open_with_digest(path, max_pixels, images)
    file = f"pictures/{sha256[:16]}.png"
    if (earlier := sources.get(file)) is not None:
        same = earlier.sha256 == sha256
        raise DataError(f"{'duplicate of' if same else 'has the same short digest as'} {earlier.source}")
    caption = read_caption(path, images)
    write_picture(out / file, pixels)
    return Picture(
        sha256=sha256,
        file=file,
        width=pixels.width,
        height=pixels.height,
        caption=caption,
        source=printable(path.relative_to(images).as_posix()),
        consent=consent,
    )


def _split(pictures: list[Picture], fraction: float) -> tuple[Picture, ...]:
    if fraction == 0.0 or len(pictures) < 2:
        return tuple(pictures)
    count = min(max(1, round(len(pictures) * fraction)), len(pictures) - 1)
    chosen = set(sorted(picture.sha256 for picture in pictures)[:count])
    return tuple(p.model_copy(update={"split": "heldout"}) if p.sha256 in chosen else p for p in pictures)


def _reason(error: DataError) -> str:
    return f"{error.problem}; allowed: {error.allowed}" if error.allowed else error.problem


def _nothing(images: Path, quarantined: list[Quarantined]) -> DataError:
    if not quarantined:
        return DataError(
            "the folder holds no pictures",
            where=str(images),
            allowed=", ".join(FORMATS),
            remedy="put pictures into it, with captions in .txt files of the same names if there are any",
        )
    first = "; ".join(f"{item.source}: {item.reason}" for item in quarantined[:3])
    kinds = len(Counter(item.reason for item in quarantined))
    return DataError(
        f"none of the {len(quarantined)} files can be used ({kinds} different reasons), first {first}",
        where=str(images),
        remedy="mend or replace the files",
    )
