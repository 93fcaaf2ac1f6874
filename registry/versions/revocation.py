"""Recall: what was made from a picture or a consent is found, flagged or withdrawn, and nothing more is made of it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from sqlalchemy import select
from sqlalchemy.orm import Session

from lora_engine.files import sha256_file
from registry import queries
from registry.entities import AdapterVersion, Event
from registry.errors import Refused, RightsError
from registry.identity import current_user
from registry.policy.policy_file import Policies, read_policies
from registry.policy.revocations import Revocation, active_revocations
from registry.store.tables import EventRow, RevocationRow, VersionRow
from registry.versions.impact import PREFIX, ImpactReport, Recall, find_affected, revoked_in
from registry.versions.promotion import require_reason
from registry.versions.versions import Versions


def revoke(
    versions: Versions,
    subject: str,
    *,
    reason: str,
    actor: str | None = None,
    policy: Recall | None = None,
    dry_run: bool = False,
) -> ImpactReport:
    """Revokes a picture or a consent, and flags or withdraws all that was made from it; all of it, or nothing.

    Ingest leaves the pictures out from now on, and nothing that was made from them is promoted.

    Args:
        versions: The registry.
        subject: A picture file, the digest of one (at least six of its digits), or the id of a consent.
        reason: Why; kept for good.
        actor: Who; this process's user by default.
        policy: `flag` leaves aliases where they are; `withdraw` takes them back to the last version that is not
            reached, or removes them, and takes the versions out of use. By default what the home's policy says.
        dry_run: Finds all of it and changes nothing.

    Raises:
        RightsError: Nothing, or more than one thing, goes by that name.
        Refused: An alias would have to be taken back that the actor may not move.
        MlflowError: Done and logged, but MLflow is behind; the next command mends it.
    """
    reason, actor = require_reason(reason, "nothing is revoked"), actor or current_user()
    policies = read_policies(versions.home.path)
    chosen = policy or policies.recall
    if dry_run:
        with versions.lineage.database.read() as session:
            return find_affected(session, versions, subject, chosen)[0]
    with versions.lineage.database.write() as session:
        found, reached = find_affected(session, versions, subject, chosen)
        if chosen == "withdraw":
            _require_movers(reached, policies, actor)
        event = _log_revocation(session, found, reached, actor, reason)
        for version in reached:
            _recall(session, version, found, event, actor)
    versions.sync()
    return ImpactReport(**{**vars(found), "event": event.seq})


def lift(versions: Versions, subject: str, *, reason: str, actor: str | None = None) -> Event:
    """Lifts a revocation: ingest takes the pictures again, and what was withdrawn for it is in use again.

    Aliases stay where they are. What something else still revokes stays withdrawn.

    Args:
        versions: The registry.
        subject: What was revoked: a picture file, a digest or its beginning, or the id of a consent.
        reason: Why; kept for good.
        actor: Who; this process's user by default.

    Raises:
        RightsError: No such revocation stands.
        MlflowError: Done and logged, but MLflow is behind; the next command mends it.
    """
    reason, actor = require_reason(reason, "nothing is lifted"), actor or current_user()
    with versions.lineage.database.write() as session:
        standing = _standing(session, subject)
        session.delete(session.get_one(RevocationRow, standing.subject))
        session.flush()
        restored = [version for version in _recalled(session) if not revoked_in(session, version)]
        details = {"kind": standing.kind, "revocation": standing.seq, "restored": [each.ref for each in restored]}
        event = queries.log_event(
            session, "lift", actor=actor, reason=reason, subject=standing.subject, details=details
        )
        for version in restored:
            said = {"actor": actor, "reason": f"lifted: {reason}", "subject": standing.subject}
            queries.set_state(session, version, "ACTIVE", "restore", details={"lift": event.seq}, **said)
    versions.sync()
    return event


def _require_movers(reached: Sequence[AdapterVersion], policies: Policies, actor: str) -> None:
    held = [
        f"{each.name}@{alias}" for each in reached for alias in each.aliases if not policies.of(alias).may_move(actor)
    ]
    if held:
        reasons = tuple(f"{actor} may not move {alias}" for alias in held)
        raise Refused(
            "not all of it can be withdrawn", reasons=reasons, remedy="flag it with `--policy flag`, or ask them"
        )


def _log_revocation(
    session: Session, found: ImpactReport, reached: Sequence[AdapterVersion], actor: str, reason: str
) -> Event:
    row = session.get(RevocationRow, found.subject)
    details = {
        "kind": found.kind,
        "policy": found.policy,
        "pictures": list(found.pictures),
        "manifests": list(found.manifests),
        "versions": list(found.versions),
        "aliases": dict(found.aliases),
    }
    event = queries.log_event(session, "revoke", actor=actor, reason=reason, subject=found.subject, details=details)
    if row is None:
        session.add(RevocationRow(subject=found.subject, seq=event.seq))
    else:
        row.seq = event.seq
    session.flush()
    return event


def _recall(session: Session, version: AdapterVersion, found: ImpactReport, event: Event, actor: str) -> None:
    why = f"{found.kind} {found.subject[:40]} was revoked: {event.reason}"
    details = {"revocation": event.seq}
    if found.policy == "flag":
        said = {"actor": actor, "reason": why, "subject": found.subject}
        queries.log_event(
            session, "flag", version=version, details=details | {"aliases": list(version.aliases)}, **said
        )
        return
    for alias in version.aliases:
        fallback = found.taken_back[f"{version.name}@{alias}"]
        if fallback is None:
            queries.clear_alias(session, version, alias, actor=actor, reason=why, details=details)
            continue
        target = queries.read_version(session, version.name, fallback)
        queries.move_alias(
            session,
            target,
            alias,
            expected=version.version,
            action="rollback",
            actor=actor,
            reason=why,
            details=details,
        )
    if version.state == "ACTIVE":
        queries.set_state(
            session, version, "WITHDRAWN", "withdraw", actor=actor, reason=why, subject=found.subject, details=details
        )


def _standing(session: Session, text: str) -> Revocation:
    standing = active_revocations(session)
    path = Path(text)
    wanted = sha256_file(path) if "\0" not in text and path.is_file() else text
    found = [each for each in standing if each.subject == wanted]
    if not found and len(text) >= PREFIX:
        found = [each for each in standing if each.kind == "picture" and each.subject.startswith(wanted)]
    if len(found) != 1:
        listed = ", ".join(each.subject[:40] for each in standing) or "none"
        raise RightsError(
            f"{text!r} names {'several revocations' if found else 'no revocation that stands'}", allowed=listed
        )
    return found[0]


def _recalled(session: Session) -> list[AdapterVersion]:
    """The versions that are out of use because of some revocation, and not because somebody withdrew them by hand."""
    found = []
    for row in session.scalars(select(VersionRow).where(VersionRow.state == "WITHDRAWN").order_by(VersionRow.id)):
        deeds = select(EventRow).where(
            EventRow.name == row.name, EventRow.after == row.version, EventRow.action == "withdraw"
        )
        last = session.scalars(deeds.order_by(EventRow.seq.desc()).limit(1)).first()
        if last is not None and "revocation" in last.details:
            found.append(row)
    return queries.entities(session, found)
