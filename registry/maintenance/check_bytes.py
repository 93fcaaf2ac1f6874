"""Checks the store against the database: missing, damaged and orphaned blobs. Part of `registry.maintenance.fsck`."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping

from sqlalchemy import select
from sqlalchemy.orm import Session

from registry.entities import AdapterVersion, Problem
from registry.errors import DamagedBlob, MissingBlob
from registry.maintenance.gc_roots import known_artifacts, read_all_files, version_roots
from registry.store.artifacts import Store
from registry.store.tables import DocumentRow, VersionRow

_RESTORE = "`loraline fsck --repair`; if that fails, run the pipeline again, or restore it from a backup"
_REDO = "`loraline fsck --repair` removes it from the cache; its step runs again when its output is needed"
_DATABASE = "restore the database from a backup"


def read_digests(store: Store) -> dict[str, str]:
    """Reads every blob, and returns its stored digest -> its actual digest."""
    digests = {}
    for digest in store.blobs.digests():
        try:
            digests[digest] = store.blobs.actual_digest(digest)
        except MissingBlob:
            continue  # collected meanwhile
    return digests


def check_bytes(session: Session, store: Store, actual: Mapping[str, str], grace: float) -> Iterator[Problem]:
    """Checks the bytes of every recorded artifact, and yields the problems.

    An artifact that no version needs may be missing entirely, because a collection removes it; a present one must be
    complete.
    """
    needed, users = version_roots(session), _users(session)
    referenced: set[str] = set()
    all_recorded = read_all_files(session)
    for ref in known_artifacts(session):
        used_by = f", used by {', '.join(users[ref.sha256])}" if users[ref.sha256] else ""
        where, remedy = f"{ref.kind} {ref.sha256}{used_by}", _RESTORE if ref.sha256 in needed else _REDO
        referenced.add(ref.sha256)
        if ref.sha256 not in actual and ref.sha256 not in needed:
            continue
        try:
            files = store.files(ref)
        except (MissingBlob, DamagedBlob) as error:
            if ref.sha256 in needed or isinstance(error, DamagedBlob):  # else it was collected a moment ago
                yield Problem(f"list of files: {error.problem}", where, remedy)
            continue
        referenced |= {entry.sha256 for entry in files.values()}
        for path, entry in files.items():
            digest = actual.get(entry.sha256)
            if digest is None:
                yield Problem(f"{path}: the bytes with digest {entry.sha256} are missing", where, remedy)
            elif digest != entry.sha256:
                yield Problem(f"{path}: the bytes have digest {digest}, but {entry.sha256} was stored", where, remedy)
        recorded = all_recorded.get(ref.sha256, {})
        if recorded and recorded != files:
            yield Problem(
                "the recorded files are not those in the store", where, "`loraline fsck --repair` records them again"
            )
    yield from _check_orphans(store, actual.keys() - referenced, grace)


def check_versions(store: Store, versions: Iterable[AdapterVersion]) -> Iterator[Problem]:
    """Checks that version numbers have no gaps, and that each version's file matches its artifact."""
    numbers: dict[str, int] = defaultdict(int)
    for version in versions:
        numbers[version.name] += 1
        if version.version != numbers[version.name]:
            yield Problem("an earlier version is missing", version.ref, _DATABASE)
            numbers[version.name] = version.version
        try:
            entry = store.files(version.artifact).get(version.adapter_path)
        except (MissingBlob, DamagedBlob):
            continue  # `check_bytes` reports it
        if entry is None or (entry.sha256, entry.size) != (version.sha256, version.size):
            actual = entry.sha256 if entry else "nothing"
            problem = f"registered with digest {version.sha256}, but its artifact contains {actual}"
            problem += " (columns 'sha256', 'size' and 'adapter_path' of the table versions)"
            yield Problem(problem, version.ref, _DATABASE)


def _users(session: Session) -> dict[str, list[str]]:
    users: dict[str, list[str]] = defaultdict(list)
    columns = (VersionRow.id, VersionRow.name, VersionRow.version)
    artifacts = (VersionRow.artifact, VersionRow.report, VersionRow.metadata_artifact)
    names = {}
    for row_id, name, number, *digests in session.execute(select(*columns, *artifacts).order_by(VersionRow.id)):
        names[row_id] = f"{name}@{number}"
        for digest in filter(None, digests):
            users[digest].append(names[row_id])
    for version, artifact in session.execute(select(DocumentRow.version, DocumentRow.artifact)):
        users[artifact].append(names.get(version, f"version {version}"))
    return users


def _check_orphans(store: Store, digests: Iterable[str], grace: float) -> Iterator[Problem]:
    oldest = time.time() - grace
    for digest in sorted(digests):
        try:
            is_old = store.blobs.age(digest) < oldest
        except (FileNotFoundError, MissingBlob):
            continue  # collected meanwhile
        if is_old:
            yield Problem("nothing refers to this blob", f"blob {digest}", "`loraline gc` deletes it", "leftover")
