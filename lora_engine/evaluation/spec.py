"""Defines the user-facing evaluation settings. Must not import torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, field_validator, model_validator
from pydantic_core.core_schema import no_info_after_validator_function, no_info_before_validator_function

from lora_engine.errors import SettingsError
from lora_engine.evaluation.evidence import BASE
from lora_engine.evaluation.metrics import METRICS
from lora_engine.settings import AddedLater

StrengthFactor = Annotated[float, Field(ge=-10.0, le=10.0, allow_inf_nan=False)]
"""Factor of an adapter's change."""


class Gate(BaseModel):
    """A bound on a metric.

    Attributes:
        min: Least allowed value; None is no bound.
        max: Greatest allowed value; None is no bound.
        of: The checked value: the adapter's own, or adapter minus base.
        against: The model of the difference: `base`, `production` or another entry of `against`.
        on: `value`, or the `lower` or `upper` bound of its 95 % interval, which fails with fewer than 6 groups.
        missing: `fail` or `skip` the gate if there is no such version; a skipped gate is reported and never counts as
            passed.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    min: FiniteFloat | None = None
    max: FiniteFloat | None = None
    of: Literal["adapter", "difference"] = "difference"
    against: Annotated[str, AddedLater()] = BASE
    on: Annotated[Literal["value", "lower", "upper"], AddedLater()] = "value"
    missing: Annotated[Literal["fail", "skip"], AddedLater()] = "fail"

    @model_validator(mode="after")
    def _bounds_make_sense(self) -> Gate:
        bounds = [bound for bound in (self.min, self.max) if bound is not None]
        if not bounds:
            raise ValueError("a gate needs min, max or both")
        if self.min is not None and self.max is not None and self.min > self.max:
            raise ValueError(f"min {self.min} is above max {self.max}, so nothing could pass")
        if self.of == "adapter" and self.against != BASE:
            raise ValueError(f"the adapter's own value is not a difference; remove of, or against: {self.against}")
        return self


@dataclass(frozen=True)
class OneOrSeveral:
    """Marks a tuple for which one item alone is valid too."""

    def __get_pydantic_core_schema__(self, source: Any, handler: Any) -> Any:
        """Returns the tuple's schema behind a step that wraps one item."""
        return no_info_before_validator_function(_to_tuple, handler(source))

    def __get_pydantic_json_schema__(self, core_schema: Any, handler: Any) -> dict[str, Any]:
        """Returns the schema of the tuple or of its item."""
        several = handler(core_schema)
        return {"anyOf": [several["items"], several]}


@dataclass(frozen=True)
class OrDefault:
    """Marks the gates, for which the word `default` means `DEFAULT_GATES`."""

    def __get_pydantic_core_schema__(self, source: Any, handler: Any) -> Any:
        """Returns the schema of the gates behind a step that replaces the word, and before one that checks names."""
        return no_info_after_validator_function(
            _check_names, no_info_before_validator_function(_from_word, handler(source))
        )

    def __get_pydantic_json_schema__(self, core_schema: Any, handler: Any) -> dict[str, Any]:
        """Returns the schema of the gates or the word."""
        return {"anyOf": [{"const": "default"}, handler(core_schema)]}


def _to_tuple(value: Any) -> Any:
    if isinstance(value, Mapping | Gate):
        return (value,)
    return tuple(value) if isinstance(value, list) else value


def _from_word(value: Any) -> Any:
    return DEFAULT_GATES if value == "default" else value


def _check_names(gates: Any) -> Any:
    for name in gates:
        try:
            METRICS[name]
        except SettingsError as error:
            raise ValueError(str(error)) from None
    return gates


Gates = Annotated[
    dict[str, Annotated[tuple[Gate, ...], Field(min_length=1, max_length=16), OneOrSeveral()]], OrDefault()
]
"""Bounds by metric name: one gate or several; `default` means `DEFAULT_GATES`."""
DEFAULT_GATES: Mapping[str, Any] = {
    "clip_i_paired": {"min": 0.0},
    "clip_t": {"min": -0.05},
    "drift": {"max": 0.5, "of": "adapter"},
    "validation_loss": {"max": 0.0},
}
"""No less like the real images than the base, no worse on held-out images, prompts still followed, little drift."""


class EvaluateSettings(BaseModel):
    """The settings of the comparison of an adapter with its base and with other versions.

    Attributes:
        seeds: Images per prompt and model.
        seed: Seed of the images, of the noise of the validation loss and of the resampling.
        steps: Denoising steps per image.
        guidance: Scale of classifier-free guidance; 1 is none.
        max_pictures: Largest number of held-out images.
        gates: Bounds by metric name: one or several; `default` bounds likeness, agreement, drift and validation loss.
        embedder: The CLIP or SigLIP of the metrics: a hub id, optionally with `@revision`, or a local folder; None
            takes the default of the base's family, the embedded one for `tiny`; `none` leaves out its metrics.
        image_embedder: A DINOv2 for the likeness to real images, as for `embedder`; `tiny` has none.
        face_embedder: An embedder of faces for the identity of persons, as for `image_embedder`; None leaves out its
            metrics.
        judge: A vision-language model that is asked about the images: a folder that `save_pretrained` of transformers
            wrote, or a hub id, optionally with `@revision`; None leaves out its metrics.
        extra: Optional metrics that are measured too: a gate on one has the same effect.
        strengths: Strengths of the adapter at which the first prompts are drawn, such as [0, 0.5, 1, 1.5].
        masked_likeness: True compares with the real images inside of their masks only.
        keep: Largest number of generated images that are stored with the report.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    seeds: int = Field(default=2, ge=1, le=64)
    seed: int = Field(default=0, ge=0, lt=2**63)
    steps: int = Field(default=12, ge=1, le=1000)
    guidance: float = Field(default=3.0, ge=0.0, le=100.0, allow_inf_nan=False)
    max_pictures: int = Field(default=16, ge=1, le=1024)
    gates: Gates = Field(default_factory=dict)
    embedder: str | None = Field(default=None, min_length=1)
    image_embedder: Annotated[str | None, AddedLater(), Field(min_length=1)] = None
    face_embedder: Annotated[str | None, AddedLater(), Field(min_length=1)] = None
    judge: Annotated[str | None, AddedLater(), Field(min_length=1)] = None
    extra: Annotated[tuple[str, ...], AddedLater(), Field(max_length=100)] = ()
    strengths: Annotated[tuple[StrengthFactor, ...], AddedLater(), Field(max_length=21)] = ()
    masked_likeness: Annotated[bool, AddedLater()] = False
    keep: Annotated[int, AddedLater(), Field(ge=0, le=100_000)] = 1_000

    @field_validator("extra")
    @classmethod
    def _extra_names_optional_metrics(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        allowed = [name for name, metric in METRICS.items() if metric.optional]
        for name in value:
            if name not in allowed:
                raise ValueError(f"{name!r} is not an optional metric; allowed: {', '.join(allowed)}")
        return value

    def measures(self, name: str) -> bool:
        """Returns True if a metric is to be measured, provided that its needs are met."""
        metric = METRICS[name]
        answered = metric.judged and self.judge is not None
        return not metric.optional or answered or name in self.extra or name in self.gates

    def listed_gates(self) -> list[tuple[str, Gate]]:
        """Returns (metric, gate) of all gates, sorted by metric."""
        return [(name, gate) for name in sorted(self.gates) for gate in self.gates[name]]
