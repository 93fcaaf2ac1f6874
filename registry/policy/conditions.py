"""Judges policies as conditions: whether a version that has an alias meets the alias's policy now.

Reasons that a user overrode when the version got the alias do not count again; new ones do.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass, replace
from datetime import datetime

from sqlalchemy import select
from sqlalchemy.orm import Session

from registry import event_log, queries
from registry.context import RegistryContext
from registry.documents.keys import trusted_keys
from registry.entities import AdapterVersion, Decision
from registry.errors import Refused
from registry.identity import current_user
from registry.policy.evaluate import evaluate_policy
from registry.policy.policy_file import read_policies
from registry.store.tables import EventRow
from registry.versions.projections import find_overridden


@dataclass(frozen=True)
class AliasState:
    """An alias, and whether its version meets its policy now.

    Args:
        name: The adapter.
        alias: The alias.
        version: Number of the version.
        reasons: Reasons for which the version does not meet the policy; empty if it does.
        overridden: Reasons that a user overrode.
        since: Time at which the alias was moved to the version; None if the event is damaged.
        actor: The user who moved it.
        moved_because: The reason that the user gave.
    """

    name: str
    alias: str
    version: int
    reasons: tuple[str, ...]
    overridden: tuple[str, ...]
    since: datetime | None
    actor: str
    moved_because: str


def judge_alias(
    context: RegistryContext, version: AdapterVersion, alias: str, *, session: Session | None = None
) -> Decision:
    """Decides whether a version that has an alias meets its policy now, for any user.

    Does not read the adapter's bytes, which each use verifies.

    Args:
        context: The registry.
        version: The version.
        alias: The alias.
        session: Session to read in; None opens a new one.

    Raises:
        PolicyError: The home's policy or table of licenses cannot be used.
    """
    with nullcontext(session) if session is not None else context.lineage.database.read() as current:
        return _judge(context, current, version, alias)[0]


def _judge(
    context: RegistryContext, session: Session, version: AdapterVersion, alias: str
) -> tuple[Decision, frozenset[str]]:
    """Returns the decision without the reasons that were overridden, and these reasons."""
    decision = evaluate_policy(context, version, alias, moves=False, session=session)
    overridden = overridden_reasons(session, version, alias)
    return without_overridden(decision, overridden), overridden


def without_overridden(decision: Decision, overridden: frozenset[str]) -> Decision:
    """Returns a decision without the reasons that were overridden; final ones stay."""
    reasons = tuple(reason for reason in decision.reasons if reason in decision.final or reason not in overridden)
    return replace(decision, allowed=not reasons, reasons=reasons)


def overridden_reasons(session: Session, version: AdapterVersion, alias: str) -> frozenset[str]:
    """Returns the reasons that were overridden when a version last got an alias by a decision."""
    events = event_log.read_events(session, version.name, alias, after=version.version)
    return find_overridden(events, version.version)


def require_policy(context: RegistryContext, version: AdapterVersion, alias: str) -> None:
    """Raises Refused if the version of an alias does not meet the alias's policy now.

    Raises:
        Refused: Has all reasons.
        PolicyError: The home's policy or table of licenses cannot be used.
    """
    decision = judge_alias(context, version, alias)
    if not decision.allowed:
        raise Refused(
            f"it does not meet the policy of {alias!r} any more",
            reasons=decision.reasons,
            where=version.ref,
            remedy=f"resolve every reason above, move the alias, or name {version.ref} instead of the alias",
        )


def read_alias_states(context: RegistryContext, session: Session, name: str | None = None) -> list[AliasState]:
    """Judges all aliases, or those of one adapter, ordered by name and alias.

    Raises:
        PolicyError: The home's policy or table of licenses cannot be used.
    """
    states = []
    moves = event_log.read_moves(session, name)
    for version in queries.read_aliased(session, name):
        for alias in version.aliases:
            decision, overridden = _judge(context, session, version, alias)
            move, unmet = moves.get((version.name, alias)), tuple(sorted(overridden))
            moved = (None, "", "") if move is None else (move.at, move.actor, move.reason)
            states.append(AliasState(version.name, alias, version.version, decision.reasons, unmet, *moved))
    return sorted(states, key=lambda state: (state.name, state.alias))


def find_lockouts(context: RegistryContext, session: Session) -> Iterator[tuple[str, str]]:
    """Yields aliases whose policy nobody can meet, with the problem: no known user, or no key for a signature.

    Raises:
        PolicyError: The home's policy cannot be used.
    """
    known = {current_user(), *(actor for actor in session.scalars(select(EventRow.actor).distinct()))}
    users = sorted(actor for actor in known if isinstance(actor, str))
    for alias, policy in read_policies(context.home.path).aliases.items():
        if not any(map(policy.may_move, users)):
            movers, shown = ", ".join(policy.movers), ", ".join(users[:4])
            yield alias, f"no known user may move the alias {alias!r}: movers are {movers}, known users are {shown}"
        if policy.needs_signature and not policy.overridable and not _has_key(context):
            yield alias, f"no version can become {alias!r}: it needs a signature, and no trusted key is valid"


def _has_key(context: RegistryContext) -> bool:
    return any(not key.has_expired() for key in trusted_keys(context.home))
