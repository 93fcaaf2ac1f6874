"""Carries events and log records of steps from workers to their run, and its stop request to the workers.

Workers are other processes, possibly on other machines; all of them see the folder of the home. The channel is a folder
in it: each worker appends to a file of its own, and the run reads all. A file `stop` asks the workers to save and stop.
The run touches the file `alive` once a second. If it no longer does, because it was killed, its workers stop, too.
"""

from __future__ import annotations

import json
import logging
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from contextvars import ContextVar, copy_context
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from uuid import uuid4

from lora_engine.lean import optional_hidden
from lora_engine.progress import Point
from registry.errors import HomeError
from registry.home import Home
from registry.store.redaction import redact
from tasks.progress import StepEvent, publish, step_scope, stop_requested
from tasks.warnings import LOGGED_PACKAGES

_log = logging.getLogger(__name__)

SILENCE = 120.0
"""Seconds without a sign of life of the run, after which its steps save and stop. NFS shows a change after up to 60."""
_POLL = 0.2
_BEAT = 1.0


@dataclass(frozen=True)
class Relay:
    """A channel; plain data that a task takes to its worker.

    Attributes:
        folder: The folder of the channel.
        level: Level of the log records that the run wants.
        prefix: Goes before the names of steps in events.
    """

    folder: Path
    level: int = logging.WARNING
    prefix: str = ""

    @property
    def stop(self) -> Path:
        """File that exists once the run asks its steps to stop."""
        return self.folder / "stop"

    @property
    def alive(self) -> Path:
        """File that the run touches while it lives."""
        return self.folder / "alive"


@contextmanager
def receive_events(home: Home) -> Iterator[Relay]:
    """Opens a channel, and publishes inside a `with` block what workers send, as if their steps ran here."""
    with home.temporary_folder() as folder:
        relay = Relay(folder, logging.getLogger("tasks").getEffectiveLevel())
        relay.alive.touch()
        receiver, ended = _Receiver(relay), threading.Event()
        # With the context of the block, whose scopes the events reach.
        arguments = (receiver.receive_until, ended)
        thread = threading.Thread(target=copy_context().run, args=arguments, name="relay", daemon=True)
        thread.start()
        try:
            yield relay
        finally:
            ended.set()
            thread.join()


@contextmanager
def relayed(relay: Relay | None) -> Iterator[None]:
    """Sends the events and log records of a `with` block to the run, in a worker; None does nothing.

    Raises:
        HomeError: The worker does not see the home of the run.
    """
    if relay is None:
        yield
        return
    if not relay.alive.exists():
        raise HomeError(
            "this worker does not see the folder of the run",
            where=str(relay.folder),
            remedy="mount the home at the same path on every worker; if the run has ended, ignore this",
        )
    sender = _Sender(relay.folder / f"{uuid4().hex}.jsonl", relay.prefix)
    ended = threading.Event()
    with optional_hidden(), step_scope(sender.send_event) as stop, sender.sending_logs(relay.level):
        thread = threading.Thread(target=_watch, args=(relay, stop, ended), name="relay", daemon=True)
        thread.start()
        _running.add(sender)
        try:
            yield
        finally:
            _running.discard(sender)
            ended.set()
            thread.join()


def _watch(relay: Relay, stop: threading.Event, ended: threading.Event) -> None:
    """Sets `stop` if the run asks for it, or is gone."""
    seen, since = -1.0, time.monotonic()
    while not ended.wait(_POLL):
        if relay.stop.exists():
            stop.set()
        try:
            beat = relay.alive.stat().st_mtime
        except OSError:
            beat = seen
        # The clock of this machine, because another one may write the file.
        if beat != seen:
            seen, since = beat, time.monotonic()
        elif time.monotonic() - since > SILENCE:
            stop.set()


class _Receiver:
    """Reads the files of a channel; remembers how far."""

    def __init__(self, relay: Relay) -> None:
        self._relay = relay
        self._read: dict[Path, int] = {}

    def receive_until(self, ended: threading.Event) -> None:
        """Publishes what comes, passes a stop request on and touches `alive`, until the event is set."""
        beat = time.monotonic()
        while not ended.wait(_POLL):
            self._publish_new()
            if stop_requested() and not self._relay.stop.exists():
                self._relay.stop.touch()
            if time.monotonic() - beat > _BEAT:
                beat = time.monotonic()
                with suppress(OSError):  # a full disk stops no run
                    self._relay.alive.touch()
        self._publish_new()

    def _publish_new(self) -> None:
        messages = [message for path in self._relay.folder.glob("*.jsonl") for message in self._read_new(path)]
        for message in sorted(messages, key=lambda message: message["time"]):
            _receive(message)

    def _read_new(self, path: Path) -> list[dict[str, Any]]:
        with path.open("rb") as file:
            file.seek(self._read.get(path, 0))
            content, newline, _ = file.read().rpartition(b"\n")  # the last line may be incomplete
        self._read[path] = self._read.get(path, 0) + len(content) + len(newline)
        return [json.loads(line) for line in content.splitlines()]


def _receive(message: Mapping[str, Any]) -> None:
    if "log" in message:
        logging.getLogger(message["log"]).log(message["level"], "%s", message["text"])
        return
    points = [Point(*point) for point in message["points"]]
    files = [Path(file) for file in message["files"]]
    event = {name: value for name, value in message.items() if name != "time"}
    publish(StepEvent(**{**event, "points": points, "files": files}))


def running_steps() -> int:
    """Returns the number of blocks of `relayed` that run in this process."""
    return len(_running)


_running: set[_Sender] = set()
_sending: ContextVar[_Sender | None] = ContextVar("sending", default=None)


class _Sender(logging.Handler):
    """Appends messages to the file of a worker, at most five a second of one step's progress."""

    def __init__(self, path: Path, prefix: str) -> None:
        super().__init__()
        self._path, self._prefix, self._next, self._failed = path, prefix, 0.0, False

    @contextmanager
    def sending_logs(self, level: int) -> Iterator[None]:
        """Sends our log records, which this process then shows nowhere else."""
        loggers = [logging.getLogger(package) for package in LOGGED_PACKAGES]
        before = [(logger.level, logger.propagate) for logger in loggers]
        token = _sending.set(self)
        for logger in loggers:
            logger.addHandler(self)
            logger.setLevel(level)
            logger.propagate = False
        try:
            yield
        finally:
            for logger, (earlier, propagate) in zip(loggers, before, strict=True):
                logger.removeHandler(self)
                logger.setLevel(earlier)
                logger.propagate = propagate
            _sending.reset(token)

    def emit(self, record: logging.LogRecord) -> None:
        """Sends a record of the step, or of a thread that no step started."""
        if _sending.get() in (None, self):
            self._send({"log": record.name, "level": record.levelno, "text": redact(record.getMessage())})

    def send_event(self, event: StepEvent) -> None:
        """Sends an event."""
        if event.kind == "progress" and event.done != event.total:
            if time.monotonic() < self._next:
                return
            self._next = time.monotonic() + _POLL
        points = [(point.step, point.time, dict(point.values)) for point in event.points]
        changed = {"values": dict(event.values), "points": points, "files": [str(file) for file in event.files]}
        self._send({**vars(event), **changed, "step": self._prefix + event.step})

    def _send(self, message: Mapping[str, Any]) -> None:
        if self._failed:
            return
        try:
            with self.lock or threading.RLock(), self._path.open("ab") as file:
                file.write(json.dumps({**message, "time": time.time()}).encode() + b"\n")
        except OSError:  # a full disk costs the display only
            self._failed = True
