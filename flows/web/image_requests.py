"""What the compatible APIs share: the tenant, drawing without blocking the server, and the statuses of errors."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

import anyio
from anyio import CapacityLimiter, to_thread
from fastapi import Request

from flows.web.callers import caller_of
from flows.web.errors import status_of
from lora_engine.errors import WordedError
from tasks.serving.job import Failure, QueueFull

if TYPE_CHECKING:
    from tasks.operations.draw_request import DrawRequest
    from tasks.serving.job import Job
    from tasks.serving.service import ImageService
    from tasks.serving.uploads import SourceFiles

_SECONDS = 0.25
"""How long a thread waits for a job before the connection is checked."""
_WAITING = 1000
"""Requests that may wait at the same time; each has a thread that sleeps."""


class ClientGone(WordedError):
    """The client closed the connection before its images were drawn; nobody reads the answer."""


class JobFailed(WordedError):
    """A job that could not be drawn.

    Args:
        failure: Why.
    """

    def __init__(self, failure: Failure) -> None:
        self.failure = failure
        super().__init__(failure.problem, where=failure.where, allowed=failure.allowed, remedy=failure.remedy)


def require_drawn(job: Job) -> None:
    """Raises `JobFailed` if a job failed; one that was canceled has no images."""
    if job.failure is not None:
        raise JobFailed(job.failure)


def status_for_clients(error: WordedError) -> int:
    """Returns the HTTP status of an error; a full queue is 429, for which these clients wait."""
    if isinstance(error, JobFailed):
        return status_of(error.failure)
    return 429 if isinstance(error, QueueFull) else status_of(error)


def service_of(request: Request) -> ImageService:
    """Returns the service of the application."""
    service: ImageService = request.app.state.service
    return service


@asynccontextmanager
async def submitted(request: Request, drawing: DrawRequest, files: SourceFiles | None) -> AsyncIterator[Job]:
    """Yields the job of a request; cancels it if the block ends before the job does, and deletes its source files.

    Args:
        request: The request.
        drawing: What to draw.
        files: The files that the job starts from.

    Raises:
        WordedError: The service refuses the request.
    """
    service = service_of(request)
    job = None
    try:
        job = await to_thread.run_sync(lambda: service.submit(drawing, tenant=caller_of(request).tenant))
        yield job
    finally:
        # A client that went away cancels this task, too.
        with anyio.CancelScope(shield=True):
            await to_thread.run_sync(_end, service, job, files)


async def next_state(request: Request, job_id: str, seconds: float = _SECONDS) -> Job:
    """Returns a job when it has ended, or after some seconds.

    Raises:
        ClientGone: The client closed the connection.
    """
    job = await to_thread.run_sync(service_of(request).wait, job_id, seconds, limiter=_limiter(request))
    if not job.state.is_final and await request.is_disconnected():
        raise ClientGone("the client closed the connection", where=job_id)
    return job


async def draw_images(request: Request, drawing: DrawRequest, files: SourceFiles | None) -> tuple[Job, list[bytes]]:
    """Returns the job of a request after its end, and the images as PNG; none if it did not complete.

    Raises:
        ClientGone: The client closed the connection; the job is canceled.
        WordedError: The service refuses the request.
    """
    async with submitted(request, drawing, files) as accepted:
        job = accepted
        while not job.state.is_final:
            job = await next_state(request, job.id)
        images = await to_thread.run_sync(service_of(request).images, job.id)
    return job, images


def _end(service: ImageService, job: Job | None, files: SourceFiles | None) -> None:
    if job is not None and not service.job(job.id).state.is_final:
        service.cancel(job.id)
    if files is not None:
        files.delete()


def _limiter(request: Request) -> CapacityLimiter:
    # Threads that wait for jobs are not those that run the other routes.
    state = request.app.state
    if not hasattr(state, "waiting"):
        state.waiting = CapacityLimiter(_WAITING)
    limiter: CapacityLimiter = state.waiting
    return limiter
