"""Decides whether a version may have an alias, with all reasons at once. Pure: reads no files and no rows."""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from registry.entities import AdapterVersion, Decision
from registry.policy.consent import ConsentFindings, ConsentPolicy
from registry.policy.license_terms import LicenseTerms, allows_commercial, conflicts

Pattern = Annotated[str, Field(max_length=1_000)]


class VotesPolicy(BaseModel):
    """Blind votes that a version needs before it gets an alias. See `registry.policy.votes`.

    Attributes:
        against: The alias whose version it is compared with, or `base` for no adapter.
        win_rate: Bound that the lower end of the win rate's interval must exceed, 0 to 1; ties count half.
        at_least: Number of votes that count.
        voters: Number of users whose votes count.
        by_others: Votes of the user who registered the version do not count.
        missing: Result if nothing has the alias `against`: `fail`, or `skip` for a first release.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    against: Pattern = "production"
    win_rate: float = Field(default=0.5, ge=0.0, lt=1.0)
    at_least: int = Field(default=30, ge=1, le=100_000)
    voters: int = Field(default=1, ge=1, le=100)
    by_others: bool = False
    missing: Literal["fail", "skip"] = "fail"


class AliasPolicy(BaseModel):
    """Requirements of an alias, beyond intact bytes, a valid structure, finite metrics and nothing revoked.

    Attributes:
        needs_evaluation: Requires a report in which nothing failed.
        needs_gate: Requires at least one gate.
        needs_licence: `known`: every upstream license is known and all can be met together; `commercial`: commercial
            use is also allowed.
        needs_consent: `known`: no consent has expired and no owner opted out; `complete`: every required statement
            about the images exists.
        allows_generated: False refuses versions with images that their metadata or owners call generated.
        needs_signature: Requires a valid signature.
        protected: The alias survives withdrawal and deletion of its version, and only `movers` may remove it.
        movers: Users who may move or remove the alias: names or patterns such as `*@lab`; one must match the actor.
        overridable: A refusal can be overridden with a reason.
        needs_approvals: Number of different users who must approve a version, 0 to 5: by `loraline endorse`, or by
            promoting it. Cannot be overridden. A rollback needs none.
        by_others: The user who registered the version does not count.
        votes: Blind votes that the version must have won; None needs none. A rollback needs none.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    needs_evaluation: bool = False
    needs_gate: bool = False
    needs_licence: Literal["none", "known", "commercial"] = "none"
    needs_consent: Literal["none", "known", "complete"] = "none"
    allows_generated: bool = True
    needs_signature: bool = False
    protected: bool = False
    movers: tuple[Pattern, ...] = Field(default=("*",), min_length=1)
    overridable: bool = True
    needs_approvals: int = Field(default=0, ge=0, le=5)
    by_others: bool = False
    votes: VotesPolicy | None = None

    def may_move(self, actor: str) -> bool:
        """Returns True if the actor may move the alias."""
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
"""Preset name -> policies by alias; an alias without a policy has only the requirements that all aliases have."""


@dataclass(frozen=True)
class PolicyFacts:
    """Inputs of a decision about one version.

    Args:
        damage: Findings of the byte verification.
        structure: Findings of the adapter validation: broken, not finite, not matching its base.
        terms: Resolved license terms; None means unchecked, which fails a policy that needs a license.
        consent: Statements about the images; None means unchecked.
        consent_policy: What the home and the ingest steps say of broken and missing statements, for every alias.
        revoked: Revoked upstream subjects.
        signature: Findings of the signature check; None means unchecked.
        actor: User who requests the alias; None if nobody moves it.
        denied: Why roles and identity keep the user from moving the alias.
        unapproved: Approvals that are missing.
        unvoted: Why its votes do not suffice.
    """

    damage: Sequence[str] = ()
    structure: Sequence[str] = ()
    terms: LicenseTerms | None = None
    consent: ConsentFindings | None = None
    consent_policy: ConsentPolicy = "off"
    revoked: Sequence[str] = ()
    signature: Sequence[str] | None = None
    actor: str | None = ""
    denied: Sequence[str] = ()
    unapproved: Sequence[str] = ()
    unvoted: Sequence[str] = ()


def decide(version: AdapterVersion, policy: AliasPolicy, facts: PolicyFacts) -> Decision:
    """Decides whether a version may have an alias with that policy, and returns every reason against it.

    Args:
        version: The version.
        policy: Requirements of the alias.
        facts: Findings about the version.
    """
    final = [f"it was {version.state.lower()}"] if version.state != "ACTIVE" else []
    final += [f"its bytes are damaged: {finding}" for finding in facts.damage]
    final += [f"it is not a valid adapter: {finding}" for finding in facts.structure]
    final += [f"metric {name} is {value!r}" for name, value in numbers(version.metrics) if not math.isfinite(value)]
    final += [f"{subject} was revoked" for subject in facts.revoked]
    if facts.actor is not None and not policy.may_move(facts.actor):
        final.append(f"{facts.actor or 'an unknown user'} may not move this alias; {', '.join(policy.movers)} may")
    final += [*facts.denied, *facts.unapproved]
    reasons = [
        *_evaluation_reasons(version, policy),
        *_license_reasons(policy, facts),
        *_consent_reasons(policy, facts),
        *facts.unvoted,
    ]
    if policy.needs_signature:
        reasons += ["its signature was not checked"] if facts.signature is None else facts.signature
    warnings = facts.consent.warnings if facts.consent is not None and facts.consent_policy != "off" else ()
    return Decision(
        not (final or reasons),
        (*final, *reasons),
        tuple(final),
        tuple(warning for warning in warnings if warning not in reasons),
    )


def numbers(value: Any, path: str = "") -> Iterator[tuple[str, float]]:
    """Yields every number in nested metrics with its dotted path; skips booleans."""
    if isinstance(value, Mapping):
        for key, entry in value.items():
            yield from numbers(entry, f"{path}.{key}" if path else str(key))
    elif isinstance(value, (list, tuple)):
        for position, entry in enumerate(value):
            yield from numbers(entry, f"{path}.{position}")
    elif isinstance(value, (int, float)) and not isinstance(value, bool):
        yield path, float(value)


def _license_reasons(policy: AliasPolicy, facts: PolicyFacts) -> Iterator[str]:
    if policy.needs_licence == "none":
        return
    if facts.terms is None:
        yield "its license was not checked"
        return
    yield from conflicts(facts.terms)
    if policy.needs_licence == "commercial" and not facts.terms.unknown and not allows_commercial(facts.terms):
        yield f"commercial use is not allowed ({', '.join(sorted(facts.terms.licenses)) or 'no license'})"


def _consent_reasons(policy: AliasPolicy, facts: PolicyFacts) -> Iterator[str]:
    is_strict = facts.consent_policy == "strict"
    if not policy.allows_generated and (facts.consent is None or facts.consent.generated):
        count = facts.consent.generated if facts.consent is not None else "an unknown number of"
        yield f"{count} images are generated, as their metadata or owners say"
    if policy.needs_consent == "none" and not is_strict:
        return
    if facts.consent is None:
        yield "the consent for its images was not checked"
        return
    yield from facts.consent.broken
    if policy.needs_consent == "complete" or is_strict:
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
    """Returns why a gate did not pass, by its value and limits as well as its recorded result; empty if it passed."""
    recorded = gate.get("reason")
    if isinstance(recorded, str) and recorded:
        return recorded
    name = f"gate {gate.get('metric', '?')}" + (f" ({gate['of']})" if gate.get("of") else "")
    value, least, most = gate.get("value"), gate.get("min"), gate.get("max")
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not math.isfinite(value):
        return f"{name} has the value {value!r}"
    if least is not None and value < least:
        return f"{name} is {value:g}, below its minimum {least:g}"
    if most is not None and value > most:
        return f"{name} is {value:g}, above its maximum {most:g}"
    return "" if gate.get("passed") is True else f"{name} did not pass"
