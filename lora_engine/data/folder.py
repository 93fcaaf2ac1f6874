"""Lists the files of the user's folder by what they are: images, masks, text. Opens none of them."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from lora_engine.errors import DataError

# Files that users keep beside images. Any other file may be an image with an unusual name and is opened.
COMPANIONS = frozenset({".txt", ".caption", ".csv", ".json", ".jsonl", ".yaml", ".yml", ".toml", ".md"})
# `star.mask.png`, `masks/star.png`, OneTrainer's `star-masklabel.png` and `star_mask.png` are masks of `star.jpg`.
MASK_ENDINGS, MASKS = (".mask", "-masklabel", "_mask"), "masks"
Owner = tuple[Path, str]


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


@dataclass(frozen=True)
class Listing:
    """The files of a folder by their names; links to folders are among the images, and hidden files are left out.

    Attributes:
        images: Possible images, sorted by name.
        masks: Image as (folder, name without suffix) -> its masks.
        companions: Text files, relative to the folder.
    """

    images: tuple[Path, ...]
    masks: Mapping[Owner, Sequence[Path]]
    companions: tuple[str, ...]


def list_folder(root: Path) -> Listing:
    """Lists a folder with its subfolders; does not follow links to folders.

    Raises:
        DataError: A folder cannot be read.
    """
    images: list[Path] = []
    masks: dict[Owner, list[Path]] = {}
    companions: list[str] = []
    files = sorted(_walk(root), key=lambda path: os.fsencode(path.relative_to(root)))
    stems = {(path.parent, path.stem) for path in files}
    for path in files:
        if path.suffix.lower() in COMPANIONS and not (path.is_dir() and path.is_symlink()):
            companions.append(path.relative_to(root).as_posix())
        elif (owner := _owner_of_mask(path, root, stems)) is not None:
            masks.setdefault(owner, []).append(path)
        else:
            images.append(path)
    return Listing(tuple(images), masks, tuple(companions))


def _walk(root: Path) -> Iterator[Path]:
    for folder, folders, files in os.walk(root, onerror=_raise_unreadable):
        parent = Path(folder)
        linked = [name for name in folders if (parent / name).is_symlink()]
        folders[:] = [name for name in folders if name not in linked and not name.startswith(".")]
        yield from (parent / name for name in files + linked if not name.startswith(".") and name != "Thumbs.db")


def _owner_of_mask(path: Path, root: Path, stems: Collection[Owner]) -> Owner | None:
    below = path.parent != root and path.parent.name == MASKS
    folder = path.parent.parent if below else path.parent
    for ending in MASK_ENDINGS:
        if path.stem.lower().endswith(ending):
            owner = folder, path.stem[: -len(ending)]
            # An image of a mask may be called `red_mask.png`.
            if ending != "_mask" or owner in stems:
                return owner
    return (folder, path.stem) if below else None


def _raise_unreadable(error: OSError) -> None:
    raise DataError(f"cannot be read ({error.strerror})", where=str(error.filename)) from None
