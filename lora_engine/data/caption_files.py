"""Finds the caption of every image of a folder: in a file beside it, in a metadata file, or in its folder's name."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import PurePosixPath
from typing import Literal

from lora_engine.data.archives import is_table
from lora_engine.data.folder import Tree
from lora_engine.data.manifest import MAX_ALTERNATIVES, MAX_CAPTION
from lora_engine.data.metadata import ImageNames, Row, captions_of, is_metadata, read_metadata
from lora_engine.data.subsets import Subset
from lora_engine.data.text_files import clean_text, printable, read_text
from lora_engine.documents.json_source import parse_json
from lora_engine.errors import DataError

TEXT, FOLDER = ".txt", "folder name"
_MAX_SIDECAR = 64 * 1024
_TEXTS = (TEXT, ".caption")
_ENDINGS = (*_TEXTS, ".json")
SeveralCaptions = Literal["auto", "first", "draw"]


@dataclass(frozen=True)
class FoundCaption:
    """The caption of an image.

    Attributes:
        text: One line.
        origin: `.txt`, `.caption` or `.json` for a file beside the image, the name of a metadata file, the ending of a
            table with images, `folder name`, or what a dataset file takes captions from.
        alternatives: Further captions, one line each.
    """

    text: str
    origin: str
    alternatives: tuple[str, ...] = ()

    @classmethod
    def of(cls, texts: Iterable[str], origin: str) -> FoundCaption:
        """Returns the first text as the caption, and the others as alternatives; empty and equal ones are left out.

        Raises:
            DataError: One is too long, or there are too many.
        """
        lines = [*dict.fromkeys(filter(None, map(_bounded, texts)))]
        if len(lines) > MAX_ALTERNATIVES:
            raise DataError(f"has {len(lines)} captions", allowed=f"{MAX_ALTERNATIVES}")
        return cls(lines[0] if lines else "", origin, tuple(lines[1:]))


def stated_origin(caption: FoundCaption) -> str | None:
    """Returns the origin as manifests state it: None for a `.txt` file."""
    return caption.origin if caption.origin != TEXT else None


class CaptionFiles:
    """The captions of a folder of images.

    A file beside the image comes first (`a.txt`, `a.caption`, `a.png.txt`, `a.png.caption`, `a.json`, `a.png.json`; in
    any case), then metadata files, the nearest first, then the words of its folder.

    Args:
        tree: All files.
        names: The images.
        companions: All text files.
        subsets: Folder -> kohya's number and words.
        rows: Name of a table that was read -> its rows.
        several: Returns what several captions of an image are; see `IngestSettings`.

    Attributes:
        faults: File -> why it cannot be used.
        differing: Images whose files state different captions -> origins of the one that is used and of another.
        unknown: Names in metadata files that mean no image, with the file.
        doubled: Images that a metadata file states more than once, with different captions.
        shortened: Number of text files with several lines of which the first is used.
        joined: Text files with several lines that are one caption.

    Raises:
        DataError: A metadata file is invalid.
    """

    def __init__(
        self,
        tree: Tree,
        names: Collection[str],
        companions: Collection[str],
        subsets: Mapping[str, Subset],
        rows: Mapping[str, Sequence[Row]],
        several: Callable[[str], SeveralCaptions],
    ) -> None:
        self.faults: dict[str, str] = {}
        self.differing: dict[str, tuple[str, str]] = {}
        self.unknown: list[str] = []
        self.doubled: list[str] = []
        self.shortened = 0
        self.joined: list[str] = []
        self._tree, self._subsets, self._several = tree, subsets, several
        metadata = [name for name in companions if is_metadata(name) and not is_table(name)]
        self._sidecars = _index({*companions} - {*metadata})
        self._owned = {name for image in names for name in self._sidecars_of(image)}
        self._unowned = sorted({name for names in self._sidecars.values() for name in names} - self._owned)
        self._stated: dict[str, list[FoundCaption]] = defaultdict(list)
        finder = ImageNames(names)
        for name in sorted({*metadata, *rows}, key=lambda name: (-name.count("/"), name)):
            # What is several in a file is the same for all of its images.
            mode = several(name)
            read = rows[name] if name in rows else read_metadata(*tree.locate(name), several=mode != "auto")
            self._add(name, read, finder, mode)

    @property
    def unowned(self) -> list[str]:
        """The files named like captions that belong to no image."""
        return [name for name in self._unowned if not name.lower().endswith(".json")]

    def find(self, name: str) -> FoundCaption | None:
        """Returns the caption of an image; None if there is none. Adds unusable files to `faults`."""
        found = [caption for caption in self._sources(name) if caption.text]
        for other in found[1:]:
            # The words of a folder are meant for images without another caption.
            if other.text != found[0].text and other.origin != FOLDER:
                self.differing.setdefault(name, (found[0].origin, other.origin))
        return found[0] if found else None

    def _sources(self, name: str) -> Iterator[FoundCaption]:
        for sidecar in self._sidecars_of(name):
            try:
                texts = self._read_sidecar(sidecar, self._several(name))
                yield FoundCaption.of(texts, PurePosixPath(sidecar).suffix.lower())
            except DataError as error:
                self.faults[sidecar] = error.reason
        yield from self._stated.get(name, ())
        if (subset := self._subsets.get(PurePosixPath(name).parent.as_posix())) is not None and subset.words:
            yield FoundCaption(subset.words, FOLDER)

    def _sidecars_of(self, name: str) -> list[str]:
        path = PurePosixPath(name)
        found: list[str] = []
        for stem, ending in product((path.stem, path.name), _TEXTS):
            found += self._spellings(path.with_name(stem + ending).as_posix())
        for stem in (path.stem, path.name):
            found += self._spellings(path.with_name(f"{stem}.json").as_posix())
        return found

    def _spellings(self, name: str) -> list[str]:
        files = self._sidecars.get(name.lower(), ())
        # Of `A.txt` and `a.txt`, only the one in the image's own spelling can be meant.
        return [name] if name in files else [*files] if len(files) == 1 else []

    def _read_sidecar(self, name: str, several: SeveralCaptions) -> Sequence[str]:
        text = read_text(*self._tree.locate(name), _MAX_SIDECAR)
        if name.lower().endswith(".json"):
            data = parse_json(text, printable(name), DataError)
            texts: Sequence[str] = ()
            if isinstance(data, dict):
                texts = captions_of(data, printable(name), several=several != "auto")
            return texts if several == "draw" else texts[:1]
        lines = [line for line in text.splitlines() if clean_text(line)]
        if several == "draw" or len(lines) < 2:
            return lines
        if several == "first":
            self.shortened += 1
            return lines[:1]
        self.joined += [name] if name not in self.joined else []
        return [text]

    def _add(self, file: str, rows: Iterable[Row], finder: ImageNames, several: SeveralCaptions) -> None:
        path = PurePosixPath(file)
        # A table that has images is their folder, too.
        places = (path, path.parent) if is_table(file) else (path.parent,)
        origin = path.suffix.lower() if is_table(file) and not is_metadata(file) else path.name
        listed: dict[str, tuple[str, list[str]]] = {}
        for stated, texts in rows:
            name = next(filter(None, (finder.find(stated, place) for place in places)), None)
            if name is None:
                self.unknown.append(f"{printable(stated)} in {printable(file)}")
            elif texts and several == "draw":
                # Several rows of one image are its captions, as in the tables of COCO and Flickr.
                listed.setdefault(name, (stated, []))[1].extend(texts)
            elif texts:
                if listed.setdefault(name, (stated, [*texts[:1]]))[1] != [*texts[:1]]:
                    self.doubled.append(f"{printable(stated)} in {printable(file)}")
                self._state(name, texts[:1], origin, f"{file}, entry {stated}")
        if several == "draw":
            for name, (stated, captions) in listed.items():
                self._state(name, captions, origin, f"{file}, entry {stated}")

    def _state(self, name: str, texts: Iterable[str], origin: str, entry: str) -> None:
        try:
            self._stated[name].append(FoundCaption.of(texts, origin))
        except DataError as error:
            self.faults[entry] = error.reason


def _bounded(text: str) -> str:
    line = clean_text(text)
    if len(line) > MAX_CAPTION:
        raise DataError(f"has {len(line):,} characters", allowed=f"{MAX_CAPTION:,} characters")
    return line


def _index(names: Collection[str]) -> dict[str, list[str]]:
    index: dict[str, list[str]] = defaultdict(list)
    for name in sorted(names):
        if name.lower().endswith(_ENDINGS):
            index[name.lower()].append(name)
    return index
