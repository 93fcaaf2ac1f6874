"""A running mean of parameters, beside whatever optimiser moves them; some optimisers keep a mean of their own."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from lora_engine.training.specs.rates import Ema


def decay_at(settings: Ema, step: int) -> float:
    """The share of the mean that stays in a step, counted from 0 (Tieleman's warmup, as TensorFlow has it)."""
    if not settings.warmup:
        return settings.decay
    return min(settings.decay, (1.0 + step) / (10.0 + step))


class RunningMean:
    """The mean of some parameters; it begins as what they are.

    Args:
        parameters: By name; only read, but by `swapped` and `take`.
        settings: How long it remembers.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter], settings: Ema) -> None:
        self._parameters, self._settings = dict(parameters), settings
        self._means = {name: value.detach().clone() for name, value in parameters.items()}

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Takes in the parameters as they are after a step, counted from 0."""
        for name, value in self._parameters.items():
            self._means[name].lerp_(value, 1.0 - decay_at(self._settings, step))

    @contextmanager
    def swapped(self) -> Iterator[None]:
        """While it is open, the parameters are their means; afterwards, bit for bit as before."""
        before = {name: value.detach().clone() for name, value in self._parameters.items()}
        self._put(self._means)
        try:
            yield
        finally:
            self._put(before)

    def take(self) -> None:
        """Puts the means into the parameters, for good, where the settings want them written."""
        if self._settings.written == "mean":
            self._put(self._means)

    def export(self) -> dict[str, Tensor]:
        """The means by name, to be saved."""
        return dict(self._means)

    def restore(self, means: Mapping[str, Tensor]) -> None:
        """Puts back what `export` gave; copies."""
        for name, value in self._means.items():
            value.copy_(means[name])

    @torch.no_grad()
    def _put(self, values: Mapping[str, Tensor]) -> None:
        for name, value in self._parameters.items():
            value.copy_(values[name])
