"""Rewrites the absolute artifact URIs in MLflow's tables after a home was moved.

Uses SQL on MLflow's tables, because MLflow's clients cannot change these columns.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from urllib.parse import unquote

from sqlalchemy import Connection, column, create_engine, func, inspect, literal, or_, select, table, update

URI_COLUMNS = (
    ("experiments", "artifact_location"),
    ("runs", "artifact_uri"),
    ("model_versions", "source"),
    ("model_versions", "storage_location"),
    ("logged_models", "artifact_location"),
)
"""(table, column) of MLflow 3 that hold an artifact URI."""


def rewrite_artifact_uris(url: str, names: Iterable[str], folder: str) -> dict[str, int]:
    """Rewrites the URIs of our artifacts in MLflow's tables to a new folder, in one transaction.

    Args:
        url: SQLAlchemy URL of MLflow's database.
        names: Adapters, each with an experiment of that name.
        folder: URI of the folder with one subfolder per adapter, without a trailing slash.

    Returns:
        Column (`table.column`) -> number of rewritten URIs; empty if none had to change.
    """
    engine = create_engine(url)
    try:
        with engine.begin() as connection:
            counts: dict[str, int] = {}
            for old in sorted(_old_folders(connection, set(names), folder)):
                for where, count in _rewrite(connection, old, folder).items():
                    counts[where] = counts.get(where, 0) + count
            return {where: count for where, count in counts.items() if count}
    finally:
        engine.dispose()


def confine_artifact_uris(url: str, old: str, folder: str) -> str | None:
    """Rewrites the URIs in MLflow's tables from one folder to another, and returns the first one outside of it.

    MLflow writes and deletes files where these URIs point.

    Args:
        url: SQLAlchemy URL of MLflow's database.
        old: URI of the folder that the URIs name.
        folder: URI of the new folder, without a trailing slash.

    Returns:
        The URI; None if all are inside, or refer to other rows.
    """
    engine = create_engine(url)
    try:
        with engine.begin() as connection:
            if not inspect(connection).has_table("experiments"):
                return None
            _rewrite(connection, old, folder)
            for table_name, uri_column in _uri_columns(connection):
                rows = table(table_name, column(uri_column)).c[uri_column]
                for uri in connection.scalars(select(rows).where(rows.is_not(None), rows != "")):
                    if not _is_inside(str(uri), folder):
                        return str(uri)
            return None
    finally:
        engine.dispose()


def _is_inside(uri: str, folder: str) -> bool:
    path = unquote(uri)
    is_below = uri == folder or uri.startswith(f"{folder}/")
    return uri.startswith(("runs:/", "models:/")) or (is_below and ".." not in path.split("/") and "\\" not in path)


def _old_folders(connection: Connection, names: set[str], folder: str) -> set[str]:
    if not inspect(connection).has_table("experiments"):
        return set()
    experiments = table("experiments", column("name"), column("artifact_location"))
    rows = connection.execute(select(experiments.c.name, experiments.c.artifact_location))
    ours = {uri.removesuffix(f"/{name}") for name, uri in rows if name in names and uri.endswith(f"/{name}")}
    return ours - {folder}


def _uri_columns(connection: Connection) -> Iterator[tuple[str, str]]:
    """Yields the columns in `URI_COLUMNS` that this version of MLflow has."""
    for table_name, uri_column in URI_COLUMNS:
        if uri_column in {entry["name"] for entry in inspect(connection).get_columns(table_name)}:
            yield table_name, uri_column


def _rewrite(connection: Connection, old: str, new: str) -> dict[str, int]:
    counts = {}
    for table_name, uri_column in _uri_columns(connection):
        rows = table(table_name, column(uri_column))
        uri = rows.c[uri_column]
        inside = or_(uri == old, func.substr(uri, 1, len(old) + 1) == f"{old}/")
        statement = update(rows).where(inside).values({uri_column: literal(new).concat(func.substr(uri, len(old) + 1))})
        counts[f"{table_name}.{uri_column}"] = connection.execute(statement).rowcount
    return counts
