"""Runs a Prefect server, MLflow and workers on this machine until a request to stop: the verb `loraline up`."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict
from pathlib import Path

from filelock import Timeout

from flows.supervision import Addresses, Supervisor, UpSettings
from lora_engine.files import atomic_write
from registry.home import Home
from tasks.errors import PipelineFailed


def run_services(
    settings: UpSettings,
    home: Home,
    stopping: threading.Event,
    *,
    announce: Callable[[Addresses], None],
    report: Callable[[str], None],
) -> None:
    """Starts the services, waits until each is ready, and runs them until `stopping` is set.

    Args:
        settings: Which services.
        home: The home whose state they show and write.
        stopping: Set by a handler of signals.
        announce: Called once, when every service is ready.
        report: Called with each line of progress and each warning.

    Raises:
        PipelineFailed: The services of the home run already, a port is taken, or a service cannot start or ended too
            often; the last lines of its log are part of the message.
        InterruptedRun: `stopping` was set before every service was ready.
    """
    # The workers of several machines may share a home.
    name = "up" if settings.server is None else f"up-{socket.gethostname()}"
    record = home.prefect / f"{name}.json"
    with _only_one(home, name, record), ExitStack() as stack:
        supervisor = Supervisor(settings, home, home.prefect / "logs" / name, stopping, stack, report)
        addresses = supervisor.start()
        atomic_write(record, json.dumps(asdict(addresses)).encode())
        stack.callback(record.unlink, missing_ok=True)
        announce(addresses)
        supervisor.watch()


@contextmanager
def _only_one(home: Home, name: str, record: Path) -> Iterator[None]:
    lock = home.lock(name, timeout=0)
    try:
        lock.__enter__()
    except Timeout as error:
        known = ", and are starting"
        with suppress(OSError, ValueError, KeyError):
            running = json.loads(record.read_text())
            known = f": {running['prefect']} (process {running['pid']})"
        raise PipelineFailed(
            f"the services of this home run already{known}",
            where=str(home.path),
            remedy="use them; or stop that process, then run the command again",
        ) from error
    try:
        record.unlink(missing_ok=True)  # of a process that was killed
        yield
    finally:
        lock.__exit__(None, None, None)
