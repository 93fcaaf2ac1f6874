"""Establishes who sends a request: by a token, by the session of a browser, or, on loopback, the process's user."""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
import secrets
import threading
import time
from dataclasses import dataclass
from typing import Any

from flows.web.tokens import TokenEntry, Tokens
from registry.identity import Actor

LOCAL = "local"
"""Tenant of all requests while no tokens are used."""
COOKIE = "loraline_session"
_SESSIONS = 1_000
_HOURS = 12


@dataclass(frozen=True)
class Caller:
    """Who sends a request.

    Attributes:
        tenant: Whose jobs it sees.
        actor: The user whose roles apply in the registry; None is the process's user, only without tokens.
        session: The browser's session; empty for a token.
    """

    tenant: str
    actor: Actor | None
    session: str = ""


def caller_of(request: Any) -> Caller:
    """Returns who sends a request.

    Args:
        request: A request of Starlette, or `gradio.Request`.
    """
    inner = getattr(request, "request", request)
    caller: Caller = inner.scope["state"]["caller"]
    return caller


class Sessions:
    """The signed-in browsers, in memory: a restart signs all out.

    Args:
        tokens: The tokens; a session ends with its token.
    """

    def __init__(self, tokens: Tokens) -> None:
        self._tokens, self._lock = tokens, threading.Lock()
        self._secret = secrets.token_bytes(32)
        self._entries: dict[str, tuple[str, float]] = {}

    def open(self, entry: TokenEntry) -> str:
        """Returns the identifier of a new session for the cookie."""
        session = secrets.token_urlsafe(32)
        with self._lock:
            while len(self._entries) >= _SESSIONS:
                del self._entries[next(iter(self._entries))]
            self._entries[_hash(session)] = entry.sha256, time.monotonic() + _HOURS * 3600
        return session

    def find(self, session: str) -> TokenEntry | None:
        """Returns the token of a session that is valid now, or None."""
        with self._lock:
            digest, ends = self._entries.get(_hash(session), ("", 0.0))
        return self._tokens.find_digest(digest) if time.monotonic() < ends else None

    def close(self, session: str) -> None:
        """Ends a session."""
        with self._lock:
            self._entries.pop(_hash(session), None)

    def form_token(self, session: str) -> str:
        """Returns the token that a form of this session must send back."""
        return hmac.new(self._secret, session.encode(), hashlib.sha256).hexdigest()

    def is_form_token(self, session: str, token: str) -> bool:
        """Returns True if a form of this session sent the token."""
        return hmac.compare_digest(self.form_token(session).encode(), token.encode(errors="replace"))


def read_token(authorization: str) -> str:
    """Returns the token in a header: `Bearer TOKEN`, or the password of `Basic`; empty without one."""
    scheme, _, value = authorization.partition(" ")
    if scheme.lower() == "bearer":
        return value.strip()
    if scheme.lower() == "basic":
        try:
            return base64.b64decode(value.strip(), validate=True).decode().partition(":")[2]
        except (binascii.Error, UnicodeDecodeError):
            return ""
    return ""


def read_cookie(header: str) -> str:
    """Returns the session in a `Cookie` header; empty without one."""
    for part in header.split(";"):
        name, _, value = part.strip().partition("=")
        if name == COOKIE:
            return value
    return ""


def _hash(session: str) -> str:
    return hashlib.sha256(session.encode(errors="replace")).hexdigest()
