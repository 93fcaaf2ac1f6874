"""Schema 1: runs, executions and artifacts; versions, aliases and events."""

import sqlalchemy as sa
from alembic import op

revision = "1"
down_revision = None

_COUNT = sa.BigInteger().with_variant(sa.Integer(), "sqlite")
_INSTANT = sa.String(32).with_variant(sa.String(32, collation="C"), "postgresql")
_TEXT = sa.String().with_variant(sa.String(collation="C"), "postgresql")


def upgrade() -> None:
    """Creates every table."""
    _make_artifacts()
    _make_executions()
    _make_versions()
    _make_events()


def _make_artifacts() -> None:
    op.create_table("meta", _key("key"), _text("value"))
    op.create_table("artifacts", _key("sha256"), _text("kind"), _count("size"))
    op.create_table(
        "contents",
        _key("artifact", "artifacts.sha256"),
        _key("path"),
        _text("sha256"),
        _count("size"),
    )
    op.create_index("ix_contents_sha256", "contents", ["sha256"])
    op.create_table("subjects", _key("artifact", "artifacts.sha256"), _key("subject"), _text("label"))
    op.create_index("ix_subjects_subject", "subjects", ["subject"])


def _make_executions() -> None:
    op.create_table(
        "runs",
        _key("id"),
        _text("name"),
        _json("spec"),
        _text("status"),
        _count("pid"),
        _text("host"),
        _text("process"),
        _instant("started_at"),
        _instant("ended_at", nullable=True),
        _text("mlflow_run_id", nullable=True),
    )
    op.create_index("ix_runs_status", "runs", ["status"])
    op.create_table(
        "executions",
        _key("id"),
        _text("run_id", "runs.id"),
        _text("step"),
        _text("uses"),
        _text("revision"),
        _text("key"),
        _json("settings"),
        _text("output", "artifacts.sha256", nullable=True),
        _text("status"),
        _json("environment"),
        _count("seed", nullable=True),
        _instant("started_at"),
        _instant("ended_at", nullable=True),
        _text("error", nullable=True),
    )
    op.create_index("executions_by_key", "executions", ["key", "status", "started_at"])
    op.create_index("ix_executions_output", "executions", ["output"])
    op.create_index("ix_executions_run_id", "executions", ["run_id"])
    op.create_table(
        "execution_inputs",
        _key("execution", "executions.id"),
        _key("role"),
        _text("artifact", "artifacts.sha256"),
        _count("position"),
    )
    op.create_index("ix_execution_inputs_artifact", "execution_inputs", ["artifact"])


def _make_versions() -> None:
    op.create_table("names", _key("name"), _instant("created_at"))
    op.create_table(
        "versions",
        sa.Column("id", _COUNT, primary_key=True),
        _text("name", "names.name"),
        _count("version"),
        _text("identity"),
        _text("sha256"),
        _count("size"),
        _text("artifact", "artifacts.sha256"),
        _text("adapter_path"),
        _text("report", "artifacts.sha256", nullable=True),
        _text("record", "artifacts.sha256"),
        _instant("created_at"),
        _text("run_id", "runs.id", nullable=True),
        _text("mlflow_run_id", nullable=True),
        sa.Column("mirrored", sa.Boolean, nullable=False),
        _json("card"),
        _json("metrics"),
        _json("gates"),
        sa.Column("passed", sa.Boolean, nullable=True),
        _json("params"),
        sa.UniqueConstraint("name", "version"),
        sa.UniqueConstraint("name", "identity"),
    )
    for column in ("artifact", "report", "mirrored", "sha256"):
        op.create_index(f"ix_versions_{column}", "versions", [column])
    op.create_table(
        "version_parents",
        _number("child", "versions.id"),
        _number("position"),
        sa.Column("parent", _COUNT, sa.ForeignKey("versions.id"), nullable=True),
        _text("text"),
    )
    for column in ("parent", "text"):
        op.create_index(f"ix_version_parents_{column}", "version_parents", [column])


def _make_events() -> None:
    op.create_table(
        "events",
        sa.Column("seq", _COUNT, primary_key=True),
        _text("name", "names.name"),
        _text("alias"),
        _text("action"),
        _count("before", nullable=True),
        _count("after", nullable=True),
        _text("actor"),
        _text("reason"),
        _json("gates"),
        _instant("at"),
        sqlite_autoincrement=True,
    )
    op.create_index("events_by_alias", "events", ["name", "alias"])
    if op.get_context().dialect.name == "sqlite":
        for verb in ("UPDATE", "DELETE"):
            op.execute(
                f"CREATE TRIGGER events_no_{verb.lower()} BEFORE {verb} ON events "
                f"BEGIN SELECT RAISE(ABORT, 'the log of events is append-only'); END"
            )
    op.create_table(
        "aliases",
        _key("name", "names.name"),
        _key("alias"),
        _count("version", nullable=True),
        sa.Column("seq", _COUNT, sa.ForeignKey("events.seq"), nullable=False),
        _count("mirrored_seq"),
    )


def _key(name: str, refers: str = "") -> sa.Column[str]:
    return sa.Column(name, _TEXT, *([sa.ForeignKey(refers)] if refers else []), primary_key=True)


def _number(name: str, refers: str = "") -> sa.Column[int]:
    keys = [sa.ForeignKey(refers)] if refers else []
    return sa.Column(name, _COUNT, *keys, primary_key=True, autoincrement=False)


def _text(name: str, refers: str = "", *, nullable: bool = False) -> sa.Column[str]:
    return sa.Column(name, _TEXT, *([sa.ForeignKey(refers)] if refers else []), nullable=nullable)


def _count(name: str, *, nullable: bool = False) -> sa.Column[int]:
    return sa.Column(name, _COUNT, nullable=nullable)


def _instant(name: str, *, nullable: bool = False) -> sa.Column[str]:
    return sa.Column(name, _INSTANT, nullable=nullable)


def _json(name: str) -> sa.Column[object]:
    return sa.Column(name, sa.JSON, nullable=False)
