"""Runs functions in threads, with a bounded number in flight, so that memory does not grow with the number of items.

For work that releases Python's lock: Pillow's codecs and filters, zlib, torch. Threads do not change results: they come
in the order of the items.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextvars import copy_context
from typing import Any, TypeVar

_Item = TypeVar("_Item")
_Result = TypeVar("_Result")
_MOST = 8


class Workers:
    """A pool of threads; a context manager that waits for all work, or cancels what has not started after an error.

    Args:
        count: Threads; None means one per core that this process may use, at most 8.
    """

    def __init__(self, count: int | None = None) -> None:
        self.count = count or min(_MOST, count_cores())
        self._executor = ThreadPoolExecutor(self.count)
        self._running: deque[Future[Any]] = deque()

    def __enter__(self) -> Workers:
        """Returns the pool."""
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Waits for all work; raises its first error if the block raised none."""
        try:
            while kind is None and self._running:
                self._running.popleft().result()
        finally:
            self._executor.shutdown(cancel_futures=True)

    def run(self, function: Callable[..., object], *arguments: object) -> None:
        """Starts a call; first waits, and raises the error of an earlier one, while `count` calls are unfinished."""
        while len(self._running) >= self.count:
            self._running.popleft().result()
        self._running.append(self._submit(function, *arguments))

    def map(self, function: Callable[[_Item], _Result], items: Iterable[_Item]) -> Iterator[_Result]:
        """Yields the results in the order of the items, and raises their errors; at most `count` wait."""
        ahead: deque[Future[_Result]] = deque()
        for item in items:
            ahead.append(self._submit(function, item))
            if len(ahead) > self.count:
                yield ahead.popleft().result()
        while ahead:
            yield ahead.popleft().result()

    def _submit(self, function: Callable[..., _Result], *arguments: object) -> Future[_Result]:
        # Context variables, such as the folder of `write_within`, hold in the threads too.
        return self._executor.submit(copy_context().run, function, *arguments)


def count_cores() -> int:
    """Returns the number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
