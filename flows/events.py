"""Sends the registry's log to Prefect as events: the log is the outbox, and a cursor per server says what was sent.

The id of an event is derived from its digest in the log, so a server that gets it twice stores it once. Importing this
module is cheap; Prefect is imported only if there is something to send.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any
from uuid import NAMESPACE_URL, UUID, uuid5

from filelock import Timeout

from lora_engine.files import atomic_write, canonical_json, sha256_bytes
from registry.entities import Event, Run, now
from registry.errors import RegistryError
from registry.home import Home
from registry.lineage.record import Lineage
from registry.outbox import digests_of, events_after, failed_runs, last_event
from registry.store.redaction import redact, redact_values

_log = logging.getLogger("flows.events")
_PREFIX = "loraline.adapter."
_NAMES = {
    "promote": "promoted",
    "override": "promoted",
    "stage": "staged",
    "rollback": "rolled-back",
    "remove": "alias-removed",
    "refuse": "refused",
    "withdraw": "withdrawn",
    "delete": "deleted",
    "restore": "restored",
    "flag": "revoked",
}
"""Action of the log -> name of the event; `withdraw` by a revocation is `revoked`."""
EVENT_NAMES = tuple(dict.fromkeys(f"{_PREFIX}{name}" for name in _NAMES.values()))
RUN_FAILED = "loraline.run.failed"
_BATCH = 100
_TIMEOUT = 5.0
_OVERLAP = timedelta(days=1)
"""Runs that ended so long before the newest reported one are looked at again, because clocks differ."""


@dataclass(frozen=True)
class RelayCursor:
    """What a server has.

    Args:
        event: Number of the last event that was sent.
        begun: When the cursor was created; runs that failed before it are not sent.
        runs_since: End of the newest failed run that was sent; `begun` for none yet.
        runs: Ids of the failed runs that were sent and ended at most a day before.
    """

    event: int
    begun: datetime
    runs_since: datetime
    runs: tuple[str, ...] = ()


@dataclass(frozen=True)
class OutgoingEvent:
    """An event as Prefect takes it.

    Args:
        id: Derived from the log, the same in each attempt.
        name: Such as `loraline.adapter.promoted`.
        resource: Id of the resource, such as `loraline.adapter.zorb`.
        occurred: Time in the log.
        payload: JSON values, without secrets.
    """

    id: UUID
    name: str
    resource: str
    occurred: datetime
    payload: Mapping[str, Any]


def configured_server() -> str:
    """Returns the address of the server in `PREFECT_API_URL`; empty if it is not set."""
    return os.environ.get("PREFECT_API_URL", "").rstrip("/")


def begin_relay(home: Home, server: str, *, from_start: bool = False) -> None:
    """Makes the log as it is now the beginning, if nothing was ever sent to the server: it gets no old events.

    Args:
        home: The home.
        server: Address of the Prefect API.
        from_start: True begins before the first event, for a home that is new.
    """
    path = _cursor_path(home, server)
    if path.exists():
        return
    number = 0
    if not from_start:
        with closing(Lineage(home.lineage_url)) as lineage:
            number = last_event(lineage)
    begun = now()
    _save(path, RelayCursor(number, begun, begun))


def relay_events(home: Home, server: str, *, timeout: float = _TIMEOUT) -> list[OutgoingEvent]:
    """Sends what the log has after the cursor, and moves the cursor; the first call for a server only sets it.

    Args:
        home: The home.
        server: Address of the Prefect API.
        timeout: Limit of each request in seconds, and of the wait for another process that sends.

    Returns:
        The events that the server accepted.

    Raises:
        OSError: The server did not accept them; the cursor is unchanged, and the next call sends them.
        filelock.Timeout: Another process is sending.
    """
    with home.lock(f"relay-{_key(server)}", timeout=timeout):
        begin_relay(home, server)
        path, sent = _cursor_path(home, server), []
        cursor = _load(path)
        with closing(Lineage(home.lineage_url)) as lineage:
            if cursor.event > (last := last_event(lineage)):
                _log.warning("the log ends at event %s, before the cursor: it was restored from a backup", last)
                cursor = replace(cursor, event=last)
            for after, outgoing in _pending(lineage, cursor):
                if outgoing:
                    _post(server, outgoing, timeout)
                _save(path, after)
                sent += outgoing
    return sent


@contextmanager
def sending_events(path: Path) -> Iterator[None]:
    """Sends the events of a verb at its end, also if it was refused; does nothing without `PREFECT_API_URL`.

    A server that does not answer is a warning, because the flow `relay` sends the events later.

    Args:
        path: Path of the home.
    """
    server = configured_server()
    if not server:
        yield
        return
    is_new = not Home.open_to_read(path).exists
    if not is_new:
        _attempt(server, lambda: begin_relay(Home.open_to_read(path), server))
    try:
        yield
    finally:
        _attempt(server, lambda: _relay_home(Home.open_to_read(path), server, is_new))


def _relay_home(home: Home, server: str, is_new: bool) -> None:
    if home.exists and not home.read_only:
        begin_relay(home, server, from_start=is_new)
        relay_events(home, server)


def _attempt(server: str, action: Callable[[], None]) -> None:
    try:
        action()
    except Timeout:
        _log.debug("another process sends the events")
    except (OSError, RegistryError, ValueError) as error:
        _log.warning("Prefect at %s did not get the events yet: %s", redact(server), redact(str(error)))


def _pending(lineage: Lineage, cursor: RelayCursor) -> Iterator[tuple[RelayCursor, list[OutgoingEvent]]]:
    """Yields batches, each with the cursor after it."""
    event = cursor.event
    while events := events_after(lineage, event, _BATCH):
        event = events[-1].seq
        digests = digests_of(lineage, {entry.name for entry in events if entry.name})
        converted = (convert_event(entry, digests) for entry in events)
        outgoing = [entry for entry in converted if entry is not None]
        yield replace(cursor, event=event), outgoing
    since = max(cursor.begun, cursor.runs_since - _OVERLAP)
    failed = [run for run in failed_runs(lineage, since) if run.id not in cursor.runs]
    if failed:
        # A machine whose clock is ahead must not hide the failures that follow.
        newest = min(now(), max([cursor.runs_since, *(run.ended_at for run in failed if run.ended_at)]))
        ids = (*cursor.runs, *(run.id for run in failed))
        yield replace(cursor, event=event, runs_since=newest, runs=ids[-1000:]), [convert_run(run) for run in failed]


def convert_event(event: Event, digests: Mapping[tuple[str, int], str] | None = None) -> OutgoingEvent | None:
    """Returns the Prefect event for an entry of the log; None for entries that are none, such as exports.

    Args:
        event: The entry.
        digests: Name and number -> sha256 of the adapter file.
    """
    kind = _NAMES.get(event.action)
    if kind is None or not event.name:
        return None
    if event.action == "withdraw" and "revocation" in event.details:
        kind = "revoked"
    number = event.before if event.after is None else event.after
    payload = {
        "name": event.name,
        "version": number,
        "sha256": (digests or {}).get((event.name, number or 0)),
        "before": event.before,
        "alias": event.alias,
        "action": event.action,
        "actor": event.actor,
        "reason": event.reason,
        "event": event.seq,
        "revocation": event.details.get("revocation"),
        "gates_failed": [str(gate.get("metric")) for gate in event.gates if gate.get("passed") is False],
    }
    identity = uuid5(NAMESPACE_URL, f"loraline:event:{event.digest}:{event.seq}")
    return OutgoingEvent(identity, f"{_PREFIX}{kind}", f"{_PREFIX}{event.name}", event.at, redact_values(payload))


def convert_run(run: Run) -> OutgoingEvent:
    """Returns the Prefect event for a failed run."""
    payload = {"name": run.name, "run": run.id, "status": run.status, "host": run.host}
    identity = uuid5(NAMESPACE_URL, f"loraline:run:{run.id}:{run.status}")
    occurred = run.ended_at or run.started_at
    return OutgoingEvent(identity, RUN_FAILED, f"loraline.run.{run.name}", occurred, redact_values(payload))


def _post(server: str, outgoing: Sequence[OutgoingEvent], timeout: float) -> None:
    """Sends events in one request: `emit_event` would queue them in a thread, and not say whether they arrived."""
    import httpx
    from prefect.client.orchestration import get_client
    from prefect.events.schemas.events import Event as PrefectEvent
    from prefect.settings import PREFECT_API_URL, temporary_settings

    events = [
        PrefectEvent(
            id=entry.id,
            event=entry.name,
            occurred=entry.occurred,  # type: ignore[arg-type]
            resource={"prefect.resource.id": entry.resource, "prefect.resource.name": entry.resource},  # type: ignore[arg-type]
            payload=dict(entry.payload),
        ).model_dump(mode="json")
        for entry in outgoing
    ]
    settings: dict[str, Any] = {"timeout": httpx.Timeout(timeout)}
    try:
        with (
            temporary_settings({PREFECT_API_URL: server}),
            get_client(httpx_settings=settings, sync_client=True) as client,
        ):
            client.request("POST", "/events", json=events).raise_for_status()
    except httpx.HTTPError as error:
        raise ConnectionError(f"{type(error).__name__}: {error}") from error


def _key(server: str) -> str:
    return sha256_bytes(server.encode())[:16]


def _cursor_path(home: Home, server: str) -> Path:
    return home.path / "relay" / f"{_key(server)}.json"


def _load(path: Path) -> RelayCursor:
    data = json.loads(path.read_bytes())
    begun, since = (datetime.fromisoformat(data[name]) for name in ("begun", "runs_since"))
    return RelayCursor(int(data["event"]), begun, since, tuple(map(str, data["runs"])))


def _save(path: Path, cursor: RelayCursor) -> None:
    times = {"begun": cursor.begun.isoformat(), "runs_since": cursor.runs_since.isoformat()}
    atomic_write(path, canonical_json({"event": cursor.event, "runs": list(cursor.runs)} | times))
