"""Links the events of the log into a hash chain, and finds where the chain is broken.

Each row has the digest of the row before it (`previous`) and its own (`digest`): the SHA-256 of a compact ASCII JSON
array of `previous` and the stored values of `FIELDS`. JSON columns enter as their stored text, so both databases give
the same digests. This form never changes: a revision in `migrations` links the rows of earlier releases with it. For
that reason, this module does not import `registry.store.tables`.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from sqlalchemy import JSON, FromClause, String, cast, select, type_coerce
from sqlalchemy.orm import Session
from sqlalchemy.types import NullType

from lora_engine.files import canonical_json, sha256_bytes
from registry.entities import is_digest
from registry.errors import LineageError

if TYPE_CHECKING:
    from registry.store.tables import EventRow

FIRST = "0" * 64
"""The digest before that of the first event."""
FIELDS = ("name", "alias", "action", "before", "after", "actor", "reason", "gates", "at", "subject", "details")
"""Columns that a digest covers; `seq` is the position in the chain."""


@dataclass(frozen=True)
class Link:
    """A row of the log as the database has it.

    Args:
        seq: Its number.
        previous: The stored digest of the event before it.
        digest: Its stored digest.
        actual: The digest of its content.
    """

    seq: int
    previous: Any
    digest: Any
    actual: str


@dataclass(frozen=True)
class Head:
    """The newest event of a log at some time; it shows later that the log up to it was changed.

    Args:
        seq: Number of the event.
        digest: Its digest.
    """

    seq: int
    digest: str

    def __str__(self) -> str:
        return f"{self.seq}:{self.digest}"

    @classmethod
    def parse(cls, text: str) -> Head:
        """Returns the head that `str` wrote.

        Raises:
            LineageError: The text is none.
        """
        seq, _, digest = text.partition(":")
        if not (seq.isascii() and seq.isdecimal() and len(seq) < 19 and is_digest(digest)):
            raise LineageError(f"{text[:90]!r} is no head of a log", allowed="NUMBER:SHA256, as `log --head` prints it")
        return cls(int(seq), digest)


@dataclass(frozen=True)
class Break:
    """A place at which the chain does not hold.

    Args:
        seq: Number of the event.
        problem: What is wrong with it.
    """

    seq: int
    problem: str


def digest_of(previous: Any, values: Sequence[Any]) -> str:
    """Returns the digest of an event.

    Args:
        previous: Digest of the event before it.
        values: The stored values of `FIELDS`: text, integers and None. Damaged rows may have others.
    """
    content = json.dumps([previous, *values], separators=(",", ":"), default=_show_damaged)
    return sha256_bytes(content.encode("ascii"))


def append_event(session: Session, row: EventRow) -> EventRow:
    """Appends an event to the log under the next number, linked to the event before it.

    Args:
        session: In a writing transaction, which is the only one: no other event can get the same number.
        row: The new row, without number and digests.
    """
    events: Any = type(row).__table__
    last = session.execute(select(events.c.seq, events.c.digest).order_by(events.c.seq.desc()).limit(1)).first()
    row.seq = last.seq + 1 if last else 1
    # A damaged digest stops no verb; `fsck` names it.
    row.previous = last.digest if last and isinstance(last.digest, str) and is_digest(last.digest) else FIRST
    row.digest = digest_of(row.previous, [_to_stored(session, row, events.c[name]) for name in FIELDS])
    session.add(row)
    session.flush()
    return row


def read_links(session: Session, events: FromClause) -> list[Link]:
    """Returns all links of the log, by number, with the digests of their content."""
    columns = [stored(events.c[name]) for name in ("seq", "previous", "digest", *FIELDS)]
    rows = session.execute(select(*columns).order_by(events.c.seq))
    return [Link(seq, previous, digest, digest_of(previous, values)) for seq, previous, digest, *values in rows]


def read_head(session: Session, events: FromClause) -> Head | None:
    """Returns the newest event; None if the log is empty."""
    row = session.execute(select(events.c.seq, events.c.digest).order_by(events.c.seq.desc()).limit(1)).first()
    return Head(row.seq, str(row.digest)) if row else None


def read_origin(session: Session, events: FromClause) -> str:
    """Returns the digest of the first event, which identifies a log and its copies; empty if the log is empty."""
    digest = session.scalar(select(events.c.digest).order_by(events.c.seq).limit(1))
    return digest if isinstance(digest, str) else ""


def find_breaks(links: Sequence[Link]) -> Iterator[Break]:
    """Yields every event that was changed, inserted or moved, or before which events are missing; in order."""
    places = {link.digest: link.seq for link in links if isinstance(link.digest, str)}
    last, position = FIRST, 1
    for link in links:
        if link.seq != position:
            missing = f"event {position} is" if link.seq == position + 1 else f"events {position} to {link.seq - 1} are"
            yield Break(link.seq, f"{missing} missing from the log" if link.seq > position else "it has no place")
        if link.actual != link.digest:
            yield Break(link.seq, "it was changed: its content does not have its digest")
        elif link.previous != last and link.seq == position:
            yield Break(link.seq, _describe(link, places))
        last, position = link.digest, link.seq + 1


def holds(links: Sequence[Link], head: Head) -> bool:
    """Returns True if a log has the event that was its newest one at some time."""
    return any(link.seq == head.seq and link.digest == head.digest for link in links)


def stored(column: Any) -> Any:
    """Returns an expression for the value of a column as it is stored."""
    return cast(column, String) if isinstance(column.type, JSON) else type_coerce(column, NullType())


def _describe(link: Link, places: dict[str, int]) -> str:
    before = places.get(link.previous, 0) if isinstance(link.previous, str) else 0
    if before >= link.seq or (before and before < link.seq - 2):
        return f"it was moved: it was written directly after event {before}"
    if before == link.seq - 2 and before:
        return f"event {link.seq - 1} was inserted: this event was written directly after event {before}"
    if link.previous == FIRST:
        return f"the event before it, {link.seq - 1}, was inserted: this one was the first"
    return f"the event before it, {link.seq - 1}, was replaced with its digest, or events between them were removed"


def _to_stored(session: Session, row: EventRow, column: Any) -> Any:
    value = getattr(row, column.name)
    if isinstance(column.type, JSON):
        return canonical_json(value).decode()
    convert = column.type.dialect_impl(session.connection().dialect).bind_processor(session.connection().dialect)
    return convert(value) if convert else value


def _show_damaged(value: Any) -> str:
    return f"damaged: {value!r}"
