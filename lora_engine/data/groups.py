"""Groups of images that the dataset files of other trainers describe: a folder with repeats, captions and a use."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any, Literal

from lora_engine.data.manifest import MAX_CAPTION, MAX_REPEATS, Split
from lora_engine.data.text_files import clean_text, printable
from lora_engine.errors import DataError

CaptionSource = Literal["files", "file name", "stated"]


@dataclass(frozen=True)
class ImageGroup:
    """What a dataset file says about the images of a folder.

    Attributes:
        folder: The folder, relative to that of all images; `.` for all.
        label: Its name in the file.
        repeats: Number of times that each image occurs per epoch.
        samples: Number of images per epoch, which replaces `repeats`; None leaves these.
        split: The use of its images.
        skipped: Why its images are not used; None uses them.
        is_recursive: True if the images of its subfolders belong to it.
        captions: `files` takes captions as for other folders, `file name` the words of the file's name, and `stated`
            takes `text`.
        first_line: True if the lines of a caption file are alternatives, of which the first is used.
        text: The caption of images without another, or of all if `captions` is `stated`.
        alternatives: Further ones; see `several_captions` of ingest.
        trigger: Replaces `[trigger]` in captions; None leaves it.
        masks: The folder of its masks, which have the names of the images; None means none.
    """

    folder: str
    label: str
    repeats: int = 1
    samples: int | None = None
    split: Split = "train"
    skipped: str | None = None
    is_recursive: bool = True
    captions: CaptionSource = "files"
    first_line: bool = False
    text: str = ""
    alternatives: tuple[str, ...] = ()
    trigger: str | None = None
    masks: str | None = None

    def describe(self, count: int) -> str:
        """Returns `2 x 'dog' (3 images)`."""
        uses = {"train": "", "heldout": " held out", "class": " as class images"}
        factor = f"{self.samples} of" if self.samples is not None else f"{self.repeats} x"
        return f"{factor} {self.label!r}{uses[self.split]} ({count} image{'' if count == 1 else 's'})"

    def repeats_of(self, count: int) -> int:
        """Returns the repeats of each of its `count` images."""
        return self.repeats if self.samples is None else min(MAX_REPEATS, max(1, round(self.samples / max(1, count))))


@dataclass(frozen=True)
class Grouping:
    """The groups of a dataset file.

    Attributes:
        title: The kind of file in the report, such as `OneTrainer concepts`.
        file: Its name.
        groups: Its groups.
        notes: What it states that is not carried over.
    """

    title: str
    file: str
    groups: tuple[ImageGroup, ...]
    notes: tuple[str, ...] = ()

    def assign(self, names: Collection[str]) -> dict[str, ImageGroup]:
        """Returns image -> its group: the one of the nearest folder."""
        by_folder = {group.folder: group for group in self.groups}
        found: dict[str, ImageGroup] = {}
        for name in names:
            parents = [parent.as_posix() for parent in PurePosixPath(name).parents]
            for distance, parent in enumerate(parents):
                group = by_folder.get(parent)
                if group is not None and (distance == 0 or group.is_recursive):
                    found[name] = group
                    break
        return found

    def mask_folders(self) -> dict[str, ImageGroup]:
        """Returns folder of masks -> group of their images."""
        return {group.masks: group for group in self.groups if group.masks is not None}


class FolderNames:
    """Finds the folder that a dataset file means.

    Args:
        names: All files, relative to the folder that has them all.
        file: The dataset file.
    """

    def __init__(self, names: Collection[str], file: str) -> None:
        self._folders = {parent.as_posix() for name in names for parent in PurePosixPath(name).parents}
        self._start = PurePosixPath(file).parent

    def find(self, stated: str, where: str) -> str:
        """Returns the folder of a path in the file, relative to the file.

        The absolute path of another machine is found by its last parts.

        Raises:
            DataError: It is outside of the folder of all images, or has no file.
        """
        path = PurePosixPath(stated.replace("\\", "/"))
        if ".." in path.parts:
            path = _without_parents(path, self._start, stated, where)
        elif path.is_absolute() or ":" in (path.parts[0] if path.parts else ""):
            for length in range(len(path.parts) - 1, 0, -1):
                tail = (self._start / PurePosixPath(*path.parts[-length:])).as_posix()
                if tail in self._folders:
                    return tail
        else:
            path = self._start / path
        if path.as_posix() in self._folders:
            return path.as_posix()
        raise DataError(
            f"there is no folder {printable(stated)!r} with files",
            where=where,
            allowed="folders below that of the file",
            remedy="correct the path, put its images there, or set layout: plain",
        )


def _without_parents(path: PurePosixPath, start: PurePosixPath, stated: str, where: str) -> PurePosixPath:
    parts: list[str] = list(start.parts)
    for part in path.parts:
        if part != "..":
            parts.append(part)
        elif parts:
            parts.pop()
        else:
            raise DataError(f"the path {printable(stated)!r} leads out of the folder", where=where)
    return PurePosixPath(*parts)


class SettingsObject:
    """An object of a dataset file, with checked access to its values.

    Args:
        data: The object.
        where: Its place, for errors.
    """

    def __init__(self, data: Any, where: str) -> None:
        if not isinstance(data, dict):
            raise DataError(f"is {type(data).__name__}", where=where, allowed="an object")
        self.data: Mapping[str, Any] = data
        self.where = where

    def text(self, key: str, default: str = "") -> str:
        """Returns a text; the default if it is missing or null."""
        return str(self._value(key, default, str, "text"))

    def caption(self, key: str) -> str:
        """Returns a text as one line; empty if it is missing."""
        return bounded_caption(self.text(key), f"{self.where}, {key}")

    def flag(self, key: str, default: bool) -> bool:
        """Returns a truth value."""
        return bool(self._value(key, default, bool, "true or false"))

    def number(self, key: str, default: float) -> float:
        """Returns a finite number."""
        value = self._value(key, default, (int, float), "a number")
        if isinstance(value, bool) or not -1e9 < value < 1e9:
            raise DataError(f"{key} is {str(value)[:50]}", where=self.where, allowed="a number")
        return float(value)

    def repeats(self, key: str, *, extra: bool = False) -> int:
        """Returns repeats: a factor, or a number of extra ones."""
        count = round(self.number(key, 0 if extra else 1)) + extra
        if not 0 <= count <= MAX_REPEATS:
            raise DataError(f"{key} is {self.data[key]!r}", where=self.where, allowed=f"up to {MAX_REPEATS}")
        return max(1, count)

    def entry(self, key: str) -> SettingsObject:
        """Returns an object; an empty one if it is missing."""
        return SettingsObject(self.data.get(key) or {}, f"{self.where}, {key}")

    def entries(self, key: str) -> Sequence[SettingsObject]:
        """Returns a list of objects; an empty one if it is missing."""
        return list(objects_of(self.data.get(key) or [], f"{self.where}, {key}"))

    def _value(self, key: str, default: Any, kind: Any, noun: str) -> Any:
        value = self.data.get(key)
        if value is None:
            return default
        if not isinstance(value, kind):
            raise DataError(f"{key} is {type(value).__name__}", where=self.where, allowed=noun)
        return value


def bounded_caption(text: str, where: str) -> str:
    """Returns a text as one line.

    Raises:
        DataError: It is longer than a caption may be.
    """
    line = clean_text(text)
    if len(line) > MAX_CAPTION:
        raise DataError(f"has {len(line):,} characters", where=where, allowed=f"{MAX_CAPTION:,} characters")
    return line


def objects_of(data: Any, where: str) -> Iterator[SettingsObject]:
    """Yields the objects of a list.

    Raises:
        DataError: It is no list, or has something else.
    """
    if not isinstance(data, list):
        raise DataError(f"is {type(data).__name__}", where=where, allowed="a list")
    for number, item in enumerate(data, start=1):
        yield SettingsObject(item, f"{where}, entry {number}")
