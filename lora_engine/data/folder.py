"""Lists the files of the user's folder by what they are (images, masks, text), and opens them safely."""

from __future__ import annotations

import os
import stat
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path

from lora_engine.errors import DataError

# Files that users keep beside images. Any other file may be an image with an unusual name and is opened.
COMPANIONS = frozenset({".txt", ".caption", ".csv", ".json", ".jsonl", ".yaml", ".yml", ".toml", ".md"})
# `star.mask.png`, OneTrainer's `star-masklabel.png`, `star_mask.png`, `masks/star.png` and `mask/star.png` are masks of
# `star.jpg`.
MASK_ENDINGS, MASK_FOLDERS = (".mask", "-masklabel", "_mask"), ("masks", "mask")
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


def list_folder(root: Path, masks_root: Path | None = None) -> Listing:
    """Lists a folder with its subfolders; does not follow links to folders.

    Args:
        root: The folder.
        masks_root: A folder of masks, with the names of their images and the same subfolders: kohya's
            `conditioning_data_dir`, ai-toolkit's `mask_path`. It may be inside the folder.

    Raises:
        DataError: A folder cannot be read.
    """
    images: list[Path] = []
    masks: dict[Owner, list[Path]] = {}
    companions: list[str] = []
    apart = _files_below(masks_root) if masks_root is not None else []
    for path in apart:
        stem = next((path.stem[: -len(end)] for end in MASK_ENDINGS if path.stem.lower().endswith(end)), path.stem)
        masks.setdefault((root / path.relative_to(masks_root or root).parent, stem), []).append(path)
    inside = {path.resolve() for path in apart}
    files = [path for path in _files_below(root) if not inside or path.resolve() not in inside]
    stems = {(path.parent, path.stem) for path in files}
    for path in files:
        if path.suffix.lower() in COMPANIONS and not (path.is_dir() and path.is_symlink()):
            companions.append(path.relative_to(root).as_posix())
        elif (owner := _owner_of_mask(path, root, stems)) is not None:
            masks.setdefault(owner, []).append(path)
        else:
            images.append(path)
    return Listing(tuple(images), masks, tuple(companions))


def open_inside(path: Path, root: Path) -> BufferedReader:
    """Opens a regular file inside the root for reading.

    Raises:
        DataError: It is a link out of the root, a pipe, a device or a folder, or it cannot be read.
    """
    try:
        real = path.resolve(strict=True)
        if not real.is_relative_to(root.resolve()):
            raise DataError("is a link that leads out of the folder", where=path.name, remedy="copy the file instead")
        # Do not block on a pipe, and do not follow a link that replaced the file since `resolve`.
        descriptor = os.open(real, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_NOFOLLOW", 0))
    except (OSError, RuntimeError) as error:
        raise DataError(f"cannot be read ({getattr(error, 'strerror', None) or error})", where=path.name) from None
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise DataError("is not a regular file", where=path.name, allowed="files, not pipes, devices or folders")
    return os.fdopen(descriptor, "rb")


def _files_below(root: Path) -> list[Path]:
    return sorted(_walk(root), key=lambda path: os.fsencode(path.relative_to(root)))


def _walk(root: Path) -> Iterator[Path]:
    for folder, folders, files in os.walk(root, onerror=_raise_unreadable):
        parent = Path(folder)
        linked = [name for name in folders if (parent / name).is_symlink()]
        folders[:] = [name for name in folders if name not in linked and not name.startswith(".")]
        yield from (parent / name for name in files + linked if not name.startswith(".") and name != "Thumbs.db")


def _owner_of_mask(path: Path, root: Path, stems: Collection[Owner]) -> Owner | None:
    below = path.parent != root and path.parent.name in MASK_FOLDERS
    folder = path.parent.parent if below else path.parent
    for ending in MASK_ENDINGS:
        if path.stem.lower().endswith(ending):
            owner = folder, path.stem[: -len(ending)]
            # An image of a mask may be called `red_mask.png`.
            if ending != "_mask" or owner in stems:
                return owner
    # Images of masks may be in a folder `mask`.
    is_sure = below and (path.parent.name != "mask" or (folder, path.stem) in stems)
    return (folder, path.stem) if is_sure else None


def _raise_unreadable(error: OSError) -> None:
    raise DataError(f"cannot be read ({error.strerror})", where=str(error.filename)) from None
