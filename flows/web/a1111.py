"""The routes of A1111's API that draw: `/sdapi/v1/txt2img`, `img2img`, `progress`, `interrupt`, `skip`, `png-info`."""

from __future__ import annotations

import base64
import io
from contextlib import suppress
from functools import partial

from anyio import to_thread
from fastapi import APIRouter, Request
from pydantic import BaseModel, Field

from flows.web.a1111_answers import ERRORS, INVALID, A1111Route, ImagesAnswer, answer_images
from flows.web.a1111_infotext import infotext_values
from flows.web.a1111_models import ImageToImageBody, TextToImageBody
from flows.web.a1111_requests import image_request, text_request
from flows.web.callers import caller_of
from flows.web.image_requests import draw_images, service_of, submission
from lora_engine.data.containers import read_png_texts
from tasks.serving.catalog import describe_base
from tasks.serving.job import JobState, UnknownJob
from tasks.serving.uploads import decode_base64, restore_png

draw_routes = APIRouter(prefix="/sdapi/v1", route_class=A1111Route, responses=INVALID, tags=["A1111"])
_TIME = "%Y%m%d%H%M%S"


class ProgressState(BaseModel):
    """State of the running job, in A1111's names."""

    skipped: bool = False
    interrupted: bool = False
    stopping_generation: bool = False
    job: str = ""
    job_count: int = Field(default=0, ge=0, le=10**6)
    job_timestamp: str = "0"
    job_no: int = Field(default=0, ge=0, le=10**6)
    sampling_step: int = Field(default=0, ge=0, le=10**6)
    sampling_steps: int = Field(default=0, ge=0, le=10**6)


class ProgressAnswer(BaseModel):
    """Answer of `progress`: 0 and no job if nothing is drawn for the client."""

    progress: float = Field(default=0.0, ge=0, le=1)
    eta_relative: float = Field(default=0.0, ge=0, le=0, description="Not estimated.")
    state: ProgressState = ProgressState()
    current_image: str | None = None
    textinfo: str | None = None


class PngInfoBody(BaseModel):
    """An image in base64."""

    image: str


class PngInfoAnswer(BaseModel):
    """The texts of an image."""

    info: str
    items: dict[str, str]
    parameters: dict[str, str]


@draw_routes.post("/txt2img", responses=ERRORS)
async def draw_from_text(body: TextToImageBody, request: Request) -> ImagesAnswer:
    """Draws images from a prompt."""
    service = service_of(request)
    base = await to_thread.run_sync(describe_base, service.settings.base)
    drawing = await to_thread.run_sync(text_request, body, base, service.home)
    job, images = await draw_images(request, submission(request, drawing))
    return await to_thread.run_sync(partial(answer_images, includes_sources=False), body, base, job, images)


@draw_routes.post("/img2img", responses=ERRORS)
async def draw_from_image(body: ImageToImageBody, request: Request) -> ImagesAnswer:
    """Draws images from an image, as a whole or under a mask."""
    service = service_of(request)
    base = await to_thread.run_sync(describe_base, service.settings.base)
    drawing, files, prepared = await to_thread.run_sync(image_request, body, base, service.home)
    job, images = await draw_images(request, submission(request, drawing), files)
    restored = [await to_thread.run_sync(restore_png, image, prepared) for image in images]
    answer = partial(answer_images, includes_sources=body.include_init_images)
    return await to_thread.run_sync(answer, body, base, job, restored)


@draw_routes.get("/progress")
def show_progress(request: Request, skip_current_image: bool = False) -> ProgressAnswer:
    """Returns how far the client's running job is, with a preview."""
    service = service_of(request)
    jobs = [job for job in service.jobs(caller_of(request).tenant) if not job.state.is_final]
    running = next((job for job in jobs if job.state is JobState.RUNNING), None)
    if not jobs:
        return ProgressAnswer()
    shown, preview = running or jobs[0], None
    if running is not None and not skip_current_image:
        with suppress(UnknownJob):
            preview = service.preview(running.id)  # waits for a step
            shown = service.job(running.id)
    return ProgressAnswer(
        progress=shown.step / max(shown.steps, 1),
        state=ProgressState(
            job=shown.id,
            job_count=len(jobs),
            job_timestamp=shown.created.strftime(_TIME),
            sampling_step=shown.step,
            sampling_steps=shown.steps,
        ),
        current_image=None if preview is None else base64.b64encode(preview).decode(),
    )


@draw_routes.post("/interrupt")
def interrupt(request: Request) -> None:
    """Cancels the client's running job; its request is answered without images."""
    _cancel_running(request)


@draw_routes.post("/skip")
def skip(request: Request) -> None:
    """Cancels the client's running job: a job is drawn as a whole, so there is no single image to skip."""
    _cancel_running(request)


@draw_routes.post("/png-info")
def read_png_info(body: PngInfoBody) -> PngInfoAnswer:
    """Returns the texts of a PNG."""
    texts = dict(read_png_texts(io.BytesIO(decode_base64(body.image, "image"))))
    info = texts.pop("parameters", "")
    return PngInfoAnswer(info=info, items=texts, parameters=infotext_values(info) if info else {})


def _cancel_running(request: Request) -> None:
    service = service_of(request)
    for job in service.jobs(caller_of(request).tenant):
        if job.state is JobState.RUNNING:
            service.cancel(job.id)
