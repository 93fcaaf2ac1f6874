"""Defines the user-facing evaluation settings. Must not import torch."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, field_validator, model_validator

from lora_engine.errors import SettingsError
from lora_engine.evaluation.metrics import METRICS


class Gate(BaseModel):
    """A bound on a metric.

    Attributes:
        min: Least allowed value; None is no bound.
        max: Greatest allowed value; None is no bound.
        of: The checked value: the adapter's own, or adapter minus base.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    min: FiniteFloat | None = None
    max: FiniteFloat | None = None
    of: Literal["adapter", "difference"] = "difference"

    @model_validator(mode="after")
    def _bounds_make_sense(self) -> Gate:
        bounds = [bound for bound in (self.min, self.max) if bound is not None]
        if not bounds:
            raise ValueError("a gate needs min, max or both")
        if self.min is not None and self.max is not None and self.min > self.max:
            raise ValueError(f"min {self.min} is above max {self.max}, so nothing could pass")
        return self


class EvaluateSettings(BaseModel):
    """The settings of the comparison of an adapter with its base.

    Attributes:
        seeds: Images per prompt and model.
        seed: Seed of the images, of the noise of the validation loss and of the resampling.
        steps: Denoising steps per image.
        guidance: Scale of classifier-free guidance; 1 is none.
        max_pictures: Largest number of held-out images.
        gates: Bounds by metric name.
        embedder: A local folder with a CLIPModel for the metrics; None takes the embedded base's.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    seeds: int = Field(default=2, ge=1, le=64)
    seed: int = Field(default=0, ge=0, lt=2**63)
    steps: int = Field(default=12, ge=1, le=1000)
    guidance: float = Field(default=3.0, ge=0.0, le=100.0, allow_inf_nan=False)
    max_pictures: int = Field(default=16, ge=1, le=1024)
    gates: dict[str, Gate] = Field(default_factory=dict)
    embedder: str | None = None

    @field_validator("gates")
    @classmethod
    def _gates_name_metrics(cls, value: dict[str, Gate]) -> dict[str, Gate]:
        for name in value:
            try:
                METRICS[name]
            except SettingsError as error:
                raise ValueError(str(error)) from None
        return value
