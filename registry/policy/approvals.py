"""Counts the approvals of a version for an alias: the two-person rule. Reads events, writes nothing.

An endorsement is an event of a user for one alias and the digests of one version. The newest one of each user counts,
if the user may still endorse.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, cast, get_args

from sqlalchemy import select
from sqlalchemy.orm import Session

from registry.entities import AdapterVersion
from registry.identity import Actor, ActorSource
from registry.policy.policy_file import Policies
from registry.store.tables import EventRow


@dataclass(frozen=True)
class Endorsement:
    """The newest endorsement of a version for an alias by one user.

    Args:
        alias: The alias.
        actor: The user.
        seq: Number of the event.
        reason: The reason given.
        withdrawn: True if the user took it back.
    """

    alias: str
    actor: Actor
    seq: int
    reason: str
    withdrawn: bool


def endorsed_digests(version: AdapterVersion) -> dict[str, str | None]:
    """Returns the digests that an endorsement is bound to: the adapter file, its artifact and its report."""
    report = version.report.sha256 if version.report else None
    return {"sha256": version.sha256, "artifact": version.artifact.sha256, "report": report}


def read_endorsements(session: Session, version: AdapterVersion, alias: str | None = None) -> list[Endorsement]:
    """Returns the newest endorsement of each user and alias that is bound to the version's digests, oldest first.

    Args:
        session: Reading or writing.
        version: The version.
        alias: The alias; None means all.
    """
    newest: dict[tuple[str, str], Endorsement] = {}
    for row in _events(session, version, "endorse"):
        details = row.details if isinstance(row.details, Mapping) else {}
        bound = {key: details.get(key) for key in endorsed_digests(version)}
        if bound != endorsed_digests(version) or (alias is not None and details.get("alias") != alias):
            continue
        actor = actor_of(row)
        entry = Endorsement(str(details["alias"]), actor, row.seq, row.reason, details.get("withdrawn") is True)
        newest.pop((entry.alias, actor.casefold()), None)
        newest[entry.alias, actor.casefold()] = entry
    return list(newest.values())


def read_makers(session: Session, version: AdapterVersion) -> tuple[Actor, ...]:
    """Returns the users who registered a version, as far as the log has them."""
    rows = list(_events(session, version, "register", "import"))
    rows = rows or [row for row in _events(session, version, "stage") if row.reason == "registered"]
    return tuple({actor_of(row).casefold(): actor_of(row) for row in rows}.values())


def find_unapproved(
    session: Session, policies: Policies, version: AdapterVersion, alias: str, promoter: str
) -> tuple[str, ...]:
    """Returns why a version does not have the approvals that an alias needs; empty if it has.

    Args:
        session: Reading, or in the transaction that moves the alias.
        policies: The policies of the home.
        version: The version.
        alias: The alias.
        promoter: The user who moves the alias, which is an approval.
    """
    policy = policies.of(alias)
    if not policy.needs_approvals:
        return ()
    makers = read_makers(session, version) if policy.by_others else ()
    approvers = {
        entry.actor.casefold(): str(entry.actor)
        for entry in read_endorsements(session, version, alias)
        if not entry.withdrawn and not policies.denial(entry.actor, "endorse", version.name, alias)
    }
    approvers[promoter.casefold()] = str(promoter)
    for maker in makers:
        approvers.pop(maker.casefold(), None)
    missing = policy.needs_approvals - len(approvers)
    if missing <= 0:
        return ()
    names = f" ({', '.join(sorted(approvers.values()))})" if approvers else ""
    others = f" than {', '.join(sorted(makers))}, who registered it" if makers else ""
    needed = "one more by another user" if missing == 1 else f"{missing} more by other users"
    count = f"{len(approvers)} of {policy.needs_approvals} approvals{names}"
    return (f"{count}; needs {needed}{others}: `loraline endorse {version.ref} --for {alias} --reason TEXT`",)


def actor_of(row: EventRow) -> Actor:
    """Returns the actor of an event, established as the event says; a declared one if it does not say."""
    details = row.details if isinstance(row.details, Mapping) else {}
    record = details.get("actor")
    facts: dict[str, Any] = dict(record) if isinstance(record, Mapping) else {}
    established = facts.pop("established", "declared")
    is_known = established in get_args(ActorSource)
    return Actor(str(row.actor), cast("ActorSource", established if is_known else "declared"), facts)


def _events(session: Session, version: AdapterVersion, *actions: str) -> Iterator[EventRow]:
    query = select(EventRow).where(
        EventRow.name == version.name, EventRow.after == version.version, EventRow.action.in_(actions)
    )
    yield from session.scalars(query.order_by(EventRow.seq))
