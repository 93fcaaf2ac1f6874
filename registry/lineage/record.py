"""Records runs, the inputs and outputs of their steps, and finds cached outputs.

Handles digests and rows, never bytes. `registry.lineage.walk` walks the graph.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any
from uuid import uuid4

from sqlalchemy import select, update
from sqlalchemy.orm import Session

from registry.entities import ArtifactRef, Execution, FileEntry, Run, RunStatus, Subject, now
from registry.errors import LineageError
from registry.lineage.graph import Edge, NodeId, Relation, upstream
from registry.lineage.rows import (
    artifact_ref,
    read_executions,
    read_run,
    record_artifacts,
    record_contents,
    store_environment,
)
from registry.lineage.walk import Direction, Walk, walk
from registry.store.database import Database, batched, require_json
from registry.store.redaction import redact, redact_values
from registry.store.tables import ArtifactRow, ExecutionRow, InputRow, RunRow

_WITH_OUTPUT = ("COMPLETED", "CACHED", "ADOPTED")


class Lineage:
    """The table of runs and executions.

    Args:
        url: SQLAlchemy URL of the database; its tables are created on first use.

    Raises:
        HomeError: The database cannot be used, or a newer release wrote it.
    """

    def __init__(self, url: str) -> None:
        self.database = Database(url)

    def close(self) -> None:
        """Closes all connections."""
        self.database.close()

    def start_run(self, name: str, spec: Mapping[str, Any]) -> Run:
        """Records that this process starts to run a spec.

        Raises:
            LineageError: The spec has a value that JSON cannot represent.
        """
        require_json(LineageError, spec, f"spec of run {name!r}")
        run = Run(uuid4().hex, name, redact_values(spec), "RUNNING", os.getpid(), socket.gethostname(), now())
        with self.database.write() as session:
            session.add(RunRow(**vars(run), process=_process_mark(run.pid)))
        return run

    def finish_run(self, run_id: str, status: RunStatus) -> Run:
        """Records the final status of a run; later calls do not change it.

        Raises:
            LineageError: No such run.
        """
        with self.database.write() as session:
            session.execute(
                update(RunRow)
                .where(RunRow.id == run_id, RunRow.status == "RUNNING")
                .values(status=status, ended_at=now())
            )
            return read_run(_get_run(session, run_id))

    def find_dead_runs(self) -> list[Run]:
        """Marks every run of this host whose process does not exist as CRASHED, and returns those runs."""
        with self.database.write() as session:
            running = session.scalars(
                select(RunRow).where(RunRow.status == "RUNNING", RunRow.host == socket.gethostname())
            ).all()
            dead = [row for row in running if not is_alive(row)]
            for row in dead:
                row.status, row.ended_at = "CRASHED", now()
            return [read_run(row) for row in dead]

    def is_dead(self, run_id: str) -> bool:
        """Returns True if a run is recorded as RUNNING, but its process on this host does not exist; writes nothing."""
        with self.database.read() as session:
            row = _get_run(session, run_id)
            return row.status == "RUNNING" and not is_alive(row)

    def run(self, run_id: str) -> Run:
        """Returns the run with that id.

        Raises:
            LineageError: No such run.
        """
        with self.database.read() as session:
            return read_run(_get_run(session, run_id))

    def runs(self, limit: int = 100) -> list[Run]:
        """Returns the latest runs, newest first."""
        with self.database.read() as session:
            rows = session.scalars(select(RunRow).order_by(RunRow.started_at.desc(), RunRow.id).limit(limit))
            return [read_run(row) for row in rows]

    def log_execution(
        self,
        execution: Execution,
        *,
        contents: Mapping[str, FileEntry] | None = None,
        subjects: Iterable[Subject] = (),
    ) -> None:
        """Records a step, its inputs, its output and the contents of the output, in one transaction.

        Args:
            execution: The execution of the step.
            contents: `store.files(execution.output)`; a walk can start at any of these files.
            subjects: External content of the output: images (by digest of the original file), captions (by digest of
                their text), consents (by id). A walk can start at each.

        Raises:
            LineageError: The run does not exist, the execution is already recorded, or a value is not JSON.
        """
        require_json(LineageError, [execution.settings, execution.environment], f"step {execution.step!r}")
        with self.database.write() as session:
            _get_run(session, execution.run_id)
            if session.get(ExecutionRow, execution.id) is not None:
                raise LineageError(f"execution {execution.id!r} is recorded already", remedy="use a unique id")
            record_artifacts(session, execution.inputs.values())
            if execution.output is not None:
                record_artifacts(session, [execution.output])
                record_contents(session, execution.output, contents or {}, subjects)
            values = {**vars(execution), "output": execution.output.sha256 if execution.output else None}
            values["environment"] = store_environment(session, execution.environment)
            # An error may quote arbitrary text, and PostgreSQL text cannot contain NUL.
            values["error"] = execution.error and redact(execution.error).replace("\0", "\ufffd")
            values["settings"] = redact_values(execution.settings)
            inputs = values.pop("inputs")
            session.add(ExecutionRow(**values))
            session.flush()
            session.add_all(
                InputRow(execution=execution.id, role=role, artifact=ref.sha256, position=position)
                for position, (role, ref) in enumerate(inputs.items())
            )

    def find_cached(self, key: str) -> ArtifactRef | None:
        """Returns the latest output that was made, or adopted, under this cache key; does not verify its bytes."""
        with self.database.read() as session:
            row = session.scalars(
                select(ArtifactRow)
                .join(ExecutionRow, ExecutionRow.output == ArtifactRow.sha256)
                .where(ExecutionRow.key == key, ExecutionRow.status.in_(("COMPLETED", "ADOPTED")))
                .order_by(ExecutionRow.started_at.desc())
                .limit(1)
            ).first()
            return None if row is None else artifact_ref(row)

    def last_attempt(self, name: str, step: str) -> Execution | None:
        """Returns the latest execution of a step in any run of the named spec, also a failed one; None if none."""
        with self.database.read() as session:
            row = session.scalars(
                select(ExecutionRow)
                .join(RunRow, RunRow.id == ExecutionRow.run_id)
                .where(RunRow.name == name, ExecutionRow.step == step)
                .order_by(ExecutionRow.started_at.desc())
                .limit(1)
            ).first()
            return None if row is None else read_executions(session, [row])[0]

    def last_execution(self, name: str, step: str) -> Execution | None:
        """Returns the latest execution with an output of a step in any run of the named spec; None if there is none."""
        with self.database.read() as session:
            row = session.scalars(
                select(ExecutionRow)
                .join(RunRow, RunRow.id == ExecutionRow.run_id)
                .where(RunRow.name == name, ExecutionRow.step == step, ExecutionRow.status.in_(_WITH_OUTPUT))
                .order_by(ExecutionRow.started_at.desc())
                .limit(1)
            ).first()
            return None if row is None else read_executions(session, [row])[0]

    def completed_executions(self, uses: str, revision: str, inputs: Collection[str]) -> list[Execution]:
        """Returns the completed executions of a kind and revision of step, latest first.

        Args:
            uses: The kind of step.
            revision: Its revision.
            inputs: Digests of artifacts; each is an input of the returned executions.
        """
        query = select(ExecutionRow).where(
            ExecutionRow.uses == uses, ExecutionRow.revision == revision, ExecutionRow.status == "COMPLETED"
        )
        for digest in inputs:
            query = query.where(ExecutionRow.id.in_(select(InputRow.execution).where(InputRow.artifact == digest)))
        with self.database.read() as session:
            return read_executions(session, session.scalars(query))[::-1]

    def executions(
        self, run_id: str | None = None, *, output: str | None = None, ids: Sequence[str] | None = None
    ) -> list[Execution]:
        """Returns executions by run, output artifact or ids, sorted by start time."""
        query = select(ExecutionRow)
        if run_id is not None:
            query = query.where(ExecutionRow.run_id == run_id)
        if output is not None:
            query = query.where(ExecutionRow.output == output)
        with self.database.read() as session:
            if ids is None:
                return read_executions(session, session.scalars(query))
            return read_executions(session, (row[0] for row in batched(session, query, ExecutionRow.id, ids)))

    def upstream_executions(
        self, artifacts: Iterable[ArtifactRef], follow: Callable[[Execution], Iterable[ArtifactRef]]
    ) -> list[Execution]:
        """Returns the completed executions upstream of artifacts, nearest first.

        Args:
            artifacts: The artifacts to start at.
            follow: Returns the inputs of an execution that the search continues with.
        """
        executions: list[Execution] = []

        def find_inputs(session: Session, ids: Sequence[str]) -> Iterator[Edge]:
            rows = (row for (row,) in batched(session, select(ExecutionRow), ExecutionRow.id, ids))
            for execution in read_executions(session, rows):
                executions.append(execution)
                for ref in follow(execution):
                    yield Edge(NodeId("artifact", ref.sha256), NodeId("execution", execution.id), "input")

        with self.database.read() as session:
            starts = [NodeId("artifact", ref.sha256) for ref in artifacts]
            upstream(session, starts, "output", extra=[Relation("execution", find_inputs)])
        return executions

    def walk(self, start: str, direction: Direction = "up", *, subjects: bool = False) -> Walk:
        """Returns the upstream (`up`) or downstream (`down`) graph of a node.

        Args:
            start: A digest (of an artifact, a file in one, an adapter file, an original image), at least six of its
                first digits, the id of a subject or a run, or `name@version` or `name@alias`.
            direction: `up` for upstream, `down` for downstream.
            subjects: True adds the subjects (images, ...) of every artifact to an upstream walk.

        Raises:
            LineageError: No node, or more than one, has that name.
        """
        with self.database.read() as session:
            return walk(session, start, direction, subjects=subjects)


def _get_run(session: Session, run_id: str) -> RunRow:
    row = session.get(RunRow, run_id)
    if row is None:
        raise LineageError(f"no run {run_id!r}", remedy="start it with `start_run`")
    return row


def is_alive(row: RunRow) -> bool:
    """Returns True if the process of a run exists, or if it is on another host, which cannot be checked."""
    if row.host != socket.gethostname():
        return True
    try:
        os.kill(row.pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    # The system may have reused the process id.
    return not row.process or _process_mark(row.pid) == row.process


def _process_mark(pid: int) -> str:
    """Returns boot id and start time of a process, which identify it if its id is reused; empty if unknown."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
    except OSError:
        return ""
    # A zombie has ended; its parent has not reaped it.
    return "" if fields[0] == "Z" else f"{boot}/{fields[19]}"
