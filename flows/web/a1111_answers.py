"""Answers of A1111's API: images with their `info`, and errors as `{error, detail, body, errors}`."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Mapping, Sequence
from typing import Any

from fastapi.responses import JSONResponse
from pydantic import BaseModel, Field

from flows.web.a1111_infotext import infotext_values
from flows.web.a1111_models import ImageBody
from flows.web.errors import FOR_A1111, CompatibleRoute, ErrorForm, JobFailed, headers_of, hide_paths, status_of
from flows.web.image_requests import require_drawn
from lora_engine.data.containers import read_png_texts
from lora_engine.errors import SettingsError, WordedError
from tasks.operations.draw_request import settings_of
from tasks.serving.catalog import ServedBase
from tasks.serving.job import Job, JobState

_TIME = "%Y%m%d%H%M%S"


class ImagesAnswer(BaseModel):
    """Answer of txt2img and img2img.

    Attributes:
        images: PNG files in base64, each with the text `parameters`.
        parameters: The request, without its images.
        info: JSON of what was drawn, as a string.
    """

    images: list[str]
    parameters: dict[str, Any]
    info: str


class A1111Error(BaseModel):
    """An error.

    Attributes:
        error: Its class.
        detail: What is wrong, what is allowed, and the fix.
        body: Always empty.
        errors: The same as `detail`.
    """

    error: str
    detail: str
    body: str = ""
    errors: str = Field("", description="The same as `detail`.")


class A1111Route(CompatibleRoute):
    """A route whose errors have A1111's form."""

    form = ErrorForm(
        invalid=lambda errors: _error("RequestValidationError", _sentence(errors), 422),
        http=lambda error: _error("HTTPException", str(error.detail), error.status_code),
        worded=lambda error: _error(_kind(error), str(error), status_of(error, FOR_A1111), headers_of(error)),
    )


ERRORS: dict[int | str, dict[str, Any]] = {
    status: {"model": A1111Error, "description": description}
    for status, description in {
        400: "The body is no JSON.",
        403: "The safety hook does not let the images out.",
        404: "No such sampler, adapter or version, or no image to start from.",
        409: "An adapter does not meet the policy of its alias.",
        410: "A version was withdrawn.",
        422: "A field cannot be honored.",
        429: "The queue is full, or too many requests; see Retry-After.",
        500: "The images could not be drawn.",
        503: "The home cannot be used, or the server stops.",
        507: "The disk is full.",
    }.items()
}
"""Statuses of the routes that draw, for the OpenAPI document."""
INVALID: dict[int | str, dict[str, Any]] = {status: ERRORS[status] for status in (400, 422)}
"""Statuses of every route."""


def answer_images(
    body: ImageBody, base: ServedBase, job: Job, images: Sequence[bytes], *, includes_sources: bool
) -> ImagesAnswer:
    """Returns the answer of a job.

    Args:
        body: The request.
        base: The base.
        job: The job after its end.
        images: The images.
        includes_sources: True repeats the images of the request in `parameters`.

    Raises:
        JobFailed: The job could not be drawn.
    """
    require_drawn(job)
    parameters = body.model_dump(mode="json")
    if not includes_sources:
        parameters |= {name: None for name in ("init_images", "mask") if name in parameters}
    info = _info(body, base, job, [read_infotext(image) for image in images])
    sent = images if body.send_images else []
    return ImagesAnswer(
        images=[base64.b64encode(image).decode() for image in sent],
        parameters=parameters,
        info=json.dumps(info, ensure_ascii=False),
    )


def read_infotext(image: bytes) -> str:
    """Returns the text `parameters` of a PNG; empty if it has none."""
    return dict(read_png_texts(io.BytesIO(image))).get("parameters", "")


def _info(body: ImageBody, base: ServedBase, job: Job, texts: Sequence[str]) -> Mapping[str, Any]:
    request = job.request
    settings = settings_of(request)
    seeds = list(settings.seeds)[: len(texts)]
    variations = [settings.variation_of(number) for number in range(len(texts))]
    subseeds = [variation.seed if variation else seed for seed, variation in zip(seeds, variations, strict=True)]
    from_height, from_width = request.seed_size or (-1, -1)
    drawn = infotext_values(texts[0]) if texts else {}
    known = {"Prompt", "Negative prompt", "Steps", "Sampler", "CFG scale", "Seed", "Size-1", "Size-2", "Model"}
    return {
        "prompt": body.prompt,
        "all_prompts": [body.prompt] * len(texts),
        "negative_prompt": body.negative_prompt,
        "all_negative_prompts": [body.negative_prompt] * len(texts),
        "seed": request.seed,
        "all_seeds": seeds,
        "subseed": request.variation.seed if request.variation else request.seed,
        "all_subseeds": subseeds,
        "subseed_strength": request.variation.strength if request.variation else 0,
        "width": body.width,
        "height": body.height,
        "sampler_name": drawn.get("Sampler", ""),
        "cfg_scale": body.cfg_scale,
        "steps": body.steps,
        "batch_size": body.batch_size,
        "restore_faces": False,
        "face_restoration_model": None,
        "sd_model_name": base.name,
        "sd_model_hash": base.fingerprint[:10],
        "sd_vae_name": None,
        "sd_vae_hash": None,
        "seed_resize_from_w": from_width,
        "seed_resize_from_h": from_height,
        "denoising_strength": body.denoising_strength,
        "extra_generation_params": {key: value for key, value in drawn.items() if key not in known},
        "index_of_first_image": 0,
        "infotexts": list(texts),
        "styles": [],
        "job_timestamp": job.created.strftime(_TIME),
        "clip_skip": request.clip_skip or 1,
        "is_using_inpainting_conditioning": False,
        "version": drawn.get("Version", ""),
        "interrupted": job.state is JobState.CANCELED,
        "ignored": body.ignored(),
        "adapters": list(job.adapters),
    }


def _kind(error: WordedError) -> str:
    return error.failure.kind if isinstance(error, JobFailed) else type(error).__name__


def _error(kind: str, detail: str, status: int, headers: Mapping[str, str] | None = None) -> JSONResponse:
    text = hide_paths(detail)
    return JSONResponse(A1111Error(error=kind, detail=text, errors=text).model_dump(), status, dict(headers or {}))


def _sentence(errors: Sequence[Mapping[str, Any]]) -> str:
    """Returns the errors of pydantic as one text: the fields and what is wrong."""
    parts = [f"{'.'.join(map(str, each['loc'][1:])) or 'the body'}: {each['msg']}" for each in errors[:10]]
    return str(SettingsError("; ".join(parts)))
