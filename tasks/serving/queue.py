"""Orders the waiting jobs of tenants fairly: start-time fair queueing (Goyal, Vin and Cheng, 1996).

Each tenant has a virtual time that advances by the cost of its jobs; the tenant whose time is earliest is next. Unlike
deficit round robin, a tenant whose queue was empty for a moment keeps what it used before.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass


@dataclass(frozen=True)
class Waiting:
    """A job that waits.

    Attributes:
        id: The job.
        tenant: Its tenant.
        cost: What it adds to the tenant's virtual time.
        arrival: Orders jobs of tenants whose times are equal.
    """

    id: str
    tenant: str
    cost: int
    arrival: int


class FairQueue:
    """The waiting jobs. Not thread-safe."""

    def __init__(self) -> None:
        self._queues: dict[str, deque[Waiting]] = {}
        self._times: dict[str, float] = {}
        self._now = 0.0
        self._arrivals = 0
        self._positions: dict[str, int] | None = None

    def __len__(self) -> int:
        return sum(map(len, self._queues.values()))

    def count(self, tenant: str) -> int:
        """Returns the number of waiting jobs of a tenant."""
        return len(self._queues.get(tenant, ()))

    def counts(self) -> dict[str, int]:
        """Returns the number of waiting jobs of each tenant that has one."""
        return {tenant: len(queue) for tenant, queue in self._queues.items()}

    def push(self, job_id: str, tenant: str, cost: int) -> None:
        """Adds a job behind those of its tenant."""
        if tenant not in self._queues:
            self._queues[tenant] = deque()
            self._times[tenant] = max(self._times.get(tenant, 0.0), self._now)
        self._arrivals += 1
        self._queues[tenant].append(Waiting(job_id, tenant, cost, self._arrivals))
        self._positions = None

    def heads(self) -> list[str]:
        """Returns the first job of each tenant, the next to draw first."""
        return [self._queues[tenant][0].id for tenant in sorted(self._queues, key=self._rank)]

    def pop(self, job_id: str) -> bool:
        """Removes a first job that is drawn now, and charges its tenant; returns False if it is none."""
        for tenant, queue in self._queues.items():
            head = queue[0]
            if head.id == job_id:
                self._remove(head)
                self._now = max(self._now, self._times[tenant])
                self._times[tenant] += head.cost
                return True
        return False

    def remove(self, job_id: str) -> None:
        """Removes a job that is not drawn; its tenant pays nothing. Does nothing if it does not wait."""
        for queue in self._queues.values():
            for entry in queue:
                if entry.id == job_id:
                    self._remove(entry)
                    return

    def position(self, job_id: str) -> int:
        """Returns the place of a job in the order of drawing, from 1; 0 if it does not wait."""
        if self._positions is None:
            self._positions = {job_id: place for place, job_id in enumerate(self._order(), 1)}
        return self._positions.get(job_id, 0)

    def settle(self) -> None:
        """Forgets what tenants used; called while nothing waits or is drawn, when nobody had to wait for them."""
        if not self._queues:
            self._times.clear()
            self._now = 0.0

    def _rank(self, tenant: str) -> tuple[float, int]:
        return self._times[tenant], self._queues[tenant][0].arrival

    def _remove(self, entry: Waiting) -> None:
        queue = self._queues[entry.tenant]
        queue.remove(entry)
        if not queue:
            del self._queues[entry.tenant]
        self._positions = None

    def _order(self) -> list[str]:
        """Returns the waiting jobs in the order in which they would be drawn one by one."""
        times, left = dict(self._times), {tenant: deque(queue) for tenant, queue in self._queues.items()}
        order = []
        while left:
            tenant = min(left, key=lambda name: (times[name], left[name][0].arrival))
            head = left[tenant].popleft()
            order.append(head.id)
            times[tenant] += head.cost
            if not left[tenant]:
                del left[tenant]
        return order
