"""Scheduled retraining with a real server and a real worker on loopback."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any
from urllib.request import urlopen

import httpx
import pytest
import yaml

from flows.template import write_pipeline
from registry.home import Home
from registry.lineage.record import Lineage
from tests.flows.conftest import draw_noise

PROJECT = Path(__file__).resolve().parents[2]
PREFECT = str(Path(sys.executable).parent / "prefect")

pytestmark = [pytest.mark.slow, pytest.mark.whole]


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    return os.environ | {
        "PREFECT_HOME": str(tmp_path / "prefect"),
        "PREFECT_API_URL": f"http://127.0.0.1:{port}/api",
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
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
        wait_for(lambda: is_up(api), 180, "the server answers")
        yield api


def is_up(api: str) -> bool:
    try:
        with urlopen(f"{api}/health", timeout=2) as answer:
            return bool(answer.status == 200)
    except OSError:
        return False


class started:
    """A process in a group of its own, ended with all of its children when the block ends."""

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


def wait_for(condition: Any, seconds: float, what: str) -> Any:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if found := condition():
            return found
        time.sleep(0.5)
    raise AssertionError(f"after {seconds} s still not: {what}")


def flow_runs(api: str, *states: str) -> list[dict[str, Any]]:
    wanted = {"flow_runs": {"state": {"type": {"any_": list(states)}}}, "limit": 200}
    return list(httpx.post(f"{api}/flow_runs/filter", json=wanted, timeout=30).json())


def test_a_deployment_is_scheduled_and_retrains_only_what_changed(
    server: str, environment: dict[str, str], tmp_path: Path
) -> None:
    images = tmp_path / "work" / "images"
    images.mkdir(parents=True)
    for index in range(5):
        draw_noise(images / f"{index}.png", index)
    spec = write_pipeline(images, "sks", "star", steps=2)
    spec.write_text(spec.read_text().replace("method: dreambooth", "method: finetune"))
    home = tmp_path / "home"
    deployment = yaml.safe_load((PROJECT / "prefect.yaml").read_text())
    deployment["deployments"][0]["parameters"] = {"spec": str(spec), "home": str(home)}
    config = tmp_path / "prefect.yaml"
    config.write_text(yaml.safe_dump(deployment))

    def prefect(*arguments: str) -> None:
        done = subprocess.run(
            [PREFECT, *arguments], env=environment, cwd=PROJECT, capture_output=True, text=True, timeout=120
        )
        assert done.returncode == 0, done.stdout + done.stderr

    prefect("work-pool", "create", "local", "--type", "process")
    prefect("--no-prompt", "deploy", "--all", "--prefect-file", str(config))
    scheduled = wait_for(lambda: flow_runs(server, "SCHEDULED"), 120, "runs are SCHEDULED")
    assert all(run["deployment_id"] for run in scheduled)

    def retrain() -> dict[str, Any]:
        before = {run["id"] for run in flow_runs(server, "COMPLETED", "FAILED", "CRASHED")}
        prefect("deployment", "run", "retrain/nightly")

        def finished() -> list[dict[str, Any]]:
            runs = flow_runs(server, "COMPLETED", "FAILED", "CRASHED")
            return [run for run in runs if run["id"] not in before and run["deployment_id"]]

        (run,) = wait_for(finished, 400, "the run has ended")
        assert run["state"]["type"] == "COMPLETED", run["state"]
        return dict(run)

    def trainings() -> int:
        with closing(Lineage(Home(home).lineage_url)) as lineage:
            done = [e for run in lineage.runs() for e in lineage.executions(run.id) if e.uses == "train"]
        return sum(execution.status == "COMPLETED" for execution in done)

    with started(
        [PREFECT, "worker", "start", "--pool", "local", "--type", "process"], environment, tmp_path / "worker.log"
    ):
        retrain()
        assert trainings() == 1
        retrain()
        assert trainings() == 1, "nothing had changed"
        draw_noise(images / "new.png", 99)
        retrain()
        assert trainings() == 2
