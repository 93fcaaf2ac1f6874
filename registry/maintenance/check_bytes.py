"""Whether the store holds what the record says, and nothing else: part of `registry.maintenance.fsck`."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping

from sqlalchemy import select
from sqlalchemy.orm import Session

from registry.entities import AdapterVersion, Problem
from registry.errors import DamagedBlob, MissingBlob
from registry.maintenance.gc_roots import known_artifacts, recorded_files, version_roots
from registry.store.artifacts import Store
from registry.store.tables import RecordRow, VersionRow

_RESTORE = "`loraline fsck --repair`; else run the pipeline again (its step is repeated), or restore it from a backup"
_REDO = "`loraline fsck --repair` takes it out of the cache; the step that made it runs again when it is asked for"
_DATABASE = "restore the database from a backup"


def read_digests(store: Store) -> dict[str, str]:
    """Every blob, read whole: the digest it is stored under -> the digest that it has."""
    found = {}
    for digest in store.blobs.digests():
        try:
            found[digest] = store.blobs.actual_digest(digest)
        except MissingBlob:
            continue  # collected meanwhile
    return found


def check_bytes(session: Session, store: Store, actual: Mapping[str, str], grace: float) -> Iterator[Problem]:
    """Every known artifact, by what was found.

    What no version needs may be gone whole, as a collection leaves it; what is there must be whole.
    """
    needed, users = version_roots(session), _users(session)
    wanted: set[str] = set()
    for ref in known_artifacts(session):
        told = f", used by {', '.join(users[ref.sha256])}" if users[ref.sha256] else ""
        where, remedy = f"{ref.kind} {ref.sha256}{told}", _RESTORE if ref.sha256 in needed else _REDO
        wanted.add(ref.sha256)
        if ref.sha256 not in actual and ref.sha256 not in needed:
            continue
        try:
            files = store.files(ref)
        except (MissingBlob, DamagedBlob) as error:
            if ref.sha256 in needed or isinstance(error, DamagedBlob):  # else it was collected a moment ago
                yield Problem(f"list of files: {error.problem}", where, remedy)
            continue
        wanted |= {entry.sha256 for entry in files.values()}
        for path, entry in files.items():
            found = actual.get(entry.sha256)
            if found is None:
                yield Problem(f"{path}: the bytes with digest {entry.sha256} are gone", where, remedy)
            elif found != entry.sha256:
                yield Problem(f"{path}: the bytes have digest {found}, but {entry.sha256} was stored", where, remedy)
        recorded = recorded_files(session, ref)
        if recorded and recorded != files:
            yield Problem(
                "the recorded files are not those in the store", where, "`loraline fsck --repair` records them again"
            )
    yield from _unwanted(store, actual.keys() - wanted, grace)


def check_versions(store: Store, versions: Iterable[AdapterVersion]) -> Iterator[Problem]:
    """Whether numbers have no gaps, and each version's file is the one in its artifact."""
    numbers: dict[str, int] = defaultdict(int)
    for version in versions:
        numbers[version.name] += 1
        if version.version != numbers[version.name]:
            yield Problem("a version before it is gone", version.ref, _DATABASE)
            numbers[version.name] = version.version
        try:
            entry = store.files(version.artifact).get(version.adapter_path)
        except (MissingBlob, DamagedBlob):
            continue  # found with the bytes
        if entry is None or (entry.sha256, entry.size) != (version.sha256, version.size):
            held = entry.sha256 if entry else "nothing"
            what = f"registered with digest {version.sha256}, but its artifact holds {held}"
            yield Problem(what, version.ref, _DATABASE)


def _users(session: Session) -> dict[str, list[str]]:
    users: dict[str, list[str]] = defaultdict(list)
    columns = (VersionRow.id, VersionRow.name, VersionRow.version)
    held = (VersionRow.artifact, VersionRow.report, VersionRow.record)
    names = {}
    for row_id, name, number, *digests in session.execute(select(*columns, *held).order_by(VersionRow.id)):
        names[row_id] = f"{name}@{number}"
        for digest in filter(None, digests):
            users[digest].append(names[row_id])
    for version, artifact in session.execute(select(RecordRow.version, RecordRow.artifact)):
        users[artifact].append(names.get(version, f"version {version}"))
    return users


def _unwanted(store: Store, digests: Iterable[str], grace: float) -> Iterator[Problem]:
    oldest = time.time() - grace
    for digest in sorted(digests):
        try:
            is_old = store.blobs.age(digest) < oldest
        except (FileNotFoundError, MissingBlob):
            continue  # collected meanwhile
        if is_old:
            yield Problem("nothing refers to this blob", f"blob {digest}", "`loraline gc` takes it away", "leftover")
