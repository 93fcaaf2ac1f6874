from __future__ import annotations

import numpy as np
import pytest

from lora_engine.evaluation.statistics import compare


def test_the_interval_has_its_nominal_coverage() -> None:
    rng = np.random.default_rng(0)
    covered = 0
    for trial in range(200):
        base = rng.normal(size=40)
        adapter = base + rng.normal(0.3, 0.5, size=40)
        low, high = compare(base, adapter, seed=trial, resamples=400).interval or (0.0, 0.0)
        covered += low <= 0.3 <= high
    assert 0.88 <= covered / 200 <= 0.99


@pytest.mark.parametrize("resamples", [1, 256, 300, 2000])
@pytest.mark.parametrize("level", [0.5, 0.95])
def test_the_interval_equals_that_of_resampling_without_chunks(resamples: int, level: float) -> None:
    base, adapter = np.random.default_rng(3).normal(size=(2, 17))
    indices = np.random.Generator(np.random.PCG64(9)).integers(0, 17, size=(resamples, 17))
    means = (adapter - base)[indices].mean(axis=1)
    expected = np.quantile(means, [0.5 - level / 2, 0.5 + level / 2])
    comparison = compare(base, adapter, seed=9, resamples=resamples, level=level)
    assert comparison.interval == pytest.approx(tuple(expected), abs=1e-12)


def test_by_default_an_interval_of_95_percent_comes_from_2000_resamples() -> None:
    base, adapter = np.random.default_rng(4).normal(size=(2, 30))
    assert compare(base, adapter, seed=1) == compare(base, adapter, seed=1, resamples=2000, level=0.95)
    assert compare(base, adapter, seed=1) != compare(base, adapter, seed=1, resamples=1999)
    assert compare(base, adapter, seed=1) != compare(base, adapter, seed=1, level=0.949)


def test_the_means_are_those_of_each_side_and_two_units_have_an_interval() -> None:
    comparison = compare(np.array([1.0, 2.0]), np.array([4.0, 9.0]), seed=0)
    assert (comparison.base, comparison.adapter, comparison.difference, comparison.n) == (1.5, 6.5, 5.0, 2)
    assert comparison.interval == (3.0, 7.0)


def test_differences_are_taken_in_double_precision() -> None:
    base = np.array([1e8, 2e8], dtype=np.float32)
    comparison = compare(base, np.nextafter(base, np.float32(np.inf)), seed=0)
    assert comparison.difference == pytest.approx(12.0)
    exact = compare(np.array([1.0, 1.0]), np.array([1.0 + 1e-12, 1.0 + 1e-12]), seed=0)
    assert exact.difference == pytest.approx(1e-12, rel=1e-3)


def test_pairing_detects_a_small_shift_in_noisy_values() -> None:
    base = np.random.default_rng(1).normal(0, 10, size=20)
    comparison = compare(base, base + 0.1, seed=0)
    assert comparison.interval == pytest.approx((0.1, 0.1))
    assert comparison.difference == pytest.approx(0.1)


def test_the_same_seed_gives_the_same_interval_and_another_seed_another() -> None:
    base, adapter = np.random.default_rng(2).normal(size=(2, 30))
    assert compare(base, adapter, seed=5) == compare(base, adapter, seed=5)
    assert compare(base, adapter, seed=5) != compare(base, adapter, seed=6)


def test_a_single_unit_has_no_interval() -> None:
    comparison = compare(np.array([1.0]), np.array([3.0]), seed=0)
    assert (comparison.difference, comparison.interval, comparison.n) == (2.0, None, 1)


@pytest.mark.parametrize(("base", "adapter"), [([], []), ([1.0], [1.0, 2.0]), ([[1.0]], [[1.0]])])
def test_values_that_are_not_pairs_are_refused(base: list[float], adapter: list[float]) -> None:
    with pytest.raises(ValueError, match="paired values"):
        compare(np.array(base), np.array(adapter), seed=0)
