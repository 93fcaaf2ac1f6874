"""Evaluates an alias policy for one version: gathers terms, consent, revocations and signature, then decides."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from datetime import date, datetime
from typing import Any

from sqlalchemy import select
from sqlalchemy.orm import Session

from registry.context import RegistryContext
from registry.documents.signing import signature_findings
from registry.entities import AdapterVersion, Decision, now
from registry.errors import IdentityError
from registry.identity import Actor
from registry.policy.actors import establish_actor
from registry.policy.alias_policy import PolicyFacts, decide
from registry.policy.approvals import find_unapproved
from registry.policy.consent import ConsentFindings
from registry.policy.policy_file import Policies, read_policies
from registry.policy.rights import resolve_rights
from registry.policy.votes import find_unvoted
from registry.store.tables import EventRow


def evaluate_policy(
    context: RegistryContext,
    version: AdapterVersion,
    alias: str,
    *,
    actor: str | None = None,
    moves: bool = True,
    damage: Sequence[str] = (),
    structure: Sequence[str] = (),
    today: date | None = None,
    session: Session | None = None,
    approvals: bool = True,
) -> Decision:
    """Decides whether a version may have an alias under the home's policy.

    Args:
        context: The registry.
        version: The version.
        alias: The alias.
        actor: User who requests the alias; None means the current user.
        moves: False asks whether the version meets the policy, for any user; `actor` is ignored.
        damage: Findings of the byte verification.
        structure: Findings of the adapter validation.
        today: Date to compare consents with; None means the current UTC date, and that of the newest event if the
            clock went back.
        session: Session of an open transaction to read in; None opens a new one.
        approvals: False ignores missing approvals and votes: the version has the alias, or had it before.

    Raises:
        PolicyError: The home's policy or table of licenses cannot be used.
    """
    policies = read_policies(context.home.path)
    policy = policies.of(alias)
    user, denied = _find_user(context, policies, version, alias, actor) if moves else (None, ())
    with nullcontext(session) if session is not None else context.lineage.database.read() as current:
        facts: dict[str, Any] = {"actor": user, "denied": denied, "damage": damage, "structure": structure}
        if user is not None and approvals:
            facts["unapproved"] = find_unapproved(current, policies, version, alias, user)
        if moves and approvals:
            facts["unvoted"] = find_unvoted(current, policies, version, alias)
        rights = resolve_rights(current, context, version, today=today)
        facts |= {"revoked": rights.revoked, "terms": rights.terms, "consent": rights.consent}
        facts["consent_policy"] = rights.consent_policy
        if today is None and (policy.needs_consent != "none" or rights.consent_policy != "off"):
            facts["consent"] = _by_the_log(current, context, version, rights.consent)
    if policy.needs_signature:
        facts["signature"] = tuple(signature_findings(context, version))
    return decide(version, policy, PolicyFacts(**facts))


def _find_user(
    context: RegistryContext, policies: Policies, version: AdapterVersion, alias: str, actor: str | None
) -> tuple[Actor | None, tuple[str, ...]]:
    """Returns the user who moves an alias, and why the user may not."""
    try:
        user = establish_actor(context, actor)
    except IdentityError as error:
        return None, (f"the user is unknown: {error.problem}",)
    denial = policies.denial(user, policies.permission_to_move(alias), version.name, alias)
    return user, ((denial,) if denial else ())


def _by_the_log(
    session: Session, context: RegistryContext, version: AdapterVersion, consent: ConsentFindings
) -> ConsentFindings:
    """Adds the consents that expired by the newest time in the log: a clock that went back revives none."""
    newest = session.execute(select(EventRow.seq, EventRow.at).order_by(EventRow.at.desc()).limit(1)).first()
    if newest is None or not isinstance(newest.at, datetime) or newest.at.date() <= now().date():
        return consent
    late = resolve_rights(session, context, version, today=newest.at.date()).consent.broken
    clock = f"by event {newest.seq} of {newest.at.date()}; the clock went back"
    return replace(
        consent, broken=(*consent.broken, *(f"{reason} ({clock})" for reason in late if reason not in consent.broken))
    )
