"""Which artifacts somebody still needs, by the record alone: what versions need, and what recent runs could use again.

Reads rows, never bytes; what becomes of the rest is decided in `registry.maintenance.gc`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from datetime import datetime
from typing import Any

from sqlalchemy import func, or_, select
from sqlalchemy.orm import Session

from lora_engine.files import sha256_bytes
from registry.entities import ArtifactRef, FileEntry
from registry.lineage.record import artifact_ref, is_alive
from registry.store.artifacts import encode_tree
from registry.store.tables import (
    AliasRow,
    ArtifactRow,
    ContentRow,
    ExecutionRow,
    InputRow,
    ParentRow,
    RecordRow,
    RunRow,
    VersionRow,
)

_BATCH = 500


def version_roots(session: Session) -> set[str]:
    """Digests of the artifacts that versions are, were described by, and were made from.

    Those of every version that is not DELETED or that an alias points at, and those of all its ancestors, whatever
    became of them: without its origins a version cannot be built again.
    """
    pointed = select(AliasRow.version).where(AliasRow.name == VersionRow.name).correlate(VersionRow)
    living = select(VersionRow.id).where(or_(VersionRow.state != "DELETED", VersionRow.version.in_(pointed)))
    ids = _with_parents(session, set(session.scalars(living)))
    found: set[str] = set()
    for batch in _batches(sorted(ids)):
        columns = (VersionRow.artifact, VersionRow.report, VersionRow.record)
        for row in session.execute(select(*columns).where(VersionRow.id.in_(batch))):
            found |= {digest for digest in row if digest}
        found |= set(session.scalars(select(RecordRow.artifact).where(RecordRow.version.in_(batch))))
    return with_ancestry(session, found)


def run_roots(session: Session, since: datetime) -> set[str]:
    """Digests of what runs read and made: those that began since then, those that still run, and the last of each name.

    The last run of each pipeline counts however old it is, so that a schedule that finds nothing changed has nothing
    to do.
    """
    last = (
        select(RunRow.name, func.max(RunRow.started_at).label("at"))
        .where(RunRow.status == "COMPLETED")
        .group_by(RunRow.name)
        .subquery()
    )
    latest = select(RunRow.id).join(last, (RunRow.name == last.c.name) & (RunRow.started_at == last.c.at))
    runs = set(session.scalars(select(RunRow.id).where(RunRow.started_at >= since))) | set(session.scalars(latest))
    runs |= {row.id for row in session.scalars(select(RunRow).where(RunRow.status == "RUNNING")) if is_alive(row)}
    found: set[str] = set()
    for batch in _batches(sorted(runs)):
        mine = ExecutionRow.run_id.in_(batch)
        found |= {digest for digest in session.scalars(select(ExecutionRow.output).where(mine)) if digest}
        read = select(InputRow.artifact).join(ExecutionRow, ExecutionRow.id == InputRow.execution).where(mine)
        found |= set(session.scalars(read))
    return found


def with_ancestry(session: Session, digests: Iterable[str]) -> set[str]:
    """The artifacts and all that they were made from, step by step."""
    found = set(digests)
    level = sorted(found)
    while level:
        read: set[str] = set()
        for batch in _batches(level):
            query = (
                select(InputRow.artifact)
                .join(ExecutionRow, ExecutionRow.id == InputRow.execution)
                .where(ExecutionRow.output.in_(batch), ExecutionRow.status == "COMPLETED")
            )
            read |= set(session.scalars(query))
        level = sorted(read - found)
        found |= read
    return found


def recorded_list(session: Session, ref: ArtifactRef) -> dict[str, FileEntry] | None:
    """The files of an artifact as the database has them, if they prove to be all of them; None otherwise."""
    files = recorded_files(session, ref)
    return files if files and sha256_bytes(encode_tree(ref.kind, files)) == ref.sha256 else None


def recorded_files(session: Session, ref: ArtifactRef) -> dict[str, FileEntry]:
    """The files of an artifact as the database has them, unproven."""
    columns = (ContentRow.path, ContentRow.sha256, ContentRow.size)
    rows = session.execute(select(*columns).where(ContentRow.artifact == ref.sha256).order_by(ContentRow.path))
    return {path: FileEntry(sha256, size) for path, sha256, size in rows}


def known_artifacts(session: Session) -> list[ArtifactRef]:
    """Everything that some step read or made, by digest."""
    return [artifact_ref(row) for row in session.scalars(select(ArtifactRow).order_by(ArtifactRow.sha256))]


def _with_parents(session: Session, ids: set[int]) -> set[int]:
    level = sorted(ids)
    while level:
        parents: set[int] = set()
        for batch in _batches(level):
            query = select(ParentRow.parent).where(ParentRow.child.in_(batch), ParentRow.parent.is_not(None))
            parents |= {parent for parent in session.scalars(query) if parent is not None}
        level = sorted(parents - ids)
        ids |= parents
    return ids


def _batches(values: Sequence[Any]) -> Iterator[Sequence[Any]]:
    return (values[begin : begin + _BATCH] for begin in range(0, len(values), _BATCH))
