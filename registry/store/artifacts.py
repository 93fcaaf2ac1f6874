"""The content-addressed store: an artifact is a tree of files, named by the digest of its canonical list.

Every read is verified. The same content is stored once. The store does not interpret artifacts.
"""

from __future__ import annotations

import hashlib
import io
import shutil
import tempfile
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import BinaryIO, NamedTuple

from lora_engine.files import FilePath, atomic_write, sha256_bytes
from registry.entities import ArtifactRef, FileEntry, Problem
from registry.errors import DamagedBlob, MissingBlob, StoreError, disk_errors
from registry.home import Home
from registry.store.blobs import Blobs, copy_hashed, damaged
from registry.store.local import LocalBlobs
from registry.store.remote import open_blobs
from registry.store.trees import check_relative, encode_tree, open_regular, parse_tree, scan_tree

Content = FilePath | bytes


class Inspection(NamedTuple):
    """The result of reading every byte of an artifact.

    Args:
        problems: Missing or damaged files; empty for an intact artifact.
        content: Verified bytes of the requested file; None if it is missing or damaged.
    """

    problems: list[Problem]
    content: bytes | None = None


class Store:
    """Stores and reads artifacts by digest.

    Args:
        folder: The folder of the store.
        blobs: The backend; None uses `LocalBlobs` in the folder.
    """

    def __init__(self, folder: FilePath, blobs: Blobs | None = None) -> None:
        self.folder = Path(folder)
        self.blobs: Blobs = blobs if blobs is not None else LocalBlobs(self.folder / "blobs")

    def put(self, kind: str, folder: FilePath) -> ArtifactRef:
        """Stores every file of a folder and returns the reference to the tree. Empty folders are not stored.

        Raises:
            StoreError: The folder is missing or empty, or contains a link, a device or a name that is not portable.
            HomeError: The disk is full or read-only.
        """
        return self.put_files(kind, scan_tree(Path(folder)))

    def put_files(self, kind: str, files: Mapping[str, Content]) -> ArtifactRef:
        """Stores files as one artifact, and returns its reference; `put` does the same for a folder.

        Args:
            kind: Kind of the artifact.
            files: Relative path with `/` -> a file to copy, or the bytes themselves.

        Raises:
            StoreError: No file, a link, or a relative path that leaves the tree.
            HomeError: The disk is full or read-only.
        """
        if not files:
            raise StoreError(f"an artifact of kind {kind!r} has no files", allowed="at least one file")
        entries: dict[str, FileEntry] = {}
        for relative in sorted(files):
            check_relative(relative)
            entries[relative] = self._put_file(files[relative])
        content = encode_tree(kind, entries)
        ref = ArtifactRef(kind, sha256_bytes(content), sum(entry.size for entry in entries.values()))
        self.blobs.write(ref.sha256, partial(io.BytesIO, content))
        return ref

    def files(self, ref: ArtifactRef) -> dict[str, FileEntry]:
        """Returns the files of an artifact: relative path -> digest and size; verifies the list itself.

        Raises:
            MissingBlob: The list is gone.
            DamagedBlob: The list differs from what was stored, or is of another kind.
        """
        return parse_tree(self._read_blob(ref.sha256, f"list of {ref.kind} {ref.sha256[:12]}"), ref)

    def read(self, ref: ArtifactRef, relative: str) -> bytes:
        """Returns the verified bytes of one file of an artifact.

        Raises:
            StoreError: The artifact has no such file; or `MissingBlob`, `DamagedBlob`.
        """
        return self._read_blob(self._entry(ref, relative).sha256, f"{relative} of {ref.kind} {ref.sha256[:12]}")

    def read_digest(self, digest: str) -> bytes | None:
        """Returns the bytes of a file of any artifact by their SHA-256; None if they are not stored, or damaged."""
        try:
            return self._read_blob(digest, digest[:12])
        except StoreError:
            return None

    def checkout(self, ref: ArtifactRef, folder: FilePath) -> None:
        """Copies an artifact to a folder, verified; the folder appears complete or not at all.

        Args:
            ref: The artifact.
            folder: The target; must not exist, or be empty.

        Raises:
            StoreError: The folder is not empty; or `MissingBlob`, `DamagedBlob`.
            HomeError: The disk is full or read-only.
        """
        files, folder = self.files(ref), Path(folder)
        with disk_errors(folder):
            if folder.is_symlink() or (folder.exists() and (not folder.is_dir() or any(folder.iterdir()))):
                raise StoreError("not an empty folder", where=str(folder), remedy="name an empty or new folder")
            folder.parent.mkdir(parents=True, exist_ok=True)
            temporary = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name[:50]}.", suffix=".partial"))
            try:
                for relative, entry in files.items():
                    target = temporary / relative
                    target.parent.mkdir(parents=True, exist_ok=True)
                    with target.open("wb") as file:
                        self._copy_out(entry.sha256, file, f"{relative} of {ref.kind} {ref.sha256[:12]}")
                temporary.chmod(0o755)
                temporary.replace(folder)
            except BaseException:
                shutil.rmtree(temporary, ignore_errors=True)
                raise

    def checkout_file(self, ref: ArtifactRef, relative: str, path: FilePath) -> None:
        """Copies one file of an artifact to a path, verified and atomic; replaces an existing file.

        Raises:
            StoreError: The artifact has no such file; or `MissingBlob`, `DamagedBlob`.
            HomeError: The disk is full or read-only.
        """
        digest = self._entry(ref, relative).sha256
        where = f"{relative} of {ref.kind} {ref.sha256[:12]}"
        path = Path(path)
        with disk_errors(path):
            atomic_write(path, lambda file: self._copy_out(digest, file, where))

    def has(self, ref: ArtifactRef) -> bool:
        """Returns True if the list of files is intact and all its blobs exist; reads no other blob."""
        try:
            return all(self.blobs.exists(entry.sha256) for entry in self.files(ref).values())
        except (MissingBlob, DamagedBlob):
            return False

    def touch(self, ref: ArtifactRef) -> bool:
        """Restarts the garbage collection's grace period for an artifact; returns False if a blob is gone."""
        try:
            digests = [ref.sha256, *(entry.sha256 for entry in self.files(ref).values())]
        except (MissingBlob, DamagedBlob):
            return False
        touched = [self.blobs.touch(digest) for digest in digests]  # a list: touches all, even if one is gone
        return all(touched)

    def verify(self, ref: ArtifactRef) -> list[Problem]:
        """Reads every byte of the artifact and returns the missing and damaged files."""
        return self.inspect(ref).problems

    def inspect(
        self, ref: ArtifactRef, keep: str | None = None, *, touch: bool = False, known: set[str] | None = None
    ) -> Inspection:
        """Reads every byte of the artifact once, and returns the missing and damaged files.

        Args:
            ref: The artifact.
            keep: Relative path of a file whose bytes are returned too.
            touch: True also restarts the grace period of each blob before it is read.
            known: Digests of blobs that were verified a moment ago and are neither touched nor read again; in-place:
                adds the verified ones.
        """
        known = set() if known is None else known
        if touch and ref.sha256 not in known:
            self.blobs.touch(ref.sha256)
        try:
            files = self.files(ref)
        except (MissingBlob, DamagedBlob) as error:
            return Inspection([_problem(error)])
        known.add(ref.sha256)
        problems, content = [], None
        for relative, entry in files.items():
            where = f"{relative} of {ref.kind} {ref.sha256[:12]}"
            try:
                if touch and entry.sha256 not in known:
                    self.blobs.touch(entry.sha256)
                if relative == keep:
                    content = self._read_blob(entry.sha256, where)
                elif entry.sha256 not in known and (actual := self.blobs.actual_digest(entry.sha256)) != entry.sha256:
                    raise damaged(entry.sha256, actual, where)
                known.add(entry.sha256)
            except (MissingBlob, DamagedBlob) as error:
                problems.append(_problem(error, where))
        return Inspection(problems, content)

    def _entry(self, ref: ArtifactRef, relative: str) -> FileEntry:
        files = self.files(ref)
        if relative not in files:
            raise StoreError(
                f"no file {relative!r}",
                where=f"{ref.kind} {ref.sha256[:12]}",
                allowed=f"one of its {len(files)} files: {', '.join(list(files)[:8])}",
            )
        return files[relative]

    def _put_file(self, content: Content) -> FileEntry:
        if isinstance(content, bytes):
            entry = FileEntry(sha256_bytes(content), len(content))
            self.blobs.write(entry.sha256, partial(io.BytesIO, content))
            return entry
        content = Path(content)
        with open_regular(content) as file:
            entry = FileEntry(hashlib.file_digest(file, "sha256").hexdigest(), file.tell())
        self.blobs.write(entry.sha256, partial(open_regular, content))
        return entry

    def _read_blob(self, digest: str, where: str) -> bytes:
        with self.blobs.open(digest) as file:
            content = file.read()
        actual = sha256_bytes(content)
        if actual != digest:
            raise damaged(digest, actual, where)
        return content

    def _copy_out(self, digest: str, target: BinaryIO, where: str) -> None:
        with self.blobs.open(digest) as source:
            actual = copy_hashed(source, target)
        if actual != digest:
            raise damaged(digest, actual, where)


def open_store(home: Home) -> Store:
    """Returns the store of a home, with the backend that its settings name.

    Raises:
        StoreError: The settings name a store that cannot be opened.
        HomeError: The settings cannot be read.
    """
    url = home.store_url
    return Store(home.store, open_blobs(url) if url else None)


def _problem(error: StoreError, where: str = "") -> Problem:
    return Problem(error.problem, where or error.where, error.remedy)
