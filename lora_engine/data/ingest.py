"""Ingests a folder of the user's files as a manifest and clean PNG images, a few images in memory at a time."""

from __future__ import annotations

import fnmatch
import logging
from collections import Counter, defaultdict
from collections.abc import Collection, Mapping, Sequence
from functools import partial
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
from lora_engine.data.images import IMAGE_FORMATS, open_image, open_with_digest, write_image, write_mask
from lora_engine.data.manifest import ImageEntry, Manifest, Quarantined
from lora_engine.data.rights import GenerationSign, Rights
from lora_engine.data.spec import IngestSettings
from lora_engine.errors import DataError
from lora_engine.parallel import Workers
from lora_engine.progress import Progress, no_progress

_log = logging.getLogger(__name__)


def ingest(
    images: Path,
    out: Path,
    settings: IngestSettings,
    *,
    consent: Path | None = None,
    revoked: Collection[str] = (),
    progress: Progress = no_progress,
) -> Manifest:
    """Reads the folder and writes a dataset: `manifest.json`, `pictures/` and `masks/`, without the files' metadata.

    Quarantines every file that cannot be used, with its reason; an image with an unusable mask is one of them. Uses
    files with the same bytes once, and not at all if the consent file states different rights for them. The result
    depends only on the bytes and names of the files.

    Args:
        images: The folder, including its subfolders.
        out: The folder for the dataset.
        settings: See `IngestSettings`.
        consent: A table for `read_consent`; file names are relative to the folder.
        revoked: Digests of images and ids of consents that were revoked; these images are quarantined.
        progress: Called after each file.

    Returns:
        The manifest that was written.

    Raises:
        DataError: The folder is missing or has no usable image, the consent file is invalid, or a pattern of `repeats`
            matches no image.
    """
    require_folder(images)
    statements = read_consent(consent) if consent is not None else {}
    entries: list[ImageEntry] = []
    quarantined: list[Quarantined] = []
    files, masks = _sort_files(images)
    names = {path.relative_to(images).as_posix() for path in files}
    _refuse_unmatched_patterns(images, settings, names)
    # Codecs run in threads. Everything that depends on earlier files happens here, in the order of the files.
    with Workers() as workers:
        ingestion = _Ingestion(images, out, settings, masks, frozenset(revoked), workers)
        opened = workers.map(partial(_try_to_open, images, settings.max_pixels), files)
        for done, (path, result) in enumerate(zip(files, opened, strict=True), start=1):
            name = path.relative_to(images).as_posix()
            try:
                entries.append(ingestion.add(path, name, statements.get(name, Statement()), result))
            except DataError as error:
                quarantined.append(_quarantine(printable(name), error))
            progress(done, len(files), {})
    entries, refused = ingestion.settle(entries)
    quarantined += refused
    quarantined += _unmatched_masks(images, masks, ingestion.used_masks)
    if not entries:
        raise _no_images_error(images, quarantined)
    if unknown := sorted(set(statements) - names):
        _log.warning("%d rows of %s name no file of the folder, first %r", len(unknown), consent, unknown[0])
    manifest = Manifest(pictures=_split(entries, settings.heldout), quarantined=tuple(quarantined))
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


_Opened = tuple[str, Image.Image] | DataError


def _try_to_open(images: Path, max_pixels: int, path: Path) -> _Opened:
    """Returns the digest and the pixels of a file, or why it cannot be used."""
    try:
        return open_with_digest(path, max_pixels, images)
    except DataError as error:
        return error


def _quarantine(source: str, error: DataError) -> Quarantined:
    item = Quarantined(source=source, reason=printable(_reason(error)))
    # The manifest lists it, and so do the summary of a run and the report.
    _log.warning("%s is quarantined: %s", source, item.reason, extra={"in_artifact": True})
    return item


class _Ingestion:
    """Ingests images in order and finds duplicates."""

    def __init__(
        self,
        images: Path,
        out: Path,
        settings: IngestSettings,
        masks: Mapping[Owner, Sequence[Path]],
        revoked: frozenset[str],
        workers: Workers,
    ) -> None:
        self._images, self._out, self._settings, self._masks = images, out, settings, masks
        self._revoked, self._workers = revoked, workers
        self._sources: dict[str, ImageEntry] = {}
        self._statements: dict[str, dict[Statement, str]] = defaultdict(dict)
        self.used_masks: set[Path] = set()

    def add(self, path: Path, name: str, statement: Statement, opened: _Opened) -> ImageEntry:
        if isinstance(opened, DataError):
            raise opened
        sha256, pixels = opened
        if statement != Statement():
            self._statements[sha256].setdefault(statement, printable(name))
        self._refuse_revoked(statement)
        if sha256 in self._revoked:
            raise DataError("the image was revoked")
        file = f"pictures/{sha256[:16]}.png"
        if (earlier := self._sources.get(file)) is not None:
            same = earlier.sha256 == sha256
            raise DataError(f"{'duplicate of' if same else 'has the same short digest as'} {earlier.source}")
        caption = read_caption(path, self._images)
        repeats = repeats_of(name, self._settings.repeats)
        mask = self._open_mask(path, pixels.size)
        self._workers.run(write_image, self._out / file, pixels)
        if mask is not None:
            self._workers.run(write_mask, self._out / "masks" / Path(file).name, mask)
        entry = ImageEntry(
            sha256=sha256,
            file=file,
            width=pixels.width,
            height=pixels.height,
            caption=caption,
            source=printable(name),
            consent=statement.consent,
            repeats=repeats,
            mask=f"masks/{Path(file).name}" if mask is not None else None,
            rights=_with_evidence(statement.rights, read_evidence(path, self._images)),
        )
        self._sources[file] = entry
        return entry

    def settle(self, entries: Sequence[ImageEntry]) -> tuple[list[ImageEntry], list[Quarantined]]:
        """Judges the statements about all copies of each image: removes those that differ, uses the only one."""
        settled, refused = [], []
        for entry in entries:
            try:
                settled.append(self._settled(entry))
            except DataError as error:
                refused.append(_quarantine(entry.source, error))
                for file in entry.files:
                    (self._out / file).unlink()
        return settled, refused

    def _settled(self, entry: ImageEntry) -> ImageEntry:
        statements = self._statements[entry.sha256]
        if len(statements) > 1:
            names = " and ".join(statements.values())
            raise DataError(f"the consent file states different rights for the same image: {names}")
        for statement in statements:
            self._refuse_revoked(statement)
            rights = _with_evidence(statement.rights, entry.rights.evidence if entry.rights else ())
            entry = entry.model_copy(update={"consent": statement.consent, "rights": rights})
        return entry

    def _refuse_revoked(self, statement: Statement) -> None:
        if statement.consent in self._revoked:
            raise DataError(f"its consent {statement.consent!r} was revoked")

    def _open_mask(self, path: Path, size: tuple[int, int]) -> Image.Image | None:
        files = self._masks.get((path.parent, path.stem), ())
        if not files:
            return None
        names = [file.relative_to(path.parent).as_posix() for file in files]
        if len(files) > 1:
            raise DataError(f"has {len(files)} masks: {', '.join(names)}", allowed="one", remedy="remove the others")
        try:
            mask = open_image(files[0], self._settings.max_pixels, self._images).convert("L")
        except DataError as error:
            raise DataError(f"its mask {names[0]} {error.problem}", allowed=error.allowed) from None
        if mask.size != size:
            raise DataError(
                f"its mask {names[0]} has {mask.width} x {mask.height} pixels",
                allowed=f"the size of the image, {size[0]} x {size[1]}",
            )
        self.used_masks.add(files[0])
        return mask


def _with_evidence(rights: Rights | None, evidence: tuple[GenerationSign, ...]) -> Rights | None:
    return (rights or Rights()).model_copy(update={"evidence": evidence}) if evidence else rights


def _unmatched_masks(images: Path, masks: Mapping[Owner, Sequence[Path]], used: set[Path]) -> list[Quarantined]:
    unused = (path for paths in masks.values() for path in paths if path not in used)
    reason = "is a mask by its name, and no used image has that name"
    return [
        Quarantined(source=printable(path.relative_to(images).as_posix()), reason=reason) for path in sorted(unused)
    ]


def _refuse_unmatched_patterns(images: Path, settings: IngestSettings, names: set[str]) -> None:
    patterns = settings.repeats if isinstance(settings.repeats, dict) else {}
    unmatched = [pattern for pattern in patterns if not any(fnmatch.fnmatchcase(name, pattern) for name in names)]
    if unmatched:
        raise DataError(
            f"the pattern {unmatched[0]!r} of repeats matches no image",
            where=str(images),
            remedy="write names or patterns relative to this folder, such as 'faces/*'",
        )


def _split(entries: list[ImageEntry], fraction: float) -> tuple[ImageEntry, ...]:
    if fraction == 0.0 or len(entries) < 2:
        return tuple(entries)
    count = min(max(1, round(len(entries) * fraction)), len(entries) - 1)
    heldout = set(sorted(entry.sha256 for entry in entries)[:count])
    return tuple(e.model_copy(update={"split": "heldout"}) if e.sha256 in heldout else e for e in entries)


def _reason(error: DataError) -> str:
    return f"{error.problem}; allowed: {error.allowed}" if error.allowed else error.problem


def _no_images_error(images: Path, quarantined: list[Quarantined]) -> DataError:
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
