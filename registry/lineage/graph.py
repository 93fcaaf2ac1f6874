"""Searches the lineage graph breadth-first over database indexes; the cost depends on the size of the result.

`upstream` and `downstream` are the only searches. A caller names the relations to follow, and filters the result.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

from sqlalchemy import ColumnElement, Select, String, cast, literal_column, select, tuple_
from sqlalchemy.orm import InstrumentedAttribute, Session, aliased

from registry.refs import can_exist, split_ref, version_number
from registry.store.database import batched
from registry.store.tables import ContentRow, ExecutionRow, InputRow, ParentRow, SubjectRow, VersionRow

RESULT_PARENT = re.compile(r"result of [\w-]+ artifact:([0-9a-f]{64})")
"""Parent of a version that is an artifact itself, which an import found by its bytes or content."""
NodeKind = Literal["subject", "file", "artifact", "execution", "run", "version", "origin"]


class NodeId(NamedTuple):
    """Kind and id of a node; the id is a digest, an id, `name@version` or free text."""

    kind: NodeKind
    id: str


@dataclass(frozen=True)
class Edge:
    """An edge from an upstream `source` to its `target`, in either direction; `role` is the role of the source."""

    source: NodeId
    target: NodeId
    role: str


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


class Relation(NamedTuple):
    """Edges of one kind, in one direction: `find` yields those of some nodes of `kind`, by the nodes' ids."""

    kind: NodeKind
    find: Callable[[Session, Sequence[str]], Iterable[Edge]]


@dataclass(frozen=True)
class Subgraph:
    """The result of a search.

    Args:
        depths: Node -> number of edges from the nearest start along named relations, in the order of the search.
        edges: The edges between the nodes, in the order of the search.
    """

    depths: dict[NodeId, int]
    edges: tuple[Edge, ...]

    def ids(self, kind: NodeKind) -> list[str]:
        """Returns the ids of the nodes of one kind, in the order of the search."""
        return [node.id for node in self.depths if node.kind == kind]

    def sources(self) -> dict[NodeId, set[NodeId]]:
        """Returns node -> its direct upstream nodes, for every node that has some."""
        sources: dict[NodeId, set[NodeId]] = defaultdict(set)
        for edge in self.edges:
            sources[edge.target].add(edge.source)
        return dict(sources)


def upstream(session: Session, starts: Iterable[NodeId], *names: str, extra: Iterable[Relation] = ()) -> Subgraph:
    """Returns the starts and everything upstream of them, along relations of `UPSTREAM` and extra ones."""
    return _search(session, starts, [UPSTREAM[name] for name in names], list(extra))


def downstream(session: Session, starts: Iterable[NodeId], *names: str, extra: Iterable[Relation] = ()) -> Subgraph:
    """Returns the starts and everything downstream of them, along relations of `DOWNSTREAM` and extra ones."""
    return _search(session, starts, [DOWNSTREAM[name] for name in names], list(extra))


def ids_by_kind(nodes: Iterable[NodeId]) -> dict[NodeKind, list[str]]:
    """Returns kind -> ids of the nodes of that kind; an absent kind has none."""
    kinds: dict[NodeKind, list[str]] = defaultdict(list)
    for node in nodes:
        kinds[node.kind].append(node.id)
    return kinds


def version_ref(table: type[VersionRow] = VersionRow) -> ColumnElement[str]:
    """Returns the SQL expression of `name@version`."""
    return table.name + "@" + cast(table.version, String)


def version_ids(session: Session, refs: Iterable[str]) -> list[int]:
    """Returns the row ids of versions by `name@version`."""
    parts = (split_ref(ref) for ref in refs if isinstance(ref, str))
    numbered = ((name, version_number(ref)) for name, ref in parts if can_exist(name, ref))
    pairs = [(name, number) for name, number in numbered if number is not None]
    rows = batched(session, select(VersionRow.id), tuple_(VersionRow.name, VersionRow.version), pairs)
    return [row[0] for row in rows]


def _search(
    session: Session, starts: Iterable[NodeId], named: Sequence[Relation], extra: Sequence[Relation]
) -> Subgraph:
    depths = dict.fromkeys(starts, 0)
    edges: dict[Edge, None] = {}
    new, waiting, depth = list(depths), list[NodeId](), 0
    while new or waiting:
        # Each search of a level costs a query: extra relations wait until the named ones find nothing more.
        if new:
            relations, ids = named, ids_by_kind(new)
            waiting += new
        else:
            relations, ids = extra, ids_by_kind(waiting)
            waiting = []
        new, depth = [], depth + 1
        for relation in relations:
            for edge in relation.find(session, ids[relation.kind]):
                edges[edge] = None
                for node in (edge.source, edge.target):
                    if node not in depths:
                        depths[node] = depth
                        new.append(node)
    return Subgraph(depths, tuple(edges))


def _lookup(
    ends: tuple[NodeKind, NodeKind], query: Select[Any], column: InstrumentedAttribute[Any], kind: NodeKind
) -> Relation:
    """Returns the relation of a query of (source, target, role), where `column` holds the ids of nodes of `kind`."""

    def find(session: Session, ids: Sequence[str]) -> Iterator[Edge]:
        for source, target, role in batched(session, query, column, ids):
            yield Edge(NodeId(ends[0], source), NodeId(ends[1], target), role)

    return Relation(kind, find)


def _version_sources(session: Session, refs: Sequence[str]) -> Iterator[Edge]:
    ids = version_ids(session, refs)
    rows = list(batched(session, select(VersionRow.artifact, VersionRow.report, version_ref()), VersionRow.id, ids))
    yield from (Edge(NodeId("artifact", row[0]), NodeId("version", row[2]), "adapter") for row in rows)
    yield from (Edge(NodeId("artifact", row[1]), NodeId("version", row[2]), "report") for row in rows if row[1])
    parents = select(ParentRow.parent, ParentRow.text, version_ref()).join(VersionRow, VersionRow.id == ParentRow.child)
    for parent, text, child in batched(session, parents.order_by(ParentRow.position), ParentRow.child, ids):
        result = RESULT_PARENT.fullmatch(text) if parent is None else None
        source = NodeId("artifact", result[1]) if result else NodeId("origin" if parent is None else "version", text)
        yield Edge(source, NodeId("version", child), "parent")


def _version_children(session: Session, refs: Sequence[str]) -> Iterator[Edge]:
    parent = aliased(VersionRow)
    children = (
        select(version_ref(parent), version_ref())
        .join(ParentRow, ParentRow.parent == parent.id)
        .join(VersionRow, VersionRow.id == ParentRow.child)
    )
    for source, target in batched(session, children, parent.id, version_ids(session, refs)):
        yield Edge(NodeId("version", source), NodeId("version", target), "parent")


_COMPLETED = ExecutionRow.status == "COMPLETED"
_OUTPUTS: Select[Any] = select(ExecutionRow.id, ExecutionRow.output, literal_column("'output'")).where(_COMPLETED)
_INPUTS = select(InputRow.artifact, InputRow.execution, InputRow.role)
_USES = _INPUTS.join(ExecutionRow, ExecutionRow.id == InputRow.execution).where(_COMPLETED)
_IN_ORDER = _INPUTS.order_by(InputRow.execution, InputRow.position)
_FILES = select(ContentRow.artifact, ContentRow.sha256, ContentRow.path)
_HOLDERS = select(ContentRow.sha256, ContentRow.artifact, ContentRow.path)
_SUBJECTS = select(SubjectRow.subject, SubjectRow.artifact, SubjectRow.label)
_RUNS = select(ExecutionRow.run_id, ExecutionRow.id, ExecutionRow.step)
_ADAPTERS: Select[Any] = select(VersionRow.artifact, version_ref(), literal_column("'adapter'"))
_REPORTS: Select[Any] = select(VersionRow.report, version_ref(), literal_column("'report'"))
_RUN = _lookup(("run", "execution"), _RUNS, ExecutionRow.run_id, "run")

UPSTREAM = {
    "output": _lookup(("execution", "artifact"), _OUTPUTS, ExecutionRow.output, "artifact"),
    "input": _lookup(("artifact", "execution"), _IN_ORDER, InputRow.execution, "execution"),
    "file": _lookup(("artifact", "file"), _FILES, ContentRow.sha256, "file"),
    "subject": _lookup(("subject", "artifact"), _SUBJECTS, SubjectRow.artifact, "artifact"),
    "run": _RUN,
    "version": Relation("version", _version_sources),
}
"""Name -> relation that finds what a node was made from; a file is found in artifacts, a run consists of steps."""

DOWNSTREAM = {
    "subject": _lookup(("subject", "artifact"), _SUBJECTS, SubjectRow.subject, "subject"),
    "file": _lookup(("file", "artifact"), _HOLDERS, ContentRow.sha256, "file"),
    "input": _lookup(("artifact", "execution"), _USES, InputRow.artifact, "artifact"),
    "output": _lookup(("execution", "artifact"), _OUTPUTS, ExecutionRow.id, "execution"),
    "adapter": _lookup(("artifact", "version"), _ADAPTERS, VersionRow.artifact, "artifact"),
    "report": _lookup(("artifact", "version"), _REPORTS, VersionRow.report, "artifact"),
    "run": _RUN,
    "parent": Relation("version", _version_children),
}
"""Name -> relation that finds what was made from a node."""
