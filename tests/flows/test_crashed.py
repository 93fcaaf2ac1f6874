"""Tests that flow runs of killed processes do not stay Running in Prefect."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import closing
from datetime import timedelta
from pathlib import Path
from typing import Any
from unittest.mock import patch

import httpx
import pytest
import yaml

from flows.approval import AWAITING, RETRAIN
from flows.crashed import MOST_STARTS, REQUEUE, mark_crashed, requeue_crashed, tag_of
from flows.decisions import mark_lost_answers
from flows.prefect import FLOW, run_as_flow
from registry.home import Home
from registry.lineage.record import Lineage
from tests.flows.commands import say

PROJECT = Path(__file__).resolve().parents[2]
RUNNING = {"type": "RUNNING", "name": "Running"}


def post_to(server: str, path: str, body: dict[str, Any]) -> str:
    while (answer := httpx.post(f"{server}/{path}", json=body, timeout=60)).status_code == 503:
        time.sleep(0.5)  # another test's run has the server's database locked
    return str(answer.raise_for_status().json()["id"])


@pytest.fixture
def killed(prefect_server: str) -> Callable[..., tuple[str, str, str]]:
    """Returns a function that makes what `retrain` leaves on the server: an outer, an inner and a task run."""

    def post(path: str, body: dict[str, Any]) -> str:
        return post_to(prefect_server, path, body)

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


def test_the_attempt_that_replaced_a_killed_one_is_not_marked(
    prefect_server: str, killed: Callable[..., tuple[str, str, str]]
) -> None:
    from prefect.settings import PREFECT_API_URL, temporary_settings

    outer, inner, _ = killed("an-earlier-attempt")
    for state in ({"type": "SCHEDULED", "name": "AwaitingRetry"}, RUNNING):
        body = {"state": state, "force": True}
        httpx.post(f"{prefect_server}/flow_runs/{outer}/set_state", json=body, timeout=60).raise_for_status()
        with temporary_settings({PREFECT_API_URL: prefect_server}):
            marked = mark_crashed({"an-earlier-attempt": "CRASHED"}, FLOW)
        assert [str(run) for run in marked] == ([inner] if state is not RUNNING else [])
    assert httpx.get(f"{prefect_server}/flow_runs/{outer}", timeout=60).json()["state"]["name"] == "Running"


def test_a_crashed_run_is_queued_again_only_with_the_automation_and_at_most_three_times(prefect_server: str) -> None:
    from prefect.settings import PREFECT_API_URL, temporary_settings

    flow = post_to(prefect_server, "flows/", {"name": "requeued"})
    deployment = post_to(prefect_server, "deployments/", {"name": "nightly", "flow_id": flow})
    first, second = (
        post_to(prefect_server, f"deployments/{deployment}/create_flow_run", {"state": {"type": "SCHEDULED"}})
        for _ in range(2)
    )
    post_to(prefect_server, "flow_runs/", {"flow_id": flow, "state": RUNNING})  # of no deployment, and not crashed
    for run in (first, second):
        body = {"state": {"type": "CRASHED", "name": "Crashed"}, "force": True}
        httpx.post(f"{prefect_server}/flow_runs/{run}/set_state", json=body, timeout=60).raise_for_status()
    (document,) = (
        entry
        for entry in yaml.safe_load((PROJECT / "deploy" / "requeue.yaml").read_text())["automations"]
        if entry["name"] == REQUEUE
    )
    with temporary_settings({PREFECT_API_URL: prefect_server}), patch("flows.crashed._PAUSE", timedelta(seconds=-60)):
        assert requeue_crashed("requeued") == [], "the automation is the switch"
        automation = post_to(prefect_server, "automations/", document)
        with patch("flows.crashed._PAUSE", timedelta(minutes=1)):
            assert requeue_crashed("requeued") == [], "the automation has a minute"
        with patch("flows.crashed.MOST_STARTS", -1):
            assert requeue_crashed("requeued") == []
        queued = {str(run) for run in requeue_crashed("requeued")}
        assert queued == {first, second}
        httpx.delete(f"{prefect_server}/automations/{automation}", timeout=60).raise_for_status()
    names = {
        httpx.get(f"{prefect_server}/flow_runs/{run}", timeout=60).json()["state"]["name"] for run in (first, second)
    }
    assert names == {"AwaitingRetry"}
    counts = document["trigger"]["match"]["prefect.run-count"]
    assert counts == [str(number) for number in range(MOST_STARTS + 1)], "the automation has the same limit"


def test_a_flow_run_is_marked_once(prefect_server: str, killed: Callable[..., tuple[str, str, str]]) -> None:
    from prefect.settings import PREFECT_API_URL, temporary_settings

    outer, inner, _ = killed("a-run")
    with temporary_settings({PREFECT_API_URL: prefect_server}):
        assert {str(run) for run in mark_crashed({"a-run": "CRASHED"}, FLOW)} == {outer, inner}
        assert mark_crashed({"a-run": "CRASHED"}, FLOW) == []


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


def test_the_flow_run_of_a_pipeline_sends_heartbeats_only_if_they_are_configured(prefect_server: str) -> None:
    from prefect.settings import PREFECT_FLOWS_HEARTBEAT_FREQUENCY, get_current_settings, temporary_settings

    def read() -> int | None:
        return get_current_settings().flows.heartbeat_frequency

    assert run_as_flow("beats", read)() is None
    with temporary_settings({PREFECT_FLOWS_HEARTBEAT_FREQUENCY: 30}):
        assert run_as_flow("beats", read)() == 30
