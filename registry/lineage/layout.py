"""Positions the boxes of a graph drawing in layers from left to right. Uses only sizes and edges.

Assigns layers by the longest path from a source and sorts them by barycenters (Sugiyama, Tagawa and Toda 1981). An edge
that crosses a layer gets its own slot there, so no line crosses a box.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence

Key = object
Edges = list[tuple[Key, Key]]
Rect = tuple[float, float, float, float]
GAP_X, GAP_Y = 56, 16
_WIRE = 10.0
_SWEEPS = 8


def layer(boxes: Iterable[Key], edges: Edges) -> tuple[list[list[Key]], list[list[Key]]]:
    """Returns the layers, each box after all its sources, and for each edge the keys of the slots that it passes."""
    boxes = list(boxes)
    back = _back_edges(boxes, edges)
    depth = _depths(boxes, [pair for pair in edges if pair not in back])
    layers: list[list[Key]] = [[] for _ in range(max(depth.values()) + 1)]
    for key in boxes:
        layers[depth[key]].append(key)
    wires: list[list[Key]] = []
    for source, target in edges:
        between: list[Key] = []
        for level in range(depth[source] + 1, depth[target]):
            between.append((source, target, level))
            layers[level].append(between[-1])
        wires.append([source, *between, target])
    return layers, wires


def _back_edges(boxes: Sequence[Key], edges: Edges) -> set[tuple[Key, Key]]:
    """Returns the edges that close a cycle, as when a step returns its input unchanged."""
    after: dict[Key, list[Key]] = defaultdict(list)
    for source, target in edges:
        after[source].append(target)
    targets = {target for _, target in edges}
    back: set[tuple[Key, Key]] = set()
    state: dict[Key, str] = {}
    for root in [*(key for key in boxes if key not in targets), *boxes]:
        if root in state:
            continue
        state[root] = "open"
        path = [(root, iter(after[root]))]
        while path:
            key, following = path[-1]
            target = next(following, None)
            if target is None:
                state[key] = "done"
                path.pop()
            elif state.get(target) == "open":
                back.add((key, target))
            elif target not in state:
                state[target] = "open"
                path.append((target, iter(after[target])))
    return back


def _depths(boxes: Sequence[Key], edges: Edges) -> dict[Key, int]:
    before: dict[Key, list[Key]] = defaultdict(list)
    after: dict[Key, list[Key]] = defaultdict(list)
    for source, target in edges:
        before[target].append(source)
        after[source].append(target)
    missing = {key: len(before[key]) for key in boxes}
    depth = dict.fromkeys(boxes, 0)
    ready = [key for key in boxes if not missing[key]]
    for key in ready:
        for target in after[key]:
            depth[target] = max(depth[target], depth[key] + 1)
            missing[target] -= 1
            if not missing[target]:
                ready.append(target)
    for key in ready:
        # A box without sources goes directly before its first target, which keeps the lines short.
        if after[key] and not before[key]:
            depth[key] = min(depth[target] for target in after[key]) - 1
    least = min(depth.values())
    return {key: level - least for key, level in depth.items()}


def order(layers: list[list[Key]], links: Edges) -> None:
    """Sorts each layer in place by the mean rank of its neighbors in the adjacent layer, in alternating sweeps."""
    sides: tuple[dict[Key, list[Key]], dict[Key, list[Key]]] = (defaultdict(list), defaultdict(list))
    for source, target in links:
        sides[0][target].append(source)
        sides[1][source].append(target)
    for sweep in range(_SWEEPS):
        side = sides[sweep % 2]
        for layer in layers if sweep % 2 == 0 else reversed(layers):
            rank = {key: _share(number, row) for row in layers for number, key in enumerate(row)}
            means = {
                key: sum(rank[near] for near in side[key]) / len(side[key]) if side[key] else rank[key] for key in layer
            }
            layer.sort(key=means.__getitem__)


def _share(number: int, layer: list[Key]) -> float:
    return (number + 0.5) / len(layer)


def position(layers: list[list[Key]], sizes: Mapping[Key, tuple[float, float]]) -> tuple[dict[Key, Rect], float, float]:
    """Returns left, top, width and height of every box and slot, and width and height of the drawing, in pixels."""
    widths = [max((sizes[key][0] for key in layer if key in sizes), default=0.0) for layer in layers]
    heights = [
        sum(sizes[key][1] if key in sizes else _WIRE for key in layer) + GAP_Y * (len(layer) - 1) for layer in layers
    ]
    tallest, left = max(heights), float(GAP_Y)
    rects: dict[Key, Rect] = {}
    for row, width, height in zip(layers, widths, heights, strict=True):
        top = GAP_Y + (tallest - height) / 2
        for key in row:
            box_width, box_height = sizes.get(key, (width, _WIRE))
            rects[key] = (left + (width - box_width) / 2, top, box_width, box_height)
            top += box_height + GAP_Y
        left += width + GAP_X
    return rects, left - GAP_X + GAP_Y, tallest + 2 * GAP_Y
