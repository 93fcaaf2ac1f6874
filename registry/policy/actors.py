"""Establishes the current actor: by an OpenID Connect token, a signed value, LORALINE_ACTOR or the operating system.

The first of these that is set counts, in this order. A token or a signed value that is not valid is an error: nothing
weaker takes its place. A server that acts for several users names the user with `acting_as`.
"""

from __future__ import annotations

import os
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path

from sqlalchemy import select
from sqlalchemy.orm import Session

from lora_engine.files import sha256_bytes
from registry.context import RegistryContext
from registry.errors import IdentityError
from registry.identity import Actor, current_user
from registry.policy.identity_policy import OidcPolicy
from registry.policy.policy_file import read_policies
from registry.store.database import insert_missing
from registry.store.tables import MetaRow

TOKEN, TOKEN_FILE, SIGNED = "LORALINE_OIDC_TOKEN", "LORALINE_OIDC_TOKEN_FILE", "LORALINE_SIGNED_ACTOR"
_HOME_ID = "home"
"""Key of the table `meta`."""
_acting: ContextVar[Actor | None] = ContextVar("acting", default=None)
_servers: list[str] = []
"""The servers of this process that act for their users only."""
_sessions: dict[str, tuple[float, Actor]] = {}
"""Digest of home, issuer's settings and token -> when this process first verified it, and its actor."""


def establish_actor(context: RegistryContext, given: str | None = None) -> Actor:
    """Returns the actor of an operation.

    Args:
        context: The registry.
        given: The actor that the caller names, which is a declared one; None means the user of this process.

    Raises:
        IdentityError: A token, a signed value or a name is not valid.
        PolicyError: The home's policy cannot be used.
    """
    if given is not None:
        return given if isinstance(given, Actor) else Actor(given)
    acting = _acting.get()
    if acting is not None:
        return acting
    if _servers:
        raise IdentityError("no user is signed in", where=_servers[-1], remedy="sign in, or send a token")
    token, value = _read_token(), os.environ.get(SIGNED, "").strip()
    if token:
        return _verify_once(context, token)
    if value:
        from registry.policy.tokens import verify_signed

        with context.lineage.database.read() as session:
            home_id = session.scalar(select(MetaRow.value).where(MetaRow.key == _HOME_ID))
        policy = read_policies(context.home.path).identity
        return verify_signed(context.home, policy, home_id or "a home without an id", value)
    return current_user()


@contextmanager
def acting_as(actor: Actor | None) -> Iterator[None]:
    """Makes an actor the user of this thread or task inside a `with` block; None changes nothing."""
    token = _acting.set(actor if actor is not None else _acting.get())
    try:
        yield
    finally:
        _acting.reset(token)


@contextmanager
def refusing_own_user(server: str) -> Iterator[None]:
    """Makes this process act for the users of `acting_as` only, never for its own, inside a `with` block.

    Args:
        server: Name of the server, for errors.
    """
    _servers.append(server)
    try:
        yield
    finally:
        _servers.remove(server)


def read_home_id(session: Session) -> str:
    """Returns the random id of a home, which signed values name; makes it on first use.

    Args:
        session: In a writing transaction.
    """
    insert_missing(session, MetaRow, [{"key": _HOME_ID, "value": str(uuid.uuid4())}])
    return session.scalars(select(MetaRow.value).where(MetaRow.key == _HOME_ID)).one()


def _read_token() -> str:
    token, path = os.environ.get(TOKEN, "").strip(), os.environ.get(TOKEN_FILE, "").strip()
    if token or not path:
        return token
    from registry.policy.tokens import MAX_TOKEN

    try:
        with Path(path).open("rb") as file:
            content = file.read(MAX_TOKEN + 2).decode("ascii").strip()
    except (OSError, ValueError) as error:
        raise IdentityError(
            f"the token cannot be read ({type(error).__name__})",
            where=f"{TOKEN_FILE}={path}",
            remedy="correct the path",
        ) from None
    if not content:
        raise IdentityError("the file is empty", where=f"{TOKEN_FILE}={path}", remedy="write the token into it")
    return content


def _verify_once(context: RegistryContext, token: str) -> Actor:
    """Verifies a token, or returns its actor if this process verified it within the session of the policy."""
    from registry.policy.tokens import verify_oidc

    policy = read_policies(context.home.path).identity.oidc
    key = sha256_bytes(f"{context.home.path}\n{_settings(policy)}\n{token}".encode(errors="replace"))
    begun, actor = _sessions.get(key, (0.0, None))
    if actor is not None and policy is not None and time.monotonic() - begun < policy.session_hours * 3600:
        return actor
    actor = verify_oidc(context.home, policy, token)
    _sessions[key] = (time.monotonic(), actor)
    return actor


def _settings(policy: OidcPolicy | None) -> str:
    return "" if policy is None else policy.model_dump_json()
