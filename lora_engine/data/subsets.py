"""Recognizes kohya's folders: `10_sks dog` holds images that occur 10 times per epoch, with its words as caption."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import PurePosixPath

from lora_engine.data.manifest import MAX_REPEATS
from lora_engine.data.text_files import clean_text, printable
from lora_engine.errors import DataError

_SUBSET = re.compile(r"([0-9]{1,9})_(.*)", re.DOTALL)
_CLASS_FOLDERS = frozenset({"reg", "reg_img", "reg_images", "regularization", "regularization_images", "class_images"})


@dataclass(frozen=True)
class Subset:
    """A folder of images with a number and words in its name.

    Attributes:
        repeats: Number of times that its images occur per epoch.
        words: The caption of its images that have no other caption; may be empty.
        is_class: True if its images are class images (regularization images), not images of the concept.
    """

    repeats: int
    words: str
    is_class: bool = False

    def describe(self, count: int) -> str:
        """Returns `10 x 'sks dog' (3 images)`."""
        plural = "" if count == 1 else "s"
        role = " as class images" if self.is_class else ""
        return f"{self.repeats} x {self.words!r}{role} ({count} image{plural})"


def find_subsets(names: Collection[str]) -> Mapping[str, Subset]:
    """Returns folder -> subset, or nothing if an image is in no such folder.

    Class images are below a folder `reg`, or in a folder whose words are the last ones of another folder: `1_dog`
    beside `10_sks dog`. At least one folder has images of the concept.

    Args:
        names: The images, relative to the folder that has them all.
    """
    found: dict[str, Subset] = {}
    for folder in sorted({PurePosixPath(name).parent for name in names}):
        subset = _read_name(folder)
        if subset is None:
            return {}
        found[folder.as_posix()] = subset
    texts = [subset.words.split() for subset in found.values() if not subset.is_class]
    marked = {
        folder: Subset(subset.repeats, subset.words, subset.is_class or _ends_another(subset.words.split(), texts))
        for folder, subset in found.items()
    }
    return marked if not all(subset.is_class for subset in marked.values()) else _without_class(marked)


def repeats_of_folders(name: str) -> int:
    """Returns the number in the innermost folder `N_words` above an image; 1 if there is none.

    Raises:
        DataError: The number is 0 or too large.
    """
    for folder in reversed(PurePosixPath(name).parts[:-1]):
        if (match := _SUBSET.fullmatch(folder)) is not None:
            count = int(match[1])
            if not 1 <= count <= MAX_REPEATS:
                raise DataError(f"the folder {printable(folder)!r} sets {count} repeats", allowed=f"1-{MAX_REPEATS}")
            return count
    return 1


def _read_name(folder: PurePosixPath) -> Subset | None:
    match = _SUBSET.fullmatch(folder.name)
    if match is None or not 1 <= int(match[1]) <= MAX_REPEATS:
        return None
    is_class = not _CLASS_FOLDERS.isdisjoint(part.lower() for part in folder.parts[:-1])
    return Subset(int(match[1]), clean_text(match[2]), is_class)


def _ends_another(words: list[str], texts: list[list[str]]) -> bool:
    return bool(words) and any(len(text) > len(words) and text[-len(words) :] == words for text in texts)


def _without_class(subsets: Mapping[str, Subset]) -> Mapping[str, Subset]:
    return {folder: Subset(subset.repeats, subset.words) for folder, subset in subsets.items()}
