"""Who may have an alias: pure functions over what is known of a version, all reasons at once. No files, no rows."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from registry.entities import AdapterVersion, Decision


@dataclass(frozen=True)
class Policy:
    """What an alias asks of a version, beyond whole bytes and finite figures.

    Args:
        needs_evaluation: There must be a report, and nothing in it may have failed.
        needs_gate: At least one gate must have been set, so that something was really decided.
    """

    needs_evaluation: bool = False
    needs_gate: bool = False


POLICIES: Mapping[str, Policy] = {
    "staging": Policy(needs_evaluation=True),
    "production": Policy(needs_evaluation=True, needs_gate=True),
}
"""The aliases that ask for more than the others."""


def decide(version: AdapterVersion, alias: str, *, damage: Sequence[str] = ()) -> Decision:
    """Whether a version may have an alias, and every reason why not.

    Args:
        version: The version, with its metrics and gates.
        alias: The alias that it shall have.
        damage: What a verification of its bytes found; empty where they are whole.
    """
    reasons = [f"its bytes are not whole: {finding}" for finding in damage]
    reasons += [f"metric {name} is {value!r}" for name, value in numbers(version.metrics) if not math.isfinite(value)]
    policy = POLICIES.get(alias, Policy())
    if policy.needs_evaluation:
        reasons += _evaluation_reasons(version)
        if policy.needs_gate and version.passed is not None and not version.gates:
            reasons.append("no gate was set; add one under `gates` of the evaluate step")
    return Decision(not reasons, tuple(reasons))


def numbers(value: Any, path: str = "") -> Iterator[tuple[str, float]]:
    """Every number in nested metrics, with its path in dots; truth values are not numbers."""
    if isinstance(value, Mapping):
        for key, entry in value.items():
            yield from numbers(entry, f"{path}.{key}" if path else str(key))
    elif isinstance(value, (list, tuple)):
        for position, entry in enumerate(value):
            yield from numbers(entry, f"{path}.{position}")
    elif isinstance(value, (int, float)) and not isinstance(value, bool):
        yield path, float(value)


def _evaluation_reasons(version: AdapterVersion) -> Iterator[str]:
    if version.passed is None:
        yield "its gates were not run; add an evaluate step and give its report to the register step"
    failed = [reason for gate in version.gates if (reason := _gate_reason(gate))]
    yield from failed
    if version.passed is False and not failed:
        yield "its evaluation did not pass"


def _gate_reason(gate: Mapping[str, Any]) -> str:
    """Why a gate is not passed, judged by its value and limits and not only by what it says of itself."""
    name = f"gate {gate.get('metric', '?')}" + (f" ({gate['of']})" if gate.get("of") else "")
    value, least, most = gate.get("value"), gate.get("min"), gate.get("max")
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not math.isfinite(value):
        return f"{name} has the value {value!r}"
    if least is not None and value < least:
        return f"{name} is {value:g}, below its minimum {least:g}"
    if most is not None and value > most:
        return f"{name} is {value:g}, above its maximum {most:g}"
    return "" if gate.get("passed") is True else f"{name} did not pass"
