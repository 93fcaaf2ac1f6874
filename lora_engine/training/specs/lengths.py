"""Lengths in steps, epochs or shares: `100`, `10 epochs`, `10%`. Torch-free.

An epoch shows every training image of the user once, repeats included. `TrainSettings.in_steps` replaces epochs by
steps once the images are known.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Annotated, Any

_NUMBER = r"\d{1,7}(\.\d{1,4})?"
_EPOCHS = re.compile(rf"({_NUMBER}) epochs?")
_SHARE = re.compile(rf"({_NUMBER})%")


@dataclass(frozen=True)
class Length:
    """Marks a setting that is a number of steps, or a text in another unit.

    Attributes:
        minimum: Smallest number of steps.
        share: True allows a share of a phase's steps, such as `10%`.
    """

    minimum: int = 1
    share: bool = False

    def __get_pydantic_core_schema__(self, source: Any, handler: Any) -> Any:
        """Returns a union of numbers and texts with one message for both."""
        from pydantic_core import core_schema

        pattern = f"^({_EPOCHS.pattern}|{_SHARE.pattern})$" if self.share else f"^{_EPOCHS.pattern}$"
        shares = ", a share such as '10%'," if self.share else ""
        return core_schema.union_schema(
            [
                core_schema.int_schema(ge=self.minimum, le=10_000_000),
                core_schema.no_info_after_validator_function(_check, core_schema.str_schema(pattern=pattern)),
            ],
            custom_error_type="length",
            custom_error_message=f"Input should be a number of steps greater than or equal to {self.minimum}{shares} "
            "or epochs such as '10 epochs'",
        )


def _check(text: str) -> str:
    share, epochs = _SHARE.fullmatch(text), _EPOCHS.fullmatch(text)
    if (share and not 0 < float(share[1]) < 100) or (epochs and not float(epochs[1])):
        raise ValueError("out of range")
    return text


Steps = Annotated[int, Length()]
"""A number of steps, at least 1, or epochs."""
Interval = Annotated[int, Length(0)]
"""Steps between events, or epochs; 0 disables them."""
Warmup = Annotated[int, Length(0, share=True)]
"""Steps, epochs, or a share of each phase."""


def to_steps(length: int | str, epoch: int) -> int | str:
    """Returns a length with epochs replaced by steps, rounded up; a share stays as it is.

    Args:
        length: A valid length.
        epoch: Steps of an epoch.
    """
    match = _EPOCHS.fullmatch(length) if isinstance(length, str) else None
    # 0.1 epochs of 30 steps are 3.0000000000000004 steps in floats.
    return length if match is None else math.ceil(round(float(match[1]) * epoch, 6))


def warmup_steps(warmup: int | str, steps: int) -> int:
    """Returns the warmup of a phase in steps; a share is rounded, and leaves at least one step."""
    match = _SHARE.fullmatch(warmup) if isinstance(warmup, str) else None
    return int(warmup) if match is None else min(round(float(match[1]) / 100 * steps), steps - 1)
