"""`loraline serve` as a process: while an alias moves, beside other servers, killed, and continued by another."""

from __future__ import annotations

import os
import signal
import socket
import threading
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient

from flows.web.app import create_app
from registry.versions.promotion import promote
from registry.versions.versions import Versions
from tasks.serving.service import ServiceSettings, open_service
from tests.flows.commands import loraline_here
from tests.flows.web.server import Serving, copy_home

BODY = {"prompt": "a zorb <lora:zorb:0.7>", "steps": 2, "seed": 5}
SAFETY = """
from registry.entities import Decision

def check(images, job):
    return Decision("secret" not in job.request.prompt, ("it is secret",))
"""


def test_a_server_that_is_killed_loses_no_accepted_job_and_an_alias_moves_while_it_serves(
    tmp_path_factory: pytest.TempPathFactory, tmp_path: Path
) -> None:
    (tmp_path / "our_safety.py").write_text(SAFETY)
    home = copy_home(tmp_path_factory, tmp_path / "home")
    serving = Serving(home, PYTHONPATH=f"{tmp_path}:{os.environ.get('PYTHONPATH', '')}")
    with serving.running("--no-studio", "--safety", "our_safety:check") as process, serving.client() as client:
        assert client.post("/v1/images", json={**BODY, "prompt": "a secret"}).status_code == 403
        _promote_while_clients_draw(serving, home)

        again = loraline_here("serve", "--port", "0", "--no-studio", home=home.path)
        assert (again.returncode, again.stdout) == (1, "")
        assert "another server serves this home" in again.stderr
        taken = loraline_here("serve", "--port", serving.address.rpartition(":")[2], home=home.path)
        assert (taken.returncode, taken.stdout) == (2, "")
        assert "cannot listen" in taken.stderr

        _answers_beside_a_silent_connection(serving)
        accepted = {}
        for index in range(4):
            key = {"Idempotency-Key": f"key-{index}"}
            body = {"prompt": "a ring", "steps": 40, "seed": index}
            accepted[client.post("/v1/jobs", json=body, headers=key).json()["id"]] = (key, body)
        first = next(iter(accepted))
        with client.stream("GET", f"/v1/jobs/{first}/events") as events:
            next(line for line in events.iter_lines() if '"state":"running"' in line)
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()

    service = open_service(home, ServiceSettings(batch_images=1))
    with closing(service), TestClient(create_app(service), base_url="http://127.0.0.1") as client:
        for job_id, (key, body) in accepted.items():
            assert client.post("/v1/jobs", json=body, headers=key).json()["id"] == job_id
        assert [service.wait(job_id, 60).state for job_id in accepted] == ["completed"] * 4
        ids = [job["id"] for job in client.get("/v1/jobs").json()]
        assert len(ids) == len(set(ids))


def _promote_while_clients_draw(serving: Serving, home: Any) -> None:
    """Moves the alias while clients draw without a pause: no request fails, and the next one has the new version."""
    stopped, answers = threading.Event(), []

    def draw() -> None:
        with serving.client() as client:
            while not stopped.is_set():
                answers.append(client.post("/v1/images", json=BODY))
                stopped.wait(0.1)

    clients = [threading.Thread(target=draw) for _ in range(2)]
    for thread in clients:
        thread.start()
    with closing(Versions(home)) as versions, serving.client() as client:
        for number in (2, 1):
            promote(versions, "zorb", number, "production", reason="a test")
            answer = client.post("/v1/images", json=BODY)
            assert answer.json()["job"]["adapters"] == [f"zorb@{number}"]
    stopped.set()
    for thread in clients:
        thread.join()
    assert {answer.status_code for answer in answers} == {200}
    drawn = {(answer.json()["job"]["adapters"][0], answer.json()["images"][0]) for answer in answers}
    assert {version for version, _ in drawn} <= {"zorb@1", "zorb@2"}
    assert len(drawn) == len({version for version, _ in drawn}), "each version has its own image"


def _answers_beside_a_silent_connection(serving: Serving) -> None:
    """Checks that a connection with half of a request keeps the server from nothing."""
    host, _, port = serving.address.removeprefix("http://").partition(":")
    with socket.create_connection((host, int(port))) as silent:
        silent.sendall(b"POST /v1/jobs HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Le")
        with serving.client() as client:
            assert client.get("/healthz").status_code == 200
