"""Schema 4: digests of what adapters do; the kind is part of the key of subjects and revocations."""

import json
from typing import Any

import sqlalchemy as sa
from alembic import op

revision = "4"
down_revision = "3"

_COUNT = sa.BigInteger().with_variant(sa.Integer(), "sqlite")
_TEXT = sa.String().with_variant(sa.String(collation="C"), "postgresql")


def upgrade() -> None:
    """Adds a table, and makes two tables again with wider keys."""
    op.create_table(
        "content_digests",
        sa.Column("artifact", _TEXT, sa.ForeignKey("artifacts.sha256"), primary_key=True),
        sa.Column("digest", _TEXT, primary_key=True),
        sa.Column("kind", _TEXT, nullable=False),
        sa.Column("sketch", _TEXT, nullable=True),
    )
    op.create_index("ix_content_digests_digest", "content_digests", ["digest"])
    _widen_subjects()
    _widen_revocations()


def _widen_subjects() -> None:
    rows = _take("SELECT artifact, kind, subject, label FROM subjects")
    op.drop_table("subjects")
    table = op.create_table(
        "subjects",
        sa.Column("artifact", _TEXT, sa.ForeignKey("artifacts.sha256"), primary_key=True),
        sa.Column("subject", _TEXT, primary_key=True),
        sa.Column("label", _TEXT, nullable=False),
        sa.Column("kind", _TEXT, primary_key=True),
    )
    op.create_index("ix_subjects_subject", "subjects", ["subject"])
    op.bulk_insert(table, rows)


def _widen_revocations() -> None:
    query = "SELECT r.subject, r.seq, e.details FROM revocations r JOIN events e ON e.seq = r.seq"
    rows = [{"kind": _kind(row.pop("details")), **row} for row in _take(query)]
    op.drop_table("revocations")
    table = op.create_table(
        "revocations",
        sa.Column("kind", _TEXT, primary_key=True),
        sa.Column("subject", _TEXT, primary_key=True),
        sa.Column("seq", _COUNT, sa.ForeignKey("events.seq"), nullable=False),
    )
    op.bulk_insert(table, rows)


def _take(query: str) -> list[dict[str, Any]]:
    return [dict(row) for row in op.get_bind().execute(sa.text(query)).mappings()]


def _kind(details: Any) -> str:
    """Returns the kind that an event states; an image for a damaged one, as earlier releases read it."""
    try:
        stated = json.loads(details) if isinstance(details, str) else details
        return str(stated.get("kind", "picture"))
    except (ValueError, AttributeError):
        return "picture"
