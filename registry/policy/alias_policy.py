"""Who may have an alias: pure functions over what is known of a version, all reasons at once. No files, no rows."""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from registry.entities import AdapterVersion, Decision
from registry.policy.consent import ConsentFindings
from registry.policy.license_terms import LicenseTerms, allows_commercial, conflicts


class AliasPolicy(BaseModel):
    """What an alias asks of a version, beyond whole bytes, a sound structure, finite figures and nothing revoked.

    Attributes:
        needs_evaluation: There must be a report, and nothing in it may have failed.
        needs_gate: At least one gate must have been set, so that something was really decided.
        needs_licence: `known`: every licence on the way is known and they can be met together; `commercial`: commercial
            use is allowed as well.
        needs_consent: `known`: nothing that is stated about the pictures has expired or was opted out of; `complete`:
            all that has to be stated is.
        needs_signature: It must be signed, and the signature must fit.
        protected: Neither taken from a version by withdrawing or deleting it, nor removed by others than `movers`.
        movers: Who may move or remove it: names, or patterns such as `*@lab`, of which one must fit the actor.
        overridable: Whether a refusal can be set aside with a reason.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    needs_evaluation: bool = False
    needs_gate: bool = False
    needs_licence: Literal["none", "known", "commercial"] = "none"
    needs_consent: Literal["none", "known", "complete"] = "none"
    needs_signature: bool = False
    protected: bool = False
    movers: tuple[str, ...] = Field(default=("*",), min_length=1)
    overridable: bool = True

    def may_move(self, actor: str) -> bool:
        """Whether the actor is one of those who may move the alias."""
        return any(fnmatch.fnmatchcase(actor, pattern) for pattern in self.movers)


_STAGING = {"needs_evaluation": True, "needs_licence": "known"}
_PRODUCTION = _STAGING | {"needs_gate": True, "needs_consent": "known", "protected": True}
PRESETS: Mapping[str, Mapping[str, AliasPolicy]] = {
    "default": {
        "staging": AliasPolicy.model_validate(_STAGING),
        "production": AliasPolicy.model_validate(_PRODUCTION),
    },
    "strict": {
        "staging": AliasPolicy.model_validate(_STAGING | {"needs_gate": True, "needs_consent": "known"}),
        "production": AliasPolicy.model_validate(
            _PRODUCTION
            | {
                "needs_licence": "commercial",
                "needs_consent": "complete",
                "needs_signature": True,
                "overridable": False,
            }
        ),
    },
}
"""The policies that are there to choose from; an alias that one does not name asks for nothing more than all do."""


@dataclass(frozen=True)
class PolicyFacts:
    """What a decision is made from.

    Args:
        damage: What a verification of its bytes found.
        structure: What a reading of the adapter found: broken, not finite, not fitting.
        terms: Its resolved terms; None where nobody looked, which is a reason where a licence is asked for.
        consent: What is stated about its pictures; None where nobody looked.
        revoked: What it was made from and may not be used any more.
        signature: What a check of its signature found; None where nobody looked.
        actor: Who asks.
    """

    damage: Sequence[str] = ()
    structure: Sequence[str] = ()
    terms: LicenseTerms | None = None
    consent: ConsentFindings | None = None
    revoked: Sequence[str] = ()
    signature: Sequence[str] | None = None
    actor: str = ""


def decide(version: AdapterVersion, policy: AliasPolicy, facts: PolicyFacts) -> Decision:
    """Whether a version may have an alias with that policy, and every reason why not.

    Args:
        version: The version.
        policy: What the alias asks for.
        facts: What was found about the version.
    """
    final = [f"it was {version.state.lower()}"] if version.state != "ACTIVE" else []
    final += [f"its bytes are not whole: {finding}" for finding in facts.damage]
    final += [f"it is not a sound adapter: {finding}" for finding in facts.structure]
    final += [f"metric {name} is {value!r}" for name, value in numbers(version.metrics) if not math.isfinite(value)]
    final += [f"{what} was revoked" for what in facts.revoked]
    if not policy.may_move(facts.actor):
        final.append(f"{facts.actor or 'nobody'} may not move this alias; {', '.join(policy.movers)} may")
    reasons = [
        *_evaluation_reasons(version, policy),
        *_licence_reasons(policy, facts),
        *_consent_reasons(policy, facts),
    ]
    if policy.needs_signature:
        reasons += ["its signature was not checked"] if facts.signature is None else facts.signature
    return Decision(not (final or reasons), (*final, *reasons), tuple(final))


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


def _licence_reasons(policy: AliasPolicy, facts: PolicyFacts) -> Iterator[str]:
    if policy.needs_licence == "none":
        return
    if facts.terms is None:
        yield "its licence was not looked at"
        return
    yield from conflicts(facts.terms)
    if policy.needs_licence == "commercial" and not facts.terms.unknown and not allows_commercial(facts.terms):
        yield f"commercial use is not allowed ({', '.join(sorted(facts.terms.licenses)) or 'no licence'})"


def _consent_reasons(policy: AliasPolicy, facts: PolicyFacts) -> Iterator[str]:
    if policy.needs_consent == "none":
        return
    if facts.consent is None:
        yield "the consent of its pictures was not looked at"
        return
    yield from facts.consent.broken
    if policy.needs_consent == "complete":
        yield from facts.consent.missing


def _evaluation_reasons(version: AdapterVersion, policy: AliasPolicy) -> Iterator[str]:
    if not policy.needs_evaluation:
        return
    if version.passed is None:
        yield "its gates were not run; add an evaluate step and give its report to the register step"
    failed = [reason for gate in version.gates if (reason := _gate_reason(gate))]
    yield from failed
    if version.passed is False and not failed:
        yield "its evaluation did not pass"
    if policy.needs_gate and version.passed is not None and not version.gates:
        yield "no gate was set; add one under `gates` of the evaluate step"


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
