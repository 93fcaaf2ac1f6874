"""Schema 3: the events of the log are a hash chain."""

import json
from datetime import UTC, datetime

import sqlalchemy as sa
from alembic import op

from registry.identity import current_user
from registry.store.chain import FIELDS, FIRST, digest_of

revision = "3"
down_revision = "2"

_TEXT = sa.String().with_variant(sa.String(collation="C"), "postgresql")
_EVENTS = sa.table("events", *map(sa.column, ("seq", "previous", "digest", *FIELDS)))
_UNGUARD = {
    "sqlite": ("DROP TRIGGER events_no_update",),
    "postgresql": ("DROP TRIGGER events_no_change ON events",),
}
_GUARD = {
    "sqlite": (
        "CREATE TRIGGER events_no_update BEFORE UPDATE ON events "
        "BEGIN SELECT RAISE(ABORT, 'the log of events is append-only'); END",
    ),
    "postgresql": (
        "CREATE TRIGGER events_no_change BEFORE UPDATE OR DELETE OR TRUNCATE ON events "
        "FOR EACH STATEMENT EXECUTE FUNCTION events_refuse()",
    ),
}


def upgrade() -> None:
    """Adds the digests, links the existing events, and logs that their links were made afterwards."""
    dialect = op.get_context().dialect.name
    for name in ("previous", "digest"):
        op.add_column("events", sa.Column(name, _TEXT, nullable=False, server_default=""))
    for statement in _UNGUARD[dialect]:
        op.execute(statement)
    _link_events()
    for statement in _GUARD[dialect]:
        op.execute(statement)


def _link_events() -> None:
    connection, last, links = op.get_bind(), FIRST, []
    columns = [_EVENTS.c[name] for name in FIELDS]
    values = [sa.cast(column, sa.String) if column.name in ("gates", "details") else column for column in columns]
    for seq, *stored in connection.execute(sa.select(_EVENTS.c.seq, *values).order_by(_EVENTS.c.seq)):
        digest = digest_of(last, stored)
        links.append({"number": seq, "last": last, "own": digest})
        last = digest
    if not links:
        return
    change = sa.update(_EVENTS).where(_EVENTS.c.seq == sa.bindparam("number"))
    connection.execute(change.values(previous=sa.bindparam("last"), digest=sa.bindparam("own")), links)
    number = links[-1]["number"]
    event = dict.fromkeys(FIELDS) | {
        "action": "link",
        "actor": current_user(),
        "reason": f"linked the events up to {number}, which earlier releases wrote without links",
        "gates": "[]",
        "at": datetime.now(UTC).isoformat(timespec="microseconds"),
        "details": json.dumps({"linked": number}, separators=(",", ":")),
    }
    link = {"seq": number + 1, "previous": last, "digest": digest_of(last, [event[name] for name in FIELDS])}
    if connection.dialect.name == "postgresql":
        event |= {name: sa.cast(sa.literal(event[name], sa.String), sa.JSON) for name in ("gates", "details")}
    connection.execute(sa.insert(_EVENTS).values({**event, **link}))
