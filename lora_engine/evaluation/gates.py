"""Checks metrics against gates. Pure functions."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

from lora_engine.errors import SettingsError
from lora_engine.evaluation.spec import Gate


@dataclass(frozen=True)
class GateResult:
    """The result of one gate, with the value that it checked; None if the value is missing or not finite."""

    metric: str
    of: Literal["adapter", "difference"]
    min: float | None
    max: float | None
    value: float | None
    passed: bool

    def as_dict(self) -> dict[str, Any]:
        """Returns the result as stored in `report.json`."""
        return asdict(self)


def check_gates(metrics: Mapping[str, Mapping[str, Any]], gates: Mapping[str, Gate]) -> list[GateResult]:
    """Returns the result of every gate, sorted by metric name. A value that is missing or not finite fails.

    Args:
        metrics: Values by metric name, at least `adapter` and `difference`, as in `report.json`.
        gates: Bounds by metric name.

    Raises:
        SettingsError: A gate names a metric that was not measured.
    """
    if unknown := sorted(set(gates) - set(metrics)):
        raise SettingsError(
            f"{len(unknown)} of {len(gates)} gates name a metric that was not measured, first {unknown[0]!r}",
            allowed=", ".join(sorted(metrics)),
        )
    return [_check(name, metrics[name].get(gates[name].of), gates[name]) for name in sorted(gates)]


def _check(name: str, value: Any, gate: Gate) -> GateResult:
    finite = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    passed = finite and (gate.min is None or value >= gate.min) and (gate.max is None or value <= gate.max)
    return GateResult(name, gate.of, gate.min, gate.max, float(value) if finite else None, bool(passed))
