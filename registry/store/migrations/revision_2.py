"""Schema 2: events without an alias, subjects of three kinds, documents of versions, revocations, distributions."""

import sqlalchemy as sa
from alembic import op

revision = "2"
down_revision = "1"

_COUNT = sa.BigInteger().with_variant(sa.Integer(), "sqlite")
_INSTANT = sa.String(32).with_variant(sa.String(32, collation="C"), "postgresql")
_TEXT = sa.String().with_variant(sa.String(collation="C"), "postgresql")
_APPEND_ONLY = {
    "sqlite": (
        "CREATE TRIGGER events_no_update BEFORE UPDATE ON events "
        "BEGIN SELECT RAISE(ABORT, 'the log of events is append-only'); END",
        "CREATE TRIGGER events_no_delete BEFORE DELETE ON events "
        "BEGIN SELECT RAISE(ABORT, 'the log of events is append-only'); END",
    ),
    "postgresql": (
        "CREATE FUNCTION events_refuse() RETURNS trigger LANGUAGE plpgsql AS "
        "$$ BEGIN RAISE EXCEPTION 'the log of events is append-only'; END $$",
        "CREATE TRIGGER events_no_change BEFORE UPDATE OR DELETE OR TRUNCATE ON events "
        "FOR EACH STATEMENT EXECUTE FUNCTION events_refuse()",
    ),
}


def upgrade() -> None:
    """Adds columns and tables, and makes name and alias of an event optional."""
    op.add_column("subjects", sa.Column("kind", _TEXT, nullable=False, server_default="picture"))
    op.add_column("versions", sa.Column("state", _TEXT, nullable=False, server_default="ACTIVE"))
    op.create_table(
        "version_records",
        sa.Column("version", _COUNT, sa.ForeignKey("versions.id"), primary_key=True, autoincrement=False),
        sa.Column("kind", _TEXT, primary_key=True),
        sa.Column("artifact", _TEXT, sa.ForeignKey("artifacts.sha256"), nullable=False),
        sa.Column("created_at", _INSTANT, nullable=False),
    )
    op.create_index("ix_version_records_artifact", "version_records", ["artifact"])
    op.create_table(
        "distributions",
        sa.Column("sha256", _TEXT, primary_key=True),
        sa.Column("listed", sa.JSON, nullable=False),
    )
    op.create_index("executions_by_output", "executions", ["output", "status"])
    op.drop_index("ix_executions_output", "executions")
    _widen_events()
    op.create_table(
        "revocations",
        sa.Column("subject", _TEXT, primary_key=True),
        sa.Column("seq", _COUNT, sa.ForeignKey("events.seq"), nullable=False),
    )


def _widen_events() -> None:
    # SQLite cannot drop NOT NULL: the batch recreates the table, which loses its triggers.
    with op.batch_alter_table("events", table_kwargs={"sqlite_autoincrement": True}) as events:
        events.alter_column("name", existing_type=_TEXT, nullable=True)
        events.alter_column("alias", existing_type=_TEXT, nullable=True)
        events.add_column(sa.Column("subject", _TEXT, nullable=True))
        events.add_column(sa.Column("details", sa.JSON, nullable=False, server_default="{}"))
        events.create_index("ix_events_subject", ["subject"])
    dialect = op.get_context().dialect.name
    if dialect == "postgresql":
        op.execute("ALTER TABLE events ALTER COLUMN seq DROP DEFAULT")
        op.execute("DROP SEQUENCE IF EXISTS events_seq_seq")
    for statement in _APPEND_ONLY[dialect]:
        op.execute(statement)
