"""Settings of learning-rate schedules. Torch-free; `training.schedules` computes them.

In a pipeline file: `schedule: linear`, or with options `schedule: {name: cosine-restarts, cycles: 3}`.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from lora_engine.registries import NameOrOptions
from lora_engine.settings import AddedLater

_Share = Annotated[float, Field(allow_inf_nan=False, ge=0.0, le=1.0)]
_Floor = Annotated[_Share, AddedLater()]


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
    """A linear decay.

    Attributes:
        floor: Lowest rate, as a share of the highest.
    """

    name: Literal["linear"] = "linear"
    floor: _Floor = 0.0


class Cosine(Schedule):
    """A half-cosine decay (Loshchilov & Hutter 2017).

    Attributes:
        floor: Lowest rate, as a share of the highest.
    """

    name: Literal["cosine"] = "cosine"
    floor: _Floor = 0.0


class CosineRestarts(Schedule):
    """Several half-cosine decays, each restarting at the highest rate (Loshchilov & Hutter 2017).

    Attributes:
        cycles: Number of decays.
        floor: Lowest rate, as a share of the highest.
    """

    name: Literal["cosine-restarts"] = "cosine-restarts"
    cycles: int = Field(default=2, ge=1, le=10_000)
    floor: _Floor = 0.0


class Polynomial(Schedule):
    """A decay with the remaining share of the steps, to a power.

    Attributes:
        power: Exponent; 1 is linear, above 1 falls sooner.
        floor: Lowest rate, as a share of the highest.
    """

    name: Literal["polynomial"] = "polynomial"
    power: float = Field(default=2.0, gt=0.0, le=100.0)
    floor: _Floor = 0.0


class Wsd(Schedule):
    """Warmup, stable, decay: the highest rate until the last part of the steps (Hu et al. 2024).

    Attributes:
        decay: Share of the steps after the warmup in which the rate falls.
        form: Form of the fall; `sqrt` is 1 - sqrt(x) (Haegele et al. 2024).
        floor: Lowest rate, as a share of the highest.
    """

    name: Literal["wsd"] = "wsd"
    decay: Annotated[float, Field(allow_inf_nan=False, gt=0.0, le=1.0)] = 0.2
    form: Literal["cosine", "linear", "sqrt"] = "cosine"
    floor: _Share = 0.0


class InverseSqrt(Schedule):
    """A slow decay, sqrt(t / (n + t)) in step n after the warmup (Zhai et al. 2022), the same for any run length.

    Attributes:
        timescale: t, steps; after 3 t steps the rate is half of the highest.
    """

    name: Literal["inverse-sqrt"] = "inverse-sqrt"
    timescale: int = Field(default=100, ge=1, le=10_000_000)


class Rex(Schedule):
    """REX (Chen et al. 2022): falls late, (1 - x) / (1 - x / 2) for a share x of the steps.

    Attributes:
        floor: Lowest rate, as a share of the highest.
    """

    name: Literal["rex"] = "rex"
    floor: _Share = 0.0


AnySchedule = Annotated[
    Constant | Linear | Cosine | CosineRestarts | Polynomial | Wsd | InverseSqrt | Rex,
    Field(discriminator="name"),
    NameOrOptions(),
]
"""A schedule: its name, or its name and options."""
