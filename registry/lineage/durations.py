"""Reads how long earlier executions took, and how much they wrote."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from sqlalchemy import select

from registry.lineage.record import Lineage
from registry.store.tables import ArtifactRow, ExecutionRow, RunRow

_LATEST = 500


@dataclass(frozen=True)
class PastExecution:
    """A completed execution.

    Attributes:
        pipeline: Name of the pipeline.
        uses: The kind of step.
        seconds: From its start to its end, with the time that it waited for a device.
        size: Bytes of its output.
        settings: The settings of the step.
        device: The device that it computed on; empty if unknown.
    """

    pipeline: str
    uses: str
    seconds: float
    size: int
    settings: Mapping[str, Any]
    device: str


def past_executions(lineage: Lineage, uses: Collection[str]) -> list[PastExecution]:
    """Returns the latest completed executions of some kinds of steps, latest first; at most 500 of each kind."""
    found = []
    with lineage.database.read() as session:
        for kind in sorted(set(uses)):
            query = (
                select(ExecutionRow, RunRow.name, ArtifactRow.size)
                .join(RunRow, RunRow.id == ExecutionRow.run_id)
                .join(ArtifactRow, ArtifactRow.sha256 == ExecutionRow.output)
                .where(
                    ExecutionRow.uses == kind, ExecutionRow.status == "COMPLETED", ExecutionRow.ended_at.is_not(None)
                )
                .order_by(ExecutionRow.started_at.desc())
                .limit(_LATEST)
            )
            for row, name, size in session.execute(query):
                seconds = max(0.0, (row.ended_at - row.started_at).total_seconds())
                settings = row.settings.get("settings", {}) if isinstance(row.settings, dict) else {}
                compute = row.environment.get("compute") if isinstance(row.environment, dict) else None
                device = str(compute.get("device", "")) if isinstance(compute, dict) else ""
                found.append(PastExecution(name, kind, seconds, size, settings, device))
    return found
