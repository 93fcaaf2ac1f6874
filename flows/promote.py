"""Promotion: gates decide, the log remembers, rollback undoes. The rules themselves are `registry.promotion`'s."""

from __future__ import annotations

import getpass
import os

from registry.entities import Event
from registry.home import Home
from registry.promotion import promote, rollback
from registry.versions import Versions


def promote_version(home: Home, ref: str, alias: str, reason: str) -> Event:
    """Points the alias at `name@version` if its gates passed and its bytes are whole.

    Raises:
        Refused: With all reasons at once.
        Conflict: Somebody else moved the alias meanwhile.
    """
    name, _, version = ref.partition("@")
    return promote(Versions(home), name, version, alias, reason=reason, actor=current_actor())


def roll_back(home: Home, name: str, alias: str, to: int | None, reason: str) -> Event:
    """Points the alias at what it pointed at before, or at a version that it once pointed at."""
    return rollback(Versions(home), name, alias, to=to, reason=reason, actor=current_actor())


def current_actor() -> str:
    """Who is acting: LORALINE_ACTOR, or the account's name."""
    try:
        return os.environ.get("LORALINE_ACTOR") or getpass.getuser()
    except (KeyError, OSError):  # an account without a name, as in some containers
        return f"uid {os.getuid()}"
