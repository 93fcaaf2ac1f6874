"""Collects everything upstream of a version as one graph of artifacts and steps. Reads rows only."""

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
    """The upstream graph of a version. Versions of the same artifact share one node, because they share its bytes.

    Args:
        root: The artifact of the version.
        parents: Node -> its direct upstream nodes.
        versions: Digest of an upstream artifact -> the versions that it was registered as.
        settings: Id of an upstream execution -> its settings.
        datasets: The datasets that steps other than dataset steps consumed.
        manifests: Digests of all upstream datasets.
    """

    root: NodeId
    parents: Mapping[NodeId, frozenset[NodeId]]
    versions: Mapping[str, tuple[AdapterVersion, ...]]
    settings: Mapping[str, Mapping[str, Any]]
    datasets: tuple[ArtifactRef, ...]
    manifests: frozenset[str]

    @property
    def nodes(self) -> frozenset[NodeId]:
        """All upstream nodes and the root."""
        return frozenset({self.root, *self.parents, *(node for sources in self.parents.values() for node in sources)})

    @property
    def ancestors(self) -> tuple[AdapterVersion, ...]:
        """The upstream versions whose bytes differ from the root's."""
        others = (versions for digest, versions in self.versions.items() if digest != self.root.id)
        return tuple(version for versions in others for version in versions)


def trace(session: Session, artifact: ArtifactRef) -> Ancestry:
    """Returns the upstream graph of an artifact, through steps and through the parents that its versions declare.

    Args:
        session: Reading or writing; rows that it added are included.
        artifact: The adapter's tree; must be recorded.
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
        for child, source in _declared_parents(session, known):
            if child != source:
                parents[child].add(source)
        waiting = {node.id for sources in parents.values() for node in sources if node.kind == "artifact"} - known
    rows = {row.sha256: row for row in _in_batches(session, select(ArtifactRow), ArtifactRow.sha256, known)}
    steps = {node.id for sources in parents.values() for node in sources if node.kind == "execution"}
    return Ancestry(
        root,
        {node: frozenset(sources) for node, sources in parents.items()},
        _versions_of(session, known),
        {row.id: row.settings for row in _in_batches(session, select(ExecutionRow), ExecutionRow.id, steps)},
        _datasets(parents, rows),
        frozenset(digest for digest, row in rows.items() if row.kind == "manifest"),
    )


def held_subjects(session: Session, subjects: Collection[str], artifacts: Collection[str]) -> frozenset[str]:
    """Returns the subjects that one of the artifacts contains."""
    candidates = list(subjects)
    matches: set[str] = set()
    for begin in range(0, len(candidates), _BATCH):
        query = select(SubjectRow.subject).where(SubjectRow.subject.in_(candidates[begin : begin + _BATCH])).distinct()
        matches.update(_in_batches(session, query, SubjectRow.artifact, artifacts))
    return frozenset(matches)


def _declared_parents(session: Session, artifacts: Iterable[str]) -> Iterator[tuple[NodeId, NodeId]]:
    """Yields (artifact, parent that a version of it declares); versions and files resolve to their artifacts."""
    query = select(VersionRow.artifact, ParentRow.parent, ParentRow.text).join(
        ParentRow, ParentRow.child == VersionRow.id
    )
    declared = list(_rows_in_batches(session, query, VersionRow.artifact, artifacts))
    ids = {parent for _, parent, _ in declared if parent is not None}
    linked = _rows_in_batches(session, select(VersionRow.id, VersionRow.artifact), VersionRow.id, ids)
    by_id: dict[int, str] = {row[0]: row[1] for row in linked}
    files = {match[1] for _, parent, text in declared if parent is None and (match := _FILE.search(text))}
    by_file = defaultdict(set)
    contents = select(ContentRow.sha256, ContentRow.artifact).join(
        VersionRow, VersionRow.artifact == ContentRow.artifact
    )
    for digest, artifact in _rows_in_batches(session, contents, ContentRow.sha256, files):
        by_file[digest].add(artifact)
    for artifact, parent, text in declared:
        match = _FILE.search(text)
        sources = {by_id[parent]} if parent is not None else by_file.get(match[1], set()) if match else set()
        for source in sorted(sources):
            yield NodeId("artifact", artifact), NodeId("artifact", source)
        if not sources:
            yield NodeId("artifact", artifact), NodeId("origin", text)


def _versions_of(session: Session, artifacts: Iterable[str]) -> dict[str, tuple[AdapterVersion, ...]]:
    rows = list(_in_batches(session, select(VersionRow).order_by(VersionRow.id), VersionRow.artifact, artifacts))
    versions: dict[str, tuple[AdapterVersion, ...]] = {}
    for version in queries.entities(session, rows):
        versions[version.artifact.sha256] = (*versions.get(version.artifact.sha256, ()), version)
    return versions


def _datasets(parents: Mapping[NodeId, set[NodeId]], rows: Mapping[str, ArtifactRow]) -> tuple[ArtifactRef, ...]:
    """Returns the datasets that non-dataset steps consumed, since an image dropped in between was not used."""

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


def _in_batches(session: Session, query: Any, column: Any, values: Iterable[Any]) -> Iterator[Any]:
    for row in _rows_in_batches(session, query, column, values):
        yield row[0]


def _rows_in_batches(session: Session, query: Any, column: Any, values: Iterable[Any]) -> Iterator[Sequence[Any]]:
    ordered = sorted(values)
    for begin in range(0, len(ordered), _BATCH):
        yield from session.execute(query.where(column.in_(ordered[begin : begin + _BATCH])))
