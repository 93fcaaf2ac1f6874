"""Whether all of it still agrees: bytes, digests, rows, events, aliases, MLflow. Reads; `repair` mends."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import closing

from registry import queries
from registry.entities import Problem
from registry.errors import HomeError
from registry.home import Home
from registry.lineage.record import Lineage
from registry.maintenance.check_bytes import check_bytes, check_versions, read_digests
from registry.maintenance.check_mlflow import SYNC, check_mlflow
from registry.maintenance.check_rows import check_log, check_runs, check_sqlite
from registry.maintenance.gc import find_partials
from registry.store.artifacts import Store, open_store
from registry.store.database import sqlite_file

_DATABASE = "restore it from a backup"


def fsck(home: Home, *, grace: float = 3600.0, mlflow: bool = True) -> list[Problem]:
    """Checks every promise of a home and lists what does not hold; an empty list is good news.

    Args:
        home: The home.
        grace: Seconds for which what nothing refers to is taken for work in progress.
        mlflow: Whether to ask MLflow too, which takes a few seconds.
    """
    # A server looks after its own files.
    own, mirrored = sqlite_file(home.lineage_url), sqlite_file(home.mlflow_url)
    problems = check_sqlite(own, _DATABASE) if own else []
    if problems:
        return problems
    store = open_store(home)
    try:
        lineage = Lineage(home.lineage_url)
    except HomeError as error:
        return [Problem(error.problem, error.where, error.remedy)]
    with closing(lineage), lineage.database.read() as session:
        versions = queries.read_versions(session)
        # After the rows, which stay as they were seen: what they name was stored before.
        problems += check_bytes(session, store, read_digests(store), grace)
        problems += check_versions(store, versions)
        problems += check_log(session)
        problems += check_runs(session)
        aliases = queries.alias_table(session)
    problems += _check_leftovers(home, store, grace)
    if mlflow and (versions or (mirrored and mirrored.exists())):
        broken = check_sqlite(mirrored, SYNC) if mirrored else []
        problems += broken or check_mlflow(home, store, versions, aliases)
    return problems


def _check_leftovers(home: Home, store: Store, grace: float) -> Iterator[Problem]:
    oldest = time.time() - grace
    what, remedy = "left over by a process that died while it wrote", "`loraline gc` takes it away"
    for stray in store.blobs.orphans():
        if stray.modified < oldest:
            yield Problem(what, f"{stray.name} in the store", remedy, "leftover")
    for path in find_partials(home):
        try:
            is_old = path.lstat().st_mtime < oldest
        except FileNotFoundError:
            continue  # its writer has finished
        if is_old:
            yield Problem(what, str(path), remedy, "leftover")
