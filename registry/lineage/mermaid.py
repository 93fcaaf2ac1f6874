"""Writes a lineage graph as a Mermaid flowchart (https://mermaid.js.org), which GitHub and notebooks render."""

from __future__ import annotations

from registry.lineage.graph import NodeId
from registry.lineage.walk import Node, Walk

_SHAPES = {
    "subject": ("([", "])"),
    "origin": ("[/", "/]"),
    "file": ("[", "]"),
    "artifact": ("[(", ")]"),
    "execution": ("[[", "]]"),
    "run": ("{{", "}}"),
    "version": ("([", "])"),
}
_LONGEST = 48


def to_mermaid(walk: Walk) -> str:
    """Returns a graph as the text of a Mermaid flowchart; edges point downstream."""
    names = {NodeId(node.kind, node.id): f"n{number}" for number, node in enumerate(walk.nodes)}
    lines = ["flowchart LR"]
    lines += [f"  {names[NodeId(node.kind, node.id)]}{_shape(node)}" for node in walk.nodes]
    lines += [f"  {names[edge.source]} -->{_role(edge.role)} {names[edge.target]}" for edge in walk.edges]
    return "\n".join(lines) + "\n"


def _shape(node: Node) -> str:
    opening, closing = _SHAPES[node.kind]
    name = node.id if node.kind in ("version", "origin") else node.id[:12]
    label = f"{node.label} {name}".strip() if node.label != node.id else node.label
    return f'{opening}"{_text(label)}"{closing}'


def _role(role: str) -> str:
    return f'|"{_text(role)}"|' if role else ""


def _text(text: str) -> str:
    # Mermaid reads HTML entities, and nothing else is an escape.
    short = text if len(text) <= _LONGEST else text[: _LONGEST - 1] + "…"
    return "".join(c if c.isalnum() or c in " .,_-:/@…" else f"#{ord(c)};" for c in " ".join(short.split()))
