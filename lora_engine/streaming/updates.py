"""What adapters do to one stored tensor: low-rank terms block by block, all others by their dense delta."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lora_engine.adapters import Delta, LoraDelta
from lora_engine.merging.compress import plain_factors
from lora_engine.streaming.model import Place
from lora_engine.streaming.rewrite import Change

Reference = Callable[[], Tensor]
"""Reads the weight (or bias) of the same module from another model, in its stored dtype."""


@dataclass(frozen=True)
class Term:
    """What one delta adds to one tensor.

    Attributes:
        delta: The delta.
        weight: Its multiplier.
        place: Where the weight, or the bias, of its module lies.
        is_bias: Whether it is the bias.
        reference: The weight (or bias) that a delta refers to, where that is not the one that is changed.
    """

    delta: Delta
    weight: float
    place: Place
    is_bias: bool
    reference: Reference | None = None

    def open(self) -> Change:
        """The change."""
        if type(self.delta) is LoraDelta and not self.is_bias:
            return _LowRank(self.delta, self.weight, self.place)
        return _Dense(self)


def open_terms(terms: Sequence[Term]) -> Change:
    """The sum of what several deltas add to one tensor; each refers to the tensor as it is stored."""
    return _Sum([term.open() for term in terms])


class _LowRank:
    """`weight * scale * up @ down`, for the rows of a block."""

    is_whole = False

    def __init__(self, delta: LoraDelta, weight: float, place: Place) -> None:
        down, up = plain_factors(delta)
        if place.transposed:
            down, up = up.T.contiguous(), down.T.contiguous()
        self._down, self._up = down, up
        self._scale = weight * delta.scale
        self._first, self._last = place.rows
        self.bound = abs(self._scale) * len(down) * _largest(up) * _largest(down)

    def apply(self, values: Tensor, stored: Tensor, first: int) -> None:
        low, high = max(first, self._first), min(first + len(values), self._last)
        if low >= high:
            return
        up, down = self._up[low - self._first : high - self._first], self._down
        values[low - first : high - first].addmm_(up.to(values.dtype), down.to(values.dtype), alpha=self._scale)


class _Dense:
    """`weight * delta_weight(base)`, whole."""

    is_whole = True
    bound = math.inf

    def __init__(self, term: Term) -> None:
        self._term = term

    def apply(self, values: Tensor, stored: Tensor, first: int) -> None:
        term, place = self._term, self._term.place
        base = self._base(stored) if term.reference is None else term.reference()
        if term.is_bias:
            change = term.delta.delta_bias(base)
            if change is None:
                return
        else:
            change = term.delta.delta_weight(base)
        part = values[slice(*place.rows)]
        flat = change.reshape(len(change), -1).T if place.transposed else change
        part.add_(flat.reshape(part.shape), alpha=term.weight)

    def _base(self, stored: Tensor) -> Tensor:
        part = stored[slice(*self._term.place.rows)]
        return (part.T if self._term.place.transposed else part).reshape(self._term.place.shape)


class _Sum:
    """One after the other."""

    def __init__(self, parts: Sequence[Change]) -> None:
        self._parts = parts
        self.is_whole = any(part.is_whole for part in parts)
        self.bound = sum(part.bound for part in parts)

    def apply(self, values: Tensor, stored: Tensor, first: int) -> None:
        if len(self._parts) > 1 and self.is_whole and stored.data_ptr() == values.data_ptr():
            stored = stored.clone()  # what a delta refers to must not move while others are added
        for part in self._parts:
            part.apply(values, stored, first)


def _largest(factor: Tensor) -> float:
    return max(abs(float(end)) for end in torch.aminmax(factor))
