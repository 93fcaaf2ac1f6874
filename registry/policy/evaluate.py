"""Evaluates an alias policy for one version: gathers terms, consent, revocations and signature, then decides."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from datetime import date
from typing import Any

from sqlalchemy.orm import Session

from registry.context import RegistryContext
from registry.documents.signing import signature_findings
from registry.entities import AdapterVersion, Decision
from registry.identity import current_user
from registry.policy.alias_policy import PolicyFacts, decide
from registry.policy.policy_file import read_policies
from registry.policy.rights import resolve_rights, revoked_upstream


def evaluate_policy(
    context: RegistryContext,
    version: AdapterVersion,
    alias: str,
    *,
    actor: str | None = None,
    damage: Sequence[str] = (),
    structure: Sequence[str] = (),
    today: date | None = None,
    session: Session | None = None,
) -> Decision:
    """Decides whether a version may have an alias under the home's policy.

    Args:
        context: The registry.
        version: The version.
        alias: The alias.
        actor: User who requests the alias; None means the current user.
        damage: Findings of the byte verification.
        structure: Findings of the adapter validation.
        today: Date to compare consents with; None means the current UTC date.
        session: Session of an open transaction to read in; None opens a new one.

    Raises:
        PolicyError: The home's policy or table of licenses cannot be used.
    """
    policy, actor = read_policies(context.home.path).of(alias), actor or current_user()
    with nullcontext(session) if session is not None else context.lineage.database.read() as current:
        facts: dict[str, Any] = {"actor": actor, "damage": damage, "structure": structure}
        if policy.needs_licence == "none" and policy.needs_consent == "none":
            facts["revoked"] = revoked_upstream(current, version)
        else:
            rights = resolve_rights(current, context, version, today=today)
            facts |= {"revoked": rights.revoked, "terms": rights.terms, "consent": rights.consent}
    if policy.needs_signature:
        facts["signature"] = tuple(signature_findings(context, version))
    return decide(version, policy, PolicyFacts(**facts))
