"""Computes confidence intervals with the paired bootstrap. Pure functions."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Values = NDArray[np.float64]
_CHUNK = 256


@dataclass(frozen=True)
class Comparison:
    """Base against adapter on the same units (prompts or images).

    Attributes:
        base: Mean of the base's values.
        adapter: Mean of the adapter's values.
        difference: adapter - base.
        interval: 95 % interval of the difference; None for a single unit.
        n: Number of units.
    """

    base: float
    adapter: float
    difference: float
    interval: tuple[float, float] | None
    n: int


def compare(base: Values, adapter: Values, *, seed: int, resamples: int = 2000, level: float = 0.95) -> Comparison:
    """Returns means and the percentile interval of the mean paired difference (Efron and Tibshirani 1993, chapter 13).

    Args:
        base: One value per unit, shape [n].
        adapter: The same units in the same order.
        seed: Seed of the resampling; same values and seed, same interval.
        resamples: Number of resamples.
        level: Coverage of the interval.

    Raises:
        ValueError: The shapes differ, or there is no unit.
    """
    if base.shape != adapter.shape or base.ndim != 1 or not len(base):
        raise ValueError(f"paired values of shapes {base.shape} and {adapter.shape}; both must be [n] with n > 0")
    differences = adapter.astype(np.float64) - base.astype(np.float64)
    return Comparison(
        base=float(base.mean()),
        adapter=float(adapter.mean()),
        difference=float(differences.mean()),
        interval=_interval(differences, seed, resamples, level) if len(differences) > 1 else None,
        n=len(differences),
    )


def _interval(differences: Values, seed: int, resamples: int, level: float) -> tuple[float, float]:
    generator = np.random.Generator(np.random.PCG64(seed))
    n = len(differences)
    # In chunks: all 2,000 resamples of 10,000 units would take 160 MB.
    means = [
        differences[generator.integers(0, n, size=(min(_CHUNK, resamples - start), n))].mean(axis=1)
        for start in range(0, resamples, _CHUNK)
    ]
    tail = (1.0 - level) / 2.0
    low, high = np.quantile(np.concatenate(means), [tail, 1.0 - tail])
    return float(low), float(high)
