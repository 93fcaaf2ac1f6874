"""Defines the text of `when`: a condition on the report of an `evaluate` step.

`STEP.gates passed`, `STEP.gates failed`, or a metric with an inclusive bound as in a gate: `STEP.METRIC >= NUMBER`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lora_engine.documents import parse_json
from lora_engine.errors import DataError
from registry.entities import ArtifactRef
from registry.store.artifacts import Store

_LONGEST = 256
_TEXT = re.compile(
    r"(?P<step>[A-Za-z0-9][A-Za-z0-9_-]*)\.(?:gates (?P<state>passed|failed)"
    r"|(?P<metric>[a-z][a-z0-9_]*)(?:\.(?P<of>adapter|difference))? (?P<operator>>=|<=) (?P<bound>-?\d+(?:\.\d+)?))"
)
ALLOWED = "'STEP.gates passed', 'STEP.gates failed', or 'STEP.METRIC >= NUMBER' with >= or <="


@dataclass(frozen=True)
class ReportCondition:
    """A condition on a report.

    Attributes:
        text: The condition as written.
        step: Name of the step that makes the report.
        state: `passed` or `failed`, of all gates; empty for a bound on a metric.
        metric: The metric; empty for gates.
        of: The compared value of the metric: the adapter's own, or adapter minus base.
        operator: `>=` or `<=`; empty for gates.
        bound: The bound, itself within it; 0 for gates.
    """

    text: str
    step: str
    state: str = ""
    metric: str = ""
    of: str = "adapter"
    operator: str = ""
    bound: float = 0.0


def parse_condition(text: str) -> ReportCondition:
    """Returns the condition that a text declares.

    Raises:
        ValueError: The text is no condition, or names an unknown metric.
    """
    match = _TEXT.fullmatch(text) if len(text) <= _LONGEST else None
    if match is None:
        raise ValueError(f"{text!r} is no condition; allowed: {ALLOWED}")
    if match["state"]:
        return ReportCondition(text, match["step"], match["state"])
    metric = match["metric"]
    _require_metric(metric)
    return ReportCondition(
        text, match["step"], "", metric, match["of"] or "adapter", match["operator"], float(match["bound"])
    )


def read_condition_report(store: Store, report: ArtifactRef) -> dict[str, Any]:
    """Returns the content of `report.json` of a report.

    Raises:
        DataError: It is no JSON object.
    """
    content: dict[str, Any] = parse_json(store.read(report, "report.json").decode(), report.sha256[:12], DataError)
    return content


def explain_unmet(condition: ReportCondition, report: Mapping[str, Any]) -> str:
    """Returns why a report does not meet a condition; empty if it does.

    Args:
        condition: The condition.
        report: Content of `report.json`.

    Raises:
        SettingsError: The report did not measure the metric.
    """
    if condition.state:
        return _explain_gates(condition, report.get("gates", []))
    from lora_engine.evaluation.gates import check_gates
    from lora_engine.evaluation.spec import Gate

    side = {"min" if condition.operator == ">=" else "max": condition.bound}
    gate = Gate.model_validate({"of": condition.of, **side})
    (result,) = check_gates(report.get("metrics", {}), [(condition.metric, gate)]).results
    return "" if result.passed else result.reason


def _explain_gates(condition: ReportCondition, gates: list[Mapping[str, Any]]) -> str:
    failed = [str(gate["metric"]) for gate in gates if not gate["passed"]]
    if not gates:
        return f"{condition.step} has no gates"
    if condition.state == "failed":
        return "" if failed else f"all gates of {condition.step} passed"
    return f"gates of {condition.step} failed: {', '.join(failed)}" if failed else ""


def _require_metric(name: str) -> None:
    from lora_engine.errors import did_you_mean
    from lora_engine.evaluation.metrics import METRICS

    if name not in METRICS:
        hint = did_you_mean(name, METRICS) or f"allowed: {', '.join(METRICS)}"
        raise ValueError(f"unknown metric {name!r}; {hint}")
