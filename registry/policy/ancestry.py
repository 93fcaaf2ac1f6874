"""All that a version was made from, as one graph of artifacts and steps. Gathers rows; judges nothing."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import select
from sqlalchemy.orm import Session

from registry import queries
from registry.entities import AdapterVersion, ArtifactRef
from registry.lineage.record import artifact_ref
from registry.lineage.walk import NodeId, walk
from registry.store.tables import ArtifactRow, ContentRow, ExecutionRow, ParentRow, SubjectRow, VersionRow

_BATCH = 500
_FILE = re.compile(r"sha256:([0-9a-f]{64})")


@dataclass(frozen=True)
class Ancestry:
    """What a version was made from; a version stands for its artifact: what is declared of one holds for its bytes.

    Args:
        root: The artifact of the version.
        parents: Node -> the nodes that it was directly made from.
        versions: Digest of an artifact on the way -> the versions that it was registered as.
        settings: Id of an execution on the way -> how it was set.
        datasets: The datasets that something else than a dataset was made from.
        manifests: Digests of all datasets on the way.
    """

    root: NodeId
    parents: Mapping[NodeId, frozenset[NodeId]]
    versions: Mapping[str, tuple[AdapterVersion, ...]]
    settings: Mapping[str, Mapping[str, Any]]
    datasets: tuple[ArtifactRef, ...]
    manifests: frozenset[str]

    @property
    def nodes(self) -> frozenset[NodeId]:
        """Everything on the way, with the root."""
        return frozenset({self.root, *self.parents, *(node for each in self.parents.values() for node in each)})

    @property
    def ancestors(self) -> tuple[AdapterVersion, ...]:
        """The registered versions with other bytes that it was made from."""
        return tuple(version for digest, each in self.versions.items() if digest != self.root.id for version in each)


def trace(session: Session, artifact: ArtifactRef) -> Ancestry:
    """Everything that an artifact was made from: through steps, and through what its versions name as their parents.

    Args:
        session: Reading or writing; what was added in it is found.
        artifact: The adapter's tree; must be known.
    """
    root = NodeId("artifact", artifact.sha256)
    parents: dict[NodeId, set[NodeId]] = defaultdict(set)
    known: set[str] = set()
    waiting = {artifact.sha256}
    while waiting:
        for digest in sorted(waiting):
            if digest not in known:
                known.add(digest)
                for edge in walk(session, digest, "up").edges:
                    parents[edge.target].add(edge.source)
                    known.update(node.id for node in (edge.source, edge.target) if node.kind == "artifact")
        for made, source in _stated_parents(session, known):
            if made != source:
                parents[made].add(source)
        waiting = {node.id for each in parents.values() for node in each if node.kind == "artifact"} - known
    rows = {row.sha256: row for row in _in_batches(session, select(ArtifactRow), ArtifactRow.sha256, known)}
    steps = {node.id for each in parents.values() for node in each if node.kind == "execution"}
    return Ancestry(
        root,
        {node: frozenset(each) for node, each in parents.items()},
        _versions_of(session, known),
        {row.id: row.settings for row in _in_batches(session, select(ExecutionRow), ExecutionRow.id, steps)},
        _datasets(parents, rows),
        frozenset(digest for digest, row in rows.items() if row.kind == "manifest"),
    )


def held_subjects(session: Session, subjects: Collection[str], artifacts: Collection[str]) -> frozenset[str]:
    """Those of the subjects that one of the artifacts holds."""
    wanted = list(subjects)
    found: set[str] = set()
    for begin in range(0, len(wanted), _BATCH):
        query = select(SubjectRow.subject).where(SubjectRow.subject.in_(wanted[begin : begin + _BATCH])).distinct()
        found.update(_in_batches(session, query, SubjectRow.artifact, artifacts))
    return frozenset(found)


def _stated_parents(session: Session, artifacts: Iterable[str]) -> Iterator[tuple[NodeId, NodeId]]:
    """(artifact, what a version of it says that it was made from), versions by their artifacts and files by theirs."""
    query = select(VersionRow.artifact, ParentRow.parent, ParentRow.text).join(
        ParentRow, ParentRow.child == VersionRow.id
    )
    stated = list(_rows_in_batches(session, query, VersionRow.artifact, artifacts))
    ids = {parent for _, parent, _ in stated if parent is not None}
    linked = _rows_in_batches(session, select(VersionRow.id, VersionRow.artifact), VersionRow.id, ids)
    by_id: dict[int, str] = {row[0]: row[1] for row in linked}
    files = {match[1] for _, parent, text in stated if parent is None and (match := _FILE.search(text))}
    holding = defaultdict(set)
    held = select(ContentRow.sha256, ContentRow.artifact).join(VersionRow, VersionRow.artifact == ContentRow.artifact)
    for digest, artifact in _rows_in_batches(session, held, ContentRow.sha256, files):
        holding[digest].add(artifact)
    for artifact, parent, text in stated:
        match = _FILE.search(text)
        sources = {by_id[parent]} if parent is not None else holding.get(match[1], set()) if match else set()
        for source in sorted(sources):
            yield NodeId("artifact", artifact), NodeId("artifact", source)
        if not sources:
            yield NodeId("artifact", artifact), NodeId("origin", text)


def _versions_of(session: Session, artifacts: Iterable[str]) -> dict[str, tuple[AdapterVersion, ...]]:
    rows = list(_in_batches(session, select(VersionRow).order_by(VersionRow.id), VersionRow.artifact, artifacts))
    found: dict[str, tuple[AdapterVersion, ...]] = {}
    for version in queries.entities(session, rows):
        found[version.artifact.sha256] = (*found.get(version.artifact.sha256, ()), version)
    return found


def _datasets(parents: Mapping[NodeId, set[NodeId]], rows: Mapping[str, ArtifactRow]) -> tuple[ArtifactRef, ...]:
    """Not what a later dataset was made from: a picture that was left out on the way takes no part."""

    def is_dataset(node: NodeId) -> bool:
        return node.kind == "artifact" and node.id in rows and rows[node.id].kind == "manifest"

    inner = {step for node, steps in parents.items() if is_dataset(node) for step in steps}
    used = {
        source.id
        for node, sources in parents.items()
        if node.kind == "execution" and node not in inner
        for source in sources
        if is_dataset(source)
    }
    return tuple(artifact_ref(rows[digest]) for digest in sorted(used))


def _in_batches(session: Session, query: Any, column: Any, wanted: Iterable[Any]) -> Iterator[Any]:
    for row in _rows_in_batches(session, query, column, wanted):
        yield row[0]


def _rows_in_batches(session: Session, query: Any, column: Any, wanted: Iterable[Any]) -> Iterator[Sequence[Any]]:
    values = sorted(wanted)
    for begin in range(0, len(values), _BATCH):
        yield from session.execute(query.where(column.in_(values[begin : begin + _BATCH])))
