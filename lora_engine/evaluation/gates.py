"""Checks metrics against gates. Pure functions."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from lora_engine.errors import SettingsError
from lora_engine.evaluation.evidence import BASE, MIN_GROUPS
from lora_engine.evaluation.spec import Gate

_BOUNDS = {"lower": 0, "upper": 1}


@dataclass(frozen=True)
class GateResult:
    """The result of one gate.

    Attributes:
        metric: The metric.
        of: See `Gate`.
        min: See `Gate`.
        max: See `Gate`.
        against: See `Gate`.
        on: See `Gate`.
        value: The checked number; None if there is none.
        passed: True if it is within the bounds.
        reason: Why it did not pass; empty if it did.
    """

    metric: str
    of: Literal["adapter", "difference"]
    min: float | None
    max: float | None
    against: str
    on: Literal["value", "lower", "upper"]
    value: float | None
    passed: bool
    reason: str

    def as_dict(self) -> dict[str, Any]:
        """Returns the result as stored in `report.json`."""
        return asdict(self)


@dataclass(frozen=True)
class GateDecision:
    """The results of all gates.

    Attributes:
        results: The checked gates.
        skipped: Reasons of the gates that are not applicable, as they declare.
    """

    results: tuple[GateResult, ...]
    skipped: tuple[str, ...] = ()

    @property
    def passed(self) -> bool:
        """Returns True if no gate failed."""
        return all(result.passed for result in self.results)

    @property
    def reasons(self) -> list[str]:
        """Returns why gates did not pass."""
        return [result.reason for result in self.results if not result.passed]


def check_measurable(gates: Sequence[tuple[str, Gate]], measured: Collection[str], unmet: Mapping[str, str]) -> None:
    """Raises if a gate names a metric that will not be measured; call it before anything is drawn.

    Args:
        gates: (metric, gate) of all gates.
        measured: The metrics that will be measured.
        unmet: Other metrics -> why they will not.

    Raises:
        SettingsError: A gate names such a metric; has all of them.
    """
    missing = sorted({name for name, _ in gates} - set(measured))
    if missing:
        reasons = "; ".join(f"{name!r}: {unmet.get(name, 'unknown metric')}" for name in missing)
        raise SettingsError(
            f"{len(missing)} of {len(gates)} gates name a metric that cannot be measured ({reasons})",
            allowed=", ".join(sorted(measured)),
            remedy="remove these gates, or provide what their metrics need",
        )


def check_compared_versions(gates: Sequence[tuple[str, Gate]], compared: Collection[str]) -> None:
    """Raises if a gate names a version that will not be compared with; call it before anything is drawn.

    Args:
        gates: (metric, gate) of all gates.
        compared: Roles of the other versions, of absent ones too.

    Raises:
        SettingsError: A gate names another version.
    """
    for name, gate in gates:
        if gate.against not in {BASE, *compared}:
            raise SettingsError(
                f"the gate {name!r} compares with {gate.against!r}, which is not among the compared versions",
                allowed=", ".join([BASE, *sorted(compared)]),
                remedy=f"add it: against: [{gate.against}]",
            )


def check_gates(
    metrics: Mapping[str, Mapping[str, Any]],
    gates: Sequence[tuple[str, Gate]],
    *,
    comparisons: Mapping[str, Mapping[str, Mapping[str, Any]]] | None = None,
    absent: Mapping[str, str] | None = None,
) -> GateDecision:
    """Checks every gate; a number that is missing or not finite fails.

    Args:
        metrics: Values by metric, as in `report.json`: against the base.
        gates: (metric, gate) of all gates.
        comparisons: Role -> metric -> values against that version.
        absent: Role -> why there is no such version.

    Raises:
        SettingsError: A gate names a metric that was not measured, or a version that was not compared with.
    """
    compared, missing = {BASE: metrics, **(comparisons or {})}, absent or {}
    check_measurable(gates, metrics.keys(), {})
    check_compared_versions(gates, [*compared, *missing])
    results: list[GateResult] = []
    skipped: list[str] = []
    for name, gate in gates:
        if gate.against in missing:
            reason = f"gate {name} against {gate.against}: {missing[gate.against]}"
            if gate.missing == "skip":
                skipped.append(reason)
            else:
                results.append(_result(name, gate, None, reason))
        else:
            results.append(_check(name, gate, compared[gate.against][name]))
    return GateDecision(tuple(results), tuple(skipped))


def _check(name: str, gate: Gate, values: Mapping[str, Any]) -> GateResult:
    label = f"gate {name} ({gate.of}{'' if gate.against == BASE else f' against {gate.against}'}"
    label += ")" if gate.on == "value" else f", {gate.on} bound)"
    if gate.on == "value":
        number = values.get(gate.of)
    else:
        interval = values.get("interval" if gate.of == "difference" else "adapter_interval")
        if interval is None:
            few = f"there is no interval for n = {values.get('n')}"
            return _result(name, gate, None, f"{label}: {few}, at least {MIN_GROUPS} independent groups are needed")
        number = interval[_BOUNDS[gate.on]]
    if not isinstance(number, int | float) or isinstance(number, bool) or not math.isfinite(number):
        return _result(name, gate, None, f"{label} has the value {number!r}")
    value = float(number)
    if gate.min is not None and value < gate.min:
        return _result(name, gate, value, f"{label} is {value:g}, below its minimum {gate.min:g}")
    if gate.max is not None and value > gate.max:
        return _result(name, gate, value, f"{label} is {value:g}, above its maximum {gate.max:g}")
    return _result(name, gate, value, "")


def _result(name: str, gate: Gate, value: float | None, reason: str) -> GateResult:
    return GateResult(name, gate.of, gate.min, gate.max, gate.against, gate.on, value, not reason, reason)
