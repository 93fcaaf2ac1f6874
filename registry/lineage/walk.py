"""Walks the lineage graph breadth-first over database indexes; the cost depends on the size of the result."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

from sqlalchemy import ColumnElement, Row, Select, String, cast, func, select
from sqlalchemy.orm import InstrumentedAttribute, Session, aliased

from registry.errors import LineageError
from registry.store.tables import (
    AliasRow,
    ArtifactRow,
    ContentRow,
    ExecutionRow,
    InputRow,
    ParentRow,
    RunRow,
    SubjectRow,
    VersionRow,
)

Direction = Literal["up", "down"]
NodeKind = Literal["subject", "file", "artifact", "execution", "run", "version", "origin"]

_BATCH = 500
_PREFIX = 6


def _ref(table: type[VersionRow]) -> ColumnElement[str]:
    return table.name + "@" + cast(table.version, String)


_REF = _ref(VersionRow)


class NodeId(NamedTuple):
    """Kind and id of a node; the id is a digest, an id, `name@version` or free text."""

    kind: NodeKind
    id: str


@dataclass(frozen=True)
class Node:
    """A node of the graph.

    Args:
        kind: Kind of the node.
        id: Digest, id, `name@version` or free text.
        depth: Number of edges from the start.
        label: Display text.
        detail: Values of its row.
    """

    kind: NodeKind
    id: str
    depth: int
    label: str = ""
    detail: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Edge:
    """An edge from an upstream `source` to its `target`, in either walk direction; `role` is the role of the source."""

    source: NodeId
    target: NodeId
    role: str


@dataclass(frozen=True)
class Walk:
    """The result of a walk: nodes sorted by distance, and the edges between them."""

    start: NodeId
    direction: Direction
    nodes: tuple[Node, ...] = field(repr=False)
    edges: tuple[Edge, ...] = field(repr=False)

    def to_mermaid(self) -> str:
        """Returns the graph as a Mermaid flowchart, which GitHub and notebooks render."""
        from registry.lineage.mermaid import to_mermaid

        return to_mermaid(self)


def walk(session: Session, start: str, direction: Direction, *, subjects: bool = False) -> Walk:
    """Walks from the node that `start` names; see `Lineage.walk`."""
    first = resolve(session, start)
    step = _up if direction == "up" else _down
    depths: dict[NodeId, int] = {first: 0}
    edges: dict[Edge, None] = {}
    level, depth = [first], 0
    if first.kind == "version" and direction == "down":
        # The downstream of a version includes the downstream of its artifact, under any name.
        for edge in _version_edges(session, [first.id]):
            if edge.role == "adapter":
                edges[edge] = None
                depths[edge.source] = 0
                level.append(edge.source)
    while level:
        depth += 1
        reached: list[NodeId] = []
        for edge in step(session, _by_kind(level), subjects):
            edges[edge] = None
            for node in (edge.source, edge.target):
                if node not in depths:
                    depths[node] = depth
                    reached.append(node)
        level = reached
    described = _describe(session, depths) | _describe_subjects(session, first, edges)
    nodes = tuple(Node(*node, depths[node], *described.get(node, ("", {}))) for node in depths)
    return Walk(first, direction, nodes, tuple(edges))


def resolve(session: Session, start: str) -> NodeId:
    """Returns the node that a digest, a prefix of one, an id or `name@ref` names.

    Raises:
        LineageError: No node, or more than one, has that name.
    """
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
    if len(start) >= _PREFIX:
        for kind, column in candidates:
            # A range, not LIKE: it uses the index on every database.
            query = select(column).where(column >= start, column < start + "\uffff").distinct().limit(3)
            matches += [NodeId(kind, value) for value in session.scalars(query)]
    if len({node.id for node in matches}) == 1:
        return matches[0]
    if matches:
        listed = ", ".join(f"{node.kind} {node.id[:16]}" for node in matches)
        raise LineageError(f"{start!r} is ambiguous: it is a prefix of {listed}", remedy="use more digits")
    raise LineageError(
        f"nothing matches {start!r}",
        allowed=f"a digest (or its first {_PREFIX} digits), a run's id, name@version or name@alias",
        remedy="`loraline list` shows what is registered",
    )


def _is_name(session: Session, name: str) -> bool:
    return session.scalar(select(VersionRow.id).where(VersionRow.name == name).limit(1)) is not None


def _is_subject(session: Session, subject: str) -> bool:
    return session.scalar(select(SubjectRow.subject).where(SubjectRow.subject == subject).limit(1)) is not None


def _version_number(session: Session, name: str, ref: str) -> int:
    aliases = select(AliasRow.version).where(AliasRow.name == name, AliasRow.alias == ref)
    latest = select(func.max(VersionRow.version)).where(VersionRow.name == name)
    number = int(ref) if ref.isdecimal() else session.scalar(latest if ref == "latest" else aliases)
    row_id = session.scalar(select(VersionRow.id).where(VersionRow.name == name, VersionRow.version == number))
    if number is None or row_id is None:
        raise LineageError(f"no version {name}@{ref}", remedy="`loraline list` shows what is registered")
    return number


def _up(session: Session, level: Mapping[NodeKind, list[str]], subjects: bool) -> Iterator[Edge]:
    done = ExecutionRow.status == "COMPLETED"
    outputs = select(ExecutionRow.id, ExecutionRow.output).where(done)
    yield from _edges(
        session, outputs, ExecutionRow.output, level["artifact"], ("execution", "artifact"), role="output"
    )
    inputs = select(InputRow.artifact, InputRow.execution, InputRow.role).order_by(
        InputRow.execution, InputRow.position
    )
    yield from _edges(session, inputs, InputRow.execution, level["execution"], ("artifact", "execution"))
    files = select(ContentRow.artifact, ContentRow.sha256, ContentRow.path)
    yield from _edges(session, files, ContentRow.sha256, level["file"], ("artifact", "file"))
    if subjects:
        query = select(SubjectRow.subject, SubjectRow.artifact, SubjectRow.label)
        yield from _edges(session, query, SubjectRow.artifact, level["artifact"], ("subject", "artifact"))
    yield from _run_edges(session, level["run"])
    yield from _version_edges(session, level["version"])


def _down(session: Session, level: Mapping[NodeKind, list[str]], _subjects: bool) -> Iterator[Edge]:
    done = ExecutionRow.status == "COMPLETED"
    subjects = select(SubjectRow.subject, SubjectRow.artifact, SubjectRow.label)
    yield from _edges(session, subjects, SubjectRow.subject, level["subject"], ("subject", "artifact"))
    files = select(ContentRow.sha256, ContentRow.artifact, ContentRow.path)
    yield from _edges(session, files, ContentRow.sha256, level["file"], ("file", "artifact"))
    inputs = (
        select(InputRow.artifact, InputRow.execution, InputRow.role)
        .join(ExecutionRow, ExecutionRow.id == InputRow.execution)
        .where(done)
    )
    yield from _edges(session, inputs, InputRow.artifact, level["artifact"], ("artifact", "execution"))
    outputs = select(ExecutionRow.id, ExecutionRow.output).where(done)
    yield from _edges(session, outputs, ExecutionRow.id, level["execution"], ("execution", "artifact"), role="output")
    for column, role in ((VersionRow.artifact, "adapter"), (VersionRow.report, "report")):
        yield from _edges(session, select(column, _REF), column, level["artifact"], ("artifact", "version"), role=role)
    yield from _run_edges(session, level["run"])
    if level["version"]:
        yield from _version_children(session, level["version"])


def _version_children(session: Session, refs: list[str]) -> Iterator[Edge]:
    parent = aliased(VersionRow)
    children = (
        select(_ref(parent), _REF)
        .join(ParentRow, ParentRow.parent == parent.id)
        .join(VersionRow, VersionRow.id == ParentRow.child)
    )
    yield from _edges(session, children, parent.id, _version_ids(session, refs), ("version", "version"), role="parent")


def _version_edges(session: Session, refs: list[str]) -> Iterator[Edge]:
    ids = _version_ids(session, refs)
    for column, role in ((VersionRow.artifact, "adapter"), (VersionRow.report, "report")):
        artifacts = select(column, _REF).where(column.is_not(None))
        yield from _edges(session, artifacts, VersionRow.id, ids, ("artifact", "version"), role=role)
    parents = select(ParentRow.parent, ParentRow.text, _REF).join(VersionRow, VersionRow.id == ParentRow.child)
    for parent, text, child in batched(session, parents.order_by(ParentRow.position), ParentRow.child, ids):
        source = NodeId("origin" if parent is None else "version", text)
        yield Edge(source, NodeId("version", child), "parent")


def _run_edges(session: Session, runs: list[str]) -> Iterator[Edge]:
    steps = select(ExecutionRow.run_id, ExecutionRow.id, ExecutionRow.step)
    yield from _edges(session, steps, ExecutionRow.run_id, runs, ("run", "execution"))


def _edges(
    session: Session,
    query: Select[Any],
    column: ColumnElement[Any] | InstrumentedAttribute[Any],
    values: list[Any],
    ends: tuple[NodeKind, NodeKind],
    *,
    role: str = "",
) -> Iterator[Edge]:
    """Yields the edges of a query of (source, target[, role]) for some values of an indexed column."""
    for row in batched(session, query, column, values):
        yield Edge(NodeId(ends[0], row[0]), NodeId(ends[1], row[1]), role or row[2])


def batched(
    session: Session,
    query: Select[Any],
    column: ColumnElement[Any] | InstrumentedAttribute[Any],
    values: Sequence[Any],
) -> Iterator[Row[Any]]:
    """Yields the rows of a query for any number of values of an indexed column."""
    for begin in range(0, len(values), _BATCH):
        yield from session.execute(query.where(column.in_(values[begin : begin + _BATCH])))


def _version_ids(session: Session, refs: list[str]) -> list[int]:
    by_name: dict[str, list[int]] = defaultdict(list)
    for ref in refs:
        name, _, number = ref.rpartition("@")
        by_name[name].append(int(number))
    ids: list[int] = []
    for name, numbers in by_name.items():
        query = select(VersionRow.id).where(VersionRow.name == name)
        ids += [row[0] for row in batched(session, query, VersionRow.version, numbers)]
    return ids


def _by_kind(level: Iterable[NodeId]) -> Mapping[NodeKind, list[str]]:
    kinds: dict[NodeKind, list[str]] = defaultdict(list)
    for node in level:
        kinds[node.kind].append(node.id)
    return kinds


def _describe(session: Session, nodes: Iterable[NodeId]) -> dict[NodeId, tuple[str, dict[str, Any]]]:
    kinds = _by_kind(nodes)
    described: dict[NodeId, tuple[str, dict[str, Any]]] = {}
    for (row,) in batched(session, select(ArtifactRow), ArtifactRow.sha256, kinds["artifact"]):
        described[NodeId("artifact", row.sha256)] = (row.kind, {"kind": row.kind, "size": row.size})
    for (row,) in batched(session, select(ExecutionRow), ExecutionRow.id, kinds["execution"]):
        detail = {"step": row.step, "uses": row.uses, "run": row.run_id, "status": row.status, "at": row.started_at}
        described[NodeId("execution", row.id)] = (f"{row.step} ({row.uses})", detail)
    for (row,) in batched(session, select(RunRow), RunRow.id, kinds["run"]):
        described[NodeId("run", row.id)] = (row.name, {"status": row.status, "at": row.started_at})
    ids = _version_ids(session, kinds["version"])
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
