"""Declares the tables of the registry's database at the current schema; `migrations` holds the earlier schemas.

Portable SQL: where SQLite and PostgreSQL differ, the type or the statement has a variant per dialect.
"""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any, cast

from sqlalchemy import (
    DDL,
    JSON,
    BigInteger,
    Dialect,
    ForeignKey,
    Index,
    Integer,
    String,
    UniqueConstraint,
    event,
    literal_column,
)
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column
from sqlalchemy.types import TypeDecorator

from registry.store.damaged import broken

SCHEMA = 4
"""The version of the schema that this release reads and writes."""

NAMESPACE = "loraline_registry"
"""The PostgreSQL schema of the tables. Not `loraline`: PostgreSQL's default search path starts with the schema that is
named like the database user, so other programs of a user `loraline` would find our tables first."""

COUNT = BigInteger().with_variant(Integer(), "sqlite")
"""Sizes and seeds exceed 32 bits; SQLite's integers have 64 bits under either name."""

TEXT = String().with_variant(String(collation="C"), "postgresql")
"""Text that sorts by bytes on both databases, as in Python; range queries find prefixes."""


class Instant(TypeDecorator[datetime]):
    """A time as fixed-width ISO 8601 text in UTC, which sorts by time on both databases."""

    impl = String(32).with_variant(String(32, collation="C"), "postgresql")
    cache_ok = True

    def process_bind_param(self, value: datetime | None, dialect: Dialect) -> str | None:
        """Returns the text of a time."""
        return None if value is None else value.astimezone(UTC).isoformat(timespec="microseconds")

    def process_result_value(self, value: str | None, dialect: Dialect) -> datetime | None:
        """Returns the time of a text, or a placeholder of a damaged one."""
        if value is None:
            return None
        try:
            time = datetime.fromisoformat(value)
        except (ValueError, TypeError):
            return cast("datetime", broken(value, "is no time"))
        return time if time.tzinfo is not None else cast("datetime", broken(value, "is no time"))


class Table(DeclarativeBase):
    """Base of all tables."""

    type_annotation_map = {  # noqa: RUF012
        dict[str, Any]: JSON,
        list[Any]: JSON,
        datetime: Instant,
        int: COUNT,
        str: TEXT,
    }


class MetaRow(Table):
    """Metadata of the database itself: schema number, sync state."""

    __tablename__ = "meta"
    key: Mapped[str] = mapped_column(primary_key=True)
    value: Mapped[str]


class ArtifactRow(Table):
    """An artifact that a step read or wrote."""

    __tablename__ = "artifacts"
    sha256: Mapped[str] = mapped_column(primary_key=True)
    kind: Mapped[str]
    size: Mapped[int]


class ContentRow(Table):
    """A file of an artifact; queried in both directions."""

    __tablename__ = "contents"
    artifact: Mapped[str] = mapped_column(ForeignKey("artifacts.sha256"), primary_key=True)
    path: Mapped[str] = mapped_column(primary_key=True)
    sha256: Mapped[str] = mapped_column(index=True)
    size: Mapped[int]


class SubjectRow(Table):
    """An image, a caption or a consent that an artifact contains or was made from."""

    __tablename__ = "subjects"
    artifact: Mapped[str] = mapped_column(ForeignKey("artifacts.sha256"), primary_key=True)
    subject: Mapped[str] = mapped_column(primary_key=True, index=True)
    label: Mapped[str]
    kind: Mapped[str] = mapped_column(primary_key=True)


class ContentDigestRow(Table):
    """What the adapters in an artifact do, whatever their format; `digest` is empty if none can be read."""

    __tablename__ = "content_digests"
    artifact: Mapped[str] = mapped_column(ForeignKey("artifacts.sha256"), primary_key=True)
    digest: Mapped[str] = mapped_column(primary_key=True, index=True)
    kind: Mapped[str]
    sketch: Mapped[str | None]


class RunRow(Table):
    """A run of a pipeline."""

    __tablename__ = "runs"
    id: Mapped[str] = mapped_column(primary_key=True)
    name: Mapped[str]
    spec: Mapped[dict[str, Any]]
    status: Mapped[str] = mapped_column(index=True)
    pid: Mapped[int]
    host: Mapped[str]
    process: Mapped[str]
    started_at: Mapped[datetime]
    ended_at: Mapped[datetime | None]
    mlflow_run_id: Mapped[str | None]


class DistributionsRow(Table):
    """The list of packages installed where steps ran; stored once, referenced by executions' environments."""

    __tablename__ = "distributions"
    sha256: Mapped[str] = mapped_column(primary_key=True)
    listed: Mapped[list[Any]]


class ExecutionRow(Table):
    """A step of a run."""

    __tablename__ = "executions"
    __table_args__ = (
        Index("executions_by_key", "key", "status", "started_at"),
        Index("executions_by_output", "output", "status"),
    )
    id: Mapped[str] = mapped_column(primary_key=True)
    run_id: Mapped[str] = mapped_column(ForeignKey("runs.id"), index=True)
    step: Mapped[str]
    uses: Mapped[str]
    revision: Mapped[str]
    key: Mapped[str]
    settings: Mapped[dict[str, Any]]
    output: Mapped[str | None] = mapped_column(ForeignKey("artifacts.sha256"))
    status: Mapped[str]
    environment: Mapped[dict[str, Any]]
    seed: Mapped[int | None]
    started_at: Mapped[datetime]
    ended_at: Mapped[datetime | None]
    error: Mapped[str | None]


class InputRow(Table):
    """An artifact that an execution read."""

    __tablename__ = "execution_inputs"
    execution: Mapped[str] = mapped_column(ForeignKey("executions.id"), primary_key=True)
    role: Mapped[str] = mapped_column(primary_key=True)
    artifact: Mapped[str] = mapped_column(ForeignKey("artifacts.sha256"), index=True)
    position: Mapped[int]


class NameRow(Table):
    """A name with its own version numbers; locking this row makes the next number unique."""

    __tablename__ = "names"
    name: Mapped[str] = mapped_column(primary_key=True)
    created_at: Mapped[datetime]


class VersionRow(Table):
    """A registered adapter."""

    __tablename__ = "versions"
    __table_args__ = (UniqueConstraint("name", "version"), UniqueConstraint("name", "identity"))
    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str] = mapped_column(ForeignKey("names.name"))
    version: Mapped[int]
    identity: Mapped[str]
    sha256: Mapped[str] = mapped_column(index=True)
    size: Mapped[int]
    artifact: Mapped[str] = mapped_column(ForeignKey("artifacts.sha256"), index=True)
    adapter_path: Mapped[str]
    report: Mapped[str | None] = mapped_column(ForeignKey("artifacts.sha256"), index=True)
    metadata_artifact: Mapped[str] = mapped_column("record", ForeignKey("artifacts.sha256"))
    created_at: Mapped[datetime]
    run_id: Mapped[str | None] = mapped_column(ForeignKey("runs.id"))
    mlflow_run_id: Mapped[str | None]
    mirrored: Mapped[bool] = mapped_column(index=True)
    card: Mapped[dict[str, Any]]
    metrics: Mapped[dict[str, Any]]
    gates: Mapped[list[Any]]
    passed: Mapped[bool | None]
    params: Mapped[dict[str, Any]]
    state: Mapped[str] = mapped_column(server_default="ACTIVE")


class DocumentRow(Table):
    """A document of a version: model card, provenance, bill of materials or signature."""

    __tablename__ = "version_records"
    version: Mapped[int] = mapped_column(ForeignKey("versions.id"), primary_key=True)
    kind: Mapped[str] = mapped_column(primary_key=True)
    artifact: Mapped[str] = mapped_column(ForeignKey("artifacts.sha256"), index=True)
    created_at: Mapped[datetime]


class ParentRow(Table):
    """A parent of a version: another version, or an origin in free text."""

    __tablename__ = "version_parents"
    child: Mapped[int] = mapped_column(ForeignKey("versions.id"), primary_key=True)
    position: Mapped[int] = mapped_column(primary_key=True)
    parent: Mapped[int | None] = mapped_column(ForeignKey("versions.id"), index=True)
    text: Mapped[str] = mapped_column(index=True)


_NEXT_EVENT = literal_column("(SELECT coalesce(max(seq), 0) + 1 FROM events)", COUNT)


class EventRow(Table):
    """An entry of the append-only log: an event of an alias, a version or a subject. `registry.store.chain` adds it."""

    __tablename__ = "events"
    __table_args__ = (Index("events_by_alias", "name", "alias"), {"sqlite_autoincrement": True})
    # Without a default, PostgreSQL would have a sequence for it, which leaves gaps.
    seq: Mapped[int] = mapped_column(primary_key=True, default=_NEXT_EVENT)
    name: Mapped[str | None] = mapped_column(ForeignKey("names.name"))
    alias: Mapped[str | None]
    action: Mapped[str]
    before: Mapped[int | None]
    after: Mapped[int | None]
    actor: Mapped[str]
    reason: Mapped[str]
    gates: Mapped[list[Any]]
    at: Mapped[datetime]
    subject: Mapped[str | None] = mapped_column(index=True)
    details: Mapped[dict[str, Any]] = mapped_column(server_default="{}")
    previous: Mapped[str] = mapped_column(server_default="")
    digest: Mapped[str] = mapped_column(server_default="")


class RevocationRow(Table):
    """What is revoked: an image, a consent, a version, content or a base; a projection of the events."""

    __tablename__ = "revocations"
    kind: Mapped[str] = mapped_column(primary_key=True)
    subject: Mapped[str] = mapped_column(primary_key=True)
    seq: Mapped[int] = mapped_column(ForeignKey("events.seq"))


class AliasRow(Table):
    """The current target of an alias; a projection of the events."""

    __tablename__ = "aliases"
    name: Mapped[str] = mapped_column(ForeignKey("names.name"), primary_key=True)
    alias: Mapped[str] = mapped_column(primary_key=True)
    version: Mapped[int | None]
    seq: Mapped[int] = mapped_column(ForeignKey("events.seq"))
    mirrored_seq: Mapped[int]


_APPEND_ONLY = {
    "sqlite": [
        f"CREATE TRIGGER events_no_{verb.lower()} BEFORE {verb} ON events "
        f"BEGIN SELECT RAISE(ABORT, 'the log of events is append-only'); END"
        for verb in ("UPDATE", "DELETE")
    ],
    "postgresql": [
        "CREATE FUNCTION events_refuse() RETURNS trigger LANGUAGE plpgsql AS "
        "$$ BEGIN RAISE EXCEPTION 'the log of events is append-only'; END $$",
        "CREATE TRIGGER events_no_change BEFORE UPDATE OR DELETE OR TRUNCATE ON events "
        "FOR EACH STATEMENT EXECUTE FUNCTION events_refuse()",
    ],
}
for _dialect, _statements in _APPEND_ONLY.items():
    for _statement in _statements:
        event.listen(
            EventRow.__table__,
            "after_create",
            DDL(_statement).execute_if(dialect=_dialect),  # type: ignore[no-untyped-call]
        )
