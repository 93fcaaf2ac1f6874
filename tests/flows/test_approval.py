"""Tests approvals of scheduled retraining with a real Prefect server and worker."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from registry.home import Home
from registry.versions.promotion import history
from registry.versions.versions import Versions
from tests.flows.commands import loraline_here
from tests.flows.made import run_line
from tests.flows.shared import draw_noise
from tests.flows.test_schedule import LINE, PREFECT, PROJECT, environment, post, read, server, started, wait_for

__all__ = ["environment", "server"]

ASK = """\
retraining:
  release: ask
  approval_timeout: 2
  check: {sample: false}
"""
OPEN: dict[str, Any] = {"needs_evaluation": False, "needs_gate": False, "needs_licence": "none", "needs_consent": "none"}
ENDED = ("COMPLETED", "FAILED", "CRASHED", "CANCELLED")


class Scheduled:
    """A deployed pipeline with a server and a worker."""

    def __init__(self, folder: Path, api: str, environment: dict[str, str]) -> None:
        self.folder, self.api, self.environment = folder, api, environment
        self.home, self.spec = Home.open(folder / "home"), folder / "line.yaml"
        (folder / "images").mkdir()
        for index in range(4):
            draw_noise(folder / "images" / f"{index}.png", index)
        policy = {"aliases": {"production": OPEN | {"movers": ["anna", "ben"]}}}
        (self.home.path / "policy.yaml").write_text(yaml.safe_dump(policy))

    def stage(self, seed: int, settings: str = ASK) -> str:
        """Makes the pipeline stage a version in this process, and returns it; the worker finds its steps cached."""
        self.spec.write_text(settings + LINE.replace("seed: 7", f"seed: {seed}"))
        return run_line(self.spec, self.home).ref

    def deploy(self) -> None:
        output = self.folder / "prefect.yaml"
        done = self.loraline("deployments", self.spec, "--output", output)
        assert done.returncode == 0, done.stderr
        command = [PREFECT, "--no-prompt", "deploy", "--all", "--prefect-file", str(output)]
        done = subprocess.run(command, env=self.environment, cwd=PROJECT, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stdout + done.stderr
        self.deployment = read(self.api, "deployments/name/retrain/nightly")["id"]

    def tick(self, until: tuple[str, ...] = (*ENDED, "PAUSED")) -> dict[str, Any]:
        """Starts a run, and returns it once it has ended or waits."""
        run = post(self.api, f"deployments/{self.deployment}/create_flow_run", {"state": {"type": "SCHEDULED"}})
        return self.wait(run["id"], until)

    def wait(self, run: str, until: tuple[str, ...] = ENDED) -> dict[str, Any]:
        path = f"flow_runs/{run}"
        return wait_for(lambda: (now := read(self.api, path))["state"]["type"] in until and now, 300, "the run ended")

    def answer(self, run: str, **answer: str) -> dict[str, Any]:
        """Answers as the page does."""
        reply = httpx.post(f"{self.api}/flow_runs/{run}/resume", json={"run_input": answer}, timeout=60)
        return reply.raise_for_status().json()

    def loraline(self, *arguments: object, actor: str = "anna") -> subprocess.CompletedProcess[str]:
        from prefect.settings import PREFECT_API_URL, temporary_settings

        with temporary_settings({PREFECT_API_URL: self.api}):
            return loraline_here(*arguments, home=self.home.path, LORALINE_ACTOR=actor)

    def events(self) -> list[tuple[str, int | None, str, str]]:
        with closing(Versions(self.home)) as versions:
            return [(e.action, e.after, e.actor, e.reason) for e in history(versions, "nightly", "production")]


@contextmanager
def scheduled(folder: Path, api: str, environment: dict[str, str]) -> Iterator[Scheduled]:
    folder.mkdir()
    made = Scheduled(folder, api, environment)
    worker = [PREFECT, "worker", "start", "--pool", "local", "--type", "process"]
    with started(worker, environment, folder / "worker.log"):
        wait_for(lambda: read(api, "work_pools/local"), 300, "the work pool is there")
        yield made


@pytest.mark.usefixtures("trained_here")
def test_a_run_waits_for_an_approval_and_a_person_decides(
    server: str, environment: dict[str, str], tmp_path: Path
) -> None:
    with scheduled(tmp_path / "work", server, environment) as line:
        first = line.stage(1)
        line.deploy()
        waiting = line.tick()
        print(waiting["state"])
        print((tmp_path / "work" / "worker.log").read_text()[-3000:])
        assert waiting["state"]["name"] == "AwaitingApproval"
        assert waiting["state"]["message"].startswith(f"{first} (sha256 ")
        done = line.loraline("approve", first, "--reason", "sharp", actor="carl")
        print(done)
        done = line.loraline("approve", first, "--reason", "sharp")
        print(done)
        assert done.returncode == 0, done.stderr
        print(line.wait(waiting["id"])["state"])
        print(line.events())
        print(post(server, "artifacts/filter", {}))
        print((tmp_path / "work" / "worker.log").read_text()[-3000:])
        assert 0
