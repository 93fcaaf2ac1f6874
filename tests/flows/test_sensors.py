"""Tests the sensors with a real Prefect server, a local S3 server and a stand-in for the hub."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from uuid import uuid4

import httpx
import pytest

from registry.entities import now
from tests.flows.conftest import PREPARE, draw_noise

COMMIT = "a" * 40


@pytest.fixture
def deployment(prefect_server: str, pipeline: Callable[..., Path]) -> tuple[str, Path, str]:
    """Returns name and id of a deployment of `retrain`, and the folder of its pipeline file."""
    from prefect.client.orchestration import get_client

    path = pipeline(PREPARE.replace("images: images/", "images: images/, consent: consent.csv"))
    (path.parent / "consent.csv").write_text("file,consent\n0.png,C-1\n")
    name = f"test-{uuid4().hex[:8]}"
    with get_client(sync_client=True) as client:
        flow = client.create_flow_from_name("retrain")
        created = client.create_deployment(flow, name, parameters={"spec": str(path)})
    return f"retrain/{name}", path.parent, str(created)


def run_of(flow: Any, home: Path, deployment: str, **options: Any) -> tuple[str, str]:
    """Runs a sensor; returns name and message of its state."""
    state = flow(home=str(home), deployments=[deployment], return_state=True, **options)
    return state.name, state.message or ""


def runs_of(server: str, deployment: str) -> list[dict[str, Any]]:
    query = {"flow_runs": {"deployment_id": {"any_": [deployment]}}}
    runs: list[dict[str, Any]] = httpx.post(f"{server}/flow_runs/filter", json=query, timeout=60).json()
    return runs


def test_a_changed_file_starts_one_run_even_if_the_sensor_is_killed(
    prefect_server: str, deployment: tuple[str, Path, str], home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from flows import sensors

    name, folder, identity = deployment
    assert run_of(sensors.watch_files, home, name)[0] == "NothingChanged"
    assert run_of(sensors.watch_files, home, name)[0] == "NothingChanged"
    assert runs_of(prefect_server, identity) == []
    draw_noise(folder / "images" / "new.png", 9)

    def killed(*_: object) -> None:
        raise RuntimeError("killed")

    with monkeypatch.context() as patch:
        patch.setattr(sensors, "_save_state", killed)
        assert run_of(sensors.watch_files, home, name)[0] == "Failed"
    assert len(runs_of(prefect_server, identity)) == 1, "it was killed after it started the run"
    assert run_of(sensors.watch_files, home, name) == ("Triggered", f"started {name}")
    assert len(runs_of(prefect_server, identity)) == 1, "the same change"
    assert run_of(sensors.watch_files, home, name)[0] == "NothingChanged"
    (folder / "images" / "new.png").unlink()
    assert run_of(sensors.watch_files, home, name)[0] == "Triggered"
    assert len(runs_of(prefect_server, identity)) == 2, "the return to an earlier state is a change, too"


def test_a_run_that_a_limit_cancelled_is_started_again(
    prefect_server: str, deployment: tuple[str, Path, str], home: Path
) -> None:
    from flows.sensors import watch_files

    name, folder, identity = deployment
    run_of(watch_files, home, name)
    (folder / "images" / "0.png").unlink()
    run_of(watch_files, home, name)
    (run,) = runs_of(prefect_server, identity)
    cancelled = {"state": {"type": "CANCELLED"}, "force": True}
    httpx.post(f"{prefect_server}/flow_runs/{run['id']}/set_state", json=cancelled, timeout=60).raise_for_status()
    assert run_of(watch_files, home, name)[0] == "Triggered"
    assert len(runs_of(prefect_server, identity)) == 2


def test_a_changed_consent_starts_a_run_and_those_that_expire_soon_are_named(
    prefect_server: str, deployment: tuple[str, Path, str], home: Path
) -> None:
    from flows.sensors import watch_consent

    name, folder, identity = deployment
    assert run_of(watch_consent, home, name)[0] == "NothingChanged"
    day = now().date() + timedelta(days=5)
    (folder / "consent.csv").write_text(f"file,consent,expires\n0.png,C-1,{day}\n")
    state, message = run_of(watch_consent, home, name, days=30)
    assert (state, f"1 consents expire soon: 0.png on {day}" in message) == ("Triggered", True)
    assert len(runs_of(prefect_server, identity)) == 1
    assert "expire" not in run_of(watch_consent, home, name, days=1)[1]


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, str]]:
    """Yields the commit by repository of a hub that answers about models."""
    commits: dict[str, str] = {}

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            repository = self.path.removeprefix("/api/models/").partition("/revision/")[0]
            found = repository in commits
            body = json.dumps({"id": repository, "modelId": repository, "sha": commits.get(repository)}).encode()
            self.send_response(200 if found else 404)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            """Logs nothing."""

    from huggingface_hub import constants

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as http:
        threading.Thread(target=http.serve_forever, daemon=True).start()
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{http.server_port}")
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        yield commits
        http.shutdown()


def test_a_new_commit_of_the_base_starts_a_run_and_no_hub_is_a_state_of_its_own(
    prefect_server: str,
    deployment: tuple[str, Path, str],
    home: Path,
    hub: dict[str, str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from huggingface_hub import constants

    from flows import sensors

    name, _, identity = deployment
    assert run_of(sensors.watch_base, home, name) == ("NothingChanged", ""), "the embedded base is on no hub"
    (known,) = sensors.find_pipelines([name])
    # A pipeline file whose base was not downloaded does not load, so the base is replaced in the loaded one.
    (loaded,) = known.pipelines
    published = replace(known, pipelines=(replace(loaded, base="studio/base"),))
    monkeypatch.setattr(sensors, "find_pipelines", lambda _names: [published])
    hub["studio/base"] = COMMIT
    assert run_of(sensors.watch_base, home, name) == ("NothingChanged", f"{name}: studio/base is at {COMMIT[:12]}")
    hub["studio/base"] = "b" * 40
    assert run_of(sensors.watch_base, home, name)[0] == "Triggered"
    assert len(runs_of(prefect_server, identity)) == 1
    del hub["studio/base"]
    assert run_of(sensors.watch_base, home, name)[0] == "Offline"
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    state, message = run_of(sensors.watch_base, home, name)
    assert (state, "HF_HUB_OFFLINE is set" in message) == ("Offline", True)


def test_a_base_that_is_pinned_to_a_commit_is_not_looked_up() -> None:
    from tasks.operations.watched_base import read_revision

    assert read_revision(f"studio/base@{COMMIT}", 1.0) is None
    assert read_revision("tiny", 1.0) is None


def test_a_listing_changes_with_a_file_in_a_folder_that_fsspec_knows(tmp_path: Path) -> None:
    from registry.errors import StoreError
    from tasks.operations.watched_folder import list_folder

    (tmp_path / "a.png").write_bytes(b"a")
    url = tmp_path.as_uri()
    before = list_folder(url)
    assert list_folder(url) == before
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "b.png").write_bytes(b"b")
    assert len(list_folder(url)) == 2
    with pytest.raises(StoreError, match="no such bucket or folder"):
        list_folder(f"{url}/missing")
    os.utime(tmp_path / "a.png", (1, 1))
    assert list_folder(url)[0] != before[0]
