"""Collects the warnings of a step, its child processes included, for lineage and for listeners.

The record of a warning reaches the terminal through `logging` as any other; the collector only listens.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

from registry.store.redaction import redact
from tasks.progress import StepEvent, publish

LOGGED_PACKAGES = ("flows", "tasks", "registry", "lora_engine")
"""The packages whose log records are ours."""
WARNINGS = "warnings"
"""The key of the warnings in the environment of an execution."""
_PACKAGES = ("lora_engine", "registry", "tasks")
_MOST = 100


@dataclass(frozen=True)
class _Collected:
    step: str
    texts: list[str] = field(default_factory=list)


_current: ContextVar[_Collected | None] = ContextVar("warnings", default=None)


class _Collector(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        if not _is_shown(record) and logging.lastResort is not None:
            logging.lastResort.handle(record)  # which `logging` leaves out because of this handler
        collected = _current.get()
        # What an artifact lists itself, such as quarantined files, is shown from there.
        if collected is None or getattr(record, "in_artifact", False) or len(collected.texts) >= _MOST:
            return
        text = redact(record.getMessage())
        if text not in collected.texts:
            collected.texts.append(text)
            publish(StepEvent(collected.step, "warning", text=text))


def _is_shown(record: logging.LogRecord) -> bool:
    """Returns True if a handler of the package or of the root writes a record to a stream."""
    package = logging.getLogger(record.name.partition(".")[0])
    return bool(logging.getLogger().handlers) or any(
        isinstance(handler, logging.StreamHandler) for handler in package.handlers
    )


_collector = _Collector(logging.WARNING)


def current_step() -> str:
    """Returns the name of the step that runs in this thread; an empty string outside of steps."""
    collected = _current.get()
    return collected.step if collected is not None else ""


@contextmanager
def collecting(step: str) -> Iterator[list[str]]:
    """Collects the distinct warnings of this thread, and of threads with its context, until the block ends.

    Publishes each as an event of the step.

    Yields:
        The texts so far, at most 100; without secrets.
    """
    for package in _PACKAGES:
        logging.getLogger(package).addHandler(_collector)  # adding it again does nothing
    collected = _Collected(step)
    token = _current.set(collected)
    try:
        yield collected.texts
    finally:
        _current.reset(token)


def with_warnings(environment: Mapping[str, Any], texts: list[str]) -> dict[str, Any]:
    """Returns the environment of an execution with its warnings; unchanged without any."""
    return {**environment, WARNINGS: [*texts]} if texts else dict(environment)


def warnings_of(environment: Mapping[str, Any]) -> list[str]:
    """Returns the warnings in the recorded environment of an execution."""
    return [str(text) for text in environment.get(WARNINGS, ())]
