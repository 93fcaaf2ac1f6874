"""`Running`: the command `loraline up` as a process, in a project of its own with cheap pipelines."""

from __future__ import annotations

import json
import os
import select
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import psutil
import yaml

from tests.flows.commands import PLAIN
from tests.flows.conftest import PREPARE
from tests.flows.shared import DATABASE, draw_noise

FINAL = ("COMPLETED", "FAILED", "CRASHED", "CANCELLED")


class Running:
    """A project folder, its home, and the services that run for them.

    Args:
        folder: The project.
        variables: More environment variables.
    """

    def __init__(self, folder: Path, **variables: str) -> None:
        self.folder, self.home = folder, folder / "home"
        plain = {name: value for name, value in os.environ.items() if not name.startswith("PREFECT_")}
        quick = {"PREFECT_WORKER_QUERY_SECONDS": "1", "OMP_NUM_THREADS": "1"}
        self.environment = plain | PLAIN | quick | {"LORALINE_HOME": str(self.home)} | variables
        self.addresses: dict[str, Any] = {}
        (folder / "images").mkdir(parents=True)
        for index in range(2):
            draw_noise(folder / "images" / f"{index}.png", index)

    def use_database(self, database: Path) -> None:
        """Copies a migrated database, so that the server skips its migrations."""
        (self.home / "prefect").mkdir(parents=True)
        shutil.copy(database, self.home / "prefect" / DATABASE)

    def write(self, name: str, text: str = PREPARE, **schedule: Any) -> dict[str, Any]:
        """Writes a pipeline whose captions no other pipeline has, and returns its deployment for `prefect.yaml`."""
        text = text.replace("name: try", f"name: {name}").replace("trigger: sks", f"trigger: sks{name}")
        (self.folder / f"{name}.yaml").write_text(text)
        deployment = {
            "name": name,
            "entrypoint": "flows.retrain.retrain",
            "parameters": {"spec": str(self.folder / f"{name}.yaml"), "home": str(self.home)},
            "work_pool": {"name": "local", "job_variables": {"command": "python -m prefect.engine"}},
        }
        return deployment | ({"schedules": [{**schedule, "active": True}]} if schedule else {})

    def write_project(self, *deployments: dict[str, Any]) -> None:
        """Writes `prefect.yaml`."""
        step = {"prefect.deployments.steps.set_working_directory": {"directory": "{{ $LORALINE_PROJECT }}"}}
        document = {"name": "test", "pull": [step], "deployments": list(deployments)}
        (self.folder / "prefect.yaml").write_text(yaml.safe_dump(document))

    def command(self, *arguments: str) -> subprocess.Popen[str]:
        """Starts `loraline up` in the project."""
        line = [sys.executable, "-c", "from flows.cli import start; start()", "up", *arguments]
        pipes: Any = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        return subprocess.Popen(line, cwd=self.folder, env=self.environment, start_new_session=True, **pipes)

    @contextmanager
    def up(self, *arguments: str) -> Iterator[subprocess.Popen[str]]:
        """Runs the services inside a `with` block, from when they are ready."""
        process = self.command("--json", *(() if "--server" in arguments else ("--port", "0")), *arguments)
        try:
            assert process.stdout is not None
            assert select.select([process.stdout], [], [], 600)[0], "not ready after 600 s"
            line = process.stdout.readline()
            assert line, process.communicate()[1]
            self.addresses = json.loads(line)
            yield process
        finally:
            if process.poll() is None:
                process.send_signal(signal.SIGTERM)
                try:
                    process.communicate(timeout=900)
                except subprocess.TimeoutExpired:
                    process.kill()
                    process.communicate()

    def ask(self, path: str, body: Any = None) -> Any:
        """Sends a request to Prefect's API, again while the server starts, and returns the answer."""
        for _ in range(60):
            try:
                url = f"{self.addresses['api']}/{path}"
                # Without verification, no certificates are read for each request.
                options: Any = {"timeout": 60, "verify": False}
                answer = httpx.get(url, **options) if body is None else httpx.post(url, json=body, **options)
            except httpx.TransportError:
                time.sleep(1)
            else:
                if answer.status_code != 503:  # the server's SQLite database is locked
                    return answer.raise_for_status().json()
                time.sleep(1)
        raise AssertionError("no answer")

    def start_run(self, deployment: str) -> str:
        """Starts a run of a deployment that is due now."""
        known = self.ask(f"deployments/name/retrain/{deployment}")
        return str(self.ask(f"deployments/{known['id']}/create_flow_run", {"state": {"type": "SCHEDULED"}})["id"])

    def state(self, run: str) -> dict[str, Any]:
        """Returns the state of a flow run."""
        return dict(self.ask(f"flow_runs/{run}")["state"])

    def wait_for_end(self, *runs: str, seconds: float = 600) -> list[str]:
        """Returns the types of the runs' final states."""
        wait_until(lambda: all(self.state(run)["type"] in FINAL for run in runs), seconds)
        return [self.state(run)["type"] for run in runs]


def wait_until(condition: Callable[[], object], seconds: float = 300) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"not after {seconds} s"
        time.sleep(0.2)


def descendants(pid: int) -> list[psutil.Process]:
    return psutil.Process(pid).children(recursive=True)


def find(pid: int, *words: str) -> list[psutil.Process]:
    """Returns the processes below a process whose command lines contain all words, without guards."""

    def command(process: psutil.Process) -> str:
        try:
            return " ".join(process.cmdline())
        except psutil.Error:
            return ""

    lines = [(process, command(process)) for process in descendants(pid)]
    return [process for process, line in lines if all(word in line for word in words) and "flows.guard" not in line]


def alive(processes: list[psutil.Process]) -> list[psutil.Process]:
    return [process for process in processes if process.is_running() and process.status() != psutil.STATUS_ZOMBIE]
