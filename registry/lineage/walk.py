"""Walks lineage from one node, upstream or downstream, and describes every node on the way."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from sqlalchemy import func, select
from sqlalchemy.orm import InstrumentedAttribute, Session

from registry.errors import LineageError
from registry.lineage import flowchart
from registry.lineage.graph import (
    DOWNSTREAM,
    UPSTREAM,
    Edge,
    Node,
    NodeId,
    NodeKind,
    downstream,
    ids_by_kind,
    upstream,
    version_ids,
)
from registry.refs import LATEST, can_exist, is_unicode, version_number
from registry.store.database import batched, begins_with
from registry.store.tables import AliasRow, ArtifactRow, ContentRow, ExecutionRow, RunRow, SubjectRow, VersionRow

Direction = Literal["up", "down"]
LEAST_DIGITS = 6
"""Minimum number of digits that identify a digest."""


@dataclass(frozen=True)
class Walk:
    """The result of a walk: nodes sorted by distance, and the edges between them."""

    start: NodeId
    direction: Direction
    nodes: tuple[Node, ...] = field(repr=False)
    edges: tuple[Edge, ...] = field(repr=False)

    def to_mermaid(self) -> str:
        """Returns the graph as a Mermaid flowchart, which GitHub and notebooks render."""
        return flowchart.to_mermaid(self.nodes, self.edges)

    def to_dot(self) -> str:
        """Returns the graph in the DOT language, which Graphviz draws as SVG, PNG or PDF."""
        return flowchart.to_dot(self.nodes, self.edges)


def join_walks(walks: Sequence[Walk]) -> Walk:
    """Returns the nodes and edges of several walks; a node has the least of its distances."""
    nodes: dict[NodeId, Node] = {}
    for node in (node for walk in walks for node in walk.nodes):
        key = NodeId(node.kind, node.id)
        if key not in nodes or node.depth < nodes[key].depth:
            nodes[key] = node
    edges = dict.fromkeys(edge for walk in walks for edge in walk.edges)
    ordered = sorted(nodes.values(), key=lambda node: node.depth)
    return Walk(walks[0].start, walks[0].direction, tuple(ordered), tuple(edges))


def walk(session: Session, start: str, direction: Direction, *, subjects: bool = False) -> Walk:
    """Walks from the node that `start` names; see `Lineage.walk`."""
    first = resolve(session, start)
    own: list[Edge] = []
    if direction == "up":
        graph = upstream(session, [first], *(name for name in UPSTREAM if subjects or name != "subject"))
    else:
        if first.kind == "version":
            # The downstream of a version includes the downstream of its artifact, under any name.
            row = session.get_one(VersionRow, version_ids(session, [first.id])[0])
            own.append(Edge(NodeId("artifact", row.artifact), first, "adapter"))
        graph = downstream(session, [first, *(edge.source for edge in own)], *DOWNSTREAM)
    edges = tuple(dict.fromkeys([*own, *graph.edges]))
    described = _describe(session, graph.depths) | _describe_subjects(session, first, edges)
    nodes = tuple(Node(*node, depth, *described.get(node, ("", {}))) for node, depth in graph.depths.items())
    return Walk(first, direction, nodes, edges)


def resolve(session: Session, start: str) -> NodeId:
    """Returns the node that a digest, a prefix of one, an id or `name@ref` names.

    Raises:
        LineageError: No node, or more than one, has that name.
    """
    if not is_unicode(start):
        raise LineageError(f"nothing has the name {start[:64]!r}", remedy="`loraline list` shows what is registered")
    name, at, ref = start.rpartition("@")
    # The id of a consent may be an e-mail address, which looks like a version.
    if at and (_is_name(session, name) or not _is_subject(session, start)):
        return NodeId("version", f"{name}@{_version_number(session, name, ref)}")
    if session.get(RunRow, start) is not None:
        return NodeId("run", start)
    if session.get(ExecutionRow, start) is not None:
        return NodeId("execution", start)
    candidates: list[tuple[NodeKind, InstrumentedAttribute[str]]] = [
        ("artifact", ArtifactRow.sha256),
        ("file", ContentRow.sha256),
        ("subject", SubjectRow.subject),
    ]
    for kind, column in candidates:
        if session.scalar(select(column).where(column == start).limit(1)) is not None:
            return NodeId(kind, start)
    return _resolve_prefix(session, start, candidates)


def _resolve_prefix(
    session: Session, start: str, candidates: list[tuple[NodeKind, InstrumentedAttribute[str]]]
) -> NodeId:
    matches: list[NodeId] = []
    if len(start) >= LEAST_DIGITS:
        for kind, column in candidates:
            query = select(column).where(begins_with(column, start)).distinct().limit(3)
            matches += [NodeId(kind, value) for value in session.scalars(query)]
    if len({node.id for node in matches}) == 1:
        return matches[0]
    if matches:
        listed = ", ".join(f"{node.kind} {node.id[:16]}" for node in matches)
        raise LineageError(f"{start!r} is ambiguous: it is a prefix of {listed}", remedy="use more digits")
    raise LineageError(
        f"nothing matches {start!r}",
        allowed=f"a digest (or its first {LEAST_DIGITS} digits), a run's id, name@version or name@alias",
        remedy="`loraline list` shows what is registered",
    )


def _is_name(session: Session, name: str) -> bool:
    return session.scalar(select(VersionRow.id).where(VersionRow.name == name).limit(1)) is not None


def _is_subject(session: Session, subject: str) -> bool:
    return session.scalar(select(SubjectRow.subject).where(SubjectRow.subject == subject).limit(1)) is not None


def _version_number(session: Session, name: str, ref: str) -> int:
    aliases = select(AliasRow.version).where(AliasRow.name == name, AliasRow.alias == ref)
    latest = select(func.max(VersionRow.version)).where(VersionRow.name == name)
    number = version_number(ref)
    if number is None and can_exist(name, ref):
        number = session.scalar(latest if ref == LATEST else aliases)
    row_id = session.scalar(select(VersionRow.id).where(VersionRow.name == name, VersionRow.version == number))
    if number is None or row_id is None:
        raise LineageError(f"no version {f'{name}@{ref}'[:128]!r}", remedy="`loraline list` shows what is registered")
    return number


def _describe(session: Session, nodes: Iterable[NodeId]) -> dict[NodeId, tuple[str, dict[str, Any]]]:
    kinds = ids_by_kind(nodes)
    described: dict[NodeId, tuple[str, dict[str, Any]]] = {}
    for (row,) in batched(session, select(ArtifactRow), ArtifactRow.sha256, kinds["artifact"]):
        described[NodeId("artifact", row.sha256)] = (row.kind, {"kind": row.kind, "size": row.size})
    for (row,) in batched(session, select(ExecutionRow), ExecutionRow.id, kinds["execution"]):
        detail = {"step": row.step, "uses": row.uses, "run": row.run_id, "status": row.status, "at": row.started_at}
        described[NodeId("execution", row.id)] = (f"{row.step} ({row.uses})", detail)
    for (row,) in batched(session, select(RunRow), RunRow.id, kinds["run"]):
        described[NodeId("run", row.id)] = (row.name, {"status": row.status, "at": row.started_at})
    ids = version_ids(session, kinds["version"])
    aliases = _aliases(session, kinds["version"])
    for (row,) in batched(session, select(VersionRow), VersionRow.id, ids):
        ref = f"{row.name}@{row.version}"
        detail = {"sha256": row.sha256, "aliases": aliases[ref], "at": row.created_at, "state": row.state}
        described[NodeId("version", ref)] = (", ".join(aliases[ref]), detail)
    return described


def _aliases(session: Session, refs: list[str]) -> Mapping[str, list[str]]:
    """Returns `name@version` -> the sorted aliases that point at it."""
    aliases: dict[str, list[str]] = defaultdict(list)
    query = select(AliasRow.name, AliasRow.alias, AliasRow.version).order_by(AliasRow.name, AliasRow.alias)
    for name, alias, number in batched(session, query, AliasRow.name, sorted({ref.rpartition("@")[0] for ref in refs})):
        if isinstance(alias, str):  # a damaged one is named by `fsck`
            aliases[f"{name}@{number}"].append(alias)
    return aliases


def _describe_subjects(
    session: Session, first: NodeId, edges: Iterable[Edge]
) -> dict[NodeId, tuple[str, dict[str, Any]]]:
    """Returns label and detail of subjects; reads one row each, even for a subject in every artifact."""
    artifacts: dict[str, str] = {}
    for edge in edges:
        if edge.source.kind == "subject":
            artifacts.setdefault(edge.source.id, edge.target.id)
    if first.kind == "subject" and not artifacts:
        query = select(SubjectRow.artifact).where(SubjectRow.subject == first.id).limit(1)
        artifacts[first.id] = session.scalar(query) or ""
    by_artifact: dict[str, list[str]] = defaultdict(list)
    for subject, artifact in artifacts.items():
        by_artifact[artifact].append(subject)
    rows = [
        row
        for artifact, subjects in by_artifact.items()
        for (row,) in batched(
            session, select(SubjectRow).where(SubjectRow.artifact == artifact), SubjectRow.subject, subjects
        )
    ]
    return {NodeId("subject", row.subject): (row.label, {"kind": row.kind, "artifact": row.artifact}) for row in rows}
