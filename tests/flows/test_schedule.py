"""Tests scheduled retraining with a real Prefect server and worker."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import httpx
import pytest
import yaml

from registry.home import Home
from registry.lineage.record import Lineage
from tests.flows.conftest import PREPARE, draw_noise
from tests.flows.shared import DATABASE, wait_until_up

PROJECT = Path(__file__).resolve().parents[2]
PREFECT = str(Path(sys.executable).parent / "prefect")

# Without evaluation and export, which `test_line` runs in processes: each import of torch takes seconds.
PREPARED = PREPARE.replace("name: try", "name: nightly")
LINE = (
    PREPARED
    + """\
  adapter:  {uses: train, dataset: captions, method: finetune, rank: 2, steps: 2, batch: 2}
  release:  {uses: register, adapter: adapter, alias: trial}
"""
)
GATED = (
    LINE.replace("adapter: adapter, alias: trial", "adapter: adapter, report: report, alias: staging")
    + """\
  report:
    uses: evaluate
    adapter: adapter
    dataset: captions
    seeds: 1
    steps: 1
    max_pictures: 1
    gates: {drift: {min: 9}}
"""
)


@pytest.fixture
def environment(tmp_path: Path, prefect_database: Path) -> dict[str, str]:
    """Returns the environment of a server, a worker and a client for this test."""
    (tmp_path / "prefect").mkdir()
    shutil.copy(prefect_database, tmp_path / "prefect" / DATABASE)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    plain = {name: value for name, value in os.environ.items() if not name.startswith("PREFECT_")}
    return plain | {
        "PREFECT_HOME": str(tmp_path / "prefect"),
        "PREFECT_API_URL": f"http://127.0.0.1:{port}/api",
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        "PREFECT_WORKER_QUERY_SECONDS": "1",
        "OMP_NUM_THREADS": "1",
        "DO_NOT_TRACK": "true",
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "LORALINE_PROJECT": str(PROJECT),
        "PATH": f"{Path(PREFECT).parent}{os.pathsep}{os.environ['PATH']}",
    }


@pytest.fixture
def server(environment: dict[str, str], tmp_path: Path) -> Iterator[str]:
    api = environment["PREFECT_API_URL"]
    port = api.rpartition(":")[2].removesuffix("/api")
    command = [PREFECT, "server", "start", "--host", "127.0.0.1", "--port", port, "--no-ui"]
    with started(command, environment, tmp_path / "server.log"):
        wait_until_up(api)
        yield api


class started:
    """A process in its own group, which ends with all of its children at the end of the `with` block."""

    def __init__(self, command: list[str], environment: dict[str, str], log: Path) -> None:
        self.command, self.environment, self.log = command, environment, log

    def __enter__(self) -> None:
        self.file = self.log.open("wb")
        self.process = subprocess.Popen(
            self.command, env=self.environment, cwd=PROJECT, stdout=self.file, stderr=self.file, start_new_session=True
        )

    def __exit__(self, *_: object) -> None:
        os.killpg(self.process.pid, signal.SIGTERM)
        try:
            self.process.wait(20)
        except subprocess.TimeoutExpired:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
        self.file.close()


def wait_for(condition: Any, seconds: float, description: str) -> Any:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if result := condition():
            return result
        time.sleep(0.2)
    raise AssertionError(f"not after {seconds} s: {description}")


def post(api: str, path: str, body: dict[str, Any]) -> Any:
    while (answer := httpx.post(f"{api}/{path}", json=body, timeout=60, verify=False)).status_code == 503:
        time.sleep(0.5)  # the server's database is locked
    answer.raise_for_status()
    return answer.json()


def read(api: str, path: str) -> Any:
    """Gets an object from the server; None if it does not exist."""
    answer = httpx.get(f"{api}/{path}", timeout=60, verify=False)  # no certificates are read
    return None if answer.status_code == 404 else answer.raise_for_status().json()


@pytest.fixture
def receiver() -> Iterator[tuple[str, list[dict[str, str]]]]:
    """Yields the URL of a webhook and the list of the notifications that it received."""
    received: list[dict[str, str]] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            received.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            self.send_response(204)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            """Logs nothing."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as http:
        threading.Thread(target=http.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{http.server_port}/hook", received
        http.shutdown()


def notify(api: str, url: str) -> None:
    """Creates the documented automation, with a webhook block as its notification block."""
    from prefect.blocks.notifications import CustomWebhookNotificationBlock
    from prefect.settings import PREFECT_API_URL, temporary_settings

    text = {"subject": "{{subject}}", "body": "{{body}}"}
    with temporary_settings({PREFECT_API_URL: api}):
        block = CustomWebhookNotificationBlock(name="notify", url=url, json_data=text).save("notify", _sync=True)
    automation = documented_automation()
    automation["actions"][0]["block_document_id"] = str(block)
    post(api, "automations/", automation)


def documented_automation() -> dict[str, Any]:
    page = (PROJECT / "docs" / "scheduling.md").read_text()
    (block,) = re.findall(r"```yaml\n(name: notify-retrain\n.*?)```", page, flags=re.DOTALL)
    return dict(yaml.safe_load(block))


@pytest.mark.usefixtures("trained_here")
@pytest.mark.parametrize(
    "by_worker", [{"prepared"}, pytest.param({"prepared", "first", "cached", "changed"}, marks=pytest.mark.nightly)]
)
def test_a_deployment_is_scheduled_and_retrains_only_what_changed(
    server: str,
    environment: dict[str, str],
    tmp_path: Path,
    by_worker: set[str],
    receiver: tuple[str, list[dict[str, str]]],
) -> None:
    images = tmp_path / "work" / "images"
    images.mkdir(parents=True)
    for index in range(4):
        draw_noise(images / f"{index}.png", index)
    spec = images.parent / "line.yaml"
    spec.write_text(PREPARED)
    home = tmp_path / "home"
    deployment = yaml.safe_load((PROJECT / "prefect.yaml").read_text())
    deployment["deployments"] = deployment["deployments"][:1]  # the others run every minute
    deployment["deployments"][0]["parameters"] = {"spec": str(spec), "home": str(home)}
    config = tmp_path / "prefect.yaml"
    config.write_text(yaml.safe_dump(deployment))

    def retrain(run: str) -> Run:
        # A training by the worker imports everything twice, so these runs call the flow in this process.
        if run not in by_worker:
            from prefect.settings import PREFECT_API_URL, PREFECT_LOGGING_TO_API_ENABLED, temporary_settings

            from flows.retrain import retrain as flow

            with temporary_settings({PREFECT_API_URL: server, PREFECT_LOGGING_TO_API_ENABLED: True}):
                state = flow(str(spec), str(home), return_state=True)
            return read_run(server, str(state.state_details.flow_run_id))
        flow_run = post(server, f"deployments/{nightly['id']}/create_flow_run", {"state": {"type": "SCHEDULED"}})
        wait_for(lambda: has_ended(server, flow_run["id"]), 600, "the run has ended")
        return read_run(server, flow_run["id"])

    def completed(step: str) -> int:
        with closing(Lineage(Home(home).lineage_url)) as lineage:
            executions = [e for run in lineage.runs() for e in lineage.executions(run.id) if e.uses == step]
        return sum(execution.status == "COMPLETED" for execution in executions)

    worker = [PREFECT, "worker", "start", "--pool", "local", "--type", "process"]
    with started(worker, environment, tmp_path / "worker.log"):
        # The worker creates its pool.
        wait_for(lambda: read(server, "work_pools/local"), 300, "the work pool is there")
        deploy = [PREFECT, "--no-prompt", "deploy", "--all", "--prefect-file", str(config)]
        done = subprocess.run(deploy, env=environment, cwd=PROJECT, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stdout + done.stderr
        nightly = read(server, "deployments/name/retrain/nightly")
        assert [schedule["schedule"]["cron"] for schedule in nightly["schedules"]] == ["0 3 * * *"]
        query = {"flow_runs": {"state": {"type": {"any_": ["SCHEDULED"]}}}, "limit": 200}
        scheduled = wait_for(lambda: post(server, "flow_runs/filter", query), 300, "runs are SCHEDULED")
        assert {run["deployment_id"] for run in scheduled} == {nightly["id"]}

        hook, notifications = receiver
        notify(server, hook)
        run = retrain("prepared")
        assert (completed("caption"), completed("train")) == (1, 0)
        assert run.state == ("COMPLETED", "Completed", "ran photos, prepared, captions")
        assert [(row["step"], row["action"]) for row in run.table] == [
            (step, "ran") for step in ("photos", "prepared", "captions")
        ]
        spec.write_text(LINE)
        run = retrain("first")
        assert (completed("caption"), completed("train")) == (1, 1)
        assert run.state == ("COMPLETED", "Staged", "nightly@1 as trial")
        actions = {row["step"]: row["action"] for row in run.table}
        assert (actions["captions"], actions["adapter"]) == ("cached", "ran")
        assert (run.table[-1]["version"], run.table[-1]["alias"]) == ("nightly@1", "trial")
        run = retrain("cached")
        assert completed("train") == 1, "nothing had changed"
        assert run.state == ("COMPLETED", "NothingChanged", "every step is cached")
        assert {row["action"] for row in run.table} == {"cached"}
        assert "NothingChanged: every step is cached" in run.logs
        draw_noise(images / "new.png", 99)
        spec.write_text(GATED)
        run = retrain("changed")
        assert (completed("caption"), completed("train")) == (2, 2)
        assert run.state[:2] == ("FAILED", "GatesFailed")
        assert re.fullmatch(r"nightly@2 not staged: drift -?[\d.e-]+ < 9", run.state[2])
        (release,) = (row for row in run.table if row["step"] == "release")
        assert (release["version"], release["gates"], release["alias"]) == ("nightly@2", "FAILED", "")
        assert re.search(r"drift [\d.e-]+ \(production: none\)", release["metrics"])
        assert f"GatesFailed: {run.state[2]}" in run.logs
        assert Path(unquote(urlsplit(release["report"]).path)).is_file()
        samples = [Path(unquote(urlsplit(image).path)) for image in release["images"].split()]
        assert samples
        assert all(image.read_bytes().startswith(b"\x89PNG") for image in samples)
        wait_for(lambda: len(notifications) > 1, 120, "two notifications")
        by_state = {entry["subject"].partition(":")[0]: entry["body"] for entry in notifications}
        assert by_state == {"Staged": "nightly@1 as trial", "GatesFailed": run.state[2]}

        pipelines = post(server, "flow_runs/filter", {"flow_runs": {"name": {"any_": ["nightly"]}}})
        assert sorted(run["state"]["name"] for run in pipelines) == ["Completed", "GatesFailed", "Staged"]
        assert len(post(server, "artifacts/filter", {})) == 4, "one per run of the deployed flow"


def test_the_documented_automation_is_valid_and_matches_states_that_runs_end_in() -> None:
    from prefect.events.schemas.automations import AutomationCore

    page = (PROJECT / "docs" / "scheduling.md").read_text()
    automation = AutomationCore.model_validate(documented_automation())
    expected = {event.removeprefix("prefect.flow-run.") for event in automation.trigger.expect}
    assert expected <= set(re.findall(r"^\| `(\w+)` \|", page, flags=re.MULTILINE))
    assert "GatesFailed" in expected


@dataclass(frozen=True)
class Run:
    """A finished flow run: type, name and message of its state, the rows of its only artifact, and its logs."""

    state: tuple[str, str, str]
    table: list[dict[str, str]]
    logs: set[str]


def has_ended(api: str, run: str) -> bool:
    return read(api, f"flow_runs/{run}")["state"]["type"] in ("COMPLETED", "FAILED", "CRASHED", "CANCELLED")


def read_run(api: str, run: str) -> Run:
    """Reads a flow run, and waits for its logs, which are sent in batches."""
    only = {"flow_run_id": {"any_": [run]}}
    state = read(api, f"flow_runs/{run}")["state"]
    (artifact,) = post(api, "artifacts/filter", {"artifacts": only})
    assert (artifact["type"], artifact["key"]) == ("table", "nightly")
    last = f"{state['name']}: {state['message']}"

    def read_logs() -> set[str]:
        logs = {line["message"] for line in post(api, "logs/filter", {"logs": only, "limit": 200})}
        return logs if last in logs else set()

    logs = wait_for(read_logs, 60, f"the log says {last!r}")
    table = json.loads(artifact["data"])
    lines = {f"step {row['step']}: {row['reason'] or 'cached'}" for row in table}
    assert lines <= logs, lines - logs
    return Run((state["type"], state["name"], state["message"]), table, logs)
