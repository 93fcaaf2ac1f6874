"""Checks the consistency of a home: bytes, digests, rows, events, policies, MLflow. Reads only; `repair` writes."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing

from sqlalchemy.exc import StatementError

from registry import queries
from registry.context import RegistryContext
from registry.entities import Problem
from registry.errors import DamagedRow, HomeError
from registry.home import Home
from registry.lineage.record import Lineage
from registry.maintenance.check_bytes import check_bytes, check_versions, read_digests
from registry.maintenance.check_chain import KnownHead, check_chain
from registry.maintenance.check_mlflow import SYNC, check_mlflow
from registry.maintenance.check_policies import check_policies, check_signatures, signature_heads
from registry.maintenance.check_rows import check_cells, check_log, check_runs, check_sqlite, is_fatal
from registry.maintenance.gc import find_partials
from registry.store.artifacts import Store, open_store
from registry.store.database import sqlite_file

_DATABASE = "restore it from a backup"


def fsck(home: Home, *, grace: float = 3600.0, mlflow: bool = True, heads: Sequence[KnownHead] = ()) -> list[Problem]:
    """Checks a home and returns all problems; an empty list means that it is consistent.

    Args:
        home: The home.
        grace: Seconds for which an unreferenced file counts as work in progress.
        mlflow: True checks MLflow too, which takes a few seconds.
        heads: Heads of the log that the user knows; those of signatures are known anyway.
    """
    # A database server checks its own files.
    own, mlflow_file = sqlite_file(home.lineage_url), sqlite_file(home.mlflow_url)
    store = open_store(home)
    if own and not own.exists() and not any(store.blobs.digests()) and not (mlflow_file and mlflow_file.exists()):
        return []  # nothing was ever registered
    problems = check_sqlite(own, _DATABASE, copy=home.read_only) if own else []
    if any(is_fatal(problem) for problem in problems):
        return problems
    try:
        lineage = Lineage(home.lineage_url)
    except HomeError as error:
        return [Problem(error.problem, error.where, error.remedy)]
    context = RegistryContext(home, store=store, lineage=lineage)
    with closing(lineage):
        with lineage.database.read() as session:
            problems += check_cells(session)
            is_damaged = bool(problems)
            versions = queries.read_versions(session)
            # The bytes come after the rows: a row is written after its blobs, and this session sees no later rows.
            for check in (
                lambda: check_bytes(session, store, read_digests(store), grace),
                lambda: check_versions(store, versions),
                lambda: check_chain(session, [*heads, *signature_heads(context, versions)]),
                lambda: check_log(session),
                lambda: check_signatures(session, versions),
                lambda: check_policies(context, session),
                lambda: check_runs(session),
            ):
                problems += _readable(check, is_damaged)
        problems += _check_leftovers(home, store, grace)
        if mlflow and (versions or (mlflow_file and mlflow_file.exists())):
            broken = check_sqlite(mlflow_file, SYNC, copy=home.read_only) if mlflow_file else []
            problems += broken or _readable(lambda: check_mlflow(home, lineage.database, versions), is_damaged)
    return problems


def _readable(check: Callable[[], Iterable[Problem]], is_damaged: bool) -> Iterator[Problem]:
    """Yields the problems of a check, up to a damaged cell, which `check_cells` has named."""
    try:
        yield from check()
    except (DamagedRow, StatementError):
        if not is_damaged:
            raise


def _check_leftovers(home: Home, store: Store, grace: float) -> Iterator[Problem]:
    oldest = time.time() - grace
    problem, remedy = "unfinished file of a killed process", "`loraline gc` deletes it"
    for orphan in store.blobs.orphans():
        if orphan.modified < oldest:
            yield Problem(problem, f"{orphan.name} in the store", remedy, "leftover")
    for path in find_partials(home):
        try:
            is_old = path.lstat().st_mtime < oldest
        except FileNotFoundError:
            continue  # its writer has finished
        if is_old:
            yield Problem(problem, str(path), remedy, "leftover")
