"""Settings of learning-rate schedules. Torch-free; `training.schedules` computes them.

In a pipeline file: `schedule: linear`, or with options `schedule: {name: cosine-restarts, cycles: 3}`.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from lora_engine.registries import NameOrOptions


class Schedule(BaseModel):
    """A learning-rate schedule after the warmup, and its options."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str

    def options(self) -> dict[str, Any]:
        """Returns every field but the name."""
        return self.model_dump(exclude={"name"})


class Constant(Schedule):
    """A constant rate."""

    name: Literal["constant"] = "constant"


class Linear(Schedule):
    """A linear decay to 0."""

    name: Literal["linear"] = "linear"


class Cosine(Schedule):
    """A half-cosine decay to 0 (Loshchilov & Hutter 2017)."""

    name: Literal["cosine"] = "cosine"


class CosineRestarts(Schedule):
    """Several half-cosine decays to 0, each restarting at the highest rate (Loshchilov & Hutter 2017).

    Attributes:
        cycles: Number of decays.
    """

    name: Literal["cosine-restarts"] = "cosine-restarts"
    cycles: int = Field(default=2, ge=1, le=10_000)


class Polynomial(Schedule):
    """A decay to 0: the remaining share of the steps, to a power.

    Attributes:
        power: Exponent; 1 is linear, above 1 falls sooner.
    """

    name: Literal["polynomial"] = "polynomial"
    power: float = Field(default=2.0, gt=0.0, le=100.0)


AnySchedule = Annotated[
    Constant | Linear | Cosine | CosineRestarts | Polynomial, Field(discriminator="name"), NameOrOptions()
]
"""A schedule: its name, or its name and options."""
