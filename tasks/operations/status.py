"""Reads the runs of a home, those in progress included: their steps, measurements, warnings and versions."""

from __future__ import annotations

from contextlib import closing
from dataclasses import dataclass, replace
from datetime import datetime
from typing import Any

from registry import queries
from registry.entities import AdapterVersion, Run
from registry.home import Home
from registry.lineage.record import Lineage
from registry.policy.conditions import AliasState, find_lockouts, read_alias_states
from registry.store.redaction import redact_values
from registry.versions.live_run import end_dead_trainings
from registry.versions.versions import Versions
from tasks.run_entry import read_points, read_run_steps

_MOST_RUNS = 200
_UNFINISHED = {"waiting": "not started", "running": "stopped"}
"""State of a step in the entry of a run that has ended -> what it was at the end."""


@dataclass(frozen=True)
class StepStatus:
    """A step of a run.

    Attributes:
        name: Its name.
        uses: Its kind.
        state: `waiting`, `running`, `cached`, `completed`, `failed`, and in a run that ended `not started`, `stopped`.
        done: Completed units of work, such as training steps.
        total: All units; 0 means unknown.
        values: Its latest measurements.
        text: Why it waits, or its error.
        warnings: Its warnings.
        samples: Sample images of a training: steps done -> files. The files exist while it runs.
    """

    name: str
    uses: str
    state: str
    done: int
    total: int
    values: dict[str, float]
    text: str
    warnings: list[str]
    samples: dict[int, list[str]]


@dataclass(frozen=True)
class RunState:
    """A run of a pipeline.

    Attributes:
        run: Its record; its status is CRASHED if its process is gone.
        steps: Its steps in the order of the pipeline; empty if the home keeps no entry of it any more.
        versions: The versions that it registered.
    """

    run: Run
    steps: list[StepStatus]
    versions: list[AdapterVersion]

    def to_json(self) -> dict[str, Any]:
        """Returns JSON values; versions as `name@version` with alias and gates."""
        run = {name: getattr(self.run, name) for name in ("id", "name", "status", "pid", "host")}
        times = {
            name: time.isoformat() if (time := getattr(self.run, name)) else None for name in ("started_at", "ended_at")
        }
        versions = [
            {"version": version.ref, "aliases": list(version.aliases), "gates": version.gate_status}
            for version in self.versions
        ]
        return {**run, **times, "steps": [vars(step) for step in self.steps], "versions": versions}


@dataclass(frozen=True)
class AdapterSummary:
    """An adapter, as the latest of its versions that is neither withdrawn nor deleted.

    Attributes:
        name: Its name.
        version: Number of that version.
        created_at: Time at which it was registered.
        gates: Its gate status.
        versions: Number of such versions.
    """

    name: str
    version: int
    created_at: datetime
    gates: str
    versions: int


def summarize_adapters(home: Home, name: str | None = None) -> list[AdapterSummary]:
    """Returns a summary of each adapter with an active version, by name.

    Args:
        home: The home.
        name: The adapter to show; None shows all.
    """
    if not has_tables(home):
        return []
    with closing(Lineage(home.lineage_url)) as lineage, lineage.database.read() as session:
        return [
            AdapterSummary(version.name, version.version, version.created_at, version.gate_status, number)
            for version, number in queries.read_latest(session, name)
        ]


def read_status(home: Home, limit: int = 5, name: str | None = None) -> list[RunState]:
    """Returns all runs in progress and the latest others, newest first.

    Marks trainings of dead processes in MLflow as KILLED if the home can be written.

    Args:
        home: The home.
        limit: Most runs that have ended.
        name: The pipeline to show; None shows all.
    """
    if not has_tables(home):
        return []
    with closing(Lineage(home.lineage_url)) as lineage:
        runs = [run for run in lineage.runs(limit=_MOST_RUNS) if name is None or run.name == name]
        dead = {run.id for run in runs if run.status == "RUNNING" and lineage.is_dead(run.id)}
        if dead and not home.read_only:
            lineage.find_dead_runs()
            end_dead_trainings(home, lineage)
        ended = [run.id for run in runs if run.status != "RUNNING" or run.id in dead][:limit]
        shown = [run for run in runs if run.id in ended or (run.status == "RUNNING" and run.id not in dead)]
        with lineage.database.read() as session:
            versions = queries.read_versions_of_runs(session, [run.id for run in shown])
    return [_state(home, run, run.id in dead, versions) for run in shown]


def read_aliases(home: Home, name: str | None = None) -> tuple[list[AliasState], dict[str, str]]:
    """Returns the aliases with what their policies demand in vain, and the policies that nobody can meet, by alias.

    Args:
        home: The home.
        name: The adapter to show; None shows all.
    """
    if not has_tables(home):
        return [], {}
    with closing(Versions(home)) as versions, versions.lineage.database.read() as session:
        return read_alias_states(versions, session, name), dict(find_lockouts(versions, session))


def has_tables(home: Home) -> bool:
    """Returns True if the home's database has been created; reading would create it otherwise."""
    return home.exists and bool(home.settings.database or home.lineage_db.exists())


def _state(home: Home, run: Run, is_dead: bool, versions: list[AdapterVersion]) -> RunState:
    run = replace(run, status="CRASHED") if is_dead else run
    steps = [_step(home, run, values) for values in read_run_steps(home, run.id)]
    return RunState(run, steps, [version for version in versions if version.run_id == run.id])


def _step(home: Home, run: Run, values: dict[str, Any]) -> StepStatus:
    name, state = str(values["name"]), str(values.get("state"))
    points = read_points(home, run.id, name)
    return StepStatus(
        name,
        str(values.get("uses")),
        state if run.status == "RUNNING" else _UNFINISHED.get(state, state),
        int(values.get("done", 0)),
        int(values.get("total", 0)),
        dict(values.get("values", {})),
        redact_values(str(values.get("text", ""))),
        list(values.get("warnings", ())),
        {point["step"]: point["samples"] for point in points if "samples" in point},
    )
