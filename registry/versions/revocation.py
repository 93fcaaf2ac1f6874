"""Revokes images, consents, versions, files and bases: flags or withdraws what was made from them, and blocks them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from sqlalchemy import select
from sqlalchemy.orm import Session

from lora_engine.files import sha256_file
from registry import changes, event_log, queries
from registry.entities import AdapterVersion, Event
from registry.errors import Refused, RightsError
from registry.lineage.walk import LEAST_DIGITS
from registry.policy.actors import establish_actor
from registry.policy.policy_file import Policies, read_policies
from registry.policy.revocations import Revocation, active_revocations
from registry.policy.rights import revoked_upstream
from registry.store.tables import EventRow, RevocationRow, VersionRow
from registry.versions.guard import guarded
from registry.versions.impact import ImpactReport, Recall, find_affected
from registry.versions.promotion import require_reason
from registry.versions.subjects import RevocationTarget
from registry.versions.versions import Versions

_DIGESTS = ("picture", "artifact", "file", "digest")
_EXTRA = ("artifacts", "bases", "unreadable")
"""Fields of `RevocationTarget` that an event has if they are not empty."""


@guarded("revoke")
def revoke(
    versions: Versions,
    subject: str,
    *,
    reason: str,
    actor: str | None = None,
    policy: Recall | None = None,
    dry_run: bool = False,
) -> ImpactReport:
    """Revokes something, and flags or withdraws it and all versions made from it, in one transaction.

    From then on ingest leaves the images out, import refuses the files, and no version made from it can be promoted. A
    version of it that is registered later is flagged or withdrawn, too.

    Args:
        versions: The registry.
        subject: An image, an adapter file, a digest (at least its first six digits), `name@ref`, the id of a consent,
            or a base. A digest that nothing has is blocked.
        reason: The reason; stored in the log.
        actor: The user; None means this process's user.
        policy: `flag` leaves aliases unchanged; `withdraw` withdraws the versions and rolls their aliases back to the
            last version that is not affected, or removes them. None means the home's policy.
        dry_run: True returns the impact and changes nothing.

    Raises:
        RightsError: Nothing matches, or several things do.
        Refused: The actor may not move an alias that has to be rolled back, or has no role that may revoke one of the
            adapters.
        MlflowError: Done and logged, but MLflow is not in sync; the next command syncs it.
    """
    reason, actor = require_reason(reason, "nothing is revoked"), establish_actor(versions, actor)
    policies = read_policies(versions.home.path)
    chosen = policy or policies.recall
    if dry_run:
        with versions.lineage.database.read() as session:
            return find_affected(session, versions, subject, chosen)[0]
    with versions.lineage.database.write() as session:
        report, affected, target = find_affected(session, versions, subject, chosen)
        _require_roles(affected, policies, actor)
        if chosen == "withdraw":
            _require_movers(affected, policies, actor)
        event = _log_revocation(session, report, target, actor, reason)
        for version in affected:
            _flag_or_withdraw(session, version, report, event, actor)
    versions.sync()
    return ImpactReport(**{**vars(report), "event": event.seq})


@guarded("lift")
def lift(versions: Versions, subject: str, *, reason: str, actor: str | None = None) -> Event:
    """Lifts a revocation: ingest accepts the images again, and the versions that it withdrew are active again.

    Aliases do not move. A version that another revocation affects stays withdrawn.

    Args:
        versions: The registry.
        subject: What was revoked: a file, a digest or its first digits, `name@version`, a consent or a base.
        reason: The reason; stored in the log.
        actor: The user; None means this process's user.

    Raises:
        RightsError: No active revocation matches, or more than one.
        MlflowError: Done and logged, but MLflow is not in sync; the next command syncs it.
    """
    reason, actor = require_reason(reason, "nothing is lifted"), establish_actor(versions, actor)
    with versions.lineage.database.write() as session:
        revocation = _find_revocation(session, subject)
        session.delete(session.get_one(RevocationRow, (revocation.kind, revocation.subject)))
        session.flush()
        restored = [version for version in _withdrawn_by_revocation(session) if not revoked_upstream(session, version)]
        details = {
            "kind": revocation.kind,
            "revocation": revocation.seq,
            "restored": [version.ref for version in restored],
        }
        event = event_log.log_event(
            session, "lift", actor=actor, reason=reason, subject=revocation.subject, details=details
        )
        for version in restored:
            fields = {"actor": actor, "reason": f"lifted: {reason}", "subject": revocation.subject}
            changes.set_state(session, version, "ACTIVE", "restore", details={"lift": event.seq}, **fields)
    versions.sync()
    return event


def _require_roles(affected: Sequence[AdapterVersion], policies: Policies, actor: str) -> None:
    names = sorted({version.name for version in affected})
    reasons = tuple(filter(None, (policies.denial(actor, "revoke", name) for name in names)))
    if reasons:
        raise Refused("not every affected version may be revoked", reasons=reasons, remedy="ask a user who may")


def _require_movers(affected: Sequence[AdapterVersion], policies: Policies, actor: str) -> None:
    forbidden = [
        f"{version.name}@{alias}"
        for version in affected
        for alias in version.aliases
        if not policies.of(alias).may_move(actor)
    ]
    if forbidden:
        reasons = tuple(f"{actor} may not move {alias}" for alias in forbidden)
        raise Refused(
            "not every affected version can be withdrawn",
            reasons=reasons,
            remedy="flag the versions with `--policy flag`, or ask a user who may move these aliases",
        )


def _log_revocation(session: Session, report: ImpactReport, target: RevocationTarget, actor: str, reason: str) -> Event:
    row = session.get(RevocationRow, (report.kind, report.subject))
    # Revoking again must not release images of datasets that cannot be read any more.
    earlier = session.get_one(EventRow, row.seq).details.get("pictures", ()) if row is not None else ()
    details = {
        "kind": report.kind,
        "policy": report.policy,
        "pictures": sorted({*report.pictures, *earlier}),
        "manifests": list(report.manifests),
        "versions": list(report.versions),
        "aliases": dict(report.aliases),
        **{name: list(values) for name in _EXTRA if (values := getattr(target, name))},
    }
    event = event_log.log_event(session, "revoke", actor=actor, reason=reason, subject=report.subject, details=details)
    if row is None:
        session.add(RevocationRow(kind=report.kind, subject=report.subject, seq=event.seq))
    else:
        row.seq = event.seq
    session.flush()
    return event


def _flag_or_withdraw(
    session: Session, version: AdapterVersion, report: ImpactReport, event: Event, actor: str
) -> None:
    reason = f"{report.kind} {report.subject[:40]} was revoked: {event.reason}"
    details = {"revocation": event.seq}
    if report.policy == "flag":
        fields = {"actor": actor, "reason": reason, "subject": report.subject}
        event_log.log_event(
            session, "flag", version=version, details=details | {"aliases": list(version.aliases)}, **fields
        )
        return
    for alias in version.aliases:
        fallback = report.taken_back[f"{version.name}@{alias}"]
        if fallback is None:
            changes.clear_alias(session, version, alias, actor=actor, reason=reason, details=details)
            continue
        target = queries.read_version(session, version.name, fallback)
        changes.move_alias(
            session,
            target,
            alias,
            expected=version.version,
            action="rollback",
            actor=actor,
            reason=reason,
            details=details,
        )
    if version.state == "ACTIVE":
        changes.set_state(
            session,
            version,
            "WITHDRAWN",
            "withdraw",
            actor=actor,
            reason=reason,
            subject=report.subject,
            details=details,
        )


def _find_revocation(session: Session, text: str) -> Revocation:
    revocations = active_revocations(session)
    path = Path(text)
    digest = sha256_file(path) if "\0" not in text and path.is_file() else text.removeprefix("sha256:").lower()
    matches = [revocation for revocation in revocations if revocation.subject in (text, digest)]
    if not matches and len(digest) >= LEAST_DIGITS:
        matches = [entry for entry in revocations if entry.kind in _DIGESTS and entry.subject.startswith(digest)]
    if len(matches) != 1:
        allowed = ", ".join(revocation.subject[:40] for revocation in revocations) or "none"
        raise RightsError(
            f"{text!r} matches {'several revocations' if matches else 'no active revocation'}", allowed=allowed
        )
    return matches[0]


def _withdrawn_by_revocation(session: Session) -> list[AdapterVersion]:
    """Returns the versions that a revocation withdrew, without those that a user withdrew."""
    rows = []
    for row in session.scalars(select(VersionRow).where(VersionRow.state == "WITHDRAWN").order_by(VersionRow.id)):
        withdrawals = select(EventRow).where(
            EventRow.name == row.name, EventRow.after == row.version, EventRow.action == "withdraw"
        )
        last = session.scalars(withdrawals.order_by(EventRow.seq.desc()).limit(1)).first()
        if last is not None and "revocation" in last.details:
            rows.append(row)
    return queries.entities(session, rows)
