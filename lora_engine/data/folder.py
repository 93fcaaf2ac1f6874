"""Lists the files of the user's folder by what they are (images, masks, text), and opens them safely."""

from __future__ import annotations

import os
import stat
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path, PurePosixPath

from lora_engine.data.archives import ARCHIVES, TABLES, is_archive, is_table
from lora_engine.errors import DataError

# Files that users keep beside images. Any other file may be an image with an unusual name and is opened.
COMPANIONS = frozenset(
    {".txt", ".caption", ".csv", ".json", ".jsonl", ".yaml", ".yml", ".toml", ".md", ".parquet", ".arrow", ".cls"}
)
# `star.mask.png`, OneTrainer's `star-masklabel.png`, `star_mask.png`, `masks/star.png` and `mask/star.png` are masks of
# `star.jpg`.
MASK_ENDINGS, MASK_FOLDERS = (".mask", "-masklabel", "_mask"), ("masks", "mask")
MASKS_APART = "(masks)"
"""Folder in the names of masks from a folder of their own."""
HEIC_ENDINGS = (".heic", ".heif", ".hif")
_HIDDEN = frozenset({"Thumbs.db", "__MACOSX"})
Owner = tuple[str, str]


class Tree:
    """Names of files -> files: a folder of the user, and what was unpacked of its archives.

    Args:
        root: The folder.
        unpacked: Name of an archive -> the folder of its content. The content of `a.tar` has names such as
            `a.tar/0.png`; that of the archive with the name `` has names without a folder.
    """

    def __init__(self, root: Path, unpacked: Mapping[str, Path] | None = None) -> None:
        self._roots = {"": root, **(unpacked or {})}

    def mount_masks(self, folder: Path) -> None:
        """Adds a folder of masks, which may be inside the tree, under the name `MASKS_APART`."""
        self._roots[MASKS_APART] = folder

    def locate(self, name: str) -> tuple[Path, Path]:
        """Returns the file of a name, and the folder that its links must not leave."""
        archive = self.archive_of(name)
        root = self._roots[archive]
        return root / (name.removeprefix(f"{archive}/") if archive else name), root

    def archive_of(self, name: str) -> str:
        """Returns the name of the archive of a file; empty for a file of the folder."""
        return next((p.as_posix() for p in PurePosixPath(name).parents if p.as_posix() in self._roots), "")

    def walk(self) -> Iterator[tuple[str, bool]]:
        """Yields the names of all files but archives, and whether each is a link to a folder, in no order.

        Raises:
            DataError: A folder cannot be read.
        """
        masks = self._roots[MASKS_APART].resolve() if MASKS_APART in self._roots else None
        for folder, root in self._roots.items():
            for path in _walk(root):
                if masks is not None and folder != MASKS_APART and path.parent.resolve().is_relative_to(masks):
                    continue
                name = path.relative_to(root).as_posix()
                full = f"{folder}/{name}" if folder else name
                if full not in self._roots:
                    yield full, path.is_dir() and path.is_symlink()


def require_images(images: Path) -> None:
    """Raises `DataError` if there is no such folder or archive of images."""
    if images.is_dir() or (images.is_file() and (is_archive(images.name) or is_table(images.name))):
        return
    problem = "is a file, not a folder of images" if images.is_file() else "there is no such folder of images"
    raise DataError(
        problem,
        where=str(images),
        allowed=f"a folder, or a file that ends in {', '.join((*ARCHIVES, *TABLES))}",
        remedy=f"name the folder of the images; a relative path starts at {str(Path.cwd())!r}",
    )


@dataclass(frozen=True)
class Listing:
    """The files of a tree by their names; links to folders are among the images, and hidden files are left out.

    Attributes:
        images: Possible images, sorted by name.
        masks: Image as (folder, name without suffix) -> its masks.
        companions: Text files and tables.
    """

    images: tuple[str, ...]
    masks: Mapping[Owner, Sequence[str]]
    companions: tuple[str, ...]


def list_tree(tree: Tree) -> Listing:
    """Lists a tree with its subfolders; does not follow links to folders.

    Raises:
        DataError: A folder cannot be read.
    """
    images: list[str] = []
    masks: dict[Owner, list[str]] = {}
    companions: list[str] = []
    files = sorted(tree.walk(), key=lambda file: os.fsencode(file[0]))
    stems = {owner_of(name) for name, _ in files}
    for name, is_linked_folder in files:
        if name.startswith(f"{MASKS_APART}/"):
            masks.setdefault(_owner_apart(name), []).append(name)
        elif PurePosixPath(name).suffix.lower() in COMPANIONS and not is_linked_folder:
            companions.append(name)
        elif (owner := _owner_of_mask(PurePosixPath(name), stems)) is not None:
            masks.setdefault(owner, []).append(name)
        else:
            images.append(name)
    return Listing(tuple(images), masks, tuple(companions))


def owner_of(name: str) -> Owner:
    """Returns folder and name without suffix of an image, as in `Listing.masks`."""
    path = PurePosixPath(name)
    return path.parent.as_posix(), path.stem


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


def _walk(root: Path) -> Iterator[Path]:
    for folder, folders, files in os.walk(root, onerror=_raise_unreadable):
        parent = Path(folder)
        linked = [name for name in folders if (parent / name).is_symlink()]
        folders[:] = [name for name in folders if name not in linked and not is_hidden(name)]
        yield from (parent / name for name in files + linked if not is_hidden(name))


def is_hidden(name: str) -> bool:
    """Returns True if a file or folder of this name is left out."""
    return name.startswith(".") or name in _HIDDEN


def _owner_apart(name: str) -> Owner:
    folder, stem = owner_of(name.removeprefix(f"{MASKS_APART}/"))
    return folder, next((stem[: -len(end)] for end in MASK_ENDINGS if stem.lower().endswith(end)), stem)


def _owner_of_mask(path: PurePosixPath, stems: Collection[Owner]) -> Owner | None:
    below = path.parent.name in MASK_FOLDERS
    folder = (path.parent.parent if below else path.parent).as_posix()
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
