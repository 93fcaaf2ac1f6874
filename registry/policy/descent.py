"""All that was made from something, in one walk down: what a deletion must respect and what a recall must reach."""

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
    """What was made from some versions or artifacts, with themselves.

    Args:
        nodes: Everything that was reached.
        edges: How.
        versions: The versions among it.
    """

    nodes: dict[NodeId, Node]
    edges: tuple[Edge, ...]
    versions: tuple[AdapterVersion, ...]


def descendants(session: Session, starts: Iterable[AdapterVersion | str]) -> Descent:
    """Everything that was made from versions or artifacts, directly or not.

    Args:
        session: Reading or writing.
        starts: Versions, which are not listed themselves, or digests of artifacts.
    """
    listed = list(starts)
    own = {each.ref for each in listed if isinstance(each, AdapterVersion)}
    waiting = [each.ref if isinstance(each, AdapterVersion) else each for each in listed]
    named = _made_from_files(session)
    nodes: dict[NodeId, Node] = {}
    edges: dict[Edge, None] = {}
    known: set[str] = set()
    while waiting:
        start = waiting.pop()
        if start in known or NodeId("artifact", start) in nodes:
            continue  # an earlier walk went through it
        known.add(start)
        found = walk(session, start, "down")
        edges |= dict.fromkeys(found.edges)
        for node in found.nodes:
            nodes.setdefault(NodeId(node.kind, node.id), node)
        refs = {node.id for node in found.nodes if node.kind == "version"}
        if named:
            digests = {version.sha256 for version in _versions(session, refs)}
            waiting += [ref for digest in digests for ref in named.get(digest, ()) if ref not in refs]
    refs = {node.id for node in nodes if node.kind == "version"} - own
    return Descent(nodes, tuple(edges), tuple(_versions(session, refs)))


def holding(session: Session, subjects: Iterable[str]) -> list[str]:
    """Digests of the artifacts that hold one of the subjects, sorted."""
    wanted, found = sorted(subjects), set[str]()
    for begin in range(0, len(wanted), _BATCH):
        query = select(SubjectRow.artifact).where(SubjectRow.subject.in_(wanted[begin : begin + _BATCH])).distinct()
        found.update(session.scalars(query))
    return sorted(found)


def _made_from_files(session: Session) -> dict[str, list[str]]:
    """Digest of an adapter file -> versions that name it as a parent in their own words."""
    query = select(ParentRow.text, VersionRow.name, VersionRow.version).join(
        VersionRow, VersionRow.id == ParentRow.child
    )
    named: dict[str, list[str]] = defaultdict(list)
    for text, name, number in session.execute(
        query.where(ParentRow.parent.is_(None), ParentRow.text.contains("sha256:"))
    ):
        if match := _FILE.search(text):
            named[match[1]].append(f"{name}@{number}")
    return named


def _versions(session: Session, refs: Iterable[str]) -> list[AdapterVersion]:
    numbers: dict[str, list[int]] = defaultdict(list)
    for ref in refs:
        name, _, number = ref.rpartition("@")
        numbers[name].append(int(number))
    rows: list[VersionRow] = []
    for name, wanted in sorted(numbers.items()):
        for begin in range(0, len(wanted), _BATCH):
            query = select(VersionRow).where(
                VersionRow.name == name, VersionRow.version.in_(wanted[begin : begin + _BATCH])
            )
            rows += session.scalars(query.order_by(VersionRow.version)).all()
    return queries.entities(session, rows)
