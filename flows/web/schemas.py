"""Defines the bodies of the own endpoints; unknown fields and values of another type are refused."""

from __future__ import annotations

import base64
import binascii
import secrets
import tempfile
from datetime import datetime
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from flows.web.errors import ErrorBody, describe_failure
from lora_engine.errors import DataError, SettingsError
from lora_engine.files import sha256_bytes
from tasks.operations.draw_request import DrawRequest
from tasks.serving.cards import ServedVersion
from tasks.serving.job import Job, JobState
from tasks.serving.results import MAX_INPUT_BYTES
from tasks.serving.service import ImageService
from tasks.serving.settings import MAX_PROMPT, MAX_SEED

_Prompt = Annotated[str, Field(max_length=MAX_PROMPT)]
_Side = Annotated[int, Field(ge=8, le=16_384)]
_MOST = 10**9
_Image = Annotated[str, Field(min_length=1, max_length=(MAX_INPUT_BYTES * 4) // 3 + 4)]


class ImageRequest(BaseModel):
    """What to draw."""

    model_config = ConfigDict(
        extra="forbid",
        strict=True,
        json_schema_extra={"examples": [{"prompt": "a red zorb <lora:zorb@production:0.7>", "seed": 7, "steps": 20}]},
    )

    prompt: _Prompt = Field(description="In A1111's syntax; adapters are `<lora:name@production:0.7>`.")
    negative: _Prompt = Field("", description="Negative prompt.")
    count: int = Field(1, ge=1, le=64, description="Number of images; their seeds count up.")
    seed: int | None = Field(None, ge=0, le=MAX_SEED, description="Seed of the first image; null draws one.")
    steps: int = Field(20, ge=1, le=1_000, description="Denoising steps.")
    guidance: float = Field(3.0, ge=0.0, le=100.0, description="Scale of classifier-free guidance; 1 is none.")
    width: _Side | None = Field(None, description="Pixels, with `height`; null is that of `image` or of the base.")
    height: _Side | None = Field(None, description="Pixels, with `width`.")
    sampler: Annotated[str, Field(max_length=100)] | None = Field(None, description="Null is the base's own.")
    image: _Image | None = Field(None, description="Image to start from: a file in base64. No URL, no path.")
    mask: _Image | None = Field(None, description="Mask of `image` in base64: its light parts are drawn.")
    strength: float = Field(0.75, ge=0.01, le=1.0, description="Share of the steps that run on `image`.")
    enlarge: float = Field(1.0, ge=1.0, le=4.0, description="Factor by which each image is enlarged and drawn again.")
    enlarged_strength: float = Field(0.5, ge=0.01, le=1.0, description="Share of the steps on the enlarged image.")

    def fingerprint(self) -> str:
        """Returns the digest of what the client sent, for its idempotency key."""
        return sha256_bytes(self.model_dump_json(exclude_unset=True).encode())

    def to_request(self, service: ImageService) -> DrawRequest:
        """Returns the request for a service, which stores its images.

        Raises:
            SettingsError: Width or height is missing.
            DataError: An image cannot be read.
        """
        if (self.width is None) != (self.height is None):
            raise SettingsError("one of width and height is missing", remedy="send both, or none")
        size = None if self.width is None or self.height is None else (self.height, self.width)
        return DrawRequest(
            prompt=self.prompt,
            negative=self.negative,
            count=self.count,
            seed=secrets.randbelow(2**32) if self.seed is None else self.seed,
            steps=self.steps,
            guidance=self.guidance,
            size=size,
            sampler=self.sampler,
            image=None if self.image is None else keep_base64(service, self.image, "image"),
            mask=None if self.mask is None else keep_base64(service, self.mask, "mask"),
            strength=self.strength,
            enlarge=self.enlarge,
            enlarged_strength=self.enlarged_strength,
        )


class JobBody(BaseModel):
    """A job as it is now."""

    id: str
    state: JobState
    position: int = Field(ge=0, le=_MOST, description="Place in the order of drawing, from 1; 0 if it does not wait.")
    step: int = Field(ge=0, le=_MOST, description="Finished denoising steps.")
    steps: int = Field(ge=0, le=_MOST)
    seed: int = Field(ge=0, le=2**63, description="Seed of the first image.")
    adapters: list[str] = Field(description="`name@version` of the adapters, as they were when it was accepted.")
    created: datetime
    ended: datetime | None
    images: list[str] = Field(description="Paths of the images; empty until the job is completed.")
    error: ErrorBody | None = Field(description="Why it failed.")


class ImagesBody(BaseModel):
    """A completed job with its images."""

    job: JobBody
    images: list[str] = Field(description="PNG files in base64, in the order of their seeds.")


class AdapterBody(BaseModel):
    """A version of an adapter."""

    name: str
    version: int = Field(ge=1, le=10**18)
    aliases: list[str]
    triggers: list[str] = Field(description="Words for the prompt.")
    license: str = Field(description="SPDX expression; empty if unknown.")
    base: str
    gates: str = Field(description="Result of its gates: passed, FAILED, none set or not run.")
    sample: str | None = Field(description="Path of a sample image.")
    tag: str = Field(description="What a prompt names it by.")


class HealthBody(BaseModel):
    """State of the server."""

    status: Literal["ok", "stopping"]


def job_body(job: Job) -> JobBody:
    """Returns the body of a job."""
    count = job.request.count if job.size else 0
    return JobBody(
        id=job.id,
        state=job.state,
        position=job.position,
        step=job.step,
        steps=job.steps,
        seed=job.request.seed,
        adapters=list(job.adapters),
        created=job.created,
        ended=job.ended,
        images=[f"/v1/jobs/{job.id}/images/{index}" for index in range(count)],
        error=None if job.failure is None else describe_failure(job.failure),
    )


def adapter_body(card: ServedVersion) -> AdapterBody:
    """Returns the body of a card."""
    ref = f"{card.name}@{card.version}"
    return AdapterBody(
        name=card.name,
        version=card.version,
        aliases=list(card.aliases),
        triggers=list(card.triggers),
        license=card.license,
        base=card.base,
        gates=card.gates,
        sample=f"/v1/adapters/{card.name}/{card.version}/sample" if card.has_sample else None,
        tag=f"<lora:{ref}:1>",
    )


def keep_base64(service: ImageService, text: str, field: str) -> Path:
    """Returns the stored copy of an image that a client sent.

    Args:
        service: Stores it.
        text: The file in base64, without a prefix.
        field: Name of the field, for errors.

    Raises:
        DataError: It is no base64, too large, or no readable image.
    """
    remedy = f"send the bytes of a PNG, JPEG or WebP file in base64 as {field!r}"
    try:
        content = base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        raise DataError("is no base64; URLs and paths are not read", where=field, remedy=remedy) from None
    if len(content) > MAX_INPUT_BYTES:
        raise DataError(f"has {len(content):,} bytes", where=field, allowed=f"at most {MAX_INPUT_BYTES:,}")
    with tempfile.NamedTemporaryFile(dir=service.home.work, suffix=".image") as file:
        file.write(content)
        file.flush()
        try:
            return service.keep_input(Path(file.name))
        except DataError as error:
            raise DataError(error.problem, where=field, allowed=error.allowed, remedy=remedy) from None
