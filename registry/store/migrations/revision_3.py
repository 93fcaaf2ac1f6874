"""Schema 3: placeholder."""

revision = "3"
down_revision = "2"


def upgrade() -> None:
    """Changes nothing."""
