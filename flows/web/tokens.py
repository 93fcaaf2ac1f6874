"""Reads and writes the file with the tokens of a server: who they establish, never the tokens themselves.

A token has 256 random bits, so its plain SHA-256 says nothing about it.
"""

from __future__ import annotations

import hmac
import secrets
import threading
from datetime import datetime, timedelta
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from lora_engine.documents import read_document
from lora_engine.documents.yaml_text import to_yaml
from lora_engine.files import atomic_write, sha256_bytes
from registry.entities import now
from registry.identity import Actor, check_actor_name
from tasks.errors import SpecError

TENANT_RULE = "[a-z0-9][a-z0-9._-]{0,62}"
_PREFIX = "ll_"
_SHOWN = 12


class TokenEntry(BaseModel):
    """One token.

    Attributes:
        sha256: Digest of the token.
        user: The user whom it establishes.
        tenant: The tenant whose jobs it sees and whose share of the engine it uses.
        expires: Until when it is valid; None is unlimited.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    sha256: Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
    user: Annotated[str, Field(min_length=1, max_length=320)]
    tenant: Annotated[str, Field(pattern=f"^{TENANT_RULE}$")]
    expires: datetime | None = None

    @field_validator("expires")
    @classmethod
    def _require_zone(cls, value: datetime | None) -> datetime | None:
        if value is not None and value.tzinfo is None:
            raise ValueError("has no time zone; write +00:00 for UTC")
        return value

    @property
    def is_valid(self) -> bool:
        """True until it expires."""
        return self.expires is None or now() < self.expires

    @property
    def actor(self) -> Actor:
        """The user for the registry."""
        return Actor(self.user, "token", {"token": self.sha256[:_SHOWN]})


class _File(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    tokens: Annotated[tuple[TokenEntry, ...], Field(max_length=10_000)] = ()


def read_tokens(path: Path, *, optional: bool = False) -> tuple[TokenEntry, ...]:
    """Returns the tokens of a file.

    Args:
        path: The file.
        optional: True reads a missing file as empty.

    Raises:
        SpecError: It cannot be used; names file and line.
    """
    document = read_document(path, SpecError, allowed="a mapping with the key tokens", optional=optional)
    try:
        return _File.model_validate(document.data).tokens
    except ValidationError as error:
        first = error.errors(include_input=False, include_url=False)[0]
        location = ".".join(map(str, first["loc"]))
        raise SpecError(
            f"{location or 'the file'}: {first['msg']}",
            where=document.where(first["loc"]),
            remedy="correct the file, or make entries with `loraline token new`",
        ) from None


def add_token(path: Path, user: str, tenant: str, seconds: float | None) -> tuple[str, TokenEntry]:
    """Adds a token to a file, and returns it with its entry; only here is it known.

    Args:
        path: The file; created if it is missing, readable by its owner alone.
        user: The user whom it establishes.
        tenant: Its tenant.
        seconds: Its validity in seconds; None is unlimited.

    Raises:
        SpecError: The file, the user or the tenant cannot be used.
    """
    token = _PREFIX + secrets.token_urlsafe(32)
    expires = None if seconds is None else now() + timedelta(seconds=seconds)
    values = {"sha256": _digest(token), "user": check_actor_name(user, "USER"), "tenant": tenant, "expires": expires}
    entries = read_tokens(path, optional=True)
    try:
        entry = TokenEntry.model_validate(values)
    except ValidationError:
        raise SpecError(f"invalid tenant {tenant[:64]!r}", allowed=f"names that match {TENANT_RULE}") from None
    _write(path, (*entries, entry))
    return token, entry


def remove_tokens(path: Path, user: str) -> int:
    """Removes the tokens of a user from a file, and returns their number.

    Raises:
        SpecError: There is none.
    """
    entries = read_tokens(path)
    left = tuple(entry for entry in entries if entry.user != user)
    if len(left) == len(entries):
        users = ", ".join(sorted({entry.user for entry in entries})) or "none"
        raise SpecError(f"no token of {user[:64]!r}", where=str(path), allowed=users)
    _write(path, left)
    return len(entries) - len(left)


class Tokens:
    """The tokens of a server, read again when the file changes.

    Args:
        path: The file.

    Raises:
        SpecError: The file cannot be used.
    """

    def __init__(self, path: Path) -> None:
        self._path, self._lock = path, threading.Lock()
        self._state = _state(path)
        self._entries = read_tokens(path)

    def find(self, token: str) -> TokenEntry | None:
        """Returns the entry of a token that is valid now; compares in constant time."""
        return self.find_digest(_digest(token))

    def find_digest(self, digest: str) -> TokenEntry | None:
        """Returns the valid entry with a digest, or None."""
        found = None
        for entry in self._current():
            if hmac.compare_digest(entry.sha256, digest):
                found = entry
        return found if found is not None and found.is_valid else None

    def _current(self) -> tuple[TokenEntry, ...]:
        with self._lock:
            state = _state(self._path)
            if state != self._state:
                # A file that cannot be read admits nobody: it may have been changed to remove a token.
                self._entries, self._state = (), state
                self._entries = read_tokens(self._path)
            return self._entries


def _state(path: Path) -> tuple[int, int, int]:
    try:
        entry = path.stat()
    except OSError:
        return 0, 0, 0
    return entry.st_mtime_ns, entry.st_size, entry.st_ino


def _digest(token: str) -> str:
    return sha256_bytes(token.encode(errors="replace"))


def _write(path: Path, entries: tuple[TokenEntry, ...]) -> None:
    data = {"tokens": [entry.model_dump(mode="json", exclude_none=True) for entry in entries]}
    atomic_write(path, to_yaml(data).encode())
    path.chmod(0o600)
