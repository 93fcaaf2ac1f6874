from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from lora_engine.errors import SettingsError
from lora_engine.evaluation.gate_file import combine_gates, read_gates
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


INTERVAL = {"difference": 0.2, "interval": [0.05, 0.35], "adapter": 0.7, "adapter_interval": [0.6, 0.8], "n": 8}


@pytest.mark.parametrize(
    ("gate", "passed", "reason"),
    [
        ({"min": 0.0, "on": "lower"}, True, ""),
        ({"min": 0.1, "on": "lower"}, False, "gate clip_t (difference, lower bound) is 0.05, below its minimum 0.1"),
        ({"max": 0.3, "on": "upper"}, False, "gate clip_t (difference, upper bound) is 0.35, above its maximum 0.3"),
        ({"min": 0.6, "of": "adapter", "on": "lower"}, True, ""),
        ({"min": 0.65, "of": "adapter", "on": "lower"}, False, "gate clip_t (adapter, lower bound) is 0.6, below"),
    ],
)
def test_a_gate_may_check_a_bound_of_the_interval(gate: dict[str, Any], passed: bool, reason: str) -> None:
    decision = check_gates({"clip_t": INTERVAL}, [("clip_t", Gate(**gate))])
    assert decision.passed is passed
    assert "".join(decision.reasons).startswith(reason)


@pytest.mark.parametrize("of", ["difference", "adapter"])
def test_a_gate_on_an_interval_fails_where_there_are_too_few_groups_for_one(of: str) -> None:
    values = {"difference": 9.0, "adapter": 9.0, "interval": None, "n": 5}
    decision = check_gates({"clip_t": values}, [("clip_t", Gate(min=0, of=of, on="lower"))])  # type: ignore[arg-type]
    assert not decision.passed
    assert decision.reasons[0].endswith("there is no interval for n = 5, at least 6 independent groups are needed")
    assert check_gates({"clip_t": values}, [("clip_t", Gate(min=0, of=of))]).passed  # type: ignore[arg-type]


def test_a_gate_compares_with_the_version_that_it_names() -> None:
    production = {"production": {"clip_t": {"difference": -0.1}}}
    gates = [("clip_t", Gate(min=0, against="production")), ("clip_t", Gate(min=0))]
    decision = check_gates({"clip_t": {"difference": 0.1}}, gates, comparisons=production)
    assert [result.passed for result in decision.results] == [False, True]
    assert decision.reasons == ["gate clip_t (difference against production) is -0.1, below its minimum 0"]
    with pytest.raises(SettingsError, match="compares with 'zorb@3'"):
        check_gates({"clip_t": {"difference": 0.1}}, [("clip_t", Gate(min=0, against="zorb@3"))])


@pytest.mark.parametrize(("missing", "passed"), [("fail", False), ("skip", True)])
def test_a_gate_against_an_absent_version_fails_or_is_skipped_as_it_declares(missing: Any, passed: bool) -> None:
    gate = Gate(min=0, against="production", missing=missing)
    decision = check_gates({"clip_t": {"difference": 1.0}}, [("clip_t", gate)], absent={"production": "none yet"})
    assert decision.passed is passed
    assert (len(decision.results), len(decision.skipped)) == ((0, 1) if passed else (1, 0)), "never a silent pass"
    assert [*decision.reasons, *decision.skipped] == ["gate clip_t against production: none yet"]


def test_the_default_gates_include_agreement_and_drift_and_refuse_an_adapter_that_ignores_prompts() -> None:
    gates = EvaluateSettings(gates="default").listed_gates()  # type: ignore[arg-type]
    assert {"clip_t", "drift", "clip_i_paired"} <= {name for name, _ in gates}
    measured = {
        "clip_i_paired": {"difference": 0.2},
        "clip_t": {"difference": 0.109 - 0.316},
        "drift": {"adapter": 0.1},
        "validation_loss": {"difference": -0.1},
    }
    assert check_gates(measured, gates).reasons == ["gate clip_t (difference) is -0.207, below its minimum -0.05"]


def test_one_gate_and_a_list_of_gates_are_read_alike_and_gates_of_a_file_are_added(tmp_path: Path) -> None:
    one = EvaluateSettings.model_validate_json('{"gates": {"clip_t": {"min": 0}}}', strict=True)
    several = EvaluateSettings.model_validate_json('{"gates": {"clip_t": [{"min": 0}]}}', strict=True)
    assert one == several
    (tmp_path / "gates.yaml").write_text("gates:\n  clip_t: [{min: 0}, {max: 0.9, of: adapter}]\n  drift: {max: 1}\n")
    combined = combine_gates(one.gates, read_gates(tmp_path / "gates.yaml"))
    assert combined == {"clip_t": (Gate(min=0), Gate(max=0.9, of="adapter")), "drift": (Gate(max=1),)}


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("gates:\n  clip_tt: {min: 0}\n", "did you mean 'clip_t'"),
        ("gates:\n  clip_t: {min: x}\n", r"gates\.yaml:2:"),
        ("others: {}\n", "gates"),
        ("[]\n", "mapping"),
        ("gates: {clip_t: []}\n", "at least 1"),
    ],
)
def test_a_file_of_gates_that_is_not_valid_is_refused(tmp_path: Path, text: str, problem: str) -> None:
    (tmp_path / "gates.yaml").write_text(text)
    with pytest.raises(SettingsError, match=problem):
        read_gates(tmp_path / "gates.yaml")
