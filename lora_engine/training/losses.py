"""What training lowers: terms over one batch, each a small frozen object. The loop adds them up."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch.nn.functional as F
from torch import Tensor

from lora_engine.training.batches import Batch


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


@dataclass(frozen=True)
class DenoisingLoss:
    """The mean squared error over the person's pictures (Ho et al. 2020, eq. 14)."""

    name: str = "denoising"

    def __call__(self, predicted: Tensor, target: Tensor, batch: Batch) -> Tensor:
        """See `LossTerm`."""
        rows = slice(0, batch.instances)
        return F.mse_loss(predicted[rows], target[rows])


@dataclass(frozen=True)
class PriorLoss:
    """The mean squared error over the class pictures, weighted (Ruiz et al. 2023, eq. 2).

    Attributes:
        weight: Beside the loss of the person's pictures.
    """

    weight: float
    name: str = "prior"

    def __call__(self, predicted: Tensor, target: Tensor, batch: Batch) -> Tensor:
        """See `LossTerm`."""
        rows = slice(batch.instances, None)
        return self.weight * F.mse_loss(predicted[rows], target[rows])
