"""Identifies the current user, whom the event log records as `actor`, and the version of this program.

`registry.policy.actors` also verifies tokens and signed values, by the policy of a home.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from typing import Any, Literal, Self

from registry.errors import IdentityError

ActorSource = Literal["declared", "os", "oidc", "signed", "token"]
"""How an actor was established: by LORALINE_ACTOR or the caller's word, by the operating system, by an OpenID Connect
token, by a value that a trusted key signed, or by a token of `loraline serve`."""

LONGEST_NAME = 320
"""Characters of the longest name of an actor: that of the longest mail address."""


class Actor(str):
    """The name of a user, with how it was established.

    Attributes:
        established: How it was established.
        facts: What established it, as JSON values: issuer, subject and id of a token, or the signing key. No secrets.
    """

    __slots__ = ("established", "facts")

    established: ActorSource
    facts: Mapping[str, Any]

    def __new__(cls, name: str, established: ActorSource = "declared", facts: Mapping[str, Any] | None = None) -> Self:
        """Returns the actor."""
        actor = super().__new__(cls, name)
        actor.established, actor.facts = established, dict(facts or {})
        return actor

    def record(self) -> dict[str, Any]:
        """Returns what an event records beside the name."""
        return {"established": self.established, **self.facts}


def check_actor_name(name: str, where: str) -> str:
    """Returns the name of an actor unchanged.

    Args:
        name: The name.
        where: The variable or claim that it is from.

    Raises:
        IdentityError: It is empty, longer than `LONGEST_NAME`, or has a character that cannot be printed.
    """
    if not name.strip() or len(name) > LONGEST_NAME or not name.isprintable():
        raise IdentityError(
            f"invalid name of a user {name[:64]!r}",
            where=where,
            allowed=f"1 to {LONGEST_NAME} printable characters",
            remedy=f"correct {where}",
        )
    return name


def os_user() -> Actor:
    """Returns `user@host` by the operating system: the name of the process's user id, not that of a variable."""
    return Actor(f"{_user_name()}@{socket.gethostname()}", "os")


def current_user() -> Actor:
    """Returns LORALINE_ACTOR, or `user@host` of this process.

    Raises:
        IdentityError: The name in LORALINE_ACTOR is not valid.
    """
    declared = os.environ.get("LORALINE_ACTOR")
    return Actor(check_actor_name(declared, "LORALINE_ACTOR")) if declared else os_user()


def program_version() -> str:
    """Returns the version of this program; `unknown` if it is not installed."""
    try:
        return version("loraline")
    except PackageNotFoundError:
        return "unknown"


def _user_name() -> str:
    try:
        import pwd
    except ImportError:  # Windows
        return os.getlogin()
    # Not getpass.getuser: it trusts LOGNAME, USER and other variables, which anyone can set.
    try:
        return pwd.getpwuid(os.getuid()).pw_name
    except KeyError:
        return f"uid-{os.getuid()}"
