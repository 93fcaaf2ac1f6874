"""Routes of jobs: POST, GET, DELETE, images, previews and events, and images in one answer."""

from __future__ import annotations

import asyncio
import base64
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Annotated, Any

from fastapi import APIRouter, Header, Path, Query, Request, Response
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import StreamingResponse

from flows.web.callers import caller_of
from flows.web.errors import ErrorAnswer, answer, status_of
from flows.web.schemas import ImageRequest, ImagesBody, JobBody, job_body
from tasks.serving.job import Failure, Job, JobState, UnknownJob
from tasks.serving.service import ImageService

job_routes = APIRouter(prefix="/v1", tags=["images"])
_TEXTS = {
    400: "The body is no JSON, or the header Host names another server.",
    401: "No valid token.",
    403: "A page of another site, or refused by the safety hook.",
    404: "No such job, adapter, version or image.",
    408: "The body did not arrive in time.",
    409: "The registry refuses the adapter, or the idempotency key belongs to another request.",
    410: "The version was withdrawn or deleted.",
    413: "The body is too large.",
    422: "A field cannot be used.",
    429: "Too many requests, or too many waiting jobs, of this tenant; see Retry-After.",
    500: "The images could not be drawn.",
    503: "The queue is full or the server stops; see Retry-After.",
    507: "The disk is full.",
}
_PNG: dict[str, Any] = {"content": {"image/png": {"schema": {"type": "string", "format": "binary"}}}}
_ALIVE = 15.0
"""Seconds between two signs of life of a stream."""
JobId = Annotated[str, Path(pattern="^[0-9a-f]{32}$", description="Identifier of the job.")]
IdempotencyKey = Annotated[
    str | None,
    Header(
        alias="Idempotency-Key",
        min_length=1,
        max_length=200,
        pattern="^[!-~]+$",
        description="The same key and body give the same job.",
    ),
]


def responses(*codes: int) -> dict[int | str, dict[str, Any]]:
    """Returns the documented errors of a route."""
    return {code: {"model": ErrorAnswer, "description": _TEXTS[code]} for code in (400, *codes)}


_ACCEPT = responses(401, 403, 404, 408, 409, 410, 413, 422, 429, 503, 507)
_FIND = responses(401, 403, 404, 422, 429)


@job_routes.post("/jobs", status_code=202, responses=_ACCEPT)
async def create_job(request: Request, body: ImageRequest, key: IdempotencyKey = None) -> JobBody:
    """Accept a request for images. The job is on the disk when this answers, and survives a restart."""
    return job_body(await _submit(request, body, key))


@job_routes.get("/jobs", responses=responses(401, 403, 422, 429))
async def list_jobs(request: Request, limit: Annotated[int, Query(ge=1, le=1000)] = 100) -> list[JobBody]:
    """List the latest jobs of the tenant, oldest first."""
    tenant = caller_of(request).tenant
    jobs = await run_in_threadpool(_service(request).jobs, tenant, limit=limit)
    return [job_body(job) for job in jobs]


@job_routes.get("/jobs/{job_id}", responses=_FIND)
async def read_job(request: Request, job_id: JobId) -> JobBody:
    """Return a job as it is now."""
    return job_body(await _find(request, job_id))


@job_routes.delete("/jobs/{job_id}", responses=_FIND)
async def cancel_job(request: Request, job_id: JobId) -> JobBody:
    """Cancel a job that waits or runs. A job that has ended stays as it is."""
    await _find(request, job_id)
    return job_body(await run_in_threadpool(_service(request).cancel, job_id))


@job_routes.get("/jobs/{job_id}/images/{index}", response_class=Response, responses={200: _PNG, **_FIND})
async def read_image(request: Request, job_id: JobId, index: Annotated[int, Path(ge=0, le=63)]) -> Response:
    """Return an image of a completed job, a PNG file with its settings."""
    await _find(request, job_id)
    images = await run_in_threadpool(_service(request).images, job_id)
    if index >= len(images):
        raise UnknownJob(f"no image {index}", where=f"job {job_id}", allowed=f"{len(images)} images")
    return Response(images[index], media_type="image/png", headers={"Cache-Control": "private, max-age=3600"})


@job_routes.get(
    "/jobs/{job_id}/preview",
    response_class=Response,
    responses={200: _PNG, 204: {"description": "There is no preview yet, or a safety hook is used."}, **_FIND},
)
async def read_preview(request: Request, job_id: JobId) -> Response:
    """Return the first image of a running job after its current step."""
    await _find(request, job_id)
    image = await run_in_threadpool(_service(request).preview, job_id)
    if image is None:
        return Response(status_code=204)
    return Response(image, media_type="image/png", headers={"Cache-Control": "no-store"})


@job_routes.get(
    "/jobs/{job_id}/events",
    response_class=StreamingResponse,
    responses={200: {"content": {"text/event-stream": {"schema": {"type": "string"}}}}, **_FIND},
)
async def stream_job(request: Request, job_id: JobId) -> StreamingResponse:
    """Stream the job as server-sent events `job`, one for each change, until it has ended."""
    await _find(request, job_id)

    async def events() -> AsyncIterator[str]:
        last = ""
        async with _watch(request, job_id) as changed:
            while True:
                changed.clear()
                body = job_body(await _find(request, job_id))
                text = body.model_dump_json()
                if text != last:
                    yield f"event: job\ndata: {text}\n\n"
                    last = text
                if body.state.is_final:
                    return
                try:
                    await asyncio.wait_for(changed.wait(), _ALIVE)
                except TimeoutError:
                    yield ": waiting\n\n"

    return StreamingResponse(
        events(), media_type="text/event-stream", headers={"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
    )


@job_routes.post("/images", responses=_ACCEPT | responses(500))
async def create_images(request: Request, body: ImageRequest, key: IdempotencyKey = None) -> ImagesBody:
    """Draw images and return them. A client that goes away cancels its job."""
    job = await _submit(request, body, key)
    async with _watch(request, job.id) as changed:
        gone = asyncio.create_task(_wait_for_disconnect(request))
        try:
            while not (job := await _find(request, job.id)).state.is_final:
                changed.clear()
                waits = [asyncio.create_task(changed.wait()), gone]
                await asyncio.wait(waits, timeout=_ALIVE, return_when=asyncio.FIRST_COMPLETED)
                waits[0].cancel()
                if gone.done():
                    await run_in_threadpool(_service(request).cancel, job.id)
        finally:
            gone.cancel()
    if job.state is JobState.COMPLETED:
        images = await run_in_threadpool(_service(request).images, job.id)
        return ImagesBody(job=job_body(job), images=[base64.b64encode(image).decode() for image in images])
    failure = job.failure or Failure("Canceled", "the job was canceled", where=f"job {job.id}")
    status = status_of(failure) if job.failure else 409
    return answer(failure, status)  # type: ignore[return-value]  # FastAPI sends a response as it is


async def _submit(request: Request, body: ImageRequest, key: str | None) -> Job:
    service, tenant = _service(request), caller_of(request).tenant

    def submit() -> Job:
        return service.submit(body.to_request(service), tenant=tenant, key=key, fingerprint=body.fingerprint())

    return await run_in_threadpool(submit)


async def _find(request: Request, job_id: str) -> Job:
    return await run_in_threadpool(_service(request).job, job_id, tenant=caller_of(request).tenant)


async def _wait_for_disconnect(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


@asynccontextmanager
async def _watch(request: Request, job_id: str) -> AsyncIterator[asyncio.Event]:
    """Yields an event that is set whenever a job changes."""
    changed, loop = asyncio.Event(), asyncio.get_running_loop()

    def listener(changed_id: str) -> None:
        if changed_id == job_id:
            loop.call_soon_threadsafe(changed.set)

    service = _service(request)
    service.listen(listener)
    try:
        yield changed
    finally:
        service.unlisten(listener)


def _service(request: Request) -> ImageService:
    service: ImageService = request.app.state.service
    return service
