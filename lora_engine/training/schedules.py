"""Learning-rate schedules: pure functions of the step, so they have no state to save."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from lora_engine.registries import Registry

Decay = Callable[..., float]
"""(share `x` in [0, 1) of the steps after the warmup, options) -> factor on the highest rate, 0 to 1."""


def _constant(x: float) -> float:
    del x
    return 1.0


def _linear(x: float) -> float:
    return 1.0 - x


def _cosine(x: float) -> float:
    return 0.5 * (1.0 + math.cos(math.pi * x))


def _restarts(x: float, cycles: int = 2) -> float:
    return _cosine((cycles * x) % 1.0)


def _polynomial(x: float, power: float = 2.0) -> float:
    return float((1.0 - x) ** power)


schedules: Registry[Decay] = Registry("learning-rate schedule")
schedules.add("constant", _constant)
schedules.add("cosine", _cosine)
schedules.add("linear", _linear)
schedules.add("cosine-restarts", _restarts)
schedules.add("polynomial", _polynomial)


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
    return decay((step - warmup) / max(1, steps - warmup), **options)
