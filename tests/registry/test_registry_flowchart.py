"""The Mermaid and DOT texts of a walk are complete, grouped and escaped."""

import json
import re

import pytest

from registry.lineage.graph import Edge, Node, NodeId
from registry.lineage.walk import Walk

EVIL = '"];\n<script>&amp;\\N\x00\x1b[31m\ud800 #35; "|'
ENTITY = re.compile(r"#(\d+);")
QUOTED = r'"((?:[^"\\]|\\["\\])*)"'


def read_mermaid(text):
    """Parses all of a flowchart: number -> label, and (source, role, target)."""
    first, *lines = text.splitlines()
    assert first == "flowchart LR"
    boxes, edges = {}, []
    for line in lines:
        if box := re.fullmatch(r'  n(\d+)[\[({/]+"([^"]*)"[\])}/]+', line):
            boxes[int(box[1])] = ENTITY.sub(lambda match: chr(int(match[1])), box[2])
        else:
            edge = re.fullmatch(r'  n(\d+) -->(?:\|"([^"]*)"\|)? n(\d+)', line)
            edges.append((int(edge[1]), edge[2] or "", int(edge[3])))
    return boxes, edges


def read_dot(text):
    """Parses all of a graph in DOT: number -> label, and (source, role, target)."""
    first, direction, *lines, last = text.splitlines()
    assert (first, direction, last) == ("digraph lineage {", "  rankdir=LR;", "}")
    boxes, edges = {}, []
    for line in lines:
        if box := re.fullmatch(rf"  n(\d+) \[shape=[a-z]+, label={QUOTED}\];", line):
            boxes[int(box[1])] = re.sub(r"\\(.)", r"\1", box[2]).replace("&amp;", "&")
        else:
            edge = re.fullmatch(rf"  n(\d+) -> n(\d+)(?: \[label={QUOTED}\])?;", line)
            edges.append((int(edge[1]), edge[3] or "", int(edge[2])))
    return boxes, edges


@pytest.fixture(params=["mermaid", "dot"])
def read(request):
    """Returns a function that writes a walk in one of the languages and parses the text."""
    if request.param == "mermaid":
        return lambda walk: read_mermaid(walk.to_mermaid())
    return lambda walk: read_dot(walk.to_dot())


def test_walk_of_a_real_version_is_written_completely(versions, register, read):
    register(versions, b"weights", alias_request="staging")
    graph = versions.lineage.walk("zorb@staging", subjects=True)
    boxes, edges = read(graph)
    names = list(boxes.values())
    assert len(names) == len(graph.nodes)
    assert all(any(node.id[:12] in name for name in names) for node in graph.nodes)
    numbers = {node.id: number for number, node in enumerate(graph.nodes)}
    expected = {(numbers[edge.source.id], numbers[edge.target.id]) for edge in graph.edges}
    assert {(source, target) for source, _, target in edges} == expected
    assert {"adapter", "output"} <= {role for _, role, _ in edges}


def test_text_from_the_database_cannot_leave_its_label(read):
    artifact = NodeId("artifact", "a" * 64)
    nodes = (Node("subject", EVIL, 0, EVIL, {"kind": EVIL}), Node("artifact", "a" * 64, 1, EVIL))
    edges = (Edge(NodeId("subject", EVIL), artifact, EVIL), Edge(artifact, artifact, EVIL))
    boxes, links = read(Walk(NodeId("subject", EVIL), "down", nodes, edges))
    assert len(boxes) == len(links) == 2
    assert all(label.startswith('"]; <script>&amp;\\N') for label in boxes.values())


def test_many_images_share_one_box(read):
    names = [f"{number:064x}" for number in range(24)]
    subjects = tuple(Node("subject", name, 1, f"picture {name[-3:]}.png", {"kind": "picture"}) for name in names)
    artifacts = tuple(Node("artifact", letter * 64, 0, "manifest") for letter in "ab")
    edges = tuple(
        Edge(NodeId("subject", name), NodeId("artifact", letter * 64), "") for name in names for letter in "ab"
    )
    boxes, links = read(Walk(NodeId("artifact", "a" * 64), "up", artifacts + subjects, edges))
    assert list(boxes.values())[2:] == ["24 pictures"]
    assert links == [(2, "", 0), (2, "", 1)]
    boxes, links = read(Walk(NodeId("subject", names[3]), "down", (*subjects[:3], *artifacts), edges[:6]))
    assert (len(boxes), len(links)) == (5, 6)


def test_the_verb_prints_both_languages_and_writes_events_and_json(versions, register, tmp_path, monkeypatch):
    from typer.testing import CliRunner

    from flows.cli import app

    register(versions, b"weights", alias_request="staging")
    monkeypatch.setenv("LORALINE_HOME", str(versions.home.path))
    (tmp_path / "mine.safetensors").write_bytes(b"weights")
    run = CliRunner()
    start, events = str(tmp_path / "mine.safetensors"), tmp_path / "a.jsonl"
    done = run.invoke(app, ["lineage", start, "--down", "--format", "mermaid", "--openlineage", str(events)])
    assert done.exit_code == 0, done.output
    assert any("zorb@1" in label for label in read_mermaid(done.output)[0].values())
    assert events.exists()
    done = run.invoke(app, ["lineage", start, "--down", "--format", "dot"])
    assert any("zorb@1" in label for label in read_dot(done.output)[0].values())
    shown = json.loads(run.invoke(app, ["lineage", start, "--down", "--json"]).output)
    assert {"start", "direction", "nodes", "edges"} == set(shown)
    assert "zorb@1" in {node["id"] for node in shown["nodes"]}
    table = run.invoke(app, ["lineage", "zorb@staging"]).output
    assert "one.jpg" in table
    refused = run.invoke(app, ["lineage", start, "--format", "svg"])
    assert refused.exit_code == 2
    assert "'mermaid', 'dot'" in refused.output
