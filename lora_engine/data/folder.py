"""Lists the image files of the user's folder and reads their captions. Decodes no image."""

from __future__ import annotations

import fnmatch
import os
import re
import unicodedata
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Literal

from lora_engine.data.images import open_inside
from lora_engine.data.manifest import MAX_CAPTION, MAX_REPEATS
from lora_engine.errors import DataError

# Files that users keep beside images. Any other file may be an image with an unusual name and is opened.
COMPANIONS = frozenset({".txt", ".caption", ".csv", ".json", ".jsonl", ".yaml", ".yml", ".toml", ".md"})
# `star.mask.png`, or `masks/star.png`, is the mask of `star.jpg`.
MASK, MASKS = ".mask", "masks"
Owner = tuple[Path, str]
_REPEATS = re.compile(r"([0-9]{1,9})_")
_MAX_TEXT = 64 * 1024
# They change the reading direction, so a caption could display other text than it contains.
_DIRECTION = frozenset("\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069\u200e\u200f")


def require_folder(images: Path) -> None:
    """Raises `DataError` if the image folder does not exist."""
    if images.is_dir():
        return
    problem = "is a file, not a folder of images" if images.is_file() else "there is no such folder of images"
    raise DataError(
        problem,
        where=str(images),
        remedy=f"name the folder of the images; a relative path starts at {str(Path.cwd())!r}",
    )


def candidates(root: Path) -> Iterator[Path]:
    """Yields the possible image files and the links to folders, sorted by name.

    Walks subfolders, but not links to folders; skips hidden files and `COMPANIONS`.
    """
    paths: list[Path] = []
    for folder, folders, files in os.walk(root, onerror=_raise_unreadable):
        parent = Path(folder)
        linked = [name for name in folders if (parent / name).is_symlink()]
        folders[:] = sorted(name for name in folders if name not in linked and not name.startswith("."))
        paths += [
            parent / name
            for name in files + linked
            if not name.startswith(".") and Path(name).suffix.lower() not in COMPANIONS and name != "Thumbs.db"
        ]
    yield from sorted(paths, key=lambda path: os.fsencode(path.relative_to(root)))


def owner_of_mask(path: Path, root: Path) -> Owner | None:
    """Returns the image of a mask file as (folder, name without suffix); None if the file is not a mask.

    A mask is named `name.mask.png`, or is in a folder `masks` beside the images.
    """
    below = path.parent != root and path.parent.name == MASKS
    if not below and not path.stem.lower().endswith(MASK):
        return None
    stem = path.stem[: -len(MASK)] if path.stem.lower().endswith(MASK) else path.stem
    return path.parent.parent if below else path.parent, stem


def repeats_of(name: str, repeats: Literal["folders"] | Mapping[str, int]) -> int:
    """Returns the repeats of an image by its name relative to the folder; see `IngestSettings`.

    Raises:
        DataError: A folder's number is 0 or too large.
    """
    if repeats != "folders":
        matches = [count for pattern, count in repeats.items() if fnmatch.fnmatchcase(name, pattern)]
        return matches[-1] if matches else 1
    for folder in reversed(PurePosixPath(name).parts[:-1]):
        if (match := _REPEATS.match(folder)) is not None:
            count = int(match[1])
            if not 1 <= count <= MAX_REPEATS:
                raise DataError(f"the folder {printable(folder)!r} sets {count} repeats", allowed=f"1-{MAX_REPEATS}")
            return count
    return 1


def printable(name: str) -> str:
    """Returns the name with control and direction characters escaped, safe for terminals and pages."""
    safe = (
        character
        if character.isprintable() and character not in _DIRECTION
        else character.encode("unicode_escape", "surrogatepass").decode()
        for character in name
    )
    return "".join(safe)


def read_caption(image: Path, root: Path) -> str:
    """Returns the text of the `.txt` file beside an image as one line; empty if there is none.

    Raises:
        DataError: The file cannot be used: not UTF-8, too long, or a link out of the folder.
    """
    path = image.with_suffix(".txt")
    if not os.path.lexists(path):
        return ""
    with open_inside(path, root) as file:
        content = file.read(_MAX_TEXT + 1)
    try:
        text = clean_text(content[:_MAX_TEXT].decode("utf-8-sig"))
    except UnicodeDecodeError:
        raise DataError("the caption is not UTF-8 text", where=printable(path.name)) from None
    if len(text) > MAX_CAPTION or len(content) > _MAX_TEXT:
        raise DataError("the caption is too long", where=printable(path.name), allowed=f"{MAX_CAPTION} characters")
    return text


def clean_text(text: str) -> str:
    """Returns the text as one line: white space collapsed, control and direction characters removed, NFC."""
    spaced = (" " if character.isspace() else character for character in unicodedata.normalize("NFC", text))
    visible = (c for c in spaced if unicodedata.category(c) not in {"Cc", "Cs"} and c not in _DIRECTION)
    return " ".join("".join(visible).split())


def _raise_unreadable(error: OSError) -> None:
    raise DataError(f"cannot be read ({error.strerror})", where=str(error.filename)) from None
