"""Defines the section `sweep` of a pipeline file, and what a registered winner says about its sweep. Torch-free."""

from __future__ import annotations

import math
from decimal import Decimal
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

MOST_TRIALS = 1_000
"""Most trials of a sweep: each is a run of the pipeline."""
SWEEP = "sweep"
"""Name of the entry about a sweep under `done` in the recipe of a version."""
TrialState = Literal["completed", "pruned", "failed"]
SweepDirection = Literal["maximize", "minimize"]
_LARGEST = 10**12
_Finite = Annotated[float, Field(allow_inf_nan=False)]
Number = Annotated[int, Field(ge=-_LARGEST, le=_LARGEST)] | _Finite
_Step = Annotated[int, Field(gt=0, le=_LARGEST)] | Annotated[float, Field(gt=0.0, allow_inf_nan=False)]
_Count = Annotated[int, Field(ge=0, lt=2**63)]


class SweepParameter(BaseModel):
    """What a setting may be: some values, or a range.

    Attributes:
        values: The values, of any type that the setting takes.
        low: Smallest value. A range of integers needs integers for both ends.
        high: Largest value.
        log: True searches the range by the logarithm.
        step: Distance of neighboring values; None is 1 for integers, and no grid for others.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    values: tuple[Any, ...] | None = Field(default=None, max_length=MOST_TRIALS)
    low: Number | None = None
    high: Number | None = None
    log: bool = False
    step: _Step | None = None

    @model_validator(mode="after")
    def _is_searchable(self) -> SweepParameter:
        if self.values is not None:
            if self.low is not None or self.high is not None or self.log or self.step is not None:
                raise ValueError("it has values and a range; keep one of them")
            if not self.values:
                raise ValueError("its values are empty; list at least one")
            return self
        if self.low is None or self.high is None:
            raise ValueError("it has neither values nor a range; set values, or low and high")
        if self.low >= self.high:
            raise ValueError(f"its range is empty: low {self.low:g} is not below high {self.high:g}")
        if self.log and self.low <= 0:
            raise ValueError(f"low is {self.low:g}, which has no logarithm; set it above 0, or log to false")
        if self.log and self.step is not None:
            raise ValueError("a range by the logarithm has no step; leave step or log out")
        if self.is_integer and isinstance(self.step, float):
            raise ValueError(f"step is {self.step:g} in a range of integers; set an integer")
        if self.step is not None and self.step > self.high - self.low:
            raise ValueError(f"step {self.step:g} is longer than the range from {self.low:g} to {self.high:g}")
        return self

    @property
    def is_integer(self) -> bool:
        """Returns True for a range of integers."""
        return isinstance(self.low, int) and isinstance(self.high, int)

    @property
    def size(self) -> int | float:
        """Number of different values; infinite for a range of numbers without a grid."""
        if self.values is not None:
            return len(self.values)
        if self.low is None or self.high is None or (self.step is None and not self.is_integer):
            return math.inf
        low, high, step = (Decimal(str(number)) for number in (self.low, self.high, self.step or 1))
        return int((high - low) // step) + 1

    @property
    def last(self) -> int | float:
        """Returns the largest value of a range that a whole number of steps reaches."""
        if self.low is None or self.high is None or self.step is None:
            return self.high or 0
        last = Decimal(str(self.low)) + (int(self.size) - 1) * Decimal(str(self.step))
        return int(last) if self.is_integer else float(last)

    def ends(self) -> tuple[Any, ...]:
        """Returns the values that decide whether all are allowed: all of a list, or the ends of a range."""
        return self.values if self.values is not None else (self.low, self.high)


class SweepSettings(BaseModel):
    """A search over settings of a pipeline, for `loraline sweep`; other verbs ignore it.

    Attributes:
        parameters: Path of a setting, such as `adapter.rank`, to its values or its range.
        metric: What trials are compared by: `STEP.METRIC` of an `evaluate` step, or `STEP.validation_loss` or
            `STEP.choice_loss` (that of the best checkpoint) of a `train` step, which needs no evaluation.
        direction: Whether the highest or the lowest value wins.
        trials: Number of trials.
        seed: Seed of the search; the same file gives the same trials.
        parallel: Trials that run at the same time. The next ones are proposed when all of them have ended.
        prune: True stops a trial whose validation loss is above the median of earlier trials at the same step.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    parameters: dict[str, SweepParameter] = Field(min_length=1, max_length=32)
    metric: str = Field(pattern=r"^[A-Za-z0-9_-]+\.[a-z0-9_]+$")
    direction: SweepDirection
    trials: int = Field(default=20, ge=2, le=MOST_TRIALS)
    seed: int = Field(default=0, ge=0, lt=2**31)
    parallel: int = Field(default=1, ge=1, le=64)
    prune: bool = True

    @model_validator(mode="after")
    def _has_enough_values(self) -> SweepSettings:
        size = math.prod(parameter.size for parameter in self.parameters.values())
        if size < self.trials:
            raise ValueError(f"trials is {self.trials}, but the parameters have only {size:g} combinations")
        return self

    @property
    def step(self) -> str:
        """Name of the step that measures."""
        return self.metric.partition(".")[0]

    @property
    def measure(self) -> str:
        """Name of the metric within the step."""
        return self.metric.partition(".")[2]


class SweptTrial(BaseModel):
    """A trial in the record of a winner.

    Attributes:
        values: Path of a setting to its value.
        state: How it ended.
        value: Value of the metric; None without one.
        adapter: The adapter; None if it was not finished.
        run: Id of its run in lineage.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    values: dict[str, Any]
    state: TrialState
    value: _Finite | None = None
    adapter: str | None = None
    run: str | None = None


class SweepWinner(BaseModel):
    """What a version says about the sweep that it won; `loraline sweep` sets it.

    Attributes:
        metric: What the trials were compared by.
        direction: Whether the highest or the lowest value won.
        value: Its value; too good, because it was chosen by it.
        trials: All trials, the winner included.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    metric: str
    direction: SweepDirection
    value: _Finite
    trials: tuple[SweptTrial, ...] = Field(max_length=MOST_TRIALS)

    def describe(self) -> dict[str, Any]:
        """Returns what the card and the report say, without the table of trials."""
        completed = sum(trial.state == "completed" for trial in self.trials)
        side = "highest" if self.direction == "maximize" else "lowest"
        return {
            "metric": self.metric,
            "value": self.value,
            "among": len(self.trials),
            "why": f"chosen among {len(self.trials)} trials ({completed} completed) by the {side} {self.metric}; "
            "its own value is too good, because it was chosen by it",
        }


class TrialRecord(BaseModel):
    """A trial that ended.

    Attributes:
        number: Its number, from 0.
        values: Path of a setting to its value.
        state: How it ended.
        value: Value of the metric; None unless it completed.
        curve: Steps and validation losses of its training.
        run: Id of its run in lineage; None if it was never recorded.
        adapter: Digest of the adapter; None unless it completed.
        size: Size of the adapter file in bytes.
        parameters: Number of values in the adapter.
        seconds: Duration of the steps that made the adapter, when they were executed.
        why: Why it was pruned or failed.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    number: int = Field(ge=0, lt=MOST_TRIALS)
    values: dict[str, Any]
    state: TrialState
    value: _Finite | None = None
    curve: tuple[tuple[_Count, _Finite], ...] = ()
    run: str | None = None
    adapter: str | None = None
    size: _Count = 0
    parameters: _Count = 0
    seconds: Annotated[float, Field(ge=0.0, allow_inf_nan=False)] = 0.0
    why: str = ""

    def to_swept(self) -> SweptTrial:
        """Returns what the record of a winner holds of it, which has no durations."""
        return SweptTrial(values=self.values, state=self.state, value=self.value, adapter=self.adapter, run=self.run)
