"""Promotion: gates decide, the log remembers, rollback undoes. The rules themselves are `registry.promotion`'s."""

from __future__ import annotations

import os

from registry.entities import AdapterVersion, Event
from registry.home import Home
from registry.promotion import current_actor, promote, rollback
from registry.versions import Versions


def promote_version(home: Home, ref: str, alias: str, reason: str) -> Event:
    """Points the alias at `name@version` if its gates passed and its bytes are whole.

    Raises:
        Refused: With all reasons at once.
        Conflict: Somebody else moved the alias meanwhile.
    """
    versions = Versions(home)
    version = find_version(versions, ref)
    return promote(versions, version.name, version.version, alias, reason=reason, actor=acting())


def roll_back(home: Home, name: str, alias: str, to: int | None, reason: str) -> Event:
    """Points the alias at what it pointed at before, or at a version that it once pointed at."""
    return rollback(Versions(home), name, alias, to=to, reason=reason, actor=acting())


def find_version(versions: Versions, ref: str) -> AdapterVersion:
    """The version that `name@version` or `name@alias` names; `name` alone is its latest.

    Raises:
        UnknownName: No such adapter.
        UnknownVersion: No such version or alias.
    """
    name, _, version = ref.partition("@")
    return versions.show(name, version or "latest")


def acting() -> str:
    """Who is acting, for the log: LORALINE_ACTOR, or user@host."""
    return os.environ.get("LORALINE_ACTOR") or current_actor()
