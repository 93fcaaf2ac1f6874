"""Learning-rate schedules as a person chooses them. Torch-free; `training.schedules` computes them.

In a pipeline file: `schedule: linear`, or with options `schedule: {name: cosine-restarts, cycles: 3}`.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field


def _named(value: Any) -> Any:
    return {"name": value} if isinstance(value, str) else value


class Schedule(BaseModel):
    """How the rate goes on after the warmup, and its options."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str

    def options(self) -> dict[str, Any]:
        """Everything but the name."""
        return self.model_dump(exclude={"name"})


class Constant(Schedule):
    """It stays."""

    name: Literal["constant"] = "constant"


class Linear(Schedule):
    """It falls in a straight line to 0."""

    name: Literal["linear"] = "linear"


class Cosine(Schedule):
    """It falls along half a cosine to 0 (Loshchilov & Hutter 2017)."""

    name: Literal["cosine"] = "cosine"


class CosineRestarts(Schedule):
    """It falls along half a cosine several times, and jumps back up in between (Loshchilov & Hutter 2017).

    Attributes:
        cycles: How many times it falls.
    """

    name: Literal["cosine-restarts"] = "cosine-restarts"
    cycles: int = Field(default=2, ge=1, le=10_000)


class Polynomial(Schedule):
    """It falls to 0 as what is left of the steps, to a power.

    Attributes:
        power: 1 is a straight line; above, it falls sooner.
    """

    name: Literal["polynomial"] = "polynomial"
    power: float = Field(default=2.0, gt=0.0, le=100.0)


AnySchedule = Annotated[
    Constant | Linear | Cosine | CosineRestarts | Polynomial, Field(discriminator="name"), BeforeValidator(_named)
]
"""A schedule by its name alone, or by its name and options."""
