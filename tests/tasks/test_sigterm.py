"""Tests that SIGTERM stops the steps of a flow that a worker runs."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator

import pytest

from tasks.progress import clear_stop, stop_requested, stopping_on_sigterm


class Terminated(Exception):
    """Raised by the handler that was installed before, as Prefect's raises an exception."""


@pytest.fixture
def handler() -> Iterator[object]:
    """Installs a handler of SIGTERM and yields it."""

    def terminate(*_: object) -> None:
        raise Terminated

    previous = signal.signal(signal.SIGTERM, terminate)
    yield terminate
    signal.signal(signal.SIGTERM, previous)
    clear_stop()


def test_steps_are_asked_to_stop_before_the_handler_that_was_installed_runs(handler: object) -> None:
    with pytest.raises(Terminated), stopping_on_sigterm():
        os.kill(os.getpid(), signal.SIGTERM)
    assert stop_requested()
    assert signal.getsignal(signal.SIGTERM) is handler


def test_without_it_steps_go_on(handler: object) -> None:
    with pytest.raises(Terminated):
        os.kill(os.getpid(), signal.SIGTERM)
    assert not stop_requested()


def test_a_thread_leaves_the_handler_alone(handler: object) -> None:
    seen: list[object] = []

    def look() -> None:
        with stopping_on_sigterm():
            seen.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=look)
    thread.start()
    thread.join()
    assert seen == [handler]
