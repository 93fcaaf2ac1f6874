import dataclasses
import subprocess
import sys

import pytest
from sqlalchemy import event, func, select
from sqlalchemy.orm import Session

from registry.entities import Execution, Subject, now
from registry.errors import LineageError
from registry.lineage.record import Lineage
from registry.store.tables import DistributionsRow, ExecutionRow, RunRow

IMAGE = "5" * 64


@pytest.fixture
def lineage(empty_home):
    opened = Lineage(empty_home.lineage_url)
    yield opened
    opened.close()


@pytest.fixture
def line(lineage, store):
    """Records executions: photos -> prepared -> two adapters -> a merge, and an unrelated dataset."""
    run = lineage.start_run("stripes", {"seed": 7})
    outputs = {}

    def step(name, content, **inputs):
        outputs[name] = store.put_files("adapter" if "adapter" in name or name == "merged" else "manifest", content)
        execution = Execution(
            f"e-{name}", run.id, name, "step", "1", f"key-{name}", inputs=inputs, output=outputs[name], started_at=now()
        )
        images = {IMAGE: "cat.jpg", "6" * 64: "dog.jpg"} if name == "photos" else {}
        subjects = [Subject(digest, "picture", label) for digest, label in images.items()]
        lineage.log_execution(execution, contents=store.files(outputs[name]), subjects=subjects)

    step("photos", {"manifest.json": b"1", "pictures/cat.png": b"cat"})
    step("prepared", {"manifest.json": b"2", "pictures/cat.png": b"small cat"}, dataset=outputs["photos"])
    step("adapter", {"adapter.safetensors": b"a"}, dataset=outputs["prepared"])
    step("other adapter", {"adapter.safetensors": b"b"}, dataset=outputs["prepared"])
    step(
        "merged",
        {"adapter.safetensors": b"ab"},
        **{"adapters.0": outputs["adapter"], "adapters.1": outputs["other adapter"]},
    )
    step("unrelated", {"manifest.json": b"3"})
    return run, outputs


def ids(walk, kind):
    return {node.id for node in walk.nodes if node.kind == kind}


def test_latest_completed_execution_is_the_cached_one(lineage, store):
    run = lineage.start_run("p", {})
    old, new = (store.put_files("adapter", {"a": content}) for content in (b"old", b"new"))
    base = Execution("1", run.id, "s", "train", "1", "k", output=old, started_at=now())
    lineage.log_execution(base)
    assert lineage.find_cached("k") == old
    lineage.log_execution(dataclasses.replace(base, id="2", output=new, started_at=now()))
    lineage.log_execution(
        dataclasses.replace(base, id="3", output=None, status="FAILED", error="NaN", started_at=now())
    )
    assert lineage.find_cached("k") == new
    assert lineage.find_cached("another") is None


def test_completed_execution_without_output_is_refused():
    with pytest.raises(LineageError, match="without an output"):
        Execution("1", "r", "s", "train", "1", "k")


def test_execution_is_recorded_once(lineage, line):
    execution = lineage.executions(line[0].id)[0]
    with pytest.raises(LineageError, match="recorded already"):
        lineage.log_execution(execution)


def test_walk_up_finds_everything_upstream_and_nothing_else(lineage, line):
    _, outputs = line
    walk = lineage.walk(outputs["merged"].sha256, "up", subjects=True)
    names = ["merged", "adapter", "other adapter", "prepared", "photos"]
    assert ids(walk, "artifact") == {outputs[name].sha256 for name in names}
    assert ids(walk, "execution") == {f"e-{name}" for name in names}
    assert ids(walk, "subject") == {IMAGE, "6" * 64}
    assert {edge.role for edge in walk.edges if edge.target.id == "e-merged"} == {"adapters.0", "adapters.1"}
    assert [node.depth for node in walk.nodes] == sorted(node.depth for node in walk.nodes)


@pytest.mark.parametrize("start", [IMAGE, IMAGE[:8], "image in the artifact"])
def test_walk_down_from_an_image_finds_everything_downstream(lineage, store, line, start):
    _, outputs = line
    if start == "image in the artifact":
        start = store.files(outputs["photos"])["pictures/cat.png"].sha256
    walk = lineage.walk(start, "down")
    names = ["photos", "prepared", "adapter", "other adapter", "merged"]
    assert ids(walk, "artifact") == {outputs[name].sha256 for name in names}


def test_walk_from_an_adapter_file_goes_both_ways(lineage, store, line):
    _, outputs = line
    digest = store.files(outputs["adapter"])["adapter.safetensors"].sha256
    assert outputs["photos"].sha256 in ids(lineage.walk(digest, "up"), "artifact")
    assert ids(lineage.walk(digest, "down"), "artifact") == {outputs["adapter"].sha256, outputs["merged"].sha256}


def test_walk_from_a_run_and_an_execution_finds_their_artifacts(lineage, line):
    run, outputs = line
    assert ids(lineage.walk(run.id, "down"), "artifact") == {ref.sha256 for ref in outputs.values()}
    assert ids(lineage.walk("e-adapter", "up"), "artifact") == {outputs["photos"].sha256, outputs["prepared"].sha256}


def test_walk_of_a_wide_graph_is_complete(lineage, store, monkeypatch):
    monkeypatch.setattr("registry.store.database.BATCH", 7)
    run = lineage.start_run("p", {})
    source = store.put_files("manifest", {"a": b"source"})
    for number in range(40):
        output = dataclasses.replace(source, sha256=f"{number:064x}")
        inputs = {"dataset": source}
        lineage.log_execution(
            Execution(str(number), run.id, "s", "train", "1", str(number), inputs=inputs, output=output)
        )
    assert len(lineage.walk(source.sha256, "down").nodes) == 81


@pytest.mark.parametrize("direction", ["up", "down"])
def test_a_walk_uses_only_index_lookups(lineage, store, line, direction):
    run, outputs = line
    statements = []

    def collect(_connection, _cursor, statement, parameters, *_rest):
        if statement.startswith("SELECT"):
            statements.append((statement, parameters))

    event.listen(lineage.database.engine, "before_cursor_execute", collect)
    for start in (IMAGE, IMAGE[:8], outputs["prepared"].sha256, outputs["adapter"].sha256[:9], run.id, "e-adapter"):
        lineage.walk(start, direction, subjects=True)
    event.remove(lineage.database.engine, "before_cursor_execute", collect)
    with lineage.database.engine.connect() as connection:
        plans = {
            statement: connection.exec_driver_sql(f"EXPLAIN QUERY PLAN {statement}", parameters).all()
            for statement, parameters in statements
        }
    assert len(plans) > 8
    scans = {
        statement: [step[3] for step in plan if "SCAN" in step[3] and "CONSTANT ROW" not in step[3]]
        for statement, plan in plans.items()
    }
    assert {statement: steps for statement, steps in scans.items() if steps} == {}


@pytest.mark.parametrize("start", ["", "5", "f" * 64, "zorb@1", "zorb@production", "zorb@", "nonsense"])
def test_unknown_start_is_refused(lineage, line, start):
    with pytest.raises(LineageError):
        lineage.walk(start)


def test_run_of_a_dead_process_is_marked_crashed_once(lineage):
    alive = lineage.start_run("alive", {})
    child = subprocess.Popen([sys.executable, "-c", ""])
    child.wait()
    dead, reused, remote = (lineage.start_run(name, {}) for name in ("dead", "reused", "remote"))
    with lineage.database.write() as session:
        session.get_one(RunRow, dead.id).pid = child.pid
        session.get_one(RunRow, reused.id).process = "another boot/1"
        session.get_one(RunRow, remote.id).host = "elsewhere"
        session.get_one(RunRow, remote.id).pid = child.pid
    assert {run.id for run in lineage.find_dead_runs()} == {dead.id, reused.id}
    assert lineage.find_dead_runs() == []
    assert lineage.run(dead.id).status == "CRASHED"
    assert lineage.run(alive.id).status == lineage.run(remote.id).status == "RUNNING"


def test_first_end_of_a_run_counts(lineage):
    run = lineage.start_run("p", {})
    assert lineage.finish_run(run.id, "FAILED").status == "FAILED"
    assert lineage.finish_run(run.id, "COMPLETED").status == "FAILED"
    with pytest.raises(LineageError, match="no run"):
        lineage.finish_run("unknown", "FAILED")


def test_value_that_json_cannot_hold_is_refused(lineage):
    for value in (float("nan"), {1, 2}):
        with pytest.raises(LineageError, match="JSON"):
            lineage.start_run("p", {"rate": value})
    assert lineage.runs() == []


def test_connection_is_durable(lineage):
    with Session(lineage.database.engine) as session:
        values = {
            name: session.connection().exec_driver_sql(f"PRAGMA {name}").scalar()
            for name in ("foreign_keys", "busy_timeout", "journal_mode", "synchronous")
        }
    assert values == {"foreign_keys": 1, "busy_timeout": 20000, "journal_mode": "wal", "synchronous": 2}


def test_list_of_installed_packages_is_stored_once(lineage):
    run = lineage.start_run("p", {})
    environment = {"python": "3.11", "distributions": ["a==1", "b==2"]}
    for number in range(3):
        lineage.log_execution(
            Execution(f"{number}", run.id, "s", "train", "1", "k", status="FAILED", environment=environment)
        )
    other = {**environment, "distributions": ["a==1", "b==3"]}
    lineage.log_execution(Execution("other", run.id, "s", "train", "1", "k", status="FAILED", environment=other))
    assert [execution.environment for execution in lineage.executions(run.id)] == [environment] * 3 + [other]
    with lineage.database.read() as session:
        assert session.scalar(select(func.count()).select_from(DistributionsRow)) == 2
        stored = session.scalars(select(ExecutionRow.environment)).all()
    assert all(len(row["distributions"]) == 64 for row in stored)


def test_walk_starts_at_a_caption_and_at_a_consent(lineage, store):
    run = lineage.start_run("p", {})
    ref = store.put_files("manifest", {"a": b"1"})
    subjects = [
        Subject("7" * 64, "caption", "caption 'a cat'"),
        Subject("anna@example.org", "consent", "consent anna@example.org"),
        Subject("C-17/2", "consent", "consent C-17/2"),
    ]
    lineage.log_execution(Execution("1", run.id, "s", "ingest", "1", "k", output=ref), contents={}, subjects=subjects)
    for subject in subjects:
        walk = lineage.walk(subject.id, "down")
        assert ids(walk, "artifact") == {ref.sha256}
        assert (walk.nodes[0].label, walk.nodes[0].detail["kind"]) == (subject.label, subject.kind)
    with pytest.raises(LineageError, match="no version"):
        lineage.walk("nobody@example.org")


def test_a_subject_in_every_artifact_does_not_slow_a_walk(lineage, store):
    run = lineage.start_run("p", {})
    refs = [store.put_files("manifest", {"a": f"{number}".encode()}) for number in range(30)]
    for number, ref in enumerate(refs):
        execution = Execution(f"{number}", run.id, "s", "ingest", "1", "k", output=ref)
        lineage.log_execution(execution, contents={}, subjects=[Subject(IMAGE, "picture", "picture cat.jpg")])
    rows = []
    event.listen(lineage.database.engine, "after_cursor_execute", lambda *a: rows.append(a[1].rowcount))
    walk = lineage.walk(refs[0].sha256, "up", subjects=True)
    assert ids(walk, "subject") == {IMAGE}
    assert len(walk.nodes) == 3
    assert len(rows) < 15


def test_environment_names_packages_and_code(tmp_path):
    from tasks.environment import PACKAGES, describe_environment

    environment = describe_environment()
    installed = dict(entry.split(" @ ")[0].split("==") for entry in environment["distributions"])
    assert environment["packages"]["torch"] == installed["torch"]
    assert len(installed) > 50
    assert list(environment["distributions"]) == sorted(environment["distributions"])
    assert len(environment["code"]["sha256"]) == 64
    assert environment["code"]["files"] > 100
    assert set(PACKAGES) == {"flows", "lora_engine", "registry", "tasks"}


def test_changed_source_changes_the_digest_of_the_code(tmp_path, monkeypatch):
    from tasks import environment

    for name in environment.PACKAGES:
        (tmp_path / name).mkdir()
        (tmp_path / name / "module.py").write_text("x = 1\n")
    monkeypatch.setattr(environment, "_folder", lambda name: tmp_path / name)
    before = environment.describe_code()
    assert before.keys() == {"sha256", "files"}
    (tmp_path / "tasks" / "__pycache__").mkdir()
    (tmp_path / "tasks" / "__pycache__" / "module.pyc").write_bytes(b"x")
    assert environment.describe_code() == before
    (tmp_path / "tasks" / "module.py").write_text("x = 2\n")
    assert environment.describe_code()["sha256"] != before["sha256"]
    for command in (
        ["init", "-q"],
        ["add", "."],
        ["-c", "user.name=a", "-c", "user.email=a@b", "commit", "-qm", "x", "--no-gpg-sign"],
    ):
        subprocess.run(["git", *command], cwd=tmp_path, check=True, capture_output=True)
    assert environment.describe_code()["changed"] is False
    (tmp_path / "flows" / "new.py").write_text("")
    changed = environment.describe_code()
    assert changed["changed"] is True
    assert len(changed["commit"]) == 40
