"""Tests two workers on one queue whose processes are killed, and schedules that fire, on both databases of Prefect."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from registry.home import Home
from registry.lineage.record import Lineage
from tests.flows.conftest import PREPARE
from tests.flows.running import Running, alive, descendants, find, wait_until
from tests.registry.test_database_contract import administer, create, needs_postgres, postgres

__all__ = ["administer", "create", "postgres"]

TRAINED = (
    PREPARE
    + """\
  adapter:  {uses: train, dataset: captions, method: finetune, rank: 2, steps: 600, batch: 2, checkpoint_every: 10}
"""
)
ALONE = ("--no-mlflow", "--grace", "0")


@pytest.fixture(params=["sqlite", pytest.param("postgres", marks=needs_postgres)])
def project(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Running]:
    """Returns a project whose server has a database of this kind."""
    variables = {}
    if request.param == "postgres":
        url = request.getfixturevalue("create")()
        variables["PREFECT_SERVER_DATABASE_CONNECTION_URL"] = url.replace("+psycopg", "+asyncpg")
    running = Running(tmp_path / "project", **variables)
    if request.param == "sqlite":
        running.use_database(request.getfixturevalue("prefect_database"))
    return running


def executions(project: Running, step: str) -> Counter[tuple[str, str]]:
    """Returns how often a step of each pipeline ended with each status."""
    with closing(Lineage(Home(project.home).lineage_url)) as lineage:
        runs = lineage.runs()
        ended = [(run.name, e.status) for run in runs for e in lineage.executions(run.id) if e.uses == step]
    return Counter(ended)


@pytest.mark.nightly
def test_queued_runs_are_executed_once_each_though_the_server_and_a_worker_are_killed(project: Running) -> None:
    names = [f"p{number}" for number in range(8)]
    project.write_project(*(project.write(name) for name in names))
    with project.up("--workers", "2", *ALONE) as process:
        runs = {name: project.start_run(name) for name in names}

        def states() -> Counter[str]:
            return Counter(project.state(run)["type"] for run in runs.values())

        wait_until(lambda: states()["COMPLETED"] >= 2)
        (server,) = find(process.pid, "flows.server")
        server.kill()
        wait_until(lambda: states()["COMPLETED"] >= 4)
        worker, _ = find(process.pid, "flows.worker")
        worker.kill()  # its run finishes without it
        project.wait_for_end(*runs.values(), seconds=900)
        for name, run in runs.items():
            if project.state(run)["type"] == "CRASHED":  # its worker was submitting it when the server died
                assert "Failed to submit flow run" in project.state(run)["message"]
                runs[name] = project.start_run(name)
        assert project.wait_for_end(*runs.values(), seconds=900) == ["COMPLETED"] * len(runs)
        assert {project.ask(f"flow_runs/{run}")["run_count"] for run in runs.values()} == {1}
        wait_until(lambda: len(find(process.pid, "flows.worker")) == 2)
    assert executions(project, "caption") == {(name, "COMPLETED"): 1 for name in names}


@pytest.mark.nightly
def test_the_next_run_resumes_the_training_of_a_killed_worker_and_marks_its_run_as_crashed(project: Running) -> None:
    project.write_project(project.write("rings", TRAINED))
    with project.up("--workers", "2", *ALONE) as process:
        first = project.start_run("rings")

        def checkpoints() -> list[Path]:
            return [path for path in (project.home / "work").glob("*/kept/*") if path.stat().st_size]

        wait_until(checkpoints)
        (worker,) = (worker for worker in find(process.pid, "flows.worker") if worker.children())
        for victim in [worker, *worker.children(recursive=True)]:
            victim.kill()
        assert project.state(first)["type"] == "RUNNING", "nobody reports for a killed process"
        second = project.start_run("rings")
        assert project.wait_for_end(second) == ["COMPLETED"]
        assert project.state(first)["name"] == "Crashed"
        logs = project.ask("logs/filter", {"logs": {"flow_run_id": {"any_": [second]}}, "limit": 200})
        messages = "\n".join(entry["message"] for entry in logs)
        assert "step adapter: never ran; continues from step" in messages
        children = descendants(process.pid)
    assert alive(children) == []
    assert executions(project, "train")["rings", "COMPLETED"] == 1


@pytest.mark.nightly
def test_schedules_fire_and_survive_a_restart_of_all_services(project: Running) -> None:
    project.write_project(
        project.write("often", interval=30), project.write("cron", cron="* * * * *", timezone="Europe/Berlin")
    )

    def completed() -> Counter[str]:
        names = {project.ask(f"deployments/name/retrain/{name}")["id"]: name for name in ("often", "cron")}
        query = {"flow_runs": {"state": {"type": {"any_": ["COMPLETED"]}}}, "limit": 200}
        ended = project.ask("flow_runs/filter", query)
        return Counter(names[run["deployment_id"]] for run in ended if run["auto_scheduled"])

    with project.up("--workers", "2", *ALONE):
        wait_until(lambda: completed()["often"] >= 2 and completed()["cron"] >= 1)
        first = completed()
    with project.up("--workers", "2", "--no-deploy", *ALONE):
        wait_until(lambda: min((completed() - first).get(name, 0) for name in ("often", "cron")) > 0)
    for name in ("often", "cron"):
        assert executions(project, "caption")[name, "COMPLETED"] == 1, "nothing had changed"


def test_the_projects_of_these_tests_differ_in_their_captions(tmp_path: Path) -> None:
    project = Running(tmp_path / "project")
    texts: list[Any] = [project.write(name) and (project.folder / f"{name}.yaml").read_text() for name in ("a", "b")]
    assert "trigger: sksa" in texts[0]
    assert "trigger: sksb" in texts[1]
