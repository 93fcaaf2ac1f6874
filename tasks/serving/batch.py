"""Draws many requests with a service, a few at a time, and reports what is done."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass

from lora_engine.errors import EngineError
from tasks.operations.draw_request import DrawRequest
from tasks.serving.job import Job, JobState, QueueFull, UnknownJob
from tasks.serving.service import ImageService

_JOBS_AT_ONCE = 4
"""Requests of one batch that are queued or drawn at the same time; other tenants' requests are drawn between."""
_POLL = 0.25


class DrawingFailed(EngineError):
    """A request of a batch failed or was canceled; no further request of the batch is drawn."""


@dataclass(frozen=True)
class BatchProgress:
    """What is known of a batch at a moment.

    Attributes:
        images: PNG files of each request, in the order of the requests; None while it is not completed.
        job: The job of the first request that is not completed; None if all are.
    """

    images: tuple[tuple[bytes, ...] | None, ...]
    job: Job | None = None

    @property
    def done(self) -> int:
        """Number of completed requests."""
        return sum(images is not None for images in self.images)


def draw_all(service: ImageService, requests: Sequence[DrawRequest], *, tenant: str) -> Iterator[BatchProgress]:
    """Draws requests, and yields what is done a few times per second and at the end.

    Closing the iterator cancels what is not drawn yet.

    Args:
        service: The service.
        requests: The requests.
        tenant: For whom the images are.

    Raises:
        DrawingFailed: A request failed or was canceled.
        QueueFull: The queue is full, and no request of this batch is in it.
        SettingsError: A prompt or a setting cannot be used.
        RegistryError: An adapter does not exist or may not be used now.
    """
    images: list[tuple[bytes, ...] | None] = [None] * len(requests)
    jobs: dict[int, str] = {}
    waiting = list(range(len(requests)))
    try:
        while waiting or jobs:
            _submit(service, requests, waiting, jobs, tenant)
            first = next(iter(jobs))
            service.wait(jobs[first], _POLL)
            for index in [index for index, job_id in jobs.items() if service.job(job_id).state.is_final]:
                job = service.job(jobs.pop(index))
                if job.state is not JobState.COMPLETED:
                    raise DrawingFailed(job.error or "the job was canceled", where=f"image {index + 1}")
                images[index] = tuple(service.images(job.id))
            yield BatchProgress(tuple(images), service.job(jobs[min(jobs)]) if jobs else None)
    finally:
        for job_id in jobs.values():
            with suppress(UnknownJob):
                service.cancel(job_id)


def _submit(
    service: ImageService, requests: Sequence[DrawRequest], waiting: list[int], jobs: dict[int, str], tenant: str
) -> None:
    while waiting and len(jobs) < _JOBS_AT_ONCE:
        try:
            job = service.submit(requests[waiting[0]], tenant=tenant)
        except QueueFull:
            if not jobs:
                raise
            return
        jobs[waiting.pop(0)] = job.id
