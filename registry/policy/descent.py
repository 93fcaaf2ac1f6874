"""Collects everything downstream of versions and artifacts, for deletions and revocations."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass

from sqlalchemy import select
from sqlalchemy.orm import Session

from registry import queries
from registry.entities import AdapterVersion
from registry.lineage.walk import Edge, Node, NodeId, walk
from registry.store.tables import ParentRow, SubjectRow, VersionRow

_BATCH = 500
_FILE = re.compile(r"sha256:([0-9a-f]{64})$")


@dataclass(frozen=True)
class Descent:
    """The downstream graph of some versions or artifacts.

    Args:
        nodes: The starts and everything downstream of them.
        edges: The edges between the nodes.
        versions: The downstream versions.
    """

    nodes: dict[NodeId, Node]
    edges: tuple[Edge, ...]
    versions: tuple[AdapterVersion, ...]


def descendants(session: Session, starts: Iterable[AdapterVersion | str]) -> Descent:
    """Returns the downstream graph of versions or artifacts.

    Args:
        session: Reading or writing.
        starts: Versions, which the result does not list, or digests of artifacts.
    """
    listed = list(starts)
    own = {start.ref for start in listed if isinstance(start, AdapterVersion)}
    waiting = [start.ref if isinstance(start, AdapterVersion) else start for start in listed]
    children = _children_of_files(session)
    nodes: dict[NodeId, Node] = {}
    edges: dict[Edge, None] = {}
    known: set[str] = set()
    while waiting:
        start = waiting.pop()
        if start in known or NodeId("artifact", start) in nodes:
            continue  # an earlier walk visited it
        known.add(start)
        graph = walk(session, start, "down")
        edges |= dict.fromkeys(graph.edges)
        for node in graph.nodes:
            nodes.setdefault(NodeId(node.kind, node.id), node)
        refs = {node.id for node in graph.nodes if node.kind == "version"}
        if children:
            digests = {version.sha256 for version in _versions(session, refs)}
            waiting += [ref for digest in digests for ref in children.get(digest, ()) if ref not in refs]
    refs = {node.id for node in nodes if node.kind == "version"} - own
    return Descent(nodes, tuple(edges), tuple(_versions(session, refs)))


def holding(session: Session, subjects: Iterable[str]) -> list[str]:
    """Returns the sorted digests of the artifacts that contain one of the subjects."""
    ordered, artifacts = sorted(subjects), set[str]()
    for begin in range(0, len(ordered), _BATCH):
        query = select(SubjectRow.artifact).where(SubjectRow.subject.in_(ordered[begin : begin + _BATCH])).distinct()
        artifacts.update(session.scalars(query))
    return sorted(artifacts)


def _children_of_files(session: Session) -> dict[str, list[str]]:
    """Returns digest of an adapter file -> versions that name it as a parent in free text."""
    query = select(ParentRow.text, VersionRow.name, VersionRow.version).join(
        VersionRow, VersionRow.id == ParentRow.child
    )
    children: dict[str, list[str]] = defaultdict(list)
    for text, name, number in session.execute(
        query.where(ParentRow.parent.is_(None), ParentRow.text.contains("sha256:"))
    ):
        if match := _FILE.search(text):
            children[match[1]].append(f"{name}@{number}")
    return children


def _versions(session: Session, refs: Iterable[str]) -> list[AdapterVersion]:
    by_name: dict[str, list[int]] = defaultdict(list)
    for ref in refs:
        name, _, number = ref.rpartition("@")
        by_name[name].append(int(number))
    rows: list[VersionRow] = []
    for name, numbers in sorted(by_name.items()):
        for begin in range(0, len(numbers), _BATCH):
            query = select(VersionRow).where(
                VersionRow.name == name, VersionRow.version.in_(numbers[begin : begin + _BATCH])
            )
            rows += session.scalars(query.order_by(VersionRow.version)).all()
    return queries.entities(session, rows)
