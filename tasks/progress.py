"""Publishes events of running steps to listeners, and passes stop requests to steps.

Both stay in one process; `tasks.relay` carries them to and from workers in other processes. The command line listens
and displays.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Literal

from lora_engine.progress import Point

ProgressKind = Literal[
    "started", "waiting", "progress", "measured", "drawn", "warning", "cached", "completed", "skipped", "failed"
]


@dataclass(frozen=True)
class StepEvent:
    """An event of a step.

    Args:
        step: The step's name in the pipeline.
        kind: The kind of event.
        done: Number of completed units of work; of `drawn`, the training steps done.
        total: Number of all units; 0 means unknown.
        values: Current metrics, such as `loss`.
        text: The error of `failed`, the reason of `waiting` or `skipped`, or the text of `warning`.
        points: The measurements of `measured`.
        files: The sample images of `drawn`.
    """

    step: str
    kind: ProgressKind
    done: int = 0
    total: int = 0
    values: Mapping[str, float] = field(default_factory=dict)
    text: str = ""
    points: Sequence[Point] = ()
    files: Sequence[Path] = ()


Listener = Callable[[StepEvent], None]


@dataclass(frozen=True)
class _Scope:
    listener: Listener
    outer: _Scope | None
    stop: threading.Event = field(default_factory=threading.Event)


_scope: ContextVar[_Scope | None] = ContextVar("scope", default=None)
_listeners: list[Listener] = []
_stop = threading.Event()


@contextmanager
def listening(listener: Listener) -> Iterator[None]:
    """Calls the listener, from the steps' threads, with every event inside a `with` block."""
    _listeners.append(listener)
    try:
        yield
    finally:
        _listeners.remove(listener)


def publish(event: StepEvent) -> None:
    """Sends an event to all listeners."""
    for listener in list(_listeners):
        listener(event)
    for scope in _scopes():
        scope.listener(event)


def request_stop() -> None:
    """Requests that every running step saves its progress and stops."""
    _stop.set()


def clear_stop() -> None:
    """Clears an earlier stop request, before a new run."""
    _stop.clear()


@contextmanager
def stopping_on_sigterm() -> Iterator[None]:
    """Requests a stop on SIGTERM inside a `with` block, before the handler that was installed already runs.

    Prefect's handler ends a flow by an exception in the main thread, which waits for the threads of its steps. Has no
    effect in another thread than the main one, where Python runs no handlers.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    previous = signal.getsignal(signal.SIGTERM)

    def handle(number: int, frame: FrameType | None) -> None:
        request_stop()
        if callable(previous):
            previous(number, frame)

    clear_stop()
    signal.signal(signal.SIGTERM, handle)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)


def stop_requested() -> bool:
    """Returns True if a stop was requested, of all steps or of those of a scope that the caller runs in."""
    return _stop.is_set() or any(scope.stop.is_set() for scope in _scopes())


@contextmanager
def step_scope(listener: Listener) -> Iterator[threading.Event]:
    """Listens to the steps that start inside a `with` block alone, and yields what stops them alone.

    Scopes nest: an event reaches the listeners of all scopes around it.

    Args:
        listener: Called from the steps' threads, which Prefect starts with the context of the block.
    """
    scope = _Scope(listener, _scope.get())
    token = _scope.set(scope)
    try:
        yield scope.stop
    finally:
        _scope.reset(token)


def _scopes() -> Iterator[_Scope]:
    scope = _scope.get()
    while scope is not None:
        yield scope
        scope = scope.outer
