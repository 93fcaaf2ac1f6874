"""Says what to do about images that show the same, and about flaws."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from lora_engine.data.manifest import ImageEntry
from lora_engine.data.quality import FIXES

_SHOWN = 5
_TO_ENLARGE = "replace them by larger ones, or train at a lower resolution"


@dataclass(frozen=True)
class Duplicates:
    """Images that show nearly the same.

    Attributes:
        keep: The one to keep: with a caption, then with the most pixels.
        others: The others.
        captions: Their distinct captions, that of `keep` first; several differ.
    """

    keep: str
    others: tuple[str, ...]
    captions: tuple[str, ...]

    def describe(self) -> str:
        """Returns `keep a.png, which has a caption, of a.png, b.png`, and captions that differ."""
        why = ", which has a caption" if self.captions else ""
        differ = f"; their captions differ: {' and '.join(map(repr, self.captions))}" if self.captions[1:] else ""
        return f"keep {self.keep}{why}, and remove {', '.join(self.others)}{differ}"


def choose_of_duplicates(entries: Sequence[ImageEntry], groups: Sequence[Sequence[int]]) -> tuple[Duplicates, ...]:
    """Returns which image of each group to keep.

    Args:
        entries: The images.
        groups: Groups of images that show nearly the same, as positions.
    """
    chosen = []
    for group in groups:
        images = [entries[index] for index in group]
        keep = max(images, key=lambda entry: (bool(entry.caption), entry.width * entry.height))
        captions = dict.fromkeys(entry.caption for entry in (keep, *images) if entry.caption)
        others = tuple(entry.source for entry in images if entry is not keep)
        chosen.append(Duplicates(keep.source, others, tuple(captions)))
    return tuple(chosen)


def describe_duplicates(duplicates: Sequence[Duplicates]) -> Iterator[str]:
    """Yields what to do about images that show nearly the same."""
    if not duplicates:
        return
    count = sum(len(group.others) for group in duplicates)
    yield f"{count} images show nearly the same as another: they count more than the others"
    # What costs most comes first: captions that contradict each other.
    by_captions = sorted(duplicates, key=lambda group: -len(group.captions))
    yield from (group.describe() for group in by_captions[:_SHOWN])
    if len(duplicates) > _SHOWN:
        yield f"{len(duplicates) - _SHOWN} more groups of images show nearly the same"


def describe_flaws(flaws: Mapping[str, Sequence[str]]) -> Iterator[str]:
    """Yields number, first name and remedy of each flaw, the most frequent first.

    Args:
        flaws: Image -> its flaws.
    """
    images: dict[str, list[str]] = {}
    for name, listed in flaws.items():
        for flaw in listed:
            images.setdefault(flaw, []).append(name)
    for flaw, names in sorted(images.items(), key=lambda item: -len(item[1])):
        yield f"{len(names)} images: {flaw}, first {names[0]}; {FIXES.get(flaw, _TO_ENLARGE)}"
