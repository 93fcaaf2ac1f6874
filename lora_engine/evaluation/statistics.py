"""Compares paired values of few units: intervals and verdicts that hold at the number of independent groups at hand.

The unit of all of it is the group: values of a group are averaged first. Pure functions.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from scipy.special import stdtr, stdtrit

from lora_engine.evaluation.evidence import MIN_GROUPS

Values = NDArray[np.float64]
MetricVerdict = Literal["better", "worse", "unclear", "distance", "too few"]

CONFIDENCE = 0.95
BOOTSTRAP_LEVEL = 0.96
"""Level of the bootstrap interval: at 95 % it covers 93 % of skewed differences at 16 groups (`test_coverage.py`)."""
RESAMPLES = 5000
"""Enough for p-values that stay below 5 % after the adjustment for 100 metrics."""
_CHUNK = 256
# A spread below this share of the values is rounding, not variation.
_ROUNDING = 1e-12


@dataclass(frozen=True)
class Estimate:
    """The mean of values of independent groups.

    Attributes:
        mean: The mean.
        interval: Interval of about 95 %: it spans the studentized bootstrap interval (Efron and Tibshirani 1993,
            chapter 12) and the t interval, so it excludes zero only if both do. None below `MIN_GROUPS` groups.
        p: Two-sided p-value of a mean of zero: the larger one of both; None without an interval.
        effect: Mean in standard deviations, corrected for few groups (Hedges 1981); None without an interval or
            variation.
        n: Number of groups.
    """

    mean: float
    interval: tuple[float, float] | None
    p: float | None
    effect: float | None
    n: int


@dataclass(frozen=True)
class Comparison:
    """A model against another one on the same units.

    Attributes:
        before: Mean of the other model's values.
        after: Mean of the model's values.
        difference: after - before, per group.
        units: Number of units, which may be more than the groups.
        differences: The differences of the groups.
    """

    before: float
    after: float
    difference: Estimate
    units: int
    differences: tuple[float, ...]


def compare(
    before: Values, after: Values, groups: Sequence[str], *, seed: int, resamples: int = RESAMPLES
) -> Comparison:
    """Compares paired values; groups are averaged first and have equal weights.

    Args:
        before: One value per unit, shape [n].
        after: The same units in the same order.
        groups: Group of each unit.
        seed: Seed of the resampling; same values and seed, same interval.
        resamples: Number of resamples.

    Raises:
        ValueError: The shapes differ, there is no unit, or a value is not finite.
    """
    if before.shape != after.shape or before.ndim != 1 or not len(before) or len(groups) != len(before):
        raise ValueError(
            f"paired values of shapes {before.shape} and {after.shape} with {len(groups)} groups; allowed: [n], n > 0"
        )
    old, new = average_groups(before, groups), average_groups(after, groups)
    differences = new - old
    return Comparison(
        before=float(old.mean()),
        after=float(new.mean()),
        difference=estimate(differences, seed=seed, resamples=resamples),
        units=len(before),
        differences=tuple(differences.tolist()),
    )


def average_groups(values: Values, groups: Sequence[str]) -> Values:
    """Returns the mean of each group's values, float64, in the order of the first units of the groups."""
    if not np.isfinite(values).all():
        raise ValueError("values contain NaN or Inf")
    positions = {group: position for position, group in enumerate(dict.fromkeys(groups))}
    index = np.array([positions[group] for group in groups])
    sums = np.bincount(index, weights=values.astype(np.float64), minlength=len(positions))
    return np.asarray(sums / np.bincount(index, minlength=len(positions)), dtype=np.float64)


def estimate(values: Values, *, seed: int, resamples: int = RESAMPLES) -> Estimate:
    """Estimates the mean of the groups' values, shape [n]."""
    n, mean = len(values), float(values.mean())
    if n < MIN_GROUPS:
        return Estimate(mean, None, None, None, n)
    deviation = float(values.std(ddof=1))
    if deviation <= _ROUNDING * float(np.abs(values).max()):
        return Estimate(mean, (mean, mean), 1.0 if mean == 0.0 else 0.0, None, n)
    error = deviation / math.sqrt(n)
    ratios = _studentized(values, mean, seed, resamples)
    tail = (1.0 - BOOTSTRAP_LEVEL) / 2.0
    low, high = (float(bound) for bound in np.quantile(ratios, [tail, 1.0 - tail]))
    widest = float(stdtrit(n - 1, (1.0 + CONFIDENCE) / 2.0))
    return Estimate(
        mean,
        (mean - max(high, widest) * error, mean - min(low, -widest) * error),
        max(2.0 * float(stdtr(n - 1, -abs(mean) / error)), _bootstrap_p(ratios, mean / error)),
        (1.0 - 3.0 / (4.0 * (n - 1) - 1.0)) * mean / deviation,
        n,
    )


def _bootstrap_p(ratios: Values, observed: float) -> float:
    """Returns the level at which the equal-tailed interval excludes zero, scaled so that `BOOTSTRAP_LEVEL` is 5 %."""
    above = (1 + int((ratios >= observed).sum())) / (len(ratios) + 1)
    below = (1 + int((ratios <= observed).sum())) / (len(ratios) + 1)
    return min(1.0, 2.0 * min(above, below) * (1.0 - CONFIDENCE) / (1.0 - BOOTSTRAP_LEVEL))


def adjust_holm(p_values: Mapping[str, float]) -> dict[str, float]:
    """Returns the p-values adjusted for their number (Holm 1979): one false verdict among all in 5 % of evaluations."""
    adjusted: dict[str, float] = {}
    largest = 0.0
    for rank, name in enumerate(sorted(p_values, key=lambda name: (p_values[name], name))):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[name]))
        adjusted[name] = largest
    return adjusted


def decide_verdicts(
    comparisons: Mapping[str, Comparison], better: Mapping[str, Literal["higher", "lower"]]
) -> tuple[dict[str, MetricVerdict], dict[str, float]]:
    """Returns the verdict of each comparison, and its p-value adjusted over all of them; distances are not among them.

    Args:
        comparisons: Metric -> comparison.
        better: Metric -> its better direction.
    """
    tested = {name: item.difference.p for name, item in comparisons.items() if item.difference.p is not None}
    adjusted = adjust_holm(tested)
    verdicts: dict[str, MetricVerdict] = {}
    for name, comparison in comparisons.items():
        difference = comparison.difference
        if name not in adjusted:
            verdicts[name] = "too few"
        elif adjusted[name] > 1.0 - CONFIDENCE or difference.mean == 0.0:
            verdicts[name] = "unclear"
        else:
            verdicts[name] = "better" if (difference.mean > 0.0) == (better[name] == "higher") else "worse"
    return verdicts, adjusted


def _studentized(values: Values, mean: float, seed: int, resamples: int) -> Values:
    """Returns (mean* - mean) / standard error* of the resamples; those without variation are drawn again."""
    generator = np.random.Generator(np.random.PCG64(seed))
    n = len(values)
    parts: list[Values] = []
    missing = resamples
    while missing > 0:
        # In chunks: all 5,000 resamples of 10,000 groups would take 400 MB.
        drawn = values[generator.integers(0, n, size=(min(_CHUNK, missing), n))]
        deviations = drawn.std(axis=1, ddof=1)
        varies = deviations > _ROUNDING * np.abs(values).max()
        parts.append((drawn[varies].mean(axis=1) - mean) * math.sqrt(n) / deviations[varies])
        missing -= len(parts[-1])
    return np.concatenate(parts)
