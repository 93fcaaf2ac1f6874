"""Promotion: aliases that move by compare-and-set, each move with its event, and the way back."""

from __future__ import annotations

import getpass
import socket
from collections.abc import Iterable
from typing import TYPE_CHECKING, Literal

from registry import catalog
from registry.entities import Event, check_alias
from registry.errors import PromotionError, Refused
from registry.policy import decide

if TYPE_CHECKING:
    from registry.versions import Versions

__all__ = ["current_actor", "decide", "history", "promote", "replay", "rollback"]


def current_actor() -> str:
    """`user@host` of this process, for the log."""
    try:
        user = getpass.getuser()
    except (KeyError, OSError):
        user = "unknown"
    return f"{user}@{socket.gethostname()}"


def promote(
    versions: Versions,
    name: str,
    ref: str | int,
    to: str,
    *,
    reason: str,
    actor: str | None = None,
    expected: int | Literal["now"] | None = "now",
) -> Event:
    """Points an alias at a version if its policy allows it and nobody moved it meanwhile.

    Args:
        versions: The registry.
        name: The adapter.
        ref: Number, alias or `latest` of the version.
        to: The alias.
        reason: Why; kept for good.
        actor: Who; this process's user by default.
        expected: The number that the alias points at, as the caller knows it (None: nothing); `now` reads it first.

    Returns:
        The event; where the alias points at the version already, the event that made it so.

    Raises:
        Refused: With all reasons; the refusal is in the log.
        Conflict: The alias was moved by somebody else.
        PromotionError: No reason given.
        UnknownName: No such adapter.
        UnknownVersion: No such version.
        MirrorError: Done and logged, but MLflow is behind; the next command mends it.
    """
    check_alias(to)
    reason, actor = _require_reason(reason, to), actor or current_actor()
    with versions.lineage.database.read() as session:
        version = catalog.read_version(session, name, ref)
        before = catalog.alias_target(session, name, to) if expected == "now" else expected
        if before == version.version == catalog.alias_target(session, name, to):
            return [event for event in catalog.read_events(session, name, to) if event.action != "refuse"][-1]
    decision = decide(version, to, damage=versions.damage(version))
    if not decision.allowed:
        with versions.lineage.database.write() as session:
            standing = catalog.alias_target(session, name, to)
            why = "; ".join(decision.reasons)
            catalog.log_event(session, version, to, standing, action="refuse", actor=actor, reason=why)
        raise Refused(f"it cannot become {to!r}", reasons=decision.reasons, where=version.ref, remedy="mend all of it")
    with versions.lineage.database.write() as session:
        event = catalog.move_alias(session, version, to, expected=before, action="promote", actor=actor, reason=reason)
    versions.sync()
    return event


def rollback(
    versions: Versions,
    name: str,
    alias: str = "production",
    *,
    to: str | int | None = None,
    reason: str = "rollback",
    actor: str | None = None,
) -> Event:
    """Points an alias back at what it pointed at before, by the log; again, and it goes back one further.

    Args:
        versions: The registry.
        name: The adapter.
        alias: The alias.
        to: An earlier version to go back to, instead of the one before.
        reason: Why; kept for good.
        actor: Who; this process's user by default.

    Raises:
        PromotionError: There is nothing earlier, or `to` never had the alias.
        Refused: The bytes of the earlier version are no longer whole.
        Conflict: The alias was moved by somebody else meanwhile.
        MirrorError: Done and logged, but MLflow is behind; the next command mends it.
    """
    reason, actor = _require_reason(reason, alias), actor or current_actor()
    with versions.lineage.database.read() as session:
        current = catalog.read_version(session, name, alias)
        stack = _stack(catalog.read_events(session, name, alias))
        wanted = catalog.find_row(session, name, to).version if to is not None else None
        earlier = [number for number in stack[:-1] if number != current.version]
        if not earlier or (wanted is not None and wanted not in earlier):
            known = ", ".join(map(str, dict.fromkeys(earlier))) or "none; it has had one version only"
            raise PromotionError(
                f"{alias!r} cannot go back" + (f" to version {wanted}" if wanted else ""), where=name, allowed=known
            )
        target = catalog.read_version(session, name, wanted or earlier[-1])
    damage = versions.damage(target)
    if damage:
        raise Refused(
            f"{alias!r} cannot go back", reasons=damage, where=target.ref, remedy="roll back further with `to`"
        )
    with versions.lineage.database.write() as session:
        event = catalog.move_alias(
            session, target, alias, expected=current.version, action="rollback", actor=actor, reason=reason
        )
    versions.sync()
    return event


def history(versions: Versions, name: str, alias: str | None = None) -> list[Event]:
    """The log of an adapter's aliases, oldest first.

    Raises:
        UnknownName: No such adapter.
    """
    with versions.lineage.database.read() as session:
        catalog.find_row(session, name, "latest")
        return catalog.read_events(session, name, alias)


def replay(events: Iterable[Event]) -> dict[tuple[str, str], int]:
    """What the aliases must be by the log alone: (name, alias) -> number."""
    aliases: dict[tuple[str, str], int | None] = {}
    for event in sorted(events, key=lambda entry: entry.seq):
        if event.alias and event.action != "refuse":
            aliases[event.name, event.alias] = event.after
    return {key: number for key, number in aliases.items() if number is not None}


def _stack(events: Iterable[Event]) -> list[int]:
    """The versions that one alias had, oldest first, without what was rolled back."""
    stack: list[int] = []
    for event in events:
        if event.action == "refuse" or event.after is None:
            continue
        if event.action == "rollback" and event.after in stack:
            last = len(stack) - 1 - stack[::-1].index(event.after)
            del stack[last + 1 :]
        else:
            stack.append(event.after)
    return stack


def _require_reason(reason: str, alias: str) -> str:
    if not reason.strip():
        raise PromotionError(f"{alias!r} cannot move without a reason", remedy="say why; it is kept in the log")
    return reason.strip()
