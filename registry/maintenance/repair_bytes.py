"""Restores missing or damaged blobs from intact copies elsewhere in the home."""

from __future__ import annotations

import io
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import BinaryIO

from sqlalchemy import delete
from sqlalchemy.orm import Session

from lora_engine.files import sha256_file
from registry.entities import ArtifactRef, FileEntry
from registry.errors import DamagedBlob, MissingBlob
from registry.home import Home
from registry.lineage.rows import record_contents
from registry.maintenance.check_bytes import read_digests
from registry.maintenance.gc_roots import intact_list, known_artifacts, read_all_files, version_roots
from registry.store.artifacts import Store
from registry.store.database import Database
from registry.store.tables import ContentRow
from registry.store.trees import encode_tree


@dataclass(frozen=True)
class Repair:
    """One problem that a repair handled.

    Args:
        what: The problem.
        where: The alias, version, artifact or file.
        outcome: The new state, or the fix that the user must apply.
        done: True if it is repaired.
    """

    what: str
    where: str
    outcome: str
    done: bool = True


@dataclass
class _BrokenBlob:
    """A missing or damaged blob and the artifacts that contain it."""

    entry: FileEntry
    exists: bool
    owners: list[ArtifactRef] = field(default_factory=list)
    path: str = ""


@dataclass(frozen=True)
class _OtherFiles:
    """Files of the home outside the store, indexed by size."""

    home: Home

    def find(self, entry: FileEntry) -> Path | None:
        """Returns a regular file with those bytes; None if there is none."""
        for path in self._by_size.get(entry.size, ()):
            if path.is_file() and not path.is_symlink() and sha256_file(path) == entry.sha256:
                return path
        return None

    @cached_property
    def _by_size(self) -> dict[int, list[Path]]:
        by_size: dict[int, list[Path]] = defaultdict(list)
        folders = (self.home.mlflow_artifacts, self.home.work, self.home.reports, self.home.path / "exports")
        for path in (path for folder in folders for path in sorted(folder.rglob("*"))):
            if path.is_file() and not path.is_symlink():
                by_size[path.stat().st_size].append(path)
        return by_size


def repair_bytes(home: Home, database: Database, store: Store) -> Iterator[Repair]:
    """Restores blobs from other copies, and quarantines broken blobs that their steps can make again.

    Args:
        home: The home, whose other folders are searched.
        database: Its database.
        store: Its store.
    """
    others = _OtherFiles(home)
    with database.read() as session:
        needed, refs = version_roots(session), known_artifacts(session)
        # Artifacts that versions need come first: their blobs must not go to the quarantine.
        refs.sort(key=lambda ref: ref.sha256 not in needed)
        all_files = read_all_files(session)
        recorded = {ref: intact_list(ref, all_files.get(ref.sha256, {})) for ref in refs}
    actual = read_digests(store)
    broken: dict[str, _BrokenBlob] = {}
    for ref in refs:
        if ref.sha256 not in actual and ref.sha256 not in needed:
            continue  # collected
        files = recorded[ref]
        if actual.get(ref.sha256) != ref.sha256:
            yield _repair_list(store, ref, files, ref.sha256 in needed)
            if files is None:
                continue
        for path, entry in (files or _read_list(store, ref)).items():
            if actual.get(entry.sha256) != entry.sha256:
                blob = broken.setdefault(entry.sha256, _BrokenBlob(entry, entry.sha256 in actual))
                blob.owners.append(ref)
                blob.path = blob.path or path
    for blob in broken.values():
        yield _repair_blob(store, blob, others, needed)
    yield from _repair_contents(database, store, refs)


def _repair_list(store: Store, ref: ArtifactRef, files: dict[str, FileEntry] | None, is_needed: bool) -> Repair:
    problem, where = "its list of files was damaged or missing", f"{ref.kind} {ref.sha256}"
    if files is not None:
        _replace(store, ref.sha256, partial(io.BytesIO, encode_tree(ref.kind, files)))
        return Repair(problem, where, "rewritten from the database")
    if is_needed:
        return Repair(problem, where, "restore it from a backup", done=False)
    moved = store.blobs.quarantine(ref.sha256)
    return Repair(problem, where, f"moved to {moved}; its step runs again when its output is needed")


def _repair_blob(store: Store, blob: _BrokenBlob, others: _OtherFiles, needed: set[str]) -> Repair:
    digest = blob.entry.sha256
    problem = f"{blob.path}: {'damaged' if blob.exists else 'missing'}"
    where = f"{blob.owners[0].kind} {blob.owners[0].sha256}, blob {digest}"
    source = others.find(blob.entry)
    if source is not None:
        _replace(store, digest, lambda: source.open("rb"))
        return Repair(problem, where, f"restored from {source}")
    if any(owner.sha256 in needed for owner in blob.owners):
        return Repair(problem, where, "no intact copy exists: restore it from a backup", done=False)
    if blob.exists:
        store.blobs.quarantine(digest)
    for owner in blob.owners:
        if store.blobs.exists(owner.sha256):
            store.blobs.quarantine(owner.sha256)
    return Repair(problem, where, "quarantined; its step runs again when its output is needed")


def _repair_contents(database: Database, store: Store, refs: list[ArtifactRef]) -> Iterator[Repair]:
    """Rewrites the recorded files of artifacts if they differ from the list in the store."""
    with database.write() as session:
        all_files = read_all_files(session)
        for ref in refs:
            recorded = all_files.get(ref.sha256, {})
            if not recorded or intact_list(ref, recorded) is not None:
                continue
            files = _read_list(store, ref)
            if files:
                _replace_contents(session, ref, files)
                yield Repair("the recorded files were wrong", f"{ref.kind} {ref.sha256}", "rewritten from the store")


def _replace_contents(session: Session, ref: ArtifactRef, files: dict[str, FileEntry]) -> None:
    session.execute(delete(ContentRow).where(ContentRow.artifact == ref.sha256))
    record_contents(session, ref, files)


def _read_list(store: Store, ref: ArtifactRef) -> dict[str, FileEntry]:
    try:
        return store.files(ref)
    except (MissingBlob, DamagedBlob):
        return {}


def _replace(store: Store, digest: str, source: Callable[[], BinaryIO]) -> None:
    # Quarantined, not overwritten, so that the damage can be examined.
    if store.blobs.exists(digest):
        store.blobs.quarantine(digest)
    store.blobs.write(digest, source)
