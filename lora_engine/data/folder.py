"""What lies in a person's folder: which files could be pictures, and their captions. No decoding here."""

from __future__ import annotations

import fnmatch
import os
import re
import unicodedata
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Literal

from lora_engine.data.images import open_regular
from lora_engine.data.manifest import MAX_CAPTION, MAX_REPEATS
from lora_engine.errors import DataError

# Files that people keep beside pictures. Anything else could be a picture under another name and is looked at.
COMPANIONS = frozenset({".txt", ".caption", ".csv", ".json", ".jsonl", ".yaml", ".yml", ".toml", ".md"})
# `star.mask.png`, or `masks/star.png`, is the mask of `star.jpg`.
MASK, MASKS = ".mask", "masks"
Owner = tuple[Path, str]
_REPEATS = re.compile(r"([0-9]{1,9})_")
_MAX_TEXT = 64 * 1024
# These turn the reading direction of what follows, so a caption could show other words than it holds.
_DIRECTION = frozenset("\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069\u200e\u200f")


def require_folder(images: Path) -> None:
    """Raises `DataError` where the folder of pictures is not there."""
    if images.is_dir():
        return
    problem = "is a file, not a folder of pictures" if images.is_file() else "there is no such folder of pictures"
    raise DataError(
        problem,
        where=str(images),
        remedy=f"give the folder that holds the pictures; a relative path starts at {str(Path.cwd())!r}",
    )


def candidates(root: Path) -> Iterator[Path]:
    """The files, and links to folders, that are used as a picture or reported; in the order of their names.

    Subfolders are walked, links to folders are not; hidden files and `COMPANIONS` are passed over.
    """
    found: list[Path] = []
    for folder, folders, files in os.walk(root, onerror=_raise_unreadable):
        here = Path(folder)
        linked = [name for name in folders if (here / name).is_symlink()]
        folders[:] = sorted(name for name in folders if name not in linked and not name.startswith("."))
        found += [
            here / name
            for name in files + linked
            if not name.startswith(".") and Path(name).suffix.lower() not in COMPANIONS and name != "Thumbs.db"
        ]
    yield from sorted(found, key=lambda path: os.fsencode(path.relative_to(root)))


def owner_of_mask(path: Path, root: Path) -> Owner | None:
    """Whose mask a file is by its name, as (folder, name without ending); None where it is no mask.

    A mask is called `name.mask.png`, or lies in a folder `masks` beside the pictures.
    """
    below = path.parent != root and path.parent.name == MASKS
    if not below and not path.stem.lower().endswith(MASK):
        return None
    stem = path.stem[: -len(MASK)] if path.stem.lower().endswith(MASK) else path.stem
    return path.parent.parent if below else path.parent, stem


def repeats_of(name: str, repeats: Literal["folders"] | Mapping[str, int]) -> int:
    """How often a picture of that name, relative to the folder, comes up; see `IngestSettings`.

    Raises:
        DataError: A folder's number is 0 or too large.
    """
    if repeats != "folders":
        fitting = [count for pattern, count in repeats.items() if fnmatch.fnmatchcase(name, pattern)]
        return fitting[-1] if fitting else 1
    for folder in reversed(PurePosixPath(name).parts[:-1]):
        if (match := _REPEATS.match(folder)) is not None:
            count = int(match[1])
            if not 1 <= count <= MAX_REPEATS:
                raise DataError(
                    f"the folder {printable(folder)!r} asks for {count} repeats", allowed=f"1-{MAX_REPEATS}"
                )
            return count
    return 1


def printable(name: str) -> str:
    """The name with everything that a terminal or a page could act on written as an escape."""
    safe = (
        character
        if character.isprintable() and character not in _DIRECTION
        else character.encode("unicode_escape", "surrogatepass").decode()
        for character in name
    )
    return "".join(safe)


def read_caption(picture: Path, root: Path) -> str:
    """The text of the `.txt` beside a picture as one line; empty where there is none.

    Raises:
        DataError: The file is there and cannot be used: not UTF-8, too long, a link out of the folder.
    """
    path = picture.with_suffix(".txt")
    if not os.path.lexists(path):
        return ""
    with open_regular(path, root) as file:
        content = file.read(_MAX_TEXT + 1)
    try:
        text = clean_text(content[:_MAX_TEXT].decode("utf-8-sig"))
    except UnicodeDecodeError:
        raise DataError("the caption is not UTF-8 text", where=printable(path.name)) from None
    if len(text) > MAX_CAPTION or len(content) > _MAX_TEXT:
        raise DataError("the caption is too long", where=printable(path.name), allowed=f"{MAX_CAPTION} characters")
    return text


def clean_text(text: str) -> str:
    """The text as one line: white space joined, control and direction characters removed, Unicode composed (NFC)."""
    spaced = (" " if character.isspace() else character for character in unicodedata.normalize("NFC", text))
    kept = (c for c in spaced if unicodedata.category(c) not in {"Cc", "Cs"} and c not in _DIRECTION)
    return " ".join("".join(kept).split())


def _raise_unreadable(error: OSError) -> None:
    raise DataError(f"cannot be read ({error.strerror})", where=str(error.filename)) from None
