"""Finds the GC roots in the database: the artifacts that versions need, and those that recent runs could reuse.

Reads rows only; `registry.maintenance.gc` deletes the rest.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime

from sqlalchemy import func, or_, select
from sqlalchemy.orm import Session

from lora_engine.files import sha256_bytes
from registry.entities import ArtifactRef, FileEntry
from registry.lineage.graph import Edge, NodeId, Relation, upstream, version_ids, version_ref
from registry.lineage.record import is_alive
from registry.lineage.rows import artifact_ref
from registry.store.database import batched
from registry.store.tables import (
    AliasRow,
    ArtifactRow,
    ContentRow,
    DocumentRow,
    EventRow,
    ExecutionRow,
    InputRow,
    RunRow,
    VersionRow,
)
from registry.store.trees import encode_tree


def version_roots(session: Session) -> set[str]:
    """Returns the digests of the artifacts and documents of versions, and of everything upstream.

    Documents include the comparisons that users vote in. Covers every version that is not DELETED or that has an
    alias, and all its upstream versions in any state: without them a version cannot be rebuilt.
    """
    aliased = select(AliasRow.version).where(AliasRow.name == VersionRow.name).correlate(VersionRow)
    live = select(version_ref()).where(or_(VersionRow.state != "DELETED", VersionRow.version.in_(aliased)))
    starts = [NodeId("version", ref) for ref in session.scalars(live)]
    beside = [Relation("version", _documents), Relation("version", _comparisons)]
    return set(upstream(session, starts, "version", "output", "input", extra=beside).ids("artifact"))


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
    outputs = select(ExecutionRow.output).where(ExecutionRow.output.is_not(None))
    inputs = select(InputRow.artifact).join(ExecutionRow, ExecutionRow.id == InputRow.execution)
    return {row[0] for query in (outputs, inputs) for row in batched(session, query, ExecutionRow.run_id, runs)}


def intact_list(ref: ArtifactRef, files: Mapping[str, FileEntry]) -> dict[str, FileEntry] | None:
    """Returns the files that the database has of an artifact; None if they do not hash to its digest."""
    return dict(files) if files and sha256_bytes(encode_tree(ref.kind, files)) == ref.sha256 else None


def read_all_files(session: Session) -> Mapping[str, Mapping[str, FileEntry]]:
    """Returns artifact -> its files from the database, unverified, in one query; an artifact without files has none."""
    files: dict[str, dict[str, FileEntry]] = defaultdict(dict)
    columns = (ContentRow.artifact, ContentRow.path, ContentRow.sha256, ContentRow.size)
    for artifact, path, sha256, size in session.execute(select(*columns).order_by(ContentRow.path)):
        if isinstance(artifact, str):  # a damaged one is named by `fsck`
            files[artifact][path] = FileEntry(sha256, size)
    return files


def known_artifacts(session: Session) -> list[ArtifactRef]:
    """Returns every recorded artifact, sorted by digest."""
    rows = session.scalars(select(ArtifactRow).order_by(ArtifactRow.sha256))
    # A row without a digest, which is damage, is no object of its table.
    refs = map(artifact_ref, filter(None, rows))
    return [ref for ref in refs if isinstance(ref, ArtifactRef)]


def _documents(session: Session, refs: Sequence[str]) -> Iterator[Edge]:
    """Yields the metadata artifacts and documents of versions."""
    metadata = select(VersionRow.metadata_artifact, version_ref())
    documents = select(DocumentRow.artifact, version_ref()).join(VersionRow, VersionRow.id == DocumentRow.version)
    ids = version_ids(session, refs)
    for query in (metadata, documents):
        for artifact, ref in batched(session, query, VersionRow.id, ids):
            yield Edge(NodeId("artifact", artifact), NodeId("version", ref), "document")


def _comparisons(session: Session, refs: Sequence[str]) -> Iterator[Edge]:
    """Yields the images that users vote on."""
    for row in session.scalars(select(EventRow).where(EventRow.action == "compare").order_by(EventRow.seq)):
        if (ref := f"{row.name}@{row.after}") in refs and isinstance(row.details, Mapping):
            yield Edge(NodeId("artifact", str(row.details.get("set"))), NodeId("version", ref), "comparison")
