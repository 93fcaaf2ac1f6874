"""Splits a dataset into images for training and held-out ones: as its folders say, or by groups that show the same."""

from __future__ import annotations

import logging
import re
from collections.abc import Collection, Mapping, Sequence
from pathlib import PurePosixPath

from lora_engine.data.duplicates import Print, find_groups, find_kin, find_same
from lora_engine.data.manifest import ImageEntry, Split

_log = logging.getLogger(__name__)
SPLITS: Mapping[str, Split] = {
    "train": "train",
    **dict.fromkeys(("test", "validation", "valid", "val", "dev", "eval"), "heldout"),
}
"""Names of splits of Hugging Face's datasets -> use."""
_SHARD = re.compile(rf"({'|'.join(SPLITS)})(?:[-_.].*)?\.(?:parquet|arrow|tar|zip)", re.IGNORECASE)


def find_splits(names: Collection[str]) -> dict[str, Split]:
    """Returns image -> use, or nothing if an image is in no split, or none is trained on."""
    splits = {name: SPLITS.get(split_name(name)) for name in names}
    found = {name: split for name, split in splits.items() if split is not None}
    return found if len(found) == len(splits) and {*found.values()} == {"train", "heldout"} else {}


def split_name(name: str) -> str:
    """Returns the split of an image: the first of its folders, or of the tables above it, that is named like one."""
    for part in PurePosixPath(name).parts[:-1]:
        if part.lower() in SPLITS:
            return part.lower()
        if (match := _SHARD.fullmatch(part)) is not None:
            return match[1].lower()
    return ""


def hold_out(entries: Sequence[ImageEntry], fraction: float, prints: Mapping[str, Print]) -> tuple[ImageEntry, ...]:
    """Returns the images, of which whole groups that show the same are held out.

    Args:
        entries: The images.
        fraction: Share of the images for training that is held out, in the order of the groups' smallest digests.
        prints: File in the dataset -> print of the image.
    """
    trained = [entry for entry in entries if entry.split == "train"]
    compared = [prints[entry.file] for entry in trained]
    _warn_of_same(trained, compared)
    _warn_of_kin([entry for entry in entries if entry.split == "heldout"], trained, prints)
    if fraction == 0.0 or len(trained) < 2:
        return tuple(entries)
    target = min(max(1, round(len(trained) * fraction)), len(trained) - 1)
    groups = [{trained[index].sha256 for index in group} for group in find_groups(compared)]
    heldout: set[str] = set()
    for group in sorted(groups, key=min):
        if len(heldout) < target and len(heldout) + len(group) < len(trained):
            heldout |= group
    if not heldout:
        _log.warning("all images show nearly the same, so those held out are not independent of the others")
        heldout = set(sorted(entry.sha256 for entry in trained)[:target])
    elif len(heldout) > target:
        _log.warning("%d images are held out instead of %d, because some show nearly the same", len(heldout), target)
    return tuple(e.model_copy(update={"split": "heldout"}) if e.sha256 in heldout else e for e in entries)


def _warn_of_same(trained: Sequence[ImageEntry], compared: Sequence[Print]) -> None:
    """Logs the number of pairs of images that are the same, and the first."""
    count, pair = 0, ""
    for first, others in find_same(compared):
        pair = pair or f"{trained[first].source} and {trained[int(others[0])].source}"
        count += len(others)
    if count:
        _log.warning("%d pairs of images are the same but for encoding or size, first %s", count, pair)


def _warn_of_kin(stated: Sequence[ImageEntry], trained: Sequence[ImageEntry], prints: Mapping[str, Print]) -> None:
    """Logs images that the folder holds out although they show nearly the same as others."""
    if not stated:
        return
    entries = [*stated, *trained]
    count, pair = 0, ""
    for first, kin in find_kin([prints[entry.file] for entry in entries], len(stated)):
        others = kin[kin >= len(stated)]
        if len(others):
            pair = pair or f"{entries[first].source} and {entries[int(others[0])].source}"
            count += 1
    if count:
        _log.warning("%d held-out images of the folder show nearly the same as others, first %s", count, pair)
