"""Compares the version that a reference resolves to with the one that the caller reviewed."""

from __future__ import annotations

import re

from sqlalchemy.orm import Session

from registry import event_log, queries
from registry.entities import AdapterVersion
from registry.errors import Conflict, PromotionError
from registry.refs import version_number

_DIGEST = re.compile(r"[0-9a-f]{8,64}")


def require_expected(session: Session, version: AdapterVersion, ref: str | int, expect: int | str | None) -> None:
    """Raises an error if a version is not the one that the caller expects.

    Args:
        session: Reads the log, for the message.
        version: The version that `ref` is.
        ref: Number, alias or `latest`, as the caller wrote it.
        expect: Its number, or at least 8 digits of its file's sha256; None expects nothing.

    Raises:
        Conflict: It is another version; the message names both, and the event that moved the alias.
        PromotionError: `expect` is neither a number nor a digest.
    """
    if expect is None:
        return
    text = str(expect).removeprefix(f"{version.name}@").removeprefix("sha256:").lower()
    number = version_number(text) if len(text) < 8 else None
    if number is None and not _DIGEST.fullmatch(text):
        raise PromotionError(
            f"the expected version {str(expect)[:80]!r} is neither a number nor a digest",
            where=f"{version.name}@{ref}",
            allowed="a version number such as 3, or 8 to 64 digits of its sha256",
        )

    def is_expected(candidate: AdapterVersion) -> bool:
        return candidate.version == number if number is not None else candidate.sha256.startswith(text)

    if is_expected(version):
        return
    candidates = [other for other in queries.read_versions(session, version.name) if is_expected(other)]
    wanted = " or ".join(map(_identify, candidates)) or (f"version {text}" if number is not None else f"sha256 {text}")
    moves = [event for event in event_log.read_events(session, version.name, str(ref)) if event.action != "refuse"]
    since = f", since event {moves[-1].seq}: {moves[-1].action} by {moves[-1].actor}" if moves else ""
    raise Conflict(
        f"this is {_identify(version)}, not {wanted} as expected{since}",
        where=f"{version.name}@{ref}",
        remedy=f"review {version.ref}, or name the expected version by its number",
    )


def _identify(version: AdapterVersion) -> str:
    return f"{version.ref} (sha256 {version.sha256[:16]})"
