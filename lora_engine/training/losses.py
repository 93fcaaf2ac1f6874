"""What training lowers: terms over one batch, each a small frozen object. The loop adds them up."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch.nn.functional as F
from torch import Tensor

from lora_engine.training.batches import Batch
from lora_engine.training.measure import PLAIN, Measure


class LossTerm(Protocol):
    """One term of the loss.

    Attributes:
        name: What the progress and the curves call it.
    """

    @property
    def name(self) -> str:
        """What the progress and the curves call it."""
        ...

    def __call__(self, predicted: Tensor, target: Tensor, batch: Batch) -> Tensor:
        """The term with its weight, a float32 scalar that keeps the graph."""
        ...


def mean_error(predicted: Tensor, target: Tensor, batch: Batch, rows: slice, measure: Measure) -> Tensor:
    """The mean over all elements of some rows, as they count: a float32 scalar that keeps the graph.

    An element counts by its error, by its row's timestep, and by `batch.weights` where there are any; the mean divides
    by the number of elements whatever they weigh. No rows give 0.
    """
    predicted, target = predicted[rows], target[rows]
    if not predicted.numel():
        return predicted.sum()
    if measure == PLAIN and batch.weights is None:
        return F.mse_loss(predicted, target)
    errors = measure.errors(predicted, target, batch.timesteps[rows])
    if batch.weights is not None:
        weights = batch.weights.expand(len(batch.timesteps), *batch.weights.shape[1:])
        errors = errors * weights[rows].to(errors.device, errors.dtype)
    return errors.mean()


@dataclass(frozen=True)
class DenoisingLoss:
    """The mean error over the person's pictures (Ho et al. 2020, eq. 14).

    Attributes:
        measure: How an error counts; by default by its square, at all timesteps alike.
    """

    measure: Measure = PLAIN
    name: str = "denoising"

    def __call__(self, predicted: Tensor, target: Tensor, batch: Batch) -> Tensor:
        """See `LossTerm`."""
        return mean_error(predicted, target, batch, slice(0, batch.instances), self.measure)


@dataclass(frozen=True)
class PriorLoss:
    """The mean error over the class pictures, weighted (Ruiz et al. 2023, eq. 2).

    Attributes:
        weight: Beside the loss of the person's pictures.
        measure: How an error counts.
    """

    weight: float
    measure: Measure = PLAIN
    name: str = "prior"

    def __call__(self, predicted: Tensor, target: Tensor, batch: Batch) -> Tensor:
        """See `LossTerm`."""
        rows = slice(batch.instances, None)
        return self.weight * mean_error(predicted, target, batch, rows, self.measure)
