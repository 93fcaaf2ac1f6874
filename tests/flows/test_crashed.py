"""Tests that flow runs of killed processes do not stay Running in Prefect."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import httpx
import pytest

from flows.approval import AWAITING, RETRAIN
from flows.crashed import mark_crashed, tag_of
from flows.decisions import mark_lost_answers
from flows.prefect import FLOW
from registry.home import Home
from registry.lineage.record import Lineage
from tests.flows.commands import say

RUNNING = {"type": "RUNNING", "name": "Running"}


@pytest.fixture
def killed(prefect_server: str) -> Callable[..., tuple[str, str, str]]:
    """Returns a function that makes what `retrain` leaves on the server: an outer, an inner and a task run."""

    def post(path: str, body: dict[str, Any]) -> str:
        while (answer := httpx.post(f"{prefect_server}/{path}", json=body, timeout=60)).status_code == 503:
            time.sleep(0.5)  # another test's run has the server's database locked
        return str(answer.raise_for_status().json()["id"])

    def make(run_id: str) -> tuple[str, str, str]:
        outer = post("flow_runs/", {"flow_id": post("flows/", {"name": "retrain"}), "state": RUNNING})
        call = {"flow_run_id": outer, "task_key": "call", "dynamic_key": run_id, "state": RUNNING}
        body = {"parent_task_run_id": post("task_runs/", call), "tags": [tag_of(run_id)], "state": RUNNING}
        inner = post("flow_runs/", {"flow_id": post("flows/", {"name": FLOW}), **body})
        step = {"flow_run_id": inner, "task_key": "adapter", "dynamic_key": run_id, "state": RUNNING}
        return outer, inner, post("task_runs/", step)

    return make


def states(server: str, runs: tuple[str, str, str]) -> list[str]:
    paths = (f"flow_runs/{runs[0]}", f"flow_runs/{runs[1]}", f"task_runs/{runs[2]}")
    return [httpx.get(f"{server}/{path}", timeout=60).json()["state"]["name"] for path in paths]


def test_the_next_run_of_a_home_marks_its_killed_flow_runs_and_no_others(
    prefect_server: str, killed: Callable[..., tuple[str, str, str]], pipeline: Callable[..., Path], home: Path
) -> None:
    opened = Home.open(home)
    with closing(Lineage(opened.lineage_url)) as lineage:
        dead, alive, finished = (lineage.start_run("try", {}).id for _ in range(3))
        lineage.finish_run(dead, "CRASHED")
        lineage.finish_run(finished, "COMPLETED")
    ours, running, lost, foreign = (killed(run) for run in (dead, alive, finished, "run-of-another-home"))
    say("run", pipeline(), home=home)
    assert states(prefect_server, ours) == states(prefect_server, lost) == ["Crashed"] * 3
    assert states(prefect_server, running) == states(prefect_server, foreign) == ["Running"] * 3
    state = httpx.get(f"{prefect_server}/flow_runs/{ours[0]}", timeout=60).json()["state"]
    assert (state["type"], state["message"]) == ("CRASHED", "The process of this run is gone.")


def test_a_run_that_waits_for_an_approval_is_not_marked(
    prefect_server: str, killed: Callable[..., tuple[str, str, str]]
) -> None:
    from prefect.settings import PREFECT_API_URL, temporary_settings

    outer, inner, _ = killed("its-run")
    waiting = {"state": {"type": "PAUSED", "name": AWAITING}, "force": True}
    httpx.post(f"{prefect_server}/flow_runs/{outer}/set_state", json=waiting, timeout=60).raise_for_status()
    with temporary_settings({PREFECT_API_URL: prefect_server}):
        assert [str(run) for run in mark_crashed({"its-run": "CRASHED"}, FLOW)] == [inner]
        assert mark_crashed({"its-run": "CRASHED"}, RETRAIN) == []


def test_a_run_whose_process_died_while_it_applied_an_answer_is_marked(prefect_server: str, home: Path) -> None:
    from prefect.settings import PREFECT_API_URL, temporary_settings

    opened = Home.open(home)
    with closing(Lineage(opened.lineage_url)) as lineage:
        dead, alive = (lineage.start_run("try", {}).id for _ in range(2))
        lineage.finish_run(dead, "CRASHED")
    flow = httpx.post(f"{prefect_server}/flows/", json={"name": RETRAIN}, timeout=60).json()["id"]
    runs = [
        httpx.post(
            f"{prefect_server}/flow_runs/", json={"flow_id": flow, "tags": [tag_of(run)], "state": RUNNING}, timeout=60
        ).json()["id"]
        for run in (dead, alive)
    ]
    with temporary_settings({PREFECT_API_URL: prefect_server}):
        mark_lost_answers(opened)
    names = [httpx.get(f"{prefect_server}/flow_runs/{run}", timeout=60).json()["state"]["name"] for run in runs]
    assert names == ["Crashed", "Running"]


def test_a_flow_run_is_marked_once(prefect_server: str, killed: Callable[..., tuple[str, str, str]]) -> None:
    from prefect.settings import PREFECT_API_URL, temporary_settings

    outer, inner, _ = killed("a-run")
    with temporary_settings({PREFECT_API_URL: prefect_server}):
        assert {str(run) for run in mark_crashed({"a-run": "CRASHED"}, FLOW)} == {outer, inner}
        assert mark_crashed({"a-run": "CRASHED"}, FLOW) == []
