"""Gathering what a decision is made from: terms, consent, revocations and signature of one version, and the verdict."""

from __future__ import annotations

import getpass
import os
import socket
from collections.abc import Sequence
from datetime import date
from typing import TYPE_CHECKING

from sqlalchemy.orm import Session

from registry.entities import AdapterVersion, Decision, now
from registry.governance.ancestry import trace
from registry.governance.consent import find_consent
from registry.governance.licenses import read_licenses
from registry.governance.policies import read_policies
from registry.governance.policy import AliasPolicy, Facts, decide
from registry.governance.revoked import revoked_ancestors, revoked_subjects
from registry.governance.terms import read_datasets, resolve_terms

if TYPE_CHECKING:
    from registry.versions import Versions


def current_actor() -> str:
    """Who acts, for the log: LORALINE_ACTOR, or `user@host` of this process."""
    try:
        user = getpass.getuser()
    except (KeyError, OSError):
        user = "unknown"
    return os.environ.get("LORALINE_ACTOR") or f"{user}@{socket.gethostname()}"


def judge(
    versions: Versions,
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
        versions: The registry.
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
    policy, actor = read_policies(versions.home.path).of(alias), actor or current_actor()
    if session is None:
        with versions.lineage.database.read() as own:
            facts = gather_facts(own, versions, version, policy, actor=actor, today=today)
    else:
        facts = gather_facts(session, versions, version, policy, actor=actor, today=today)
    found = {**vars(facts), "damage": damage, "structure": structure}
    if policy.needs_signature:
        found["signature"] = check_signature(versions, version)
    return decide(version, policy, Facts(**found))


def gather_facts(
    session: Session,
    versions: Versions,
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
    datasets = read_datasets(versions.store, ancestry.datasets)
    return Facts(
        actor=actor,
        revoked=found,
        terms=resolve_terms(ancestry, datasets, read_licenses(versions.home.path)).terms,
        consent=find_consent(datasets, today or now().date()),
    )


def check_signature(versions: Versions, version: AdapterVersion) -> tuple[str, ...]:
    """What is wrong with a version's signature; empty where it is signed and the signature fits."""
    try:
        from registry.records.signing import signature_findings
    except ImportError:
        return ("signatures cannot be checked by this installation",)
    return tuple(signature_findings(versions, version))
