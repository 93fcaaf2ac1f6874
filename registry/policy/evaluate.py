"""Evaluates an alias policy for one version: gathers terms, consent, revocations and signature, then decides."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import date

from sqlalchemy.orm import Session

from registry.context import RegistryContext
from registry.documents.signing import signature_findings
from registry.entities import AdapterVersion, Decision, now
from registry.identity import current_user
from registry.policy.alias_policy import AliasPolicy, PolicyFacts, decide
from registry.policy.ancestry import trace
from registry.policy.consent import find_consent
from registry.policy.licenses import read_licenses
from registry.policy.policy_file import read_policies
from registry.policy.revocations import revoked_ancestors, revoked_subjects
from registry.policy.terms import read_datasets, resolve_terms


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
    if session is None:
        with context.lineage.database.read() as own:
            facts = gather_policy_facts(own, context, version, policy, actor=actor, today=today)
    else:
        facts = gather_policy_facts(session, context, version, policy, actor=actor, today=today)
    values = {**vars(facts), "damage": damage, "structure": structure}
    if policy.needs_signature:
        values["signature"] = check_signature(context, version)
    return decide(version, policy, PolicyFacts(**values))


def gather_policy_facts(
    session: Session,
    context: RegistryContext,
    version: AdapterVersion,
    policy: AliasPolicy,
    *,
    actor: str,
    today: date | None = None,
) -> PolicyFacts:
    """Returns the lineage facts that the policy needs; always includes revoked upstream subjects."""
    revoked = revoked_subjects(session)
    needs_datasets = policy.needs_licence != "none" or policy.needs_consent != "none"
    if not needs_datasets and not revoked:
        return PolicyFacts(actor=actor)
    ancestry = trace(session, version.artifact)
    revoked_upstream = revoked_ancestors(session, ancestry, revoked)
    if not needs_datasets:
        return PolicyFacts(actor=actor, revoked=revoked_upstream)
    datasets = read_datasets(context.store, ancestry.datasets)
    return PolicyFacts(
        actor=actor,
        revoked=revoked_upstream,
        terms=resolve_terms(ancestry, datasets, read_licenses(context.home.path)).terms,
        consent=find_consent(datasets, today or now().date()),
    )


def check_signature(context: RegistryContext, version: AdapterVersion) -> tuple[str, ...]:
    """Returns the problems of a version's signature; empty if the signature is valid."""
    return tuple(signature_findings(context, version))
