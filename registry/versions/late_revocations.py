"""Applies earlier revocations to a version when it is registered, or when more of its parents become known."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from sqlalchemy import func, select
from sqlalchemy.orm import Session

from registry import changes, event_log
from registry.entities import AdapterVersion
from registry.lineage.graph import version_ids
from registry.policy.ancestry import trace
from registry.policy.revocations import active_revocations, find_revoked
from registry.store.tables import ParentRow, VersionRow


def follow_revocations(session: Session, version: AdapterVersion, actor: str) -> None:
    """Flags or withdraws a version if anything that it was made from is revoked, as the revocation did with others.

    Args:
        session: In the transaction that writes the version.
        version: The version.
        actor: The user.
    """
    if not active_revocations(session):
        return
    found = find_revoked(session, trace(session, version.artifact))
    for revocation, names in sorted(found.items(), key=lambda item: (item[0].policy != "withdraw", item[0].seq)):
        fields: dict[str, Any] = {
            "actor": actor,
            "reason": f"{', '.join(names)} was revoked before",
            "subject": revocation.subject,
            "details": {"revocation": revocation.seq},
        }
        if revocation.policy == "withdraw" and version.state == "ACTIVE":
            for alias in version.aliases:
                changes.clear_alias(session, version, alias, actor=actor, reason=fields["reason"])
            changes.set_state(session, version, "WITHDRAWN", "withdraw", **fields)
            return
        event_log.log_event(session, "flag", version=version, **fields)


def add_parents(session: Session, version: AdapterVersion, parents: Sequence[str], actor: str) -> tuple[str, ...]:
    """Adds the parents that a version does not have yet, and applies revocations; returns those that were added.

    Args:
        session: In a writing transaction.
        version: The version.
        parents: `name@version`, or a text with a digest.
        actor: The user.
    """
    added = tuple(parent for parent in dict.fromkeys(parents) if parent not in version.parents)
    if not added:
        return ()
    (child,) = version_ids(session, [version.ref])
    last = session.scalar(select(func.max(ParentRow.position)).where(ParentRow.child == child))
    for position, text in enumerate(added, start=0 if last is None else last + 1):
        known = version_ids(session, [text])
        session.add(ParentRow(child=child, position=position, parent=known[0] if known else None, text=text))
    session.get_one(VersionRow, child).mirrored = False
    session.flush()
    follow_revocations(session, version, actor)
    return added
