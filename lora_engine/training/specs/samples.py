"""Settings of sample images drawn during training. They do not change the adapter."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

_Prompt = Annotated[str, Field(min_length=1, max_length=2000)]
_Seed = Annotated[int, Field(ge=0, lt=1 << 63)]


class Samples(BaseModel):
    """Sample images at intervals: each prompt with each seed, so that one image can be followed through the run.

    Attributes:
        every: Training steps between samples.
        prompts: Prompts of the samples.
        seeds: Noise seeds; the same at every interval.
        steps: Sampler steps.
        guidance: Classifier-free guidance.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    every: int = Field(ge=1, le=10_000_000)
    prompts: Annotated[tuple[_Prompt, ...], Field(min_length=1, max_length=64)]
    seeds: Annotated[tuple[_Seed, ...], Field(min_length=1, max_length=64)] = (0,)
    steps: int = Field(default=12, ge=1, le=1000)
    guidance: float = Field(default=3.0, ge=0.0, le=50.0, allow_inf_nan=False)
