"""Reads files that hold the captions of many images: Hugging Face's `metadata`, kohya's `meta_cap.json`, tables."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from fnmatch import fnmatchcase
from pathlib import Path, PurePosixPath
from typing import Any

from lora_engine.data.text_files import printable, read_text
from lora_engine.documents.csv_source import read_table
from lora_engine.documents.json_source import parse_json
from lora_engine.errors import DataError

_MAX_BYTES = 256 << 20
FILE_COLUMNS = ("file_name", "image_path", "image_file", "file_path", "filename", "image", "file", "path")
CAPTION_COLUMNS = ("caption", "text", "prompt", "description")
_FURTHER = ("captions", "caption_short")
"""Keys of JSON objects with further captions; the second is ai-toolkit's."""
_SPELLINGS = {
    **dict.fromkeys(FILE_COLUMNS, "file_name"),
    **dict.fromkeys((*CAPTION_COLUMNS, "captions"), "caption"),
}
Row = tuple[str, tuple[str, ...]]
"""The name of an image as the file states it, and its captions: the first, and further ones of a list."""


def is_metadata(name: str) -> bool:
    """Returns True if the file of this name has captions of many images; `unpacking` reads `metadata.parquet`."""
    name = PurePosixPath(name).name
    return _reader(name) is not None or name.lower() == "metadata.parquet"


def read_metadata(path: Path, root: Path, *, several: bool = False) -> list[Row]:
    """Returns the images that a file names, in its order, with their captions; entries without a caption are left out.

    Tags of kohya's files follow the caption, separated by a comma, as kohya's trainer joins them.

    Args:
        path: The file.
        root: Links that lead out of this folder are refused.
        several: See `captions_of`.

    Raises:
        DataError: It cannot be read, or does not have the structure of its kind; names line and column.
    """
    reader = _reader(path.name)
    if reader is None:
        raise DataError("is no file of captions", where=printable(path.name), allowed=", ".join(_READERS))
    rows = reader(read_text(path, root, _MAX_BYTES), path.name, several)
    return [(name, captions) for name, captions in rows if captions]


class ImageNames:
    """Finds the image that a metadata file means.

    Args:
        names: All images, relative to the folder that has them all.
    """

    def __init__(self, names: Iterable[str]) -> None:
        self._names: dict[str, str] = {}
        self._tails: dict[str, str | None] = {}
        for name in names:
            for spelled in {name, _without_ending(name)}:
                self._names.setdefault(spelled, name)
                tail = PurePosixPath(spelled).name
                self._tails[tail] = None if self._tails.get(tail, name) != name else name

    def find(self, stated: str, folder: PurePosixPath) -> str | None:
        """Returns the image of a stated name; None if there is none, or several.

        A name is relative to the metadata file, with or without ending. The path of another machine is found by its
        last part.

        Args:
            stated: The name in the file.
            folder: The file's folder, relative to the folder that has all images.
        """
        path = PurePosixPath(stated.replace("\\", "/"))
        is_foreign = path.is_absolute() or ":" in path.parts[0] if path.parts else False
        if not is_foreign:
            for start in (folder, PurePosixPath()):
                if (found := self._names.get((start / path).as_posix())) is not None:
                    return found
        return self._tails.get(path.name) if is_foreign else None


def _without_ending(name: str) -> str:
    return PurePosixPath(name).with_suffix("").as_posix()


def _read_table(text: str, name: str, _: bool) -> Iterator[Row]:
    rows = read_table(text.encode(), name, ("file_name", "caption"), DataError, spellings=_SPELLINGS)
    for column in ("file_name", "caption"):
        if rows and column not in rows[0].cells:
            columns = FILE_COLUMNS if column == "file_name" else CAPTION_COLUMNS
            raise DataError(f"has no column of the {_NOUNS[column]}", where=printable(name), allowed=", ".join(columns))
    for row in rows:
        yield row.cells["file_name"], tuple(filter(None, [row.cells["caption"]]))


_NOUNS = {"file_name": "images' names", "caption": "captions"}


def _read_lines(text: str, name: str, several: bool) -> Iterator[Row]:
    for number, line in enumerate(text.splitlines(), start=1):
        if not line.strip():
            continue
        where = f"{printable(name)}:{number}"
        entry = _object(parse_json(line, where, DataError), where)
        stated = next((entry[column] for column in FILE_COLUMNS if column in entry), None)
        if not isinstance(stated, str):
            raise DataError("names no image", where=where, allowed=", ".join(FILE_COLUMNS))
        yield stated, captions_of(entry, where, several=several)


def _read_object(text: str, name: str, several: bool) -> Iterator[Row]:
    entries = _object(parse_json(text, printable(name), DataError), printable(name))
    for stated, entry in entries.items():
        where = f"{printable(name)}, entry {printable(stated)!r}"
        if isinstance(entry, str):
            yield stated, tuple(filter(None, [entry]))
        else:
            yield stated, captions_of(_object(entry, where), where, several=several)


def captions_of(entry: Mapping[str, Any], where: str, *, several: bool) -> tuple[str, ...]:
    """Returns the captions of a JSON object, each followed by its tags; nothing if it has neither.

    Args:
        entry: The object.
        where: Its place, for errors.
        several: True takes all captions of a list and of all keys; False takes the first key, which must have text.

    Raises:
        DataError: Caption or tags are not text.
    """
    stated = [entry[column] for column in (*CAPTION_COLUMNS, *_FURTHER) if entry.get(column)]
    if several:
        captions = [text for value in stated for text in (value if isinstance(value, list) else [value]) if text]
    else:
        captions = [entry[column] for column in CAPTION_COLUMNS if entry.get(column)][:1]
    tags = entry.get("tags") or entry.get("tag_string") or ""
    if isinstance(tags, list) and all(isinstance(tag, str) for tag in tags):
        tags = ", ".join(tags)
    for value in (*captions, tags):
        if not isinstance(value, str):
            allowed = "text" if several else "text, or a list with several_captions: first or draw"
            raise DataError(f"the caption is {type(value).__name__}", where=where, allowed=allowed)
    return tuple(", ".join(filter(None, (caption, tags))) for caption in captions or [""] if caption or tags)


def _object(entry: Any, where: str) -> dict[str, Any]:
    if not isinstance(entry, dict):
        raise DataError(f"is {type(entry).__name__}", where=where, allowed="a JSON object")
    return entry


_READERS: dict[str, Callable[[str, str, bool], Iterator[Row]]] = {
    "metadata.jsonl": _read_lines,
    "captions.jsonl": _read_lines,
    "meta_*.jsonl": _read_lines,
    "metadata.csv": _read_table,
    "caption.csv": _read_table,
    "captions.csv": _read_table,
    "meta_*.json": _read_object,
}
"""Pattern of lower-case file names -> reader; from Hugging Face's imagefolder, Replicate and kohya's scripts."""


def _reader(name: str) -> Callable[[str, str, bool], Iterator[Row]] | None:
    return next((reader for pattern, reader in _READERS.items() if fnmatchcase(name.lower(), pattern)), None)
