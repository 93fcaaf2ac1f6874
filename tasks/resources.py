"""Defines `retries` and `resources`, which every step of a pipeline has. They change no bytes and no cache key."""

from __future__ import annotations

import re
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

_GPU = re.compile(r"cuda(?::(?P<number>\d{1,3}))?")
DEVICE_PATTERN = r"^(auto|cpu|mps|cuda(:\d{1,3})?)$"


class Retries(BaseModel):
    """When a step that failed is tried again.

    Attributes:
        count: Maximum further attempts.
        delay: Seconds before each of them.
        any: False retries only timeouts and errors of a connection or a lock; True any error but a stop.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    count: Annotated[int, Field(ge=0, le=100)] = 2
    delay: Annotated[float, Field(ge=0, le=86400, allow_inf_nan=False)] = 1.0
    any: bool = False


class Resources(BaseModel):
    """What a step needs of the machine that runs it.

    Attributes:
        device: `auto` for the fastest, `cpu`, `mps`, `cuda`, or a numbered GPU such as `cuda:1`.
        memory: Free memory of the device in GiB that the step waits for; refused if the device has less in all.
        exclusive: True runs it only while no other training, and no other step with `resources`, uses the device.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    device: Annotated[str, Field(pattern=DEVICE_PATTERN)] = "auto"
    memory: Annotated[float | None, Field(gt=0, le=65536, allow_inf_nan=False)] = None
    exclusive: bool = False


NO_RESOURCES = Resources()


def retries_of(setting: int | Retries | None) -> Retries:
    """Returns the retries of a step; a number is their count, None the default."""
    if setting is None:
        return Retries()
    return Retries(count=setting) if isinstance(setting, int) else setting


def device_type(device: str) -> str:
    """Returns a device without its number."""
    return device.partition(":")[0]


def gpu_number(device: str) -> int | None:
    """Returns the number of a GPU such as `cuda:1`; None if it has none."""
    match = _GPU.fullmatch(device)
    return int(match["number"]) if match and match["number"] else None
