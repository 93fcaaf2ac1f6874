"""Draws a walk as an SVG image. Text from the database is always escaped. `layout` computes the positions."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from xml.sax.saxutils import escape

from registry.errors import LineageError
from registry.lineage.graph import NodeId
from registry.lineage.layout import GAP_X, GAP_Y, Edges, Key, Rect, layer, order, position
from registry.lineage.walk import Node, Walk

LIMIT = 400
"""Maximum number of boxes in one image."""
_GROUP = 4
_CHARACTER, _LINE, _PAD = 6.7, 15, 10
_LONGEST = 30
_STYLES = {
    "subject": ("#2e7d32", "#e8f5e9", "from outside: image, caption, consent"),
    "origin": ("#6d4c41", "#efebe9", "named origin"),
    "file": ("#546e7a", "#eceff1", "file in an artifact"),
    "artifact": ("#1565c0", "#e3f2fd", "artifact"),
    "execution": ("#616161", "#fafafa", "step"),
    "run": ("#7b1fa2", "#f3e5f5", "run"),
    "version": ("#e65100", "#fff3e0", "version"),
}
"""Node kind -> stroke color, fill color, text of the legend."""


@dataclass(frozen=True)
class Box:
    """One box of the image.

    Args:
        kind: Kind of the nodes in it.
        lines: Its two lines of text.
        title: Its tooltip, with the full digests.
    """

    kind: str
    lines: tuple[str, str]
    title: str

    @property
    def width(self) -> float:
        """Its width in pixels, for a monospaced font."""
        return max(map(len, self.lines)) * _CHARACTER + 2 * _PAD + (16 if self.kind in {"execution", "origin"} else 0)

    @property
    def height(self) -> float:
        """Its height in pixels."""
        return 2 * _LINE + _PAD


def draw(walk: Walk) -> bytes:
    """Returns a walk as an SVG image.

    Raises:
        LineageError: The walk has more than `LIMIT` boxes.
    """
    boxes, edges = _boxes(walk)
    if len(boxes) > LIMIT:
        raise LineageError(
            f"an image of {len(boxes)} boxes",
            allowed=f"at most {LIMIT}",
            remedy="start closer to the nodes of interest, or use the table or --json",
        )
    layers, wires = layer(boxes, edges)
    order(layers, [pair for wire in wires for pair in pairwise(wire)])
    rects, width, height = position(layers, {key: (box.width, box.height) for key, box in boxes.items()})
    start = next(key for key in boxes if key == walk.start or (isinstance(key, frozenset) and walk.start in key))
    parts = [_wire(wire, rects, boxes) for wire in wires]
    parts += [_box(box, *rects[key], is_start=key == start) for key, box in boxes.items()]
    kinds = [kind for kind in _STYLES if any(box.kind == kind for box in boxes.values())]
    legend, legend_width = _legend(kinds, height)
    width, height = max(width, legend_width), height + 40
    title = f"Lineage of {walk.start.id}, {'upstream' if walk.direction == 'up' else 'downstream'}"
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width:.0f}" height="{height:.0f}" '
        f'viewBox="0 0 {width:.0f} {height:.0f}" font-family="ui-monospace, Menlo, Consolas, monospace" font-size="11">'
        f"<title>{_text(title)}</title>"
        '<defs><marker id="arrow" viewBox="0 0 8 8" refX="8" refY="4" markerWidth="7" markerHeight="7" '
        'orient="auto"><path d="M0,0 L8,4 L0,8 z" fill="#78909c"/></marker></defs>'
        f'<rect width="{width:.0f}" height="{height:.0f}" fill="#ffffff"/>'
    )
    return "\n".join([head, *parts, *legend, "</svg>\n"]).encode()


def _boxes(walk: Walk) -> tuple[dict[Key, Box], Edges]:
    """Returns one box per node, and the edges between boxes; many subjects with the same edges share one box."""
    neighbors: dict[NodeId, set[tuple[NodeId, NodeId]]] = defaultdict(set)
    for edge in walk.edges:
        neighbors[edge.source].add((NodeId("subject", ""), edge.target))
        neighbors[edge.target].add((edge.source, NodeId("subject", "")))
    groups: dict[object, list[Node]] = defaultdict(list)
    for node in walk.nodes:
        node_id = NodeId(node.kind, node.id)
        group = (node.detail.get("kind"), frozenset(neighbors[node_id])) if node.kind == "subject" else node_id
        groups[group].append(node)
    boxes: dict[Key, Box] = {}
    keys: dict[NodeId, Key] = {}
    for nodes in groups.values():
        ids = [NodeId(node.kind, node.id) for node in nodes]
        if len(nodes) >= _GROUP:
            boxes[frozenset(ids)] = _group(nodes)
            keys |= dict.fromkeys(ids, frozenset(ids))
        else:
            boxes |= {node_id: _single(node) for node_id, node in zip(ids, nodes, strict=True)}
            keys |= {node_id: node_id for node_id in ids}
    edges = dict.fromkeys((keys[edge.source], keys[edge.target]) for edge in walk.edges)
    return boxes, [pair for pair in edges if pair[0] != pair[1]]


def _single(node: Node) -> Box:
    label = node.label or node.kind
    first, second = (node.id, label) if node.kind in {"version", "origin"} else (label, node.id[:16])
    if node.kind == "version" and not node.label:
        second = node.detail.get("sha256", "")[:16]
    return Box(node.kind, (_short(first), _short(second)), f"{node.kind} {node.id}\n{node.label}".strip())


def _group(nodes: list[Node]) -> Box:
    kind = str(nodes[0].detail.get("kind") or "subject")
    listed = "\n".join(f"{node.id}  {node.label}" for node in nodes)
    first, last = (node.label.removeprefix(f"{kind} ") for node in (nodes[0], nodes[-1]))
    return Box(nodes[0].kind, (f"{len(nodes)} {kind}s", _short(f"{_short(first, 12)} to {_short(last, 12)}")), listed)


def _wire(wire: list[Key], rects: Mapping[Key, Rect], boxes: Mapping[Key, Box]) -> str:
    left, top, width, height = rects[wire[0]]
    x, y = left + width, top + height / 2
    end = rects[wire[-1]]
    if end[0] < x:  # a back edge, from the left side to the right side
        x, y, to_x, to_y = left, y + height / 4, end[0] + end[2], end[1] + end[3] * 0.75
        path = [
            f"M{x:.1f},{y:.1f} C{x - GAP_X / 2:.1f},{y:.1f} {to_x + GAP_X / 2:.1f},{to_y:.1f} {to_x:.1f},{to_y:.1f}"
        ]
        wire = wire[:1]
    else:
        path = [f"M{x:.1f},{y:.1f}"]
    for key in wire[1:]:
        left, top, width, height = rects[key]
        to_y = top + height / 2
        bend = (left - x) / 2
        path.append(f"C{x + bend:.1f},{y:.1f} {left - bend:.1f},{to_y:.1f} {left:.1f},{to_y:.1f}")
        if key not in boxes:
            path.append(f"H{left + width:.1f}")
        x, y = left + width, to_y
    return f'<path d="{" ".join(path)}" fill="none" stroke="#90a4ae" stroke-width="1.2" marker-end="url(#arrow)"/>'


def _box(box: Box, left: float, top: float, width: float, height: float, *, is_start: bool) -> str:
    stroke, fill, _ = _STYLES[box.kind]
    style = f'fill="{fill}" stroke="{stroke}" stroke-width="{2.6 if is_start else 1.2}"'
    middle = left + width / 2
    text_styles = ('fill="#212121" font-weight="600"', 'fill="#546e7a"')
    lines = "".join(
        f'<text x="{middle:.1f}" y="{top + _PAD / 2 + _LINE * (number + 0.75):.1f}" text-anchor="middle" {text_style}>'
        f"{_text(text)}</text>"
        for number, (text, text_style) in enumerate(zip(box.lines, text_styles, strict=True))
    )
    return f"<g><title>{_text(box.title)}</title>{_shape(box.kind, left, top, width, height, style)}{lines}</g>"


def _shape(kind: str, left: float, top: float, width: float, height: float, style: str) -> str:
    right, bottom = left + width, top + height
    corners: Iterable[tuple[float, float]] = ()
    if kind == "execution":
        corners = (
            (left + 10, top),
            (right - 10, top),
            (right, top + height / 2),
            (right - 10, bottom),
            (left + 10, bottom),
            (left, top + height / 2),
        )
    elif kind == "origin":
        corners = ((left + 10, top), (right, top), (right - 10, bottom), (left, bottom))
    elif kind == "file":
        corners = ((left, top), (right - 9, top), (right, top + 9), (right, bottom), (left, bottom))
    if corners:
        points = " ".join(f"{x:.1f},{y:.1f}" for x, y in corners)
        return f'<polygon points="{points}" {style}/>'
    radius = {"subject": height / 2, "artifact": 6, "version": 0, "run": 12}[kind]
    style += f' rx="{radius}"' + (' stroke-dasharray="5 3"' if kind == "run" else "")
    return f'<rect x="{left:.1f}" y="{top:.1f}" width="{width:.1f}" height="{height:.1f}" {style}/>'


def _legend(kinds: list[str], top: float) -> tuple[list[str], float]:
    parts, left = [], float(GAP_Y)
    for kind in kinds:
        stroke, fill, label = _STYLES[kind]
        style = f'fill="{fill}" stroke="{stroke}" stroke-width="1.2"'
        parts.append(_shape(kind, left, top + 8, 30, 16, style))
        parts.append(f'<text x="{left + 38:.1f}" y="{top + 20:.1f}" fill="#546e7a">{_text(label)}</text>')
        left += 38 + len(label) * _CHARACTER + 24
    return parts, left


def _short(text: str, length: int = _LONGEST) -> str:
    return text if len(text) <= length else f"{text[: length - 1]}…"


def _text(text: str) -> str:
    # XML forbids control characters, even escaped ones.
    return escape("".join(char if char.isprintable() or char == "\n" else "�" for char in text))
