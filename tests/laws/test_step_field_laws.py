"""Laws of the fields that every step has: each step accepts them, and none of them changes its cache key."""

from __future__ import annotations

import pytest
from pydantic import ValidationError

from tasks.condition import ReportCondition, explain_unmet, parse_condition
from tasks.step import STEPS
from tests.tasks.test_keys import STEP_CASES, job_of

FIELDS = {
    "timeout": 5.0,
    "when": "report.gates passed",
    "retries": {"count": 3, "delay": 0.5, "any": True},
    "resources": {"device": "cpu", "memory": 1.5, "exclusive": True},
}


@pytest.mark.parametrize("field", FIELDS)
@pytest.mark.parametrize("name", STEP_CASES)
def test_every_step_has_the_field_and_its_key_does_not_depend_on_it(name: str, field: str) -> None:
    plain, inputs = job_of({"uses": name, **STEP_CASES[name]})
    job, _ = job_of({"uses": name, **STEP_CASES[name], field: FIELDS[field]})
    assert getattr(job.spec, field) is not None
    assert job.key(inputs) == plain.key(inputs)
    assert job.recorded_settings == plain.recorded_settings


def test_a_condition_is_the_only_reference_that_is_no_input() -> None:
    spec = STEPS["register"].spec.model_validate({"uses": "register", **STEP_CASES["register"], "when": FIELDS["when"]})
    assert [*spec.conditions()] == [("when", "report", "report")]
    assert "when" not in {field for field, _, _ in spec.references()}


@pytest.mark.parametrize(
    ("name", "fields", "message"),
    [
        ("train", {"running": {"device": "cpu"}, "resources": {"device": "cuda:1"}}, "step's own device is 'cpu'"),
        ("train", {"running": {"processes": 2}, "resources": {"device": "cuda:1"}}, "without a number"),
        ("convert", {"resources": {"device": "gpu"}}, "pattern"),
        ("convert", {"resources": {"memory": 0}}, "greater than 0"),
        ("convert", {"retries": 101}, "less than or equal to 100"),
        ("convert", {"retries": {"delay": 1e9}}, "less than or equal to 86400"),
        ("convert", {"when": "report.clip_t > 0.2"}, "with >= or <="),
    ],
)
def test_settings_that_contradict_each_other_or_have_no_bound_are_refused(
    name: str, fields: dict, message: str
) -> None:
    with pytest.raises(ValidationError, match=message):
        STEPS[name].spec.model_validate({"uses": name, **STEP_CASES[name], **fields})


def report_with(*passed: bool) -> dict:
    metrics = {"clip_t": {"adapter": 0.25, "difference": -0.5, "base": 0.75}}
    return {"gates": [{"metric": "clip_t", "passed": value} for value in passed], "metrics": metrics}


@pytest.mark.parametrize(
    ("text", "report", "reason"),
    [
        ("report.gates passed", report_with(True, True), ""),
        ("report.gates passed", report_with(True, False), "gates of report failed: clip_t"),
        ("report.gates passed", report_with(), "report has no gates"),
        ("report.gates failed", report_with(True), "all gates of report passed"),
        ("report.gates failed", report_with(False), ""),
        ("report.gates failed", report_with(), "report has no gates"),
        ("report.clip_t >= 0.25", report_with(), ""),
        ("report.clip_t <= 0.25", report_with(), ""),
        ("report.clip_t >= 0.26", report_with(), "0.25"),
        ("report.clip_t.difference >= 0", report_with(), "-0.5"),
        ("report.clip_t.difference <= -0.5", report_with(), ""),
    ],
)
def test_a_condition_is_met_by_the_gates_or_by_a_value_within_its_bound(text: str, report: dict, reason: str) -> None:
    condition = parse_condition(text)
    assert isinstance(condition, ReportCondition)
    unmet = explain_unmet(condition, report)
    assert reason in unmet
    assert bool(unmet) == bool(reason)
