"""Bringing back blobs that are gone or damaged, from any other place that still holds them whole."""

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
from registry.lineage.record import record_contents
from registry.maintenance.check_bytes import read_digests
from registry.maintenance.gc_roots import known_artifacts, recorded_files, recorded_list, version_roots
from registry.store.artifacts import Store, encode_tree
from registry.store.database import Database
from registry.store.tables import ContentRow


@dataclass(frozen=True)
class Mended:
    """One thing that a repair found.

    Args:
        what: What was wrong.
        where: Which alias, version, artifact or file.
        outcome: What it is now, or what is left to do.
        done: Whether it is mended.
    """

    what: str
    where: str
    outcome: str
    done: bool = True


@dataclass
class _Broken:
    """A blob that is not what it should be, and the artifacts that hold it."""

    entry: FileEntry
    is_there: bool
    owners: list[ArtifactRef] = field(default_factory=list)
    path: str = ""


@dataclass(frozen=True)
class _Elsewhere:
    """Files of the home outside the store, found by what they hold."""

    home: Home

    def find(self, entry: FileEntry) -> Path | None:
        """A regular file with those bytes."""
        for path in self._by_size.get(entry.size, ()):
            if path.is_file() and not path.is_symlink() and sha256_file(path) == entry.sha256:
                return path
        return None

    @cached_property
    def _by_size(self) -> dict[int, list[Path]]:
        found: dict[int, list[Path]] = defaultdict(list)
        folders = (self.home.mlflow_artifacts, self.home.work, self.home.reports, self.home.path / "exports")
        for path in (path for folder in folders for path in sorted(folder.rglob("*"))):
            if path.is_file() and not path.is_symlink():
                found[path.stat().st_size].append(path)
        return found


def mend_bytes(home: Home, database: Database, store: Store) -> Iterator[Mended]:
    """Puts back what another place holds; takes out of the cache what is broken and can be made again.

    Args:
        home: The home, whose other folders are searched.
        database: Its record.
        store: Its store.
    """
    elsewhere = _Elsewhere(home)
    with database.read() as session:
        needed, refs = version_roots(session), known_artifacts(session)
        # What versions need comes first, so that a blob that they share is not given up.
        refs.sort(key=lambda ref: ref.sha256 not in needed)
        proven = {ref: recorded_list(session, ref) for ref in refs}
    actual = read_digests(store)
    broken: dict[str, _Broken] = {}
    for ref in refs:
        if ref.sha256 not in actual and ref.sha256 not in needed:
            continue  # collected
        files = proven[ref]
        if actual.get(ref.sha256) != ref.sha256:
            yield _mend_list(store, ref, files, ref.sha256 in needed)
            if files is None:
                continue
        for path, entry in (files or _read_list(store, ref)).items():
            if actual.get(entry.sha256) != entry.sha256:
                one = broken.setdefault(entry.sha256, _Broken(entry, entry.sha256 in actual))
                one.owners.append(ref)
                one.path = one.path or path
    for one in broken.values():
        yield _mend_blob(store, one, elsewhere, needed)
    yield from _mend_contents(database, store, refs)


def _mend_list(store: Store, ref: ArtifactRef, files: dict[str, FileEntry] | None, is_needed: bool) -> Mended:
    what, where = "its list of files was not whole", f"{ref.kind} {ref.sha256}"
    if files is not None:
        _replace(store, ref.sha256, partial(io.BytesIO, encode_tree(ref.kind, files)))
        return Mended(what, where, "written again from the record")
    if is_needed:
        return Mended(what, where, "restore it from a backup", done=False)
    return Mended(
        what, where, f"moved to {store.blobs.quarantine(ref.sha256)}; its step runs again when it is asked for"
    )


def _mend_blob(store: Store, one: _Broken, elsewhere: _Elsewhere, needed: set[str]) -> Mended:
    digest = one.entry.sha256
    what = f"{one.path}: {'damaged' if one.is_there else 'gone'}"
    where = f"{one.owners[0].kind} {one.owners[0].sha256}, blob {digest}"
    source = elsewhere.find(one.entry)
    if source is not None:
        _replace(store, digest, lambda: source.open("rb"))
        return Mended(what, where, f"put back from {source}")
    if any(owner.sha256 in needed for owner in one.owners):
        return Mended(what, where, "no other copy is whole: restore it from a backup", done=False)
    if one.is_there:
        store.blobs.quarantine(digest)
    for owner in one.owners:
        if store.blobs.exists(owner.sha256):
            store.blobs.quarantine(owner.sha256)
    return Mended(what, where, "moved aside; its step runs again when it is asked for")


def _mend_contents(database: Database, store: Store, refs: list[ArtifactRef]) -> Iterator[Mended]:
    """Records the files of artifacts again where the record differs from the list whose digest names them."""
    with database.write() as session:
        for ref in refs:
            recorded = recorded_files(session, ref)
            if not recorded or recorded_list(session, ref) is not None:
                continue
            files = _read_list(store, ref)
            if files:
                _record_again(session, ref, files)
                yield Mended("the recorded files were not its own", f"{ref.kind} {ref.sha256}", "recorded again")


def _record_again(session: Session, ref: ArtifactRef, files: dict[str, FileEntry]) -> None:
    session.execute(delete(ContentRow).where(ContentRow.artifact == ref.sha256))
    record_contents(session, ref, files)


def _read_list(store: Store, ref: ArtifactRef) -> dict[str, FileEntry]:
    try:
        return store.files(ref)
    except (MissingBlob, DamagedBlob):
        return {}


def _replace(store: Store, digest: str, source: Callable[[], BinaryIO]) -> None:
    # Kept, not overwritten: somebody may still want to know what happened to it.
    if store.blobs.exists(digest):
        store.blobs.quarantine(digest)
    store.blobs.write(digest, source)
