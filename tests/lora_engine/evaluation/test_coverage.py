"""Intervals cover, and verdicts are false, as often as the documentation says: simulated."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from lora_engine.evaluation.statistics import estimate

Values = NDArray[np.float64]
KINDS = ("normal", "skewed", "bounded")


def draw(kind: str, rng: np.random.Generator, n: int) -> Values:
    """Draws values of mean 0 and variance 1: normal, log-normal, or bounded with 40 % equal to the least."""
    if kind == "normal":
        return rng.normal(size=n)
    if kind == "skewed":
        sigma = 0.8
        mean, variance = np.exp(sigma**2 / 2), (np.exp(sigma**2) - 1) * np.exp(sigma**2)
        return np.asarray((np.exp(sigma * rng.normal(size=n)) - mean) / np.sqrt(variance))
    values = np.where(rng.random(n) < 0.4, 0.0, rng.beta(0.5, 0.5, size=n))
    return np.asarray((values - 0.3) / np.sqrt(0.6 * 0.375 - 0.09))


def simulate(kind: str, n: int, trials: int) -> tuple[float, float]:
    """Returns the share of intervals that contain the true mean, and the share of false verdicts."""
    rng = np.random.default_rng([n, KINDS.index(kind)])
    covered = false = 0
    for trial in range(trials):
        result = estimate(draw(kind, rng, n), seed=trial, resamples=999)
        assert result.interval is not None
        assert result.p is not None
        covered += result.interval[0] <= 0.0 <= result.interval[1]
        false += result.p <= 0.05
    return covered / trials, false / trials


@pytest.mark.parametrize("kind", KINDS)
def test_the_interval_of_six_groups_covers_the_mean(kind: str) -> None:
    covered, false = simulate(kind, 6, 300)
    assert covered >= 0.91 - 0.04, "2.4 standard errors of 300 trials are .04"
    assert false <= 0.08 + 0.04


@pytest.mark.nightly
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("n", "least"), [(6, 0.91), (8, 0.91), (12, 0.91), (16, 0.94), (24, 0.94), (32, 0.94)])
def test_the_interval_covers_the_mean_and_verdicts_are_rarely_false(kind: str, n: int, least: float) -> None:
    covered, false = simulate(kind, n, 6_000)
    assert covered >= least
    assert false <= 0.08


@pytest.mark.nightly
def test_a_percentile_interval_would_not_pass() -> None:
    rng = np.random.default_rng(0)
    covered = 0
    for _ in range(2_000):
        values = draw("skewed", rng, 6)
        means = values[rng.integers(0, 6, size=(999, 6))].mean(axis=1)
        low, high = np.quantile(means, [0.025, 0.975])
        covered += low <= 0.0 <= high
    assert covered / 2_000 < 0.85
