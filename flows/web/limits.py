"""Bounds the requests of each tenant over time: a token bucket."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable

_TENANTS = 10_000


class RequestLimit:
    """Admits some requests per minute and tenant, and as many at once after a pause.

    Args:
        per_minute: Requests per minute; 0 admits all.
        clock: Seconds that only grow.
    """

    def __init__(self, per_minute: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._rate, self._most, self._clock = per_minute / 60.0, float(per_minute), clock
        self._lock = threading.Lock()
        self._left: dict[str, tuple[float, float]] = {}

    def admit(self, tenant: str) -> int:
        """Returns 0 and counts the request, or the seconds after which it may be sent again."""
        if not self._rate:
            return 0
        with self._lock:
            now = self._clock()
            left, since = self._left.pop(tenant, (self._most, now))
            left = min(self._most, left + (now - since) * self._rate)
            is_admitted = left >= 1.0
            self._left[tenant] = (left - 1.0 if is_admitted else left), now
            while len(self._left) > _TENANTS:  # the one that was not seen for the longest time
                del self._left[next(iter(self._left))]
            return 0 if is_admitted else math.ceil((1.0 - left) / self._rate)
