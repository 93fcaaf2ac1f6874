"""Sweeps propose the same trials again, prune by the median, and compare quality with cost."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from lora_engine.evaluation.choices import describe_training_choices
from tasks.sweep.page import render_sweep
from tasks.sweep.records import best_trial, describe_winner, pareto_front
from tasks.sweep.search import comparable_curve, find_pruned_step, propose
from tasks.sweep.spec import SweepParameter, SweepSettings, TrialRecord

PARAMETERS: dict[str, Any] = {
    "adapter.rank": {"values": [4, 8, [1, 2]]},
    "adapter.learning_rate": {"low": 1e-4, "high": 1e-2, "log": True},
    "adapter.steps": {"low": 10, "high": 35, "step": 10},
    "adapter.warmup": {"low": 0.1, "high": 0.35, "step": 0.1},
}


def settings(**change: Any) -> SweepSettings:
    values = {"parameters": PARAMETERS, "metric": "report.clip_t", "direction": "maximize", **change}
    return SweepSettings.model_validate(values)


def record(number: int, value: float | None, **facts: Any) -> TrialRecord:
    values = {"adapter.rank": 4, "adapter.learning_rate": 1e-3, "adapter.steps": 10, "adapter.warmup": 0.1}
    return TrialRecord(number=number, values=values, value=value, **{"state": "completed", **facts})


def test_the_same_trials_are_proposed_again() -> None:
    pytest.importorskip("optuna")
    earlier = [record(number, float(number)) for number in range(3)]
    first = propose(settings(), earlier, 4)
    assert propose(settings(), earlier, 4) == first
    assert propose(settings(), earlier, 2) == first[:2]
    assert propose(settings(seed=1), earlier, 4) != first
    assert propose(settings(), earlier[:2], 4) != first
    for values in first:
        assert values["adapter.rank"] in (4, 8, [1, 2])
        assert 1e-4 <= values["adapter.learning_rate"] <= 1e-2
        assert values["adapter.steps"] in (10, 20, 30)
        assert values["adapter.warmup"] in (0.1, 0.2, pytest.approx(0.3))
    # Proposed values are those of an earlier trial later, lists included.
    again = [record(number, 0.1).model_copy(update={"values": values}) for number, values in enumerate(first)]
    assert len(propose(settings(), again, 1)) == 1


@pytest.mark.parametrize("direction", ["maximize", "minimize"])
def test_a_trial_is_pruned_at_the_first_step_above_the_median(direction: str) -> None:
    pytest.importorskip("optuna")
    curves = [((10, 1.0), (20, loss)) for loss in (0.5, 0.6, 0.7, 0.8)]
    earlier = [record(number, 0.1, curve=curve) for number, curve in enumerate(curves)]
    sweep = settings(direction=direction)
    assert find_pruned_step(sweep, earlier, ((10, 1.0), (20, 0.9))) == 20
    assert find_pruned_step(sweep, earlier, ((10, 1.1), (20, 0.1))) == 10
    assert find_pruned_step(sweep, earlier, ((10, 1.0), (20, 0.6))) is None
    assert find_pruned_step(sweep, earlier[:3], ((10, 1.0), (20, 0.9))) is None
    assert find_pruned_step(settings(direction=direction, prune=False), earlier, ((20, 0.9),)) is None


def test_the_front_has_the_trials_that_no_other_one_dominates() -> None:
    trials = [record(number, value, size=size) for number, (size, value) in enumerate([(3, 3), (1, 1), (2, 0), (3, 2)])]
    trials += [record(4, None, state="failed"), record(5, 2.5, size=3)]
    assert [trial.number for trial in pareto_front(settings(), trials, lambda trial: trial.size)] == [1, 0]
    low = settings(direction="minimize")
    assert [trial.number for trial in pareto_front(low, trials, lambda trial: trial.size)] == [1, 2]
    best = best_trial(settings(), trials)
    assert best is trials[0]
    assert best_trial(settings(), trials[4:5]) is None
    assert "chosen among 6 trials (5 completed)" in describe_winner(settings(), trials, best).describe()["why"]


def test_the_report_of_a_winner_says_among_how_many_it_was_chosen() -> None:
    trials = [record(0, 1.0), record(1, 2.0)]
    sweep = describe_winner(settings(), trials, trials[1]).describe()
    ((name, figure, reason),) = describe_training_choices({"sweep": sweep})
    assert (name, figure) == ("sweep", "report.clip_t 2")
    assert "chosen among 2 trials" in reason
    assert list(describe_training_choices({})) == []


def test_the_page_escapes_names_and_reasons() -> None:
    trials = [record(0, 1.0, size=10), record(1, None, state="failed", why="<script>alert(1)</script>")]
    page = render_sweep("a", settings(), trials, trials[0])
    assert "<script" not in page
    assert "&lt;script&gt;" in page


def test_the_curve_is_that_of_the_candidates_or_of_the_validation() -> None:
    validation = {"validation_loss": [[0, 3.0], [1, 2.0]]}
    assert comparable_curve(validation) == ((1, 2.0),)
    assert comparable_curve({**validation, "candidates": {"scores": [[0, 1.0], [2, 0.5]]}}) == ((2, 0.5),)
    assert comparable_curve({}) == ()


@pytest.mark.parametrize(
    ("parameter", "message"),
    [
        ({"values": [1], "low": 1}, "keep one of them"),
        ({"low": 1}, "neither values nor a range"),
        ({"low": 2, "high": 1}, "its range is empty"),
        ({"low": 1, "high": 9, "log": True, "step": 2}, "has no step"),
        ({"low": 1, "high": 9, "step": 0.5}, "set an integer"),
        ({"low": 1, "high": 9, "step": 10}, "longer than the range"),
        ({"low": 1, "high": float("inf")}, "finite"),
    ],
    ids=str,
)
def test_a_parameter_that_cannot_be_searched_is_refused(parameter: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        SweepParameter.model_validate(parameter)
