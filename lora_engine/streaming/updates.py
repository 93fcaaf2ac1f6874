"""Updates stored tensors by the deltas of adapters: LoRA block by block, other kinds by their dense delta."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lora_engine.adapters import Delta, LoraDelta
from lora_engine.merging.compress import plain_factors
from lora_engine.streaming.model import TensorLocation
from lora_engine.streaming.tensor_change import TensorChange

Reference = Callable[[], Tensor]
"""Reads the weight (or bias) of the same module from another model, in its stored dtype."""


@dataclass(frozen=True)
class Update:
    """The update of one tensor by one delta.

    Attributes:
        delta: The delta.
        weight: Multiplier of the delta.
        location: Location of the module's weight or bias.
        is_bias: True for the bias.
        reference: Reads the weight (or bias) that the delta refers to; None means the tensor that is updated.
    """

    delta: Delta
    weight: float
    location: TensorLocation
    is_bias: bool
    reference: Reference | None = None

    def open(self) -> TensorChange:
        """Returns the change, with its factors in memory."""
        if type(self.delta) is LoraDelta and not self.is_bias:
            return _LowRank(self.delta, self.weight, self.location)
        return _Dense(self)


def open_updates(updates: Sequence[Update]) -> TensorChange:
    """Returns the sum of several updates of one tensor; each refers to the stored values."""
    return _Sum([update.open() for update in updates])


class _LowRank:
    """Adds `weight * scale * up @ down` to the rows of a block."""

    is_whole = False

    def __init__(self, delta: LoraDelta, weight: float, location: TensorLocation) -> None:
        down, up = plain_factors(delta)
        if location.transposed:
            down, up = up.T.contiguous(), down.T.contiguous()
        if location.swapped:
            up = up.roll(len(up) // 2, 0)
        self._down, self._up = down, up
        self._scale = weight * delta.scale
        self._first, self._last = location.rows
        self.bound = abs(self._scale) * len(down) * _largest(up) * _largest(down)

    def apply(self, values: Tensor, stored: Tensor, first: int) -> None:
        low, high = max(first, self._first), min(first + len(values), self._last)
        if low >= high:
            return
        up, down = self._up[low - self._first : high - self._first], self._down
        values[low - first : high - first].addmm_(up.to(values.dtype), down.to(values.dtype), alpha=self._scale)


class _Dense:
    """Adds `weight * delta_weight(base)` to the whole tensor."""

    is_whole = True
    bound = math.inf

    def __init__(self, update: Update) -> None:
        self._update = update

    def apply(self, values: Tensor, stored: Tensor, first: int) -> None:
        update, location = self._update, self._update.location
        base = location.view(stored) if update.reference is None else update.reference()
        base = base.float() if base.element_size() == 1 else base  # torch computes nothing in float8
        if update.is_bias:
            change = update.delta.delta_bias(base)
            if change is None:
                return
        else:
            change = update.delta.delta_weight(base)
        part = values[slice(*location.rows)]
        flat = change.reshape(len(change), -1).T if location.transposed else change
        if location.swapped:
            flat = flat.roll(len(flat) // 2, 0)
        part.add_(flat.reshape(part.shape), alpha=update.weight)


class _Sum:
    """Applies several changes, one after the other."""

    def __init__(self, parts: Sequence[TensorChange]) -> None:
        self._parts = parts
        self.is_whole = any(part.is_whole for part in parts)
        self.bound = sum(part.bound for part in parts)

    def apply(self, values: Tensor, stored: Tensor, first: int) -> None:
        if len(self._parts) > 1 and self.is_whole and stored.data_ptr() == values.data_ptr():
            stored = stored.clone()  # deltas refer to the values before any update
        for part in self._parts:
            part.apply(values, stored, first)


def _largest(factor: Tensor) -> float:
    return max(abs(float(end)) for end in torch.aminmax(factor))
