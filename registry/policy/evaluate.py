"""Gathering what a decision is made from: terms, consent, revocations and signature of one version, and the verdict."""

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
    """Whether a version may have an alias, by the home's policy and all that is known of the version.

    Args:
        opened: The registry.
        version: The version.
        alias: The alias.
        actor: Who asks; this process's user by default.
        damage: What a verification of its bytes found.
        structure: What a reading of the adapter found.
        today: The day that consents are compared with; by default that of the clock, in UTC.
        session: Where to read, if that is to happen within a transaction.

    Raises:
        PolicyError: The home's policy or table of licences cannot be used.
    """
    policy, actor = read_policies(context.home.path).of(alias), actor or current_user()
    if session is None:
        with context.lineage.database.read() as own:
            facts = gather_policy_facts(own, context, version, policy, actor=actor, today=today)
    else:
        facts = gather_policy_facts(session, context, version, policy, actor=actor, today=today)
    found = {**vars(facts), "damage": damage, "structure": structure}
    if policy.needs_signature:
        found["signature"] = check_signature(context, version)
    return decide(version, policy, PolicyFacts(**found))


def gather_policy_facts(
    session: Session,
    context: RegistryContext,
    version: AdapterVersion,
    policy: AliasPolicy,
    *,
    actor: str,
    today: date | None = None,
) -> PolicyFacts:
    """What the lineage of a version says, as far as the policy asks for it; what was revoked, in any case."""
    revoked = revoked_subjects(session)
    asks = policy.needs_licence != "none" or policy.needs_consent != "none"
    if not asks and not revoked:
        return PolicyFacts(actor=actor)
    ancestry = trace(session, version.artifact)
    found = revoked_ancestors(session, ancestry, revoked)
    if not asks:
        return PolicyFacts(actor=actor, revoked=found)
    datasets = read_datasets(context.store, ancestry.datasets)
    return PolicyFacts(
        actor=actor,
        revoked=found,
        terms=resolve_terms(ancestry, datasets, read_licenses(context.home.path)).terms,
        consent=find_consent(datasets, today or now().date()),
    )


def check_signature(context: RegistryContext, version: AdapterVersion) -> tuple[str, ...]:
    """What is wrong with a version's signature; empty where it is signed and the signature fits."""
    return tuple(signature_findings(context, version))
