"""Taking versions out of use: withdrawing, deleting, and bringing back. The row and its number stay for good."""

from __future__ import annotations

from sqlalchemy.orm import Session

from registry import queries
from registry.entities import AdapterVersion, Event
from registry.errors import Refused
from registry.identity import current_user
from registry.policy.descent import descendants
from registry.policy.policy_file import Policies, read_policies
from registry.versions.promotion import require_reason
from registry.versions.versions import Versions


def withdraw(versions: Versions, name: str, ref: str | int, *, reason: str, actor: str | None = None) -> Event:
    """Takes a version out of use: it is not promoted or handed out any more; aliases that are not protected go.

    Raises:
        Refused: A protected alias points at it, or the actor may not move one that does.
        GoneVersion: It was withdrawn or deleted already.
        UnknownVersion: No such version.
        MlflowError: Done and logged, but MLflow is behind; the next command mends it.
    """
    reason, actor = require_reason(reason, "nothing is withdrawn"), actor or current_user()
    policies = read_policies(versions.home.path)
    with versions.lineage.database.write() as session:
        version = queries.read_version(session, name, ref)
        queries.require_active(session, name, version.version)
        reasons = [_holds(alias) for alias in version.aliases if policies.of(alias).protected]
        reasons += [
            f"{actor} may not move the alias {alias!r}"
            for alias in version.aliases
            if not policies.of(alias).may_move(actor)
        ]
        if reasons:
            raise Refused("it cannot be withdrawn", reasons=tuple(reasons), where=version.ref, remedy="mend all of it")
        for alias in version.aliases:
            queries.clear_alias(session, version, alias, actor=actor, reason=f"withdrawn: {reason}")
        details = {"aliases": list(version.aliases)}
        event = queries.set_state(
            session, version, "WITHDRAWN", "withdraw", actor=actor, reason=reason, details=details
        )
    versions.sync()
    return event


def delete(versions: Versions, name: str, ref: str | int, *, reason: str, actor: str | None = None) -> Event:
    """Deletes a version; what is in use, or what something in use was made from, is kept.

    Its row stays, and its number is given to nothing else. Its bytes stay until the store is tidied up.

    Raises:
        Refused: An alias points at it, or at something that was made from it; a version that has to do with an alias
            that is not protected is deleted in two steps, and has to be withdrawn first.
        GoneVersion: It was deleted already.
        UnknownVersion: No such version.
        MlflowError: Done and logged, but MLflow is behind; the next command mends it.
    """
    reason, actor = require_reason(reason, "nothing is deleted"), actor or current_user()
    policies = read_policies(versions.home.path)
    with versions.lineage.database.write() as session:
        version = queries.read_version(session, name, ref)
        if version.state == "DELETED":
            queries.require_active(session, name, version.version)
        reasons = _reasons_to_keep(session, version, policies)
        if reasons:
            raise Refused("it cannot be deleted", reasons=reasons, where=version.ref, remedy="mend all of it")
        event = queries.set_state(session, version, "DELETED", "delete", actor=actor, reason=reason)
    versions.sync()
    return event


def restore(versions: Versions, name: str, ref: str | int, *, reason: str, actor: str | None = None) -> Event:
    """Brings a withdrawn version back, or a deleted one whose bytes are still whole; its aliases do not come back.

    Raises:
        Refused: It is in use, or its bytes are gone.
        UnknownVersion: No such version.
        MlflowError: Done and logged, but MLflow is behind; the next command mends it.
    """
    reason, actor = require_reason(reason, "nothing is restored"), actor or current_user()
    version = versions.show(name, ref)
    damage = ("it is in use",) if version.state == "ACTIVE" else versions.damage(version)
    if damage:
        raise Refused("it cannot be restored", reasons=damage, where=version.ref, remedy="restore it from a backup")
    with versions.lineage.database.write() as session:
        version = queries.read_version(session, name, version.version)
        details = {"was": version.state}
        event = queries.set_state(session, version, "ACTIVE", "restore", actor=actor, reason=reason, details=details)
    versions.sync()
    return event


def _reasons_to_keep(session: Session, version: AdapterVersion, policies: Policies) -> tuple[str, ...]:
    reasons = [_holds(alias) for alias in version.aliases]
    is_first_step = version.state == "ACTIVE"
    for child in descendants(session, [version]).versions:
        if child.artifact == version.artifact or child.state == "DELETED":
            continue  # the same bytes under another name were not made from it
        for alias in child.aliases:
            if policies.of(alias).protected:
                reasons.append(f"{child.ref}, which has the protected alias {alias!r}, was made from it")
            elif is_first_step:
                reasons.append(f"{child.ref}, which has the alias {alias!r}, was made from it; withdraw this one first")
    return tuple(reasons)


def _holds(alias: str) -> str:
    return f"the alias {alias!r} points at it; give the alias to another version, or remove it"
