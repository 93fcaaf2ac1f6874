"""What the compatible APIs share: the tenant, drawing without blocking the server, and the statuses of errors."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from http import HTTPStatus
from typing import TYPE_CHECKING

import anyio
from anyio import CapacityLimiter, to_thread
from fastapi import Request

from lora_engine.errors import DataError, WordedError
from registry.errors import (
    Conflict,
    DiskFull,
    GoneVersion,
    HomeError,
    Refused,
    StoreError,
    UnknownName,
    UnknownVersion,
)
from tasks.serving.job import QueueFull, UnknownJob

if TYPE_CHECKING:
    from tasks.operations.images import DrawRequest
    from tasks.serving.job import Job
    from tasks.serving.service import ImageService
    from tasks.serving.uploads import SourceFiles

_SECONDS = 0.25
"""How long a thread waits for a job before the connection is checked."""
_WAITING = 1000
"""Requests that may wait at the same time; each has a thread that sleeps."""
_STATUSES: tuple[tuple[type[WordedError], HTTPStatus], ...] = (
    (QueueFull, HTTPStatus.TOO_MANY_REQUESTS),
    (UnknownJob, HTTPStatus.NOT_FOUND),
    (GoneVersion, HTTPStatus.GONE),
    (UnknownName, HTTPStatus.NOT_FOUND),
    (UnknownVersion, HTTPStatus.NOT_FOUND),
    (Refused, HTTPStatus.FORBIDDEN),
    (Conflict, HTTPStatus.CONFLICT),
    (DiskFull, HTTPStatus.INSUFFICIENT_STORAGE),
    (HomeError, HTTPStatus.SERVICE_UNAVAILABLE),
    (StoreError, HTTPStatus.INTERNAL_SERVER_ERROR),
    (DataError, HTTPStatus.UNPROCESSABLE_ENTITY),
)


class ClientGone(WordedError):
    """The client closed the connection before its images were drawn; nobody reads the answer."""


def status_of(error: WordedError) -> int:
    """Returns the HTTP status of an error: 422 for what a request may not ask."""
    return next((int(status) for kind, status in _STATUSES if isinstance(error, kind)), 422)


def service_of(request: Request) -> ImageService:
    """Returns the service of the application."""
    service: ImageService = request.app.state.service
    return service


def tenant_of(request: Request) -> str:
    """Returns for whom the images of a request are; `local` without tokens."""
    return str(getattr(request.state, "tenant", "local"))


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
        job = await to_thread.run_sync(lambda: service.submit(drawing, tenant=tenant_of(request)))
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
