"""Finds the GC roots in the database: the artifacts that versions need, and those that recent runs could reuse.

Reads rows only; `registry.maintenance.gc` deletes the rest.
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
    """Returns the digests of the artifacts and documents of versions, and of everything upstream.

    Covers every version that is not DELETED or that has an alias, and all its upstream versions in any state: without
    them a version cannot be rebuilt.
    """
    aliased = select(AliasRow.version).where(AliasRow.name == VersionRow.name).correlate(VersionRow)
    live = select(VersionRow.id).where(or_(VersionRow.state != "DELETED", VersionRow.version.in_(aliased)))
    ids = _with_parents(session, set(session.scalars(live)))
    digests: set[str] = set()
    for batch in _batches(sorted(ids)):
        columns = (VersionRow.artifact, VersionRow.report, VersionRow.record)
        for row in session.execute(select(*columns).where(VersionRow.id.in_(batch))):
            digests |= {digest for digest in row if digest}
        digests |= set(session.scalars(select(RecordRow.artifact).where(RecordRow.version.in_(batch))))
    return with_ancestry(session, digests)


def run_roots(session: Session, since: datetime) -> set[str]:
    """Returns the digests of the inputs and outputs of runs since `since`, running runs, and the last run of each name.

    The last run of each pipeline counts at any age: a schedule with unchanged inputs must find its cached results.
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
    digests: set[str] = set()
    for batch in _batches(sorted(runs)):
        in_batch = ExecutionRow.run_id.in_(batch)
        digests |= {digest for digest in session.scalars(select(ExecutionRow.output).where(in_batch)) if digest}
        inputs = select(InputRow.artifact).join(ExecutionRow, ExecutionRow.id == InputRow.execution).where(in_batch)
        digests |= set(session.scalars(inputs))
    return digests


def with_ancestry(session: Session, digests: Iterable[str]) -> set[str]:
    """Returns the artifacts and everything upstream of them, through completed steps."""
    upstream = set(digests)
    level = sorted(upstream)
    while level:
        inputs: set[str] = set()
        for batch in _batches(level):
            query = (
                select(InputRow.artifact)
                .join(ExecutionRow, ExecutionRow.id == InputRow.execution)
                .where(ExecutionRow.output.in_(batch), ExecutionRow.status == "COMPLETED")
            )
            inputs |= set(session.scalars(query))
        level = sorted(inputs - upstream)
        upstream |= inputs
    return upstream


def recorded_list(session: Session, ref: ArtifactRef) -> dict[str, FileEntry] | None:
    """Returns the files of an artifact from the database; None if they do not hash to its digest."""
    files = recorded_files(session, ref)
    return files if files and sha256_bytes(encode_tree(ref.kind, files)) == ref.sha256 else None


def recorded_files(session: Session, ref: ArtifactRef) -> dict[str, FileEntry]:
    """Returns the files of an artifact from the database, unverified."""
    columns = (ContentRow.path, ContentRow.sha256, ContentRow.size)
    rows = session.execute(select(*columns).where(ContentRow.artifact == ref.sha256).order_by(ContentRow.path))
    return {path: FileEntry(sha256, size) for path, sha256, size in rows}


def known_artifacts(session: Session) -> list[ArtifactRef]:
    """Returns every recorded artifact, sorted by digest."""
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
