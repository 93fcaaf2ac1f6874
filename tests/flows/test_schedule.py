"""Tests scheduled retraining with a real Prefect server and worker."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

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
        time.sleep(1)
    raise AssertionError(f"not after {seconds} s: {description}")


def post(api: str, path: str, body: dict[str, Any]) -> Any:
    answer = httpx.post(f"{api}/{path}", json=body, timeout=60)
    answer.raise_for_status()
    return answer.json()


def read(api: str, path: str) -> Any:
    """Gets an object from the server; None if it does not exist."""
    answer = httpx.get(f"{api}/{path}", timeout=60)
    return None if answer.status_code == 404 else answer.raise_for_status().json()


@pytest.mark.usefixtures("trained_here")
@pytest.mark.parametrize(
    "by_worker", [{"prepared"}, pytest.param({"prepared", "first", "cached", "changed"}, marks=pytest.mark.nightly)]
)
def test_a_deployment_is_scheduled_and_retrains_only_what_changed(
    server: str, environment: dict[str, str], tmp_path: Path, by_worker: set[str]
) -> None:
    images = tmp_path / "work" / "images"
    images.mkdir(parents=True)
    for index in range(4):
        draw_noise(images / f"{index}.png", index)
    spec = images.parent / "line.yaml"
    spec.write_text(PREPARED)
    home = tmp_path / "home"
    deployment = yaml.safe_load((PROJECT / "prefect.yaml").read_text())
    deployment["deployments"][0]["parameters"] = {"spec": str(spec), "home": str(home)}
    config = tmp_path / "prefect.yaml"
    config.write_text(yaml.safe_dump(deployment))

    def retrain(run: str) -> None:
        # A training by the worker imports everything twice, so these runs call the flow in this process.
        if run not in by_worker:
            from flows.retrain import retrain as flow

            flow(str(spec), str(home))
            return
        flow_run = post(server, f"deployments/{nightly['id']}/create_flow_run", {"state": {"type": "SCHEDULED"}})
        ended = wait_for(lambda: ended_run(server, flow_run["id"]), 600, "the run has ended")
        assert ended["state"]["type"] == "COMPLETED", ended["state"]

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

        retrain("prepared")
        assert (completed("caption"), completed("train")) == (1, 0)
        spec.write_text(LINE)
        retrain("first")
        assert (completed("caption"), completed("train")) == (1, 1)
        retrain("cached")
        assert completed("train") == 1, "nothing had changed"
        draw_noise(images / "new.png", 99)
        retrain("changed")
        assert (completed("caption"), completed("train")) == (2, 2)


def ended_run(api: str, run: str) -> Any:
    flow_run = read(api, f"flow_runs/{run}")
    return flow_run if flow_run["state"]["type"] in ("COMPLETED", "FAILED", "CRASHED", "CANCELLED") else None
