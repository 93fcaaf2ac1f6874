from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy.stats import ttest_1samp

from lora_engine.evaluation.evidence import MIN_GROUPS
from lora_engine.evaluation.statistics import (
    adjust_holm,
    average_groups,
    compare,
    decide_verdicts,
    estimate,
)

Values = NDArray[np.float64]
Draw = Callable[[np.random.Generator, int], Values]


def alone(count: int) -> list[str]:
    """Returns the groups of units that are independent."""
    return [str(number) for number in range(count)]


def test_the_means_are_those_of_the_groups() -> None:
    comparison = compare(np.array([1.0, 2.0, 6.0]), np.array([4.0, 9.0, 7.0]), ["a", "b", "b"], seed=0)
    assert (comparison.before, comparison.after) == (2.5, 6.0)
    assert comparison.differences == (3.0, 4.0)
    assert (comparison.difference.mean, comparison.difference.n, comparison.units) == (3.5, 2, 3)


def test_groups_are_averaged_in_the_order_of_their_first_units() -> None:
    assert average_groups(np.array([1.0, 2.0, 5.0, 4.0]), ["b", "a", "b", "c"]).tolist() == [3.0, 2.0, 4.0]


def test_copies_of_a_unit_in_its_group_change_nothing() -> None:
    base, adapter = np.random.default_rng(3).normal(size=(2, 8))
    once = compare(base, adapter, alone(8), seed=1)
    twice = compare(np.tile(base, 3), np.tile(adapter, 3), alone(8) * 3, seed=1)
    assert twice.difference.interval == pytest.approx(once.difference.interval)
    assert (twice.difference.n, twice.units) == (8, 24)
    as_if_independent = compare(np.tile(base, 3), np.tile(adapter, 3), alone(24), seed=1)
    assert width(as_if_independent.difference.interval) < 0.7 * width(once.difference.interval)


def width(interval: tuple[float, float] | None) -> float:
    assert interval is not None
    return interval[1] - interval[0]


@pytest.mark.parametrize("count", range(1, MIN_GROUPS))
def test_few_groups_have_no_interval_and_no_verdict(count: int) -> None:
    after = np.arange(count) + 5.0
    comparison = compare(np.zeros(count), after, alone(count), seed=0)
    assert (comparison.difference.interval, comparison.difference.p, comparison.difference.effect) == (None, None, None)
    assert decide_verdicts({"m": comparison}, {"m": "higher"}) == ({"m": "too few"}, {})


def test_from_six_groups_on_there_are_an_interval_and_a_verdict() -> None:
    comparison = compare(np.zeros(MIN_GROUPS), np.arange(MIN_GROUPS) + 5.0, alone(MIN_GROUPS), seed=0)
    assert comparison.difference.interval is not None
    assert decide_verdicts({"m": comparison}, {"m": "higher"})[0] == {"m": "better"}
    assert decide_verdicts({"m": comparison}, {"m": "lower"})[0] == {"m": "worse"}


def test_the_p_value_is_at_least_that_of_the_t_test_and_agrees_with_the_interval() -> None:
    rng = np.random.default_rng(5)
    for _ in range(60):
        values = rng.normal(0.5, 1.0, size=10)
        result = estimate(values, seed=3)
        assert result.interval is not None
        assert result.p is not None
        assert result.p >= float(ttest_1samp(values, 0.0).pvalue) - 1e-12
        if result.p <= 0.05:
            assert not result.interval[0] <= 0.0 <= result.interval[1]


def test_the_effect_is_the_mean_in_standard_deviations_with_the_correction_of_hedges() -> None:
    values = np.array([1.0, 2.0, 3.0, 4.0, 5.0, 6.0])
    expected = 3.5 / math.sqrt(3.5) * (1 - 3 / 19)
    assert estimate(values, seed=0).effect == pytest.approx(expected)


@pytest.mark.parametrize(("value", "verdict", "p"), [(0.0, "unclear", 1.0), (0.1, "better", 0.0)])
def test_differences_without_variation_are_their_own_interval(value: float, verdict: str, p: float) -> None:
    base = np.random.default_rng(1).normal(0, 10, size=20)
    comparison = compare(base, base + value, alone(20), seed=0)
    assert comparison.difference.interval == pytest.approx((value, value))
    assert comparison.difference.p == p
    assert decide_verdicts({"m": comparison}, {"m": "higher"})[0] == {"m": verdict}


def test_holm_adjusts_for_the_number_of_metrics() -> None:
    adjusted = adjust_holm({"a": 0.01, "b": 0.04, "c": 0.03, "d": 0.9})
    assert adjusted == pytest.approx({"a": 0.04, "c": 0.09, "b": 0.09, "d": 0.9})
    assert adjust_holm({"a": 0.04}) == {"a": 0.04}


def test_a_difference_that_is_clear_alone_may_not_be_among_many() -> None:
    rng = np.random.default_rng(8)
    spread = np.linspace(-1.0, 1.0, 12)
    shown = compare(np.zeros(12), spread + 0.45, alone(12), seed=0)
    assert shown.difference.p is not None
    assert 0.01 < shown.difference.p < 0.05
    noise = {str(k): compare(np.zeros(12), rng.normal(0.0, 1.0, 12), alone(12), seed=k) for k in range(5)}
    assert decide_verdicts({"m": shown}, {"m": "higher"})[0]["m"] == "better"
    better = dict.fromkeys(["m", *noise], "higher")
    assert decide_verdicts({"m": shown, **noise}, better)[0]["m"] == "unclear"  # type: ignore[arg-type]


def test_the_same_seed_gives_the_same_interval_and_another_seed_another() -> None:
    values = np.random.default_rng(2).normal(size=30)
    assert estimate(values, seed=5) == estimate(values, seed=5)
    assert estimate(values, seed=5) != estimate(values, seed=6)


def test_differences_are_taken_in_double_precision() -> None:
    base = np.array([1e8, 2e8], dtype=np.float32)
    comparison = compare(base, np.nextafter(base, np.float32(np.inf)), alone(2), seed=0)
    assert comparison.difference.mean == pytest.approx(12.0)


@pytest.mark.parametrize(
    ("base", "adapter", "groups"),
    [
        ([], [], []),
        ([1.0], [1.0, 2.0], ["a"]),
        ([[1.0]], [[1.0]], ["a"]),
        ([1.0], [2.0], []),
        ([1.0], [math.nan], ["a"]),
    ],
)
def test_values_that_are_not_pairs_of_numbers_are_refused(
    base: list[float], adapter: list[float], groups: list[str]
) -> None:
    with pytest.raises(ValueError, match="values"):
        compare(np.array(base), np.array(adapter), groups, seed=0)
