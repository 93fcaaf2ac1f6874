"""Groups denoising losses by timestep: an adapter may learn composition at high noise and details at low noise."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from lora_engine.evaluation.statistics import Values

BANDS = 5
"""Number of bands of the schedule, equally wide; the first has the least noise."""
_LEAST_LEARNED = 0.01


@dataclass(frozen=True)
class BandLoss:
    """The mean loss in one band of timesteps.

    Attributes:
        low: Start of the band, as a share of the schedule from 0 (the image) to 1 (noise).
        high: End of the band.
        losses: Mean loss by name, such as `base` and `adapter`.
    """

    low: float
    high: float
    losses: Mapping[str, float]

    def as_dict(self) -> dict[str, Any]:
        """Returns the band as stored in `report.json`."""
        return {"low": self.low, "high": self.high, "losses": dict(self.losses)}


def band_losses(grids: Mapping[str, Values], bands: int = BANDS) -> list[BandLoss]:
    """Returns the mean losses by band.

    Args:
        grids: Losses [images, timesteps] by name, on a grid at the midpoints of equal parts of the schedule, in
            ascending order of noise.
        bands: Number of bands; at most the number of timesteps.

    Raises:
        ValueError: A grid has no image or fewer timesteps than there are bands.
    """
    for name, grid in grids.items():
        if grid.ndim != 2 or not len(grid) or grid.shape[1] < bands:
            raise ValueError(f"losses of {name!r} have the shape {grid.shape}; [images, {bands} or more] is needed")
    columns = {name: _means(grid, bands) for name, grid in grids.items()}
    return [
        BandLoss(index / bands, (index + 1) / bands, {name: means[index] for name, means in columns.items()})
        for index in range(bands)
    ]


def training_gap(heldout: Values, training: Values) -> Values:
    """Returns how much larger each held-out image's loss is than the mean training image's, on the same fixed noise.

    The base's gap is that of the images themselves; an adapter that memorizes widens it.

    Args:
        heldout: Losses [n] of held-out images.
        training: Losses [m] of training images.
    """
    gap: Values = heldout - training.mean()
    return gap


def share_memorized(heldout: tuple[Values, Values], training: tuple[Values, Values]) -> Values:
    """Returns the share of the learned improvement that does not carry over to each held-out image.

    Args:
        heldout: Losses [n] of held-out images, before and after the training.
        training: Losses [m] of training images, before and after.

    Returns:
        [n]: 1 - the fall of its loss over the mean fall of the training images' losses; 0 if these fell by less than
        1 %, which is nothing learned.
    """
    before, after = training
    learned = float(before.mean() - after.mean())
    if learned < _LEAST_LEARNED * float(before.mean()):
        return np.zeros_like(heldout[0])
    share: Values = 1.0 - (heldout[0] - heldout[1]) / learned
    return share


def _means(grid: Values, bands: int) -> Sequence[float]:
    middles = (np.arange(grid.shape[1]) + 0.5) / grid.shape[1]
    band = (middles * bands).astype(np.int64)
    return [float(grid[:, band == index].mean()) for index in range(bands)]
