"""Routes of jobs: POST, GET, DELETE, images, previews and events, and images in one answer."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from typing import Annotated, Any

from anyio import to_thread
from fastapi import APIRouter, Depends, Header, Path, Query, Request, Response
from fastapi.responses import StreamingResponse

from flows.web.callers import caller_of
from flows.web.errors import ErrorAnswer, JobFailed
from flows.web.image_requests import draw_images, find_job, require_drawn, service_of, watched
from flows.web.openai_answers import encode_base64
from flows.web.schemas import ImageRequest, ImagesBody, JobBody, job_body
from lora_engine.inference import ImageFormat
from lora_engine.inference.image_files import MEDIA_TYPES, ImageOptions, convert_png
from tasks.serving.job import Failure, Job, JobState, UnknownJob

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
_IMAGE: dict[str, Any] = {
    "content": {kind: {"schema": {"type": "string", "format": "binary"}} for kind in MEDIA_TYPES.values()}
}
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


def read_format(
    format: Annotated[ImageFormat, Query(description="Format of the images.")] = "png",  # noqa: A002 (its name)
    quality: Annotated[int, Query(ge=1, le=100, description="Of JPEG and WebP; a WebP of 100 has no loss.")] = 90,
) -> ImageOptions:
    """Returns the format that the query of a request asks for."""
    return ImageOptions(format, quality)


AnswerFormat = Annotated[ImageOptions, Depends(read_format)]


def responses(*codes: int) -> dict[int | str, dict[str, Any]]:
    """Returns the documented errors of a route."""
    return {code: {"model": ErrorAnswer, "description": _TEXTS[code]} for code in (400, *codes)}


_ACCEPT = responses(401, 403, 404, 408, 409, 410, 413, 422, 429, 503, 507)
_FIND = responses(401, 403, 404, 422, 429)


@job_routes.post("/jobs", status_code=202, responses=_ACCEPT)
async def create_job(request: Request, body: ImageRequest, key: IdempotencyKey = None) -> JobBody:
    """Accept a request for images. The job is on the disk when this answers, and survives a restart."""
    return job_body(await to_thread.run_sync(_submission(request, body, key)))


@job_routes.get("/jobs", responses=responses(401, 403, 422, 429))
async def list_jobs(request: Request, limit: Annotated[int, Query(ge=1, le=1000)] = 100) -> list[JobBody]:
    """List the latest jobs of the tenant, oldest first."""
    tenant = caller_of(request).tenant
    jobs = await to_thread.run_sync(lambda: service_of(request).jobs(tenant, limit=limit))
    return [job_body(job) for job in jobs]


@job_routes.get("/jobs/{job_id}", responses=_FIND)
async def read_job(request: Request, job_id: JobId) -> JobBody:
    """Return a job as it is now."""
    return job_body(await find_job(request, job_id))


@job_routes.delete("/jobs/{job_id}", responses=_FIND)
async def stop_job(request: Request, job_id: JobId) -> JobBody:
    """Cancel a job that waits or runs. A job that has ended stays as it is."""
    await find_job(request, job_id)
    return job_body(await to_thread.run_sync(service_of(request).cancel, job_id))


@job_routes.get("/jobs/{job_id}/images/{index}", response_class=Response, responses={200: _IMAGE, **_FIND})
async def read_image(
    request: Request, job_id: JobId, index: Annotated[int, Path(ge=0, le=63)], options: AnswerFormat
) -> Response:
    """Return an image of a completed job, a file with its settings."""
    await find_job(request, job_id)
    images = await to_thread.run_sync(service_of(request).images, job_id)
    if index >= len(images):
        raise UnknownJob(f"no image {index}", where=f"job {job_id}", allowed=f"{len(images)} images")
    content = await to_thread.run_sync(convert_png, images[index], options)
    headers = {"Cache-Control": "private, max-age=3600"}
    return Response(content, media_type=MEDIA_TYPES[options.format], headers=headers)


@job_routes.get(
    "/jobs/{job_id}/preview",
    response_class=Response,
    responses={200: _PNG, 204: {"description": "There is no preview yet, or a safety hook is used."}, **_FIND},
)
async def read_preview(request: Request, job_id: JobId) -> Response:
    """Return the first image of a running job after its current step."""
    await find_job(request, job_id)
    image = await to_thread.run_sync(service_of(request).preview, job_id)
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
    await find_job(request, job_id)

    async def events() -> AsyncIterator[str]:
        last = ""
        async with watched(request, job_id) as changed:
            while True:
                changed.clear()
                body = job_body(await find_job(request, job_id))
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
async def create_images(
    request: Request, body: ImageRequest, options: AnswerFormat, key: IdempotencyKey = None
) -> ImagesBody:
    """Draw images and return them. A client that goes away cancels its job."""
    job, images = await draw_images(request, _submission(request, body, key))
    require_drawn(job)
    if job.state is not JobState.COMPLETED:
        raise JobFailed(Failure("Canceled", "the job was canceled", where=f"job {job.id}"))
    texts = await to_thread.run_sync(lambda: [encode_base64(image, options) for image in images])
    return ImagesBody(job=job_body(job), images=texts)


def _submission(request: Request, body: ImageRequest, key: str | None) -> Callable[[], Job]:
    service, tenant = service_of(request), caller_of(request).tenant
    return lambda: service.submit(body.to_request(service), tenant=tenant, key=key, fingerprint=body.fingerprint())
