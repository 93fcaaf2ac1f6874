from __future__ import annotations

import numpy as np
import pytest

from lora_engine.evaluation.statistics import compare


def test_the_interval_holds_the_truth_about_as_often_as_it_says() -> None:
    rng = np.random.default_rng(0)
    held = 0
    for trial in range(200):
        base = rng.normal(size=40)
        adapter = base + rng.normal(0.3, 0.5, size=40)
        low, high = compare(base, adapter, seed=trial, resamples=400).interval or (0.0, 0.0)
        held += low <= 0.3 <= high
    assert 0.88 <= held / 200 <= 0.99


def test_pairing_sees_a_small_shift_under_large_spread() -> None:
    base = np.random.default_rng(1).normal(0, 10, size=20)
    found = compare(base, base + 0.1, seed=0)
    assert found.interval == pytest.approx((0.1, 0.1))
    assert found.difference == pytest.approx(0.1)


def test_the_same_seed_gives_the_same_interval_and_another_seed_another() -> None:
    base, adapter = np.random.default_rng(2).normal(size=(2, 30))
    assert compare(base, adapter, seed=5) == compare(base, adapter, seed=5)
    assert compare(base, adapter, seed=5) != compare(base, adapter, seed=6)


def test_a_single_unit_has_no_interval() -> None:
    found = compare(np.array([1.0]), np.array([3.0]), seed=0)
    assert (found.difference, found.interval, found.n) == (2.0, None, 1)


@pytest.mark.parametrize(("base", "adapter"), [([], []), ([1.0], [1.0, 2.0]), ([[1.0]], [[1.0]])])
def test_values_that_are_not_pairs_are_refused(base: list[float], adapter: list[float]) -> None:
    with pytest.raises(ValueError, match="paired values"):
        compare(np.array(base), np.array(adapter), seed=0)
