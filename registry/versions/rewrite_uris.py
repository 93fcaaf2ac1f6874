"""MLflow notes where artifacts lie as absolute places. After a home was moved, they are put right in MLflow's tables.

Knows MLflow's tables and nothing of its code, since its clients cannot change these columns.
"""

from __future__ import annotations

from collections.abc import Iterable

from sqlalchemy import Connection, column, create_engine, func, inspect, literal, or_, select, table, update

PLACES = (
    ("experiments", "artifact_location"),
    ("runs", "artifact_uri"),
    ("model_versions", "source"),
    ("model_versions", "storage_location"),
    ("logged_models", "artifact_location"),
)
"""The columns of MLflow 3 that hold the place of an artifact."""


def rewrite_artifact_uris(url: str, names: Iterable[str], folder: str) -> dict[str, int]:
    """Moves what MLflow notes of our artifacts to where they lie now, in one transaction.

    Args:
        url: SQLAlchemy URL of MLflow's database.
        names: Adapters, each with an experiment of that name.
        folder: URI of the folder that holds one folder an adapter, without a slash at its end.

    Returns:
        Column (`table.column`) -> how many of its places were moved; empty where nothing had to be.
    """
    engine = create_engine(url)
    try:
        with engine.begin() as connection:
            moved: dict[str, int] = {}
            for old in sorted(_old_folders(connection, set(names), folder)):
                for where, count in _move(connection, old, folder).items():
                    moved[where] = moved.get(where, 0) + count
            return {where: count for where, count in moved.items() if count}
    finally:
        engine.dispose()


def _old_folders(connection: Connection, names: set[str], folder: str) -> set[str]:
    if not inspect(connection).has_table("experiments"):
        return set()
    experiments = table("experiments", column("name"), column("artifact_location"))
    rows = connection.execute(select(experiments.c.name, experiments.c.artifact_location))
    ours = {place.removesuffix(f"/{name}") for name, place in rows if name in names and place.endswith(f"/{name}")}
    return ours - {folder}


def _move(connection: Connection, old: str, new: str) -> dict[str, int]:
    counts = {}
    for name, place in PLACES:
        if place not in {entry["name"] for entry in inspect(connection).get_columns(name)}:
            continue
        rows = table(name, column(place))
        held = rows.c[place]
        inside = or_(held == old, func.substr(held, 1, len(old) + 1) == f"{old}/")
        changed = update(rows).where(inside).values({place: literal(new).concat(func.substr(held, len(old) + 1))})
        counts[f"{name}.{place}"] = connection.execute(changed).rowcount
    return counts
