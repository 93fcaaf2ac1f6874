"""Tests approvals of scheduled retraining with a real Prefect server and worker."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import pytest
import yaml

from registry.home import Home
from registry.versions.promotion import history
from registry.versions.versions import Versions
from tests.flows.browser import browsed
from tests.flows.commands import loraline_here
from tests.flows.made import run_line
from tests.flows.shared import draw_noise, wait_until_up
from tests.flows.test_schedule import LINE, PREFECT, PROJECT, environment, post, read, server, started, wait_for

__all__ = ["environment", "server"]

ASK = """\
retraining:
  release: ask
  approval_timeout: 2
  check: {sample: false}
"""
OPEN: dict[str, Any] = {
    "needs_evaluation": False,
    "needs_gate": False,
    "needs_licence": "none",
    "needs_consent": "none",
}
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
        return dict(wait_for(lambda: (now := read(self.api, path))["state"]["type"] in until and now, 300, "it ended"))

    def answer(self, run: str, **answer: str) -> dict[str, Any]:
        """Answers as the page does."""
        return dict(post(self.api, f"flow_runs/{run}/resume", {"run_input": answer}))

    def loraline(self, *arguments: object, actor: str = "anna") -> subprocess.CompletedProcess[str]:
        from prefect.settings import PREFECT_API_URL, temporary_settings

        with temporary_settings({PREFECT_API_URL: self.api}):
            return loraline_here(*arguments, home=self.home.path, LORALINE_ACTOR=actor)

    def read(self, run: str) -> dict[str, Any]:
        return dict(read(self.api, f"flow_runs/{run}"))

    def sha256(self, ref: str) -> str:
        with closing(Versions(self.home)) as versions:
            return versions.show(*ref.split("@")).sha256

    def production(self) -> int | None:
        with closing(Versions(self.home)) as versions:
            return next((v.version for v in versions.list("nightly") if "production" in v.aliases), None)

    def events(self) -> list[tuple[str, int | None, str, str]]:
        with closing(Versions(self.home)) as versions:
            return [(e.action, e.after, e.actor, e.reason) for e in history(versions, "nightly", "production")]


@pytest.fixture
def server_with_pages(environment: dict[str, str], tmp_path: Path) -> Iterator[str]:
    """Yields the address of a server that serves its pages, too."""
    api = environment["PREFECT_API_URL"]
    port = api.rpartition(":")[2].removesuffix("/api")
    with started([PREFECT, "server", "start", "--host", "127.0.0.1", "--port", port], environment, tmp_path / "log"):
        wait_until_up(api)
        yield api


@contextmanager
def scheduled(folder: Path, api: str, environment: dict[str, str]) -> Iterator[Scheduled]:
    folder.mkdir()
    made = Scheduled(folder, api, environment)
    with working(environment, folder / "worker.log"):
        wait_for(lambda: read(api, "work_pools/local"), 300, "the work pool is there")
        yield made


def working(environment: dict[str, str], log: Path) -> started:
    return started([PREFECT, "worker", "start", "--pool", "local", "--type", "process"], environment, log)


def state_of(run: dict[str, Any]) -> tuple[str, str, str]:
    return run["state"]["type"], run["state"]["name"], run["state"]["message"]


@pytest.mark.nightly
@pytest.mark.usefixtures("trained_here")
def test_a_run_waits_for_an_approval_and_a_user_decides(
    server: str, environment: dict[str, str], tmp_path: Path
) -> None:
    with scheduled(tmp_path / "work", server, environment) as line:
        first = line.stage(1)
        line.deploy()
        waiting = line.tick()
        assert state_of(waiting)[:2] == ("PAUSED", "AwaitingApproval")
        assert waiting["state"]["message"].startswith(f"{first} (sha256 ")

        meanwhile = line.tick()
        assert state_of(meanwhile) == (
            "COMPLETED", "NothingChanged", f"every step is cached; {first} waits for an approval"
        ), "a waiting run holds no slot, and asks once"  # fmt: skip
        refused = line.loraline("approve", first, "--reason", "sharp", actor="carl")
        assert refused.returncode == 1
        assert "carl may not move this alias; anna, ben may" in refused.stderr
        assert line.events() == []
        approved = line.loraline("approve", first, "--reason", "sharp", "--json")
        assert approved.returncode == 0, approved.stderr
        assert json.loads(approved.stdout)["flow_run"] == waiting["id"]
        assert state_of(line.wait(waiting["id"])) == ("COMPLETED", "Promoted", f"{first} is production")
        assert line.events() == [("promote", 1, "anna", "sharp")]
        again = line.loraline("approve", first, "--reason", "sharp")
        assert again.returncode == 1
        assert f"no run waits for {first}" in again.stderr
        assert "loraline promote" in again.stderr

        second = line.stage(2)
        waiting = line.tick()
        form = read(
            server,
            f"flow_runs/{waiting['id']}/input/{waiting['state']['state_details']['run_input_keyset']['description']}",
        )
        assert "nightly@1 -> nightly@2" in form
        assert "adapter.seed: 1 -> 2" in form
        assert line.answer(waiting["id"], decision="approve")["status"] == "REJECT", "the form requires all fields"
        answer = {"decision": "reject", "reason": "blurred", "actor": "ben", "sha256": line.sha256(second)}
        assert line.answer(waiting["id"], **answer)["status"] == "ACCEPT"
        assert state_of(line.wait(waiting["id"])) == (
            "COMPLETED", "Rejected", f"{second} not production: ben: blurred"
        )  # fmt: skip
        assert line.events()[-1] == ("refuse", 2, "ben", "blurred")
        assert state_of(line.tick())[1] == "NothingChanged", "a rejected version is not asked about again"

        third = line.stage(3)
        waiting, other = line.tick(), line.sha256(second)
        assert waiting["state"]["message"].startswith(third)
        line.answer(waiting["id"], decision="approve", reason="sharp", actor="ben", sha256=other)
        state = state_of(line.wait(waiting["id"]))
        assert state == (
            "FAILED",
            "Refused",
            f"{third} not production: the approval is for sha256 {other[:16]}, this is {line.sha256(third)[:16]}",
        )
        waiting = line.tick()
        assert waiting["state"]["name"] == "AwaitingApproval", "a refused answer decides nothing"
        fourth = line.stage(4)
        line.answer(waiting["id"], decision="approve", reason="sharp", actor="ben", sha256=line.sha256(third))
        state = state_of(line.wait(waiting["id"]))
        assert state == (
            "FAILED", "Refused", f"{third} not production: it moved: it is not trial any more, {fourth} has it"
        )  # fmt: skip
        assert line.production() == 1


@pytest.mark.nightly
@pytest.mark.usefixtures("trained_here")
def test_approvals_expire_and_answers_survive_another_run(
    server: str, environment: dict[str, str], tmp_path: Path
) -> None:
    work = tmp_path / "work"
    with scheduled(work, server, environment) as line:
        first = line.stage(1, ASK.replace("timeout: 2", "timeout: 0.001"))
        line.deploy()
        waiting = line.tick()
        assert waiting["state"]["name"] == "AwaitingApproval"
        state = state_of(line.wait(waiting["id"]))  # ended by a run that Prefect starts at the deadline
        assert state[:2] == ("FAILED", "ApprovalExpired")
        assert state[2].startswith(f"{first} not production: no approval until ")
        assert line.production() is None
        assert state_of(line.tick())[1] == "NothingChanged"
        second = line.stage(2)
        waiting = line.tick()
        assert waiting["state"]["name"] == "AwaitingApproval"
    # Both are due when the next worker starts; the limit of the deployment cancels the later one.
    due = {"state": {"type": "SCHEDULED", "state_details": {"scheduled_time": "2020-01-01T00:00:00Z"}}}
    tick = post(server, f"deployments/{line.deployment}/create_flow_run", due)["id"]
    answer = {"decision": "approve", "reason": "sharp", "actor": "ben", "sha256": line.sha256(second)}
    assert line.answer(waiting["id"], **answer)["status"] == "ACCEPT"
    with working(environment, work / "second.log"):
        assert state_of(line.wait(tick, (*ENDED, "PAUSED")))[0] in ("COMPLETED", "CANCELLED"), "nobody is asked twice"
        state = wait_for(lambda: (now := state_of(line.read(waiting["id"])))[1] == "Promoted" and now, 300, "promoted")
        assert state == ("COMPLETED", "Promoted", f"{second} is production")
    assert line.events()[-1] == ("promote", 2, "ben", "sharp")


@pytest.mark.nightly
@pytest.mark.needs("chromium")
@pytest.mark.usefixtures("trained_here")
def test_a_user_approves_on_the_page_of_prefect(
    server_with_pages: str, environment: dict[str, str], tmp_path: Path
) -> None:
    with scheduled(tmp_path / "work", server_with_pages, environment) as line:
        first = line.stage(1)
        line.deploy()
        waiting = line.tick()
        with browsed(tmp_path / "browser") as page:
            page.open(f"{server_with_pages.removesuffix('/api')}/runs/flow-run/{waiting['id']}")
            page.wait_for_text("AwaitingApproval")
            page.click("Resume")
            page.wait_for_text(f"{first} (sha256 ")
            page.type("Decision", "approve")
            page.type("Reason", "sharp rings")
            page.type("Your name", "anna")
            page.click("Submit")
            assert state_of(line.wait(waiting["id"])) == ("COMPLETED", "Promoted", f"{first} is production")
            page.wait_for_text("Promoted")
        assert line.events() == [("promote", 1, "anna", "sharp rings")]


def test_approving_without_a_server_names_the_verb_that_needs_none(tmp_path: Path) -> None:
    from prefect.settings import PREFECT_API_URL, temporary_settings

    from tests.flows.made import register_zorb

    home = register_zorb(tmp_path)
    with temporary_settings(restore_defaults={PREFECT_API_URL}):
        done = loraline_here("approve", "zorb@1", "--reason", "sharp", home=home)
    assert done.returncode == 2
    assert "no Prefect server is configured" in done.stderr
    assert "loraline promote zorb@1 --to production" in done.stderr
