"""What a running step tells the world, and how the world asks it to stop.

Steps run in threads of one process; the command line subscribes and draws. Nothing here draws or logs.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Literal

Kind = Literal["started", "waiting", "progress", "cached", "completed", "failed"]


@dataclass(frozen=True)
class StepEvent:
    """One thing that happened to one step.

    Args:
        step: The step's name in the pipeline.
        kind: What happened.
        done: How many units of its work are done.
        total: Of how many; 0 where it is not known.
        values: Figures of the moment, such as `loss`.
        text: For `failed`, why; for `waiting`, for what.
    """

    step: str
    kind: Kind
    done: int = 0
    total: int = 0
    values: Mapping[str, float] = field(default_factory=dict)
    text: str = ""


Listener = Callable[[StepEvent], None]

_listeners: list[Listener] = []
_stop = threading.Event()


@contextmanager
def listening(listener: Listener) -> Iterator[None]:
    """Sends every event to the listener while the block lasts; the listener is called from the steps' threads."""
    _listeners.append(listener)
    try:
        yield
    finally:
        _listeners.remove(listener)


def publish(event: StepEvent) -> None:
    """Tells all listeners."""
    for listener in list(_listeners):
        listener(event)


def request_stop() -> None:
    """Asks every running step to save what it has and stop."""
    _stop.set()


def clear_stop() -> None:
    """Forgets an earlier request, before a new run."""
    _stop.clear()


def stop_requested() -> bool:
    """Whether the running steps have been asked to stop."""
    return _stop.is_set()
