"""Where the boxes of a picture go: in layers from left to right. Knows sizes and edges, and nothing of what they mean.

Layers by the longest way from a source, orders by barycentres (Sugiyama, Tagawa and Toda 1981); an edge that passes a
layer has a place of its own there, so that no line runs through a box.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence

Key = object
Edges = list[tuple[Key, Key]]
Room = tuple[float, float, float, float]
GAP_X, GAP_Y = 56, 16
_WIRE = 10.0
_SWEEPS = 8


def layer(boxes: Iterable[Key], edges: Edges) -> tuple[list[list[Key]], list[list[Key]]]:
    """Every box in the layer after all that it came from, and each edge as the row of places that it passes."""
    boxes = list(boxes)
    turned = _turned(boxes, edges)
    depth = _depths(boxes, [pair for pair in edges if pair not in turned])
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


def _turned(boxes: Sequence[Key], edges: Edges) -> set[tuple[Key, Key]]:
    """The edges that close a circle: a step that changes nothing gives what it took."""
    after: dict[Key, list[Key]] = defaultdict(list)
    for source, target in edges:
        after[source].append(target)
    fed = {target for _, target in edges}
    turned: set[tuple[Key, Key]] = set()
    state: dict[Key, str] = {}
    for root in [*(key for key in boxes if key not in fed), *boxes]:
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
                turned.add((key, target))
            elif target not in state:
                state[target] = "open"
                path.append((target, iter(after[target])))
    return turned


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
        # What came from nowhere stands just before what was made of it, which keeps the lines short.
        if after[key] and not before[key]:
            depth[key] = min(depth[target] for target in after[key]) - 1
    least = min(depth.values())
    return {key: level - least for key, level in depth.items()}


def order(layers: list[list[Key]], links: Edges) -> None:
    """Sorts each layer by the mean place of the neighbours in the layer beside it, forth and back."""
    sides: tuple[dict[Key, list[Key]], dict[Key, list[Key]]] = (defaultdict(list), defaultdict(list))
    for source, target in links:
        sides[0][target].append(source)
        sides[1][source].append(target)
    for sweep in range(_SWEEPS):
        side = sides[sweep % 2]
        for layer in layers if sweep % 2 == 0 else reversed(layers):
            rank = {key: _share(number, other) for other in layers for number, key in enumerate(other)}
            means = {
                key: sum(rank[near] for near in side[key]) / len(side[key]) if side[key] else rank[key] for key in layer
            }
            layer.sort(key=means.__getitem__)


def _share(number: int, layer: list[Key]) -> float:
    return (number + 0.5) / len(layer)


def place(layers: list[list[Key]], sizes: Mapping[Key, tuple[float, float]]) -> tuple[dict[Key, Room], float, float]:
    """Left, top, width and height of every box and of every place that a line passes; and those of the picture."""
    widths = [max((sizes[key][0] for key in layer if key in sizes), default=0.0) for layer in layers]
    heights = [
        sum(sizes[key][1] if key in sizes else _WIRE for key in layer) + GAP_Y * (len(layer) - 1) for layer in layers
    ]
    tallest, left = max(heights), float(GAP_Y)
    places: dict[Key, Room] = {}
    for row, width, height in zip(layers, widths, heights, strict=True):
        top = GAP_Y + (tallest - height) / 2
        for key in row:
            wide, high = sizes.get(key, (width, _WIRE))
            places[key] = (left + (width - wide) / 2, top, wide, high)
            top += high + GAP_Y
        left += width + GAP_X
    return places, left - GAP_X + GAP_Y, tallest + 2 * GAP_Y
