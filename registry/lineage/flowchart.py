"""Writes a lineage graph as text that other programs draw: Mermaid (https://mermaid.js.org) or Graphviz DOT."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

from registry.lineage.graph import Edge, Node, NodeId

_GROUP = 4
"""Minimum number of images or captions with the same edges that share one box."""
_LONGEST = 48
_SHAPES = {
    "subject": ("([", "])", "oval"),
    "origin": ("[/", "/]", "parallelogram"),
    "file": ("[", "]", "note"),
    "artifact": ("[(", ")]", "cylinder"),
    "execution": ("[[", "]]", "cds"),
    "run": ("{{", "}}", "hexagon"),
    "version": ("([", "])", "box"),
}
"""Node kind -> brackets of Mermaid, shape of Graphviz."""


def to_mermaid(nodes: Sequence[Node], edges: Sequence[Edge]) -> str:
    """Returns a graph as the text of a Mermaid flowchart; edges point downstream."""
    boxes, arrows = _boxes(nodes, edges)
    lines = ["flowchart LR"]
    for number, (kind, label) in enumerate(boxes):
        opening, closing, _ = _SHAPES[kind]
        lines.append(f'  n{number}{opening}"{_mermaid(label)}"{closing}')
    for source, target, role in arrows:
        lines.append(f"  n{source} -->" + (f'|"{_mermaid(role)}"|' if role else "") + f" n{target}")
    return "\n".join(lines) + "\n"


def to_dot(nodes: Sequence[Node], edges: Sequence[Edge]) -> str:
    """Returns a graph in the DOT language of Graphviz; edges point downstream."""
    boxes, arrows = _boxes(nodes, edges)
    lines = ["digraph lineage {", "  rankdir=LR;"]
    lines += [
        f"  n{number} [shape={_SHAPES[kind][2]}, label={_dot(label)}];" for number, (kind, label) in enumerate(boxes)
    ]
    for source, target, role in arrows:
        lines.append(f"  n{source} -> n{target}" + (f" [label={_dot(role)}];" if role else ";"))
    return "\n".join(lines) + "\n}\n"


def _boxes(nodes: Sequence[Node], edges: Sequence[Edge]) -> tuple[list[tuple[str, str]], list[tuple[int, int, str]]]:
    """Returns kind and label of each box, and (source, target, role) of each edge between boxes."""
    neighbors: dict[NodeId, set[tuple[str, NodeId]]] = defaultdict(set)
    for edge in edges:
        neighbors[edge.source].add(("to", edge.target))
        neighbors[edge.target].add(("from", edge.source))
    groups: dict[object, list[Node]] = defaultdict(list)
    for node in nodes:
        node_id = NodeId(node.kind, node.id)
        is_shared = node.kind == "subject"
        groups[(node.detail.get("kind"), frozenset(neighbors[node_id])) if is_shared else node_id].append(node)
    boxes: list[tuple[str, str]] = []
    numbers: dict[NodeId, int] = {}
    for group in groups.values():
        for members in [group] if len(group) >= _GROUP else [[node] for node in group]:
            numbers |= {NodeId(node.kind, node.id): len(boxes) for node in members}
            boxes.append((members[0].kind, _label(members)))
    # The role of an image or a caption repeats its label.
    arrows = (
        (numbers[edge.source], numbers[edge.target], "" if edge.source.kind == "subject" else edge.role)
        for edge in edges
    )
    return boxes, list(dict.fromkeys(arrows))


def _label(nodes: list[Node]) -> str:
    first = nodes[0]
    if len(nodes) > 1:
        return f"{len(nodes)} {first.detail.get('kind') or 'subject'}s"
    name = first.id if first.kind in ("version", "origin") else first.id[:12]
    return f"{first.label} {name}".strip() if first.label != first.id else first.label


def _shorten(text: str) -> str:
    short = " ".join(text.split())
    return short if len(short) <= _LONGEST else short[: _LONGEST - 1] + "…"


def _mermaid(text: str) -> str:
    # Mermaid reads HTML entities, and nothing else is an escape.
    return "".join(c if c.isalnum() or c in " .,_-:/@…" else f"#{ord(c)};" for c in _shorten(text))


def _dot(text: str) -> str:
    # A quoted string of DOT has backslash escapes and HTML entities.
    plain = "".join(c if c.isprintable() else "�" for c in _shorten(text))
    escaped = plain.replace("&", "&amp;").replace("\\", "\\\\").replace('"', '\\"')
    return f'"{escaped}"'
