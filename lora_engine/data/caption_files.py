"""Finds the caption of every image of a folder: in a file beside it, in a metadata file, or in its folder's name."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from lora_engine.data.manifest import MAX_CAPTION
from lora_engine.data.metadata import ImageNames, caption_of, is_metadata, read_metadata
from lora_engine.data.subsets import Subset
from lora_engine.data.text_files import clean_text, printable, read_text
from lora_engine.documents.json_source import parse_json
from lora_engine.errors import DataError

TEXT, FOLDER = ".txt", "folder name"
_MAX_SIDECAR = 64 * 1024
_ENDINGS = (TEXT, ".caption", ".json")


@dataclass(frozen=True)
class FoundCaption:
    """The caption of an image.

    Attributes:
        text: One line.
        origin: `.txt`, `.caption` or `.json` for a file beside the image, the name of a metadata file, or
            `folder name`.
    """

    text: str
    origin: str


def stated_origin(caption: FoundCaption) -> str | None:
    """Returns the origin as manifests state it: None for a `.txt` file."""
    return caption.origin if caption.origin != TEXT else None


class CaptionFiles:
    """The captions of a folder of images.

    A file beside the image comes first (`a.txt`, `a.png.txt`, `a.caption`, `a.png.caption`, `a.json`, `a.png.json`; in
    any case), then metadata files, the nearest first, then the words of its folder.

    Args:
        root: The folder of all images.
        names: The images, relative to it.
        companions: All text files, relative to it.
        subsets: Folder -> kohya's number and words.

    Attributes:
        faults: File -> why it cannot be used.
        differing: Images whose files state different captions -> origins of the one that is used and of another.
        unknown: Names in metadata files that mean no image, with the file.

    Raises:
        DataError: A metadata file is invalid.
    """

    def __init__(
        self, root: Path, names: Collection[str], companions: Collection[str], subsets: Mapping[str, Subset]
    ) -> None:
        self.faults: dict[str, str] = {}
        self.differing: dict[str, tuple[str, str]] = {}
        self.unknown: list[str] = []
        self._root, self._subsets = root, subsets
        metadata = [name for name in companions if is_metadata(PurePosixPath(name).name)]
        self._sidecars = _index({*companions} - {*metadata})
        self._owned = {name for image in names for name in self._sidecars_of(image)}
        self._unowned = sorted({name for names in self._sidecars.values() for name in names} - self._owned)
        self._stated: dict[str, list[FoundCaption]] = defaultdict(list)
        finder = ImageNames(names)
        for name in sorted(metadata, key=lambda name: (-name.count("/"), name)):
            self._read_metadata(name, finder)

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
                yield FoundCaption(self._read_sidecar(sidecar), PurePosixPath(sidecar).suffix.lower())
            except DataError as error:
                self.faults[sidecar] = error.reason
        yield from self._stated.get(name, ())
        if (subset := self._subsets.get(PurePosixPath(name).parent.as_posix())) is not None and subset.words:
            yield FoundCaption(subset.words, FOLDER)

    def _sidecars_of(self, name: str) -> list[str]:
        path = PurePosixPath(name)
        found: list[str] = []
        for ending in _ENDINGS:
            for stem in (path.stem, path.name):
                spelled = path.with_name(stem + ending).as_posix()
                files = self._sidecars.get(spelled.lower(), ())
                # Of `A.txt` and `a.txt`, only the one in the image's own spelling can be meant.
                found += [spelled] if spelled in files else files[:1] if len(files) == 1 else []
        return found

    def _read_sidecar(self, name: str) -> str:
        text = read_text(self._root / name, self._root, _MAX_SIDECAR)
        if name.lower().endswith(".json"):
            data = parse_json(text, printable(name), DataError)
            text = caption_of(data, printable(name)) if isinstance(data, dict) else ""
        return _bounded(text)

    def _read_metadata(self, file: str, finder: ImageNames) -> None:
        path = PurePosixPath(file)
        for stated, text in read_metadata(self._root / file, self._root):
            name = finder.find(stated, path.parent)
            if name is None:
                self.unknown.append(f"{printable(stated)} in {printable(file)}")
                continue
            try:
                self._stated[name].append(FoundCaption(_bounded(text), path.name))
            except DataError as error:
                self.faults[f"{file}, entry {stated}"] = error.reason


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
