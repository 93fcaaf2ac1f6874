"""Counts the rows of a registry for monitoring."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime

from sqlalchemy import func, select
from sqlalchemy.orm import Session

from registry.store.tables import EventRow, ExecutionRow, RunRow, VersionRow


@dataclass(frozen=True)
class RegistryCounts:
    """Numbers of rows; none has a label without rows.

    Attributes:
        versions: (adapter, state) -> versions.
        runs: (pipeline, status) -> runs.
        last_runs: Pipeline -> start of its latest run.
        executions: (kind of step, status) -> executions.
        events: Action -> events of the log.
    """

    versions: Mapping[tuple[str, str], int]
    runs: Mapping[tuple[str, str], int]
    last_runs: Mapping[str, datetime]
    executions: Mapping[tuple[str, str], int]
    events: Mapping[str, int]


def count_rows(session: Session) -> RegistryCounts:
    """Counts versions, runs, executions and events, with one query for each."""
    versions = select(VersionRow.name, VersionRow.state, func.count()).group_by(VersionRow.name, VersionRow.state)
    runs = select(RunRow.name, RunRow.status, func.count()).group_by(RunRow.name, RunRow.status)
    executions = select(ExecutionRow.uses, ExecutionRow.status, func.count()).group_by(
        ExecutionRow.uses, ExecutionRow.status
    )
    started = select(RunRow.name, func.max(RunRow.started_at)).group_by(RunRow.name)
    events = select(EventRow.action, func.count()).group_by(EventRow.action)
    return RegistryCounts(
        {(name, state): number for name, state, number in session.execute(versions)},
        {(name, status): number for name, status, number in session.execute(runs)},
        {row[0]: row[1] for row in session.execute(started)},
        {(uses, status): number for uses, status, number in session.execute(executions)},
        {row[0]: row[1] for row in session.execute(events)},
    )
