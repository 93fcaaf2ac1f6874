"""Exponential moving averages of parameters, independent of the optimizer. Some optimizers average on their own."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from lora_engine.training.specs.rates import Ema


def decay_at(settings: Ema, step: int) -> float:
    """Returns the decay in a step, counted from 0 (Tieleman's warmup, as in TensorFlow)."""
    if not settings.warmup:
        return settings.decay
    return min(settings.decay, (1.0 + step) / (10.0 + step))


class EmaWeights:
    """An exponential moving average of parameters, initialized with their values.

    Args:
        parameters: Parameters by name; changed only by `applied` and `finalize`.
        settings: Decay and warmup.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter], settings: Ema) -> None:
        self._parameters, self._settings = dict(parameters), settings
        self._means = {name: value.detach().clone() for name, value in parameters.items()}

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Updates the average after a step, counted from 0."""
        for name, value in self._parameters.items():
            self._means[name].lerp_(value, 1.0 - decay_at(self._settings, step))

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Swaps the averages into the parameters; restores them bit for bit on exit."""
        before = {name: value.detach().clone() for name, value in self._parameters.items()}
        self._copy_to_parameters(self._means)
        try:
            yield
        finally:
            self._copy_to_parameters(before)

    def finalize(self) -> None:
        """Copies the averages into the parameters if the settings write the average."""
        if self._settings.written == "mean":
            self._copy_to_parameters(self._means)

    def export(self) -> dict[str, Tensor]:
        """Returns the averages by name, for a checkpoint."""
        return dict(self._means)

    def restore(self, means: Mapping[str, Tensor]) -> None:
        """Copies exported averages back."""
        for name, value in self._means.items():
            value.copy_(means[name])

    @torch.no_grad()
    def _copy_to_parameters(self, values: Mapping[str, Tensor]) -> None:
        for name, value in self._parameters.items():
            value.copy_(values[name])
