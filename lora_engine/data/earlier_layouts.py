"""Tells by the names of files if earlier releases read a folder as this one does; their results are used then."""

from __future__ import annotations

from collections.abc import Collection
from functools import lru_cache
from pathlib import PurePosixPath

from lora_engine.data.archives import is_archive, is_table
from lora_engine.data.caption_files import TEXT
from lora_engine.data.folder import COMPANIONS, HEIC_ENDINGS, MASK_ENDINGS
from lora_engine.data.metadata import is_metadata
from lora_engine.data.splits import find_splits
from lora_engine.data.subsets import find_subsets
from lora_engine.data.trainer_files import find_dataset_file


def is_plain(names: Collection[str]) -> bool:
    """Returns True if releases before 0.4 used the same images and captions of a folder with files of these names.

    They read `a.txt` beside `a.png`, in PNG, JPEG and WebP, and no meaning of folder names.
    """
    return _is_plain(frozenset(names))


# Plans ask once per step, and the pipelines of a matrix share their folders.
@lru_cache(maxsize=64)
def _is_plain(names: frozenset[str]) -> bool:
    paths = [PurePosixPath(name) for name in names]
    kinds = {path.suffix for path in paths}
    images = {str(path) for path in paths if path.suffix.lower() not in COMPANIONS}
    return _is_without_archives(names) and not (
        kinds & {".caption", ".json"}
        or {kind.lower() for kind in kinds} & {".avif", ".bmp", ".tif", ".tiff", ".gif"}
        or any(kind != TEXT and kind.lower() == TEXT for kind in kinds)
        or any(path.suffix == TEXT and PurePosixPath(path.stem).suffix for path in paths)
        or any(is_metadata(path.name) for path in paths)
        or any(path.stem.lower().endswith(MASK_ENDINGS[1:]) for path in paths)
        or find_subsets(images)
    )


def is_without_archives(names: Collection[str]) -> bool:
    """Returns True if release 0.4 read a folder with files of these names as this release does.

    It knew no archives, tables, HEIC, dataset files of other trainers, splits and folders `mask`, and took `a.png.txt`
    before `a.caption`.
    """
    return _is_without_archives(frozenset(names))


@lru_cache(maxsize=64)
def _is_without_archives(names: frozenset[str]) -> bool:
    paths = [PurePosixPath(name) for name in names]
    captions = {(path.parent, path.stem) for path in paths if path.suffix.lower() == ".caption"}
    doubled = ((path.parent, PurePosixPath(path.stem).stem) for path in paths if path.suffix.lower() == TEXT)
    return not (
        any(is_archive(name) or is_table(name) or name.lower().endswith((".cls", *HEIC_ENDINGS)) for name in names)
        or any("__MACOSX" in path.parts for path in paths)
        or find_dataset_file("auto", names)
        or find_splits([str(path) for path in paths if path.suffix.lower() not in COMPANIONS])
        or captions & {*doubled}
        or any(path.parent.name == "mask" for path in paths)
        or "." in names  # the digest of an archive that is given instead of a folder
    )
