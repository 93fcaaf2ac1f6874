"""`JobBoard`: the state of all jobs of a server, shared by the threads of requests and the one that draws."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from dataclasses import replace

from registry.entities import now
from registry.errors import HomeError
from tasks.serving.job import (
    Failure,
    Job,
    JobState,
    KeyReused,
    QueueFull,
    ServiceClosed,
    TenantQueueFull,
    UnknownJob,
)
from tasks.serving.metrics import ServingMetrics
from tasks.serving.queue import FairQueue
from tasks.serving.records import JobRecords
from tasks.serving.settings import ServiceSettings

_logger = logging.getLogger(__name__)
_PATIENCE = 2.0
"""Seconds to wait for a preview of the next step."""


class JobBoard:
    """Jobs that wait or are drawn in memory, ended ones in the records.

    Args:
        records: The jobs on the disk. Those that have not ended wait again.
        settings: The settings.
        metrics: Counts the jobs.
    """

    def __init__(self, records: JobRecords, settings: ServiceSettings, metrics: ServingMetrics) -> None:
        self._records, self._settings, self._metrics = records, settings, metrics
        self._changed = threading.Condition()
        self._active: dict[str, Job] = {}
        self._unsaved: dict[str, Job] = {}
        self._queue = FairQueue()
        self._previews: dict[str, tuple[int, bytes]] = {}
        self._watched: set[str] = set()
        self._listeners: set[Callable[[str], None]] = set()
        self._is_closing = self._is_stopping = False
        metrics.watch_queue(self.counts)
        for job in records.unfinished():
            self._active[job.id] = job
            self._queue.push(job.id, job.tenant, job.cost)

    def find_key(self, tenant: str, key: str | None, fingerprint: str) -> Job | None:
        """Returns the job that a tenant's idempotency key names, or None.

        Raises:
            KeyReused: The key was sent with another request.
        """
        known = None if key is None else self._records.find_key(tenant, key)
        if known is None:
            return None
        if known[1] != fingerprint:
            raise KeyReused(f"the idempotency key {key!r} belongs to another request", remedy="send another key")
        return self.job(known[0])

    def require_room(self, tenant: str) -> None:
        """Raises an error if no job of a tenant is accepted now.

        Raises:
            ServiceClosed: The server stops.
            QueueFull: Too many jobs wait, of all tenants or of this one.
        """
        with self._changed:
            if self._is_closing:
                raise ServiceClosed("the server stops", remedy="send the request again later")
            waiting, own = len(self._queue), self._queue.count(tenant)
            if waiting >= self._settings.queue_limit:
                raise QueueFull(f"{waiting} jobs wait", remedy="send the request again later")
            if own >= self._settings.waiting_per_tenant:
                raise TenantQueueFull(f"{own} of your jobs wait", remedy="send the request again later")

    def add(self, job: Job, fingerprint: str, key: str | None) -> Job:
        """Accepts a job: when this returns, it is on the disk. A known key returns its job instead.

        Raises:
            HomeError: It could not be stored, for instance `DiskFull`.
        """
        with self._changed:
            known = self.find_key(job.tenant, key, fingerprint)
            if known is not None:
                return known
            self.require_room(job.tenant)
            self._records.add(job, fingerprint, key)
            self._active[job.id] = job
            self._queue.push(job.id, job.tenant, job.cost)
            self._announce(job.id)
            return self.job(job.id)

    def job(self, job_id: str) -> Job:
        """Returns a job as it is now.

        Raises:
            UnknownJob: There is none.
        """
        with self._changed:
            job = self._active.get(job_id) or self._unsaved.get(job_id)
            if job is not None:
                return replace(job, position=self._queue.position(job_id))
        job = self._records.find(job_id)
        if job is None:
            raise UnknownJob(f"unknown job {job_id[:40]!r}")
        return job

    def jobs(self, tenant: str | None, limit: int) -> list[Job]:
        """Returns the latest jobs of a tenant, or of all, in the order of their acceptance."""
        return [self.job(job.id) if not job.state.is_final else job for job in self._records.latest(tenant, limit)]

    def counts(self) -> dict[str, int]:
        """Returns the number of waiting jobs of each tenant that has one."""
        with self._changed:
            return self._queue.counts()

    def waiting(self) -> list[Job]:
        """Returns the jobs that wait."""
        with self._changed:
            return [job for job in self._active.values() if job.state is JobState.QUEUED]

    def wait_for_end(self, job_id: str, seconds: float | None) -> Job:
        """Returns a job when it has ended, or after some seconds."""
        with self._changed:
            self._changed.wait_for(lambda: job_id not in self._active, seconds)
        return self.job(job_id)

    def listen(self, listener: Callable[[str], None]) -> None:
        """Calls a function with the identifier of each job that changes, from the thread that changes it."""
        with self._changed:
            self._listeners.add(listener)

    def unlisten(self, listener: Callable[[str], None]) -> None:
        """Ends `listen`."""
        with self._changed:
            self._listeners.discard(listener)

    def take(self, seconds: float) -> Job | None:
        """Returns the next job, which is drawn now; None if none comes within some seconds."""
        with self._changed:
            self._wait_for_jobs(seconds)
            heads = self._queue.heads()
            return None if self._is_closing or not heads else self.claim(heads[0])

    def heads(self, seconds: float) -> list[Job]:
        """Returns the first waiting job of each tenant, the next to draw first; waits some seconds if there is none."""
        with self._changed:
            self._wait_for_jobs(seconds)
            return [] if self._is_closing else [self._active[job_id] for job_id in self._queue.heads()]

    def claim(self, job_id: str) -> Job | None:
        """Makes the first waiting job of a tenant one that is drawn now; None if it does not wait any more."""
        with self._changed:
            if self._is_closing or not self._queue.pop(job_id):
                return None
            job = self._active[job_id] = replace(self._active[job_id], state=JobState.RUNNING)
            self._metrics.waiting_seconds.observe((now() - job.created).total_seconds())
            self._announce(job_id)
            return job

    def settle(self) -> None:
        """Ends a busy period of the queue; called while nothing is drawn."""
        with self._changed:
            self._queue.settle()

    def advance(self, job_id: str, step: int, steps: int) -> bool:
        """Stores the progress of a job, and returns False if it must stop."""
        with self._changed:
            job = self._active.get(job_id)
            if job is None or self._is_stopping:
                return False
            self._active[job_id] = replace(job, step=step, steps=steps)
            self._announce(job_id)
            return True

    def wants_preview(self, job_id: str) -> bool:
        """Returns True, once, if a client asked for a preview of a job."""
        with self._changed:
            is_wanted = job_id in self._watched
            self._watched.discard(job_id)
            return is_wanted

    def show_preview(self, job_id: str, image: bytes) -> None:
        """Stores the preview of a job after its current step."""
        with self._changed:
            if job_id in self._active:
                self._previews[job_id] = self._active[job_id].step, image
                self._changed.notify_all()

    def preview(self, job_id: str) -> bytes | None:
        """Returns the latest preview of a running job, after waiting for its next step; None if there is none."""
        with self._changed:
            before = self._previews.get(job_id, (0, b""))[0]
            if job_id in self._active and self._active[job_id].state is JobState.RUNNING:
                self._watched.add(job_id)
                self._changed.wait_for(
                    lambda: job_id not in self._active or self._previews.get(job_id, (0, b""))[0] > before, _PATIENCE
                )
            return self._previews.get(job_id, (0, None))[1]

    def end(self, job_id: str, state: JobState, failure: Failure | None = None, size: int = 0) -> bool:
        """Ends a job unless it has ended; returns False if it had.

        A final state that cannot be stored is kept in memory, and stored later.
        """
        with self._changed:
            job = self._active.pop(job_id, None)
            if job is None:
                return False
            self._queue.remove(job_id)
            self._previews.pop(job_id, None)
            self._watched.discard(job_id)
            error = None if failure is None else failure.message
            step = job.steps if state is JobState.COMPLETED else job.step
            job = replace(job, state=state, failure=failure, error=error, size=size, step=step, ended=now())
            self._unsaved[job_id] = job
            self.save()
            self._metrics.count_end(job)
            self._announce(job_id)
            return True

    def save(self) -> None:
        """Stores the final states that could not be stored before; logs it if they still cannot."""
        with self._changed:
            for job_id, job in list(self._unsaved.items()):
                try:
                    self._records.end(job)
                except HomeError as error:
                    _logger.warning("the end of job %s is not stored yet: %s", job_id, error)
                    return
                del self._unsaved[job_id]

    def close(self, grace: float) -> None:
        """Accepts and starts no more jobs; those that are drawn have some seconds to finish.

        What is left waits on the disk for the next start.
        """
        with self._changed:
            self._is_closing = True
            self._changed.notify_all()
            self._changed.wait_for(lambda: not self._has_running(), grace)
            self._is_stopping = True
            self._changed.notify_all()

    @property
    def is_closing(self) -> bool:
        """True after `close` was called."""
        return self._is_closing

    def requeue(self, job_id: str) -> None:
        """Makes a job that stopped because the server stops wait again, which the records say already."""
        with self._changed:
            if job_id in self._active:
                self._active[job_id] = replace(self._active[job_id], state=JobState.QUEUED, step=0)
                self._announce(job_id)

    def _wait_for_jobs(self, seconds: float) -> None:
        self._changed.wait_for(lambda: len(self._queue) or self._is_closing, seconds)

    def _has_running(self) -> bool:
        return any(job.state is JobState.RUNNING for job in self._active.values())

    def _announce(self, job_id: str) -> None:
        self._changed.notify_all()
        for listener in self._listeners:
            listener(job_id)
