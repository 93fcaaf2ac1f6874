"""Learning-rate schedules: pure functions of the step, so that there is nothing to save and nothing to restore."""

from __future__ import annotations

import math
from collections.abc import Callable

from lora_engine.registries import Registry

# What is left of the highest rate when the share `x` in [0, 1) of the steps after the warmup is done.
schedules: Registry[Callable[[float], float]] = Registry("learning-rate schedule")
schedules.add("constant", lambda x: 1.0)
schedules.add("cosine", lambda x: 0.5 * (1.0 + math.cos(math.pi * x)))
schedules.add("linear", lambda x: 1.0 - x)


def rate_factor(schedule: str, step: int, steps: int, warmup: int) -> float:
    """The factor on the highest rate in a step, counted from 0."""
    if step < warmup:
        return (step + 1) / (warmup + 1)
    return schedules[schedule]((step - warmup) / max(1, steps - warmup))
