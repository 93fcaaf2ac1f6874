"""Checks MLflow against the registry. Part of `registry.maintenance.fsck`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path

from lora_engine.files import sha256_file
from registry.entities import AdapterVersion, Problem
from registry.errors import MlflowError
from registry.home import Home
from registry.store.database import Database
from registry.versions.mlflow_drift import find_drift
from registry.versions.mlflow_sync import find_unsynced
from registry.versions.mlflow_tables import MlflowTables, local_path, read_tables

SYNC = "`loraline fsck --repair` syncs MLflow, or rebuilds it"


def check_mlflow(home: Home, database: Database, versions: Sequence[AdapterVersion]) -> Iterator[Problem]:
    """Compares versions, tags, aliases, runs and file copies, and yields the differences.

    Args:
        home: The home.
        database: Its database.
        versions: The registered versions.
    """
    try:
        drift, tables = find_drift(home, database), read_tables(home.mlflow_url)
        unsynced = _find_unsynced(home, database)
    except MlflowError as error:
        yield Problem(error.problem, error.where, error.remedy)
        return
    yield from (Problem(difference.problem.what, difference.problem.where, SYNC) for difference in drift)
    for ref in unsynced:
        yield Problem("MLflow does not have its current state", f"MLflow's {ref}", SYNC)
    yield from _check_copies(versions, tables)
    known = {(version.name, version.version) for version in versions}
    for name, number in sorted(tables.versions.keys() - known):
        yield Problem("MLflow has a version that the registry does not have", f"MLflow's {name}@{number}", SYNC)


def _find_unsynced(home: Home, database: Database) -> list[str]:
    """Returns what MLflow does not have yet, after a process that syncs has ended."""
    unsynced = find_unsynced(home, database)
    if unsynced:
        with suppress(OSError), home.lock("mlflow"):  # a read-only home has no locks
            return find_unsynced(home, database)
    return unsynced


def _check_copies(versions: Sequence[AdapterVersion], tables: MlflowTables) -> Iterator[Problem]:
    for version in versions:
        entry = tables.versions.get((version.name, version.version))
        folder = local_path(entry.source) if entry else None
        if folder is None or version.state == "DELETED":
            continue
        copy = folder / Path(version.adapter_path).name
        where = f"MLflow's {version.ref}: {copy}"
        if not copy.is_file():
            yield Problem("MLflow's copy of the adapter is missing", where, SYNC)
            continue
        actual = sha256_file(copy)
        if actual != version.sha256:
            yield Problem(f"MLflow's copy has digest {actual} instead of {version.sha256}", where, SYNC)
