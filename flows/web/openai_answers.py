"""Answers of OpenAI's image endpoints, errors as `{"error": {message, type, param, code}}`, and events of streams."""

from __future__ import annotations

import base64
import struct
import time
from collections.abc import Sequence
from typing import Any, Literal

from fastapi.responses import JSONResponse
from pydantic import BaseModel, Field

from flows.web.errors import FOR_OPENAI, CompatibleRoute, ErrorForm, JobFailed, headers_of, hide_paths, status_of
from lora_engine.errors import WordedError
from lora_engine.inference import ImageFormat
from lora_engine.inference.image_files import ImageOptions, convert_png
from tasks.serving.job import Job

_CODES = {
    "UnknownModel": "model_not_found",
    "UnknownName": "model_not_found",
    "UnknownVersion": "model_not_found",
    "GoneVersion": "model_withdrawn",
    "QueueFull": "rate_limit_exceeded",
    "TenantQueueFull": "rate_limit_exceeded",
    "ImagesRefused": "content_policy_violation",
}


class OpenAIErrorBody(BaseModel):
    """What is wrong.

    Attributes:
        message: The problem, what is allowed, and the fix.
        type: Kind of the error.
        param: The field.
        code: Code for programs.
    """

    message: str
    type: str
    param: str | None = None
    code: str | None = None


class OpenAIError(BaseModel):
    """The body of an answer that is no success."""

    error: OpenAIErrorBody


class ImageData(BaseModel):
    """An image."""

    b64_json: str = Field(description="The file in base64.")
    revised_prompt: str | None = None
    seed: int = Field(ge=0, le=2**63, description="Its seed; not in OpenAI's API.")


class ImagesResponse(BaseModel):
    """Images."""

    created: int = Field(ge=0, le=2**40, description="Seconds since 1970.")
    data: list[ImageData]
    output_format: ImageFormat = "png"
    background: Literal["opaque"] = "opaque"
    quality: Literal["auto"] = "auto"
    size: str


class ImageEvent(BaseModel):
    """An event of a stream."""

    type: str
    b64_json: str
    created_at: int = Field(ge=0, le=2**40, description="Seconds since 1970.")
    size: str
    output_format: ImageFormat = "png"
    background: Literal["opaque"] = "opaque"
    quality: Literal["auto"] = "auto"
    partial_image_index: int | None = Field(default=None, ge=0, le=3)

    def to_sse(self) -> str:
        """Returns the event as text of a stream."""
        return f"event: {self.type}\ndata: {self.model_dump_json(exclude_none=True)}\n\n"


OPENAI_ERRORS: dict[int | str, dict[str, Any]] = {
    status: {"model": OpenAIError, "description": description}
    for status, description in {
        400: "A field cannot be honored, or an image cannot be read.",
        401: "No valid token.",
        403: "The safety hook does not let the images out.",
        404: "No such adapter or version.",
        409: "An adapter does not meet the policy of its alias.",
        410: "The version was withdrawn.",
        429: "The queue is full; see Retry-After.",
        500: "The images could not be drawn.",
        503: "The home cannot be used, or the server stops.",
        507: "The disk is full.",
    }.items()
}
"""Statuses of the routes that draw, for the OpenAPI document."""


def describe_error(error: WordedError) -> OpenAIError:
    """Returns the body of an error."""
    kind = error.failure.kind if isinstance(error, JobFailed) else type(error).__name__
    status = status_of(error, FOR_OPENAI)
    group = "rate_limit_error" if status == 429 else "server_error" if status >= 500 else "invalid_request_error"
    where = error.where if error.where.isidentifier() else None
    return OpenAIError(
        error=OpenAIErrorBody(
            message=hide_paths(str(error)), type=group, param=where, code=_CODES.get(kind, "invalid_value")
        )
    )


def describe_images(job: Job, images: Sequence[bytes], options: ImageOptions) -> ImagesResponse:
    """Returns the answer of a completed job.

    Args:
        job: The job.
        images: Its PNG files.
        options: The format to answer in.
    """
    data = [
        ImageData(b64_json=encode_base64(image, options), seed=job.request.seed + number)
        for number, image in enumerate(images)
    ]
    return ImagesResponse(
        created=int(job.created.timestamp()), data=data, output_format=options.format, size=size_of(images[0])
    )


def describe_event(kind: str, image: bytes, options: ImageOptions, index: int | None = None) -> str:
    """Returns an event of a stream.

    Args:
        kind: Its type.
        image: The PNG.
        options: The format to answer in.
        index: Number of a preview; None for a finished image.
    """
    return ImageEvent(
        type=kind,
        b64_json=encode_base64(image, options),
        created_at=int(time.time()),
        output_format=options.format,
        size=size_of(image),
        partial_image_index=index,
    ).to_sse()


def encode_base64(image: bytes, options: ImageOptions) -> str:
    """Returns a PNG in another format, in base64."""
    return base64.b64encode(convert_png(image, options)).decode()


def size_of(image: bytes) -> str:
    """Returns WIDTHxHEIGHT of a PNG."""
    width, height = struct.unpack(">II", image[16:24])  # of the first chunk, IHDR
    return f"{width}x{height}"


def _answer_invalid(errors: Sequence[Any]) -> JSONResponse:
    first = errors[0]
    param = ".".join(str(part) for part in first["loc"] if part != "body")
    code = "unknown_parameter" if first["type"] == "extra_forbidden" else "invalid_value"
    message = hide_paths(f"{param or 'the body'}: {first['msg']}")
    return _answer_invalid_request(message, param=param or None, code=code)


def _answer_invalid_request(
    message: str, *, param: str | None = None, code: str = "invalid_value", status: int = 400
) -> JSONResponse:
    body = OpenAIErrorBody(message=message, type="invalid_request_error", param=param, code=code)
    return JSONResponse(OpenAIError(error=body).model_dump(), status)


class OpenAIRoute(CompatibleRoute):
    """A route whose errors have OpenAI's form."""

    form = ErrorForm(
        invalid=_answer_invalid,
        http=lambda error: _answer_invalid_request(str(error.detail), status=error.status_code),
        worded=lambda error: JSONResponse(
            describe_error(error).model_dump(), status_of(error, FOR_OPENAI), headers_of(error)
        ),
    )
