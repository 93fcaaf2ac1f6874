from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from lora_engine.errors import SettingsError
from lora_engine.evaluation.gates import check_gates
from lora_engine.evaluation.metrics import METRICS
from lora_engine.evaluation.spec import EvaluateSettings, Gate


def result(gate: dict[str, Any], **values: Any) -> bool:
    return check_gates({"clip_t": values}, [("clip_t", Gate(**gate))]).passed


@pytest.mark.parametrize(
    ("gate", "difference", "passed"),
    [
        ({"min": 0.1}, 0.1, True),
        ({"min": 0.1}, 0.0999, False),
        ({"max": 0.1}, 0.1, True),
        ({"max": 0.1}, 0.1001, False),
        ({"min": -1, "max": 1}, 0.0, True),
        ({"min": -1, "max": 1}, 2.0, False),
        ({"min": -1}, float("nan"), False),
        ({"max": 1}, float("nan"), False),
        ({"max": 1}, float("-inf"), False),
        ({"min": 0}, None, False),
        ({"min": 0}, True, False),
        ({"min": 0}, "1", False),
    ],
)
def test_a_gate_passes_only_finite_values_within_its_bounds(
    gate: dict[str, Any], difference: Any, passed: bool
) -> None:
    assert result(gate, difference=difference, adapter=0.5) is passed


def test_a_gate_checks_the_value_that_it_names() -> None:
    values = {"adapter": 0.9, "difference": -0.5}
    assert result({"min": 0.5, "of": "adapter"}, **values)
    assert not result({"min": 0.5}, **values)


def test_a_value_that_is_not_finite_is_reported_as_missing() -> None:
    decision = check_gates({"drift": {"difference": float("nan")}}, [("drift", Gate(max=1))])
    assert decision.results[0].as_dict() == {
        "metric": "drift",
        "of": "difference",
        "min": None,
        "max": 1.0,
        "against": "base",
        "on": "value",
        "value": None,
        "passed": False,
        "reason": "gate drift (difference) has the value nan",
    }


def test_a_gate_on_a_missing_metric_is_refused() -> None:
    with pytest.raises(SettingsError, match=r"cannot be measured \('clip_t': unknown metric\)"):
        check_gates({"drift": {"difference": 0.0}}, [("clip_t", Gate(min=0))])


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        ({"gates": {"clip_tt": {"min": 0}}}, "did you mean 'clip_t'"),
        ({"gates": {"clip_t": {}}}, "needs min, max or both"),
        ({"gates": {"clip_t": {"min": 2, "max": 1}}}, "nothing could pass"),
        ({"gates": {"clip_t": {"min": float("nan")}}}, "finite"),
        ({"gates": {"clip_t": {"min": 0, "of": "base"}}}, "adapter"),
        ({"gates": {"clip_t": {"least": 0}}}, "least"),
        ({"seeds": 0}, "seeds"),
        ({"steps": 0}, "steps"),
    ],
)
def test_invalid_settings_are_refused(settings: dict[str, Any], problem: str) -> None:
    with pytest.raises(ValidationError, match=problem):
        EvaluateSettings(**settings)


def test_every_metric_has_a_description() -> None:
    assert len(METRICS) >= 5
    assert all(metric.title and metric.meaning.endswith(".") for metric in METRICS.values())
