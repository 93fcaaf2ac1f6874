"""Defines the bodies of the own endpoints; unknown fields and values of another type are refused."""

from __future__ import annotations

import secrets
from datetime import datetime
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from flows.web.errors import ErrorBody, describe_failure
from lora_engine.errors import SettingsError
from lora_engine.files import sha256_bytes
from lora_engine.inference.variation import NoiseVariation
from tasks.operations.adapter_cards import AdapterCard
from tasks.operations.draw_request import DrawRequest, parse_size
from tasks.serving.job import Job, JobState
from tasks.serving.service import ImageService
from tasks.serving.settings import MAX_PROMPT, MAX_SEED
from tasks.serving.uploads import MAX_UPLOAD_BYTES, decode_base64, upload_file

_Prompt = Annotated[str, Field(max_length=MAX_PROMPT)]
_Side = Annotated[int, Field(ge=8, le=16_384)]
_MOST = 10**9
_Image = Annotated[str, Field(min_length=1, max_length=(MAX_UPLOAD_BYTES * 4) // 3 + 100)]


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
    regions: list[_Prompt] = Field(
        [], max_length=20, description="`LEFT,TOP,RIGHT,BOTTOM=PROMPT`: parts, in shares, with own prompt and adapters."
    )
    feather: float = Field(0.0, ge=0.0, le=256.0, description="Blur of the regions' borders in pixels.")
    only_regions: bool = Field(False, description="Draw only the regions of `image`.")
    adapter_guidance: float = Field(
        1.0, ge=-100.0, le=100.0, description="Scale between the predictions without and with the adapters."
    )
    variation: Annotated[str, Field(max_length=100)] | None = Field(
        None, description="`SEED:STRENGTH`: noise of another seed to mix in."
    )
    seed_size: Annotated[str, Field(max_length=100)] | None = Field(
        None, description="`WIDTHxHEIGHT` whose noise is put into the middle."
    )
    clip_skip: int | None = Field(
        None, ge=1, le=99, description="Layer of CLIP's text encoders from the last; null is that of the training."
    )

    def fingerprint(self) -> str:
        """Returns the digest of what the client sent, for its idempotency key."""
        return sha256_bytes(self.model_dump_json(exclude_unset=True).encode())

    def to_request(self, service: ImageService) -> DrawRequest:
        """Returns the request for a service, which stores its images.

        Raises:
            SettingsError: Width or height is missing, or a text cannot be read.
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
            image=_keep(service, self.image, "image"),
            mask=_keep(service, self.mask, "mask"),
            strength=self.strength,
            enlarge=self.enlarge,
            enlarged_strength=self.enlarged_strength,
            regions=tuple(self.regions),
            feather=self.feather,
            only_regions=self.only_regions,
            adapter_guidance=self.adapter_guidance,
            variation=None if self.variation is None else NoiseVariation.parse(self.variation),
            seed_size=None if self.seed_size is None else parse_size(self.seed_size),
            clip_skip=self.clip_skip,
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
    images: list[str] = Field(description="Files in base64, PNG unless the query asks for another format.")


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


def adapter_bodies(card: AdapterCard) -> list[AdapterBody]:
    """Returns the bodies of a card, one for each version, the oldest first."""
    return [
        AdapterBody(
            name=card.name,
            version=version.number,
            aliases=list(version.aliases),
            triggers=list(version.triggers),
            license=version.license,
            base=version.base,
            gates=version.gates,
            sample=f"/v1/adapters/{card.name}/{version.number}/sample" if version.has_sample else None,
            tag=f"<lora:{card.name}@{version.number}:1>",
        )
        for version in reversed(card.versions)
    ]


def _keep(service: ImageService, text: str | None, field: str) -> Path | None:
    """Returns the stored copy of an image that a client sent in base64."""
    if text is None:
        return None
    with upload_file(decode_base64(text, field), field) as file:
        return service.keep_input(file)
