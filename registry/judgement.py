"""Gathering what a decision is made from: terms, consent, revocations and signature of one version, and the verdict."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import date

from sqlalchemy.orm import Session

from registry.actors import current_actor
from registry.entities import AdapterVersion, Decision, now
from registry.governance.ancestry import trace
from registry.governance.consent import find_consent
from registry.governance.licenses import read_licenses
from registry.governance.policies import read_policies
from registry.governance.policy import AliasPolicy, Facts, decide
from registry.governance.revoked import revoked_ancestors, revoked_subjects
from registry.governance.terms import read_datasets, resolve_terms
from registry.opened import Opened
from registry.records.signing import signature_findings


def judge(
    opened: Opened,
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
    policy, actor = read_policies(opened.home.path).of(alias), actor or current_actor()
    if session is None:
        with opened.lineage.database.read() as own:
            facts = gather_facts(own, opened, version, policy, actor=actor, today=today)
    else:
        facts = gather_facts(session, opened, version, policy, actor=actor, today=today)
    found = {**vars(facts), "damage": damage, "structure": structure}
    if policy.needs_signature:
        found["signature"] = check_signature(opened, version)
    return decide(version, policy, Facts(**found))


def gather_facts(
    session: Session,
    opened: Opened,
    version: AdapterVersion,
    policy: AliasPolicy,
    *,
    actor: str,
    today: date | None = None,
) -> Facts:
    """What the lineage of a version says, as far as the policy asks for it; what was revoked, in any case."""
    revoked = revoked_subjects(session)
    asks = policy.needs_licence != "none" or policy.needs_consent != "none"
    if not asks and not revoked:
        return Facts(actor=actor)
    ancestry = trace(session, version.artifact)
    found = revoked_ancestors(session, ancestry, revoked)
    if not asks:
        return Facts(actor=actor, revoked=found)
    datasets = read_datasets(opened.store, ancestry.datasets)
    return Facts(
        actor=actor,
        revoked=found,
        terms=resolve_terms(ancestry, datasets, read_licenses(opened.home.path)).terms,
        consent=find_consent(datasets, today or now().date()),
    )


def check_signature(opened: Opened, version: AdapterVersion) -> tuple[str, ...]:
    """What is wrong with a version's signature; empty where it is signed and the signature fits."""
    return tuple(signature_findings(opened, version))
