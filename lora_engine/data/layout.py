"""Reads what a folder says about its images besides their pixels: captions, repeats, class images."""

from __future__ import annotations

import fnmatch
import logging
from collections import Counter
from collections.abc import Collection, Mapping
from pathlib import Path, PurePosixPath

from lora_engine.data.caption_files import TEXT, CaptionFiles, FoundCaption
from lora_engine.data.folder import COMPANIONS, MASK_ENDINGS, Listing
from lora_engine.data.manifest import Quarantined, Split
from lora_engine.data.metadata import is_metadata
from lora_engine.data.spec import IngestSettings
from lora_engine.data.subsets import Subset, find_subsets, repeats_of_folders
from lora_engine.data.text_files import printable
from lora_engine.errors import DataError

_log = logging.getLogger(__name__)


def is_plain(names: Collection[str]) -> bool:
    """Returns True if releases before 0.4 used the same images and captions of a folder with files of these names.

    They read `a.txt` beside `a.png`, in PNG, JPEG and WebP, and no meaning of folder names.
    """
    paths = [PurePosixPath(name) for name in names]
    kinds = {path.suffix for path in paths}
    images = {str(path) for path in paths if path.suffix.lower() not in COMPANIONS}
    return not (
        kinds & {".caption", ".json"}
        or {kind.lower() for kind in kinds} & {".avif", ".bmp", ".tif", ".tiff", ".gif"}
        or any(kind != TEXT and kind.lower() == TEXT for kind in kinds)
        or any(path.suffix == TEXT and PurePosixPath(path.stem).suffix for path in paths)
        or any(is_metadata(path.name) for path in paths)
        or any(path.stem.lower().endswith(MASK_ENDINGS[1:]) for path in paths)
        or find_subsets(images)
    )


class FolderLayout:
    """What a folder says about its images.

    Args:
        root: The folder.
        listing: Its files.
        settings: `layout` and `repeats` of ingest.

    Attributes:
        names: The possible images, relative to the folder.

    Raises:
        DataError: A metadata file is invalid, a pattern of `repeats` matches no image, or `layout` is `kohya` and an
            image is in no folder `N_words`.
    """

    def __init__(self, root: Path, listing: Listing, settings: IngestSettings) -> None:
        self.names = {path.relative_to(root).as_posix(): path for path in listing.images}
        self._repeats = settings.repeats
        self._subsets = find_subsets(self.names) if settings.layout != "plain" else {}
        if settings.layout == "kohya" and self.names and not self._subsets:
            raise DataError(
                "layout is kohya, but not every image is in a folder such as '10_sks dog'",
                where=str(root),
                remedy="move the images, or leave layout out",
            )
        _refuse_unmatched_patterns(root, settings, self.names)
        self._captions = CaptionFiles(root, self.names, listing.companions, self._subsets)

    def caption(self, name: str) -> FoundCaption | None:
        """Returns the caption of an image; None if there is none."""
        return self._captions.find(name)

    def repeats(self, name: str) -> int:
        """Returns the number of times that an image occurs per epoch; see `IngestSettings`.

        Raises:
            DataError: The number of a folder is 0 or too large.
        """
        if self._repeats == "folders":
            return repeats_of_folders(name)
        matches = [count for pattern, count in self._repeats.items() if fnmatch.fnmatchcase(name, pattern)]
        subset = self._subset(name)
        return matches[-1] if matches else subset.repeats if subset is not None and not self._repeats else 1

    def split(self, name: str) -> Split:
        """Returns `class` for a class image, else `train`."""
        subset = self._subset(name)
        return "class" if subset is not None and subset.is_class else "train"

    def describe(self, used: Collection[str]) -> str | None:
        """Returns a line about kohya's folders; None if the folder has none.

        Args:
            used: The images that are used, relative to the folder.
        """
        if not self._subsets:
            return None
        counts = Counter(PurePosixPath(name).parent.as_posix() for name in used)
        return "kohya folders: " + ", ".join(
            subset.describe(counts[folder]) for folder, subset in self._subsets.items()
        )

    def report(self) -> list[Quarantined]:
        """Logs what is odd about the captions, after `caption` was called for all images.

        Returns:
            The unusable files of captions. Their images are used.
        """
        captions = self._captions
        if captions.differing:
            name, (used, other) = next(iter(captions.differing.items()))
            _log.warning(
                "%d images have different captions in two places, first %s: %s is used, not %s",
                len(captions.differing),
                printable(name),
                used,
                other,
            )
        _warn("%d captions belong to no image, first %s", [printable(name) for name in captions.unowned])
        _warn("%d entries of metadata files name no image, first %s", captions.unknown)
        faults = [Quarantined(source=printable(file), reason=printable(why)) for file, why in captions.faults.items()]
        for fault in faults:
            # The manifest lists it, and so does the summary of a run.
            _log.warning("the caption %s is not used: %s", fault.source, fault.reason, extra={"in_artifact": True})
        return faults

    def _subset(self, name: str) -> Subset | None:
        return self._subsets.get(PurePosixPath(name).parent.as_posix())


def _warn(message: str, items: list[str]) -> None:
    if items:
        _log.warning(message, len(items), items[0])


def _refuse_unmatched_patterns(root: Path, settings: IngestSettings, names: Mapping[str, Path]) -> None:
    patterns = settings.repeats if isinstance(settings.repeats, dict) else {}
    unmatched = [pattern for pattern in patterns if not any(fnmatch.fnmatchcase(name, pattern) for name in names)]
    if unmatched:
        raise DataError(
            f"the pattern {unmatched[0]!r} of repeats matches no image",
            where=str(root),
            remedy="write names or patterns relative to this folder, such as 'faces/*'",
        )
