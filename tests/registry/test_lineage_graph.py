"""Laws of the lineage graph: every search equals the closure that networkx computes from the rows."""

import random
from hashlib import sha256

import networkx
import pytest
from sqlalchemy import event, insert, select

from registry import queries
from registry.entities import now
from registry.lineage.graph import Edge, NodeId, downstream, upstream
from registry.lineage.record import Lineage
from registry.maintenance.gc_roots import version_roots
from registry.policy.ancestry import descendants, trace
from registry.store.tables import (
    ArtifactRow,
    ContentRow,
    DocumentRow,
    ExecutionRow,
    InputRow,
    NameRow,
    ParentRow,
    RunRow,
    VersionRow,
)
from tasks.operations.upstream import find_upstream_steps

AT = now()
STEPS = ("output", "input")
EMPTY = {"card": {}, "metrics": {}, "gates": [], "passed": True, "params": {}}


def digest(*parts):
    return sha256(" ".join(map(str, parts)).encode()).hexdigest()


def artifact(number):
    return NodeId("artifact", digest("artifact", number))


def add_rows(lineage, steps, versions=(), parents=(), documents=()):
    """Adds steps (inputs, output, status), versions (artifact, report, state) and parents (child, parent or text)."""
    numbers = {number for inputs, output, _ in steps for number in (*inputs, output)}
    numbers |= {number for version in versions for number in version[:2]} | {number for _, number in documents}
    with lineage.database.write() as session:
        run = {"name": "p", "spec": {}, "status": "COMPLETED", "pid": 1, "host": "h", "process": "", "started_at": AT}
        session.execute(insert(RunRow), [{"id": "run", **run}])
        kinds = [{"sha256": artifact(number).id, "kind": "adapter", "size": 1} for number in sorted(numbers)]
        session.execute(insert(ArtifactRow), kinds)
        facts = {"run_id": "run", "step": "s", "uses": "train", "revision": "1", "key": "k", "settings": {}}
        facts |= {"environment": {}, "started_at": AT}
        for number, (inputs, output, status) in enumerate(steps):
            session.execute(
                insert(ExecutionRow).values(id=f"e{number}", output=artifact(output).id, status=status, **facts)
            )
            session.add_all(
                InputRow(
                    execution=f"e{number}", role=f"adapters.{position}", artifact=artifact(source).id, position=position
                )
                for position, source in enumerate(inputs)
            )
        session.add(NameRow(name="a", created_at=AT))
        session.flush()
        for number, (adapter, report, state) in enumerate(versions, 1):
            file, tree = digest("file", adapter), artifact(adapter).id
            own = {"name": "a", "version": number, "identity": str(number), "sha256": file, "artifact": tree, "size": 1}
            own |= {
                "adapter_path": "a",
                "report": artifact(report).id,
                "metadata_artifact": artifact(report).id,
                "state": state,
            }
            session.add(VersionRow(id=number, created_at=AT, mirrored=True, **own, **EMPTY))
            if session.get(ContentRow, (tree, "a")) is None:
                session.add(ContentRow(artifact=tree, path="a", sha256=file, size=1))
            session.flush()
        for position, (child, parent) in enumerate(parents):
            known = parent if isinstance(parent, int) else None
            text = f"a@{parent}" if known else parent
            session.add(ParentRow(child=child, position=position, parent=known, text=text))
        session.add_all(
            DocumentRow(version=version, kind="card", artifact=artifact(number).id, created_at=AT)
            for version, number in documents
        )


@pytest.fixture
def lineage(empty_home):
    opened = Lineage(empty_home.lineage_url)
    yield opened
    opened.close()


@pytest.fixture(params=range(3))
def rows(request, lineage):
    """Adds random rows with cycles, failed and cached steps; returns them."""
    random_source = random.Random(request.param)
    size = 24

    def pick(below, count):
        return random_source.sample(range(below), min(below, count))

    steps = []
    for number in range(40):
        output = random_source.randrange(size)
        sources = pick(size if number % 8 == 0 else output, random_source.randrange(4))
        steps.append((sources, output, random_source.choice(["COMPLETED"] * 6 + ["FAILED", "CACHED"])))
    states = ["ACTIVE", "ACTIVE", "WITHDRAWN", "DELETED"]
    versions = [(pick(size, 1)[0], pick(size, 1)[0], random_source.choice(states)) for _ in range(10)]
    parents = []
    for child in range(1, 11):
        for parent in random_source.sample(range(1, 11), random_source.randrange(3)):
            is_known = random_source.random() < 0.5
            parents.append((child, parent if is_known else f"0.5 b sha256:{digest('file', versions[parent - 1][0])}"))
    documents = [(number, size + number) for number in range(1, 4)]
    add_rows(lineage, steps, versions, parents, documents)
    return steps, versions, parents, documents


def steps_graph(steps):
    graph = networkx.DiGraph()
    for number, (inputs, output, status) in enumerate(steps):
        if status == "COMPLETED":
            graph.add_edge(NodeId("execution", f"e{number}"), artifact(output), role="output")
            for position, source in enumerate(inputs):
                graph.add_edge(artifact(source), NodeId("execution", f"e{number}"), role=f"adapters.{position}")
    return graph


def parent_number(parent, versions):
    """Returns the numbers of the versions that a parent refers to."""
    if isinstance(parent, int):
        return [parent]
    return [number for number, version in enumerate(versions, 1) if parent.endswith(digest("file", version[0]))]


@pytest.mark.parametrize("batch", [2, 500])
def test_upstream_and_downstream_are_the_closures_of_the_completed_steps(lineage, rows, monkeypatch, batch):
    monkeypatch.setattr("registry.store.database.BATCH", batch)
    graph = steps_graph(rows[0])
    with lineage.database.read() as session:
        for node in graph:
            if node.kind == "artifact":
                up, down = upstream(session, [node], *STEPS), downstream(session, [node], *STEPS)
                assert up.depths == dict(networkx.single_target_shortest_path_length(graph, node))
                assert down.depths == networkx.single_source_shortest_path_length(graph, node)
                assert list(down.depths.values()) == sorted(down.depths.values())
                closed = graph.subgraph(down.depths)
                assert set(down.edges) == {Edge(*ends, closed.edges[ends]["role"]) for ends in closed.edges}
                assert set(up.edges) == {Edge(*ends, graph.edges[ends]["role"]) for ends in graph.in_edges(up.depths)}


def test_one_node_is_upstream_of_another_exactly_if_that_is_downstream_of_it(lineage, rows):
    nodes = [artifact(number) for number in range(24)]
    with lineage.database.read() as session:
        above = {(node, other) for node in nodes for other in upstream(session, [node], *STEPS).depths}
        below = {(other, node) for node in nodes for other in downstream(session, [node], *STEPS).depths}
    assert {(a, b) for a, b in above if b.kind == "artifact"} == {(a, b) for a, b in below if a.kind == "artifact"}
    assert len(above) > len(nodes)


def test_ancestry_follows_steps_and_the_parents_of_all_versions_of_an_artifact(lineage, rows):
    steps, versions, parents, _ = rows
    graph = steps_graph(steps)
    for child, parent in parents:
        for number in parent_number(parent, versions):
            graph.add_edge(artifact(versions[number - 1][0]), artifact(versions[child - 1][0]))
    with lineage.database.read() as session:
        for version in queries.read_versions(session):
            ancestry = trace(session, version.artifact)
            expected = networkx.ancestors(graph, ancestry.root) if ancestry.root in graph else set()
            assert set(ancestry.graph.depths) == {ancestry.root, *expected}
            above = {node.id for node in ancestry.graph.depths}
            assert [entry.ref for entry in ancestry.versions] == [
                f"a@{number}" for number, entry in enumerate(versions, 1) if artifact(entry[0]).id in above
            ]


def test_what_has_an_artifact_in_its_ancestry_is_downstream_of_it(lineage, rows):
    with lineage.database.read() as session:
        versions = queries.read_versions(session)
        pairs = {(node, version.ref) for version in versions for node in trace(session, version.artifact).graph.depths}
        artifacts = {node for node, _ in pairs if node.kind == "artifact"}
        below = {(node, ref) for node in artifacts for ref in descendants(session, [node]).ids("version")}
    assert {pair for pair in pairs if pair[0] in artifacts} <= below


def test_roots_are_what_undeleted_versions_and_their_parents_were_made_from(lineage, rows):
    steps, versions, parents, documents = rows
    graph = steps_graph(steps)
    for child, parent in parents:
        if isinstance(parent, int):
            graph.add_edge(f"a@{parent}", f"a@{child}")
    for number, (adapter, report, _) in enumerate(versions, 1):
        graph.add_edges_from((artifact(source), f"a@{number}") for source in (adapter, report))
    graph.add_edges_from((artifact(number), f"a@{version}") for version, number in documents)
    live = [f"a@{number}" for number, version in enumerate(versions, 1) if version[2] != "DELETED"]
    expected = {node.id for ref in live for node in networkx.ancestors(graph, ref) if node[:1] == ("artifact",)}
    with lineage.database.read() as session:
        assert version_roots(session) == expected


def test_a_long_chain_is_followed_to_its_end_in_a_few_queries_a_step(lineage):
    length = 150
    add_rows(
        lineage,
        [([number - 1] if number else [], number, "COMPLETED") for number in range(length)],
        [(length - 1, length - 1, "ACTIVE")],
    )
    statements = []
    event.listen(lineage.database.engine, "before_cursor_execute", lambda *call: statements.append(call[2]))
    with lineage.database.read() as session:
        (version,) = queries.read_versions(session)
        assert len(trace(session, version.artifact).graph.depths) == 2 * length
        assert len(descendants(session, [artifact(0)]).ids("version")) == 1
    assert len(find_upstream_steps(lineage, version).steps) == length
    assert len(statements) < 12 * length


def test_a_wide_graph_is_read_in_a_few_queries(lineage):
    width = 1200
    steps = [([0], number, "COMPLETED") for number in range(1, width)]
    add_rows(lineage, [*steps, (range(1, width), width, "COMPLETED")], [(width, width, "ACTIVE")])
    statements = []
    event.listen(lineage.database.engine, "before_cursor_execute", lambda *call: statements.append(call[2]))
    with lineage.database.read() as session:
        (version,) = queries.read_versions(session)
        assert len(trace(session, version.artifact).graph.depths) == 2 * width + 1
        assert len(version_roots(session)) == width + 1
    assert len(find_upstream_steps(lineage, version).steps) == width
    assert len(statements) < 70


def test_a_failed_step_has_inputs_and_nothing_has_it_downstream(lineage):
    add_rows(lineage, [([0], 1, "FAILED"), ([0], 2, "COMPLETED")])
    with lineage.database.read() as session:
        assert set(upstream(session, [NodeId("execution", "e0")], *STEPS).depths) == {
            NodeId("execution", "e0"),
            artifact(0),
        }
        assert downstream(session, [artifact(0)], *STEPS).ids("execution") == ["e1"]
        assert session.scalar(select(ExecutionRow.status).where(ExecutionRow.id == "e0")) == "FAILED"
