"""The tables of the registry's own database. Portable SQL; what only SQLite understands is guarded by its dialect."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

from sqlalchemy import DDL, JSON, Dialect, ForeignKey, Index, String, UniqueConstraint, event
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column
from sqlalchemy.types import TypeDecorator

SCHEMA = 2
"""The version of the schema that this release reads and writes."""


class Instant(TypeDecorator[datetime]):
    """An instant as fixed-width ISO 8601 text in UTC, which sorts as time does on every database."""

    impl = String(32)
    cache_ok = True

    def process_bind_param(self, value: datetime | None, dialect: Dialect) -> str | None:
        """The text of an instant."""
        return None if value is None else value.astimezone(UTC).isoformat(timespec="microseconds")

    def process_result_value(self, value: str | None, dialect: Dialect) -> datetime | None:
        """The instant of a text."""
        return None if value is None else datetime.fromisoformat(value)


class Table(DeclarativeBase):
    """Base of all tables."""

    type_annotation_map = {dict[str, Any]: JSON, list[Any]: JSON, datetime: Instant}  # noqa: RUF012


class MetaRow(Table):
    """What the database says of itself."""

    __tablename__ = "meta"
    key: Mapped[str] = mapped_column(primary_key=True)
    value: Mapped[str]


class ArtifactRow(Table):
    """An artifact that some step read or made."""

    __tablename__ = "artifacts"
    sha256: Mapped[str] = mapped_column(primary_key=True)
    kind: Mapped[str]
    size: Mapped[int]


class ContentRow(Table):
    """A file of an artifact; walked both ways."""

    __tablename__ = "contents"
    artifact: Mapped[str] = mapped_column(ForeignKey("artifacts.sha256"), primary_key=True)
    path: Mapped[str] = mapped_column(primary_key=True)
    sha256: Mapped[str] = mapped_column(index=True)
    size: Mapped[int]


class SubjectRow(Table):
    """Something of the outer world that an artifact holds or was made from: a picture, a caption, a consent."""

    __tablename__ = "subjects"
    artifact: Mapped[str] = mapped_column(ForeignKey("artifacts.sha256"), primary_key=True)
    subject: Mapped[str] = mapped_column(primary_key=True, index=True)
    label: Mapped[str]
    kind: Mapped[str] = mapped_column(server_default="picture")


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


class ExecutionRow(Table):
    """A step of a run."""

    __tablename__ = "executions"
    __table_args__ = (Index("executions_by_key", "key", "status", "started_at"),)
    id: Mapped[str] = mapped_column(primary_key=True)
    run_id: Mapped[str] = mapped_column(ForeignKey("runs.id"), index=True)
    step: Mapped[str]
    uses: Mapped[str]
    revision: Mapped[str]
    key: Mapped[str]
    settings: Mapped[dict[str, Any]]
    output: Mapped[str | None] = mapped_column(ForeignKey("artifacts.sha256"), index=True)
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
    """A name that versions are counted under; locking this row makes the count safe."""

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
    record: Mapped[str] = mapped_column(ForeignKey("artifacts.sha256"))
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


class RecordRow(Table):
    """A document that was written about a version: its model card, provenance, bill of materials or signature."""

    __tablename__ = "version_records"
    version: Mapped[int] = mapped_column(ForeignKey("versions.id"), primary_key=True)
    kind: Mapped[str] = mapped_column(primary_key=True)
    artifact: Mapped[str] = mapped_column(ForeignKey("artifacts.sha256"), index=True)
    created_at: Mapped[datetime]


class ParentRow(Table):
    """Where a version comes from: another version, or an origin named in free text."""

    __tablename__ = "version_parents"
    child: Mapped[int] = mapped_column(ForeignKey("versions.id"), primary_key=True)
    position: Mapped[int] = mapped_column(primary_key=True)
    parent: Mapped[int | None] = mapped_column(ForeignKey("versions.id"), index=True)
    text: Mapped[str] = mapped_column(index=True)


class EventRow(Table):
    """The append-only log: of aliases, and of all else that somebody decided about a version or a subject."""

    __tablename__ = "events"
    __table_args__ = (Index("events_by_alias", "name", "alias"), {"sqlite_autoincrement": True})
    seq: Mapped[int] = mapped_column(primary_key=True, autoincrement=True)
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


class RevocationRow(Table):
    """A picture or a consent that may not be used any more; always the replay of the events."""

    __tablename__ = "revocations"
    subject: Mapped[str] = mapped_column(primary_key=True)
    seq: Mapped[int] = mapped_column(ForeignKey("events.seq"))


class AliasRow(Table):
    """What an alias points at now; always the replay of the events."""

    __tablename__ = "aliases"
    name: Mapped[str] = mapped_column(ForeignKey("names.name"), primary_key=True)
    alias: Mapped[str] = mapped_column(primary_key=True)
    version: Mapped[int | None]
    seq: Mapped[int] = mapped_column(ForeignKey("events.seq"))
    mirrored_seq: Mapped[int]


for _verb in ("UPDATE", "DELETE"):
    event.listen(
        EventRow.__table__,
        "after_create",
        DDL(  # type: ignore[no-untyped-call]
            f"CREATE TRIGGER events_no_{_verb.lower()} BEFORE {_verb} ON events "
            f"BEGIN SELECT RAISE(ABORT, 'the log of events is append-only'); END"
        ).execute_if(dialect="sqlite"),
    )
