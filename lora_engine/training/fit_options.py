"""Defines the options and the history of `fit`. Imports no torch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from lora_engine.training.choosing import Check, Chooser
from lora_engine.training.schedules import PhaseRates, RateStage
from lora_engine.training.specs.rates import Ema

if TYPE_CHECKING:
    from lora_engine.training.phases import Phase


@dataclass(frozen=True)
class FitOptions:
    """Options of the loop; see `TrainSettings` for their meaning."""

    schedule: str = "constant"
    warmup: int | str = 0
    weight_decay: float = 0.0
    clip: float = 1.0
    accumulate: int = 1
    checkpoint_every: int = 100
    validate_every: int = 0
    observe_every: int = 0
    optimizer: str = "adamw"
    schedule_options: Mapping[str, Any] = field(default_factory=dict)
    optimizer_options: Mapping[str, Any] = field(default_factory=dict)
    ema: Ema | None = None
    loss_scale: float = 1.0
    then: tuple[RateStage, ...] = ()
    """Stages after the last phase's own steps."""
    save_every: int = 0
    validated_on: str = ""
    """Digest of the held-out images; validation losses on others are not continued."""
    chooser: Chooser | None = None
    """Chooses the best step of the last phase and ends it early; None keeps the last step."""


@dataclass
class History:
    """Losses and rates of a run over all phases, one entry per step.

    Attributes:
        loss: Loss of each step.
        rate: Learning rate of each step (of the phase's first group).
        validation: (steps done, validation loss).
        checks: Scores of the chooser's candidates; the first is that before the last phase's first step.
    """

    loss: list[float] = field(default_factory=list)
    rate: list[float] = field(default_factory=list)
    validation: list[tuple[int, float]] = field(default_factory=list)
    checks: list[Check] = field(default_factory=list)


def rates_of(phases: Sequence[Phase], options: FitOptions) -> Iterator[PhaseRates]:
    """Yields the rates of each phase: its own stage, and those that follow in the last one."""
    for number, phase in enumerate(phases, start=1):
        own = RateStage(phase.steps, options.schedule, dict(options.schedule_options), options.warmup)
        yield PhaseRates(phase.name, (own, *(options.then if number == len(phases) else ())))
