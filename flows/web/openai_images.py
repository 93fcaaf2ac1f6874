"""The routes of OpenAI's API: `/v1/images/generations`, `/v1/images/edits`, `/v1/images/variations`, `/v1/models`."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import replace
from typing import TYPE_CHECKING, Any, TypeVar

from anyio import to_thread
from fastapi import APIRouter, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import StreamingResponse
from pydantic import BaseModel, Field, ValidationError
from starlette.datastructures import UploadFile

from flows.web.image_requests import (
    draw_images,
    next_state,
    require_drawn,
    service_of,
    submission,
    submitted,
    watched,
)
from flows.web.openai_answers import (
    OPENAI_ERRORS,
    ImagesResponse,
    OpenAIRoute,
    describe_error,
    describe_event,
    describe_images,
)
from flows.web.openai_models import EditBody, GenerationBody, UnknownModel, VariationBody
from lora_engine.errors import DataError, SettingsError, WordedError
from tasks.operations.draw_request import DrawRequest
from tasks.serving.catalog import describe_base, list_named_adapters
from tasks.serving.job import Job, JobState
from tasks.serving.uploads import MAX_UPLOAD_BYTES, SourceFiles, UploadedImage, read_upload

if TYPE_CHECKING:
    from PIL import Image

openai_routes = APIRouter(prefix="/v1", route_class=OpenAIRoute, tags=["openai"])
_STREAM: dict[str, Any] = {"content": {"text/event-stream": {"schema": {"type": "string"}}}}


def _form(body: type[EditBody], files: Sequence[str], required: Sequence[str]) -> dict[str, Any]:
    """Returns the part of the OpenAPI document for a form."""
    schema = {
        "type": "object",
        "required": list(required),
        "properties": {
            **{name: {"type": "string", "format": "binary"} for name in files},
            **{name: {"type": "string"} for name in body.model_fields if name != "loras"},
        },
    }
    return {"requestBody": {"required": True, "content": {"multipart/form-data": {"schema": schema}}}}


class ModelBody(BaseModel):
    """A model: the base, or the base with an adapter."""

    id: str
    object: str = "model"
    created: int = Field(ge=0, le=2**40, description="Seconds since 1970; 0 for the base.")
    owned_by: str = "loraline"


class ModelsBody(BaseModel):
    """The models."""

    object: str = "list"
    data: list[ModelBody]


@openai_routes.post("/images/generations", response_model=ImagesResponse, responses={200: _STREAM, **OPENAI_ERRORS})
async def create_generation(body: GenerationBody, request: Request) -> ImagesResponse | Response:
    """Draw images from a prompt."""
    service = service_of(request)
    base = await to_thread.run_sync(describe_base, service.settings.base)
    drawing = await to_thread.run_sync(body.to_request, base, service.home)
    return await _respond(request, body, drawing, None, "image_generation")


@openai_routes.post(
    "/images/edits",
    response_model=ImagesResponse,
    responses={200: _STREAM, **OPENAI_ERRORS},
    openapi_extra=_form(EditBody, ("image", "mask"), ("image", "prompt")),
)
async def create_edit(request: Request) -> ImagesResponse | Response:
    """Draw an image again, or its transparent parts, or those of a mask."""
    body, files = await _read_form(request, EditBody)
    image, mask = await to_thread.run_sync(_read_files, files)
    return await _draw_from(request, body, image, mask, "image_edit")


@openai_routes.post(
    "/images/variations",
    response_model=ImagesResponse,
    responses={200: _STREAM, **OPENAI_ERRORS},
    openapi_extra=_form(VariationBody, ("image",), ("image",)),
)
async def create_variation(request: Request) -> ImagesResponse | Response:
    """Draw a whole image again, without a prompt."""
    body, files = await _read_form(request, VariationBody)
    image, _ = await to_thread.run_sync(lambda: _read_files(files, allows_mask=False))
    return await _draw_from(request, body, replace(image, opacity=None), None, "image_variation")


_Body = TypeVar("_Body", bound=EditBody)


async def _read_form(request: Request, kind: type[_Body]) -> tuple[_Body, list[tuple[str, bytes]]]:
    async with request.form(max_files=4, max_fields=64) as form:
        fields = {name: value for name, value in form.multi_items() if isinstance(value, str)}
        files = [(name, value) for name, value in form.multi_items() if isinstance(value, UploadFile)]
        read = [(name, await file.read(MAX_UPLOAD_BYTES + 1)) for name, file in files]
    try:
        return kind.model_validate(fields), read
    except ValidationError as error:
        raise RequestValidationError(error.errors()) from error


async def _draw_from(
    request: Request, body: EditBody, image: UploadedImage, mask: UploadedImage | None, kind: str
) -> ImagesResponse | Response:
    service = service_of(request)
    base = await to_thread.run_sync(describe_base, service.settings.base)
    drawing = await to_thread.run_sync(body.to_request, base, service.home)
    sources = await to_thread.run_sync(_write_sources, image, mask, drawing.size)
    drawing = replace(drawing, image=sources.image, mask=sources.mask, strength=body.strength)
    return await _respond(request, body, drawing, sources, kind)


@openai_routes.get("/models", responses={401: OPENAI_ERRORS[401]})
def list_served_models(request: Request) -> ModelsBody:
    """List the base and the adapters that `model` may name."""
    return ModelsBody(data=list(_models(request).values()))


@openai_routes.get("/models/{model:path}", responses={status: OPENAI_ERRORS[status] for status in (401, 404)})
def read_model(model: str, request: Request) -> ModelBody:
    """Return a model."""
    models = _models(request)
    if model not in models:
        raise UnknownModel(f"the model {model[:80]!r} does not exist", where="model", allowed="those of /v1/models")
    return models[model]


async def _respond(
    request: Request, body: GenerationBody, drawing: DrawRequest, files: SourceFiles | None, kind: str
) -> ImagesResponse | Response:
    submit = submission(request, drawing)
    if body.stream:
        stack = AsyncExitStack()
        job = await stack.enter_async_context(submitted(request, submit, files))
        headers = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
        return StreamingResponse(
            _events(request, stack, job, kind, body), media_type="text/event-stream", headers=headers
        )
    job, images = await draw_images(request, submit, files)
    _require_images(job)
    return await to_thread.run_sync(describe_images, job, images, body.options())


async def _events(
    request: Request, stack: AsyncExitStack, job: Job, kind: str, body: GenerationBody
) -> AsyncIterator[str]:
    """Yields previews while a job is drawn, then its images; cancels the job if the client goes away."""
    service, sent, options, previews = service_of(request), 0, body.options(), body.partial_images or 0
    async with stack, watched(request, job.id) as changed:
        try:
            while not job.state.is_final:
                if job.state is JobState.RUNNING and sent < previews and job.step * (previews + 1) > sent * job.steps:
                    image = await to_thread.run_sync(service.preview, job.id)
                    if image is not None:
                        partial = f"{kind}.partial_image"
                        yield await to_thread.run_sync(describe_event, partial, image, options, sent)
                        sent += 1
                job = await next_state(request, job.id, changed)
            _require_images(job)
            for image in await to_thread.run_sync(service.images, job.id):
                yield await to_thread.run_sync(describe_event, f"{kind}.completed", image, options)
        except WordedError as error:
            yield f"event: error\ndata: {describe_error(error).model_dump_json()}\n\n"


def _require_images(job: Job) -> None:
    require_drawn(job)
    if job.state is JobState.CANCELED:
        raise SettingsError("the job was canceled", where=f"job {job.id}")


def _models(request: Request) -> Mapping[str, ModelBody]:
    service = service_of(request)
    base = describe_base(service.settings.base)
    models = {base.name: ModelBody(id=base.name, created=0)}
    for adapter in list_named_adapters(service.home):
        models[adapter.name] = ModelBody(id=adapter.name, created=adapter.created)
    return models


def _read_files(
    files: list[tuple[str, bytes]], *, allows_mask: bool = True
) -> tuple[UploadedImage, UploadedImage | None]:
    images = [data for name, data in files if name in {"image", "image[]"}]
    masks = [data for name, data in files if name == "mask"]
    if len(images) != 1 or len(masks) > allows_mask or len(images) + len(masks) != len(files):
        raise DataError(
            f"the form has the files {sorted(name[:40] for name, _ in files)}",
            where="image",
            allowed="one image, and one mask" if allows_mask else "one image",
        )
    return read_upload(images[0], "image"), read_upload(masks[0], "mask") if masks else None


def _write_sources(image: UploadedImage, mask: UploadedImage | None, size: tuple[int, int] | None) -> SourceFiles:
    from PIL import ImageChops

    from lora_engine.inference.inpainting import InpaintSettings, PreparedImage, prepare_inpainting

    if mask is not None and mask.opacity is None:
        raise DataError("the mask has no transparent parts, which are drawn", where="mask")
    opacity = image.opacity if mask is None else mask.opacity
    drawn: Image.Image | None = None if opacity is None else ImageChops.invert(opacity)
    if drawn is not None and drawn.size != image.pixels.size:
        raise DataError(f"the mask has {drawn.width} x {drawn.height} pixels, unlike the image", where="mask")
    if size is None:
        return SourceFiles.write(PreparedImage(image.pixels, drawn, image.pixels))
    return SourceFiles.write(prepare_inpainting(image.pixels, drawn, InpaintSettings(size, "crop", blur=0)))
