"""Declares which settings of a training may change without losing its steps. Torch-free.

A training continues from a checkpoint if its settings and its steps so far are those that the new settings would have
taken, so the result has the bytes of an uninterrupted run.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from lora_engine.training.specs.lengths import Steps, Warmup
from lora_engine.training.specs.schedules import AnySchedule, Constant

Effect = Literal["none", "continues", "restarts"]


@dataclass(frozen=True)
class SettingChange:
    """What a change of a setting does to the steps that were trained.

    Attributes:
        effect: `none` repeats nothing; `continues` keeps the first steps whose rates stay the same; `restarts` begins
            at step 0.
        reason: Why.
    """

    effect: Effect
    reason: str


_WATCHES = SettingChange("none", "it changes no byte of the adapter")
_RATES = "the steps at unchanged rates stay the same"
CHANGES: Mapping[str, SettingChange] = {
    "samples": _WATCHES,
    "validate_every": _WATCHES,
    "checkpoint_every": _WATCHES,
    "save_every": _WATCHES,
    "steps": SettingChange(
        "continues", f"{_RATES}: all of them with schedule constant, none with one that falls to the end"
    ),
    "schedule": SettingChange("continues", f"{_RATES}, such as those of the warmup"),
    "warmup": SettingChange("continues", f"{_RATES}: none if the warmup changes from the first step on"),
    "then": SettingChange("continues", "it adds steps after those of the last phase"),
    "learning_rate": SettingChange("restarts", "it changes every step; `then` changes the rate of later steps"),
    "rates": SettingChange("restarts", "it changes every step; `then` changes the rate of later steps"),
    "weight_decay": SettingChange("restarts", "it changes every step"),
    "clip": SettingChange("restarts", "it changes every step whose gradient is larger"),
    "batch": SettingChange("restarts", "every step sees other images"),
    "accumulate": SettingChange("restarts", "every step sees other images"),
    "seed": SettingChange("restarts", "every step sees other images and noise"),
    "captions": SettingChange("restarts", "every step sees other captions or images"),
    "caption_dropout": SettingChange("restarts", "every step sees other captions"),
    "objective": SettingChange("restarts", "every step sees another noise or loss"),
    "dropout": SettingChange("restarts", "it changes every step"),
    "prior": SettingChange("restarts", "every step sees other class images"),
    "method": SettingChange("restarts", "it trains something else"),
    "kind": SettingChange("restarts", "the factors have another form; `init` converts a finished adapter"),
    "rank": SettingChange("restarts", "the factors have another shape; `init` enlarges a finished adapter"),
    "alpha": SettingChange("restarts", "the factors have another scale"),
    "targets": SettingChange("restarts", "other layers are trained; `init` starts from a finished adapter"),
    "overrides": SettingChange("restarts", "the factors have another form; `init` starts from a finished adapter"),
    "precision": SettingChange("restarts", "every step has other rounding"),
    "running": SettingChange("restarts", "every step may have other rounding"),
    "clip_skip": SettingChange("restarts", "every step reads other text embeddings"),
    "prediction": SettingChange("restarts", "every step has another target"),
    "zero_terminal_snr": SettingChange("restarts", "every step has another noise"),
    "best_checkpoint": SettingChange("restarts", "it decides which steps are compared, and where they end"),
    "optimizer_state": SettingChange("restarts", "it changes the first step"),
}
"""What a change of each setting does; one that is not listed restarts."""
UNLISTED = SettingChange("restarts", "it may change every step")


def find_change(setting: str) -> SettingChange:
    """Returns what a change of a setting does."""
    return CHANGES.get(setting, UNLISTED)


def fixed_settings(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the settings, as JSON values, of which a change restarts a training."""
    return {name: value for name, value in settings.items() if find_change(name).effect == "restarts"}


def restarting(before: Mapping[str, Any], after: Mapping[str, Any]) -> Iterator[tuple[str, SettingChange]]:
    """Yields the settings that differ and restart a training, with what they do."""
    fixed, now = fixed_settings(before), fixed_settings(after)
    for name in sorted({*fixed, *now}):
        if fixed.get(name) != now.get(name):
            yield name, find_change(name)


class Stage(BaseModel):
    """More steps after the others, at another rate or with another schedule.

    Attributes:
        steps: Optimizer steps, or epochs such as `10 epochs`.
        learning_rate: Highest learning rate of the stage; None is that of the run. Other rates change by the same
            factor.
        schedule: Schedule of the stage.
        warmup: Steps of linear warmup, epochs, or a share of the stage such as `10%`.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    steps: Steps
    learning_rate: Annotated[float | None, Field(allow_inf_nan=False, gt=0.0)] = None
    schedule: AnySchedule = Constant()
    warmup: Warmup = 0
