"""Casts changed values to the dtypes of their tensors, and measures how much of the change the cast keeps.

Stochastic rounding takes one of the two neighboring numbers, with a probability that makes the mean exact (Croci et
al. 2022, "Stochastic rounding: implementation, error analysis and applications", section 2).
"""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

from lora_engine.errors import SettingsError
from lora_engine.seeds import generator

RoundingMode = Literal["nearest", "stochastic"]
# Elements per step of a measurement, which bounds its memory.
_STEP = 1 << 18
# Of 16-bit tensors a sample is measured, because measuring costs as much as the change: of the first blocks and of one
# in eight after them about so many elements, in evenly spaced rows.
_SAMPLE, _FIRST, _EVERY = 1 << 14, 64, 8


class Rounding:
    """Casts values to narrower dtypes for one rewrite of a model.

    Args:
        mode: `nearest`, or `stochastic`; float32 and float64 are never rounded.
        seed: Seed of stochastic rounding; every tensor has its own generator.

    Attributes:
        raised: Number of scales that were raised because changed values would not fit.

    Raises:
        SettingsError: The mode is unknown.
    """

    def __init__(self, mode: RoundingMode = "nearest", seed: int = 0) -> None:
        if mode not in get_args(RoundingMode):
            raise SettingsError(
                f"the rounding {mode!r} is unknown", allowed=", ".join(get_args(RoundingMode)), remedy="choose another"
            )
        self._mode, self._seed = mode, seed
        self._blocks, self._dot, self._square = 0, 0.0, 0.0
        self.raised = 0

    @property
    def survived(self) -> float | None:
        """Share of the changes that is in the stored values; None if no changed tensor is narrower than float32.

        It is `sum(stored * wanted) / sum(wanted^2)` over the changes of all float8 elements, and of a sample of the
        elements of 16-bit tensors.
        """
        return self._dot / self._square if self._square else None

    def source_for(self, tensor: str) -> torch.Generator | None:
        """Returns the generator for the blocks of a tensor, in their order; None to round to nearest."""
        return None if self._mode == "nearest" else generator(self._seed, "rounding", tensor)

    def measured_rows(self, block: Tensor) -> slice:
        """Returns the rows of the next block, `[rows, inner]` in its stored dtype, that are to be measured."""
        if block.element_size() == 1:
            return slice(None)
        self._blocks += 1
        is_measured = self._blocks <= _FIRST or self._blocks % _EVERY == 0
        return slice(0, None if is_measured else 0, max(1, block.numel() // _SAMPLE))

    def measure(self, before: Tensor, wanted: Tensor, stored: Tensor) -> None:
        """Adds a block to `survived`; all of one shape, of any float dtypes."""
        flat = [tensor.reshape(-1) for tensor in (before, wanted, stored)]
        for first in range(0, len(flat[0]), _STEP):
            base, change, cast = (part[first : first + _STEP].float() for part in flat)
            change = change - base
            self._square += float(torch.dot(change, change))
            self._dot += float(torch.dot(cast - base, change))


def cast_into(block: Tensor, values: Tensor, source: torch.Generator | None) -> None:
    """Writes values into a block of a narrower float dtype, rounded to nearest or, with a generator, stochastically.

    Args:
        block: The output.
        values: Float32 values of the same shape; overwritten by the rounded values.
        source: Generator of the draws; None rounds to nearest.
    """
    if source is not None:
        limits = torch.finfo(block.dtype)
        smallest = limits.smallest_normal * limits.eps
        spacing = torch.exp2(torch.frexp(values).exponent.float()).mul_(limits.eps / 2).clamp_(min=smallest)
        low = values.div_(spacing).floor()
        # A value that the dtype has is a whole number of spacings: its fraction is 0, and it stays.
        low.add_(torch.rand(values.shape, generator=source) < values.sub_(low))
        torch.mul(low, spacing, out=values)
    block.copy_(values)
