"""Learning-rate schedules: pure functions of the step, so they have no state to save."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from lora_engine.registries import Registry
from lora_engine.training.specs.lengths import warmup_steps

Decay = Callable[..., float]
"""(share `x` in [0, 1) of the steps after the warmup, options) -> factor on the highest rate, 0 to 1.

`inverse-sqrt` takes the number of steps after the warmup instead of the share.
"""
_BY_STEP = ("inverse-sqrt",)


def _constant(x: float) -> float:
    del x
    return 1.0


def _linear(x: float, floor: float = 0.0) -> float:
    return _raise_to(floor, 1.0 - x)


def _cosine(x: float, floor: float = 0.0) -> float:
    return _raise_to(floor, 0.5 * (1.0 + math.cos(math.pi * x)))


def _restarts(x: float, cycles: int = 2, floor: float = 0.0) -> float:
    return _cosine((cycles * x) % 1.0, floor)


def _polynomial(x: float, power: float = 2.0, floor: float = 0.0) -> float:
    return _raise_to(floor, float((1.0 - x) ** power))


def _wsd(x: float, decay: float = 0.2, form: str = "cosine", floor: float = 0.0) -> float:
    share = (x - (1.0 - decay)) / decay
    if share <= 0.0:
        return 1.0
    return _raise_to(floor, 1.0 - math.sqrt(share)) if form == "sqrt" else schedules[form](share, floor=floor)


def _inverse_sqrt(steps: float, timescale: int = 100) -> float:
    return math.sqrt(timescale / (steps + timescale))


def _rex(x: float, floor: float = 0.0) -> float:
    return _raise_to(floor, (1.0 - x) / (1.0 - 0.5 * x))


def _raise_to(floor: float, factor: float) -> float:
    # Without a floor the factor keeps its bits.
    return floor + (1.0 - floor) * factor if floor else factor


schedules: Registry[Decay] = Registry("learning-rate schedule")
schedules.add("constant", _constant)
schedules.add("cosine", _cosine)
schedules.add("linear", _linear)
schedules.add("cosine-restarts", _restarts)
schedules.add("polynomial", _polynomial)
schedules.add("wsd", _wsd)
schedules.add("inverse-sqrt", _inverse_sqrt)
schedules.add("rex", _rex)


def rate_factor(schedule: str, step: int, steps: int, warmup: int, **options: Any) -> float:
    """Returns the factor on the highest rate in a step, counted from 0.

    Args:
        schedule: A name in `schedules`.
        step: 0 to `steps` - 1.
        steps: Steps of the phase.
        warmup: Steps of linear warmup to the highest rate.
        **options: The schedule's own options.

    Raises:
        SettingsError: The schedule is unknown.
    """
    decay = schedules[schedule]
    if step < warmup:
        return (step + 1) / (warmup + 1)
    after = step - warmup
    return decay(after if schedule in _BY_STEP else after / max(1, steps - warmup), **options)


@dataclass(frozen=True)
class RateStage:
    """A stretch of steps with one schedule; a phase has one or more of them.

    Attributes:
        steps: Number of steps.
        schedule: A name in `schedules`.
        options: The schedule's own options.
        warmup: Steps of linear warmup, or a share of the stage such as `10%`.
        scale: Factor on the highest rates of the run.
    """

    steps: int
    schedule: str = "constant"
    options: Mapping[str, Any] = field(default_factory=dict)
    warmup: int | str = 0
    scale: float = 1.0

    def factor(self, step: int) -> float:
        """Returns the factor on the highest rates of the run in a step of the stage, counted from 0."""
        warmup = warmup_steps(self.warmup, self.steps)
        return self.scale * rate_factor(self.schedule, step, self.steps, warmup, **self.options)


@dataclass(frozen=True)
class PhaseRates:
    """The rates of a phase.

    Attributes:
        name: The phase.
        stages: Its stages in order.
        end: Steps after which the phase ends within its stages; None is at their end.
    """

    name: str
    stages: tuple[RateStage, ...]
    end: int | None = None

    @property
    def steps(self) -> int:
        """Number of steps of the phase."""
        return sum(stage.steps for stage in self.stages) if self.end is None else self.end

    def factor(self, step: int) -> float:
        """Returns the factor on the highest rates in a step of the phase, counted from 0."""
        for stage in self.stages:
            if step < stage.steps:
                return stage.factor(step)
            step -= stage.steps
        raise IndexError(f"phase {self.name!r} has {self.steps} steps")

    def to_json(self) -> dict[str, Any]:
        """Returns JSON values, for checkpoints."""
        return {name: value for name, value in asdict(self).items() if name != "end" or value is not None}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> PhaseRates:
        """Returns the rates of `to_json`."""
        return cls(values["name"], tuple(RateStage(**stage) for stage in values["stages"]), values.get("end"))


def common_steps(before: Sequence[PhaseRates], after: Sequence[PhaseRates]) -> int:
    """Returns how many first steps of two runs with the same other settings are the same steps at the same rates."""
    total = 0
    for one, other in zip(before, after, strict=False):
        if one.name != other.name:
            break
        shared = min(one.steps, other.steps)
        same = shared if one == other else _count_equal(one, other, shared)
        total += same
        if same < shared or one.steps != other.steps:
            break
    return total


def _count_equal(one: PhaseRates, other: PhaseRates, steps: int) -> int:
    return next((step for step in range(steps) if one.factor(step) != other.factor(step)), steps)
