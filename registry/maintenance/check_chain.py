"""Checks that the log of events is as it was written, by its hash chain. Part of `registry.maintenance.fsck`.

A chain shows any change that does not compute it anew. Events that were removed from the end of the log, and a
chain that was computed anew, are found by a head that is known outside of the database: from a backup, a signature, or
the user.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

from sqlalchemy import select, text
from sqlalchemy.orm import Session

from registry.entities import Problem
from registry.store.chain import Head, Link, find_breaks, holds, read_links
from registry.store.tables import EventRow

EVENTS: Any = EventRow.__table__
_REMEDY = "find out who changed the log, and restore the database from a backup; `--repair` does not change the log"
_CLOCK = timedelta(hours=1)
"""Difference of two events' times that is no adjustment of the clock."""
_MINUTE = "%Y-%m-%d %H:%M"


@dataclass(frozen=True)
class KnownHead:
    """A head of the log that is known outside of the log.

    Args:
        head: The head.
        origin: Where it is known from.
    """

    head: Head
    origin: str


def check_chain(session: Session, heads: Iterable[KnownHead] = ()) -> Iterator[Problem]:
    """Checks the chain of events, their times, and that the log has every known head.

    Args:
        session: A session.
        heads: Heads that are known outside of the log.
    """
    links = read_links(session, EVENTS)
    breaks = list(find_breaks(links))
    if breaks:
        more = f" ({len(breaks) - 1} more events after it do not fit)" if len(breaks) > 1 else ""
        yield Problem(f"the log was changed at event {breaks[0].seq}: {breaks[0].problem}{more}", "events", _REMEDY)
    last, written = links[-1].seq if links else 0, _count_written(session)
    if written > last:
        yield Problem(
            f"the log was shortened: it ends with event {last}, but event {written} was written", "events", _REMEDY
        )
    yield from check_heads(links, heads)
    yield from _check_times(session)


def check_heads(links: list[Link], heads: Iterable[KnownHead]) -> Iterator[Problem]:
    """Checks that a log has the events that were its newest ones at earlier times."""
    for known in heads:
        if not holds(links, known.head):
            problem = f"the log was shortened or written anew: it does not have event {known.head}"
            yield Problem(problem, known.origin, _REMEDY)


def is_intact(session: Session) -> bool:
    """Returns True if the chain of events has no break."""
    return next(find_breaks(read_links(session, EVENTS)), None) is None


def _count_written(session: Session) -> int:
    """Returns the largest number that SQLite ever gave to an event, which outlives the row; 0 if it is unknown."""
    if session.connection().dialect.name != "sqlite":
        return 0
    value = session.scalar(text("SELECT seq FROM sqlite_sequence WHERE name = 'events'"))
    return value if isinstance(value, int) else 0


def _check_times(session: Session) -> Iterator[Problem]:
    last: tuple[int, datetime] | None = None
    for seq, at in session.execute(select(EventRow.seq, EventRow.at).order_by(EventRow.seq)):
        if not isinstance(at, datetime):
            continue  # `check_cells` names it
        if last and at < last[1] - _CLOCK:
            problem = f"the clock went back: event {seq} is of {at:{_MINUTE}}, event {last[0]} of {last[1]:{_MINUTE}}"
            remedy = "set the clock; the log is ordered by number, and consents are judged by the later time"
            yield Problem(problem, f"event {seq}", remedy, "warning")
        last = (seq, at)
