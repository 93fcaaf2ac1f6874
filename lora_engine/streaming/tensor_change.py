"""Defines the change of a stored tensor, and finds the scale with which the changed values of a scaled tensor fit."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from lora_engine.checkpoints.scales import FLOATS, read_scale
from lora_engine.checkpoints.stored_tensor import StoredTensor
from lora_engine.streaming.blocks import BLOCK, read_rows


class TensorChange(Protocol):
    """The change of one tensor.

    Attributes:
        is_whole: True if it needs the whole tensor at once instead of blocks of rows.
        bound: Upper bound of the change of an element; infinity if unknown.
    """

    @property
    def is_whole(self) -> bool: ...  # noqa: D102

    @property
    def bound(self) -> float: ...  # noqa: D102

    def apply(self, values: Tensor, stored: Tensor, first: int) -> None:
        """Changes a block in place.

        Args:
            values: `[rows, inner]`, float32 (float64 for a float64 tensor).
            stored: The same values in the stored dtype; for float32 and float64 the same memory as `values`.
            first: First row of the block in the tensor.
        """
        ...


Opener = Callable[[], TensorChange]
"""Creates the change of a tensor just before it is written: only its factors are in memory in float32."""


def fitting_scale(source: int, stored: StoredTensor, change: TensorChange) -> Tensor | None:
    """Returns the scale with which the changed values fit into the tensor's dtype; None if it has no scale or it fits.

    The scale is raised by powers of two, so unchanged values stay equal unless they become subnormal.

    Args:
        source: File descriptor of the tensor's file.
        stored: The tensor.
        change: Its change; applied once without writing.
    """
    scale = read_scale(stored)
    if scale is None:
        return None
    largest = torch.zeros_like(scale)
    rows = stored.shape[0] if stored.shape else 1
    step = rows if change.is_whole else max(1, BLOCK * rows // max(1, stored.size))
    for first in range(0, rows, step):
        values = read_rows(source, stored, first, min(step, rows - first))
        change.apply(values, values, first)
        parts = values.view(len(values), scale.shape[1], -1).abs().amax(-1)
        if len(scale) == 1:
            largest = torch.maximum(largest, parts.amax(0, keepdim=True))
        else:
            largest[first : first + len(values)] = parts
    limits = torch.finfo(FLOATS[stored.dtype])
    smallest = torch.finfo(torch.float32).tiny
    excess = largest / (limits.max * scale).clamp_(min=smallest)
    if bool((excess <= 1.0).all()):
        return None
    return scale.clamp(min=smallest / limits.max) * torch.exp2(excess.clamp(min=1.0).log2().ceil())
