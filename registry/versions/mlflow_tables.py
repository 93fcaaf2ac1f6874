"""Reads and corrects MLflow's tables of models, versions, aliases and runs by SQL.

A read takes milliseconds; importing MLflow takes seconds. MLflow's client cannot restore a deleted version.
"""

from __future__ import annotations

import os
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from urllib.request import url2pathname

from sqlalchemy import (
    Connection,
    Row,
    TableClause,
    column,
    create_engine,
    delete,
    insert,
    inspect,
    null,
    select,
    table,
    update,
)
from sqlalchemy.exc import SQLAlchemyError

from registry.errors import MlflowError
from registry.refs import version_number
from registry.store.damaged import show_cell
from registry.store.database import batches, name_of, parse_url
from registry.store.redaction import redact

PREFIX = "loraline."
"""Start of the names of all tags that the registry writes."""
TRAINING = f"{PREFIX}training."
TRAINING_KEY, TRAINING_RUN = f"{TRAINING}key", f"{TRAINING}run"
"""Tags of a run that shows a training: the cache key of its step, and the run of its pipeline."""
NO_STAGE, DELETED = "None", "Deleted_Internal"
"""Stages of a model version: none, and that of a version which MLflow deleted; its row remains."""
_TIMEOUT_VARIABLE = "LORALINE_MLFLOW_TIMEOUT"
_TIMEOUT = 20
"""Seconds to wait for a connection to MLflow's database server."""

_MODELS = table("registered_models", column("name"))
_VERSIONS = table(
    "model_versions",
    *map(column, ("name", "version", "current_stage", "run_id", "source", "run_link", "status", "status_message")),
)
_VERSION_TAGS = table("model_version_tags", *map(column, ("name", "version", "key", "value")))
_ALIASES = table("registered_model_aliases", *map(column, ("name", "alias", "version")))
_RUNS = table("runs", *map(column, ("run_uuid", "lifecycle_stage", "status", "end_time")))
_OPTIONAL = {"value", "source", "run_id", "lifecycle_stage", "current_stage"}
_RUN_TAGS = table("tags", *map(column, ("run_uuid", "key", "value")))


@dataclass(frozen=True)
class MlflowVersion:
    """A model version as MLflow has it.

    Attributes:
        stage: Its stage; `None` for a version without one.
        run_id: Its run.
        source: URI of the folder with its files.
        tags: Its tags whose names start with `PREFIX`.
        run_stage: `active` or `deleted`; None if its run does not exist.
        run_tags: The tags of its run whose names start with `PREFIX`.
    """

    stage: str
    run_id: str
    source: str
    tags: Mapping[str, str]
    run_stage: str | None
    run_tags: Mapping[str, str]


@dataclass(frozen=True)
class MlflowTables:
    """What MLflow has of one registered model or of all.

    Attributes:
        models: Names of the registered models.
        versions: (name, number) -> version; without deleted versions.
        aliases: (name, alias) -> number.
    """

    models: frozenset[str] = frozenset()
    versions: Mapping[tuple[str, int], MlflowVersion] = field(default_factory=dict)
    aliases: Mapping[tuple[str, str], int] = field(default_factory=dict)


def read_models(url: str) -> frozenset[str]:
    """Reads the names of the registered models; raises as `read_tables` does."""
    with _connected(url) as connection:
        if not inspect(connection).has_table(_MODELS.name):
            return frozenset()
        rows = connection.execute(select(_MODELS.c.name))
        return frozenset(name for row in rows for name in _checked(_MODELS, ("name",), row))


def read_tables(url: str, name: str | None = None) -> MlflowTables:
    """Reads one registered model, or all; empty if MLflow has not created its tables yet.

    Args:
        url: SQLAlchemy URL of MLflow's database.
        name: The registered model; None reads all.

    Raises:
        MlflowError: The database cannot be read; a server must answer within seconds.
    """
    with _connected(url) as connection:
        if not inspect(connection).has_table(_MODELS.name):
            return MlflowTables()

        def rows(source: TableClause, *names: str) -> Iterator[tuple[Any, ...]]:
            query = select(*(source.c[key] for key in names))
            query = query.where(source.c.name == name) if name is not None else query
            yield from (_checked(source, names, row) for row in connection.execute(query))

        entries = list(rows(_VERSIONS, "name", "version", "current_stage", "run_id", "source"))
        tags: dict[tuple[str, int], dict[str, str]] = defaultdict(dict)
        for model, version, key, value in rows(_VERSION_TAGS, "name", "version", "key", "value"):
            if key.startswith(PREFIX):
                tags[model, int(version)][key] = value or ""
        run_stages, run_tags = _read_runs(connection, {row[3] for row in entries})
        versions = {
            (model, int(version)): MlflowVersion(
                stage, run, source, tags[model, int(version)], run_stages.get(run), run_tags[run]
            )
            for model, version, stage, run, source in entries
            if stage != DELETED
        }
        aliases = {(model, alias): int(version) for model, alias, version in rows(_ALIASES, "name", "alias", "version")}
        return MlflowTables(frozenset(model for (model,) in rows(_MODELS, "name")), versions, aliases)


def _checked(source: TableClause, names: Sequence[str], row: Row[Any]) -> tuple[Any, ...]:
    """Returns a row whose key, names and numbers have the right type."""
    for name, value in zip(names, row, strict=True):
        if name == "version":
            is_valid = version_number(value if isinstance(value, int) else str(value)) is not None
        else:
            is_valid = isinstance(value, str) or (value is None and name in _OPTIONAL)
        if not is_valid:
            raise MlflowError(
                f"the column {name!r} is damaged: it is {show_cell(value)}",
                where=f"row {', '.join(show_cell(key) for key in row[:2])} of MLflow's table {source.name}",
                remedy="`loraline fsck --repair` rebuilds MLflow's database",
            )
    return tuple(row)


def _read_runs(connection: Connection, ids: set[str]) -> tuple[dict[str, str], dict[str, dict[str, str]]]:
    stages: dict[str, str] = {}
    tags: dict[str, dict[str, str]] = defaultdict(dict)
    for batch in batches(ids):
        query = select(_RUNS.c.run_uuid, _RUNS.c.lifecycle_stage).where(_RUNS.c.run_uuid.in_(batch))
        stages.update(_checked(_RUNS, ("run_uuid", "lifecycle_stage"), row) for row in connection.execute(query))
        query = select(_RUN_TAGS.c.run_uuid, _RUN_TAGS.c.key, _RUN_TAGS.c.value)
        for row in connection.execute(query.where(_RUN_TAGS.c.run_uuid.in_(batch))):
            run, key, value = _checked(_RUN_TAGS, ("run_uuid", "key", "value"), row)
            if key.startswith(PREFIX):
                tags[run][key] = value or ""
    return stages, tags


def reset_version(url: str, name: str, version: int, run_id: str, source: str) -> None:
    """Gives a model version its run and source, and no stage; also one that was deleted. Does nothing without a row.

    Raises:
        MlflowError: The database cannot be written.
    """
    values = {"current_stage": NO_STAGE, "run_id": run_id, "source": source, "run_link": null(), "status": "READY"}
    statement = update(_VERSIONS).where(_VERSIONS.c.name == name, _VERSIONS.c.version == version)
    with _connected(url) as connection:
        connection.execute(statement.values(**values, status_message=null()))


def write_alias(url: str, name: str, alias: str, version: int | None) -> bool:
    """Points an alias of a registered model at a version, or removes it, in one transaction.

    Args:
        url: SQLAlchemy URL of MLflow's database.
        name: The registered model.
        alias: The alias.
        version: Number of the version; None removes the alias.

    Returns:
        False if MLflow has no such version, or no tables yet; nothing is changed then.

    Raises:
        MlflowError: The database cannot be written.
    """
    with _connected(url) as connection:
        if not inspect(connection).has_table(_ALIASES.name):
            return version is None
        row = (_ALIASES.c.name == name) & (_ALIASES.c.alias == alias)
        if version is None:
            connection.execute(delete(_ALIASES).where(row))
            return True
        of_version = (_VERSIONS.c.name == name, _VERSIONS.c.version == version, _VERSIONS.c.current_stage != DELETED)
        if connection.execute(select(_VERSIONS.c.version).where(*of_version)).first() is None:
            return False
        if connection.execute(update(_ALIASES).where(row).values(version=version)).rowcount == 0:
            connection.execute(insert(_ALIASES).values(name=name, alias=alias, version=version))
        return True


def has_training(url: str, key: str) -> bool:
    """Returns True if MLflow has a run of the training with a cache key.

    Raises:
        MlflowError: The database cannot be read.
    """
    with _connected(url) as connection:
        if not inspect(connection).has_table(_RUN_TAGS.name):
            return False
        query = select(_RUN_TAGS.c.run_uuid).where(_RUN_TAGS.c.key == TRAINING_KEY, _RUN_TAGS.c.value == key)
        return connection.execute(query.limit(1)).first() is not None


def end_trainings(url: str, is_over: Callable[[str], bool]) -> list[str]:
    """Marks the running trainings whose pipeline is over as KILLED; returns their ids in MLflow.

    Args:
        url: SQLAlchemy URL of MLflow's database.
        is_over: Takes the id of a pipeline's run.

    Raises:
        MlflowError: The database cannot be used.
    """
    with _connected(url) as connection:
        if not inspect(connection).has_table(_RUNS.name):
            return []
        query = select(_RUNS.c.run_uuid, _RUN_TAGS.c.value).join(_RUN_TAGS, _RUN_TAGS.c.run_uuid == _RUNS.c.run_uuid)
        running = connection.execute(query.where(_RUNS.c.status == "RUNNING", _RUN_TAGS.c.key == TRAINING_RUN))
        dead = [run for run, pipeline in running.all() if is_over(pipeline)]
        ended = update(_RUNS).where(_RUNS.c.run_uuid.in_(dead))
        connection.execute(ended.values(status="KILLED", end_time=int(time.time() * 1000)))
        return dead


def require_reachable(url: str) -> None:
    """Raises an error if MLflow's database does not answer; its client would try for an hour.

    Raises:
        MlflowError: No answer within seconds.
    """
    with _connected(url):
        pass


def local_path(uri: str | None) -> Path | None:
    """Returns the path of a `file:` URI or a path; None for another location."""
    parts = urlsplit(uri or "")
    return Path(url2pathname(parts.path)) if parts.scheme in {"", "file"} and parts.path else None


def _timeout() -> int:
    value = os.environ.get(_TIMEOUT_VARIABLE) or str(_TIMEOUT)
    if not value.isdecimal() or not int(value):
        raise MlflowError(f"{value!r} is no timeout", where=_TIMEOUT_VARIABLE, allowed="whole seconds, at least 1")
    return int(value)


@contextmanager
def _connected(url: str) -> Iterator[Connection]:
    """Opens one connection in a transaction."""
    parsed = parse_url(url)
    option = "timeout" if parsed.get_backend_name() == "sqlite" else "connect_timeout"
    engine = create_engine(parsed, connect_args={} if option in parsed.query else {option: _timeout()})
    try:
        with engine.begin() as connection:
            yield connection
    except SQLAlchemyError as error:
        message = str(getattr(error, "orig", None) or error).strip().splitlines()[0]
        raise MlflowError(
            f"MLflow's database cannot be used ({redact(message, url)})",
            where=name_of(url),
            remedy="start the server, or correct the URL; nothing is lost, and the next command syncs MLflow",
        ) from None
    finally:
        engine.dispose()
