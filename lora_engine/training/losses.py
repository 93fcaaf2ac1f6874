"""Loss terms over one batch, each a small frozen object. The loop adds them up."""

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
        name: Name in the progress and the curves.
    """

    @property
    def name(self) -> str:
        """Name in the progress and the curves."""
        ...

    def __call__(self, predicted: Tensor, target: Tensor, batch: Batch) -> Tensor:
        """Returns the weighted term, a float32 scalar that keeps the graph."""
        ...


def mean_error(predicted: Tensor, target: Tensor, batch: Batch, rows: slice, measure: Measure) -> Tensor:
    """Returns the mean weighted error over some rows: a float32 scalar that keeps the graph.

    An element is weighted by its row's timestep, and by `batch.weights` if set. The mean divides by the number of
    elements, not by the sum of the weights. No rows give 0.
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
    """The mean error over the user's images (Ho et al. 2020, eq. 14).

    Attributes:
        measure: Loss function; by default the squared error, at all timesteps alike.
    """

    measure: Measure = PLAIN
    name: str = "denoising"

    def __call__(self, predicted: Tensor, target: Tensor, batch: Batch) -> Tensor:
        """See `LossTerm`."""
        return mean_error(predicted, target, batch, slice(0, batch.instances), self.measure)


@dataclass(frozen=True)
class PriorLoss:
    """The mean error over the class images, weighted (Ruiz et al. 2023, eq. 2).

    Attributes:
        weight: Weight of the term; the loss of the user's images has weight 1.
        measure: Loss function.
    """

    weight: float
    measure: Measure = PLAIN
    name: str = "prior"

    def __call__(self, predicted: Tensor, target: Tensor, batch: Batch) -> Tensor:
        """See `LossTerm`."""
        rows = slice(batch.instances, None)
        return self.weight * mean_error(predicted, target, batch, rows, self.measure)
