"""Reads the current state of the versions that a pipeline registered; never cached."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from flows.plan import Plan
from registry.entities import AdapterVersion
from registry.errors import GoneVersion, UnknownVersion
from registry.home import Home
from registry.policy.evaluate import evaluate_policy
from registry.versions.versions import Versions
from tasks.job import Outcome
from tasks.operations.promote import compare_metrics
from tasks.steps.register import Register


@dataclass(frozen=True)
class RegistrationState:
    """Current state of the version of one `register` step.

    Attributes:
        version: The version.
        alias: The alias that the step requests; None requests none.
        holder: Number of the version that the alias points at; None if it points at none.
        refused: All reasons why the version may not have the alias; empty if it has it or may have it.
        gone: Who withdrew or deleted the version, when and why; empty for an active version.
        compared: Metric -> its value in production (None without one) and in this version.
    """

    version: AdapterVersion
    alias: str | None
    holder: int | None
    refused: tuple[str, ...]
    gone: str
    compared: Mapping[str, tuple[float | None, float | None]] = field(default_factory=dict)

    @property
    def has_alias(self) -> bool:
        """Returns True if the requested alias points at this version."""
        return self.alias is not None and self.holder == self.version.version

    def to_json(self) -> dict[str, Any]:
        """Returns a JSON object."""
        return {
            "name": self.version.name,
            "version": self.version.version,
            "sha256": self.version.sha256,
            "state": self.version.state,
            "gates": self.version.gate_status,
            "alias": self.alias,
            "alias_version": self.holder,
            "refused": list(self.refused),
        }


def read_registered(plan: Plan, outcomes: Mapping[str, Outcome], home: Home) -> dict[str, RegistrationState]:
    """Reads the current state of the version of each `register` step, by the step's name.

    Restores what others changed in MLflow, also if every step was cached.
    """
    steps = [step for step in plan.steps if step.name in outcomes]  # the others are skipped
    specs = {step.name: step.job.spec for step in steps if isinstance(step.job.spec, Register)}
    if not specs:
        return {}
    versions = Versions(home)
    try:
        versions.try_sync()
        return {name: _read(versions, json.loads(outcomes[name].summary), spec.alias) for name, spec in specs.items()}
    finally:
        versions.close()


def _read(versions: Versions, recorded: Mapping[str, Any], alias: str | None) -> RegistrationState:
    version = versions.show(recorded["name"], recorded["version"])
    holder = _holder(versions, version.name, alias) if alias else None
    compared = compare_metrics(versions, version, "production")
    try:
        versions.require_active(version)
    except GoneVersion as error:
        return RegistrationState(version, alias, holder, (), error.problem, compared)
    has_alias = alias is None or holder == version.version
    refused = () if has_alias else evaluate_policy(versions, version, str(alias)).reasons
    return RegistrationState(version, alias, holder, refused, "", compared)


def _holder(versions: Versions, name: str, alias: str) -> int | None:
    try:
        return versions.show(name, alias).version
    except UnknownVersion:
        return None
