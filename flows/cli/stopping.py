"""Handles Ctrl-C and SIGTERM during a run: the first makes the steps save and stop, the second stops at once."""

from __future__ import annotations

import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from flows.runners import kill_workers
from tasks.progress import clear_stop, request_stop, stop_requested


@contextmanager
def stoppable() -> Iterator[None]:
    """Handles both signals inside a `with` block, then restores the previous handlers."""
    clear_stop()

    def handle(number: int, frame: FrameType | None) -> None:
        if stop_requested():
            kill_workers()
            raise KeyboardInterrupt
        request_stop()
        print("\nStopping: saving progress. Press Ctrl-C again to stop at once.", file=sys.stderr)

    previous = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
