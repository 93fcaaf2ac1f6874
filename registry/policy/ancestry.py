"""Collects what an artifact was made from, for rights, and what was made from versions, for deletion and revocation."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass
from typing import Any

from sqlalchemy import Select, select
from sqlalchemy.orm import Session

from registry import queries
from registry.entities import ADAPTER_KINDS, AdapterVersion, ArtifactRef
from registry.lineage.graph import (
    DOWNSTREAM,
    RESULT_PARENT,
    Edge,
    NodeId,
    Relation,
    Subgraph,
    downstream,
    upstream,
    version_ids,
    version_ref,
)
from registry.lineage.rows import read_artifacts
from registry.policy.consent import CONSENT_POLICIES, ConsentPolicy
from registry.store.database import batched
from registry.store.tables import ArtifactRow, ContentRow, ExecutionRow, InputRow, ParentRow, VersionRow

_REWRITES = {"merge", "convert", "resize", "export", "extract", "fuse"}
"""Steps that use no base, except a merge that learns its weights from a dataset."""
_BASE = "base:"
_FILE = re.compile(r"sha256:([0-9a-f]{64})")
_HOLDERS: Select[Any] = (
    select(ContentRow.sha256, ContentRow.artifact)
    .join(ArtifactRow, ArtifactRow.sha256 == ContentRow.artifact)
    .where(ArtifactRow.kind.in_(ADAPTER_KINDS))
)
_IMPORTED: Select[Any] = (
    select(ContentRow.sha256, ExecutionRow.output)
    .join(InputRow, InputRow.artifact == ContentRow.artifact)
    .join(ExecutionRow, ExecutionRow.id == InputRow.execution)
    .where(ExecutionRow.uses == "import", ExecutionRow.status == "COMPLETED")
)
"""Digest of an original file, and the adapter that it was imported as, to which the statements belong."""


@dataclass(frozen=True)
class Ancestry:
    """What a version was made from. Versions of the same artifact share one node, because they share its bytes.

    Args:
        root: The artifact of the version.
        graph: The upstream artifacts, steps and origins.
        versions: The versions that upstream artifacts were registered as, by their time of registration.
        settings: Id of an upstream execution -> its settings; without steps that only rewrite adapters, which carry the
            terms of their own bases.
        datasets: The datasets that steps other than dataset steps consumed.
        manifests: Digests of all upstream datasets.
        undocumented: The adapters for which no dataset and no parent is recorded: `name@version`, or a short digest.
    """

    root: NodeId
    graph: Subgraph
    versions: tuple[AdapterVersion, ...]
    settings: Mapping[str, Mapping[str, Any]]
    datasets: tuple[ArtifactRef, ...]
    manifests: frozenset[str]
    undocumented: tuple[str, ...] = ()

    @property
    def bases(self) -> frozenset[str]:
        """Names and fingerprints of the bases upstream, as steps, cards and parents state them."""
        described = [settings.get("base") or {} for settings in self.settings.values()]
        own = [(settings.get("settings") or {}).get("base") for settings in self.settings.values()]
        cards = [version.card for version in self.versions]
        origins = [text.removeprefix(_BASE).strip() for text in self.graph.ids("origin") if text.startswith(_BASE)]
        stated = [
            *(base.get(key) for base in described for key in ("label", "fingerprint")),
            *(card.get(key) for card in cards for key in ("base", "base_fingerprint")),
            *own,
            *origins,
        ]
        return frozenset(str(name) for name in stated if name)

    @property
    def consent_policies(self) -> frozenset[ConsentPolicy]:
        """The policies that ingest steps upstream set for consent."""
        stated = {(settings.get("settings") or {}).get("consent_policy") for settings in self.settings.values()}
        return frozenset(policy for policy in CONSENT_POLICIES if policy in stated)


def trace(session: Session, artifact: ArtifactRef) -> Ancestry:
    """Returns what an artifact was made from, through steps and through the parents that its versions declare.

    Args:
        session: Reading or writing; rows that it added are included.
        artifact: The adapter's tree; must be recorded.
    """
    root = NodeId("artifact", artifact.sha256)
    graph = upstream(session, [root], "output", "input", extra=[Relation("artifact", _declared_parents)])
    digests, steps = graph.ids("artifact"), graph.ids("execution")
    datasets = read_artifacts(session, digests, kind="manifest")
    adapters = read_artifacts(session, digests, kind="adapter")
    versions = [row for (row,) in batched(session, select(VersionRow), VersionRow.artifact, digests)]
    columns = select(ExecutionRow.id, ExecutionRow.uses, ExecutionRow.settings)
    trained = {edge.target.id for edge in graph.edges if edge.source.kind == "artifact" and edge.source.id in datasets}
    made = [
        row
        for row in batched(session, columns, ExecutionRow.id, steps)
        if row.uses not in _REWRITES or row.id in trained
    ]
    return Ancestry(
        root,
        graph,
        tuple(queries.entities(session, sorted(versions, key=lambda row: row.id))),
        {row.id: row.settings for row in made},
        _used_datasets(graph, datasets),
        frozenset(datasets),
        tuple(_undocumented(graph, {*datasets, *adapters}, adapters, {row.artifact: row for row in versions})),
    )


def _undocumented(
    graph: Subgraph, documents: Set[str], adapters: Iterable[str], versions: Mapping[str, VersionRow]
) -> Iterator[str]:
    """Yields the adapters that a step made from neither a dataset nor an adapter, or that have no origin at all."""
    sources = graph.sources()
    for digest in sorted(adapters):
        origins = sources.get(NodeId("artifact", digest), set())
        paths = [sources.get(node, set()) if node.kind == "execution" else {node} for node in origins]
        is_documented = [any(node.kind == "artifact" and node.id in documents for node in path) for path in paths]
        is_made = any(node.kind == "execution" for node in origins)
        checked = [
            known
            for node, known in zip(origins, is_documented, strict=True)
            # Other origins are parents by title: those of an artifact with steps are among the inputs of the steps.
            if node.kind != "origin" or not (is_made or node.id.startswith(_BASE))
        ]
        if not checked or not all(checked):
            row = versions.get(digest)
            yield f"{row.name}@{row.version}" if row else digest[:12]


def descendants(session: Session, starts: Iterable[NodeId]) -> Subgraph:
    """Returns what was made from artifacts; holds every version whose ancestry holds one of them.

    Args:
        session: Reading or writing.
        starts: The artifacts; the result holds them and the versions that they were registered as, too.
    """
    return downstream(session, starts, "input", "output", "adapter", "report", extra=_declared_children(session))


def _declared_parents(session: Session, artifacts: Sequence[str]) -> Iterator[Edge]:
    """Yields the parents that versions of artifacts declare; versions and files resolve to their artifacts."""
    parents = select(VersionRow.artifact, ParentRow.parent, ParentRow.text).join(
        ParentRow, ParentRow.child == VersionRow.id
    )
    declared = list(batched(session, parents, VersionRow.artifact, artifacts))
    ids = {parent for _, parent, _ in declared if parent is not None}
    by_id = {
        row.id: row.artifact for row in batched(session, select(VersionRow.id, VersionRow.artifact), VersionRow.id, ids)
    }
    files = {match[1] for _, parent, text in declared if parent is None and (match := _FILE.search(text))}
    by_file = defaultdict(set)
    for query in (_HOLDERS, _IMPORTED):
        for digest, artifact in batched(session, query, ContentRow.sha256, files):
            by_file[digest].add(artifact)
    for artifact, parent, text in declared:
        match, result = _FILE.search(text), RESULT_PARENT.fullmatch(text)
        if parent is not None:
            sources = {by_id[parent]}
        else:
            sources = {result[1]} if result else by_file.get(match[1], set()) if match else set()
        child = NodeId("artifact", artifact)
        yield from (Edge(NodeId("artifact", source), child, "parent") for source in sorted(sources - {artifact}))
        if not sources:
            yield Edge(NodeId("origin", text), child, "parent")


def _declared_children(session: Session) -> list[Relation]:
    """Returns the searches for the versions that declare a version, or a file of an artifact, as a parent."""
    query = select(ParentRow.text, version_ref()).join(VersionRow, VersionRow.id == ParentRow.child)
    by_file: dict[str, list[str]] = defaultdict(list)
    by_artifact: dict[str, list[str]] = defaultdict(list)
    for text, child in session.execute(query.where(ParentRow.parent.is_(None), ParentRow.text.contains(":"))):
        if result := RESULT_PARENT.fullmatch(text):
            by_artifact[result[1]].append(child)
        elif match := _FILE.search(text):
            by_file[match[1]].append(child)

    def of_versions(session: Session, refs: Sequence[str]) -> Iterator[Edge]:
        yield from _with_artifacts(session, DOWNSTREAM["parent"].find(session, refs))

    def of_artifacts(session: Session, artifacts: Sequence[str]) -> Iterator[Edge]:
        held: list[Any] = []
        if by_file:
            held += batched(session, _HOLDERS, ContentRow.artifact, artifacts)
            held += batched(session, _IMPORTED, ExecutionRow.output, artifacts)
        pairs = [(artifact, child) for digest, artifact in held for child in by_file[digest]]
        pairs += [(artifact, child) for artifact in artifacts for child in by_artifact.get(artifact, ())]
        edges = [Edge(NodeId("artifact", artifact), NodeId("version", child), "parent") for artifact, child in pairs]
        yield from _with_artifacts(session, edges)

    return [Relation("version", of_versions), Relation("artifact", of_artifacts)]


def _with_artifacts(session: Session, found: Iterable[Edge]) -> Iterator[Edge]:
    """Yields edges to versions, and those of their artifacts: what was made from them was made from the parent, too."""
    edges = list(found)
    yield from edges
    children = version_ids(session, {edge.target.id for edge in edges})
    for artifact, ref in batched(session, select(VersionRow.artifact, version_ref()), VersionRow.id, children):
        yield Edge(NodeId("artifact", artifact), NodeId("version", ref), "adapter")


def _used_datasets(graph: Subgraph, datasets: Mapping[str, ArtifactRef]) -> tuple[ArtifactRef, ...]:
    """Returns the datasets that non-dataset steps consumed, since an image dropped in between was not used."""
    inner = {edge.source for edge in graph.edges if edge.target.id in datasets}
    used = {edge.source.id for edge in graph.edges if edge.target.kind == "execution" and edge.target not in inner}
    return tuple(datasets[digest] for digest in sorted(used & datasets.keys()))
