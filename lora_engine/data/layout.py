"""Reads what a folder says about its images besides their pixels: captions, repeats, class images."""

from __future__ import annotations

import fnmatch
import logging
from collections import Counter
from collections.abc import Collection, Iterable
from pathlib import Path, PurePosixPath

from lora_engine.data.caption_files import CaptionFiles, FoundCaption, SeveralCaptions
from lora_engine.data.folder import Listing, Tree, list_tree, owner_of
from lora_engine.data.groups import Grouping
from lora_engine.data.manifest import MAX_CAPTION, Quarantined, Split
from lora_engine.data.spec import IngestSettings
from lora_engine.data.splits import SPLITS, find_splits, split_name
from lora_engine.data.subsets import Subset, find_subsets, repeats_of_folders
from lora_engine.data.text_files import clean_text, printable
from lora_engine.data.trainer_files import DATASET_FILES, find_dataset_file, read_dataset_file
from lora_engine.data.unpacking import Unpacked
from lora_engine.errors import DataError

_log = logging.getLogger(__name__)


class FolderLayout:
    """What a folder says about its images.

    Args:
        root: The user's folder or archive, for errors.
        unpacked: Its files.
        settings: `layout` and `repeats` of ingest.

    Attributes:
        names: The possible images.
        masks: Image as (folder, name without suffix) -> its masks.
        skipped: Image -> why it is not used.

    Raises:
        DataError: A metadata or dataset file is invalid, a pattern of `repeats` matches no image, or the folder does
            not have the stated layout.
    """

    def __init__(self, root: Path, unpacked: Unpacked, settings: IngestSettings) -> None:
        listing = list_tree(unpacked.tree)
        self._repeats, self._unpacked = settings.repeats, unpacked
        self._several_captions = settings.several_captions
        self._grouping = _find_grouping(unpacked.tree, listing, settings.layout)
        if self._grouping is not None:
            listing = _with_masks(listing, self._grouping)
        self.names, self.masks = listing.images, listing.masks
        self._groups = self._grouping.assign(self.names) if self._grouping is not None else {}
        self._counts = Counter(group.folder for group in self._groups.values())
        is_kohya = settings.layout in {"auto", "kohya"} and self._grouping is None
        self._subsets = find_subsets(self.names) if is_kohya else {}
        if settings.layout == "kohya" and self.names and not self._subsets:
            raise DataError(
                "layout is kohya, but not every image is in a folder such as '10_sks dog'",
                where=str(root),
                remedy="move the images, or leave layout out",
            )
        is_split = settings.layout == "huggingface" or (settings.layout == "auto" and not self._subsets)
        self._splits = find_splits(self.names) if is_split and self._grouping is None else {}
        if settings.layout == "huggingface" and self.names and not self._splits:
            raise DataError(
                "layout is huggingface, but not every image is in a folder or table such as 'train'",
                where=str(root),
                allowed=", ".join(SPLITS),
                remedy="move the images, or leave layout out",
            )
        _refuse_unmatched_patterns(root, settings, self.names)
        self._captions = CaptionFiles(
            unpacked.tree, self.names, listing.companions, self._subsets, unpacked.rows, self._several
        )
        self.skipped = self._find_skipped()

    def _several(self, name: str) -> SeveralCaptions:
        if self._several_captions == "auto" and name in self._groups and self._groups[name].first_line:
            return "first"
        return self._several_captions

    def _find_skipped(self) -> dict[str, str]:
        if self._grouping is None:
            return {}
        outside = f"is in no folder of {printable(PurePosixPath(self._grouping.file).name)}"
        groups = ((name, self._groups.get(name)) for name in self.names)
        reasons = {name: group.skipped if group is not None else outside for name, group in groups}
        return {name: reason for name, reason in reasons.items() if reason is not None}

    def caption(self, name: str) -> FoundCaption | None:
        """Returns the caption of an image; None if there is none."""
        group = self._groups.get(name)
        if group is not None and group.captions == "stated":
            drawn = group.alternatives if self._several_captions == "draw" else ()
            return FoundCaption(group.text, "dataset file", drawn) if group.text else None
        if group is not None and group.captions == "file name":
            return FoundCaption(clean_text(PurePosixPath(name).stem.replace("_", " ")), "file name")
        caption = self._captions.find(name)
        if group is None:
            return caption
        if caption is None and group.text:
            caption = FoundCaption(group.text, "dataset file")
        if caption is None or group.trigger is None:
            return caption
        texts = [text.replace("[trigger]", group.trigger) for text in (caption.text, *caption.alternatives)]
        if max(map(len, texts)) > MAX_CAPTION:
            self._captions.faults[f"{name}, its caption"] = f"is cut after {MAX_CAPTION:,} characters"
        first, *others = (text[:MAX_CAPTION] for text in texts)
        return FoundCaption(first, caption.origin, tuple(others))

    def repeats(self, name: str) -> int:
        """Returns the number of times that an image occurs per epoch; see `IngestSettings`.

        Raises:
            DataError: The number of a folder is 0 or too large.
        """
        if self._repeats == "folders":
            return repeats_of_folders(name)
        matches = [count for pattern, count in self._repeats.items() if fnmatch.fnmatchcase(name, pattern)]
        if matches:
            return matches[-1]
        group, subset = self._groups.get(name), self._subset(name)
        if group is not None:
            return group.repeats_of(self._counts[group.folder])
        return subset.repeats if subset is not None and not self._repeats else 1

    def split(self, name: str) -> Split:
        """Returns the use that the folder states for an image; `train` if it states none."""
        if (group := self._groups.get(name)) is not None:
            return group.split
        subset = self._subset(name)
        return "class" if subset is not None and subset.is_class else self._splits.get(name, "train")

    def describe(self, used: Collection[str]) -> str | None:
        """Returns a line about the layout; None for a plain folder.

        Args:
            used: The images that are used.
        """
        folders = Counter(PurePosixPath(name).parent.as_posix() for name in used)
        lines = [
            "kohya folders: " + ", ".join(subset.describe(folders[name]) for name, subset in self._subsets.items())
            if self._subsets
            else "",
            self._describe_groups(used),
            f"Hugging Face splits: {_counted(split_name(name) for name in used)}" if self._splits else "",
            self._describe_archives(used),
        ]
        return "; ".join(filter(None, lines)) or None

    def _describe_groups(self, used: Collection[str]) -> str:
        if self._grouping is None:
            return ""
        counts = Counter(self._groups[name].folder for name in used)
        groups = [group for group in self._grouping.groups if group.skipped is None]
        parts = [", ".join(group.describe(counts[group.folder]) for group in groups)]
        if self._captions.shortened:
            parts.append(f"{self._captions.shortened} captions have alternatives, and their first line is used")
        return f"{self._grouping.title}: {'; '.join((*parts, *self._grouping.notes))}"

    def _describe_archives(self, used: Collection[str]) -> str:
        counts = Counter(self._unpacked.tree.archive_of(name) or self._unpacked.archive for name in used)
        kinds = Counter(PurePosixPath(archive).suffix.lstrip(".").lower() for archive in counts if archive)
        images = sum(count for archive, count in counts.items() if archive)
        shards = ", ".join(f"{number} {kind}" for kind, number in sorted(kinds.items()))
        return f"archives: {shards} ({images} image{'' if images == 1 else 's'})" if kinds else ""

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
        _warn("%d images are stated twice with different captions, and the first is used, first %s", captions.doubled)
        for note in self._grouping.notes if self._grouping is not None else ():
            _log.warning("%s", note)
        _warn("%d captions belong to no image, first %s", [printable(name) for name in captions.unowned])
        _warn(
            "%d caption files have several lines, which are one caption (set several_captions to first or draw if "
            "they are alternatives), first %s",
            [printable(name) for name in captions.joined],
        )
        _warn("%d entries of metadata files name no image, first %s", captions.unknown)
        faults = [Quarantined(source=printable(file), reason=printable(why)) for file, why in captions.faults.items()]
        for fault in faults:
            # The manifest lists it, and so does the summary of a run.
            _log.warning("the caption %s is not used: %s", fault.source, fault.reason, extra={"in_artifact": True})
        return faults

    def _subset(self, name: str) -> Subset | None:
        return self._subsets.get(PurePosixPath(name).parent.as_posix())


def _find_grouping(tree: Tree, listing: Listing, layout: str) -> Grouping | None:
    if layout not in {"auto", *DATASET_FILES}:
        return None
    found = find_dataset_file(layout, listing.companions)
    names = [*listing.images, *listing.companions, *(name for masks in listing.masks.values() for name in masks)]
    return read_dataset_file(*found, tree, names) if found is not None else None


def _with_masks(listing: Listing, grouping: Grouping) -> Listing:
    """Returns the listing with the images of folders of masks as masks of the images with the same names."""
    folders = grouping.mask_folders()
    masks = {owner: [*names] for owner, names in listing.masks.items()}
    images = []
    for name in listing.images:
        parent = next((p.as_posix() for p in PurePosixPath(name).parents if p.as_posix() in folders), None)
        if parent is None:
            images.append(name)
        else:
            twin = PurePosixPath(folders[parent].folder) / PurePosixPath(name).relative_to(parent)
            masks.setdefault(owner_of(twin.as_posix()), []).append(name)
    return Listing(tuple(images), masks, listing.companions)


def _counted(words: Iterable[str]) -> str:
    return ", ".join(f"{count} {word}" for word, count in sorted(Counter(words).items()))


def _warn(message: str, items: list[str]) -> None:
    if items:
        _log.warning(message, len(items), items[0])


def _refuse_unmatched_patterns(root: Path, settings: IngestSettings, names: Collection[str]) -> None:
    patterns = settings.repeats if isinstance(settings.repeats, dict) else {}
    unmatched = [pattern for pattern in patterns if not any(fnmatch.fnmatchcase(name, pattern) for name in names)]
    if unmatched:
        raise DataError(
            f"the pattern {unmatched[0]!r} of repeats matches no image",
            where=str(root),
            remedy="write names or patterns relative to this folder, such as 'faces/*'",
        )
