"""Defines the result of a run, and what a flow run shows of it: a state with a message, and a table."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from flows.registered import RegistrationState
from registry.entities import AdapterVersion
from registry.home import Home
from registry.store.redaction import redact
from tasks.errors import NotStarted
from tasks.job import Outcome
from tasks.operations.report import write_report

_IMAGES = 4
"""Sample images of a version that its row links to."""
_VERSION_COLUMNS = ("version", "alias", "gates", "refused", "metrics", "report", "images")


@dataclass(frozen=True)
class PipelineResult:
    """The result of a run.

    Attributes:
        outcomes: Step name -> its artifact and whether it was cached.
        changed: Name of each step that ran -> why; empty if every step was cached.
        versions: Name of each `register` step -> current state of its version.
        skipped: Name of each step that was skipped -> why.
    """

    outcomes: Mapping[str, Outcome]
    changed: Mapping[str, str]
    versions: Mapping[str, RegistrationState]
    skipped: Mapping[str, str] = field(default_factory=dict)

    @property
    def new_versions(self) -> list[RegistrationState]:
        """Returns the versions of the `register` steps that ran."""
        return [registered for name, registered in self.versions.items() if name in self.changed]

    @property
    def refusals(self) -> dict[str, tuple[str, ...]]:
        """Returns, by `register` step, all reasons why its version was refused the requested alias."""
        return {name: registered.refused for name, registered in self.versions.items() if registered.refused}


@dataclass(frozen=True)
class FinalState:
    """The state in which a flow run ends.

    Attributes:
        name: The state's name, on which automations match; docs/scheduling.md lists all.
        message: The versions and reasons.
        failed: True if a new version failed its gates or was refused its alias.
    """

    name: str
    message: str
    failed: bool = False


def final_state(result: PipelineResult) -> FinalState:
    """Returns the state of a finished run."""
    new = result.new_versions
    missed = [registered for registered in new if not registered.has_alias]
    message = "; ".join(map(_describe, new))
    if not result.changed:
        refused = [_describe(registered) for registered in result.versions.values() if registered.refused]
        return FinalState("NothingChanged", "; ".join(["every step is cached", *refused]))
    if any(registered.version.gate_status == "FAILED" for registered in missed):
        return FinalState("GatesFailed", message, failed=True)
    if any(registered.refused for registered in missed):
        return FinalState("Refused", message, failed=True)
    if len(missed) < len(new):
        return FinalState("Staged", message)
    if new:
        return FinalState("Registered", message)
    return FinalState("Completed", f"ran {', '.join(result.changed)}")


def tabulate(result: PipelineResult, home: Home) -> list[dict[str, str]]:
    """Returns a row per step: cached or why it ran, its version, gates, refusals, metrics, report and images."""
    return [
        _row(name, "cached" if outcome.cached else "ran", result.changed.get(name, ""))
        | _describe_version(home, result.versions.get(name), is_new=name in result.changed)
        for name, outcome in result.outcomes.items()
    ] + [_row(name, "skipped", reason) for name, reason in result.skipped.items()]


def tabulate_failure(
    reasons: Mapping[str, str],
    outcomes: Mapping[str, Any],
    errors: Mapping[str, BaseException],
    skipped: Mapping[str, str] | None = None,
) -> list[dict[str, str]]:
    """Returns a row per step of a run in which a step failed: what it did, and why.

    Args:
        reasons: Step name -> why it is to run, in the order of the plan.
        outcomes: Results of the steps that are cached or ran; a result that is no `Outcome` has the reason of a skip.
        errors: Step name -> why it failed or did not start; without secrets in the rows.
        skipped: Step name -> why the plan skipped it.
    """
    rows = []
    for name, reason in reasons.items():
        error, outcome = errors.get(name), outcomes.get(name)
        if error is not None:
            action = "not started" if isinstance(error, NotStarted) else "failed"
            rows.append(_row(name, action, redact(str(error))))
        elif name in (skipped or {}) or not isinstance(outcome, Outcome | None):
            rows.append(_row(name, "skipped", reason if outcome is None else outcome.reason))
        else:
            is_cached = outcome is None or outcome.cached
            rows.append(_row(name, "cached" if is_cached else "ran", "" if is_cached else reason))
    return rows


def _row(step: str, action: str, reason: str) -> dict[str, str]:
    return {"step": step, "action": action, "reason": reason, **dict.fromkeys(_VERSION_COLUMNS, "")}


def _describe_version(home: Home, registered: RegistrationState | None, *, is_new: bool) -> dict[str, str]:
    if registered is None:
        return {}
    version = registered.version
    metrics = (
        f"{name} {_number(new)} (production: {_number(old)})"
        for name, (old, new) in sorted(registered.compared.items())
    )
    # Writing the report of an unchanged version again would only repeat work.
    report = write_report(home, version.ref) if is_new and version.state == "ACTIVE" else None
    images = sorted(report.with_suffix("").glob("*.png"))[:_IMAGES] if report else []
    return {
        "version": version.ref,
        "alias": registered.alias if registered.alias and registered.has_alias else "",
        "gates": version.gate_status,
        "refused": "; ".join(registered.refused),
        "metrics": "; ".join(metrics),
        "report": report.as_uri() if report else "",
        "images": " ".join(image.as_uri() for image in images),
    }


def _describe(registered: RegistrationState) -> str:
    """Returns the version with its alias, or with the reasons why it has none."""
    ref, alias = registered.version.ref, registered.alias
    if registered.has_alias:
        return ref if alias == "staging" else f"{ref} as {alias}"
    reasons = _failed_gates(registered.version) or list(registered.refused)
    if not reasons:
        return ref
    refusal = " not staged" if alias == "staging" else f" not {alias}" if alias else ""
    return f"{ref}{refusal}: {', '.join(reasons)}"


def _failed_gates(version: AdapterVersion) -> list[str]:
    return [_compare(gate) for gate in version.gates if not gate["passed"]]


def _compare(gate: Mapping[str, Any]) -> str:
    metric, value, least, most = gate["metric"], gate["value"], gate["min"], gate["max"]
    if value is None:
        return str(gate.get("reason") or f"{metric} has no value")
    if gate.get("against", "base") != "base":
        metric = f"{metric} against {gate['against']}"
    if least is not None and value < least:
        return f"{metric} {value:g} < {least:g}"
    return f"{metric} {value:g} > {most:g}"


def _number(value: float | None) -> str:
    return "none" if value is None else f"{value:g}"
