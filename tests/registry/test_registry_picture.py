"""The image of a walk is complete, readable and safe."""

import itertools
import json
import xml.etree.ElementTree as ET

import pytest

from registry.errors import LineageError
from registry.lineage.graph import Edge, NodeId
from registry.lineage.picture import LIMIT, draw
from registry.lineage.walk import Node, Walk

SVG = "{http://www.w3.org/2000/svg}"


def walk(names, edges, kind="artifact", start=0):
    """Returns a walk over nodes of one kind; edges by number."""
    nodes = tuple(Node(kind, name, 0, f"label of {name}") for name in names)
    ids = [NodeId(kind, name) for name in names]
    return Walk(ids[start], "up", nodes, tuple(Edge(ids[a], ids[b], "") for a, b in edges))


def drawn(walk):
    root = ET.fromstring(draw(walk))
    assert root.tag == f"{SVG}svg"
    return root


def boxes(root):
    """Yields texts, title and rectangle of each box."""
    for group in root.iter(f"{SVG}g"):
        shape = next(child for child in group if child.tag != f"{SVG}title" and child.tag != f"{SVG}text")
        if shape.tag == f"{SVG}rect":
            left, top, width, height = (float(shape.get(name)) for name in ("x", "y", "width", "height"))
            rect = (left, top, left + width, top + height)
        else:
            points = [tuple(map(float, point.split(","))) for point in shape.get("points").split()]
            rect = (*map(min, zip(*points, strict=True)), *map(max, zip(*points, strict=True)))
        yield [text.text for text in group.iter(f"{SVG}text")], group.find(f"{SVG}title").text, rect


def overlap(a, b):
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


def test_walk_of_a_real_version_is_drawn_completely(versions, register):
    register(versions, b"weights", alias_request="staging")
    graph = versions.lineage.walk("zorb@staging", subjects=True)
    root = drawn(graph)
    titles = [title for _, title, _ in boxes(root)]
    assert len(titles) == len(graph.nodes)
    assert all(any(node.id in title for title in titles) for node in graph.nodes)
    assert len(list(root.iter(f"{SVG}path"))) == len(graph.edges) + 1


GRAPHS = {
    "one": walk(["a"], []),
    "chain": walk("abcdef", [(n, n + 1) for n in range(5)]),
    "wide": walk([f"n{n}" for n in range(60)], [(n, 59) for n in range(59)]),
    "lattice": walk([f"n{n}" for n in range(40)], [(a, b) for a in range(40) for b in range(a + 1, min(a + 9, 40), 3)]),
    "long names": walk(["x" * 500, "y" * 500, "z"], [(0, 1), (1, 2), (0, 2)], kind="origin"),
    "circle": walk("abc", [(0, 1), (1, 2), (2, 0), (0, 2)]),
    "itself": walk("ab", [(0, 1), (1, 1)]),
}


@pytest.mark.parametrize("name", GRAPHS)
def test_no_two_boxes_or_labels_overlap(name):
    root = drawn(GRAPHS[name])
    placed = list(boxes(root))
    assert len(placed) == len(GRAPHS[name].nodes)
    for (_, _, a), (_, _, b) in itertools.combinations(placed, 2):
        assert not overlap(a, b)
    width, height = float(root.get("width")), float(root.get("height"))
    for lines, _, (left, top, right, bottom) in placed:
        assert left >= 0 < top
        assert right <= width
        assert bottom <= height
        # A monospaced character of 11 pixels is at most 6.7 wide: the text stays inside its box.
        assert all(len(line) * 6.7 <= right - left for line in lines)


def test_edges_lead_from_left_to_right():
    graph = GRAPHS["lattice"]
    rects = {title.split()[1].split("\n")[0]: rect for _, title, rect in boxes(drawn(graph))}
    for edge in graph.edges:
        assert rects[edge.source.id][2] < rects[edge.target.id][0]


def test_text_from_the_database_is_escaped():
    evil = '<script>alert("1")</script>&amp;\x00\x1b[31m\ud800'
    nodes = (Node("subject", evil, 0, evil, {"kind": evil}), Node("artifact", "a" * 64, 1, "manifest"))
    root = drawn(
        Walk(NodeId("subject", evil), "down", nodes, (Edge(NodeId("subject", evil), NodeId("artifact", "a" * 64), ""),))
    )
    assert list(root.iter(f"{SVG}script")) == []
    texts = "".join(root.itertext())
    assert "<script>" in texts
    assert not {"\x00", "\x1b", "\ud800"} & set(texts)


def test_many_images_share_one_box_that_names_each():
    names = [f"{number:064x}" for number in range(24)]
    subjects = tuple(Node("subject", name, 1, f"picture {name[-3:]}.png", {"kind": "picture"}) for name in names)
    artifacts = tuple(Node("artifact", letter * 64, 0, "manifest") for letter in "ab")
    edges = tuple(
        Edge(NodeId("subject", name), NodeId("artifact", letter * 64), "") for name in names for letter in "ab"
    )
    placed = list(boxes(drawn(Walk(NodeId("artifact", "a" * 64), "up", artifacts + subjects, edges))))
    assert len(placed) == 3
    (group,) = [entry for entry in placed if entry[0][0] == "24 pictures"]
    assert all(name in group[1] for name in names)
    single = Walk(NodeId("subject", names[3]), "down", (subjects[3], *artifacts), edges[6:8])
    assert len(list(boxes(drawn(single)))) == 3


def test_too_many_boxes_are_refused():
    with pytest.raises(LineageError, match=str(LIMIT)):
        draw(walk([f"n{n}" for n in range(LIMIT + 1)], []))


def test_same_walk_gives_the_same_bytes():
    assert draw(GRAPHS["lattice"]) == draw(GRAPHS["lattice"])


def test_verb_writes_image_events_and_json(versions, register, tmp_path, monkeypatch):
    from typer.testing import CliRunner

    from flows.cli import app

    register(versions, b"weights", alias_request="staging")
    monkeypatch.setenv("LORALINE_HOME", str(versions.home.path))
    (tmp_path / "mine.safetensors").write_bytes(b"weights")
    run = CliRunner()
    start = str(tmp_path / "mine.safetensors")
    image, events = tmp_path / "a.svg", tmp_path / "a.jsonl"
    done = run.invoke(app, ["lineage", start, "--down", "-o", str(image), "--openlineage", str(events)])
    assert done.exit_code == 0, done.output
    assert ET.fromstring(image.read_bytes()).tag == f"{SVG}svg"
    assert "zorb@1" in image.read_text()
    assert events.exists()
    shown = json.loads(run.invoke(app, ["lineage", start, "--down", "--json"]).output)
    assert {"start", "direction", "nodes", "edges"} == set(shown)
    assert "zorb@1" in {node["id"] for node in shown["nodes"]}
    table = run.invoke(app, ["lineage", "zorb@staging"]).output
    assert "one.jpg" in table
