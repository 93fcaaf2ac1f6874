"""Tests the events that Prefect gets from the registry's log, with a real server."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import httpx
import pytest

import flows.events
from flows.events import RelayCursor, begin_relay, configured_server, convert_event, relay_events
from registry.home import Home
from registry.lineage.record import Lineage
from registry.versions.promotion import read_log
from registry.versions.versions import Versions
from tests.flows.commands import loraline_here
from tests.flows.shared import Trained

REFUSED = "http://127.0.0.1:9/api"


@pytest.fixture(autouse=True)
def _without_mlflow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("registry.versions.versions.sync_mlflow", lambda *_arguments, **_settings: None)


def verb(*words: str, home: Home, server: str) -> None:
    """Runs a verb with a Prefect server."""
    assert "Traceback" not in loraline_here(*words, home=home.path, PREFECT_API_URL=server).stderr


def log_of(home: Home) -> list[Any]:
    versions = Versions(home)
    log = read_log(versions)
    versions.close()
    return log


def received(server: str, home: Home) -> list[dict[str, Any]]:
    """Returns the events that the server stored for this home's log, waiting for those that the log asks for."""
    expected = {str(event.id) for entry in log_of(home) if (event := convert_event(entry))}
    deadline = time.monotonic() + 60
    while True:
        query = {"filter": {"event": {"prefix": ["loraline.adapter."]}}, "limit": 50}
        answer = httpx.post(f"{server}/events/filter", json=query, timeout=60)
        events = [event for event in answer.raise_for_status().json()["events"] if event["id"] in expected]
        if len(events) >= len(expected) - 1 or time.monotonic() > deadline:
            return sorted(events, key=lambda event: event["payload"]["event"])
        time.sleep(0.2)


def test_verbs_send_what_they_log_once_and_old_events_are_not_sent(trained: Trained, prefect_server: str) -> None:
    home = trained.home
    old = len(log_of(home))
    verb("promote", "small@1", "--to", "production", "--reason", "looks right", home=home, server=prefect_server)
    verb("withdraw", "small@1", "--reason", "too early", home=home, server=prefect_server)  # refused
    verb("unalias", "small@production", "--reason", "off", home=home, server=prefect_server)
    verb("unalias", "small@staging", "--reason", "off", home=home, server=prefect_server)
    verb("withdraw", "small@1", "--reason", "done", home=home, server=prefect_server)
    assert relay_events(home, prefect_server) == []
    events = received(prefect_server, home)
    assert [event["event"].removeprefix("loraline.adapter.") for event in events] == [
        "promoted",
        "refused",
        "alias-removed",
        "alias-removed",
        "withdrawn",
    ]
    assert {event["resource"]["prefect.resource.id"] for event in events} == {"loraline.adapter.small"}
    payload = events[0]["payload"]
    assert (payload["name"], payload["version"], payload["alias"]) == ("small", 1, "production")
    assert (payload["reason"], payload["event"]) == ("looks right", old + 1)
    assert payload["sha256"] == trained.version().sha256


def test_a_server_that_is_down_is_a_warning_and_gets_the_events_later(
    trained: Trained, prefect_server: str, caplog: pytest.LogCaptureFixture
) -> None:
    home = trained.home
    begin_relay(home, prefect_server)
    begin_relay(home, REFUSED)
    promoted = ("promote", "small@1", "--to", "production", "--reason", "r")
    verb(*promoted, home=home, server=REFUSED)
    assert "did not get the events yet" in caplog.text
    assert log_of(home)[-1].action == "promote", "the verb itself succeeded"
    with pytest.raises(ConnectionError):
        relay_events(home, REFUSED)
    assert [event.name for event in relay_events(home, prefect_server)] == ["loraline.adapter.promoted"]
    assert relay_events(home, prefect_server) == []


def test_events_that_are_sent_twice_have_the_same_id_and_are_stored_once(
    trained: Trained, prefect_server: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    home = trained.home
    begin_relay(home, prefect_server)
    loraline_here("promote", "small@1", "--to", "production", "--reason", "r", home=home.path)

    def killed(_path: Path, _cursor: RelayCursor) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(flows.events, "_save", killed)
        with pytest.raises(KeyboardInterrupt):
            relay_events(home, prefect_server)
    (again,) = relay_events(home, prefect_server)
    stored = received(prefect_server, home)
    assert [event["id"] for event in stored] == [str(again.id)]


def test_failed_runs_are_sent_once_and_earlier_ones_are_not(trained: Trained, prefect_server: str) -> None:
    lineage = Lineage(trained.home.lineage_url)
    lineage.finish_run(lineage.start_run("early", {}).id, "FAILED")
    begin_relay(trained.home, prefect_server)
    run = lineage.start_run("nightly", {})
    lineage.finish_run(run.id, "FAILED")
    (event,) = relay_events(trained.home, prefect_server)
    assert (event.name, event.resource) == ("loraline.run.failed", "loraline.run.nightly")
    assert event.payload["run"] == run.id
    assert relay_events(trained.home, prefect_server) == []
    lineage.close()


def test_a_refusal_and_a_revocation_have_names_of_their_own(trained: Trained) -> None:
    (trained.home.path / "policy.yaml").write_text("aliases: {production: {movers: [nobody]}}\n")
    loraline_here("promote", "small@1", "--to", "production", "--reason", "r", home=trained.home.path)
    loraline_here("revoke", "small@1", "--reason", "r", home=trained.home.path)
    events = [convert_event(event) for event in log_of(trained.home)]
    names = [event.name.removeprefix("loraline.adapter.") for event in events if event]
    assert names[-2:] == ["refused", "revoked"]
    assert log_of(trained.home)[-2].action == "revoke", "which has no adapter, and is in the events of its adapters"


def test_without_a_server_no_cursor_is_written(trained: Trained, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PREFECT_API_URL", raising=False)
    assert configured_server() == ""
    loraline_here("promote", "small@1", "--to", "production", "--reason", "r", home=trained.home.path)
    assert not (trained.home.path / "relay").exists()


def test_a_new_home_sends_its_first_events(home: Path, prefect_server: str) -> None:
    loraline_here("gc", home=home, PREFECT_API_URL=prefect_server)
    (cursor,) = (home / "relay").glob("*.json")
    assert json.loads(cursor.read_bytes())["event"] == 0
