"""Ingest: a folder of a person's files becomes a manifest and clean PNG pictures, one picture in memory at a time."""

from __future__ import annotations

import fnmatch
import logging
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

from PIL import Image

from lora_engine.data.consent import Statement, read_consent
from lora_engine.data.evidence import read_evidence
from lora_engine.data.folder import (
    Owner,
    candidates,
    owner_of_mask,
    printable,
    read_caption,
    repeats_of,
    require_folder,
)
from lora_engine.data.images import FORMATS, open_image, open_with_digest, write_image, write_mask
from lora_engine.data.manifest import ImageEntry, Manifest, Quarantined
from lora_engine.data.rights import Rights
from lora_engine.data.spec import IngestSettings
from lora_engine.errors import DataError

_log = logging.getLogger(__name__)


def ingest(
    images: Path,
    out: Path,
    settings: IngestSettings,
    *,
    consent: Path | None = None,
    revoked: Collection[str] = (),
) -> Manifest:
    """Reads the folder and writes a dataset: `manifest.json`, `pictures/` and `masks/`, without the files' metadata.

    A file that cannot be used is quarantined with its reason and the rest goes on; a picture with a mask that cannot be
    used is one of these. Files with the same bytes are used once. The result depends on the files' bytes and names
    alone.

    Args:
        images: The folder; subfolders belong to it.
        out: Where the dataset is written.
        settings: See `IngestSettings`.
        consent: What is stated about each picture, as `read_consent` takes it; names are relative to the folder.
        revoked: Digests of pictures and ids of consents that may not be used any more; such pictures are quarantined.

    Returns:
        The manifest that was written.

    Raises:
        DataError: The folder is missing or holds nothing that can be used, the consent file is not valid, or a pattern
            of `repeats` fits no picture.
    """
    require_folder(images)
    covered = read_consent(consent) if consent is not None else {}
    pictures: list[ImageEntry] = []
    quarantined: list[Quarantined] = []
    files, masks = _sort_files(images)
    names = {path.relative_to(images).as_posix() for path in files}
    _refuse_idle_patterns(images, settings, names)
    taking = _Taking(images, out, settings, masks, frozenset(revoked))
    for path in files:
        name = path.relative_to(images).as_posix()
        try:
            pictures.append(taking.take(path, name, covered.get(name, Statement())))
        except DataError as error:
            quarantined.append(Quarantined(source=printable(name), reason=printable(_reason(error))))
            _log.warning("%s is left out: %s", printable(name), quarantined[-1].reason)
    quarantined += _idle_masks(images, masks, taking.used_masks)
    if not pictures:
        raise _nothing(images, quarantined)
    if unknown := sorted(set(covered) - names):
        _log.warning("%d rows of %s name no file of the folder, first %r", len(unknown), consent, unknown[0])
    manifest = Manifest(pictures=_split(pictures, settings.heldout), quarantined=tuple(quarantined))
    manifest.save(out)
    return manifest


def _sort_files(images: Path) -> tuple[list[Path], dict[Owner, list[Path]]]:
    files: list[Path] = []
    masks: dict[Owner, list[Path]] = {}
    for path in candidates(images):
        owner = owner_of_mask(path, images)
        if owner is None:
            files.append(path)
        else:
            masks.setdefault(owner, []).append(path)
    return files, masks


class _Taking:
    """Takes pictures in, one at a time, and knows which were taken already."""

    def __init__(
        self,
        images: Path,
        out: Path,
        settings: IngestSettings,
        masks: Mapping[Owner, Sequence[Path]],
        revoked: frozenset[str],
    ) -> None:
        self._images, self._out, self._settings, self._masks = images, out, settings, masks
        self._revoked = revoked
        self._sources: dict[str, ImageEntry] = {}
        self.used_masks: set[Path] = set()

    def take(self, path: Path, name: str, stated: Statement) -> ImageEntry:
        if stated.consent in self._revoked:
            raise DataError(f"its consent {stated.consent!r} was revoked")
        sha256, pixels = open_with_digest(path, self._settings.max_pixels, self._images)
        if sha256 in self._revoked:
            raise DataError("the picture was revoked")
        file = f"pictures/{sha256[:16]}.png"
        if (earlier := self._sources.get(file)) is not None:
            same = earlier.sha256 == sha256
            raise DataError(f"{'duplicate of' if same else 'has the same short digest as'} {earlier.source}")
        caption = read_caption(path, self._images)
        repeats = repeats_of(name, self._settings.repeats)
        mask = self._open_mask(path, pixels.size)
        write_image(self._out / file, pixels)
        if mask is not None:
            write_mask(self._out / "masks" / Path(file).name, mask)
        picture = ImageEntry(
            sha256=sha256,
            file=file,
            width=pixels.width,
            height=pixels.height,
            caption=caption,
            source=printable(name),
            consent=stated.consent,
            repeats=repeats,
            mask=f"masks/{Path(file).name}" if mask is not None else None,
            rights=self._rights(path, stated),
        )
        self._sources[file] = picture
        return picture

    def _rights(self, path: Path, stated: Statement) -> Rights | None:
        evidence = read_evidence(path, self._images)
        return (stated.rights or Rights()).model_copy(update={"evidence": evidence}) if evidence else stated.rights

    def _open_mask(self, path: Path, size: tuple[int, int]) -> Image.Image | None:
        found = self._masks.get((path.parent, path.stem), ())
        if not found:
            return None
        names = [item.relative_to(path.parent).as_posix() for item in found]
        if len(found) > 1:
            raise DataError(f"has {len(found)} masks: {', '.join(names)}", allowed="one", remedy="remove the others")
        try:
            mask = open_image(found[0], self._settings.max_pixels, self._images).convert("L")
        except DataError as error:
            raise DataError(f"its mask {names[0]} {error.problem}", allowed=error.allowed) from None
        if mask.size != size:
            raise DataError(
                f"its mask {names[0]} has {mask.width} x {mask.height} pixels",
                allowed=f"those of the picture, {size[0]} x {size[1]}",
            )
        self.used_masks.add(found[0])
        return mask


def _idle_masks(images: Path, masks: Mapping[Owner, Sequence[Path]], used: set[Path]) -> list[Quarantined]:
    idle = [path for paths in masks.values() for path in paths if path not in used]
    reason = "is a mask by its name, and no picture that is used has that name"
    return [Quarantined(source=printable(path.relative_to(images).as_posix()), reason=reason) for path in sorted(idle)]


def _refuse_idle_patterns(images: Path, settings: IngestSettings, names: set[str]) -> None:
    patterns = settings.repeats if isinstance(settings.repeats, dict) else {}
    idle = [pattern for pattern in patterns if not any(fnmatch.fnmatchcase(name, pattern) for name in names)]
    if idle:
        raise DataError(
            f"repeats names {idle[0]!r}, and no picture has such a name",
            where=str(images),
            remedy="write names or patterns relative to this folder, such as 'faces/*'",
        )


def _split(pictures: list[ImageEntry], fraction: float) -> tuple[ImageEntry, ...]:
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
