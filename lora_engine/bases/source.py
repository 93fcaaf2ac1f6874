"""Resolves the name of a base model to a folder, a family and a fingerprint. Torch-free; loads no weights."""

from __future__ import annotations

import functools
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from lora_engine.errors import BaseModelError, did_you_mean
from lora_engine.families.layout import Layout, read_layout
from lora_engine.files import (
    FilePath,
    canonical_json,
    expand_home,
    is_present,
    is_present_file,
    is_present_folder,
    sha256_bytes,
    sha256_file,
)

TINY = "tiny"
_HUB_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}/[A-Za-z0-9][A-Za-z0-9._-]{0,95}")
_ALLOWED = "`tiny`, a diffusers folder, a checkpoint file, or a hub id (`owner/name` or `owner/name@revision`)"


@dataclass(frozen=True)
class BaseSource:
    """A complete base model on this machine.

    Attributes:
        name: The name that the user gave, without the revision.
        folder: The diffusers folder.
        revision: The commit of a base from the hub; None for others.
        family: The family of its adapters; a name among `families`.
        loader: Dotted name of its `BaseModel`; see `families.Pipeline`.
        file: Name of the single file that was converted to the folder; empty for others.
    """

    name: str
    folder: Path
    revision: str | None
    family: str
    loader: str
    file: str = ""

    @property
    def module(self) -> str:
        """The module of `loader`; importing it imports all classes of the base."""
        return self.loader.partition(":")[0]

    @property
    def label(self) -> str:
        """The name for cards and reports: without paths, the same on every machine."""
        if self.name == TINY:
            return TINY
        if self.revision:
            return f"{self.name}@{self.revision}"
        return self.file or self.folder.name

    @property
    def layout(self) -> Layout:
        """The files of the base."""
        return read_layout(self.folder)

    @property
    def size(self) -> int:
        """Total size of its files in bytes."""
        return sum((self.folder / name).stat().st_size for name in self.layout.files)

    def fingerprint(self) -> str:
        """Returns the SHA-256 over the relative names and digests of its files: weights and configuration."""
        return digest_files(self.folder, self.layout.files)


def resolve_base(name: FilePath, revision: str | None = None) -> BaseSource:
    """Finds a base model; downloads it if necessary.

    Args:
        name: `tiny`, the path of a diffusers folder or of a single checkpoint file (converted once, see
            `single_file`), or a hub id, optionally with `@revision`.
        revision: Branch, tag or commit of a hub id.

    Raises:
        BaseModelError: No such base, an unknown family, or a part of the base is missing.
    """
    name = os.fspath(name)
    if name == TINY:
        # Imported here: other bases do not need the package of the embedded base.
        from lora_engine.bases.tiny import folder as tiny_folder

        return _from_folder(TINY, tiny_folder(), revision)
    path = expand_home(name)
    if is_present_folder(path):
        return _from_folder(name, path.resolve(), revision)
    if is_present_file(path):
        return _from_file(path.resolve(), revision)
    hub_id = split_hub_id(name)
    if hub_id is None:
        raise BaseModelError(
            f"unknown base {name!r}: neither a folder or file nor a hub id",
            allowed=_ALLOWED,
            remedy=did_you_mean(name, [TINY], "check the path"),
        )
    repository, pinned = hub_id
    if pinned and revision and pinned != revision:
        raise BaseModelError(f"the base {name!r} and the revision {revision!r} differ", remedy="name one revision")
    from lora_engine.bases.hub import fetch_from_hub

    folder, commit = fetch_from_hub(repository, revision or pinned)
    return _source(repository, folder, commit)


def split_hub_id(name: FilePath) -> tuple[str, str | None] | None:
    """Returns repository and revision of a hub id; None if the name is the embedded base, a path or neither."""
    name = os.fspath(name)
    repository, _, revision = name.partition("@")
    is_path = name == TINY or is_present(expand_home(name))
    return None if is_path or not _HUB_ID.fullmatch(repository) else (repository, revision or None)


def _from_folder(name: str, folder: Path, revision: str | None) -> BaseSource:
    if revision is not None:
        raise BaseModelError(f"{name!r} is a folder and has no revision {revision!r}", remedy="remove the revision")
    return _source(name, folder, None)


def _from_file(file: Path, revision: str | None) -> BaseSource:
    if revision is not None:
        raise BaseModelError(f"{file.name!r} is a file and has no revision {revision!r}", remedy="remove the revision")
    from lora_engine.bases.single_file import check_file, folder_of_file

    check_file(file)  # before all bytes are read for the digest
    folder = folder_of_file(file, digest_of_file(file))
    return _source(str(file), folder, None, file.name)


def _source(name: str, folder: Path, revision: str | None, file: str = "") -> BaseSource:
    layout = read_layout(folder)
    return BaseSource(name, folder, revision, layout.family.name, layout.pipeline.loader, file)


def digest_files(folder: Path, names: Iterable[str]) -> str:
    """Returns the SHA-256 over the names and digests of the files of a model."""
    return sha256_bytes(canonical_json({name: digest_of_file(folder / name) for name in names}))


def digest_of_file(path: Path) -> str:
    """Returns the SHA-256 of a file; reads it once per process unless it changes."""
    status = path.stat()
    return _digest_of_state(path, status.st_size, status.st_mtime_ns, status.st_ino)


@functools.lru_cache(maxsize=4096)
def _digest_of_state(path: Path, size: int, changed: int, inode: int) -> str:
    # Hashes gigabytes of weights once per process, unless the file changes.
    del size, changed, inode
    return sha256_file(path)
