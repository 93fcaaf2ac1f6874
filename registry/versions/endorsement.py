"""Endorses a version for an alias: an approval for the two-person rule. See `registry.policy.approvals`."""

from __future__ import annotations

from registry import changes, event_log, queries
from registry.entities import AdapterVersion, Event
from registry.errors import PromotionError, Refused
from registry.policy.actors import establish_actor
from registry.policy.approvals import Endorsement, endorsed_digests, read_endorsements, read_makers
from registry.policy.policy_file import read_policies
from registry.refs import check_alias
from registry.versions.expected_version import require_expected
from registry.versions.guard import guarded
from registry.versions.promotion import require_reason
from registry.versions.versions import Versions


@guarded("endorse", alias="alias")
def endorse(
    versions: Versions,
    name: str,
    ref: str | int,
    alias: str,
    *,
    reason: str,
    actor: str | None = None,
    expect: int | str | None = None,
    withdraw: bool = False,
) -> Event:
    """Approves a version for an alias, or takes the user's approval back; moves no alias.

    The approval is bound to the digests of the adapter and of its report.

    Args:
        versions: The registry.
        name: The adapter.
        ref: Number, alias or `latest` of the version.
        alias: The alias.
        reason: The reason; stored in the log.
        actor: The user; None means this process's user.
        expect: Number or digest of the version that `ref` must be; see `require_expected`. None: any.
        withdraw: True takes the approval back.

    Returns:
        The event; the earlier one if the user's approval is as requested already.

    Raises:
        Refused: The user has no role that may endorse it, or registered it and the alias counts others only.
        PromotionError: The reason is empty, or there is no approval to take back.
        Conflict: `ref` is not the expected version.
        GoneVersion: The version was withdrawn or deleted.
        UnknownName: No such adapter.
        UnknownVersion: No such version.
    """
    check_alias(alias)
    reason, user = require_reason(reason, "nothing is endorsed"), establish_actor(versions, actor)
    policy = read_policies(versions.home.path).of(alias)
    with versions.lineage.database.write() as session:
        version = queries.read_version(session, name, ref)
        require_expected(session, version, ref, expect)
        changes.require_active(session, name, version.version)
        makers = read_makers(session, version) if policy.by_others else ()
        if not withdraw and user.casefold() in {maker.casefold() for maker in makers}:
            raise Refused(
                f"it cannot be endorsed for {alias!r}",
                reasons=(f"{user} registered it, and the approvals must be by others (by_others)",),
                where=version.ref,
                remedy="ask another user",
            )
        earlier = [
            entry for entry in read_endorsements(session, version, alias) if entry.actor.casefold() == user.casefold()
        ]
        if withdraw and (not earlier or earlier[-1].withdrawn):
            raise PromotionError(f"{user} has not endorsed it for {alias!r}", where=version.ref)
        if earlier and earlier[-1].withdrawn == withdraw and earlier[-1].actor.established == user.established:
            return event_log.read_event(session, earlier[-1].seq)
        details = {"alias": alias, **endorsed_digests(version), **({"withdrawn": True} if withdraw else {})}
        return event_log.log_event(session, "endorse", actor=user, reason=reason, version=version, details=details)


def list_endorsements(versions: Versions, version: AdapterVersion) -> list[Endorsement]:
    """Returns the endorsements of a version that count, oldest first: the newest of each user and alias."""
    policies = read_policies(versions.home.path)
    with versions.lineage.database.read() as session:
        return [
            entry
            for entry in read_endorsements(session, version)
            if not entry.withdrawn and not policies.denial(entry.actor, "endorse", version.name, entry.alias)
        ]
