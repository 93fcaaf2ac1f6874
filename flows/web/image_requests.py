"""What all APIs share: submitting, watching and drawing the job of a request without blocking the server."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from typing import TYPE_CHECKING

import anyio
from anyio import to_thread
from fastapi import Request

from flows.web.callers import caller_of
from flows.web.errors import ClientGone, JobFailed

if TYPE_CHECKING:
    from tasks.operations.draw_request import DrawRequest
    from tasks.serving.job import Job
    from tasks.serving.service import ImageService
    from tasks.serving.uploads import SourceFiles

_LOOK = 0.25
"""Seconds between two looks at the connection of a client that waits for a job without changes."""


def service_of(request: Request) -> ImageService:
    """Returns the service of the application."""
    service: ImageService = request.app.state.service
    return service


def require_drawn(job: Job) -> None:
    """Raises `JobFailed` if a job failed; one that was canceled has no images."""
    if job.failure is not None:
        raise JobFailed(job.failure)


async def find_job(request: Request, job_id: str) -> Job:
    """Returns a job of the client's tenant as it is now.

    Raises:
        UnknownJob: The tenant has none with this identifier.
    """
    return await to_thread.run_sync(lambda: service_of(request).job(job_id, tenant=caller_of(request).tenant))


@asynccontextmanager
async def submitted(
    request: Request, submit: Callable[[], Job], files: SourceFiles | None = None
) -> AsyncIterator[Job]:
    """Yields the job of a request; cancels it if the block ends before the job does, and deletes its source files.

    Args:
        request: The request.
        submit: Submits the job; may block.
        files: The files that the job starts from.

    Raises:
        WordedError: The service refuses the request.
    """
    job = None
    try:
        job = await to_thread.run_sync(submit)
        yield job
    finally:
        # A client that went away cancels this task, too.
        with anyio.CancelScope(shield=True):
            await to_thread.run_sync(_end, service_of(request), job, files)


@asynccontextmanager
async def watched(request: Request, job_id: str) -> AsyncIterator[asyncio.Event]:
    """Yields an event that is set whenever a job changes; a new one is set."""
    changed, loop = asyncio.Event(), asyncio.get_running_loop()
    changed.set()

    def listener(changed_id: str) -> None:
        if changed_id == job_id:
            loop.call_soon_threadsafe(changed.set)

    service = service_of(request)
    service.listen(listener)
    try:
        yield changed
    finally:
        service.unlisten(listener)


async def next_state(request: Request, job_id: str, changed: asyncio.Event) -> Job:
    """Returns a job after its next change, or as it is after a quarter of a second without one.

    Args:
        request: The request.
        job_id: The job.
        changed: The event of `watched`.

    Raises:
        ClientGone: The client closed the connection.
    """
    with suppress(TimeoutError):
        await asyncio.wait_for(changed.wait(), _LOOK)
    changed.clear()
    job = await find_job(request, job_id)
    if not job.state.is_final and await request.is_disconnected():
        raise ClientGone("the client closed the connection", where=job_id)
    return job


async def draw_images(
    request: Request, submit: Callable[[], Job], files: SourceFiles | None = None
) -> tuple[Job, list[bytes]]:
    """Returns the job of a request after its end, and the images as PNG; none if it did not complete.

    Args:
        request: The request.
        submit: Submits the job; may block.
        files: The files that the job starts from.

    Raises:
        ClientGone: The client closed the connection; the job is canceled.
        WordedError: The service refuses the request.
    """
    async with submitted(request, submit, files) as accepted, watched(request, accepted.id) as changed:
        job = accepted
        while not job.state.is_final:
            job = await next_state(request, job.id, changed)
        images = await to_thread.run_sync(service_of(request).images, job.id)
    return job, images


def submission(request: Request, drawing: DrawRequest) -> Callable[[], Job]:
    """Returns a function that submits a request of the client's tenant."""
    return lambda: service_of(request).submit(drawing, tenant=caller_of(request).tenant)


def _end(service: ImageService, job: Job | None, files: SourceFiles | None) -> None:
    if job is not None and not service.job(job.id).state.is_final:
        service.cancel(job.id)
    if files is not None:
        files.delete()
