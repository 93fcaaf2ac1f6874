"""Settings of sample images drawn during training. They do not change the adapter."""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, model_validator

from lora_engine.training.specs.lengths import Steps
from lora_engine.training.specs.sample_prompts import SampleRequest, read_prompt

_Prompt = Annotated[str, Field(min_length=1, max_length=2000)]
_Seed = Annotated[int, Field(ge=0, lt=1 << 63)]


class Samples(BaseModel):
    """Sample images at intervals: each prompt with each seed, so that one image can be followed through the run.

    Attributes:
        every: Training steps between samples, or epochs.
        prompts: Prompts of the samples. Options of sd-scripts can follow a text: `--w` width and `--h` height in
            pixels, `--n` negative prompt, `--s` steps, `--l` guidance, `--d` seed (instead of `seeds`), `--ss` sampler.
        seeds: Noise seeds; the same at every interval.
        steps: Sampler steps.
        guidance: Classifier-free guidance.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    every: Steps
    prompts: Annotated[tuple[_Prompt, ...], Field(min_length=1, max_length=64)]
    seeds: Annotated[tuple[_Seed, ...], Field(min_length=1, max_length=64)] = (0,)
    steps: int = Field(default=12, ge=1, le=1000)
    guidance: float = Field(default=3.0, ge=0.0, le=50.0, allow_inf_nan=False)

    def requests(self) -> tuple[SampleRequest, ...]:
        """Returns the images to draw, prompt by prompt; one per seed, or one if the prompt has its own seed."""
        found: list[SampleRequest] = []
        for number, prompt in enumerate(self.prompts):
            plain = SampleRequest(number, prompt, -1, self.steps, self.guidance)
            request = read_prompt(prompt, plain)
            seeds = (request.seed,) if request.seed >= 0 else self.seeds
            found += [replace(request, seed=seed) for seed in seeds]
        return tuple(found)

    @model_validator(mode="after")
    def _prompts_can_be_read(self) -> Samples:
        self.requests()
        return self
