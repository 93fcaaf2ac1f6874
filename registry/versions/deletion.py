"""Withdraws, deletes and restores versions. The row and its number stay forever."""

from __future__ import annotations

from sqlalchemy.orm import Session

from registry import changes, queries
from registry.entities import AdapterVersion, Event
from registry.errors import Refused
from registry.lineage.graph import NodeId
from registry.policy.actors import establish_actor
from registry.policy.ancestry import descendants
from registry.policy.policy_file import Policies, read_policies
from registry.versions.expected_version import require_expected
from registry.versions.guard import guarded
from registry.versions.promotion import require_reason
from registry.versions.versions import Versions

_RESOLVE = "resolve every reason above"


@guarded("withdraw")
def withdraw(
    versions: Versions,
    name: str,
    ref: str | int,
    *,
    reason: str,
    actor: str | None = None,
    expect: int | str | None = None,
) -> Event:
    """Withdraws a version: it can no longer be promoted or read; removes its aliases, which must not be protected.

    Args:
        versions: The registry.
        name: The adapter.
        ref: Number, alias or `latest` of the version.
        reason: The reason; stored in the log.
        actor: The user; None means this process's user.
        expect: Number or digest of the version that `ref` must be; see `require_expected`. None: any.

    Raises:
        Conflict: `ref` is not the expected version.
        Refused: A protected alias points at it, or an alias that the actor may not move.
        GoneVersion: It was withdrawn or deleted already.
        UnknownVersion: No such version.
        MlflowError: Done and logged, but MLflow is not in sync; the next command syncs it.
    """
    reason, actor = require_reason(reason, "nothing is withdrawn"), establish_actor(versions, actor)
    policies = read_policies(versions.home.path)
    with versions.lineage.database.write() as session:
        version = queries.read_version(session, name, ref)
        require_expected(session, version, ref, expect)
        changes.require_active(session, name, version.version)
        reasons = [_alias_reason(alias) for alias in version.aliases if policies.of(alias).protected]
        reasons += [
            f"{actor} may not move the alias {alias!r}"
            for alias in version.aliases
            if not policies.of(alias).may_move(actor)
        ]
        if reasons:
            raise Refused("it cannot be withdrawn", reasons=tuple(reasons), where=version.ref, remedy=_RESOLVE)
        for alias in version.aliases:
            changes.clear_alias(session, version, alias, actor=actor, reason=f"withdrawn: {reason}")
        details = {"aliases": list(version.aliases)}
        event = changes.set_state(
            session, version, "WITHDRAWN", "withdraw", actor=actor, reason=reason, details=details
        )
    versions.sync()
    return event


@guarded("delete")
def delete(
    versions: Versions,
    name: str,
    ref: str | int,
    *,
    reason: str,
    actor: str | None = None,
    expect: int | str | None = None,
) -> Event:
    """Deletes a version unless it, or a version made from it, is in use.

    Its row stays, and its number is not reused. Its bytes stay until the next garbage collection. For the arguments
    see `withdraw`.

    Raises:
        Conflict: `ref` is not the expected version.
        Refused: An alias points at it or a protected alias at a version made from it; if an unprotected alias does,
            the version must be withdrawn first.
        GoneVersion: It was deleted already.
        UnknownVersion: No such version.
        MlflowError: Done and logged, but MLflow is not in sync; the next command syncs it.
    """
    reason, actor = require_reason(reason, "nothing is deleted"), establish_actor(versions, actor)
    policies = read_policies(versions.home.path)
    with versions.lineage.database.write() as session:
        version = queries.read_version(session, name, ref)
        require_expected(session, version, ref, expect)
        if version.state == "DELETED":
            changes.require_active(session, name, version.version)
        reasons = _reasons_to_keep(session, version, policies)
        if reasons:
            raise Refused("it cannot be deleted", reasons=reasons, where=version.ref, remedy=_RESOLVE)
        event = changes.set_state(session, version, "DELETED", "delete", actor=actor, reason=reason)
    versions.sync()
    return event


@guarded("restore")
def restore(versions: Versions, name: str, ref: str | int, *, reason: str, actor: str | None = None) -> Event:
    """Restores a withdrawn version, or a deleted one whose bytes are intact; does not restore its aliases.

    Raises:
        Refused: It is active, or its bytes are missing or damaged.
        UnknownVersion: No such version.
        MlflowError: Done and logged, but MLflow is not in sync; the next command syncs it.
    """
    reason, actor = require_reason(reason, "nothing is restored"), establish_actor(versions, actor)
    version = versions.show(name, ref)
    damage = ("it is in use",) if version.state == "ACTIVE" else versions.damage(version)
    if damage:
        raise Refused("it cannot be restored", reasons=damage, where=version.ref, remedy="restore it from a backup")
    with versions.lineage.database.write() as session:
        version = queries.read_version(session, name, version.version)
        details = {"was": version.state}
        event = changes.set_state(session, version, "ACTIVE", "restore", actor=actor, reason=reason, details=details)
    versions.sync()
    return event


def _reasons_to_keep(session: Session, version: AdapterVersion, policies: Policies) -> tuple[str, ...]:
    reasons = [_alias_reason(alias) for alias in version.aliases]
    is_first_step = version.state == "ACTIVE"
    graph = descendants(session, [NodeId("artifact", version.artifact.sha256)])
    for child in queries.find_versions(session, graph.ids("version")):
        if child.artifact == version.artifact or child.state == "DELETED":
            continue  # the same bytes under another name are not derived from it
        for alias in child.aliases:
            if policies.of(alias).protected:
                reasons.append(f"{child.ref}, which has the protected alias {alias!r}, was made from it")
            elif is_first_step:
                reasons.append(f"{child.ref}, which has the alias {alias!r}, was made from it; withdraw it first")
    return tuple(reasons)


def _alias_reason(alias: str) -> str:
    return f"the alias {alias!r} points at it; move the alias to another version, or remove it"
