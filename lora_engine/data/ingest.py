"""Ingests a folder of the user's files as a manifest and clean PNG images, a few images in memory at a time."""

from __future__ import annotations

import io
import logging
from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path, PurePosixPath

from PIL import Image

from lora_engine.data.caption_files import FoundCaption, stated_origin
from lora_engine.data.class_images import GIVEN, ClassImage, find_odd, read_class_image
from lora_engine.data.consent import Statement, read_consent
from lora_engine.data.credentials import require_c2pa
from lora_engine.data.decode_cache import DecodeCache
from lora_engine.data.decoders import DecodedImage, shared_decoders
from lora_engine.data.duplicates import Print
from lora_engine.data.folder import owner_of, require_images
from lora_engine.data.ingest_reports import (
    no_images_error,
    unmatched_masks,
    warn_of_generated,
    warn_of_signatures,
    warn_of_transparency,
)
from lora_engine.data.layout import FolderLayout
from lora_engine.data.manifest import ImageEntry, Manifest, Quarantined
from lora_engine.data.opening import ImageOpener
from lora_engine.data.preparation import Preparation
from lora_engine.data.rights import GenerationSign, Rights
from lora_engine.data.spec import IngestSettings
from lora_engine.data.splits import hold_out
from lora_engine.data.text_files import printable
from lora_engine.data.unpacking import unpacked_images
from lora_engine.errors import DataError
from lora_engine.files import atomic_write
from lora_engine.parallel import Workers
from lora_engine.progress import Progress, no_progress

_log = logging.getLogger(__name__)


def ingest(
    images: Path,
    out: Path,
    settings: IngestSettings,
    *,
    consent: Path | None = None,
    masks: Path | None = None,
    revoked: Collection[str] = (),
    prints: dict[str, Print] | None = None,
    cache: DecodeCache | None = None,
    c2pa_roots: Path | None = None,
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
        masks: A folder of masks with the names of their images; None means that masks are beside the images only.
        revoked: Digests of images and ids of consents that were revoked; these images are quarantined.
        prints: Gets the prints of the images by their files in the dataset; None keeps none.
        cache: What was decoded before, and gets what is decoded now; None decodes all images.
        c2pa_roots: See `verify_credentials`, for `c2pa: verify`.
        progress: Called after each file.

    Returns:
        The manifest that was written.

    Raises:
        DataError: The folder is missing or has no usable image, the consent file is invalid, or a pattern of `repeats`
            matches no image.
        SettingsError: Signatures cannot be verified.
    """
    require_images(images)
    if settings.c2pa == "verify":
        require_c2pa(c2pa_roots)
    statements = read_consent(consent) if consent is not None else {}
    with unpacked_images(images, out) as unpacked:
        if masks is not None:
            unpacked.tree.mount_masks(masks)
        layout = FolderLayout(images, unpacked, settings)
        opener = ImageOpener(unpacked.tree, settings, cache, c2pa_roots)
        ingestion = _Ingestion(opener, out, layout, frozenset(revoked))
        entries, quarantined = ingestion.run(statements, progress)
    warn_of_transparency(ingestion.transparent, settings.background)
    quarantined += [_quarantine(printable(name), DataError(why)) for name, why in unpacked.refused.items()]
    quarantined += unmatched_masks(layout.masks, ingestion.used_masks)
    if not entries:
        raise no_images_error(images, quarantined)
    if settings.generated == "warn":
        warn_of_generated(entries)
    warn_of_signatures(entries)
    quarantined += layout.report()
    if unknown := sorted(set(statements) - set(layout.names)):
        _log.warning("%d rows of %s name no file of the folder, first %r", len(unknown), consent, unknown[0])
    skipped = tuple(Quarantined(source=printable(name), reason=why) for name, why in layout.skipped.items())
    for problem in find_odd([ingestion.class_images[e.file] for e in entries if e.split == "class"], GIVEN):
        _log.warning("%s", problem)
    manifest = Manifest(
        pictures=hold_out(entries, settings.heldout, ingestion.prints),
        quarantined=tuple(quarantined),
        skipped=skipped or None,
        layout=layout.describe([ingestion.names[entry.file] for entry in entries]),
    )
    manifest.save(out)
    if cache is not None:
        cache.save({entry.sha256 for entry in manifest.pictures})
    if prints is not None:
        prints |= {entry.file: ingestion.prints[entry.file] for entry in manifest.pictures}
    return manifest


def _quarantine(source: str, error: DataError) -> Quarantined:
    item = Quarantined(source=source, reason=printable(error.reason))
    # The manifest lists it, and so do the summary of a run and the report.
    _log.warning("%s is quarantined: %s", source, item.reason, extra={"in_artifact": True})
    return item


class _Ingestion:
    """Ingests images in order and finds duplicates."""

    def __init__(self, opener: ImageOpener, out: Path, layout: FolderLayout, revoked: frozenset[str]) -> None:
        self._opener, self._tree, self._settings, self._out = opener, opener.tree, opener.settings, out
        self._layout, self._revoked = layout, revoked
        self._sources: dict[str, ImageEntry] = {}
        self._statements: dict[str, dict[Statement, str]] = defaultdict(dict)
        self.names: dict[str, str] = {}
        self.prints: dict[str, Print] = {}
        self.class_images: dict[str, ClassImage] = {}
        self._captions: dict[str, FoundCaption] = {}
        self.used_masks: set[str] = set()
        self.transparent: list[str] = []

    def run(
        self, statements: Mapping[str, Statement], progress: Progress
    ) -> tuple[list[ImageEntry], list[Quarantined]]:
        """Returns the usable images, and the others with reasons."""
        entries: list[ImageEntry] = []
        quarantined: list[Quarantined] = []
        names = [name for name in self._layout.names if name not in self._layout.skipped]
        # Codecs run in children. Everything that depends on earlier files happens here, in the order of the files.
        with Workers() as workers, Workers() as self._writers:
            opened = workers.map(self._opener, names)
            for done, (name, result) in enumerate(zip(names, opened, strict=True), start=1):
                try:
                    entries.append(self._add(name, statements.get(name, Statement()), result))
                except DataError as error:
                    quarantined.append(_quarantine(printable(name), error))
                progress(done, len(names), {})
        entries, refused = self._settle(entries)
        return entries, quarantined + refused

    def _add(self, name: str, statement: Statement, opened: DecodedImage | DataError) -> ImageEntry:
        if isinstance(opened, DataError):
            raise opened
        sha256 = opened.sha256
        if statement != Statement():
            self._statements[sha256].setdefault(statement, printable(name))
        self._refuse_revoked(statement)
        if sha256 in self._revoked:
            raise DataError("the image was revoked")
        file = f"pictures/{sha256[:16]}.png"
        if (earlier := self._sources.get(file)) is not None:
            same = earlier.sha256 == sha256
            if same and (copied := self._layout.caption(name)) is not None:
                self._offer_caption(earlier, copied, name)
            raise DataError(f"{'duplicate of' if same else 'has the same short digest as'} {earlier.source}")
        self.prints[file] = opened.print
        if self._opener.cache is not None:
            self._opener.cache.keep(opened)
        if self._layout.split(name) == "class":
            pixels = Image.open(io.BytesIO(opened.png))
            self.class_images[file] = read_class_image(printable(name), pixels, opened.print)
        caption, repeats = self._layout.caption(name), self._layout.repeats(name)
        mask = self._open_mask(name, opened.size)
        is_opacity = mask is None and opened.opacity is not None and self._settings.alpha == "mask"
        mask = opened.opacity if is_opacity else mask
        self.transparent += [printable(name)] if opened.opacity is not None else []
        self._writers.run(atomic_write, self._out / file, opened.png)
        if mask is not None:
            self._writers.run(atomic_write, self._out / "masks" / Path(file).name, mask)
        entry = ImageEntry(
            sha256=sha256,
            file=file,
            width=opened.size[0],
            height=opened.size[1],
            caption=caption.text if caption is not None else "",
            caption_origin=stated_origin(caption) if caption is not None else None,
            alternatives=(caption.alternatives or None) if caption is not None else None,
            source=printable(name),
            split=self._layout.split(name),
            consent=statement.consent,
            repeats=repeats,
            mask=f"masks/{Path(file).name}" if mask is not None else None,
            rights=_with_evidence(statement.rights, opened.evidence),
            preparation=Preparation(mask="transparency") if is_opacity else None,
        )
        self._sources[file], self.names[file] = entry, name
        return entry

    def _offer_caption(self, earlier: ImageEntry, caption: FoundCaption, name: str) -> None:
        used = earlier.caption or self._captions.setdefault(earlier.file, caption).text
        if used != caption.text:
            source, other = earlier.source, printable(name)
            _log.warning("%s and %s are the same image with different captions; %r is used", source, other, used)

    def _settle(self, entries: Sequence[ImageEntry]) -> tuple[list[ImageEntry], list[Quarantined]]:
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
        if (copied := self._captions.get(entry.file)) is not None:
            stated = {"caption": copied.text, "caption_origin": stated_origin(copied)}
            entry = entry.model_copy(update={**stated, "alternatives": copied.alternatives or None})
        statements = self._statements[entry.sha256]
        if len(statements) > 1:
            names = " and ".join(statements.values())
            raise DataError(f"the consent file states different rights for the same image: {names}")
        for statement in statements:
            self._refuse_revoked(statement)
            rights = _with_evidence(statement.rights, entry.rights.evidence if entry.rights else ())
            entry = entry.model_copy(update={"consent": statement.consent, "rights": rights})
        if self._settings.generated == "refuse" and entry.rights is not None and entry.rights.is_generated:
            raise DataError(f"is {entry.rights.describe_generation()}")
        return entry

    def _refuse_revoked(self, statement: Statement) -> None:
        if statement.consent in self._revoked:
            raise DataError(f"its consent {statement.consent!r} was revoked")

    def _open_mask(self, name: str, size: tuple[int, int]) -> bytes | None:
        files = self._layout.masks.get(owner_of(name), ())
        if not files:
            return None
        folder = PurePosixPath(name).parent.as_posix()
        names = [file.removeprefix(f"{folder}/") for file in files]
        if len(files) > 1:
            raise DataError(f"has {len(files)} masks: {', '.join(names)}", allowed="one", remedy="remove the others")
        try:
            own, mask = shared_decoders().mask(*self._tree.locate(files[0]), self._settings.max_pixels)
        except DataError as error:
            raise DataError(f"its mask {names[0]} {error.problem}", allowed=error.allowed) from None
        if own != size:
            raise DataError(
                f"its mask {names[0]} has {own[0]} x {own[1]} pixels",
                allowed=f"the size of the image, {size[0]} x {size[1]}",
            )
        self.used_masks.add(files[0])
        return mask


def _with_evidence(rights: Rights | None, evidence: tuple[GenerationSign, ...]) -> Rights | None:
    return (rights or Rights()).model_copy(update={"evidence": evidence}) if evidence else rights
